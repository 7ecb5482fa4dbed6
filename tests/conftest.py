"""Shared places and settings: the golden vectors, one thread, no network."""

import atexit
import gc
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from tests import warm

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "DAMA_CONFIG_HOME" not in os.environ:  # checkpoints are signed with a key of the tests' own, not the user's
    os.environ["DAMA_CONFIG_HOME"] = tempfile.mkdtemp(prefix="dama-config-")
    atexit.register(shutil.rmtree, os.environ["DAMA_CONFIG_HOME"], ignore_errors=True)
if "DAMA_CACHE_HOME" not in os.environ:  # nor what the user's commands have kept
    os.environ["DAMA_CACHE_HOME"] = tempfile.mkdtemp(prefix="dama-cache-")
    atexit.register(shutil.rmtree, os.environ["DAMA_CACHE_HOME"], ignore_errors=True)
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts what it puts into the background
    signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
LONG = ("gpu", "distributed", "kill", "browser")
# Files that take half a minute or more each, the longest first.
LONGEST = (
    "playground/test_tiny_vlm.py", "test_docs.py", "test_wheel.py", "test_howtos.py", "test_notebook.py",
    "test_examples.py", "llava/test_kill.py", "models/test_training.py", "llava/test_distributed.py",
    "cuda/test_steps.py", "llava/test_resume.py", "llava/test_gradio.py", "test_interrupt.py", "test_bench.py",
    "eval/test_evaluate.py", "llava/test_chat_page_attacks.py", "playground/test_study.py",
    "llava/test_console_lines.py", "cuda/test_gpu_check.py", "playground/test_clip.py", "cuda/test_trainings.py",
    "llava/test_memory.py", "cuda/test_levers.py", "llava/test_reference.py", "llava/test_export.py",
    "llava/test_base_model.py", "llava/test_invariance.py", "llava/test_signing.py", "llava/test_notices.py",
    "test_disk_full.py", "cuda/test_stages.py", "test_soak.py", "eval/test_page.py", "cuda/test_device.py",
    "dama/test_synth.py", "dama/test_synth_models.py", "dama/test_prepare.py", "dama/test_trl.py", "test_upstream.py",
    "test_scripts.py", "test_architecture.py",
)  # fmt: skip


warm.use()


def pytest_configure(config: pytest.Config) -> None:
    """With several processes, which is many tests, child processes fork from one that has imported the libraries."""
    gc.disable()  # till all tests are known: a third of the time that takes
    if getattr(config.option, "numprocesses", None) and config.option.markexpr != "fast":
        warm.start()


def pytest_collection_finish() -> None:
    """What thousands of tests are made of stays: no later collection need look at it."""
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many child processes were spared their imports."""
    if line := warm.counts():
        terminalreporter.write_line(line)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m fast`, leave files without that marker unread: what they import costs more than the fast tests."""
    if config.option.markexpr != "fast" or collection_path.suffix != ".py":
        return None
    return "pytest.mark.fast" not in collection_path.read_text(encoding="utf-8") or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what drives a browser; long files first, so that no process ends with one while others are idle."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
    long = {item.path for item in items if any(item.get_closest_marker(name) for name in LONG)}
    places = {ROOT / "tests" / name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: (places.get(item.path, len(places)), item.path not in long))


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture()
def in_golden(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The golden configs name their vision tower relative to that folder."""
    monkeypatch.chdir(GOLDEN)
    return GOLDEN
