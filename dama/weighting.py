"""How strongly each pair counts in one step: alpha_D, alpha_M, the selection of pairs, and R_bar as explicit state.

Sources: DAMA (arXiv 2502.01943, Eq. 3-16 and Algorithm 1), the released code's behavior (variant `released`) and
beta-DPO (arXiv 2407.08639), on whose batch statistics the model-aware part builds. Everything here is without
gradient, in float64 on the CPU, so that every rank of a run comes to the same decision from the same numbers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from typing import NamedTuple

import torch
from torch import Tensor

BETA_DPO_KEEP = 0.8  # K / N of beta-DPO's filtering


class Strategy(StrEnum):
    """Which factors set beta. `none` is plain DPO. A new one is a name here, a function and a row of STRATEGIES."""

    NONE = "none"
    DATA = "data"
    MODEL = "model"
    BOTH = "both"
    BETA_DPO = "beta_dpo"


class Variant(StrEnum):
    """`paper` follows Algorithm 1; `released` computes what the authors' released code computes."""

    PAPER = "paper"
    RELEASED = "released"


class Selection(StrEnum):
    """How K of the N pairs are chosen. `auto`: off for none and data, sample otherwise."""

    AUTO = "auto"
    OFF = "off"
    SAMPLE = "sample"
    NEAREST = "nearest"
    RANDOM = "random"


@dataclass(frozen=True)
class WeightingConfig:
    """The method's constants, named as in the paper."""

    strategy: Strategy = Strategy.BOTH
    variant: Variant = Variant.PAPER
    selection: Selection = Selection.AUTO
    beta: float = 0.1
    gamma: float = 0.9
    keep: float = 0.75  # K / N
    beta_min: float = 1e-3
    beta_dpo_a: float = 0.6
    seed: int = 0

    def __post_init__(self) -> None:
        errors = [
            f"{name}: expected {expected}, got {getattr(self, name)}"
            for name, holds, expected in (
                ("beta", self.beta > 0, "a number above 0"),
                ("gamma", 0 <= self.gamma < 1, "a number in [0, 1)"),
                ("keep", 0 < self.keep <= 1, "a share in (0, 1]"),
                ("beta_min", 0 <= self.beta_min <= self.beta, "a number in [0, beta]"),
            )
            if not holds
        ]
        if errors:
            raise ValueError("; ".join(errors))

    @property
    def selects(self) -> Selection:
        """Selection with AUTO resolved: OFF without a model-aware part, else SAMPLE."""
        if self.selection is not Selection.AUTO:
            return self.selection
        return Selection.SAMPLE if STRATEGIES[self.strategy].uses_gaps else Selection.OFF

    @property
    def uses_delta(self) -> bool:
        """Whether beta depends on hardness, so that every pair needs a delta."""
        return STRATEGIES[self.strategy].uses_delta

    @property
    def is_static(self) -> bool:
        """Whether beta is known without looking at R: no selection, and neither alpha_M nor batch statistics."""
        return self.selects is Selection.OFF and not STRATEGIES[self.strategy].uses_gaps

    def count_kept(self, n: int) -> int:
        """K for a step of N pairs: 12 of 16; int(0.8 N) in the released code; never none."""
        if self.variant is Variant.RELEASED:
            return max(1, int(0.8 * n))
        keep = BETA_DPO_KEEP if self.strategy is Strategy.BETA_DPO else self.keep
        return max(1, round(keep * n))


@dataclass(frozen=True)
class WeightingState:
    """What one step passes to the next; saved in every checkpoint."""

    step: int = 0
    R_bar: float = 0.0
    R_std: float = 0.0  # beta-DPO only

    def as_dict(self) -> dict[str, float]:
        """State as JSON values, for a checkpoint."""
        return asdict(self)


@dataclass(frozen=True)
class Weights:
    """The decision for the N pairs of one step."""

    beta: Tensor  # [N] float64: beta_C of Eq. 15, clamped
    selected: Tensor  # [N] bool
    alpha_D: Tensor  # [N]
    alpha_M: float
    R_mean: float  # of all N pairs
    R_B: float  # of the selected pairs, which moves R_bar
    clamped: float  # share of pairs whose beta met the lower bound
    near_tie: bool = field(default=False)  # another order of addition could have selected another pair


# --- Data-aware strategy ---------------------------------------------------------------------------------------------


def alpha_data(delta: Tensor, delta_bar: float) -> Tensor:
    """alpha_D,i = sigma(delta_i) / sigma(delta_bar) (Eq. 7). [N] to [N]."""
    return torch.sigmoid(delta) / _sigmoid(delta_bar)


def static_beta(config: WeightingConfig, delta: Tensor, delta_bar: float) -> Tensor:
    """Data-aware beta alpha_D,i, clamped from below: Eq. 15 without the model-aware factor. [N] to [N] float64."""
    delta = delta.double()
    alpha_D = alpha_data(delta, delta_bar) if config.uses_delta else torch.ones_like(delta)
    return (config.beta * alpha_D).clamp(min=config.beta_min)


# --- Model-aware strategy --------------------------------------------------------------------------------------------


def alpha_model(R_B: float, R_bar: float) -> float:
    """alpha_M = sigma(R_B) / sigma(R_bar) (Eq. 13)."""
    return _sigmoid(R_B) / _sigmoid(R_bar)


def update_R_bar(R_bar: float, R_B: float, gamma: float) -> float:
    """R_bar <- gamma R_bar + (1 - gamma) R_B (Eq. 14)."""
    return gamma * R_bar + (1 - gamma) * R_B


def log_weights(R: Tensor, R_bar: float, std: float = 1.0) -> Tensor:
    """Logarithm of the selection weights, -0.5 ((R_i - R_bar) / std)^2 (Eq. 10; unit variance in DAMA). [N] to [N]."""
    return -0.5 * ((R - R_bar) / std) ** 2


def gumbel_noise(n: int, seed: int, step: int) -> Tensor:
    """[N] standard Gumbel noise that depends on (seed, step, position) alone: not on rank, device or resume."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    uniform = torch.rand(n, dtype=torch.float64, generator=generator).clamp_(1e-300, 1 - 1e-16)
    return -torch.log(-torch.log(uniform))


def top_k(scores: Tensor, k: int) -> tuple[Tensor, bool]:
    """Positions [k] of the largest scores, and whether the last of them won by less than rounding can turn (1e-6)."""
    order = scores.argsort(descending=True, stable=True)
    near_tie = k < len(scores) and bool(scores[order[k - 1]] - scores[order[k]] < 1e-6)
    return order[:k], near_tie


def select(config: WeightingConfig, state: WeightingState, R: Tensor) -> tuple[Tensor, bool]:
    """Positions of the pairs that are kept, and the near-tie flag of `top_k`.

    `sample` draws K of N without replacement with probability proportional to exp(-0.5 (R_i - R_bar)^2) (Eq. 10-11)
    by Gumbel top-K on the log-weights: the same distribution as sequential draws, and no weight ever vanishes.
    """
    n, k = len(R), config.count_kept(len(R))
    if config.selects is Selection.OFF:
        return torch.arange(n), False
    noise = gumbel_noise(n, config.seed, state.step)
    std = state.R_std if config.strategy is Strategy.BETA_DPO and state.R_std > 0 else 1.0
    if config.selects is Selection.RANDOM:
        return top_k(noise, k)
    if config.selects is Selection.NEAREST:
        return top_k(-(R - state.R_bar).abs(), k)
    if config.variant is Variant.RELEASED:
        return _draw_as_released(config, state, R, k), False
    return top_k(log_weights(R, state.R_bar, std) + noise, k)


def _draw_as_released(config: WeightingConfig, state: WeightingState, R: Tensor, k: int) -> Tensor:
    """The released code's draw: multinomial on float32 weights; all zero: uniform WITH replacement, so fewer count.

    A position drawn twice counts twice in alpha_M and once in the loss, as there.
    """
    weights = log_weights(R.float(), state.R_bar).exp()
    generator = torch.Generator().manual_seed((config.seed * 1_000_003 + state.step) % 2**63)
    if weights.sum() == 0:
        return torch.randint(len(R), (k,), generator=generator)
    return torch.multinomial(weights, k, replacement=False, generator=generator)


# --- One step --------------------------------------------------------------------------------------------------------


class StepGaps(NamedTuple):
    """What a strategy sees of one step."""

    R: Tensor  # [N] reward gaps of all pairs
    selected: Tensor  # [K] those of the selected pairs
    delta: Tensor | None  # [N] hardness
    delta_bar: float
    R_bar: float  # as the strategy defines it: before this step (DAMA), or with it (beta-DPO)


def weigh_none(config: WeightingConfig, gaps: StepGaps) -> tuple[Tensor, float]:
    """(alpha_D [N], alpha_M) of plain DPO: no factor on beta."""
    return torch.ones_like(gaps.R), 1.0


def weigh_data(config: WeightingConfig, gaps: StepGaps) -> tuple[Tensor, float]:
    """(alpha_D, 1): the data-aware factor alone (Eq. 7)."""
    if gaps.delta is None:
        raise ValueError(f"strategy '{config.strategy}': expected the hardness delta of every pair, got none")
    return alpha_data(_checked("hardness delta", gaps.delta), gaps.delta_bar), 1.0


def weigh_model(config: WeightingConfig, gaps: StepGaps) -> tuple[Tensor, float]:
    """(1, alpha_M): the model-aware factor alone (Eq. 13); the released code averages sigma(R) instead of R."""
    if config.variant is Variant.RELEASED:
        alpha_M = float(torch.sigmoid(gaps.selected).mean()) / _sigmoid(gaps.R_bar)
    else:
        alpha_M = alpha_model(float(gaps.selected.mean()), gaps.R_bar)
    return torch.ones_like(gaps.R), alpha_M


def weigh_both(config: WeightingConfig, gaps: StepGaps) -> tuple[Tensor, float]:
    """(alpha_D, alpha_M): DAMA (Eq. 15)."""
    return weigh_data(config, gaps)[0], weigh_model(config, gaps)[1]


def weigh_beta_dpo(config: WeightingConfig, gaps: StepGaps) -> tuple[Tensor, float]:
    """(1, 1 + a (mean of R over the selected - R_bar)): beta-DPO (arXiv 2407.08639, Eq. 6)."""
    return torch.ones_like(gaps.R), 1 + config.beta_dpo_a * (float(gaps.selected.mean()) - gaps.R_bar)


class StrategyRow(NamedTuple):
    """What is to be known of a strategy besides its equation."""

    function: Callable[[WeightingConfig, StepGaps], tuple[Tensor, float]]
    summary: str  # for --help
    uses_delta: bool = False  # every pair needs its hardness
    uses_gaps: bool = False  # beta depends on R of the step; pairs are then selected unless --selection says otherwise


STRATEGIES: dict[Strategy, StrategyRow] = {
    Strategy.NONE: StrategyRow(weigh_none, "plain DPO"),
    Strategy.DATA: StrategyRow(weigh_data, "alpha_D", uses_delta=True),
    Strategy.MODEL: StrategyRow(weigh_model, "alpha_M", uses_gaps=True),
    Strategy.BOTH: StrategyRow(weigh_both, "DAMA", uses_delta=True, uses_gaps=True),
    Strategy.BETA_DPO: StrategyRow(weigh_beta_dpo, "Wu et al. 2024", uses_gaps=True),
}


def weigh(
    config: WeightingConfig,
    state: WeightingState,
    R: Tensor,
    delta: Tensor | None = None,
    delta_bar: float = 0.0,
    *,
    drawn: Sequence[int] | None = None,
) -> tuple[Weights, WeightingState]:
    """beta_C,i = beta alpha_D,i alpha_M, clamped from below (Eq. 15), and the state after the step.

    Args:
        R: [N] reward gaps of all pairs of the optimizer step (variant `released`: of the gathered micro-batch), in the
            sampler's global order.
        delta: [N] hardness of the pairs (Eq. 6), needed by the strategies `data` and `both`.
        delta_bar: mean of delta over the training set.
        drawn: positions to select instead of drawing, to replay a recorded run.

    Raises:
        ValueError: R or delta is not finite, or delta is missing.
    """
    R = _checked("reward gaps R", R)
    # beta-DPO compares with statistics that include this step, DAMA with those of the steps before.
    seen = _moved_beta_dpo(config, state, R) if config.strategy is Strategy.BETA_DPO else state
    index, near_tie = select(config, seen, R) if drawn is None else (torch.tensor(drawn), False)
    alpha_D, alpha_M = STRATEGIES[config.strategy].function(config, StepGaps(R, R[index], delta, delta_bar, seen.R_bar))
    weights = replace(_weights(config, R, index, alpha_D, alpha_M), near_tie=near_tie)
    after = seen if config.strategy is Strategy.BETA_DPO else _moved(config, state, weights)
    return weights, replace(after, step=state.step + 1)


def _weights(config: WeightingConfig, R: Tensor, index: Tensor, alpha_D: Tensor, alpha_M: float) -> Weights:
    """Beta of Eq. 15, clamped from below, and means of R; `index` has the positions of the selected pairs."""
    raw = config.beta * alpha_D * alpha_M
    selected = torch.zeros(len(R), dtype=torch.bool)
    selected[index] = True
    return Weights(
        beta=raw.clamp(min=config.beta_min),
        selected=selected,
        alpha_D=alpha_D,
        alpha_M=alpha_M,
        R_mean=float(R.mean()),
        R_B=float(R[index].mean()),
        clamped=float((raw < config.beta_min).double().mean()),
    )


def _moved(config: WeightingConfig, state: WeightingState, weights: Weights) -> WeightingState:
    """DAMA's R_bar, moved by the selected pairs (Eq. 14); the released code takes the mean of all pairs."""
    moved_by = weights.R_mean if config.variant is Variant.RELEASED else weights.R_B
    return replace(state, R_bar=update_R_bar(state.R_bar, moved_by, config.gamma))


def _moved_beta_dpo(config: WeightingConfig, state: WeightingState, R: Tensor) -> WeightingState:
    """beta-DPO's running mean and standard deviation of R, this step's included."""
    spread = float(R.std()) if len(R) > 1 else state.R_std
    return replace(
        state,
        R_bar=update_R_bar(state.R_bar, float(R.mean()), config.gamma),
        R_std=update_R_bar(state.R_std, spread, config.gamma),
    )


def _checked(name: str, values: Tensor) -> Tensor:
    values = values.detach().to("cpu", torch.float64)
    if values.ndim != 1 or len(values) == 0:
        raise ValueError(f"{name}: expected a vector [N] of at least one pair, got shape {tuple(values.shape)}")
    if not torch.isfinite(values).all():
        bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
        raise ValueError(
            f"{name}: expected finite numbers, got {values[bad[0]].item()} at positions {bad[:8]} of the step. "
            "Look at those pairs' answers and at the learning rate."
        )
    return values


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
