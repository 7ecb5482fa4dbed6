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
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from dama.logps import IGNORE_INDEX, AnswerIndex


class PackedPair(NamedTuple):
    """Positions of the three parts of a pair."""

    prefix: int
    chosen: int
    rejected: int


@dataclass(frozen=True)
class VarlenPlan:
    """The sequences of a pack, [prefix | chosen] and [rejected] of each pair in turn, as varlen kernels want them."""

    keys: Tensor  # [Tk] which position of the pack each key is
    query_bounds: Tensor  # [2B + 1] int32, where each sequence's queries begin
    key_bounds: Tensor  # [2B + 1] int32
    longest_query: int
    longest_key: int


@dataclass(frozen=True)
class PackLayout:
    """Where the parts of each pair lie in the packed row of T positions."""

    pairs: tuple[PackedPair, ...]
    varlen: VarlenPlan

    @staticmethod
    def of(pairs: Sequence[PackedPair]) -> PackLayout:
        """The layout of pairs that lie one after the other."""
        return PackLayout(tuple(pairs), varlen_plan(pairs))

    @cached_property
    def starts(self) -> list[int]:
        """First position of each pair."""
        return [0, *accumulate(sum(pair) for pair in self.pairs)][:-1]

    @property
    def positions(self) -> int:
        return sum(sum(pair) for pair in self.pairs)

    def position_ids(self) -> Tensor:
        """[1, T]: both answers go on where their prefix ends."""
        parts = []
        for prefix, chosen, rejected in self.pairs:
            parts += [torch.arange(prefix + chosen), torch.arange(prefix, prefix + rejected)]
        return torch.cat(parts)[None]

    def predictors(self) -> Tensor:
        """[T] the position whose hidden state predicts each position's token; -1 for the first of a pair."""
        previous = torch.arange(self.positions) - 1
        for start, (prefix, chosen, _) in zip(self.starts, self.pairs):
            previous[start] = -1
            if start + prefix + chosen < self.positions:
                previous[start + prefix + chosen] = start + prefix - 1
        return previous

    def rows(self) -> Tensor:
        """[T] the answer that each position belongs to: i for the chosen of pair i (and its prefix), B + i rejected."""
        count = len(self.pairs)
        owner = torch.tensor([n for i in range(count) for n in (i, count + i)])
        repeats = torch.tensor([n for prefix, chosen, rejected in self.pairs for n in (prefix + chosen, rejected)])
        return owner.repeat_interleave(repeats)

    def answers(self, labels: Tensor) -> AnswerIndex:
        """The supervised tokens of 2B answers, those of the chosen ones first.

        Args:
            labels: [T], IGNORE_INDEX where nothing is predicted.
        """
        supervised = (labels != IGNORE_INDEX).nonzero().flatten()
        rows = self.rows()[supervised]
        tokens = rows.bincount(minlength=2 * len(self.pairs))
        return AnswerIndex(self.predictors()[supervised], labels[supervised], rows, tokens)


def varlen_plan(pairs: Sequence[PackedPair]) -> VarlenPlan:
    """The sequences of pairs that lie one after the other."""
    queries, keys, start = [], [], 0
    for prefix, chosen, rejected in pairs:
        second = start + prefix + chosen
        queries += [prefix + chosen, rejected]
        keys += [range(start, second), [*range(start, start + prefix), *range(second, second + rejected)]]
        start = second + rejected
    lengths = [len(positions) for positions in keys]

    def bounds(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

    gathered = torch.tensor([position for positions in keys for position in positions])
    return VarlenPlan(gathered, bounds(queries), bounds(lengths), max(queries), max(lengths))


def common_prefix(chosen: Sequence[int], rejected: Sequence[int]) -> int:
    """How many leading tokens two rows have in common, at least one being left for each."""
    limit = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(limit) if chosen[i] != rejected[i]), limit)


# --- Attention -------------------------------------------------------------------------------------------------------

SDPA, TORCH_VARLEN, FLASH_VARLEN = "scaled_dot_product_attention", "torch varlen", "flash_attn varlen"
WIDEST_HEAD = 256  # of the varlen kernels, whose head width is also a multiple of EVEN_HEAD
EVEN_HEAD = 8

# (query [Tq, heads, d], key, value [Tk, key heads, d], bounds of the queries' and of the keys' sequences, the longest
# of each, scale) to [Tq, heads, d]; causal, aligned to the bottom right.
VarlenKernel = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, float], Tensor]


@cache
def attention_backend(device: torch.device, dtype: torch.dtype, width: int = EVEN_HEAD) -> str:
    """The fastest attention for packed pairs there, with heads of this width.

    The varlen kernels are for half precision on Ampere and later, and for heads of up to 256 channels.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or width > WIDEST_HEAD:
        return SDPA
    if torch.cuda.get_device_capability(device) < (8, 0):
        return SDPA
    if flash_attn_problem() is None:
        return FLASH_VARLEN
    return TORCH_VARLEN if importlib.util.find_spec("torch.nn.attention.varlen") else SDPA


@cache
def flash_attn_problem() -> str | None:
    """Why flash_attn's varlen kernel cannot be used; None where it can.

    A package that is found may still lack the function (flash-attn 4 has another namespace) or fail to load (built for
    another torch).
    """
    if not importlib.util.find_spec("flash_attn"):
        return "not installed"
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401 (whether it can be had is the question)
    except (ImportError, OSError, RuntimeError) as error:
        lines = str(error).splitlines() or [type(error).__name__]
        return f"installed, but not usable: {lines[0]}"
    return None


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
    backend = backend or attention_backend(query.device, query.dtype, query.shape[-1])
    if backend == SDPA:
        return sdpa_attention(query, key, value, layout, scale)
    return varlen_attention(query, key, value, layout, scale, varlen_kernel(backend))


def sdpa_attention(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scale: float) -> Tensor:
    """Two calls a pair, no mask tensor: queries [prefix, chosen] on keys [prefix, chosen]; queries [rejected] on keys
    [prefix, rejected], the causal triangle aligned to the bottom right.
    """
    options: dict[str, Any] = {"scale": scale, "enable_gqa": key.shape[1] != query.shape[1]}
    # Pieces by split: the gradient of a slice is as large as the whole row.
    queries = query.split([n for prefix, chosen, rejected in layout.pairs for n in (prefix + chosen, rejected)], dim=2)
    keys, values = (t.split([n for pair in layout.pairs for n in pair], dim=2) for t in (key, value))
    outputs = []
    for i, pair in enumerate(layout.pairs):
        k, v = (torch.cat(pieces[3 * i : 3 * i + 2], dim=2) for pieces in (keys, values))
        outputs.append(scaled_dot_product_attention(queries[2 * i], k, v, is_causal=True, **options))
        k, v = (torch.cat(pieces[3 * i : 3 * i + 3 : 2], dim=2) for pieces in (keys, values))
        triangle = q_sees_k(pair.rejected, pair.prefix, query.device)
        outputs.append(scaled_dot_product_attention(queries[2 * i + 1], k, v, attn_mask=triangle, **options))
    return torch.cat(outputs, dim=2)


def q_sees_k(answer: int, prefix: int, device: torch.device) -> Tensor:
    """[answer, prefix + answer] bool: each query of an answer sees the prefix, the answer before it, and itself."""
    return torch.ones(answer, prefix + answer, dtype=torch.bool, device=device).tril(prefix)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scale: float, kernel: VarlenKernel
) -> Tensor:
    """One call for all pairs: two sequences a pair, the queries as they lie, the keys of the prefix gathered twice."""
    plan, width = layout.varlen, query.shape[-1]
    # Zeros that fill a head up to the kernel's width change no score and add nothing to the output.
    query, key, value = (pad(t, (0, -width % EVEN_HEAD)) if width % EVEN_HEAD else t for t in (query, key, value))
    # squeeze, not t[0]: the gradient of an index is a copy of the whole.
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    # Not k[keys]: its gradient sorts; at most two terms meet in this one's, so their order does not matter.
    k, v = (t.index_select(0, plan.keys) for t in (k, v))
    out = kernel(q, k, v, plan.query_bounds, plan.key_bounds, plan.longest_query, plan.longest_key, scale)
    return out[..., :width].transpose(0, 1)[None]


@cache
def varlen_kernel(backend: str) -> VarlenKernel:
    """flash_attn's kernel, or torch's, whose signature differs by release."""
    if backend == FLASH_VARLEN:
        from flash_attn import flash_attn_varlen_func

        return lambda q, k, v, bq, bk, nq, nk, scale: flash_attn_varlen_func(
            q, k, v, bq, bk, nq, nk, softmax_scale=scale, causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip
    from torch.nn.attention import varlen

    varlen_attn: Callable[..., Tensor] = varlen.varlen_attn  # type: ignore[assignment]  # a pair only where asked for
    accepted = inspect.signature(varlen_attn).parameters
    causal = {"is_causal": True} if "is_causal" in accepted else {"window_size": (-1, 0)}

    def torch_varlen(q: Tensor, k: Tensor, v: Tensor, bq: Tensor, bk: Tensor, nq: int, nk: int, scale: float) -> Tensor:
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
