"""Chat with a checkpoint that sees images in crops."""

import json
import shutil
from threading import Event

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from llava.eval.generate import Decoding
from llava.serve.chat import LocalModel


@pytest.mark.parametrize("merge", ["flat", "spatial", "spatial_unpad"])
def test_chat_answers_with_images_in_crops(in_golden, tmp_path, merge):
    folder = tmp_path / "anyres"
    shutil.copytree(in_golden / "llava-v1.5-tiny", folder)
    fields = {"image_aspect_ratio": "anyres", "mm_patch_merge_type": merge, "image_grid_pinpoints": [[112, 56]]}
    config = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    if merge == "spatial_unpad":
        weights["model.image_newline"] = torch.zeros(64)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = LocalModel(str(folder), None, device="cpu")
    image, decoding = Image.new("RGB", (90, 40), "red"), Decoding(max_new_tokens=3, temperature=0)
    for question in ("What is it?", "And now?"):
        assert list(model.reply([], question, image, decoding, Event()))
