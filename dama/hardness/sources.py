"""Hardness from two sources: CLIP's delta, and how much more likely the reference model holds the preferred answer.

Source: DA-DPO (arXiv 2601.00623). Both tell how easily a pair is decided; a large value is an easy pair, as with delta.
"""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor


class HardnessSource(StrEnum):
    """Where a pair's delta comes from."""

    CLIP = "clip"
    GENERATIVE = "generative"
    VOTE = "vote"


def generative_gap(logps: Tensor, tokens: Tensor) -> Tensor:
    """Length-normalized reference gap, log pi_ref(w) / |w| - log pi_ref(l) / |l|, in nats per token.

    Args:
        logps: [N, 2] summed log-probs of the chosen and the rejected answer. tokens: [N, 2] their answer tokens.

    Returns:
        [N].
    """
    means = logps / tokens.clamp(min=1)
    return means[:, 0] - means[:, 1]


def by_rank(values: Tensor, like: Tensor) -> Tensor:
    """The numbers of `like`, given to the pairs in the order of `values`: [N] and [N] to [N].

    The k-th smallest value becomes the k-th smallest of `like`, so that both have one scale; ties keep their order.
    """
    ranked = torch.empty_like(like)
    ranked[values.argsort(stable=True)] = like.sort().values
    return ranked


def delta_from(source: HardnessSource, delta: Tensor, gap: Tensor) -> Tensor:
    """[N] hardness: CLIP's delta, the generative gap, or the mean of delta and of the gap brought to its scale by rank.

    Args:
        delta: [N] of CLIP (Eq. 6). gap: [N] of `generative_gap`.
    """
    if source is HardnessSource.CLIP:
        return delta
    return gap if source is HardnessSource.GENERATIVE else (delta + by_rank(gap, delta)) / 2
