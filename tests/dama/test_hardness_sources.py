"""Hardness from CLIP, from the reference model, or both."""

import pytest
import torch

from dama.hardness.sources import HardnessSource, by_rank, delta_from, generative_gap

pytestmark = pytest.mark.fast


def test_generative_gap_on_paper():
    """-6 nats over 3 tokens less -10 over 4: -2 + 2.5 = 0.5; -8 over 2 less -2 over 1: -4 + 2 = -2."""
    logps, tokens = torch.tensor([[-6.0, -10.0], [-8.0, -2.0]]), torch.tensor([[3, 4], [2, 1]])
    assert generative_gap(logps, tokens).tolist() == [0.5, -2.0]


def test_ranks_on_paper():
    """Gaps 5, -1, 3 are ranks 2, 0, 1; of the deltas 0.1, 0.3, 0.2 these are 0.3, 0.1, 0.2."""
    gap, delta = torch.tensor([5.0, -1.0, 3.0]), torch.tensor([0.1, 0.3, 0.2])
    assert by_rank(gap, delta).tolist() == pytest.approx([0.3, 0.1, 0.2])
    assert delta_from(HardnessSource.VOTE, delta, gap).tolist() == pytest.approx([0.2, 0.2, 0.2])
    assert delta_from(HardnessSource.CLIP, delta, gap) is delta
    assert delta_from(HardnessSource.GENERATIVE, delta, gap) is gap


def test_a_vote_of_agreeing_sources_is_delta():
    """Any increasing function of delta has its ranks, so the vote is delta itself."""
    delta = torch.randn(50, dtype=torch.float64)
    torch.testing.assert_close(delta_from(HardnessSource.VOTE, delta, 7 * delta.exp()), delta)
