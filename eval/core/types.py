"""What every benchmark meets: its questions about pictures, and a model's answers to them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dama.errors import error_list
from eval.core.official import digest_of_text

if TYPE_CHECKING:
    from llava.generation.request import Request


@dataclass(frozen=True)
class Answer:
    """`id` is unique in its file; `image_id` is empty where the file names no picture; both are text, never numbers.

    missing: why the model gave no answer, or ""; such an answer is counted and in no metric.
    """

    id: str
    image_id: str
    prompt: str
    text: str
    model_id: str = ""
    missing: str = ""


@dataclass(frozen=True)
class Question:
    """What the model is asked and what the judge is told.

    image: a file in the benchmark's image folder. truth: the reference answer. kinds: the classes that are averaged by
    themselves. context: words for the picture, which the judge does not see.
    """

    id: str
    image: str
    prompt: str
    truth: str
    kinds: tuple[str, ...] = ()
    context: str = ""

    @property
    def image_id(self) -> str:
        return Path(self.image).stem


@dataclass(frozen=True)
class Benchmark:
    """The questions, the official judge prompt word for word, and the folder of the pictures."""

    questions: tuple[Question, ...]
    judge_prompt: str
    image_folder: Path = Path()

    @property
    def prompt_digest(self) -> str:
        return digest_of_text(self.judge_prompt)[:16]

    def requests(self) -> list[Request]:
        """One for each question, for llava.eval.generate."""
        from llava.generation.request import Request

        return [Request(q.id, q.prompt, q.image, q.image_id) for q in self.questions]

    def missing_records(self, answers: Iterable[Answer]) -> list[dict[str, Any]]:
        """Records, as in results.json, of the questions that the model gave no answer to: in no metric, but shown."""
        reasons = {answer.id: answer.missing for answer in answers if answer.missing}
        return [
            {
                "id": question.id,
                "image_id": question.image_id,
                "image": question.image,
                "prompt": question.prompt,
                "text": "",
                "truth": question.truth,
                "wrong": None,
                "spans": [],
                "parts": {},
                "kinds": list(question.kinds),
                "missing": reasons[question.id],
            }
            for question in self.questions
            if question.id in reasons
        ]

    def answered(self, answers: Iterable[Answer]) -> list[tuple[Question, Answer]]:
        """The questions that have an answer, with it; joined by id, never by position. Missing answers are none.

        ValueError for an answer to no question here, to another wording of it, or for a second answer.
        """
        answers = list(answers)
        prompts = {question.id: question.prompt for question in self.questions}
        times = Counter(answer.id for answer in answers)
        faults = [f"answer {id_!r}: {n} answers to one question" for id_, n in times.items() if n > 1]
        for answer in answers:
            asked = prompts.get(answer.id)
            if asked is None:
                faults.append(f"answer {answer.id!r}: no question has this id")
            elif answer.prompt.split() != asked.split():
                faults.append(f"answer {answer.id!r}: to {answer.prompt[:60]!r}, but the question is {asked[:60]!r}")
        if faults:
            raise ValueError(error_list("answers", faults, "give the answers that were made for this benchmark"))
        given = {answer.id: answer for answer in answers if not answer.missing}
        return [(question, given[question.id]) for question in self.questions if question.id in given]
