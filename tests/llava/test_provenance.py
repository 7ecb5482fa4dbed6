"""The record of a training: every setting that its result depends on, in plain values; older records are understood."""

import json

import pytest

from dama.train.provenance import ALWAYS_RECORDED, PROVENANCE_FILE, provenance_of, recorded_flags, step_settings
from llava.train import train, train_dpo
from llava.train.arguments import parse_arguments
from llava.train.checkpoints import is_finished
from tests.llava.tiny import arguments, flags

STEPS = ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1"]
# What the revision before this record wrote for flags(...) and STEPS: its own flags, and others not at their default.
EARLIER = {
    "activation_checkpointing": False, "auto_micro_batch": False, "beta_min": 0.001, "bits": 16,
    "check_reference": True, "delta_bar": 0.0482190464911681, "double_quant": True, "dpo_beta": 0.1,
    "dpo_use_average": False, "eval_pairs": 0.0, "freeze_backbone": False, "freeze_mm_mlp_adapter": False, "gamma": 0.9,
    "group_by_modality_length": False, "image_aspect_ratio": "square", "is_multimodal": True, "lazy_preprocess": True,
    "learning_rate": 0.001, "logp_chunk": 1024, "lora_alpha": 16, "lora_bias": "none", "lora_dropout": 0.05,
    "lora_enable": False, "lora_r": 64, "lora_weight_path": "", "max_steps": 2,
    "mm_use_im_start_end": False, "model_max_length": 2048, "on_bad_image": "fail", "on_long_pair": "fail",
    "optim": "adamw_torch", "pair_log": False, "per_device_train_batch_size": 4, "quant_type": "nf4",
    "remove_unused_columns": False, "save_steps": 1, "select_ratio": 0.75, "selection": "auto", "shared_prefix": True,
    "strategy": "both", "task": "DPO", "tune_mm_mlp_adapter": False, "variant": "released", "version": "v1",
}  # fmt: skip


def trained(tmp_path, *more):
    """A finished DPO training and its record."""
    train_dpo.run(parse_arguments(flags(tmp_path, *STEPS, *more)))
    return json.loads((tmp_path / "out" / PROVENANCE_FILE).read_text())


def rewrite(folder, change):
    """Changes the flags of every record in an output folder, as if another revision had written them."""
    for path in [folder / PROVENANCE_FILE, *folder.glob(f"checkpoint-*/{PROVENANCE_FILE}")]:
        made = json.loads(path.read_text())
        made.pop("training")
        made["flags"] = change(made["flags"])
        path.write_text(json.dumps(made))


def test_the_record_holds_defaults_and_what_they_come_to(in_golden, tmp_path):
    """4 pairs x 1 rank x 1 micro-batch; int(0.8 x 4) = 3 of them selected by the released variant."""
    made = trained(tmp_path)
    expected = {
        "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "max_grad_norm": 1.0, "seed": 42,
        "optim": "adamw_torch", "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "weight_decay": 0.0,
        "lr_scheduler_type": "linear", "warmup_steps": 0, "num_train_epochs": 3.0, "bf16": False, "fp16": False,
    }  # fmt: skip
    assert made["flags"] | expected == made["flags"] and set(ALWAYS_RECORDED) <= set(made["flags"])
    assert made["training"] == {
        "ranks": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1, "precision": "fp32",
        "seed": 42, "data_seed": 42, "pairs_per_step": 4, "pairs_selected": 3,
    }  # fmt: skip
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| `--max_grad_norm` | 1.0 |" in card and "| `--optim` | adamw_torch |" in card
    assert "| pairs per step | 4 |" in card and "| data seed | 42 |" in card


@pytest.mark.parametrize(
    "more",
    [
        ["--optim", "adafactor", "--lr_scheduler_type", "cosine"],
        ["--save_strategy", "epoch", "--eval_pairs", "2", "--eval_strategy", "epoch"],
        ["--strategy", "none", "--selection", "off", "--variant", "paper"],
        ["--lr_scheduler_type", "cosine_with_min_lr", "--lr_scheduler_kwargs", '{"min_lr": 1e-7}'],
        ["--fsdp", "full_shard", "--debug", "underflow_overflow"],
    ],
)
def test_values_are_plain(in_golden, tmp_path, more):
    recorded = recorded_flags(*parse_arguments(flags(tmp_path, *more)))
    assert {type(value) for value in recorded.values()} <= {int, float, bool, str}
    shown = "\n".join(f"{value}" for value in recorded.values())
    for name in ("Names.", "Type.", "Strategy.", "Variant.", "Selection.", "<", "Option."):
        assert name not in shown, name


@pytest.mark.parametrize(
    ("words", "recorded"), [(["mdpo"], "mdpo"), (["dpo:0.8", "sft"], "dpo:0.8 sft"), (["mpo"], "mpo")]
)
def test_the_loss_is_recorded_in_plain_words(in_golden, tmp_path, words, recorded):
    arguments = parse_arguments(flags(tmp_path, "--variant", "paper", "--loss", *words))
    assert provenance_of(arguments)["flags"]["loss"] == recorded


def test_seeds_precision_and_layout_are_resolved(in_golden, tmp_path):
    more = ["--seed", "7", "--bf16", "True", "--gradient_accumulation_steps", "2"]
    args = parse_arguments(flags(tmp_path, *more))[2]
    settings = step_settings(args)
    assert (settings["seed"], settings["data_seed"], settings["precision"]) == (7, 7, "bf16")
    assert settings["pairs_per_step"] == 8
    assert step_settings(parse_arguments(flags(tmp_path, *more, "--data_seed", "3"))[2])["data_seed"] == 3


def test_fine_tuning_counts_rows(in_golden, tmp_path):
    train.run(arguments(tmp_path, "--max_steps", "1", "--per_device_train_batch_size", "2", "--save_strategy", "no"))
    made = json.loads((tmp_path / PROVENANCE_FILE).read_text())
    assert made["training"]["rows_per_step"] == 2 and "pairs_per_step" not in made["training"]


def test_a_finished_folder_of_an_earlier_revision_is_recognized(in_golden, tmp_path, capsys):
    made = trained(tmp_path)
    assert set(EARLIER) - set(made["flags"]) == {
        "activation_checkpointing",
        "auto_micro_batch",
    }  # how a step is computed
    rewrite(tmp_path / "out", lambda _: EARLIER)
    assert train_dpo.run(parse_arguments(flags(tmp_path, *STEPS))) is None
    assert "complete" in capsys.readouterr().out


def test_a_loss_that_an_earlier_revision_recorded_as_a_list_is_the_same(in_golden, tmp_path, capsys):
    trained(tmp_path)
    rewrite(tmp_path / "out", lambda flags: flags | {"loss": "['dpo']"})
    trained(tmp_path)
    assert "training: complete in" in capsys.readouterr().out


def test_another_loss_that_an_earlier_revision_recorded_as_a_list_is_named(in_golden, tmp_path):
    trained(tmp_path)
    rewrite(tmp_path / "out", lambda flags: flags | {"loss": "['dpo:0.8', 'sft']"})
    with pytest.raises(ValueError, match='--loss: "dpo:0.8 sft" -> "dpo"'):
        trained(tmp_path)


def test_a_half_finished_folder_of_an_earlier_revision_is_continued(in_golden, tmp_path, capsys):
    trained(tmp_path)
    rewrite(tmp_path / "out", lambda _: EARLIER)
    (tmp_path / "out" / PROVENANCE_FILE).unlink()
    seal_again(tmp_path / "out" / "checkpoint-2")
    assert train_dpo.run(parse_arguments(flags(tmp_path, *STEPS))).state.global_step == 2
    assert "continuing from" in capsys.readouterr().out


def seal_again(checkpoint):
    """A checkpoint's seal lists its files' sizes and digests, the rewritten record's among them."""
    from dama.train.checkpoints import seal_checkpoint

    seal_checkpoint(checkpoint, world_size=1)


@pytest.mark.parametrize(
    ("more", "change"),
    [
        (["--max_grad_norm", "0.5"], r"--max_grad_norm: default -> 0.5"),
        (["--seed", "1"], r"--seed: default -> 1"),
        (["--gradient_accumulation_steps", "2"], r"--gradient_accumulation_steps: default -> 2"),
        (["--per_device_train_batch_size", "2"], r"--per_device_train_batch_size: 4 -> 2"),
        (["--lr_scheduler_type", "cosine"], r'--lr_scheduler_type: default -> "cosine"'),
        (["--bf16", "True"], r"--bf16: default -> true"),
        (["--optim", "adafactor"], r'--optim: "adamw_torch" -> "adafactor"'),
    ],
)
def test_a_setting_that_differs_from_an_earlier_record_is_refused(in_golden, tmp_path, more, change):
    parsed = parse_arguments(flags(tmp_path, *STEPS))
    provenance = provenance_of(parsed, data={})
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / PROVENANCE_FILE).write_text(json.dumps(provenance | {"flags": EARLIER}))
    other = provenance_of(parse_arguments(flags(tmp_path, *STEPS, *more)), data={})
    with pytest.raises(ValueError, match=change):
        is_finished(tmp_path / "out", other)


def test_a_setting_that_only_an_earlier_record_has_is_refused(in_golden, tmp_path):
    """It was given then and is at its default now, as --seed; an unknown one counts as given."""
    provenance = provenance_of(parse_arguments(flags(tmp_path, *STEPS)), data={})
    (tmp_path / "out").mkdir()
    for given, change in ({"seed": 5}, "--seed: 5 -> 42"), ({"warp": 2}, "--warp: 2 -> default"):
        made = provenance | {"flags": EARLIER | given}
        (tmp_path / "out" / PROVENANCE_FILE).write_text(json.dumps(made))
        with pytest.raises(ValueError, match=change):
            is_finished(tmp_path / "out", provenance)


def test_the_layout_that_is_chosen_for_fine_tuning_does_not_make_another_training(in_golden, tmp_path):
    """With --auto_micro_batch, the flags as given are compared; the record beside them has the layout in use."""
    parsed = arguments(tmp_path, "--auto_micro_batch", "True", "--per_device_train_batch_size", "4")
    provenance = provenance_of(parsed, data={})
    parsed[2].per_device_train_batch_size, parsed[2].gradient_accumulation_steps = 1, 4
    made = provenance | {"training": step_settings(parsed[2])}
    (tmp_path / PROVENANCE_FILE).write_text(json.dumps(made))
    assert made["training"]["rows_per_step"] == provenance["training"]["rows_per_step"] == 4
    assert made["training"] != provenance["training"] and is_finished(tmp_path, provenance)
