"""Several images in any place, texts alone, earlier turns and a system turn: packed rows against stock rows."""

from types import SimpleNamespace

import pytest
import torch

from dama.models.way import Way
from dama.pairs import pair_from_row
from dama.train.data import encode_pairs
from dama.train.family import ImageRef
from tests.models.packs import WEIGHTS, assert_same_gradients, family_of, gradients, logps_of, prepared, stock_logps
from tests.models.tiny_hub import FAMILIES

TURNS = [("system", "Be brief."), ("user", "<image>What?"), ("assistant", "A cat."), ("user", "Which color?")]
ROWS = [
    {  # TRL's message lists: two images, text between them
        "prompt": [
            {
                "role": "user",
                "content": [
                    {"type": "image", "text": None},
                    {"type": "text", "text": "First."},
                    {"type": "image", "text": None},
                    {"type": "text", "text": "What differs?"},
                ],
            }
        ],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "The sky."}]}],
        "rejected": [{"role": "assistant", "content": [{"type": "text", "text": "A dog that sleeps."}]}],
        "images": ["0.png", "2.png"],
    },
    {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "It is five.", "images": []},
    {
        "prompt": [{"role": role, "content": text} for role, text in TURNS],
        "chosen": "Gray, and white.",
        "rejected": "Red.",
        "image": "1.png",
    },
]
SHAPES = {"images and a question": 0, "texts alone": 1, "earlier turns": 2}


@pytest.fixture
def pairs():
    return [pair_from_row(row | {"id": name}) for name, row in zip(SHAPES, ROWS, strict=True)]


def compared(name, world, pairs):
    """Log-probs [2, B] and gradients, packed and by the stock model."""
    family = family_of(name, world)
    items = prepared(family, pairs)
    weights = WEIGHTS[:, : len(items)]
    packed = logps_of(family, items, world[1])
    expected, stock = stock_logps(name, world, items, family.views)
    found = gradients(family.module, (packed * weights).sum())
    return packed, expected, found, gradients(stock, (expected * weights).sum())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_mixed_pack_is_stock_rows(name, world, pairs):
    """Log-probs and every gradient, 1e-5 in fp32: two images in a pair, a pair of texts alone, a conversation."""
    packed, expected, found, wanted = compared(name, world, pairs)
    assert torch.allclose(packed, expected, atol=1e-4, rtol=1e-5)
    assert_same_gradients(found, wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_pack_of_texts_alone_gives_every_part_a_gradient(name, world, pairs):
    """As ZeRO-3 and reductions of gradients want: the vision encoder runs, and its gradients are zero, not absent."""
    packed, expected, found, wanted = compared(name, world, [pairs[1]])
    assert torch.allclose(packed, expected, atol=1e-4, rtol=1e-5)
    mixed = compared(name, world, pairs)[2]
    assert found.keys() == mixed.keys() > wanted.keys()
    for parameter, gradient in found.items():
        scale = max(float(g.abs().max()) for g in wanted.values())
        assert torch.allclose(gradient, wanted.get(parameter, torch.zeros(())), atol=1e-5 * scale, rtol=1e-4), parameter


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("name", ["qwen2_5_vl", "gemma3"])
def test_a_blank_image_is_behind_all_rows(name, world, pairs, shared):
    family = family_of(name, world, shared_prefix=shared)
    batch = family.collate(prepared(family, [pairs[1]]))["pairs"]
    assert batch.shown[-1] == 0 and set(batch.shown[:-1]) == {None}
    assert batch.answers.tokens.tolist() == [2, 12] and batch.answers.rows.max() == 1
    assert batch.real.flatten()[batch.blank] and not batch.real.flatten()[batch.blank + 1 :].any()
    with_image = family.collate(prepared(family, pairs))["pairs"]
    assert with_image.blank is None


def test_every_image_of_a_pair_is_corrupted(world, pairs):
    """mdpo: both images of the pair are cropped, and the same answer is read again behind them."""
    family = family_of("internvl", world, loss=["mdpo"])
    assert family.decided.way is Way.KERNEL
    items = prepared(family, [pairs[0]])
    own, _, cropped = items[0].images
    assert own.paths == cropped.paths == ("0.png", "2.png") and cropped.corruption == "crop"
    rows = family_of("internvl", world, loss=["mdpo"], shared_prefix=False)
    one, other = (logps_of(f, items, world[1]) for f in (family, rows))
    assert torch.allclose(one, other, atol=1e-4, rtol=1e-5) and (one[0] - one[2]).abs().min() > 1e-3


def test_the_place_of_an_image_counts(world, pairs):
    """The same images and texts in another order are another row."""
    family = family_of("qwen2_5_vl", world)
    first = ROWS[0] | {"prompt": [{"role": "user", "content": "<image><image>First.What differs?"}]}
    moved = pair_from_row(first | {"id": "x"})
    rows = [prepared(family, [pair])[0].rows[0].input_ids.tolist() for pair in (pairs[0], moved)]
    assert rows[0] != rows[1] and sorted(rows[0]) == sorted(rows[1])


def test_a_special_token_in_an_earlier_turn_is_refused_by_name(world):
    family = family_of("llava", world)
    turns = [{"role": "user", "content": "Hi <turn>"}, {"role": "assistant", "content": "Ho"}]
    row = {"prompt": [*turns, {"role": "user", "content": "So?"}], "chosen": "A", "rejected": "B", "images": []}
    with pytest.raises(ValueError, match="pair 7: its user's turn contains '<turn>', a special token of this model"):
        family.encode([pair_from_row(row | {"id": 7})], [(ImageRef(()),) * 2])


def test_a_system_turn_of_the_pair_takes_the_place_of_the_flag(world, pairs):
    family = family_of("llava", world)
    family.chat.system = "Say all."
    texts = [family.processor.tokenizer.decode(item.rows[0].input_ids) for item in prepared(family, pairs)]
    assert ["Say all." in text for text in texts] == [True, True, False] and "Be brief." in texts[2]


def test_a_family_of_single_images_refuses_by_name(pairs):
    data = SimpleNamespace(data_path="pairs.jsonl", on_long_pair="fail")
    with pytest.raises(ValueError, match=r"3 of 3 pairs are not one question about one image \(first: images and a"):
        encode_pairs(pairs, SimpleNamespace(), data, None)
