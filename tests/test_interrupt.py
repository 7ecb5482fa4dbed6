"""Ctrl-C in any command: one line, exit code 130, and the same command goes on."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dama.train.checkpoints import last_complete_checkpoint
from tests import warm
from tests.conftest import GOLDEN
from tests.llava.tiny import flags_of

pytestmark = pytest.mark.kill

ROOT = Path(__file__).resolve().parents[1]
LINE = "interrupted; run the same command to continue"
ASKED = ["--model-path", "nowhere", "--question-file", "q.jsonl", "--image-folder", "images"]
IMPORTING = {
    "dama doctor": ["-m", "dama", "doctor", "--config-of", "scripts/dama_7b.sh"],
    "dama hardness": ["-m", "dama", "hardness", "--data", "dama/rlaifv_records.json", "--image_folder", "images",
                      "--clip", "clip-vit-tiny-patch14-56", "--out", "nowhere"],
    "generate": ["-m", "llava.eval.generate", *ASKED, "--out", "out"],
    "model_vqa": ["-m", "llava.eval.model_vqa", *ASKED],
    "run_llava": ["-m", "llava.eval.run_llava", "--model-path", "nowhere", "--image-file", "x", "--query", "x"],
    "chat": ["-m", "llava.serve.cli", "--model-path", "nowhere", "--image-file", "images/wide.png"],
    "export": ["-m", "llava.model.export", "--to", "hf", "nowhere", "nowhere"],
    "evaluate": ["-m", "eval.evaluate", "pope", "nowhere"],
    "training": [str(ROOT / "llava/train/train_mem.py"), "--data_path", "nowhere"],
}  # fmt: skip


class Started:
    """A command in a process and a session of its own, from tests/golden."""

    def __init__(self, words, log, environment):
        self.log = log
        environment = environment | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
        with log.open("wb") as file:
            self.process = subprocess.Popen(
                [sys.executable, *words], cwd=GOLDEN, env=environment, stdin=subprocess.DEVNULL, stdout=file,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait_until(self, holds):
        deadline = time.monotonic() + 120
        while self.process.poll() is None and not holds():
            if time.monotonic() > deadline:
                os.killpg(self.process.pid, signal.SIGKILL)  # or it would go on after the test
                pytest.fail(self.log.read_text())
            time.sleep(0.02)
        assert self.process.poll() is None, self.log.read_text()

    def is_importing(self):
        """Whether torch's libraries are mapped: the imports have begun, and take seconds more."""
        return "libtorch" in Path(f"/proc/{self.process.pid}/maps").read_text()

    def interrupt(self):
        """Ctrl-C reaches the process and its children; the exit code and what was written."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(60), self.log.read_text()


@pytest.mark.parametrize("name", IMPORTING)
def test_interrupted_in_its_imports(tmp_path, name):
    started = Started(IMPORTING[name], tmp_path / "log", warm.cold())
    started.wait_until(started.is_importing)
    code, log = started.interrupt()
    assert (code, log.split("\n")[-2:]) == (130, [LINE, ""]), log
    assert "Traceback" not in log


@pytest.mark.parametrize("workers", ["0", "2"])
def test_interrupted_in_training(tmp_path, workers):
    """Also while worker processes prepare the data; and started again, it goes on from its checkpoint."""
    flags = flags_of(tmp_path / "out", "--per_device_train_batch_size", "2", "--save_strategy", "steps", "--save_steps",
                     "1", "--save_total_limit", "1", "--dataloader_num_workers", workers, "--max_steps")  # fmt: skip
    command = [str(ROOT / "llava/train/train_mem.py"), *flags]
    started = Started([*command, "5000"], tmp_path / "log", os.environ)
    started.wait_until(lambda: last_complete_checkpoint(tmp_path / "out"))
    code, log = started.interrupt()
    assert code == 130 and log.count(LINE) == 1 and "Traceback" not in log, log
    started = Started([*command, "5000"], tmp_path / "again", os.environ)
    started.wait_until(lambda: "continuing from" in started.log.read_text())
    assert started.interrupt()[0] == 130


def test_other_ranks_are_silent(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    started = Started(IMPORTING["generate"], tmp_path / "log", warm.cold())
    started.wait_until(started.is_importing)
    assert started.interrupt() == (130, "")
