"""Pairs with a context (SENTINEL) through any model's chat template: packed against stock rows, and a training."""

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image

from dama.cli import main
from dama.models.encoding import behind_context
from dama.pairs import PreferencePair
from dama.token_weights import NONE
from dama.train.family import ImageRef, group_lengths, join_answers
from llava.train import train_hub
from llava.train.arguments import parse_arguments
from tests.conftest import GOLDEN
from tests.models.packs import WEIGHTS, assert_same_gradients, family_of, gradients, logps_of, prepared
from tests.models.test_training import PAIRS, saved, words_of
from tests.models.tiny_hub import FAMILIES, build

CONTEXTS = ["There is a table. It is green.", None, "- one\n- two"]


@pytest.fixture
def pairs(world):
    """The pairs of the packed tests, two of them behind a context."""
    return [replace(pair, context=context) for pair, context in zip(world[0], CONTEXTS, strict=True)]


def texts_of(pair, answer):
    """(what the assistant has said, what is supervised): the end of the turn only where nothing was said before."""
    return (pair.context, f" {answer}") if pair.context else ("", f"{answer}<turn>")


def stock_logps(name, folder, pairs):
    """[2, B] and the model: every answer in a row of its own through the stock model."""
    model, processor = build(name)
    rows = []
    for side in ("chosen", "rejected"):
        for pair in pairs:
            turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": pair.question}]}]
            said, answer = texts_of(pair, getattr(pair, side))
            prompt = processor.apply_chat_template(turns, add_generation_prompt=True) + said
            image = Image.open(folder / pair.image).convert("RGB")
            whole = processor(text=[prompt + answer], images=[[image]], return_tensors="pt")
            count = len(answer.removesuffix("<turn>").encode()) + answer.endswith("<turn>")
            logits, targets = model(**whole).logits[0, -count - 1 : -1], whole["input_ids"][0, -count:]
            rows.append(logits.log_softmax(-1).gather(-1, targets[:, None]).sum())
    return torch.stack(rows).view(2, -1), model


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_is_two_stock_rows(name, world, pairs):
    """Log-probs and every gradient; the context is part of the prefix, computed once for both answers."""
    family = family_of(name, world)
    items = prepared(family, pairs)
    packed = logps_of(family, items, world[1])
    expected, stock = stock_logps(name, world[1], pairs)
    assert torch.allclose(packed, expected, atol=1e-4, rtol=1e-5)
    found = gradients(family.module, (packed * WEIGHTS).sum())
    wanted = gradients(stock, (expected * WEIGHTS).sum())
    assert_same_gradients(found, wanted)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "gemma3"])
def test_only_the_sentence_is_supervised_and_the_context_is_shared(name, world, pairs):
    family = family_of(name, world)
    for item in prepared(family, pairs):
        texts = [texts_of(item.pair, answer) for answer in (item.pair.chosen, item.pair.rejected)]
        kept = [row.labels[row.labels != -100] for row in item.rows]
        assert [family.processor.tokenizer.decode(ids) for ids in kept] == [answer for _, answer in texts]
        joined, tails = join_answers(item.rows)
        (group,) = group_lengths(item.rows, family.views, family.tokens)
        prefix = family.processor.tokenizer.decode(joined.input_ids[: group.prefix])
        assert group.prefix == len(joined.input_ids) - sum(tails) and prefix.rstrip(" A").endswith(texts[0][0])


def test_an_objective_on_two_images_reads_it_twice(world, pairs):
    packed, rows = (family_of("qwen2_5_vl", world, loss=["mdpo"], shared_prefix=shared) for shared in (True, False))
    one, other = (logps_of(family, prepared(family, pairs), world[1]) for family in (packed, rows))
    assert one.shape == (3, 3) and torch.allclose(one, other, atol=1e-4, rtol=1e-5)


def test_a_context_that_the_model_would_not_read_as_it_is(world):
    family, pair = family_of("llava", world), PreferencePair("7", "0.png", "What?", "A.", "B.", context="Red <turn>")
    with pytest.raises(ValueError, match="pair 7: its context contains '<turn>', a special token"):
        family.encode([pair], [(ImageRef(("0.png",)),) * 2])
    with pytest.raises(ValueError, match="pair 7: its context: expected it as it is in the chat template, got 'RED A."):
        behind_context(replace(pair, context="Red"), ("user: ", "RED A.<turn>"), "<turn>")


def test_they_train(in_golden, tmp_path):
    """From the reference stage to a training: it begins at log 2, and falls; token weights read the same answers."""
    model = saved(tmp_path / "model", "qwen2_5_vl")
    rows = json.loads((GOLDEN / PAIRS).read_text())
    contexts = [row["chosen"] for row in rows]
    rows = [row | {"context": context} for row, context in zip(rows, contexts[1:] + contexts[:1])]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    data = str(tmp_path / "pairs.json")
    words = ["reference", "--model_name_or_path", str(model), "--data", data, "--image_folder", "images", "--device",
             "cpu", "--per_token", "--out", str(tmp_path / "reference")]  # fmt: skip
    assert main(words) == 0
    common = ["--data_path", data, "--reference", str(tmp_path / "reference"), "--strategy", "none"]
    for weights in (NONE, "segments:5"):
        given = [*common, "--token_weights", weights, "--per_device_train_batch_size", "8"]
        trainer = train_hub.run(parse_arguments(words_of(tmp_path / weights, model, *given)))
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        assert losses[0] == pytest.approx(math.log(2), abs=1e-3) and losses[-1] < losses[0]
