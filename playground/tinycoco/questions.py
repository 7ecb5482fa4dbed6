"""Questions about a scene with their right answers: yes or no, a word or two, or a letter.

What abilities are measured by, and the wording that the editions of the benchmarks share.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

from playground.tinycoco.captions import PLURALS, SETTINGS, article, third_of
from playground.tinycoco.scenes import Scene, SceneObject
from playground.tinycoco.vocabulary import CATEGORIES, COLOURS, PALETTES, companion_of

CLEARLY_BESIDE = 14  # pixels between two centers
NUMBERS = ("no", "one", "two", "three")
LETTERS = "ABCD"


@dataclass(frozen=True)
class Question:
    """A question and its right answer; kind: existence, recognition, color, count or position."""

    kind: str
    text: str
    answer: str


# --- Yes or no -------------------------------------------------------------------------------------------------------


def closed_questions(scene: Scene, rng: random.Random) -> Iterator[Question]:
    """As many with the answer yes as with no, in the wording of POPE and AMBER."""
    for category in scene.categories:
        yield Question("existence", is_there(category, rng.choice(("the", "this"))), "Yes")
    for category in absent_categories(scene, rng, len(scene.categories)):
        yield Question("existence", is_there(category, rng.choice(("the", "this"))), "No")
    for thing in with_color(scene):
        for color, answer in ((thing.colour, "Yes"), (other_color(thing, rng), "No")):
            yield Question("color", is_color(thing.category, color, rng.choice(("the", "this"))), answer)
    for category in scene.categories:
        if category in PLURALS:
            count = scene.count[category]
            for number, answer in ((count, "Yes"), (rng.choice(sorted({1, 2, 3} - {count})), "No")):
                yield Question("count", is_number(category, number), answer)
    for left, right in beside(scene):
        for (one, other), answer in (((left, right), "Yes"), ((right, left), "No")):
            yield Question("position", is_left_of(one.category, other.category), answer)


def is_there(category: str, image: str = "the") -> str:
    """POPE asks about `the` image, AMBER about `this`."""
    return f"Is there {article(category)} {category} in {image} image?"


def is_color(category: str, color: str, image: str = "this") -> str:
    """AMBER's question about a state."""
    return f"Is the {category} {color} in {image} image?"


def is_number(category: str, number: int) -> str:
    """AMBER's question about a number."""
    if number == 1:
        return f"Is there one {category} in this image?"
    return f"Are there {NUMBERS[number]} {PLURALS[category]} in this image?"


def is_left_of(one: str, other: str) -> str:
    """AMBER's question about a relation."""
    return f"Is the {one} to the left of the {other} in this image?"


# --- A word or two ---------------------------------------------------------------------------------------------------


def open_questions(scene: Scene) -> Iterator[Question]:
    """Questions with one right answer, in the wording of MMHal-Bench's edition."""
    yield Question("recognition", WHAT_PLACE, SETTINGS[scene.context])
    for side, end in (("left", min), ("right", max)):
        outer = end(scene.objects, key=lambda thing: thing.centre[0])
        if all(apart(outer, other) for other in scene.objects if other != outer):
            yield Question("recognition", f"What is farthest to the {side}?", outer.category)
    for thing in with_color(scene):
        yield Question("color", what_color(thing.category), thing.colour)
    for category in scene.categories:
        if category in PLURALS:
            yield Question("count", how_many(category), NUMBERS[scene.count[category]])
    for thing in scene.single:
        yield Question("position", f"Where is the {thing.category} in the image?", third_of(thing.centre))
    for left, right in beside(scene):
        for (one, other), answer in (((left, right), "left"), ((right, left), "right")):
            yield Question("position", which_side(one.category, other.category), answer)


WHAT_PLACE = "What kind of place does the image show?"


def what_color(category: str) -> str:
    """Asked about what is there, and by MMHal-Bench's adversarial questions about what is not."""
    return f"What color is the {category} in the image?"


def how_many(category: str) -> str:
    """Only categories with a plural are counted."""
    return f"How many {PLURALS[category]} are there in the image?"


def which_side(one: str, other: str) -> str:
    """The answer is left or right."""
    return f"Is the {one} to the left or to the right of the {other} in the image?"


# --- A letter --------------------------------------------------------------------------------------------------------

CAPABILITIES = {
    "coarse perception": "image scene and topic",
    "fine-grained perception": "recognition",
    "instance reasoning": "single-instance reasoning",
    "logical reasoning": "common reasoning",
    "math": "numeric commonsense and calculation",
    "science & technology": "biology & chemistry & physics",
}
"""Of MMStar -> the one of its finer classes that the question is put into."""


def choice_question(scene: Scene, capability: str, rng: random.Random) -> tuple[str, str]:
    """A question with four options in MMStar's form, and the letter of the right one."""
    question, right, others = _choices(scene, capability)
    options = rng.sample([right, *rng.sample(sorted(set(others) - {right}), 3)], 4)
    listed = ", ".join(f"{letter}: {option}" for letter, option in zip(LETTERS, options))
    return f"{question}\nOptions: {listed}", LETTERS[options.index(right)]


def _choices(scene: Scene, capability: str) -> tuple[str, str, list[str]]:
    """A question, the right option, and what the others are drawn from."""
    left, right = (choose(scene.objects, key=lambda thing: thing.centre[0]) for choose in (min, max))
    absent = sorted(set(CATEGORIES) - set(scene.categories))
    numbers = [str(number) for number in range(1, 10)]
    category = scene.categories[0]
    colored = [thing for thing in scene.single if thing.colour]
    if capability == "fine-grained perception" and colored:
        return f"Which color does the {colored[0].category} have?", colored[0].colour, sorted(COLOURS)
    if capability == "instance reasoning":
        return f"How many objects of the kind {category} are drawn?", str(scene.count[category]), numbers
    if capability == "logical reasoning":
        return "What is farthest to the left?", left.category, [*absent, *({right.category} - {left.category})]
    if capability == "math":
        return "How many objects are drawn, and one more?", str(len(scene.objects) + 1), numbers
    if capability == "science & technology":
        return "How many different kinds of objects are drawn?", str(len(scene.categories)), numbers
    return "What is the setting?", scene.context, sorted(SETTINGS)


# --- What is asked about ---------------------------------------------------------------------------------------------


def with_color(scene: Scene) -> list[SceneObject]:
    """The only ones of their category that have a color of several; of a person, the clothes have it."""
    return [thing for thing in scene.single if thing.colour and thing.category != "person"]


def other_color(thing: SceneObject, rng: random.Random) -> str:
    """One that the category comes in, and this thing does not."""
    return rng.choice([color for color in PALETTES[thing.category] if color != thing.colour])


def beside(scene: Scene) -> Iterator[tuple[SceneObject, SceneObject]]:
    """Twos of single things, the left one first, where that can be told."""
    for one, other in combinations(scene.single, 2):
        if apart(one, other):
            left, right = sorted((one, other), key=lambda thing: thing.centre[0])
            yield left, right


def apart(one: SceneObject, other: SceneObject) -> bool:
    """Whether one is clearly to the left or right of the other."""
    return abs(one.centre[0] - other.centre[0]) >= CLEARLY_BESIDE


def usual_but_absent(scene: Scene) -> list[str]:
    """Companions of what is there that are not there themselves."""
    companions = dict.fromkeys(companion_of(category, scene.context) for category in scene.categories)
    return [companion for companion in companions if companion is not None and companion not in scene.categories]


def absent_categories(scene: Scene, rng: random.Random, count: int) -> list[str]:
    """So many categories that are not there: companions up to half, others at random."""
    usual = usual_but_absent(scene)[: max(1, count // 2)]
    others = sorted(set(CATEGORIES) - set(scene.categories) - set(usual))
    return usual + rng.sample(others, count - len(usual))


def one_of_each(questions: Iterable[Question], rng: random.Random) -> list[Question]:
    """A question of each kind that there is."""
    by_kind: dict[str, list[Question]] = {}
    for question in questions:
        by_kind.setdefault(question.kind, []).append(question)
    return [rng.choice(of_kind) for of_kind in by_kind.values()]
