"""The preference loss of a pair, with a beta of its own (DAMA, arXiv 2502.01943, Eq. 1, 2 and 16)."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def reward_gap(policy_chosen: Tensor, policy_rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
    """R_i = [log pi(y_w) - log pi_ref(y_w)] - [log pi(y_l) - log pi_ref(y_l)], without beta (Eq. 1).

    Args:
        four [N] vectors of summed log-probs of the answers.

    Returns:
        [N] reward gaps.
    """
    _expect_vectors(policy_chosen, policy_rejected, ref_chosen, ref_rejected)
    return (policy_chosen - ref_chosen) - (policy_rejected - ref_rejected)


def preference_loss(R: Tensor, beta: Tensor | float) -> Tensor:
    """loss_i = -log sigma(beta_i R_i) (Eq. 2; with beta_i = beta_C,i Eq. 16).

    Args:
        R: [N] reward gaps. beta: [N], or one number for all pairs.

    Returns:
        [N] losses.
    """
    _expect_vectors(R)
    return -logsigmoid(beta * R)


def _expect_vectors(*tensors: Tensor) -> None:
    shapes = [tuple(t.shape) for t in tensors]
    if any(len(shape) != 1 or shape != shapes[0] for shape in shapes):
        raise ValueError(f"pairs: expected vectors of one length [N], got shapes {shapes}")
