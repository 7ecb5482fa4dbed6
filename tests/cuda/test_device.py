"""The null device, its mode and the attention kernels: tests that run in a child, judged here one group at a time."""

import pytest

from tests.cuda.conftest import outcomes_of

pytestmark = pytest.mark.gpu

GROUPS = {
    "test_the_devices": 1, "test_the_allocator": 2, "test_copies": 1, "test_kernels_and_products": 1, "test_graphs": 1,
    "test_small_floats": 1, "test_everything": 14, "test_dropout": 1, "test_an_optimizer": 1, "test_inference": 14,
    "test_a_wait": 16, "test_no_wait": 5, "test_a_librarys_line": 1, "test_settings": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def device(tmp_path_factory):
    return outcomes_of(tmp_path_factory.mktemp("device"), "tests/cuda/device_checks.py", devices=2)


@pytest.fixture(scope="module")
def kernels(tmp_path_factory):
    files = ("tests/cuda/kernel_checks.py", "tests/dama/test_shared_prefix.py")
    chosen = ("-k", "bf16_on_a_gpu or test_widths")
    return outcomes_of(tmp_path_factory.mktemp("kernels"), "-p", "tests.cuda.everything", *files, *chosen)


def judge(outcomes, prefix, count):
    found = {name: outcome for name, outcome in outcomes.items() if name.startswith(prefix)}
    assert found == dict.fromkeys(found, "passed")
    assert len(found) == count


@pytest.mark.parametrize("prefix", GROUPS)
def test_the_device(device, prefix):
    judge(device, prefix, GROUPS[prefix])


def test_no_group_is_forgotten(device):
    assert len(device) == sum(GROUPS.values())


def test_the_kernels_in_bf16(kernels):
    judge(kernels, "test_kernels_in_bf16_on_a_gpu", 6)


def test_head_widths_64_and_128(kernels):
    judge(kernels, "test_widths_of_the_kernels", 8)


def test_head_widths_36_and_264(kernels):
    judge(kernels, "test_widths_that_no_kernel_has", 8)
