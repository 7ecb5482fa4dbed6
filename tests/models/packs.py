"""Tiny models' packed rows and stock rows of the same pairs, to compare."""

import re
from types import SimpleNamespace

import torch
from PIL import Image

from dama.losses import Loss
from dama.models.family import HubFamily
from dama.train.data import ImageChoice, PairDataset
from dama.train.family import PreparedPair, shown_images
from tests.models.tiny_hub import build

SIZES = [(40, 30), (30, 44), (56, 56)]


def arguments(**given):
    views = Loss.parse(given.pop("loss", ["dpo"])).views
    flags = {"views": lambda: views, "shared_prefix": True, "model_max_length": 2048, "float32_logits": True}
    return SimpleNamespace(**flags | given)


def family_of(name, world, **given):
    model, processor = build(name)
    return HubFamily(model, processor, arguments(**given), image_folder=[str(world[1])])


def prepared(family, pairs):
    choice = ImageChoice(family.views, "crop", 0, tuple(pair.image for pair in pairs))
    images = [choice.images(pair) for pair in pairs]
    return [PreparedPair(*row) for row in zip(pairs, family.encode(pairs, images), images)]


def logps_of(family, items, folder):
    """[V, B] by the family's own way."""
    dataset = PairDataset(items, [str(folder)], family.prepare_image)
    images = [dataset.pixels(image) for image in shown_images(items)]
    batch = family.collate(items)
    found = family.answer_logps(family.module, batch, images, False, 1024)
    return found.logps.view(len(family.views), -1)


def stock_logps(name, world, items, views):
    """[V, B] and the model: every answer in a row of its own through the stock forward pass, as its processor says."""
    model, processor = build(name)
    rows = []
    for view in range(len(views)):
        for item in items:
            answer = getattr(item.pair, views[view].answer)
            turns = [{"role": role, "content": content_of(text)} for role, text in item.pair.prompt]
            prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
            images = [[Image.open(world[1] / name).convert("RGB") for name in item.pair.own_images]]
            whole = processor(
                text=[f"{prompt}{answer}<turn>"], images=images if images[0] else None, return_tensors="pt"
            )
            count = len(answer.encode()) + 1
            logits = model(**whole).logits[0, -count - 1 : -1]
            targets = whole["input_ids"][0, -count:]
            rows.append(logits.log_softmax(-1).gather(-1, targets[:, None]).sum())
    return torch.stack(rows).view(len(views), -1), model


def content_of(text):
    """A message's parts."""
    texts = re.split("(<image>)", text)
    return [{"type": "image"} if part == "<image>" else {"type": "text", "text": part} for part in texts if part]


def gradients(model, total):
    model.zero_grad()
    total.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


WEIGHTS = torch.tensor([[1.0, 0.7, -0.3], [-0.6, 0.2, 1.1]])


def assert_same_gradients(found, wanted):
    """Every parameter's gradient, to 1e-5 of the largest number in any of them."""
    assert found.keys() == wanted.keys() and found
    scale = max(float(g.abs().max()) for g in wanted.values())
    for parameter, gradient in wanted.items():
        assert torch.allclose(found[parameter], gradient, atol=1e-5 * scale, rtol=1e-4), parameter
