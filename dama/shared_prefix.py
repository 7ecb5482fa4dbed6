"""One pass over [prefix | chosen | rejected]: image and question are computed once for both answers of a pair.

The pairs of a micro-batch lie one after the other in a single row, without padding. The rejected answer attends to the
prefix and itself, not to the chosen one, and its positions go on where the prefix ends; so its log-probs are those of
a row of its own.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple

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


# --- Attention -------------------------------------------------------------------------------------------------------

SDPA, TORCH_VARLEN, FLASH_VARLEN = "scaled_dot_product_attention", "torch varlen", "flash_attn varlen"

# (query [Tq, heads, d], key, value [Tk, key heads, d], bounds of the queries' and of the keys' sequences, the longest
# of each, scale) to [Tq, heads, d]; causal, aligned to the bottom right.
VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]


def attention_backend(device: torch.device, dtype: torch.dtype) -> str:
    """The fastest attention for packed pairs there: the varlen kernels are for half precision on Ampere and later."""
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return SDPA
    if torch.cuda.get_device_capability(device) < (8, 0):
        return SDPA
    if importlib.util.find_spec("flash_attn"):
        return FLASH_VARLEN
    return TORCH_VARLEN if importlib.util.find_spec("torch.nn.attention.varlen") else SDPA


def shared_prefix_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: PackLayout,
    scale: float | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """Causal attention within [prefix | chosen] and within [prefix | rejected] of every pair.

    Args:
        query: [1, heads, T, d]; key, value: [1, key heads, T, d], fewer heads under grouped-query attention.
        scale: of the scores; d ** -0.5 when None.
        backend: `attention_backend`'s choice when None.

    Returns:
        [1, heads, T, d].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    backend = backend or attention_backend(query.device, query.dtype)
    if backend == SDPA:
        return sdpa_attention(query, key, value, layout, scale)
    return varlen_attention(query, key, value, layout, scale, varlen_kernel(backend))


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scale: float) -> Tensor:
    """Two calls a pair, no mask tensor: queries [prefix, chosen] on keys [prefix, chosen]; queries [rejected] on keys
    [prefix, rejected], the causal triangle aligned to the bottom right."""
    options: dict[str, Any] = {"scale": scale, "enable_gqa": key.shape[1] != query.shape[1]}
    # Pieces by split: the gradient of a slice is as large as the whole row.
    queries = query.split([n for prefix, chosen, rejected in layout.pairs for n in (prefix + chosen, rejected)], dim=2)
    keys, values = (t.split([n for pair in layout.pairs for n in pair], dim=2) for t in (key, value))
    outputs = []
    for i, pair in enumerate(layout.pairs):
        k, v = (torch.cat(pieces[3 * i : 3 * i + 2], dim=2) for pieces in (keys, values))
        outputs.append(scaled_dot_product_attention(queries[2 * i], k, v, is_causal=True, **options))
        k, v = (torch.cat(pieces[3 * i : 3 * i + 3 : 2], dim=2) for pieces in (keys, values))
        triangle = causal_lower_right(pair.rejected, pair.prefix + pair.rejected)
        outputs.append(scaled_dot_product_attention(queries[2 * i + 1], k, v, attn_mask=triangle, **options))
    return torch.cat(outputs, dim=2)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scale: float, kernel: VarlenKernel
) -> Tensor:
    """One call for all pairs: two sequences a pair, the queries as they lie, the keys of the prefix gathered twice."""
    plan = varlen_plan(layout, query.device)
    q, k, v = (t[0].transpose(0, 1) for t in (query, key, value))
    # Not k[keys]: its gradient sorts; at most two terms meet in this one's, so their order does not matter.
    k, v = (t.index_select(0, plan.keys) for t in (k, v))
    out = kernel(q, k, v, plan.query_bounds, plan.key_bounds, plan.longest_query, plan.longest_key, scale)
    return out.transpose(0, 1)[None]


class VarlenPlan(NamedTuple):
    """The sequences of a pack, [prefix | chosen] and [rejected] of each pair in turn, as varlen kernels want them."""

    keys: Tensor  # [Tk] which position of the pack each key is
    query_bounds: Tensor  # [2B + 1] int32, where each sequence's queries begin
    key_bounds: Tensor  # [2B + 1] int32
    longest_query: int
    longest_key: int


@lru_cache(maxsize=4)  # a forward pass asks once in every layer
def varlen_plan(layout: PackLayout, device: torch.device) -> VarlenPlan:
    queries, keys = [], []
    for start, (prefix, chosen, rejected) in zip(layout.starts, layout.pairs):
        second = start + prefix + chosen
        queries += [prefix + chosen, rejected]
        keys += [[*range(start, second)], [*range(start, start + prefix), *range(second, second + rejected)]]

    def bounds(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)

    lengths = [len(positions) for positions in keys]
    gathered = torch.tensor([position for positions in keys for position in positions], device=device)
    return VarlenPlan(gathered, bounds(queries), bounds(lengths), max(queries), max(lengths))


@cache
def varlen_kernel(backend: str) -> VarlenKernel:
    """flash_attn's kernel, or torch's, whose signature differs by release."""
    if backend == FLASH_VARLEN:
        from flash_attn import flash_attn_varlen_func

        return lambda q, k, v, bq, bk, nq, nk, scale: flash_attn_varlen_func(
            q, k, v, bq, bk, nq, nk, softmax_scale=scale, causal=True
        )
    from torch.nn.attention import varlen

    varlen_attn: Callable[..., Tensor] = varlen.varlen_attn  # type: ignore[assignment]  # a pair only where asked for
    accepted = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in accepted else {"window_size": (-1, 0)}

    def torch_varlen(
        q: Tensor, k: Tensor, v: Tensor, bq: Tensor, bk: Tensor, nq: int, nk: int, scale: float
    ) -> Tensor:
        options: dict[str, Any] = dict(causal)
        if "scale" in accepted:
            options["scale"] = scale
        else:
            q = q * (scale * q.shape[-1] ** 0.5)
        if k.shape[1] != q.shape[1]:
            if "enable_gqa" in accepted:
                options["enable_gqa"] = True
            else:
                k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
        return varlen_attn(q, k, v, bq, bk, nq, nk, **options)

    return torch_varlen
