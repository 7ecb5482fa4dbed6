"""One table of malformed inputs: each ends in a clear error, or in a row that is left out, counted and listed.

A case says which command gets what, and how it must end. Beside every bad row stands a good one, which must survive.
"""

from __future__ import annotations

import json
import os
import re
import struct
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pytest
from PIL import Image

from dama import chat
from dama.cli import main
from dama.console import USER_ERROR
from dama.hardness.split_llm import PROMPT
from dama.pairs import read_pairs
from tests.dama.prepare_sets import RLAIFV, card, lines, picture, prepare, rlaifv_row, write_lines, write_parquet
from tests.dama.tiny_clip import write_tiny_clip
from tests.openai_server import Call, Scripted, ScriptedServer, completion, failure, malformed, wrong_schema

Words = Sequence[object]


class Case(NamedTuple):
    """`words` writes the input into an empty folder and gives the command's words, --out apart.

    The end is an `error` (a pattern its message matches), or one row left out for `reason` with `detail` (a pattern).
    """

    words: Callable[[Path], Words]
    error: str = ""
    reason: str = ""
    detail: str = ""
    command: str = "prepare"


# ------------------------------------------------------------------------------------------------- what is malformed

GOOD = {"idx": "good", "image": "good.png", "question": "What?", "chosen": "A cat.", "rejected": "A dog."}
OTHER = GOOD | {"idx": "bad", "chosen": "A bird."}
DEEP = "[" * 100_000
TURN = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}]


def rows(*bad: Any) -> Callable[[Path], Words]:
    """JSON lines of a good row and these, beside the good row's picture."""

    def words(folder: Path) -> Words:
        (folder / "good.png").write_bytes(picture(0))
        return [write_lines(folder / "rows.jsonl", [GOOD, *bad])]

    return words


def line(bad: bytes) -> Callable[[Path], Words]:
    """A good row and a line that json.dumps would not write."""

    def words(folder: Path) -> Words:
        (path,) = rows()(folder)
        assert isinstance(path, Path)
        path.write_bytes(path.read_bytes() + bad)
        return [path]

    return words


def file(name: str, content: bytes) -> Callable[[Path], Words]:
    def words(folder: Path) -> Words:
        (folder / name).write_bytes(content)
        return [folder / name]

    return words


def parquet(*bad: dict[str, Any], schema: pa.Schema = RLAIFV) -> Callable[[Path], Words]:
    """Parquet of a good row and these."""
    return lambda folder: [write_parquet(folder / "rows.parquet", [rlaifv_row(0), *bad], schema)]


def inside(content: bytes | None, path: str | None = None) -> dict[str, Any]:
    """A row of RLAIF-V with this for its picture's file."""
    return rlaifv_row(1, image_path=path) | {"image": {"bytes": content, "path": path}}


def beside(name: str, make: Callable[[Path], object]) -> Callable[[Path], Words]:
    """A row that names a picture, which `make` puts there; the folder of pictures is not the outermost one."""

    def words(folder: Path) -> Words:
        (folder / "secret.png").write_bytes(picture(9))
        (folder / "images").mkdir()
        make(folder / "images" / name)
        return [*rows(OTHER | {"image": name})(folder / "images")]

    return words


def nothing(path: Path) -> None:
    """The picture is not put there."""


def flags(*more: object) -> Callable[[Path], Words]:
    return lambda folder: [*rows()(folder), *more]


def broken_parquet(folder: Path) -> Words:
    """One byte of an answer turned, as by a bad disk; the page's checksum tells."""
    table = pa.Table.from_pylist([rlaifv_row(n) for n in range(50)], RLAIFV)
    pa.parquet.write_table(table, folder / "rows.parquet", compression="none", write_page_checksum=True)
    content = (folder / "rows.parquet").read_bytes()
    (folder / "rows.parquet").write_bytes(content.replace(b"Cat 33.", b"Rat 33."))
    return [folder / "rows.parquet"]


def png(width: int, height: int) -> bytes:
    """A PNG of 57 bytes that claims to be this large."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def not_utf8(folder: Path) -> Words:
    """Arrow writes what it is given, so a text column can hold any bytes."""
    columns = {"question": ["What?"] * 2, "rejected": ["A dog."] * 2, "image_path": ["good.png"] * 2}
    chosen = pa.array([b"A cat.", b"A c\xe4t."]).view(pa.string())
    pa.parquet.write_table(pa.table({**columns, "chosen": chosen, "id": ["good", "bad"]}), folder / "rows.parquet")
    (folder / "good.png").write_bytes(picture(0))
    return [folder / "rows.parquet"]


def wrong_depth(path: Path) -> None:
    Image.new("F", (4, 4)).save(path, "TIFF")


def hardness(**bad: Any) -> Callable[[Path], Words]:
    """The command hardness on a good row and another, scores as given."""

    def words(folder: Path) -> Words:
        scores = {"chosen_logits": "[0.3]", "rejected_logits": "[0.1]"}
        (source,) = rows(OTHER | scores | bad)(folder)
        assert isinstance(source, Path)
        write_lines(source, [GOOD | scores, OTHER | scores | bad])
        return ["--data", source, "--image_folder", folder, "--from_scores"]

    return words


# ---------------------------------------------------------------------------------------------------------- the table

HARDNESS = "hardness"
UNREADABLE, TEXT, IMAGE = "unreadable row", "unusable text", "unusable image"
TABLE = {
    # files
    "no such file": Case(lambda folder: [folder / "none.parquet"], error="none.parquet: no such file"),
    "a folder without tables": Case(lambda folder: [folder], error="none of its 0 files is a table"),
    "a file of another kind": Case(file("a.txt", b"x"), error=r"a.txt: 1 error(?s:.*)end in .parquet"),
    "Parquet of no bytes": Case(file("a.parquet", b""), error="a.parquet: .*\nRemedy: .*truncated"),
    "Parquet cut off": Case(file("a.parquet", b"PAR1" * 99), error="a.parquet: .*\nRemedy: .*truncated"),
    "JSON called Parquet": Case(file("a.parquet", b'[{"idx": 1}]'), error="Remedy: .*or not Parquet"),
    "Parquet with a damaged page": Case(broken_parquet, error=r"damaged after row \d+ (?s:.*)fetch it again"),
    "Parquet without its columns": Case(
        parquet(schema=pa.schema({"question": pa.string(), "idx": pa.int64()})),
        error="3 errors(?s:.*)no column 'chosen'(?s:.*)no column 'image', (?s:.*)it has question, idx",
    ),
    "JSON that is not UTF-8": Case(file("a.json", b'[{"a": "\xff"}]'), error="byte 8 is not UTF-8"),
    "a JSON list that is torn": Case(file("a.json", b'[{"a": 1},\n{"b"'), error="line 2: .*\n.*is torn"),
    "a JSON list nested too deep": Case(file("a.json", DEEP.encode()), error="not JSON of preference pairs"),
    "a file without rows": Case(file("a.jsonl", b"\n\n"), error="a.jsonl: no rows in it"),
    "a hub name that is none": Case(lambda _: ["hf://RLAIF-V"], error="expected hf://owner/name"),
    # flags
    "a column that is not there": Case(
        lambda folder: [*parquet()(folder), "--column", "question=ask"],
        error=r"no column 'ask' \(--column\)\nRemedy: it has ds_name, image",
    ),
    "wrong flags, all at once": Case(
        flags("--column", "ask=a", "--hold_out", "-1", "--workers", "0", "--image_folder", "/nowhere"),
        error="--column ask=a: .*\n--hold_out -1.0: .*\n--workers 0: .*\n--image_folder /nowhere: no such folder",
    ),
    "a generator that no row has": Case(flags("--generator", "x"), error="no row of x(?s:.*)1  .not stated"),
    "a hold-out of everything": Case(flags("--hold_out", "9"), error="no pair is left to train on"),
    # rows
    "a line that is torn": Case(line(b'{"idx": "bad", "ima'), reason=UNREADABLE, detail="not JSON, perhaps"),
    "a line that is not UTF-8": Case(line(b'{"idx": "\xff"}'), reason=UNREADABLE, detail="byte 9 is not"),
    "a line nested too deep": Case(line(DEEP.encode()), reason=UNREADABLE, detail="not JSON of a"),
    "a number of 5000 digits": Case(line(b"9" * 5000), reason=UNREADABLE, detail="not JSON of a"),
    "a row that is no record": Case(rows([1, 2]), reason=UNREADABLE, detail="expected a record .* got list"),
    "a row without an answer": Case(
        rows({k: v for k, v in OTHER.items() if k != "chosen"}), reason=UNREADABLE, detail="no field chosen"
    ),
    "an answer that is a number": Case(
        rows(OTHER | {"chosen": 5}), reason=UNREADABLE, detail="field chosen: expected text, got int"
    ),
    "an id that is none": Case(rows(OTHER | {"idx": [1]}), reason=UNREADABLE, detail="field idx: expected"),
    "a text column that is not UTF-8": Case(not_utf8, reason=UNREADABLE, detail="text that is not UTF-8"),
    "a cell of Parquet that is null": Case(
        parquet(rlaifv_row(1, rejected=None)), reason=UNREADABLE, detail="no field rejected"
    ),
    "half of a surrogate pair": Case(rows(OTHER | {"idx": "\ud83d"}), reason=UNREADABLE, detail="surrogate"),
    "scores that are NaN": Case(
        rows(OTHER | {"chosen_logits": [float("nan")], "rejected_logits": [0.1]}),
        reason=UNREADABLE,
        detail="field chosen_logits: expected a list of finite numbers",
    ),
    "a conversation without answer": Case(
        rows(OTHER | {"chosen": [*TURN, TURN[0]]}), reason=UNREADABLE, detail="the last one the answer"
    ),
    "two images, one placeholder": Case(
        rows({"prompt": "<image> ?", "chosen": "A", "rejected": "B", "images": ["good.png"] * 2}),
        reason=UNREADABLE,
        detail="expected as many <image> as images, 2, or none, got 1",
    ),
    "a CSV row of too many cells": Case(
        lambda folder: [
            *rows()(folder),
            *file("more.csv", b"question,chosen,rejected,image\n?,A,B,good.png,\n")(folder),
        ],
        reason=UNREADABLE,
        detail="expected 4 cells as in the first line, got 5",
    ),
    "a picture of another type": Case(
        rows(OTHER | {"image": 7}), reason=UNREADABLE, detail="field image: expected a path, .* got int"
    ),
    # texts
    "an answer of 10 MB": Case(
        rows(OTHER | {"chosen": "word " * 2_000_000}), reason=TEXT, detail="chosen: 10000000 characters"
    ),
    "an answer of 10 MB in Parquet": Case(
        parquet(rlaifv_row(1, chosen="word " * 2_000_000)), reason=TEXT, detail="chosen: 10000000 characters"
    ),
    "an empty answer": Case(rows(OTHER | {"rejected": "\n"}), reason=TEXT, detail="rejected answer is empty"),
    "equal answers": Case(rows(OTHER | {"rejected": "A bird. "}), reason=TEXT, detail="answer are equal"),
    "a placeholder in an answer": Case(
        rows(OTHER | {"chosen": "A <image> bird."}), reason=TEXT, detail="<image> inside the text"
    ),
    # pictures
    "a picture of no bytes": Case(parquet(inside(b"")), reason=IMAGE, detail=r"empty \(0 bytes\)"),
    "no picture": Case(parquet(inside(None)), reason=IMAGE, detail="the row has no picture"),
    "a JPEG cut off": Case(parquet(inside(picture(1, "JPEG")[:-300])), reason=IMAGE, detail="truncated or damaged"),
    "a PNG cut off": Case(parquet(inside(picture(1)[:-100])), reason=IMAGE, detail="unreadable"),
    "text for a picture": Case(parquet(inside(b"<svg/>")), reason=IMAGE, detail="unreadable .* got HTML, SVG"),
    "PostScript for a picture": Case(
        parquet(inside(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")),
        reason=IMAGE,
        detail="unreadable .* got PostScript",
    ),
    "a decompression bomb": Case(parquet(inside(png(30_000, 30_000))), reason=IMAGE, detail="bomb"),
    "a picture too large": Case(
        parquet(inside(png(9_500, 9_500))), reason=IMAGE, detail=r"9500 x 9500 pixels, more than \d+"
    ),
    "32 bits a pixel": Case(beside("a.tif", wrong_depth), reason=IMAGE, detail="32 bits a pixel"),
    "a picture that is missing": Case(beside("a.png", nothing), reason=IMAGE, detail="is missing: a.png"),
    "a folder for a picture": Case(beside("a.png", Path.mkdir), reason=IMAGE, detail="no regular file"),
    "a pipe for a picture": Case(beside("a.png", os.mkfifo), reason=IMAGE, detail="no regular file"),
    "a picture of 100 GB": Case(
        beside("a.png", lambda path: (path.touch(), os.truncate(path, 100 << 30))),
        reason=IMAGE,
        detail="image has 107374182400 bytes, more than",
    ),
    "a path out of the folder": Case(beside("../secret.png", nothing), reason=IMAGE, detail="leaves the image folder"),
    "an absolute path": Case(rows(OTHER | {"image": "/etc/hosts"}), reason=IMAGE, detail="is absolute"),
    "a link out of the folder": Case(
        beside("a.png", lambda path: path.symlink_to("../secret.png")),
        reason=IMAGE,
        detail="leaves the image folder",
    ),
    "a link to itself": Case(beside("a.png", lambda path: path.symlink_to(path)), reason=IMAGE, detail="loop|levels"),
    "a zero byte in a path": Case(rows(OTHER | {"image": "a\0.png"}), reason=IMAGE, detail="names no file"),
    "a path of 5000 letters": Case(rows(OTHER | {"image": "a" * 5000}), reason=IMAGE, detail="too long"),
    # repeated
    "an id used twice": Case(rows(OTHER | {"idx": "good"}), reason="repeated id", detail="another pair has it"),
    "a pair there twice": Case(rows(GOOD | {"idx": "bad"}), reason="repeated pair", detail="jsonl line 1"),
    # the stage after it
    "hardness: NaN scores": Case(
        hardness(chosen_logits="[NaN]"), error="chosen_logits: expected a list of finite numbers", command=HARDNESS
    ),
    "hardness: no scores": Case(hardness(chosen_logits=None, rejected_logits=None), error="logits", command=HARDNESS),
    "hardness: an id used twice": Case(hardness(idx="good"), error="id 'good' is used by 2 rows", command=HARDNESS),
    "hardness: a path out of the folder": Case(
        hardness(image="../x.png"), error="leaves the image folder", command=HARDNESS
    ),
    "hardness: a missing picture": Case(hardness(image="none.png"), error="image is missing", command=HARDNESS),
}

# Servers that split answers: what each replies, and what becomes of the four answers of two pairs.
SERVERS: dict[str, tuple[Callable[[Call], str | Scripted], dict[str, int]]] = {
    "a server that answers 500": (lambda call: failure(500), {"no reply": 4}),
    "a server whose JSON breaks off": (lambda call: malformed(), {"no reply": 4}),
    "a server that answers something else": (lambda call: wrong_schema(), {"no reply": 4}),
    "a server that says nothing": (lambda call: "", {"no statements": 4}),
    "a server that talks nonsense": (lambda call: "colourless green ideas", {"added words": 4}),
    "a server that repeats the prompt": (lambda call: call.text, {"added words": 4}),
    "a server that is late at first": (
        lambda call: completion(call.text.removeprefix(PROMPT), delay=5.0 * (call.attempt == 0)),
        {},
    ),
}


# ----------------------------------------------------------------------------------------------------- how it must end


@pytest.mark.parametrize("name", [name for name, case in TABLE.items() if case.command == "prepare" and case.error])
def test_prepare_refuses(name: str, tmp_path: Path) -> None:
    case = TABLE[name]
    with pytest.raises(ValueError, match=case.error):
        prepare(*case.words(make(tmp_path)), "--out", tmp_path / "out")
    assert not (tmp_path / "out/pairs.jsonl").exists()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("name", [name for name, case in TABLE.items() if case.reason])
def test_prepare_leaves_out_counts_and_lists(name: str, tmp_path: Path) -> None:
    case = TABLE[name]
    prepare(*case.words(make(tmp_path)), "--out", tmp_path / "out")
    assert len(read_pairs(tmp_path / "out/pairs.jsonl")) == 1
    assert card(tmp_path / "out")["left_out"] == {case.reason: 1}
    (dropped,) = lines(tmp_path / "out/dropped.jsonl")
    assert dropped["reason"] == case.reason and dropped["place"]
    assert len(json.dumps(dropped)) < 2000
    assert re.search(case.detail, dropped["detail"])


@pytest.mark.parametrize("name", [name for name, case in TABLE.items() if case.command == "hardness"])
def test_hardness_refuses(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    case = TABLE[name]
    words = ["hardness", *case.words(make(tmp_path)), "--out", tmp_path / "out", "--workers", 0]
    assert main(list(map(str, words))) == USER_ERROR
    error = capsys.readouterr().err
    assert re.search(case.error, error) and "Traceback" not in error


@pytest.mark.parametrize("name", SERVERS)
def test_hardness_does_without_a_bad_server_and_counts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "_LONGEST_PAUSE", 0.05)
    reply, fallbacks = SERVERS[name]
    (source,) = rows(OTHER | {"image": "good.png"})(tmp_path)
    clip, out = write_tiny_clip(tmp_path / "clip"), tmp_path / "out"
    with ScriptedServer(reply) as url:
        llm = ["--splitter", "llm", "--base_url", url, "--judge_model", "any", "--request_timeout", 1]
        words = ["hardness", "--data", source, "--image_folder", tmp_path, "--out", out, "--clip", clip, *llm]
        assert main(list(map(str, [*words, "--workers", 0]))) == 0
    assert json.loads((out / "manifest.json").read_text())["summary"]["fallbacks"] == fallbacks
    assert [row["id"] for row in lines(out / "hardness.jsonl")] == ["good", "bad"]


def make(folder: Path) -> Path:
    """The folder that a case may fill, apart from the output's."""
    (folder / "src").mkdir()
    return folder / "src"


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) + len(SERVERS) >= 40
    assert all(bool(case.error) != bool(case.reason and case.detail) for case in TABLE.values())


def test_names_inside_parquet_write_nowhere_else(tmp_path: Path) -> None:
    """A picture's own name never becomes a path: its file is named by its bytes."""
    source = write_parquet(tmp_path / "a/b/rows.parquet", [inside(picture(0), "../../../stolen.png")])
    before = set(tmp_path.rglob("*"))
    prepare(source, "--out", tmp_path / "out")
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(tmp_path / "out")} == before
    (pair,) = read_pairs(tmp_path / "out/pairs.jsonl")
    assert lines(tmp_path / "out/pairs.jsonl")[0]["origin_image"] == "../../../stolen.png"
    assert ".." not in pair.image


def test_no_row_left_is_an_error_that_lists_the_reasons(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "rows.jsonl", [GOOD, [1]])
    with pytest.raises(ValueError, match="no pair is left to train on") as caught:
        prepare(source, "--out", tmp_path / "out")
    for part in ("1 x unusable image", "1 x unreadable row", "line 1: image is missing: good.png", "Remedy"):
        assert part in str(caught.value)
    assert len(lines(tmp_path / "out/dropped.jsonl")) == 2
    assert not (tmp_path / "out/pairs.jsonl").exists()
