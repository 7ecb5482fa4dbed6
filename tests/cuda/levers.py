"""python -m pytest tests/cuda/levers.py, in a child: what trainings do on CUDA only, every number computed."""

import os

import pytest
import torch
from transformers import set_seed

from dama.logps import float32_head
from llava.train import train_dpo
from llava.train.arguments import TrainingArguments, parse_arguments
from tests.conftest import GOLDEN
from tests.cuda.trainings import DPO, FOUR, SFT

CUDA = torch.device("cuda", 0)


@pytest.fixture()
def in_golden():
    before = os.getcwd()
    os.chdir(GOLDEN)
    yield
    os.chdir(before)


def test_the_optimizer_is_fused(tmp_path):
    assert TrainingArguments(output_dir=str(tmp_path)).optim == "adamw_torch_fused"
    assert TrainingArguments(output_dir=str(tmp_path), use_cpu=True).optim == "adamw_torch"
    assert TrainingArguments(output_dir=str(tmp_path), optim="adamw_torch").optim == "adamw_torch"


def test_one_process_uses_one_gpu(tmp_path, capsys):
    """Two devices are visible.

    transformers would wrap the model in DataParallel, which scatters a batch by its first axis: the images of one
    replica's pairs would be another's.
    """
    assert torch.cuda.device_count() == 2
    args = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=4)
    assert (args.device, args.n_gpu, args.train_batch_size) == (CUDA, 1, 4)
    assert "warning: 2 GPUs are visible and one process uses one" in capsys.readouterr().out


def test_a_training_with_two_visible_gpus(in_golden, tmp_path):
    trainer = train_dpo.run(parse_arguments([*DPO, *FOUR, "--output_dir", str(tmp_path), "--max_steps", "1"]))
    assert not isinstance(trainer.model_wrapped, torch.nn.DataParallel)


def test_the_head_in_float32():
    """torch.mm takes two precisions on CUDA alone: float32 logits of bfloat16 weights, and the same gradients."""
    set_seed(0)
    layer = torch.nn.Linear(16, 33, bias=False, dtype=torch.bfloat16, device=CUDA)
    x = torch.randn(5, 16, dtype=torch.bfloat16, device=CUDA, requires_grad=True)
    logits = float32_head(layer)(x)
    assert logits.dtype == torch.float32
    expected = x.float().cpu() @ layer.weight.float().cpu().T
    torch.testing.assert_close(logits.cpu(), expected, atol=1e-5, rtol=1e-5)
    logits.sum().backward()
    assert x.grad.dtype == layer.weight.grad.dtype == torch.bfloat16
    torch.testing.assert_close(layer.weight.grad.float().cpu(), x.detach().float().cpu().sum(0).expand(33, -1),
                               atol=0.05, rtol=0.02)  # fmt: skip


def test_heads_that_keep_their_own_product():
    for layer in (torch.nn.Linear(4, 6, device=CUDA, dtype=torch.bfloat16), torch.nn.Linear(4, 6, False, device=CUDA)):
        assert float32_head(layer) is layer
    spread = torch.nn.Linear(4, 6, False, device=CUDA, dtype=torch.bfloat16)
    spread.weight.ds_id = 0
    assert float32_head(spread) is spread


@pytest.mark.parametrize("task", [[*DPO, *FOUR], [*DPO, *FOUR, "--shared_prefix", "False"], SFT])
def test_a_forward_pass_without_synchronizations(in_golden, tmp_path, task):
    """Turn torch's own check on: an error inside the forward pass, warnings elsewhere."""
    from llava.train import train

    run = train_dpo.run if "DPO" in task else train.run
    words = ["--output_dir", str(tmp_path), "--max_steps", "1", "--debug_sync", "error", "--bf16", "True"]
    with pytest.warns(UserWarning, match="synchronizing CUDA operation"):
        run(parse_arguments([*task, *words]))
    torch.cuda.set_sync_debug_mode("default")


def test_a_synchronization_in_the_forward_pass_is_an_error(in_golden, tmp_path, monkeypatch):
    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    original = LlavaLlamaForCausalLM._planned_forward

    def waits(self, plan, *args):
        plan.answers.tokens.sum().item()
        return original(self, plan, *args)

    monkeypatch.setattr(LlavaLlamaForCausalLM, "_planned_forward", waits)
    words = ["--output_dir", str(tmp_path), "--max_steps", "1", "--debug_sync", "error"]
    with pytest.raises(RuntimeError, match="called a synchronizing CUDA operation"):
        train_dpo.run(parse_arguments([*DPO, *FOUR, *words]))
    torch.cuda.set_sync_debug_mode("default")


def test_reference_log_probs_in_float32_for_a_training_in_bf16(in_golden, tmp_path):
    """The data file's are in float32. Their distance is precision, and is no reason to stop."""
    words = ["--output_dir", str(tmp_path), "--max_steps", "1", "--bf16", "True"]
    trainer = train_dpo.run(parse_arguments([*DPO, *FOUR, *words]))
    assert trainer.state.global_step == 1
