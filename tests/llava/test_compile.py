"""--compile_layers: compiled decoder layers give the eager ones' log-probs and gradients, for batches of any length."""

import copy

import pytest
import torch

from llava.train.arguments import parse_arguments
from llava.train.dpo_data import DataCollatorForDPODataset
from llava.train.setup_model import compile_layers
from tests.llava.tiny import flags, prepare


def logps_and_gradients(model, batch):
    model.zero_grad()
    sums = model(plan=batch["plan"], images=batch["images"], logp_chunk=64)
    (sums.logps * torch.linspace(-1, 1, len(sums.logps))).sum().backward()
    return sums.logps.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_compiled_layers_are_the_eager_ones(in_golden, tmp_path):
    eager, tokenizer, data = prepare(parse_arguments(flags(tmp_path)))
    compiled = copy.deepcopy(eager)
    collate = DataCollatorForDPODataset(tokenizer, data.train, True, eager.get_vision_tower().tokens_per_image)
    for model in (eager, compiled):
        model.train()
    torch._dynamo.reset()
    compile_layers(compiled)
    for items in (data.train.prepared[:2], data.train.prepared[2:7]):
        logps, gradients = logps_and_gradients(compiled, batch := collate(items))
        expected, expected_gradients = logps_and_gradients(eager, batch)
        torch.testing.assert_close(logps, expected, atol=1e-4, rtol=1e-6)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            assert (gradients[name] - gradient).norm() <= 1e-5 * gradient.norm().clamp(min=1e-5), name
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert 0 < graphs <= 8  # two layers and two lengths: not a graph for each


def test_compiled_layers_are_refused_under_zero3(in_golden, tmp_path, monkeypatch):
    monkeypatch.setattr("llava.train.setup_model.is_deepspeed_zero3_enabled", lambda: True)
    with pytest.raises(ValueError, match="--compile_layers True: not possible under ZeRO-3"):
        compile_layers(None)
