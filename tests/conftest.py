"""Shared places and settings: the golden vectors, one thread, no network."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def golden() -> Path:
    return GOLDEN


@pytest.fixture()
def in_golden(monkeypatch: pytest.MonkeyPatch) -> Path:
    """The golden configs name their vision tower relative to that folder."""
    monkeypatch.chdir(GOLDEN)
    return GOLDEN
