"""The attention that reads [prefix | answer | answer ...] in an unmodified Hugging Face model.

A model's decoder is told by name which attention and which mask to use; the layout of the pack comes to the attention
as a keyword argument of the model's call. With `Way.MASK` every group is a row of its own, and the model's own rule of
who sees whom (windows, blocks of image tokens) is asked at the positions that a token would have in a row of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from dama.shared_prefix import PackedGroup, PackLayout, shared_prefix_attention

PACKED = "dama_packed"
PADDING = -1  # segment of positions that fill a row up


@dataclass(frozen=True)
class GroupRows:
    """Groups as rows of equal length, for models that need a dense mask.

    Attributes:
        alone: [B, T] the position that each token would have in a row [prefix | its answer].
        segment: [B, T] 0 in the prefix, 1 and up in the answers, PADDING behind them.
    """

    alone: Tensor
    segment: Tensor

    @staticmethod
    def of(groups: Sequence[PackedGroup]) -> GroupRows:
        """Lay every group out in a row."""
        length = max(group.positions for group in groups)
        alone = torch.arange(length).repeat(len(groups), 1)
        segment = torch.full((len(groups), length), PADDING)
        for row, (prefix, answers) in enumerate(groups):
            segment[row, :prefix] = 0
            start = prefix
            for number, answer in enumerate(answers, start=1):
                alone[row, start : start + answer] = torch.arange(prefix, prefix + answer)
                segment[row, start : start + answer] = number
                start += answer
        return GroupRows(alone, segment)

    def visible(self, rule: Callable[..., Tensor]) -> Tensor:
        """[B, 1, T, T] bool: who sees whom by the model's rule (batch, head, query, key), within its own row."""
        row = torch.arange(len(self.alone), device=self.alone.device)[:, None, None, None]
        query, key = self.alone[:, None, :, None], self.alone[:, None, None, :]
        of_query, of_key = self.segment[:, None, :, None], self.segment[:, None, None, :]
        allowed = rule(row, torch.zeros_like(row), query, key)
        return allowed & ((of_key == 0) | (of_key == of_query))


_layout: ContextVar[PackLayout | GroupRows | None] = ContextVar("layout of the rows of a model's call", default=None)


@contextmanager
def rows_hold(layout: PackLayout | GroupRows | None) -> Iterator[None]:
    """A model's call whose rows hold groups: its masks are made for them."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


@torch.compiler.disable  # a layout is another in every batch
def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    pack: PackLayout | None = None,
    scaling: float | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """[B, heads, T, d] to [B, T, heads, d]: by `pack` where the one row holds groups, else by the mask."""
    if softcap is not None:
        return capped_attention(query, key, value, attention_mask, scaling, softcap).transpose(1, 2).contiguous(), None
    if pack is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
    query, key = query.to(value.dtype), key.to(value.dtype)  # under autocast rotary embeddings are in fp32
    return shared_prefix_attention(query, key, value, pack, scaling).transpose(1, 2).contiguous(), None


def capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, cap: float
) -> Tensor:
    """[B, heads, T, d] by scores within [-cap, cap], which torch's own kernels do not have.

    Args:
        mask: [B, 1, T, K] bool, who sees whom; causal where None.
    """
    queries, keys = query.shape[2], key.shape[2]
    if mask is None:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    repeats = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = query @ key.transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = (cap * torch.tanh(scores / cap)).masked_fill(~mask, torch.finfo(scores.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value


def packed_mask(*, mask_function: Callable[..., Tensor], **kwargs: Any) -> Tensor | None:
    """The mask of rows of groups; none for a pack, which says itself who sees whom; else transformers' own."""
    layout = _layout.get()
    if isinstance(layout, PackLayout):
        return None  # transformers would cut answers off where positions start again
    return sdpa_mask(mask_function=mask_function, **kwargs) if layout is None else layout.visible(mask_function)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, packed_mask)
