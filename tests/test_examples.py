"""The scripts of examples/: help at once, defaults that parse, and a run on tiny models."""

import importlib.util
import json
import math

import pytest
import torch

from dama.losses import OBJECTIVES, ViewLogps
from dama.stage import read_stage
from dama.views import PAIR_VIEWS
from llava.train.arguments import parse_arguments
from tests.conftest import ROOT
from tests.models.saved import save

CLIP = ROOT / "playground/tinycoco/weights/clip"
PAIRS = ["--data", "dama/rlaifv_records.json", "--image_folder", "images"]


def load(name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"examples/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def own_objective():
    """The script, whose objective is in the table during one test."""
    yield load("own_objective")
    OBJECTIVES.pop("dpop")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """A tiny model of Qwen2.5-VL's architecture."""
    folder = tmp_path_factory.mktemp("qwen")
    save("qwen2_5_vl", folder)
    return str(folder)


def losses_of(folder):
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [row["loss"] for row in log if "loss" in row]


def flags_of(folder):
    """The flags that the model's provenance records."""
    return json.loads((folder / "dama_provenance.json").read_text())["flags"]


@pytest.mark.parametrize("name", ["dama_qwen_lora", "hardness_page", "own_objective"])
def test_help(name, capsys):
    script = load(name)
    OBJECTIVES.pop("dpop", None)
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    assert ended.value.code == 0 and "usage: " in capsys.readouterr().out


@pytest.mark.parametrize("on_gpu", [False, True])
def test_the_defaults_are_training_flags(on_gpu, in_golden, tmp_path):
    """Adapters of rank 128 on Qwen2.5-VL-3B, 16 pairs a step, bf16 on GPUs."""
    script = load("dama_qwen_lora")
    args, more = script.build_parser().parse_known_args([*PAIRS, "--out", str(tmp_path), "--seed", "3"])
    *_, words = script.stages_of(args, more, on_gpu)
    short = {"--model": "--model_name_or_path", "--data": "--data_path", "--out": "--output_dir"}
    flags = [short.get(word, word) for word in words[1:]]
    assert ("--bf16" in flags) is on_gpu
    for unmet in ("--bf16", "--hardness", "--reference"):  # a GPU, and stages that have not run
        if unmet in flags:
            del flags[flags.index(unmet) : flags.index(unmet) + 2]
    model, _, training = parse_arguments(["--task", "DPO", "--loss", "simpo", "--strategy", "none", *flags])
    assert model.model_name_or_path == "Qwen/Qwen2.5-VL-3B-Instruct" and model.max_pixels == 602112
    assert (training.lora_enable, training.lora_r, training.lora_alpha, training.seed) == (True, 128, 256, 3)
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps == 16


def test_dama_on_qwen_with_lora(in_golden, qwen, tmp_path):
    flags = ["--model", qwen, "--clip", str(CLIP), "--max_pixels", "1024", "--out", str(tmp_path)]
    quick = ["--num_train_epochs", "10", "--learning_rate", "1e-3", "--logging_steps", "1", "--report_to", "none"]
    assert load("dama_qwen_lora").main([*PAIRS, *flags, *quick]) == 0
    adapter = tmp_path / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 128
    losses = losses_of(adapter)
    assert len(losses) == 10 and losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < losses[0]


def test_a_stage_that_fails_ends_the_run(in_golden, tmp_path, capsys):
    words = ["--data", "no.json", "--image_folder", "images", "--clip", str(CLIP), "--out", str(tmp_path / "out")]
    assert load("dama_qwen_lora").main(words) == 2
    assert "no.json: no such file" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_own_objective_by_hand(own_objective):
    """r(w) = -2, r(l) = -3, so R = 1; with lambda 5 and b 0.5: -log s(0.5 (1 - 10)). With r(w) = 2 it is DPO."""
    policy = torch.tensor([[-2.0, 2.0], [-3.0, 1.0]])
    logps = ViewLogps(PAIR_VIEWS, policy, torch.zeros(2, 2), torch.ones(2, 2))
    found = own_objective.dpop(logps, torch.tensor([0.5, 0.5]), None)
    expected = [math.log1p(math.exp(4.5)), math.log1p(math.exp(-0.5))]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_the_own_objective_trains(own_objective, in_golden, qwen, tmp_path):
    """Reference stage and training by the script's own command line."""
    common = [*PAIRS, "--model", qwen, "--loss", "dpop"]
    assert own_objective.main(["reference", *common, "--device", "cpu", "--out", str(tmp_path / "reference")]) == 0
    flags = ["--strategy", "model", "--use_cpu", "True", "--per_device_train_batch_size", "4", "--logging_steps", "1",
             "--num_train_epochs", "5", "--learning_rate", "1e-3", "--report_to", "none"]  # fmt: skip
    reference = ["--reference", str(tmp_path / "reference"), "--out", str(tmp_path / "dpop")]
    assert own_objective.main(["train", *common, *flags, *reference]) == 0
    losses = losses_of(tmp_path / "dpop")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4) and losses[-1] < losses[0]
    assert flags_of(tmp_path / "dpop")["loss"] == "dpop"


def test_the_page_of_hardness(in_golden, tmp_path, capsys):
    """The hardest pairs come in order; alpha_D is below 1 where delta is below its mean."""
    words = [*PAIRS, "--clip", str(CLIP), "--out", str(tmp_path), "--hardest", "3"]
    assert load("hardness_page").main(words) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "beta times" in line]
    manifest, records = read_stage(tmp_path, "hardness")
    hardest = sorted(records, key=lambda record: record["delta"])[:3]
    assert [line.split()[1].rstrip(":") for line in lines] == [record["id"] for record in hardest]
    assert hardest[0]["delta"] < manifest["summary"]["delta_bar"] and float(lines[0].split()[-1]) < 1
    assert (tmp_path / "hardness.html").is_file()
