"""The step `context`: first errors on paper, marks that make no pair, a server that marks, killed and resumed."""

import pytest

from dama.chat import ChatSettings
from dama.console import USER_ERROR
from dama.hardness.split import sentence_spans
from dama.pairs import check_pairs, read_pairs
from dama.synth import command
from dama.synth.context import CONTEXT_PAIRS, NO_CORRECTION, NO_MARK, RIGHT, JudgeMarker, Mark, read_mark, run_context
from dama.synth.images import run_images
from dama.synth.prompts import SynthError, read_step
from dama.synth.rank import run_rank_images
from dama.synth.respond import Sampling, run_respond
from tests.dama.test_synth import PROMPTS, Artist, Reward, parse, path_length, responder
from tests.openai_server import ScriptedServer

ANSWER = "There is a red car.\n- A dog sits next to it, e.g. a small one. A bird flies."


def sentences(text):
    return [text[start:end] for start, end in sentence_spans(text)]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (ANSWER, ["There is a red car.", "- A dog sits next to it, e.g. a small one.", "A bird flies."]),
        ("A cat. A cat. A cat!", ["A cat.", "A cat.", "A cat!"]),
        ("No end", ["No end"]),
        (" ... \n", []),
    ],
)
def test_sentences_stand_in_the_text(text, found):
    assert sentences(text) == found
    spans = sentence_spans(text)
    assert all(end <= start for (_, end), (start, _) in zip(spans, spans[1:]))


class Marker:
    """Marks by a function of an answer; `stop_after` calls it breaks down, as a killed process."""

    name = "marker"

    def __init__(self, mark, stop_after=None):
        self.of, self.stop_after, self.calls = mark, stop_after, 0

    def identity(self):
        return {"kind": "scripted"}

    def mark(self, items):
        self.calls += 1
        if self.calls == self.stop_after:
            raise KeyboardInterrupt
        return [self.of(item) for item in items]


def answered(out, texts=(ANSWER, "A cat."), prompts=PROMPTS[:3]):
    """The steps before, with these answers to every question."""
    run_images(Artist(), prompts, out, batch_size=3, suffix="png")
    run_rank_images([Reward(path_length)], out)
    run_respond([responder(list(texts))], out, Sampling(len(texts)))
    return out


def second_is_wrong(item):
    return Mark(1, f"A cat sits near {item.id}.") if len(item.sentences) > 1 else Mark()


def test_the_first_error_against_its_correction(tmp_path):
    summary = run_context(Marker(second_is_wrong), answered(tmp_path))
    assert summary == {
        "answers": 6, "pairs": 3, "with_context": 3, "left_out": {RIGHT: 3}, "without_answer": 0,
        "image_folder": str(tmp_path),
    }  # fmt: skip
    pairs = read_pairs(tmp_path / CONTEXT_PAIRS)
    assert check_pairs(pairs, tmp_path) == (pairs, [])
    assert pairs[0].id == "art-1-driver-0" and pairs[0].question == "what is 1?" and pairs[0].kind == "context"
    assert pairs[0].context == "There is a red car." and pairs[0].rejected == sentences(ANSWER)[1]
    assert pairs[0].chosen == "A cat sits near art-1-driver-0."


def test_an_error_at_the_beginning_has_no_context(tmp_path):
    """An ordinary pair of first sentences; equal ones are there once."""
    run_context(Marker(lambda item: Mark(0, "A bus.")), answered(tmp_path, ["A car. It is red.", "A car. It is blue."]))
    pairs = read_pairs(tmp_path / CONTEXT_PAIRS)
    assert [(pair.context, pair.chosen, pair.rejected) for pair in pairs] == [(None, "A bus.", "A car.")] * 3


@pytest.mark.parametrize(
    ("mark", "reason"),
    [(None, NO_MARK), (Mark(), RIGHT), (Mark(0, ""), NO_CORRECTION), (Mark(0, " A cat. "), NO_CORRECTION),
     (Mark(0, "an <image>"), NO_CORRECTION)],
)  # fmt: skip
def test_marks_that_make_no_pair_are_counted(tmp_path, mark, reason):
    answered(tmp_path)
    run_context(Marker(lambda item: second_is_wrong(item) if len(item.sentences) > 1 else mark), tmp_path)
    assert read_step(tmp_path, "context")[0]["summary"]["left_out"] == {reason: 3}
    with pytest.raises(SynthError, match="no context pair in 6 answers"):
        run_context(Marker(lambda _: None), tmp_path, overwrite=True)


def test_killed_and_resumed_is_undisturbed(tmp_path, monkeypatch):
    monkeypatch.setattr("dama.synth.context.ANSWERS_PER_CHUNK", 2)
    for name in ("calm", "killed"):
        answered(tmp_path / name)
    run_context(Marker(second_is_wrong), tmp_path / "calm")
    for stop_after in (2, 2):
        with pytest.raises(KeyboardInterrupt):
            run_context(Marker(second_is_wrong, stop_after), tmp_path / "killed")
    run_context(Marker(second_is_wrong), tmp_path / "killed")
    for name in (CONTEXT_PAIRS, "stages/context/context.jsonl"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "calm" / name).read_bytes()


# ------------------------------------------------------------------------------------------------------------- judge


@pytest.mark.parametrize(
    ("text", "mark"),
    [
        ('{"first_error": 2, "correction": "A cat. "}', Mark(1, "A cat.")),
        ('```json\n{"first_error": 0, "correction": ""}\n```', Mark(-1, "")),
        ('<think>{"first_error": 1}</think>{"first_error": 3, "correction": "x"}', Mark(2, "x")),
        ('{"first_error": 0, "correction": null}', Mark(-1, "")),
        ('{"first_error": 4, "correction": "x"}', None),
        ('{"first_error": true, "correction": "x"}', None),
        ('{"first_error": 1, "correction": 2}', None),
        ("The second sentence is wrong.", None),
        ("[1]", None),
        ('{"first_error": 1', None),
    ],
)
def test_replies(text, mark):
    assert read_mark(text, 3) == mark


def test_a_server_marks(tmp_path):
    """It is shown the image and the numbered sentences; an unreadable reply is asked for again, then counted."""

    def handler(call):
        if "1. A cat." in call.text:
            return "unreadable"
        assert (
            "2. - A dog sits next to it" in call.text and call.body["messages"][-1]["content"][0]["type"] == "image_url"
        )
        return '{"first_error": 3, "correction": "A plane flies."}'

    answered(tmp_path)
    with ScriptedServer(handler) as base_url:
        marker = JudgeMarker(ChatSettings(base_url, "judge"), tmp_path / "replies.jsonl")
        summary = run_context(marker, tmp_path)
    assert summary["left_out"] == {NO_MARK: 3} and summary["pairs"] == 3
    (pair, *_) = read_pairs(tmp_path / CONTEXT_PAIRS)
    assert pair.context == ANSWER.removesuffix(" A bird flies.") and pair.chosen == "A plane flies."


# ----------------------------------------------------------------------------------------------------------- command


def test_the_command(tmp_path, capsys):
    answered(tmp_path)
    with ScriptedServer(lambda call: '{"first_error": 1, "correction": "A bus."}') as base_url:
        command.run(parse("context", "--out", str(tmp_path), "--marker", "judge:m", "--base_url", base_url))
    said = capsys.readouterr().out
    assert "context: 6 answers, 6 pairs" in said and "0 pairs have a context" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--marker : expected KIND:WHAT with KIND one of judge"),
        (["--marker", "clip:x"], "--marker clip:x: expected KIND:WHAT with KIND one of judge"),
        (["--marker", "judge:m"], "--marker judge:m: expected the server's URL as --base_url"),
    ],
)
def test_flags_that_are_refused(tmp_path, capsys, words, message):
    from dama.cli import main

    assert main(["synth", "context", "--out", str(tmp_path), *words]) == USER_ERROR
    assert message in capsys.readouterr().err


def test_a_step_that_is_missing_is_named(tmp_path):
    with pytest.raises(ValueError, match="respond"):
        run_context(Marker(second_is_wrong), tmp_path)
