"""QLoRA on a CPU: adapters over a base of 4 and 8 bits by bitsandbytes, trained, saved, and answering with it."""

import pytest
import torch

from dama.models import setup
from dama.models.loading import HubCheckpoint
from llava.train import train_hub
from llava.train.arguments import parse_arguments
from tests.models.packs import logps_of, prepared
from tests.models.test_training import saved, words_of

LAYERS = {"4": "Linear4bit", "8": "Linear8bitLt"}
ADAPTERS = ["--lora_enable", "True", "--lora_r", "4", "--reference", "base", "--freeze_mm_mlp_adapter", "True"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(tmp_path_factory.mktemp("qwen"), "qwen2_5_vl")


def quantized(family, layer):
    """The quantized layers of the language model, by name."""
    decoder = setup.decoder_of(family.model)
    return {name: m for name, m in decoder.named_modules() if type(m).__name__ == layer and "base_layer" in name}


@pytest.mark.parametrize("bits", LAYERS)
def test_adapters_learn_over_a_quantized_base(in_golden, tmp_path, folder, bits):
    """The base keeps its bytes; without adapters it gives the reference's log-probs: the first loss is log 2."""
    words = words_of(tmp_path / "out", folder, *ADAPTERS, "--bits", bits)
    before = setup.setup_family(parse_arguments(words))
    trainer = train_hub.run(parse_arguments(words))
    layers, started = quantized(trainer.family, LAYERS[bits]), quantized(before, LAYERS[bits])
    assert layers.keys() == started.keys() and len(layers) == 14  # 2 layers of 7 matrices
    for name, layer in layers.items():
        base = layer.weight.data
        assert base.dtype in (torch.uint8, torch.int8) and torch.equal(base, started[name].weight.data), name
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 10 and rows[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    assert rows[-1]["loss"] < rows[0]["loss"]
    learned = [p for name, p in trainer.model.named_parameters() if "lora_B" in name]
    assert learned and all(p.requires_grad and p.abs().max() > 0 for p in learned)


@pytest.mark.parametrize("bits", LAYERS)
def test_a_pack_is_rows_of_their_own_over_a_quantized_base(tmp_path, folder, bits, world):
    """8 bits round each row's activations by its own largest, so that a pack of others rounds otherwise."""
    found = []
    for shared in ("True", "False"):
        words = words_of(tmp_path / "out", folder, *ADAPTERS, "--bits", bits, "--shared_prefix", shared)
        words[words.index("--image_folder") + 1] = str(world[1])
        words[words.index("--data_path") + 1] = __file__
        family = setup.setup_family(parse_arguments(words))
        with torch.no_grad():
            found.append(logps_of(family, prepared(family, world[0]), world[1]))
    assert torch.allclose(*found, rtol=1e-3 if bits == "4" else 2e-2)


def test_the_adapter_answers_over_the_quantized_base(in_golden, tmp_path, folder):
    words = words_of(tmp_path / "out", folder, *ADAPTERS, "--bits", "4")
    trained = train_hub.run(parse_arguments(words)).family.model
    checkpoint = HubCheckpoint(str(tmp_path / "out"))
    loaded = checkpoint.model(device="cpu", dtype=torch.float32, bits=4)
    ids = torch.arange(40, 80)[None]
    with torch.no_grad():
        own, found, base = (
            model.eval()(input_ids=ids).logits
            for model in (trained, loaded, HubCheckpoint(str(folder)).model(device="cpu", dtype=torch.float32, bits=4))
        )
    assert (found - own).abs().max() < 0.05 * (found - base).abs().max()
