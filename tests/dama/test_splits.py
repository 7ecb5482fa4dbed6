"""dama.prepare: a data set's other splits are not trained on unasked, and what is counted adds up."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dama.pairs import PairsError, read_pairs
from dama.prepare.sources import SourceError, find_files, split_of
from tests.dama.prepare_sets import card, lines, prepare, rlaifv_row, write_lines, write_parquet
from tests.dama.test_prepare import PROGRAM, ROOT

NAMES = {
    "train-00000-of-00002.parquet": "train",
    "data/train-00001-of-00002.parquet": "train",
    "train.parquet": "train",
    "train_prefs-00000-of-00001.parquet": "train",
    "training/0.parquet": "train",
    "test-00000-of-00001.parquet": "test",
    "Test.parquet": "test",
    "data/test/0.parquet": "test",
    "pairs_eval.parquet": "test",
    "test_prefs-00000-of-00001.parquet": "test",
    "validation-00000-of-00001.parquet": "validation",
    "val2014.parquet": "validation",
    "dev/x.parquet": "validation",
    "testset.parquet": "test",
    "train_data/0.parquet": "train",
    "evaldata-0.parquet": "test",
    "trainsplit.parquet": "train",
    "latest.parquet": None,
    "dataset.parquet": None,
    "pairs.parquet": None,
    "trained_on.parquet": None,
    "contest/0.parquet": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_the_split_in_a_name(name: str) -> None:
    assert split_of(name) == NAMES[name]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A pair in each file, its id the file's place among them."""
    for number, name in enumerate(("train-0.parquet", "test-0.parquet", "x/validation.parquet", "rest.parquet")):
        write_parquet(tmp_path / "src" / name, [rlaifv_row(number)])
    return tmp_path / "src"


def ids(out: Path) -> list[str]:
    return sorted(pair.id for pair in read_pairs(out / "pairs.jsonl"))


@pytest.mark.parametrize(
    ("words", "found"),
    [((), ["0", "3"]), (("--split", "train"), ["0", "3"]), (("--split", "test"), ["1"]),
     (("--split", "validation"), ["2"]), (("--split", "all"), ["0", "1", "2", "3"])],
)  # fmt: skip
@pytest.mark.parametrize("form", ["folder", "glob"])
def test_only_the_split_is_read_and_the_others_are_named(
    form: str,
    words: tuple[str, ...],
    found: list[str],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = folder if form == "folder" else folder / "**/*.parquet"
    prepare(source, "--out", tmp_path / "out", *words)
    assert ids(tmp_path / "out") == found
    aside = card(tmp_path / "out").get("left_aside", {})
    page = (tmp_path / "out/data_card.md").read_text()
    assert len(aside) == 4 - len(found)
    assert all(f"| {name} | {why} |" in page and why.startswith("split ") for name, why in aside.items())
    assert ("left aside: " in capsys.readouterr().out) == bool(aside)
    assert card(tmp_path / "out")["settings"].get("split") == (words[1] if words else None)


def test_a_file_that_is_named_by_itself_is_read(folder: Path, tmp_path: Path) -> None:
    prepare(folder / "test-0.parquet", "--out", tmp_path / "out")
    assert ids(tmp_path / "out") == ["1"] and "left_aside" not in card(tmp_path / "out")
    with pytest.raises(SourceError, match="no file of the split train, only of test\nRemedy: --split"):
        prepare(folder / "test-0.parquet", "--split", "train", "--out", tmp_path / "other")


def test_a_glob_that_the_shell_expands_is_read_like_any(folder: Path, tmp_path: Path) -> None:
    files = sorted(folder.rglob("*.parquet"))
    prepare(*files, "--out", tmp_path / "out")
    assert ids(tmp_path / "out") == ["0", "3"] and len(card(tmp_path / "out")["left_aside"]) == 2
    prepare(*files, "--split", "all", "--out", tmp_path / "all")
    assert ids(tmp_path / "all") == ["0", "1", "2", "3"]


def test_a_folder_without_the_split_is_an_error(folder: Path) -> None:
    (folder / "train-0.parquet").unlink()
    (folder / "rest.parquet").unlink()
    with pytest.raises(SourceError, match="no file of the split train, only of test, validation\nRemedy: --split"):
        find_files([str(folder)])


def test_a_folder_without_splits_is_read_as_before(tmp_path: Path) -> None:
    for name in ("a/1.parquet", "latest.parquet"):
        write_parquet(tmp_path / name, [])
    assert len(find_files([str(tmp_path)])) == 2


@pytest.mark.parametrize(
    ("inside", "found"), [("", ["0"]), ("/data/*.parquet", ["0"]), ("/data/test-0.parquet", ["1"])]
)
def test_a_hub_set_alike(inside: str, found: list[str], tmp_path: Path) -> None:
    """From the hub's own cache layout, without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub/datasets--some--pairs"
    for number, name in enumerate(("train", "test")):
        write_parquet(repository / f"snapshots/{commit}/data/{name}-0.parquet", [rlaifv_row(number)])
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(commit)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    line = [sys.executable, "-c", PROGRAM, f"hf://some/pairs{inside}", "--out", str(tmp_path / "out")]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ids(tmp_path / "out") == found
    aside = card(tmp_path / "out").get("left_aside", {})
    assert aside == ({} if found == ["1"] else {"data/test-0.parquet": "split test"})


def test_rows_and_reasons_are_counted_alike_where_no_pair_is_left(tmp_path: Path) -> None:
    """Twelve rows of two reasons: the first ten are listed, and the numbers are of rows, not of lines."""
    source = write_lines(tmp_path / "rows.jsonl", [{"question": "?"}] * 5 + [[1]] * 7)
    with pytest.raises(PairsError) as caught:
        prepare(source, "--out", tmp_path / "out")
    message = str(caught.value).splitlines()
    assert message[0] == "no pair is left to train on: 12 rows, 12 left out, 0 held out"
    assert [line.strip() for line in message[1:3]] == ["7 x unreadable row", "5 x unusable image"]
    assert message[-2].strip() == "... and 2 more rows"
    assert len(message) == 1 + 2 + 10 + 1 + 1 and len(lines(tmp_path / "out/dropped.jsonl")) == 12
