"""What a step of preference optimisation has to say: its table of pairs, figures for the log, a line for each pair."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from torch import Tensor
from transformers.trainer_callback import ProgressCallback, TrainerCallback

from dama.console import regular_file, say
from dama.losses import reward_gap
from dama.weighting import Weights
from llava.train.throughput import Throughput

NO_PAIR = -1
PAIR_LOG = "pair_log.jsonl"  # in the output folder, with --pair_log True


class StepTable(NamedTuple):
    """All pairs of a step (or of a gathered micro-batch) in global order, each field [N] float64."""

    position: Tensor
    policy_chosen: Tensor
    policy_rejected: Tensor
    ref_chosen: Tensor
    ref_rejected: Tensor
    delta: Tensor
    tokens: Tensor

    @property
    def R(self) -> Tensor:
        return reward_gap(self.policy_chosen, self.policy_rejected, self.ref_chosen, self.ref_rejected)

    @staticmethod
    def from_rows(rows: Tensor) -> StepTable:
        """From gathered rows [M, fields]; rows without a pair are left out, the others sorted by position."""
        rows = rows[rows[:, 0] != NO_PAIR]
        return StepTable(*rows[rows[:, 0].argsort()].T)


class StepLine(ProgressCallback):
    """The progress bar with time left, and one readable line for each log instead of a dictionary."""

    FIGURES = {
        "loss": "loss {:.4f}",
        "rewards/accuracies": "accuracy {:.2f}",
        "rewards/margins": "margin {:+.4f}",
        "dama/R_mean": "R {:+.3f}",
        "dama/R_bar": "R_bar {:+.3f}",
        "dama/alpha_M": "alpha_M {:.3f}",
        "dama/beta": "beta {:.4f}",
        "dama/selected": "kept {:g}",
        "dama/pairs": "of {:g}",
        "grad_norm": "grad {:.3g}",
        "learning_rate": "lr {:.2e}",
        "speed/pairs_per_second": "{:.3g} pairs/s",
        "speed/rows_per_second": "{:.3g} rows/s",
        "speed/tokens_per_second": "{:.0f} tokens/s",
        "speed/mfu": "MFU {:.1%}",
    }
    LEGEND = (
        "log: loss and grad (norm of the gradient) of a step, lr (learning rate), rate of training and time left",
    )
    PREFERENCE_LEGEND = (
        "log: accuracy (share of pairs whose chosen answer has the higher reward), margin (chosen minus rejected "
        "reward, beta times the log-ratio to the reference)",
        "log: R (mean reward gap of the step's pairs in nats, without beta), R_bar (its running mean), alpha_M "
        "(factor on beta from the model's response), beta (mean over pairs), kept (pairs selected) of (pairs seen)",
    )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """What the columns mean, once, above the progress bar."""
        if state.is_world_process_zero:
            for line in self.LEGEND + (self.PREFERENCE_LEGEND if args.task == "DPO" else ()):
                say(line)
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.training_bar is None or not logs:
            return
        held_out = "eval_loss" in logs
        figures = {name.removeprefix("eval_"): value for name, value in logs.items()}
        parts = [text.format(float(figures[name])) for name, text in self.FIGURES.items() if name in figures]
        if "speed/hours_left" in figures:
            parts.append(f"{duration(figures['speed/hours_left'])} left")
        if parts and ("loss" in figures):
            place = "held-out" if held_out else "training"
            self.training_bar.write(f"step {state.global_step:>5} {place}: {'  '.join(parts)}")


def duration(hours: float) -> str:
    """Hours, minutes and seconds as 2:05:09."""
    seconds = round(hours * 3600)
    return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"


class StopWatch(TrainerCallback):
    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.throughput.stop()


def preference_metrics(table: StepTable, beta: float) -> dict[str, float]:
    """TRL's names; rewards are beta times the log-ratio, beta the plain one."""
    chosen = beta * (table.policy_chosen - table.ref_chosen)
    rejected = beta * (table.policy_rejected - table.ref_rejected)
    return {
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
        "rewards/margins": (chosen - rejected).mean().item(),
        "rewards/accuracies": (chosen > rejected).double().mean().item(),
        "logps/chosen": table.policy_chosen.mean().item(),
        "logps/rejected": table.policy_rejected.mean().item(),
    }


def weighting_metrics(weights: Weights, R_bar: float) -> dict[str, float]:
    """`R_bar`: after the step."""
    alpha, beta = weights.alpha_D, weights.beta
    return {
        "dama/R_mean": weights.R_mean,
        "dama/R_bar": R_bar,
        "dama/alpha_M": weights.alpha_M,
        "dama/alpha_D": alpha.mean().item(),
        "dama/alpha_D_min": alpha.min().item(),
        "dama/alpha_D_max": alpha.max().item(),
        "dama/beta": beta.mean().item(),
        "dama/beta_min": beta.min().item(),
        "dama/beta_max": beta.max().item(),
        "dama/clamped": weights.clamped,
        "dama/pairs": float(len(beta)),
        "dama/selected": float(weights.selected.sum()),
        "dama/near_ties": float(weights.near_tie),
    }


class PairLog:
    """One line for every pair of every step: what the model said of it and what the method made of that."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Cut off what was written at `step` and later, and a torn line: a resumed run takes these steps again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b", opener=regular_file) as file:
            file.truncate(end_of_steps_before(file, step))

    def append(self, step: int, ids: list[str], table: StepTable, weights: Weights) -> None:
        columns = {
            "R": table.R, "chosen": table.policy_chosen - table.ref_chosen,
            "rejected": table.policy_rejected - table.ref_rejected, "delta": table.delta, "alpha_D": weights.alpha_D,
            "beta": weights.beta, "selected": weights.selected,
        }  # fmt: skip
        values = zip(*(column.tolist() for column in columns.values()))
        rows = ({"step": step, "id": id} | dict(zip(columns, row)) for id, row in zip(ids, values, strict=True))
        with open(self.path, "a", encoding="utf-8", opener=regular_file) as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def end_of_steps_before(file: BinaryIO, step: int, block: int = 1 << 16) -> int:
    """Bytes of a pair log up to its last whole line of a step before `step`; read from the end, in blocks of bytes."""
    start, rest = file.seek(0, os.SEEK_END), b""
    while start > 0 and step > 0:
        start, stop = max(0, start - block), start
        file.seek(start)
        rest = file.read(stop - start) + rest
        first = rest.find(b"\n") + 1 if start else 0  # before it is the end of a line that begins in an earlier block
        end = rest.rfind(b"\n") + 1
        for line in reversed(rest[first:end].split(b"\n")[:-1]):
            if json.loads(line)["step"] < step:
                return start + end
            end -= len(line) + 1
        rest = rest[:first]
    return 0
