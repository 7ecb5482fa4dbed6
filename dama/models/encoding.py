"""Preference pairs as rows of a model's own chat template, images written out at their size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from dama.models.chat import ChatTemplate, Turn
from dama.models.images import ProcessorImages
from dama.pairs import PreferencePair
from dama.train.family import ImageRef
from dama.train.rows import EncodedTable, TableRows
from dama.views import View

AT_ONCE = 1000  # pairs whose texts exist at one time


class PairEncoder:
    """Encodes the views of pairs.

    Args:
        chat: the template. images: how an image is written. views: of each pair.
        size_of: width and height of an image in pixels.
    """

    def __init__(
        self,
        chat: ChatTemplate,
        images: ProcessorImages,
        views: Sequence[View],
        size_of: Callable[[ImageRef], tuple[int, int]],
    ) -> None:
        self.chat, self.images, self.views, self.size_of = chat, images, tuple(views), size_of

    def encode(self, pairs: Sequence[PreferencePair], images: Sequence[Sequence[ImageRef]]) -> list[TableRows]:
        """The rows of every pair, one for each view. Raises ValueError naming a pair that cannot be encoded."""
        for pair in pairs:
            self._validate(pair)
        ids, supervised, lengths = [], [], []
        for start in range(0, len(pairs), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            for prompt, whole in self._rows(pairs[part], images[part]):
                ids.append(np.asarray(whole, dtype=np.int32))
                supervised.append(np.arange(len(whole)) >= prompt)
                lengths.append(len(whole))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        table = EncodedTable(np.concatenate(ids), np.concatenate(supervised), offsets)
        count = len(self.views)
        return [TableRows(table, tuple(range(i * count, (i + 1) * count))) for i in range(len(pairs))]

    def _rows(
        self, pairs: Sequence[PreferencePair], images: Sequence[Sequence[ImageRef]]
    ) -> Iterator[tuple[int, list[int]]]:
        """(ids of the prompt, counted; ids of the row) of every view of every pair."""
        shown = [image for of_views in images for image in of_views]
        turns = [Turn(pair.question, said(pair, view)) for pair in pairs for view in self.views]
        owners = [pair for pair in pairs for _ in self.views]
        rows = [behind_context(pair, row, self.chat.end) for pair, row in zip(owners, self.chat.rows(turns))]
        texts = [
            (self.images.written_out(prompt, [self.size_of(image)]), answer)
            for (prompt, answer), image in zip(rows, shown, strict=True)
        ]
        prompts = self.chat.token_ids([prompt for prompt, _ in texts])
        wholes = self.chat.token_ids([prompt + answer for prompt, answer in texts])
        for pair, prompt, whole in zip(owners, prompts, wholes, strict=True):
            if whole[: len(prompt)] != prompt:
                raise ValueError(
                    f"pair {pair.id}: expected its rows to begin with the tokens of its prompt, got others: the "
                    "tokenizer joins the prompt's end with the answer's beginning"
                )
            yield len(prompt), whole

    def _validate(self, pair: PreferencePair) -> None:
        """Raise ValueError where a text spells a special token, which would be read as one."""
        names = ("question", "context", "chosen", "rejected", "second")
        texts: dict[str, str | None] = {name: getattr(pair, name) for name in names}
        for field, text in texts.items():
            found = self.chat.special_in(text) if text else None
            if found:
                raise ValueError(
                    f"pair {pair.id}: its {field} contains {found!r}, a special token of this model; remove it, or "
                    "spell it otherwise"
                )


def said(pair: PreferencePair, view: View) -> str:
    """What the assistant says: the answer of a view, behind the pair's context where it has one."""
    answer = str(getattr(pair, view.answer))
    return f"{pair.context} {answer}" if pair.context else answer


def behind_context(pair: PreferencePair, row: tuple[str, str], end: str) -> tuple[str, str]:
    """Prompt and answer of a row, a context moved to the prompt; then nothing ends the turn: the text may go on.

    Raises:
        ValueError: the template does not write the context as it is.
    """
    prompt, answer = row
    if not pair.context:
        return row
    before, found, own = answer.removesuffix(end).partition(pair.context)
    if not found:
        raise ValueError(
            f"pair {pair.id}: its context: expected it as it is in the chat template, got {answer[:120]!r}"
        )
    return prompt + before + found, own.rstrip()
