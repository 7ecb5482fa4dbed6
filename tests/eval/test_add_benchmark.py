"""A benchmark costs one file and one line: that of docs/howto/add_benchmark.md goes through every command.

None of these names a benchmark.
"""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from eval import benchmarks, compare, download, evaluate, page, summary
from eval.core.benchmark import Benchmark, SummaryColumn
from eval.core.metrics import Metric, resampling_units
from eval.core.scores import Score
from eval.core.statistics import Interval
from eval.core.types import Answer
from eval.page_items import unpacked
from eval.results import read_all
from tests.eval import tiny_bench
from tests.howto import code_of
from tests.openai_server import ScriptedServer

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = str(ROOT / "playground/tinycoco/weights/llava")
GENERIC = ("evaluate", "evaluate_flags", "task", "results", "compare", "compare_curves", "wording", "page",
           "page_items", "page_images", "summary", "download")  # fmt: skip


def run_page(file: str) -> dict[str, Any]:
    """The names in a file of the page."""
    names: dict[str, Any] = {"__name__": Path(file).stem}
    exec(code_of("add_benchmark.md", file), names)
    return names


BENCHMARK: Benchmark = run_page("eval/toy.py")["BENCHMARK"]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The tuple with the toy in it, and a data folder: three scenes with a question about a thing and a missing one."""
    monkeypatch.setattr(benchmarks, "BENCHMARKS", (*benchmarks.BENCHMARKS, BENCHMARK))
    folder = tmp_path / "data"
    monkeypatch.setenv("DAMA_BENCH_DATA", str(folder))
    monkeypatch.setattr(sys, "argv", ["make_toy.py", str(folder)])
    run_page("make_toy.py")
    tiny_bench.record(folder)
    return folder


def scored(data: Path, reply: Callable[[str], str]) -> Score:
    """The score of answers: id of a question -> text."""
    loaded = BENCHMARK.load(data, "")
    return BENCHMARK.score(loaded, [Answer(q.id, "", q.prompt, reply(q.id)) for q in loaded.questions])


def test_items_are_scored_in_groups(data: Path) -> None:
    """Answers yes yes, yes no, ? no: 4 of 6 are right, and both of one image of three. 4 / 6 + 1 / 3 = 1."""
    replies = {"0yes": "Yes", "0no": "Yes", "1yes": "yes", "1no": "no", "2yes": "Perhaps", "2no": "No"}
    score = scored(data, replies.__getitem__)
    assert score.metrics == pytest.approx({"toy_score": 100.0, "accuracy": 400 / 6, "both": 100 / 3, "silent": 100 / 6})
    assert score.counts == {"answers": 6, "missing": 0, "unparsed": 1, "incomplete images": 0}
    assert [item["groups"] for item in score.items[:3]] == [
        {"images": "0.png"},
        {"images": "0.png"},
        {"images": "1.png"},
    ]
    assert score.interval("both").value == pytest.approx(100 / 3)


def test_a_group_that_lacks_an_answer_is_counted_and_excluded(data: Path) -> None:
    """Of three images one has both answers, both right; another lacks an answer, and its other one still counts."""
    loaded = BENCHMARK.load(data, "")
    answers = [Answer(q.id, "", q.prompt, q.truth) for q in loaded.questions][:3]
    score = BENCHMARK.score(loaded, answers)
    assert score.counts == {"answers": 3, "missing": 3, "unparsed": 0, "incomplete images": 2}
    assert (score.metrics["both"], score.metrics["accuracy"]) == (100.0, 100.0)


def test_groups_over_several_images_are_resampled_together() -> None:
    """Images a and b share a group, b and c another; d stands alone."""
    groups = [
        ("a", {}),
        ("a", {"pair": "1"}),
        ("b", {"pair": "1"}),
        ("b", {"pair": "2"}),
        ("c", {"pair": "2"}),
        ("d", {}),
    ]
    records = [{"id": str(n), "image_id": image, "image": "", "groups": of} for n, (image, of) in enumerate(groups)]
    assert resampling_units(records) == ["a"] * 5 + ["d"]


def test_from_a_checkpoint_to_the_page(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The real model answers, and a server beside it; scores, table, differences, page and results.json follow."""
    out = tmp_path / "out"
    flags = ["--conv-mode", "v1", "--device", "cpu", "--out", str(out)]
    assert evaluate.main(["toy", CHECKPOINT, *flags]) == 0
    truth = {q.prompt: q.truth for q in BENCHMARK.load(data, "").questions}
    with ScriptedServer(lambda call: next(truth[prompt] for prompt in truth if prompt in call.text)) as url:
        served = ["--backend", "openai", "--base-url", url, "--conv-mode", "v1", "--out", str(out)]
        assert evaluate.main(["toy", "oracle", *served]) == 0
    printed = capsys.readouterr().out
    assert "toy score" in printed and "both right %" in printed
    base, oracle = (out / name / "toy/results.json" for name in ("llava", "oracle"))
    content = json.loads(oracle.read_text())
    assert content["metrics"] == {"toy_score": 200.0, "accuracy": 100.0, "both": 100.0, "silent": 0.0}
    assert content["provenance"]["protocol"] == "toy"

    assert compare.main([str(base), str(oracle)]) == 0
    printed = capsys.readouterr().out
    assert "Toy Benchmark" in printed and "oracle - llava" in printed and "--published" not in printed
    rows = {row.metric: row for row in compare.compare([base, oracle]).rows}
    assert list(rows) == ["toy_score", "accuracy", "both", "silent"]
    assert rows["both"].values[1] == Interval(100.0, 100.0, 100.0)

    assert page.main([str(base), str(oracle), "--images", str(data / "toy/images")]) == 0
    text = base.with_name("page.html").read_text()
    items = unpacked(text.split('id="items-data">')[1].split("</script>")[0])
    assert len(items) == 6 and "An answer is wrong where it is not the true yes or no." in text

    assert summary.main([str(out / "llava"), str(out / "oracle"), "--out", str(out)]) == 0
    heading, *lines = (out / "summary.txt").read_text().splitlines()
    assert heading.endswith("A Toy +  A Toy silent -")
    assert next(line for line in lines if "oracle" in line).split()[-2:] == ["200.0", "0.0"]


def test_its_files_are_listed_and_downloaded(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert download.main(["toy", "--list"]) == 0
    lines = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["toy/questions.jsonl", "there", "-", "-", "from http://toy.invalid/questions.jsonl"]
    assert [line[:2] for line in lines[1:]] == [[f"toy/images/{i}.png", "there"] for i in range(3)]
    (data / "toy/images/1.png").unlink()
    with pytest.raises(download.DownloadError, match=r"toy/images/: 1 images \(1.png\), each from http://toy.invalid"):
        download.fetch(["toy"], data, offline=True)


def test_the_commands_help_lists_it(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        evaluate.main(["--help"])
    assert "pope,toy,all" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        download.main(["--help"])
    assert "pope, toy" in " ".join(capsys.readouterr().out.split())


def test_a_description_that_contradicts_itself_is_refused() -> None:
    with pytest.raises(ValueError, match="benchmark toy: column 'bleu' is no metric\nRemedy") as caught:
        replace(BENCHMARK, columns=(SummaryColumn("bleu", "BLEU"),))
    assert "correct its description" in str(caught.value)
    with pytest.raises(ValueError, match="metric 'both' is listed twice"):
        replace(BENCHMARK, metrics=(*BENCHMARK.metrics, Metric("both", "both")))
    with pytest.raises(ValueError, match="'sum' is derived from 'bleu', which is no metric"):
        replace(BENCHMARK, metrics=(*BENCHMARK.metrics, Metric("sum", "sum", inputs=("bleu",), formula=abs)))


def test_no_command_names_a_benchmark() -> None:
    """Neither as a word nor by an import: what is known of one is in its file."""
    names = [*benchmarks.names(), *(benchmark.title for benchmark in benchmarks.BENCHMARKS)]
    named = re.compile(r"(?<![a-z])(" + "|".join(map(re.escape, names)) + r")(?![a-z])", re.IGNORECASE)
    core = [path for path in sorted((ROOT / "eval/core").glob("*.py")) if path.stem not in ("nouns", "objects")]
    for path in [*core, *(ROOT / f"eval/{stem}.py" for stem in GENERIC), ROOT / "eval/page.html.jinja"]:
        found = named.search(path.read_text())
        assert found is None, f"{path}: {found}"


def test_core_imports_no_benchmark() -> None:
    for path in (ROOT / "eval/core").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [node.module] if isinstance(node, ast.ImportFrom) else []
            modules += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert all(not (name or "").startswith("eval") or (name or "").startswith("eval.core") for name in modules)


def test_results_of_an_older_toy_are_refused_by_name(data: Path, tmp_path: Path) -> None:
    """A metric that the benchmark has no more is named with those that it has."""
    score = scored(data, lambda id_: "yes")
    facts: dict[str, Any] = {
        "benchmark": "toy",
        "protocol": "toy",
        "checkpoint": "m",
        "fingerprint": "f",
        "decoding": {},
        "judge": None,
    }
    content = {"provenance": facts | {"counts": score.counts}, "items": list(score.items)}
    content["metrics"] = dict(score.metrics) | {"old_metric": 1.0}
    (tmp_path / "results.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"metric 'old_metric': expected a metric of Toy Benchmark \(toy_score, "):
        read_all([tmp_path / "results.json"])
