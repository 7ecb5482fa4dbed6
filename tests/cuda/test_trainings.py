"""Trainings on the null device give the CPU's losses; what happens on the way is CUDA's and DeepSpeed's own code."""

import pytest

from tests.cuda.conftest import results_of
from tests.cuda.trainings import WAYS, steps_of, without_deepspeed

pytestmark = pytest.mark.gpu

# Both compute in fp32, where CUDA's dispatch differs in attention (math instead of the CPU's fused kernel) and in the
# order of sums. Measured over all ways: 6e-7 of a loss and 6e-6 of a gradient norm, after a step as before it.
TOLERANCES = {"loss": 5e-6, "grad_norm": 5e-5}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    return results_of("trainings", tmp_path_factory.mktemp("trainings"))


@pytest.fixture(scope="module")
def on_the_cpu():
    """Steps of each distinct training; DeepSpeed's are those of the same training without it."""
    done = {}

    def steps(way):
        words = tuple(without_deepspeed(WAYS[way]))
        if words not in done:
            done[words] = steps_of([*words, "--use_cpu", "True"])
        return done[words]

    return steps


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_the_cpus(rehearsed, on_the_cpu, way):
    got, expected = rehearsed[way]["steps"], on_the_cpu(way)
    assert len(got) == len(expected) >= 2
    for name, tolerance in TOLERANCES.items():
        assert [step[name] for step in got] == pytest.approx([step[name] for step in expected], rel=tolerance)
    assert rehearsed[way]["gemms"] > 100
