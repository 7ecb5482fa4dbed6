"""dama.images: only the accepted formats are opened, everywhere, and what is said of others is the same every time."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dama.images import (
    FORMATS,
    ImageError,
    load_image,
    open_image,
    probe_image,
    resolve_image,
    resolve_images,
)
from dama.pairs import PreferencePair, check_pairs
from eval.page_images import shrunk
from llava.generation.answers import check_requests
from llava.generation.request import Request
from llava.mm_utils import load_image_from_base64
from llava.serve.images import read_image
from tests.dama.prepare_sets import picture, prepare, write_lines

pytestmark = pytest.mark.fast

ROOT = Path(__file__).parents[2]
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def written_as(format: str) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (9, 9), "red").save(file, format)
    return file.getvalue()


FOREIGN = {name: written_as(name) for name in ("PPM", "PCX", "TGA", "ICO", "ICNS", "SGI", "PDF", "IM")}
FOREIGN |= {
    "EPS": EPS,
    "EPS of Windows": b"\xc5\xd0\xd3\xc6" + (30).to_bytes(4, "little") * 7 + EPS,
    "HEIC": b"\x00\x00\x00\x18ftypheic" + bytes(40),
    "AVIF": b"\x00\x00\x00\x18ftypavif" + bytes(40),
    "HTML": b"\n<!DOCTYPE html><title>Sign in</title>",
    "SVG": b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "JSON": b'{"error": "not found"}',
    "nothing": b"",
    "zeros": bytes(100),
}

OPENERS: dict[str, Callable[[Path], Any]] = {
    "open_image": lambda path: open_image(path).load(),
    "open_image of bytes": lambda path: open_image(io.BytesIO(path.read_bytes())).load(),
    "load_image": load_image,
    "probe_image": probe_image,
    "pairs": lambda path: check_pairs([PreferencePair("1", path.name, "What?", "A.", "B.")], path.parent),
    "evaluation": lambda path: check_requests([Request("1", "What?", path.name, path.name)], path.parent),
    "page": shrunk,
    "base64": lambda path: load_image_from_base64(base64.b64encode(path.read_bytes())).load(),
    "chat": lambda path: read_image(path.read_bytes(), path.name),
}


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `gs` that only leaves a mark that it was started."""
    (tmp_path / "bin").mkdir()
    program, mark = tmp_path / "bin/gs", tmp_path / "started"
    program.write_text(f"#!/bin/sh\ntouch {mark}\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    return mark


@pytest.mark.parametrize("opener", OPENERS)
def test_other_formats_are_refused_and_start_no_program(opener: str, tmp_path: Path, ghostscript: Path) -> None:
    for number, (kind, content) in enumerate(FOREIGN.items()):
        path = tmp_path / f"{number}.jpg"  # what it is called does not matter
        path.write_bytes(content)
        with pytest.raises(ValueError) as caught:
            OPENERS[opener](path)
        assert "0x" not in str(caught.value), kind
    assert not ghostscript.exists()


@pytest.mark.parametrize("format", [*FORMATS, "MPO"])
def test_accepted_formats_open_everywhere(format: str, tmp_path: Path) -> None:
    path = tmp_path / "image.dat"
    path.write_bytes(written_as(format))
    for opener in OPENERS.values():
        opener(path)


def test_what_such_a_file_is_stands_in_the_message(tmp_path: Path) -> None:
    said = {"EPS": "PostScript", "PDF": "PDF", "HEIC": "HEIC", "HTML": "HTML", "Git LFS": "a Git LFS pointer",
            "nothing": "an empty file", "zeros": "another format"}  # fmt: skip
    for kind, words in said.items():
        with pytest.raises(ImageError, match=rf"expected PNG, .* or TIFF, got {words}"):
            probe_image(io.BytesIO(FOREIGN[kind]))


def test_no_module_opens_images_another_way() -> None:
    """`Image.open` is called in dama/images.py and nowhere else in what is installed."""
    calls = []
    for folder in ("dama", "llava", "eval", "playground"):
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and ast.unparse(node) in ("Image.open", "PIL.Image.open"):
                    calls.append(path.relative_to(ROOT).as_posix())
    assert calls == ["dama/images.py"]


# ---------------------------------------------------------------------------------------------- the same every time


def bad_images(folder: Path) -> Path:
    """Rows whose images cannot be used for every reason there is, beside a good one."""
    folder.mkdir(parents=True)
    contents = FOREIGN | {
        "good": picture(0),
        "torn JPEG": picture(1, "JPEG")[:-300],
        "torn PNG": picture(1)[:-100],
        "torn TIFF": written_as("TIFF")[:-60],
        "torn GIF": written_as("GIF")[:20],
        "torn WEBP": written_as("WEBP")[:-20],
        "torn BMP": written_as("BMP")[:-60],
    }
    for number, content in enumerate(contents.values()):
        (folder / f"{number}.png").write_bytes(content)
    (folder / "loop.png").symlink_to("loop.png")
    (folder.parent / "secret.png").write_bytes(picture(5))
    (folder / "out.png").symlink_to(folder.parent / "secret.png")
    (folder / "folder.png").mkdir()
    names = [f"{number}.png" for number in range(len(contents))]
    names += ["loop.png", "out.png", "folder.png", "missing.png", "../secret.png", "a" * 5000, "/etc/hosts", "\0"]
    row = {"question": "What?", "chosen": "A cat.", "rejected": "A dog."}
    return write_lines(folder / "rows.jsonl", [row | {"id": i, "image": name} for i, name in enumerate(names)])


def test_three_runs_in_three_places_leave_the_same_files(tmp_path: Path) -> None:
    sums = []
    for place in ("a", "b/deeper", "c (it leads to)"):
        source = bad_images(tmp_path / place / "rows")
        prepare(source, "--out", tmp_path / place / "out")
        sums.append(hashlib.sha256((tmp_path / place / "out/SHA256SUMS").read_bytes()).hexdigest())
        dropped = (tmp_path / place / "out/dropped.jsonl").read_text()
        assert "0x" not in dropped and str(tmp_path) not in dropped and "Errno" not in dropped
        assert len(dropped.splitlines()) == len(source.read_text().splitlines()) - 1
    assert len(set(sums)) == 1


def test_skipped_pairs_have_the_same_reason_every_time(tmp_path: Path) -> None:
    reasons = set()
    for place in ("a", "b"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "good.png").write_bytes(picture(0))
        (tmp_path / place / "bad.png").write_bytes(FOREIGN["HEIC"])
        pairs = [PreferencePair(name, f"{name}.png", "What?", "A.", "B.") for name in ("good", "bad")]
        _, skipped = check_pairs(pairs, tmp_path / place, "skip")
        reasons.add(json.dumps([pair.reason for pair in skipped]))
    assert len(reasons) == 1 and "0x" not in reasons.pop()


NAMES = [
    "a.png", "sub/a.png", "sub//a.png", "./a.png", "sub/./a.png", "sub/", "sub/.", ".", "", "missing.png",
    "no/such/a.png", "/a.png", "\\a.png", "c:a.png", "../images/a.png", "sub/../a.png", "..", "link.png", "out.png",
    "linked/a.png", "away/b.png", "loop/a.png", "loop", "a\0.png", "a\0/b.png", "..a.png", "a.png/b",
    "x" * 300, f"{'x' * 300}/a.png",
]  # fmt: skip


@pytest.mark.parametrize("second", [False, True], ids=["one folder", "two folders"])
def test_many_paths_are_resolved_as_one_by_one(tmp_path: Path, second: bool) -> None:
    """Whether they share a folder with others, follow links, leave the folder or name nothing."""
    images, other = tmp_path / "images", tmp_path / "other"
    (images / "sub").mkdir(parents=True)
    other.mkdir()
    for path in (images / "a.png", images / "sub" / "a.png", other / "b.png"):
        path.write_bytes(b"")
    links = {"link.png": "sub/a.png", "out.png": "../other/b.png", "linked": "sub", "away": "../other", "loop": "loop"}
    for name, target in links.items():
        (images / name).symlink_to(target)
    folders = [images, other] if second else images
    inside, outside = resolve_images(NAMES, folders)
    assert len(inside) + len(outside) == len(NAMES) and len(inside) > 9 and len(outside) > 5
    for name in NAMES:
        try:
            assert resolve_image(folders, name) == inside[name], name
        except (ValueError, OSError, RuntimeError) as error:
            assert outside[name] == str(error), name
