"""One pass over [prefix | chosen | rejected]: image and question are computed once for both answers of a pair.

The pairs of a micro-batch lie one after the other in a single row, without padding. The rejected answer attends to the
prefix and itself, not to the chosen one, and its positions go on where the prefix ends; so its log-probs are those of
a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from dama.logps import IGNORE_INDEX


class PackedPair(NamedTuple):
    """Positions of the three parts of a pair."""

    prefix: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class PackLayout:
    """Where the parts of each pair lie in the packed row of T positions."""

    pairs: tuple[PackedPair, ...]

    @cached_property
    def starts(self) -> list[int]:
        """First position of each pair."""
        return [0, *accumulate(sum(pair) for pair in self.pairs)][:-1]

    @property
    def positions(self) -> int:
        return sum(sum(pair) for pair in self.pairs)

    def position_ids(self, device: torch.device | None = None) -> Tensor:
        """[1, T]: both answers go on where their prefix ends."""
        parts = []
        for prefix, chosen, rejected in self.pairs:
            parts += [torch.arange(prefix + chosen), torch.arange(prefix, prefix + rejected)]
        return torch.cat(parts)[None].to(device)

    def predictors(self, device: torch.device | None = None) -> Tensor:
        """[T] the position whose hidden state predicts each position's token; -1 for the first of a pair."""
        previous = torch.arange(self.positions) - 1
        for start, (prefix, chosen, _) in zip(self.starts, self.pairs):
            previous[start] = -1
            if start + prefix + chosen < self.positions:
                previous[start + prefix + chosen] = start + prefix - 1
        return previous.to(device)

    def rows(self, device: torch.device | None = None) -> Tensor:
        """[T] the answer that each position belongs to: i for the chosen of pair i (and its prefix), B + i rejected."""
        count = len(self.pairs)
        owner = torch.tensor([n for i in range(count) for n in (i, count + i)])
        repeats = torch.tensor([n for prefix, chosen, rejected in self.pairs for n in (prefix + chosen, rejected)])
        return owner.repeat_interleave(repeats).to(device)

    def answers(self, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(positions whose hidden states predict, targets, rows) of the M supervised tokens, each [M].

        Args:
            labels: [T], IGNORE_INDEX where nothing is predicted.
        """
        supervised = (labels != IGNORE_INDEX).nonzero().flatten()
        device = labels.device
        return self.predictors(device)[supervised], labels[supervised], self.rows(device)[supervised]


def common_prefix(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """How many leading tokens two rows have in common, at least one being left for each."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(limit) if chosen[i] != rejected[i]), limit)


def shared_prefix_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scale: float | None = None
) -> Tensor:
    """Causal attention within [prefix | chosen] and within [prefix | rejected] of every pair.

    Two calls a pair, no mask tensor: queries [prefix, chosen] on keys [prefix, chosen]; queries [rejected] on keys
    [prefix, rejected], the causal triangle aligned to the bottom right.

    Args:
        query: [1, heads, T, d]; key, value: [1, key heads, T, d], fewer heads under grouped-query attention.

    Returns:
        [1, heads, T, d].
    """
    gqa = key.shape[1] != query.shape[1]
    outputs = []
    for start, (prefix, chosen, rejected) in zip(layout.starts, layout.pairs):
        first = slice(start, start + prefix + chosen)
        second = slice(first.stop, first.stop + rejected)
        shared = slice(start, start + prefix)
        outputs.append(
            scaled_dot_product_attention(
                query[:, :, first], key[:, :, first], value[:, :, first], is_causal=True, scale=scale, enable_gqa=gqa
            )
        )
        if rejected:
            keys, values = (torch.cat([t[:, :, shared], t[:, :, second]], dim=2) for t in (key, value))
            outputs.append(
                scaled_dot_product_attention(
                    query[:, :, second],
                    keys,
                    values,
                    attn_mask=causal_lower_right(rejected, prefix + rejected),
                    scale=scale,
                    enable_gqa=gqa,
                )
            )
    return torch.cat(outputs, dim=2)
