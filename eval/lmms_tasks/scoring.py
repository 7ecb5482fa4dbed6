"""Images, prompts, and metrics of the lmms-eval tasks; the metrics are those of this repository's scorers.

lmms-eval runs in the root of the repository, on the questions that `python -m eval.lmms_tasks.data` wrote:

    python -m eval.lmms_tasks.data
    python -m lmms_eval --include_path eval/lmms_tasks --tasks dama_objhal,dama_amber_g,dama_amber_d ...

A document is {"id", "image", "question"}. Every metric gets the same {"question_id", "text"} of each answer, and its
aggregation scores all answers at once. An undefined metric is NaN.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from eval import benchmarks
from eval.core.judge import JudgeRun
from eval.core.record import data_folder
from eval.core.scores import Score
from eval.core.types import Answer
from eval.task import Task

JUDGE_URL, JUDGE_MODEL, JUDGE_OUT = "DAMA_JUDGE_BASE_URL", "DAMA_JUDGE_MODEL", "DAMA_JUDGE_OUT"

Document = Mapping[str, Any]


@lru_cache(maxsize=4)
def loaded(name: str) -> Any:
    """Load a benchmark from the data folder, in its default mode."""
    benchmark = benchmarks.named(name)
    return Task(benchmark, benchmark.modes[0], None).load(data_folder())


def doc_to_visual(name: str, doc: Document) -> list[Any]:
    """Open the document's image."""
    from dama.images import load_image, resolve_image

    return [load_image(resolve_image(str(loaded(name).image_folder), doc["image"]))]


def doc_to_text(doc: Document, lmms_eval_specific_kwargs: Any = None) -> str:
    """Return the question as it is asked."""
    return doc["question"]


def judged_doc_to_text(doc: Document, lmms_eval_specific_kwargs: Any = None) -> str:
    """Return the question; before anything is generated, raise ValueError where no judge is named."""
    if not os.environ.get(JUDGE_URL):
        raise ValueError(
            f"{JUDGE_URL}: expected the judge's URL, got none\nRemedy: set it, and {JUDGE_MODEL} to its model"
        )
    return doc["question"]


def process_results(metrics: Sequence[str], doc: Document, results: Sequence[str]) -> dict[str, dict[str, str]]:
    """Hand the answer on to the aggregation of each metric."""
    return {metric: {"question_id": doc["id"], "text": results[0]} for metric in metrics}


def score(name: str, answers: Sequence[Mapping[str, str]]) -> Score:
    """Score the answers of a task; those of each metric are the same, and scored once."""
    return _score(name, tuple((answer["question_id"], answer["text"]) for answer in answers))


@lru_cache(maxsize=4)
def _score(name: str, answers: tuple[tuple[str, str], ...]) -> Score:
    data, benchmark = loaded(name), benchmarks.named(name)
    prompts = {question.id: question.prompt for question in data.questions}
    given = [Answer(id_, "", prompts[id_], text) for id_, text in answers]
    if benchmark.modes[0].judged:
        return benchmark.score(data, given, _verdicts(name, data, given))
    return benchmark.score(data, given)


def _verdicts(name: str, data: Any, answers: Sequence[Answer]) -> JudgeRun:
    """Ask the judge that the environment names; replies are stored, and an interrupted run continues."""
    judge = benchmarks.named(name).judge
    assert judge is not None
    settings = judge.settings(os.environ[JUDGE_URL], os.environ.get(JUDGE_MODEL) or None, give_up=True)
    return judge.ask(data, answers, settings, Path(os.environ.get(JUDGE_OUT) or "runs/lmms_judge") / name)


def aggregation(name: str, metric: str) -> Callable[[Sequence[Mapping[str, str]]], float]:
    """Return the function from all answers of a task to a metric.

    lmms-eval resamples answers, repeating some, for functions with amber_ in their names; these are all "aggregate".
    """

    def aggregate(answers: Sequence[Mapping[str, str]]) -> float:
        value = score(name, answers).metrics[metric]
        return float("nan") if value is None else value

    return aggregate
