"""A command is a module and a row of the table in dama/cli.py: help, flags and errors follow."""

import sys
from types import ModuleType

import pytest

from dama import cli
from dama.console import USER_ERROR, log

pytestmark = pytest.mark.fast


@pytest.fixture
def greet(monkeypatch):
    """A command `greet NAME`, which refuses a name in lower case."""
    module = ModuleType("greet_command")
    module.DESCRIPTION = "Greets somebody."
    module.add_flags = lambda parser: parser.add_argument("--given_name", required=True, help="who is greeted")

    def run(args):
        if args.given_name.islower():
            raise ValueError(f"--given_name {args.given_name}: expected a capital letter")
        log(f"Hello {args.given_name}")

    module.run = run
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(cli.COMMANDS, "greet", cli.Command(module.__name__, "greet somebody"))


def test_it_runs_in_both_spellings_of_its_flag(greet, capsys):
    for flag in ("--given_name", "--given-name"):
        assert cli.main(["greet", flag, "Ann"]) == 0
        assert "Hello Ann" in capsys.readouterr().out


def test_it_is_listed_and_has_help_of_its_own(greet, capsys):
    for words, expected in (["--help"], "greet somebody"), (["greet", "--help"], "who is greeted"):
        with pytest.raises(SystemExit):
            cli.main(words)
        assert expected in capsys.readouterr().out


def test_its_errors_are_the_user_errors_of_all_commands(greet, capsys):
    assert cli.main(["greet", "--given_name", "ann"]) == USER_ERROR
    assert "dama greet: error: --given_name ann: expected a capital letter" in capsys.readouterr().err
