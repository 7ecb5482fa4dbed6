"""What people read on the console: readable lines with a legend, warnings that concern them, no library's notices."""

import json
import os
import re
import subprocess
import sys
import threading

import pytest
from torch.utils.cpp_extension import load_inline
from torch.utils.file_baton import FileBaton

from dama.notices import without_build_notices
from dama.train.builds import watched_builds
from dama.train.callbacks import duration
from llava.train.arguments import parse_arguments
from llava.train.train_dpo import single_pair_warning
from tests import warm
from tests.conftest import GOLDEN
from tests.llava.tiny import flags
from tests.models.saved import save

ROOT = GOLDEN.parents[1]
DATA = {
    "LM": ["--data_path", "sft/records.json"],
    "DPO": ["--data_path", "dama/rlaifv_records.json", "--image_aspect_ratio", "square", "--delta_bar", "0.05"],
}
NOTICES = re.compile(
    r"Warning|\[WARNING\]|deprecat|kernels|pin_memory|CUDA|\[transformers\]|built successfully|extension module|ninja|"
    r"Loading weights|Writing model shards|tokenizer has new",
    re.I,
)


def training(task, out, *more):
    return [
        str(ROOT / "llava/train/train_mem.py"), "--task", task, *DATA[task], "--model_name_or_path", "llava-v1.5-tiny",
        "--image_folder", "images", "--output_dir", str(out), "--use_cpu", "True", "--max_steps", "2",
        "--logging_steps", "1", "--per_device_train_batch_size", "2", "--gradient_checkpointing", "True", *more,
    ]  # fmt: skip


def printed(command, stdin="", imports=False, **environment):
    """(standard output, standard error) of a command with nothing silenced from outside; `imports`: those as well."""
    plain = warm.cold() if imports else dict(os.environ)
    plain.pop("PYTHONWARNINGS", None)
    plain |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""} | environment
    done = subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=500, env=plain, cwd=GOLDEN)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def notices(*texts):
    return [line for text in texts for line in text.splitlines() if NOTICES.search(line)]


@pytest.mark.parametrize("task", DATA)
def test_a_training_has_readable_lines_one_legend_and_no_notices(tmp_path, task):
    out, err = printed([sys.executable, *training(task, tmp_path / "out")], imports=task == "DPO")
    assert notices(out, err) == []
    unit = {"LM": "rows", "DPO": "pairs"}[task]
    lines = [line for line in out.splitlines() if line.startswith("step  ")]
    assert len(lines) == 2
    for line in lines:
        assert re.search(rf"training: loss \d+\.\d{{4}} .* lr \S+  [\d.]+ {unit}/s .*\d:\d\d:\d\d left$", line), line
    legend = "\n".join(line for line in out.splitlines() if line.startswith("log: "))
    assert legend.count("learning rate") == 1 and (legend.count("R_bar") == 1) is (task == "DPO")
    for column in ("loss", "grad", "lr") + (("accuracy", "margin", "alpha_M", "beta", "kept") if task == "DPO" else ()):
        assert column in legend, column
    assert "{'loss'" not in out


@pytest.mark.distributed
def test_ranks_under_deepspeed_print_no_notices(tmp_path):
    launcher = [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--quiet",
        "--num_gpus",
        "2",
        "--master_port",
        "28917",
    ]
    command = [*launcher, *training("LM", tmp_path / "out", "--deepspeed", str(ROOT / "scripts/zero2.json"))]
    out, err = printed(command, DS_ACCELERATOR="cpu", OMP_NUM_THREADS="1")
    assert notices(out, err) == []
    assert out.count("log: loss") == 1 and len(re.findall("^step .* rows/s", out, re.M)) == 2


def asked(folder):
    """Flags of a file with one question."""
    (folder / "q.jsonl").write_text(json.dumps({"question_id": 1, "image": "wide.png", "text": "What?"}) + "\n")
    return ["--question-file", str(folder / "q.jsonl"), "--image-folder", "images", "--max-new-tokens", "3"]


def test_generation_prints_no_notices(tmp_path):
    command = [sys.executable, "-m", "llava.eval.generate", "--model-path", "llava-v1.5-tiny", *asked(tmp_path)]
    assert notices(*printed([*command, "--out", str(tmp_path / "out")])) == []


def test_commands_on_a_hub_model_print_no_notices(tmp_path):
    model, out = tmp_path / "qwen", str(tmp_path / "out")
    save("qwen2_5_vl", model)
    config = json.loads((model / "config.json").read_text())  # the class's own ids are beyond the tiny vocabulary
    # An end of answers that is not the tokenizer's, which transformers would say at every training.
    config["text_config"] |= {"bos_token_id": 256, "eos_token_id": 258, "pad_token_id": 259}
    (model / "config.json").write_text(json.dumps(config))
    limits = ["--max_pixels", "512"]
    answers = [sys.executable, "-m", "llava.eval.generate", "--model-path", str(model), *asked(tmp_path)]
    assert notices(*printed([*answers, *limits, "--out", out])) == []
    pairs = ["--model", str(model), "--data", "dama/rlaifv_records.json", "--image_folder", "images", *limits]
    reference = [sys.executable, "-m", "dama", "reference", *pairs, "--device", "cpu", "--out", out + "-reference"]
    assert notices(*printed(reference)) == []
    training = [sys.executable, "-m", "dama", "train", *pairs, "--reference", out + "-reference", "--delta_bar", "0.05"]
    training += ["--use_cpu", "True", "--max_steps", "1", "--out", out + "-dama"]
    assert notices(*printed(training, imports=True)) == []
    chat = [sys.executable, "-m", "llava.serve.cli", "--model-path", out + "-dama", "--image-file", "images/wide.png"]
    said = printed([*chat, *limits, "--device", "cpu", "--max-new-tokens", "3"], stdin="What is it?\n", imports=True)
    assert notices(*said) == [] and "ASSISTANT: " in said[0]


@pytest.mark.parametrize("holds", [True, False])
def test_a_start_that_waits_for_a_lock_says_what_for(tmp_path, capsys, holds):
    lock = tmp_path / "shm_comm" / "lock"
    lock.parent.mkdir()
    held = lock.open("x")
    if not holds:
        held.close()
    threading.Timer(1.5, lock.unlink).start()
    with watched_builds(patience_s=0.2):
        FileBaton(str(lock)).wait()
    held.close()
    lines = capsys.readouterr().err.splitlines()
    by_another = ["waiting for another process that compiles DeepSpeed's operator shm_comm"]
    assert lines == by_another if holds else len(lines) == 1
    assert holds or re.search(rf"^waiting for {lock}, which no process .* rm -r {lock.parent}$", lines[0])


def test_a_start_that_compiles_says_so(tmp_path, capfd):
    with watched_builds(patience_s=0.2):
        slow = '#include <regex>\nbool is_one(const char* text) { return std::regex_match(text, std::regex("1")); }'
        load_inline("tiny_operator", slow, functions=None, no_implicit_headers=True,
                    is_python_module=False, build_directory=str(tmp_path))  # fmt: skip
    lines = capfd.readouterr().err.splitlines()
    assert "compiling DeepSpeed's operator tiny_operator: once on a machine, a minute or more" in lines


def test_other_lines_of_a_library_are_printed(capsys):
    with pytest.raises(RuntimeError), without_build_notices():
        sys.stdout.write("DeepSpeed op built successfully\nsomething else\n")
        raise RuntimeError
    assert capsys.readouterr().out == "something else\n"


def test_hours_as_people_read_them():
    assert [duration(hours) for hours in (0, 1 / 3600, 0.5, 27.0)] == ["0:00:00", "0:00:01", "0:30:00", "27:00:00"]


@pytest.mark.parametrize(
    ("more", "pairs", "expected"),
    [
        (["1", "--variant", "paper"], 8, "every step has 1 pair"),
        (["1", "--variant", "paper", "--gradient_accumulation_steps", "4"], 8, None),
        (["1", "--variant", "paper", "--gradient_accumulation_steps", "4"], 9, r"last .* 1 pair \(9 in steps of 4\)"),
        (["1", "--variant", "released", "--gradient_accumulation_steps", "4"], 8, "every step has 1 pair"),
        (["1", "--variant", "paper", "--strategy", "model"], 8, "every step has 1 pair"),
        (["1", "--variant", "paper", "--strategy", "none"], 8, None),
        (["1", "--variant", "paper", "--strategy", "data"], 8, None),
        (["4", "--variant", "paper"], 8, None),
        (["4", "--variant", "paper"], 5, "last step"),
    ],
)
def test_a_step_of_a_single_pair_is_warned_of(in_golden, tmp_path, more, pairs, expected):
    args = parse_arguments(flags(tmp_path, "--per_device_train_batch_size", *more))[2]
    warning = single_pair_warning(args, pairs)
    assert warning is None if expected is None else re.search(f"^warning: .*{expected}.*R_bar", warning)
