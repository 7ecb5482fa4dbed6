"""One bad row, whatever is wrong with any of its fields, is a listed row: it never ends prepare."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dama.pairs import PairsError, check_pairs, parse_pairs, read_pairs
from tests.dama.prepare_sets import card, lines, picture, prepare

pytestmark = pytest.mark.fast

GOOD = {"idx": "good", "image": "good.png", "question": "What?", "chosen": "A cat.", "rejected": "A dog."}
FIELDS = (
    *("idx", "id", "image", "image_path", "images", "question", "prompt", "chosen", "rejected", "origin_dataset"),
    *("origin_split", "generator", "kind", "logps", "chosen_logits", "rejected_logits", "conversations", "messages"),
    *("text", "rejected_response", "history", "some_other_field"),
)


def nested(depth: int, form: str) -> str:
    """JSON of lists, of records, or of both in turn."""
    start, end = {"lists": ("[", "]"), "records": ('{"a":', "}"), "both": ('[{"a":', "}]")}[form]
    return start * depth + "1" + end * depth


VALUES = {
    **{f"{depth} {form}": nested(depth, form) for depth in (60, 900, 990, 5000, 100_000) for form in ("lists", "both")},
    "JSON text of lists": json.dumps(nested(900, "lists")),
    "JSON text of many lists": json.dumps(nested(50_000, "lists")),
    "JSON text of many records": json.dumps(nested(50_000, "records")),
    "a name of 300 letters": json.dumps("a" * 300),
    "a name of 5000 letters": json.dumps("a" * 5000),
    "a name of a million letters": json.dumps("a" * 1_000_000),
    "a path of 3000 folders": json.dumps("a/" * 3000),
    "a path up 3000 folders": json.dumps("../" * 3000),
    "a name of 300 letters beyond ASCII": json.dumps("図" * 300),
    "a number of 400 digits": "9" * 400,
    "a number of 4000 digits": "9" * 4000,
    "numbers of 400 digits": "[" + ",".join(["9" * 400] * 6) + "]",
    "an infinite number": "1e999",
    "NaN": "[NaN, NaN, NaN, NaN, NaN, NaN]",
    "true": "true",
    "an empty list": "[]",
    "an empty record": "{}",
    "a zero character": '"\\u0000"',
    "half a character": '"\\ud800"',
    "a list of half characters": '["\\udc00", {"\\ud800": "\\ud800"}]',
    "a record of messages": '{"role": {"a": 1}, "content": [1]}',
    "a list of messages": '[{"role": ["user"], "content": {"a": 1}}, {"from": 3, "value": null}]',
}


@pytest.mark.parametrize("field", FIELDS)
def test_no_value_of_a_field_ends_prepare(field: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With each of the values beside good rows: all good ones are kept, every row is a pair or a row left out."""
    (tmp_path / "good.png").write_bytes(picture(0))
    rows = [json.dumps(GOOD)]
    for number, value in enumerate(VALUES.values()):
        row = {name: text for name, text in GOOD.items() if name != field} | {"chosen": f"Cat {number}."}
        row |= {} if field in ("idx", "id") else {"idx": f"bad {number}"}
        text = json.dumps({name: text for name, text in row.items() if name != field})
        rows.append(f'{text[:-1]}, "{field}": {value}}}')
    rows.append(json.dumps(GOOD | {"idx": "last", "chosen": "A bird."}))
    source = tmp_path / "rows.jsonl"
    source.write_text("\n".join(rows))
    prepare(source, "--out", tmp_path / "out")
    counts = card(tmp_path / "out")["counts"]
    assert counts["rows"] == counts["pairs"] + counts["left_out"] == len(rows)
    kept = [pair.id for pair in read_pairs(tmp_path / "out/pairs.jsonl")]
    assert (kept[0], kept[-1]) == ("good", "last")
    dropped = lines(tmp_path / "out/dropped.jsonl")
    assert all(row["place"] and row["reason"] and row["detail"] for row in dropped)
    assert all(len(json.dumps(row)) < 6000 for row in dropped)
    assert len((tmp_path / "out/data_card.md").read_text()) < 100_000
    pairs, faults = parse_pairs(source)  # what training and hardness read
    assert len(pairs) + len(faults) == len(rows)
    try:
        check_pairs(pairs, tmp_path, errors=faults)
    except PairsError as error:
        assert "Remedy" in str(error)


def test_many_and_long_names_of_fields(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(picture(0))
    bad: list[dict[str, Any]] = [{"x" * 100_000: 1}, {f"field {n}": n for n in range(10_000)}, {"": ""}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [GOOD, *bad])))
    prepare(tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    assert card(tmp_path / "out")["left_out"] == {"unusable image": 3}
    assert all(len(row["detail"]) < 400 for row in lines(tmp_path / "out/dropped.jsonl"))
