"""dama.logps: token log-probs on paper, their gradient against autograd's, chunks, one backward pass."""

from __future__ import annotations

import math

import pytest
import torch

from dama.logps import IGNORE_INDEX, Float32Product, TargetLogps, answer_logps, float32_head, token_logps

pytestmark = pytest.mark.fast


def test_on_paper() -> None:
    """Logits (0, log 3): probabilities 1/4 and 3/4; d log p_0 / dz = (1 - 1/4, -3/4)."""
    logits = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    logps = TargetLogps.apply(logits, torch.tensor([0]))
    assert logps.tolist() == pytest.approx([math.log(0.25)])
    logps.sum().backward()
    assert logits.grad is not None and logits.grad[0].tolist() == pytest.approx([0.75, -0.75])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [4, 7, 64])
def test_as_autograd_whatever_the_chunk(dtype: torch.dtype, chunk: int) -> None:
    torch.manual_seed(0)
    hidden, targets = torch.randn(19, 8, dtype=dtype), torch.randint(33, (19,))
    head, weights = torch.randn(33, 8, dtype=dtype), torch.rand(19)

    def gradients(way: str) -> list[torch.Tensor]:
        h, w = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        if way == "ours":
            logps = token_logps(h, targets, lambda part: part @ w.T, chunk)
        else:
            logps = (h @ w.T).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
        (logps * weights).sum().backward()
        assert h.grad is not None and w.grad is not None
        return [logps.detach(), h.grad, w.grad]

    for ours, theirs in zip(gradients("ours"), gradients("autograd")):
        scale = theirs.float().abs().max()
        assert (ours.float() - theirs.float()).abs().max() <= (1e-5 if dtype == torch.float32 else 2e-2) * scale


def test_a_second_backward_pass_is_refused() -> None:
    logits = torch.zeros(1, 2, requires_grad=True)
    total = TargetLogps.apply(logits, torch.tensor([0])).sum()
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="expected one backward pass, got a second; compute them again"):
        total.backward()


def test_rows_without_labels_sum_to_zero() -> None:
    labels = torch.tensor([[IGNORE_INDEX, IGNORE_INDEX, 1], [IGNORE_INDEX] * 3])
    logps, tokens = answer_logps(torch.zeros(2, 3, 4), labels, lambda hidden: hidden)
    assert logps.tolist() == pytest.approx([-math.log(4), 0.0]) and tokens.tolist() == [1, 0]


def test_float32_logits_are_nearer_to_the_truth() -> None:
    """bfloat16 keeps 8 bits of a logit; the product's float32 sums keep them all. Gradients are a linear layer's."""
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(shape, generator=generator).bfloat16() for shape in ((40, 64), (500, 64)))
    targets = torch.randint(500, (40,), generator=generator)
    exact = (x.double() @ weight.double().T).log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    results = {}
    for name, product in (("half", lambda h, w: h @ w.T), ("float32", Float32Product.apply)):
        h, w = x.clone().requires_grad_(), weight.clone().requires_grad_()
        logps = TargetLogps.apply(product(h, w), targets)
        logps.sum().backward()
        results[name] = (logps.detach().double() - exact).abs().mean().item(), h.grad, w.grad
    assert results["float32"][0] < 1e-5 < 0.01 < results["half"][0]
    for ours, theirs in zip(results["float32"][1:], results["half"][1:]):
        assert (ours.float() - theirs.float()).norm() < 0.02 * theirs.float().norm()


def test_heads_that_keep_their_own_product() -> None:
    """On a CPU the layer itself is called; tests/cuda has the others: a bias, float32, weights spread by ZeRO-3."""
    layer = torch.nn.Linear(4, 6, bias=False, dtype=torch.bfloat16)
    assert float32_head(layer) is layer
