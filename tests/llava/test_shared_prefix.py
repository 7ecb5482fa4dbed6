"""The shared prefix against two padded rows: log-probs and every gradient, to 1e-5 in float32."""

import json
from dataclasses import replace

import pytest
import torch

from dama.losses import Loss
from dama.token_weights import TokenWeights
from dama.train.family import join_answers, shown_images
from dama.views import ordered
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.attention import SHARED_PREFIX
from llava.train.arguments import parse_arguments
from llava.train.dpo_data import DataCollatorForDPODataset, PairCollator
from llava.train.preprocess import EncodedTurns
from tests.llava.tiny import flags, prepare


def relative(one, other):
    return ((one - other).norm() / other.norm().clamp(min=1e-12)).item()


def logps_and_gradients(model, batch):
    model.zero_grad()
    sums = model(
        batch["input_ids"], batch["attention_mask"], labels=batch["targets"], images=batch["images"],
        image_index=batch["image_index"], tails=batch.get("tails"), logp_chunk=7,
    )  # fmt: skip
    weights = torch.linspace(-1, 1, len(sums.logps))
    (sums.logps * weights).sum().backward()
    return sums, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_equal(model, tokenizer, dataset, items, pictures=1):
    """`pictures`: placeholders in a row, which show the batch's pictures in turn."""

    def batch(shared_prefix):
        rows = DataCollatorForDPODataset(tokenizer, dataset, shared_prefix)(items)
        if pictures > 1:
            shown = torch.arange(pictures) % len(rows["images"])
            rows["image_index"] = shown.repeat(len(rows["input_ids"]))
        return rows

    plain, plain_gradients = logps_and_gradients(model, batch(False))
    shared, shared_gradients = logps_and_gradients(model, batch(True))
    assert shared.tokens.tolist() == plain.tokens.tolist()
    assert relative(shared.logps, plain.logps) < 1e-5
    assert shared_gradients.keys() == plain_gradients.keys()
    for name, gradient in plain_gradients.items():
        assert relative(shared_gradients[name], gradient) < 1e-5, name


@pytest.fixture()
def world(in_golden, tmp_path):
    return prepare(parse_arguments(flags(tmp_path)))


@pytest.mark.parametrize("count", [1, 3, 8])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_golden_pairs(world, count, checkpointing):
    model, tokenizer, data = world
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    assert_equal(model, tokenizer, data.train, data.train.prepared[:count])


def test_bf16(world):
    """In bf16 both ways are as near to fp32 as each other.

    Measured relative to fp32: log-probs 1.26e-3 (shared) and 1.28e-3 (plain), the worst parameter's gradient 3.91e-2
    and 3.94e-2.
    """
    model, tokenizer, data = world
    items = data.train.prepared
    plain, shared = (DataCollatorForDPODataset(tokenizer, data.train, way)(items) for way in (False, True))
    exact, exact_gradients = logps_and_gradients(model, plain)
    model.to(torch.bfloat16)
    errors = {}
    for name, batch in (("plain", plain), ("shared", shared)):
        sums, gradients = logps_and_gradients(model, batch | {"images": batch["images"].bfloat16()})
        errors[name] = (
            relative(sums.logps, exact.logps),
            max(relative(gradients[key].float(), gradient) for key, gradient in exact_gradients.items()),
        )
    for shared_error, plain_error, measured in zip(errors["shared"], errors["plain"], (1.3e-3, 4e-2)):
        assert shared_error < 1.2 * plain_error and shared_error < 2 * measured


def test_random_lengths_and_grouped_queries(world):
    """A model with 2 key heads for 4 query heads; questions from none at all, answers of 1 to 40 tokens."""
    golden, tokenizer, data = world
    torch.manual_seed(0)
    config = LlavaConfig(**json.loads(golden.config.to_json_string()) | {"num_key_value_heads": 2})
    model = LlavaLlamaForCausalLM._from_config(config, attn_implementation=SHARED_PREFIX, dtype=torch.float32)
    model.get_model().vision_tower = golden.get_vision_tower()
    model.train()
    generator = torch.Generator().manual_seed(1)
    items = [random_pair(data.train[i], generator, question=i * 5) for i in range(6)]
    assert_equal(model, tokenizer, data.train, items)


def random_pair(item, generator, question, pictures=1):
    """Random tokens: `question` of them between the pictures and the answers, which have 1 to 40 each."""

    def tokens(count):
        return torch.randint(3, 1000, (count,), generator=generator)

    def row(prefix, length):
        answer = tokens(length)
        return EncodedTurns(torch.cat([prefix, answer]), torch.cat([torch.full_like(prefix, -100), answer]))

    shown = [torch.tensor([-200, *tokens(2).tolist()])[: 1 if pictures == 1 else 3] for _ in range(pictures)]
    prefix = torch.cat([torch.tensor([1]), *shown, tokens(question)])
    chosen, rejected = (row(prefix, n) for n in torch.randint(1, 41, (2,), generator=generator).tolist())
    return replace(item, rows=(chosen, rejected))


def test_several_pictures_and_a_long_question(world):
    model, tokenizer, data = world
    generator = torch.Generator().manual_seed(2)
    items = [random_pair(data.train[i], generator, question=700 * i, pictures=3) for i in range(2)]
    assert_equal(model, tokenizer, data.train, items, pictures=3)


def test_answers_that_begin_alike_share_no_supervised_token(world):
    _, _, data = world
    item = data.train[0]
    joined, (chosen, rejected) = join_answers(item.rows)
    k = len(item.chosen.input_ids) - chosen
    assert (joined.labels[:k] == -100).all() and joined.labels[k] != -100
    assert joined.input_ids[k : k + chosen].tolist() == item.chosen.input_ids[k:].tolist()
    assert joined.input_ids[k + chosen :].tolist() == item.rejected.input_ids[k:].tolist()
    assert len(joined.input_ids) == k + chosen + rejected


def test_the_plain_way_is_a_flag(in_golden, tmp_path):
    arguments = parse_arguments(flags(tmp_path, "--shared_prefix", "False"))
    model, _, _ = prepare(arguments)
    assert not arguments[2].shared_prefix


PATTERNS = {loss: Loss.parse([loss]).views for loss in ("dpo", "mdpo", "symmpo")}
PATTERNS["visual weights"] = ordered(TokenWeights("visual").views)


@pytest.mark.parametrize("views", PATTERNS.values(), ids=PATTERNS)
def test_views_packed_are_views_apart(world, views):
    """Two to five rows of a pair: three answers to one image, two images with one or both answers, several pairs.

    Compared are sums, single tokens in the order of the rows, and all gradients.
    """
    model, tokenizer, data = world
    model.train()
    generator = torch.Generator().manual_seed(4)
    items = [with_views(data.train[i], views, generator) for i in range(3)]
    images = shown_images(items)
    pixels = torch.stack([data.train.pixels(image) for image in images])
    found = {}
    for shared in (True, False):
        plan = PairCollator(model.get_vision_tower().tokens_per_image, shared, views)(items)["plan"]
        model.zero_grad()
        sums = model(plan=plan, images=pixels, logp_chunk=7, per_token=True)
        (sums.logps * torch.linspace(-1, 1, len(sums.logps))).sum().backward()
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        found[shared] = sums, gradients, plan.splice.source.numel()
    (packed, packed_gradients, fewer), (apart, apart_gradients, more) = found[True], found[False]
    assert packed.tokens.tolist() == apart.tokens.tolist() and fewer < 0.8 * more
    assert len(packed.logps) == 3 * len(views) and relative(packed.logps, apart.logps) < 1e-5
    assert relative(packed.per_token, apart.per_token) < 1e-5
    rows = torch.stack([answer.sum() for answer in packed.per_token.split(packed.tokens.tolist())])
    assert relative(rows, packed.logps) < 1e-6
    for name, gradient in apart_gradients.items():
        assert relative(packed_gradients[name], gradient) < 1e-5, name


def with_views(item, views, generator):
    """The pair with random answers of its own lengths in every view, on its image and a blank one."""
    item = random_pair(item, generator, question=9)
    third = random_pair(item, generator, question=9).chosen
    prefix = item.chosen.unsupervised
    answers = {"chosen": item.chosen, "rejected": item.rejected}
    answers["second"] = EncodedTurns(
        torch.cat([item.chosen.input_ids[:prefix], third.input_ids[prefix:]]), third.labels
    )
    images = tuple(replace_corruption(item.images[0], view.corrupted) for view in views)
    return replace(
        item, rows=tuple(answers[view.answer] for view in views), images=images, reference=(0.0,) * len(views)
    )


def replace_corruption(image, corrupted):
    return image._replace(corruption="blank", pair="x") if corrupted else image
