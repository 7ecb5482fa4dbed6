"""The plan of a batch, made from ids on the CPU: the same numbers as without one.

Nothing is read back from the device.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import CLIPVisionConfig, CLIPVisionModel

from dama.transfer import to_device
from llava.estimate.configs import CLIP_SHAPE, SHAPES
from llava.model import LlavaConfig, LlavaLlamaForCausalLM
from llava.model.attention import SHARED_PREFIX
from llava.model.multimodal_encoder.clip_encoder import CLIPVisionTower
from llava.model.multimodal_projector.builder import build_vision_projector
from llava.model.splice import ForwardPlan, plan_splice
from llava.train.arguments import parse_arguments
from llava.train.dpo_data import DataCollatorForDPODataset
from tests.llava.tiny import flags, prepare

IMAGE = -200


def test_a_plan_on_paper():
    """Rows [5 <image> 6] and [7 8]; images of 2 and 1 positions, the second unused.

    Sources: text 0 to 3, features 4 to 6, zeros 7.
    """
    ids = [torch.tensor([5, IMAGE, 6]), torch.tensor([7, 8])]
    labels = [torch.tensor([-100, -100, 6]), torch.tensor([-100, 8])]
    plan = plan_splice(ids, labels, [[0], []], [2, 1])
    assert plan.text_ids.tolist() == [5, 6, 7, 8]
    assert plan.source.tolist() == [[0, 4, 5, 1], [2, 3, 7, 7]]
    assert plan.labels.tolist() == [[-100, -100, -100, 6], [-100, 8, -100, -100]]
    assert plan.mask.tolist() == [[True] * 4, [True, True, False, False]]
    assert plan.position_ids.tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]
    features = [torch.full((2, 1), 50.0), torch.full((1, 1), 60.0)]
    embeds = plan.embed(lambda ids: ids[:, None].float(), features)
    assert embeds[..., 0].tolist() == [[5, 50, 50, 6], [7, 8, 0, 0]]


def test_pairs_lie_one_after_the_other():
    """Two pairs [1 <image> 2 | 3 | 4] and [5 <image> | 6 | 7], each with an image of 2 positions."""
    ids = [torch.tensor([1, IMAGE, 2, 3, 4]), torch.tensor([5, IMAGE, 6, 7])]
    labels = [torch.tensor([-100, -100, -100, 3, 4]), torch.tensor([-100, -100, 6, 7])]
    plan = ForwardPlan.of_groups(ids, labels, [[1], [0]], [2, 2], [[1, 1], [1, 1]])
    assert plan.splice.text_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert plan.splice.source.tolist() == [[0, 9, 10, 1, 2, 3, 4, 7, 8, 5, 6]]
    assert plan.pack.groups == ((4, (1, 1)), (3, (1, 1)))
    assert plan.answers.targets.tolist() == [3, 4, 6, 7] and plan.answers.rows.tolist() == [0, 2, 1, 3]


def test_images_are_counted_row_by_row():
    """Two placeholders and no image, one image and no placeholder: the totals agree, the rows do not."""
    ids = [torch.tensor([IMAGE, IMAGE]), torch.tensor([5])]
    with pytest.raises(ValueError, match=r"row 0 of the batch: 2 image token\(s\) and 1 image\(s\)"):
        plan_splice(ids, ids, [[0], [1]], [1, 1])


def test_to_device_keeps_types_and_nesting():
    plan = ForwardPlan.of_rows([torch.tensor([5, IMAGE, 6])], [torch.tensor([-100, -100, 6])], [[0]], [2])
    moved = to_device(plan, torch.device("meta"))
    assert moved.splice.source.device.type == "meta" and moved.answers.rows.device.type == "meta"
    assert moved.splice.mask.dtype == torch.bool and moved.splice.source.shape == plan.splice.source.shape


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_a_planned_batch_gives_the_log_probs_of_its_ids(in_golden, tmp_path, shared_prefix):
    model, tokenizer, data = prepare(parse_arguments(flags(tmp_path)))
    model.train()
    image_tokens = model.get_vision_tower().tokens_per_image
    collate = DataCollatorForDPODataset(tokenizer, data.train, shared_prefix, image_tokens)
    batch = collate(data.train.prepared[:5])
    planned = model(plan=batch["plan"], images=batch["images"], logp_chunk=7)
    (planned.logps * torch.linspace(-1, 1, 10)).sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    found = model(
        batch["input_ids"], batch["attention_mask"], labels=batch["targets"], images=batch["images"],
        image_index=batch["image_index"], tails=batch.get("tails"), logp_chunk=7,
    )  # fmt: skip
    (found.logps * torch.linspace(-1, 1, 10)).sum().backward()
    torch.testing.assert_close(planned.logps, found.logps, atol=1e-4, rtol=1e-6)
    assert planned.tokens.tolist() == found.tokens.tolist()
    for name, gradient in gradients.items():
        found_gradient = dict(model.named_parameters())[name].grad
        assert (gradient - found_gradient).norm() <= 1e-5 * found_gradient.norm().clamp(min=1e-6), name


def seven_b() -> LlavaLlamaForCausalLM:
    """LLaVA-v1.5-7B's shape, on whatever device is the default."""
    config = LlavaConfig(
        vocab_size=32000, mm_projector_type="mlp2x_gelu", mm_hidden_size=1024, mm_vision_select_layer=-2, **SHAPES["7b"]
    )
    config._attn_implementation = SHARED_PREFIX
    model = LlavaLlamaForCausalLM(config)
    tower = CLIPVisionTower("", config, delay_load=True)
    tower.vision_tower, tower.is_loaded = CLIPVisionModel(CLIPVisionConfig(**CLIP_SHAPE)).requires_grad_(False), True
    model.model.vision_tower, model.model.mm_projector = tower, build_vision_projector(config)
    return model


@pytest.mark.parametrize("shared_prefix", [True, False])
def test_the_forward_pass_of_7b_asks_for_no_value(shared_prefix):
    """Fake tensors have shapes and no values: whatever a forward pass looked at would raise here."""
    ids = torch.randint(3, 31000, (4, 290), generator=torch.Generator().manual_seed(0))
    ids[:, 35] = IMAGE
    labels = ids.clone()
    labels[:, :60] = -100
    rows = (list(ids), list(labels), [[i] for i in range(4)], [576] * 4)
    plan = ForwardPlan.of_groups(*rows, [[120, 110]] * 4) if shared_prefix else ForwardPlan.of_rows(*rows)
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = seven_b().train()
        sums = model(plan=plan, images=torch.zeros(4, 3, 336, 336), logp_chunk=1024)
    assert sums.logps.shape == (8 if shared_prefix else 4,)
    assert sums.tokens.sum() == 4 * 230
