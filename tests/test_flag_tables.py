"""Help and errors of flags without the long imports are those of the commands' own parsers."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dama import cli
from dama.flag_table import describe, find_entry, rebuild
from llava.train.arguments import dataclasses_of, help_text
from llava.train.flag_help import USAGE
from llava.train.flag_names import TABLE, check_flags_early, translate_flags
from scripts import flag_tables

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = [*(["-m", module] for module in flag_tables.MODULES), *(
    [f"llava/train/{name}.py"] for name in ("train_mem", "train")
)]  # fmt: skip
HEAVY = ("torch", "transformers", "deepspeed")


def test_the_tables_are_up_to_date():
    """Otherwise call `python scripts/flag_tables.py`."""
    done = subprocess.run(
        [sys.executable, "scripts/flag_tables.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("package", ["llava", "eval"])
def test_a_rebuilt_parser_is_described_alike(package):
    for name, entry in json.loads((ROOT / package / "flags.json").read_text()).items():
        assert describe(rebuild(entry["parser"])) == entry["parser"], name


@pytest.mark.parametrize("module", ["eval.evaluate", "llava.eval.generate", "llava.serve.cli"])
def test_a_rebuilt_parser_has_the_help_of_the_commands(module):
    entry = find_entry(ROOT / module.split(".")[0] / "flags.json", module)
    expected = flag_tables.parser_of(module).format_help()
    assert rebuild(entry["parser"]).format_help() == expected
    assert rebuild(entry["parser"], check_choices=False).format_help() == expected


def test_choices_of_other_files_are_left_to_the_command():
    parser = rebuild(find_entry(ROOT / "eval/flags.json", "eval.evaluate")["parser"], check_choices=False)
    assert parser.parse_args(["a_new_benchmark", "model"]).benchmark == "a_new_benchmark"


def start(command, *flags):
    """The finished process, and the long imports that it made."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1", "COLUMNS": "100"}
    line = [sys.executable, *command, *flags]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, env=environment, check=False)
    times = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    errors = "\n".join(line for line in done.stderr.splitlines() if not line.startswith("import time:"))
    assert times
    return done, errors, [name for name in HEAVY if any(line.split("|")[-1].strip() == name for line in times)]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[-1])
def test_help_and_a_misspelt_flag_need_no_long_import(command):
    done, _, imported = start(command, "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and imported == []
    done, errors, imported = start(command, "--no_such_flag=1")
    assert done.returncode == 2 and imported == []
    assert "no such flag" in errors or "required" in errors or "unrecognized arguments" in errors


def test_help_of_the_command_lists_the_flags_of_training(capsys):
    with pytest.raises(SystemExit):
        cli.main(["train", "--help"])
    said = capsys.readouterr().out
    assert said.startswith("usage: dama train") and said.endswith(help_text().removeprefix(USAGE) + "\n")


def test_help_is_that_of_the_dataclasses(capsys):
    with pytest.raises(SystemExit):
        check_flags_early(["--help"])
    assert capsys.readouterr().out == help_text() + "\n"


@pytest.mark.parametrize(
    "words",
    [
        ["--learnig_rate", "1e-5"], ["--lr=1"], ["--learning_rate", "fast"], ["--num_train_epochs"],
        ["--strategy", "all"], ["--lr_scheduler_type", "x"], ["--lora_r", "1.5"],
        ["--xyz-w", "1", "--data", "a"],
        ["--save_strategy", "often"], ["--image_folder"],
    ],
)  # fmt: skip
def test_an_early_error_is_the_late_one(words):
    words = translate_flags(["--output_dir", "x", *words])[0]
    with pytest.raises(ValueError) as late:
        dataclasses_of(words)
    with pytest.raises(ValueError) as early:
        check_flags_early(words)
    assert str(early.value) == str(late.value)


def test_right_flags_pass(capsys):
    check_flags_early(
        ["--learning-rate", "1e-5", "--bf16", "True", "--full_determinism", "--evaluation_strategy", "no", "--task=DPO"]
    )
    assert capsys.readouterr() == ("", "")


def test_a_table_of_other_sources_does_not_count(tmp_path):
    entry = find_entry(TABLE, "llava.train")
    assert entry is not None and find_entry(TABLE, "llava.none") is None
    package = tmp_path / "llava"
    for source in entry["sources"]:
        (tmp_path / source).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / source).write_bytes((ROOT / source).read_bytes())
    copied = package / "flags.json"
    copied.write_bytes(TABLE.read_bytes())
    assert find_entry(copied, "llava.train") == entry
    (package / "train/arguments.py").write_text("other")
    assert find_entry(copied, "llava.train") is None
    check_flags_early(["--help"], copied)  # nothing is printed and nothing raised
    copied.write_text("torn")
    assert find_entry(copied, "llava.train") is None
