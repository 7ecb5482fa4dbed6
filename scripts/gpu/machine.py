"""python -m scripts.gpu.machine: card, driver and versions of the machine as JSON, or exit status 2 without a GPU."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from typing import Any

import torch

from dama.console import log
from dama.shared_prefix import attention_backend
from llava.estimate.machine import driver_version, gpu_problem
from llava.rehearsal.launch import is_rehearsed

PACKAGES = (
    "torch", "transformers", "accelerate", "peft", "triton", "deepspeed", "trl", "open_clip_torch", "flash_attn",
)  # fmt: skip


def version_of(package: str) -> str | None:
    """Installed version of a package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """What results depend on besides the code. Versions of packages that are not installed are None."""
    device = torch.device("cuda", 0)
    properties = torch.cuda.get_device_properties(device)
    return {
        "card": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 2),
        "compute_capability": "{}.{}".format(*torch.cuda.get_device_capability(device)),
        "driver": None if is_rehearsed() else driver_version(),
        "versions": {"python": platform.python_version(), "cuda": torch.version.cuda}
        | {name: version_of(name) for name in PACKAGES},
        "attention": attention_backend(device, torch.bfloat16, 128),
    }


def main() -> int:
    """Print the description as JSON; return 2 without a GPU."""
    if not torch.cuda.is_available():
        sys.stderr.write(f"gpu_check: error: expected one GPU: {gpu_problem()}; --rehearse runs without one\n")
        return 2
    log(json.dumps(describe()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
