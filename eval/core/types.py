"""What all benchmarks share: questions about images, a model's answers to them, and the record of a scored answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dama.errors import error_list
from eval.core.official import digest_of_text

if TYPE_CHECKING:
    from llava.generation.request import Request

Record = dict[str, Any]
"""A scored answer as results.json has it."""
Parts = dict[str, list[float]]
"""Metric -> [numerator, denominator] of one item; a metric is the sum of numerators over the sum of denominators."""


@dataclass(frozen=True)
class Answer:
    """One answer. `id` is unique in its file; `image_id` is empty where the file names no image; both are strings.

    missing: why the model gave no answer, or ""; such an answer is counted and excluded from all metrics.
    """

    id: str
    image_id: str
    prompt: str
    text: str
    model_id: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Question:
    """What the model is asked, and what the judge is given.

    image: a file in the benchmark's image folder, "" for a question without image. truth: the reference answer. kinds:
    the classes with metrics of their own. context: a description of the image for a judge that does not see it.
    """

    id: str
    image: str
    prompt: str
    truth: str
    kinds: tuple[str, ...] = ()
    context: str = ""

    @property
    def image_id(self) -> str:
        """The image's path in the image folder without its suffix, "" without an image."""
        return str(PurePosixPath(self.image).with_suffix("")) if self.image else ""


@dataclass(frozen=True)
class BenchmarkData:
    """A loaded benchmark: its questions, the official judge prompt word for word, and the image folder."""

    questions: tuple[Question, ...]
    judge_prompt: str
    image_folder: Path = Path()

    @property
    def prompt_digest(self) -> str:
        """First 16 hexadecimal digits of the judge prompt's SHA-256."""
        return digest_of_text(self.judge_prompt)[:16]

    def requests(self, includes: Callable[[Question], bool] = lambda question: True) -> list[Request]:
        """Return one generation request for each question that is included, with the question's own prompt."""
        from llava.generation.request import Request

        return [Request(q.id, q.prompt, q.image or None, q.image_id) for q in self.questions if includes(q)]

    def missing_records(self, answers: Iterable[Answer]) -> list[Record]:
        """Return records of the questions that the model gave no answer to: in no metric, but shown on the page."""
        reasons = {answer.id: answer.missing for answer in answers if answer.missing}
        return [
            record_of(question, "", wrong=None, parts={}, kinds=list(question.kinds), missing=reasons[question.id])
            for question in self.questions
            if question.id in reasons
        ]

    def answered(self, answers: Iterable[Answer]) -> list[tuple[Question, Answer]]:
        """Pair the questions with their answers, by id and never by position. Missing answers are left out.

        Raises ValueError for an answer to an unknown question, to another wording of it, or for a second answer.
        """
        answers = list(answers)
        prompts = {question.id: question.prompt for question in self.questions}
        times = Counter(answer.id for answer in answers)
        errors = [f"answer {id_!r}: {n} answers to one question" for id_, n in times.items() if n > 1]
        for answer in answers:
            asked = prompts.get(answer.id)
            if asked is None:
                errors.append(f"answer {answer.id!r}: no question has this id")
            elif answer.prompt.split() != asked.split():
                errors.append(f"answer {answer.id!r}: to {answer.prompt[:60]!r}, but the question is {asked[:60]!r}")
        if errors:
            raise ValueError(error_list("answers", errors, "give the answers that were made for this benchmark"))
        given = {answer.id: answer for answer in answers if not answer.missing}
        return [(question, given[question.id]) for question in self.questions if question.id in given]


def record_of(question: Question, text: str, *, wrong: bool | None, parts: Parts, **extras: Any) -> Record:
    """Return an answer's record; `extras` replace or follow the fields that all benchmarks have.

    wrong: None for an answer that cannot be scored, such as one whose verdict is unreadable.
    """
    return {
        "id": question.id,
        "image_id": question.image_id,
        "image": question.image,
        "prompt": question.prompt,
        "text": text,
        "truth": question.truth,
        "wrong": wrong,
        "spans": [],
        "parts": parts,
    } | extras
