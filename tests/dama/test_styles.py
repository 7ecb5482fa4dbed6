"""dama.styles and dama.texts: every layout of public sets gives the same pair.

Messages name the file's own fields, and texts that look alike make no pair.
"""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path
from typing import Any

import pytest

from dama.pairs import PairsError, PreferencePair, check_pairs, pair_from_row, read_pairs, text_errors
from dama.prepare.sources import SourceError
from dama.texts import visible_text, without_image_tokens
from tests.dama.prepare_sets import card, lines, picture, prepare, write_lines, write_parquet

pytestmark = pytest.mark.fast


def user(text: Any = "<image>\nWhat is it?") -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def human(text: str = "<image>What is it?") -> dict[str, str]:
    return {"from": "human", "value": text}


def gpt(text: str) -> dict[str, str]:
    return {"from": "gpt", "value": text}


PARTS = [{"type": "image"}, {"type": "text", "text": "What is it?"}]
TEXTS = {"question": "What is it?", "chosen": "A cat.", "rejected": "A dog."}
LAYOUTS: dict[str, dict[str, Any]] = {
    "RLHF-V": {"text": json.dumps(TEXTS), "image_path": "a.png"},
    "RLHF-V, a record": {"text": TEXTS, "image": "a.png"},
    "ms-swift": {"messages": [user(), assistant("A cat.")], "rejected_response": "A dog.", "images": ["a.png"]},
    "ms-swift, empty system": {
        "messages": [{"role": "system", "content": ""}, user(), assistant("A cat.")],
        "rejected_response": "A dog.",
        "images": "a.png",
    },
    "ms-swift, parts": {
        "messages": [user(PARTS), assistant([{"type": "text", "text": "A cat."}])],
        "rejected_response": "A dog.",
        "images": ["a.png"],
    },
    "ms-swift, two conversations": {
        "messages": [user(), assistant("A cat.")],
        "rejected_messages": [user(), assistant("A dog.")],
        "images": ["a.png"],
    },
    "ms-swift, the other answer alone": {
        "messages": [user(), assistant("A cat.")],
        "rejected_messages": [assistant("A dog.")],
        "images": ["a.png"],
    },
    "ms-swift, conversations": {
        "conversations": [human(), gpt("A cat.")],
        "rejected_response": "A dog.",
        "images": [{"path": "a.png", "bytes": None}],
    },
    "ms-swift, old": {
        "query": "<image>What is it?",
        "response": "A cat.",
        "rejected_response": "A dog.",
        "images": ["a.png"],
    },
    "LLaMA-Factory": {
        "conversations": [human()],
        "chosen": gpt("A cat."),
        "rejected": gpt("A dog."),
        "images": ["a.png"],
    },
    "LLaMA-Factory, roles": {
        "messages": [user()],
        "chosen": assistant("A cat."),
        "rejected": assistant("A dog."),
        "images": ["a.png"],
    },
    "LLaMA-Factory, texts": {
        "conversations": [human()],
        "chosen": "A cat.",
        "rejected": "A dog.",
        "images": ["a.png"],
    },
    "MMPR": {"image": ["a.png"], **TEXTS, "question": "<image>\nWhat is it?"},
    "a list of one path": {"image_path": ["a.png"], **TEXTS},
    "PDS-DPO": {
        "conversations": [human(), gpt("A cat.")],
        "rejected_conversations": [human(), gpt("A dog.")],
        "image": "a.png",
    },
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("form", ["jsonl", "json", "parquet", "csv"])
def test_every_layout_and_form_gives_the_same_pair(tmp_path: Path, layout: str, form: str) -> None:
    """In CSV, what is no text stands as JSON."""
    (tmp_path / "a.png").write_bytes(picture(1))
    row, source = {"id": "x-1", **LAYOUTS[layout]}, tmp_path / f"rows.{form}"
    if form == "parquet":
        write_parquet(source, [row], schema=None)
    elif form == "csv":
        cells = [value if isinstance(value, str) else json.dumps(value) for value in row.values()]
        with open(source, "w", newline="") as file:
            csv.writer(file).writerows([list(row), cells])
    else:
        source.write_text(json.dumps(row if form == "jsonl" else [row]))
        (pair,) = read_pairs(source)
        assert (pair.id, pair.image, pair.question, pair.chosen, pair.rejected) == ("x-1", "a.png", *TEXTS.values())
    prepare(source, "--out", tmp_path / "out")
    (pair,) = read_pairs(tmp_path / "out/pairs.jsonl")
    assert (pair.id, pair.question, pair.chosen, pair.rejected) == ("x-1", *TEXTS.values())
    assert lines(tmp_path / "out/pairs.jsonl")[0]["origin_image"] == "a.png"


def test_a_column_may_hold_messages_and_a_list_of_one_image(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(1))
    row = {"turns": [human()], "good": gpt("A cat."), "bad": [assistant("A dog.")], "photo": ["a.png"]}
    columns = {"question": "turns", "chosen": "good", "rejected": "bad", "image": "photo"}
    words = [word for name, column in columns.items() for word in ("--column", f"{name}={column}")]
    for source in (write_lines(tmp_path / "a.jsonl", [row]), write_parquet(tmp_path / "a.parquet", [row], schema=None)):
        prepare(source, "--out", tmp_path / source.suffix, *words)
        (pair,) = read_pairs(tmp_path / source.suffix / "pairs.jsonl")
        assert (pair.question, pair.chosen, pair.rejected) == tuple(TEXTS.values())


# ------------------------------------------------------------------------------------- messages name the file's fields

SWIFT = LAYOUTS["ms-swift"]
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "TRL": ({"prompt": 5, "chosen": "A", "rejected": "B", "images": ["a"]}, "field prompt: expected text, got int"),
    "TRL without images": (
        {"prompt": "?", "chosen": "A", "rejected": "B"},
        "no field image_path or image; it has chosen, prompt, rejected$",
    ),
    "images": ({"prompt": "?", "chosen": "A", "rejected": "B", "images": [3]}, "field images: expected"),
    "two images, one placeholder": (
        {**TEXTS, "question": "<image> What?", "image": ["a", "a"]},
        "field question: expected as many <image> as images, 2, or none, got 1",
    ),
    "no image, a placeholder": (
        SWIFT | {"images": []},
        "field messages: expected as many <image> as images, 0, or none, got 1",
    ),
    "RLHF-V": (
        {"text": '{"question": "?", "chosen": 5, "rejected": "B"}', "image": "a"},
        r"field text\.chosen: expected text, got int",
    ),
    "RLHF-V without one": (
        {"text": '{"question": "?", "chosen": "A"}', "image": "a"},
        "no field rejected; it has image, text, text.chosen, text.question$",
    ),
    "text that is no JSON": ({"text": "A cat.", "image": "a"}, r"field text: not JSON \(column 1\)"),
    "text that is a list": ({"text": "[1]", "image": "a"}, "field text: expected JSON of question, .* got list"),
    "text nested too deep": ({"text": "[" * 100_000, "image": "a"}, "field text: JSON with .* too many brackets"),
    "a system message in the middle": (
        SWIFT | {"messages": [SWIFT["messages"][0], {"role": "system", "content": "x"}, *SWIFT["messages"][1:]]},
        "field messages: expected turns of user and assistant .* got user, system, assistant",
    ),
    "a question without answer": (
        SWIFT | {"messages": [*SWIFT["messages"], user("And now?")], "rejected_response": [user("So?")]},
        "field messages: .* got user, assistant, user",
    ),
    "earlier turns": (
        LAYOUTS["ms-swift, old"] | {"history": [["Hi"]]},
        r"field history: expected a list of \[question, answer\], got",
    ),
    "a video": (
        {"prompt": [{"role": "user", "content": [{"type": "video"}]}], "chosen": "A", "rejected": "B", "image": "a"},
        "field prompt: expected parts of type text or image, got video",
    ),
    "a second answer that is a list": (
        SWIFT | {"rejected_response": ["A dog.", "A bird."]},
        "field rejected_response: expected text or a list of messages",
    ),
    "other questions": (
        LAYOUTS["ms-swift, two conversations"] | {"rejected_messages": [user("Who?"), assistant("B")]},
        "fields messages and rejected_messages: .* different questions",
    ),
    "an object without text": (
        {"conversations": [human()], "chosen": {"from": "gpt"}, "rejected": "B", "image": "a"},
        "field chosen: a message without text",
    ),
    "a question from the other side": (
        {"conversations": [gpt("What?")], "chosen": "A", "rejected": "B", "image": "a"},
        "field chosen: expected turns of user and assistant .* got assistant, assistant",
    ),
    "an id": ({**TEXTS, "id": [1], "image": "a"}, "field id: expected an integer or text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rows_are_named_by_the_files_fields(name: str, tmp_path: Path) -> None:
    row, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        pair_from_row(row)
    (tmp_path / "a").write_bytes(picture(0))
    good = TEXTS | {"id": "good", "image": "a"}
    prepare(write_lines(tmp_path / "rows.jsonl", [good, row]), "--out", tmp_path / "out")
    (dropped,) = lines(tmp_path / "out/dropped.jsonl")
    assert dropped["reason"] in ("unreadable row", "unusable image")
    assert dropped["detail"][:250] in (str(caught.value)[:250], "the row has no picture") or "field image" in message


@pytest.mark.parametrize("form", ["jsonl", "csv"])
def test_named_columns_are_called_what_the_file_calls_them(form: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(picture(0))
    names, source = ("ask", "good", "bad", "file", "key"), tmp_path / f"rows.{form}"
    table: list[list[Any]] = [["What?", "A cat.", "A dog.", "a", "1"], ["What?", None, "A dog.", "a", "2"]]
    if form == "csv":
        with open(source, "w", newline="") as file:
            csv.writer(file).writerows([names, *table])
    else:
        write_lines(source, [dict(zip(names, row)) for row in [*table, ["What?", 5, "A dog.", "a", "3"]]])
    words = zip(("question", "chosen", "rejected", "image", "id"), names)
    prepare(source, "--out", tmp_path / "out", *(part for name in words for part in ("--column", "=".join(name))))
    details = [row["detail"] for row in lines(tmp_path / "out/dropped.jsonl")]
    assert details[0] == "no field good; it has ask, bad, file, key"
    assert details[1:] == ([] if form == "csv" else ["field good: expected text, got int"])


def test_parquet_without_the_columns_of_any_layout(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "a.parquet", [{"messages": [user()], "images": ["a"]}], schema=None)
    with pytest.raises(SourceError, match="no column 'chosen'\n  no column 'rejected'"):
        prepare(source, "--out", tmp_path / "out")


# --------------------------------------------------------------------------------------------------- the placeholder


@pytest.mark.parametrize(
    "question",
    [
        "What?",
        "<image>\nWhat?",
        "<image>\r\nWhat?",
        "<image>\rWhat?",
        "<image> What?",
        "<image>What?",
        " <image>\n\nWhat?",
        "\ufeff<image>\nWhat?",
        "\n<image>\t What?",
        "What?<image>",
        "What? <image> ",
        "What?\r\n<image>\r\n",
        "What? <image>\u200b",
        "What?\u00a0<image>\u2028",
        "<image>\u200b\nWhat?",
    ],
)
def test_one_placeholder_at_either_end_with_what_is_around_it(question: str) -> None:
    assert without_image_tokens(question) == "What?"
    pair = pair_from_row(TEXTS | {"image": "a.png", "question": question})
    assert pair.question == "What?" and not list(text_errors(pair))


@pytest.mark.parametrize("question", ["<image>\nWhat?\n<image>", "<image><image>What?", "<image> Is <image> a cat?"])
def test_another_placeholder_is_another_image(question: str) -> None:
    pair = pair_from_row(TEXTS | {"image": "a.png", "question": question})
    assert any("one more image" in fault for fault in text_errors(pair))


def test_a_long_question_of_spaces_is_read_in_time() -> None:
    assert without_image_tokens(" " * 1_000_000 + "What?" + "\u200b" * 1_000_000).strip(" \u200b") == "What?"
    assert visible_text(" \u200b\u2800\r\n" * 200_000) == ""


def test_a_question_without_placeholder_stays_as_it_is() -> None:
    assert without_image_tokens(" What?\r\n") == " What?\r\n"


# ---------------------------------------------------------------------------------------------- what cannot be seen

UNSEEN = {
    "CRLF": "A cat\r\nsits.",
    "CR": "A cat\rsits.",
    "line separator": "A cat\u2028sits.",
    "space before a line end": "A cat \nsits.",
    "no-break space": "A\u00a0cat\nsits.",
    "two spaces": "A  cat\nsits.",
    "tab": "A\tcat\nsits.",
    "ideographic space": "A\u3000cat\nsits.",
    "Braille blank": "A\u2800cat\nsits.",
    "zero-width space": "A c\u200bat\nsits.",
    "zero-width non-joiner": "A c\u200cat\nsits.",
    "word joiner": "A cat\u2060\nsits.",
    "byte order mark": "\ufeffA cat\nsits.",
    "soft hyphen": "A c\u00adat\nsits.",
    "mark of direction": "A cat\nsits.\u200e",
    "variation selector": "A cat\nsits\ufe0e.",
    "grapheme joiner": "A c\u034fat\nsits.",
    "zero byte": "A c\x00at\nsits.",
    "tag": "A cat\nsits.\U000e0041",
    "trailing white space": "A cat\nsits. \n\n",
}
SEEN = {
    "case": "a cat\nsits.",
    "mark": "A cat\nsits",
    "a line": "A cat\n\nsits.",
    "no line": "A cat sits.",
    "accent": "A c\u00e1t\nsits.",
    "hyphen": "A cat\nsits-.",
    "emoji": "A cat\nsits. \u2764",
    "other space": "Acat\nsits.",
}


def pair_of(chosen: str, rejected: str, id: str = "x") -> PreferencePair:
    return PreferencePair(id, "a.png", "What?", chosen, rejected)


@pytest.mark.parametrize("name", UNSEEN)
def test_answers_that_look_alike_make_no_pair(name: str) -> None:
    (fault,) = text_errors(pair_of("A cat\nsits.", UNSEEN[name]))
    assert fault.startswith("chosen and rejected answer are equal")


@pytest.mark.parametrize("name", SEEN)
def test_answers_that_look_different_do(name: str) -> None:
    assert not list(text_errors(pair_of("A cat\nsits.", SEEN[name])))


def test_accents_composed_or_not_look_alike_and_joiners_between_letters_do_not() -> None:
    assert visible_text("caf\u00e9") == visible_text("cafe\u0301")
    assert visible_text("\u0645\u06cc\u200c\u062e") != visible_text("\u0645\u06cc\u062e")
    assert visible_text("\U0001f468\u200d\U0001f469") != visible_text("\U0001f468\U0001f469")


@pytest.mark.parametrize(
    "text", ["\u200b", "\ufeff \n", "\u2800", "\u3164\u00ad", "\x00", "\u200e\u200f\u2060", "\u202e"]
)
def test_a_text_that_shows_nothing_is_empty(text: str) -> None:
    (fault,) = text_errors(pair_of(text, "A dog."))
    assert fault == "the chosen answer is empty, it has invisible characters only"
    (fault,) = text_errors(PreferencePair("x", "a.png", text, "A.", "B."))
    assert fault == "the question is empty"


def test_prepare_leaves_them_out_and_counts_them_and_training_refuses_them(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    good = TEXTS | {"image": "a.png", "id": "good"}
    bad = [good | {"id": name, "chosen": "A cat\nsits.", "rejected": text} for name, text in UNSEEN.items()]
    empty = good | {"id": "empty", "rejected": "\u200b"}
    repeated = good | {"id": "again", "question": "What\u200b is\u00a0it?", "chosen": "A cat.\r\n"}
    source = write_lines(tmp_path / "rows.jsonl", [good, *bad, empty, repeated])
    prepare(source, "--out", tmp_path / "out")
    assert card(tmp_path / "out")["left_out"] == {"unusable text": len(UNSEEN) + 1, "repeated pair": 1}
    assert [pair.id for pair in read_pairs(tmp_path / "out/pairs.jsonl")] == ["good"]
    with pytest.raises(PairsError, match="row CRLF .*: chosen and rejected answer are equal but for what cannot"):
        check_pairs(read_pairs(source), tmp_path)


class Unhurried(str):
    """Text that does not count as ASCII, so that it takes the general way."""

    def isascii(self):
        return False


def test_plain_text_is_seen_as_any_text_is():
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices("ab  \n\n.~\t", k=draw.randint(0, 12)))
        assert visible_text(text) == visible_text(Unhurried(text)), repr(text)
