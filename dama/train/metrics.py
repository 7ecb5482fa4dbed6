"""The table of a preference step and the metrics that are logged of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dama.losses import ViewLogps
from dama.views import CHOSEN, PAIR_VIEWS, REJECTED, View
from dama.weighting import Weights

NO_PAIR = -1


@dataclass(frozen=True)
class StepTable:
    """All pairs of a step (or of a gathered micro-batch) in global order, float64.

    Attributes:
        position: [N] of each pair in its step. delta: [N] hardness. logps: of every view, [V, N].
    """

    position: Tensor
    delta: Tensor
    logps: ViewLogps

    @property
    def R(self) -> Tensor:
        """[N] reward gaps of the pairs' own images."""
        return self.logps.R

    @property
    def tokens(self) -> Tensor:
        """[N] answer tokens of the chosen and the rejected answer."""
        return self.logps.tokens[: len(PAIR_VIEWS)].sum(0)

    @staticmethod
    def rows(position: Tensor, delta: Tensor, logps: ViewLogps, size: int) -> Tensor:
        """[size, fields] float64 of one rank's micro-batch for `from_rows`, filled up with rows without a pair."""
        columns = [position[None], delta[None], logps.policy.detach(), logps.reference, logps.tokens]
        rows = torch.cat([column.double() for column in columns]).T
        return torch.cat([rows, rows.new_full((size - len(rows), rows.shape[1]), NO_PAIR)])

    @staticmethod
    def from_rows(rows: Tensor, views: tuple[View, ...]) -> StepTable:
        """From gathered rows [M, fields]; rows without a pair are left out, the others sorted by position."""
        rows = rows[rows[:, 0] != NO_PAIR]
        position, delta, *columns = rows[rows[:, 0].argsort()].T
        policy, reference, tokens = torch.stack(columns).split(len(views))
        return StepTable(position, delta, ViewLogps(views, policy, reference, tokens))


def preference_metrics(table: StepTable, beta: float) -> dict[str, float]:
    """TRL's names; rewards are beta times the log-ratio to the reference, beta the plain one."""
    logps = table.logps
    chosen, rejected = beta * logps.r(CHOSEN), beta * logps.r(REJECTED)
    metrics = {
        "rewards/chosen": chosen.mean().item(),
        "rewards/rejected": rejected.mean().item(),
        "rewards/margins": (chosen - rejected).mean().item(),
        "rewards/accuracies": (chosen > rejected).double().mean().item(),
        "logps/chosen": logps.pi(CHOSEN).mean().item(),
        "logps/rejected": logps.pi(REJECTED).mean().item(),
    }
    for view in logps.views[len(PAIR_VIEWS) :]:
        metrics[f"rewards/{view.name}"] = (beta * logps.r(view)).mean().item()
        metrics[f"logps/{view.name}"] = logps.pi(view).mean().item()
    return metrics


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
