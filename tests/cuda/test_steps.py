"""The scripts' hardware lines, held by DeepSpeed's real engine and torch's real allocator on the null device.

What they promise fits, the next smaller number of GPUs does not, and the estimate says so beforehand.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.cuda.conftest import results_of

pytestmark = pytest.mark.gpu

CARD = 79.25  # GiB that a card of 80 GB has
SMALL_CARD = 39.4  # and one of 40 GB
# script, GPUs, GiB of each, whether it fits, (pairs in a micro-batch, micro-batches), gradient checkpointing
CASES = {
    "7b on 4": ("dama_7b.sh", 4, CARD, True, [4, 1], False),
    "7b on 2": ("dama_7b.sh", 2, CARD, False, [4, 2], True),
    "13b on 8": ("dama_13b.sh", 8, CARD, True, [2, 1], False),
    "13b on 4": ("dama_13b.sh", 4, CARD, False, [2, 2], True),
    "LoRA on 40 GB": ("dama_7b_lora.sh", 1, SMALL_CARD, True, [16, 1], True),
}


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """Every case in a child of its own, as many at a time as there are cores.

    The data is a pair whose answers are as long as RLAIF-V's: 120 and 110 tokens, at 3 characters each.
    """
    folder = tmp_path_factory.mktemp("steps")
    row = {"idx": 0, "question": "What is in the image?", "chosen": "a" * 360, "rejected": "b" * 330}
    (folder / "pairs.json").write_text(
        json.dumps([row | {"image_path": "1.png", "origin_dataset": "x", "origin_split": "x"}])
    )

    def run(case):
        script, gpus, gib, *_ = CASES[case]
        own = folder / script / str(gpus)
        own.mkdir(parents=True)
        places = {"DATA": str(folder / "pairs.json"), "IMAGES": str(folder), "OUTPUT": str(own / "out")}
        words = [str(gpus), "--config-of", os.path.join("scripts", script)]
        return results_of("steps", own, *words, gib=gib, settings=places | {"GPUS": str(gpus)})

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip(CASES, pool.map(run, CASES)))


@pytest.mark.parametrize("case", CASES)
def test_a_hardware_line(rehearsed, case):
    fits, layout, checkpointing = CASES[case][3:]
    found = rehearsed[case]
    assert (found["layout"], found["checkpointing"]) == (layout, checkpointing)
    assert bool(found["ran_out_in"]) == (not fits)
    assert bool(found["faults"]) == (not fits), "the preflight refuses what does not fit, and only that"
    assert found["waits"] == {}, "the forward pass waits for the device nowhere"
    if fits:
        assert found["peak"] == pytest.approx(found["estimate"], rel=0.03)
        assert found["reserved"] < found["estimated_reserve"] <= found["memory"]
    else:
        assert found["estimated_reserve"] > found["memory"]
