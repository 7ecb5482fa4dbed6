"""Conversations to ids and labels, for every prompt format by one function: render, tokenise, mark the answers.

A conversation is rendered as segments of text; the ids are those of the whole prompt, and a token is supervised when
the text it stands for lies in an answer. Lengths are never added up, so a row cannot be miscounted and lost.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from dama.train.rows import EncodedRow
from llava.constants import DEFAULT_IMAGE_TOKEN, IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import (
    Segment,
    SeparatorStyle,
    Template,
    conv_templates,
    default_conversation,
    image_placeholder,
)
from llava.mm_utils import tokenize_with_offsets

CHATML_SYSTEM = "<|im_start|>system\n"

# Who ("human" or "gpt"; first also "system"; before a last answer also "context"), and what is said.
Turn = tuple[str, str]
Source = Sequence[Mapping[str, str]]  # a conversation of a data file: {"from": ..., "value": ...} for each turn
Batch = dict[str, Any]  # "input_ids" and "labels": LongTensors [B, T], or lists of B LongTensors [T]


EncodedTurns = EncodedRow  # a conversation: ids, IMAGE_TOKEN_INDEX for an image, and labels


def encode_turns(
    turns: Sequence[Turn], tokenizer: PreTrainedTokenizerBase, template: Template, has_image: bool
) -> EncodedTurns:
    """Ids and labels of one conversation at full length; what is too long is for the caller to report or to cut.

    Supervised are the answers with their end markers; an empty answer has none and supervises nothing. Without
    `has_image` an "<image>" is ordinary text.

    Raises:
        ValueError: the turns do not alternate, or an answer begins or ends in the middle of a token.
        AssertionError: a caption (plain) without its image, or a LLaMA-2 conversation that opens with an empty turn.
    """
    spans: list[tuple[int, int | None]]
    segments = segments_of(turns, template)
    tokens = tokenize("".join(segment.text for segment in segments), tokenizer, has_image)
    if template.sep_style is SeparatorStyle.SINGLE:
        spans = spans_as_counted(segments, tokenizer, has_image)
    else:
        spans = [(tokens.at(start), tokens.at(stop)) for start, stop in answers(segments)]
    ids = torch.tensor(tokens.ids, dtype=torch.long)
    labels = torch.full_like(ids, IGNORE_INDEX)
    for first, last in spans:
        labels[first:last] = ids[first:last]
    return EncodedTurns(ids, labels)


def segments_of(turns: Sequence[Turn], template: Template) -> list[Segment]:
    """The text of a conversation in pieces, answers marked. A first turn from "system" replaces the template's system.

    A turn from "context" before the last answer is what the assistant has said already: no answer, in front of it.

    Raises:
        ValueError, AssertionError: the turns do not fit the template, see `encode_turns`.
    """
    if turns and turns[0][0] == "system":
        template, turns = with_system(template, turns[0][1]), turns[1:]
    if len(turns) < 2 or turns[-2][0] != "context":
        return SEGMENTERS[template.sep_style](template, turns)
    context, answer = turns[-2][1], turns[-1][1]
    segments = SEGMENTERS[template.sep_style](template, [*turns[:-2], ("gpt", f"{context} {answer}")])
    return without_context(segments, context, answer)


def without_context(segments: Sequence[Segment], context: str, answer: str) -> list[Segment]:
    """Mark only the answer behind its context, without the end marker: the text may go on after this sentence.

    Raises:
        ValueError: the format puts something else at the end, or changes the text.
    """
    *before, last = segments
    start = last.text.find(context)
    text = f" {answer.rstrip()}"
    end = start + len(context)
    if not last.is_answer or start < 0 or not last.text.startswith(text, end):
        raise ValueError("context: expected a template that ends in the answer as it is, such as v1; choose --version")
    parts = [(last.text[:end], False), (text, True), (last.text[end + len(text) :], False)]
    return [*before, *(Segment(piece, is_answer) for piece, is_answer in parts if piece)]


def with_system(template: Template, text: str) -> Template:
    """The template with another system text, between the same markers; a blank text changes nothing."""
    if not text.strip() or template.sep_style is SeparatorStyle.PLAIN:
        return template
    marker = CHATML_SYSTEM if template.system.startswith(CHATML_SYSTEM) else ""
    return dataclasses.replace(template, system=marker + text.strip())


def answers(segments: Sequence[Segment]) -> Iterator[tuple[int, int]]:
    """The characters (from, to) of the prompt that are answers."""
    position = 0
    for segment in segments:
        if segment.is_answer:
            yield position, position + len(segment.text)
        position += len(segment.text)


# ------------------------------------------------------------------------------------------- text to tokens with places


@dataclasses.dataclass(frozen=True)
class PlacedTokens:
    """The ids of a prompt and, for each, the characters (from, to) of the prompt it stands for."""

    ids: list[int]
    places: list[tuple[int, int]]

    def at(self, character: int) -> int:
        """The index of the first token from that character on."""
        index = bisect_left(self.places, character, key=lambda place: place[0])
        if index and self.places[index - 1][1] > character:
            raise ValueError(
                f"an answer must begin and end between tokens, but character {character} of the prompt is inside "
                f"token {index - 1} (id {self.ids[index - 1]}, characters {self.places[index - 1]}): "
                "change the spaces or line breaks at the ends of the answer"
            )
        return index


def tokenize(prompt: str, tokenizer: PreTrainedTokenizerBase, has_image: bool) -> PlacedTokens:
    """The ids that tokenizer_image_token gives (those of plain text without `has_image`), each with its place."""
    return PlacedTokens(*tokenize_with_offsets(prompt, tokenizer, has_image))


# ------------------------------------------------------------------------------------------------ the formats of turns


def chat_segments(template: Template, turns: Sequence[Turn]) -> list[Segment]:
    """The prompt that the model will be given, answers included. An opening turn of the assistant is left out."""
    if turns and turns[0][0] == "gpt":
        turns = turns[1:]
    for index, (who, _) in enumerate(turns):
        expected = ("human", "gpt")[index % 2]
        if who != expected:
            raise ValueError(f"turn {index + 1} is from {who!r}, expected {expected!r}: turns must alternate")
    conversation = template.copy()
    for index, (_, text) in enumerate(turns):
        conversation.append_message(template.roles[index % 2], text)
    return conversation.get_segments()


def caption_segments(template: Template, turns: Sequence[Turn]) -> list[Segment]:
    """An image and its caption; the question's words are left out."""
    if len(turns) != 2 or DEFAULT_IMAGE_TOKEN not in turns[0][1]:
        raise AssertionError(
            f"the plain format is for a turn with {DEFAULT_IMAGE_TOKEN} and its caption, got {len(turns)} turns "
            f"opening with {turns[0][1] if turns else ''!r}: choose another --version"
        )
    return [Segment(DEFAULT_IMAGE_TOKEN, False), Segment(turns[1][1] + template.sep, True)]


def signal_segments(template: Template, turns: Sequence[Turn]) -> list[Segment]:
    r"""LLaVA-v0's training text: `### Human: ...\n### Assistant: ...\n### `, not quite its prompt."""
    names = dict(zip(("human", "gpt"), template.roles))
    said = [Segment(f"### {names.get(who, 'unknown')}: {text}\n", who != "human") for who, text in turns]
    return [Segment(f"{template.system}\n\n", False), *said, Segment("### ", True)]


def spans_as_counted(
    segments: Sequence[Segment], tokenizer: PreTrainedTokenizerBase, has_image: bool
) -> list[tuple[int, int | None]]:
    """The tokens (from, to) that LLaVA-v0 was trained on, kept for its checkpoints' sake only.

    Each turn is counted alone, BOS included, so what is supervised drifts by a token or two a turn; and the first two
    tokens of a human turn, meant to be its "###" signal, are supervised too.
    """
    header, *said = [len(tokenize(segment.text, tokenizer, has_image).ids) for segment in segments[:-1]]
    spans: list[tuple[int, int | None]] = []
    cursor = header
    for segment, length in zip(segments[1:], said):
        spans.append((cursor, cursor + (length if segment.is_answer else 2)))
        cursor += length
    return [*spans, (cursor, None)]


SEGMENTERS = MappingProxyType(
    {
        SeparatorStyle.TWO: chat_segments,
        SeparatorStyle.LLAMA_2: chat_segments,
        SeparatorStyle.MPT: chat_segments,
        SeparatorStyle.PLAIN: caption_segments,
        SeparatorStyle.SINGLE: signal_segments,
    }
)


# ---------------------------------------------------------------------------------------------------- LLaVA's own names


def preprocess(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    has_image: bool = False,
    *,
    template: Template = default_conversation,
) -> Batch:
    """Ids and labels of several conversations, padded to a batch; captions (plain) and v0 stay lists of rows.

    Conversations without an image are cut at `tokenizer.model_max_length` tokens, those with one never.
    """
    is_plain = template.sep_style is SeparatorStyle.PLAIN
    has_image = has_image or is_plain
    limit = None if has_image else tokenizer.model_max_length
    rows = [
        encode_turns([(turn["from"], turn["value"]) for turn in source], tokenizer, template, has_image)
        for source in sources
    ]
    ids = [row.input_ids[:limit] for row in rows]
    labels = [row.labels[:limit] for row in rows]
    if is_plain or template.sep_style is SeparatorStyle.SINGLE:
        return {"input_ids": ids, "labels": labels}
    return {
        "input_ids": pad_sequence(ids, batch_first=True, padding_value=tokenizer.pad_token_id),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
    }


def preprocess_v1(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    has_image: bool = False,
    *,
    template: Template = conv_templates["v1"],
) -> Batch:
    """Encode turns as `USER: ... ASSISTANT: ...</s>`."""
    return preprocess(sources, tokenizer, has_image, template=_of_style(template, SeparatorStyle.TWO))


def preprocess_llama_2(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    has_image: bool = False,
    *,
    template: Template = conv_templates["llava_llama_2"],
) -> Batch:
    """Encode turns as `[INST] ... [/INST] ... </s>`."""
    return preprocess(sources, tokenizer, has_image, template=_of_style(template, SeparatorStyle.LLAMA_2))


def preprocess_mpt(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    has_image: bool = False,
    *,
    template: Template = conv_templates["mpt"],
) -> Batch:
    """Encode turns as `<|im_start|>user ...<|im_end|><|im_start|>assistant ...<|im_end|>`."""
    return preprocess(sources, tokenizer, has_image, template=_of_style(template, SeparatorStyle.MPT))


def preprocess_plain(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    template: Template = conv_templates["plain"],
) -> Batch:
    """`<image>caption`, for pre-training the projector."""
    return preprocess(sources, tokenizer, True, template=_of_style(template, SeparatorStyle.PLAIN))


def _of_style(template: Template, style: SeparatorStyle) -> Template:
    if template.sep_style is not style:
        raise ValueError(f"the template's style is {template.sep_style.name}, expected {style.name}: use preprocess()")
    return template


def preprocess_multimodal(
    sources: Sequence[Source], data_args: Any, *, template: Template = default_conversation
) -> list[list[dict[str, str]]]:
    """The conversations with each turn's image in front, marked as `template` and `data_args` want it; new lists.

    A turn keeps one image however often it names "<image>". Nothing is done unless `data_args.is_multimodal`.
    """
    marked = image_placeholder(data_args.mm_use_im_start_end)
    if "mmtag" in template.version:
        marked = f"<Image>{marked}</Image>"

    def place_image(text: str) -> str:
        if not data_args.is_multimodal or DEFAULT_IMAGE_TOKEN not in text:
            return text
        words = text.replace(DEFAULT_IMAGE_TOKEN, "").strip()
        return f"{DEFAULT_IMAGE_TOKEN}\n{words}".strip().replace(DEFAULT_IMAGE_TOKEN, marked)

    return [[{**turn, "value": place_image(turn["value"])} for turn in source] for source in sources]


# ------------------------------------------------------------------------------------------------------- for the reader


def render_supervised(
    ids: torch.Tensor | Sequence[int], labels: torch.Tensor | Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[str]:
    """The supervised tokens of a row [T] as text, in order; an image is "<image>"."""
    pairs = zip(torch.as_tensor(ids).tolist(), torch.as_tensor(labels).tolist())
    supervised = [token for token, label in pairs if label != IGNORE_INDEX]
    texts = tokenizer.convert_ids_to_tokens([max(token, 0) for token in supervised])
    return [DEFAULT_IMAGE_TOKEN if token == IMAGE_TOKEN_INDEX else text for token, text in zip(supervised, texts)]
