"""dama.trl on a tiny LLaVA: TRL's steps end at the weights of our own trainer's, from the same folders of stages."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
from trl import DPOConfig

from dama.cli import main
from dama.pairs import read_pairs
from dama.stage import read_stage
from dama.train.data import PairValues, data_fingerprint, hardness_of_pairs, join_pairs, read_checked_pairs
from dama.trl import DamaDPOTrainer, dataset_of_pairs, join_stages, read_images
from dama.weighting import Selection, Strategy, Variant, WeightingConfig
from llava.conversation import get_template
from llava.model.export import export
from llava.tokenization import load_tokenizer
from llava.train.arguments import parse_arguments
from llava.train.dpo_data import encode_answer
from llava.train.dpo_trainer import LLaVA15DPOTrainer
from llava.train.family import LlavaFamily
from llava.train.setup_model import setup_model
from llava.train.train import train_and_save
from tests.conftest import GOLDEN
from tests.llava.tiny import edit_config, edit_weights

TOKENS = 1000  # in LLaVA's vocabulary; llava-hf's has rows for <image>, <pad> and 22 others beside
STATIC = WeightingConfig(strategy=Strategy.DATA)
MODEL_AWARE = WeightingConfig(strategy=Strategy.BOTH, selection=Selection.OFF)
STEP = [
    "--train_sampling_strategy", "sequential", "--optim", "sgd", "--learning_rate", "0.05", "--lr_scheduler_type",
    "constant", "--max_grad_norm", "0", "--max_steps", "2", "--save_strategy", "no", "--logging_steps", "1",
    "--per_device_train_batch_size", "4", "--image_aspect_ratio", "pad", "--check_reference", "False",
]  # fmt: skip


def shaken(weights: dict[str, torch.Tensor]) -> None:
    """Move the weights a little, so that the policy is not the reference and R is not 0."""
    generator = torch.Generator().manual_seed(0)
    for name, weight in weights.items():
        weights[name] = weight + 0.05 * weight.abs().mean() * torch.randn(weight.shape, generator=generator)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Pairs, their stages, and a policy near the reference in both layouts."""
    folder = tmp_path_factory.mktemp("trl")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for name in ("llava-v1.5-tiny", "clip-vit-tiny-patch14-56", "images"):
            shutil.copytree(GOLDEN / name, name)
        shutil.copy(GOLDEN / "dama" / "rlaifv_records.json", "pairs.json")
        edit_config(Path("llava-v1.5-tiny"), image_aspect_ratio="pad")
        shutil.copytree("llava-v1.5-tiny", "llava-policy")
        edit_weights(Path("llava-policy"), shaken)
        data = ["--data", "pairs.json", "--image_folder", "images", "--workers", "0"]
        model = ["--model_name_or_path", "llava-v1.5-tiny", "--device", "cpu"]
        assert main(["hardness", *data, "--from_scores", "--out", "hardness"]) == 0
        assert main(["reference", *data, *model, "--out", "reference"]) == 0
        for source, name in (("llava-policy", "policy-hf"), ("llava-v1.5-tiny", "reference-hf")):
            export(source, name, "hf")
    return folder


@pytest.fixture()
def here(world, monkeypatch):
    monkeypatch.chdir(world)
    return world


def processor():
    return AutoProcessor.from_pretrained("policy-hf", backend="pil")


def joined(**stages) -> Dataset:
    return dataset_of_pairs("pairs.json", "images", processor(), **stages)


def model_of(folder: str) -> LlavaForConditionalGeneration:
    """Without llava-hf's additional rows, which take probability from every token; the vision tower is frozen."""
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:TOKENS].detach().clone())
    model.model.vision_tower.requires_grad_(False)
    return model


def config(output: Path, **options) -> DPOConfig:
    own: dict[str, Any] = {
        "output_dir": str(output), "use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True,
        "gradient_checkpointing": False, "max_length": None, "train_sampling_strategy": "sequential", "optim": "sgd",
        "learning_rate": 0.05, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "max_steps": 2,
        "save_strategy": "no", "logging_steps": 1, "per_device_train_batch_size": 4,
    }  # fmt: skip
    return DPOConfig(**own | options)


def trainer_of(output: Path, weighting: WeightingConfig = STATIC, folder: str = "policy-hf", **options):
    dataset = options.pop("dataset", None) or joined(hardness="hardness", reference="reference")
    own = {
        name: options.pop(name)
        for name in ("check_reference", "ref_model", "delta_bar", "peft_config")
        if name in options
    }
    return DamaDPOTrainer(
        model_of(folder), args=config(output, **options), train_dataset=dataset, processing_class=processor(),
        weighting=weighting, **{"check_reference": False} | own,
    )  # fmt: skip


def our_training(output: Path, *more: str) -> LLaVA15DPOTrainer:
    """Joins the folders by hand: the command refuses a reference of other weights than it starts from."""
    arguments = parse_arguments(
        ["--task", "DPO", "--model_name_or_path", "llava-policy", "--version", "v1", "--data_path", "pairs.json",
         "--image_folder", "images", "--use_cpu", "True", "--disable_tqdm", "True", "--output_dir", str(output), *STEP,
         *more]
    )  # fmt: skip
    pairs, _ = read_checked_pairs(arguments[1])
    model, tokenizer, _ = setup_model(arguments)
    family = LlavaFamily.of(arguments, model, tokenizer)
    hardness = hardness_of_pairs(pairs, "hardness", data_fingerprint(pairs, arguments[1]), True)
    records = {record["id"]: record for record in read_stage("reference", "reference")[1]}
    logps = [(records[pair.id]["chosen_logp"], records[pair.id]["rejected_logp"]) for pair in pairs]
    data = join_pairs(pairs, hardness, PairValues(logps, {}), family, arguments[1], arguments[2])
    trainer = LLaVA15DPOTrainer(
        model, tokenizer, arguments[2], train_dataset=data.train, family=family, delta_bar=data.delta_bar
    )
    train_and_save(trainer, None)
    return trainer


def logged(trainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


# --- Equal to our own training ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weighting", "flags"),
    [
        (STATIC, ["--strategy", "data"]),
        (MODEL_AWARE, ["--strategy", "both", "--selection", "off"]),
        (
            WeightingConfig(strategy=Strategy.BETA_DPO, selection=Selection.OFF),
            ["--strategy", "beta_dpo", "--selection", "off"],
        ),
    ],
    ids=["data", "both", "beta_dpo"],
)
@pytest.mark.parametrize(("loss", "theirs"), [("dpo", "sigmoid"), ("apo_zero", "apo_zero")])
def test_loss_and_gradient_are_our_trainers(here, tmp_path, weighting, flags, loss, theirs):
    """Two steps of plain SGD, whose weights move by the gradients: each weight by what our trainer moves it.

    Bounds: 1e-5 of the loss, and 1e-4 of the largest movement of each weight tensor. Measured: 6e-5, in the
    norms, whose weights near 1 move by 0.002 and are rounded to 1.2e-7.
    """
    trainer = trainer_of(tmp_path / "theirs", weighting, loss_type=[theirs])
    before = {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}
    trainer.train()
    ours = our_training(tmp_path / "ours", *flags, "--loss", loss)
    assert logged(trainer, "loss") == pytest.approx(logged(ours, "loss"), rel=1e-5)
    assert logged(trainer, "dama/beta") == pytest.approx(logged(ours, "dama/beta"), rel=1e-5)
    assert trainer.weighting_state.R_bar == pytest.approx(
        0 if weighting.is_static else ours.weighting_state.R_bar, rel=1e-4
    )
    export(str(tmp_path / "ours"), tmp_path / "ours-hf", "hf")
    after = LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours-hf", dtype=torch.float32).state_dict()
    moved = 0
    for name, weight in trainer.model.named_parameters():
        want = after[name][:TOKENS] if weight.shape[0] != after[name].shape[0] else after[name]
        got = weight.detach()
        if "embed_tokens" in name:  # the export recomputes the additional rows
            got, want, start = got[:TOKENS], want[:TOKENS], before[name][:TOKENS]
        else:
            start = before[name]
        scale = (want - start).abs().max()
        assert (got - want).abs().max() <= 1e-4 * scale, name
        moved += int(scale > 1e-6)
    assert moved > 10, "most weights have moved far above the rounding unit"


def test_betas_of_pairs_differ(here, tmp_path):
    """The comparison above can fail: plain beta gives other losses."""
    alpha, plain = (
        trainer_of(tmp_path / str(strategy), WeightingConfig(strategy=strategy))
        for strategy in (Strategy.DATA, Strategy.NONE)
    )
    alpha.train()
    plain.train()
    assert all(abs(a - b) > 1e-3 for a, b in zip(logged(alpha, "loss"), logged(plain, "loss"), strict=True))
    assert plain.beta == alpha.beta == 0.1 and logged(plain, "dama/beta") == pytest.approx([0.1, 0.1])


def test_cached_reference_is_the_reference_model(here, tmp_path):
    """Equal to a second model in memory, which TRL runs on every batch."""
    cached = trainer_of(tmp_path / "cached")
    live = trainer_of(tmp_path / "live", dataset=joined(hardness="hardness"), ref_model=model_of("reference-hf"))
    assert cached.ref_model is None and live.ref_model is not None
    cached.train()
    live.train()
    for name in ("loss", "rewards/chosen", "rewards/margins"):
        assert logged(cached, name) == pytest.approx(logged(live, name), rel=1e-4, abs=1e-5), name


def test_gradient_accumulation_changes_nothing(here, tmp_path):
    """Strategy data: 4 pairs at once are 2 x 2."""
    whole = trainer_of(tmp_path / "whole")
    parts = trainer_of(tmp_path / "parts", per_device_train_batch_size=2, gradient_accumulation_steps=2)
    whole.train()
    parts.train()
    assert logged(parts, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-5)


def test_evaluation_takes_plain_beta(here, tmp_path):
    """As our trainer's does: -log s(0.1 R), from R that TRL logs as rewards."""
    dataset = joined(hardness="hardness", reference="reference")
    trainer = trainer_of(tmp_path, dataset=dataset, per_device_eval_batch_size=8)
    metrics = trainer.evaluate(dataset)
    plain = trainer_of(tmp_path, WeightingConfig(strategy=Strategy.NONE), dataset=dataset, per_device_eval_batch_size=8)
    assert metrics["eval_loss"] == pytest.approx(plain.evaluate(dataset)["eval_loss"])


def test_R_bar_is_saved_and_loaded(here, tmp_path):
    saves = {"save_strategy": "steps", "save_steps": 1}
    trainer = trainer_of(tmp_path, MODEL_AWARE, **saves)
    trainer.train()
    assert json.loads((tmp_path / "checkpoint-1" / "dama_state.json").read_text())["step"] == 1
    again = trainer_of(tmp_path, MODEL_AWARE, delta_bar=7.0)
    again.create_optimizer_and_scheduler(2)
    again._load_optimizer_and_scheduler(str(tmp_path / "checkpoint-2"))
    assert again.weighting_state == trainer.weighting_state and again.weighting_state.R_bar != 0
    assert again.delta_bar == trainer.delta_bar


def test_a_checkpoint_without_the_models_weights_is_refused(here, tmp_path):
    """The Trainer writes llava-hf's names and looks for its own: it would go on from weights of the start."""
    trainer_of(tmp_path, save_strategy="steps", save_steps=1).train()
    with pytest.raises(ValueError, match="checkpoint: expected all weights of the model, .* are missing"):
        trainer_of(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_adapters_train_against_cached_log_probs_and_resume(here, tmp_path):
    """Stopped after step 1 and continued, R_bar and loss are the same."""
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    options = {"peft_config": lora, "save_strategy": "steps", "save_steps": 1, "learning_rate": 1.0}
    whole = trainer_of(tmp_path, MODEL_AWARE, **options)
    whole.train()
    resumed = trainer_of(tmp_path, MODEL_AWARE, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert resumed.weighting_state.R_bar == pytest.approx(whole.weighting_state.R_bar, rel=1e-6)
    assert logged(resumed, "loss")[-1] == pytest.approx(logged(whole, "loss")[-1], rel=1e-6)


# --- The data --------------------------------------------------------------------------------------------------------


def test_rows_have_llavas_tokens(here, tmp_path):
    """TRL's collator encodes prompt and answer apart; together they are LLaVA's ids of the same pair."""
    trainer = trainer_of(tmp_path)
    tokenizer, pairs = load_tokenizer("llava-v1.5-tiny"), read_pairs("pairs.json")
    batch = trainer.data_collator(list(trainer.train_dataset))
    for i, pair in enumerate(pairs):
        for row, answer in ((i, pair.chosen), (i + len(pairs), pair.rejected)):
            ids = batch["input_ids"][row][batch["attention_mask"][row].bool()].tolist()
            ids = [token for token, previous in zip(ids, [None, *ids]) if not token == previous == TOKENS]
            want = encode_answer(pair, answer, tokenizer, get_template("v1"))
            assert ids == [TOKENS if token == -200 else token for token in want.input_ids.tolist()]
            assert batch["completion_mask"][row].sum() == (want.labels != -100).sum()


def test_images_are_read_as_in_the_stages(here, tmp_path):
    """Not rotated by EXIF, which `datasets` and many loaders do; transparency dropped."""
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    Image.new("RGB", (8, 4), "red").save(tmp_path / "turned.jpg", exif=exif)
    paths = [str(tmp_path / "turned.jpg"), "images/rgba.png"]
    turned, transparent = read_images({"images": paths})["images"]
    assert turned.size == (8, 4) and transparent.mode == "RGB"
    opened = {"images": [turned]}
    assert read_images(opened) is opened


def test_columns_of_the_stages(here):
    dataset = joined(hardness="hardness", reference="reference")
    deltas = {record["id"]: record["delta"] for record in read_stage("hardness", "hardness")[1]}
    logps = {record["id"]: record["rejected_logp"] for record in read_stage("reference", "reference")[1]}
    assert {row["id"]: row["delta"] for row in dataset} == deltas
    assert {row["id"]: row["ref_rejected_logps"] for row in dataset} == logps


def test_default_delta_bar_is_that_of_the_training_data(here, tmp_path):
    dataset = joined(hardness="hardness", reference="reference").select([0, 1, 2])
    assert trainer_of(tmp_path, dataset=dataset).delta_bar == pytest.approx(sum(dataset["delta"]) / 3)
    assert trainer_of(tmp_path, dataset=dataset, delta_bar=0.25).delta_bar == 0.25


def test_a_pair_without_its_stage_is_named(here):
    rows = Dataset.from_list([{"id": "0"}, {"id": "unknown"}])
    with pytest.raises(ValueError, match="pair unknown: no delta"):
        join_stages(rows, hardness="hardness")


def test_a_stage_of_other_pairs_is_refused(here, tmp_path):
    rows = json.loads(Path("pairs.json").read_text())
    rows[0]["chosen"] = "Nothing."
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    with pytest.raises(ValueError, match="--reference reference: made from other inputs .*content"):
        dataset_of_pairs(tmp_path / "pairs.json", ["images"], processor(), reference="reference")


def test_answers_that_are_cut_are_refused(here, tmp_path):
    """TRL's default max_length would train on beginnings of answers against log-probs of whole ones."""
    trainer = trainer_of(tmp_path, max_length=60)
    with pytest.raises(ValueError, match=r"pair 1, chosen answer: \d+ tokens, 26 in the reference stage|pair \d"):
        trainer.train()


# --- What TRL's step does not allow ----------------------------------------------------------------------------------


def test_another_models_reference_is_refused(here, tmp_path):
    with pytest.raises(ValueError, match=r"expected the first step's \|R\| below"):
        trainer_of(tmp_path, check_reference=True).train()


def test_the_reference_itself_starts_at_log_2(here, tmp_path):
    trainer = trainer_of(tmp_path, folder="reference-hf", check_reference=True, max_steps=1)
    trainer.train()
    assert logged(trainer, "loss") == pytest.approx([0.6931472], abs=1e-4)


@pytest.mark.parametrize(
    ("weighting", "options", "message"),
    [
        (WeightingConfig(strategy=Strategy.BOTH), {}, "selection sample: TRL's loss is the mean over all pairs"),
        (MODEL_AWARE, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps 2: strategy both needs R"),
        (
            WeightingConfig(strategy=Strategy.MODEL, selection=Selection.OFF, variant=Variant.RELEASED),
            {},
            "variant released: expected paper",
        ),
        (STATIC, {"loss_type": ["aot"]}, r"loss_type \['aot'\]: sorts pairs"),
        (STATIC, {"ld_alpha": 0.5}, "ld_alpha 0.5: cached reference log-probs are plain sums"),
    ],
)
def test_refused(here, tmp_path, weighting, options, message):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, weighting, **options)


def test_refused_for_want_of_columns(here, tmp_path):
    with pytest.raises(ValueError, match="strategy data: needs the column 'delta'"):
        trainer_of(tmp_path, dataset=joined(reference="reference"))
    with pytest.raises(ValueError, match="strategy both: needs R before the loss, so cached reference log-probs"):
        trainer_of(tmp_path, MODEL_AWARE, dataset=joined(hardness="hardness"))
    with pytest.raises(ValueError, match="ref_model: given beside cached reference log-probs"):
        trainer_of(tmp_path, ref_model=model_of("reference-hf"))
