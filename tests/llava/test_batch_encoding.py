"""Encoding in batches gives what encoding one by one gives, to the last id and label, and the same errors."""

import json
import random

import numpy as np
import pytest
import torch

from dama.pairs import PreferencePair
from llava.conversation import conv_templates, get_template
from llava.mm_utils import BREAK
from llava.tokenization import load_tokenizer
from llava.train import batch_encoding
from llava.train.batch_encoding import encode_answers, encode_conversations
from llava.train.dpo_data import encode_pair
from llava.train.preprocess import encode_turns
from llava.train.word_cache import merges_within_words, word_cache
from tests.conftest import GOLDEN
from tests.llava.test_preprocess import CONVERSATIONS, byte_level, turns_of  # noqa: F401  (a fixture)

TEXTS = [
    "A cat.", " leading", "trailing ", "two  spaces   three", "line\nbreak\n\n", "\ttab", "été 猫 🙂‍↔️ \u0301",
    "Stop.</s>USER: Say yes. ASSISTANT:", "</s>", "<unk>", "<</s>", f"a{BREAK}b", f"<{BREAK}/s>", "<im_start> x",
    "▁ literal ▁▁", " ASSISTANT: hi", "USER:", "", "\u200b", "a" * 300, "1,000.50 %", "\ufeffx", "<0x0A>",
]  # fmt: skip


@pytest.fixture(scope="module", params=["llava-v1.5-tiny", "tokenizer-legacy"])
def tokenizer(request):
    tokenizer = load_tokenizer(GOLDEN / request.param)
    tokenizer.add_tokens(["<im_patch>", "<im_start>", "<im_end>"], special_tokens=True)
    return tokenizer


def pairs_of(count):
    """Every text as question, chosen and rejected answer, then random mixtures of them."""
    draw = random.Random(5)
    fixed = [(text, text, other) for text, other in zip(TEXTS, reversed(TEXTS))]
    mixed = [["".join(draw.choices(TEXTS, k=draw.randint(1, 4))) for _ in range(3)] for _ in range(count - len(fixed))]
    return [PreferencePair(str(i), "a.jpg", *texts) for i, texts in enumerate([*fixed, *mixed])]


def assert_equal(row, expected):
    assert torch.equal(row.input_ids, expected.input_ids) and torch.equal(row.labels, expected.labels)
    assert row.input_ids.dtype == row.labels.dtype == torch.int64


@pytest.mark.parametrize("template", ["v1", "llava_llama_2", "mpt", "v1_mmtag", "chatml_direct"])
@pytest.mark.parametrize(("marked", "cached"), [(False, True), (False, False), (True, True)])
def test_pairs_are_those_of_encode_pair(template, marked, cached, tokenizer, monkeypatch):
    if not cached:
        monkeypatch.setattr(batch_encoding, "word_cache", lambda tokenizer: None)
    monkeypatch.setattr(batch_encoding, "BATCH", 7)  # several batches, the last one smaller
    pairs = pairs_of(60)
    table = encode_answers(pairs, tokenizer, get_template(template), marked)
    assert len(table) == 2 * len(pairs)
    for index, pair in enumerate(pairs):
        expected = encode_pair(pair, tokenizer, get_template(template), marked)
        for row, one in zip((table[2 * index], table[2 * index + 1]), expected, strict=True):
            assert_equal(row, one)


@pytest.mark.parametrize("template", ["v1", "llava_llama_2", "mpt", "v0", "plain"])
def test_conversations_are_those_of_encode_turns(template, tokenizer):
    plain = template == "plain"
    names = [name for name in CONVERSATIONS if not plain or fits_plain(turns_of(name))]
    assert names
    for has_image in (True,) if plain else (False, True):
        conversations = [turns_of(name) for name in names]
        table = encode_conversations(conversations, tokenizer, get_template(template), has_image)
        for row, turns in zip(table, conversations, strict=True):
            assert_equal(row, encode_turns(turns, tokenizer, get_template(template), has_image))


def fits_plain(turns):
    return len(turns) == 2 and "<image>" in turns[0][1]


ORDINARY = [PreferencePair(str(i), "a.jpg", "Where?", f"été 猫 {i}.", f" Near  the\nbus {i}") for i in range(20)]


def test_ordinary_text_takes_the_fast_ways(tokenizer, monkeypatch):
    """Otherwise the equality above would prove nothing of them."""
    expected = encode_answers(ORDINARY, tokenizer, conv_templates["v1"])
    monkeypatch.setattr(batch_encoding, "encode_turns", None)
    monkeypatch.setattr(batch_encoding, "word_cache", lambda tokenizer: None)
    batched = encode_answers(ORDINARY, tokenizer, conv_templates["v1"])
    monkeypatch.undo()
    monkeypatch.setattr(batch_encoding, "encode_turns", None)
    monkeypatch.setattr(batch_encoding, "_from_batch", None)
    by_words = encode_answers(ORDINARY, tokenizer, conv_templates["v1"])
    for table in (batched, by_words):
        assert table.ids.tolist() == expected.ids.tolist()
        assert table.supervised.tolist() == expected.supervised.tolist()
    with pytest.raises(TypeError):
        encode_answers([PreferencePair("0", "a.jpg", "Where?", "</s>", "b")], tokenizer, conv_templates["v1"])


def test_a_piece_with_an_inner_space_forbids_the_word_cache(tokenizer):
    backend = tokenizer.backend_tokenizer
    vocabulary = backend.get_vocab(with_added_tokens=False)
    assert merges_within_words(backend.model, vocabulary)
    assert not merges_within_words(backend.model, vocabulary | {"of\u2581the": 0})
    assert not merges_within_words(backend.model, {k: v for k, v in vocabulary.items() if k != "<0xF0>"})


def test_the_word_cache_stays_bounded(tokenizer, monkeypatch):
    monkeypatch.setattr("llava.train.word_cache.MAX_WORDS", 5)
    cache = word_cache(tokenizer)
    text = "many different words that do not fit"
    assert cache.ids_of(text) == tokenizer(text).input_ids[1:] and len(cache.words) <= 5


def test_rows_are_views_of_flat_arrays(tokenizer):
    table = encode_answers(pairs_of(30), tokenizer, conv_templates["v1"])
    assert table.ids.dtype == np.int32 and table.offsets[-1] == len(table.ids) == len(table.supervised)
    assert table.lengths.tolist() == [len(row.input_ids) for row in table]
    with pytest.raises(IndexError, match="row 60: expected 0 to 59"):
        table[60]


def test_nothing_gives_an_empty_table(tokenizer):
    table = encode_answers([], tokenizer, conv_templates["v1"])
    assert len(table) == 0 and table.lengths.tolist() == []


def test_an_error_names_the_pair(byte_level, monkeypatch):  # noqa: F811
    """An answer that opens with a line break shares a token with the prompt's end; the message is encode_pair's."""
    monkeypatch.setattr(batch_encoding, "BATCH", 3)
    template = conv_templates["chatml_direct"]
    pairs = [PreferencePair(f"n{i}", "a.jpg", "x", "a cat", "\na cat" if i == 4 else "a mat") for i in range(6)]
    with pytest.raises(ValueError, match=r"^pair n4: an answer must begin and end between tokens") as batched:
        encode_answers(pairs, byte_level, template)
    with pytest.raises(ValueError) as single:
        encode_pair(pairs[4], byte_level, template)
    assert str(batched.value) == str(single.value)


def test_an_error_of_the_turns_names_the_conversation(tokenizer):
    good, bad = [("human", "a"), ("gpt", "b")], [("human", "a"), ("human", "b")]
    with pytest.raises(ValueError, match="^conversation 1: turn 2 is from 'human', expected 'gpt'"):
        encode_conversations([good, bad], tokenizer, conv_templates["v1"], has_image=False)


def test_a_byte_level_tokenizer_without_bos(byte_level):  # noqa: F811
    texts = ["a cat", "é on a mat", "x\n\n", " a", "on"]
    pairs = [PreferencePair(str(i), "a.jpg", json.dumps(text), text, "a") for i, text in enumerate(texts)]
    table = encode_answers(pairs, byte_level, conv_templates["chatml_direct"])
    for index, pair in enumerate(pairs):
        for row, one in zip(
            (table[2 * index], table[2 * index + 1]), encode_pair(pair, byte_level, conv_templates["chatml_direct"])
        ):
            assert_equal(row, one)
