"""alpha_D, alpha_M, selection and R_bar: on paper, in the limit, and against the released code's recorded numbers."""

import json
import math

import pytest
import torch

from dama.losses import preference_loss, reward_gap
from dama.weighting import (
    Selection,
    Strategy,
    Variant,
    WeightingConfig,
    WeightingState,
    gumbel_noise,
    log_weights,
    select,
    weigh,
)
from tests.conftest import GOLDEN

pytestmark = pytest.mark.fast

CASES = json.loads((GOLDEN / "f_dpo_functions.json").read_text())
RELEASED_DELTA_BAR = CASES["dpo_loss"]["constant_vlm_mean"]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def tensors(values: dict) -> dict[str, torch.Tensor]:
    return {name: torch.tensor([float(v) for v in value]) for name, value in values.items()}


def test_two_pairs_on_paper():
    """R = (1, 3), all kept: R_B = 2. R_bar = 0: alpha_M = sigma(2)/0.5. delta = (0, 0) = delta_bar: alpha_D = 1.

    beta_C = 0.1 * 2 sigma(2) = 0.17615942 for both; R_bar <- 0.9*0 + 0.1*2 = 0.2.
    """
    config = WeightingConfig(selection=Selection.OFF)
    weights, state = weigh(config, WeightingState(), torch.tensor([1.0, 3.0]), torch.zeros(2), 0.0)
    assert weights.beta.tolist() == pytest.approx([0.17615941559557646] * 2, rel=1e-12)
    assert state.R_bar == pytest.approx(0.2) and state.step == 1


def test_hard_pair_gets_a_smaller_beta():
    """With delta = (-1, 1), delta_bar = 0: alpha_D = sigma(-1)/0.5 = 0.53788 and sigma(1)/0.5 = 1.46212."""
    weights, _ = weigh(
        WeightingConfig(strategy=Strategy.DATA), WeightingState(), torch.zeros(2), torch.tensor([-1.0, 1.0])
    )
    assert weights.alpha_D.tolist() == pytest.approx([0.5378828427399902, 1.4621171572600098])
    assert weights.alpha_M == 1.0 and weights.selected.all()


def test_plain_dpo_is_untouched():
    weights, _ = weigh(WeightingConfig(strategy=Strategy.NONE), WeightingState(R_bar=5.0), torch.tensor([9.0, -9.0]))
    assert weights.beta.tolist() == [0.1, 0.1] and weights.selected.all()


def test_beta_is_clamped_from_below_and_counted():
    """sigma(-800) underflows to 0: beta_C = 0 is lifted to 1e-3 for both pairs."""
    weights, _ = weigh(WeightingConfig(strategy=Strategy.MODEL), WeightingState(), torch.tensor([-800.0, -800.0]))
    assert weights.beta.tolist() == [1e-3, 1e-3] and weights.clamped == 1.0


@pytest.mark.parametrize(("n", "k"), [(16, 12), (4, 3), (1, 1), (5, 4), (2, 2)])
def test_number_kept(n, k):
    config = WeightingConfig(strategy=Strategy.MODEL)
    assert len(set(select(config, WeightingState(), torch.randn(n))[0].tolist())) == k


def test_gumbel_top_k_has_the_distribution_of_sequential_draws():
    """N = 3, K = 2, weights w = (1, 1/2, 1/4): P(3rd left out) = 1/1.75 * (.5/.75) + .5/1.75 * (1/1.25) = 0.609524."""
    R = torch.tensor([0.0, math.sqrt(2 * math.log(2)), math.sqrt(2 * math.log(4))], dtype=torch.float64)
    config = WeightingConfig(strategy=Strategy.MODEL, keep=2 / 3)
    left_out = [3 - int(select(config, WeightingState(step=s), R)[0].sum()) for s in range(20_000)]
    assert left_out.count(2) / 20_000 == pytest.approx(0.609524, abs=0.012)


def test_draw_survives_weights_that_vanish():
    """All weights are exp(-5e5) = 0 in float64; the three nearest to R_bar are drawn all the same."""
    R = torch.tensor([1000.0, 1001.0, 1002.0, 2000.0])
    index, _ = select(WeightingConfig(strategy=Strategy.MODEL), WeightingState(), R)
    assert set(index.tolist()) == {0, 1, 2}


def test_noise_depends_on_seed_step_and_position_only():
    assert torch.equal(gumbel_noise(16, 1, 7)[:4], gumbel_noise(4, 1, 7))
    assert not torch.equal(gumbel_noise(4, 1, 7), gumbel_noise(4, 1, 8))
    assert not torch.equal(gumbel_noise(4, 1, 7), gumbel_noise(4, 2, 7))


def test_nearest_keeps_the_smallest_distances():
    config = WeightingConfig(strategy=Strategy.MODEL, selection=Selection.NEAREST)
    index, _ = select(config, WeightingState(R_bar=1.0), torch.tensor([1.1, -5.0, 0.8, 1.5]))
    assert index.tolist() == [0, 2, 3]


def test_beta_dpo_on_paper():
    """R = (0, 2) from R_bar = 0, s = 0: R_bar <- 0.1*1 = 0.1, s <- 0.1*sqrt(2); all kept: R_B = 1.

    beta = 0.1 * (1 + 0.6 * (1 - 0.1)) = 0.154.
    """
    config = WeightingConfig(strategy=Strategy.BETA_DPO, selection=Selection.OFF)
    weights, state = weigh(config, WeightingState(), torch.tensor([0.0, 2.0]))
    assert weights.beta.tolist() == pytest.approx([0.154, 0.154])
    assert (state.R_bar, state.R_std) == pytest.approx((0.1, 0.1 * math.sqrt(2)))


def test_log_weights_on_paper():
    """R = 3, R_bar = 1: -0.5 * 2^2 = -2."""
    assert log_weights(torch.tensor([3.0]), 1.0).tolist() == [-2.0]


@pytest.mark.parametrize("case", CASES["dpo_loss"]["cases"], ids=lambda case: case["name"])
def test_released_variant_reproduces_the_released_code(case):
    inputs = tensors(case["inputs"])
    policy = [inputs["policy_chosen"].requires_grad_(), inputs["policy_rejected"].requires_grad_()]
    R = reward_gap(*policy, inputs["ref_chosen"], inputs["ref_rejected"])
    # There, `reference_free` leaves the reference out of the loss but not out of the weights.
    R_in_loss = policy[0] - policy[1] if case["kw"].get("reference_free") else R
    delta = inputs["vlm_chosen"] - inputs["vlm_rejected"]
    config = WeightingConfig(variant=Variant.RELEASED, beta=case["beta"])
    state = WeightingState(R_bar=float(case["gap_mean_in"][0]))
    if "error" in case and case["name"] == "nan_gap":
        with pytest.raises(ValueError, match="reward gaps R: expected finite numbers, got nan"):
            weigh(config, state, R, delta, RELEASED_DELTA_BAR)
        return
    if "error" in case:  # a batch of one crashes the released code; here its one pair is kept
        assert weigh(config, state, R, delta, RELEASED_DELTA_BAR)[0].selected.tolist() == [True]
        return
    drawn = case["draws"][0]["index"]
    weights, _ = weigh(config, state, R, delta, RELEASED_DELTA_BAR, drawn=drawn)
    expected = tensors({k: v for k, v in case["outputs"].items() if isinstance(v, list)})
    losses = preference_loss(R_in_loss, weights.beta.float())
    torch.testing.assert_close(losses, expected["losses"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weights.beta.float(), expected["beta_used"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(weights.selected.float(), expected["global_mask"])
    torch.testing.assert_close(weights.alpha_D.float(), expected["this_logits"], atol=1e-6, rtol=1e-5)
    loss = losses[weights.selected].mean()
    assert loss.item() == pytest.approx(case["masked_loss"], abs=1e-6, rel=1e-5)
    loss.backward()
    torch.testing.assert_close(policy[0].grad, torch.tensor(case["grad_policy_chosen"]), atol=1e-6, rtol=1e-4)


def test_released_weights_are_those_recorded():
    for case in CASES["dpo_loss"]["cases"]:
        for draw in case.get("draws", []):
            if draw.get("kind") != "torch.multinomial" or "error" in case:
                continue
            inputs = tensors(case["inputs"])
            R = reward_gap(*(inputs[k] for k in ("policy_chosen", "policy_rejected", "ref_chosen", "ref_rejected")))
            weights = log_weights(R, float(case["gap_mean_in"][0])).exp()
            torch.testing.assert_close(weights, torch.tensor([float(w) for w in draw["weights"]]), atol=1e-6, rtol=1e-4)


def test_released_running_mean():
    state, config = WeightingState(), WeightingConfig(variant=Variant.RELEASED, strategy=Strategy.MODEL)
    for step in CASES["update_and_sync_tensor_mean"]["steps"]:
        _, state = weigh(config, state, torch.tensor(step["gap_local"]))
        assert state.R_bar == pytest.approx(step["gap_mean"][0], abs=1e-6)


def test_released_draw_with_vanished_weights_may_count_fewer():
    config = WeightingConfig(variant=Variant.RELEASED, strategy=Strategy.MODEL)
    counts = {len(set(select(config, WeightingState(step=s), torch.full((10,), 1e3))[0].tolist())) for s in range(50)}
    assert min(counts) < 8 <= config.count_kept(10)


def test_all_faults_of_the_configuration_at_once():
    with pytest.raises(ValueError, match=r"beta: expected a number above 0, got -1.*gamma: .* got 2"):
        WeightingConfig(beta=-1, gamma=2)


def test_missing_hardness_is_named():
    with pytest.raises(ValueError, match="strategy 'both': expected the hardness delta of every pair"):
        weigh(WeightingConfig(), WeightingState(), torch.zeros(4))


def test_state_survives_json():
    state = WeightingState(step=3, R_bar=0.1 + 0.2)
    assert WeightingState(**json.loads(json.dumps(state.as_dict()))) == state
