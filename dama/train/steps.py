"""One optimizer step over ranks and micro-batches: which pairs lie where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Sampler

IMAGES_AT_ONCE = 32  # in one call of the vision tower


@dataclass(frozen=True)
class StepPlan:
    """How the pairs of one optimizer step are spread over micro-batches and ranks.

    Each (micro-batch, rank) has a contiguous block of the global order; sizes differ by at most one, no pair repeats.
    """

    pairs: int
    world_size: int
    micro_batches: int

    @staticmethod
    def of(pairs: int, world_size: int, batch_size: int) -> StepPlan:
        """In as few micro-batches as hold them, at most `batch_size` pairs in each on each rank."""
        return StepPlan(pairs, world_size, -(-pairs // (batch_size * world_size)))

    def block(self, micro: int, rank: int) -> range:
        """Positions, within the step, of the pairs of one micro-batch on one rank; may be empty."""
        blocks = self.world_size * self.micro_batches
        index = micro * self.world_size + rank
        return range(index * self.pairs // blocks, (index + 1) * self.pairs // blocks)


class StepSampler(Sampler):
    """Batches of dataset indices for one rank; the global order depends on (seed, epoch) alone, not on the hardware.

    Every rank gets the same number of batches. Where a step has fewer pairs than places, an empty place is filled with
    the step's first pair so that no rank waits; the trainer knows from the plan that it does not count.
    """

    def __init__(
        self, size: int, batch_size: int, world_size: int, rank: int, accumulation: int, seed: int, shuffle: bool = True
    ) -> None:
        self.size, self.batch_size, self.world_size, self.rank = size, batch_size, world_size, rank
        self.accumulation, self.seed, self.shuffle = accumulation, seed, shuffle
        self.set_epoch(0)

    @property
    def pairs_per_step(self) -> int:
        """Pairs of one optimizer step over all ranks and micro-batches."""
        return self.batch_size * self.world_size * self.accumulation

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch, an incomplete last one included."""
        return -(-self.size // self.pairs_per_step)

    def plan(self, step: int) -> StepPlan:
        """The plan of step `step` of an epoch; the last one may be smaller."""
        pairs = min(self.pairs_per_step, self.size - step * self.pairs_per_step)
        return StepPlan.of(pairs, self.world_size, self.batch_size)

    def indices(self, step: int) -> list[int]:
        """The dataset indices of one step's pairs of this epoch, in global order."""
        return self.order[step * self.pairs_per_step : (step + 1) * self.pairs_per_step]

    def set_epoch(self, epoch: int) -> None:
        """Reshuffle for this epoch; the order follows from seed and epoch alone, so every rank has the same."""
        self.order = list(range(self.size))
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self.order = torch.randperm(self.size, generator=generator).tolist()

    def __len__(self) -> int:
        return sum(self.plan(step).micro_batches for step in range(self.steps))

    def __iter__(self) -> Iterator[list[int]]:
        for step in range(self.steps):
            plan, indices = self.plan(step), self.indices(step)
            for micro in range(plan.micro_batches):
                yield [indices[p] for p in plan.block(micro, self.rank)] or [indices[0]]


class StepLoader(DataLoader):
    """A DataLoader whose StepSampler is told the epoch."""

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to the sampler."""
        self.batch_sampler.set_epoch(epoch)  # type: ignore[union-attr]
