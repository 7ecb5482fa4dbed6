"""What reaches the terminal: text of checkpoints, data files and servers cannot command it."""

import json
from fractions import Fraction

import pytest

from dama.chat import ChatClient, ChatError, ChatRequest, ChatSettings
from dama.console import log, printable, report_error
from dama.pairs import PairsError, check_pairs, read_pairs
from llava.serve import cli
from tests.openai_server import ScriptedServer, failure

pytestmark = pytest.mark.fast

ESCAPES = [
    ("\x1b[2J\x1b[H", r"\x1b[2J\x1b[H"),  # clears the screen
    ("\x1b]0;title\x07", r"\x1b]0;title\x07"),  # renames the window
    ("\x1b]52;c;cm0gLXJm\x07", r"\x1b]52;c;cm0gLXJm\x07"),  # writes the clipboard
    ("\x1b]8;;http://a.b\x1b\\x", r"\x1b]8;;http://a.b\x1b\x"),  # a link
    ("\x9b31m", r"\x9b31m"),  # CSI in one character
    ("\x90q\x9c", r"\x90q\x9c"),  # DCS
    ("ok\rno", r"ok\rno"),  # overwrites the line
    ("ok\b\bno", r"ok\x08\x08no"),
    ("a\x00b\x7f", r"a\x00b\x7f"),
    ("gpj\u202eexe", r"gpj\u202eexe"),  # shown from right to left
    ("\u2066a\u2069\u200f\u061c", r"\u2066a\u2069\u200f\u061c"),
    ("a\u2028b\x85c\x0b\x0c", r"a\u2028b\x85c\x0b\x0c"),  # other line ends
    ("\ud83d", r"\ud83d"),  # cannot be encoded
]


@pytest.mark.parametrize(("text", "shown"), ESCAPES)
def test_control_characters_are_shown_not_obeyed(text, shown, capsys):
    assert printable(text) == shown
    log(f"checkpoint {text}: loaded")
    assert capsys.readouterr().out == f"checkpoint {shown}: loaded\n"


@pytest.mark.parametrize("text", ["", "a\tb\nc", "naïve 猫 שלום مرحبا", "👩\u200d🚀 ❤\ufe0f", "e\u0301", r"C:\x1b"])
def test_other_text_stays(text):
    assert printable(text) == text


def raised(error):
    try:
        raise error
    except type(error) as caught:
        return caught


@pytest.mark.parametrize("error", [ValueError("row \x1b[31m7"), KeyError("\x1b[31m"), OSError(2, "no", "\x1b[31m\r")])
def test_errors(error, capsys):
    report_error(raised(error), "prog")
    said = capsys.readouterr()
    assert "prog: error: " in said.err and r"\x1b[31m" in said.err and not {"\x1b", "\r"} & set(said.err + said.out)


def test_a_traceback_too(capsys):
    """An error that a library raises is shown with its traceback, which repeats the message."""
    with pytest.raises(ValueError, match="31m") as caught:
        Fraction("\x1b[31m")
    report_error(caught.value, "prog")
    said = capsys.readouterr().err
    assert "Traceback" in said and said.count("x1b[31m") >= 2 and "\x1b" not in said


def test_a_server(capsys):
    """Its error message, and a model's name on the progress bar."""
    with ScriptedServer(lambda call: failure(404, "no \x1b]0;model\x07")) as url:
        client = ChatClient(ChatSettings(url, "m\x1b[31m", retries=0))
        with pytest.raises(ChatError) as caught:
            client.ask([ChatRequest("1", ({"role": "user", "content": "?"},))], desc="m\x1b[31m")
    report_error(caught.value, "prog")
    said = capsys.readouterr().err
    assert r"no \x1b]0;model\x07" in said and r"m\x1b[31m: " in said and not {"\x1b]", "\x07"} & set(said)
    assert "\x1b[31m" not in said


def test_rows_of_a_data_file(tmp_path, capsys):
    path = tmp_path / "pairs.jsonl"
    row = {"idx": "\x1b[31m7", "image": "\x1b]0;a.png\x07", "question": "", "chosen": "a", "rejected": "a\r"}
    path.write_text(json.dumps(row) + "\n")
    with pytest.raises(PairsError) as caught:
        check_pairs(read_pairs(path), tmp_path)
    report_error(caught.value, "prog")
    said = capsys.readouterr().err
    assert r"row \x1b[31m7 (image \x1b]0;a.png\x07)" in said and "\x1b" not in said and said.count("\n") > 3


def test_a_streamed_answer(capsys):
    """A sequence that comes in two pieces does not pass either; what is returned is the answer as it is."""
    assert cli.show(iter(["A \x1b", "A \x1b[31mcat\n"])) == "A \x1b[31mcat\n"
    assert capsys.readouterr().out == "A \\x1b[31mcat\n\n"
