"""A training's process group on the null device: one rank of many, whose collectives do nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

# Where DeepSpeed asks whether gradients are finite: (module, class or None, function).
CHECKS = (
    ("deepspeed.runtime.zero.stage_1_and_2", "DeepSpeedZeroOptimizer", "has_overflow"),
    ("deepspeed.runtime.zero.stage3", "DeepSpeedZeroOptimizer_Stage3", "has_overflow"),
    ("deepspeed.runtime.zero.stage_1_and_2", None, "is_invalid_grad_norm"),
    ("deepspeed.runtime.zero.stage3", None, "is_invalid_grad_norm"),
)


@contextmanager
def single_rank_world(world: int, *, rank: int = 0, numbers: bool = False) -> Iterator[None]:
    """Make this process one rank of `world` on torch's fake process group, inside the block.

    DeepSpeed partitions optimizer states, gradients and parameters over `world` ranks; what the others would send is
    never received. Without the gradients' real numbers DeepSpeed would find overflows and skip its optimizer step, so
    its checks are off, unless `numbers`: one rank on which every number is computed, `NullMode(everything=True)`.
    DeepSpeed keeps the groups that it made: train with it in one block of a process only.

    Args:
        world: number of ranks.
        rank: which of them this process is, and the index of its device.
        numbers: keep DeepSpeed's checks on.

    Raises:
        RuntimeError: a process group exists already.
    """
    if dist.is_initialized():
        raise RuntimeError("single_rank_world: expected no process group, got one initialized before; leave it out")
    from torch.testing._internal.distributed.fake_pg import FakeStore

    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": "29999"}  # fmt: skip
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, ranks))
        dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
        stack.callback(leave)
        if not numbers:
            switch_checks_off(stack)
        yield


def leave() -> None:
    """Destroy the process group where there is one."""
    if dist.is_initialized():  # what runs inside may have left by itself
        dist.destroy_process_group()


def switch_checks_off(stack: ExitStack) -> None:
    """Replace DeepSpeed's checks for overflow, which would read values that no kernel computed."""
    for module, owner, function in CHECKS:
        target = ".".join(name for name in (module, owner, function) if name)
        stack.enter_context(patch(target, finite))


def finite(*_: Any, **__: Any) -> bool:
    """The answer of a check for overflow or an invalid norm."""
    return False
