"""docs/evaluation.md states the decoding, judges and metrics that the benchmarks' descriptions have."""

import re
from pathlib import Path

import pytest

from eval.benchmarks import BENCHMARKS
from eval.task import Task

pytestmark = pytest.mark.fast

PAGE = (Path(__file__).resolve().parents[2] / "docs/evaluation.md").read_text(encoding="utf-8")


def table(heading: str) -> list[list[str]]:
    """Cells of the first table of a section; an empty first cell is that of the row above."""
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if line[:1] == "|"]
    for above, row in zip(rows, rows[1:]):
        row[0] = row[0] or above[0]
    return rows[2:]


def benchmark_of(cell: str):
    """The benchmark that a row is about."""
    (found,) = [benchmark for benchmark in BENCHMARKS if benchmark.title.startswith(cell.partition(",")[0])]
    return found


def numbers(cell: str) -> set[int]:
    return {int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", cell)}


def test_decoding_is_the_published_one():
    rows = {benchmark_of(row[0]).name: row for row in table("Protocols")}
    assert set(rows) == {benchmark.name for benchmark in BENCHMARKS}
    for benchmark in BENCHMARKS:
        tasks = [Task(benchmark, mode, None) for mode in benchmark.modes]
        decoding = [task.decoding(part) for task in tasks for part in benchmark.parts]
        _, _, tokens, beams, _ = rows[benchmark.name]
        assert numbers(tokens) == {each.max_new_tokens for each in decoding}, benchmark.name
        assert numbers(beams) == {each.num_beams for each in decoding}, benchmark.name
        assert {each.temperature for each in decoding} == {0.0}


def test_judges_are_those_of_the_authors():
    rows = {benchmark_of(row[0]).name: row for row in table("Judges")}
    assert set(rows) == {benchmark.name for benchmark in BENCHMARKS if benchmark.judge is not None}
    for benchmark in BENCHMARKS:
        if benchmark.judge is not None:
            _, model, temperature, _ = rows[benchmark.name]
            assert (model, float(temperature.split()[0])) == (benchmark.judge.model, benchmark.judge.temperature)


@pytest.mark.parametrize("benchmark", BENCHMARKS, ids=lambda benchmark: benchmark.name)
def test_metrics_exist(benchmark):
    named = {
        name
        for row in table("Metrics")
        if benchmark_of(row[0]) is benchmark
        for name in re.findall(r"`([a-z0-9_]+)`", " ".join(row[1:]))
    }
    assert named and named <= {metric.name for metric in benchmark.metrics}


def test_the_first_table_names_every_script():
    scripts = set(re.findall(r"`(eval_\w+\.sh)`", PAGE.partition("\n## ")[0]))
    assert scripts == {f"eval_{benchmark.name}.sh" for benchmark in BENCHMARKS}
