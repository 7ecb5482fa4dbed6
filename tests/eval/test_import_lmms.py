"""Results of lmms-eval become results.json: intervals where the samples give the metric, else the value alone."""

import json

import pytest

from eval import compare, page
from eval.import_lmms import main, parts_of
from eval.results import read_all

pytestmark = pytest.mark.fast

DATE = "20261127_120000"


def write(folder, model, right, perception):
    """What lmms-eval 0.7 writes: GQA's mean of matches, MME's sums over categories, and a group without samples."""
    folder.mkdir(parents=True)
    scores = [1.0] * right + [0.0] * (4 - right)
    configs = {
        "gqa": {"task": "gqa", "generation_kwargs": {"max_new_tokens": 16},
                "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}]},
        "mme": {"task": "mme", "generation_kwargs": {"max_new_tokens": 16}},
    }  # fmt: skip
    results = {
        "gqa": {"alias": "gqa", "exact_match,none": right / 4, "exact_match_stderr,none": 0.1,
                "exact_match_stderr_clt,none": "N/A"},
        "mme": {"alias": "mme", "mme_perception_score,none": perception, "mme_perception_score_stderr,none": "N/A"},
        "llava_suite": {"alias": "llava_suite"},
    }  # fmt: skip
    content = {"results": results, "configs": configs, "versions": {"gqa": "Yaml", "mme": "Yaml"},
               "n-shot": {"gqa": 0, "mme": 0}, "higher_is_better": {"mme": {"mme_perception_score": True}},
               "config": {"limit": None}, "model_name": f"org/{model}"}  # fmt: skip
    (folder / f"{DATE}_results.json").write_text(json.dumps(content))
    gqa = [{"doc_id": i, "target": "a", "input": "Which?", "filtered_resps": "a" if s else "b", "exact_match": s}
           for i, s in enumerate(scores)]  # fmt: skip
    mme = [{"doc_id": i, "target": "Yes", "input": "Is it?", "filtered_resps": ["Yes"],
            "mme_perception_score": {"question_id": "x.jpg", "category": "color", "score": s}}
           for i, s in enumerate(scores)]  # fmt: skip
    for task, samples in (("gqa", gqa), ("mme", mme)):
        lines = "".join(json.dumps(sample) + "\n" for sample in samples)
        (folder / f"{DATE}_samples_{task}.jsonl").write_text(lines)
    return folder


@pytest.fixture
def imported(tmp_path):
    for model, right, perception in (("base", 2, 1500.0), ("aligned", 3, 1490.5)):
        assert (
            main([str(write(tmp_path / "lmms" / model, model, right, perception)), "--out", str(tmp_path / "out")]) == 0
        )
    return tmp_path / "out"


def test_metrics_and_items(imported):
    (found,) = read_all([imported / "aligned/gqa/results.json"])
    assert found.metrics == {"exact_match": 0.75} and found.benchmark.metric("exact_match").better == "higher"
    assert found.provenance["benchmark"] == "lmms-eval/gqa" and found.protocol == "lmms-eval gqa, version Yaml, 0-shot"
    assert [item["wrong"] for item in found.items.values()] == [False, False, False, True]
    assert found.items["3"]["parts"] == {"exact_match": [0.0, 1.0]} and found.items["3"]["text"] == "b"
    (found,) = read_all([imported / "aligned/mme/results.json"])
    assert found.metrics == {"mme_perception_score": 1490.5} and found.items["0"]["parts"] == {}


def test_comparison_and_page(imported, capsys):
    paths = [str(imported / model / "gqa/results.json") for model in ("base", "aligned")]
    assert compare.main(paths) == 0
    printed = capsys.readouterr().out
    assert "gqa (lmms-eval)" in printed and "aligned - base" in printed and "+0.2500" in printed
    assert page.main([*paths, "--images", str(imported)]) == 0
    assert "scores 0" in (imported / "base/gqa/page.html").read_text()


def test_a_sum_over_categories_has_no_interval(imported, capsys):
    assert compare.main([str(imported / model / "mme/results.json") for model in ("base", "aligned")]) == 0
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("mme perception score"))
    assert line.split()[3:] == ["no", "interval", "1500.00", "1490.50", "-9.50"]


def test_two_tasks_are_not_comparable(imported, capsys):
    assert compare.main([str(imported / "base" / task / "results.json") for task in ("gqa", "mme")]) == 2
    assert "benchmark: 'lmms-eval/gqa'" in capsys.readouterr().err


def test_percent_and_fractions_and_filters():
    samples = [{"acc": 1}, {"acc": 0}, {"acc": True}, {"acc": {"score": 0.0}}]
    assert parts_of(samples, {"acc": 50.0, "acc,strict": 0.5, "other": 0.5}) == {"acc": 100.0, "acc,strict": 1.0}
    assert parts_of(samples, {"acc": 0.51, "acc,strict": None}) == {}


def test_an_undefined_metric_is_null(tmp_path):
    folder = write(tmp_path / "r", "m", 1, float("nan"))
    assert main([str(folder), "--out", str(tmp_path / "out")]) == 0
    (found,) = read_all([tmp_path / "out/m/mme/results.json"])
    assert found.metrics == {"mme_perception_score": None}


class TestErrors:
    def failing(self, capsys, *words):
        assert main([*map(str, words)]) == 2
        return capsys.readouterr().err

    def test_no_samples(self, tmp_path, capsys):
        folder = write(tmp_path / "r", "m", 1, 1.0)
        (folder / f"{DATE}_samples_gqa.jsonl").unlink()
        error = self.failing(capsys, folder, "--out", tmp_path)
        assert f"{DATE}_samples_gqa.jsonl: missing" in error and "--log_samples" in error

    def test_no_results_several_and_others(self, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        assert "expected one *_results.json, got 0" in self.failing(capsys, tmp_path / "empty")
        for name in "ab":
            write(tmp_path / "two" / name, name, 1, 1.0)
        assert "expected one *_results.json, got 2" in self.failing(capsys, tmp_path / "two")
        (tmp_path / "x_results.json").write_text("{}")
        assert "expected the fields results and configs" in self.failing(capsys, tmp_path / "x_results.json")

    def test_unknown_tasks(self, tmp_path, capsys):
        folder = write(tmp_path / "r", "m", 1, 1.0)
        assert "expected some of gqa, mme, got vqa" in self.failing(capsys, folder, "--tasks", "vqa")

    def test_a_changed_description(self, imported):
        path = imported / "base/gqa/results.json"
        content = json.loads(path.read_text())
        content["benchmark"]["metrics"][0] |= {"better": "more", "decimals": "4"}
        path.write_text(json.dumps(content))
        with pytest.raises(ValueError, match=r"(?s)2 errors.*'decimals': expected int, got str.*null, got 'more'"):
            read_all([path])
