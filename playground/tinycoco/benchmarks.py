"""TinyCOCO editions of POPE and of AMBER's yes/no questions: made from the scenes, in the official files' formats.

eval.pope.load(folder, "official") and eval.amber.load(folder) read them as they read the originals.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

from dama.console import write_atomic, write_json
from playground.tinycoco.captions import PLURALS, article
from playground.tinycoco.scenes import Scene, SceneObject, draw, sample_scene
from playground.tinycoco.vocabulary import CATEGORIES, PALETTES, companion_of

POSITIVES = 3  # questions with the answer yes about one scene, at most; and as many with the answer no
NUMBERS = ("no", "one", "two", "three")
CLEARLY_BESIDE = 14  # pixels between two centres

Asked = tuple[str, str, str]
"""Type in AMBER's annotations, question, answer."""


def write_benchmarks(folder: Path, scenes: int, split: str) -> None:
    """Writes folder/pope, folder/amber and the pictures, where the benchmarks look for them, of the first scenes."""
    chosen = [sample_scene(index, split) for index in range(scenes)]
    for home in (folder / "coco/val2014", folder / "amber/images"):
        home.mkdir(parents=True, exist_ok=True)
    for scene in chosen:
        picture = draw(scene)
        for home in (folder / "coco/val2014", folder / "amber/images"):
            picture.save(home / f"{scene.id}.png")
    write_pope(folder / "pope", chosen)
    write_amber(folder / "amber", chosen)


# ----------------------------------------------------------------------------------------------------------- POPE


def write_pope(folder: Path, scenes: Sequence[Scene]) -> None:
    """coco_pope_{random,popular,adversarial}.json: one question a line, every other one about what is absent.

    What is absent is drawn at random, or is what is most often in the scenes, or most often together with what is in
    this one.
    """
    often = Counter(category for scene in scenes for category in scene.categories)
    together = Counter(pair for scene in scenes for pair in permutations(scene.categories, 2))

    def at_random(scene: Scene, absent: list[str]) -> list[str]:
        return random.Random(f"tinycoco/pope/{scene.id}").sample(absent, len(absent))

    def popular(scene: Scene, absent: list[str]) -> list[str]:
        return sorted(absent, key=lambda category: -often[category])

    def adversarial(scene: Scene, absent: list[str]) -> list[str]:
        return sorted(absent, key=lambda category: -sum(together[here, category] for here in scene.categories))

    for ranking in (at_random, popular, adversarial):
        name = ranking.__name__.removeprefix("at_")
        rows = [row for scene in scenes for row in _pope_questions(scene, ranking)]
        lines = [json.dumps({"question_id": number} | row) + "\n" for number, row in enumerate(rows, 1)]
        write_atomic(folder / f"coco_pope_{name}.json", "".join(lines))


def _pope_questions(scene: Scene, ranking: Callable[[Scene, list[str]], list[str]]) -> Iterator[dict[str, Any]]:
    """Yes and no in turn."""
    present = scene.categories[:POSITIVES]
    absent = ranking(scene, sorted(set(CATEGORIES) - set(scene.categories)))
    for pair in zip(present, absent):
        for category, label in zip(pair, ("yes", "no")):
            text = f"Is there {article(category)} {category} in the image?"
            yield {"image": f"{scene.id}.png", "text": text, "label": label}


# ---------------------------------------------------------------------------------------------------------- AMBER


def write_amber(folder: Path, scenes: Sequence[Scene]) -> None:
    """annotations.json and query/query_discriminative.json: existence, state (colour), number and relation (side).

    There is no question on actions: nothing in a scene acts.
    """
    asked = [(scene, *question) for scene in scenes for question in _amber_questions(scene)]
    queries = [{"id": i, "image": f"{scene.id}.png", "query": text} for i, (scene, _, text, _) in enumerate(asked, 1)]
    annotations = [{"id": i, "type": kind, "truth": truth} for i, (_, kind, _, truth) in enumerate(asked, 1)]
    write_json(folder / "query/query_discriminative.json", queries)
    write_json(folder / "annotations.json", annotations)


def _amber_questions(scene: Scene) -> Iterator[Asked]:
    """All but those on existence come in twos, one with each answer."""
    rng = random.Random(f"tinycoco/amber/{scene.id}")
    count = Counter(thing.category for thing in scene.objects)
    single = [thing for thing in scene.objects if count[thing.category] == 1]
    companions = dict.fromkeys(companion_of(category, scene.context) for category in scene.categories)
    for companion in companions:
        if companion is not None and companion not in scene.categories:
            yield "discriminative-hallucination", f"Is there {article(companion)} {companion} in this image?", "no"
    for thing in single:
        yield from _on_colour(thing, rng)
    for category in scene.categories:
        if category in PLURALS:
            for number, truth in ((count[category], "yes"), (count[category] + 1, "no")):
                yield "discriminative-attribute-number", _on_number(category, number), truth
    for one, other in combinations(single, 2):
        yield from _on_sides(one, other)


def _on_colour(thing: SceneObject, rng: random.Random) -> Iterator[Asked]:
    others = [colour for colour in PALETTES[thing.category] if colour != thing.colour]
    if thing.colour and others and thing.category != "person":
        for colour, truth in ((thing.colour, "yes"), (rng.choice(others), "no")):
            yield "discriminative-attribute-state", f"Is the {thing.category} {colour} in this image?", truth


def _on_number(category: str, number: int) -> str:
    if number == 1:
        return f"Is there one {category} in this image?"
    return f"Are there {NUMBERS[number]} {PLURALS[category]} in this image?"


def _on_sides(one: SceneObject, other: SceneObject) -> Iterator[Asked]:
    left, right = sorted((one, other), key=lambda thing: thing.centre[0])
    if right.centre[0] - left.centre[0] >= CLEARLY_BESIDE:
        for (a, b), kind, truth in (
            ((left, right), "discriminative-relation", "yes"),
            ((right, left), "relation", "no"),
        ):
            yield kind, f"Is the {a.category} to the left of the {b.category} in this image?", truth
