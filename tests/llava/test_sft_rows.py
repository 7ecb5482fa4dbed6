"""Rows of fine-tuning as people have them: read where their meaning is clear, named in an error where it is not."""

import io
import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from dama.pairs import PairsError
from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX
from llava.conversation import conv_templates
from llava.tokenization import load_tokenizer
from llava.train import train
from llava.train.preprocess import encode_turns, render_supervised
from llava.train.sft_data import LazySupervisedDataset, read_rows, supervised_rows
from llava.train.sft_rows import SftRows, checked_rows, row_of_record
from tests.conftest import GOLDEN
from tests.llava.tiny import arguments

IMAGES = str(GOLDEN / "images")
ASK = {"from": "human", "value": "<image>\nWhat is it?"}
ANSWER = {"from": "gpt", "value": "A cat."}
ROW = {"id": "a", "image": "wide.png", "conversations": [ASK, ANSWER]}
TEXT = {"id": "t", "conversations": [{"from": "human", "value": "Hello"}, ANSWER]}
STEPS = ["--max_steps", "2", "--per_device_train_batch_size", "2", "--save_strategy", "no"]


def written(folder, rows, name="rows.json"):
    path = folder / name
    path.write_text(json.dumps(rows))
    return str(path)


def talk(*turns):
    return [{"from": who, "value": text} for who, text in turns]


# ------------------------------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize(
    "content",
    {
        "a list": json.dumps([ROW, TEXT]),
        "JSON lines": f"{json.dumps(ROW)}\n{json.dumps(TEXT)}\n",
        "JSON lines with blank ones": f"\n{json.dumps(ROW)}\r\n\r\n{json.dumps(TEXT)}",
        "a byte order mark": "\ufeff" + json.dumps([ROW, TEXT], indent=1),
        "lines with a byte order mark": f"\ufeff{json.dumps(ROW)}\n{json.dumps(TEXT)}\n",
    }.items(),
    ids=lambda item: item[0],
)
def test_files_that_are_read(tmp_path, content):
    path = tmp_path / "rows"
    path.write_bytes(content[1].encode())
    assert read_rows(str(path), IMAGES) == [ROW, TEXT]


SPOKEN = [{"role": "user", "content": "<image>\nWhat is it?"}, {"role": "assistant", "content": "A cat."}]
PARTS = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
]


@pytest.mark.parametrize(
    "record",
    [
        ROW,
        {"id": "a", "images": ["wide.png"], "conversations": [ASK, ANSWER]},
        {"id": "a", "images": "wide.png", "conversations": [ASK, ANSWER]},
        {"id": "a", "image": ["wide.png"], "conversations": [ASK, ANSWER]},
        {"id": "a", "image": "wide.png", "images": ["wide.png"], "conversations": [ASK, ANSWER]},
        {"id": "a", "images": [{"path": "wide.png", "bytes": None}], "conversations": [ASK, ANSWER]},
        {"id": "a", "image": "wide.png", "images": None, "system": None, "conversations": [ASK, ANSWER]},
        {"id": "a", "image": "wide.png", "messages": SPOKEN},
        {"id": "a", "image": "wide.png", "conversations": None, "messages": PARTS},
        {"id": "a", "image": "wide.png",
         "messages": [{"from": None, "value": None, **SPOKEN[0]}, {"role": None, "content": None, **ANSWER}]},
        {"id": "a", "image": "wide.png", "conversations": [ASK | {"weight": None}, ANSWER | {"from": "Assistant"}]},
    ],
    ids=str,
)  # fmt: skip
def test_rows_that_mean_the_same(record):
    assert row_of_record(record) == ROW


def test_null_images_are_no_images():
    assert row_of_record(ROW | {"image_path": "x", "image_url": "y"})["image"] == ROW["image"]  # notes beside it
    assert row_of_record(TEXT | {"image_id": 3, "video": [], "img": None}) == TEXT | {"image_id": 3, "video": []}
    for record in (TEXT | {"image": None}, TEXT | {"images": []}, TEXT | {"image": None, "images": None}):
        assert row_of_record(record) == TEXT


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (["row"], "expected a record with named fields, got list"),
        ({"id": "r", "text": "x"}, "row r: expected conversations, .* got fields id, text"),
        (r := {"id": "r", "conversations": "x"}, "row r: expected conversations, .* got str"),
        (r | {"conversations": ["x"]}, "row r: turn 1: expected 'from' and 'value', got str"),
        (r | {"conversations": [{"from": "human"}]}, "row r: turn 1: expected text in 'value', got null"),
        (r | {"conversations": talk(("human", "a"), ("gpt", None))}, "turn 2: expected text in 'value', got null"),
        (r | {"conversations": talk(("human", "a"), ("gpt", 7))}, "turn 2: expected text in 'value', got int"),
        (r | {"conversations": talk((None, "a"))}, "turn 1: expected 'from' to be system, human or gpt .*, got null"),
        (r | {"conversations": talk(("human", "a"), ("tool", "b"))}, "turn 2: expected 'from' .*, got 'tool'"),
        (r | {"conversations": talk(("human", "a"), ("system", "b"))}, "turn 2: expected 'from' .*, got 'system'"),
        (r | {"conversations": talk(("human", "a"), ("human", "b"))}, "row r: turn 2 is from 'human', expected 'gpt'"),
        (r | {"conversations": talk(("human", "a\ud83d"), ("gpt", "b"))}, "turn 1: contains an unpaired surrogate"),
        (ROW | {"image": 3}, "row a: field image: expected a path .*, got int"),
        (ROW | {"image": {"bytes": "QUJD", "path": None}}, "row a: field image: expected a path .*, got dict"),
        (ROW | {"image": ["wide.png", "tall.png"]}, "row a: field image: expected one image, got 2"),
        (ROW | {"images": ["tall.png"]}, "row a: fields image and images: expected the same path"),
        (TEXT | {"image_path": "wide.png"}, "row t: field image_path: expected what the row shows in 'image'"),
        (TEXT | {"Image": "wide.png"}, "row t: field Image: expected what the row shows in 'image'"),
        (TEXT | {"img": "wide.png"}, "row t: field img: expected what the row shows in 'image'"),
        (TEXT | {"image_file": "wide.png"}, "row t: field image_file: expected what the row shows in 'image'"),
        (TEXT | {"image_paths": ["wide.png"]}, "row t: field image_paths: expected what the row shows in 'image'"),
        (TEXT | {"video": "a.mp4"}, "row t: field video: expected what the row shows in 'image'"),
        (ROW | {"image": ""}, "row a: image : image path '' names no file"),
        ({"image": "wide.png", "conversations": talk(("human", "a"), ("gpt", "b"))}, "row 2: expected one <image>"),
        (TEXT | {"conversations": [ASK, ANSWER]}, "row t: expected one <image> .* got 1 in the text"),
        (ROW | {"conversations": [ASK, ANSWER, ASK, ANSWER]}, "row a: .* got 2 in the text and 1 image"),
        (ROW | {"conversations": talk(("human", "<image><image>?"), ("gpt", "b"))}, "row a: expected one <image> .* 2"),
        (ROW | {"conversations": talk(("human", "<image>?"), ("gpt", "<image>"))}, "row a: expected one <image> .* 2"),
    ],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("lines", [False, True], ids=["list", "lines"])
def test_rows_that_are_refused_by_name(tmp_path, record, reason, lines):
    path = tmp_path / "rows.json"
    path.write_text("\n".join(map(json.dumps, [ROW, record])) if lines else json.dumps([ROW, record]))
    with pytest.raises(PairsError, match=reason.replace("row 2", "line 2") if lines else reason) as error:
        read_rows(str(path), IMAGES)
    assert str(error.value).startswith(f"{path}: 1 error")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no rows in it"),
        (b"[]", "no rows in it"),
        (b" \n\n", "no rows in it"),
        (json.dumps([ROW, ROW]).encode()[:-20], "line 1: .*\nRemedy: the file is torn or not JSON"),
        (json.dumps(ROW).encode() + b"\n" + json.dumps(ROW).encode()[:-20], r"line 2: not JSON, perhaps torn"),
        (json.dumps([TEXT]).encode().replace(b"Hello", "Olé".encode("latin-1")), r"byte \d+ is not UTF-8"),
        (json.dumps(TEXT).encode().replace(b"Hello", "Olé".encode("latin-1")), r"line 1: byte \d+ is not UTF-8"),
        (json.dumps([ROW]).encode("utf-16"), "is not UTF-8"),
    ],
    ids=["empty", "empty list", "blank", "torn list", "torn line", "latin-1 list", "latin-1 line", "utf-16"],
)
def test_files_that_are_refused_by_name(tmp_path, content, reason):
    path = tmp_path / "rows.json"
    path.write_bytes(content)
    with pytest.raises(PairsError, match=reason) as error:
        read_rows(str(path), IMAGES)
    assert str(path) in str(error.value)


def test_a_dataset_made_of_a_file_checks_its_rows(tmp_path):
    path = written(tmp_path, [ROW, ROW | {"id": "two", "conversations": [ASK, ANSWER, ASK, ANSWER]}])
    with pytest.raises(PairsError, match="row two: expected one <image>"):
        LazySupervisedDataset(path, None, SimpleNamespace())


# --------------------------------------------------------------------------------------------------------------- system


@pytest.mark.parametrize("name", ["v1", "llava_llama_2", "mpt", "llava_v0"])
@pytest.mark.parametrize(
    "record",
    [
        {"conversations": talk(("system", "Be brief."), ("human", "Hello"), ("gpt", "Hi."))},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"},
                      {"role": "assistant", "content": "Hi."}]},
        {"system": "Be brief.", "conversations": talk(("human", "Hello"), ("gpt", "Hi."))},
    ],
    ids=["LLaVA", "messages", "a field"],
)  # fmt: skip
def test_a_system_turn_takes_the_templates_place(in_golden, name, record):
    """Only the system text differs from the template's: the markers around it and what is supervised stay."""
    tokenizer, template = load_tokenizer("llava-v1.5-tiny"), conv_templates[name]
    turns = [(turn["from"], turn["value"]) for turn in row_of_record(record)["conversations"]]
    ids, plain = (encode_turns(t, tokenizer, template, False) for t in (turns, turns[1:]))
    prompt, usual = (tokenizer.decode(e.input_ids) for e in (ids, plain))
    system = template.system.removeprefix("<|im_start|>system\n")
    assert prompt == usual.replace(system, "Be brief.") != usual
    if name != "llava_v0":  # its spans are counted, not found
        assert render_supervised(ids.input_ids, ids.labels, tokenizer) == render_supervised(
            plain.input_ids, plain.labels, tokenizer
        )


def test_a_blank_system_turn_changes_nothing(in_golden):
    tokenizer, turns = load_tokenizer("llava-v1.5-tiny"), [("human", "Hello"), ("gpt", "Hi.")]
    both = [("system", " "), *turns], turns
    blank, usual = (encode_turns(some, tokenizer, conv_templates["v1"], False) for some in both)
    assert torch.equal(blank.input_ids, usual.input_ids)


def test_rows_are_checked_against_the_template(tmp_path):
    path = written(tmp_path, [ROW, TEXT])
    with pytest.raises(PairsError, match="1 error\n  row t: the plain format is for a turn with <image>"):
        read_rows(path, IMAGES, template=conv_templates["plain"])


# --------------------------------------------------------------------------------------------------------------- images


def bad_images(folder):
    """A folder with images that cannot be used, and the reason for each."""
    shutil.copy(GOLDEN / "images/wide.png", folder / "wide.png")
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "JPEG")
    (folder / "cut.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (folder / "page.jpg").write_bytes(b"<!DOCTYPE html><title>404</title>")
    (folder / "empty.png").write_bytes(b"")
    (folder / "dir.png").mkdir()
    Image.new("1", (1, 30_000)).save(folder / "thin.png")
    Image.new("1", (9_460, 60)).save(folder / "long.png")
    return {
        "cut.jpg": "image is unreadable", "page.jpg": "image is unreadable", "empty.png": "image is unreadable",
        "dir.png": "image is a folder", "gone.png": "image is missing",
        "thin.png": "image has 1 x 30000 pixels, a side longer than 9,459 pixels",
        "long.png": "image has 9460 x 60 pixels, a side longer than 9,459 pixels",
    }  # fmt: skip


def rows_of(names):
    return [ROW | {"id": name, "image": name} for name in names]


def test_bad_images_are_all_named_before_a_model_is_loaded(in_golden, tmp_path):
    reasons = bad_images(tmp_path)
    path = written(tmp_path, rows_of(["wide.png", *reasons]))
    flags = ["--model_name_or_path", str(tmp_path / "no_model"), "--data_path", path]
    parsed = arguments(tmp_path / "out", *flags)
    parsed[1].image_folder = [str(tmp_path)]
    with pytest.raises(ValueError, match=f"{len(reasons)} errors") as error:
        train.run(parsed)
    for name, reason in reasons.items():
        assert f"row {name}: image {name}: {reason}" in str(error.value)
    assert "--on_bad_image skip" in str(error.value)


def test_bad_images_are_left_out_on_request(in_golden, tmp_path, capsys):
    reasons = bad_images(tmp_path)
    path = written(tmp_path, [*rows_of(["wide.png", *reasons]), TEXT])
    parsed = arguments(tmp_path / "out", "--data_path", path, "--on_bad_image", "skip", *STEPS)
    parsed[1].image_folder = [str(tmp_path)]
    trainer = train.run(parsed)
    said = capsys.readouterr().out
    assert len(trainer.train_dataset) == 2
    assert f"rows: 2 to train on, {len(reasons)} skipped" in said
    for name in reasons:
        assert f"skipped row {name}: " in said
    recorded = json.loads((tmp_path / "out/dama_provenance.json").read_text())
    assert recorded["rows"] == {"trained": 2, "skipped": len(reasons)}


def test_paths_that_escape_are_never_skipped(tmp_path):
    path = written(tmp_path, rows_of(["../secret.png", "wide.png"]))
    for on_bad_image in ("fail", "skip"):
        with pytest.raises(PairsError, match=r"row ../secret.png: image ../secret.png: .* leaves the image folder"):
            checked_rows(path, IMAGES, on_bad_image)


def test_no_row_left_is_an_error(tmp_path):
    path = written(tmp_path, rows_of(["gone.png"]))
    with pytest.raises(PairsError, match="row gone.png: image is missing: gone.png\nRemedy: no row is left"):
        checked_rows(path, IMAGES, "skip")


# ----------------------------------------------------------------------------------------------------------- supervised


def settings(**changes):
    usual = {
        "data_path": "rows.json", "on_long_pair": "skip", "template": conv_templates["v1"], "is_multimodal": True,
        "mm_use_im_start_end": False, "image_aspect_ratio": "pad", "image_folder": IMAGES,
    }  # fmt: skip
    return SimpleNamespace(**usual | changes)


def named(*rows):
    return SftRows(list(rows), [f"row {row['id']}" for row in rows])


IDLE = {
    "no turns": [],
    "no answer": talk(("human", "Hello")),
    "an empty answer": talk(("human", "Hello"), ("gpt", "")),
    "an invisible answer": talk(("human", "Hello"), ("gpt", "\u200b\ufeff")),
    "blank answers": talk(("human", "Hello"), ("gpt", " \n"), ("human", "Hello?"), ("gpt", "\t")),
    "an opening answer only": talk(("gpt", "Hi."), ("human", "Hello")),
    "cut before the answer": talk(("human", "Why? " * 200), ("gpt", "So.")),
    "nothing but a system turn": talk(("system", "Be brief.")),
}


@pytest.mark.parametrize("name", IDLE)
@pytest.mark.parametrize("template", ["v1", "llava_llama_2", "mpt"])
def test_rows_without_a_supervised_token_are_named(in_golden, name, template):
    tokenizer = load_tokenizer("llava-v1.5-tiny", model_max_length=200)
    data = named(TEXT, {"id": "idle", "conversations": IDLE[name]})
    flags = settings(template=conv_templates[template])
    kept = supervised_rows(data, tokenizer, flags, 16)
    assert (kept.rows, [row for row, _ in kept.skipped]) == ([TEXT], ["row idle"])
    reason = "its first answer begins at position" if name.startswith("cut") else "no answer with text in it"
    assert kept.skipped[0][1].startswith(reason)
    flags.on_long_pair = "fail"
    with pytest.raises(ValueError, match=f"rows.json: 1 error\n  row idle: {reason}.*\nRemedy: .*--on_long_pair skip"):
        supervised_rows(data, tokenizer, flags, 16)


def test_the_image_counts_towards_the_cut(in_golden, capsys):
    """The limit at which the first token of the answer is lost, with the image's positions and without."""
    tokenizer = load_tokenizer("llava-v1.5-tiny")
    encoded = encode_turns([("human", ASK["value"]), ("gpt", "A cat.")], tokenizer, conv_templates["v1"], True)
    first, whole = int((encoded.labels != IGNORE_INDEX).nonzero()[0]) + 1, len(encoded.input_ids)
    assert IMAGE_TOKEN_INDEX in encoded.input_ids[:first]
    for positions in (1, 16, 576):
        tokenizer.model_max_length = first + positions - 1
        assert supervised_rows(named(ROW), tokenizer, settings(), positions).rows == [ROW]
        cut = f"rows: 1 are cut at --model_max_length {tokenizer.model_max_length}, the first is row a, "
        assert f"{cut}{whole + positions - 1} positions" in capsys.readouterr().out
        tokenizer.model_max_length -= 1
        with pytest.raises(ValueError, match=f"row a: its first answer begins at position {first + positions - 1}"):
            supervised_rows(named(ROW), tokenizer, settings(), positions)


def test_crops_count_towards_the_cut(in_golden):
    """wide.png at [112, 56]: the whole and two crops of 56 pixels, 48 positions."""
    tokenizer = load_tokenizer("llava-v1.5-tiny")
    encoded = encode_turns([("human", ASK["value"]), ("gpt", "A cat.")], tokenizer, conv_templates["v1"], True)
    first = int((encoded.labels != IGNORE_INDEX).nonzero()[0]) + 1
    anyres = settings(image_aspect_ratio="anyres", image_grid_pinpoints=[[112, 56], [56, 112]])
    anyres.image_processor = SimpleNamespace(crop_size={"height": 56})
    tokenizer.model_max_length = first + 47
    assert supervised_rows(named(ROW), tokenizer, anyres, 16).rows == [ROW]
    tokenizer.model_max_length = first + 46
    with pytest.raises(ValueError, match=f"begins at position {first + 47}"):
        supervised_rows(named(ROW), tokenizer, anyres, 16)


def test_a_training_without_anything_to_learn_is_refused(in_golden, tmp_path):
    path = written(tmp_path, [TEXT | {"conversations": IDLE["an empty answer"]}])
    with pytest.raises(ValueError, match="row t: no answer with text in it"):
        train.run(arguments(tmp_path / "out", "--data_path", path, "--on_long_pair", "skip", *STEPS))
    assert not list((tmp_path / "out").glob("*.safetensors"))


# ----------------------------------------------------------------------------------------------------------- assignment


def test_images_are_assigned_by_row_whoever_shares_the_batch(in_golden, tmp_path):
    """A row's loss in any batch is its loss alone: no image moves to another row."""
    from llava.train.setup_model import setup_model
    from llava.train.sft_data import make_supervised_data_module, supervised_settings

    rows = [ROW, TEXT, ROW | {"id": "b", "image": "tall.png"}, ROW | {"id": "c", "image": "wide.png"}]
    parsed = arguments(tmp_path / "out", "--data_path", written(tmp_path, rows))
    model, tokenizer, processor = setup_model(parsed)
    module = make_supervised_data_module(tokenizer, supervised_settings(parsed, model, processor))
    items, collate = [*module["train_dataset"]], module["data_collator"]
    model.eval()
    with torch.no_grad():
        alone = [model(**collate([item])).loss for item in items]
        assert alone[0] != alone[2]  # the image matters
        lengths = [(item["labels"] != IGNORE_INDEX).sum() for item in items]
        for batch in ([0, 1], [1, 2], [2, 1, 0], [0, 1, 2, 3], [1, 1, 2]):
            together = model(**collate([items[i] for i in batch])).loss
            expected = sum(alone[i] * lengths[i] for i in batch) / sum(lengths[i] for i in batch)
            assert together == pytest.approx(expected.item(), abs=1e-5)
