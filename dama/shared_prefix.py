"""One pass over [prefix | answer | answer ...]: image and question are computed once for all answers of a group.

The groups of a micro-batch lie one after the other in a single row, without padding. Every answer attends to its
group's prefix and to itself, not to the other answers, and its positions continue where the prefix ends; so its
log-probs are those of a row of its own. DPO has one group [prefix | chosen | rejected] for each pair; an objective that
also looks at a second image has a second group for it.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from dama.logps import IGNORE_INDEX, AnswerIndex


class PackedGroup(NamedTuple):
    """Number of positions of a prefix, its image included, and of each answer that continues it."""

    prefix: int
    answers: tuple[int, ...]

    @property
    def positions(self) -> int:
        """Length of the group in the packed row, in tokens."""
        return self.prefix + sum(self.answers)


@dataclass(frozen=True)
class VarlenPlan:
    """The sequences of a pack, [prefix | first answer] and each further answer, as varlen kernels want them.

    Shapes: S sequences, one for each answer.
    """

    keys: Tensor  # [Tk] which position of the pack each key is
    query_bounds: Tensor  # [S + 1] int32, where each sequence's queries begin
    key_bounds: Tensor  # [S + 1] int32
    longest_query: int
    longest_key: int


@dataclass(frozen=True)
class PackLayout:
    """Where the prefix and the answers of each group lie in the packed row of T positions.

    Attributes:
        owners: the row of the log-probs that each answer belongs to, in the order in which the answers lie; any for an
            answer without labels.
    """

    groups: tuple[PackedGroup, ...]
    owners: tuple[int, ...]
    varlen: VarlenPlan

    @staticmethod
    def of(groups: Sequence[PackedGroup], owners: Sequence[int] | None = None) -> PackLayout:
        """Lay groups out one after the other.

        Args:
            owners: by default the first answers of all groups come first, then the second ones, and so on.
        """
        if owners is None:
            owners = rows_by_answer([len(group.answers) for group in groups])
        return PackLayout(tuple(groups), tuple(owners), varlen_plan(groups))

    @cached_property
    def starts(self) -> list[int]:
        """First position of each group."""
        return [0, *accumulate(group.positions for group in self.groups)][:-1]

    @property
    def positions(self) -> int:
        """T, the length of the packed row, in tokens."""
        return sum(group.positions for group in self.groups)

    def position_ids(self) -> Tensor:
        """[1, T]: every answer continues where its prefix ends."""
        parts = []
        for prefix, answers in self.groups:
            parts.append(torch.arange(prefix))
            parts += [torch.arange(prefix, prefix + answer) for answer in answers]
        return torch.cat(parts)[None]

    def predictors(self) -> Tensor:
        """[T] the position whose hidden state predicts each position's token; -1 for the first of a group."""
        previous = torch.arange(self.positions) - 1
        for start, (prefix, answers) in zip(self.starts, self.groups):
            previous[start] = -1
            offsets = list(accumulate(answers, initial=start + prefix))
            for offset, length in zip(offsets, answers):
                if length and prefix:
                    previous[offset] = start + prefix - 1
        return previous

    def rows(self) -> Tensor:
        """[T] the row of the log-probs that each position belongs to; a prefix belongs to its first answer's."""
        repeats = [length for first, *others in self._answers_with_prefix() for length in (first, *others)]
        return torch.tensor(self.owners).repeat_interleave(torch.tensor(repeats))

    def _answers_with_prefix(self) -> Iterator[tuple[int, ...]]:
        for prefix, (first, *others) in self.groups:
            yield prefix + first, *others

    def answers(self, labels: Tensor) -> AnswerIndex:
        """Index the supervised tokens of all answers, row by row of `owners`.

        Args:
            labels: [T], IGNORE_INDEX where nothing is predicted.
        """
        supervised = (labels != IGNORE_INDEX).nonzero().flatten()
        rows = self.rows()[supervised]
        tokens = rows.bincount(minlength=max(self.owners) + 1)
        return AnswerIndex(self.predictors()[supervised], labels[supervised], rows, tokens)


def rows_by_answer(counts: Sequence[int]) -> list[int]:
    """The rows of groups with these numbers of answers: all first answers, then all second ones, and so on."""
    order = sorted((answer, group) for group, count in enumerate(counts) for answer in range(count))
    row = {place: number for number, place in enumerate(order)}
    return [row[answer, group] for group, count in enumerate(counts) for answer in range(count)]


def varlen_plan(groups: Sequence[PackedGroup]) -> VarlenPlan:
    """Plan the sequences of groups that lie one after the other."""
    queries: list[int] = []
    keys: list[list[int]] = []
    start = 0
    for prefix, (first, *others) in groups:
        shared, end = range(start, start + prefix), start + prefix + first
        queries.append(prefix + first)
        keys.append([*range(start, end)])
        for answer in others:
            queries.append(answer)
            keys.append([*shared, *range(end, end + answer)])
            end += answer
        start = end
    lengths = [len(positions) for positions in keys]

    def bounds(lengths: list[int]) -> Tensor:
        return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)

    gathered = torch.tensor([position for positions in keys for position in positions])
    return VarlenPlan(gathered, bounds(queries), bounds(lengths), max(queries), max(lengths))


def common_prefix(*rows: Sequence[int]) -> int:
    """How many leading tokens the rows have in common, at least one being left for each."""
    limit = min(len(row) for row in rows) - 1
    first, *others = rows
    return next((i for i in range(limit) if any(row[i] != first[i] for row in others)), limit)


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
    """Causal attention within [prefix | answer] for every answer of every group.

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
    """Attend with one call for each answer and no mask tensor.

    Queries [prefix, first answer] attend to the same keys; queries of a further answer attend to keys [prefix, that
    answer], with the causal triangle aligned to the bottom right.
    """
    options: dict[str, Any] = {"scale": scale, "enable_gqa": key.shape[1] != query.shape[1]}
    # Pieces by split: the gradient of a slice is as large as the whole row.
    queries = iter(
        query.split([n for first, *others in layout._answers_with_prefix() for n in (first, *others)], dim=2)
    )
    parts = [n for prefix, answers in layout.groups for n in (prefix, *answers)]
    pieces = iter(zip(*(t.split(parts, dim=2) for t in (key, value))))
    outputs = []
    for prefix, (_, *others) in layout.groups:
        shared = next(pieces)
        k, v = (torch.cat(pair, dim=2) for pair in zip(shared, next(pieces)))
        outputs.append(scaled_dot_product_attention(next(queries), k, v, is_causal=True, **options))
        for answer in others:
            k, v = (torch.cat(pair, dim=2) for pair in zip(shared, next(pieces)))
            triangle = q_sees_k(answer, prefix, query.device)
            outputs.append(scaled_dot_product_attention(next(queries), k, v, attn_mask=triangle, **options))
    return torch.cat(outputs, dim=2)


def q_sees_k(answer: int, prefix: int, device: torch.device) -> Tensor:
    """[answer, prefix + answer] bool: each query of an answer sees the prefix, the answer before it, and itself."""
    return torch.ones(answer, prefix + answer, dtype=torch.bool, device=device).tril(prefix)


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scale: float, kernel: VarlenKernel
) -> Tensor:
    """Attend with one call for all groups.

    Each answer is a sequence: queries stay where they are, the prefix's keys are gathered for each.
    """
    plan, width = layout.varlen, query.shape[-1]
    # Zeros that fill a head up to the kernel's width change no score and add nothing to the output.
    query, key, value = (pad(t, (0, -width % EVEN_HEAD)) if width % EVEN_HEAD else t for t in (query, key, value))
    # squeeze, not t[0]: the gradient of an index is a copy of the whole.
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))
    # Not k[keys]: its gradient sorts. Where two answers share a prefix, two terms meet in this one's, in any order.
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
