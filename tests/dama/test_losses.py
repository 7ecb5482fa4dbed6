"""Objectives on paper, in their limits, by finite differences, and against TRL's own code on the same log-probs."""

import json
import math
import shlex
from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from dama.losses import MIXTURES, OBJECTIVES, Loss, LossConfig, RunningMean, ViewLogps, log_odds
from dama.views import (
    ALL_VIEWS,
    CHOSEN,
    CHOSEN_CORRUPTED,
    PAIR_VIEWS,
    REJECTED,
    SECOND,
    SECOND_CORRUPTED,
    View,
    ordered,
)
from llava.train.arguments import parse_arguments
from tests.conftest import ROOT
from tests.llava.tiny import flags

LOG2, LOG3 = math.log(2), math.log(3)
NAMES = [*OBJECTIVES, *MIXTURES]
ON_ONE_IMAGE = [name for name in OBJECTIVES if OBJECTIVES[name].views == PAIR_VIEWS]


def vector(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def one_pair(policy: dict[View, float], tokens: dict[View, int] | None = None) -> ViewLogps:
    """Log-probs of one pair whose reference log-probs are all 0, so that r = log pi."""
    views = ordered(policy)
    values = vector(*(policy[view] for view in views))[:, None]
    counts = torch.tensor([[(tokens or {}).get(view, 1)] for view in views])
    return ViewLogps(views, values, torch.zeros_like(values), counts)


def value(words: str, logps: ViewLogps, beta: float = 0.5, **constants: float) -> float:
    return Loss.parse(words.split(), LossConfig(**constants))(logps, vector(beta)).item()


# b = 1/2 unless said: b r(w) = log 2, b r(l) = -log 2, b R = log 4, so s(b r(w)) = 2/3, s(b r(l)) = 1/3, s(b R) = 4/5.
PAIR = {CHOSEN: 2 * LOG2, REJECTED: -2 * LOG2}
# b r(w, m') = 0: b [r(w, m) - r(w, m')] = log 2.
TWO_IMAGES = PAIR | {CHOSEN_CORRUPTED: 0.0}
# b r(w2, m) = 0 and b r(w2, m') = log 3: b D1 = log 2, b D2 = log 3.
SYMMETRIC = TWO_IMAGES | {SECOND: 0.0, SECOND_CORRUPTED: 2 * LOG3}


# --- On paper --------------------------------------------------------------------------------------------------------


def test_reward_of_a_view():
    """If log pi = -3, log pi_ref = -5: r = 2. R = r(w) - r(l) = 2 - (-4 + 3) = 3. Per token, 4 and 2: 0.5 + 0.5 = 1."""
    logps = ViewLogps(PAIR_VIEWS, vector(-3, -4)[:, None], vector(-5, -3)[:, None], torch.tensor([[4], [2]]))
    assert logps.r(CHOSEN).item() == 2 and logps.pi(REJECTED).item() == -4
    assert logps.R.item() == 3 and logps.averaged().R.item() == 1
    assert torch.equal(logps.averaged().averaged().policy, logps.averaged().policy)


def test_dpo():
    """-log s(b R) = -log(4/5) = log(5/4) = 0.22314355."""
    assert value("dpo", one_pair(PAIR)) == pytest.approx(math.log(5 / 4)) == pytest.approx(0.22314355)


def test_cdpo():
    """For e = 0.1: -0.9 log(4/5) - 0.1 log(1/5) = 0.9 log(5/4) + 0.1 log 5 = 0.20082920 + 0.16094379 = 0.36177299."""
    assert value("cdpo", one_pair(PAIR), label_smoothing=0.1) == pytest.approx(0.36177299)


def test_robust():
    """For e = 0.1: [0.9 log(5/4) - 0.1 log 5] / 0.8 = (0.20082920 - 0.16094379) / 0.8 = 0.04985676."""
    assert value("robust", one_pair(PAIR), label_smoothing=0.1) == pytest.approx(0.04985676, abs=1e-8)


def test_robust_is_unbiased_under_flipped_labels():
    """If a share e of the labels is flipped, robust DPO's mean is DPO's of the true labels.

    (1 - e) rob(R) + e rob(-R) = [(1 - e)^2 - e^2] (-log s(b R)) / (1 - 2 e) = -log s(b R).
    """
    flipped = one_pair({CHOSEN: PAIR[REJECTED], REJECTED: PAIR[CHOSEN]})
    mean = 0.7 * value("robust", one_pair(PAIR), label_smoothing=0.3)
    mean += 0.3 * value("robust", flipped, label_smoothing=0.3)
    assert mean == pytest.approx(value("dpo", one_pair(PAIR)))


def test_ipo():
    """r(w) = 8 over 4 tokens, r(l) = -1 over 2: R' = 2 + 0.5 = 2.5; 1 / (2 b) = 1: (2.5 - 1)^2 = 2.25.

    A pair twice as hard to move, alpha_D = 2, has b = 1 and the target 1/2: (2.5 - 0.5)^2 = 4.
    """
    logps = one_pair({CHOSEN: 8, REJECTED: -1}, {CHOSEN: 4, REJECTED: 2})
    assert value("ipo", logps) == pytest.approx(2.25)
    assert value("ipo", logps, beta=1.0) == pytest.approx(4)


def test_hinge():
    """With b R = log 4 = 1.39 > 1: 0. With b = 1/4, b R = log 2: 1 - 0.69314718 = 0.30685282."""
    assert value("hinge", one_pair(PAIR)) == 0
    assert value("hinge", one_pair(PAIR), beta=0.25) == pytest.approx(0.30685282)


def test_apo_zero():
    """1 - s(b r(w)) + s(b r(l)) = 1 - 2/3 + 1/3 = 2/3."""
    assert value("apo_zero", one_pair(PAIR)) == pytest.approx(2 / 3)


def test_apo_down():
    """s(b r(w)) + 1 - s(b R) = 2/3 + 1 - 4/5 = 13/15."""
    assert value("apo_down", one_pair(PAIR)) == pytest.approx(13 / 15)


def test_bco_pair():
    """With d = 0: -log(2/3) - log s(log 2) = 2 log(3/2) = 0.81093022.

    d = log 2: -log s(0) - log s(-(-log 2 - log 2)) = log 2 + log(5/4) = log(5/2).
    """
    assert value("bco_pair", one_pair(PAIR)) == pytest.approx(0.81093022)
    assert value("bco_pair", one_pair(PAIR), bco_shift=LOG2) == pytest.approx(math.log(5 / 2))


def test_sft():
    """With log pi(w) = -8 over 4 tokens: 2 nats a token. The rejected answer and beta play no part."""
    logps = one_pair({CHOSEN: -8, REJECTED: -99}, {CHOSEN: 4, REJECTED: 3})
    assert value("sft", logps) == value("sft", logps, beta=7.0) == 2


def test_simpo():
    """With b = 2, g = 0.5, per token: log pi(w) = -4 / 4 = -1, log pi(l) = -1 - (log 3 + 0.5) / 2.

    b [log pi(w) - log pi(l)] - g = log 3 + 0.5 - 0.5 = log 3: -log(3/4) = log(4/3) = 0.28768207.
    """
    logps = one_pair({CHOSEN: -4, REJECTED: 2 * (-1 - (LOG3 + 0.5) / 2)}, {CHOSEN: 4, REJECTED: 2})
    assert value("simpo", logps, beta=2.0, simpo_margin=0.5) == pytest.approx(0.28768207)


def test_orpo():
    """Per token p(w) = 1/2 and p(l) = 1/4: log odds 0 and log(1/3), gap log 3, lambda = 0.1.

    -log(1/2) + 0.1 * -log(3/4) = 0.69314718 + 0.02876821 = 0.72191539.
    """
    logps = one_pair({CHOSEN: -3 * LOG2, REJECTED: -2 * 2 * LOG2}, {CHOSEN: 3, REJECTED: 2})
    assert value("orpo", logps, orpo_lambda=0.1) == pytest.approx(0.72191539)


def test_mdpo():
    """DPO log(5/4); image -log s(log 2) = log(3/2); anchor at 0 -log s(log 2) = log(3/2): log(45/16) = 1.03407377.

    With the anchor at log 2 the last term is -log s(0) = log 2: log(5/4 * 3/2 * 2) = log(15/4).
    """
    logps = one_pair(TWO_IMAGES)
    assert value("mdpo", logps) == pytest.approx(1.03407377)
    assert value("mdpo", logps, mdpo_anchor=LOG2) == pytest.approx(math.log(15 / 4))


def test_adavip():
    """exp(b r_j - b r(w)) = 1/4 for (l, m), 1/2 for (w, m'): -log s(-log(3/4)) = log(1 + 3/4) = 0.55961579."""
    assert value("adavip", one_pair(TWO_IMAGES)) == pytest.approx(0.55961579)


def test_opa():
    """log(5/4) + 0.2 log(3/2) + 1.0 log(3/2) = 0.22314355 + 0.08109302 + 0.40546511 = 0.70970168."""
    assert value("opa", one_pair(TWO_IMAGES)) == pytest.approx(0.70970168)


def test_symmpo():
    """With b D1 = log 2 and b D2 = log 3; b r(w, m) = log 2 and b r(w2, m') = log 3; lambda = 1/2.

    log(5/4) + [log(3/2) + log(4/3)] / 2 + log(3/2) + log(4/3) + 1e-4 (2 log 2 - 2 log 3)^2
    = 0.22314355 + 1.5 * 0.69314718 + 4e-4 * 0.16440195 = 1.26293008.
    """
    assert value("symmpo", one_pair(SYMMETRIC)) == pytest.approx(1.26293008)
    assert value("symmpo", one_pair(SYMMETRIC), symmpo_lambda=0.0) == pytest.approx(1.26293008 - LOG2 / 2)


def test_mpo():
    """0.8 log(5/4) + 0.2 * 2 log(3/2) + 1.0 * log 2, the chosen answer at log pi = -2 log 2 over 2 tokens.

    With pi_ref(w) = -4 log 2 the rewards are those of PAIR: 0.17851484 + 0.16218604 + 0.69314718 = 1.03384807.
    """
    policy, reference = vector(-2 * LOG2, -2 * LOG2)[:, None], vector(-4 * LOG2, 0)[:, None]
    assert value("mpo", ViewLogps(PAIR_VIEWS, policy, reference, torch.tensor([[2], [1]]))) == pytest.approx(1.03384807)


def test_weighted_sum():
    """RPO as `dpo sft:0.5`: log(5/4) + 0.5 * (-2 log 2) on PAIR, whose chosen answer has log pi = 2 log 2."""
    assert value("dpo sft:0.5", one_pair(PAIR)) == pytest.approx(math.log(5 / 4) - LOG2)
    assert value("dpo:3", one_pair(PAIR)) == pytest.approx(3 * math.log(5 / 4))


def test_log_odds():
    """For p = 1/2, 1/4, 3/4: odds 1, 1/3, 3. Near p = 1, log p = -1e-12: p / (1 - p) = 1e12, where 1 - e^x cancels."""
    log_p = vector(*(math.log(p) for p in (0.5, 0.25, 0.75)), -1e-12)
    assert log_odds(log_p).tolist() == pytest.approx([0, -LOG3, LOG3, 12 * math.log(10)])


# --- Limits ----------------------------------------------------------------------------------------------------------

# Losses where policy and reference are equal (all r = 0), b = 1/2.
AT_EQUAL_POLICIES = {
    "dpo": LOG2, "cdpo": LOG2, "robust": LOG2, "ipo": 1.0, "hinge": 1.0, "apo_zero": 1.0, "apo_down": 1.0,
    "bco_pair": 2 * LOG2, "mdpo": 3 * LOG2, "adavip": LOG3, "opa": 2.2 * LOG2, "symmpo": 4 * LOG2,
}  # fmt: skip


def random_logps(names: str, pairs: int = 3, seed: int = 0) -> ViewLogps:
    """[V, pairs] log-probs of -1 to -12 nats over 2 to 6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    views = Loss.parse(names.split()).views
    policy, reference = (-1 - 11 * torch.rand(len(views), pairs, generator=generator).double() for _ in range(2))
    return ViewLogps(views, policy, reference, torch.randint(2, 7, policy.shape, generator=generator))


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if OBJECTIVES[name].needs_reference])
def test_equal_policies(name):
    logps = random_logps(name)
    equal = replace(logps, reference=logps.policy)
    losses = Loss.parse([name])(equal, vector(0.5, 0.5, 0.5))
    assert losses.tolist() == pytest.approx([AT_EQUAL_POLICIES[name]] * 3)


@pytest.mark.parametrize("name", [name for name in AT_EQUAL_POLICIES if name not in ("ipo", "symmpo")])
def test_beta_to_0(name):
    """The loss of equal policies, whatever they are, and a gradient that vanishes with beta.

    ipo's target grows without bound, and symmpo's last term has no beta: those two have tests of their own.
    """
    logps = random_logps(name)
    policy = logps.policy.clone().requires_grad_()
    losses = Loss.parse([name])(replace(logps, policy=policy), vector(1e-9, 1e-9, 1e-9))
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([AT_EQUAL_POLICIES[name]] * 3)
    assert 0 < policy.grad.abs().max() < 5e-9


def test_beta_to_0_of_ipo():
    """(R' - 1 / (2 b))^2 times 4 b^2 goes to 1."""
    losses = Loss.parse(["ipo"])(random_logps("ipo"), vector(1e-9, 1e-9, 1e-9))
    assert (4e-18 * losses).tolist() == pytest.approx([1.0] * 3)


def test_beta_to_0_of_symmpo():
    """4 log 2 + 1e-4 (D1 - D2)^2; on SYMMETRIC D1 - D2 = 2 log 2 - 2 log 3."""
    assert value("symmpo", one_pair(SYMMETRIC), beta=1e-12) == pytest.approx(4 * LOG2 + 4e-4 * (LOG2 - LOG3) ** 2)


def test_beta_to_0_of_simpo():
    """-log s(-g) = log(1 + e^g)."""
    assert value("simpo", random_logps("simpo", pairs=1), beta=1e-12) == pytest.approx(math.log(1 + math.exp(0.5)))


@pytest.mark.parametrize("name", NAMES)
def test_answers_without_tokens(name):
    """Nothing to sum: log-probs of 0 over 0 tokens give a finite loss, the one of equal policies, and gradient."""
    logps = random_logps(name, pairs=1)
    policy = torch.zeros_like(logps.policy, requires_grad=True)
    empty = ViewLogps(logps.views, policy, torch.zeros_like(policy), torch.zeros_like(logps.tokens))
    loss = Loss.parse([name])(empty, vector(0.5))
    loss.sum().backward()
    expected = AT_EQUAL_POLICIES | {
        "sft": 0.0, "simpo": math.log(1 + math.exp(0.5)), "orpo": 0.1 * LOG2, "mpo": 0.8 * LOG2 + 0.2 * 2 * LOG2,
    }  # fmt: skip
    assert loss.item() == pytest.approx(expected[name], abs=1e-12)
    assert torch.isfinite(policy.grad).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("certain", [CHOSEN, REJECTED])
def test_orpo_of_an_answer_that_is_certain(certain, dtype):
    """A log-prob that rounds to 0, as of a short answer learnt by heart: 1 - p is the rounding unit, not 0."""
    policy = torch.tensor([[0.0 if view == certain else -2.0] for view in PAIR_VIEWS], dtype=dtype, requires_grad=True)
    logps = ViewLogps(PAIR_VIEWS, policy, torch.zeros_like(policy), torch.ones(2, 1))
    loss = Loss.parse(["orpo"])(logps, torch.ones(1, dtype=dtype)).sum()
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(policy.grad).all()


@pytest.mark.parametrize("scale", [1e-6, 1e4])
@pytest.mark.parametrize("name", NAMES)
def test_extreme_log_probs_stay_finite(name, scale):
    """From probabilities near 1 to answers of 10,000 nats, in float32."""
    logps = random_logps(name)
    policy = (logps.policy * scale).float().requires_grad_()
    far = ViewLogps(logps.views, policy, (logps.reference * scale).float(), logps.tokens)
    losses = Loss.parse([name])(far, torch.full((3,), 0.5))
    losses.sum().backward()
    assert torch.isfinite(losses).all() and torch.isfinite(policy.grad).all()


# --- Gradients, and what the table claims ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_gradient_by_finite_differences(name):
    logps, loss = random_logps(name), Loss.parse([name], LossConfig(bco_shift=0.3))
    beta = vector(0.1, 0.3, 0.5)
    inputs = (logps.policy.clone().requires_grad_(), logps.reference.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda p, r: loss(ViewLogps(logps.views, p, r, logps.tokens), beta), inputs)


def test_gradient_of_dpo():
    """d/dR -log s(b R) = -b s(-b R): at b R = log 4 and b = 1/2 it is -1/2 * 1/5 = -0.1 for w, 0.1 for l."""
    logps = one_pair(PAIR)
    policy = logps.policy.clone().requires_grad_()
    Loss.parse(["dpo"])(replace(logps, policy=policy), vector(0.5)).sum().backward()
    assert policy.grad.flatten().tolist() == pytest.approx([-0.1, 0.1])


def moved_by(name: str) -> dict[str, bool | set[View]]:
    """What the values of an objective change with, found by differentiation at random log-probs of all six views."""
    generator = torch.Generator().manual_seed(1)
    policy, reference = (-torch.rand(6, 4, generator=generator).double() for _ in range(2))
    policy.requires_grad_()
    reference.requires_grad_()
    beta = torch.full((4,), 0.3, dtype=torch.float64, requires_grad=True)
    tokens = torch.ones(6, 4)
    loss = OBJECTIVES[name].function(ViewLogps(ALL_VIEWS, policy, reference, tokens), beta, LossConfig()).sum()
    of_policy, of_reference, of_beta = torch.autograd.grad(loss, (policy, reference, beta), allow_unused=True)
    views = {view for view, row in zip(ALL_VIEWS, of_policy) if row.abs().max() > 0}
    return {"views": views, "reference": of_reference is not None, "beta": of_beta is not None}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_table_says_what_an_objective_takes(name):
    """Views, reference and beta as declared, neither more nor fewer; sft leaves the rejected answer out."""
    objective, moved = OBJECTIVES[name], moved_by(name)
    declared = {CHOSEN} if name == "sft" else set(objective.views)
    assert moved == {"views": declared, "reference": objective.needs_reference, "beta": objective.has_beta}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_state_is_the_shift_alone(name):
    """Only an objective with state changes with the running mean."""
    logps, beta = random_logps(name), vector(0.1, 0.3, 0.5)
    one, other = (Loss.parse([name]).shifted(d)(logps, beta) for d in (0.0, 0.7))
    assert torch.equal(one, other) is not OBJECTIVES[name].has_state


@pytest.mark.parametrize("name", NAMES)
def test_pairs_are_independent(name):
    """Each pair with its own beta: a batch gives what its pairs give alone."""
    logps, beta, loss = random_logps(name), vector(0.1, 0.3, 0.5), Loss.parse([name])
    alone = [
        loss(ViewLogps(logps.views, *(t[:, i : i + 1] for t in (logps.policy, logps.reference, logps.tokens))), b[None])
        for i, b in enumerate(beta)
    ]
    torch.testing.assert_close(loss(logps, beta), torch.cat(alone), rtol=1e-12, atol=0)


def test_dpo_is_alone_what_it_is_in_a_sum():
    """A single term is not rounded by the sum."""
    logps, beta = random_logps("dpo"), vector(0.1, 0.3, 0.5)
    assert torch.equal(Loss()(logps, beta), OBJECTIVES["dpo"].function(logps, beta, LossConfig()))


# --- --loss ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "terms", "name"),
    [
        ("dpo", [("dpo", 1)], "dpo"),
        ("dpo:1", [("dpo", 1)], "dpo"),
        ("dpo:0.8 sft:1.0", [("dpo", 0.8), ("sft", 1)], "dpo:0.8 sft:1"),
        ("mpo", [("dpo", 0.8), ("bco_pair", 0.2), ("sft", 1)], "dpo:0.8 bco_pair:0.2 sft:1"),
        ("mpo:0.5", [("dpo", 0.4), ("bco_pair", 0.1), ("sft", 0.5)], "dpo:0.4 bco_pair:0.1 sft:0.5"),
        ("hinge:-1e-3", [("hinge", -0.001)], "hinge:-0.001"),
    ],
)
def test_parser(words, terms, name):
    loss = Loss.parse(words.split())
    assert [(term, pytest.approx(weight)) for term, weight in loss.terms] == terms
    assert loss.name == name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("dop", "--loss dop: expected one of dpo, .*, symmpo, mpo, or several"),
        ("", "expected each objective once, got none"),
        ("dpo dpo:2", r"expected each objective once, got \['dpo', 'dpo'\]"),
        ("mpo sft", "expected each objective once"),
        *[(f"dpo:{text}", f"--loss dpo:{text}: expected NAME or NAME:WEIGHT") for text in ("", "x", "0", "nan", "1:2")],
        ("sft dpo:inf", "--loss dpo:inf: expected NAME or NAME:WEIGHT with a finite weight other than 0"),
    ],
)
def test_parser_refuses(words, message):
    with pytest.raises(ValueError, match=message):
        Loss.parse(words.split())


def test_a_sum_needs_what_its_terms_need():
    image = Loss.parse(["sft", "mdpo"])
    assert image.views == (CHOSEN, REJECTED, CHOSEN_CORRUPTED)
    assert (image.needs_reference, image.has_beta, image.has_state) == (True, True, False)
    free = Loss.parse(["sft", "orpo:0.5"])
    assert (free.needs_reference, free.has_beta, free.has_state) == (False, False, False)
    assert Loss.parse(["simpo"]).has_beta and not Loss.parse(["simpo"]).needs_reference
    assert Loss.parse(["mpo"]).has_state
    assert Loss.parse(["symmpo"]).views == (CHOSEN, REJECTED, SECOND, CHOSEN_CORRUPTED, SECOND_CORRUPTED)


def test_shift_leaves_the_other_constants():
    loss = Loss.parse(["bco_pair"], LossConfig(simpo_margin=3)).shifted(0.25)
    assert (loss.config.bco_shift, loss.config.simpo_margin) == (0.25, 3)


# --- The running mean ------------------------------------------------------------------------------------------------


def rewards(chosen: list[float], rejected: list[float]) -> ViewLogps:
    policy = torch.tensor([chosen, rejected], dtype=torch.float64)
    return ViewLogps(PAIR_VIEWS, policy, torch.zeros_like(policy), torch.ones_like(policy))


def test_running_mean_counts_answers():
    """Step 1, b = (1, 0.5): b r(w) = (1, 0.5 * 6) = (1, 3), b r(l) = (0, 0.5 * 8) = (0, 4): mean 8 / 4 = 2.

    Step 2, one pair, b = 2: (2 * 4, 2 * -2) = (8, -4): (8 + 8 - 4) / 6 = 2.
    Step 3, one pair, b = 1: (9, 9): (12 + 18) / 8 = 3.75, where the mean of the steps' means would be (2 + 2 + 9) / 3.
    """
    first = RunningMean().updated(rewards([1, 6], [0, 8]), vector(1, 0.5))
    second = first.updated(rewards([4], [-2]), vector(2))
    third = second.updated(rewards([9], [9]), vector(1))
    assert [(state.mean, state.count) for state in (first, second, third)] == [(2, 4), (2, 6), (3.75, 8)]


def test_running_mean_is_of_all_pairs_however_they_are_spread():
    chosen, rejected = [1.0, -2.0, 0.5, 7.0], [0.25, 3.0, -1.0, 2.0]
    at_once = RunningMean().updated(rewards(chosen, rejected), vector(*[0.1] * 4))
    parts = RunningMean().updated(rewards(chosen[:1], rejected[:1]), vector(0.1))
    parts = parts.updated(rewards(chosen[1:], rejected[1:]), vector(*[0.1] * 3))
    assert at_once.mean == pytest.approx(0.1 * 10.75 / 8) and parts.mean == pytest.approx(at_once.mean)
    assert at_once.count == parts.count == 8


def test_running_mean_has_no_gradient_and_survives_json():
    logps = rewards([1.25], [0.5])
    state = RunningMean(0.1, 3).updated(replace(logps, policy=logps.policy.requires_grad_()), vector(0.3))
    assert isinstance(state.mean, float) and RunningMean(**json.loads(json.dumps(state.as_dict()))) == state


# --- TRL -------------------------------------------------------------------------------------------------------------

TOLERANCE = 1e-6  # of losses of about 1, on the same float32 log-probs
BETAS = torch.tensor([0.1, 0.3, 0.5])
# Three pairs; the last two have answers of equal length, over which TRL's sft averages as ours does.
ROWS = [
    {"prompt": "a b c", "chosen": " d e f g", "rejected": " h a"},
    {"prompt": "c", "chosen": " b a h", "rejected": " f g e d"},
    {"prompt": "e f", "chosen": " g g d", "rejected": " a b c c"},
]


@pytest.fixture(scope="module")
def tokenizer():
    words = {word: i for i, word in enumerate(["<s>", "</s>", "<pad>", *"abcdefgh"])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def tiny_llama(seed: int) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        initializer_range=0.5, pad_token_id=2, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def trl_dpo(tokenizer, tmp_path_factory):
    """TRL's trainer of a policy and another reference, and a batch of its collator."""
    args = DPOConfig(
        output_dir=str(tmp_path_factory.mktemp("trl")), use_cpu=True, bf16=False, report_to="none",
        gradient_checkpointing=False,
    )  # fmt: skip
    rows = Dataset.from_list(ROWS)
    trainer = DPOTrainer(tiny_llama(1), tiny_llama(2), args=args, train_dataset=rows, processing_class=tokenizer)
    return trainer, trainer.data_collator(list(trainer.train_dataset))


def at(batch: dict, pairs: list[int]) -> dict:
    """A batch of TRL's with some of its pairs: chosen answers are its first half, rejected its second."""
    rows = [*pairs, *(len(ROWS) + i for i in pairs)]
    return {name: column[rows] for name, column in batch.items()}


@torch.no_grad()
def logps_of(trainer: Any, batch: dict) -> ViewLogps:
    """The log-probs of TRL's own forward pass, from which its loss is made."""
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    sums = [
        model(**inputs, labels=labels, fused_lm_head=True).log_probs.sum(1).view(2, -1)
        for model in (trainer.model, trainer.ref_model)
    ]
    policy, reference = sums
    return ViewLogps(PAIR_VIEWS, policy, reference, batch["completion_mask"].sum(1).view(2, -1))


@pytest.mark.parametrize(
    ("words", "theirs", "weights", "smoothing", "pairs"),
    [
        ("dpo", "sigmoid", None, 0.0, [0, 1, 2]),
        ("cdpo", "aot_unpaired", None, 0.2, [0]),  # without label smoothing in `sigmoid`; alone, a pair is not sorted
        ("robust", "robust", None, 0.2, [0, 1, 2]),
        ("ipo", "ipo", None, 0.0, [0, 1, 2]),
        ("hinge", "hinge", None, 0.0, [0, 1, 2]),
        ("apo_zero", "apo_zero", None, 0.0, [0, 1, 2]),
        ("apo_down", "apo_down", None, 0.0, [0, 1, 2]),
        ("bco_pair", "bco_pair", None, 0.0, [0, 1, 2]),
        ("sft", "sft", None, 0.0, [1, 2]),
        ("mpo", "sigmoid bco_pair sft", [0.8, 0.2, 1.0], 0.0, [1, 2]),
    ],
)
def test_trl_has_the_same_values(trl_dpo, words, theirs, weights, smoothing, pairs):
    """A beta for each pair, which TRL's code takes as well."""
    trainer, batch = trl_dpo[0], at(trl_dpo[1], pairs)
    trainer.loss_types, trainer.label_smoothing, trainer.beta = theirs.split(), smoothing, BETAS[pairs]
    trainer.loss_weights = weights or [1.0]
    expected = trainer._compute_loss(trainer.model, batch, return_outputs=False).item()
    logps = logps_of(trainer, batch)
    assert logps.R.abs().min() > 0.1  # a comparison at R = 0 could not fail
    loss = Loss.parse(words.split(), LossConfig(label_smoothing=smoothing))
    assert loss(logps, BETAS[pairs]).mean().item() == pytest.approx(expected, rel=TOLERANCE, abs=TOLERANCE)


def experimental(trainer, config, tokenizer, folder, **options):
    args = config(
        output_dir=str(folder), use_cpu=True, bf16=False, report_to="none", gradient_checkpointing=False, **options
    )
    return trainer(tiny_llama(1), args=args, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer)


def test_simpo_is_trls(tokenizer, tmp_path):
    trainer = experimental(
        CPOTrainer, CPOConfig, tokenizer, tmp_path, loss_type="simpo", cpo_alpha=0.0, simpo_gamma=0.7, beta=2.0
    )
    logps = random_logps("simpo")
    mean = logps.averaged()
    theirs = trainer.cpo_loss(mean.pi(CHOSEN), mean.pi(REJECTED))[0]
    ours = Loss.parse(["simpo"], LossConfig(simpo_margin=0.7))(logps, vector(2, 2, 2))
    torch.testing.assert_close(ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


def test_orpos_odds_are_trls(tokenizer, tmp_path):
    """TRL adds -beta log s(log odds ratio) to a likelihood that averages over the batch's tokens."""
    trainer = experimental(ORPOTrainer, ORPOConfig, tokenizer, tmp_path, beta=0.4)
    logps = random_logps("orpo")
    mean = logps.averaged()
    theirs = mean.pi(CHOSEN) + trainer.odds_ratio_loss(mean.pi(CHOSEN), mean.pi(REJECTED))[0]
    ours = Loss.parse(["orpo"], LossConfig(orpo_lambda=0.4))(logps, vector(1, 1, 1))
    torch.testing.assert_close(-ours, theirs, rtol=TOLERANCE, atol=TOLERANCE)


# --- docs/objectives.md ----------------------------------------------------------------------------------------------


def table_of_objectives() -> tuple[list[str], dict[str, list[str]]]:
    """(column titles, cells by objective) of the first table whose first column is `name`."""
    lines = (ROOT / "docs" / "objectives.md").read_text().splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines if line.startswith("|")]
    start = next(i for i, row in enumerate(rows) if row[0] == "name")
    table: dict[str, list[str]] = {}
    for row in rows[start + 2 :]:
        if len(row) != len(rows[start]):
            break
        table[row[0].strip("`")] = row
    return rows[start], table


def test_every_objective_has_its_row():
    titles, table = table_of_objectives()
    assert list(table) == NAMES
    assert all(all(row) for row in table.values()), "no cell is empty"
    for name, objective in OBJECTIVES.items():
        row = dict(zip(titles, table[name]))
        assert (row["beta"], row["reference"]) == tuple(
            "yes" if needs else "no" for needs in (objective.has_beta, objective.needs_reference)
        )
        wanted = [view.name for view in objective.views[len(PAIR_VIEWS) :]]
        assert all(view in row["views"] for view in wanted) and ("pair" in row["views"])


def paper_index() -> list[str]:
    """The commands of the paper index, each one cell in backquotes."""
    index = (ROOT / "docs" / "objectives.md").read_text().split("## Paper index")[1].split("## ")[0]
    return [row.split(" | ")[1].strip("`") for row in index.splitlines() if row.startswith("| ")][1:]


@pytest.mark.parametrize("command", paper_index())
def test_commands_of_the_paper_index_parse(command, in_golden, tmp_path):
    """Their flags are training's own, and the loss is one of the table's."""
    script, *words = shlex.split(command)
    assert script in ("7b", "train")
    args = parse_arguments(flags(tmp_path, "--variant", "paper", *words))[2]
    assert args.preference_loss().views == ordered(view for o in args.preference_loss().objectives for view in o.views)
    assert ("--corruption" in words) == any(view.corrupted for view in args.preference_loss().views)
    plain = args.preference_loss().views == PAIR_VIEWS and args.token_weighting() is None
    assert script == "train" or plain, "dama_7b.sh makes a reference of two views, without single tokens"


@pytest.mark.parametrize("views", [("pair", 866, 1502), ("visual", 1732, 3004)])
def test_token_weights_have_their_rows(views):
    """The table of token weights names what parses, with the counts that scripts/bench/objectives.py computes."""
    text = (ROOT / "docs" / "objectives.md").read_text().split("## Token weights")[1].split("## ")[0]
    rows = [row.split(" | ") for row in text.splitlines() if row.startswith("| `")]
    assert [row.pop(0) for row in rows[1:]] == ["| `none`", "| `segments:G`", "| `visual`"]
    name, packed, apart = views
    row = rows[3 if name == "visual" else 2]
    assert row[3:5] == [f"{packed:,}", f"{apart:,}"]


def test_every_objective_is_in_the_paper_index():
    """apo_down has apo_zero's paper, sft comes as a term."""
    named = {word for command in paper_index() for word in command.replace(":", " ").split()}
    assert set(NAMES) - named == {"apo_down"}
