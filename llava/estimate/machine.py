"""Query this machine: GPUs, driver, memory."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import torch

GIB = 1 << 30
OLDEST_DRIVER = {12: 525, 13: 580}  # of NVIDIA's, by CUDA's major version (CUDA toolkit release notes)


def gpus() -> list[tuple[str, int]]:
    """Name and bytes of memory of every GPU that this process can see."""
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [(gpu.name, gpu.total_memory) for gpu in found]


def gpu_problem() -> str:
    """What keeps torch from the GPUs of this machine, and what helps; 'none found' where there are none."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} has no CUDA build; run scripts/setup.sh"
    driver = driver_version()
    if driver is None:
        return "none found; for a run without one see scripts/dama_tiny.sh"
    needed = OLDEST_DRIVER.get(int(torch.version.cuda.partition(".")[0]))
    if needed and int(driver.partition(".")[0]) < needed:
        return (
            f"the NVIDIA driver is {driver}, torch {torch.__version__} for CUDA {torch.version.cuda} needs {needed} or "
            "newer; update the driver, or set TORCH_INDEX_URL to PyTorch's wheels for an older CUDA (such as cu126, "
            "for drivers from 525) and run scripts/setup.sh again"
        )
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return f"none visible with CUDA_VISIBLE_DEVICES={visible!r}; nvidia-smi finds driver {driver}"
    return f"torch {torch.__version__} finds none, nvidia-smi finds driver {driver}; see `nvidia-smi` and `dmesg`"


def driver_version() -> str | None:
    """Of NVIDIA's driver, such as '580.65.06'; None where nvidia-smi finds no GPU."""
    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    first = done.stdout.strip().splitlines()[:1]
    return first[0].strip() if first and first[0].strip()[:1].isdigit() else None


def host_memory() -> int:
    """Bytes of memory that this host, or the container around this process, has."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    text = limit.read_text().strip() if limit.is_file() else "max"
    return total if text == "max" else min(total, int(text))


def format_bytes(count: float) -> str:
    """Bytes in words."""
    return f"{count / GIB:.1f} GiB" if count >= GIB / 2 else f"{count / 1024**2:.1f} MiB"
