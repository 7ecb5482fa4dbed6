"""Run by pytest in a child, every number computed: the packed attention at the head widths of real models."""

import pytest
import torch

from dama.shared_prefix import SDPA, shared_prefix_attention
from tests.dama.test_shared_prefix import gradients, random_pack

# bf16 keeps 8 bits: a result lies within 2^-9 of its value; the inputs are exact, sums are fp32, and the gradients pass
# a few such results: their error is allowed to be 1 % of the norm. fp32 keeps 24 bits.
TOLERANCES = {torch.bfloat16: 1e-2, torch.float32: 1e-5}


def check_width(width, key_heads, seed, dtype=torch.bfloat16):
    """Output and gradients on the device, against scaled dot products in fp32 on the CPU."""
    layout, *half = random_pack(seed, 4, key_heads, width=width, longest=40, device="cuda", dtype=dtype)
    exact = [t.detach().cpu().float().requires_grad_() for t in half]
    output = shared_prefix_attention(*half, layout)
    expected = shared_prefix_attention(*exact, layout, backend=SDPA)
    assert output.shape == expected.shape and output.dtype == dtype and output.is_cuda
    pairs = zip([output, *gradients(output, half)], [expected, *gradients(expected, exact)])
    for got, wanted in pairs:
        assert (got.cpu().float() - wanted).norm() < TOLERANCES[dtype] * wanted.norm()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("width", [64, 128])
def test_widths_of_the_kernels(width, key_heads, seed):
    check_width(width, key_heads, seed)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("width", [36, 264])
def test_widths_that_no_kernel_has(width, key_heads, seed):
    check_width(width, key_heads, seed)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("key_heads", [4, 2])
@pytest.mark.parametrize("width", [36, 64, 128, 264])
def test_widths_in_fp32(width, key_heads, seed):
    check_width(width, key_heads, seed, torch.float32)
