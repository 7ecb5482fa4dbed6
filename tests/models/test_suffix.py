"""PaliGemma, whose processor takes a prefix and a suffix: packed against rows of its own processor, and its answers."""

import pytest
import torch
from PIL import Image

from dama.models.answering import ChatGenerator, Prompter, Turn
from dama.models.chat import ChatTemplate
from dama.models.family import set_decoder_attention
from dama.models.head import finish_of, logits_of, unchanged
from dama.models.suffix import suffix_template
from dama.models.way import Way, way_of
from dama.pairs import pair_from_row
from tests.models.packs import WEIGHTS, assert_same_gradients, family_of, gradients, logps_of, prepared
from tests.models.tiny_hub import FAMILIES, SUFFIX_FAMILIES, build

IMAGES = 4  # tokens of an image


def stock_row(processor, pair, answer, folder):
    """As the model card says: the question as text, the answer as suffix; with labels of the suffix."""
    images = [Image.open(folder / name).convert("RGB") for name in pair.own_images]
    text = "<image>" * len(images) + pair.question
    return processor(text=[text], images=[images], suffix=[answer], return_tensors="pt")


def stock_logps(name, world, items, views):
    """[V, B]: every answer in a row of its own through the stock model."""
    model, processor = build(name)
    rows = []
    for view in views:
        for item in items:
            row = stock_row(processor, item.pair, getattr(item.pair, view.answer), world[1])
            labels = row.pop("labels")[0, 1:]
            logps = model(**row).logits[0, :-1].log_softmax(-1)
            rows.append(logps.gather(-1, labels.clamp(min=0)[:, None])[:, 0][labels != -100].sum())
    return torch.stack(rows).view(len(views), -1), model


@pytest.mark.parametrize("shared", [True, False], ids=["packed", "rows"])
@pytest.mark.parametrize("name", SUFFIX_FAMILIES)
def test_pairs_are_rows_of_the_processor(name, shared, world):
    """Log-probs and every gradient, three pairs in a batch; token types of the processor decide who sees whom."""
    family = family_of(name, world, shared_prefix=shared)
    items = prepared(family, world[0])
    found, (expected, stock) = logps_of(family, items, world[1]), stock_logps(name, world, items, family.views)
    assert torch.allclose(found, expected, atol=1e-4, rtol=1e-5)
    own, wanted = gradients(family.module, (found * WEIGHTS).sum()), gradients(stock, (expected * WEIGHTS).sum())
    assert_same_gradients(own, wanted)


@pytest.mark.parametrize("name", SUFFIX_FAMILIES)
def test_two_images_in_a_pair(name, world):
    row = {"images": ["0.png", "2.png"], "prompt": "Same?", "chosen": "No.", "rejected": "Yes, the same."}
    family = family_of(name, world)
    items = prepared(family, [pair_from_row(row), world[0][1]])
    expected, _ = stock_logps(name, world, items, family.views)
    assert torch.allclose(logps_of(family, items, world[1]), expected, atol=1e-4, rtol=1e-5)


def test_texts_alone_are_read_behind_a_blank_image(world):
    """A pair of texts has the same log-probs whether a blank image stands behind the rows or another pair's."""
    row = {"images": [], "prompt": "2 + 2?", "chosen": "4", "rejected": "It is 5.", "id": "x"}
    family, alone = family_of("paligemma", world), pair_from_row(row)
    one = logps_of(family, prepared(family, [alone]), world[1])
    both = logps_of(family, prepared(family, [alone, world[0][0]]), world[1])
    assert torch.allclose(one[:, 0], both[:, 0], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", SUFFIX_FAMILIES)
def test_stock_attention_on_the_packed_row_is_wrong(name, world):
    family = family_of(name, world)
    items = prepared(family, world[0])
    packed = logps_of(family, items, world[1])
    set_decoder_attention(family.model, "eager")
    assert (logps_of(family, items, world[1]) - packed).abs().max() > 0.05


def test_a_prefix_that_sees_only_what_is_before_is_another_model(world):
    """The comparison can fail: marks of image tokens, as other models want them, give other log-probs."""
    family = family_of("paligemma", world)
    items = prepared(family, world[0])
    right = logps_of(family, items, world[1])
    batch = family.collate(items)["pairs"]
    object.__setattr__(batch.rows, "segment", batch.rows.segment.clamp(min=1))  # nothing is prefix
    assert (family.answer_logps(
        family.module, {"pairs": batch}, [family.prepare_image(Image.open(world[1] / i.pair.image)) for i in items],
        False, 64).logps.view(2, -1) - right).abs().max() > 0.05  # fmt: skip


@pytest.mark.parametrize("name", SUFFIX_FAMILIES)
def test_rows_are_what_the_processor_writes(name, world):
    family = family_of(name, world)
    for item in prepared(family, world[0]):
        for row, answer in zip(item.rows, (item.pair.chosen, item.pair.rejected)):
            stock = stock_row(family.processor, item.pair, answer, world[1])
            assert torch.equal(row.input_ids, stock["input_ids"][0])
            assert torch.equal(row.labels, stock["labels"][0])
    text = family.processor.tokenizer.decode(row.input_ids)
    assert text == "<image>" * IMAGES + "<s>What is in image 2?\nYes!</s>"


def test_the_way_is_decided_by_config_and_call():
    assert [way_of(build(name)[0]).way for name in SUFFIX_FAMILIES] == [Way.MASK, Way.MASK]
    assert str(way_of(build("paligemma2")[0])) == "shared prefix by a dense mask (attention windows of 12 tokens)"
    model, _ = build("llava")
    model.config.text_config.attn_logit_softcapping = 50.0
    assert str(way_of(model)) == "shared prefix by a dense mask (attention scores bounded by 50)"


@pytest.mark.parametrize("name", SUFFIX_FAMILIES)
def test_answers_are_those_of_the_processor_and_generate(name, world):
    """Two questions of other lengths at once, padded at the left."""
    model, processor = build(name)
    model.lm_head.weight = torch.nn.Parameter(torch.randn(model.lm_head.weight.shape))  # tied, it repeats itself
    generator = ChatGenerator(model, Prompter(processor))
    questions, images = ["What?", "What is in image 1, and why?"], [Image.open(world[1] / f"{i}.png") for i in (0, 1)]
    prompts = [generator.prompter.prompt([Turn(question, "")]) for question in questions]
    rows = generator.prompter.token_ids(prompts, [[image.size] for image in images])
    inputs = [generator.prompter.images(image) for image in images]
    together = generator.generate(rows, inputs, max_new_tokens=8, do_sample=False)
    for question, image, row, ids in zip(questions, images, rows, together, strict=True):
        stock = processor(text=[f"<image>{question}"], images=[image], return_tensors="pt")
        stock.pop("labels", None)
        assert stock["input_ids"][0].tolist() == row
        found = model.generate(**stock, max_new_tokens=8, do_sample=False)[0, len(row) :].tolist()
        assert ids.tolist()[: len(found)] == found
    assert len(set(map(tuple, together.tolist()))) == 2


def test_it_takes_one_question_and_no_system_prompt():
    _, processor = build("paligemma")
    assert suffix_template(processor) and processor.chat_template is None  # which is not saved with the model
    with pytest.raises(Exception, match="this model takes one question"):
        ChatTemplate(processor, "Be brief.")


# ------------------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize("name", [*FAMILIES, "paligemma"])
def test_most_models_logits_are_the_product(name):
    assert finish_of(build(name)[0]) is unchanged


def test_bounded_logits_are_seen_in_the_models_own_forward_pass():
    model, _ = build("paligemma2")
    hidden = torch.randn(1, 3, 32)
    product = model.lm_head(hidden)
    assert (product - logits_of(model, hidden)).abs().max() > 0.1
    assert torch.allclose(finish_of(model)(product), logits_of(model, hidden), atol=1e-5)
    assert "forward" not in model.model.__dict__


def test_logits_of_another_kind_are_refused(monkeypatch):
    model, _ = build("llava")
    stock = model.forward

    def halved(*args, **kwargs):
        found = stock(*args, **kwargs)
        found.logits = found.logits / 2
        return found

    monkeypatch.setattr(model, "forward", halved)
    with pytest.raises(ValueError, match="expected logits that are its output layer's product"):
        finish_of(model)
