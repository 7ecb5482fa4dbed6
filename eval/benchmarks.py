"""The benchmarks. A new one is a file beside this one, a line in the tuple, and a script that names it."""

from __future__ import annotations

from eval import amber, chair, hallusionbench, llavabench, mmhal, mmstar, mmvet, objhal, pope
from eval.core.benchmark import Benchmark

BENCHMARKS: tuple[Benchmark, ...] = (
    objhal.BENCHMARK,
    amber.BENCHMARK,
    chair.BENCHMARK,
    mmhal.BENCHMARK,
    hallusionbench.BENCHMARK,
    llavabench.BENCHMARK,
    mmvet.BENCHMARK,
    mmstar.BENCHMARK,
    pope.BENCHMARK,
)


def names() -> list[str]:
    """Return the benchmarks' names, in the order of the tuple."""
    return [benchmark.name for benchmark in BENCHMARKS]


def named(name: str) -> Benchmark:
    """Return the benchmark of this name or alias. Raises ValueError for an unknown one."""
    for benchmark in BENCHMARKS:
        if name in (benchmark.name, *benchmark.aliases):
            return benchmark
    raise ValueError(f"benchmark: expected one of {', '.join(names())}, got {name!r}")
