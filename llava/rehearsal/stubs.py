"""One-line C functions for what torch imports from CUDA's libraries and null_cuda.c does not define."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

# Libraries whose functions need a stand-in, with the status that a stand-in returns. Calls into the mathematical
# libraries are kernels like any other: they succeed and do nothing. The rest of the runtime (graphs, memory pools,
# sharing between processes) is not rehearsed and is refused: cudaErrorNotSupported.
STATUS = {
    "libcudart": 801,
    "libcublas": 0,
    "libcublasLt": 0,
    "libcusolver": 0,
    "libcusparse": 0,
    "libcusparseLt": 0,
    "libcufft": 0,
    "libcurand": 0,
}
# Functions of libcuda, which no wheel holds; every other library's prefix continues in lower case.
DRIVER = re.compile(r"cu[A-Z]\w+")


def symbols(library: Path, which: str) -> set[str]:
    """Names of a shared library's dynamic symbols; `which` is "defined" or "undefined"."""
    done = subprocess.run(["nm", "-D", f"--{which}-only", str(library)], capture_output=True, text=True, check=True)
    return {line.split()[-1].split("@")[0] for line in done.stdout.splitlines()}


def stand_ins(torch_libraries: Iterable[Path], cuda_libraries: Iterable[Path], source: str) -> str:
    """C source of the stand-ins.

    Args:
        torch_libraries: what is loaded into the process.
        cuda_libraries: where their undefined symbols are defined.
        source: text of null_cuda.c, whose own functions get none.
    """
    needed = set().union(*(symbols(library, "undefined") for library in torch_libraries))
    status = {name: 0 for name in needed if DRIVER.fullmatch(name)}
    for library in cuda_libraries:
        kind = library.name.split(".")[0]
        status |= dict.fromkeys(needed & symbols(library, "defined"), STATUS[kind])
    written = set(re.findall(r"(\w+)\(", source))
    lines = ["extern unsigned long nullcuda_gemms;"]
    lines += [stand_in(name, status[name]) for name in sorted(set(status) - written)]
    return "\n".join(lines) + "\n"


def stand_in(name: str, status: int) -> str:
    """Return the C source of a function that only returns a status."""
    count = "__atomic_add_fetch(&nullcuda_gemms, 1, __ATOMIC_RELAXED); " if "gemm" in name.lower() else ""
    return f"int {name}(void) {{ {count}return {status}; }}"
