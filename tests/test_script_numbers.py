"""Numbers from the environment and the command line of shell scripts: bash runs code that is written inside them."""

import os
import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
# {mark} is a file that the attack would make. Octal, hexadecimal and overlong numbers run no code, but mislead bash.
ATTACKS = [
    "a[$(touch {mark})]", "$(touch {mark})", "`touch {mark}`", "1+a[$(touch {mark})]", "x=1,a[$(touch {mark})]",
    "BASH_VERSINFO[$(touch {mark})]", "1;touch {mark}", "1\ntouch {mark}",
]  # fmt: skip
NO_NUMBERS = ["-1", "+1", "08", "0x10", "2#1", "1e3", "1.5", " 1", "1 ", "1\n", "PATH", "٣", "9" * 20]
# Script, words before the value (None: the value goes into the environment), name of the value.
DOORS = [
    ("synthalign_7b.sh", None, "GPUS"),
    ("synthalign_7b.sh", ["--dry-run", "--rounds"], "--rounds"),
    ("synthalign_tiny.sh", ["--rounds"], "--rounds"),
    ("dama_7b.sh", None, "GPUS"),
    ("dama_7b.sh", None, "MICRO_BATCH"),
    ("v1_5/finetune.sh", None, "GPUS"),
    ("slurm/hardness.sh", None, "SLURM_CPUS_PER_TASK"),
    ("slurm/reference.sh", None, "SLURM_CPUS_PER_TASK"),
]


def run(script, before, name, value):
    words, environment = (["--dry-run"], {name: value}) if before is None else ([*before, value], {})
    return subprocess.run(
        ["bash", str(SCRIPTS / script), *words], env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )  # fmt: skip


@pytest.mark.parametrize("value", [*ATTACKS, *NO_NUMBERS])
@pytest.mark.parametrize(("script", "before", "name"), DOORS, ids=lambda part: part if isinstance(part, str) else "")
def test_a_number_is_digits_before_any_arithmetic(script, before, name, value, tmp_path):
    mark = tmp_path / "ran"
    done = run(script, before, name, value.format(mark=mark))
    assert not mark.exists()
    assert done.returncode == 1 and f"{name}: expected a whole number from " in done.stderr and not done.stdout


@pytest.mark.parametrize(("script", "before", "name"), DOORS[:2], ids=["GPUS", "--rounds"])
def test_a_missing_number_is_named(script, before, name):
    done = run(script, before, name, "0" if before is None else "")
    assert done.returncode == 1 and f"{name}: expected a whole number" in done.stderr


def digits(*words):
    source = f'source {SCRIPTS / "checks.sh"}; digits "$@"; echo passed'
    return subprocess.run(["bash", "-c", source, "bash", *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("value", "least"), [("0", "0"), ("1", "1"), ("10", "2"), ("999999999", "1")])
def test_digits_lets_numbers_pass(value, least):
    assert digits("N", value, least).stdout == "passed\n"


def test_digits_shows_no_raw_control_characters():
    done = digits("N", "\x1b]0;title\x07")
    assert done.returncode == 1 and "\x1b" not in done.stderr and r"\E]0;title\a" in done.stderr
