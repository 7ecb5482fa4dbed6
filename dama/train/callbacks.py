"""What watches training: the progress line, the stopwatch, and the observers of each step's decision."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from transformers.trainer_callback import ProgressCallback, TrainerCallback

from dama.console import log, regular_file
from dama.train.family import ModelFamily, PreparedPair, shown_images
from dama.train.metrics import StepTable, preference_metrics, weighting_metrics
from dama.train.throughput import Throughput, step_flops
from dama.views import CHOSEN, REJECTED
from dama.weighting import Weights

PAIR_LOG = "pair_log.jsonl"  # in the output folder, with --pair_log True


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
                log(line)
        super().on_train_begin(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Write one line above the progress bar: loss, rewards, weighting, speed and the hours left."""
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
    """Stops the throughput's clock at the end of every optimizer step."""

    def __init__(self, throughput: Throughput) -> None:
        self.throughput = throughput

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Close the step that the observers have counted."""
        self.throughput.stop()


# --- Observers of decisions ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Decided:
    """A decision on the pairs of one step (or of one gathered micro-batch), for those who log it.

    Attributes:
        step: number of decisions before this one. pairs: in the order of the table. R_bar: after the step.
    """

    step: int
    pairs: Sequence[PreparedPair]
    table: StepTable
    weights: Weights
    R_bar: float


class Observer(Protocol):
    """Is called with every decision; alike on all ranks."""

    def on_decision(self, decided: Decided) -> None:
        """Receive one decision. Every rank calls this for the same decisions in the same order."""


class MetricMeans:
    """The means of the metrics of all decisions since the last log line."""

    def __init__(self, beta: float) -> None:
        self.beta = beta
        self.values: dict[str, list[float]] = defaultdict(list)

    def on_decision(self, decided: Decided) -> None:
        """Add the decision's rewards and weighting metrics."""
        metrics = preference_metrics(decided.table, self.beta) | weighting_metrics(decided.weights, decided.R_bar)
        for name, value in metrics.items():
            self.values[name].append(value)

    def take(self) -> dict[str, float]:
        """The means, which are then forgotten."""
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        self.values.clear()
        return means


class WorkCount:
    """Counts pairs, tokens and FLOPs for the stopwatch."""

    def __init__(self, family: ModelFamily, throughput: Throughput, frozen_weights: bool) -> None:
        self.family, self.throughput, self.frozen_weights = family, throughput, frozen_weights
        self.size = family.size()

    def on_decision(self, decided: Decided) -> None:
        """Add the pairs, tokens and FLOPs of the decision's forward and backward passes."""
        groups = [self.family.groups(pair) for pair in decided.pairs]
        trained = decided.weights.selected.tolist()
        flops = step_flops(self.size, groups, trained, len(shown_images(decided.pairs)), self.frozen_weights)
        tokens = sum(group.positions for pair in groups for group in pair)
        self.throughput.add(len(groups), tokens, flops)


class PairLog:
    """Writes one line for every pair of every step: its rewards and the method's decision on it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def rewind(self, step: int) -> None:
        """Cut off what was written at `step` and later, and a torn line: a resumed run takes these steps again."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a+b", opener=regular_file) as file:
            file.truncate(end_of_steps_before(file, step))

    def on_decision(self, decided: Decided) -> None:
        """Append one line for every pair of the decision."""
        self.append(decided.step, [item.pair.id for item in decided.pairs], decided.table, decided.weights)

    def append(self, step: int, ids: list[str], table: StepTable, weights: Weights) -> None:
        """Add the lines of one step: rewards are log-ratios to the reference in nats, without beta."""
        views = [(view.name, table.logps.r(view)) for view in table.logps.views if view not in (CHOSEN, REJECTED)]
        columns = {
            "R": table.R, "chosen": table.logps.r(CHOSEN), "rejected": table.logps.r(REJECTED), **dict(views),
            "delta": table.delta, "alpha_D": weights.alpha_D, "beta": weights.beta, "selected": weights.selected,
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
