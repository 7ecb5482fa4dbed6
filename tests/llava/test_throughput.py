"""What a step costs, on paper; a stopwatch that counts steps only; the lines of a pair."""

import json
from types import SimpleNamespace

import pytest
import torch

from dama.losses import ViewLogps
from dama.train.callbacks import PairLog, end_of_steps_before
from dama.train.metrics import StepTable
from dama.train.throughput import ModelSize, PairLength, Throughput, forward_flops, peak_flops, step_flops
from dama.views import PAIR_VIEWS
from dama.weighting import Weights
from llava.train.family import size_of

pytestmark = pytest.mark.fast

SIZE = ModelSize(decoder=10, output=6, attention=2, tower=7, projector=3, patches=4)


def test_forward_pass_on_paper():
    """Prefix 2, answers 1 and 2: 5 positions x 2 x 10 = 100.

    Causal [prefix | chosen]: 1 + 2 + 3 = 6 query-key pairs; rejected: 3 + 4 = 7; 13 x 4 x 2 = 104. Logits at 3
    positions x 2 x 6 = 36. Projector 4 x 2 x 3 = 24. Sum 264.
    """
    assert forward_flops(SIZE, PairLength.of(2, 1, 2).groups) == 264


def test_step_on_paper():
    """Two pairs forward, one also backward (2 x): 264 x (1 + 3) = 1056; one image 2 x 7 x 4 = 56.

    Under LoRA the backward pass is one forward pass: 264 x 3 + 56.
    """
    pairs = [PairLength.of(2, 1, 2).groups] * 2
    assert step_flops(SIZE, pairs, [True, False], 1, frozen_weights=False) == 1112
    assert step_flops(SIZE, pairs, [True, False], 1, frozen_weights=True) == 848


def test_size_of_a_model_is_that_of_its_matrices(in_golden):
    from llava.model.builder import load_llava

    model = load_llava("llava-v1.5-tiny", dtype=torch.float32)
    model.get_model().load_vision_tower()
    size = size_of(model)
    layers = [p for name, p in model.get_model().layers.named_parameters() if p.ndim == 2]
    encoder = model.get_vision_tower().vision_tower.encoder
    assert size.decoder == sum(p.numel() for p in layers)
    assert size.output == model.lm_head.weight.numel()
    assert size.tower == sum(p.numel() for p in encoder.parameters() if p.ndim == 2)
    assert size.projector == sum(p.numel() for p in model.get_model().mm_projector.parameters() if p.ndim == 2)


def test_stopwatch_counts_steps_only(monkeypatch):
    """Steps of 2 s and 4 s with a pause of 100 s: 12 pairs in 6 s are 2 a second; 5 steps left take 15 s."""
    clock = iter([0.0, 2.0, 102.0, 106.0])
    monkeypatch.setattr("dama.train.throughput.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    throughput = Throughput(peak=100.0)
    for _ in range(2):
        throughput.start()
        throughput.add(pairs=6, tokens=30, flops=150.0)
        throughput.stop()
    figures = throughput.take(steps_left=5)
    assert figures["speed/pairs_per_second"] == 2 and figures["speed/tokens_per_second"] == 10
    assert figures["speed/hours_left"] == pytest.approx(15 / 3600) and figures["speed/mfu"] == 0.5
    assert throughput.take(steps_left=5) == {}


def test_peak_is_known_by_name(monkeypatch):
    names = {"NVIDIA H100 PCIe": 756e12, "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA A100-SXM4-80GB": 312e12, "X": None}
    for name, expected in names.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda")) == expected
    assert peak_flops(torch.device("cpu")) is None


def test_pair_log_forgets_the_steps_that_are_taken_again(tmp_path):
    column = torch.tensor([1.0, 2.0], dtype=torch.float64)
    policy = torch.stack([column * 3, column])
    table = StepTable(column, column, ViewLogps(PAIR_VIEWS, policy, torch.stack([column, column]), policy))
    weights = Weights(column, torch.tensor([True, False]), column, 1.0, 0.0, 0.0, 0.0)
    log = PairLog(tmp_path / "out" / "pair_log.jsonl")
    log.rewind(0)
    for step in range(3):
        log.append(step, ["a", "b"], table, weights)
    with open(log.path, "a") as file:
        file.write('{"step": 3, "id": "to')  # killed while writing
    log.rewind(2)
    rows = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert [(row["step"], row["id"], row["selected"]) for row in rows] == [
        (0, "a", True), (0, "b", False), (1, "a", True), (1, "b", False)
    ]  # fmt: skip
    assert rows[1]["R"] == 4.0 and rows[1]["chosen"] == 4.0


@pytest.mark.parametrize("block", [1, 7, 40, 1 << 16])
@pytest.mark.parametrize("torn", [b"", b'{"step": 9, "id": "to', b"x" * 100])
def test_the_end_of_earlier_steps_is_found_from_the_end(tmp_path, block, torn):
    """As reading every line finds it, wherever the blocks that are read divide the lines."""
    lines = [
        json.dumps({"step": i // 3, "id": "é" * (5 * i % 17)}, ensure_ascii=False).encode() + b"\n" for i in range(12)
    ]
    path = tmp_path / "log"
    path.write_bytes(b"".join(lines) + torn)
    for step in range(7):
        expected = sum(len(line) for line in lines if json.loads(line)["step"] < step)
        with open(path, "rb") as file:
            assert end_of_steps_before(file, step, block) == expected


def test_rewinding_reads_only_the_steps_that_are_cut_off(tmp_path):
    log = PairLog(tmp_path / "pair_log.jsonl")
    log.path.write_text("not JSON\n" + '{"step": 1}\n{"step": 2}\n')
    log.rewind(2)
    assert log.path.read_text() == 'not JSON\n{"step": 1}\n'
