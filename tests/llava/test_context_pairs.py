"""Pairs with a context: what the assistant has said before both answers is read and not trained on (SENTINEL)."""

import json
import math
from dataclasses import replace

import pytest
from PIL import Image

from dama.cli import main
from dama.pairs import PreferencePair, pair_from_row, pairs_fingerprint, read_pairs, text_errors
from dama.stage import read_stage
from dama.train.family import ImageRef, PreparedPair, group_lengths, join_answers
from dama.views import PAIR_VIEWS
from llava.conversation import get_template
from llava.tokenization import load_tokenizer
from llava.train.batch_encoding import encode_answers
from llava.train.dpo_data import PairCollator, encode_pair
from llava.train.preprocess import render_supervised
from tests.conftest import ROOT
from tests.llava.test_objectives import train
from tests.llava.test_reference import reference, world  # noqa: F401  (a fixture)

CONTEXT = "The image shows a red car. There is a dog next to it."
PAIR = PreferencePair("1", "a.png", "What is there?", "A cat sits on the car.", "A bird can be seen.", context=CONTEXT)


@pytest.fixture(scope="module", params=["tests/golden/llava-v1.5-tiny", "playground/tinycoco/weights/llava"])
def tokenizer(request):
    return load_tokenizer(str(ROOT / request.param))


def text_of(ids, tokenizer):
    return tokenizer.decode([token for token in ids if token >= 0])


@pytest.mark.parametrize("version", ["v1", "llava_llama_2", "mpt", "plain"])
def test_only_the_sentence_is_supervised(tokenizer, version):
    """No token of the context, and no end token: the text goes on behind this sentence."""
    chosen, rejected = encode_pair(PAIR, tokenizer, get_template(version))
    for row, answer in ((chosen, PAIR.chosen), (rejected, PAIR.rejected)):
        spoken = render_supervised(row.input_ids, row.labels, tokenizer)
        assert tokenizer.convert_tokens_to_string(spoken).strip() == answer
        before = text_of(row.input_ids[: row.unsupervised].tolist(), tokenizer)
        assert before.endswith(CONTEXT) and (version == "plain" or PAIR.question in before)
        assert row.labels[-1] == -100 or version == "plain"


def test_the_row_is_that_of_the_whole_answer(tokenizer):
    """The model reads what it would read of one answer; fewer of its tokens are supervised."""
    whole = replace(PAIR, chosen=f"{CONTEXT} {PAIR.chosen}", rejected=f"{CONTEXT} {PAIR.rejected}", context=None)
    template = get_template("v1")
    for part, row in zip(encode_pair(PAIR, tokenizer, template), encode_pair(whole, tokenizer, template)):
        assert part.input_ids.tolist() == row.input_ids.tolist()
        kept = part.labels != -100
        assert (part.labels[kept] == row.labels[kept]).all() and part.supervised < row.supervised


AWKWARD = [
    PAIR,
    replace(PAIR, id="2", context=None),
    replace(PAIR, id="3", context="It says </s> there.", chosen="A cat. \n", rejected="Dogs, 3.5 of them!"),
    replace(PAIR, id="4", context="- one\n- two", chosen="It's a cat", rejected="It\N{RIGHT SINGLE QUOTATION MARK}s"),
    replace(PAIR, id="5", context="A", chosen="A", rejected="B"),
]


def test_many_at_once_are_one_at_a_time(tokenizer):
    template = get_template("v1")
    table = encode_answers(AWKWARD, tokenizer, template)
    for i, pair in enumerate(AWKWARD):
        for k, row in enumerate(encode_pair(pair, tokenizer, template)):
            assert table[2 * i + k].input_ids.tolist() == row.input_ids.tolist()
            assert table[2 * i + k].labels.tolist() == row.labels.tolist()


def test_the_context_is_shared(tokenizer):
    """One prefix for both answers, the context in it."""
    rows = encode_pair(PAIR, tokenizer, get_template("v1"))
    joined, tails = join_answers(rows)
    prefix = joined.input_ids[: len(joined.input_ids) - sum(tails)]
    assert text_of(prefix.tolist(), tokenizer).rstrip(" A").endswith(CONTEXT)
    (group,) = group_lengths(rows, PAIR_VIEWS, lambda ids: ids)
    assert group.prefix == len(prefix) and (joined.labels[: group.prefix] == -100).all()
    plan = PairCollator(4, True)([PreparedPair(PAIR, rows, (ImageRef(("a.png",)),) * 2)])["plan"]
    assert plan.answers.tokens.tolist() == [row.supervised for row in rows]


def test_a_format_that_counts_turns_is_refused(tokenizer):
    with pytest.raises(ValueError, match="pair 1: context: expected a template that ends in the answer"):
        encode_pair(PAIR, tokenizer, get_template("v0"))
    with pytest.raises(ValueError, match="pair 1: context: expected a template"):
        encode_answers([PAIR], tokenizer, get_template("v0"))


# --- The field -------------------------------------------------------------------------------------------------------

ROW = {"image": "a.png", "question": "What?", "chosen": "A cat.", "rejected": "A dog."}


def test_the_field():
    pair = pair_from_row(ROW | {"context": "A car. \n"})
    assert pair.context == "A car." and pair.id != pair_from_row(ROW).id
    assert pair_from_row(ROW | {"context": " "}) == pair_from_row(ROW)
    with pytest.raises(ValueError, match="field context: expected text, got int"):
        pair_from_row(ROW | {"context": 3})
    (error,) = text_errors(replace(pair, context="an <image>"))
    assert "context: <image> inside the text" in error


def test_the_fingerprint_of_pairs_without_a_context_is_unchanged():
    """Recorded with the revision before the field."""
    assert pairs_fingerprint([replace(PAIR, context=None)]) == "9b19872b89f728da"
    assert pairs_fingerprint([PAIR]) != pairs_fingerprint([replace(PAIR, context="Other.")])


# --- From marked answers to a training -------------------------------------------------------------------------------

MARKED = {
    "question": "What is there?", "answer": "A red car. A dog near it. A bird.", "first_error": "A dog near it.",
    "correction": "A cat near it.",
}  # fmt: skip


def marked(folder, *changes):
    for n in range(max(1, len(changes))):
        Image.new("RGB", (8, 8), (9 * n, 8, 7)).save(folder / f"{n}.png")
    rows = [MARKED | {"image": f"{n}.png"} | change for n, change in enumerate(changes or [{}])]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(folder / "rows.jsonl"), "--out", str(folder / "made")]


def test_prepare_makes_them_from_marked_answers(tmp_path):
    """Sentences before the first wrong one are the context; the wrong one loses against its correction.

    A second marking of the same answer is another pair where its context is another.
    """
    first = {"first_error": "A red car.", "correction": "A blue car."}
    again = {"answer": "A blue car. A dog near it.", "image": "0.png"}
    assert main(["prepare", *marked(tmp_path, {}, first, again)]) == 0
    pairs = read_pairs(tmp_path / "made" / "pairs.jsonl")
    assert [(p.context, p.chosen, p.rejected) for p in pairs] == [
        ("A red car.", "A cat near it.", "A dog near it."),
        (None, "A blue car.", "A red car."),
        ("A blue car.", "A cat near it.", "A dog near it."),
    ]


@pytest.mark.parametrize(
    ("change", "detail"),
    [
        ({"first_error": "A fish."}, "field first_error: expected a sentence of answer, got 0 times"),
        ({"answer": "A dog near it. A dog near it."}, "expected a sentence of answer, got 2 times"),
        ({"first_error": " "}, "expected a sentence of answer, got an empty text"),
        ({"correction": None}, "no field correction"),
        ({"correction": "A dog near it."}, "chosen and rejected answer are equal"),
    ],
)
def test_marks_that_make_no_pair_are_listed(tmp_path, change, detail):
    assert main(["prepare", *marked(tmp_path, {}, change)]) == 0
    (row,) = map(json.loads, (tmp_path / "made" / "dropped.jsonl").read_text().splitlines())
    assert detail in row["detail"]


def test_prepare_reads_a_column_of_contexts(tmp_path):
    """A data set in which contexts and both sentences are columns already."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    row = {"question": "Q", "context": CONTEXT, "y_win": "A.", "y_lose": "B.", "image": "a.png"}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row))
    names = ["--column", "chosen=y_win", "--column", "rejected=y_lose"]
    assert main(["prepare", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "made"), *names]) == 0
    (pair,) = read_pairs(tmp_path / "made" / "pairs.jsonl")
    assert (pair.context, pair.chosen, pair.rejected) == (CONTEXT, "A.", "B.")


def test_they_train(world):  # noqa: F811
    """Reference log-probs of the sentences alone; the first loss is log 2, and it falls."""
    rows = json.loads((world / "pairs.json").read_text())
    contexts = [row["chosen"] for row in rows]
    rows = [row | {"context": context} for row, context in zip(rows, contexts[1:] + contexts[:1])]
    (world / "pairs.json").write_text(json.dumps(rows))
    assert reference(world, "--per_token") == 0
    _, records = read_stage(world / "reference", "reference")
    assert sum(r["chosen_tokens"] for r in records) == 108 - 8  # without the end token
    losses = [row["loss"] for row in train(world, "--num_train_epochs", "8", "--per_device_train_batch_size", "8")]
    assert losses[0] == pytest.approx(math.log(2), abs=1e-3) and losses[-1] < losses[0]
    assert train(world, "--token_weights", "segments:5", "--max_steps", "1", "--output_dir", str(world / "w"))
