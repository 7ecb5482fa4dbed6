"""Lengths of the longest training items, in tokens."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from operator import attrgetter
from types import SimpleNamespace
from typing import Any, cast

from dama.pairs import PreferencePair
from dama.shared_prefix import PackedGroup
from dama.train.data import ImageChoice
from dama.train.family import PreparedPair, group_lengths
from dama.train.throughput import PairLength
from dama.views import PAIR_VIEWS, View, by_image
from llava.conversation import get_template
from llava.estimate.hub import hub_lengths, longest_of
from llava.supported import is_hub_model
from llava.tokenization import load_tokenizer
from llava.train.arguments import Arguments
from llava.train.dpo_data import encode_answer
from llava.train.preprocess import preprocess, preprocess_multimodal
from llava.train.sft_data import Row

LONGEST = 64  # pairs whose lengths are looked at
PROMPT = 64  # tokens of a template with a short question


def lengths_of(
    arguments: Arguments, items: Sequence[PreferencePair] | Sequence[Row], patches: int
) -> tuple[list[PairLength], str]:
    """(lengths of about the longest pairs, or rows of fine-tuning, that training does not leave out; how known).

    Without data the longest that --model_max_length allows.
    """
    model_args, _, args = arguments
    limit = args.model_max_length
    if is_hub_model(model_args.model_name_or_path):
        if items and (longest_pairs := longest_of(arguments, cast("Sequence[PreferencePair]", items))):
            return hub_lengths(arguments, longest_pairs), "tokenized, of those looked at"
        return without_data(arguments, patches), "--model_max_length"
    try:
        tokenizer = load_tokenizer(str(model_args.model_name_or_path), model_max_length=limit, padding_side="right")
    except (OSError, ValueError):
        tokenizer = None
    if args.task == "DPO":
        pairs = cast("Sequence[PreferencePair]", items)
        if pairs and tokenizer:
            longest = longest_items(pairs, arguments, tokenizer, patches)
            if longest:
                return [length_of(item, patches, views_of(args)) for item in longest], "tokenized"
        if pairs:
            return [guess_length(pair, patches, views_of(args)) for pair in pairs], "a token for 3 characters"
    elif items and tokenizer:
        rows = longest_rows(cast("Sequence[Row]", items), patches)
        return [row_length(row, arguments, tokenizer, patches) for row in rows], "tokenized"
    return without_data(arguments, patches), "--model_max_length"


def without_data(arguments: Arguments, patches: int) -> list[PairLength]:
    """Return the longest item that --model_max_length allows."""
    args = arguments[2]
    answer = max(1, args.model_max_length - patches - PROMPT)
    if args.task != "DPO":
        return [PairLength.of(patches + PROMPT + answer)]
    groups = [PackedGroup(patches + PROMPT, (answer,) * len(group)) for group in by_image(views_of(args))]
    return [PairLength(tuple(groups))]


def views_of(args: Any) -> tuple[View, ...]:
    """The views that preference training with these arguments reads each pair in."""
    return args.preference_loss().views


def guess_length(pair: PreferencePair, patches: int, views: Sequence[View] = PAIR_VIEWS) -> PairLength:
    """Estimate a pair's tokens from its characters, where no tokenizer is available."""
    prefix = patches + PROMPT + len(pair.question) // 3
    answers = [len(answer_of(pair, view)) // 3 for view in views]
    return PairLength(tuple(PackedGroup(prefix, tuple(answers[v] for v in group)) for group in by_image(views)))


def answer_of(pair: PreferencePair, view: View) -> str:
    """The answer that a view reads; empty where the pair has none, which `ImageChoice.of` reports."""
    return getattr(pair, view.answer) or ""


def longest_items(
    pairs: Sequence[PreferencePair], arguments: Arguments, tokenizer: Any, patches: int
) -> list[PreparedPair]:
    """Return about the longest pairs that fit into --model_max_length, in the views that the loss reads.

    They are tokenized in the order of their characters until there are enough; hardness and reference are left at 0.

    Raises:
        ValueError: a pair lacks the second image or answer that a view needs.
    """
    model_args, _, args = arguments
    views, template, found = views_of(args), get_template(str(model_args.version)), []
    choice, marks = ImageChoice.of(pairs, views, args), bool(model_args.mm_use_im_start_end)

    texts = attrgetter("question", *(view.answer for view in views))

    def characters(pair: PreferencePair) -> int:
        return sum(map(len, filter(None, texts(pair))))

    for pair in sorted(pairs, key=characters, reverse=True):
        rows = {
            answer: encode_answer(pair, getattr(pair, answer), tokenizer, template, marks)
            for answer in dict.fromkeys(view.answer for view in views)
        }
        if max(len(row.input_ids) for row in rows.values()) - 1 + patches <= args.model_max_length:
            found.append(PreparedPair(pair, tuple(rows[view.answer] for view in views), choice.images(pair)))
        if len(found) == LONGEST:
            break
    return found


def length_of(item: PreparedPair, patches: int, views: Sequence[View] = PAIR_VIEWS) -> PairLength:
    """Return the tokens of an encoded pair, with `patches` for each of its images."""
    return PairLength(group_lengths(item.rows, views, lambda ids: ids - 1 + patches))


def longest_rows(rows: Sequence[Row], patches: int) -> list[Row]:
    """About the longest conversations, by their characters."""
    return sorted(rows, key=lambda row: -(patches * ("image" in row) + len(text_of_row(row)) / 4))[:LONGEST]


def row_length(row: Row, arguments: Arguments, tokenizer: Any, patches: int) -> PairLength:
    """What goes over --model_max_length is cut in training, the image's positions put in afterwards."""
    model_args, data_args, args = arguments
    source, template = copy.deepcopy(row["conversations"]), get_template(str(model_args.version))
    if has_image := "image" in row:
        flags = SimpleNamespace(
            is_multimodal=data_args.is_multimodal, mm_use_im_start_end=model_args.mm_use_im_start_end
        )
        (source,) = preprocess_multimodal([source], flags)
    (ids,) = preprocess([source], tokenizer, has_image=has_image, template=template)["input_ids"]
    positions = min(len(ids), args.model_max_length) + has_image * (patches - 1)
    return PairLength.of(min(positions, args.model_max_length))


def text_of_row(row: Row) -> str:
    """Return the text of all turns."""
    return " ".join(str(turn["value"]) for turn in row["conversations"])
