"""Token ids and labels of many conversations at once, by the tokenizer's batched calls, as flat arrays.

The result is what `encode_turns` gives one conversation at a time. Of three ways each conversation takes the first that
is exact for it: a LLaMA tokenizer's ids word by word from a cache, the tokenizer's batched calls, and `encode_turns`
(text with broken-up special tokens, LLaVA-v0's format, an answer that begins inside a token).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dama.pairs import PreferencePair
from dama.train.rows import EncodedTable
from llava.constants import (
    DEFAULT_IMAGE_TOKEN,
    IGNORE_INDEX,
    IMAGE_TOKEN_INDEX,
)
from llava.conversation import SeparatorStyle, Template, image_placeholder
from llava.mm_utils import BREAK, count_bos, join_chunks, literal, special_spellings
from llava.tokenization import SPACE
from llava.train.kept_rows import kept_rows
from llava.train.preprocess import Turn, answers, encode_turns, segments_of
from llava.train.word_cache import WordCache, word_cache

BATCH = 512
"""Conversations in one call of the tokenizer; its intermediate results take about 20 KB for each."""
SPACES = (" ", SPACE)


class _Row(NamedTuple):
    """One conversation's ids [T], and the tokens (from, to) that are answers."""

    ids: list[int]
    spans: list[tuple[int, int]]


class _Prompt(NamedTuple):
    """A conversation as text: the prompt's parts between images, and the characters (from, to) that are answers."""

    chunks: list[str]
    answers: list[tuple[int, int]]  # counted from the start of the last chunk


def encode_answers(
    pairs: Sequence[PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    use_im_start_end: bool = False,
    answers: Sequence[str] = ("chosen", "rejected"),
) -> EncodedTable:
    """Encode the answers of every pair as `encode_pair` does, pair after pair; of many pairs once for all processes.

    Args:
        answers: fields of a pair; with the two of them pair i has rows 2i (chosen) and 2i + 1 (rejected).

    Raises:
        ValueError: an answer begins or ends inside a token; the message names the pair.
    """
    image = image_placeholder(use_im_start_end)
    spellings = [spelling for spelling in special_spellings(tokenizer) if len(spelling) > 1]

    def escaped(text: str) -> str:
        return literal(text, tokenizer) if any(spelling in text for spelling in spellings) else text

    def conversations() -> Iterator[list[Turn]]:
        for pair in pairs:
            question = f"{image}\n{escaped(pair.question)}"
            context = [("context", escaped(pair.context))] if pair.context else []
            for answer in answers:
                yield [("human", question), *context, ("gpt", escaped(getattr(pair, answer)))]

    def table() -> EncodedTable:
        def name(row: int) -> str:
            return f"pair {pairs[row // len(answers)].id}"

        return encode_conversations(conversations(), tokenizer, template, has_image=True, name=name)

    return kept_rows(table, pairs, tokenizer, template, answers, use_im_start_end)


def encode_conversations(
    conversations: Iterable[Sequence[Turn]],
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    has_image: bool,
    name: Callable[[int], str] = "conversation {}".format,
) -> EncodedTable:
    """Encode conversations at full length, each a row with the ids and labels of `encode_turns`.

    Args:
        name: what errors call the conversation of a number, counted from 0.

    Raises:
        ValueError, AssertionError: as `encode_turns`; a ValueError begins with the conversation's name.
    """
    encoder = _Encoder(tokenizer, template, has_image, word_cache(tokenizer), name)
    ids, supervised, lengths = [], [], [np.zeros(1, np.int64)]
    remaining, start = iter(conversations), 0
    while batch := list(itertools.islice(remaining, BATCH)):
        rows = encoder.encode(batch, start)
        lengths.append(np.array([len(row.ids) for row in rows], np.int64))
        ids.append(np.fromiter(itertools.chain.from_iterable(row.ids for row in rows), np.int32, lengths[-1].sum()))
        supervised.append(_marked(rows, lengths[-1]))
        start += len(batch)
    none = [np.zeros(0, np.int32)]
    return EncodedTable(
        np.concatenate(ids or none), np.concatenate(supervised or none).astype(bool), np.concatenate(lengths).cumsum()
    )


def _marked(rows: Sequence[_Row], lengths: NDArray[np.int64]) -> NDArray[np.bool_]:
    marks = np.zeros(lengths.sum(), bool)
    for row, end in zip(rows, lengths.cumsum()):
        for first, last in row.spans:
            start = end - len(row.ids)
            marks[start + first : start + last] = True
    return marks


@dataclass(frozen=True)
class _Encoder:
    """What stays the same for all batches."""

    tokenizer: PreTrainedTokenizerBase
    template: Template
    has_image: bool
    cache: WordCache | None
    name: Callable[[int], str]

    def encode(self, batch: Sequence[Sequence[Turn]], start: int) -> list[_Row]:
        """Rows of the conversations whose numbers begin with `start`."""
        prompts = [self._named(start + index, self._prompt_of, turns) for index, turns in enumerate(batch)]
        rows = [_from_words(prompt, self.cache) if prompt else None for prompt in prompts]
        self._fill_batched(rows, prompts)
        return [
            self._named(start + index, self._encode_one, batch[index]) if row is None else row
            for index, row in enumerate(rows)
        ]

    def _named(self, number: int, encode: Callable[[Sequence[Turn]], Any], turns: Sequence[Turn]) -> Any:
        try:
            return encode(turns)
        except ValueError as error:
            raise ValueError(f"{self.name(number)}: {error}") from error

    def _prompt_of(self, turns: Sequence[Turn]) -> _Prompt | None:
        return _prompt_of(turns, self.template, self.has_image)

    def _encode_one(self, turns: Sequence[Turn]) -> _Row:
        row = encode_turns(turns, self.tokenizer, self.template, self.has_image)
        edges = np.flatnonzero(np.diff(row.labels.numpy() != IGNORE_INDEX, prepend=False, append=False)).tolist()
        return _Row(row.input_ids.tolist(), list(zip(edges[::2], edges[1::2])))

    def _fill_batched(self, rows: list[_Row | None], prompts: Sequence[_Prompt | None]) -> None:
        """Give rows that are still missing, where possible, what one call of the tokenizer finds for all of them."""
        missing = [(i, prompt) for i, prompt in enumerate(prompts) if prompt is not None and rows[i] is None]
        places = {text: i for i, text in enumerate(dict.fromkeys(text for _, p in missing for text in p.chunks))}
        if not places:
            return
        encoded = self.tokenizer(list(places), return_attention_mask=False, verbose=False)
        for index, prompt in missing:
            rows[index] = _from_batch(prompt, encoded, [places[text] for text in prompt.chunks], self.tokenizer)


def _prompt_of(turns: Sequence[Turn], template: Template, has_image: bool) -> _Prompt | None:
    """The conversation as text; None where the batched way does not apply."""
    if template.sep_style is SeparatorStyle.SINGLE:
        return None
    segments = segments_of(turns, template)
    text = "".join(segment.text for segment in segments)
    if BREAK in text:
        return None
    chunks = text.split(DEFAULT_IMAGE_TOKEN) if has_image else [text]
    begin = len(text) - len(chunks[-1])
    return _Prompt(chunks, [(start - begin, stop - begin) for start, stop in answers(segments)])


def _from_words(prompt: _Prompt, cache: WordCache | None) -> _Row | None:
    """The row of one answer that ends the prompt with the end token, from cached words; None for any other."""
    *heads, last = prompt.chunks
    if cache is None or len(prompt.answers) != 1 or not cache.ends_plainly(last):
        return None
    (start, stop), body = prompt.answers[0], last.removesuffix(cache.end)
    at_a_space = 0 < start < len(body) and body[start] in SPACES and body[start - 1] not in SPACES
    if stop != len(last) or not at_a_space or not all(map(cache.is_plain, heads)):
        return None
    ids = [cache.bos_id]
    for head in heads:
        ids += [*cache.ids_of(head), IMAGE_TOKEN_INDEX]
    ids += cache.ids_of(body[:start])
    first = len(ids)
    ids += cache.ids_within(body[start:])
    ids.append(cache.end_id)
    return _Row(ids, [(first, len(ids))])


def _from_batch(
    prompt: _Prompt, encoded: Any, places: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> _Row | None:
    """The ids with the images' tokens, and the answers' tokens; None where an answer's ends are not between tokens."""
    chunks = [encoded.input_ids[place] for place in places]
    encoding, size = encoded.encodings[places[-1]], len(prompt.chunks[-1])
    ids = join_chunks(chunks, IMAGE_TOKEN_INDEX, count_bos(chunks, tokenizer.bos_token_id))
    before = len(ids) - len(chunks[-1])
    spans = []
    for start, stop in prompt.answers:
        first, last = _token_at(encoding, start, size), _token_at(encoding, stop, size)
        if first is None or last is None:
            return None
        spans.append((before + first, before + last))
    return _Row(ids, spans)


def _token_at(encoding: Any, character: int, size: int) -> int | None:
    """Index of the token that begins at a character, the number of tokens at the end of the text, or else None.

    Asks for single tokens, since a list of all places costs more than the tokenization.
    """
    if character < 0:
        return None
    index = len(encoding) if character == size else encoding.char_to_token(character)
    if not index:
        return None
    previous = encoding.token_to_chars(index - 1)
    if previous is None or previous[0] >= character or previous[1] > character:
        return None
    if character < size and encoding.token_to_chars(index)[0] != character:
        return None
    return index
