"""Flags: LLaVA's old names, all faults at once, help that reads."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dama.train.arguments import ZERO, zero_file
from llava.estimate.flags import plan_of_flags
from llava.train.arguments import help_text, parse_arguments
from llava.train.flag_names import translate_flags
from llava.train.train_mem import main, validate_gpu_count, validate_half_precision
from tests.conftest import GOLDEN, ROOT

pytestmark = pytest.mark.fast

GOOD = [
    "--model_name_or_path", "m", "--data_path", str(GOLDEN / "dama" / "rlaifv_records.json"),
    "--image_folder", str(GOLDEN / "images"), "--output_dir", "out", "--use_cpu", "True",
]  # fmt: skip


def test_old_names_are_mapped_and_said():
    words, warnings = translate_flags(
        ["--evaluation_strategy", "no", "--warmup_ratio=0.03", "--data_source_names", "a", "b", "--bf16", "True"]
    )
    assert words == ["--eval_strategy", "no", "--bf16", "True", "--warmup_steps", "0.03"]
    assert warnings == [
        "--evaluation_strategy is now --eval_strategy",
        "--data_source_names is ignored: one file of pairs is read",
        "--warmup_ratio is now --warmup_steps",
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
    with pytest.raises(ValueError, match=r"^5 error\(s\) in the flags") as error:
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


@pytest.mark.parametrize(
    ("words", "nearest"),
    [
        (["--learnig_rate", "1e-5"], "--learning_rate"),
        (["--lr", "1e-5"], "--learning_rate"),
        (["--LR", "1e-5"], "--learning_rate"),
        (["--learning-rat=1e-5"], "--learning_rate"),
        (["--beta", "0.1"], "--dpo_beta"),
        (["--epochs", "3"], "--num_train_epochs"),
        (["--num_epoch", "3"], "--num_train_epochs"),
        (["--batch_size", "4"], "--per_device_train_batch_size"),
        (["--per_device_batch_size", "4"], "--per_device_train_batch_size"),
        (["--gradient_acumulation_steps", "4"], "--gradient_accumulation_steps"),
        (["--imagefolder", "x"], "--image_folder"),
        (["--model", "m"], "--model_name_or_path"),
        (["--max_step", "3"], "--max_steps"),  # no abbreviations: another flag may be meant
        (["--stategy", "both"], "--strategy"),
        (["--lora_rank", "8"], "--lora_r"),
    ],
)
def test_a_misspelt_flag_gets_one_line_with_the_nearest(words, nearest):
    with pytest.raises(ValueError, match=r"no such flag") as error:
        parse_arguments([*GOOD, *words])
    flag = words[0].partition("=")[0].removeprefix("--").replace("-", "_")
    assert str(error.value) == f"--{flag}: no such flag; did you mean {nearest}? (--help lists the flags)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate", "fast"], "--learning_rate: invalid float value: 'fast'"),
        (["--max_steps", "1.5"], "--max_steps: invalid int value: '1.5'"),
        (["--strategy", "all"], "--strategy: invalid choice: 'all'"),
        (["--bf16", "maybe"], "--bf16: Truthy value expected"),
        (["--gamma"], "--gamma: expected one argument"),
        (["stray"], "stray: expected a flag before each value"),
        (["--save_strategy", "sometimes"], "--save_strategy: .*sometimes"),
        (["--modle", "M"], "--modle: no such flag; did you mean --model_name_or_path?"),
        (["--qqqq", "1", "--lr", "2"], "--qqqq: no such flag; --lr: no such flag; did you mean --learning_rate?"),
    ],
)
def test_a_wrong_value_gets_one_line(words, message):
    with pytest.raises(ValueError) as error:
        parse_arguments([*GOOD, *words])
    assert re.match(message.replace("?", r"\?"), str(error.value)) and "\n" not in str(error.value)


def test_the_command_says_it_in_one_line(capsys):
    assert main([*GOOD, "--learnig_rate", "1e-5"]) == 2
    shown = capsys.readouterr()
    expected = "--learnig_rate: no such flag; did you mean --learning_rate? (--help lists the flags)"
    assert (shown.out, shown.err) == ("", f"train_mem.py: error: {expected}\n")


def test_dashes_and_negations_are_flags_too():
    words = ["--learning-rate", "1e-3", "--no_shared_prefix", "--per-device-train-batch-size=3"]
    _, _, args = parse_arguments([*GOOD, *words])
    assert (args.learning_rate, args.shared_prefix, args.per_device_train_batch_size) == (1e-3, False, 3)


def test_what_is_not_given_is_none_or_the_default():
    with pytest.raises(ValueError, match="fault") as error:
        parse_arguments(["--output_dir", "o", "--use_cpu", "True", "--image_aspect_ratio", "round"])
    for part in ("--data_path: expected an existing path, got none",
                 "--image_folder: expected an existing path, got none",
                 "--image_aspect_ratio: expected one of the default, pad, square, anyres, got 'round'"):  # fmt: skip
        assert part in str(error.value)
    assert "None" not in str(error.value)


@pytest.mark.parametrize("launcher", ["LOCAL_WORLD_SIZE", "LOCAL_SIZE"])  # torchrun's, DeepSpeed's
def test_more_ranks_than_gpus_are_refused_before_anything_else(monkeypatch, capsys, launcher):
    found = torch.cuda.device_count()
    monkeypatch.setenv(launcher, str(found + 3))
    assert main(["--learnig_rate", "also wrong"]) == 2
    said = capsys.readouterr().err
    assert f"GPUs: {found + 3} ranks need {found + 3}, found {found} that torch can use; " in said
    assert "DS_ACCELERATOR=cpu in front of the command and --use_cpu True behind it" in said
    assert (f"start {found} (--num_gpus {found}" in said) is (found > 0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_without_a_gpu_is_refused_before_anything_loads(precision):
    done = subprocess.run(
        [sys.executable, "-m", "llava.train.train_mem", f"--{precision}", "True"],
        capture_output=True, text=True, timeout=300, env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    expected = f"train_mem.py: error: --{precision} True: expected a GPU, found none that torch can use; leave "
    assert done.returncode == 2 and [line[: len(expected)] for line in done.stderr.splitlines()] == [expected]
    validate_half_precision([f"--{precision}", "True", "--use_cpu", "True"])
    validate_half_precision([f"--{precision}", "False"])


@pytest.mark.parametrize("words", [["--use_cpu", "True"], ["--use_cpu"], ["--use-cpu=yes"], ["--no_cuda", "1"]])
def test_ranks_on_cpus_need_no_gpus(monkeypatch, words):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "64")
    validate_gpu_count(words)
    for others in ([], ["--use_cpu", "False"], ["--use_cpu=false", "--bf16", "True"], ["--output_dir", "--no_cuda_x"]):
        with pytest.raises(ValueError, match="GPUs: 64 ranks need 64"):
            validate_gpu_count(others)


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        ("--warmup_ratio 0.03 --warmup_steps 0", 30),
        ("--warmup_steps 0 --warmup_ratio 0.03", 30),
        ("--warmup_steps 100 --warmup_ratio 0.03", 100),
        ("--warmup_ratio 0.03 --warmup_steps 100", 100),
        ("--warmup_ratio=0.03 --warmup_steps=100", 100),
        ("--warmup-ratio 0.03 --warmup-steps 100", 100),
        ("--warmup_ratio 0.03 --warmup_steps 0.1", 100),
        ("--warmup_ratio 0.1 --warmup_ratio 0.03", 30),
        ("--warmup_ratio 0.03", 30),
        ("--warmup-ratio=0.03", 30),
        ("--warmup_ratio 1.0", 1000),
        ("--warmup_ratio 0", 0),
        ("--warmup_steps 100", 100),
        ("--warmup_steps 0.1", 100),
        ("", 0),
    ],
)
def test_warm_up_follows_transformers_rule(words, steps):
    """Of 1000 steps: a number of steps above 0 wins over the ratio, in whatever order and form they are given."""
    assert parse_arguments([*GOOD, *words.split()])[2].get_warmup_steps(1000) == steps


@pytest.mark.parametrize("words", ["--warmup_ratio 1.5", "--warmup_ratio -0.1", "--warmup_ratio x", "--warmup_ratio"])
def test_a_warm_up_that_is_no_share_is_refused(words):
    with pytest.raises(ValueError, match=r"--warmup_ratio: expected (a share of all steps from 0 to 1|a number), got"):
        parse_arguments([*GOOD, *words.split()])


def test_old_names_with_dashes_are_mapped_too():
    args = parse_arguments([*GOOD, "--evaluation-strategy", "no", "--save-safetensors", "True"])[2]
    assert args.eval_strategy == "no"


@pytest.mark.parametrize("task", ["LM", "DPO"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--label_smoothing_factor 0.1", "--label_smoothing_factor 0.1: not supported"),
        ("--neftune_noise_alpha 5", "--neftune_noise_alpha 5.0: not supported"),
        ("--model_max_length -1", "--model_max_length: expected 1 or more tokens, got -1"),
        ("--model_max_length 0", "--model_max_length: expected 1 or more tokens, got 0"),
        ("--auto_find_batch_size True", "--auto_find_batch_size: not supported"),
        ("--ignore_data_skip True", "--ignore_data_skip: not supported"),
        ("--mm_vision_select_feature cls", "--mm_vision_select_feature: expected one of the default, patch, cls_patch"),
        ("--mm_patch_merge_type unpad", "expected one of the default, flat, spatial, spatial_unpad, got 'unpad'"),
        ("--tune_mm_mlp_adapter True --mm_use_im_start_end True", "choose one of the two"),
        ("--tune_mm_mlp_adapter True --lora_enable True", "choose one of the two"),
        ("--pretrain_mm_mlp_adapter gone.bin", "--pretrain_mm_mlp_adapter: expected an existing file, got 'gone.bin'"),
        ("--resume_from_checkpoint gone", "--resume_from_checkpoint: expected a checkpoint folder .*, got 'gone'"),
        ("--resume_from_checkpoint True", "--resume_from_checkpoint True: expected a checkpoint in 'out', found none"),
        ("--train_sampling_strategy batch_rebalance", "batch_rebalance: expected one of random, "),
        ("--save_strategy best --load_best_model_at_end True", "--load_best_model_at_end: needs evaluations"),
        ("--report_to neptune", "neptune: expected an installed package, found none; install it, or "),
        ("--report_to wandbb", "--report_to wandbb: expected none, all or some of .*, tensorboard, .*wandb"),
    ],
)
def test_flags_that_could_not_be_honored_are_refused_at_the_start(words, message, task):
    with pytest.raises(ValueError, match=message):
        parse_arguments([*GOOD, "--task", task, *words.split()])


def test_fine_tuning_has_no_evaluation():
    with pytest.raises(ValueError, match="--eval_strategy epoch: not supported for --task LM"):
        parse_arguments([*GOOD, "--eval_strategy", "epoch"])


def test_is_multimodal_has_no_effect_and_says_so(capsys):
    """As in LLaVA, which switches it on where there is a vision tower."""
    assert parse_arguments([*GOOD, "--is_multimodal", "False"])[1].is_multimodal
    assert "warning: --is_multimodal False is ignored" in capsys.readouterr().out


@pytest.mark.parametrize("name", ZERO)
def test_an_installed_deepspeed_file_by_its_name(name):
    assert Path(zero_file(name)).read_bytes() == (ROOT / f"scripts/{name}.json").read_bytes()
    assert zero_file(f"scripts/{name}.json") == f"scripts/{name}.json"
    assert plan_of_flags([*GOOD, "--deepspeed", name], ranks=1).arguments[2].deepspeed == zero_file(name)
