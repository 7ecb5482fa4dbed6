"""How fast training goes: pairs and tokens a second, and the share of the GPU's peak that the model's own work takes.

The work is counted as in PaLM (Chowdhery et al. 2022, appendix B): what the mathematics needs, recomputing left out.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from dama.shared_prefix import PackedGroup

# Dense bf16 matrix products with fp32 sums, TFLOP/s, from the makers' data sheets; the first name found counts.
PEAK_TFLOPS = {
    "GB200": 2500, "B200": 2250, "H200": 989, "GH200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H800": 989,
    "A100": 312, "A800": 312, "L40S": 362, "L40": 181, "RTX 6000 Ada": 364, "A6000": 155, "A40": 150, "L4": 121,
    "A10": 125, "RTX 4090": 165, "RTX 3090": 71,
}  # fmt: skip


def peak_flops(device: torch.device) -> float | None:
    """FLOP/s of the GPU in half precision; None where it is not known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((tflops * 1e12 for part, tflops in PEAK_TFLOPS.items() if part in name), None)


@dataclass(frozen=True)
class ModelSize:
    """What a forward pass costs: matrix parameters of the decoder layers, of the output layer, of the tower."""

    decoder: int
    output: int  # D x V
    attention: int  # layers x heads x width of a head
    tower: int
    projector: int
    patches: int  # tokens of an image


@dataclass(frozen=True)
class PairLength:
    """Tokens of a pair's views: of each image's prefix, the image included, and of the answers that continue it.

    A row of fine-tuning is a prefix without answers.
    """

    groups: tuple[PackedGroup, ...]

    @staticmethod
    def of(prefix: int, *answers: int) -> PairLength:
        """Of answers that are all read with one image: DPO's chosen and rejected one."""
        return PairLength((PackedGroup(prefix, answers),))

    @property
    def tokens(self) -> int:
        """Distinct tokens of all views."""
        return sum(group.positions for group in self.groups)

    @property
    def answers(self) -> tuple[int, ...]:
        """Tokens of every view's answer, group by group."""
        return tuple(answer for group in self.groups for answer in group.answers)

    @property
    def rows(self) -> int:
        """Number of rows where each view is one of its own."""
        return max(1, len(self.answers))

    @property
    def longest(self) -> int:
        """Tokens of the longest of these rows."""
        return max(group.prefix + max(group.answers, default=0) for group in self.groups)

    @property
    def prefix(self) -> int:
        """Tokens before the answers to the pair's own image."""
        return self.groups[0].prefix

    @property
    def chosen(self) -> int:
        """Tokens of the chosen answer."""
        return self.groups[0].answers[0]

    @property
    def rejected(self) -> int:
        """Tokens of the rejected answer."""
        return self.groups[0].answers[1]

    def __str__(self) -> str:
        return ", ".join(" + ".join(map(str, (group.prefix, *group.answers))) for group in self.groups)


def forward_flops(size: ModelSize, groups: Sequence[PackedGroup]) -> float:
    """One pass over the distinct tokens of a pair's groups, without encoding their images.

    2 FLOPs a matrix parameter and token; in attention 4 a query, key and channel (scores and weighted sum); logits at
    the answers' tokens.
    """
    tokens = sum(group.positions for group in groups)
    answers = sum(sum(group.answers) for group in groups)
    return (
        2 * size.decoder * tokens
        + 4 * size.attention * sum(map(queries_times_keys, groups))
        + 2 * size.output * answers
        + 2 * size.projector * size.patches * len(groups)
    )


def queries_times_keys(group: PackedGroup) -> float:
    """Pairs of a query and a key that it sees: causal within the prefix and each answer, each answer on the prefix."""
    prefix, answers = group
    return prefix * (prefix + 1) / 2 + sum(n * (prefix + (n + 1) / 2) for n in answers)


def step_flops(
    size: ModelSize, pairs: Sequence[Sequence[PackedGroup]], trained: Sequence[bool], images: int, frozen_weights: bool
) -> float:
    """The work of one optimizer step: all pairs forward, the trained ones backward, every image encoded once.

    A backward pass is two forward passes, or one where weights are frozen (LoRA) and only activations have gradients.
    """
    backward = 1 if frozen_weights else 2
    passes = (forward_flops(size, pair) * (1 + backward * learns) for pair, learns in zip(pairs, trained, strict=True))
    return sum(passes) + images * 2 * size.tower * size.patches


COUNTS = ("pairs", "tokens", "flops")


@dataclass
class Throughput:
    """A stopwatch that runs during steps only: evaluation and saves are not counted."""

    peak: float | None = None  # FLOP/s of all ranks together
    unit: str = "pairs"  # what `add` counts first
    seconds: float = 0.0
    counts: dict[str, float] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0.0))
    steps: int = 0
    _began: float | None = None

    def start(self) -> None:
        """Start timing a step."""
        self._began = time.perf_counter()

    def add(self, pairs: float, tokens: float = 0.0, flops: float = 0.0) -> None:
        """Count the work of the current step."""
        for name, value in zip(COUNTS, (pairs, tokens, flops), strict=True):
            self.counts[name] += value

    def stop(self) -> None:
        """Stop timing a step."""
        if self._began is not None:
            self.seconds += time.perf_counter() - self._began
            self.steps += 1
        self._began = None

    def take(self, steps_left: int) -> dict[str, float]:
        """The figures since the last call; empty where no step was timed."""
        if not self.steps or not self.seconds:
            return {}
        figures = {
            f"speed/{self.unit}_per_second": self.counts["pairs"] / self.seconds,
            "speed/hours_left": steps_left * self.seconds / self.steps / 3600,
        }
        if self.counts["tokens"]:
            figures["speed/tokens_per_second"] = self.counts["tokens"] / self.seconds
        if self.peak and self.counts["flops"]:
            figures["speed/mfu"] = self.counts["flops"] / self.seconds / self.peak
        self.seconds, self.steps = 0.0, 0
        self.counts = dict.fromkeys(self.counts, 0.0)
        return figures
