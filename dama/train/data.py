"""Preference data for training: pairs encoded, joined with hardness and reference log-probs, checked, split."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from PIL import Image
from torch.utils.data import Dataset

from dama.checked_pairs import CheckedPairs, check_pair_file, read_pair_file
from dama.console import digest_of
from dama.corruptions import FIELD, OTHER_IMAGE, corrupted, other_number
from dama.errors import error_list
from dama.hardness.score import load_hardness
from dama.hardness.sources import HardnessSource, delta_from, generative_gap
from dama.image_table import table_of_images
from dama.images import ImageFolder, load_image, resolve_image
from dama.pairs import (
    FILE_REMEDY,
    PairsError,
    PreferencePair,
    SkippedPair,
    all_images,
    distinct_images,
    pairs_fingerprint,
)
from dama.stage import differences
from dama.train.family import ImageRef, ModelFamily, PreparedPair
from dama.train.rows import RowsOfPair, longest
from dama.views import PAIR_VIEWS, View

# What to call the fields of data_fingerprint and of a family's fingerprint in errors.
DATA_FLAGS = {
    "pairs": "--data_path (content)", "images": "--image_folder (content)", "template": "--version",
    "model": "--model_name_or_path (content)", "vision_tower": "--vision_tower (content)",
    "tokenizer": "--model_name_or_path (tokenizer)", "image_aspect_ratio": "--image_aspect_ratio",
    "image_processor": "--vision_tower (image processor)", "mm_use_im_start_end": "--mm_use_im_start_end",
    "views": "--loss (views)", "corruption": "--corruption", "chat_template": "--system_prompt, or the chat template",
    "per_token": "--per_token",
}  # fmt: skip


class PairDataset(Dataset):
    """Preference pairs, encoded once; images are read and prepared when they are asked for.

    Args:
        prepared: the pairs. image_folder: where their image paths start.
        prepare_image: the RGB images of a view to pixels, as ModelFamily.prepare_image.
    """

    def __init__(
        self,
        prepared: Sequence[PreparedPair],
        image_folder: ImageFolder,
        prepare_image: Callable[..., Any],
    ) -> None:
        self.prepared = list(prepared)
        self.image_folder = image_folder
        self.prepare_image = prepare_image

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, i: int) -> PreparedPair:
        return self.prepared[i]

    def pixels(self, image: ImageRef) -> Any:
        """What the family's `prepare_image` makes of a view's images: [3, H, W], or [F, 3, H, W] in crops."""
        return self.prepare_image(*(self._loaded(path, image) for path in image.paths))

    def _loaded(self, path: str, image: ImageRef) -> Image.Image:
        loaded = load_image(resolve_image(self.image_folder, path))
        return corrupted(loaded, image.corruption, image.seed, image.pair) if image.corruption else loaded


@dataclass(frozen=True)
class ImageChoice:
    """Which image each view of a pair shows.

    Args:
        views: of each pair. corruption, seed: how the second image is made. names: of all pairs' images, for
            `other_image`.
    """

    views: tuple[View, ...] = PAIR_VIEWS
    corruption: str = ""
    seed: int = 0
    names: tuple[str, ...] = ()

    @staticmethod
    def of(pairs: Sequence[PreferencePair], views: tuple[View, ...], args: Any) -> ImageChoice:
        """For training with these arguments.

        Raises:
            ValueError: naming the pairs that lack the second image or the second answer that the views need.
        """
        compares = any(view.corrupted for view in views)
        wants_image = compares and args.corruption == FIELD
        wants_answer = any(view.answer == "second" for view in views)
        texts_alone = [pair.id for pair in pairs if not pair.image] if compares else []
        without_image = [pair.id for pair in pairs if pair.second_image is None] if wants_image else []
        without_answer = [pair.id for pair in pairs if pair.second is None] if wants_answer else []
        of_several = [pair.id for pair in pairs if pair.more_images] if wants_image else []
        errors = [
            f"{len(ids)} of {len(pairs)} pairs {what} (first: {ids[0]})"
            for ids, what in (
                (texts_alone, "without an image, which the objective compares with another"),
                (without_image, "without rejected_images"),
                (of_several, f"of several images, of which --corruption {FIELD} replaces only a single one"),
                (without_answer, "without a second answer, field `second`"),
            )
            if ids
        ]
        if errors:
            remedy = "add the fields to --data_path, remove these rows, or choose another --loss or --corruption"
            raise ValueError(error_list(f"--loss {' '.join(args.loss)}", errors, remedy))
        return ImageChoice(views, args.corruption, args.corruption_seed, tuple(distinct_images(pairs)))

    def images(self, pair: PreferencePair) -> tuple[ImageRef, ...]:
        """What each view shows."""
        return tuple(self._second(pair) if view.corrupted else ImageRef(pair.own_images) for view in self.views)

    def _second(self, pair: PreferencePair) -> ImageRef:
        if self.corruption == FIELD:
            return ImageRef((str(pair.second_image),))
        if self.corruption != OTHER_IMAGE:
            return ImageRef(pair.own_images, self.corruption, pair.id, self.seed)
        if len(self.names) < 2:
            raise ValueError(f"--corruption {OTHER_IMAGE}: expected another image than {pair.image}, found none")
        return ImageRef(tuple(self._another(name, pair.id, place) for place, name in enumerate(pair.own_images)))

    def _another(self, name: str, pair: str, place: int) -> str:
        owner = f"{pair} image {place + 1}" if place else pair  # so that two images of a pair get two others
        return self.names[other_number(self._numbers[name], len(self.names), self.seed, owner)]

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self.names)}

    def fingerprint(self) -> dict[str, Any]:
        """What log-probs depend on beyond a pair's own two views."""
        if self.views == PAIR_VIEWS:
            return {}
        return {"views": [view.name for view in self.views], "corruption": self.made_by}

    @property
    def made_by(self) -> str:
        """How the second image is made; `none` where no view shows one."""
        return f"{self.corruption}, seed {self.seed}" if any(view.corrupted for view in self.views) else "none"


def checked_pairs_of(data_args: Any) -> CheckedPairs:
    """The pairs of --data_path, every image checked."""
    file, path = read_pair_file(data_args.data_path), str(data_args.data_path)
    if file.row_errors:
        raise PairsError(error_list(path, file.row_errors, FILE_REMEDY))
    return check_pair_file(file, data_args.image_folder, data_args.on_bad_image, subject=path)


def read_checked_pairs(data_args: Any) -> tuple[list[PreferencePair], list[SkippedPair]]:
    """The pairs of --data_path that can be used, and those that were left out."""
    checked = checked_pairs_of(data_args)
    return checked.pairs, checked.skipped


@dataclass(frozen=True)
class EncodedPairs:
    """What all views of every pair read and show, and which pairs fit into the model."""

    rows: Sequence[RowsOfPair]
    images: list[tuple[ImageRef, ...]]
    fits: list[int]  # indices of the pairs that fit
    long: list[SkippedPair]


def encode_pairs(
    pairs: Sequence[PreferencePair], family: ModelFamily, data_args: Any, choice: ImageChoice
) -> EncodedPairs:
    """Encode every pair. Nothing is ever cut: what is too long with its images is left out or an error.

    Raises:
        ValueError: with --on_long_pair fail, naming every pair that is too long.
    """
    if (with_context := [pair.id for pair in pairs if pair.context]) and not getattr(family, "reads_context", False):
        raise ValueError(
            f"{data_args.data_path}: {len(with_context)} of {len(pairs)} pairs have a context (first: "
            f"{with_context[0]}), which this model family does not read; remove these rows"
        )
    if (others := [pair.id for pair in pairs if not pair.is_plain]) and not getattr(
        family, "reads_conversations", False
    ):
        raise ValueError(
            f"{data_args.data_path}: {len(others)} of {len(pairs)} pairs are not one question about one image (first: "
            f"{others[0]}), which is all that this model family reads; remove these rows, or train a Hugging Face "
            "model (docs/models.md)"
        )
    images = [choice.images(pair) for pair in pairs]
    rows = family.encode(pairs, images)
    fits, long = [], []
    for i, (pair, views) in enumerate(zip(pairs, rows)):
        length = family.tokens(longest(views))
        if length <= family.max_tokens:
            fits.append(i)
        else:
            long.append(SkippedPair(pair.id, f"{length} tokens with its image, the model takes {family.max_tokens}"))
    if long and data_args.on_long_pair == "fail":
        errors = [f"pair {skip.id}: {skip.reason}" for skip in long]
        remedy = (
            "raise --model_max_length as far as the model allows, give a smaller --max_pixels where the resolution "
            "follows the image, or --on_long_pair skip"
        )
        raise ValueError(error_list(str(data_args.data_path), errors, remedy))
    return EncodedPairs(rows, images, fits, long)


@dataclass(frozen=True)
class PairValues:
    """A value for every pair, and where the values come from.

    Attributes:
        tokens: of reference log-probs, those of single tokens, by view; empty where none are wanted.
    """

    values: Sequence[Any]
    source: dict[str, Any]
    tokens: Sequence[Any] = ()


def hardness_of_pairs(
    pairs: Sequence[PreferencePair], folder: str | None, data: dict[str, str], needed: bool
) -> PairValues:
    """Delta of every pair (Eq. 6): from the stage's folder, else from scores in the data, else zeros if not needed.

    A pair of texts alone, which no CLIP can score, has the mean: it is trained with the strength of an average pair.
    `data` is their `data_fingerprint`.
    """
    if folder:
        hardness = load_hardness(folder)
        validate_same_inputs("hardness", folder, hardness.fingerprint, data)
        deltas = [hardness.delta[pair.id] if pair.image else hardness.delta_bar for pair in pairs]
        return PairValues(deltas, hardness.fingerprint)
    without = [pair.id for pair in pairs if pair.clip_scores is None]
    if not without:
        scores = [pair.clip_scores for pair in pairs if pair.clip_scores is not None]
        return PairValues([sum(chosen) - sum(rejected) for chosen, rejected in scores], {"scores": "in the data file"})
    if not needed:
        return PairValues([0.0] * len(pairs), {})
    raise ValueError(
        f"hardness: expected delta for every pair, got none for {len(without)} of {len(pairs)} (first: {without[0]}). "
        "Run `python -m dama hardness` and pass its folder as --hardness, or train with --strategy none or model."
    )


def data_fingerprint(pairs: Sequence[PreferencePair], data_args: Any) -> dict[str, str]:
    """Digests of the pairs and of the bytes of their images."""
    table = table_of_images(all_images(pairs), data_args.image_folder)
    return {"pairs": pairs_fingerprint(pairs), "images": digest_of(table.digests_of(pairs))}


def validate_same_inputs(stage: str, folder: str, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    """Raise ValueError where a stage's folder was made from other inputs than training uses now, naming each field."""
    shared = [name for name in current if name in recorded]
    was, now = ({name: fingerprint[name] for name in shared} for fingerprint in (recorded, current))
    changed = differences(was, now, DATA_FLAGS)
    if changed:
        raise ValueError(
            f"--{stage} {folder}: made from other inputs than this training's ({'; '.join(changed)}). "
            f"Run `python -m dama {stage}` for these inputs into a new folder, or use the inputs it was made from."
        )


@dataclass(frozen=True)
class PreferenceData:
    """What training reads, and what the provenance records of it."""

    train: PairDataset
    held_out: PairDataset | None
    delta_bar: float
    skipped: list[SkippedPair]
    provenance: dict[str, Any]


def join_pairs(
    pairs: Sequence[PreferencePair],
    hardness: PairValues,
    reference: PairValues,
    family: ModelFamily,
    data_args: Any,
    args: Any,
) -> PreferenceData:
    """Encode the pairs, join them with delta and reference log-probs, and hold some out.

    Args:
        reference: for each pair a value for each of the family's views, or None where the stage left the pair out.
    """
    encoded = encode_pairs(pairs, family, data_args, ImageChoice.of(pairs, family.views, args))
    validate_reference([pairs[i] for i in encoded.fits], [reference.values[i] for i in encoded.fits])
    delta = deltas_of(encoded, hardness, reference, args)
    prepared = [
        PreparedPair(
            pairs[i], encoded.rows[i], encoded.images[i], reference.values[i], delta[k],
            reference.tokens[i] if reference.tokens else (),
        )
        for k, i in enumerate(encoded.fits)
    ]  # fmt: skip
    validate_token_counts(prepared)
    if not prepared:
        raise ValueError(f"{data_args.data_path}: expected pairs to train on, got none of {len(pairs)}")
    train, held_out = hold_out(prepared, data_args.eval_pairs, args.seed)

    def dataset(items: list[PreparedPair]) -> PairDataset:
        return PairDataset(items, data_args.image_folder, family.prepare_image)

    mean = sum(item.delta for item in train) / len(train)
    return PreferenceData(
        train=dataset(train),
        held_out=dataset(held_out) if held_out else None,
        delta_bar=mean if args.delta_bar is None else args.delta_bar,
        skipped=encoded.long,
        provenance={"data": str(data_args.data_path), "hardness": hardness.source, "reference": reference.source},
    )


def validate_reference(pairs: Sequence[PreferencePair], logps: Sequence[Any]) -> None:
    """Raise ValueError where the reference stage left out pairs that fit here."""
    without = [pair.id for pair, known in zip(pairs, logps, strict=True) if known is None]
    if without:
        raise ValueError(
            f"reference: expected log-probs for every pair, got none for {len(without)} of {len(pairs)} (first: "
            f"{without[0]}). Run `python -m dama reference` with this training's --model_max_length, and pass its "
            "folder as --reference."
        )


def validate_token_counts(items: Sequence[PreparedPair]) -> None:
    """Raise ValueError naming pairs whose answers have more or fewer tokens than the stored log-probs per token."""
    errors = [
        f"pair {item.pair.id}: {item.rows[i].supervised} answer tokens, {len(known)} in the reference stage"
        for item in items
        for i, known in enumerate(item.reference_tokens)
        if known is not None and len(known) != item.rows[i].supervised
    ]
    if errors:
        raise ValueError(error_list("--reference", errors, "run `python -m dama reference --per_token` again"))


def deltas_of(encoded: EncodedPairs, hardness: PairValues, reference: PairValues, args: Any) -> list[float]:
    """Delta of every pair that fits, from --hardness_from's source.

    Raises:
        ValueError: the source needs reference log-probs, and there are none.
    """
    source = HardnessSource(args.hardness_from)
    delta = [hardness.values[i] for i in encoded.fits]
    if source is HardnessSource.CLIP:
        return delta
    logps = torch.tensor([reference.values[i][: len(PAIR_VIEWS)] for i in encoded.fits], dtype=torch.float64)
    if not logps.any():
        raise ValueError(
            f"--hardness_from {source}: expected reference log-probs of every pair, got none; give a folder of "
            "`python -m dama reference` as --reference, or --hardness_from clip"
        )
    pairs = [[encoded.rows[i][v].supervised for v in range(len(PAIR_VIEWS))] for i in encoded.fits]
    gap = generative_gap(logps, torch.tensor(pairs))
    return delta_from(source, torch.tensor(delta, dtype=torch.float64), gap).tolist()


def hold_out(items: list[PreparedPair], amount: float, seed: int) -> tuple[list[PreparedPair], list[PreparedPair]]:
    """Split off about `amount` pairs (a number, or a share below 1, which is at least one pair), by whole images."""
    wanted = max(1, round(amount * len(items))) if 0 < amount < 1 else int(amount)
    if wanted == 0:
        return items, []
    images = sorted({item.pair.place for item in items})
    random.Random(seed).shuffle(images)
    counts = {image: 0 for image in images}
    for item in items:
        counts[item.pair.place] += 1
    held: set[str] = set()
    taken = 0
    for image in images:
        if taken >= wanted:
            break
        held.add(image)
        taken += counts[image]
    train = [item for item in items if item.pair.place not in held]
    if not train:
        raise ValueError(f"--eval_pairs {amount}: holds out all {len(items)} pairs; leave some to train on")
    return train, [item for item in items if item.pair.place in held]
