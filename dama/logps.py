"""Log-probabilities of answers: token log-probs at labelled positions, without the logits of all the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

IGNORE_INDEX = -100


class AnswerLogps(NamedTuple):
    """What a sequence's labels say of it under the model."""

    logps: Tensor  # [B] float32, sum over the labelled tokens of log pi(token | everything before)
    tokens: Tensor  # [B] int64, how many tokens were summed


class AnswerTokenLogps(NamedTuple):
    """AnswerLogps and what was summed."""

    logps: Tensor  # [B] float32
    tokens: Tensor  # [B] int64
    per_token: Tensor  # [M] float32, log-probs of the labelled tokens, row after row


@dataclass(frozen=True)
class AnswerIndex:
    """Which hidden states predict which answer tokens: computed from labels alone, so a data loader can do it.

    Shapes: M supervised tokens in R rows of a batch whose hidden states are [B, T, D].
    """

    predictors: Tensor  # [M] positions in the hidden states, flattened to [B * T, D]
    targets: Tensor  # [M] token ids
    rows: Tensor  # [M] row that each token belongs to, 0 to R - 1
    tokens: Tensor  # [R] supervised tokens of each row

    @staticmethod
    def of(labels: Tensor) -> AnswerIndex:
        """Of labels [B, T], IGNORE_INDEX where nothing is predicted: position t - 1 predicts label t."""
        rows, positions = (labels[:, 1:] != IGNORE_INDEX).nonzero(as_tuple=True)
        predictors = rows * labels.shape[1] + positions
        return AnswerIndex(predictors, labels[rows, positions + 1], rows, rows.bincount(minlength=len(labels)))


class TargetLogps(torch.autograd.Function):
    """log softmax(z)_y of logits z [M, V] at targets y [M], in float32.

    Its gradient, d/dz_v = [v = y] - softmax(z)_v, is made in the buffer that held log softmax(z), where autograd would
    take two more of that size. So there is one backward pass.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        """[N, C] logits and [N] target ids to [N] float32 log-probs; keeps the log-softmax for one backward pass."""
        log_softmax = logits.float().log_softmax(-1)
        ctx.save_for_backward(targets)
        ctx.log_softmax, ctx.dtype = log_softmax, logits.dtype
        return log_softmax.gather(-1, targets[:, None]).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        """Gradient of the logits, written over the log-softmax. Raises RuntimeError for a second backward pass."""
        (targets,) = ctx.saved_tensors
        if ctx.log_softmax is None:
            raise RuntimeError("log-probs: expected one backward pass, got a second; compute them again for it")
        gradient, ctx.log_softmax = ctx.log_softmax.exp_().mul_(-grads[0][:, None]), None
        gradient.scatter_add_(-1, targets[:, None], grads[0][:, None])
        return gradient.to(ctx.dtype), None


class Float32Product(torch.autograd.Function):
    """x W^T in float32, of half-precision x [m, D] and W [V, D].

    The sums are made in float32 anyway; a product in bfloat16 would round each logit, and with it R by 0.3 to 0.7 nats.
    The gradients' products are in half precision, as those of a linear layer are.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """[N, D] times the transposed [C, D] weight, in float32."""
        ctx.save_for_backward(x, weight)
        if x.device.type == "cuda":
            return torch.mm(x, weight.T, out_dtype=torch.float32)
        return x.float() @ weight.float().T  # CPUs have no product of two precisions

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Gradients of both factors, multiplied in the factors' own precision."""
        x, weight = ctx.saved_tensors
        gradient = grads[0].to(x.dtype)
        of_x = gradient @ weight if ctx.needs_input_grad[0] else None
        return of_x, gradient.T @ x if ctx.needs_input_grad[1] else None


def float32_head(lm_head: torch.nn.Module) -> Callable[[Tensor], Tensor]:
    """The output layer with float32 logits, where it is a plain half-precision layer on a GPU; else the layer itself.

    Under ZeRO-3 (`ds_id`) its weights are whole only inside its own call, and quantized or adapted layers have products
    of their own.
    """
    weight = getattr(lm_head, "weight", None)
    plain = type(lm_head) is torch.nn.Linear and lm_head.bias is None and not hasattr(weight, "ds_id")
    if not plain or weight is None or weight.device.type != "cuda" or weight.dtype == torch.float32:
        return lm_head
    return lambda hidden: Float32Product.apply(hidden.to(weight.dtype), weight)


def chunk_for(lm_head: torch.nn.Module, chunk: int, targets: Tensor) -> int:
    """Number of tokens whose logits exist at one time.

    All of them under ZeRO-3, which gathers lm_head at each call: every rank must make the same number of calls.
    """
    return targets.numel() if hasattr(lm_head.weight, "ds_id") else chunk


def token_logps(hidden: Tensor, targets: Tensor, lm_head: Callable[[Tensor], Tensor], chunk: int) -> Tensor:
    """Log softmax(lm_head(hidden))[target] at every position.

    Args:
        hidden: [M, D] final hidden states. targets: [M] token ids.
        lm_head: [m, D] to [m, V].
        chunk: positions whose logits exist at one time; they are computed again in the backward pass.

    Returns:
        [M] float32.
    """

    def of_chunk(h: Tensor, y: Tensor) -> Tensor:
        return TargetLogps.apply(lm_head(h), y)

    pieces = zip(hidden.split(chunk), targets.split(chunk))
    if not torch.is_grad_enabled() or len(hidden) <= chunk:
        return torch.cat([of_chunk(h, y) for h, y in pieces])
    return torch.cat([checkpoint(of_chunk, h, y, use_reentrant=False) for h, y in pieces])


def answer_logps(hidden: Tensor, labels: Tensor, lm_head: Callable[[Tensor], Tensor], chunk: int = 1024) -> AnswerLogps:
    """Sums of token log-probs over the labelled positions of each row.

    Args:
        hidden: [B, T, D] final hidden states; position t-1 predicts label t.
        labels: [B, T], IGNORE_INDEX where nothing is predicted.
    """
    return summed_logps(hidden, AnswerIndex.of(labels), lm_head, chunk)[0]


def indexed_logps(
    hidden: Tensor, index: AnswerIndex, lm_head: Callable[[Tensor], Tensor], chunk: int = 1024
) -> AnswerLogps:
    """Sums of token log-probs of each row of `index`, from hidden states [B, T, D]."""
    return summed_logps(hidden, index, lm_head, chunk)[0]


def indexed_token_logps(
    hidden: Tensor, index: AnswerIndex, lm_head: Callable[[Tensor], Tensor], chunk: int = 1024
) -> AnswerTokenLogps:
    """The same sums, and the log-probs of single tokens, those of the first row first, whatever order `index` has."""
    sums, values = summed_logps(hidden, index, lm_head, chunk)
    return AnswerTokenLogps(*sums, values.index_select(0, index.rows.argsort(stable=True)))


def summed_logps(
    hidden: Tensor, index: AnswerIndex, lm_head: Callable[[Tensor], Tensor], chunk: int
) -> tuple[AnswerLogps, Tensor]:
    """(sums of each row, [M] token log-probs in the order of `index`)."""
    predicting = hidden.flatten(0, 1).index_select(0, index.predictors)
    values = token_logps(predicting, index.targets, lm_head, chunk)
    return AnswerLogps(values.new_zeros(len(index.tokens)).index_add(0, index.rows, values), index.tokens), values


def get_batch_logps(
    logits: Tensor, labels: Tensor, return_per_token_logp: bool = False, return_all: bool = False
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The released code's interface on full logits: sum, or per token, or (per token, sum, average).

    Args:
        logits: [B, T, V]. labels: [B, T], IGNORE_INDEX where nothing is predicted.

    Returns:
        [B] sums; [B, T-1] with `return_per_token_logp` (at ignored positions the log-prob of token 0, as there);
        all three with `return_all`. The average of a row without labels is NaN.
    """
    mask = labels[:, 1:] != IGNORE_INDEX
    targets = labels[:, 1:].masked_fill(~mask, 0)
    per_token = logits[:, :-1].log_softmax(-1).gather(-1, targets[..., None]).squeeze(-1)
    total = (per_token * mask).sum(-1)
    if return_all:
        return per_token, total, total / mask.sum(-1)
    return per_token if return_per_token_logp else total
