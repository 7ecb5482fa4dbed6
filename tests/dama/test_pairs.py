"""dama.pairs: the formats it reads, the identity of pairs, and every fault it must name before long work starts."""

from __future__ import annotations

import json
import struct
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from dama.images import load_image, resolve_image
from dama.pairs import (
    PairsError,
    PreferencePair,
    ReferenceLogps,
    SkippedPair,
    check_pairs,
    image_digests,
    pairs_fingerprint,
    parse_pairs,
    read_pairs,
)

pytestmark = pytest.mark.fast

GOLDEN = Path(__file__).parent.parent / "golden"
ROW = {"idx": 7, "image_path": "a.png", "question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}


def write_lines(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def pair(**fields: Any) -> PreferencePair:
    return replace(PreferencePair("1", "a.png", "What is it?", "A cat.", "A dog."), **fields)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (40, 30, 3), dtype=np.uint8)
    for name in ("a.png", "b.jpg"):
        Image.fromarray(noise).save(folder / name)
    return folder


# ---------------------------------------------------------------------------------------------------------- reading


def test_reads_the_released_json() -> None:
    pairs = read_pairs(GOLDEN / "dama/rlaifv_records.json")
    assert [pair.id for pair in pairs] == [str(index) for index in range(8)]
    first, second = pairs[:2]
    assert (first.image, first.kind, first.source) == ("wide.png", "detail", "synthetic")
    assert first.chosen == "A small red cat is sitting on the wooden chair."
    assert first.reference == ReferenceLogps(-95.27703857421875, -88.33395385742188)  # a bare list of six
    assert second.reference == ReferenceLogps(-202.7195281982422, -108.79036712646484)  # the list under "logps"
    assert first.clip_scores == ((0.31, -0.12), (0.05, -0.2))
    good, skipped = check_pairs(pairs, GOLDEN / "images")
    assert (good, skipped) == (pairs, [])


def test_json_list_and_json_lines_are_the_same(tmp_path: Path) -> None:
    rows = [ROW, ROW | {"idx": "x-8", "kind": "edit"}]
    lines = write_lines(tmp_path / "pairs.jsonl", [rows[0], "", rows[1]])
    listed = tmp_path / "pairs.json"
    listed.write_text("\ufeff" + json.dumps(rows))
    assert read_pairs(lines) == read_pairs(listed) == [pair(id="7"), pair(id="x-8", kind="edit")]


def test_rlaifv_field_names(tmp_path: Path) -> None:
    row = {"id": 3, "image": "a.png", "question": "<image>\nWhat is it?", "chosen": "A cat.", "rejected": "A dog."}
    row |= {"origin_dataset": "VQAv2", "origin_split": '{"model": "m", "type": "question_answering"}'}
    expected = pair(id="3", source="VQAv2", kind="question_answering")
    assert read_pairs(write_lines(tmp_path / "a", [row])) == [expected]
    assert read_pairs(write_lines(tmp_path / "b", [row | {"origin_split": "train"}])) == [replace(expected, kind="")]
    assert read_pairs(write_lines(tmp_path / "c", [row | {"question": "What is it?\n<image>"}])) == [expected]


def test_line_separators_inside_an_answer_do_not_end_the_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.jsonl"
    row = ROW | {"chosen": "A cat\u2028and\x85more."}
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_pairs(path)[0].chosen == "A cat\u2028and\x85more."


def test_an_absent_id_is_a_digest_of_the_content(tmp_path: Path) -> None:
    bare = {name: value for name, value in ROW.items() if name != "idx"}
    rows = [bare, bare | {"chosen": "Two cats."}, bare | {"kind": "edit"}]
    one, two, three = read_pairs(write_lines(tmp_path / "pairs.jsonl", rows))
    assert one.id == three.id != two.id
    assert len(one.id) == 16


def test_torn_and_faulty_lines_are_all_named(tmp_path: Path) -> None:
    rows = [
        ROW,
        '{"idx": 8, "image": "a.p',
        {name: value for name, value in ROW.items() if name != "chosen"},
        ROW | {"rejected": 5},
        ROW | {"idx": True},
        ROW | {"logps": "[1, 2, 3]"},
        ROW | {"logps": "[NaN, -1, [-1], -2, -1, [-1]]"},
        ROW | {"chosen_logits": "[0.1, 0.2]"},
        "[1]",
        '{"idx": 9, "image": "a.png", "question": "q", "chosen": "\\ud83d", "rejected": "b"}',
    ]
    path = write_lines(tmp_path / "pairs.jsonl", rows)
    with pytest.raises(PairsError) as caught:
        read_pairs(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: 9 errors")
    for part in (
        "line 2: not JSON, perhaps torn",
        "line 3: no field chosen",
        "line 4: field rejected: expected text, got int",
        "line 5: field idx: expected an integer or text, got True",
        "line 6: field logps: expected six entries (sum, average, per token; twice), got 3 of them",
        "line 7: field logps: expected a list of finite numbers",
        "line 8: field rejected_logits: expected a list of finite numbers",
        "line 9: expected a record with named fields, got list",
        "line 10: field chosen: half of a surrogate pair",
        "Remedy:",
    ):
        assert part in message
    pairs, faults = parse_pairs(path)
    assert (len(pairs), len(faults)) == (1, 9)


def test_a_torn_json_list_names_the_line(tmp_path: Path) -> None:
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([ROW, ROW], indent=1)[:-20])
    with pytest.raises(PairsError, match=r"pairs\.json, line 14: .*\nRemedy: the file is torn"):
        read_pairs(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "no pairs in it"), (b"[]", "no pairs in it"), (b'{"a": "\xff"}', "byte 7 is not UTF-8")],
)
def test_files_without_pairs(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "pairs").write_bytes(content)
    with pytest.raises(PairsError, match=message):
        read_pairs(tmp_path / "pairs")


def test_an_absent_file(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="no such file\nRemedy"):
        read_pairs(tmp_path / "pairs.json")


# ----------------------------------------------------------------------------------------------------------- checks


def test_every_fault_is_in_one_message(images: Path, tmp_path: Path) -> None:
    (images / "broken.jpg").write_bytes((images / "b.jpg").read_bytes()[:-200])
    (images / "text.png").write_text("no image")
    (images / "folder.png").mkdir()
    Image.new("RGB", (4, 4)).save(tmp_path / "secret.png")
    (images / "link.png").symlink_to(tmp_path / "secret.png")
    pairs = [
        pair(id="good"),
        pair(id="good"),
        pair(id="empty", chosen=" \n"),
        pair(id="equal", chosen=" A dog. "),
        pair(id="token", rejected="<image> A dog."),
        pair(id="silent", question=""),
        pair(id="missing", image="none.png"),
        pair(id="torn", image="broken.jpg"),
        pair(id="text", image="text.png"),
        pair(id="folder", image="folder.png"),
        pair(id="up", image="../secret.png"),
        pair(id="absolute", image=str(tmp_path / "secret.png")),
        pair(id="link", image="link.png"),
        pair(id="zero", image="a\0.png"),
    ]
    with pytest.raises(PairsError) as caught:
        check_pairs(pairs, images, subject="my.json", errors=["line 3: torn"])
    message = str(caught.value)
    assert message.startswith("my.json: 14 errors\n  line 3: torn\n")
    for part in (
        "id 'good' is used by 2 rows",
        "row empty (image a.png): the chosen answer is empty",
        "row equal (image a.png): chosen and rejected answer are equal",
        "row token (image a.png): rejected: <image> inside the text",
        "row silent (image a.png): the question is empty",
        "row missing (image none.png): image is missing",
        "row torn (image broken.jpg): image is unreadable (OSError: image file is truncated",
        "row text (image text.png): image is unreadable (UnidentifiedImageError",
        "row folder (image folder.png): image is a folder",
        "row up (image ../secret.png): image path ../secret.png leaves the image folder",
        "is absolute, expected one relative to the image folder",
        "row link (image link.png): image path link.png leaves the image folder",
        "names no file",
    ):
        assert part in message


def test_only_the_first_twenty_faults_are_shown(images: Path) -> None:
    pairs = [pair(id=str(index), image="none.png") for index in range(33)]
    with pytest.raises(PairsError, match=r"33 errors(?s:.*)row 19 (?s:.*)and 13 more\n.*--on_bad_image skip") as caught:
        check_pairs(pairs, images)
    assert "row 20 " not in str(caught.value)


@pytest.mark.parametrize(("good", "suspected"), [(0, True), (1, False)])
def test_the_folder_is_suspected_where_no_image_is_there(images: Path, good: int, suspected: bool) -> None:
    pairs = [pair(id="1", image="none.png"), pair(id="2", image="a.png" if good else "nothing.png")]
    with pytest.raises(PairsError, match="image is missing") as caught:
        check_pairs(pairs, images)
    assert ("is this the right --image_folder? None of its images" in str(caught.value)) is suspected


def test_bad_images_are_skipped_only_on_request(images: Path) -> None:
    (images / "broken.png").write_bytes((images / "a.png").read_bytes()[:900])
    pairs = [pair(id=str(index)) for index in range(1, 5)]
    pairs[1:] = [replace(pairs[n], image=name) for n, name in enumerate(("none.png", "b.jpg", "broken.png"), start=1)]
    good, skipped = check_pairs(pairs, images, on_bad_image="skip")
    assert [row.id for row in good] == ["1", "3"]
    assert skipped[0] == SkippedPair("2", "image is missing: none.png")
    assert skipped[1].id == "4" and "image is unreadable" in skipped[1].reason


def test_leaving_the_folder_is_an_error_even_when_skipping(images: Path) -> None:
    with pytest.raises(PairsError, match="row up .*leaves the image folder"):
        check_pairs([pair(), pair(id="up", image="../a.png")], images, on_bad_image="skip")


def test_skipping_everything_is_an_error(images: Path) -> None:
    with pytest.raises(PairsError, match="row 1: image is missing(?s:.*)is this the right image folder"):
        check_pairs([pair(image="none.png")], images, on_bad_image="skip")


def test_an_absent_image_folder_is_one_fault(tmp_path: Path) -> None:
    with pytest.raises(PairsError, match="image folder .*nowhere: no such folder"):
        check_pairs([pair()], tmp_path / "nowhere")


def test_a_decompression_bomb_is_seen_without_decoding_it(images: Path) -> None:
    """A PNG of 60 bytes may claim 30000 x 30000 pixels, 2.7 GB when decoded; twice its threshold Pillow refuses."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    for name, side in (("large.png", 10_000), ("huge.png", 30_000)):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunks = chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
        (images / name).write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
    with pytest.warns(Image.DecompressionBombWarning), pytest.raises(PairsError) as caught:
        check_pairs([pair(id="large", image="large.png"), pair(id="huge", image="huge.png")], images)
    assert "row large (image large.png): image has 10000 x 10000 pixels" in str(caught.value)
    assert "row huge (image huge.png): image is unreadable (DecompressionBombError" in str(caught.value)


def test_resolve_image_follows_paths_that_stay_inside(images: Path) -> None:
    (images / "sub").mkdir()
    (images / "sub/link.png").symlink_to("../a.png")
    assert resolve_image(images, "sub/../a.png") == resolve_image(images, "sub/link.png") == images.resolve() / "a.png"
    with pytest.raises(ValueError, match="is absolute"):
        resolve_image(images, "C:\\images\\a.png")


def test_load_image_drops_alpha_and_ignores_exif(tmp_path: Path) -> None:
    """A 3 x 2 photo marked "turn by 90 degrees" (orientation 6) stays 3 wide and 2 high."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (3, 2)).save(tmp_path / "turned.jpg", exif=exif)
    Image.new("RGBA", (3, 2), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert load_image(tmp_path / "turned.jpg").size == (3, 2)
    assert load_image(tmp_path / "clear.png").getpixel((0, 0)) == (10, 20, 30)


# ------------------------------------------------------------------------------------------------------ fingerprint


@pytest.mark.parametrize("field", ["id", "image", "question", "chosen", "rejected", "kind", "source"])
def test_fingerprint_sees_every_field(field: str) -> None:
    pairs, other = [pair(id="1"), pair(id="2")], {field: "other"}
    assert pairs_fingerprint([pairs[0], replace(pairs[1], **cast(Any, other))]) != pairs_fingerprint(pairs)


def test_fingerprint_sees_order_and_scores() -> None:
    one, two = pair(id="1"), pair(id="2")
    assert pairs_fingerprint([one, two]) == pairs_fingerprint([replace(one), replace(two)])
    assert pairs_fingerprint([two, one]) != pairs_fingerprint([one, two])
    assert pairs_fingerprint([one, replace(two, clip_scores=((0.1,), (0.2,)))]) != pairs_fingerprint([one, two])


def test_image_digests_are_of_the_bytes(images: Path) -> None:
    pairs = [pair(id="1"), pair(id="2", image="b.jpg"), pair(id="3")]
    before = image_digests(pairs, images)
    assert list(before) == ["a.png", "b.jpg"]
    Image.new("RGB", (4, 4)).save(images / "a.png")
    after = image_digests(pairs, images)
    assert before["a.png"] != after["a.png"] and before["b.jpg"] == after["b.jpg"]


@pytest.mark.parametrize(
    ("mode", "value", "rgb"),
    [("I;16", 0x8000, (128, 128, 128)), ("L", 77, (77, 77, 77)), ("CMYK", (0, 255, 255, 0), (255, 0, 0))],
)
def test_pictures_of_any_depth_become_8_bit_rgb(tmp_path, mode, value, rgb):
    """16-bit grey 0x8000 of 0xFFFF is mid-grey; Pillow's own conversion would clip it to white."""
    path = tmp_path / ("picture.jpg" if mode == "CMYK" else "picture.png")
    Image.new(mode, (8, 8), value).save(path)
    got = load_image(path).getpixel((4, 4))
    assert max(abs(a - b) for a, b in zip(got, rgb)) <= 2
