"""The environment in which a Python process finds the null device."""

from __future__ import annotations

import os
from pathlib import Path

from llava.rehearsal.build import library

ROOT = Path(__file__).resolve().parents[2]
GIB, DEVICES, NAME, CAPABILITY = 79.25, 1, "NVIDIA H100 80GB HBM3", (9, 0)
MOST_DEVICES = 8


def environment(
    gib: float = GIB, devices: int = DEVICES, name: str = NAME, capability: tuple[int, int] = CAPABILITY
) -> dict[str, str]:
    """This process's environment, changed so that a child has the null device.

    Args:
        gib: memory of each device in GiB, as `torch.cuda.mem_get_info` reports it.
        devices: number of devices, 1 to 8.
        name: what `torch.cuda.get_device_name` returns.
        capability: compute capability, major and minor.

    Raises:
        ValueError: no memory, or a number of devices out of range.
        llava.rehearsal.build.RehearsalError: no rehearsal is possible on this machine.
    """
    if gib <= 0:
        raise ValueError(f"gib: expected a positive number of GiB, got {gib}")
    if not 1 <= devices <= MOST_DEVICES:
        raise ValueError(f"devices: expected 1 to {MOST_DEVICES}, got {devices}")
    built = library()
    # The null devices are all visible, whatever hides the machine's own.
    variables = {key: value for key, value in os.environ.items() if key != "CUDA_VISIBLE_DEVICES"}
    return variables | {
        "LD_PRELOAD": before(str(built), "LD_PRELOAD"),
        "LD_LIBRARY_PATH": before(str(built.parent), "LD_LIBRARY_PATH"),
        "PYTHONPATH": before(str(ROOT), "PYTHONPATH"),
        "NULLCUDA_GIB": repr(float(gib)),
        "NULLCUDA_DEVICES": str(devices),
        "NULLCUDA_NAME": name,
        "NULLCUDA_CAPABILITY": "{}.{}".format(*capability),
        "TORCH_DISABLE_NATIVE_JIT": "1",  # operators that torch writes in Triton
    }


def is_rehearsed() -> bool:
    """Whether this process was started on the null device."""
    return "NULLCUDA_DEVICES" in os.environ


def allow_forks() -> None:
    """Let this forked process use the null device.

    torch refuses CUDA in a process forked from one that has counted devices, whose driver's state would not survive;
    the null device has no driver.
    """
    import torch

    torch.cuda._is_in_bad_fork = lambda: False


def before(first: str, variable: str) -> str:
    """Return the value of a path variable with an entry in front."""
    rest = os.environ.get(variable)
    return f"{first}{os.pathsep}{rest}" if rest else first
