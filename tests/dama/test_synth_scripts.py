"""scripts/synthalign_7b.sh: its dry run has PDS-DPO's models and settings, and every flag parses."""

import argparse
import os
import shlex
import subprocess
from pathlib import Path

import pytest

from dama.synth import command
from llava.train.arguments import parse_arguments
from tests.conftest import GOLDEN

ROOT = Path(__file__).resolve().parents[2]


def dry_run(*words, **environment):
    done = subprocess.run(
        ["bash", str(ROOT / "scripts/synthalign_7b.sh"), "--dry-run", *words],
        env=os.environ | {"OUTPUT": "runs/x"} | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return [shlex.split(line[2:]) for line in done.stdout.splitlines() if line.startswith("+ ")]


def synth_flags(commands):
    parser = argparse.ArgumentParser()
    command.add_flags(parser)
    return [parser.parse_args(words[4:]) for words in commands if words[:4] == ["python", "-m", "dama", "synth"]]


def test_the_papers_models():
    images, rank_images, respond, rank_responses, report = steps = synth_flags(dry_run("--trust_remote_code"))
    assert [args.step for args in steps] == ["images", "rank-images", "respond", "rank-responses", "report"]
    for args in steps[:4]:
        assert command.flag_errors(args, [args.step]) == []
    assert (images.text_to_image, images.guidance, images.steps) == (command.DEFAULT_T2I, [5, 7, 9, 11], 28)
    llavas = ("mistral-7b", "vicuna-13b", "vicuna-7b")
    assert respond.responder == [f"hf:llava-hf/llava-v1.6-{name}-hf" for name in llavas]
    assert (respond.load_4bit, respond.samples, respond.max_new_tokens) == (True, 1, 1000)
    assert (rank_responses.reward, rank_responses.trust_remote_code) == (["text:RLHFlow/ArmoRM-Llama3-8B-v0.1"], True)
    assert rank_responses.margin == 0 and report.hardness == "runs/x/round-1/hardness"


@pytest.mark.parametrize("reward", ["text:RLHFlow/ArmoRM-Llama3-8B-v0.1", "text:evil/MyArmoRM", "text:./ArmoRM"])
def test_no_name_of_a_reward_lets_code_run(reward):
    assert not any("--trust_remote_code" in words for words in dry_run(REWARD=reward))
    asked = [words for words in dry_run("--trust_remote_code", REWARD=reward) if "--trust_remote_code" in words]
    assert asked and all("rank-responses" in words for words in asked)


def test_the_default_reward_is_refused_before_any_work_where_its_code_may_not_run(tmp_path):
    environment = os.environ | {"OUTPUT": str(tmp_path / "out")}
    line = ["bash", str(ROOT / "scripts/synthalign_7b.sh")]
    done = subprocess.run(line, capture_output=True, text=True, env=environment, timeout=60, check=False)
    assert done.returncode == 1 and done.stdout == "" and not (tmp_path / "out").exists()
    assert "expected --trust_remote_code\nRemedy: read that code" in done.stderr


def test_code_of_others_runs_only_where_the_flag_says_so():
    served = synth_flags(dry_run(REWARD="http-text:http://127.0.0.1:9/score", IMAGE_REWARD="http:http://127.0.0.1:8/"))
    assert not served[3].trust_remote_code and served[1].image_reward == ["http:http://127.0.0.1:8/"]
    assert command.flag_errors(served[1], ["rank-images"]) == command.flag_errors(served[3], ["rank-responses"]) == []


@pytest.mark.parametrize("gpus", [1, 2])
def test_the_papers_training(gpus, tmp_path, monkeypatch):
    (training,) = (words for words in dry_run("--seed", "3", GPUS=str(gpus)) if words[0] == "deepspeed")
    replaced = {"--data_path": str(GOLDEN / "dama" / "rlaifv_records.json"), "--image_folder": str(GOLDEN / "images"),
                "--deepspeed": None, "--bf16": None, "--hardness": None, "--reference": None}  # fmt: skip
    flags = []
    for flag, value in zip(training[4::2], training[5::2]):
        if replaced.get(flag, value) is not None:
            flags += [flag, replaced.get(flag, value)]
    monkeypatch.chdir(tmp_path)
    _, _, args = parse_arguments([*flags, "--use_cpu", "True"])
    assert (args.lora_r, args.lora_alpha, args.lora_dropout, args.mm_projector_lr) == (128, 256, 0.05, 2e-5)
    assert (args.learning_rate, args.num_train_epochs, args.warmup_steps, args.weight_decay) == (1e-5, 2, 0.03, 0)
    assert (args.per_device_train_batch_size * args.gradient_accumulation_steps * gpus, args.seed) == (16, 3)


def test_rounds_ask_the_policy_of_the_round_before():
    steps = synth_flags(dry_run("--rounds", "2"))
    asked = [args for args in steps if args.step == "respond"]
    assert [args.out for args in asked] == [f"runs/x/round-{n}" for n in (1, 2, 3)]
    assert [args.responder for args in asked[1:]] == [[f"llava:runs/x/round-{n}/merged"] for n in (1, 2)]
    assert {args.pictures for args in asked} == {"runs/x/pictures"} and len({args.seed for args in asked}) == 3
