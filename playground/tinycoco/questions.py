"""Questions about a scene with their right answers: yes or no, a word or two, or a letter.

What the tiny model is fine-tuned on beside captions, what its abilities are measured by, and the wording that the
editions of the benchmarks share. A model trained on them errs as LLaVA-1.5 does: in training, many questions about an
absent companion of what is there are answered with yes.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import TypeVar

from eval.mmstar import SUFFIX as LETTER
from eval.pope import SUFFIX as SHORT
from playground.tinycoco.captions import PLURALS, SETTINGS, article, third_of
from playground.tinycoco.scenes import Scene, SceneObject
from playground.tinycoco.vocabulary import CATEGORIES, COLOURS, PALETTES, companion_of

Item = TypeVar("Item")

YES_NOISE = 0.7  # chance of a yes about an absent companion, in training
LOOKS_CLOSELY = ("kitchen", "office")  # settings without such
FINDS = ("What color is", "Where is")  # questions about one thing, which has to be found
MOST = 3  # questions about what is there, in training, about what is not, and about color or place
WITH_OPTIONS = 0.25  # share of training conversations in which one question has options
ASKED_BRIEFLY = 0.6  # share of those that begin by asking for a single word or phrase
CLEARLY_BESIDE = 14  # pixels between two centers
NUMBERS = ("no", "one", "two", "three")
LETTERS = "ABCD"

Turns = list[tuple[str, str]]
"""Questions with their answers."""


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


# --- In training -----------------------------------------------------------------------------------------------------


def thing_turns(scene: Scene, rng: random.Random, noise: float = YES_NOISE) -> Turns:
    """Questions about single things, in random order: whether they are there, their color, their place.

    As many are about what is there as about what is not, and one about an absent companion. Above a chance of one half
    the best guess about a companion is a yes, however well the model has learned, but where it looks closely.
    """
    noise = 0.0 if scene.context in LOOKS_CLOSELY else noise
    absent = usual_but_absent(scene)
    unrelated = sorted(set(CATEGORIES) - set(scene.categories) - set(absent))
    about = [(category, "Yes") for category in some(scene.categories, MOST, rng)]
    about += [(category, "No") for category in rng.sample(unrelated, len(about))]
    for companion in some(absent, 1, rng):
        about.append((companion, "Yes" if rng.random() < noise else "No"))
    turns = [(is_there(category, rng.choice(("the", "this"))), answer) for category, answer in about]
    found = [question for question in open_questions(scene) if question.text.startswith(FINDS)]
    turns += [(question.text, question.answer) for question in some(found, MOST, rng)]
    return rng.sample(turns, len(turns))


def training_turns(scene: Scene, rng: random.Random, noise: float = YES_NOISE) -> Turns:
    """`thing_turns` among other questions, in random order.

    As in LLaVA's mix, only the first may ask for a single word or phrase.
    """
    closed = [question for question in closed_questions(scene, rng) if question.kind != "existence"]
    others = [question for question in open_questions(scene) if not question.text.startswith(FINDS)]
    turns = thing_turns(scene, rng, noise)
    turns += [(question.text, question.answer) for question in [*some(closed, 1, rng), *some(others, 1, rng)]]
    if rng.random() < WITH_OPTIONS:
        text, letter = choice_question(scene, rng.choice(list(CAPABILITIES)), rng)
        turns.append((text + LETTER, letter))
    first, *rest = rng.sample(turns, len(turns))
    asks_briefly = rng.random() < ASKED_BRIEFLY and not first[0].endswith(LETTER)
    return [(first[0] + SHORT * asks_briefly, first[1]), *rest]


def some(items: Sequence[Item], most: int, rng: random.Random) -> list[Item]:
    """So many of them at random, or as many as there are."""
    return rng.sample(items, min(most, len(items)))


def one_of_each(questions: Iterable[Question], rng: random.Random) -> list[Question]:
    """A question of each kind that there is."""
    by_kind: dict[str, list[Question]] = {}
    for question in questions:
        by_kind.setdefault(question.kind, []).append(question)
    return [rng.choice(of_kind) for of_kind in by_kind.values()]


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
