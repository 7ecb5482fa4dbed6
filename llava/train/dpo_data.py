"""Preference data for training: pairs joined with hardness and reference log-probs, tokenised, checked, batched."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from dama.console import digest_of
from dama.hardness.score import load_hardness
from dama.logps import AnswerLogps
from dama.pairs import (
    ImageFolder,
    PreferencePair,
    SkippedPair,
    check_pairs,
    fault_list,
    image_digests,
    load_image,
    pairs_fingerprint,
    read_pairs,
    resolve_image,
)
from dama.shared_prefix import common_prefix
from dama.stage import differences
from llava.constants import IGNORE_INDEX
from llava.conversation import Template, get_template, image_placeholder
from llava.mm_utils import literal, process_images
from llava.model.splice import ForwardPlan
from llava.train.preprocess import EncodedTurns, encode_turns

# What to call the fields of data_fingerprint and of llava.train.reference.model_fingerprint in errors.
DATA_FLAGS = {
    "pairs": "--data_path (content)", "images": "--image_folder (content)", "template": "--version",
    "model": "--model_name_or_path (content)", "vision_tower": "--vision_tower (content)",
    "tokenizer": "--model_name_or_path (tokenizer)", "image_aspect_ratio": "--image_aspect_ratio",
    "image_processor": "--vision_tower (image processor)", "mm_use_im_start_end": "--mm_use_im_start_end",
}  # fmt: skip


@dataclass(frozen=True)
class PreparedPair:
    """A pair as the trainer needs it: token ids, hardness, reference log-probs."""

    pair: PreferencePair
    chosen: EncodedTurns
    rejected: EncodedTurns
    delta: float
    ref_chosen: float  # sum of log pi_ref over the answer's tokens
    ref_rejected: float


def encode_pair(
    pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, template: Template, use_im_start_end: bool = False
) -> tuple[EncodedTurns, EncodedTurns]:
    """Ids and labels of both answers to the pair's question, the image before it as in LLaVA-v1.5's training.

    A special token's spelling in these texts, such as "</s>", is encoded as the text that it is.
    """
    question = f"{image_placeholder(use_im_start_end)}\n{literal(pair.question, tokenizer)}"

    def encode(answer: str) -> EncodedTurns:
        try:
            turns = [("human", question), ("gpt", literal(answer, tokenizer))]
            return encode_turns(turns, tokenizer, template, has_image=True)
        except ValueError as error:
            raise ValueError(f"pair {pair.id}: {error}") from error

    return encode(pair.chosen), encode(pair.rejected)


class DPODataset(Dataset):
    """Preference pairs, tokenised once; images are read and prepared when they are asked for.

    Args:
        prepared: the pairs. image_folder: where their images lie.
        image_processor, config: the checkpoint's way with images (`image_aspect_ratio`).
    """

    def __init__(
        self, prepared: Sequence[PreparedPair], image_folder: ImageFolder, image_processor: Any, config: Any
    ) -> None:
        self.prepared = list(prepared)
        self.image_folder = image_folder
        self.image_processor = image_processor
        self.config = config

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, i: int) -> PreparedPair:
        return self.prepared[i]

    def pixels(self, image: str) -> Tensor:
        """[3, H, W] of one image file, as the model is to see it."""
        return process_images([load_image(resolve_image(self.image_folder, image))], self.image_processor, self.config)[
            0
        ]


@dataclass(frozen=True)
class DataCollatorForDPODataset:
    """Pairs to one batch. An image that several pairs show is there once.

    With `shared_prefix` a pair is one row [prefix | chosen | rejected]; without, two: the chosen answers first.

    Args:
        image_tokens: positions of an image in the language model; with it a batch brings its ForwardPlan along.
    """

    tokenizer: PreTrainedTokenizerBase
    dataset: DPODataset
    shared_prefix: bool = False
    image_tokens: int | None = None

    def __call__(self, instances: Sequence[PreparedPair]) -> dict[str, Tensor]:
        """Keys: those of `rows`, and images [U, 3, H, W]."""
        pixels = [self.dataset.pixels(image) for image in shown_images(instances)]
        return self.rows(instances) | {"images": torch.stack(pixels)}

    def rows(self, instances: Sequence[PreparedPair]) -> dict[str, Tensor]:
        """All but the pixels.

        Keys: input_ids, attention_mask, targets [R, T]; image_index [R], into `shown_images`; ref_chosen,
        ref_rejected, delta [B]; with the shared prefix tails [B, 2]; R rows, B or 2B of them. With `image_tokens` also
        plan, a ForwardPlan: all that the forward pass needs of the other keys.
        """
        images = shown_images(instances)
        index = [images.index(item.pair.image) for item in instances]
        batch: dict[str, Any] = {}
        tails: tuple[tuple[int, int], ...] = ()
        if self.shared_prefix:
            rows, tails = zip(*(join_answers(item) for item in instances))
            batch["tails"] = torch.tensor(tails)
        else:
            rows = tuple([item.chosen for item in instances] + [item.rejected for item in instances])
            index = index * 2
        if self.image_tokens is not None:
            batch["plan"] = self._plan(rows, index, len(images), tails)
        input_ids = pad_sequence([row.input_ids for row in rows], True, self.tokenizer.pad_token_id)
        lengths = torch.tensor([len(row.input_ids) for row in rows])
        return batch | {
            "input_ids": input_ids,
            "attention_mask": torch.arange(input_ids.shape[1]) < lengths[:, None],
            # Not "labels": the trainer would scale the loss by their number.
            "targets": pad_sequence([row.labels for row in rows], True, IGNORE_INDEX),
            "image_index": torch.tensor(index),
            "ref_chosen": torch.tensor([item.ref_chosen for item in instances], dtype=torch.float64),
            "ref_rejected": torch.tensor([item.ref_rejected for item in instances], dtype=torch.float64),
            "delta": torch.tensor([item.delta for item in instances], dtype=torch.float64),
        }

    def _plan(
        self, rows: Sequence[EncodedTurns], index: list[int], images: int, tails: Sequence[tuple[int, int]]
    ) -> ForwardPlan:
        """Of rows that each show one of the batch's images."""
        ids, labels = [row.input_ids for row in rows], [row.labels for row in rows]
        shown, lengths = [[i] for i in index], [self.image_tokens or 0] * images
        if tails:
            return ForwardPlan.of_pairs(ids, labels, shown, lengths, tails)
        return ForwardPlan.of_rows(ids, labels, shown, lengths)


def answer_logps_of(model: Any, batch: dict[str, Any], logp_chunk: int) -> AnswerLogps:
    """Log-probs of a batch's answers, 2B sums with those of the chosen answers first.

    Args:
        model: LlavaLlamaForCausalLM, wrapped or not.
        batch: `plan`, and `images` [U, 3, H, W] or `features` [U, P, width] of the vision tower, on the model's device.
        logp_chunk: answer positions whose logits exist at one time.
    """
    kind = "features" if "features" in batch else "images"
    return model(plan=batch["plan"], images=batch[kind], images_encoded=kind == "features", logp_chunk=logp_chunk)


def shown_images(items: Sequence[PreparedPair]) -> list[str]:
    """The distinct images of pairs, in order of appearance."""
    return list(dict.fromkeys(item.pair.image for item in items))


def common_length(item: PreparedPair) -> int:
    """How many tokens both rows begin with and neither predicts."""
    rows = item.chosen, item.rejected
    unsupervised = min(int((row.labels != IGNORE_INDEX).nonzero()[0]) for row in rows)
    return min(unsupervised, common_prefix(*(row.input_ids.tolist() for row in rows)))


def join_answers(item: PreparedPair) -> tuple[EncodedTurns, tuple[int, int]]:
    """One row [prefix | chosen | rejected], and how many tokens the two answers have at its end."""
    chosen, rejected = item.chosen, item.rejected
    k = common_length(item)
    joined = EncodedTurns(
        torch.cat([chosen.input_ids, rejected.input_ids[k:]]), torch.cat([chosen.labels, rejected.labels[k:]])
    )
    return joined, (len(chosen.input_ids) - k, len(rejected.input_ids) - k)


# --- Joining and checking --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PreferenceData:
    """What training reads, and what it has to say about it."""

    train: DPODataset
    held_out: DPODataset | None
    delta_bar: float
    skipped: list[SkippedPair]
    provenance: dict[str, Any]


def read_checked_pairs(data_args: Any) -> tuple[list[PreferencePair], list[SkippedPair]]:
    """The pairs of --data_path, every image verified."""
    pairs = read_pairs(data_args.data_path)
    return check_pairs(pairs, data_args.image_folder, data_args.on_bad_image, subject=str(data_args.data_path))


@dataclass(frozen=True)
class EncodedPairs:
    """Token ids of both answers of every pair, and which pairs fit into the model."""

    answers: list[tuple[EncodedTurns, EncodedTurns]]
    fits: list[int]  # positions of the pairs that fit
    long: list[SkippedPair]


def encode_pairs(
    pairs: Sequence[PreferencePair], arguments: Any, tokenizer: PreTrainedTokenizerBase, model: Any
) -> EncodedPairs:
    """Tokenises every pair. Nothing is ever cut: what is too long with its image is left out or an error.

    Raises:
        ValueError: with --on_long_pair fail, naming every pair that is too long.
    """
    model_args, data_args, args = arguments
    template = get_template(model_args.version)
    answers = [encode_pair(pair, tokenizer, template, model.config.mm_use_im_start_end) for pair in pairs]
    limit = min(args.model_max_length, getattr(model.config, "max_position_embeddings", args.model_max_length))
    per_image = model.get_vision_tower().tokens_per_image
    fits, long = [], []
    for i, (pair, both) in enumerate(zip(pairs, answers)):
        length = max(len(answer.input_ids) for answer in both) - 1 + per_image
        if length <= limit:
            fits.append(i)
        else:
            long.append(SkippedPair(pair.id, f"{length} tokens with its image, the model takes {limit}"))
    if long and data_args.on_long_pair == "fail":
        faults = [f"pair {skip.id}: {skip.reason}" for skip in long]
        remedy = "raise --model_max_length as far as the model allows, or --on_long_pair skip"
        raise ValueError(fault_list(str(data_args.data_path), faults, remedy))
    return EncodedPairs(answers, fits, long)


@dataclass(frozen=True)
class PairValues:
    """One number, or two, for every pair, and where they come from."""

    values: Sequence[Any]
    source: dict[str, Any]


def hardness_of_pairs(
    pairs: Sequence[PreferencePair], folder: str | None, data: dict[str, str], needed: bool
) -> PairValues:
    """delta of every pair (Eq. 6): from the stage's folder, else from scores in the data, else zeros if not needed.

    `data` is their `data_fingerprint`.
    """
    if folder:
        hardness = load_hardness(folder)
        refuse_other_inputs("hardness", folder, hardness.fingerprint, data)
        return PairValues([hardness.delta[pair.id] for pair in pairs], hardness.fingerprint)
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
    images = digest_of(image_digests(pairs, data_args.image_folder))
    return {"pairs": pairs_fingerprint(pairs), "images": images}


def refuse_other_inputs(stage: str, folder: str, recorded: dict[str, Any], current: dict[str, Any]) -> None:
    """Raises when a stage's folder was made from something else than what training uses now, naming each field."""
    shared = [name for name in current if name in recorded]
    was, now = ({name: fingerprint[name] for name in shared} for fingerprint in (recorded, current))
    changed = differences(was, now, DATA_FLAGS)
    if changed:
        raise ValueError(
            f"--{stage} {folder}: made from other inputs than this training's ({'; '.join(changed)}). "
            f"Run `python -m dama {stage}` for these inputs into a new folder, or use the inputs it was made from."
        )


def join_pairs(
    pairs: Sequence[PreferencePair],
    hardness: PairValues,
    reference: PairValues,
    arguments: Any,
    tokenizer: PreTrainedTokenizerBase,
    image_processor: Any,
    model: Any,
) -> PreferenceData:
    """Tokenises the pairs, joins them with delta and reference log-probs, and holds some out."""
    _, data_args, args = arguments
    encoded = encode_pairs(pairs, arguments, tokenizer, model)
    without = [pairs[i].id for i in encoded.fits if reference.values[i] is None]
    if without:
        raise ValueError(
            f"reference: expected log-probs for every pair, got none for {len(without)} of {len(encoded.fits)} (first: "
            f"{without[0]}). Run `python -m dama reference` with this training's --model_max_length, and pass its "
            "folder as --reference."
        )
    prepared = [
        PreparedPair(pairs[i], *encoded.answers[i], hardness.values[i], *reference.values[i]) for i in encoded.fits
    ]
    if not prepared:
        raise ValueError(f"{data_args.data_path}: expected pairs to train on, got none of {len(pairs)}")
    train, held_out = hold_out(prepared, data_args.eval_pairs, args.seed)

    def dataset(items: list[PreparedPair]) -> DPODataset:
        return DPODataset(items, data_args.image_folder, image_processor, model.config)

    mean = sum(item.delta for item in train) / len(train)
    return PreferenceData(
        train=dataset(train),
        held_out=dataset(held_out) if held_out else None,
        delta_bar=mean if args.delta_bar is None else args.delta_bar,
        skipped=encoded.long,
        provenance={"data": str(data_args.data_path), "hardness": hardness.source, "reference": reference.source},
    )


def hold_out(items: list[PreparedPair], amount: float, seed: int) -> tuple[list[PreparedPair], list[PreparedPair]]:
    """Splits off about `amount` pairs (a share below 1, or a number), keeping all pairs of an image on one side."""
    wanted = round(amount * len(items)) if amount < 1 else int(amount)
    if wanted == 0:
        return items, []
    images = sorted({item.pair.image for item in items})
    random.Random(seed).shuffle(images)
    counts = {image: 0 for image in images}
    for item in items:
        counts[item.pair.image] += 1
    held: set[str] = set()
    taken = 0
    for image in images:
        if taken >= wanted:
            break
        held.add(image)
        taken += counts[image]
    train = [item for item in items if item.pair.image not in held]
    if not train:
        raise ValueError(f"--eval_pairs {amount}: holds out all {len(items)} pairs; leave some to train on")
    return train, [item for item in items if item.pair.image in held]
