"""Chat and generation with a checkpoint that sees images in crops."""

import json
import shutil
from threading import Event

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava.generation.local import Answerer
from llava.generation.request import Decoding, Request
from llava.serve.local_model import LocalModel
from tests.conftest import GOLDEN


def anyres(golden, folder, merge, pinpoints):
    """The tiny checkpoint as one that sees images in crops."""
    shutil.copytree(golden / "llava-v1.5-tiny", folder)
    fields = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": merge, "image_grid_pinpoints": pinpoints}
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    if merge == "spatial_unpad":
        weights["model.image_newline"] = torch.zeros(64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_chat_answers_with_images_in_crops(in_golden, tmp_path, merge):
    folder = anyres(in_golden, tmp_path / "anyres", merge, [[112, 56]])
    model = LocalModel(str(folder), None, device="cpu")
    image, decoding = Image.new("RGB", (90, 40), "red"), Decoding(max_new_tokens=3, temperature=0)
    for question in ("What is it?", "And now?"):
        assert list(model.reply([], question, image, decoding, Event()))


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_images_of_several_numbers_of_crops_share_a_batch(in_golden, tmp_path, merge):
    folder = anyres(in_golden, tmp_path / "anyres", merge, [[112, 56], [56, 112], [112, 112]])
    answerer = Answerer(str(folder), device="cpu")
    names = ["wide.png", "square.png", None, "tall.png"]
    requests = [Request(str(i), "What is it?", name) for i, name in enumerate(names)]
    crops = {len(answerer.pixels(request, GOLDEN / "images")[0]) for request in requests if request.image}
    assert len(crops) > 1
    decoding = Decoding(max_new_tokens=8)
    together = answerer.answer(requests, GOLDEN / "images", decoding)
    assert together == [answerer.answer([request], GOLDEN / "images", decoding)[0] for request in requests]
