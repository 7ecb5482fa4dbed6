"""Loading: the kind of a checkpoint from its files, and what is missing by name."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.model.builder import load_pretrained_model
from llava.model.multimodal_projector.builder import build_vision_projector
from tests.conftest import GOLDEN


@pytest.fixture()
def checkpoint(tmp_path, monkeypatch):
    """A copy without 'llava' in its name, the vision tower inside."""
    folder = tmp_path / "run-7"
    shutil.copytree(GOLDEN / "llava-v1.5-tiny", folder)
    shutil.copytree(GOLDEN / "clip-vit-tiny-patch14-56", folder / "clip-vit-tiny-patch14-56")
    monkeypatch.chdir(tmp_path)
    return folder


def load(folder, **kwargs):
    return load_pretrained_model(str(folder), None, folder.name, device="cpu", **({"dtype": torch.float32} | kwargs))


def test_a_folder_of_any_name_is_llava_by_its_config(checkpoint):
    tokenizer, model, processor, context = load(checkpoint)
    assert type(model).__name__ == "LlavaLlamaForCausalLM" and not model.training
    assert (len(tokenizer), context, processor.crop_size["height"]) == (1000, 2048, 56)
    assert model.get_vision_tower().is_loaded


def test_default_precision_is_llavas(checkpoint):
    _, model, _, _ = load(checkpoint, dtype=None)
    assert (model.dtype, model.get_vision_tower().dtype) == (torch.float16, torch.float32)


def test_without_its_vision_tower(checkpoint):
    shutil.rmtree(checkpoint / "clip-vit-tiny-patch14-56")
    with pytest.raises(FileNotFoundError, match=r"vision tower 'clip-vit-tiny.*--vision_tower"):
        load(checkpoint)


def test_without_config(checkpoint):
    (checkpoint / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected config.json .* or adapter_config.json"):
        load(checkpoint)


def test_of_another_kind(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"model_type": "bert"}))
    with pytest.raises(ValueError, match="expected model_type 'llava_llama' or 'llama' in config.json, got 'bert'"):
        load(checkpoint)


def test_with_weights_missing(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"1 are missing: model.layers.1.mlp.up_proj.weight\."):
        load(checkpoint)


def test_weights_of_the_tower_inside_an_old_checkpoint_do_no_harm(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    weights["model.vision_tower.vision_tower.vision_model.post_layernorm.bias"] = torch.zeros(32)
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    assert load(checkpoint)[1].get_vision_tower().is_loaded


@pytest.mark.parametrize(("kind", "linears"), [("linear", 1), ("mlp2x_gelu", 2), ("mlp3x_gelu", 3), ("identity", 0)])
def test_projectors(kind, linears):
    class Config:
        mm_projector_type, mm_hidden_size, hidden_size = kind, 6, 6

    projector = build_vision_projector(Config)
    assert sum(isinstance(m, torch.nn.Linear) for m in projector.modules()) == linears
    assert projector(torch.ones(2, 3, 6)).shape == (2, 3, 6)


def test_unknown_projector():
    class Config:
        mm_projector_type, mm_hidden_size, hidden_size = "mlp0x_gelu", 6, 6

    with pytest.raises(ValueError, match="mm_projector_type: expected 'linear', .* got 'mlp0x_gelu'"):
        build_vision_projector(Config)
