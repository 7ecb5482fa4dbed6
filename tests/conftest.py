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

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture()
def in_golden(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The golden configs name their vision tower relative to that folder."""
    monkeypatch.chdir(GOLDEN)
    return GOLDEN
