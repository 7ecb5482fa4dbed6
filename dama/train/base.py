"""What every training here has, whatever it trains: rates in the log, resuming to the bit, watched synchronizations."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import Trainer
from transformers.trainer_callback import ProgressCallback

from dama.console import log, writing
from dama.train.callbacks import StepLine, StopWatch
from dama.train.checkpoints import missing_files, seal_checkpoint
from dama.train.signing import validate_signature
from dama.train.throughput import Throughput


def sampler_of(loader: Any) -> Any:
    """The sampler of rows inside a data loader, under whatever splits, shards or skips its batches; None for none."""
    batches = loader.batch_sampler
    while hasattr(batches, "batch_sampler"):
        batches = batches.batch_sampler
    return getattr(batches, "sampler", None)


def sum_of_losses(log_history: Sequence[dict[str, Any]]) -> float:
    """Over all steps that were logged: a line's loss is the mean of the steps since the line before."""
    rows = [row for row in log_history if "loss" in row]
    begins = [0, *(row["step"] for row in rows)]
    return sum(row["loss"] * (row["step"] - begin) for row, begin in zip(rows, begins))


def forget_shared_memory(folder: Path = Path("/dev/shm")) -> None:
    """Unlinks the buffer that DeepSpeed shares among CPU ranks, 66 MB each, which it would leave behind.

    The ranks have mapped each other's and go on with them; the memory is returned when they end, however they do.
    """
    if not torch.distributed.is_initialized():
        return
    address, port, rank = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT"), torch.distributed.get_rank()
    buffer = folder / f"deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{rank}"
    if buffer.exists():  # then every rank has one
        torch.distributed.barrier()
        buffer.unlink()


@contextmanager
def watched(mode: str) -> Iterator[None]:
    """A block in which the host must not wait for the GPU: --debug_sync says what happens where it does.

    Args:
        mode: 'off', 'warn', or 'error', which raises inside the block; everywhere else torch only warns.
    """
    if mode == "off" or not torch.cuda.is_available():
        yield
        return
    torch.cuda.set_sync_debug_mode(mode)
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("warn")


class BaseTrainer(Trainer):
    """transformers' Trainer with a stopwatch, readable log lines and resuming as if there had been no interruption.

    Args:
        provenance: what the run was made from, for the model card; None for none.
    """

    args: Any
    model: Any
    control: Any
    provenance: dict[str, Any] | None = None

    def __init__(self, *args: Any, provenance: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.provenance = provenance
        # As in LLaVA, a step's loss is the mean of its micro-batches' means.
        self.model_accepts_loss_kwargs = False
        self.throughput = Throughput(unit="rows")
        self.add_callback(StopWatch(self.throughput))
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(StepLine)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: Any) -> tuple[list[Any], Any]:
        """The micro-batches of one optimizer step, which the stopwatch times from here on."""
        self.throughput.start()
        group, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._count_rows(group)
        return group, items

    def _count_rows(self, group: list[Any]) -> None:
        """Adds the rows of this step to the stopwatch's; every rank has as many."""
        self.throughput.add(sum(len(batch["input_ids"]) for batch in group) * self.args.world_size)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute the loss while watching the forward pass for host-device synchronizations."""
        with watched(self.args.debug_sync):
            return super().compute_loss(model, inputs, *args, **kwargs)

    # --- Going on as if there had been no interruption ---------------------------------------------------------------

    def _run_epoch(self, **kwargs: Any) -> None:
        """One pass over the data; transformers takes a step too many where the checkpoint is of the last one."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
            return
        forget_shared_memory()
        # accelerate does not reach the sampler of a loader that skips batches on one of several ranks.
        sampler = sampler_of(kwargs["train_dataloader"])
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(kwargs["epoch"])
        super()._run_epoch(**kwargs)

    def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """A log line at every save: what is summed between two lines is in no checkpoint."""
        self.control.should_log |= self.control.should_save
        super()._maybe_log_save_evaluate(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds rate and time left; the closing mean loss is of all steps, not only of those since an interruption."""
        if "loss" in logs:
            logs = logs | self.throughput.take(self.state.max_steps - self.state.global_step)
        if "train_loss" in logs:
            total = sum_of_losses(self.state.log_history) + self._tr_loss.item()
            logs = logs | {"train_loss": total / max(1, self.state.global_step)}
        super().log(logs, start_time)

    def save_final(self, folder: str) -> None:
        """Save the finished model, once, by one process."""
        self.save_model(folder)

    # --- Checkpoints -------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        trained = sum(p.numel() * p.element_size() for p in self.model.parameters() if p.requires_grad)
        with writing(self.args.output_dir, 3 * trained, RuntimeError, SafetensorError):  # weights and two moments
            super()._save_checkpoint(*args, **kwargs)

    def _save_rng_state(self, output_dir: str) -> None:
        """The last thing that every rank writes: then the checkpoint is sealed, before an older one is deleted."""
        super()._save_rng_state(output_dir)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            seal_checkpoint(output_dir, self.args.world_size)

    def _load_best_model(self) -> None:
        """Every trained part from the best checkpoint, by `_load_from_checkpoint`.

        Raises:
            ValueError: the best checkpoint is incomplete, or this user's run did not write it.
        """
        recorded = Path(str(self.state.best_model_checkpoint))
        best = Path(self.args.output_dir) / recorded.name  # the output folder may have moved since it was recorded
        if missing := missing_files(best):
            raise ValueError(
                f"--load_best_model_at_end: expected the best checkpoint at '{best}', found no whole {missing[0]}. "
                f"The last checkpoint is complete; start again without the flag to save the last model."
            )
        validate_signature(best, trust=self.args.trust_checkpoint)
        self.state.best_model_checkpoint = str(best)
        log(f"loading the best checkpoint, {best} ({self.args.metric_for_best_model} {self.state.best_metric:.6g})")
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(best))
