"""An ability benchmark about held-out scenes: short questions with exact answers, and yes or no about what is there.

What alignment costs or brings beside fewer inventions. A model is asked for a word or phrase, as in POPE.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from eval.core.metrics import Metric
from eval.core.scores import Score, Table, TableColumn, score_items
from eval.core.types import Answer, BenchmarkData, Parts, Question, record_of
from llava.eval.eval_pope import read_answer
from playground.tinycoco.questions import SHORT, is_there, one_of_each, open_questions, usual_but_absent
from playground.tinycoco.scenes import Scene
from playground.tinycoco.vocabulary import CATEGORIES

PROTOCOL = "tinycoco-ability"
OPEN = ("recognition", "color", "count", "position")
CLOSED = ("present", "companion", "unrelated")  # what a yes/no question is about; the latter two are absent
METRICS = (
    Metric("ability", "ability %"),
    *(Metric(kind, f"{kind} %") for kind in OPEN),
    Metric("yes_no", "yes/no accuracy %"),
    Metric("present", "accuracy on present %"),
    Metric("companion", "accuracy on absent companions %"),
    Metric("unrelated", "accuracy on other absent %"),
    Metric("yes_ratio", "yes ratio %", None),
)


def benchmark(scenes: Iterable[Scene], image_folder: Path = Path()) -> BenchmarkData:
    """All questions about these scenes, whose images are SCENE.png in the folder."""
    asked = [question for scene in scenes for question in _questions(scene)]
    return BenchmarkData(tuple(asked), "", image_folder)


def question_lines(scenes: Iterable[Scene]) -> str:
    """The questions as a file that `llava.eval.generate` reads, with kind and right answer for people."""
    rows = (
        {"question_id": q.id, "image": q.image, "text": q.prompt, "kind": q.kinds[0], "answer": q.truth}
        for q in benchmark(scenes).questions
    )
    return "".join(json.dumps(row) + "\n" for row in rows)


def _questions(scene: Scene) -> Iterator[Question]:
    """An open question of each kind that the scene allows; two about what is there and two about what is not."""
    rng = random.Random(f"tinycoco/ability/{scene.id}")
    for question in one_of_each(open_questions(scene), rng):
        yield _question(scene, question.kind, question.text, question.answer)
    usual = usual_but_absent(scene)
    companions = rng.sample(usual, min(1, len(usual)))
    unrelated = rng.sample(sorted(set(CATEGORIES) - set(scene.categories) - set(usual)), 2 - len(companions))
    about = {"present": rng.sample(scene.categories, min(2, len(scene.categories))), "companion": companions,
             "unrelated": unrelated}  # fmt: skip
    for kind, categories in about.items():
        for category in categories:
            yield _question(scene, kind, is_there(category), "yes" if kind == "present" else "no")


def _question(scene: Scene, kind: str, text: str, answer: str) -> Question:
    id_ = f"{scene.id}/{text.rstrip('?')}"
    return Question(id_, f"{scene.id}.png", text + SHORT, answer, kinds=(kind,))


def score(data: BenchmarkData, answers: Iterable[Answer]) -> Score:
    """Compute METRICS in percent: an open answer is right in the words of the true one, a closed one by yes or no.

    A closed answer that is neither is unparsed, and right in no metric.
    """
    items = []
    for question, answer in data.answered(answers):
        (kind,) = question.kinds
        said = reply_of(answer.text) if kind in OPEN else read_answer(answer.text)
        right = [100.0 * (said == question.truth), 1.0]
        parts: Parts = {kind: right, ("ability" if kind in OPEN else "yes_no"): right}
        if kind in CLOSED:
            parts["yes_ratio"] = [100.0 * (said == "yes"), 1.0]
        wrong = None if said is None else said != question.truth
        items.append(record_of(question, answer.text, wrong=wrong, parts=parts, said=said))
    return score_items(PROTOCOL, METRICS, items, data.questions)


def reply_of(text: str) -> str:
    """What counts of an open answer: its words in lower case, without article and full stop."""
    return re.sub(r"^(?:an?|the)\s+", "", " ".join(text.lower().split()).rstrip("."))


format_table = Table(
    (
        TableColumn("ability", "ability %", interval=True),
        *(TableColumn(kind, kind) for kind in OPEN),
        TableColumn("yes_no", "yes/no %", interval=True),
        *(TableColumn(kind, kind) for kind in CLOSED),
        TableColumn("yes_ratio", "yes"),
    ),
    protocol=False,
    note="neither yes nor no, right in no metric",
)
