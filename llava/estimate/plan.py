"""The training run that is examined, with the notes and errors found so far."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dama.shared_prefix import TORCH_VARLEN, attention_backend, flash_attn_problem
from llava.estimate.sizes import Training
from llava.train.arguments import Arguments


@dataclass
class Plan:
    """A training that is to be started, and what has been found out about it."""

    arguments: Arguments
    ranks: int
    cuda: bool  # meant for GPUs, whether there are any or not
    clip: tuple[str, str] | None = None  # open_clip's architecture and weights, which the hardness stage will fetch
    notes: list[tuple[str, str]] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    def note(self, title: str, text: str) -> None:
        """Add a line to the page."""
        self.notes.append((title, text))

    @property
    def layout(self) -> tuple[int, int]:
        """Micro-batch size and number of accumulated micro-batches."""
        args = self.arguments[2]
        return args.per_device_train_batch_size, args.gradient_accumulation_steps

    @property
    def device(self) -> torch.device:
        """Device that the training run would use on this machine."""
        return torch.device("cuda" if self.cuda and torch.cuda.is_available() else "cpu")


def backends(plan: Plan) -> str:
    """What computes: attention, collectives, precision, DeepSpeed's stage."""
    args = plan.arguments[2]
    run = Training.of(plan.arguments, plan.ranks, plan.cuda, False)
    attention = attention_backend(plan.device, torch.bfloat16 if run.half else torch.float32)
    problem = flash_attn_problem() or ""
    unusable = f" (flash_attn {problem})" if attention == TORCH_VARLEN and problem.startswith("installed") else ""
    return ", ".join([
        f"attention by {attention}{unusable}{' with the prefix shared' * run.shared_prefix}",
        "nccl" if plan.cuda else "gloo",
        "bf16" if args.bf16 else "fp16" if args.fp16 else "fp32",
        f"DeepSpeed ZeRO-{run.stage}" if run.zero else "no DeepSpeed",
    ])  # fmt: skip


def error_text(errors: Sequence[str]) -> str:
    """Return the errors as one message."""
    return "\n  - ".join([f"{len(errors)} thing(s) missing for this training:", *errors])
