"""The stages before training and generation: the second device answers as the first, and both as the CPU."""

import pytest

from tests.cuda.conftest import results_of
from tests.cuda.stages import STAGES, results_on

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    return results_of("stages", tmp_path_factory.mktemp("stages"), devices=2)


@pytest.fixture(scope="module")
def on_the_cpu():
    return results_on("cpu")


@pytest.mark.parametrize("stage", STAGES)
def test_the_second_device_gives_the_firsts_results(rehearsed, stage):
    assert rehearsed["cuda:0"][stage] == rehearsed["cuda:1"][stage]
    assert len(rehearsed["cuda:0"][stage]) >= 4


def test_log_probs_are_the_cpus(rehearsed, on_the_cpu):
    for pair, logps in on_the_cpu["reference"].items():
        assert rehearsed["cuda:1"]["reference"][pair] == pytest.approx(logps, abs=1e-4)


def test_hardness_is_the_cpus(rehearsed, on_the_cpu):
    assert rehearsed["cuda:1"]["hardness"] == pytest.approx(on_the_cpu["hardness"], abs=1e-6)


def test_answers_are_words(rehearsed):
    assert all(text.strip() for text in rehearsed["cuda:0"]["generation"])
