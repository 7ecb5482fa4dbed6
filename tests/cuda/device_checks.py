"""Run by pytest in a child with two devices of 8 GiB: the null device itself, and NullMode."""

import re

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from llava.rehearsal.mode import NullMode, counts

GIB = 2**30
CUDA = torch.device("cuda", 0)


def test_the_devices_are_those_asked_for():
    assert torch.cuda.device_count() == 2
    assert torch.cuda.get_device_name(1) == "NVIDIA H100 80GB HBM3"
    assert torch.cuda.get_device_capability(1) == (9, 0)
    assert torch.cuda.mem_get_info(1) == (8 * GIB, 8 * GIB)
    with pytest.raises(RuntimeError, match="invalid device ordinal"):
        torch.empty(1, device="cuda:2")


@pytest.mark.parametrize("device", ["cuda:0", "cuda:1"])
def test_the_allocator_refuses_beyond_the_limit_and_gives_back(device):
    torch.cuda.reset_peak_memory_stats(device)
    held = [torch.empty(2 * GIB, dtype=torch.uint8, device=device) for _ in range(3)]
    with pytest.raises(torch.OutOfMemoryError, match="total capacity of 8.00 GiB"):
        torch.empty(3 * GIB, dtype=torch.uint8, device=device)
    assert torch.cuda.max_memory_allocated(device) == 6 * GIB
    del held
    torch.cuda.empty_cache()
    assert torch.cuda.mem_get_info(device)[0] == 8 * GIB
    torch.empty(7 * GIB, dtype=torch.uint8, device=device)
    torch.cuda.empty_cache()


def test_copies_are_real_and_counted():
    before = counts()
    numbers = torch.arange(1000.0)
    there = numbers.to(CUDA)
    assert torch.equal(there.cpu(), numbers)
    assert torch.equal(there.to("cuda:1").cpu(), numbers)
    done = {name: number - before[name] for name, number in counts().items()}
    assert (done["copies from host"], done["bytes from host"]) == (1, 4000)
    assert (done["copies to host"], done["bytes to host"]) == (2, 8000)


def test_kernels_and_products_are_counted_and_do_nothing_without_the_mode():
    a = torch.ones(8, 8).to(CUDA)
    before = counts()
    a.relu_().neg_()
    a @ a
    torch.baddbmm(a[None], a[None], a[None])
    done = {name: number - before[name] for name, number in counts().items()}
    assert (done["launches"], done["gemms"]) == (2, 2)
    assert torch.equal(a.cpu(), torch.ones(8, 8))


def test_graphs_are_refused_instead_of_imagined():
    with (
        pytest.raises(RuntimeError, match="operation not supported by the null device"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        torch.ones(1, device=CUDA)


# --- Numbers ---------------------------------------------------------------------------------------------------------


def test_small_floats_and_all_integers_are_computed_large_floats_are_not():
    with NullMode(limit=64):
        small, large = torch.ones(8, device=CUDA), torch.ones(4096, device=CUDA)
        integers = torch.arange(4096, device=CUDA)
        assert small.cumsum(0).tolist() == list(range(1, 9))
        assert integers.sum().item() == 4095 * 4096 // 2
        assert (large + large).cpu().unique().tolist() != [2.0]
        with pytest.raises(RuntimeError, match=r"expected at most 64 floating-point elements.*got 4096"):
            large.nonzero()


PROGRAMS = {
    "products": lambda x: (x @ x.T).softmax(-1),
    "in place": lambda x: x.clone().mul_(2).add_(1),
    "views": lambda x: x.t()[1:, ::2].contiguous(),
    "mask": lambda x: x[x > 0],
    "mask written": lambda x: x.clone().index_put_((x < 0,), torch.zeros((), device=x.device)),
    "nonzero": lambda x: (x > 0).nonzero(),
    "unique": lambda x: x.detach().round().unique(),
    "repeats": lambda x: x.repeat_interleave(torch.arange(6, device=x.device), 0),
    "sorted": lambda x: x.sort(-1).values,
    "norms": lambda x: torch.nn.functional.layer_norm(x, (5,)),
    "half": lambda x: x.to(torch.bfloat16).float(),
    "log of a sigmoid": lambda x: torch.nn.functional.logsigmoid(x),
    "foreach": lambda x: torch._foreach_add([x, x + 1], 1.0)[1],
    "attention": lambda x: scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], is_causal=True),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_everything_gives_the_cpus_numbers_and_gradients(name):
    program, x = PROGRAMS[name], torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    expected_gradient = gradient_of(program, x)
    with NullMode(everything=True):
        there = x.to(CUDA)
        torch.testing.assert_close(program(there).cpu(), program(x), atol=1e-6, rtol=1e-5)
        if expected_gradient is not None:
            torch.testing.assert_close(gradient_of(program, there).cpu(), expected_gradient, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", PROGRAMS)
def test_inference_gives_the_cpus_numbers(name):
    """There operators reach the mode whole that autograd takes apart elsewhere."""
    program, x = PROGRAMS[name], torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    with NullMode(everything=True), torch.inference_mode():
        torch.testing.assert_close(program(x.to(CUDA)).cpu(), program(x), atol=1e-6, rtol=1e-5)


def gradient_of(program, x):
    leaf = x.detach().clone().requires_grad_()
    result = program(leaf)
    if not (result.requires_grad and result.is_floating_point()):
        return None
    return torch.autograd.grad((result * torch.arange(result.numel()).view_as(result).to(x)).sum(), leaf)[0]


def test_dropout_zeroes_its_share():
    with NullMode(everything=True):
        dropped = torch.nn.functional.dropout(torch.ones(10_000, device=CUDA), 0.25)
        assert 0.22 < (dropped == 0).float().mean().item() < 0.28
        assert dropped.max().item() == pytest.approx(4 / 3)


def test_an_optimizer_takes_the_cpus_steps():
    trajectories = []
    with NullMode(everything=True):
        for device in ("cpu", CUDA):
            torch.manual_seed(0)
            layer = torch.nn.Linear(4, 4).to(device)
            optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
            losses = []
            for _ in range(5):
                loss = layer(torch.ones(2, 4).to(device)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(loss.item())
            trajectories.append(losses)
    assert trajectories[0] == pytest.approx(trajectories[1], rel=1e-5)
    assert losses[-1] < losses[0]


# --- Waits of the host -----------------------------------------------------------------------------------------------

WAITS = {
    "item": lambda x: x.sum().item(),
    "nonzero.default": lambda x: x.nonzero(),
    "mask as index": lambda x: x[x > 0],
    "index on the host": lambda x: x[torch.tensor([1, 2])],
    "copy to host": lambda x: x.cpu(),
    "copy from host": lambda x: x + torch.ones(3).to(CUDA),
    "copy from pageable memory": lambda x: x + torch.ones(3).to(CUDA, non_blocking=True),
    "equal.default": lambda x: torch.equal(x, x),
}


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("what", WAITS)
def test_a_wait_is_recorded_with_its_line(what, inference):
    with NullMode() as mode, torch.inference_mode(inference):
        x = torch.ones(3, device=CUDA)
        WAITS[what](x)
    line = WAITS[what].__code__.co_firstlineno
    assert mode.syncs == {f"{what}  tests/cuda/device_checks.py:{line} <lambda>": 1}


NO_WAITS = {
    "arithmetic": lambda x: (x + 1).sum(),
    "page-locked memory": lambda x: torch.ones(3).pin_memory().to(CUDA, non_blocking=True),
    "asynchronous copy to the host": lambda x: x.to("cpu", non_blocking=True),
    "index on the device": lambda x: x[torch.zeros(2, dtype=torch.long, device=CUDA)],
    "known number of repeats": lambda x: x.repeat_interleave(
        torch.ones(3, dtype=torch.long, device=CUDA), output_size=3
    ),
}


@pytest.mark.parametrize("name", NO_WAITS)
def test_no_wait_is_invented(name):
    with NullMode() as mode:
        NO_WAITS[name](torch.ones(3, device=CUDA))
    assert not mode.syncs


def test_a_librarys_line_is_named_shortly_with_the_callers():
    with NullMode() as mode:
        torch.nn.Linear(2, 2, bias=False).to(CUDA)
    [where] = mode.syncs
    assert re.fullmatch(
        r"copy from host  torch/nn/modules/module\.py:\d+ convert <- tests/cuda/device_checks\.py:\d+ "
        "test_a_librarys_line_is_named_shortly_with_the_callers",
        where,
    )


def test_settings_come_back():
    def settings():
        cuda = torch.backends.cuda
        return (torch.backends.cudnn.enabled, cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(),
                cuda.cudnn_sdp_enabled())  # fmt: skip

    before = settings()
    with NullMode():
        assert settings()[:4] == (False, True, True, False)
    with pytest.raises(KeyError), NullMode(everything=True):
        assert settings()[:4] == (False, False, False, False)
        raise KeyError
    assert settings() == before and before[1:4] == (True, True, True)
