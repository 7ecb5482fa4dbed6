"""A finished call ends at once, and only while nothing that it depends on is different."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from dama import finished
from dama.console import write_json
from dama.finished import Call, files_of, stamps
from dama.image_table import table_of_images

NAMES = ["0.png", "1.png"]


@pytest.fixture(autouse=True)
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAMA_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for folder in ("images", "model/tower", "out"):
        (tmp_path / folder).mkdir(parents=True)
    for name in NAMES:
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / name)
    for name in ("pairs.json", "model/config.json", "model/tower/weights.bin", "other.bin", "out/manifest.json"):
        (tmp_path / name).write_text(name)
    return tmp_path


def begin(command: str = "stage", beta: float = 0.1) -> Call:
    return Call.begin(command, {"beta": beta}, ["pairs.json", "model", "out", "v1", ""], "out")


def finish(call: Call) -> None:
    call.remember([Path("out/manifest.json")], table_of_images(NAMES, "images"), "images", ["other.bin"])


def test_the_same_call_is_finished() -> None:
    assert not begin().is_finished()
    finish(begin())
    assert begin().is_finished()


CHANGES: dict[str, Callable[[Path], object]] = {
    "pairs": lambda work: (work / "pairs.json").write_text("PAIRS.JSON"),
    "weights": lambda work: (work / "model/tower/weights.bin").write_text("x"),
    "one file more": lambda work: (work / "model/new.bin").write_text("x"),
    "one file less": lambda work: (work / "model/config.json").unlink(),
    "a file that no flag names": lambda work: (work / "other.bin").write_text("x"),
    "a file that no flag names is gone": lambda work: (work / "other.bin").unlink(),
    "output": lambda work: (work / "out/manifest.json").write_text("x"),
    "no output": lambda work: (work / "out/manifest.json").unlink(),
    "image": lambda work: Image.new("RGB", (8, 8), (1, 2, 3)).save(work / "images/1.png"),
    "no image": lambda work: (work / "images/0.png").unlink(),
    "receipt": lambda work: [path.write_text("[]") for path in (work / "cache").glob("finished-*")],
    "torn receipt": lambda work: [path.write_text('{"files"') for path in (work / "cache").glob("finished-*")],
    "half a receipt": lambda work: [path.write_text('{"files": {}}') for path in (work / "cache").glob("finished-*")],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_difference_lets_the_command_decide(change: str, work: Path) -> None:
    finish(begin())
    CHANGES[change](work)
    assert not begin().is_finished()


def test_a_file_of_the_same_size_and_time_is_another_one(work: Path) -> None:
    """Also where it was settled: the time of its last change cannot be set back."""
    path = work / "pairs.json"
    earlier = time.time_ns() - 10**11
    os.utime(path, ns=(earlier, earlier))
    finish(begin())
    path.write_text("srias.json")
    os.utime(path, ns=(earlier, earlier))
    assert not begin().is_finished()


def test_flags_command_folder_and_code_belong_to_the_call(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(begin())
    assert not begin(beta=0.2).is_finished() and not begin("other").is_finished()
    with monkeypatch.context() as patch:
        patch.setattr(finished, "code_digest", lambda: "changed")
        assert not begin().is_finished()
    assert begin().is_finished()
    monkeypatch.chdir(work / "model")
    assert not Call.begin("stage", {"beta": 0.1}, ["../pairs.json"], "../out").is_finished()


def test_files_that_change_while_the_command_runs_are_noticed(work: Path) -> None:
    """The stamps are those of the call's beginning."""
    call = begin()
    (work / "pairs.json").write_text("written during the run")
    finish(call)
    assert not begin().is_finished()


def test_output_may_change_where_the_result_does_not(work: Path) -> None:
    finish(begin())
    write_json(work / "out/log.json", {})
    os.utime(work / "out/manifest.json")
    assert begin().is_finished()


def test_with_too_many_files_no_receipt_is_written(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(finished, "MAX_FILES", 2)
    assert stamps(files_of(["pairs.json", "model"], None)) is None
    finish(begin())
    assert not begin().is_finished() and not list((work / "cache").glob("finished-*"))


def test_a_model_of_the_hub_counts_by_its_files_in_the_cache(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(work / "hub"))
    snapshot = work / "hub/models--org--name/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    assert list(files_of(["org/name", "org/missing", "a/b/c"], None)) == [str(snapshot / "config.json")]


def test_images_of_a_call_may_be_bad(work: Path) -> None:
    """With --on_bad_image skip: the same ones are bad again."""
    (work / "images/1.png").write_text("no image")
    finish(begin())
    assert begin().is_finished()
    Image.new("RGB", (8, 8)).save(work / "images/1.png")
    assert not begin().is_finished()
