"""dama.hardness.markers: lists give the same statements whatever they are marked with, and nothing else is a list."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dama.hardness.markers import numbered_markers
from dama.hardness.split import BEFORE_MARKERS, VERSION, split_statements, version_for
from dama.hardness.split_llm import read_statements
from tests.growth import growth

pytestmark = pytest.mark.fast

ITEMS = ["A red cup is on the table", "Two dogs sleep", "A man who holds a kite", "The sky is blue", "No bird is seen"]
STATEMENTS = [f"{item}." for item in ITEMS]
NUMBERS = ["1.", "2.", "3.", "4.", "5."]
MARKERS = {
    "small Roman": ["i.", "ii.", "iii.", "iv.", "v."],
    "capital Roman": ["I.", "II.", "III.", "IV.", "V."],
    "Roman in brackets": ["(i)", "(ii)", "(iii)", "(iv)", "(v)"],
    "Roman before a bracket": ["i)", "ii)", "iii)", "iv)", "v)"],
    "small letters": ["a.", "b.", "c.", "d.", "e."],
    "capital letters": ["A.", "B.", "C.", "D.", "E."],
    "letters before a bracket": ["A)", "B)", "C)", "D)", "E)"],
    "letters in brackets": ["(a)", "(b)", "(c)", "(d)", "(e)"],
    "capital letters in brackets": ["(A)", "(B)", "(C)", "(D)", "(E)"],
    "numbers before a bracket": ["1)", "2)", "3)", "4)", "5)"],
    "numbers in brackets": ["(1)", "(2)", "(3)", "(4)", "(5)"],
    "circled": ["①", "②", "③", "④", "⑤"],
    "Roman signs": ["Ⅰ.", "Ⅱ.", "Ⅲ.", "Ⅳ.", "Ⅴ."],
    "keycaps": [f"{n}\ufe0f\u20e3" for n in range(1, 6)],
    "Cyrillic": ["а)", "б)", "в)", "г)", "д)"],
    "Greek": ["α)", "β)", "γ)", "δ)", "ε)"],
}
AT_LINE_START = MARKERS | {
    "a colon": ["1:", "2:", "3:", "4:", "5:"],
    "letters and a colon": ["A:", "B:", "C:", "D:", "E:"],
    "square brackets": ["[1]", "[2]", "[3]", "[4]", "[5]"],
    "full width": ["１．", "２．", "３．", "４．", "５．"],
    "Chinese": ["一、", "二、", "三、", "四、", "五、"],
    "a dot and a bracket": ["1.)", "2.)", "3.)", "4.)", "5.)"],
    "dashes": ["1 -", "2 -", "3 -", "4 -", "5 -"],
    "letters and long dashes": ["A –", "B –", "C –", "D –", "E –"],
    "slashes": ["1/", "2/", "3/", "4/", "5/"],
    "hashes": ["#1", "#2", "#3", "#4", "#5"],
    "hashes and a colon": ["#1:", "#2:", "#3:", "#4:", "#5:"],
    "words": ["Item 1:", "Item 2:", "Item 3:", "Item 4:", "Item 5:"],
    "a short word": ["No. 1:", "No. 2:", "No. 3:", "No. 4:", "No. 5:"],
    "corner brackets": ["【1】", "【2】", "【3】", "【4】", "【5】"],
    "italics": ["*i.*", "*ii.*", "*iii.*", "*iv.*", "*v.*"],
    "Korean": ["가.", "나.", "다.", "라.", "마."],
    "heavenly stems": ["甲、", "乙、", "丙、", "丁、", "戊、"],
    "katakana": ["ア.", "イ.", "ウ.", "エ.", "オ."],
    "bold": ["**A.**", "**B.**", "**C.**", "**D.**", "**E.**"],
    "bold numbers": ["**1.**", "**2.**", "**3.**", "**4.**", "**5.**"],
    "a bullet before them": ["- 1.", "- 2.", "- 3.", "- 4.", "- 5."],
    "headings": ["### 1.", "### 2.", "### 3.", "### 4.", "### 5."],
    "pluses": ["+"] * 5,
    "dots": ["●"] * 5,
    "checks": ["✓"] * 5,
}
LAYOUTS = {
    "lines": "{0}\n{1}\n{2}\n{3}\n{4}",
    "lines with stops": "{0}.\n{1}.\n{2}.\n{3}.\n{4}.",
    "lines of Windows": "{0}.\r\n{1}.\r\n{2}.\r\n{3}.\r\n{4}.",
    "paragraphs": "{0}.\n\n{1}.\n\n{2}.\n\n{3}.\n\n{4}.",
    "indented": "  {0}\n  {1}\n  {2}\n  {3}\n  {4}",
    "after a heading": "In the image:\n{0}\n{1}\n{2}\n{3}\n{4}\n\nThat is all.",
    "one line with stops": "{0}. {1}. {2}. {3}. {4}.",
    "one line with semicolons": "In the image: {0}; {1}; {2}; {3}; {4}.",
    "one line": "{0} {1} {2} {3} {4}",
    "one line with commas": "In the image: {0}, {1}, {2}, {3}, and {4}.",
}


def answer(layout: str, markers: list[str]) -> str:
    return LAYOUTS[layout].format(*(f"{marker} {item}" for marker, item in zip(markers, ITEMS)))


WITHOUT_BRACKETS = [name for name, markers in MARKERS.items() if not markers[0].startswith("(")]
CASES = [(layout, name) for layout in LAYOUTS for name in AT_LINE_START if "one line" not in layout]
CASES += [(layout, name) for layout in LAYOUTS for name in MARKERS if "one line" in layout and "commas" not in layout]
CASES += [("one line with commas", name) for name in WITHOUT_BRACKETS]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_the_same_statements_as_with_numbers(layout: str, name: str) -> None:
    statements = split_statements(answer(layout, AT_LINE_START[name]))
    assert statements == split_statements(answer(layout, NUMBERS))
    assert [text for text in statements if text not in ("In the image.", "That is all.")] == STATEMENTS


@pytest.mark.parametrize("name", MARKERS)
def test_two_items_and_small_letters_after_a_line_break(name: str) -> None:
    first, second = MARKERS[name][:2]
    assert split_statements(f"{first} a red cup\n{second} a dog") == ["A red cup.", "A dog."]


def test_lists_of_many_items_and_lists_in_lists() -> None:
    letters = "\n".join(f"{letter}. item {letter} stands" for letter in "abcdefghijklmnop")
    assert len(split_statements(letters)) == 16  # at i. it is letters, not Roman numerals
    nested = "I. A cup\n  a) it is red\n  b) it is small\nII. A dog\n  a) it sleeps\n  b) it is old"
    assert split_statements(nested) == ["A cup.", "It is red.", "It is small.", "A dog.", "It sleeps.", "It is old."]


@pytest.mark.parametrize(
    "text",
    [
        "A. Lincoln is on the wall. A dog sits below.",
        "J. R. Smith stands beside A. B. Jones.",
        "It is vitamin A. B. is not there.",
        "I. see a cat",
        "The shirt says 1. The other says 2.",
        "At 5 a.m. the sun rises. At 6 p.m. it sets.",
        "A cat sits. I see it. V. is a letter.",
        "There are (a) a red cup, (b) a dog.",
        "Two panels: (1) a red cup, and (2) a dog.",
        "1. A cup that says 2. The dog sits.\n2. A dog.",
        "The ratio is 1.5\n2.5 is more.",
        "Grade: A. It is good.",
        "Plan A: go. Plan B: stay.",
        "1/2 cup of milk\n2/3 cup of oil",
        "#1 is red.",
        "A - as ever - sleeps.\nThe dog does not.",
    ],
)
def test_what_is_no_list_stays_as_it_is(text: str) -> None:
    assert numbered_markers(text) == text


def test_replies_of_an_llm_are_read_alike() -> None:
    for markers in AT_LINE_START.values():
        assert read_statements(answer("lines", markers)) == STATEMENTS


def test_the_version_tells_whether_scores_of_before_are_still_right() -> None:
    cases = json.loads((Path(__file__).parent / "split_cases.json").read_text(encoding="utf-8"))
    assert version_for([answer("lines", NUMBERS), "Two dogs. One cat.", "a. one\nb. two"]) == BEFORE_MARKERS
    assert version_for(["Two dogs.", answer("lines", MARKERS["small Roman"])]) == VERSION
    for case in cases:
        if version_for([case["answer"]]) == BEFORE_MARKERS:
            assert numbered_markers(case["answer"]) == case["answer"]


@pytest.mark.parametrize("part", ["A. b ii. c 1. d (a) e ", "A. b\nii. c 1. d\n(a) e\n", " ", "*", " *"])
def test_long_answers_take_no_long_time(part: str) -> None:
    assert growth(numbered_markers, part, 4_800) < 80


def test_a_long_gap_before_stars_takes_no_long_time() -> None:
    assert growth(lambda text: numbered_markers(text + "*" * len(text)), " ", 48_000) < 80
