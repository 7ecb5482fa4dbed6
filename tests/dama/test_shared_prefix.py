"""The packed pass: its bookkeeping on paper, its attention against the two rows that it stands for."""

import sys

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from dama.shared_prefix import (
    SDPA,
    PackedGroup,
    PackLayout,
    attention_backend,
    common_prefix,
    flash_attn_problem,
    shared_prefix_attention,
    varlen_attention,
    varlen_plan,
)
from dama.transfer import to_device

pytestmark = pytest.mark.fast

LAYOUT = PackLayout.of([PackedGroup(3, (2, 1)), PackedGroup(1, (1, 2))])


def test_bookkeeping_on_paper():
    """Pair 0 at 0..5: prefix 0 1 2, chosen 3 4, rejected 5. Pair 1 at 6..9: prefix 6, chosen 7, rejected 8 9."""
    assert LAYOUT.starts == [0, 6] and LAYOUT.positions == 10
    assert LAYOUT.position_ids()[0].tolist() == [0, 1, 2, 3, 4, 3, 0, 1, 1, 2]
    assert LAYOUT.predictors().tolist() == [-1, 0, 1, 2, 3, 2, -1, 6, 6, 8]
    assert LAYOUT.rows().tolist() == [0, 0, 0, 0, 0, 2, 1, 1, 3, 3]
    labels = torch.tensor([-100, -100, -100, 11, 12, 13, -100, 14, 15, 16])
    answers = LAYOUT.answers(labels)
    assert answers.predictors.tolist() == [2, 3, 2, 6, 6, 8] and answers.targets.tolist() == [11, 12, 13, 14, 15, 16]
    assert answers.rows.tolist() == [0, 0, 2, 1, 3, 3] and answers.tokens.tolist() == [2, 1, 1, 2]


def test_groups_of_different_numbers_of_answers_on_paper():
    """Two images of a pair, [prefix 2 | chosen 1 | rejected 2] and [prefix 1 | chosen 1], of two pairs.

    Rows are wanted in the order chosen 0, chosen 1, rejected 0, rejected 1, second image 0, second image 1.
    """
    groups = [PackedGroup(2, (1, 2)), PackedGroup(1, (1,)), PackedGroup(1, (1, 1)), PackedGroup(2, (1,))]
    layout = PackLayout.of(groups, owners=[0, 2, 4, 1, 3, 5])
    assert layout.starts == [0, 5, 7, 10] and layout.positions == 13
    assert layout.position_ids()[0].tolist() == [0, 1, 2, 2, 3, 0, 1, 0, 1, 1, 0, 1, 2]
    assert layout.predictors().tolist() == [-1, 0, 1, 1, 3, -1, 5, -1, 7, 7, -1, 10, 11]
    assert layout.rows().tolist() == [0, 0, 0, 2, 2, 4, 4, 1, 1, 3, 5, 5, 5]
    assert PackLayout.of(groups).owners == (0, 4, 1, 2, 5, 3)  # first answers, then second ones


def test_common_prefix_on_paper():
    assert common_prefix([1, 2, 3, 4], [1, 2, 9]) == 2
    assert common_prefix([1, 2, 3], [1, 2, 3, 4]) == 2  # one token is left for each
    assert common_prefix([5], [6]) == 0


def test_varlen_sequences_on_paper():
    """LAYOUT's four sequences: queries 0..4 on keys 0..4, 5 on 0 1 2 5, 6 7 on 6 7, 8 9 on 6 8 9."""
    plan = varlen_plan(LAYOUT.groups)
    assert plan.keys.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 5, 6, 7, 6, 8, 9]
    assert plan.query_bounds.tolist() == [0, 5, 6, 8, 10] and plan.key_bounds.tolist() == [0, 5, 9, 11, 14]
    assert (plan.longest_query, plan.longest_key) == (5, 5)


def test_half_precision_on_a_recent_gpu_is_what_the_kernels_are_for():
    assert attention_backend(torch.device("cpu"), torch.bfloat16) == SDPA
    assert attention_backend(torch.device("cuda"), torch.float32) == SDPA


@pytest.mark.parametrize("text", ["", "raise ImportError('undefined symbol: _ZN3c10')", "raise OSError('libcudart')"])
def test_a_flash_attn_without_its_kernel_is_named_and_not_used(tmp_path, monkeypatch, text):
    """Another version's package, or one built for another torch."""
    (tmp_path / "flash_attn.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    flash_attn_problem.cache_clear()
    assert str(flash_attn_problem()).startswith("installed, but not usable: ")
    flash_attn_problem.cache_clear()
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)


def random_pack(seed, heads, key_heads, width=8, longest=9, device="cpu", dtype=torch.float32, answers=2):
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, longest, (4, 1 + answers), generator=generator).tolist()
    groups = [PackedGroup(prefix, tuple(lengths)) for prefix, *lengths in sizes]
    layout = to_device(PackLayout.of(groups), torch.device(device))
    shapes = [(1, n, layout.positions, width) for n in (heads, key_heads, key_heads)]
    tensors = [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]
    return layout, *tensors


def rows_of_their_own(query, key, value, layout):
    """What the pack stands for: every answer with its prefix as one causal row."""
    expected = torch.empty_like(query)
    for start, (prefix, answers) in zip(layout.starts, layout.groups):
        for number, length in enumerate(answers):
            first = start + prefix + sum(answers[:number])
            row = [*range(start, start + prefix), *range(first, first + length)]
            repeat = query.shape[1] // key.shape[1]
            k, v = (t[:, :, row].repeat_interleave(repeat, dim=1) for t in (key, value))
            expected[:, :, row] = scaled_dot_product_attention(query[:, :, row], k, v, is_causal=True)
    return expected


def gradients(output, inputs):
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(0)).to(output)
    return torch.autograd.grad((output * weights).sum(), inputs)


def one_sequence_at_a_time(q, k, v, query_bounds, key_bounds, longest_query, longest_key, scale):
    """A varlen kernel in plain words, for where the fast ones do not run."""
    outputs = []
    bounds = zip(query_bounds.tolist(), query_bounds.tolist()[1:], key_bounds.tolist(), key_bounds.tolist()[1:])
    for q0, q1, k0, k1 in bounds:
        assert q1 - q0 <= longest_query and k1 - k0 <= longest_key
        repeat = q.shape[1] // k.shape[1]
        keys, values = (t[k0:k1].repeat_interleave(repeat, dim=1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[q0:q1], keys) * scale
        future = torch.arange(k1 - k0) > torch.arange(k1 - k0 - (q1 - q0), k1 - k0)[:, None]
        outputs.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(future, -torch.inf).softmax(-1), values))
    return torch.cat(outputs)


@pytest.mark.parametrize("key_heads", [4, 2, 1])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("way", ["sdpa", "varlen"])
@pytest.mark.parametrize("answers", [1, 2, 3])
def test_attention_is_that_of_separate_rows(key_heads, seed, way, answers):
    layout, *inputs = random_pack(seed, 4, key_heads, answers=answers)
    if way == "sdpa":
        packed = shared_prefix_attention(*inputs, layout)
    else:
        packed = varlen_attention(*inputs, layout, 8**-0.5, one_sequence_at_a_time)
    expected = rows_of_their_own(*inputs, layout)
    torch.testing.assert_close(packed, expected, atol=1e-6, rtol=1e-5)
    for one, other in zip(gradients(packed, inputs), gradients(expected, inputs)):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA")
@pytest.mark.parametrize("key_heads", [8, 2])
@pytest.mark.parametrize("seed", range(3))
def test_kernels_in_bf16_on_a_gpu(key_heads, seed):
    """The varlen kernel in bf16 is as near to the plain rows in fp32 as the plain rows in bf16 are.

    Twice their error is allowed, in output and gradients; unequal lengths show that the triangle is aligned to the
    bottom right.
    """
    layout, *half = random_pack(seed, 8, key_heads, width=64, longest=300, device="cuda", dtype=torch.bfloat16)
    backend = attention_backend(torch.device("cuda"), torch.bfloat16)
    assert backend != SDPA
    full = [t.detach().float().requires_grad_() for t in half]
    ways = {
        "packed": (shared_prefix_attention(*half, layout), half),
        "rows": (rows_of_their_own(*half, layout), half),
        "exact": (rows_of_their_own(*full, layout), full),
    }
    results = {name: [output, *gradients(output, inputs)] for name, (output, inputs) in ways.items()}
    for packed, rows, exact in zip(*(results[name] for name in ("packed", "rows", "exact"))):
        norm = exact.norm()
        packed_error, rows_error = ((t.float() - exact).norm() / norm for t in (packed, rows))
        print(f"{backend}: {packed_error:.2e}, rows in bf16 {rows_error:.2e}")  # noqa: T201 (shown with pytest -s)
        assert packed_error < 2 * rows_error + 1e-3
