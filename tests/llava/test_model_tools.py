"""consolidate, make_delta, apply_delta, auto_upgrade, and the scripts that merge adapters and extract projectors."""

import inspect
import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from llava.model import apply_delta, consolidate, make_delta, utils
from llava.model.apply_delta import apply_delta as apply
from llava.model.builder import load_pretrained_model
from llava.model.consolidate import consolidate_ckpt
from llava.model.make_delta import make_delta as make
from llava.model.utils import auto_upgrade
from tests.conftest import GOLDEN
from tests.llava.tiny import PROJECTOR, edit_config, edit_weights, lora_folder, merged_by_hand, shard

ROOT = Path(__file__).resolve().parents[2]
INVENTORY = json.loads((GOLDEN / "api_inventory.json").read_text())


@pytest.fixture()
def model(tmp_path, monkeypatch):
    """The golden checkpoint; its vision tower lies beside it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(GOLDEN / "clip-vit-tiny-patch14-56", "clip-vit-tiny-patch14-56")
    return Path(shutil.copytree(GOLDEN / "llava-v1.5-tiny", "model"))


@pytest.fixture()
def base(model):
    """A bare LLaMA of 990 tokens: other weights, no projector."""
    folder = Path(shutil.copytree(model, "base"))
    config = json.loads((folder / "config.json").read_text())
    plain = {key: value for key, value in config.items() if "mm_" not in key}
    (folder / "config.json").write_text(json.dumps(plain | {"model_type": "llama", "vocab_size": 990}))

    def change(weights):
        for name in PROJECTOR:
            del weights[name]
        for name in weights:
            weights[name] = weights[name] * 0.5
            if "lm_head" in name or "embed" in name:
                weights[name] = weights[name][:990].clone()

    edit_weights(folder, change)
    return folder


def weights_of(folder):
    return load_file(Path(folder) / "model.safetensors")


def script(name, *arguments):
    """Runs scripts/NAME in this process."""
    runpy.run_path(str(ROOT / "scripts" / name))["main"](list(arguments))


@pytest.mark.parametrize("module", [consolidate, make_delta, apply_delta, utils])
def test_names_and_signatures_are_llavas(module):
    api = INVENTORY["upstream_llava"]["modules"][module.__name__.replace(".", "/") + ".py"]
    for name, entry in api["functions"].items():
        parameters = ", ".join(inspect.signature(getattr(module, name)).parameters)
        assert f"({parameters})" == entry["signature"]


@pytest.mark.parametrize(
    "file",
    ["llava/model/consolidate.py", "llava/model/make_delta.py", "llava/model/apply_delta.py",
     "scripts/merge_lora_weights.py", "scripts/extract_mm_projector.py"],
)  # fmt: skip
def test_flags_are_llavas(file):
    table = INVENTORY["upstream_llava"]["argparse_flags"] | INVENTORY["upstream_scripts_argparse"]
    declared = re.findall(
        r'add_argument\("(--[\w-]+)", type=str, (required=True|default=None)?', (ROOT / file).read_text()
    )
    wanted = [
        (e["flags"][0], next((f"{k}={e[k]}" for k in ("required", "default") if k in e), "")) for e in table[file]
    ]
    if "extract" in file:  # LLaVA lets both be left out, and fails on None
        wanted = [(flag, "required=True") for flag, _ in wanted]
    assert declared == wanted


def test_consolidate(model):
    want = weights_of(model)
    shard(want, model, "bin")
    (model / "model.safetensors").unlink()
    consolidate.main(["--src", str(model), "--dst", "one"])
    got = weights_of("one")
    assert got.keys() == want.keys() and all(torch.equal(got[name], want[name].half()) for name in want)
    assert json.loads(Path("one/config.json").read_text())["torch_dtype"] == "float16"
    _, loaded, processor, _ = load_pretrained_model("one", None, "one", device="cpu")
    assert loaded.dtype == torch.float16 and processor.crop_size["height"] == 56


def test_delta_and_back(model, base):
    """The sum target - base + base is the target up to float16's rounding; new rows and the projector are unchanged."""
    make_delta.main(["--base-model-path", str(base), "--target-model-path", str(model), "--delta-path", "delta"])
    delta, target, half = weights_of("delta"), weights_of(model), weights_of(base)
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(delta[name], target[name].half() - half[name].half())
    assert torch.equal(delta["lm_head.weight"][990:], target["lm_head.weight"][990:].half())
    assert all(torch.equal(delta[name], target[name].half()) for name in PROJECTOR)

    apply_delta.main(["--base-model-path", str(base), "--target-model-path", "again", "--delta-path", "delta"])
    again = weights_of("again")
    assert again.keys() == target.keys()
    for name in target:
        assert torch.allclose(again[name].float(), target[name], rtol=2e-3, atol=2e-4), name
    assert load_pretrained_model("again", None, "", device="cpu")[1].config.model_type == "llava_llama"


def test_deltas_of_other_architectures(model, base):
    edit_weights(base, lambda w: w.pop("model.norm.weight"))
    with pytest.raises(ValueError, match="1 are missing: model.norm.weight"):
        make(str(base), str(model), "delta", None)
    edit_weights(base, lambda w: w.update({"model.norm.weight": torch.ones(64)}))
    config = {"num_hidden_layers": 1}
    edit_config(base, **config)
    edit_weights(base, lambda w: [w.pop(name) for name in list(w) if "layers.1." in name])
    with pytest.raises(ValueError, match=r"only one of them has \['model.layers.1.input_layernorm.weight'"):
        apply(str(base), "out", str(model))
    assert not Path("out").exists()


def test_deltas_of_other_widths(model, base):
    edit_config(base, intermediate_size=64)

    def narrow(weights):
        for name in [n for n in weights if "mlp" in n]:
            weights[name] = (weights[name][:, :64] if "down" in name else weights[name][:64]).clone()

    edit_weights(base, narrow)
    with pytest.raises(ValueError, match=r"expected model.layers.*mlp.* of the base's shape .*64"):
        make(str(base), str(model), "delta", None)


@pytest.mark.parametrize(("answer", "kind"), [("y", "llava_llama"), ("", "llama")])
def test_upgrade_of_the_first_release(model, monkeypatch, answer, kind):
    edit_config(model, model_type="llama")
    monkeypatch.setattr("builtins.input", lambda prompt: answer)
    if answer:
        auto_upgrade(str(model))
    else:
        with pytest.raises(SystemExit, match="was left as it is"):
            auto_upgrade(str(model))
    assert json.loads((model / "config.json").read_text())["model_type"] == kind


def test_nothing_to_upgrade(model, base, monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: pytest.fail("asked"))
    for folder in (model, base, "owner/name"):
        auto_upgrade(str(folder))
    with pytest.raises(FileExistsError, match="expected a new or empty folder to write to, got 'base'"):
        consolidate_ckpt(str(model), str(base))


def test_merging_a_lora(model):
    want = merged_by_hand(model, *lora_folder(Path("adapter"), model))
    flags = ["--model-path", "adapter", "--model-base", str(model), "--save-model-path", "merged"]
    script("merge_lora_weights.py", *flags)
    got = weights_of("merged")
    assert got.keys() == want.keys()
    assert max((got[name].float() - want[name].half().float()).abs().max() for name in want) < 2e-4
    assert load_pretrained_model("merged", None, "", device="cpu")[1].get_vision_tower().is_loaded


def test_extracting_a_projector(model, base):
    shard(weights_of(model), model, "safetensors")
    want = weights_of(model)
    (model / "model.safetensors").unlink()
    script("extract_mm_projector.py", "--model-path", str(model), "--output", "out/mm_projector.bin")
    got = torch.load("out/mm_projector.bin", weights_only=True)
    assert sorted(got) == sorted(PROJECTOR) and all(torch.equal(got[name], want[name]) for name in got)
    with pytest.raises(ValueError, match=r"expected weights named model.mm_projector.\*, found none"):
        script("extract_mm_projector.py", "--model-path", str(base), "--output", "out/none.bin")
