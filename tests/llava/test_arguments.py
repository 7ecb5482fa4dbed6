"""Flags: LLaVA's old names, all faults at once, help that reads."""

import pytest

from llava.train.arguments import help_text, parse_arguments, translate_flags
from tests.conftest import GOLDEN

GOOD = [
    "--model_name_or_path", "m", "--data_path", str(GOLDEN / "dama" / "rlaifv_records.json"),
    "--image_folder", str(GOLDEN / "images"), "--output_dir", "out", "--use_cpu", "True",
]  # fmt: skip


def test_old_names_are_mapped_and_said():
    words, warnings = translate_flags(
        ["--evaluation_strategy", "no", "--warmup_ratio=0.03", "--data_source_names", "a", "b", "--bf16", "True"]
    )
    assert words == ["--eval_strategy", "no", "--warmup_steps=0.03", "--bf16", "True"]
    assert warnings == [
        "--evaluation_strategy is now --eval_strategy",
        "--warmup_ratio is now --warmup_steps",
        "--data_source_names is ignored: one file of pairs is read",
    ]


def test_llavas_own_script_parses(capsys):
    """The flags of LLaVA-v1.5's finetune.sh."""
    _, data, args = parse_arguments(
        [*GOOD, "--version", "v1", "--mm_projector_type", "mlp2x_gelu", "--mm_vision_select_layer", "-2",
         "--mm_use_im_start_end", "False", "--mm_use_im_patch_token", "False", "--image_aspect_ratio", "pad",
         "--group_by_modality_length", "True", "--evaluation_strategy", "no", "--save_total_limit", "1",
         "--warmup_ratio", "0.03", "--lr_scheduler_type", "cosine", "--lazy_preprocess", "True"]
    )  # fmt: skip
    assert (args.warmup_steps, args.task, data.image_aspect_ratio) == (0.03, "LM", "pad")
    assert "warning: --warmup_ratio is now --warmup_steps" in capsys.readouterr().out


def test_all_faults_at_once():
    flags = ["--model_name_or_path", "m", "--data_path", "no.json", "--image_folder", "nowhere", "--use_cpu", "True",
             "--output_dir", "o", "--task", "DPO", "--gamma", "2", "--version", "v11", "--hardness", "no"]  # fmt: skip
    with pytest.raises(ValueError, match=r"^5 fault\(s\) in the flags") as error:
        parse_arguments(flags)
    for part in ("--data_path: expected an existing path, got 'no.json'", "--image_folder", "did you mean", "gamma: ",
                 "--hardness: expected a folder written by `python -m dama hardness`, got 'no'"):  # fmt: skip
        assert part in str(error.value)


def test_method_flags_reach_the_method():
    _, _, args = parse_arguments(
        [*GOOD, "--strategy", "model", "--variant", "released", "--selection", "nearest", "--dpo_beta", "0.2",
         "--select_ratio", "0.5", "--data_seed", "7"]
    )  # fmt: skip
    config = args.weighting()
    assert (config.strategy, config.variant, config.selects) == ("model", "released", "nearest")
    assert (config.beta, config.keep, config.seed) == (0.2, 0.5, 7)


def test_help_names_every_own_flag_once(capsys):
    text = help_text()
    for flag in ("--strategy", "--hardness", "--model_name_or_path", "--lora_r", "--per_device_train_batch_size"):
        assert sum(line.split()[:1] == [flag] and line[:3] == "  -" for line in text.splitlines()) == 1
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    assert "train_mem.py --task LM|DPO" in capsys.readouterr().out
