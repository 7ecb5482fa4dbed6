"""Loading: the kind of a checkpoint from its files, every form of weights, and what does not fit by name."""

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_llava
from llava.model.checkpoint import read_beside
from llava.model.export import sample_image
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.source import Kind, kind_of
from tests.conftest import GOLDEN
from tests.llava.tiny import (
    PROJECTOR,
    edit_config,
    edit_weights,
    load,
    lora_folder,
    merged_by_hand,
    shard,
    tower_weights,
)

EXTRAS = json.loads((GOLDEN / "k_extras.json").read_text())


def logits_of(folder, base=None):
    tokenizer, model, processor, _ = load(folder, base)
    ids = tokenizer_image_token("USER: <image>\nWhat? ASSISTANT:", tokenizer, return_tensors="pt")[None]
    with torch.inference_mode():
        return model(ids, images=process_images([sample_image()], processor, model.config)).logits


# --- Full checkpoints ------------------------------------------------------------------------------------------------


def test_a_folder_of_any_name_is_llava_by_its_config(checkpoint):
    tokenizer, model, processor, context = load(checkpoint)
    assert type(model).__name__ == "LlavaLlamaForCausalLM" and not model.training
    assert (len(tokenizer), context, processor.crop_size["height"]) == (1000, 2048, 56)
    assert model.get_vision_tower().is_loaded


@pytest.mark.parametrize("case", ["device_cpu_default_device_map", "device_cpu_device_map_cpu"])
def test_what_comes_back_is_llavas(checkpoint, case):
    want = EXTRAS["load_pretrained_model"][case]
    placement = {} if "default" in case else {"device_map": "cpu"}
    tokenizer, model, processor, context = load(checkpoint, dtype=None, **placement)
    got = {
        "tokenizer": type(tokenizer).__name__,
        "legacy": tokenizer.legacy,
        "model": type(model).__name__,
        "model_dtype": str(model.dtype),
        "lm_head_dtype": str(model.lm_head.weight.dtype),
        "vision_dtype": str(model.get_vision_tower().dtype),
        "image_processor": type(processor).__name__.removesuffix("Pil"),
        "context_len": context,
        "vocab": len(tokenizer),
        "training": model.training,
    }
    assert got == want


@pytest.mark.parametrize("form", ["bin", "old bin", "bin shards", "safetensors shards"])
def test_every_form_of_weights_is_the_same_model(checkpoint, form):
    want = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    if "shards" in form:
        shard(want, checkpoint, form.split()[0])
    else:
        torch.save(want, checkpoint / "pytorch_model.bin", _use_new_zipfile_serialization=form == "bin")
    got = load_llava(str(checkpoint), dtype=torch.float32).state_dict()
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


def test_a_shard_that_is_not_there(checkpoint):
    files = shard(load_file(checkpoint / "model.safetensors"), checkpoint, "safetensors")
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / files[1]).unlink()
    with pytest.raises(
        FileNotFoundError, match=re.escape(f"the 2 files that model.safetensors.index.json lists, {[files[1]]}")
    ):
        load(checkpoint)


@pytest.mark.parametrize("cut", [8, 1000])
def test_truncated_safetensors(checkpoint, cut):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(ValueError, match=r"model.safetensors': expected a complete safetensors file, got \d+ bytes"):
        load(checkpoint)


def test_truncated_pickle(checkpoint):
    weights = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    torch.save(weights, checkpoint / "pytorch_model.bin")
    os.truncate(checkpoint / "pytorch_model.bin", 4000)
    with pytest.raises(ValueError, match="expected a complete PyTorch file, got 4000 bytes"):
        load(checkpoint)


class Touch:
    def __reduce__(self):
        return Path.touch, (Path("pwned"),)


def test_a_pickle_with_code_is_not_run(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    torch.save({"model.norm.weight": Touch()}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match="expected tensors only, got a pickle of other Python objects"):
        load(checkpoint)
    assert not Path("pwned").exists()


def test_a_pickle_with_more_than_tensors(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    torch.save({"epoch": 3}, checkpoint / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"something else under \['epoch'\]"):
        load(checkpoint)


def test_grouped_queries_and_a_tied_output_layer(checkpoint):
    """2 key-value heads for 4 heads of 16: k_proj and v_proj are [32, 64]; lm_head comes from the embedding."""

    def change(weights):
        for name in [n for n in weights if "k_proj" in n or "v_proj" in n]:
            weights[name] = weights[name][:32].clone()
        del weights["lm_head.weight"]

    edit_weights(checkpoint, change)
    edit_config(checkpoint, num_key_value_heads=2, tie_word_embeddings=True)
    model = load(checkpoint)[1]
    assert model.model.layers[0].self_attn.k_proj.weight.shape == (32, 64)
    assert model.lm_head.weight is model.model.embed_tokens.weight


# --- What does not fit -----------------------------------------------------------------------------------------------


def test_without_its_vision_tower(checkpoint):
    shutil.rmtree(checkpoint / "clip-vit-tiny-patch14-56")
    with pytest.raises(FileNotFoundError, match=r"vision tower 'clip-vit-tiny.*--vision_tower"):
        load(checkpoint)


def test_a_tower_of_another_family(checkpoint):
    edit_config(checkpoint / "clip-vit-tiny-patch14-56", model_type="siglip_vision_model")
    with pytest.raises(ValueError, match="vision tower '.*': expected a CLIP model .* got 'siglip_vision_model'"):
        load(checkpoint)


def test_without_config(checkpoint):
    (checkpoint / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected config.json .* or adapter_config.json"):
        load(checkpoint)


def test_without_weights(checkpoint):
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected weights .*found none"):
        load(checkpoint)


@pytest.mark.parametrize("name", ["no-such-folder", "/no/such/folder", "./no"])
def test_no_such_checkpoint(name):
    with pytest.raises(FileNotFoundError, match=f"checkpoint '{name}': expected a folder or the name of a hub"):
        load(name)


def test_of_another_kind(checkpoint):
    edit_config(checkpoint, model_type="bert")
    with pytest.raises(ValueError, match="expected a LLaVA-1.5 model .*got model_type bert"):
        load(checkpoint)


def test_missing_unknown_and_misshapen_weights_are_all_named(checkpoint):
    def change(weights):
        del weights["model.layers.1.mlp.up_proj.weight"]
        weights["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(64)
        weights["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(64)
        weights["model.norm.weight"] = torch.ones(63)

    edit_weights(checkpoint, change)
    with pytest.raises(ValueError) as error:
        load(checkpoint)
    for part in (
        "1 are missing: model.layers.1.mlp.up_proj.weight.",
        "2 are unknown to the model: model.layers.{0,1}.self_attn.q_proj.bias",
        "1 have another shape: model.norm.weight (64,) got (63,)",
    ):
        assert part in str(error.value)


def with_rows(checkpoint, rows):
    """The checkpoint of 1000 tokens with a vocabulary table of another length."""
    edit_config(checkpoint, vocab_size=rows)
    edit_weights(
        checkpoint, lambda w: w.update({n: torch.zeros(rows, 64) for n in w if "lm_head" in n or "embed" in n})
    )


@pytest.mark.parametrize("rows", [999, 1025])
def test_tokenizer_and_embedding_that_disagree(checkpoint, rows):
    with_rows(checkpoint, rows)
    with pytest.raises(ValueError, match=f"got a tokenizer of 1000 and a table of {rows}.*copy those of"):
        load(checkpoint)


def test_a_table_padded_to_a_multiple_of_64_is_kept(checkpoint):
    """1000 tokens need 1024 = 16 * 64 rows."""
    with_rows(checkpoint, 1024)
    assert load(checkpoint)[1].lm_head.weight.shape == (1024, 64)


def test_image_tokens_that_the_config_asks_for_are_added(checkpoint):
    edit_config(checkpoint, mm_use_im_patch_token=True, mm_use_im_start_end=True)
    tokenizer, model, _, _ = load(checkpoint)
    assert tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>"]) == [1000, 1001, 1002]
    assert model.lm_head.weight.shape == (1003, 64)


def test_an_unknown_projector(checkpoint):
    edit_config(checkpoint, mm_projector_type="perceiver")
    with pytest.raises(ValueError, match="mm_projector_type: expected 'linear', .* got 'perceiver'"):
        load(checkpoint)


def test_without_bitsandbytes(checkpoint, monkeypatch):
    monkeypatch.setattr("dama.train.setup.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="loading in 4 bits: expected the package bitsandbytes"):
        load(checkpoint, load_4bit=True)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(("bits", "layer"), [(4, "Linear4bit"), (8, "Linear8bitLt")])
def test_few_bits(checkpoint, bits, layer):
    _, model, _, _ = load(checkpoint, **{f"load_{bits}bit": True}, dtype=torch.float16)
    assert type(model.model.layers[0].mlp.up_proj).__name__ == layer
    assert type(model.model.mm_projector[0]) is type(model.lm_head) is torch.nn.Linear
    layers = load_file(checkpoint / "model.safetensors")
    assert torch.equal(model.model.mm_projector[0].weight, layers["model.mm_projector.0.weight"].half())


# --- The tower's weights inside --------------------------------------------------------------------------------------


def test_weights_of_a_frozen_tower_inside_are_named_and_left_out(checkpoint, capsys):
    edit_weights(checkpoint, lambda w: w.update(tower_weights("model.vision_tower.vision_tower.")))
    tower = load(checkpoint)[1].get_vision_tower().vision_tower
    want = load_file(GOLDEN / "clip-vit-tiny-patch14-56" / "model.safetensors")
    assert torch.equal(tower.post_layernorm.bias, want["vision_model.post_layernorm.bias"])
    assert "55 weights of its frozen vision tower are left out" in capsys.readouterr().out


@pytest.mark.parametrize(
    "flag", [{"unfreeze_mm_vision_tower": True}, {"mm_tunable_parts": "mm_vision_tower,mm_mlp_adapter"}]
)
@pytest.mark.parametrize("style", ["", "flat"])
def test_weights_of_a_trained_tower_are_loaded(checkpoint, flag, style):
    inside = tower_weights("model.vision_tower.vision_tower.")
    if style == "flat":  # as transformers 5 names them
        inside = {name.replace("vision_model.", ""): tensor for name, tensor in inside.items()}
    edit_weights(checkpoint, lambda w: w.update(inside))
    edit_config(checkpoint, **flag)
    tower = load(checkpoint)[1].get_vision_tower().vision_tower
    want = load_file(GOLDEN / "clip-vit-tiny-patch14-56" / "model.safetensors")
    assert torch.equal(tower.post_layernorm.bias, want["vision_model.post_layernorm.bias"] + 1)
    assert not any(parameter.requires_grad for parameter in tower.parameters())
    with pytest.raises(ValueError, match="expected a vision tower in a folder of its own"):
        load_llava(str(checkpoint))


def test_a_trained_tower_that_is_not_whole(checkpoint):
    inside = tower_weights("model.vision_tower.vision_tower.")
    del inside["model.vision_tower.vision_tower.vision_model.post_layernorm.bias"]
    edit_weights(checkpoint, lambda w: w.update(inside))
    edit_config(checkpoint, unfreeze_mm_vision_tower=True)
    with pytest.raises(
        ValueError, match="all weights of its vision tower; missing: post_layernorm.bias; unknown: none"
    ):
        load(checkpoint)


# --- Adapters and projectors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
@pytest.mark.parametrize("named", [True, False])
def test_lora_merged(checkpoint, suffix, named):
    want = merged_by_hand(checkpoint, *lora_folder(checkpoint.parent / "x", checkpoint, suffix))
    model = load("x", None if named else checkpoint)[1]
    got = {name: t for name, t in model.state_dict().items() if "vision_tower" not in name}
    assert got.keys() == want.keys()
    assert max((got[name] - want[name]).abs().max() for name in want) < 1e-6


def test_lora_merged_in_half_precision_is_as_near_as_the_original(checkpoint):
    want = merged_by_hand(checkpoint, *lora_folder(checkpoint.parent / "x", checkpoint))
    model, golden = load("x", dtype=None)[1], EXTRAS["load_pretrained_model"]["lora_merge"]
    got = model.state_dict()
    assert str(model.dtype) == golden["dtype"]
    error = max((got[name].float() - want[name].half().float()).abs().max() for name in want)
    assert error <= golden["max_abs_param_diff_vs_fp32_merge_then_half"]


def test_lora_on_a_bare_language_model(checkpoint):
    """As LLaVA is trained from Vicuna: the base has no projector and no config of one."""
    adapter, beside = lora_folder(checkpoint.parent / "x", checkpoint)
    want = merged_by_hand(checkpoint, adapter, beside)
    shutil.copytree(checkpoint / "clip-vit-tiny-patch14-56", "x/clip-vit-tiny-patch14-56")
    edit_weights(checkpoint, lambda w: [w.pop(name) for name in PROJECTOR])
    config = json.loads((checkpoint / "config.json").read_text())
    plain = {key: value for key, value in config.items() if "mm_" not in key} | {"model_type": "llama"}
    (checkpoint / "config.json").write_text(json.dumps(plain))
    got = load("x", checkpoint)[1].state_dict()
    assert max((got[name] - want[name]).abs().max() for name in want) < 1e-6
    Path("x/non_lora_trainables.bin").unlink()
    with pytest.raises(ValueError, match=re.escape("4 are missing: model.mm_projector.{0,2}.bias, ")):
        load("x", checkpoint)


def test_lora_without_base(checkpoint):
    lora_folder(checkpoint.parent / "x", checkpoint)
    shutil.move(checkpoint, "elsewhere")
    with pytest.raises(
        FileNotFoundError, match="LoRA folder 'x': its adapter_config.json names the base .*--model-base"
    ):
        load("x")
    config = json.loads(Path("x/adapter_config.json").read_text())
    Path("x/adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": None}))
    with pytest.raises(
        ValueError, match="'x' holds a LoRA adapter: expected its base model, got none. Pass --model-base"
    ):
        load("x")
    with pytest.raises(ValueError, match="expected a full model, got a LoRA adapter only"):
        load_llava("x")


def test_an_adapter_that_does_not_fit_its_config(checkpoint):
    adapter, _ = lora_folder(checkpoint.parent / "x", checkpoint)
    first = min(adapter)
    save_file({name: t for name, t in adapter.items() if name != first}, "x/adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"missing: {re.escape(first)}; unknown: none"):
        load("x")
    Path("x/adapter_model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="expected adapter_model.safetensors or adapter_model.bin"):
        load("x")


def test_names_beside_the_adapter_come_in_three_forms(tmp_path):
    names = ["base_model.model.model.mm_projector.0.bias", "model.model.norm.weight", "lm_head.weight"]
    torch.save({name: torch.zeros(1) for name in names}, tmp_path / "non_lora_trainables.bin")
    weights, tower = read_beside(tmp_path, Kind.LORA)
    assert list(weights) == ["model.mm_projector.0.bias", "model.norm.weight", "lm_head.weight"] and not tower


def test_a_projector_on_its_base(checkpoint):
    folder = checkpoint.parent / "x"
    folder.mkdir()
    assert list(EXTRAS["mm_projector_bin_keys"]) == PROJECTOR
    projector = {name: torch.full(shape, 0.01) for name, shape in EXTRAS["mm_projector_bin_keys"].items()}
    torch.save(projector, folder / "mm_projector.bin")
    shutil.copy(checkpoint / "config.json", folder)
    edit_weights(checkpoint, lambda w: [w.pop(name) for name in PROJECTOR])
    assert kind_of(folder) is Kind.PROJECTOR
    model = load(folder, checkpoint)[1]
    assert torch.equal(model.model.mm_projector[2].weight, torch.full((64, 64), 0.01))
    with pytest.raises(ValueError, match="holds a projector: expected its base model, got none"):
        load(folder)
    with pytest.raises(ValueError, match=r"4 are missing: model.mm_projector.\{0,2\}.bias"):
        load(checkpoint)


def test_a_base_that_is_not_needed_is_said(checkpoint, capsys):
    load(checkpoint, "anything")
    assert "is a full model: the base 'anything' is not used" in capsys.readouterr().out


def test_the_first_release_named_its_models_llava(checkpoint):
    want = logits_of(checkpoint)
    edit_config(checkpoint, model_type="llava")
    assert torch.equal(logits_of(checkpoint), want)


def test_layout_of_a_saved_model_is_the_originals(checkpoint):
    """Names, shapes and dtypes of the released checkpoint, also after loading and saving here."""
    layout = json.loads((GOLDEN / "i_model_layout.json").read_text())["llava-v1.5-tiny"]["state_dict_as_released"]
    model = load_llava(str(checkpoint))
    model.save_pretrained("saved")
    got = {
        name: {"shape": list(t.shape), "dtype": str(t.dtype)}
        for name, t in load_file("saved/model.safetensors").items()
    }
    assert got == layout


# --- Projectors ------------------------------------------------------------------------------------------------------


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
