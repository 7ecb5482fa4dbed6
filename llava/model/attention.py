"""The attention of training and the reference stage: torch's own, and the shared prefix where a pack is given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dama.shared_prefix import PackLayout, shared_prefix_attention

SHARED_PREFIX = "sdpa_shared_prefix"


@torch.compiler.disable  # a layout is another in every batch; compiled layers break here
def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pack: PackLayout | None = None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[B, heads, T, d] to [B, T, heads, d]; with `pack` the row holds pairs, see dama.shared_prefix."""
    if pack is None:
        if attention_mask is not None and attention_mask.numel() == 1:
            attention_mask = None  # no_mask's: causal, and nothing else
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    # Under autocast the rotary embedding leaves queries and keys in fp32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return shared_prefix_attention(query, key, value, pack, scaling).transpose(1, 2).contiguous(), None


def no_mask(device: torch.device) -> Tensor:
    """Stands for "the pack, or causality alone, says who sees whom".

    transformers passes a four-dimensional mask on as it is, and does not search it for padding, for which the host
    would wait.
    """
    return torch.zeros(1, 1, 1, 1, device=device)


AttentionInterface.register(SHARED_PREFIX, attention)
AttentionMaskInterface.register(SHARED_PREFIX, sdpa_mask)
