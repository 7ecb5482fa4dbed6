"""Pairs packed through each family's unmodified model against two rows through its own stock forward pass."""

import pytest
import torch
from transformers.masking_utils import find_packed_sequence_indices

from dama.models.batch import PairCollator
from dama.models.family import HubFamily, install, set_decoder_attention
from dama.models.way import Way, way_of
from dama.pairs import PreferencePair
from dama.train.family import ImageRef
from tests.models.packs import (
    WEIGHTS,
    arguments,
    assert_same_gradients,
    family_of,
    gradients,
    logps_of,
    prepared,
    stock_logps,
)
from tests.models.tiny_hub import FAMILIES, build


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_two_stock_rows(name, world):
    """Log-probs and every gradient, 1e-5 in fp32, with three pairs and images of three sizes in a pack."""
    family = family_of(name, world)
    items = prepared(family, world[0])
    packed = logps_of(family, items, world[1])
    expected, stock = stock_logps(name, world, items, family.views)
    assert torch.allclose(packed, expected, atol=1e-4, rtol=1e-5)
    found = gradients(family.module, (packed * WEIGHTS).sum())
    wanted = gradients(stock, (expected * WEIGHTS).sum())
    assert_same_gradients(found, wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_stock_attention_on_the_packed_row_is_wrong(name, world):
    """The comparison can fail: with the model's own attention the rejected answers see the chosen ones."""
    family = family_of(name, world)
    items = prepared(family, world[0])
    packed = logps_of(family, items, world[1])
    if family.decided.way is Way.ROWS:  # forced into a pack, a state flows on from the chosen answer
        install(family.model, Way.KERNEL)
        family.collate = PairCollator(Way.KERNEL, family.views)
    set_decoder_attention(family.model, "sdpa")
    assert (logps_of(family, items, world[1]) - packed).abs().max() > 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_the_supervised_tokens_are_the_answer_and_its_end(name, world):
    family = family_of(name, world)
    for item in prepared(family, world[0]):
        for row, answer in zip(item.rows, (item.pair.chosen, item.pair.rejected)):
            kept = row.labels[row.labels != -100]
            assert family.processor.tokenizer.decode(kept) == f"{answer}<turn>"


WAYS = dict.fromkeys(FAMILIES, Way.KERNEL) | {"gemma3": Way.MASK, "qwen3_5": Way.ROWS}


@pytest.mark.parametrize("name", FAMILIES)
def test_the_way_is_decided_by_the_config(name):
    model, _ = build(name)
    assert way_of(model).way == WAYS[name]
    assert str(way_of(model, shared_prefix=False)) == "one row per answer (--shared_prefix False)"


def test_a_window_that_is_used_needs_a_mask():
    model, _ = build("mistral3")
    model.config.text_config.sliding_window = 24
    assert str(way_of(model)) == "shared prefix by a dense mask (attention windows of 24 tokens)"


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "internvl"])
def test_rows_of_their_own_are_stock_rows(name, world):
    """--shared_prefix False through the same family."""
    family = family_of(name, world, shared_prefix=False)
    items = prepared(family, world[0])
    expected, _ = stock_logps(name, world, items, family.views)
    assert torch.allclose(logps_of(family, items, world[1]), expected, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3", "idefics3"])
def test_an_objective_on_two_images_packs_two_groups(name, world):
    """mdpo: the same answer on a cropped image is a group of its own; log-probs are those of rows of their own."""
    packed, rows = (family_of(name, world, loss=["mdpo"], shared_prefix=shared) for shared in (True, False))
    items = prepared(packed, world[0])
    one, other = (logps_of(family, items, world[1]) for family in (packed, rows))
    assert one.shape == (3, 3) and torch.allclose(one, other, atol=1e-4, rtol=1e-5)
    assert (one[0] - one[2]).abs().min() > 1e-3  # the crop matters


def test_positions_that_start_again_do_not_cut_answers_off(world):
    """Attention takes a row whose positions start again for packed sequences, unless its mask is another's."""
    family = family_of("llava", world)
    batch = family.collate(prepared(family, world[0]))["pairs"]
    positions = batch.position_ids
    assert (positions.diff() < 0).any() and find_packed_sequence_indices(positions) is not None


@pytest.mark.parametrize("text", ["a <image> b", "stop</s>", "<turn>"])
def test_a_special_token_in_a_text_is_refused_by_name(world, text):
    family = family_of("qwen2_5_vl", world)
    pair = PreferencePair("7", "0.png", "What?", text, "No.")
    with pytest.raises(ValueError, match="pair 7: its chosen contains '.*', a special token of this model"):
        family.encode([pair], [(ImageRef(("0.png",)),) * 2])


def test_a_processor_without_template_is_refused(world):
    model, processor = build("llava")
    processor.chat_template = None
    with pytest.raises(ValueError, match="chat template: expected one in the checkpoint's processor, got none"):
        HubFamily(model, processor, arguments())


def test_a_system_prompt_comes_first(world):
    plain = family_of("llava", world)
    model, processor = build("llava")
    family = HubFamily(model, processor, arguments(), image_folder=[str(world[1])], system="Be brief.")
    row, without = (prepared(f, world[0])[0].rows[0].input_ids for f in (family, plain))
    text = processor.tokenizer.decode(row)
    assert text.startswith("<s>system: Be brief.") or text.startswith("system: Be brief.")
    assert len(row) > len(without)
