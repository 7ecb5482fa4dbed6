"""dama.prepare: every style of rows to the same pairs, what is left out, the split, the card, killed and resumed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dama.pairs import PairsError, check_pairs, read_pairs
from dama.prepare.command import PrepareError
from dama.prepare.contamination import coco_ids, contamination, evaluation_images
from dama.prepare.outputs import Split
from dama.prepare.rows import folded, generator_of
from dama.prepare.sources import SourceError, find_files
from dama.stage import StageError
from dama.styles import named_fields
from tests.dama.prepare_sets import card, lines, picture, prepare, rlaifv_row, write_lines, write_parquet

ROOT = Path(__file__).parents[2]
GOLDEN = Path(__file__).parent.parent / "golden"
official = pytest.mark.skipif("DAMA_BENCH_DATA" not in os.environ, reason="DAMA_BENCH_DATA is not set")
PROGRAM = """
import argparse, sys
from dama.prepare import command
parser = argparse.ArgumentParser()
command.add_flags(parser)
command.run(parser.parse_args(sys.argv[1:]))
"""


def tree(folder: Path) -> dict[str, bytes]:
    """Every file's bytes, the manifest's without its time."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    manifest = json.loads(files.pop("manifest.json"))
    manifest.pop("time")
    return files | {"manifest.json": json.dumps(manifest).encode()}


# ---------------------------------------------------------------------------------------------------- the whole way


def test_rlaifv_parquet_to_pairs_that_training_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shards = [[rlaifv_row(n) for n in range(3)], [rlaifv_row(3, image=0), rlaifv_row(4, chosen=" ")]]
    for number, rows in enumerate(shards):
        write_parquet(tmp_path / f"src/{number}.parquet", rows)
    prepare(tmp_path / "src", "--out", tmp_path / "out")
    pairs = read_pairs(tmp_path / "out/pairs.jsonl")
    assert [pair.id for pair in pairs] == ["0", "1", "2", "3"]
    assert check_pairs(pairs, tmp_path / "out/images") == (pairs, [])
    digest = hashlib.sha256(picture(0)).hexdigest()
    first = pairs[0]
    assert (first.image, first.chosen, first.kind) == (f"{digest[:2]}/{digest}.png", "Cat 0.", "question_answering")
    assert first.source == "VQAv2" and pairs[3].image == first.image
    assert (tmp_path / "out/images" / first.image).read_bytes() == picture(0)
    assert len(list((tmp_path / "out/images").rglob("*.png"))) == 3
    (dropped,) = lines(tmp_path / "out/dropped.jsonl")
    assert (dropped["reason"], dropped["detail"]) == ("unusable text", "the chosen answer is empty")
    assert (dropped["idx"], dropped["image"]) == ("4", "4.png")
    assert dropped["place"] == "1.parquet row 2"
    assert (tmp_path / "out/held_out.jsonl").read_text() == ""
    output = capsys.readouterr().out
    assert "rows 5: pairs 4, held out 0, left out 1\n        1  unusable text" in output
    assert f"checksum {card(tmp_path / 'out')['checksum']}" in output


STYLES: dict[str, dict[str, Any]] = {
    "rlaifv": {"question": "What is it?", "chosen": "A cat.", "rejected": "A dog.", "image": "a.png"},
    "trl": {"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog.", "images": ["a.png"]},
    "trl messages": {
        "prompt": [
            {
                "role": "user",
                "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is it?"}],
            }
        ],
        "chosen": [{"role": "assistant", "content": [{"type": "text", "text": "A cat."}]}],
        "rejected": [{"role": "assistant", "content": "A dog."}],
        "images": ["a.png"],
    },
    "trl prompt inside": {
        "chosen": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A cat."}],
        "rejected": [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "A dog."}],
        "image": "a.png",
    },
    "pds-dpo": {
        "conversations": [{"from": "human", "value": "<image> What is it?"}, {"from": "gpt", "value": "A cat."}],
        "rejected_conversations": [
            {"from": "human", "value": "<image> What is it?"},
            {"from": "gpt", "value": "A dog."},
        ],
        "image": "a.png",
    },
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_every_style_and_form_gives_the_same_pair(tmp_path: Path, style: str, form: str) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    row = {"id": "x-1", **STYLES[style]}
    source = tmp_path / f"rows.{form}"
    if form == "parquet":
        write_parquet(source, [row], schema=None)
    else:
        source.write_text(json.dumps(row if form == "jsonl" else [row]))
        assert [(pair.question, pair.image) for pair in read_pairs(source)] == [("What is it?", "a.png")]
    prepare(source, "--out", tmp_path / "out")
    (pair,) = read_pairs(tmp_path / "out/pairs.jsonl")
    assert (pair.id, pair.question, pair.chosen, pair.rejected) == ("x-1", "What is it?", "A cat.", "A dog.")
    assert lines(tmp_path / "out/pairs.jsonl")[0]["origin_image"] == "a.png"


def test_trl_with_pictures_inside_the_rows(tmp_path: Path) -> None:
    row = {"prompt": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
    row |= {"images": [{"bytes": picture(1), "path": None}]}  # type: ignore[dict-item]
    prepare(write_parquet(tmp_path / "rows.parquet", [row], schema=None), "--out", tmp_path / "out")
    (pair,) = read_pairs(tmp_path / "out/pairs.jsonl")
    assert (tmp_path / "out/images" / pair.image).read_bytes() == picture(1)


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_any_table_with_named_columns(tmp_path: Path, ending: str) -> None:
    """`image_path` names another picture, and must not win over the column that was given."""
    names = ("prompt_text", "good", "bad", "file", "image_path", "model", "key")
    cells = ("What, then?", "A cat.", "A dog.", "pictures/a.png", "none.png", "GPT-4 V", "k")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(picture(1))
    source = tmp_path / f"table.{ending}"
    if ending == "parquet":
        write_parquet(source, [dict(zip(names, cells))], schema=None)
    else:
        comma = "," if ending == "csv" else "\t"
        source.write_text("\n".join(comma.join(f'"{cell}"' for cell in row) for row in (names, cells)) + "\n")
    columns = zip(("question", "chosen", "rejected", "image", "generator", "id"), (*names[:4], *names[5:]))
    words = [word for name, column in columns for word in ("--column", f"{name}={column}")]
    prepare(source, "--out", tmp_path / "out", *words, "--generator", "gpt4v")
    (pair,) = read_pairs(tmp_path / "out/pairs.jsonl")
    assert (pair.id, pair.question, pair.chosen, pair.rejected) == ("k", "What, then?", "A cat.", "A dog.")


def test_the_released_scores_are_kept(tmp_path: Path) -> None:
    released = GOLDEN / "dama/rlaifv_records.json"
    prepare(released, "--image_folder", GOLDEN / "images", "--out", tmp_path / "out")
    before = {pair.id: pair for pair in read_pairs(released)}
    after = read_pairs(tmp_path / "out/pairs.jsonl")
    assert len(after) == len(before) == 8
    for pair in after:
        assert (pair.reference, pair.clip_scores) == (before[pair.id].reference, before[pair.id].clip_scores)


@pytest.mark.parametrize("form", ["parquet", "paths"])
def test_second_images_and_their_answers_are_kept(tmp_path: Path, form: str) -> None:
    """Inside the rows or beside them; checked, stored and counted like the others."""
    images = [picture(number) for number in (7, 8)]
    if form == "parquet":
        second: dict[str, Any] = {"rejected_images": [{"bytes": images[1], "path": "8.png"}], "second": "A dog."}
        source = write_parquet(tmp_path / "in/set.parquet", [rlaifv_row(7, **second)], schema=None)
    else:
        for number, image in zip((7, 8), images, strict=True):
            (tmp_path / f"{number}.png").write_bytes(image)
        row = {"image_path": "7.png", "question": "What is it?", "chosen": "Cat 7.", "rejected": "It is dog 7."}
        source = write_lines(tmp_path / "set.jsonl", [row | {"rejected_images": ["8.png"], "second": "A dog."}])
    prepare(source, "--image_folder", tmp_path, "--out", tmp_path / "out")
    (pair,) = read_pairs(tmp_path / "out/pairs.jsonl")
    found = [(tmp_path / "out/images" / str(name)).read_bytes() for name in (pair.image, pair.second_image)]
    assert found == images and pair.second == "A dog."
    assert card(tmp_path / "out")["images"]["distinct"] == 2
    check_pairs([pair], tmp_path / "out/images")


def test_a_second_image_that_is_bad_leaves_the_pair_out(tmp_path: Path) -> None:
    rows = [rlaifv_row(1, rejected_images=["absent.png"]), rlaifv_row(2, rejected_images=["2.png", "3.png"])]
    (tmp_path / "2.png").write_bytes(picture(2))
    source = write_parquet(tmp_path / "in/set.parquet", [*rows, rlaifv_row(3, rejected_images=["2.png"])], schema=None)
    prepare(source, "--image_folder", tmp_path, "--out", tmp_path / "out")
    assert [(row["reason"], row["detail"]) for row in lines(tmp_path / "out/dropped.jsonl")] == [
        ("unusable image", "image is missing: absent.png"),
        ("unreadable row", "field rejected_images: expected one image, or a list of one, got 2"),
    ]
    assert len(read_pairs(tmp_path / "out/pairs.jsonl")) == 1


def test_what_it_wrote_can_be_prepared_again(tmp_path: Path) -> None:
    """Ids, kinds, data sets and generators survive; so a set can be filtered later."""
    source = write_parquet(tmp_path / "a.parquet", [rlaifv_row(n, origin_dataset=None) for n in range(3)])
    prepare(source, "--out", tmp_path / "one")
    again = ("--image_folder", tmp_path / "one/images", "--generator", "LLaVA 1.5 7B")
    prepare(tmp_path / "one/pairs.jsonl", "--out", tmp_path / "two", *again)
    assert read_pairs(tmp_path / "two/pairs.jsonl") == read_pairs(tmp_path / "one/pairs.jsonl")


FORMATS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tif"}


@pytest.mark.parametrize(("kind", "ending"), FORMATS.items())
def test_formats_of_pictures(tmp_path: Path, kind: str, ending: str) -> None:
    """Stored as they are. Cameras write JPEG files with further pictures behind the first, which Pillow calls MPO."""
    file = io.BytesIO()
    more = {"save_all": True, "append_images": [Image.new("RGB", (9, 9))]} if kind == "MPO" else {}
    Image.open(io.BytesIO(picture(0))).save(file, kind, **more)
    row = rlaifv_row(0, image_path="a") | {"image": {"bytes": file.getvalue(), "path": None}}
    prepare(write_parquet(tmp_path / "a.parquet", [row]), "--out", tmp_path / "out")
    (pair,) = read_pairs(tmp_path / "out/pairs.jsonl")
    assert pair.image.endswith(f".{ending}")
    assert (tmp_path / "out/images" / pair.image).read_bytes() == file.getvalue()


@official
def test_the_official_pds_dpo_sample(tmp_path: Path) -> None:
    """Ten pairs, of which art-2 and art-3 have no rejected answer."""
    source = Path(os.environ["DAMA_BENCH_DATA"]) / "pds_dpo/step3_sanity.json"
    rows = json.loads(source.read_text())
    (tmp_path / "images").mkdir()
    for number, row in enumerate(rows):
        (tmp_path / row["image"]).write_bytes(picture(number, "JPEG"))
    prepare(source, "--image_folder", tmp_path, "--out", tmp_path / "out")
    pairs = read_pairs(tmp_path / "out/pairs.jsonl")
    assert [pair.id for pair in pairs] == [f"art-{number}" for number in (1, *range(4, 11))]
    assert {row["detail"] for row in lines(tmp_path / "out/dropped.jsonl")} == {"the rejected answer is empty"}
    assert all(pair.question and not pair.question.startswith((" ", "<image>")) for pair in pairs)


def test_a_conversation_must_end_in_two_answers() -> None:
    turn = {"role": "user", "content": "What?"}, {"role": "assistant", "content": "A cat."}
    other = {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A dog."}
    with pytest.raises(ValueError, match="chosen: expected turns of user and assistant .* got user, assistant, user"):
        named_fields({"chosen": [*turn, turn[0]], "rejected": list(turn)})
    with pytest.raises(ValueError, match="ask different questions"):
        named_fields({"chosen": list(turn), "rejected": list(other)})
    with pytest.raises(ValueError, match=r"a message without text \(\{'role'"):
        named_fields({"chosen": [{"role": "user", "content": None}], "rejected": list(turn)})


# ------------------------------------------------------------------------------------------------------- generators


def test_the_generator_is_found_without_regard_to_its_spelling(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    models = ["LLaVA-1.5_7B", "llava 1.5 7b", "llava-1.6-34b"]
    rows = [rlaifv_row(n, origin_split=json.dumps({"model": model})) for n, model in enumerate(models)]
    source = write_parquet(tmp_path / "a.parquet", rows)
    prepare(source, "--out", tmp_path / "out", "--generator", "llava-1.5-7b")
    assert [pair.id for pair in read_pairs(tmp_path / "out/pairs.jsonl")] == ["0", "1"]
    assert lines(tmp_path / "out/dropped.jsonl")[0]["detail"] == "llava-1.6-34b"
    assert "*        1  llava 1.5 7b\n         1  llava-1.6-34b" in capsys.readouterr().out


def test_a_generator_that_no_row_has_lists_those_there_are(tmp_path: Path) -> None:
    splits = ['{"model": "a"}', '{"model": "a"}', '{"model": "b"}', "plain text", None]
    rows = [rlaifv_row(n, origin_split=split) for n, split in enumerate(splits)]
    words = ("--generator", "A", "--generator", "c-d")
    with pytest.raises(PrepareError) as caught:
        prepare(write_parquet(tmp_path / "a.parquet", rows), "--out", tmp_path / "out", *words)
    message = str(caught.value)
    assert message.startswith("--generator: no row of c-d; generators of the rows are\n        2  a\n        1  b\n")
    assert "1  plain text" in message and "1  (not stated)" in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("row", "generator"),
    [
        ({"origin_split": '{"model": "m"}'}, "m"),
        ({"origin_split": {"model": "m"}}, "m"),
        ({"origin_split": "train"}, "train"),
        ({"origin_split": '{"labeler": "m"}'}, "(not stated)"),
        ({"origin_split": 5}, "(not stated)"),
        ({"generator": "m", "origin_split": '{"model": "n"}'}, "m"),
        ({}, "(not stated)"),
    ],
)
def test_generator_of(row: dict[str, Any], generator: str) -> None:
    assert generator_of(row) == generator


def test_folded() -> None:
    assert folded("LLaVA_v1.5 - 7B") == folded("llava-v1.5-7b") == "llavav1.57b"
    assert folded("llava-1.5-7b") != folded("llava-1.6-7b")


# ---------------------------------------------------------------------------------------------------- contamination


@pytest.mark.parametrize(
    ("name", "dataset", "ids"),
    [
        ("COCO_val2014_000000339761.jpg", "", {339761}),
        ("train2017/000000339761.jpg", "", {339761}),
        ("C:\\coco\\COCO_val2014_000000339761_crop.png", "", {339761}),
        ("coco/val2014/339761.jpg", "", {339761}),
        ("339761.jpg", "VQAv2", {339761}),
        ("coco_339761.jpg", "", {339761}),
        ("339761.jpg", "GoogleLandmark", set()),
        ("vg/339761.jpg", "", set()),
        ("COCO_train2014.jpg", "", set()),
        ("0000003397610.jpg", "COCO", set()),  # 13 digits
        ("", "COCO", set()),
    ],
)
def test_coco_ids_in_names(name: str, dataset: str, ids: set[int]) -> None:
    assert coco_ids(name, dataset) == ids


def test_contamination_names_every_benchmark() -> None:
    benchmarks = {"A": frozenset({7, 9}), "B": frozenset({7})}
    assert contamination(["x.jpg", "000000000007.jpg"], "", benchmarks) == "COCO image 7 is in A and B"
    assert contamination(["000000000009.jpg"], "", benchmarks) == "COCO image 9 is in A"
    assert contamination(["000000000008.jpg"], "", benchmarks) is None


def test_evaluation_images_are_left_out_unless_wanted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    number = min(evaluation_images()["POPE"])
    row = rlaifv_row(0, image_path=f"COCO_val2014_{number:012d}.jpg")
    inside = rlaifv_row(1) | {"image": {"bytes": picture(1), "path": f"{number:012d}.jpg"}, "image_path": "7.png"}
    source = write_parquet(tmp_path / "a.parquet", [row, inside, rlaifv_row(2)])
    prepare(source, "--out", tmp_path / "out")
    assert [pair.id for pair in read_pairs(tmp_path / "out/pairs.jsonl")] == ["2"]
    assert [r["detail"] for r in lines(tmp_path / "out/dropped.jsonl")] == [f"COCO image {number} is in POPE"] * 2
    assert len(list((tmp_path / "out/images").rglob("*.png"))) == 1
    prepare(source, "--out", tmp_path / "kept", "--keep_contaminated")
    assert len(read_pairs(tmp_path / "kept/pairs.jsonl")) == 3
    assert card(tmp_path / "kept")["counts"]["evaluation_images_kept"] == 2
    assert "WARNING: 2 pairs show evaluation images" in capsys.readouterr().out


def test_the_shipped_ids_are_as_many_as_the_benchmarks_have() -> None:
    assert {name: len(ids) for name, ids in evaluation_images().items()} == {"Object HalBench": 300, "POPE": 500}


@official
def test_the_shipped_ids_are_the_official_files_ids() -> None:
    folder = Path(os.environ["DAMA_BENCH_DATA"])
    questions = lines(folder / "objhal/obj_halbench_300_questions.jsonl")
    shipped = evaluation_images()
    assert shipped["Object HalBench"] == {row["image_id"] for row in questions}
    for split in ("random", "popular", "adversarial"):
        rows = lines(folder / f"pope/coco_pope_{split}.json")
        assert shipped["POPE"] == {number for row in rows for number in coco_ids(row["image"])}


# ----------------------------------------------------------------------------------------------- repeated, held out


def test_repeated_pairs_and_ids(tmp_path: Path) -> None:
    """Row 2 is row 1 under another id and picture name; row 3 takes row 1's id; row 4 differs in the picture alone."""
    same = {"chosen": "A cat.", "rejected": "A dog."}
    rows = [
        rlaifv_row(1, image=7, **same),
        rlaifv_row(2, image=7, **same | {"rejected": "A dog. "}),
        rlaifv_row(3, image=8, idx=1),
        rlaifv_row(4, image=9, **same),
    ]
    source = write_parquet(tmp_path / "a.parquet", rows)
    prepare(source, "--out", tmp_path / "out")
    assert [pair.id for pair in read_pairs(tmp_path / "out/pairs.jsonl")] == ["1", "4"]
    pair, id_ = lines(tmp_path / "out/dropped.jsonl")
    assert (pair["idx"], pair["reason"], pair["detail"]) == ("2", "repeated pair", "as in a.parquet row 1")
    assert (id_["idx"], id_["reason"]) == ("1", "repeated id")
    assert id_["detail"] == "another pair has it, in a.parquet row 1; --column id= gives ids from the content"
    assert len(list((tmp_path / "out/images").rglob("*.png"))) == 2  # row 3's is not kept
    prepare(source, "--out", tmp_path / "anew", "--column", "id=")
    ids = [pair.id for pair in read_pairs(tmp_path / "anew/pairs.jsonl")]
    assert len(set(ids)) == 3 and all(len(id_) == 16 for id_ in ids)


def test_held_out_pictures_are_in_no_training_pair(tmp_path: Path) -> None:
    rows = [rlaifv_row(n, image=n % 10) for n in range(40)]
    source = write_parquet(tmp_path / "a.parquet", rows)
    prepare(source, "--out", tmp_path / "out", "--hold_out", 0.3, "--seed", 5)
    kept, held = (read_pairs(tmp_path / f"out/{name}.jsonl") for name in ("pairs", "held_out"))
    assert (len(kept), len(held)) == (28, 12)
    assert not {pair.image for pair in kept} & {pair.image for pair in held}
    write_parquet(tmp_path / "b.parquet", rows[::-1])
    prepare(tmp_path / "b.parquet", "--out", tmp_path / "turned", "--hold_out", 3, "--seed", 5)
    assert {pair.id for pair in read_pairs(tmp_path / "turned/held_out.jsonl")} == {pair.id for pair in held}


def test_the_split_depends_on_its_seed() -> None:
    images = [f"{n}.png" for n in range(50)]
    assert Split(0.2, 0).held_out(images) == Split(10, 0).held_out(images[::-1])
    assert len(Split(0.2, 0).held_out(images)) == 10
    assert Split(0.2, 0).held_out(images) != Split(0.2, 1).held_out(images)
    assert Split(0, 0).held_out(images) == frozenset()


# --------------------------------------------------------------------------------------------------------- the card


def test_the_cards_figures(tmp_path: Path) -> None:
    """Chosen answers have 2, 2 and 4 words: median 2, mean 8/3. Rejected ones 4, 4, 1: the last chosen one is longer.

    Two pictures, 12 x 8 and 20 x 8 pixels: mean width 16; 3 pairs on 2 pictures = 1.5.
    """
    wide = {"bytes": picture(5, size=(20, 8)), "path": None}
    rows = [rlaifv_row(0), rlaifv_row(1, image=0), rlaifv_row(2, chosen="one two three four", rejected="no")]
    rows[2] |= {"image": wide, "origin_dataset": None}
    prepare(write_parquet(tmp_path / "a.parquet", rows), "--out", tmp_path / "out")
    figures = card(tmp_path / "out")
    assert figures["lengths"]["unit"] == "words (no --tokenizer was given)"
    assert figures["lengths"]["chosen"] == {"min": 2, "median": 2, "mean": 2.67, "p95": 3.8, "max": 4}
    assert figures["lengths"]["chosen_longer_than_rejected"] == 0.3333
    assert figures["images"]["distinct"] == 2 and figures["images"]["pairs_per_image"] == 1.5
    assert figures["images"]["width"]["mean"] == 16 and figures["images"]["height"]["max"] == 8
    assert figures["images"]["bytes"] == len(picture(0)) + len(wide["bytes"])  # type: ignore[arg-type]
    assert figures["sources"] == {"VQAv2": 2, "(not stated)": 1}
    assert figures["generators"] == {"llava-1.5-7b": 3} and figures["kinds"] == {"question_answering": 3}
    page = (tmp_path / "out/data_card.md").read_text()
    for line in ("3 rows: 3 pairs to train on", "| chosen | 2.0 | 2.0 | 2.67 | 3.8 | 4.0 |", "in 33.3 % of the pairs"):
        assert line in page


def test_checksums_of_all_files(tmp_path: Path) -> None:
    prepare(write_parquet(tmp_path / "a.parquet", [rlaifv_row(0), rlaifv_row(1)]), "--out", tmp_path / "out")
    listed = [line.split("  ") for line in (tmp_path / "out/SHA256SUMS").read_text().splitlines()]
    assert [name.split("/")[0] for _, name in listed] == [*("pairs.jsonl", "held_out.jsonl", "dropped.jsonl")] + [
        "images",
        "images",
    ]
    for digest, name in listed:
        assert hashlib.sha256((tmp_path / "out" / name).read_bytes()).hexdigest() == digest
    checksum = hashlib.sha256((tmp_path / "out/SHA256SUMS").read_bytes()).hexdigest()
    assert card(tmp_path / "out")["checksum"] == checksum


def test_checksums_do_not_depend_on_where_the_files_lie(tmp_path: Path) -> None:
    for place in ("one", "two/deeper"):
        write_parquet(tmp_path / place / "x/a.parquet", [rlaifv_row(0), rlaifv_row(1, chosen="")])
        write_parquet(tmp_path / place / "y/a.parquet", [rlaifv_row(0)])
        prepare(tmp_path / place, "--out", tmp_path / place / "out")
    one, two = (tmp_path / place / "out/SHA256SUMS" for place in ("one", "two/deeper"))
    assert one.read_text() == two.read_text()
    assert [row["place"] for row in lines(one.with_name("dropped.jsonl"))] == ["x/a.parquet row 2", "y/a.parquet row 1"]


def test_lengths_in_tokens(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = GOLDEN / "llava-v1.5-tiny"
    source = write_parquet(tmp_path / "a.parquet", [rlaifv_row(0)])
    prepare(source, "--out", tmp_path / "out", "--tokenizer", tokenizer)
    lengths = card(tmp_path / "out")["lengths"]
    ids = AutoTokenizer.from_pretrained(tokenizer)("Cat 0.", add_special_tokens=False).input_ids
    assert (lengths["unit"], lengths["chosen"]["max"]) == (f"tokens of {tokenizer}", len(ids))
    with pytest.raises(PrepareError, match="--tokenizer .*nowhere.*\n?(?s:.*)Remedy: give a folder with tokenizer"):
        prepare(source, "--out", tmp_path / "other", "--tokenizer", tmp_path / "nowhere")


# ----------------------------------------------------------------------------------------------------------- sources


def test_a_folder_gives_its_tables_of_one_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("b/2.parquet", "a/1.parquet", ".cache/3.parquet", "notes.json", "x.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = [file.path.relative_to(tmp_path).as_posix() for file in find_files([str(tmp_path)])]
    assert names == ["a/1.parquet", "b/2.parquet"]
    assert "its 2 .parquet files are read, left aside: notes.json" in capsys.readouterr().out
    globbed = find_files([str(tmp_path / "*/*.parquet"), str(tmp_path / "notes.json"), str(tmp_path / "a")])
    assert [file.path.name for file in globbed] == ["1.parquet", "2.parquet", "notes.json"]


def test_the_output_inside_the_source_folder_is_no_source(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    write_lines(tmp_path / "rows.jsonl", [STYLES["rlaifv"]])
    for _ in range(2):  # the second time finds pairs.jsonl too
        prepare(tmp_path, "--out", tmp_path / "out")
    with pytest.raises(PrepareError, match="all tables in it are in --out"):
        prepare(tmp_path / "out", "--out", tmp_path / "out")


def test_a_hub_data_set_at_a_revision(tmp_path: Path) -> None:
    """From the hub's own cache layout, as a download leaves it, without a network."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "hub/datasets--some--pairs"
    write_parquet(repository / f"snapshots/{commit}/data/0.parquet", [rlaifv_row(0)])
    write_lines(repository / f"snapshots/{commit}/notes.json", [])
    (repository / "refs").mkdir()
    (repository / "refs/v2").write_text(commit)
    environment = os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}

    def run(source: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-c", PROGRAM, source, "--out", str(tmp_path / "out")]
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)

    absent = run("hf://some/pairs@v1")
    assert absent.returncode and "Remedy: check name and revision" in absent.stderr
    done = run("hf://some/pairs@v2")
    assert done.returncode == 0, done.stderr
    assert card(tmp_path / "out")["files"][0]["name"] == f"hf://some/pairs@{commit}/data/0.parquet"


def test_all_bad_sources_are_named(tmp_path: Path) -> None:
    (tmp_path / "x.txt").touch()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SourceError) as caught:
        find_files([str(tmp_path / "none"), str(tmp_path / "x.txt"), str(tmp_path / "empty"), "hf://only-a-name"])
    for part in ("none: no such file", "x.txt: 1 error", "empty: none of its 0 files", "expected hf://owner/name"):
        assert part in str(caught.value)


# ---------------------------------------------------------------------------------------------- resumed, done, other


@pytest.mark.kill
def test_killed_twice_and_resumed_is_undisturbed(tmp_path: Path) -> None:
    """A kill falls at a random moment while records are written, in the first or the second of two files."""
    rows = [rlaifv_row(n, image=n // 2, chosen=f"Cat {n}." if n % 7 else " ") for n in range(3000)]
    for number in range(2):
        write_parquet(tmp_path / f"src/{number}.parquet", rows[number::2], group=400)
    words = [str(tmp_path / "src"), "--hold_out", "0.1", "--out"]
    prepare(*words, tmp_path / "calm")
    total = (tmp_path / "calm/prepare.jsonl").stat().st_size
    records = tmp_path / "killed/prepare.jsonl"
    line = [sys.executable, "-c", PROGRAM, *words, str(tmp_path / "killed")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for low in (0.1, 0.5):
        moment = random.uniform(low, low + 0.3) * total
        with subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
            while child.poll() is None and (not records.exists() or records.stat().st_size < moment):
                time.sleep(0.001)
            child.send_signal(signal.SIGKILL)
        assert child.returncode == -signal.SIGKILL
        assert not (tmp_path / "killed/pairs.jsonl").exists()
    prepare(*words, tmp_path / "killed")
    assert tree(tmp_path / "killed") == tree(tmp_path / "calm")


def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", [rlaifv_row(n, image=n % 50) for n in range(300)])
    for workers in (1, 4):
        prepare(source, "--out", tmp_path / f"out{workers}", "--workers", workers)
    assert tree(tmp_path / "out1") == tree(tmp_path / "out4")


def test_a_complete_run_is_skipped_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = (write_parquet(tmp_path / "a.parquet", [rlaifv_row(n) for n in range(4)]), "--out", tmp_path / "out")
    prepare(*words)
    before = tree(tmp_path / "out")
    prepare(*words)
    assert tree(tmp_path / "out") == before
    assert "prepare: complete in" in capsys.readouterr().out
    with pytest.raises(StageError, match="--hold_out: 0.0 -> 0.5"):
        prepare(*words, "--hold_out", 0.5)
    (tmp_path / "out/pairs.jsonl").write_text("")
    with pytest.raises(PairsError, match="pairs.jsonl changed since the run was complete\nRemedy: --overwrite"):
        prepare(*words)
    (tmp_path / "out/held_out.jsonl").unlink()
    with pytest.raises(PairsError, match="held_out.jsonl missing"):
        prepare(*words)
    prepare(*words, "--overwrite")
    assert tree(tmp_path / "out") == before


def test_overwriting_removes_the_pictures_of_before_and_nothing_else(tmp_path: Path) -> None:
    sources = [write_parquet(tmp_path / f"{n}.parquet", [rlaifv_row(n)]) for n in range(2)]
    images = tmp_path / "out/images"
    prepare(sources[0], "--out", tmp_path / "out")
    (images / "mine.png").write_bytes(picture(9))
    prepare(sources[1], "--out", tmp_path / "out", "--overwrite")
    assert {path.read_bytes() for path in images.rglob("*.png")} == {picture(1), picture(9)}


def test_a_folder_of_somebody_else_is_not_written_to(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", [rlaifv_row(0)])
    (tmp_path / "out/images").mkdir(parents=True)
    (tmp_path / "out/images/holiday.png").write_bytes(picture(1))
    (tmp_path / "out/pairs.jsonl").write_text("mine")
    with pytest.raises(PrepareError, match="holds pairs.jsonl, images/, not made by this command"):
        prepare(source, "--out", tmp_path / "out")
    with pytest.raises(PrepareError, match="holds images/, not made by this command"):
        prepare(source, "--out", tmp_path / "out", "--overwrite")
    assert (tmp_path / "out/pairs.jsonl").read_text() == "mine"
