"""dama.hardness.split: expected statements of LLaVA-style answers, and what must hold for any text."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from dama.hardness.split import fit_to_context, split_statements

CASES = json.loads((Path(__file__).parent / "split_cases.json").read_text(encoding="utf-8"))
# What a split may leave out of an answer: joining words, and the marks of lists and headings.
JOINING = {"and", "but", "while", "whereas", "with"}


def words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in JOINING]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_expected_statements(case: dict[str, str]) -> None:
    assert split_statements(case["answer"]) == case["statements"]


@pytest.mark.parametrize("case", CASES, ids=[case["name"] for case in CASES])
def test_no_word_is_added_lost_or_moved(case: dict[str, str]) -> None:
    unmarked = re.sub(r"(?:^|(?<=[.:]))\s*\(?\d{1,2}[.)](?=\s+[A-Z].*(?:\n|\s\d\.|$))", " ", case["answer"], flags=re.M)
    source = unmarked if re.search(r"1\.\s", case["answer"]) else case["answer"]
    assert words(" ".join(split_statements(case["answer"]))) == words(source)


def test_nothing_from_nothing() -> None:
    assert split_statements("") == split_statements(" \n\t") == []


def test_one_long_sentence_of_many_clauses_is_split_in_reasonable_time() -> None:
    answer = ", and ".join(f"the box {index} is red" for index in range(1500))
    assert len(split_statements(answer)) == 1500


def count_words(text: str) -> int:
    """A toy tokenizer: a token a word, and a start and an end token."""
    return len(text.split()) + 2


def test_a_statement_that_fits_is_left_alone() -> None:
    assert fit_to_context("A dog, a cat, a bird.", count_words, 8) == ["A dog, a cat, a bird."]


def test_halves_meet_at_the_clause_mark_nearest_the_middle() -> None:
    """8 words + 2 > 8; commas after words 2 and 5 of 8, the second is nearer to the middle of the text."""
    statement = "a dog, a small cat, a yellow bird."
    assert fit_to_context(statement, count_words, 8) == ["a dog, a small cat,", "a yellow bird."]


def test_words_where_no_mark_is_central_and_characters_where_no_space_is() -> None:
    """21 characters, the comma in their first fifth: cut at the space nearest to 10.5. A word without one is halved."""
    assert fit_to_context("so, b c d e f g h i j", count_words, 8) == ["so, b c d", "e f g h i j"]
    assert fit_to_context("图中有一只猫坐着", lambda text: len(text) + 2, 6) == ["图中有一", "只猫坐着"]


def test_nothing_is_cut_away_from_a_long_statement() -> None:
    statement = "The table holds " + ", ".join(f"a plate number {index} of seven grams" for index in range(60)) + "."
    pieces = fit_to_context(statement, count_words, 30)
    assert " ".join(pieces) == statement
    assert max(map(count_words, pieces)) <= 30
    assert min(map(count_words, pieces)) > 8  # halving leaves no crumbs


def test_a_character_beyond_the_limit_is_an_error() -> None:
    with pytest.raises(ValueError, match="single character 'x' takes 3 tokens, limit is 2"):
        fit_to_context("xy", count_words, 2)
