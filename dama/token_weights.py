"""Weights of single tokens: on the segments in which two answers differ, or on the tokens that the image decides.

A weight multiplies the token's log-prob under the policy and under the reference alike, before log-probs are summed, so
that every objective of dama.losses can have it: r(y) = sum_t w_t [log pi(y_t) - log pi_ref(y_t)]. Sums that an
objective averages are divided by the sum of the weights.

    segments:G  w_t = G inside segments that differ between the two answers, else 1
                (RLHF-V's DDPO, arXiv 2312.00849, G = 5; RLAIF-V, arXiv 2405.17220, G = 3; CHiP, arXiv 2501.16629,
                G = 2)
    visual      w_t = s(z_t) + 1/2 in the chosen, 3/2 - s(z_t) in the rejected answer, where
                z_t = log pi(y_t | m) - log pi(y_t | m') under the current policy, without gradient, m' the second
                image (TPO, arXiv 2412.14487)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
from itertools import accumulate

import torch
from torch import Tensor

from dama.losses import ViewLogps
from dama.views import CHOSEN, CHOSEN_CORRUPTED, REJECTED, REJECTED_CORRUPTED, View

NONE, SEGMENTS, VISUAL = "none", "segments", "visual"
SPELLINGS = f"{NONE}, {SEGMENTS}:G with G at least 1, {VISUAL}"
WORD_MARKS = "'\N{RIGHT SINGLE QUOTATION MARK}_\N{REPLACEMENT CHARACTER}"  # characters of words besides letters, digits


@dataclass(frozen=True)
class TokenLogps:
    """Log-probs of the answers' tokens of N pairs in V views, flat: pair after pair of the first view, then the next.

    Shapes: M tokens in all; `counts` has the tokens of each answer, V lists of N.
    """

    views: tuple[View, ...]
    policy: Tensor  # [M]
    reference: Tensor  # [M]
    counts: tuple[tuple[int, ...], ...]

    @property
    def answers(self) -> list[int]:
        """[V x N] tokens of each answer, in the order of the values."""
        return [count for view in self.counts for count in view]

    def of(self, view: View, values: Tensor) -> Tensor:
        """The part of [M] values that belongs to a view."""
        sizes = [sum(counts) for counts in self.counts]
        return values.split(sizes)[self.views.index(view)]

    def weighted(self, weights: Tensor, views: Sequence[View]) -> ViewLogps:
        """Sums of weighted log-probs of some of the views; `tokens` are the sums of the weights.

        Args:
            weights: [M].
        """
        answers = self.answers
        rows = torch.arange(len(answers)).repeat_interleave(torch.tensor(answers)).to(weights.device)

        def sums(values: Tensor) -> Tensor:
            return values.new_zeros(len(answers)).index_add(0, rows, values).view(len(self.views), -1)

        wanted = [self.views.index(view) for view in views]
        policy, reference, total = (
            sums(values)[wanted] for values in (weights * self.policy, weights * self.reference, weights)
        )
        return ViewLogps(tuple(views), policy, reference, total)


@dataclass(frozen=True)
class TokenWeights:
    """Which tokens count more.

    Attributes:
        name: `segments` or `visual`. g: weight inside changed segments.
    """

    name: str
    g: float = 1.0

    @staticmethod
    def parse(text: str) -> TokenWeights | None:
        """Read `--token_weights`; None for `none`.

        Raises:
            ValueError: it is no such weighting, or G is no number of at least 1.
        """
        name, _, number = text.partition(":")
        if text == NONE:
            return None
        if text == VISUAL:
            return TokenWeights(VISUAL)
        try:
            g = float(number)
        except ValueError:
            g = math.nan
        if name != SEGMENTS or not 1 <= g < math.inf:
            raise ValueError(f"--token_weights {text}: expected one of {SPELLINGS}")
        return TokenWeights(SEGMENTS, g)

    @property
    def views(self) -> tuple[View, ...]:
        """The views whose log-probs under the policy the weights are made of."""
        return (CHOSEN, REJECTED, CHOSEN_CORRUPTED, REJECTED_CORRUPTED) if self.name == VISUAL else (CHOSEN, REJECTED)

    def __str__(self) -> str:
        return VISUAL if self.name == VISUAL else f"{SEGMENTS}:{self.g:g}"


# --- Changed segments ------------------------------------------------------------------------------------------------


def segment_weights(chosen: Sequence[str], rejected: Sequence[str], g: float) -> tuple[list[float], list[float]]:
    """Weights of both answers' tokens: g in words that are not common to both, in order, else 1 (RLHF-V, Eq. 4).

    Args:
        chosen, rejected: the text that each token adds.
    """
    words = [words_of(texts) for texts in (chosen, rejected)]
    ends = [[0, *accumulate(size for _, size in own)] for own in words]
    weights = [[1.0] * len(chosen), [1.0] * len(rejected)]
    w, other = ([word for word, _ in own] for own in words)
    matcher = SequenceMatcher(None, w, other, autojunk=False)
    for kind, *places in matcher.get_opcodes():
        if kind != "equal":
            for side in (0, 1):
                first, last = (ends[side][place] for place in places[2 * side : 2 * side + 2])
                weights[side][first:last] = [g] * (last - first)
    return weights[0], weights[1]


def words_of(texts: Sequence[str]) -> list[tuple[str, int]]:
    """The words that tokens spell, each with its number of tokens; a punctuation mark is a word of its own."""
    words: list[tuple[str, int]] = []
    last = ""  # the character before
    for text in texts:
        if words and (not text or (_of_word(last) and _of_word(text[0]))):
            word, size = words[-1]
            words[-1] = (word + text, size + 1)
        else:
            words.append((text.strip() or text, 1))
        last = text[-1:] or last
    return words


def _of_word(character: str) -> bool:
    return character.isalnum() or (character != "" and character in WORD_MARKS)


class TokenTexts:
    """The text that each token of a sequence adds to what is before it.

    Args:
        decode: token ids to text, special tokens included.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self.decode = decode
        self.known: dict[tuple[int, ...], str] = {}  # text of single tokens and of neighbors

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """The texts of the tokens; a part of a character adds none until it is complete."""
        return [self._added(tuple(ids[max(0, i - 1) : i]), token) for i, token in enumerate(ids)]

    def _added(self, before: tuple[int, ...], token: int) -> str:
        return self._text((*before, token))[len(self._text(before)) :]

    def _text(self, ids: tuple[int, ...]) -> str:
        if ids not in self.known:
            self.known[ids] = self.decode(list(ids)) if ids else ""
        return self.known[ids]


# --- What the image decides ------------------------------------------------------------------------------------------


def visual_weights(z: Tensor, view: View) -> Tensor:
    """s(z) + 1/2 of the chosen answer's tokens, 3/2 - s(z) of the rejected one's (TPO, arXiv 2412.14487).

    Args:
        z: [T] log pi(y_t | m) - log pi(y_t | m').
    """
    share = torch.sigmoid(z.detach())
    return share + 0.5 if view.answer == CHOSEN.answer else 1.5 - share


def visual_differences(logps: TokenLogps) -> dict[str, Tensor]:
    """Visual contrast z of both answers' tokens under the policy, without gradient, by answer."""
    policy = logps.policy.detach()
    pairs = ((CHOSEN, CHOSEN_CORRUPTED), (REJECTED, REJECTED_CORRUPTED))
    return {own.answer: logps.of(own, policy) - logps.of(other, policy) for own, other in pairs}
