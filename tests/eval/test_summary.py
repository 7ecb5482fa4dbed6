"""All benchmarks in one table: what may not be compared is marked; the chart's axes point the right way."""

import json

import pytest

from eval import benchmarks
from eval.summary import columns, format_table, main, reach

pytestmark = pytest.mark.fast


def result(protocol="p", judge=None, **metrics):
    return {"metrics": metrics, "provenance": {"protocol": protocol, "judge": judge}}


def judge(version):
    return {"name": "gpt", "version": version, "prompt_digest": "d", "temperature": 0.0}


def test_figures_of_another_protocol_or_judge_are_marked():
    models = {
        "A": {"objhal": result("objhal-rules", response_level=53.6, mention_level=25.2),
              "mmhal": result("mmhal", judge("v1"), score=2.11, hallucination_rate=54.0)},
        "B": {"objhal": result("objhal-rules", response_level=10.3, mention_level=None),
              "mmhal": result("mmhal", judge("v2"), score=2.76, hallucination_rate=41.0)},
    }  # fmt: skip
    lines = format_table(models).splitlines()
    cells = [dict(zip((column.metric for column in columns()), line.split()[1:])) for line in lines[1:3]]
    given = [{name: of[name] for name in ("response_level", "mention_level", "score", "hallucination_rate")}
             for of in cells]  # fmt: skip
    assert [list(of.values()) for of in given] == [["53.6", "25.2", "2.11", "54.0"], ["10.3", "n/a", "2.76*", "41.0*"]]
    assert all(set(of.values()) - set(own.values()) == {"n/a"} for of, own in zip(cells, given) if own is given[0])
    assert lines[4:] == [
        "objhal: objhal-rules",
        "mmhal: mmhal, judge gpt (v1)",
        "* mmhal, not comparable: B: mmhal, judge gpt (v2)",
    ]


def test_each_metric_is_marked_and_changes_of_ability_are_listed():
    """MMStar falls by 1.9; MM-Vet's judges differ, so nothing is said; hallucination is in the table alone."""
    models = {
        "aligned": {"mmstar": result("mmstar", total=30.0), "mmvet": result("mm-vet", judge("v1"), total=29.0),
                    "pope": result("pope-llava", mean_f1=86.0), "llavabench": result("l", judge("v1"), relative=65.0)},
        "base": {"mmstar": result("mmstar", total=31.9), "mmvet": result("mm-vet", judge("v2"), total=31.0),
                 "pope": result("pope-llava", mean_f1=85.0), "llavabench": result("l", judge("v1"), relative=64.0)},
    }  # fmt: skip
    lines = format_table(models).splitlines()
    assert [mark for mark in ("H POPE F1 +", "H CHAIRs -", "A MM-Vet +", "A MMStar +") if mark in lines[0]] != []
    assert lines[0].index("H POPE F1 +") < lines[0].index("A LLaVA-Bench +") < lines[0].index("A MMStar +")
    assert lines[3].startswith("H hallucination, A general ability")
    assert lines[4] == "ability, aligned minus base: LLaVA-Bench +1.0, MMStar -1.9 (lower)"


def test_farther_out_is_better():
    """MMHal 3 of 6 lies half way; from 50 to 0 a mention level of 12.5 at three quarters, one of 60 in the centre."""
    by_metric = {column.metric: column for column in columns()}
    assert reach(by_metric["score"], 3.0) == 0.5
    assert reach(by_metric["mention_level"], 12.5) == 0.75
    assert reach(by_metric["mention_level"], 60.0) == 0.0


def test_the_command(tmp_path, capsys):
    for name, value in (("A", 80.0), ("B", 86.0)):
        (tmp_path / name / "pope").mkdir(parents=True)
        (tmp_path / name / "pope/results.json").write_text(json.dumps(result("pope-llava", mean_f1=value)))
    assert main([str(tmp_path / "A"), str(tmp_path / "B"), "--out", str(tmp_path)]) == 0
    assert "86.0" in (tmp_path / "summary.txt").read_text()
    assert "no chart, because the models have fewer than three metrics" in capsys.readouterr().out
    assert main([str(tmp_path / "C"), "--out", str(tmp_path)]) == 2
    assert "expected results.json of a benchmark in" in capsys.readouterr().err


def test_an_unknown_metric_of_a_results_file_is_named(tmp_path, capsys):
    (tmp_path / "A/pope").mkdir(parents=True)
    (tmp_path / "A/pope/results.json").write_text(json.dumps(result("pope-llava", mean_f2=1.0)))
    assert main([str(tmp_path / "A"), "--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert "A/pope/results.json" in error and "metric 'mean_f2': expected a metric of POPE (mean_f1, " in error
    assert "score the answers anew" in error


@pytest.mark.parametrize(
    "name, shown",
    [
        ("objhal", {"object_recall", "mean_words"}),
        ("amber", {"cover", "mean_words"}),
        ("chair", {"recall", "mean_words"}),
        ("mmhal", {"mean_words"}),
    ],
)
def test_hallucination_is_shown_with_how_much_is_said(name, shown):
    """In the benchmark's own table and in the summary; words have no better direction, and so no sign."""
    benchmark = benchmarks.named(name)
    assert shown <= {column.metric for column in benchmark.table.columns}
    headings = {column.metric: column.heading for column in columns() if column.benchmark == name}
    assert shown <= headings.keys() and headings["mean_words"].endswith(" words")
    assert all(headings[metric].endswith(" +") for metric in shown - {"mean_words"})
