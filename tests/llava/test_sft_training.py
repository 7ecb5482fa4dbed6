"""Fine-tuning by its command: full, LoRA and projector only; killed and resumed is never killed."""

import json
import shutil

import pytest
import torch

from llava.model.llava_arch import load_projector
from llava.train import train
from llava.train.llava_trainer import LLaVATrainer
from tests.conftest import GOLDEN
from tests.llava.tiny import arguments

FLAGS = ["--max_steps", "4", "--per_device_train_batch_size", "2", "--logging_steps", "1", "--save_strategy", "steps",
         "--save_steps", "1"]  # fmt: skip
WAYS = {
    "full": [],
    "lora": ["--lora_enable", "True", "--lora_r", "4"],
    "projector": ["--tune_mm_mlp_adapter", "True"],
}


@pytest.mark.parametrize("way", WAYS)
def test_killed_and_resumed_is_never_killed(in_golden, tmp_path, monkeypatch, way):
    whole = train.run(arguments(tmp_path / "whole", *FLAGS, *WAYS[way]))
    save = LLaVATrainer._save_checkpoint

    def save_and_die(self, *args):
        save(self, *args)
        if self.state.global_step == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(LLaVATrainer, "_save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train.run(arguments(tmp_path / "parts", *FLAGS, *WAYS[way]))
    monkeypatch.setattr(LLaVATrainer, "_save_checkpoint", save)
    parts = train.run(arguments(tmp_path / "parts", *FLAGS, *WAYS[way]))
    for (name, one), (_, other) in zip(whole.model.named_parameters(), parts.model.named_parameters()):
        assert torch.equal(one, other), name
    assert parts.state.global_step == 4


def test_projector_alone_is_saved_under_the_originals_names(in_golden, tmp_path):
    trainer = train.run(arguments(tmp_path, *FLAGS, *WAYS["projector"]))
    weights = torch.load(tmp_path / "mm_projector.bin", weights_only=True)
    expected = json.loads((GOLDEN / "k_extras.json").read_text())["mm_projector_bin_keys"]
    assert {name: list(value.shape) for name, value in weights.items()} == expected
    projector = trainer.model.get_model().mm_projector
    before = {name: value.clone() for name, value in projector.state_dict().items()}
    load_projector(projector, str(tmp_path / "mm_projector.bin"))
    assert all(torch.equal(before[name], value) for name, value in projector.state_dict().items())


def test_lora_saves_the_originals_layout(in_golden, tmp_path):
    train.run(arguments(tmp_path, *FLAGS, *WAYS["lora"]))
    recorded = json.loads((GOLDEN / "k_extras.json").read_text())["lora"]
    beside = torch.load(tmp_path / "non_lora_trainables.bin", weights_only=True)
    assert {name: list(value.shape) for name, value in beside.items()} == recorded["non_lora_trainables_bin_keys"]
    from safetensors import safe_open

    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(recorded["adapter_model_keys"])
    assert set(recorded["saved_files"]) <= {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("bits", ["4", "8"])
def test_adapters_learn_on_a_quantised_base(in_golden, tmp_path, bits):
    """QLoRA: the language model's layers are quantised, the projector and the output layer are not."""
    trainer = train.run(arguments(tmp_path, *FLAGS, *WAYS["lora"], "--bits", bits))
    names = {type(module).__name__ for name, module in trainer.model.named_modules() if name.endswith("base_layer")}
    assert names == {"Linear4bit" if bits == "4" else "Linear8bitLt"}
    projector = trainer.model.base_model.model.get_model().mm_projector
    assert type(projector[0]) is torch.nn.Linear
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


def test_anyres_pictures_train_in_crops(in_golden, tmp_path):
    """A checkpoint that names its grids: the whole picture and two crops, 48 positions instead of 16."""
    base = tmp_path / "base"
    shutil.copytree(in_golden / "llava-v1.5-tiny", base)
    config = json.loads((base / "config.json").read_text()) | {"image_grid_pinpoints": [[112, 56], [56, 112]]}
    (base / "config.json").write_text(json.dumps(config))
    flags = ["--model_name_or_path", str(base), "--image_aspect_ratio", "anyres", *FLAGS, "--save_strategy", "no"]
    trainer = train.run(arguments(tmp_path / "out", *flags))
    rows = trainer.train_dataset
    assert rows[0]["image"].shape == (3, 3, 56, 56)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0]


def test_anyres_without_grids_is_refused(in_golden, tmp_path):
    with pytest.raises(ValueError, match="anyres: expected image_grid_pinpoints, the grids in pixels"):
        train.run(arguments(tmp_path, "--image_aspect_ratio", "anyres", *FLAGS))


def test_bad_rows_are_named_before_the_model_is_loaded(in_golden, tmp_path):
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
    rows = [
        {"id": "good", "image": "wide.png", "conversations": talk},
        {"id": "gone", "image": "gone.png", "conversations": talk},
        {"id": "out", "image": "../sft/records.json", "conversations": talk},
        {"id": "mute"},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=r"3 errors") as error:
        train.run(arguments(tmp_path / "out", "--data_path", str(tmp_path / "rows.json"), *FLAGS))
    for part in (
        "row gone: image gone.png: image is missing",
        "row out: image ../sft/records.json",
        "row mute: expected conversations",
    ):
        assert part in str(error.value)
