"""Preference objectives: pure functions of log-probs by view and of a beta per pair, and the table that names them.

Notation: w the chosen and l the rejected answer, w2 the right answer for the corrupted image m', s the logistic
function, r(y, m) = log pi(y | m, x) - log pi_ref(y | m, x), R = r(w, m) - r(l, m), b = beta of the pair. Log-probs are
sums over answer tokens unless an objective says that it averages. DAMA (arXiv 2502.01943) is `dpo` with the betas and
the selection of dama.weighting, which combine with every objective that has a beta.

A new objective is one function and one row of OBJECTIVES; flags, help, reference stage, memory estimate, evaluation
and model card read the table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from dama.views import CHOSEN, CHOSEN_CORRUPTED, PAIR_VIEWS, REJECTED, SECOND, SECOND_CORRUPTED, View, ordered


@dataclass(frozen=True)
class ViewLogps:
    """Summed log-probs of N pairs' answers, view by view.

    Shapes: [V, N] each; `tokens` counts the answer tokens that were summed.
    """

    views: tuple[View, ...]
    policy: Tensor
    reference: Tensor
    tokens: Tensor

    def pi(self, view: View) -> Tensor:
        """Log-probs under the policy of a view's answers: [N]."""
        return self.policy[self.views.index(view)]

    def r(self, view: View) -> Tensor:
        """[N] log pi(y | m, x) - log pi_ref(y | m, x) of a view."""
        i = self.views.index(view)
        return self.policy[i] - self.reference[i]

    @property
    def R(self) -> Tensor:
        """[N] reward gaps of the pair's own image, without beta (Eq. 1)."""
        return self.r(CHOSEN) - self.r(REJECTED)

    def averaged(self) -> ViewLogps:
        """The same per answer token: divided by each answer's number of tokens."""
        tokens = self.tokens.clamp(min=1)
        return ViewLogps(self.views, self.policy / tokens, self.reference / tokens, torch.ones_like(self.tokens))


@dataclass(frozen=True)
class LossConfig:
    """The objectives' own constants."""

    label_smoothing: float = 0.1  # cdpo, robust: assumed share of flipped pairs
    simpo_margin: float = 0.5  # simpo: g
    orpo_lambda: float = 0.1
    mdpo_anchor: float = 0.0
    opa_image: float = 0.2  # opa: weight of the term that compares images
    opa_anchor: float = 1.0
    symmpo_lambda: float = 0.5
    symmpo_margin: float = 1e-4  # symmpo: weight of (D1 - D2)^2
    bco_shift: float = 0.0  # bco_pair: d, the running mean of b r; set by the trainer before each step's loss


@dataclass(frozen=True)
class RunningMean:
    """Mean of b r over both answers of all pairs so far: d of bco_pair, one value for a step on all ranks."""

    mean: float = 0.0
    count: int = 0

    def updated(self, logps: ViewLogps, beta: Tensor) -> RunningMean:
        """With the N pairs of one more step; beta: [N]."""
        values = torch.cat([beta * logps.r(CHOSEN), beta * logps.r(REJECTED)]).detach().double()
        count = self.count + len(values)
        return RunningMean(self.mean + (float(values.sum()) - len(values) * self.mean) / count, count)

    def as_dict(self) -> dict[str, float]:
        """State as JSON values, for a checkpoint."""
        return {"mean": self.mean, "count": self.count}


# --- The pair's own image --------------------------------------------------------------------------------------------


def reward_gap(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """R_i = [log pi(y_w) - log pi_ref(y_w)] - [log pi(y_l) - log pi_ref(y_l)], without beta (Eq. 1).

    Args:
        policy_chosen, policy_rejected, ref_chosen, ref_rejected: [N] summed log-probs of the answers.

    Returns:
        [N] reward gaps.
    """
    _expect_vectors(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)


def preference_loss(R: Tensor, beta: Tensor | float) -> Tensor:
    """loss_i = -log s(beta_i R_i) (Eq. 2; with beta_i = beta_C,i Eq. 16).

    Args:
        R: [N] reward gaps. beta: [N], or one number for all pairs.

    Returns:
        [N] losses.
    """
    _expect_vectors(R)
    return -logsigmoid(beta * R)


def dpo(y: ViewLogps, b: Tensor, c: LossConfig) -> Tensor:
    """-log s(b R) (Rafailov et al. 2023, arXiv 2305.18290, Eq. 7)."""
    return preference_loss(y.R, b)


def cdpo(y: ViewLogps, b: Tensor, c: LossConfig) -> Tensor:
    """-(1 - e) log s(b R) - e log s(-b R), e the label smoothing (Mitchell 2023, conservative DPO)."""
    e = c.label_smoothing
    return -(1 - e) * logsigmoid(b * y.R) - e * logsigmoid(-b * y.R)


def robust(y: ViewLogps, b: Tensor, c: LossConfig) -> Tensor:
    """[-(1 - e) log s(b R) + e log s(-b R)] / (1 - 2 e) (Chowdhury et al. 2024, arXiv 2403.00409, Eq. 12)."""
    e = c.label_smoothing
    return (-(1 - e) * logsigmoid(b * y.R) + e * logsigmoid(-b * y.R)) / (1 - 2 * e)


def ipo(y: ViewLogps, b: Tensor, c: LossConfig) -> Tensor:
    """(R' - 1 / (2 b))^2, R' from log-probs per token (Azar et al. 2023, arXiv 2310.12036, Eq. 17)."""
    return (y.averaged().R - 1 / (2 * b)) ** 2


def hinge(y: ViewLogps, b: Tensor, c: LossConfig) -> Tensor:
    """max(0, 1 - b R) (SLiC, Zhao et al. 2023, arXiv 2305.10425)."""
    return relu(1 - b * y.R)


def apo_zero(y: ViewLogps, b: Tensor, c: LossConfig) -> Tensor:
    """1 - s(b r(w)) + s(b r(l)): more of w, less of l (D'Oosterlinck et al. 2024, arXiv 2408.06266)."""
    return 1 - torch.sigmoid(b * y.r(CHOSEN)) + torch.sigmoid(b * y.r(REJECTED))


def apo_down(y: ViewLogps, b: Tensor, c: LossConfig) -> Tensor:
    """s(b r(w)) + 1 - s(b R): less of both, l more so (D'Oosterlinck et al. 2024, arXiv 2408.06266)."""
    return torch.sigmoid(b * y.r(CHOSEN)) + 1 - torch.sigmoid(b * y.R)


def bco_pair(y: ViewLogps, b: Tensor, c: LossConfig) -> Tensor:
    """-log s(b r(w) - d) - log s(-(b r(l) - d)), d the running mean of b r (Jung et al. 2024, arXiv 2404.04656)."""
    d = c.bco_shift
    return -logsigmoid(b * y.r(CHOSEN) - d) - logsigmoid(-(b * y.r(REJECTED) - d))


def sft(y: ViewLogps, b: Tensor, c: LossConfig) -> Tensor:
    """-log pi(w | m, x) per token: the likelihood term of RPO and MPO. It has no beta."""
    return -y.averaged().pi(CHOSEN)


def simpo(y: ViewLogps, b: Tensor, c: LossConfig) -> Tensor:
    """-log s(b [log pi(w) - log pi(l)] - g), log-probs per token (Meng et al. 2024, arXiv 2405.14734, Eq. 6)."""
    mean = y.averaged()
    return -logsigmoid(b * (mean.pi(CHOSEN) - mean.pi(REJECTED)) - c.simpo_margin)


def orpo(y: ViewLogps, b: Tensor, c: LossConfig) -> Tensor:
    """`sft` - lambda log s(log odds(w) - log odds(l)), per token (Hong et al., arXiv 2403.07691, Eq. 6). No beta."""
    mean = y.averaged()
    gap = log_odds(mean.pi(CHOSEN)) - log_odds(mean.pi(REJECTED))
    return -mean.pi(CHOSEN) - c.orpo_lambda * logsigmoid(gap)


def log_odds(log_p: Tensor) -> Tensor:
    """log(p / (1 - p)) of log-probs up to 0, without the cancellation of 1 - p near p = 1.

    1 - p is at least the rounding unit: a log-prob that rounds to 0, or sums over no token, has finite odds.
    """
    log_p = log_p.clamp(max=-torch.finfo(log_p.dtype).eps)
    # log(1 - e^x): by expm1 near 0, by log1p far from it.
    near = log_p > -math.log(2)
    log_rest = torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, log_p, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, log_p))),
    )
    return log_p - log_rest


# --- A second image --------------------------------------------------------------------------------------------------


def mdpo(y: ViewLogps, b: Tensor, c: LossConfig) -> Tensor:
    """`dpo` - log s(b [r(w, m) - r(w, m')]) - log s(b r(w, m) - anchor) (Wang et al. 2024, arXiv 2406.11839, Eq. 8)."""
    image = b * (y.r(CHOSEN) - y.r(CHOSEN_CORRUPTED))
    return dpo(y, b, c) - logsigmoid(image) - logsigmoid(b * y.r(CHOSEN) - c.mdpo_anchor)


def adavip(y: ViewLogps, b: Tensor, c: LossConfig) -> Tensor:
    """-log s(-log sum_j exp(b r_j - b r(w, m))), j over (l, m) and (w, m') (AdaViP, arXiv 2504.15619).

    The equation was read in a review of that paper, not in the paper itself.
    """
    others = torch.stack([y.r(REJECTED), y.r(CHOSEN_CORRUPTED)])
    return -logsigmoid(-torch.logsumexp(b * (others - y.r(CHOSEN)), dim=0))


def opa(y: ViewLogps, b: Tensor, c: LossConfig) -> Tensor:
    """`dpo` - 0.2 log s(b [r(w, m) - r(w, m')]) - log s(b r(w, m)) (OPA-DPO, Yang et al. 2025, arXiv 2501.09695)."""
    image = b * (y.r(CHOSEN) - y.r(CHOSEN_CORRUPTED))
    return dpo(y, b, c) - c.opa_image * logsigmoid(image) - c.opa_anchor * logsigmoid(b * y.r(CHOSEN))


def symmpo(y: ViewLogps, b: Tensor, c: LossConfig) -> Tensor:
    """`dpo` + lambda [-log s(b D1) - log s(b D2)] - log s(b r(w, m)) - log s(b r(w2, m')) + 1e-4 (D1 - D2)^2.

    D1 = r(w, m) - r(w2, m), D2 = r(w2, m') - r(w, m') (SymMPO, Liu et al. 2025, arXiv 2506.11712, as in its code).
    """
    D1 = y.r(CHOSEN) - y.r(SECOND)
    D2 = y.r(SECOND_CORRUPTED) - y.r(CHOSEN_CORRUPTED)
    symmetric = -logsigmoid(b * D1) - logsigmoid(b * D2)
    anchors = -logsigmoid(b * y.r(CHOSEN)) - logsigmoid(b * y.r(SECOND_CORRUPTED))
    return dpo(y, b, c) + c.symmpo_lambda * symmetric + anchors + c.symmpo_margin * (D1 - D2) ** 2


# --- The table -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Objective:
    """What is to be known of an objective besides its equation."""

    function: Callable[[ViewLogps, Tensor, LossConfig], Tensor]
    summary: str  # for --help, in a few words
    views: tuple[View, ...] = PAIR_VIEWS
    needs_reference: bool = True
    has_beta: bool = True
    has_state: bool = False  # a running mean over steps, saved in every checkpoint


ON_TWO_IMAGES = (*PAIR_VIEWS, CHOSEN_CORRUPTED)
OBJECTIVES: dict[str, Objective] = {
    "dpo": Objective(dpo, "direct preference optimization; DAMA sets its beta"),
    "cdpo": Objective(cdpo, "DPO with label smoothing"),
    "robust": Objective(robust, "DPO, unbiased under flipped labels"),
    "ipo": Objective(ipo, "squared distance of the mean log-ratio to 1 / (2 beta)"),
    "hinge": Objective(hinge, "hinge on the reward gap (SLiC)"),
    "apo_zero": Objective(apo_zero, "raises the chosen and lowers the rejected answer"),
    "apo_down": Objective(apo_down, "lowers both answers, the rejected one more"),
    "bco_pair": Objective(bco_pair, "binary classifier of each answer around a running mean", has_state=True),
    "sft": Objective(sft, "likelihood of the chosen answer, per token", needs_reference=False, has_beta=False),
    "simpo": Objective(simpo, "mean log-probs and a margin, no reference", needs_reference=False),
    "orpo": Objective(orpo, "likelihood plus log odds ratio, no reference", needs_reference=False, has_beta=False),
    "mdpo": Objective(mdpo, "DPO, image preference and anchor", ON_TWO_IMAGES),
    "adavip": Objective(adavip, "chosen answer against the rejected one and the corrupted image", ON_TWO_IMAGES),
    "opa": Objective(opa, "DPO, weak image preference, anchor", ON_TWO_IMAGES),
    "symmpo": Objective(
        symmpo, "symmetric in two images and their answers", (*ON_TWO_IMAGES, SECOND, SECOND_CORRUPTED)
    ),
}  # fmt: skip
MIXTURES: dict[str, tuple[tuple[str, float], ...]] = {
    "mpo": (("dpo", 0.8), ("bco_pair", 0.2), ("sft", 1.0)),  # InternVL's MPO, arXiv 2411.10442
}


@dataclass(frozen=True)
class Loss:
    """A weighted sum of objectives, and what all of them together need."""

    terms: tuple[tuple[str, float], ...] = (("dpo", 1.0),)
    config: LossConfig = LossConfig()

    @staticmethod
    def parse(words: Sequence[str], config: LossConfig | None = None) -> Loss:
        """Read `--loss` words: a name, or NAME:WEIGHT for a term of a sum.

        Raises:
            ValueError: a name is unknown or given twice, or a weight is no finite number other than 0.
        """
        terms: list[tuple[str, float]] = []
        for word in words:
            name, _, text = word.partition(":")
            weight = _weight(word, text)
            terms += [(part, weight * share) for part, share in MIXTURES.get(name, ((name, 1.0),))]
        names = [name for name, _ in terms]
        if unknown := [name for name in names if name not in OBJECTIVES]:
            known = ", ".join([*OBJECTIVES, *MIXTURES])
            raise ValueError(f"--loss {unknown[0]}: expected one of {known}, or several as NAME:WEIGHT")
        if not terms or len(set(names)) < len(names):
            raise ValueError(f"--loss {' '.join(words)}: expected each objective once, got {names or 'none'}")
        return Loss(tuple(terms), config or LossConfig())

    @property
    def objectives(self) -> tuple[Objective, ...]:
        """Rows of the table, in the order of `terms`."""
        return tuple(OBJECTIVES[name] for name, _ in self.terms)

    @property
    def views(self) -> tuple[View, ...]:
        """All views that a pair is read in, those of the pair itself first."""
        return ordered(view for objective in self.objectives for view in objective.views)

    @property
    def needs_reference(self) -> bool:
        """Whether any term reads log pi_ref."""
        return any(objective.needs_reference for objective in self.objectives)

    @property
    def has_beta(self) -> bool:
        """Whether any term has a beta, which DAMA's weighting then sets."""
        return any(objective.has_beta for objective in self.objectives)

    @property
    def has_state(self) -> bool:
        """Whether any term keeps a running mean across steps (bco_pair)."""
        return any(objective.has_state for objective in self.objectives)

    @property
    def name(self) -> str:
        """`dpo`, or `dpo:0.8 sft:1` for a sum."""
        if len(self.terms) == 1 and self.terms[0][1] == 1:
            return self.terms[0][0]
        return " ".join(f"{name}:{weight:g}" for name, weight in self.terms)

    def shifted(self, bco_shift: float) -> Loss:
        """The same loss with this step's d of bco_pair."""
        return replace(self, config=replace(self.config, bco_shift=bco_shift))

    def __call__(self, logps: ViewLogps, beta: Tensor) -> Tensor:
        """[N] losses of N pairs.

        Args:
            logps: of all `views`. beta: [N] of each pair.
        """
        losses = [weight * OBJECTIVES[name].function(logps, beta, self.config) for name, weight in self.terms]
        return losses[0] if len(losses) == 1 else torch.stack(losses).sum(0)


def _weight(word: str, text: str) -> float:
    try:
        weight = float(text) if ":" in word else 1.0
    except ValueError:
        weight = math.nan
    if not math.isfinite(weight) or weight == 0:
        raise ValueError(f"--loss {word}: expected NAME or NAME:WEIGHT with a finite weight other than 0")
    return weight


def _expect_vectors(*tensors: Tensor) -> None:
    shapes = [tuple(t.shape) for t in tensors]
    if any(len(shape) != 1 or shape != shapes[0] for shape in shapes):
        raise ValueError(f"pairs: expected vectors of one length [N], got shapes {shapes}")
