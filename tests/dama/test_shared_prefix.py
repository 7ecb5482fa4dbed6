"""The packed pass: its bookkeeping on paper, its attention against the two rows that it stands for."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dama.shared_prefix import PackedPair, PackLayout, common_prefix, shared_prefix_attention

LAYOUT = PackLayout((PackedPair(3, 2, 1), PackedPair(1, 1, 2)))


def test_bookkeeping_on_paper():
    """Pair 0 at 0..5: prefix 0 1 2, chosen 3 4, rejected 5. Pair 1 at 6..9: prefix 6, chosen 7, rejected 8 9."""
    assert LAYOUT.starts == [0, 6] and LAYOUT.positions == 10
    assert LAYOUT.position_ids()[0].tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 1, 2]
    assert LAYOUT.predictors().tolist() == [-1, 0, 1, 2, 3, 2, -1, 6, 6, 8]
    assert LAYOUT.rows().tolist() == [0, 0, 0, 0, 0, 2, 1, 1, 3, 3]
    labels = torch.tensor([-100, -100, -100, 11, 12, 13, -100, 14, 15, 16])
    predictors, targets, rows = LAYOUT.answers(labels)
    assert predictors.tolist() == [2, 3, 2, 6, 6, 8] and targets.tolist() == [11, 12, 13, 14, 15, 16]
    assert rows.tolist() == [0, 0, 2, 1, 3, 3]


def test_common_prefix_on_paper():
    assert common_prefix([1, 2, 3, 4], [1, 2, 9]) == 2
    assert common_prefix([1, 2, 3], [1, 2, 3, 4]) == 2  # one token is left for each
    assert common_prefix([5], [6]) == 0


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("seed", range(3))
def test_attention_is_that_of_separate_rows(key_heads, seed):
    torch.manual_seed(seed)
    sizes = torch.randint(1, 9, (4, 3)).tolist()
    layout = PackLayout(tuple(PackedPair(*size) for size in sizes))
    T = layout.positions
    query = torch.randn(1, 4, T, 8, requires_grad=True)
    key, value = (torch.randn(1, key_heads, T, 8, requires_grad=True) for _ in range(2))
    packed = shared_prefix_attention(query, key, value, layout)

    expected = torch.empty_like(packed)
    for start, (prefix, chosen, rejected) in zip(layout.starts, layout.pairs):
        for first, length in ((start + prefix, chosen), (start + prefix + chosen, rejected)):
            row = [*range(start, start + prefix), *range(first, first + length)]
            repeat = 4 // key_heads
            k, v = (t[:, :, row].repeat_interleave(repeat, dim=1) for t in (key, value))
            expected[:, :, row] = scaled_dot_product_attention(query[:, :, row], k, v, is_causal=True)
    torch.testing.assert_close(packed, expected, atol=1e-6, rtol=1e-5)
    weights = torch.randn_like(packed)
    inputs = (query, key, value)
    got = torch.autograd.grad((packed * weights).sum(), inputs, retain_graph=True)
    for one, other in zip(got, torch.autograd.grad((expected * weights).sum(), inputs)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
