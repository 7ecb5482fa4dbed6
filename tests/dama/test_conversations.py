"""Pairs that are not one question about one image: how they are read, kept, prepared and told apart."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dama.checked_pairs import _pair
from dama.hardness.clip import load_clip
from dama.hardness.score import delta_bar, load_hardness, run_hardness
from dama.hardness.show import sheet_text
from dama.pairs import PreferencePair, fields_of, pair_from_row, pairs_fingerprint, read_pairs, text_errors
from dama.train.data import hardness_of_pairs
from tests.dama.prepare_sets import card, lines, picture, prepare, write_lines
from tests.dama.tiny_clip import write_tiny_clip

ANSWERS = {"chosen": "A cat.", "rejected": "A dog."}
IMAGE = {"type": "image", "text": None}  # as a table of parts has it


def words(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def said(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


FORMS: dict[str, tuple[dict[str, Any], tuple[str, ...], tuple[tuple[str, str], ...]]] = {
    # row, images, prompt
    "two images first": ({"images": ["a", "b"], "prompt": "Same?"}, ("a", "b"), (("user", "<image><image>Same?"),)),
    "two images, placeholders": (
        {"images": ["a", "b"], "question": "<image>\n<image>\nSame?"},
        ("a", "b"),
        (("user", "<image><image>Same?"),),
    ),
    "an image inside": ({"image": "a", "question": "Is <image> old?"}, ("a",), (("user", "Is <image> old?"),)),
    "TRL, parts": (
        {"images": ["a", "b"], "prompt": [said("user", [words("One:"), IMAGE, words("Two:"), IMAGE, words("Same?")])]},
        ("a", "b"),
        (("user", "One:<image>Two:<image>Same?"),),
    ),
    "TRL, a system turn": (
        {"images": ["a"], "prompt": [said("system", "Be brief."), said("user", [IMAGE, words("What?")])]},
        ("a",),
        (("system", "Be brief."), ("user", "<image>What?")),
    ),
    "TRL, no placeholder": (
        {"images": ["a"], "prompt": [said("user", "Hi"), said("assistant", "Ho"), said("user", "What?")]},
        ("a",),
        (("user", "<image>Hi"), ("assistant", "Ho"), ("user", "What?")),
    ),
    "texts alone": ({"images": [], "prompt": "2 + 2?"}, (), (("user", "2 + 2?"),)),
    "ms-swift, history": (
        {"images": ["a"], "query": "And?", "history": [["<image>What?", "A hat."]]},
        ("a",),
        (("user", "<image>What?"), ("assistant", "A hat."), ("user", "And?")),
    ),
    "LLaMA-Factory": (
        {
            "images": ["a"],
            "conversations": [
                {"from": "human", "value": "<image>What?"},
                {"from": "gpt", "value": "A hat."},
                {"from": "human", "value": "And?"},
            ],
        },
        ("a",),
        (("user", "<image>What?"), ("assistant", "A hat."), ("user", "And?")),
    ),
}


def pair_of(form: str) -> PreferencePair:
    return pair_from_row(FORMS[form][0] | ANSWERS)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_images_and_prompt(form: str) -> None:
    pair = pair_of(form)
    assert (pair.own_images, pair.prompt) == FORMS[form][1:]
    assert (pair.chosen, pair.rejected) == tuple(ANSWERS.values()) and not list(text_errors(pair))
    assert "<image>" not in pair.question and pair.question in pair.prompt[-1][1].replace("<image>", "")
    assert not pair.is_plain


def test_a_plain_pair_in_messages_is_the_plain_pair() -> None:
    plain = pair_from_row({"image": "a", "question": "What?"} | ANSWERS)
    messages = pair_from_row({"images": ["a"], "prompt": [said("user", [IMAGE, words("What?")])]} | ANSWERS)
    assert plain == messages and plain.is_plain and fields_of(plain)[9:] == []


@pytest.mark.parametrize("form", FORMS)
def test_kept_fields_give_the_pair_back(form: str) -> None:
    pair = pair_of(form)
    assert _pair(json.loads(json.dumps(fields_of(pair)))) == pair
    assert _pair(fields_of(replace(pair, context="It is."))).context == "It is."


def test_order_and_turns_are_part_of_a_pair() -> None:
    first = pair_of("two images first")
    turned = pair_from_row({"images": ["b", "a"], "prompt": "Same?"} | ANSWERS)
    told = pair_from_row({"images": ["a", "b"], "question": "<image> <image> Same?"} | ANSWERS)
    inside = pair_from_row({"images": ["a", "b"], "question": "<image> and <image> Same?"} | ANSWERS)
    assert first.id == told.id and len({first.id, turned.id, inside.id}) == 3
    same_id = [replace(pair, id="x") for pair in (first, turned, inside)]
    assert len({pairs_fingerprint([pair]) for pair in same_id}) == 3


def test_texts_alone_are_held_out_one_by_one() -> None:
    pairs = [replace(pair_of("texts alone"), id=str(number)) for number in range(3)]
    assert len({pair.place for pair in pairs}) == 3 and pair_of("two images first").place == "a"


def test_an_image_that_nobody_names_is_an_error() -> None:
    with pytest.raises(ValueError, match="no field image_path or image; it has chosen, question, rejected"):
        pair_from_row({"question": "What?"} | ANSWERS)
    with pytest.raises(ValueError, match="field images: expected text, got bytes"):
        pair_from_row({"images": [b"x", b"y"], "question": "What?"} | ANSWERS)


def test_prepare_keeps_images_and_turns(tmp_path: Path) -> None:
    """Every form comes back from pairs.jsonl with the same prompt, its images stored by their bytes."""
    for number, name in enumerate("ab"):
        (tmp_path / name).write_bytes(picture(number))
    rows = [
        row | {key: f"{text} {number}" for key, text in ANSWERS.items()}
        for number, (row, *_) in enumerate(FORMS.values())
    ]
    prepare(write_lines(tmp_path / "rows.jsonl", rows), "--image_folder", tmp_path, "--out", tmp_path / "out")
    assert not lines(tmp_path / "out/dropped.jsonl")
    pairs = read_pairs(tmp_path / "out/pairs.jsonl")
    assert [pair.prompt for pair in pairs] == [prompt for _, _, prompt in FORMS.values()]
    stored = {name: pairs[0].own_images["ab".index(name)] for name in "ab"}
    assert [pair.own_images for pair in pairs] == [tuple(map(stored.get, names)) for _, names, _ in FORMS.values()]
    assert {path.name for path in (tmp_path / "out/images").glob("*/*")} == {
        Path(name).name for name in stored.values()
    }
    found = card(tmp_path / "out")["images"]
    assert found["distinct"] == 2 and found["pairs_of_texts_alone"] == 1


def test_prepare_tells_repeated_rows_by_all_images_and_turns(tmp_path: Path) -> None:
    for number, name in enumerate("abc"):
        (tmp_path / name).write_bytes(picture(number))
    same = {"images": ["a", "b"], "question": "Same?"} | ANSWERS
    rows = [same, same, same | {"images": ["a", "c"]}, same | {"question": "<image> and <image> Same?"}]
    prepare(write_lines(tmp_path / "rows.jsonl", rows), "--image_folder", tmp_path, "--out", tmp_path / "out")
    assert [row["reason"] for row in lines(tmp_path / "out/dropped.jsonl")] == ["repeated pair"]
    assert len(read_pairs(tmp_path / "out/pairs.jsonl")) == 3


def test_an_evaluation_image_among_several_leaves_the_row_out(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(picture(0))
    evaluated = tmp_path / "COCO_val2014_000000339761.jpg"
    evaluated.write_bytes(picture(1))
    rows = [{"images": ["a", evaluated.name], "question": "Same?"} | ANSWERS, {"image": "a", "question": "?"} | ANSWERS]
    prepare(write_lines(tmp_path / "rows.jsonl", rows), "--image_folder", tmp_path, "--out", tmp_path / "out")
    (dropped,) = lines(tmp_path / "out/dropped.jsonl")
    assert dropped["reason"] == "evaluation image"


def test_hardness_takes_the_image_that_fits_and_leaves_texts_alone_out(tmp_path: Path) -> None:
    """Of two images each statement's larger score; a pair without image gets the mean in training."""
    for number, name in enumerate("ab"):
        (tmp_path / name).write_bytes(picture(number))
    both = replace(pair_of("two images first"), id="both")
    singles = [replace(both, id=name, image=name, more_images=()) for name in "ab"]
    alone = replace(pair_of("texts alone"), id="alone")
    scorer = load_clip(str(write_tiny_clip(tmp_path / "clip")), None, "cpu", "fp32")
    pairs = [both, alone, *singles]
    run_hardness(pairs, tmp_path, tmp_path / "out", scorer, progress=False)
    records = {record["id"]: record for record in lines(tmp_path / "out/hardness.jsonl")}
    assert records.keys() == {"both", "a", "b"}
    for side in ("chosen_scores", "rejected_scores"):
        one, other = records["a"][side], records["b"][side]
        assert one != other and records["both"][side] == pytest.approx(list(map(max, one, other)), abs=2e-8)
    assert records["both"]["images"] == ["a", "b"] and "images" not in records["a"]
    assert "the first of 2 images" in sheet_text(records["both"]) and "the first" not in sheet_text(records["a"])
    made_from = load_hardness(tmp_path / "out").fingerprint
    found = hardness_of_pairs(pairs, str(tmp_path / "out"), {"pairs": made_from["pairs"]}, needed=True).values
    assert found[1] == delta_bar([records[name]["delta"] for name in ("both", "a", "b")])
    assert found[0] == records["both"]["delta"]
