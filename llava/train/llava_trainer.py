"""LLaVA's trainer: length- and modality-grouped sampling, a learning rate of its own for the projector, its saves."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler

from dama.train.base import BaseTrainer
from llava.model.checkpoint import VOCABULARY_TABLES
from llava.model.llava_arch import load_projector
from llava.train.checkpoints import (
    NON_LORA_FILE,
    PROJECTOR_KEYS,
    get_mm_adapter_state_maybe_zero_3,
    keep_tower_inside,
    matching,
    maybe_zero_3,
    names_beside_adapter,
    safe_save_model_for_hf_trainer,
    without_frozen_tower,
    write_model_card,
)

__all__ = ["LLaVATrainer", "LengthGroupedSampler", "maybe_zero_3", "get_mm_adapter_state_maybe_zero_3"]


SEEDS_APART = 1_000_003  # orders of neighboring seeds share no epoch's


def split_to_even_chunks(indices: Sequence[int], lengths: Sequence[int], num_chunks: int) -> list[list[int]]:
    """Deals indices to chunks of equal size so that their total lengths are about equal (longest-first order is kept).

    Indices that do not divide evenly are dealt in turn instead.
    """
    if len(indices) % num_chunks:
        return [list(indices[k::num_chunks]) for k in range(num_chunks)]
    size = len(indices) // num_chunks
    chunks: list[list[int]] = [[] for _ in range(num_chunks)]
    loads = [(0.0, k) for k in range(num_chunks)]  # a heap: of equally light chunks the first one is next
    for index in indices:
        load, lightest = loads[0]
        chunks[lightest].append(index)
        if len(chunks[lightest]) < size:
            heapq.heapreplace(loads, (load + lengths[index], lightest))
        else:
            heapq.heappop(loads)
    return chunks


def get_length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: Any = None, merge: bool = True
) -> list[int]:
    """A random order in which every megabatch (world x batch) is sorted by length and dealt evenly to the ranks."""
    order = torch.randperm(len(lengths), generator=generator).tolist()
    size = world_size * batch_size
    megabatches = [
        sorted(order[i : i + size], key=lengths.__getitem__, reverse=True) for i in range(0, len(order), size)
    ]
    return [i for batch in megabatches for chunk in split_to_even_chunks(batch, lengths, world_size) for i in chunk]


def get_modality_length_grouped_indices(
    lengths: Sequence[int], batch_size: int, world_size: int, generator: Any = None
) -> list[int]:
    """As above, each megabatch of one modality: positive lengths have an image, negative ones are text only."""
    if any(length == 0 for length in lengths):
        raise AssertionError("lengths: expected none to be 0; the sign says whether a row has an image")
    if all(length > 0 for length in lengths) or all(length < 0 for length in lengths):
        # As they are: rows of text only come shortest first in a megabatch, as in the original.
        return get_length_grouped_indices(lengths, batch_size, world_size, generator=generator)
    size = world_size * batch_size
    megabatches, leftovers = [], []
    for wanted in (1, -1):  # the draws' order is part of the original's result
        rows = [i for i, length in enumerate(lengths) if length * wanted > 0]
        grouped = get_length_grouped_indices([abs(lengths[i]) for i in rows], batch_size, world_size, generator=None)
        order = [rows[i] for i in grouped]
        batches = [order[i : i + size] for i in range(0, len(order), size)]
        megabatches += batches[:-1]
        leftovers += batches[-1]
    shuffled = [megabatches[i] for i in torch.randperm(len(megabatches), generator=generator).tolist()]
    return [i for batch in [*shuffled, sorted(leftovers)] for i in batch]


class LengthGroupedSampler(Sampler):
    """Indices grouped by length, and by modality where lengths carry it in their sign.

    Args:
        seed: makes the order a function of seed and epoch, alike on every rank and after a resume. None draws it from
            `generator` and torch's own state, as LLaVA does.
    """

    def __init__(
        self,
        batch_size: int,
        world_size: int,
        lengths: list[int] | None = None,
        generator: Any = None,
        group_by_modality: bool = False,
        *,
        seed: int | None = None,
    ) -> None:
        if lengths is None:
            raise ValueError("LengthGroupedSampler: expected the rows' lengths, got none")
        self.batch_size, self.world_size, self.lengths = batch_size, world_size, lengths
        self.generator, self.group_by_modality = generator, group_by_modality
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Select the permutation that the next iteration uses."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        if self.seed is None:
            return iter(self._grouped())
        # The groups of one modality are drawn from torch's own state, which is left as it was.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed * SEEDS_APART + self.epoch)
            return iter(self._grouped())

    def _grouped(self) -> list[int]:
        group = get_modality_length_grouped_indices if self.group_by_modality else get_length_grouped_indices
        return group(self.lengths, self.batch_size, self.world_size, generator=self.generator)


class LLaVATrainer(BaseTrainer):
    """The trainer with LLaVA's sampler, parameter groups and checkpoints."""

    args: Any  # llava.train.arguments.TrainingArguments
    model: Any
    train_dataset: Any
    optimizer: Any
    control: Any

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler | None:
        args, rows = self.args, train_dataset or self.train_dataset
        by_length = args.train_sampling_strategy == "group_by_length"
        if not (args.group_by_modality_length or by_length):
            return super()._get_train_sampler(train_dataset)
        return LengthGroupedSampler(
            args.train_batch_size,
            world_size=args.world_size * args.gradient_accumulation_steps,
            lengths=rows.modality_lengths if args.group_by_modality_length else rows.lengths,
            group_by_modality=args.group_by_modality_length,
            seed=args.seed if args.data_seed is None else args.data_seed,
        )

    def create_optimizer(self, model: Any = None) -> Any:
        """Groups by weight decay, and by learning rate where the projector has one of its own."""
        if self.optimizer is not None:
            return self.optimizer
        trained = model or self.model
        decayed = set(self.get_decay_parameter_names(trained))
        rates = {"mm_projector": self.args.mm_projector_lr} if self.args.mm_projector_lr is not None else {}
        groups: dict[tuple[bool, bool], list[Any]] = {
            (own, decay): [] for own in ((False, True) if rates else (False,)) for decay in (True, False)
        }
        for name, parameter in trained.named_parameters():
            if parameter.requires_grad:
                groups[bool(rates) and "mm_projector" in name, name in decayed].append(parameter)
        options = [
            {"params": parameters, "weight_decay": self.args.weight_decay if decay else 0.0}
            | ({"lr": rates["mm_projector"]} if own else {})
            for (own, decay), parameters in groups.items()
        ]
        cls, kwargs = self.get_optimizer_cls_and_kwargs(self.args, trained)
        self.optimizer = cls(options, **kwargs)
        return self.optimizer

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """A checkpoint without the frozen tower: all weights, the projector, or the adapter and what trains with it."""
        # Under DeepSpeed every rank comes here, and the weights come gathered: to the first alone under ZeRO-3.
        if not self.args.should_save:
            return
        folder = Path(output_dir or self.args.output_dir)
        state = self.model.state_dict() if state_dict is None else state_dict
        folder.mkdir(parents=True, exist_ok=True)
        if self._trains_projector_only:
            torch.save(matching(state, PROJECTOR_KEYS), folder / "mm_projector.bin")
        else:
            saved = without_frozen_tower(state, self.model.config)
            if self.args.lora_enable:  # PEFT would put tables that grew into the adapter's file
                saved = {name: value for name, value in saved.items() if not name.endswith(VOCABULARY_TABLES)}
            super()._save(str(folder), saved)
        self.model.config.save_pretrained(folder)
        if self.args.lora_enable:
            torch.save({name: state[name] for name in names_beside_adapter(self.model)}, folder / NON_LORA_FILE)
        keep_tower_inside(self.model, folder)
        if self.provenance is not None:
            write_model_card(folder, self.provenance)

    def save_final(self, folder: str) -> None:
        """Save the finished model as LLaVA's layout wants it."""
        safe_save_model_for_hf_trainer(self, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Everything that trained: transformers knows full weights and adapters, not what trains beside them."""
        folder = Path(resume_from_checkpoint)
        if self._trains_projector_only:
            load_projector(self.model.get_model().mm_projector, str(folder / "mm_projector.bin"))
            return
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self.args.lora_enable:
            beside = torch.load(folder / NON_LORA_FILE, map_location="cpu", weights_only=True)
            self.model.load_state_dict(beside, strict=False)

    @property
    def _trains_projector_only(self) -> bool:
        return getattr(self.model.config, "tune_mm_mlp_adapter", False)
