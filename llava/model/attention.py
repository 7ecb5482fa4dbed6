"""The attention of training and the reference stage: torch's own, and the shared prefix where a pack is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dama.models.attention import packed_attention

SHARED_PREFIX = "sdpa_shared_prefix"


@torch.compiler.disable  # a layout is another in every batch; compiled layers break here
def attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor | None]:
    """[B, heads, T, d] to [B, T, heads, d]; with `pack` the row holds pairs, see dama.models.attention."""
    if attention_mask is not None and attention_mask.numel() == 1:
        attention_mask = None  # no_mask's: causal, and nothing else
    return packed_attention(module, query, key, value, attention_mask, **kwargs)


def no_mask(device: torch.device) -> Tensor:
    """Stands for "the pack, or causality alone, says who sees whom".

    transformers passes a four-dimensional mask on as it is, and does not search it for padding, for which the host
    would wait.
    """
    return torch.zeros(1, 1, 1, 1, device=device)


AttentionInterface.register(SHARED_PREFIX, attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)
