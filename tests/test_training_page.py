"""docs/training.md explains every metric that training logs, and no other."""

import re
from pathlib import Path

import pytest
import torch

from dama.losses import ViewLogps
from dama.train.callbacks import StepLine
from dama.train.metrics import StepTable, preference_metrics, weighting_metrics
from dama.train.throughput import Throughput
from dama.views import ALL_VIEWS, PAIR_VIEWS
from dama.weighting import WeightingConfig, WeightingState, weigh

pytestmark = pytest.mark.fast

PAGE = (Path(__file__).resolve().parents[1] / "docs/training.md").read_text(encoding="utf-8")
TABLES = PAGE.partition("\n## The log\n")[2].partition("\n## ")[0]
EXPLAINED = {
    name
    for row in re.findall(r"^\| (`.+?) \| ", TABLES, re.M)
    for name in re.findall(r"`([^`]+)`", row)
}  # fmt: skip
# transformers' own, of its Trainer's log and summary.
OF_TRANSFORMERS = {
    "loss", "grad_norm", "learning_rate", "epoch",
    "train_loss", "train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos",
}  # fmt: skip


def metrics_of(views) -> set[str]:
    """Names that a step of 4 pairs with these views logs."""
    policy, reference = torch.randn(2, len(views), 4, dtype=torch.float64)
    logps = ViewLogps(views, policy, reference, torch.ones(len(views), 4))
    table = StepTable(torch.arange(4), torch.zeros(4), logps)
    weights, state = weigh(WeightingConfig(), WeightingState(), table.R, table.delta)
    return {*preference_metrics(table, 0.1), *weighting_metrics(weights, state.R_bar)}


def speeds(unit: str) -> set[str]:
    """Names of the rates."""
    throughput = Throughput(peak=1.0, unit=unit, seconds=1.0, steps=1)
    throughput.add(1, 1, 1)
    return set(throughput.take(1))


def test_every_logged_metric_is_explained_and_no_other():
    of_pair = metrics_of(PAIR_VIEWS)
    of_views = {name for name in metrics_of(ALL_VIEWS) - of_pair}
    held_out = {f"eval_{name}" for name in of_pair if not name.startswith("dama/")} | {"eval_loss"}
    logged = of_pair | speeds("pairs") | speeds("rows") | held_out | OF_TRANSFORMERS
    assert logged | {"rewards/VIEW", "logps/VIEW"} == EXPLAINED
    assert {name.partition("/")[2] for name in of_views} == {view.name for view in ALL_VIEWS} - {"chosen", "rejected"}
    (listed,) = re.findall(r"^\| `rewards/VIEW` \| .*?: (.+?) \|", TABLES, re.M)
    assert set(re.findall(r"`(\w+)`", listed)) == {view.name for view in ALL_VIEWS} - {"chosen", "rejected"}


def test_the_console_shows_only_metrics_that_the_page_explains():
    assert set(StepLine.FIGURES) <= EXPLAINED
