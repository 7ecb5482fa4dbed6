"""dama.prepare.card: what stands in the data cannot become HTML, a link or a table in data_card.md."""

from __future__ import annotations

import html
import re
from pathlib import Path

import pytest

from dama.prepare.rows import clean
from tests.dama.prepare_sets import card, picture, prepare, write_lines

pytestmark = pytest.mark.fast

ATTACKS = {
    "HTML": '<img src="http://evil.example/a.png" onerror="alert(1)">',
    "a script": "<script>alert(1)</script>",
    "a comment": "<!-- hides what follows",
    "an entity": "&lt;b&gt; &#60;script&#62;",
    "an image": "![x](http://evil.example/a.png)",
    "a link": "[a set](javascript:alert(1))",
    "a link by reference": "[a set][1]",
    "an address": "see https://evil.example/a now",
    "an address without scheme": "see www.evil.example/a now",
    "an address in brackets": "<https://evil.example>",
    "a mail address": "me@evil.example",
    "capital letters": "HTTPS://EVIL.EXAMPLE",
    "a cell": "a | b",
    "an escaped cell": "a \\| b \\\\| c",
    "code": "`a` ``b",
    "a line": "a\n| x | y |\n\n# Heading",
    "a carriage return": "a\r\n\r\n<h1>x</h1>",
    "a control": "a\x1b[31m b\x00c",
    "a strange line end": "a\u2028# b\x85c\x0bd",
    "a long name": "x" * 50_000,
}


def seen(cell: str) -> str:
    """The text that a reader of Markdown sees: entities resolved, backslashes before marks gone."""
    return html.unescape(re.sub(r"\\([\\`*\[\]|~])", r"\1", cell))


@pytest.mark.parametrize("field", ["origin_dataset", "generator", "kind", "column"])
@pytest.mark.parametrize("name", ATTACKS)
def test_text_of_the_data_is_shown_letter_by_letter(name: str, field: str, tmp_path: Path) -> None:
    attack = ATTACKS[name]
    (tmp_path / "a.png").write_bytes(picture(0))
    row = {"question": "?", "chosen": "A cat.", "rejected": "A dog.", "image": "a.png"}
    words: list[str] = []
    if field == "column":
        row[attack], words = row.pop("question"), ["--column", f"question={attack}"]
    else:
        row[field] = attack
    prepare(write_lines(tmp_path / "rows.jsonl", [row]), "--out", tmp_path / "out", *words)
    page = (tmp_path / "out/data_card.md").read_text(encoding="utf-8")
    rest = page.replace(f"`{card(tmp_path / 'out')['checksum']}`", "")
    assert not re.search(r"<|(?<!\\)[\[\]`]|(?:https?|mailto):/?/?evil|www\.|\w@\w", rest, re.IGNORECASE)
    assert len(page) < 10_000 and len(re.findall("^# ", page, re.M)) == 1
    tables = [line for line in page.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)(?:\\\\)*\|", line)[1:-1] for line in tables]
    assert all(len(row) in (2, 4, 6) for row in cells)
    attack = clean(attack) if field == "generator" else attack
    words_seen = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", attack).split())[:300]
    shown = [seen(cell.strip()) for row in cells for cell in row]
    assert any(words_seen.strip() in cell for cell in shown)


def test_ordinary_names_stay_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture(0))
    names = {"origin_dataset": "VQAv2_train-2014 (part 1)", "generator": "llava-1.5-7b", "kind": "question_answering"}
    row = {"question": "?", "chosen": "A cat.", "rejected": "A dog.", "image": "a.png"} | names
    prepare(write_lines(tmp_path / "rows.jsonl", [row]), "--out", tmp_path / "out")
    page = (tmp_path / "out/data_card.md").read_text()
    assert all(f"| {name} | 1 |" in page for name in names.values())
