"""Preference pairs of TinyCOCO: answers sampled from the SFT model and ranked by what is really in the scene.

Three kinds, so that hardness varies: `sampled` (best and worst of several answers), `edit` (one word of a truthful
answer made wrong) and `unrelated` (a truthful answer about another scene). Chosen and rejected are of about equal
length, or alignment would teach the model to say less instead of to say what is there.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from playground.tinycoco.captions import QUESTIONS, hallucinated_categories, one_word_edit, truthful_caption
from playground.tinycoco.scenes import Scene, draw, sample_scene, without_category
from playground.tinycoco.vocabulary import mentioned_categories

if TYPE_CHECKING:
    from llava.generation.local import Answerer

SHARES = {"sampled": 900, "edit": 400, "unrelated": 200}
SAMPLES = 8
TEMPERATURE = 1.0
LENGTH_TOLERANCE = 0.25  # of the longer answer's words


@dataclass(frozen=True)
class Judged:
    """An answer and what is right and wrong in it."""

    text: str
    invented: int  # categories named that are not drawn
    found: int  # drawn categories named

    @property
    def merit(self) -> tuple[int, int]:
        """Sort key: fewer inventions first, then more objects found."""
        return -self.invented, self.found


def judge(text: str, scene: Scene) -> Judged:
    """Compare the categories that a text mentions with those drawn in the scene."""
    found = set(mentioned_categories(text)) & set(scene.categories)
    return Judged(text, len(hallucinated_categories(text, scene)), len(found))


def similar_length(one: str, other: str) -> bool:
    """Whether the shorter answer lacks at most LENGTH_TOLERANCE of the longer one's words."""
    lengths = sorted((len(one.split()), len(other.split())))
    return lengths[1] - lengths[0] <= LENGTH_TOLERANCE * lengths[1]


def best_and_worst(answers: Sequence[Judged]) -> tuple[Judged, Judged] | None:
    """The two answers of similar length that differ most in inventions (then in what they find), or None."""
    options = [
        (better, worse)
        for better in answers
        for worse in answers
        if better.invented < worse.invented and better.found >= worse.found and similar_length(better.text, worse.text)
    ]
    return max(options, key=lambda o: (o[1].invented - o[0].invented, *o[0].merit), default=None)


def sampled_pairs(answerer: Answerer, first_scene: int, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Scenes of the pairs' stream, asked in batches, until `count` of them gave a pair."""
    import torch

    from llava.generation.request import Decoding, Request

    torch.manual_seed(seed)
    rng = random.Random(f"sampled/{seed}")
    made, index = 0, first_scene
    decoding = Decoding(max_new_tokens=96, temperature=TEMPERATURE, samples=SAMPLES)
    while made < count:
        scenes = [sample_scene(i, "pairs") for i in range(index, index + 16)]
        index += 16
        requests = [Request(scene.id, rng.choice(QUESTIONS), f"{scene.id}.png") for scene in scenes]
        pictures = {f"{scene.id}.png": draw(scene) for scene in scenes}
        for scene, request, texts in zip(scenes, requests, answer_pictures(answerer, requests, pictures, decoding)):
            pair = best_and_worst([judge(text, scene) for text in texts])
            if pair and made < count:
                made += 1
                yield record(scene, request.prompt, pair[0].text, pair[1].text, "sampled")


def answer_pictures(answerer: Answerer, requests: Any, pictures: dict[str, Any], decoding: Any) -> list[list[str]]:
    """Answers about images that are in memory: written to a temporary folder, where the driver looks for them."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for name, picture in pictures.items():
            picture.save(Path(folder) / name)
        return answerer.answer(requests, folder, decoding)


def written_pairs(first_scene: int, count: int, kind: str, seed: int) -> Iterator[dict[str, Any]]:
    """`edit` and `unrelated` pairs, from truthful captions."""
    rng = random.Random(f"{kind}/{seed}")
    for index in range(first_scene, first_scene + count):
        scene = sample_scene(index, "pairs")
        chosen = truthful_caption(scene, rng)
        if kind == "edit":
            rejected = one_word_edit(chosen, scene, rng)
        else:
            rejected = unrelated_caption(scene, chosen, rng)
        yield record(scene, rng.choice(QUESTIONS), chosen, rejected, kind)


def unrelated_caption(scene: Scene, chosen: str, rng: random.Random) -> str:
    """A truthful caption of a scene elsewhere that shares no object with this one, of similar length."""
    while True:
        other = sample_scene(rng.randrange(10**6, 2 * 10**6), "pairs")
        caption = truthful_caption(other, rng)
        if not set(other.categories) & set(scene.categories) and similar_length(caption, chosen):
            return caption


def record(scene: Scene, question: str, chosen: str, rejected: str, kind: str) -> dict[str, Any]:
    """One row in RLAIF-V's JSON format."""
    return {
        "idx": f"{kind}-{scene.id}",
        "image_path": f"{scene.id}.png",
        "question": question,
        "chosen": chosen,
        "rejected": rejected,
        "origin_dataset": "TinyCOCO",
        "origin_split": json.dumps({"model": "tinycoco-sft", "type": kind}),
    }


def make_pairs(
    answerer: Answerer, seed: int = 0, shares: Mapping[str, int] = SHARES, first_scene: int = 0
) -> list[dict[str, Any]]:
    """So many pairs of each kind, in an order that mixes them. Each kind has 100,000 scenes of its own to draw from."""
    rows = list(sampled_pairs(answerer, first_scene, shares["sampled"], seed))
    rows += written_pairs(first_scene + 100_000, shares["edit"], "edit", seed)
    rows += written_pairs(first_scene + 200_000, shares["unrelated"], "unrelated", seed)
    random.Random(seed).shuffle(rows)
    return rows


# --- Second images ---------------------------------------------------------------------------------------------------

WITHOUT = "-without-"  # in the file name of a scene that is drawn without one category


def with_second_image(row: dict[str, Any]) -> dict[str, Any]:
    """A pair whose second image lacks one thing that its chosen answer names, with an answer that is right for it.

    Raises:
        ValueError: there is only one category in the scene.
    """
    scene, rng = scene_of(row["image_path"]), random.Random(f"second/{row['idx']}")
    named = [category for category in mentioned_categories(row["chosen"]) if category in scene.categories]
    category = rng.choice(named or scene.categories)
    rest = without_category(scene, category)
    answers = [truthful_caption(rest, rng) for _ in range(SAMPLES)]
    second = min(answers, key=lambda answer: abs(len(answer.split()) - len(row["chosen"].split())))
    image = f"{scene.id}{WITHOUT}{category.replace(' ', '_')}.png"
    return row | {"rejected_images": [image], "second": second}


def parts_of(image: str) -> tuple[Scene, str | None]:
    """The scene that an image's file name stands for, and the category that it is drawn without."""
    name, _, category = Path(image).stem.partition(WITHOUT)
    split, _, index = name.rpartition("-")
    return sample_scene(int(index), split), category.replace("_", " ") or None


def scene_of(image: str) -> Scene:
    """What is to be seen on the image of this file name."""
    scene, category = parts_of(image)
    return scene if category is None else without_category(scene, category)
