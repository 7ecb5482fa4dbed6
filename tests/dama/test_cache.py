"""The user's cache: one process makes an entry, old ones go, and nothing depends on it."""

from __future__ import annotations

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from dama import cache
from dama.cache import cache_folder, cache_name, prune, shared
from dama.checked_pairs import check_pair_file, read_pair_file
from dama.console import write_atomic
from dama.image_table import table_of_images, table_path
from dama.pairs import PairsError, pairs_fingerprint, read_pairs
from tests.conftest import GOLDEN


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DAMA_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def read_text(path: Path) -> str | None:
    return path.read_text() if path.exists() else None


def write_text(text: str, path: Path) -> None:
    write_atomic(path, text)


def test_a_value_is_made_once(folder: Path) -> None:
    made: list[int] = []
    for _ in range(3):
        assert shared("text-1", lambda: str(made.append(1)), read_text, write_text) == "None"
    assert made == [1] and (folder / "text-1").read_text() == "None"


def count_one(arguments: tuple[Path, float]) -> str:
    log, begin = arguments
    time.sleep(max(0.0, begin - time.time()))

    def make() -> str:
        with log.open("a") as file:
            file.write("made\n")
        time.sleep(0.2)
        return "value"

    return shared("text-2", make, read_text, write_text)


def test_of_processes_that_start_together_one_makes_the_value(tmp_path: Path) -> None:
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        results = list(pool.map(count_one, [(tmp_path / "log", time.time() + 3)] * 4, chunksize=1))
    assert results == ["value"] * 4 and (tmp_path / "log").read_text() == "made\n"


@pytest.mark.fast
def test_a_folder_that_others_can_write_to_is_not_used(folder: Path) -> None:
    folder.mkdir(mode=0o700)
    assert cache_folder() == folder
    folder.chmod(0o777)
    assert cache_folder() is None
    assert shared("text-3", lambda: "made", read_text, write_text) == "made" and not (folder / "text-3").exists()


@pytest.mark.fast
def test_a_folder_that_cannot_be_made_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DAMA_CACHE_HOME", str(tmp_path / "file/cache"))
    assert cache_folder() is None
    monkeypatch.delenv("DAMA_CACHE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dama"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache/dama"


@pytest.mark.fast
def test_a_full_disk_is_logged_and_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    def full(value: str, path: Path) -> None:
        raise OSError(28, "No space left on device")

    assert shared("text-4", lambda: "made", read_text, full) == "made"
    assert "is not kept ([Errno 28] No space left on device)" in capsys.readouterr().out


@pytest.mark.fast
def test_entries_used_least_recently_are_removed_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "MAX_BYTES", 250)
    (folder / "rows-old").mkdir(parents=True)
    (folder / "locks").mkdir()
    for number, path in enumerate([folder / "rows-old/ids.npy", folder / "used", folder / "new", folder / "kept"]):
        path.write_bytes(bytes(100))
        os.utime(path if number else path.parent, (1000 + number, 1000 + number))
    prune(folder, keep=folder / "kept")
    assert sorted(path.name for path in folder.iterdir()) == ["kept", "locks", "new"]


def write_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Golden pairs, in a file and with images that count as many."""
    monkeypatch.setattr("dama.checked_pairs.LARGE", 1)
    monkeypatch.setattr("dama.image_table.MANY", 1)
    path = tmp_path / "pairs.json"
    path.write_bytes((GOLDEN / "dama/rlaifv_records.json").read_bytes())
    return path


def test_kept_pairs_are_those_of_the_file(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_many(tmp_path, monkeypatch)
    first, again = read_pair_file(path), read_pair_file(path)
    assert first == again and first.pairs == read_pairs(path) and first.fingerprint == pairs_fingerprint(first.pairs)
    assert [entry.name.partition("-")[0] for entry in folder.iterdir() if entry.name != "locks"] == ["pairs"]
    (entry,) = folder.glob("pairs-*")
    for damaged in (b"", b"{", entry.read_bytes()[:-20], b'"x"\n["too few"]\n', b'"x"\n7\n'):
        entry.write_bytes(damaged)
        assert read_pair_file(path) == first
    path.write_bytes(path.read_bytes() + b"\n")
    read_pair_file(path)
    assert len(list(folder.glob("pairs-*"))) == 2  # other bytes, another entry


def test_pairs_with_errors_are_not_kept(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_many(tmp_path, monkeypatch)
    path = tmp_path / "bad.jsonl"
    path.write_text('{"idx": 1, "image": "a.png", "question": "Q?", "chosen": "A", "rejected": "A"}\n')
    for _ in range(2):
        file = read_pair_file(path)
        with pytest.raises(PairsError, match="chosen and rejected answer are equal"):
            check_pair_file(file, tmp_path)
    assert not list(folder.glob("pairs-*"))


def test_images_are_opened_once_for_every_caller(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = read_pair_file(write_many(tmp_path, monkeypatch))
    names = sorted({pair.image for pair in file.pairs})
    images = GOLDEN / "images"
    first = table_of_images(names, images)
    assert first.opened == len(names) and table_path(names, images).parent == folder
    again = table_of_images(names, images)
    assert (again.opened, again.identity, again.good) == (0, first.identity, first.good)


def test_names_of_entries_depend_on_every_part() -> None:
    names = {cache_name("a", 1, "x"), cache_name("a", 1, "y"), cache_name("b", 1, "x"), cache_name("a", [1, "x"])}
    assert len(names) == 4
