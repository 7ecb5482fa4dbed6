"""dama.hardness.split and split_llm.

Expected statements of LLaVA-style answers, what must hold for any text, and an LLM's splits over HTTP and from a local
model, checked against their answers.
"""

from __future__ import annotations

import json
import re
import unicodedata
from itertools import takewhile
from pathlib import Path

import pytest

from dama.chat import ChatError, ChatSettings
from dama.hardness import split_llm
from dama.hardness.split import Split, fit_to_context, split_statements
from dama.hardness.split_llm import (
    ADDED,
    LOST,
    NO_REPLY,
    NO_STATEMENTS,
    PROMPT,
    added_words,
    checked_split,
    local_splitter,
    read_statements,
    server_splitter,
)
from tests.openai_server import Call, Scripted, ScriptedServer, failure

pytestmark = pytest.mark.fast

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
    """The statements' words are the answer's in their order; only joining words and the marks of lists are missing."""
    source = iter(words(case["answer"]))
    left_out: list[str] = []
    for word in words(" ".join(split_statements(case["answer"]))):
        left_out += takewhile(word.__ne__, source)
    marks = re.findall(r"(?:^|[\s:(])\(?(\d{1,2})[.)]\s", case["answer"])
    assert set([*left_out, *source]) <= set(marks)


def test_there_are_sixty_cases_in_several_scripts() -> None:
    assert len(CASES) >= 60 and len({case["name"] for case in CASES}) == len(CASES)
    letters = {letter for case in CASES for letter in case["answer"] if letter.isalpha()}
    scripts = {unicodedata.name(letter).split()[0] for letter in letters}
    assert {"LATIN", "CJK", "HIRAGANA", "ARABIC", "CYRILLIC", "DEVANAGARI"} <= scripts


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


# ------------------------------------------------------------------------------------------------------------- LLM

BEACH = "The image features a man standing on a sandy beach, holding a surfboard. He is looking at the waves."
GOOD = "A man is standing on a sandy beach.\nThe man holds a surfboard.\nThe man is looking at the waves."
STATEMENTS = GOOD.split("\n")


def test_a_reply_is_read_line_by_line() -> None:
    assert read_statements("Here are the statements:\n\n1. a cat sleeps\n- The dog: it barks.\n```\n") == [
        "A cat sleeps.",
        "The dog: it barks.",
    ]
    assert read_statements("Sure:\n") == read_statements("---") == []


@pytest.mark.parametrize(
    "answer, statement, added",
    [
        (BEACH, "The man stands, and there is sand.", ["sand"]),  # sandy is no inflection of sand
        (BEACH, "It's the man's surfboards.", []),
        (BEACH, "He isn't looking.", ["isn't"]),  # a negation is content
        ("Two dogs were running past the dishes.", "A dog runs past a dish.", []),
        ("It costs 3.50 and was placed there.", "It costs 3.5, in a place.", ["3.5"]),
        ("A plan lies on the table.", "A plane is lying on tables.", ["plane"]),
        ("图中有一只猫。它坐在椅子上！", "猫坐在椅子上，狗在旁边。", ["狗", "旁", "边"]),
        ("दो लड़के खेल रहे हैं।", "लड़के खेल रहे हैं।", []),
        ("Ein Hund läuft.", "Der Hund läuft.", ["der"]),  # other languages' articles are not known
    ],
)
def test_words_that_a_statement_adds(answer: str, statement: str, added: list[str]) -> None:
    assert added_words(answer, [statement]) == added


def test_a_split_that_adds_or_loses_words_gives_way_to_the_rules() -> None:
    """BEACH has ten words of content besides "image features"; "A man." keeps one of twelve."""
    rules = split_statements(BEACH)
    assert checked_split(BEACH, GOOD) == Split(STATEMENTS)
    assert checked_split(BEACH, GOOD + "\nA dog is beside him.") == Split(rules, ADDED)
    assert checked_split(BEACH, "A man.") == Split(rules, LOST)
    assert checked_split(BEACH, "...") == Split(rules, NO_STATEMENTS)
    assert checked_split(BEACH, None) == Split(rules, NO_REPLY)


def test_a_server_splits_and_its_replies_are_kept(tmp_path: Path) -> None:
    """Four answers: one split well, one with a dog put in, one at the second try, one that only fails.

    The cache saves three of them the second time, without a server for them.
    """
    answers = [BEACH, "There is a cat on a mat.", "A red bus.", "Two women are talking."]

    def reply(call: Call) -> str | Scripted:
        answer = call.text.removeprefix(PROMPT)
        if answer == answers[3]:
            return failure(500)
        if answer == answers[2] and call.attempt == 0:
            return "Here it is:"
        return {BEACH: GOOD, answers[1]: "A cat and a dog are on a mat.", answers[2]: "There is a red bus."}[answer]

    expected = {
        answers[0]: Split(STATEMENTS),
        answers[1]: Split(["There is a cat on a mat."], ADDED),
        answers[2]: Split(["There is a red bus."]),
        answers[3]: Split(["Two women are talking."], NO_REPLY),
    }
    server = ScriptedServer(reply)
    with server as url:
        settings = ChatSettings(url, "splitter", retries=1)
        splitter = server_splitter(settings, tmp_path / "splits.jsonl")
        assert splitter.split(answers) == expected
        assert server.calls[0].text == PROMPT + BEACH
        assert splitter.identity["llm"] == "splitter"
        asked = len(server.calls)
        assert server_splitter(settings, tmp_path / "splits.jsonl").split(answers) == expected
        assert len(server.calls) == asked + 2  # one answer, tried twice
    with pytest.raises(ChatError, match="no server answers"):
        server_splitter(settings, tmp_path / "none.jsonl").split([BEACH])


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with random weights, a word-level tokenizer, and a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("chat") / "tiny"
    words = ["<unk>", "</s>", *dict.fromkeys(re.findall(r"\w+|[^\w\s]", PROMPT + BEACH + GOOD))]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}</s>"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        bos_token_id=1, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_local_model_splits_in_batches_and_its_replies_are_kept(
    chat_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights: what it says is nonsense in the prompt's words, so that splits fall back, with a reason."""
    monkeypatch.setattr(split_llm, "REPLY_TOKENS", 12)
    answers = [BEACH, "A cat sleeps.", *(f"There are {number} dogs." for number in range(9))]
    splitter = local_splitter(chat_model, tmp_path / "splits.jsonl")
    splits = splitter.split(answers)
    assert {answer: parts.statements for answer, parts in splits.items()} == {a: split_statements(a) for a in answers}
    assert {parts.fallback for parts in splits.values()} <= {ADDED, LOST, NO_STATEMENTS} and splits[BEACH].fallback
    lines = (tmp_path / "splits.jsonl").read_text().splitlines()
    replies = [json.loads(line)["replies"] for line in lines]  # eleven answers in batches of eight
    assert [len(batch) for batch in replies] == [8, 3] and all(text.strip() for batch in replies for text in batch)

    # A kill inside the second batch's line: the first is kept, the second comes out the same again.
    (tmp_path / "splits.jsonl").write_text(lines[0] + "\n" + lines[1][:20])
    again = local_splitter(chat_model, tmp_path / "splits.jsonl")
    assert again.identity == splitter.identity and again.split(answers) == splits
    assert (tmp_path / "splits.jsonl").read_text().splitlines() == lines
    # A reply that was kept is used; the model need not say it again.
    shorter = sorted(answers, key=lambda answer: (len(answer), answer))[:8]
    told = {"key": json.loads(lines[0])["key"], "replies": shorter}
    (tmp_path / "told.jsonl").write_text(json.dumps(told) + "\n")
    assert local_splitter(chat_model, tmp_path / "told.jsonl").split(shorter) == {a: Split([a]) for a in shorter}


def test_a_model_without_a_chat_template_is_refused(chat_model: Path, tmp_path: Path) -> None:
    import shutil

    folder = tmp_path / "base"
    shutil.copytree(chat_model, folder)
    for name in ("chat_template.jinja", "chat_template.json"):
        (folder / name).unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="its tokenizer has no chat template\nRemedy: take a chat"):
        local_splitter(folder, tmp_path / "splits.jsonl")


def test_thoughts_are_no_statements() -> None:
    assert read_statements("<think>\nA cat?\n</think>\nA dog stands.\nIt is red.") == ["A dog stands.", "It is red."]
    assert read_statements("<think>A cat stands.\nIt is") == []
