"""The memory estimate: each part on paper, saved tensors of a real layer to the byte, whole steps within 15 %."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import CLIPVisionConfig

from dama.shared_prefix import PackedGroup
from dama.train.data import PairValues, join_pairs, read_checked_pairs
from dama.train.throughput import PairLength
from llava.estimate.lengths import length_of, views_of
from llava.estimate.measure import TensorPeak
from llava.estimate.memory import (
    attention_bytes,
    bucket_bytes,
    estimate,
    estimate_step,
    gathered_bytes,
    gradient_bytes,
    image_bytes,
    layer_bytes,
    logit_bytes,
    optimizer_bytes,
    tokens_of,
    trained_parameters,
    weight_bytes,
)
from llava.estimate.sizes import HALF, LayerSizes, Load, ModelShape, Training, Zero
from llava.model.attention import SHARED_PREFIX, no_mask
from llava.model.language_model.llava_llama import LlavaConfig, LlavaLlamaForCausalLM
from llava.train.arguments import parse_arguments
from llava.train.dpo_trainer import LLaVA15DPOTrainer
from llava.train.family import LlavaFamily
from llava.train.setup_model import setup_model
from tests.llava.tiny import flags, prepare

ROOT = Path(__file__).resolve().parents[2]
SHAPE = ModelShape(
    layers=2, width=4, queries=4, keys=2, heads=2, intermediate=8, vocabulary=10,
    parameters=LayerSizes(40, 20, 150, 44),
    matrix=40, tower_parameters=100, tower_layers=3, tower_width=2, tower_intermediate=5, patches=6, pixels=12,
)  # fmt: skip
PAIR = PairLength.of(10, 3, 2)
ROW = PairLength.of(13)  # of fine-tuning
FULL = Training("full")


def deepspeed(stage, ranks=2, half=True, method="full", **zero):
    return Training(method, Zero(stage, **zero), ranks, half)


# --- On paper --------------------------------------------------------------------------------------------------------


def test_what_is_resident():
    """404 = 40 + 20 + 2 x 150 + 44 parameters train, 100 of the tower do not.

    fp32 without DeepSpeed: 504 x 4 bytes, and 404 x 8 for Adam. ZeRO-2 in bf16 on 2 ranks: 504 x 2, and 404 / 2 x 12.
    ZeRO-3 halves the weights as well, and gathers them; offloading leaves nothing.
    """
    assert (weight_bytes(SHAPE, FULL), optimizer_bytes(SHAPE, FULL)) == (2016, 3232)
    assert (weight_bytes(SHAPE, deepspeed(2)), optimizer_bytes(SHAPE, deepspeed(2))) == (1008, 2424)
    assert (weight_bytes(SHAPE, deepspeed(3)), optimizer_bytes(SHAPE, deepspeed(3))) == (504, 2424)
    assert (gathered_bytes(SHAPE, deepspeed(3)), gathered_bytes(SHAPE, deepspeed(3, max_live=7))) == (1008, 14)
    offloaded = deepspeed(3, offload_optimizer=True, offload_weights=True)
    assert (weight_bytes(SHAPE, offloaded), optimizer_bytes(SHAPE, offloaded)) == (0, 0)


def test_adapters_and_quantised_weights():
    """Rank 1: r (in + out) is 4+4 for queries and output, 4+2 for keys and values, 4+8 for each of three: 64 a layer.

    4 bits: 0.516 bytes for each of 2 x 150 weights of the layers; the other 204 stay fp32, as adapters do.
    """
    lora = Training("lora", lora_rank=1, half=True)
    assert trained_parameters(SHAPE, lora) == LayerSizes(0, 20, 64, 0)
    assert weight_bytes(SHAPE, lora) == 504 * 2 + 128 * 4
    assert weight_bytes(SHAPE, Training("lora", lora_rank=1, half=True, bits=4)) == 204 * 4 + 154 + 128 * 4
    assert trained_parameters(SHAPE, Training("projector")) == LayerSizes(0, 20, 0, 0)
    assert trained_parameters(SHAPE, Training("head", trains_projector=False)) == LayerSizes(0, 0, 0, 40)


def test_gradients():
    """404 gradients: all of them in fp32; in bf16 from ZeRO-2 on a rank's half.

    Buckets of D^2 = 16 numbers, two where they overlap the backward pass.
    """
    assert (gradient_bytes(SHAPE, FULL), gradient_bytes(SHAPE, deepspeed(1))) == (1616, 808)
    assert gradient_bytes(SHAPE, deepspeed(2)) == gradient_bytes(SHAPE, deepspeed(3)) == 404
    assert bucket_bytes(SHAPE, deepspeed(2, bucket=None)) == 32
    assert bucket_bytes(SHAPE, deepspeed(2, bucket=5, overlaps=True)) == 20


def test_positions_and_attention():
    """10 + 3 + 2 = 15 positions packed; padded, two rows of 13, in fine-tuning one.

    Packed, in fp32: queries and output 2 x 15 x 4, keys and values 2 x 2 x (13 + 12), sums 15 x 2, a mask 2 x 12, and
    outputs joined 15 x 4, of 4 bytes each.
    """
    padded = Training("full", shared_prefix=False)
    tuning = Training("full", shared_prefix=False, logp_chunk=None)
    assert [tokens_of(run, [PAIR]) for run in (FULL, padded)] == [15, 26] and tokens_of(tuning, [ROW]) == 13
    assert attention_bytes(SHAPE, FULL, [PAIR]) == 4 * (120 + 100 + 30 + 24 + 60)
    assert attention_bytes(SHAPE, Training("full", varlen=True, half=True), [PAIR]) == 2 * (120 + 100) + 4 * 30


MDPO = PairLength((PackedGroup(10, (3, 2)), PackedGroup(10, (3,))))
SYMMPO = PairLength((PackedGroup(10, (3, 2, 4)), PackedGroup(10, (3, 4))))


def test_views_on_two_images():
    """The objective mDPO reads the chosen answer once more, with another image: 15 + 13 tokens packed.

    3 rows of 13 padded. Packed, keys and values for 2 x 2 x (13 + 12 + 13), a mask of 2 x 12 for the rejected answer
    alone. SymMPO: 19 + 17 tokens, 5 rows of 14, masks for the rejected answer and twice for the second: 2 x 12 and
    2 x 4 x 14.
    """
    padded = Training("full", shared_prefix=False)
    assert [tokens_of(run, [MDPO]) for run in (FULL, padded)] == [28, 39]
    assert [tokens_of(run, [SYMMPO]) for run in (FULL, padded)] == [36, 70]
    assert attention_bytes(SHAPE, FULL, [MDPO]) == 4 * (28 * 8 + 2 * 2 * 38 + 28 * 2 + 24 + 28 * 4)
    masks = 2 * 12 + 2 * 4 * 14
    assert attention_bytes(SHAPE, FULL, [SYMMPO]) == 4 * (36 * 8 + 2 * 2 * (36 + 30) + 36 * 2 + masks + 36 * 4)
    assert logit_bytes(SHAPE, FULL, [MDPO]) == (320, 320)  # 3 + 2 + 3 tokens
    one, two = (estimate(SHAPE, FULL, [pair]).phases["images"] for pair in (PAIR, MDPO))
    assert two - one == image_bytes(SHAPE, FULL, 1)


def test_logits_are_bounded_by_the_chunk():
    """5 answer positions x 10 tokens x 4 bytes and as much for their gradient; of 2 positions 80.

    In half precision 2 bytes are kept, and 4 + 4 needed. Fine-tuning: 13 positions x 10 x 4, and two more.
    """
    assert logit_bytes(SHAPE, FULL, [PAIR]) == (200, 200)
    assert logit_bytes(SHAPE, Training("full", logp_chunk=2), [PAIR]) == (80, 80)
    assert logit_bytes(SHAPE, deepspeed(2), [PAIR]) == (100, 400)
    assert logit_bytes(SHAPE, Training("full", shared_prefix=False, logp_chunk=None), [ROW]) == (520, 1040)


def test_pictures():
    """3 + 1 hidden states of width 2 and an MLP of 2 x 5, at 6 + 1 positions of 4 bytes; never more than 32 at once."""
    assert image_bytes(SHAPE, FULL, 1) == 7 * 4 * (4 * 2 + 2 * 5)
    assert image_bytes(SHAPE, FULL, 100) == 32 * image_bytes(SHAPE, FULL, 1)


@pytest.mark.parametrize(
    ("layout", "more", "load"),
    [
        ((16, 1), [], Load(16, False)),  # one pass over all 16, selected or not
        ((8, 2), [], Load(6, True)),  # R first; the 12 selected are 2 x 6
        ((4, 4), [], Load(4, True)),  # 3 x 4
        ((12, 2), [], Load(9, True)),  # 18 of 24
        ((8, 2), ["--strategy", "none"], Load(8, True)),  # nothing is selected
        ((8, 2), ["--variant", "released"], Load(8, True)),
        ((16, 1), ["--lora_enable", "True"], Load(12, False)),  # dropout: R without it first
    ],
)
def test_pairs_of_a_backward_pass(in_golden, tmp_path, layout, more, load):
    args = parse_arguments(flags(tmp_path, "--variant", "paper", *more))[2]
    assert Load.of(args, 1, *layout) == load


def test_checkpointing_and_selection_lower_the_peak():
    checkpointed = Training("full", checkpointing=True)
    long = [PairLength.of(1000, 300, 200)]
    assert estimate(SHAPE, checkpointed, long).activations < estimate(SHAPE, FULL, long).activations / 2
    assert estimate(SHAPE, FULL, long * 2).peak > estimate(SHAPE, FULL, long).peak


@pytest.mark.parametrize(
    ("file", "zero"),
    [
        ("zero2.json", Zero(2, None, True)),
        ("zero3.json", Zero(3, None, True)),
        ("zero3_offload.json", Zero(3, None, True, offload_optimizer=True, offload_weights=True)),
    ],
)
def test_deepspeeds_files(file, zero):
    assert Zero.read(ROOT / "scripts" / file) == zero


# --- Against real tensors --------------------------------------------------------------------------------------------


def golden_configs(folder):
    return LlavaConfig.from_pretrained(folder / "llava-v1.5-tiny"), CLIPVisionConfig.from_pretrained(
        folder / "clip-vit-tiny-patch14-56"
    )


def test_parameters_are_counted_without_weights_or_random_numbers(in_golden, tmp_path):
    state = torch.get_rng_state()
    shape = ModelShape.of(*golden_configs(in_golden))
    assert torch.equal(state, torch.get_rng_state())
    model = prepare(parse_arguments(flags(tmp_path)))[0]
    tower = sum(p.numel() for p in model.get_vision_tower().parameters())
    assert shape.tower_parameters == tower
    assert shape.parameters.total(shape.layers) + tower == sum(p.numel() for p in model.parameters())


def saved_by_layer(config, run, pairs):
    """Bytes of the distinct tensors that a decoder layer keeps for its backward pass, weights left out."""
    from dama.shared_prefix import PackLayout

    model = LlavaLlamaForCausalLM(config).model
    layer = (
        model.layers[0].to(torch.bfloat16 if run.weight == HALF else torch.float32).requires_grad_(run.method == "full")
    )
    pack = PackLayout.of([group for pair in pairs for group in pair.groups])
    x = torch.randn(1, pack.positions, config.hidden_size, dtype=next(layer.parameters()).dtype, requires_grad=True)
    cosines = model.rotary_emb(x, position_ids=pack.position_ids())
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        _output = layer(x, attention_mask=no_mask(x.device), position_embeddings=cosines, pack=pack)
    elsewhere = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *cosines]}
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in elsewhere)


@pytest.mark.parametrize("method", ["full", "projector"])
@pytest.mark.parametrize("keys", [4, 2], ids=["heads", "grouped heads"])
@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_a_layers_saved_tensors(in_golden, method, keys, half):
    """Formula and autograd agree to 1 %: what is left are indices and numbers per position."""
    config, tower = golden_configs(in_golden)
    config = copy.deepcopy(config)
    config.num_key_value_heads, config._attn_implementation = keys, SHARED_PREFIX
    run = Training(method, Zero() if half else None, half=half)
    pairs = [PairLength.of(50, 20, 30), PairLength.of(40, 25, 9)]
    assert layer_bytes(ModelShape.of(config, tower), run, pairs) == pytest.approx(
        saved_by_layer(config, run, pairs), rel=0.01
    )


WAYS = {
    "full": [],
    "full, checkpointing": ["--gradient_checkpointing", "True"],
    "full, padded rows": ["--shared_prefix", "False"],
    "full, two micro-batches": ["--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "2"],
    "full, chunked logits": ["--logp_chunk", "16"],
    "LoRA": ["--lora_enable", "True", "--lora_r", "8"],
    "LoRA, checkpointing": ["--lora_enable", "True", "--lora_r", "8", "--gradient_checkpointing", "True"],
    "projector": ["--tune_mm_mlp_adapter", "True"],
}
VIEWS = {
    "mdpo": ["--loss", "mdpo", "--corruption", "blank"],
    "mdpo, padded rows": ["--loss", "mdpo", "--corruption", "blank", "--shared_prefix", "False"],
    "mdpo, checkpointing": ["--loss", "mdpo", "--gradient_checkpointing", "True"],
    "symmpo": ["--loss", "symmpo", "--corruption", "other_image"],
    "symmpo, LoRA": ["--loss", "symmpo", "--corruption", "other_image", *WAYS["LoRA"]],
}


def prepare_views(arguments):
    """`prepare` for more views than the file has log-probs of: a reference of zeros, and second answers."""
    pairs = [replace(pair, second=f"It is {pair.rejected}") for pair in read_checked_pairs(arguments[1])[0]]
    model, tokenizer, _ = setup_model(arguments)
    family = LlavaFamily.of(arguments, model, tokenizer)
    reference = PairValues([(0.0,) * len(family.views)] * len(pairs), {})
    data = join_pairs(pairs, PairValues([0.0] * len(pairs), {}), reference, family, *arguments[1:])
    return model, tokenizer, data


@pytest.mark.parametrize("way", [*WAYS, *VIEWS])
def test_a_real_steps_peak_is_estimated_within_15_percent(in_golden, tmp_path, way):
    words = ["--variant", "paper", "--max_steps", "4", "--save_strategy", "no", *(WAYS | VIEWS)[way]]
    words += ["--check_reference", "False"] if way in VIEWS else []
    arguments = parse_arguments(flags(tmp_path, *words))
    args = arguments[2]
    model, tokenizer, data = (prepare_views if way in VIEWS else prepare)(arguments)
    trainer = LLaVA15DPOTrainer(model, tokenizer, args, train_dataset=data.train, delta_bar=data.delta_bar)
    with TensorPeak(args.device, [*model.parameters(), *model.buffers()]) as needed:
        trainer.train()
    lengths = [length_of(pair, trainer.family.image_tokens, views_of(args)) for pair in data.train.prepared]
    layout = args.per_device_train_batch_size, args.gradient_accumulation_steps
    estimated = estimate_step(arguments, ModelShape.of(*golden_configs(in_golden)), lengths, 1, False, layout)
    assert estimated.peak == pytest.approx(needed.peak, rel=0.15)


def test_tensor_peak_on_paper():
    """1000 numbers are there; 2000 more come, then 3000, and the 2000 go before 1000 come: 4 x (1000 + 2000 + 3000)."""
    there = torch.zeros(1000)
    with TensorPeak(torch.device("cpu"), [there, there[:10]]) as used:
        a = torch.ones(2000)
        _b = torch.ones(3000)
        del a
        _c = torch.ones(1000)
    assert used.peak == 4 * 6000


def test_estimates_are_plain_numbers():
    figures = estimate(SHAPE, FULL, [PAIR])
    assert json.loads(json.dumps(figures.phases)) == figures.phases and figures.peak == figures.phases[figures.highest]
