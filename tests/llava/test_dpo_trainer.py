"""What must hold whatever the hardware: one step's loss, gradient, selection and R_bar; resuming; the saved model."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from dama.train.checkpoints import seal_checkpoint
from dama.train.provenance import recorded_flags
from llava.model.builder import load_pretrained_model
from llava.train import train_dpo
from llava.train.arguments import parse_arguments
from llava.train.checkpoints import TOWER_PREFIX
from llava.train.dpo_trainer import LLaVA15DPOTrainer
from tests.conftest import ROOT
from tests.llava.tiny import PAPER, flags, prepare


def history(tmp_path, *more):
    arguments = parse_arguments(flags(tmp_path, *PAPER, "--save_strategy", "no", *more))
    model, tokenizer, data = prepare(arguments)
    trainer = LLaVA15DPOTrainer(model, tokenizer, arguments[2], train_dataset=data.train, delta_bar=data.delta_bar)
    trainer.train()
    return [row for row in trainer.state.log_history if "loss" in row], trainer


def layout(batch_size, accumulation):
    return ["--per_device_train_batch_size", str(batch_size), "--gradient_accumulation_steps", str(accumulation)]


@pytest.mark.parametrize("strategy", ["both", "none", "model"])
def test_accumulation_changes_nothing(in_golden, tmp_path, strategy):
    """8 pairs in one pass = 4 x 2 = 2 x 4 = 1 x 8: decisions are made per optimiser step."""
    whole, _ = history(tmp_path, "--strategy", strategy, *layout(8, 1))
    for batch_size, accumulation in ((4, 2), (2, 4), (1, 8)):
        parts, _ = history(tmp_path, "--strategy", strategy, *layout(batch_size, accumulation))
        names = ["loss", "grad_norm"] + (["dama/R_bar", "dama/alpha_M", "dama/beta"] if strategy != "none" else [])
        for one, other in zip(whole, parts, strict=True):
            for name in names:
                assert other[name] == pytest.approx(one[name], rel=2e-4, abs=2e-5), name


def test_first_step_is_log_2_and_selects_three_quarters(in_golden, tmp_path):
    rows, trainer = history(tmp_path, *layout(8, 1))
    assert rows[0]["loss"] == pytest.approx(0.6931472, abs=1e-4)
    assert rows[0]["dama/selected"] == 6 and rows[0]["dama/pairs"] == 8
    assert rows[-1]["dama/R_bar"] == pytest.approx(trainer.weighting_state.R_bar)
    assert rows[-1]["rewards/margins"] > rows[0]["rewards/margins"]


def test_an_incomplete_last_step_counts_its_own_pairs(in_golden, tmp_path):
    """8 pairs, 3 a step: the last step has 2, of which max(1, round(1.5)) = 2 are kept."""
    rows, _ = history(tmp_path, *layout(3, 1), "--num_train_epochs", "1")
    assert [row["dama/pairs"] for row in rows] == [3, 3, 2]
    assert [row["dama/selected"] for row in rows] == [2, 2, 2]


KILLED = {
    "full": [],
    "lora": ["--lora_enable", "True", "--lora_r", "4"],
    "running mean": ["--loss", "bco_pair", "sft:0.5"],  # the loss's own state is in the checkpoint
    "weights on segments": ["--token_weights", "segments:5", "--loss", "mpo", "--reference", "base", "--lora_enable",
                            "True", "--lora_r", "4", "--freeze_mm_mlp_adapter", "True"],
    "weights by the image": ["--token_weights", "visual", "--reference", "base", "--lora_enable", "True", "--lora_r",
                             "4", "--freeze_mm_mlp_adapter", "True"],
    "second image": ["--loss", "mdpo", "--reference", "base", "--lora_enable", "True", "--lora_r", "4",
                     "--freeze_mm_mlp_adapter", "True"],
}  # fmt: skip


@pytest.mark.parametrize("how", KILLED.values(), ids=KILLED)
def test_killed_and_resumed_is_never_killed(in_golden, tmp_path, monkeypatch, how):
    """Stopped after the save of step 3 and continued: weights and R_bar bit for bit those of an undisturbed run."""
    steps = [*layout(4, 1), "--save_strategy", "steps", "--save_steps", "1", "--eval_pairs", "2", *how]
    whole = train_dpo.run(parse_arguments(flags(tmp_path / "whole", *PAPER, *steps)))
    arguments = parse_arguments(flags(tmp_path / "parts", *PAPER, *steps))
    save = LLaVA15DPOTrainer._save_checkpoint

    def save_and_die(self, *args):
        save(self, *args)
        if self.state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(LLaVA15DPOTrainer, "_save_checkpoint", save_and_die)
    with pytest.raises(KeyboardInterrupt):
        train_dpo.run(arguments)
    monkeypatch.setattr(LLaVA15DPOTrainer, "_save_checkpoint", save)
    parts = train_dpo.run(parse_arguments(flags(tmp_path / "parts", *PAPER, *steps)))
    assert parts.weighting_state == whole.weighting_state and parts.loss_state == whole.loss_state
    for (name, one), (_, other) in zip(whole.model.named_parameters(), parts.model.named_parameters()):
        assert torch.equal(one, other), name
    logs = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, parts)]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("shared_prefix", ["True", "False"])
def test_bf16_without_deepspeed_is_autocast_over_fp32_weights(in_golden, tmp_path, shared_prefix):
    trainer = train_dpo.run(
        parse_arguments(flags(tmp_path, *PAPER, *layout(4, 1), "--bf16", "True", "--shared_prefix", shared_prefix,
                              "--max_steps", "2", "--save_strategy", "no", "--check_reference", "False"))
    )  # fmt: skip
    assert trainer.model.dtype == torch.float32 and trainer.model.get_vision_tower().dtype == torch.bfloat16
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0.6931, abs=2e-2)


def test_a_checkpoint_without_its_state_is_refused(in_golden, tmp_path):
    more = [*PAPER, *layout(4, 1), "--save_strategy", "steps", "--save_steps", "2", "--max_steps", "2"]
    train_dpo.run(parse_arguments(flags(tmp_path, *more)))
    folder = tmp_path / "out"
    (folder / "checkpoint-2" / "dama_state.json").unlink()
    seal_checkpoint(folder / "checkpoint-2", world_size=1)  # whole, but of another kind of training
    (folder / "dama_provenance.json").unlink()
    with pytest.raises(FileNotFoundError, match="expected dama_state.json with R_bar"):
        train_dpo.run(parse_arguments(flags(tmp_path, *more)))


def test_the_saved_model_has_the_released_layout_and_answers_alike(in_golden, tmp_path):
    trainer = train_dpo.run(
        parse_arguments(flags(tmp_path, *PAPER, *layout(4, 1), "--eval_pairs", "2", "--eval_strategy", "epoch",
                              "--save_strategy", "epoch", "--save_total_limit", "1",
                              "--metric_for_best_model", "eval_loss"))
    )  # fmt: skip
    folder = tmp_path / "out"
    layout_keys = json.loads((in_golden / "i_model_layout.json").read_text())["llava-v1.5-tiny"]
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        assert {k: list(file.get_slice(k).get_shape()) for k in file.keys()} == {  # noqa: SIM118
            k: v["shape"] for k, v in layout_keys["state_dict_as_released"].items()
        }
        assert not [k for k in file.keys() if k.startswith(TOWER_PREFIX)]  # noqa: SIM118
    reloaded = load_pretrained_model(str(folder), None, "x", device="cpu", dtype=torch.float32)[1]
    trained = dict(trainer.model.named_parameters())
    for name, value in reloaded.named_parameters():
        assert torch.equal(value, trained[name]), name
    card = json.loads((folder / "dama_provenance.json").read_text())
    assert card["base"] == "llava-v1.5-tiny" and card["data"]["pairs"] == 6 and card["flags"]["variant"] == "paper"
    assert "| `--learning_rate` | 0.0005 |" in (folder / "README.md").read_text()
    kept = sorted(p.name for p in folder.glob("checkpoint-*"))
    assert 1 <= len(kept) <= 2 and Path(trainer.state.best_model_checkpoint).name in kept
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    assert len(evaluations) == 4 and "eval_rewards/accuracies" in evaluations[0]


def test_lora_learns_beside_a_frozen_base_and_reloads(in_golden, tmp_path):
    trainer = train_dpo.run(
        parse_arguments(flags(tmp_path, *PAPER, *layout(4, 2), "--lora_enable", "True", "--lora_r", "4",
                              "--save_strategy", "no"))
    )  # fmt: skip
    folder = tmp_path / "out"
    assert {p.name for p in folder.iterdir()} >= {"adapter_config.json", "non_lora_trainables.bin", "config.json"}
    merged = load_pretrained_model(str(folder), "llava-v1.5-tiny", "x", device="cpu", dtype=torch.float32)[1]
    expected = trainer.model.merge_and_unload()
    for (name, one), (_, other) in zip(merged.named_parameters(), expected.named_parameters()):
        torch.testing.assert_close(one, other, msg=name)


def test_a_finished_run_is_skipped_and_another_one_is_refused(in_golden, tmp_path, capsys):
    more = [*PAPER, *layout(4, 1), "--max_steps", "1", "--save_strategy", "no"]
    assert train_dpo.run(parse_arguments(flags(tmp_path, *more))) is not None
    assert train_dpo.run(parse_arguments(flags(tmp_path, *more))) is None
    assert "complete" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"--dpo_beta: 0.1 -> 0.3"):
        train_dpo.run(parse_arguments(flags(tmp_path, *more, "--dpo_beta", "0.3")))


def test_under_lora_the_base_is_the_reference(in_golden, tmp_path):
    """Adapters switched off on the fly give the steps of a run with the log-probs of the file."""
    lora = [*PAPER, *layout(4, 1), "--lora_enable", "True", "--lora_r", "4", "--freeze_mm_mlp_adapter", "True",
            "--save_strategy", "no", "--max_steps", "4"]  # fmt: skip
    from_file = train_dpo.run(parse_arguments(flags(tmp_path / "file", *lora)))
    on_the_fly = train_dpo.run(parse_arguments(flags(tmp_path / "fly", *lora, "--reference", "base")))
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (from_file, on_the_fly)]
    assert losses[1] == pytest.approx(losses[0], abs=1e-5) and losses[0][-1] != losses[0][0]


def test_the_base_is_no_reference_when_more_than_adapters_train(in_golden, tmp_path):
    with pytest.raises(ValueError, match="--reference base: needs --lora_enable True and --freeze_mm_mlp_adapter True"):
        parse_arguments(flags(tmp_path, "--reference", "base", "--lora_enable", "True"))


def test_a_half_written_checkpoint_is_passed_over(in_golden, tmp_path, capsys):
    more = [*PAPER, *layout(4, 1), "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "3"]
    whole = train_dpo.run(parse_arguments(flags(tmp_path, *more)))
    folder = tmp_path / "out"
    for name in ("trainer_state.json", "dama_state.json", "optimizer.pt"):
        (folder / "checkpoint-3" / name).unlink()
    (folder / "dama_provenance.json").unlink()
    parts = train_dpo.run(parse_arguments(flags(tmp_path, *more)))
    said = capsys.readouterr().out
    assert "checkpoint-3 is incomplete" in said and "checkpoint-2" in said
    for (name, one), (_, other) in zip(whole.model.named_parameters(), parts.model.named_parameters()):
        assert torch.equal(one, other), name


def test_an_interrupted_run_does_not_go_on_with_other_flags(in_golden, tmp_path):
    more = [*PAPER, *layout(4, 1), "--save_strategy", "steps", "--save_steps", "1", "--max_steps", "2"]
    train_dpo.run(parse_arguments(flags(tmp_path, *more)))
    (tmp_path / "out" / "dama_provenance.json").unlink()
    with pytest.raises(
        ValueError,
        match=r"checkpoint-2 holds a model of other inputs \(--strategy: .both. -> .none.\).*remove .*/out to",
    ):
        train_dpo.run(parse_arguments(flags(tmp_path, *more, "--strategy", "none")))


def test_what_is_recorded_holds_no_secret_and_no_rank(in_golden, tmp_path):
    arguments = parse_arguments(flags(tmp_path, "--hub_token", "hf_SECRET", "--local_rank", "1"))
    recorded = recorded_flags(*arguments)
    assert "hf_SECRET" not in json.dumps(recorded) and "local_rank" not in recorded
    assert "auto_micro_batch" not in recorded and "per_device_train_batch_size" in recorded  # what it has chosen
    assert recorded["gamma"] == 0.9 and recorded["learning_rate"] == 1e-3


def test_a_tower_inside_the_checkpoint_goes_along(in_golden, tmp_path, monkeypatch):
    base = tmp_path / "base"
    shutil.copytree(in_golden / "llava-v1.5-tiny", base)
    shutil.copytree(in_golden / "clip-vit-tiny-patch14-56", base / "tower")
    config = json.loads((base / "config.json").read_text()) | {"mm_vision_tower": "tower"}
    (base / "config.json").write_text(json.dumps(config))
    more = [*PAPER, "--model_name_or_path", str(base), "--max_steps", "1", "--save_strategy", "no"]
    train_dpo.run(parse_arguments(flags(tmp_path, *more)))
    shutil.rmtree(base)
    monkeypatch.chdir("/")
    model = load_pretrained_model(str(tmp_path / "out"), None, "x", device="cpu", dtype=torch.float32)[1]
    assert model.get_vision_tower().is_loaded and model.config.mm_vision_tower == "tower"


def test_preferences_are_learnt_on_a_quantised_base(in_golden, tmp_path):
    """QLoRA: the reference is the same 4-bit base with its adapters off, so that the first step is log 2."""
    trainer = train_dpo.run(
        parse_arguments(flags(tmp_path, *PAPER, *layout(4, 1), "--bits", "4", "--lora_enable", "True", "--lora_r", "4",
                              "--freeze_mm_mlp_adapter", "True", "--reference", "base", "--save_strategy", "no"))
    )  # fmt: skip
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[0] == pytest.approx(0.6931472, abs=1e-4) and losses[-1] < losses[0] - 1e-3


def test_a_quantised_base_is_not_divided_among_ranks(in_golden, tmp_path):
    zero3 = ["--deepspeed", str(ROOT / "scripts" / "zero3.json"), "--lora_enable", "True"]
    with pytest.raises(ValueError, match="--bits 4: expected ZeRO-2 or no DeepSpeed, got --deepspeed .*zero3.json"):
        parse_arguments(flags(tmp_path, "--bits", "4", *zero3))


def test_a_quantised_base_needs_itself_as_reference(in_golden, tmp_path):
    with pytest.raises(ValueError, match="--bits 4: the reference must be the same quantized base"):
        parse_arguments(flags(tmp_path, "--bits", "4", "--lora_enable", "True"))
