"""Flags of commands whose imports take seconds, kept in a JSON file: `--help` and errors of flags come at once.

scripts/flag_tables.py writes the files. An entry counts only while the sources that define the flags are those that it
was made from; otherwise the command's own parser answers, after its imports.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import Any

from dama.console import digest_of_file

Entry = dict[str, Any]
TYPES: Mapping[str, Callable[[str], Any]] = MappingProxyType({"int": int, "float": float})
FORMATTERS = MappingProxyType(
    {cls.__name__: cls for cls in (argparse.HelpFormatter, argparse.RawDescriptionHelpFormatter)}
)
ACTIONS = ("store", "store_true", "store_false", "append", "extend")


def find_entry(table: Path, name: str) -> Entry | None:
    """A command's entry in a table; None where there is none, or one made from other sources.

    Args:
        table: a file in a package's folder; the sources' paths begin in the folder that the package is in.
    """
    try:
        entry = json.loads(table.read_bytes())[name]
        current = {path: digest_of_file(table.parent.parent / path) for path in entry["sources"]}
        versions = {package: version(package) for package in entry["versions"]}
    except (OSError, ValueError, KeyError, PackageNotFoundError):
        return None
    return entry if (current, versions) == (entry["sources"], entry["versions"]) else None


def make_entry(root: Path, sources: list[str], packages: list[str], **content: Any) -> Entry:
    """An entry that counts while these sources, relative to `root`, and the packages' versions stay the same."""
    digests = {path: digest_of_file(root / path) for path in sources}
    return {"sources": digests, "versions": {package: version(package) for package in packages}} | content


def check_module_flags(table: Path) -> None:
    """Read the flags of a `python -m MODULE` while its package is imported, for help and errors of the flags.

    The module's own parser reads the flags again, and checks the choices too, which may come from other files.
    """
    words = sys.orig_argv
    if sys.argv[:1] != ["-m"] or "-m" not in words[:-1]:
        return
    entry = find_entry(table, words[words.index("-m") + 1])
    if entry is not None:
        rebuild(entry["parser"], check_choices=False).parse_args(sys.argv[1:])


# ------------------------------------------------------------------------------------------------- parsers as JSON


def describe(parser: argparse.ArgumentParser) -> dict[str, Any]:
    """A parser as JSON values. Its types but int and float, and its own kinds of actions, become plain text."""
    groups = [
        {
            "title": group.title,
            "description": group.description,
            "flags": [_flag(action) for action in group._group_actions if not isinstance(action, argparse._HelpAction)],
        }
        for group in parser._action_groups
    ]
    return {
        "prog": parser.prog,
        "description": parser.description,
        "epilog": parser.epilog,
        "usage": parser.usage,
        "formatter": getattr(parser.formatter_class, "__name__", "HelpFormatter"),
        "allow_abbrev": parser.allow_abbrev,
        "groups": groups,
    }


def _flag(action: argparse.Action) -> dict[str, Any]:
    names = {name: getattr(argparse, f"_{''.join(map(str.capitalize, name.split('_')))}Action") for name in ACTIONS}
    kind = next((name for name, cls in names.items() if type(action) is cls), "store")
    flag: dict[str, Any] = {"names": action.option_strings or [action.dest], "action": kind, "help": action.help}
    flag["default"] = action.default if isinstance(action.default, str | int | float | None) else str(action.default)
    if action.option_strings:
        flag |= {"dest": action.dest, "required": action.required}
    if not kind.startswith("store_"):
        typed = next((name for name, cls in TYPES.items() if action.type is cls), None)
        choices = None if action.choices is None else [str(choice) for choice in action.choices]
        metavar = list(action.metavar) if isinstance(action.metavar, tuple) else action.metavar
        flag |= {"nargs": action.nargs, "const": action.const, "type": typed, "choices": choices, "metavar": metavar}
    return flag


class _AnyChoice(list[Any]):
    """Choices that the help lists, and others, all of which are accepted."""

    def __contains__(self, value: object) -> bool:
        return True


def rebuild(
    spec: dict[str, Any],
    kind: type[argparse.ArgumentParser] = argparse.ArgumentParser,
    *,
    check_choices: bool = True,
) -> argparse.ArgumentParser:
    """The parser that `describe` described: the same help, and the errors of its names, types and choices."""
    parser = kind(
        prog=spec["prog"],
        description=spec["description"],
        epilog=spec["epilog"],
        usage=spec["usage"],
        formatter_class=FORMATTERS[spec["formatter"]],
        allow_abbrev=spec["allow_abbrev"],
    )
    known = {group.title: group for group in parser._action_groups}
    for group in spec["groups"]:
        target = known.get(group["title"]) or parser.add_argument_group(group["title"], group["description"])
        for flag in group["flags"]:
            _add(target, dict(flag), list if check_choices else _AnyChoice)
    return parser


def _add(target: Any, flag: dict[str, Any], choices: type[list[Any]]) -> None:
    names, values = flag.pop("names"), {name: value for name, value in flag.items() if value is not None}
    if "type" in values:
        values["type"] = TYPES[values["type"]]
    if "choices" in values:
        values["choices"] = choices(map(values.get("type", str), values["choices"]))
    if isinstance(values.get("metavar"), list):
        values["metavar"] = tuple(values["metavar"])
    target.add_argument(*names, **values)
