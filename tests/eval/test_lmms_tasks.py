"""The lmms-eval task folder: its files name what is there, and its metrics are those of the scorers.

lmms-eval itself runs it in scripts/check_lmms_eval.sh.
"""

import re
from pathlib import Path

import pytest

from eval import benchmarks
from eval.core.types import Answer
from eval.lmms_tasks import scoring, utils
from eval.lmms_tasks.data import TASKS, main
from eval.task import Task
from playground.tinycoco.benchmarks import write_benchmarks

pytestmark = pytest.mark.fast

FOLDER = Path(utils.__file__).parent


@pytest.fixture
def world(tmp_path, monkeypatch):
    write_benchmarks(tmp_path, 6, "test")
    monkeypatch.setenv("DAMA_BENCH_DATA", str(tmp_path))
    scoring.loaded.cache_clear()
    scoring._score.cache_clear()
    yield tmp_path
    scoring.loaded.cache_clear()
    scoring._score.cache_clear()


def of_file(task):
    """Return the text of a task file, and metric -> (name of the aggregation, stated direction)."""
    text = (FOLDER / f"{task}.yaml").read_text()
    entries = re.findall(
        r"- metric: (\w+)\n    aggregation: !function utils\.(\w+)\n(?:    higher_is_better: (\w+)\n)?", text
    )
    return text, {
        metric: (function, {"true": "higher", "false": "lower"}.get(better)) for metric, function, better in entries
    }


def test_there_is_a_file_for_each_task():
    assert {path.stem for path in FOLDER.glob("*.yaml")} == set(TASKS)


@pytest.mark.parametrize("task", TASKS)
def test_a_file_states_the_published_decoding_and_the_directions(task):
    text, metrics = of_file(task)
    name, part = TASKS[task]
    benchmark = benchmarks.named(name)
    assert f"dataset_path: runs/lmms_data/{task}\n" in text and f'task: "{task}"\n' in text
    (decoding,) = (p.decoding for p in benchmark.parts if (p.name or "answers") == part)
    for setting in ("max_new_tokens", "num_beams"):
        assert f"  {setting}: {decoding[setting]}\n" in text
    assert "  until: []" in text
    assert {m: better for m, (_, better) in metrics.items()} == {m: benchmark.metric(m).better for m in metrics}


@pytest.mark.parametrize("task", TASKS)
def test_every_function_that_a_file_names_is_there(task):
    text, metrics = of_file(task)
    named = re.findall(r"!function utils\.(\w+)", text)
    assert len(named) >= 4 and all(callable(getattr(utils, function)) for function in named)
    (results,) = re.findall(r"process_results: !function utils\.(\w+)", text)
    given = getattr(utils, results)({"id": "7"}, ["a text"])
    assert given == {metric: {"question_id": "7", "text": "a text"} for metric in metrics}


@pytest.mark.parametrize("task", ["dama_objhal", "dama_amber_g", "dama_amber_d"])
def test_metrics_equal_the_scorers(world, task):
    """On right, wrong, unparsable and empty answers in turn."""
    name, part = TASKS[task]
    benchmark = benchmarks.named(name)
    data = Task(benchmark, benchmark.modes[0], None).load(world)
    requests = Task(benchmark, benchmark.modes[0], None).parts(data)[part][0]
    truths = {q.id: q.truth for q in data.questions}
    said = [(truths[r.id], "A giraffe, no.", "Perhaps.", "")[i % 4] for i, r in enumerate(requests)]
    handed = [{"question_id": r.id, "text": text} for r, text in zip(requests, said)]
    own = benchmark.score(data, [Answer(r.id, "", r.prompt, text) for r, text in zip(requests, said)]).metrics
    for metric, (function, _) in of_file(task)[1].items():
        value = getattr(utils, function)(handed)
        assert value == (
            pytest.approx(own[metric]) if own[metric] is not None else pytest.approx(float("nan"), nan_ok=True)
        )


def test_images_and_questions(world):
    (question, *_) = benchmarks.named("objhal").load(world, "rules").questions
    doc = {"id": question.id, "image": question.image, "question": question.prompt}
    (image,) = utils.objhal_visual(doc)
    assert image.size == (112, 112) and utils.doc_to_text(doc) == question.prompt


def test_a_judge_must_be_named_before_anything_is_generated(monkeypatch):
    monkeypatch.delenv("DAMA_JUDGE_BASE_URL", raising=False)
    with pytest.raises(ValueError, match="DAMA_JUDGE_BASE_URL: expected the judge's URL, got none"):
        utils.judged_doc_to_text({"question": "q"})
    monkeypatch.setenv("DAMA_JUDGE_BASE_URL", "http://127.0.0.1:1/v1")
    assert utils.judged_doc_to_text({"question": "q"}) == "q"


def test_the_questions_are_written(world, tmp_path):
    import datasets

    assert main(["dama_amber_d", "--out", str(tmp_path / "sets")]) == 0
    rows = datasets.load_from_disk(str(tmp_path / "sets/dama_amber_d"))["test"]
    asked = [q for q in benchmarks.named("amber").load(world, "").questions if q.kinds[0] == "discriminative"]
    assert [(row["id"], row["image"], row["question"]) for row in rows] == [(q.id, q.image, q.prompt) for q in asked]
