"""Measure the peak memory of a block of code."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile


class TensorPeak:
    """Measure the highest sum of tensors' bytes while the block runs.

    On a GPU this is PyTorch's own count, on a CPU the sum of its allocator's events (resident memory would count
    libraries, and what was freed but not given back).

    Args:
        before: tensors that exist already; a CPU's allocator does not tell.
    """

    def __init__(self, device: torch.device, before: Iterable[Tensor]) -> None:
        self.device, self.peak = device, 0
        self.before = sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in before}.values())
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it reports the GPU that is not there
        self.events = profile(activities=[ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> TensorPeak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            gc.collect()  # what an earlier block made would be freed in this one
            self.events.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        if self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device)
            return
        self.events.__exit__(*error)
        recorded: Any = self.events.profiler
        changes = (event.nbytes() for event in recorded.kineto_results.events() if event.name() == "[memory]")
        self.peak = self.before + max(accumulate(changes), default=0)
