"""Pixels, patches, ids with image places and stop words against LLaVA's recorded values."""

import base64
import json
from io import BytesIO
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPImageProcessorPil

from llava.mm_utils import (
    KeywordsStoppingCriteria,
    divide_to_patches,
    expand2square,
    get_anyres_image_grid_shape,
    get_model_name_from_path,
    load_image_from_base64,
    parse_pinpoints,
    process_images,
    resize_and_pad_image,
    select_best_resolution,
    tokenizer_image_token,
)
from llava.tokenization import load_tokenizer

pytestmark = pytest.mark.fast

FOLDER = Path(__file__).parents[1] / "golden"
IMAGES = json.loads((FOLDER / "b_images.json").read_text())
TOKENS = json.loads((FOLDER / "b_tokenizer_image_token.json").read_text())
MISC = json.loads((FOLDER / "b_misc.json").read_text())
PINPOINTS = IMAGES["image_grid_pinpoints"]
PROMPT_IDS = [1, 312, 307, 957, 342, 934, 316, 957]  # USER: hi ASSISTANT:


def picture(name):
    return Image.open(FOLDER / f"images/{name}.png").convert("RGB")


def channel_sums(image):
    return np.asarray(image).astype(int).sum((0, 1)).tolist()


@pytest.fixture(scope="module")
def processor():
    return CLIPImageProcessorPil.from_pretrained(FOLDER / "clip-vit-tiny-patch14-56")


@pytest.fixture(scope="module")
def tensors():
    return load_file(FOLDER / "b_images.safetensors")


@pytest.fixture
def tokenizer():
    return load_tokenizer(FOLDER / "llava-v1.5-tiny")


@pytest.fixture
def legacy_tokenizer():
    return load_tokenizer(FOLDER / "tokenizer-legacy")


def config_of(mode):
    fields = {} if mode == "none" else {"image_aspect_ratio": mode, "image_grid_pinpoints": PINPOINTS}
    return SimpleNamespace(**fields)


@pytest.mark.parametrize("key", [key for key in IMAGES["process_images"] if not key.endswith("batch3")])
def test_pixels(key, processor, tensors):
    """Same arithmetic in the same order on the same PIL resampling: equal to the last bit."""
    mode, name = key.split("|")
    expected = IMAGES["process_images"][key]
    pixels = process_images([picture(name)], processor, config_of(mode))
    assert list(pixels.shape) == expected["shape"]
    flat = pixels.flatten()
    assert flat[:4].tolist() + flat[-4:].tolist() == expected["first4"] + expected["last4"]
    last_crop = pixels.reshape(-1, 3, 56, 56)[-1]
    for place, value in expected["pixels"].items():
        channel, row, column = (int(n) for n in place.replace("c", "").replace("y", " ").replace("x", " ").split())
        assert last_crop[channel, row, column].item() == value, place
    if key in tensors:
        assert torch.equal(pixels, tensors[key])


@pytest.mark.parametrize("mode", ["none", "square", "pad", "anyres"])
def test_a_batch_is_its_images_one_by_one(mode, processor):
    names = ["wide", "tall", "square"]
    batch = process_images([picture(name) for name in names], processor, config_of(mode))
    single = [process_images([picture(name)], processor, config_of(mode))[0] for name in names]
    assert all(torch.equal(a, b) for a, b in zip(batch, single))
    expected = IMAGES["process_images"][f"{mode}|batch3"]
    assert type(batch).__name__ == expected["type"]
    assert (list(batch.shape) if mode != "anyres" else [list(p.shape) for p in batch]) == expected["shape"]


@pytest.mark.parametrize("name", IMAGES["expand2square"])
def test_expand2square(name):
    image, expected = picture(name), IMAGES["expand2square"][name]
    square = expand2square(image, tuple(IMAGES["pad_background"]))
    assert list(square.size) == expected["size_wh"]
    assert (square is image) == expected["is_same_object"]
    assert channel_sums(square) == expected["channel_sums"]


def test_expand2square_wants_a_colour_of_the_images_mode():
    with pytest.raises(TypeError, match=IMAGES["expand2square_L_mode_error"]["message"]):
        expand2square(Image.new("L", (4, 2)), (1, 2, 3))


def test_resolutions_and_grids():
    """120 x 70 on 112 x 112: scale 112/120, 112 x 65 = 7280 pixels kept; 168 x 56 keeps 96 x 56 = 5376 only."""
    for case in IMAGES["select_best_resolution"]:
        assert list(select_best_resolution(tuple(case["size"]), parse_pinpoints(PINPOINTS))) == case["best"]
    for case in IMAGES["get_anyres_image_grid_shape"]:
        assert list(get_anyres_image_grid_shape(tuple(case["size"]), PINPOINTS, 56)) == case["grid"]


def test_resize_and_pad():
    for key, expected in IMAGES["resize_and_pad_image"].items():
        name, size = key.split("->")
        image = resize_and_pad_image(picture(name), tuple(json.loads(size.replace("(", "[").replace(")", "]"))))
        assert (list(image.size), channel_sums(image)) == (expected["size"], expected["sums"]), key


def test_patches_row_by_row():
    image = Image.new("RGB", (5, 4))
    image.putpixel((2, 0), (1, 0, 0))
    image.putpixel((0, 2), (3, 0, 0))
    patches = divide_to_patches(image, 2)
    assert [patch.size for patch in patches] == [(2, 2)] * 6  # three across (the last hangs over), two down
    assert [channel_sums(patch)[0] for patch in patches] == [0, 1, 0, 3, 0, 0]


def test_image_from_base64():
    buffer = BytesIO()
    picture("wide").save(buffer, format="PNG")
    assert channel_sums(load_image_from_base64(base64.b64encode(buffer.getvalue()))) == channel_sums(picture("wide"))


@pytest.mark.parametrize("case", TOKENS["cases"], ids=lambda case: repr(case["prompt"][-30:]))
def test_ids_with_image_places(case, tokenizer, legacy_tokenizer):
    assert tokenizer_image_token(case["prompt"], tokenizer) == case["ids"]
    assert tokenizer_image_token(case["prompt"], tokenizer, -7) == case["ids_custom_index_-7"]
    assert tokenizer_image_token(case["prompt"], legacy_tokenizer) == case["ids_legacy_true"]
    tensor = tokenizer_image_token(case["prompt"], tokenizer, return_tensors="pt")
    assert (str(tensor.dtype), tensor.tolist()) == (case["pt_dtype"], case["ids"])


def test_ids_without_bos(tokenizer):
    tokenizer.add_bos_token = False
    for case in TOKENS["add_bos_token_false"]:
        assert tokenizer_image_token(case["prompt"], tokenizer) == case["ids"]


def test_unsupported_tensors(tokenizer):
    with pytest.raises(ValueError, match=TOKENS["bad_return_tensors"]["message"]):
        tokenizer_image_token("Hello", tokenizer, return_tensors="np")


@pytest.mark.parametrize("case", MISC["get_model_name_from_path"], ids=lambda case: case["path"])
def test_model_name(case):
    """A lone "checkpoint-3" has no parent to be named after; LLaVA raised IndexError there."""
    expected = case["name"] if isinstance(case["name"], str) else "checkpoint-3"
    assert get_model_name_from_path(case["path"]) == expected


@pytest.mark.parametrize("case", MISC["KeywordsStoppingCriteria"], ids=lambda case: repr(case["keywords"]))
def test_stopping_at_keywords(case, tokenizer):
    criteria = KeywordsStoppingCriteria(case["keywords"], tokenizer, torch.tensor([PROMPT_IDS]))
    assert criteria.keyword_ids == case["keyword_ids"]
    assert criteria.max_keyword_len == case["max_keyword_len"]
    for call in [*case["calls"], case["batch2"], case["no_new_tokens"]]:
        assert criteria(torch.tensor(call["output_ids"]), None) is call["result"], call
