"""Shared places and settings: the golden vectors, one thread, no network."""

import atexit
import os
import shutil
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "DAMA_CONFIG_HOME" not in os.environ:  # checkpoints are signed with a key of the tests' own, not the user's
    os.environ["DAMA_CONFIG_HOME"] = tempfile.mkdtemp(prefix="dama-config-")
    atexit.register(shutil.rmtree, os.environ["DAMA_CONFIG_HOME"], ignore_errors=True)
if "DAMA_CACHE_HOME" not in os.environ:  # nor what the user's commands have kept
    os.environ["DAMA_CACHE_HOME"] = tempfile.mkdtemp(prefix="dama-cache-")
    atexit.register(shutil.rmtree, os.environ["DAMA_CACHE_HOME"], ignore_errors=True)

ROOT = Path(__file__).resolve().parents[1]
GOLDEN = ROOT / "tests" / "golden"
LONG = ("gpu", "distributed", "kill", "browser")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """With `-m fast`, leave files without that marker unread: what they import costs more than the fast tests."""
    if config.option.markexpr != "fast" or collection_path.suffix != ".py":
        return None
    return "pytest.mark.fast" not in collection_path.read_text(encoding="utf-8") or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what drives a browser; files of long tests first, so that no process ends with one while others are idle."""
    for item in items:
        if "browser" in getattr(item, "fixturenames", ()):
            item.add_marker("browser")
    long = {item.path for item in items if any(item.get_closest_marker(name) for name in LONG)}
    items.sort(key=lambda item: item.path not in long)


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture()
def in_golden(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The golden configs name their vision tower relative to that folder."""
    monkeypatch.chdir(GOLDEN)
    return GOLDEN
