"""The released code's 20 training steps, reproduced from its recorded draws: loop and transformers trainer."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from dama.logps import get_batch_logps
from dama.losses import preference_loss, reward_gap
from dama.weighting import Variant, WeightingConfig, WeightingState, weigh
from llava.train.arguments import parse_arguments
from llava.train.dpo_data import DataCollatorForDPODataset
from llava.train.dpo_trainer import LLaVA15DPOTrainer
from tests.conftest import GOLDEN
from tests.llava.tiny import DELTA_BAR, flags, prepare

TRAINING = json.loads((GOLDEN / "h_training.json").read_text())
OFFICIAL = json.loads((GOLDEN / "h_official_hf_trainer.json").read_text())
DATASET = json.loads((GOLDEN / "g_dataset.json").read_text())


def test_get_batch_logps():
    recorded = load_file(GOLDEN / "f_get_batch_logps.safetensors")
    logits, labels = recorded["gbl_logits"], recorded["gbl_labels"]
    per_token, total, average = get_batch_logps(logits, labels, return_all=True)
    torch.testing.assert_close(per_token, recorded["gbl_per_token"])
    torch.testing.assert_close(total, recorded["gbl_sum"])
    torch.testing.assert_close(average, recorded["gbl_avg"], equal_nan=True)
    torch.testing.assert_close(get_batch_logps(logits, labels), total)
    torch.testing.assert_close(get_batch_logps(logits, labels, return_per_token_logp=True), per_token)


def test_ids_labels_and_images_are_the_released_codes(in_golden, tmp_path):
    _, tokenizer, data = prepare(parse_arguments(flags(tmp_path)))
    pixels = load_file(GOLDEN / "g_dataset.safetensors")
    for i, recorded in enumerate(DATASET["dataset_items"]):
        item = data.train[i]
        for answer, name in ((item.chosen, "win"), (item.rejected, "rej")):
            assert answer.input_ids.tolist() == recorded[name]["input_ids"]
            assert answer.labels.tolist() == recorded[name]["labels"]
        if f"image.{i}" in pixels:
            torch.testing.assert_close(data.train.pixels(item.images[0]), pixels[f"image.{i}"], atol=1e-6, rtol=0)
        assert item.delta == pytest.approx(recorded["win"]["vlm_win_logits"] - recorded["rej"]["vlm_rej_logits"])


def test_reference_log_probs(in_golden, tmp_path):
    """Batched and padded, against the original one at a time."""
    model, tokenizer, data = prepare(parse_arguments(flags(tmp_path)))
    batch = DataCollatorForDPODataset(tokenizer, data.train)([data.train[i] for i in range(8)])
    with torch.no_grad():
        sums = model(
            batch["input_ids"], batch["attention_mask"], labels=batch["targets"], images=batch["images"],
            image_index=batch["image_index"], logp_chunk=64,
        )  # fmt: skip
    recorded = DATASET["reference_logps"]["llava-v1.5-tiny"]
    expected = [row["win"]["sum"] for row in recorded] + [row["rej"]["sum"] for row in recorded]
    torch.testing.assert_close(sums.logps, torch.tensor(expected), atol=2e-4, rtol=0)
    assert sums.tokens.tolist()[:8] == [row["win"]["n_label_tokens"] for row in recorded]


@pytest.mark.parametrize("name", ["plain_adamw", "plain_adamw_use_average"])
def test_training_steps(in_golden, tmp_path, name):
    average = "use_average" in name
    model, tokenizer, data = prepare(parse_arguments(flags(tmp_path)))
    collate = DataCollatorForDPODataset(tokenizer, data.train)
    config = WeightingConfig(variant=Variant.RELEASED)
    state = WeightingState()
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)
    for step in TRAINING[name]["steps"]:
        batch = collate([data.train[i] for i in step["records"]])
        sums = model(
            batch["input_ids"], batch["attention_mask"], labels=batch["targets"], images=batch["images"],
            image_index=batch["image_index"], logp_chunk=64,
        )  # fmt: skip
        reference = torch.cat([batch["ref_chosen"], batch["ref_rejected"]]).float()
        scale = sums.tokens if average else 1
        R = reward_gap(*(sums.logps / scale).chunk(2), *(reference / scale).chunk(2))
        assert R.detach().tolist() == pytest.approx(step["gap"], abs=5e-4)
        drawn = step["draws"][0]["index"]
        weights, state = weigh(config, state, R, batch["delta"], float(DELTA_BAR), drawn=drawn)
        loss = preference_loss(R, weights.beta.float())[weights.selected].mean()
        assert loss.item() == pytest.approx(step["loss"], abs=1e-5)
        assert state.R_bar == pytest.approx(step["gap_mean_after"][0], abs=5e-4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    if name == "plain_adamw":
        trained = dict(model.named_parameters())
        for key, value in load_file(GOLDEN / "h_params_after_20_steps.safetensors").items():
            got = trained[key.removesuffix(".rows0_63")].detach()[: len(value)]
            torch.testing.assert_close(got, value, atol=2e-3, rtol=0)


@pytest.mark.parametrize("run", OFFICIAL, ids=lambda run: run["label"])
def test_trainer_gives_the_official_trainers_losses(in_golden, tmp_path, run):
    kw = run["kw"]
    more = [word for name, value in kw.items() for word in (f"--{name}", str(value))]
    arguments = parse_arguments(
        flags(tmp_path, *more, "--train_sampling_strategy", "sequential", "--save_strategy", "no")
    )
    model, tokenizer, data = prepare(arguments)
    losses = []

    class Recorder(LLaVA15DPOTrainer):
        def compute_loss(self, *args, **kwargs):
            loss = super().compute_loss(*args, **kwargs)
            losses.append(loss.item())
            return loss

    drawn = [step["draws"][0]["index"] for step in run["steps"]]
    trainer = Recorder(model, tokenizer, arguments[2], train_dataset=data.train, delta_bar=data.delta_bar, drawn=drawn)
    trainer.train()
    assert losses == pytest.approx([step["loss"] for step in run["steps"]], abs=1e-5)
    assert trainer.weighting_state.R_bar == pytest.approx(run["steps"][-1]["gap_mean_after"][0], abs=5e-4)
    assert replace(trainer.weighting_state, R_bar=0.0) == WeightingState(step=len(drawn))
    json.dumps(trainer.state.log_history)  # the released code crashes here, on a tensor in its log
