"""Fixtures of the tests of llava."""

import shutil

import pytest

from tests.conftest import GOLDEN


@pytest.fixture()
def checkpoint(tmp_path, monkeypatch):
    """A copy without 'llava' in its name, the vision tower inside."""
    folder = tmp_path / "run-7"
    shutil.copytree(GOLDEN / "llava-v1.5-tiny", folder)
    shutil.copytree(GOLDEN / "clip-vit-tiny-patch14-56", folder / "clip-vit-tiny-patch14-56")
    monkeypatch.chdir(tmp_path)
    return folder
