"""One opening of each image for its checks and its digest, none for an unchanged image, one process for many."""

from __future__ import annotations

import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from PIL import Image

from dama.console import digest_of
from dama.image_table import ImageTable, check_images, kept_table, read_table
from dama.images import find_image_errors
from dama.pairs import PreferencePair, check_pairs, image_digests

HOUR_NS = 3_600_000_000_000


def write_image(path: Path, color: tuple[int, int, int]) -> None:
    """An image that was last modified an hour ago."""
    Image.new("RGB", (8, 8), color).save(path)
    earlier = time.time_ns() - HOUR_NS
    os.utime(path, ns=(earlier, earlier))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    for number in range(4):
        write_image(folder / f"{number}.png", (number, 0, 0))
    write_image(folder / "sub/a.jpg", (9, 9, 9))
    Image.effect_noise((64, 64), 50).save(folder / "torn.png")
    os.truncate(folder / "torn.png", 1000)
    (folder / "text.png").write_text("{}")
    (folder / "out.png").symlink_to(tmp_path / "elsewhere.png")
    return folder


GOOD = ["0.png", "1.png", "2.png", "3.png", "sub/a.jpg"]
BAD = ["torn.png", "text.png", "missing.png", "sub"]
OUTSIDE = ["out.png", "../x.png", "/etc/x.png"]
NAMES = [*GOOD, *BAD, *OUTSIDE]


def pairs_of(names: list[str]) -> list[PreferencePair]:
    return [PreferencePair(str(i), name, "What?", f"A {i}.", f"B {i}.") for i, name in enumerate(names)]


def test_errors_and_digests_are_those_of_the_separate_checks(images: Path) -> None:
    table = check_images(NAMES, images)
    assert table.errors == find_image_errors(NAMES, images)
    assert set(table.bad) == set(BAD) and set(table.outside) == set(OUTSIDE)
    pairs = pairs_of(GOOD)
    assert table.digests_of(pairs) == image_digests(pairs, images)
    assert digest_of(table.digests_of(pairs)) == digest_of(image_digests(pairs, images))
    assert table.opened == len(GOOD) + 2  # the missing one and the folder are not opened


def test_pairs_are_checked_by_the_table(images: Path) -> None:
    pairs = pairs_of([*GOOD, *BAD])
    expected = check_pairs(pairs, images, "skip")
    assert check_pairs(pairs, images, "skip", images=check_images([*GOOD, *BAD], images).errors) == expected


def test_an_unchanged_image_is_not_opened_again(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    first = kept_table(NAMES, images, path)
    again = kept_table(NAMES, images, path)
    assert again == ImageTable(first.good, first.bad, first.outside, again.finished_ns)
    assert (first.opened, again.opened) == (7, 2)  # what cannot be used is looked at each time


@pytest.mark.parametrize("change", ["content", "time", "replaced", "just now"])
def test_a_changed_image_is_opened_again(images: Path, tmp_path: Path, change: str) -> None:
    """Also one with the same size and time under another inode, or whose time is too near to that of the check."""
    target, path = images / "1.png", tmp_path / "table.json"
    status = target.stat()
    if change == "just now":
        os.utime(target)
    first = kept_table(GOOD, images, path)
    if change == "content":
        Image.new("RGB", (9, 9), (200, 1, 1)).save(target)
    elif change == "time":
        os.utime(target, ns=(status.st_mtime_ns - 1, status.st_mtime_ns - 1))
    elif change == "replaced":
        Image.new("RGB", (8, 8), (99, 0, 0)).save(images / "new.png")
        os.utime(images / "new.png", ns=(status.st_mtime_ns, status.st_mtime_ns))
        os.replace(images / "new.png", target)
    again = kept_table(GOOD, images, path)
    assert again.opened == 1
    assert again.digests_of(pairs_of(GOOD)) == image_digests(pairs_of(GOOD), images)
    assert (again.good["1.png"].digest != first.good["1.png"].digest) is (change in ("content", "replaced"))


def test_another_folder_or_a_torn_file_starts_anew(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    kept_table(GOOD, images, path)
    assert read_table(path, images / "sub") is None and read_table(tmp_path / "none", images) is None
    for content in ("", "[]", '{"version": 1}', json.dumps({"version": 2, "folders": [str(images)]})):
        path.write_text(content)
        assert read_table(path, images) is None
        assert kept_table(GOOD, images, path).opened == len(GOOD)


def make_table(arguments: tuple[Path, Path, float]) -> tuple[int, dict[str, str], int]:
    """In a process of its own, all of which begin at one time."""
    images, path, begin = arguments
    time.sleep(max(0.0, begin - time.time()))
    table = kept_table(NAMES, images, path)
    return table.opened, table.digests_of(pairs_of(GOOD)), os.getpid()


def test_of_processes_that_start_together_one_opens_the_images(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    with ProcessPoolExecutor(4, mp_context=multiprocessing.get_context("spawn")) as pool:
        begin = time.time() + 3
        results = list(pool.map(make_table, [(images, path, begin)] * 4, chunksize=1))
    opened = sorted((result[0] for result in results), reverse=True)
    assert opened[0] == 7 and set(opened[1:]) <= {0, 2}
    assert all(result[1] == image_digests(pairs_of(GOOD), images) for result in results)
