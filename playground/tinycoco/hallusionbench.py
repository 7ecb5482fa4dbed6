"""TinyCOCO edition of HallusionBench in the official format, and the rules that judge its answers.

Set N is about scene N. Visual dependent (VD): figure 0 is the scene, figure 1 the scene edited, and both get the same
questions, some of whose truths change. Visual supplement (VS): the same, and figure 0 is the question without a figure.
An edit gives one object another color, or takes all of one category out.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dama.console import write_atomic, write_json
from playground.tinycoco.questions import is_color, is_there, other_color, with_color
from playground.tinycoco.scenes import Scene, draw
from playground.tinycoco.vocabulary import PALETTES

PROMPT = "prompts/hallusionbench_judge.txt"  # in the data folder
JUDGE_PROMPT = """\
Compare an answer about a drawn scene of TinyCOCO with the reference by a fixed rule: it is correct or incorrect by the
yes or no that it begins with, and unclear without one.

### Question
{question}

### Reference
{gt_answer_details}

### Answer to compare
{prediction}"""

_ANSWER = re.compile(r"### Reference\n\s*(yes|no)\b.*### Answer to compare\n(.*)\Z", re.DOTALL | re.IGNORECASE)
_LEADING = re.compile(r"\W*(yes|no)\b", re.IGNORECASE)
_VISUAL_DEPENDENT = ("VD", "illusion")
_VISUAL_SUPPLEMENT = ("VS", "figure")


def write_hallusionbench(folder: Path, scenes: Sequence[Scene]) -> None:
    """Write folder/hallusionbench with its figures, and the judge's prompt that the rules read."""
    rows: list[dict[str, Any]] = []
    for number, scene in enumerate(scenes):
        category = _VISUAL_DEPENDENT if number % 2 == 0 else _VISUAL_SUPPLEMENT
        first = 0 if category == _VISUAL_DEPENDENT else 1  # figure 0 of VS is no figure
        versions = [scene, edited(scene)]
        for figure, version in enumerate(versions, first):
            path = folder / "hallusionbench/images" / _file_of(category, number, figure)
            path.parent.mkdir(parents=True, exist_ok=True)
            draw(version).save(path)
        questions = list(asked_about(*versions))
        rows += [row for i, asked in enumerate(questions) for row in _rows(category, number, first, i, *asked)]
    write_json(folder / "hallusionbench/HallusionBench.json", rows)
    write_atomic(folder / PROMPT, JUDGE_PROMPT)


def _rows(
    category: tuple[str, str], number: int, first: int, question_id: int, question: str, truth: bool, edited_truth: bool
) -> Iterator[dict[str, Any]]:
    """Yield the question without figure where the first figure is 1, then about both figures."""
    if first == 1:
        yield _row(category, number, 0, "0", question_id, question, truth)
    yield _row(category, number, first, "1", question_id, question, truth)
    yield _row(category, number, first + 1, "2", question_id, question, edited_truth)


def _file_of(category: tuple[str, str], number: int, figure: int) -> str:
    return "/".join((*category, f"{number}_{figure}.png"))


def _row(
    category: tuple[str, str], number: int, figure: int, visual_input: str, question_id: int, question: str, truth: bool
) -> dict[str, Any]:
    """Return a record with the official fields; all values are strings, and no figure is null."""
    return {
        "category": category[0],
        "subcategory": category[1],
        "visual_input": visual_input,
        "set_id": str(number),
        "figure_id": str(figure),
        "sample_note": "TinyCOCO",
        "question_id": str(question_id),
        "question": question,
        "gt_answer_details": f"{'Yes' if truth else 'No'}: {question}",
        "gt_answer": str(int(truth)),
        "filename": None if visual_input == "0" else f"./{_file_of(category, number, figure)}",
    }


def edited(scene: Scene) -> Scene:
    """Give one object another color where one has a choice, else take out all that is of the last one's category."""
    rng, colored = random.Random(f"tinycoco/hallusionbench/{scene.id}"), with_color(scene)
    for thing in rng.sample(scene.objects, len(scene.objects)):
        if thing in colored:
            changed = replace(thing, colour=other_color(thing, rng))
            return replace(scene, objects=tuple(changed if each is thing else each for each in scene.objects))
    gone = scene.objects[-1].category
    return replace(scene, objects=tuple(each for each in scene.objects if each.category != gone))


def asked_about(scene: Scene, other: Scene) -> Iterator[tuple[str, bool, bool]]:
    """Yield a question, and its truth for both versions of the scene."""
    for thing in scene.objects:
        now = next((each for each in other.objects if each.category == thing.category), None)
        if thing in scene.single and now is not None and now.colour != thing.colour:
            for color in (thing.colour, now.colour):
                yield is_color(thing.category, color, "the"), thing.colour == color, now.colour == color
    for place, category in enumerate(scene.categories):
        if place < 2 or category not in other.categories:
            yield is_there(category), True, category in other.categories
    absent = sorted(set(PALETTES) - set(scene.categories))
    missing = random.Random(f"tinycoco/hallusionbench/absent/{scene.id}").choice(absent)
    yield is_there(missing), False, False


def judge_prompt(prompt: str) -> str | None:
    """Return the verdict on the answer in a filled JUDGE_PROMPT, None for another prompt."""
    found = _ANSWER.search(prompt)
    if found is None or not prompt.startswith(JUDGE_PROMPT.split("\n")[0]):
        return None
    said = _LEADING.match(found[2])
    return "unclear" if said is None else "correct" if said[1].lower() == found[1].lower() else "incorrect"
