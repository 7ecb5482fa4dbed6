"""The training benchmarks run at a tiny shape, and the ways that they compare compute the same."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parents[1] / "scripts/bench"


@pytest.fixture()
def load(monkeypatch):
    """A script of scripts/bench as a module, its neighbours importable as when it runs."""
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module


@pytest.fixture()
def settings(load, tmp_path):
    dpo_step = load("dpo_step")
    settings = dpo_step.Settings(tmp_path, dpo_step.SHAPES["tiny"], pairs=2, threads=1, steps=1)
    assert dpo_step.prepare(settings, with_trl=False).seconds > 0
    return settings


@pytest.fixture()
def run(load, monkeypatch, capsys, tmp_path):
    """Runs a script: (the lines that it printed, what it wrote with --json)."""

    def run(script, *flags):
        file = tmp_path / "figures.json"
        monkeypatch.setattr(sys, "argv", [script, "--shape", "tiny", "--repeats", "1", "--json", str(file), *flags])
        load(script).main()
        return capsys.readouterr().out.splitlines(), json.loads(file.read_text())

    return run


def test_plain_and_ours_give_the_same_log_probs_and_gradients(load, settings):
    found = {}
    for way in ("plain", "ours"):
        model, step = load("dpo_step").BUILDERS[way](settings)
        found[way] = step(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    (plain, plain_gradients), (ours, our_gradients) = found["plain"], found["ours"]
    torch.testing.assert_close(ours, plain, rtol=1e-6, atol=0)
    assert our_gradients.keys() == plain_gradients.keys() and "model.mm_projector.0.weight" in our_gradients
    for name, gradient in plain_gradients.items():
        assert (our_gradients[name] - gradient).norm() < 1e-5 * gradient.norm(), name


def test_random_pairs_have_the_shapes_lengths(load):
    """576 positions of the picture, <s> and 59 tokens of text are the prefix of 636; one <image> stands for 576."""
    measure = load("measure")
    (pair,) = measure.random_pairs(measure.SHAPES["cpu"], 1)
    assert len(pair.chosen.input_ids) == 1 + 1 + 59 + 120 and len(pair.rejected.input_ids) == 1 + 1 + 59 + 110
    assert int((pair.chosen.labels >= 0).sum()) == 120 and int((pair.rejected.labels >= 0).sum()) == 110


def test_training_on_all_weights_is_measured(load, settings):
    training = load("dpo_step").train_fully(settings)
    assert len(training.pairs_per_second) == 2 and min(training.pairs_per_second) > 0 and training.peak > 0


def test_dpo_step_prints_ratios(run):
    said, written = run("dpo_step", "--ways", "plain", "ours", "--steps", "1")
    ratio = written["ratios"]["plain / ours, time"]["median"]
    plain, ours = (written["runs"][way][0]["times"][0][0] for way in ("plain", "ours"))
    assert ratio == pytest.approx(plain / ours)
    assert any(line.split()[:5] == ["plain", "/", "ours,", "time", f"{ratio:.3g}"] for line in said)


@pytest.mark.parametrize("of", [[], ["--step"]])
def test_reference_counts_distinct_tokens(run, of):
    """4 pairs of 40 + 12 + 9 positions are 244; with answers twice as long 4 x (40 + 24 + 18) = 328."""
    said, written = run("reference", *of)
    tokens = {(line.split()[0], int(line.split()[6])) for line in said[-12:]}
    assert {("pairs", 244), ("pairs", 976), ("answers", 328), ("prefix", 404)} <= tokens
    assert all(row["floor"] > 0 and min(row["shared"] + row["plain"]) > 0 for row in written["rows"])


def test_objectives_sets_what_packing_saves_beside_its_tokens(run):
    """m: 40 + 12 + 9, m': 40 + 12 tokens packed; apart 52 + 49 + 52. Log-probs of both ways are the same."""
    said, written = run("objectives", "--steps", "1", "--patterns", "second image")
    found = written["patterns"]["second image"]
    assert found["tokens"] == [113, 153] and found["token_ratio"] == pytest.approx(153 / 113)
    assert found["time"]["median"] > 0 and found["memory"]["median"] > 0 and found["logps"] < 1e-5
    assert any(line.split()[:5] == ["second", "image", "113", "153", "1.35"] for line in said)


def test_token_counts_of_each_pattern(load):
    """The prefix of 636 and answers of 120, 110 and 115 tokens: once for each image, or once for each answer."""
    bench = load("objectives")
    counts = {name: bench.tokens_of(bench.SHAPES["cpu"], views) for name, views in bench.PATTERNS.items()}
    assert counts == {
        "pair": (866, 1502), "second image": (1622, 2258), "visual weights": (1732, 3004), "symmetric": (1852, 3760),
    }  # fmt: skip


def test_flops_of_the_symmetric_pattern(load):
    """Parameters of the small model: 12.65 million in its 4 layers, 16.38 in its output layer.

    Linear layers: 1,852 tokens x 12.65 = 23.4 (packed), 3,760 x 12.65 = 47.6 (apart); logits: 580 x 16.38 = 9.5 both
    ways. Attention, 2 x 4 x 512 = 4,096 a query and key: 0.807 million of them = 3.3, apart 1.415 million = 5.8. In all
    36.2 and 62.9 billion: packing can save 1.735, which is 85 % of the tokens' 2.03.
    """
    bench = load("objectives")
    views = bench.PATTERNS["symmetric"]
    assert bench.flops_saved(bench.SHAPES["cpu"], views) == pytest.approx(62.9 / 36.2, rel=3e-3)
    assert bench.flops_saved(bench.SHAPES["7b"], views) == pytest.approx(3760 / 1852, rel=1e-2)
