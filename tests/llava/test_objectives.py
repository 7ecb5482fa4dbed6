"""Objectives on LLaVA, as a user runs them: the reference stage with their views, training, what is refused."""

import json
import math

import pytest

from dama.cli import main
from dama.console import USER_ERROR
from dama.stage import read_stage
from llava.train import train_dpo
from llava.train.arguments import parse_arguments
from tests.llava.test_reference import reference, words, world  # noqa: F401  (a fixture)
from tests.llava.tiny import DELTA_BAR, flags


def train(folder, *more):
    """Losses of a training on the fixture's pairs with its reference stage."""
    given = ["--data_path", str(folder / "pairs.json"), "--image_folder", str(folder / "images"), "--strategy", "none"]
    given += ["--reference", str(folder / "reference"), "--variant", "paper", "--logging_steps", "1"]
    trainer = train_dpo.run(
        parse_arguments(flags(folder, *given, "--save_strategy", "no", "--learning_rate", "1e-3", *more))
    )
    return [row for row in trainer.state.log_history if "loss" in row]


def add_fields(folder, **fields):
    pairs = json.loads((folder / "pairs.json").read_text())
    images = [row["image_path"] for row in pairs]
    for i, row in enumerate(pairs):
        row |= {name: value(images, i) for name, value in fields.items()}
    (folder / "pairs.json").write_text(json.dumps(pairs))


@pytest.mark.parametrize(
    ("loss", "views", "first"),
    [
        ("mdpo", 3, 3 * math.log(2)),  # three comparisons of equal policies
        ("adavip", 3, math.log(1 + 2)),  # -log s(-log 2) = log(1 + e^(log 2))
        ("opa", 3, (1 + 0.2 + 1) * math.log(2)),
        ("symmpo", 6 - 1, (1 + 2 * 0.5 + 2) * math.log(2)),  # no rejected answer on the second image
    ],
)
def test_from_the_stage_to_a_training(world, loss, views, first):  # noqa: F811
    """At the reference every gap is 0, so the first loss is known; it then falls, and both images are in the log."""
    add_fields(
        world, rejected_images=lambda images, i: [images[(i + 1) % len(images)]], second=lambda _, i: f"It is {i}."
    )
    chosen = ["--loss", loss, "--corruption", "field"]
    assert reference(world, *chosen) == 0
    _, (record, *_) = read_stage(world / "reference", "reference")
    assert sum(name.endswith("_logp") for name in record) == views
    rows = train(world, *chosen, "--num_train_epochs", "8", "--per_device_train_batch_size", "8")
    assert rows[0]["loss"] == pytest.approx(first, abs=2e-3) and rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["rewards/chosen"] > rows[-1]["rewards/chosen_corrupted"]


def test_a_stage_of_another_loss_or_corruption_is_named(world):  # noqa: F811
    assert reference(world) == 0
    with pytest.raises(ValueError, match="views chosen_corrupted for --loss mdpo .*found chosen, rejected. "):
        train(world, "--loss", "mdpo")
    assert reference(world, "--loss", "mdpo", "--corruption", "noise") == 0
    with pytest.raises(ValueError, match=r"--corruption blank, found .*; chosen_corrupted \(noise, seed 0"):
        train(world, "--loss", "mdpo", "--corruption", "blank")
    rows = train(world, "--loss", "mdpo", "--corruption", "noise", "--per_device_train_batch_size", "8")
    assert rows[0]["loss"] == pytest.approx(3 * math.log(2), abs=2e-3)


def test_what_the_pairs_lack_is_named_before_long_work(world, capsys):  # noqa: F811
    assert reference(world, "--loss", "symmpo", "--corruption", "field") == USER_ERROR
    err = capsys.readouterr().err
    assert "without rejected_images" in err and "without a second answer" in err


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--loss", "dqo"], "--loss dqo: expected one of dpo, cdpo"),
        (["--loss", "dpo:x"], "--loss dpo:x: expected NAME or NAME:WEIGHT"),
        (["--loss", "dpo", "dpo:2"], "expected each objective once"),
        (["--corruption", "fog"], "--corruption fog: expected one of blank, crop"),
        (["--token_weights", "words:2"], "--token_weights words:2: expected one of none, segments:G"),
        (["--token_weights", "visual", "--loss", "symmpo"], "--token_weights visual: weights tokens of the chosen"),
    ],
)
def test_flags_that_are_refused(world, capsys, given, message):  # noqa: F811
    assert main(words(world, *given)) == USER_ERROR
    assert message in capsys.readouterr().err
    with pytest.raises(ValueError, match=message.split(":")[0]):
        train(world, *given)


def test_hardness_from_the_reference_model(world):  # noqa: F811
    """alpha_D follows the generative gap without a hardness stage; without reference log-probs it is refused."""
    assert reference(world) == 0
    rows = train(world, "--strategy", "data", "--hardness_from", "generative", "--per_device_train_batch_size", "8")
    _, records = read_stage(world / "reference", "reference")
    gaps = [r["chosen_logp"] / r["chosen_tokens"] - r["rejected_logp"] / r["rejected_tokens"] for r in records]
    mean = float(DELTA_BAR)  # given by the fixture's flags
    alpha = [(1 + math.exp(-mean)) / (1 + math.exp(-gap)) for gap in gaps]
    assert rows[0]["dama/alpha_D"] == pytest.approx(sum(alpha) / len(alpha), rel=1e-5)
    with pytest.raises(ValueError, match="expected delta for every pair"):
        train(world, "--strategy", "data", "--hardness_from", "vote")
    with pytest.raises(ValueError, match="--hardness_from generative: expected reference log-probs"):
        train(world, "--strategy", "data", "--hardness_from", "generative", "--reference", "base", "--lora_enable",
              "True", "--freeze_mm_mlp_adapter", "True")  # fmt: skip


@pytest.mark.parametrize("weights", ["segments:5", "visual"])
def test_token_weights_from_the_stage_to_a_training(world, weights):  # noqa: F811
    """The first loss is log 2 whatever the weights, and falls; the noised image shows in no metric."""
    assert reference(world, "--token_weights", weights) == 0
    assert (world / "reference" / "tokens.f32").stat().st_size == 4 * (108 + 109)
    more = ["--token_weights", weights, "--num_train_epochs", "8", "--per_device_train_batch_size", "8"]
    rows = train(world, *more)
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-3) and rows[-1]["loss"] < rows[0]["loss"]
    assert not any("corrupted" in name for name in rows[0])


@pytest.mark.parametrize("weights", ["segments:5", "visual"])
def test_token_weights_with_the_base_as_reference(world, weights):  # noqa: F811
    """Under LoRA the base's log-probs per token are computed on the fly: they are the stage's."""
    assert reference(world, "--per_token") == 0
    lora = ["--lora_enable", "True", "--lora_r", "4", "--freeze_mm_mlp_adapter", "True", "--token_weights", weights]
    lora += ["--max_steps", "2"]
    stored = train(world, *lora)
    base = train(world, *lora, "--reference", "base", "--output_dir", str(world / "base"))
    for one, other in zip(stored, base, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)


def test_token_weights_need_what_the_stage_did_not_store(world):  # noqa: F811
    assert reference(world) == 0
    with pytest.raises(ValueError, match="dama reference --loss dpo --per_token ... --out .* adds them"):
        train(world, "--token_weights", "segments:5")
    assert reference(world, "--per_token") == 0
    first = train(world, "--token_weights", "segments:5", "--max_steps", "1")[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-3)
