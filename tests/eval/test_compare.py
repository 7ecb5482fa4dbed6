"""eval.compare: differences on paper, what is refused and why, and what is said of the published figures."""

from __future__ import annotations

import gzip
import json
import os
from pathlib import Path
from typing import Any

import pytest

from eval import benchmarks, page, pope
from eval.compare import compare, main, rows_of
from eval.core.metrics import ratios
from eval.core.published import Published
from eval.core.statistics import Interval
from eval.core.store import Provenance, read_answers, write_results
from eval.results import read_all
from eval.wording import verdict

pytestmark = pytest.mark.fast
OBJHAL = benchmarks.named("objhal")
BENCH = os.environ.get("DAMA_BENCH_DATA", "")
JUDGE = {"name": "gpt-4-0613", "version": "gpt-4-0613", "prompt_digest": "ab12", "temperature": 0.0}


def item(number: int, parts: dict[str, list[float]], **changes: Any) -> dict[str, Any]:
    record = {"id": f"q{number}", "image_id": f"im{number}", "image": f"im{number}.jpg", "prompt": "What?"}
    return record | {"text": "A dog.", "truth": "dog", "wrong": False, "spans": [], "parts": parts} | changes


def results(folder: Path, name: str, items: list[dict[str, Any]], **changes: Any) -> Path:
    """A results.json of these items; changes: of the provenance, or `metrics` beside those of the items."""
    names = dict.fromkeys(metric for row in items for metric in row["parts"])
    metrics = ratios(items, names) | changes.pop("metrics", {})
    facts: dict[str, Any] = {
        "benchmark": "objhal", "protocol": "objhal-rules", "checkpoint": f"runs/{name}", "fingerprint": name,
        "decoding": {"num_beams": 3}, "counts": {"answers": len(items)}, "judge": None,
    }  # fmt: skip
    write_results(folder / name / "results.json", metrics, Provenance(**facts | changes), items)
    return folder / name / "results.json"


def pair(folder: Path, base: list[dict[str, Any]], aligned: list[dict[str, Any]], **changes: Any) -> list[Path]:
    return [results(folder, name, items, **changes) for name, items in (("base", base), ("aligned", aligned))]


def responses(*rates: float) -> list[dict[str, Any]]:
    return [item(number, {"response_level": [rate, 1.0]}) for number, rate in enumerate(rates)]


# ---------------------------------------------------------------------------------------------------- differences


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_json_does_not_have_are_named(tmp_path, capsys, number):
    """Python reads them, a browser does not: its page would be empty."""
    path = tmp_path / "results.json"
    items = f'[{{"id": "q1", "values": [{number}]}}]'
    path.write_text(f'{{"provenance": {{}}, "metrics": {{"mean": {number}}}, "items": {items}}}')
    for program in (main, page.main):
        flags = ["--images", str(tmp_path)] if program is page.main else [str(path)]
        assert program([str(path), *flags]) == 2
        said = capsys.readouterr().err
        assert "not JSON compliant" in said and "metrics, mean: " in said and "items, q1, values, 0: " in said


def test_results_nested_without_end_are_an_error(tmp_path, capsys):
    (tmp_path / "results.json").write_text("[" * 99_999)
    assert main([str(tmp_path / "results.json")] * 2) == 2
    assert "cannot be read" in capsys.readouterr().err


def test_a_difference_on_paper(tmp_path: Path) -> None:
    """The models differ by 0 and by -100 on two images: a resample has -100, -50 or 0 in 1, 2 and 1 of 4 cases.

    So the value is -50 and the interval [-100, 0] allows no claim. With -100 on both, every resample has -100.
    """
    (row,) = compare(pair(tmp_path, responses(100, 100), responses(100, 0))).rows
    assert [value.value for value in row.values] == [100, 50] and row.differences == (Interval(-50, -100, 0),)
    assert row.values[1] == Interval(50, 0, 100)
    assert verdict(OBJHAL, "response_level", row.differences[0], "aligned") == "no clear difference"
    (row,) = compare(pair(tmp_path, responses(100, 100), responses(0, 0))).rows
    assert row.differences == (Interval(-100, -100, -100),)
    assert verdict(OBJHAL, "response_level", row.differences[0], "aligned") == "aligned better"


def test_items_are_matched_by_id(tmp_path: Path) -> None:
    """Turned round, the same answers differ nowhere; matched by place they would by 100 on two of four."""
    items = responses(100, 0, 0, 100, 50)
    (row,) = compare(pair(tmp_path, items, items[::-1])).rows
    assert row.differences == (Interval(0, 0, 0),)


def test_a_picture_is_drawn_with_all_its_items(tmp_path: Path) -> None:
    """Fifty questions on each of two pictures are two observations: the interval of 0 and -100 stays [-100, 0]."""

    def asked(second: float) -> list[dict[str, Any]]:
        rates = [100.0] * 50 + [second] * 50
        return [row | {"image_id": f"im{n // 50}"} for n, row in enumerate(responses(*rates))]

    comparison = compare(pair(tmp_path, asked(100), asked(0)))
    assert comparison.rows[0].differences == (Interval(-50, -100, 0),) and comparison.images == 2


def test_f1_is_a_ratio_of_sums(tmp_path: Path) -> None:
    """F1 = 2 TP / (2 TP + FP + FN). Base: a hit and a miss, 2 / 3; aligned: two hits, 4 / 4."""
    hit, miss = {"f1": [200.0, 2.0]}, {"f1": [0.0, 1.0]}
    base, aligned = [item(0, hit), item(1, miss)], [item(0, hit), item(1, hit)]
    (row,) = compare(pair(tmp_path, base, aligned, benchmark="amber")).rows
    assert [value.value for value in row.values] == pytest.approx([200 / 3, 100])
    assert row.differences[0] == pytest.approx((100 / 3, 0, 100))


def described(chair: float, f1: float) -> list[dict[str, Any]]:
    """One description and one question on each of two pictures, all alike."""
    parts = [{"chair": [chair, 1.0]}, {"f1": [2 * f1, 2.0]}]
    return [item(n, parts[n % 2], image_id=f"im{n // 2}") for n in range(4)]


def test_the_amber_score(tmp_path: Path) -> None:
    """(100 - CHAIR + F1) / 2: (100 - 8 + 74) / 2 = 83 and (100 - 4 + 80) / 2 = 88, in every resample 5 apart."""
    paths = pair(tmp_path, described(8, 74), described(4, 80), benchmark="amber", metrics={"amber_score": None})
    first = compare(paths).rows[0]
    assert (first.metric, [value.value for value in first.values]) == ("amber_score", [83, 88])
    assert first.differences == (Interval(5, 5, 5),)


def test_derived_figures_are_resampled_together(tmp_path: Path) -> None:
    """CHAIR and F1 of the same images are resampled together.

    Where one image has both 0 and the other both 100, CHAIR cancels F1 in each resample and the score is always 50.
    Resampled apart it would spread from 0 to 100.
    """
    rows = [item(n, {"chair": [value, 1.0], "f1": [value, 1.0]}) for n, value in enumerate((0.0, 100.0))]
    (run,) = read_all([results(tmp_path, "base", rows, benchmark="amber")])
    values = {row.metric: row.values for row in rows_of([run])}
    assert values["amber_score"] == (Interval(50, 50, 50),) and values["chair"] == (Interval(50, 0, 100),)


def test_the_mean_over_popes_splits(tmp_path: Path) -> None:
    """Means of 90, 80, 70 and of 90, 80, 40: 80 and 70."""

    def splits(*values: float) -> list[dict[str, Any]]:
        return [
            item(n, {f"{name}_f1": [v, 1.0]}, image_id="one") for n, (name, v) in enumerate(zip(pope.SPLITS, values))
        ]

    comparison = compare(pair(tmp_path, splits(90, 80, 70), splits(90, 80, 40), benchmark="pope"))
    assert comparison.rows[0].metric == "mean_f1" and comparison.rows[0].differences == (Interval(-10, -10, -10),)


def test_nothing_to_divide_by(tmp_path: Path) -> None:
    """Where one of them has no figure there is no difference, and where none has, the figure is named below."""
    some = {"chairs": [50.0, 1.0], "mention_level": [0.0, 0.0]}
    none = {"chairs": [0.0, 0.0], "mention_level": [0.0, 0.0]}
    comparison = compare(pair(tmp_path, [item(0, some)], [item(0, none)]))
    assert comparison.rows[0].differences == (Interval(None, None, None),)
    assert ["CHAIRs", "%", "undefined", "50.0", "n/a", "n/a"] in [line.split() for line in comparison.text.splitlines()]
    assert "Undefined: mention_level." in comparison.text


@pytest.mark.parametrize(
    "benchmark, metric, low, high, words",
    [
        ("objhal", "mention_level", -3, -1, "B better"),
        ("objhal", "mention_level", 1, 3, "B worse"),
        ("objhal", "object_recall", -3, -1, "B worse"),
        ("amber", "relation_f1", 1, 3, "B better"),
        ("objhal", "mean_words", 1, 3, "B higher"),
        ("pope", "random_yes_ratio", -3, -1, "B lower"),
        ("mmhal", "score", 0, 3, "no clear difference"),
        ("mmhal", "score", None, None, "undefined"),
    ],
)
def test_words(benchmark: str, metric: str, low: float | None, high: float | None, words: str) -> None:
    assert verdict(benchmarks.named(benchmark), metric, Interval(low, low, high), "B") == words


def test_decimals_are_those_of_the_papers() -> None:
    metrics = {"objhal": ("response_level", "mean_words"), "mmhal": ("score", "score_counting"), "amber": ("f1",),
               "llavabench": ("relative",), "mmvet": ("total",), "pope": ("mean_f1",)}  # fmt: skip
    decimals = [[benchmarks.named(name).metric(metric).decimals for metric in of] for name, of in metrics.items()]
    assert decimals == [[1, 1], [2, 2], [1], [1], [1], [2]]


def test_an_unknown_metric_or_benchmark_is_an_error(tmp_path: Path) -> None:
    """Neither direction is assumed: the file, the benchmark, its metrics and the remedy are named."""
    path = results(tmp_path, "base", [item(0, {"hallucinations": [1.0, 1.0]})])
    with pytest.raises(ValueError, match="metric 'hallucinations': expected a metric of Object HalBench") as caught:
        read_all([path])
    assert str(path) in str(caught.value) and "(response_level, chairs, " in str(caught.value)
    assert "Remedy: give a results.json that eval.evaluate wrote" in str(caught.value)
    with pytest.raises(ValueError, match="metric 'bleu': expected a metric of Object HalBench"):
        read_all([results(tmp_path, "base", responses(1), metrics={"bleu": None})])
    with pytest.raises(ValueError, match="benchmark: expected one of objhal, .*, pope, got 'halbench'"):
        read_all([results(tmp_path, "base", responses(1), benchmark="halbench")])
    with pytest.raises(ValueError, match="metric 'bleu'"):
        verdict(OBJHAL, "bleu", Interval(1, 1, 1), "B")


def test_each_later_result_against_the_first(tmp_path: Path) -> None:
    paths = [results(tmp_path, name, responses(rate)) for name, rate in (("a", 50), ("b", 40), ("c", 70))]
    comparison = compare(paths, ["base", "one", "two"])
    assert [difference.value for difference in comparison.rows[0].differences] == [-10, 20]
    assert "one - base" in comparison.text and "two worse" in comparison.text


def test_notes(tmp_path: Path) -> None:
    def run(name: str, beams: int) -> Path:
        return results(
            tmp_path, name, [item(0, {"total": [50.0, 1.0]})], judge=JUDGE | {"version": ""}, fingerprint="same",
            metrics={"total_std": 0.25}, benchmark="mmvet", counts={"missing": 2, "unparsed": 0},
            decoding={"generative": {"num_beams": beams}},
        )  # fmt: skip

    text = compare([run("base", 1), run("aligned", 3)]).text
    for note in (
        "Images: only 1,", "No sums over items, so without interval: total_std 0.25 / 0.25.",
        "Missing: base 2, aligned 2.", "The judge's version is not named", "base and aligned have the same weights.",
        "Decoded differently, generative num_beams: base 1, aligned 3.",
    ):  # fmt: skip
        assert note in text
    assert "Unparsed" not in text


# -------------------------------------------------------------------------------------------------------- refusing


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"benchmark": "TinyCOCO captions"}, "benchmark: 'objhal' in base, 'TinyCOCO captions' in aligned"),
        ({"protocol": "objhal-llm"}, "protocol: 'objhal-rules' in base, 'objhal-llm' in aligned"),
        ({"judge": JUDGE | {"name": "gpt-4o"}}, "judge's name: 'gpt-4-0613' in base, 'gpt-4o' in aligned"),
        ({"judge": JUDGE | {"version": "2"}}, "judge's version: 'gpt-4-0613' in base, '2' in aligned"),
        ({"judge": JUDGE | {"prompt_digest": "f"}}, "judge's prompt_digest: 'ab12' in base, 'f' in aligned"),
        ({"judge": JUDGE | {"temperature": 0.2}}, "judge's temperature: 0.0 in base, 0.2 in aligned"),
        ({"judge": None}, "judge's name: 'gpt-4-0613' in base, 'no judge' in aligned"),
    ],
)
def test_what_was_made_differently_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    base = results(tmp_path, "base", responses(1), judge=JUDGE)
    other = results(tmp_path, "aligned", responses(1), **{"judge": JUDGE} | changes)
    with pytest.raises(ValueError, match=message) as caught:
        compare([base, other])
    assert "Remedy: score both in one way" in str(caught.value)


def test_other_items_are_refused_with_counts_and_all_at_once(tmp_path: Path) -> None:
    base = results(tmp_path, "base", responses(*range(9)))
    other = [row for row in responses(*range(10)) if row["id"] not in ("q2", "q3")]
    other[0] |= {"prompt": "Where?"}
    other[1] |= {"image_id": "im7"}
    with pytest.raises(ValueError, match="not comparable: 5 errors") as caught:
        compare([base, results(tmp_path, "aligned", other, protocol="mine")])
    for fault in (
        "protocol: 'objhal-rules' in base, 'mine' in aligned",
        "items: 2 of 9 are in base but not in aligned: q2, q3",
        "items: 1 of 8 are in aligned but not in base: q9",
        "items: 1 of 7 have another image_id, e.g. q1: 'im1' and 'im7'",
        "items: 1 of 7 have another prompt, e.g. q0: 'What?' and 'Where?'",
    ):
        assert fault in str(caught.value)


def broken(path: Path, **changes: Any) -> Path:
    """The file with another first item."""
    content = json.loads(path.read_text())
    content["items"][0] |= changes
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"id": 7}, "item 0: field 'id': expected str, got int"),
        ({"wrong": "no"}, "item 0: field 'wrong': expected bool or NoneType, got str"),
        ({"parts": {"a": [1.0]}}, r"item 0: parts of 'a': expected two numbers, got \[1.0\]"),
        ({"parts": {"a": [float("nan"), 1.0]}}, r"not JSON compliant: 1 error\n  items, q0, parts, a, 0: nan"),
        ({"spans": [[2, 9]]}, r"item 0: spans: expected \[start, end\] within 6 characters, got \[2, 9\]"),
        ({"spans": [[-1, 2]]}, r"got \[-1, 2\]"),
        ({"id": "q1"}, "items: 1 ids are used twice"),
        ({"parts": {"response_level": [9.0, 1.0]}}, "metric 'response_level': says 0.0, but its items give 4.5"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_all([broken(results(tmp_path, "base", responses(0, 0)), **changes)])


def test_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="cannot be read .*No such file"):
        read_all([tmp_path / "absent.json"])
    (tmp_path / "torn.json").write_text('{"items": [')
    with pytest.raises(ValueError, match="torn.json: cannot be read"):
        read_all([tmp_path / "torn.json"])
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(ValueError, match="results: expected an object, got list"):
        read_all([tmp_path / "list.json"])
    with pytest.raises(ValueError, match="judge: field 'version': expected str, got no such field"):
        read_all([results(tmp_path, "half", responses(0), judge={"name": "a", "prompt_digest": "", "temperature": 0})])
    with pytest.raises(ValueError, match="items: expected some, got none"):
        read_all([results(tmp_path, "none", [])])
    with pytest.raises(ValueError, match="expected two results.json or more, got 1"):
        compare([tmp_path])


def test_official_rounding_is_no_fault(tmp_path: Path) -> None:
    facts: dict[str, Any] = {"metrics": {"response_level": 33.4}}
    with pytest.raises(ValueError, match="says 33.4, but its items give 33.333"):
        read_all([results(tmp_path, "base", responses(0, 0, 100), **facts)])
    facts = {"metrics": {"response_level": 33.4}, "protocol": "objhal-llm-official-quirks"}
    read_all([results(tmp_path, "base", responses(0, 0, 100), **facts)])


def test_names(tmp_path: Path) -> None:
    """Checkpoints of one name go by their paths."""
    paths = [results(tmp_path, name, responses(0), checkpoint=f"{name}/llava") for name in ("base", "aligned")]
    assert [run.name for run in read_all(paths)] == [str(path) for path in paths]
    assert [run.name for run in read_all(paths, ["A", "B"])] == ["A", "B"]
    with pytest.raises(ValueError, match="expected 2 different ones, got A, A"):
        read_all(paths, ["A", "A"])
    with pytest.raises(ValueError, match="names: expected 2 different ones"):
        read_all([paths[0], paths[0]])


@pytest.mark.parametrize("benchmark", ("amber", "llavabench", "mmhal", "mmvet", "objhal", "pope"))
def test_results_of_the_revision_before_are_read_and_compared_to_the_digit(tmp_path: Path, benchmark: str) -> None:
    """Both results.json, and the rows of their comparison, as revision 70a1940 wrote them."""
    content = json.loads((Path(__file__).with_name("written_before") / f"{benchmark}.json").read_text())
    paths = [tmp_path / f"{name}.json" for name in ("base", "aligned")]
    for path in paths:
        path.write_text(json.dumps(content[path.stem]))
    rows = json.loads(json.dumps(compare(paths).record()["rows"]))
    assert [row["metric"] for row in rows] == [row["metric"] for row in content["rows"]]
    for row, before in zip(rows, content["rows"]):
        assert row["better"] == before["better"]
        for values in ("values", "differences"):
            for now, then in zip(row[values], before[values], strict=True):
                assert now == pytest.approx(then)


# -------------------------------------------------------------------------------------------------------- published


def published(protocol: str | None = "mm-vet", judge: str | None = None) -> Published:
    return Published("LLaVA", {"total": 31.1}, protocol, judge, {"LLaVA": "eval.zip"}, "")


@pytest.mark.parametrize(
    "protocol, judge, judged, standing",
    [
        ("mm-vet", None, None, "same"),
        ("mm-vet", None, JUDGE, "unknown"),
        ("mm-vet", "gpt-4-0613", JUDGE, "same"),
        ("mm-vet", "gpt-4o", JUDGE, "other"),
        ("mm-vet, first 6", "gpt-4-0613", JUDGE, "other"),
        (None, "gpt-4o", JUDGE, "other"),
        (None, "gpt-4-0613", JUDGE, "unknown"),
        (None, None, None, "unknown"),
    ],
)
def test_standing(tmp_path: Path, protocol: str | None, judge: str | None, judged: Any, standing: str) -> None:
    (run,) = read_all([results(tmp_path, "base", responses(0), protocol="mm-vet", judge=judged)])
    assert published(protocol, judge).standing(run.protocol, run.judge) == standing


def test_published_figures_beside_these(tmp_path: Path) -> None:
    """By rules: the rule figures come first and bare, those of judges are marked, and so is what is not stated."""
    text = compare(pair(tmp_path, responses(0), responses(0))).report(published=True)
    lines = [line.split() for line in text.splitlines()]
    assert ["LLaVA-1.5-7B", "objhal-rules;", "UE-DPO", "55.67", "15.96"] in lines
    assert ["LLaVA-1.5-7B", "objhal-llm;", "mDPO,", "TPR", "53.6*", "25.2*"] in lines
    assert ["DAMA-7B", "not", "stated;", "PEA-DPO", "10.3?", "5.9?", "54.5?"] in lines
    assert ["base", "this", "run", "0.0"] in lines
    places = [next(i for i, line in enumerate(lines) if line[-1:] == [last]) for last in ("15.96", "54.5?", "25.2*")]
    assert places == sorted(places)
    assert "mDPO (text of the paper)" in text


def test_published_results_come_on_request_and_last(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path) for path in pair(tmp_path, responses(100, 100), responses(0, 0))]
    assert main(paths) == 0
    said = capsys.readouterr().out
    assert "UE-DPO" not in said and "--published shows" in said
    assert main([*paths, "--published"]) == 0
    asked = capsys.readouterr().out
    own, published = asked.index("aligned better"), asked.index("UE-DPO")
    assert own < asked.index("published results") < published and "--published shows" not in asked


def test_every_published_figure_says_where_it_is_from() -> None:
    unknown = set()
    for benchmark in benchmarks.BENCHMARKS:
        assert benchmark.published()
        for entry in benchmark.published():
            assert entry.sources and (entry.metrics or entry.note)
            assert all(0 <= value <= 100 for value in entry.metrics.values())
            unknown |= {(benchmark.name, metric) for metric in entry.metrics if metric not in benchmark.metric_named}
    assert unknown == {("pope", "accuracy"), ("pope", "precision")}  # over a split that is not stated
    # AMBER's README prints the score as well: (100 - CHAIR + F1) / 2, of figures that are rounded to one decimal.
    entries = benchmarks.named("amber").published()
    scored = [entry.metrics for entry in entries if "amber_score" in entry.metrics]
    assert len(scored) == 9
    for row in scored:
        assert row["amber_score"] == pytest.approx((100 - row["chair"] + row["f1"]) / 2, abs=0.1001)


@pytest.mark.skipif(not BENCH, reason="DAMA_BENCH_DATA not set")
def test_popes_published_figures_are_what_the_answers_give(tmp_path: Path) -> None:
    """LLaVA-1.5-13B's own answers, scored here, are the published row, which is of the same protocol."""
    home = Path(BENCH, "pope/golden")
    (tmp_path / "a.jsonl").write_bytes(gzip.decompress((home / "llava-v1.5-13b_answers.jsonl.gz").read_bytes()))
    score = pope.score(pope.load(BENCH), read_answers(tmp_path / "a.jsonl"))
    facts = Provenance("pope", score.protocol, "llava-v1.5-13b", "", {}, score.counts)
    write_results(tmp_path / "results.json", score.metrics, facts, score.items)
    (run,) = read_all([tmp_path / "results.json"])
    (entry,) = (e for e in benchmarks.named("pope").published() if e.standing(run.protocol, run.judge) == "same")
    values = {row.metric: row.values[0].value for row in rows_of([run])}
    assert {name: values[name] for name in entry.metrics} == pytest.approx(dict(entry.metrics), abs=0.00501)


# ---------------------------------------------------------------------------------------------------------- command


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [str(path) for path in pair(tmp_path, responses(100, 100), responses(0, 0))]
    assert main([*paths, "--names", "before", "after"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("Object HalBench, protocol objhal-rules; 2 answers about 2 images\n")
    assert "response-level %  after better   100.0    0.0      -100.0  [-100.0, -100.0]" in said
    assert main([*paths, "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["rows"][0]["differences"] == [
        {"value": -100.0, "low": -100.0, "high": -100.0, "verdict": "aligned better"}
    ]
    assert [run["name"] for run in record["runs"]] == ["base", "aligned"] and record["rows"][0]["better"] == "lower"
    assert {entry["comparable"] for entry in record["published"]} == {True, False, None}
    assert main(paths[:1]) == 2
    assert "compare: error: compare: expected two results.json or more" in capsys.readouterr().err
