"""Supervised fine-tuning against the original's numbers: rows, batches, losses, samplers, parameter groups, tokens."""

import json
import random
from types import SimpleNamespace

import pytest
import torch

from llava.model.builder import load_llava
from llava.tokenization import load_tokenizer
from llava.train import llava_trainer
from llava.train.llava_trainer import LLaVATrainer
from llava.train.setup_model import find_all_linear_names, setup_model
from llava.train.sft_data import make_supervised_data_module
from tests.conftest import GOLDEN
from tests.llava.tiny import arguments

EXTRAS = json.loads((GOLDEN / "k_extras.json").read_text())
SFT = EXTRAS["sft"]
SAMPLERS = EXTRAS["samplers"]


def data_of(parsed, model, tokenizer, processor):
    settings = SimpleNamespace(
        data_path=parsed[1].data_path, image_folder=parsed[1].image_folder, is_multimodal=True,
        image_processor=processor, image_aspect_ratio=model.config.image_aspect_ratio, mm_use_im_start_end=False,
    )  # fmt: skip
    return make_supervised_data_module(tokenizer, settings)


def test_rows_and_batches(in_golden, tmp_path):
    parsed = arguments(tmp_path, "--model_max_length", "2048")
    model, tokenizer, processor = setup_model(parsed)
    module = data_of(parsed, model, tokenizer, processor)
    dataset, collate = module["train_dataset"], module["data_collator"]
    assert (dataset.lengths, dataset.modality_lengths) == (SFT["lengths"], SFT["modality_lengths"])
    for i, row in enumerate(SFT["items"]):
        assert dataset[i]["input_ids"].tolist() == row["input_ids"]
        assert dataset[i]["labels"].tolist() == row["labels"]
        assert list(dataset[i]["image"].shape) == row["image"]
    assert not dataset[1]["image"].any()  # a row of text only carries zeros
    batch = collate([dataset[i] for i in range(3)])
    assert {k: list(v.shape) for k, v in batch.items()} == SFT["collated_0_1_2"]
    tokenizer.model_max_length = 40
    batch = collate([dataset[i] for i in range(3)])
    assert {k: list(v.shape) for k, v in batch.items()} == SFT["collated_maxlen40"]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("losses_pad_full_finetune", ["--image_aspect_ratio", "pad"]),
        ("losses_square_full_finetune", ["--image_aspect_ratio", "square"]),
        ("losses_pad_tune_mm_mlp_adapter", ["--image_aspect_ratio", "pad", "--tune_mm_mlp_adapter", "True"]),
    ],
)
def test_ten_steps(in_golden, tmp_path, name, flags):
    parsed = arguments(tmp_path, *flags)
    model, tokenizer, processor = setup_model(parsed)
    module = data_of(parsed, model, tokenizer, processor)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    model.train()
    for step, expected in enumerate(SFT[name]):
        rows = (0, 1, 2) if step % 2 == 0 else (3, 4, 5)
        loss = model(**module["data_collator"]([module["train_dataset"][i] for i in rows])).loss
        assert loss.item() == pytest.approx(expected, abs=1e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize("case", SAMPLERS["split_to_even_chunks"], ids=str)
def test_split_to_even_chunks(case):
    assert llava_trainer.split_to_even_chunks(case["indices"], case["lengths"], case["n"]) == case["out"]


@pytest.mark.parametrize("chunks", [1, 2, 7, 16])
@pytest.mark.parametrize("largest", [0, 1, 3, 1000])
def test_every_row_goes_to_the_first_of_the_lightest_chunks(chunks, largest):
    """Searched for among all chunks, with many ties where lengths are few; text-only rows are negative."""
    draw = random.Random(chunks * largest)
    indices = draw.sample(range(chunks * 9), chunks * 9)
    lengths = [draw.randint(-1, largest) for _ in indices]
    expected = [[] for _ in range(chunks)]
    for index in indices:
        open_chunks = [k for k in range(chunks) if len(expected[k]) < 9]
        lightest = min(open_chunks, key=lambda k: sum(lengths[i] for i in expected[k]))
        expected[lightest].append(index)
    assert llava_trainer.split_to_even_chunks(indices, lengths, chunks) == expected


@pytest.mark.parametrize("case", [name for name in SAMPLERS if "|" in name])
def test_samplers_by_seed(case):
    name, *options, batch, world = case.split("|")
    sizes = int(batch[2:]), int(world[2:])
    lengths = SAMPLERS["mixed_lengths"] if "modality" in case else SAMPLERS["lengths"]
    generator = None
    if "generator_seed1" in case:
        generator = torch.Generator().manual_seed(1)
    if "single_modality_negative" in case:
        lengths = [-abs(length) for length in SAMPLERS["lengths"]]
    torch.manual_seed(0)
    if name == "LengthGroupedSampler":
        got = list(llava_trainer.LengthGroupedSampler(*sizes, lengths=lengths, group_by_modality=True))
    else:
        got = getattr(llava_trainer, name)(lengths, *sizes, generator=generator)
    assert got == SAMPLERS[case]


@pytest.mark.parametrize(("case", "flags"), [("default", []), ("mm_projector_lr_2e-3", ["--mm_projector_lr", "2e-3"])])
def test_parameter_groups(in_golden, tmp_path, case, flags):
    parsed = arguments(tmp_path, "--weight_decay", "0.1", *flags)
    parsed[2].learning_rate = 2e-5
    model, tokenizer, processor = setup_model(parsed)
    trainer = LLaVATrainer(model=model, args=parsed[2], **data_of(parsed, model, tokenizer, processor))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = [
        {"lr": g["lr"], "weight_decay": g["weight_decay"], "names": [names[id(p)] for p in g["params"]]}
        for g in trainer.create_optimizer().param_groups
    ]
    assert groups == EXTRAS["create_optimizer"][case]


def test_linear_layers_for_lora(in_golden, tmp_path):
    model, _, _ = setup_model(arguments(tmp_path))
    assert find_all_linear_names(model) == EXTRAS["find_all_linear_names_sorted_vision_tower_loaded"]


@pytest.mark.parametrize("case", list(EXTRAS["initialize_vision_tokenizer"]))
def test_image_tokens(in_golden, case):
    patch, start_end = (part.split("=")[1] == "True" for part in case.split(","))
    expected = EXTRAS["initialize_vision_tokenizer"][case]
    model, tokenizer = load_llava("llava-v1.5-tiny", dtype=torch.float32), load_tokenizer("llava-v1.5-tiny")
    chosen = SimpleNamespace(mm_use_im_patch_token=patch, mm_use_im_start_end=start_end, tune_mm_mlp_adapter=False)
    before = len(tokenizer)
    model.initialize_vision_tokenizer(chosen, tokenizer)
    assert [before, len(tokenizer)] == expected["len_tokenizer"]
    table = model.get_input_embeddings().weight
    assert (len(table), len(model.lm_head.weight)) == (expected["embed_rows"], expected["lm_head_rows"])
    assert tokenizer.convert_tokens_to_ids(list(expected["new_ids"])) == list(expected["new_ids"].values())
    if start_end:
        torch.testing.assert_close(table[-1], table[:-2].mean(0))
