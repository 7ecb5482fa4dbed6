"""TinyCOCO editions of Object HalBench, AMBER, POPE, MMHal-Bench, HallusionBench, MMStar and CHAIR.

They are made from the scenes, in the official formats:

    python -m playground.tinycoco benchmarks --out runs/bench
    DAMA_BENCH_DATA=runs/bench bash scripts/eval_objhal.sh playground/tinycoco/weights/llava

and eval_amber.sh, eval_pope.sh, eval_hallusionbench.sh, eval_mmstar.sh, eval_chair.sh likewise; eval_mmhal.sh needs a
judge as well (playground/tinycoco/judge.py). The files' digests are recorded as downloads' are, so that the commands
accept them and label every figure with the digest of the data; such figures compare among themselves only.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from pathlib import Path
from typing import Any

from dama.console import write_atomic, write_json
from eval import benchmarks
from eval.core.record import RECORD
from eval.core.transfer import digest
from playground.tinycoco.captions import PLURALS, QUESTIONS
from playground.tinycoco.hallusionbench import write_hallusionbench
from playground.tinycoco.mmhal import write_mmhal
from playground.tinycoco.mmstar import write_mmstar
from playground.tinycoco.questions import (
    beside,
    is_color,
    is_left_of,
    is_number,
    is_there,
    other_color,
    usual_but_absent,
    with_color,
)
from playground.tinycoco.scenes import Scene, draw, sample_scene
from playground.tinycoco.vocabulary import CATEGORIES, SYNONYMS

DESCRIBE = "Describe this image."
EDITIONS = ("objhal", "amber", "pope", "mmhal", "hallusionbench", "mmstar", "chair")
POSITIVES = 3  # questions with the answer yes about one scene, at most; and as many with the answer no

Asked = tuple[str, str, str]
"""Type in AMBER's annotations, question, answer."""


def write_benchmarks(folder: Path, scenes: int, split: str) -> None:
    """Write the benchmarks about the first scenes, and the images, where the commands look for them in the folder."""
    chosen = [sample_scene(index, split) for index in range(scenes)]
    coco, of_amber, of_mmhal = (folder / name for name in ("coco/val2014", "amber/images", "mmhal/images"))
    for home in (coco, of_amber, of_mmhal):
        home.mkdir(parents=True, exist_ok=True)
    for index, scene in enumerate(chosen):
        picture = draw(scene)
        for home in (coco, of_amber, of_mmhal):
            picture.save(home / f"{scene.id}.png")
        picture.save(coco / f"COCO_val2014_{index:012d}.jpg", quality=95, subsampling=0)
    write_objhal(folder / "objhal", chosen)
    write_amber(folder / "amber", chosen)
    for home in (folder / "pope", folder / "pope/llava_variant"):
        write_pope(home, chosen)
    write_mmhal(folder, chosen)
    write_hallusionbench(folder, chosen)
    write_mmstar(folder, chosen)
    write_chair(folder / "chair_coco", chosen)
    write_record(folder)


def write_record(folder: Path) -> None:
    """downloads.json, which says what the files are that are not the published ones."""
    files = [file for name in EDITIONS for file in benchmarks.named(name).files]
    paths = {name: folder / name for file in files for name in (file.path, file.instead) if name}
    entries = {
        name: {"sha256": digest(path), "bytes": path.stat().st_size, "source": "TinyCOCO", "edition": "TinyCOCO"}
        for name, path in paths.items()
        if path.is_file()
    }
    write_json(folder / RECORD, entries)


# ------------------------------------------------------------------------------------------------ Object HalBench


def write_objhal(folder: Path, scenes: Sequence[Scene]) -> None:
    """The questions, what is drawn in each image, and the synonyms; without a judge's prompt."""
    rows = [
        {"org_idx": index, "image_id": index, "question": QUESTIONS[index % len(QUESTIONS)]}
        for index in range(len(scenes))
    ]
    write_atomic(folder / "obj_halbench_300_questions.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    write_json(folder / "gt_objects_300.json", {str(i): list(scene.categories) for i, scene in enumerate(scenes)})
    write_atomic(folder / "synonyms_refine.txt", "".join(", ".join(forms) + "\n" for forms in SYNONYMS.values()))


# ---------------------------------------------------------------------------------------------------------- CHAIR


def write_chair(folder: Path, scenes: Sequence[Scene]) -> None:
    """Write what is drawn in each image, the synonyms, and the ids of the images."""
    truth = {str(i): sorted(scene.categories) for i, scene in enumerate(scenes)}
    write_json(folder / "gt_objects_val2014.json", truth)
    write_atomic(folder / "synonyms.txt", "".join(", ".join(forms) + "\n" for forms in SYNONYMS.values()))


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
            yield {"image": f"{scene.id}.png", "text": is_there(category), "label": label}


# ---------------------------------------------------------------------------------------------------------- AMBER


def write_amber(folder: Path, scenes: Sequence[Scene]) -> None:
    """Descriptions first, then yes/no questions on existence, state (color), number and relation (side).

    There is no question on actions: nothing in a scene acts.
    """
    described = [{"id": i, "image": f"{scene.id}.png", "query": DESCRIBE} for i, scene in enumerate(scenes, 1)]
    annotations: list[dict[str, Any]] = [
        {"id": i, "type": "generative", "truth": list(map(noun_of, scene.categories)),
         "hallu": list(map(noun_of, usual_but_absent(scene)))}
        for i, scene in enumerate(scenes, 1)
    ]  # fmt: skip
    asked = [(scene, *question) for scene in scenes for question in _amber_questions(scene)]
    first = len(scenes) + 1
    queries = [{"id": i, "image": f"{s.id}.png", "query": text} for i, (s, _, text, _) in enumerate(asked, first)]
    annotations += [{"id": i, "type": kind, "truth": truth} for i, (_, kind, _, truth) in enumerate(asked, first)]
    write_json(folder / "query/query_generative.json", described)
    write_json(folder / "query/query_discriminative.json", queries)
    write_json(folder / "annotations.json", annotations)
    others = {
        noun_of(category): [form for form in forms if " " not in form and form != category]
        for category, forms in SYNONYMS.items()
    }
    write_json(folder / "relation.json", others)
    write_atomic(folder / "safe_words.txt", "")


def noun_of(category: str) -> str:
    """The one word that AMBER, which looks at single nouns, knows it by: of a traffic light the light."""
    return category.split()[-1]


def _amber_questions(scene: Scene) -> Iterator[Asked]:
    """All but those on existence come in twos, one with each answer."""
    rng = random.Random(f"tinycoco/amber/{scene.id}")
    for companion in usual_but_absent(scene):
        yield "discriminative-hallucination", is_there(companion, "this"), "no"
    for thing in with_color(scene):
        for color, truth in ((thing.colour, "yes"), (other_color(thing, rng), "no")):
            yield "discriminative-attribute-state", is_color(thing.category, color), truth
    for category in scene.categories:
        if category in PLURALS:
            count = scene.count[category]
            for number, truth in ((count, "yes"), (count + 1, "no")):
                yield "discriminative-attribute-number", is_number(category, number), truth
    for left, right in beside(scene):
        for (one, other), kind, truth in (
            ((left, right), "discriminative-relation", "yes"),
            ((right, left), "relation", "no"),
        ):
            yield kind, is_left_of(one.category, other.category), truth
