"""CPU formulas of operators whose CUDA and CPU signatures differ, or that exist on CUDA only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor


def varlen_attention(a: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """(output [Tq, heads, d], log-sum-exp [heads, Tq], state of the generator) of torch's varlen kernel, in fp32."""
    query, key, value = (a[name] for name in ("query", "key", "value"))
    output = torch.empty(query.shape, dtype=torch.float32)
    logsumexp = torch.empty(query.shape[1], len(query), dtype=torch.float32)
    for queries, keys in sequences(a):
        scores = masked_scores(query[queries], repeated(key[keys], query), a)
        logsumexp[:, queries] = scores.logsumexp(-1)
        output[queries] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), repeated(value[keys], query))
    return output, logsumexp, torch.zeros(2, dtype=torch.uint64)


def varlen_attention_backward(a: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, in fp32."""
    query, key, value, grad_out = (a[name] for name in ("query", "key", "value", "grad_out"))
    grads = tuple(torch.zeros(t.shape, dtype=torch.float32) for t in (query, key, value))
    for queries, keys in sequences(a):
        q, g = query[queries].float(), grad_out[queries].float()
        k, v = repeated(key[keys], query), repeated(value[keys], query)
        p = masked_scores(q, k, a).softmax(-1)
        dp = torch.einsum("qhd,khd->hqk", g, v)
        ds = p * (dp - (dp * p).sum(-1, keepdim=True)) * scale_of(a)
        grads[0][queries] = torch.einsum("hqk,khd->qhd", ds, k)
        grads[1][keys] = summed(torch.einsum("hqk,qhd->khd", ds, q), key)
        grads[2][keys] = summed(torch.einsum("hqk,qhd->khd", p, g), value)
    return grads[0], grads[1], grads[2]


def sequences(a: dict[str, Any]) -> Iterator[tuple[slice, slice]]:
    """(positions of the queries, of the keys) of each sequence."""
    query_bounds, key_bounds = a["cu_seq_q"].tolist(), a["cu_seq_k"].tolist()
    for q0, q1, k0, k1 in zip(query_bounds, query_bounds[1:], key_bounds, key_bounds[1:]):
        yield slice(q0, q1), slice(k0, k1)


def masked_scores(q: Tensor, k: Tensor, a: dict[str, Any]) -> Tensor:
    """[heads, q, k], scaled; causal and aligned to the bottom right where asked for."""
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale_of(a)
    left, right = a.get("window_size") or (-1, -1)
    if a.get("is_causal"):
        right = 0
    if left >= 0 or right > 0:
        raise NotImplementedError(f"varlen attention on the null device: expected no window, got {left, right}")
    if right < 0:
        return scores
    last = torch.arange(len(k) - len(q), len(k))
    return scores.masked_fill(torch.arange(len(k)) > last[:, None], -torch.inf)


def scale_of(a: dict[str, Any]) -> float:
    """Return attention's scale."""
    return a["query"].shape[-1] ** -0.5 if a.get("scale") is None else a["scale"]


def repeated(t: Tensor, query: Tensor) -> Tensor:
    """[T, key heads, d] to fp32 [T, heads, d], under grouped-query attention."""
    return t.float().repeat_interleave(query.shape[1] // t.shape[1], dim=1)


def summed(gradient: Tensor, t: Tensor) -> Tensor:
    """[T, heads, d] to [T, key heads, d], the sum over the queries' heads of each."""
    return gradient.view(len(gradient), t.shape[1], -1, gradient.shape[2]).sum(2)


def log_sigmoid_backward(a: dict[str, Any]) -> Tensor:
    """The CPU's own needs a buffer that CUDA leaves empty."""
    return a["grad_output"] * torch.sigmoid(-a["self"])


def mixed_product(a: dict[str, Any]) -> Tensor:
    """A product of half-precision matrices in fp32, which CPUs do not have."""
    return a["self"].to(a["out_dtype"]) @ a["mat2"].to(a["out_dtype"])


FORMULAS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "torch_attn::_varlen_attn": varlen_attention,
    "torch_attn::_varlen_attn_backward": varlen_attention_backward,
    "aten::log_sigmoid_backward": log_sigmoid_backward,
    "aten::mm.dtype": mixed_product,
}


def on_cpu(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator's result for CPU tensors."""
    schema = func._schema
    formula = FORMULAS.get(".".join(filter(None, (schema.name, schema.overload_name))))
    if formula is None:
        return func(*args, **kwargs)
    named = {argument.name: value for argument, value in zip(func._schema.arguments, args)}
    return formula(named | kwargs)
