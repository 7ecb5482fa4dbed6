"""Rows are tokenized once, mapped by whoever needs them next, and tokenized anew where anything differs."""

import dataclasses

import numpy as np
import pytest
import torch

from dama.pairs import PreferencePair
from llava.conversation import get_template
from llava.tokenization import load_tokenizer
from llava.train import batch_encoding, kept_rows
from llava.train.batch_encoding import encode_answers
from tests.conftest import GOLDEN
from tests.llava.test_preprocess import byte_level  # noqa: F401  (a fixture)

PAIRS = [PreferencePair(str(i), "a.jpg", f"What {i}?", f"été 猫 {i}.", f" Near  the\nbus {i}") for i in range(9)]


@pytest.fixture()
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DAMA_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_rows, "MANY", len(PAIRS))
    return tmp_path / "cache"


@pytest.fixture()
def tokenizer():
    return load_tokenizer(GOLDEN / "llava-v1.5-tiny")


@pytest.fixture()
def encoded(monkeypatch):
    """How many rows each call of the encoder was given."""
    counts, encode = [], batch_encoding.encode_conversations

    def counted(conversations, *args, **kwargs):
        table = encode(conversations, *args, **kwargs)
        counts.append(len(table))
        return table

    monkeypatch.setattr(batch_encoding, "encode_conversations", counted)
    return counts


def assert_same(one, other):
    for index in range(len(one)):
        assert torch.equal(one[index].input_ids, other[index].input_ids)
        assert torch.equal(one[index].labels, other[index].labels)
    assert len(one) == len(other)


def test_the_second_call_maps_the_rows_of_the_first(cache, tokenizer, encoded):
    first, again = (encode_answers(PAIRS, tokenizer, get_template("v1")) for _ in range(2))
    assert_same(first, again)
    assert encoded == [2 * len(PAIRS)] and isinstance(again.ids.base, np.memmap)
    assert [array.dtype for array in (again.ids, again.supervised, again.offsets)] == [np.int32, np.bool_, np.int64]


def test_few_pairs_are_not_kept(cache, tokenizer, encoded):
    for _ in range(2):
        encode_answers(PAIRS[:-1], tokenizer, get_template("v1"))
    assert len(encoded) == 2 and not cache.exists()


@pytest.mark.parametrize("change", ["answer", "order", "template", "tokenizer", "brackets", "answers"])
def test_whatever_rows_depend_on_makes_others(change, cache, tokenizer, encoded):
    settings = {"pairs": PAIRS, "template": get_template("v1"), "marks": False, "answers": ("chosen", "rejected")}
    encode_answers(PAIRS, tokenizer, settings["template"])
    if change == "answer":
        settings["pairs"] = [*PAIRS[:-1], dataclasses.replace(PAIRS[-1], rejected="A dog.")]
    elif change == "order":
        settings["pairs"] = PAIRS[::-1]
    elif change == "template":
        settings["template"] = get_template("llava_llama_2")
    elif change == "tokenizer":
        tokenizer.add_tokens(["cat"], special_tokens=True)
    elif change == "brackets":
        tokenizer.add_tokens(["<im_start>", "<im_end>"], special_tokens=True)
        settings["marks"] = True
    elif change == "answers":
        settings["answers"] = ("chosen",)
    pairs, template, marks, answers = settings.values()
    table = encode_answers(pairs, tokenizer, template, marks, answers)
    assert encoded == [2 * len(PAIRS), len(table)]


@pytest.mark.parametrize("damage", ["absent", "torn", "other type", "other length", "pickle"])
def test_damaged_rows_are_made_anew(damage, cache, tokenizer, encoded):
    first = encode_answers(PAIRS, tokenizer, get_template("v1"))
    (folder,) = cache.glob("rows-*")
    ids = np.load(folder / "ids.npy")
    if damage == "absent":
        (folder / "offsets.npy").unlink()
    elif damage == "torn":
        (folder / "ids.npy").write_bytes((folder / "ids.npy").read_bytes()[:-7])
    elif damage == "other type":
        np.save(folder / "ids.npy", ids.astype(np.int64))
    elif damage == "other length":
        np.save(folder / "ids.npy", ids[:-1])
    else:
        np.save(folder / "ids.npy", np.array([{}], dtype=object), allow_pickle=True)
    assert_same(encode_answers(PAIRS, tokenizer, get_template("v1")), first)
    assert_same(encode_answers(PAIRS, tokenizer, get_template("v1")), first)
    assert len(encoded) == 2


def test_errors_name_the_pair(cache, byte_level):  # noqa: F811
    pairs = [*PAIRS, PreferencePair("bad", "a.jpg", "x", "\na cat", "a mat")]
    for _ in range(2):
        with pytest.raises(ValueError, match="^pair bad: an answer must begin and end between tokens"):
            encode_answers(pairs, byte_level, get_template("chatml_direct"))
    assert not list(cache.glob("rows-*"))
