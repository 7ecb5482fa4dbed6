"""Comparison of two inventories: every file and name of LLaVA as same, changed, left out or missing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from tools.upstream.inventory import Inventory, Item, Names, Parameter
from tools.upstream.reasons import CHANGED, LEFT_OUT

State = Literal["same", "changed (compatible)", "changed", "added", "left out", "missing"]
STATES: tuple[State, ...] = ("same", "changed (compatible)", "changed", "added", "left out", "missing")


@dataclass(frozen=True)
class Finding:
    """One file (`name` empty) or one name in it. `how`: what changed. `reason`: why, from the tables above."""

    file: str
    name: str
    state: State
    how: str = ""
    reason: str = ""


def compare(theirs: Inventory, ours: Inventory) -> list[Finding]:
    """Every file and name of `theirs`, and what `ours` adds to the files that both have.

    A name is there when it can be imported from the same module. Keyword-only parameters may be added.
    """
    findings = []
    for file in sorted({*theirs, *ours}):
        if file not in theirs:
            findings.append(Finding(file, "", "added"))
        elif file not in ours:
            findings.append(_absent(file, ""))
        else:
            findings += _compare_names(file, theirs[file], ours[file])
    return findings


def _compare_names(file: str, theirs: Names, ours: Names) -> list[Finding]:
    findings = []
    for name in (name for name, item in theirs.items() if _is_demanded(file, name, item)):
        if name in ours:
            findings.append(_compare_items(file, name, theirs[name], ours[name]))
        elif _owner(name) in ours or not _owner(name):  # a class that is absent is reported once
            findings.append(_absent(file, name))
    added = [name for name, item in ours.items() if name not in theirs and not item.imported]
    findings += [Finding(file, name, "added") for name in added if _owner(name) in theirs or not _owner(name)]
    states = {finding.state for finding in findings} - {"same", "added"}
    compatible: State = "changed (compatible)"
    whole: State = "same" if not states else compatible if states == {compatible} else "changed"
    return [Finding(file, "", whole), *findings]


def _is_demanded(file: str, name: str, item: Item) -> bool:
    """What a module merely imports is no part of its interface, except in a package's __init__."""
    trivial = name.endswith(".__init__") and len(item.parameters) == 1  # as good as inherited
    return not trivial and (not item.imported or file.endswith("__init__.py"))


def _owner(name: str) -> str:
    """The class of a member; empty for other names."""
    return name.partition(".")[0] if "." in name else ""


def _absent(file: str, name: str) -> Finding:
    reason = reason_for(LEFT_OUT, file, name)
    return Finding(file, name, "left out" if reason else "missing", reason=reason)


def reason_for(table: Mapping[str, str], file: str, name: str) -> str:
    """The reason of the first pattern that fits; empty when there is none."""
    subject = f"{file}:{name}" if name else file
    fits = (pattern for pattern in table if (":" in pattern) == bool(name) and fnmatchcase(subject, pattern))
    return next((table[pattern] for pattern in fits), "")


def _compare_items(file: str, name: str, theirs: Item, ours: Item) -> Finding:
    if "unknown" in (theirs.kind, ours.kind):  # it is there: imported from a library, or set by a method
        return Finding(file, name, "same")
    kinds = [item.kind.replace("property", "field") for item in (theirs, ours)]
    if kinds[0] != kinds[1]:
        changes, compatible = [f"{theirs.kind} -> {ours.kind}"], False
    else:
        changes, compatible = _signature_changes(theirs.parameters, ours.parameters)
        settings = _setting_changes(theirs, ours)
        changes, compatible = changes + settings, compatible and not settings
    if not changes:
        return Finding(file, name, "same")
    state: State = "changed (compatible)" if compatible else "changed"
    return Finding(file, name, state, "; ".join(changes), reason_for(CHANGED, file, name))


def _setting_changes(theirs: Item, ours: Item) -> list[str]:
    """Differences of a flag's or field's settings; values that one side does not record are not compared."""
    if theirs.kind == "flag":
        names = sorted({*theirs.settings, *ours.settings})
        before, after = ({n: i.settings.get(n, "not set") for n in names} for i in (theirs, ours))
    else:
        names = [name for name in theirs.settings if name in ours.settings]
        before, after = ({n: i.settings[n] for n in names} for i in (theirs, ours))
    if theirs.kind == "content":
        return ["the contents differ (not Python, not compared further)"] if before != after else []
    return [f"{name} {before[name]} -> {after[name]}" for name in names if before[name] != after[name]]


def _signature_changes(theirs: tuple[Parameter, ...], ours: tuple[Parameter, ...]) -> tuple[list[str], bool]:
    """(what differs, whether every call that LLaVA's signature allows still means the same)."""
    places = {parameter.name: (place, parameter) for place, parameter in enumerate(ours)}
    breaking: list[str] = []
    harmless: list[str] = []
    for place, parameter in enumerate(theirs):
        here, twin = places.get(parameter.name, (None, None))
        if parameter.kind in ("*", "**"):
            if not any(other.kind == parameter.kind for other in ours):
                breaking.append(f"no {parameter.kind}{parameter.name}")
        elif twin is None:
            breaking.append(f"no parameter {parameter.name}")
        elif (twin.kind, here) != (parameter.kind, place) and parameter.kind == "positional":
            where = f"in place {here}" if twin.kind == "positional" else "by keyword only"
            breaking.append(f"{parameter.name} {where}, was in place {place}")
        elif parameter.default != twin.default:
            known = harmless if parameter.default is None else breaking
            known.append(f"{parameter.name} = {parameter.default or 'required'} -> {twin.default or 'required'}")
    for parameter in ours:
        if parameter.name in {other.name for other in theirs} or parameter.kind in ("*", "**"):
            continue
        if parameter.default is None:
            breaking.append(f"needs {parameter.name}")
        elif parameter.kind == "positional":
            harmless.append(f"{parameter.name} = {parameter.default} is new")
    return breaking + harmless, not breaking
