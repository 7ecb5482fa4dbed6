"""Memory of Hugging Face models from configs and data alone, beside what a batch really needs."""

import json
import re

import pytest
import torch
from transformers.integrations import is_deepspeed_zero3_enabled

from dama.pairs import read_pairs
from llava.estimate.doctor import main as doctor
from llava.estimate.hub import count, hub_shape, looked_at, skeleton
from llava.estimate.preflight import preflight
from llava.train.arguments import parse_arguments
from tests.conftest import ROOT
from tests.models.test_training import PAIRS, mixed, saved, words_of
from tests.models.tiny_hub import FAMILIES, SUFFIX_FAMILIES

NOT_ESTIMATED = {"qwen3_5", "paligemma2"}
ESTIMATED = [name for name in {**FAMILIES, **SUFFIX_FAMILIES} if name not in NOT_ESTIMATED]


def page(capsys, *words):
    status = doctor([str(word) for word in words])
    return status, capsys.readouterr().out


@pytest.mark.parametrize("name", ESTIMATED)
def test_one_batch_needs_what_is_estimated(in_golden, tmp_path, capsys, name):
    """Without optimizer, the longest pairs of the golden set; images of their own sizes."""
    status, said = page(capsys, *words_of(tmp_path / "out", saved(tmp_path / "model", name)))
    used, estimated = re.search(r"([\d.]+) MiB at the peak without optimizer, estimated ([\d.]+) MiB", said).groups()
    assert float(estimated) == pytest.approx(float(used), rel=0.15)
    assert status == 0 and "loss 0.6931" in said and "micro-batches of up to 4 fit" in said


@pytest.mark.parametrize(
    "way",
    [
        ["--lora_enable", "True", "--lora_r", "4", "--freeze_mm_mlp_adapter", "True"],
        ["--gradient_checkpointing", "True"],
        ["--shared_prefix", "False"],
        ["--loss", "mdpo", "--corruption", "crop"],
    ],
    ids=["lora", "checkpointing", "rows", "two images"],
)
def test_other_ways_need_what_is_estimated(in_golden, tmp_path, capsys, way):
    said = page(capsys, *words_of(tmp_path / "out", saved(tmp_path / "model", "qwen2_5_vl"), *way))[1]
    used, estimated = re.search(r"([\d.]+) MiB at the peak without optimizer, estimated ([\d.]+) MiB", said).groups()
    assert float(estimated) == pytest.approx(float(used), rel=0.2)


@pytest.mark.parametrize("zero", [2, 3])
def test_a_model_is_counted_under_zero(in_golden, tmp_path, zero):
    """Its parts are not spread over ranks while they are counted; then training's loading spreads them again."""
    words = words_of(tmp_path / "out", saved(tmp_path / "model", "qwen2_5_vl"))
    alone = hub_shape(parse_arguments(words), read_pairs(PAIRS))
    skeleton.cache_clear()
    arguments = parse_arguments([*words, "--deepspeed", str(ROOT / "scripts" / f"zero{zero}.json")])
    assert hub_shape(arguments, read_pairs(PAIRS)) == alone
    assert is_deepspeed_zero3_enabled() == (zero == 3)


def test_pairs_of_any_form_are_measured(in_golden, tmp_path, capsys):
    words = words_of(tmp_path / "out", saved(tmp_path / "model", "qwen2_5_vl"))
    status, said = page(capsys, *words, "--data_path", mixed(tmp_path / "pairs.json"))
    assert status == 0 and "texts alone" in said and "square.png 64 x 64, wide.png 120 x 70" in said
    assert "forward and backward" in said


def test_parts_are_counted_once(in_golden, tmp_path):
    """The parts of the meta model add up to the parameters of the saved one."""
    folder = saved(tmp_path / "model", "qwen3_vl")
    shape = hub_shape(parse_arguments(words_of(tmp_path / "out", folder)), read_pairs(PAIRS))
    total = count(skeleton(str(folder)).parameters())
    assert abs(shape.parameters.total(shape.layers) + shape.tower_parameters - total) < shape.layers
    assert all(parameter.device == torch.device("meta") for parameter in skeleton(str(folder)).parameters())


@pytest.mark.parametrize(
    ("name", "flags", "reason"),
    [
        ("qwen3_5", [], "layers of linear_attention, whose activations are not counted"),
        ("paligemma2", [], "attention with a soft cap, whose activations are not counted"),
        ("llava", ["--freeze_vision", "False"], "a vision encoder that is trained"),
    ],
)
def test_what_is_not_counted_is_said(in_golden, tmp_path, capsys, name, flags, reason):
    assert reason in page(capsys, *words_of(tmp_path / "out", saved(tmp_path / "model", name), *flags))[1]


def without_template(folder):
    (folder / "chat_template.jinja").unlink()


def with_adapter_alone(folder):
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(folder.parent / "base")}))
    saved(folder.parent / "base", "qwen2_5_vl")


@pytest.mark.parametrize(
    ("spoil", "flags", "message"),
    [
        (without_template, [], "model: chat template: expected one in the checkpoint's processor, got none"),
        (with_adapter_alone, [], "model: --model_name_or_path .* expected a full model, got an adapter of"),
        (None, ["--processor_option", "foo=3"], "model: --processor_option foo=3: expected a setting"),
        (None, ["--lora_enable", "True", "--lora_r", "0"], "--lora_r: expected 1 or more, got 0"),
    ],
    ids=["template", "adapter", "option", "rank"],
)
def test_what_would_stop_a_training_is_listed(in_golden, tmp_path, capsys, spoil, flags, message):
    folder = saved(tmp_path / "model", "qwen2_5_vl")
    if spoil:
        spoil(folder)
    status, said = page(capsys, *words_of(tmp_path / "out", folder), *flags)
    assert status == 1 and re.search(message, said.partition("missing")[2]), said


def test_a_training_takes_the_micro_batch_that_fits(in_golden, tmp_path, monkeypatch):
    """Of 4 pairs at a time, in the memory that 2 need."""
    words = words_of(tmp_path / "out", saved(tmp_path / "model", "internvl"), "--auto_micro_batch", "True")
    arguments, pairs = parse_arguments(words), read_pairs(PAIRS)
    monkeypatch.setattr("llava.estimate.machine.host_memory", lambda: int(3.2 * 2**20))
    preflight(arguments, pairs)
    args = arguments[2]
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (2, 2)


def test_a_model_that_cannot_be_counted_trains_all_the_same(in_golden, tmp_path, monkeypatch, capsys):
    """Its config has other fields than those of the models that are known."""
    arguments = parse_arguments(words_of(tmp_path / "out", saved(tmp_path / "model", "llava")))
    monkeypatch.setattr("llava.estimate.hub.parts_of", lambda *_: {}["layers"])
    preflight(arguments, read_pairs(PAIRS))
    assert "not estimated: the sizes of this model are not known (KeyError: 'layers')" in capsys.readouterr().out


def test_the_pairs_that_are_looked_at_are_the_same_again():
    pairs = read_pairs("tests/golden/" + PAIRS) * 40
    numbered = [pair.__class__(**{**fields(pair), "id": str(number)}) for number, pair in enumerate(pairs)]
    once, again = looked_at(numbered), looked_at(numbered)
    assert [pair.id for pair in once] == [pair.id for pair in again] and 64 < len(once) <= 128


def fields(pair):
    return {name: getattr(pair, name) for name in pair.__dataclass_fields__}
