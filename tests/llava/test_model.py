"""The model against the original's numbers on the golden checkpoint: splicing, forward, gradients, generation."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from llava.mm_utils import process_images
from llava.model.builder import load_pretrained_model
from llava.model.splice import assemble_crops, assign_images, unpad_image
from tests.conftest import GOLDEN

pytestmark = pytest.mark.fast

PREPARED = load_file(GOLDEN / "d_prepare_inputs.safetensors")
FORWARD = load_file(GOLDEN / "e_forward.safetensors")
EXPECTED = json.loads((GOLDEN / "e_forward_generate.json").read_text())
# Attention kernels differ in the last bits between library versions: hidden states agree to 2e-5.
CLOSE = {"atol": 2e-5, "rtol": 1e-5}
# The frozen vision tower has no gradient, and is recorded so.
TRAINED = {name: norm for name, norm in EXPECTED["grad"]["norms"].items() if norm}


@pytest.fixture()
def model(in_golden):
    return load_pretrained_model("llava-v1.5-tiny", None, "llava-v1.5-tiny", device="cpu", dtype=torch.float32)[1]


@pytest.fixture()
def batch():
    return {name: PREPARED[name] for name in ("input_ids", "attention_mask", "labels", "images")}


def prepare(model, batch, position_ids=None, **changes):
    given = batch | changes
    names = ("ids", "position_ids", "attention_mask", "past", "inputs_embeds", "labels")
    with torch.no_grad():
        outputs = model.prepare_inputs_labels_for_multimodal(
            given["input_ids"], position_ids, given["attention_mask"], None, given["labels"], given["images"]
        )
    return dict(zip(names, outputs))


def assert_case(got, case):
    for name in ("inputs_embeds", "labels", "attention_mask", "position_ids"):
        if f"{case}.{name}" in PREPARED:
            torch.testing.assert_close(got[name], PREPARED[f"{case}.{name}"], **CLOSE)


def test_vision_tower_and_projector(model, batch):
    torch.testing.assert_close(model.get_vision_tower()(batch["images"]), PREPARED["vision_tower_out"], **CLOSE)
    with torch.no_grad():
        features = model.encode_images(batch["images"])
    torch.testing.assert_close(features, PREPARED["encode_images"], **CLOSE)
    tower = model.get_vision_tower()
    assert (tower.hidden_size, tower.num_patches, tower.num_patches_per_side, tower.tokens_per_image) == (32, 16, 4, 16)
    assert [tuple(f.shape) for f in tower([batch["images"][0]])] == [(1, 16, 32)]


def test_prepare_with_and_without_mask(model, batch):
    assert_case(prepare(model, batch), "A")
    assert_case(prepare(model, batch, attention_mask=None), "B")


def test_prepare_gives_back_what_it_got(model, batch):
    position_ids = torch.zeros_like(batch["input_ids"])
    assert_case(prepare(model, batch, position_ids=position_ids), "C")
    assert prepare(model, batch, labels=None)["labels"] is None
    assert prepare(model, batch, attention_mask=batch["attention_mask"].long())["attention_mask"].dtype == torch.int64


@pytest.mark.parametrize("length", [64, 40])
def test_prepare_truncates(model, batch, length):
    model.config.tokenizer_model_max_length = length
    assert_case(prepare(model, batch, position_ids=torch.zeros_like(batch["input_ids"])), f"E{length}")


def test_prepare_pads_left(model, batch):
    model.config.tokenizer_padding_side = "left"
    assert_case(prepare(model, batch, position_ids=torch.zeros_like(batch["input_ids"])), "F")


def test_images_as_list_and_as_crops(model, batch):
    assert_case(prepare(model, batch, images=list(batch["images"])), "A")
    row = {name: batch[name][:1, :55] for name in ("input_ids", "labels")} | {"attention_mask": None}
    crops = batch["images"][[0, 3]]
    assert_case(prepare(model, row | {"images": [crops]}), "G2")
    assert_case(prepare(model, row | {"images": crops[None]}), "G2")


def test_without_images_the_input_passes_through(model, batch):
    got = prepare(model, batch, images=None)
    assert got["ids"] is batch["input_ids"] and got["inputs_embeds"] is None
    one = prepare(model, batch, input_ids=batch["input_ids"][:, :1])
    assert one["inputs_embeds"] is None


def test_text_only_rows_need_no_dummy_image(model, batch):
    """The original consumes one image for the text-only row; here the unused one may be given or not."""
    without_dummy = torch.cat([batch["images"][:2], batch["images"][3:]])
    assert_case(prepare(model, batch, images=without_dummy), "A")


@pytest.mark.parametrize("count", [3, 7])
def test_image_count_that_fits_nothing_is_refused(model, batch, count):
    images = batch["images"][:1].expand(count, -1, -1, -1)
    with pytest.raises(ValueError, match=rf"images: expected 4 .* got {count}\. Give as many images"):
        prepare(model, batch, images=images)


def test_rows_share_one_encoding(model, batch):
    ids, labels = (batch[name][:1, :55].repeat(2, 1) for name in ("input_ids", "labels"))
    args = (ids, None, None, None, labels)
    with torch.no_grad():
        twice = model.prepare_inputs_labels_for_multimodal(*args, batch["images"][:1].repeat(2, 1, 1, 1))
        shared = model.prepare_inputs_labels_for_multimodal(
            *args, batch["images"][:1], image_index=torch.tensor([0, 0])
        )
    torch.testing.assert_close(shared[4], twice[4], atol=0, rtol=0)


def test_assignment_on_paper():
    """Rows with 1, 0, 2 placeholders: of four images, one a dummy for the second row, the second is skipped."""
    assert assign_images([1, 0, 2], 4) == [[0], [], [2, 3]]
    assert assign_images([1, 0, 2], 3) == [[0], [], [1, 2]]


@pytest.mark.parametrize(
    ("case", "mask", "length"), [("A_mask", True, None), ("B_no_mask", False, None), ("E64_mask", True, 64)]
)
def test_forward(model, batch, case, mask, length):
    model.config.tokenizer_model_max_length = length
    given = batch if mask else batch | {"attention_mask": None}
    with torch.no_grad():
        outputs = model(**given)
        sums = model(**given, logp_chunk=7)
    expected = EXPECTED["forward"][f"mha.{case}"]
    assert outputs.loss.item() == pytest.approx(expected["loss"], abs=1e-5)
    valid = prepare(model, given)["attention_mask"]
    valid = slice(None) if valid is None else valid
    torch.testing.assert_close(
        outputs.logits[..., ::16][valid], FORWARD[f"mha.{case}.logits_cols_every16"][valid], **CLOSE
    )
    torch.testing.assert_close(sums.logps, torch.tensor(expected["per_row_sum_logp"]), atol=2e-4, rtol=0)
    assert sums.tokens.tolist() == expected["per_row_n"]


def test_gradients(model, batch):
    model.train()
    model(**batch).loss.backward()
    parameters = dict(model.named_parameters())
    for name, norm in TRAINED.items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-4), name
    for name in FORWARD:
        if name.startswith("grad."):
            torch.testing.assert_close(parameters[name[5:]].grad, FORWARD[name], atol=1e-5, rtol=1e-4)


def test_gradient_of_log_probs_needs_no_full_logits(model, batch):
    """d(sum of log-probs)/d theta is -n d(mean loss)/d theta, chunked or not."""
    model.train()
    (-model(**batch, logp_chunk=5).logps.sum() / 43).backward()
    parameters = dict(model.named_parameters())
    for name, norm in TRAINED.items():
        assert parameters[name].grad.norm().item() == pytest.approx(norm, rel=1e-4), name


def pixels(model, name):
    image = Image.open(GOLDEN / "images" / f"{name}.png").convert("RGB")
    return process_images([image], model.get_vision_tower().image_processor, model.config)


@pytest.mark.parametrize("case", [c for c in EXPECTED["generate"] if "batch" not in c], ids=lambda c: c["prompt"][-30:])
def test_generation(model, case):
    """The original returned BOS before the new tokens."""
    images = pixels(model, case["image"]) if case.get("image") else None
    ids = torch.tensor([case["input_ids"]])
    options = {"images": images, "do_sample": False, "max_new_tokens": 20}
    assert model.generate(ids, **options)[0].tolist() == case["output_ids"][1:]
    if "num_beams3_output_ids" in case:
        assert model.generate(ids, num_beams=3, **options)[0].tolist() == case["num_beams3_output_ids"][1:]


@pytest.mark.parametrize("side", ["right", "left"])
def test_batched_generation_is_right_whatever_the_config_says(model, side):
    """With 'right' the original gives the shorter row another answer; here every row is answered as if alone."""
    case = EXPECTED["generate"][-1]
    assert case["config_tokenizer_padding_side"] == "left"
    model.config.tokenizer_padding_side = side
    images = torch.cat([pixels(model, name) for name in case["images"]])
    mask = torch.tensor(case["attention_mask"]).bool()
    got = model.generate(
        torch.tensor(case["input_ids"]), attention_mask=mask, images=images, do_sample=False, max_new_tokens=20
    )
    assert got.tolist() == [ids[1:] for ids in case["output_ids"]]


def test_crops_are_assembled_on_paper():
    """Two crops side by side, each 2 x 2: rows of the map run through both crops."""
    crops = torch.tensor([[[0.0], [1], [2], [3]], [[4.0], [5], [6], [7]]])
    assert assemble_crops(crops, rows=1, columns=2, side=2)[..., 0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert assemble_crops(crops, rows=2, columns=1, side=2)[..., 0].tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_padding_is_cut_on_paper():
    """A 4 x 2 picture in a 4 x 4 map has one padded row above and one below; a 2 x 4 picture one column each side."""
    whole = torch.arange(16.0).view(1, 4, 4)
    assert unpad_image(whole, (4, 2))[0].tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert unpad_image(whole, (2, 4))[0].tolist() == [[1, 2], [5, 6], [9, 10], [13, 14]]


@pytest.mark.parametrize(("merge", "positions"), [("flat", 48), ("spatial", 48), ("spatial_unpad", 16 + 4 * 9)])
def test_anyres_picture(model, merge, positions):
    """112 x 56 pixels: the whole, and two crops of 4 x 4 patches; unpad adds a newline to each row."""
    model.config.mm_patch_merge_type, model.config.image_grid_pinpoints = merge, [[112, 56]]
    model.get_model().image_newline = torch.nn.Parameter(torch.full((64,), 7.0))
    crops = torch.randn(3, 3, 56, 56)
    with torch.no_grad():
        (features,) = model._image_features([crops], [(112, 56)])
        encoded = model.encode_images(crops)
    assert features.shape == (positions, 64)
    torch.testing.assert_close(features[:16], encoded[0])
    if merge == "spatial":
        torch.testing.assert_close(features[16:20], encoded[1][:4])
        torch.testing.assert_close(features[20:24], encoded[2][:4])
    if merge == "spatial_unpad":
        assert (features[16 + 8] == 7).all()


def test_unknown_merging_is_refused(model, batch):
    model.config.mm_patch_merge_type = "stack"
    with pytest.raises(ValueError, match="mm_patch_merge_type: expected 'flat', 'spatial' or 'spatial_unpad'"):
        prepare(model, batch, images=list(batch["images"]))
