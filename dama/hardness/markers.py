"""List markers of any kind (A. B., i. ii., ①, 1: ...) replaced by the numbers that the splitting rules recognize.

A marker is only replaced as part of a sequence that starts at the first value and has a second one, so that an initial
("A. Smith") or a Roman "I" stays as it is. Each marker keeps its place: an answer gives the same statements whatever
its lists are marked with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

_LAST = 39  # of Roman numerals; letters end with their alphabet, numbers at 99


def _roman(number: int) -> str:
    tens, ones = divmod(number, 10)
    return "x" * tens + ("", "i", "ii", "iii", "iv", "v", "vi", "vii", "viii", "ix")[ones]


def _numbered(tokens: str) -> dict[str, int]:
    return {token: number for number, token in enumerate(tokens.split(), start=1)}


_ROMAN = _numbered(" ".join(map(_roman, range(1, _LAST + 1))))
_LETTERS = _numbered(" ".join("abcdefghijklmnopqrstuvwxyz"))
FAMILIES: tuple[Mapping[str, int], ...] = (
    {str(number): number for number in range(1, 100)},
    _LETTERS,
    {token.upper(): number for token, number in _LETTERS.items()},
    _ROMAN,
    {token.upper(): number for token, number in _ROMAN.items()},
    _numbered(" ".join("１２３４５６７８９")),
    _numbered("一 二 三 四 五 六 七 八 九 十"),
    _numbered(" ".join("абвгдежзик")),
    _numbered(" ".join("АБВГДЕЖЗИК")),
    _numbered(" ".join("αβγδεζηθ")),
    _numbered(" ".join("ⅰⅱⅲⅳⅴⅵⅶⅷⅸⅹ")),
    _numbered(" ".join("ⅠⅡⅢⅣⅤⅥⅦⅧⅨⅩ")),
    _numbered(" ".join("甲乙丙丁戊己庚辛壬癸")),
    _numbered(" ".join("アイウエオカキクケコ")),
    _numbered(" ".join("가나다라마바사아자차")),
)
"""Marker -> its number, of each way to number."""
SIGNS: tuple[Mapping[str, int], ...] = (
    {f"{digit}\ufe0f\u20e3": digit for digit in range(1, 10)},  # a keycap
    *(
        {chr(first + index): index + 1 for index in range(count)}
        for first, count in (
            (0x2460, 20),  # ①
            (0x2474, 20),  # ⑴
            (0x2488, 20),  # ⒈
            (0x249C, 26),  # ⒜
            (0x24B6, 26),  # Ⓐ
            (0x24D0, 26),  # ⓐ
            (0x2776, 10),  # ❶
            (0x2780, 10),  # ➀
            (0x278A, 10),  # ➊
        )
    ),
)
"""The same of signs that need no dot or bracket after them."""

_TOKEN = "|".join(sorted({re.escape(token) for family in FAMILIES for token in family}, key=len, reverse=True))
_SIGN = "|".join(re.escape(sign) for family in SIGNS for sign in family)
_BULLET = "[-*•‣–+·∙◦▪▫●○■□◆◇►▶➤→✓✔★☆⁃]"
# At the start of a line, perhaps behind a bullet or a heading's marks, and inside emphasis.
_AT_START = re.compile(
    rf"^(?P<before>[ \t]*(?:(?:{_BULLET}|\#{{1,6}})[ \t]+)?)(?P<emphasis>\*\*|__|[*_])?"
    r"(?:(?:(?:Item|Point|Number|No\.)[ \t]+)?(?P<open>(?P<hash>\#)|[(（\[【〔]?)"
    rf"(?P<token>{_TOKEN})(?P<inner>(?P=emphasis))?"
    r"(?P<close>\.\)|[.)）:：．、\]】〕/]|[ \t]+[-–—](?=[ \t])|(?(hash)(?=[ \t])|(?!)))"
    rf"|(?P<sign>{_SIGN}))"
    r"(?P<end>(?P=emphasis))?(?P<space>[ \t]*)(?=\S)"
)
_INSIDE = re.compile(
    rf"(?<=\S)(?P<before>[ \t]+)(?:(?P<open>\(?)(?P<token>{_TOKEN})(?P<close>[.)])|(?P<sign>{_SIGN}))"
    r"(?P<space>[ \t]+)(?=\S)"
)
# What the rules do not take for a bullet; some are written without a space.
_OTHER_BULLET = re.compile(r"^([ \t]*)(?:[+·◦▫□◇→✓✔☆⁃][ \t]+|[•‣∙▪●○■◆►▶➤★][ \t]*)(?=\S)", re.MULTILINE)
_WORD = re.compile(r"[^\W\d_]{2}|[\u3040-\u30ff\u3400-\u9fff]")
_AND = re.compile(r"[,;]?\s+and\s*$")
_RUNNING_ON = re.compile(r"(?:,|\b(?:and|or))\Z")
_ENDS = ":;.!?"  # after one of these the rules split before a number


class _Marker(NamedTuple):
    line: int
    match: re.Match[str]
    first: bool  # at the start of its line
    punctuated: bool  # there, or after a mark
    kind: tuple[int, str, str]  # family, and the brackets or the dot around the token
    number: int


def numbered_markers(answer: str) -> str:
    """The answer with its lists marked by numbers, as the splitting rules know them; every other answer as it is."""
    text = _OTHER_BULLET.sub(r"\1- ", answer)
    lines = text.replace("\r\n", "\n").split("\n")
    by_line = [list(_markers(number, line)) for number, line in enumerate(lines)]
    found = _longest(_runs([marker for markers in by_line for marker in markers if marker.first]))
    listed = {(marker.line, marker.kind) for run in found for marker in run}
    inside = []
    for number, markers in enumerate(by_line):
        if any(not marker.first for marker in markers):
            runs = _runs([marker for marker in markers if (number, marker.kind) not in listed])
            inside += [run for run in runs if _is_inline_list(run, lines[number])]
    edits = [_renumbered(marker) for run in found for marker in run]
    edits += [edit for run in _longest(inside) for edit in _renumbered_inside(run)]
    edits = [edit for edit in edits if edit.text != lines[edit.line][edit.start : edit.end]]
    for edit in sorted(edits, reverse=True):
        lines[edit.line] = _edited(lines[edit.line], edit)
    return "\n".join(lines) if edits else text


def _markers(number: int, line: str) -> Iterator[_Marker]:
    """Everything in a line that can be a marker, once for each way to number that has it."""
    start = _AT_START.match(line)
    if start is not None and _may_be_followed(start):
        yield from _readings(number, start, True, True)
    for match in _INSIDE.finditer(line):
        yield from _readings(number, match, False, line[match.start() - 1] in _ENDS)


def _may_be_followed(match: re.Match[str]) -> bool:
    """Without a space after it, "1." begins "1.5" and "A." an abbreviation."""
    following = match.string[match.end()]
    if match["space"] or match["end"] or match["sign"] or match["close"] in ("）", "：", "．", "、", "】", "〕"):
        return True
    return match["token"].isdecimal() and following.isalpha()


def _readings(line: int, match: re.Match[str], first: bool, punctuated: bool) -> Iterator[_Marker]:
    families = SIGNS if match["sign"] else FAMILIES
    token = match["sign"] or match["token"]
    for index, family in enumerate(families):
        if token in family:
            kind = (index + len(FAMILIES) * bool(match["sign"]), match["open"] or "", match["close"] or "")
            yield _Marker(line, match, first, punctuated, kind, family[token])


def _runs(markers: list[_Marker]) -> list[list[_Marker]]:
    """Markers of one kind that count 1, 2, ... in their order, two at least."""
    open_runs: dict[tuple[int, str, str], list[_Marker]] = {}
    runs = []
    for marker in markers:
        run = open_runs.get(marker.kind)
        if run is not None and marker.number == len(run) + 1:
            run.append(marker)
        elif marker.number == 1:
            open_runs[marker.kind] = [marker]
            runs.append(open_runs[marker.kind])
    return [run for run in runs if len(run) > 1]


def _longest(runs: list[list[_Marker]]) -> list[list[_Marker]]:
    """Of runs that share a marker, as letters and Roman numerals may, the longest."""
    taken: set[tuple[int, int]] = set()
    kept = []
    for run in sorted(runs, key=len, reverse=True):
        places = {(marker.line, marker.match.start()) for marker in run}
        if not places & taken:
            taken |= places
            kept.append(run)
    return kept


def _is_inline_list(run: list[_Marker], line: str) -> bool:
    """Begin a line or follows a colon (a mark, where marks end all items), with a word in every item.

    "Panels (a) and (b)" or "(a) a cup, (b) a dog" run on as one sentence.
    """
    before = line[: run[0].match.start()]
    plain = all(marker.punctuated for marker in run)
    if not (run[0].first or before.endswith(":") or (plain and run[0].punctuated)):
        return False
    in_brackets = [marker.match.start() for marker in run[1:] if marker.kind[1]]
    if not plain and any(_RUNNING_ON.search(line[max(0, start - 4) : start]) for start in in_brackets):
        return False
    ends = [marker.match.start() for marker in run[1:]] + [len(line)]
    return all(_WORD.search(line[marker.match.end() : end]) for marker, end in zip(run, ends))


class _Edit(NamedTuple):
    line: int
    start: int
    end: int
    text: str


def _renumbered(marker: _Marker, known: str = r"[0-9]{1,2}|[a-z]") -> _Edit:
    """A marker at the start of a line; one whose token the rules know stays."""
    match, emphasis = marker.match, marker.match["emphasis"] or ""
    plain = not match["before"].strip() and not emphasis  # no bullet or heading before it
    if plain and _is_known(match, known):
        return _Edit(marker.line, match.start(), match.end(), match[0])
    indent = match["before"][: len(match["before"]) - len(match["before"].lstrip())]
    open_again = "" if match["end"] or match["inner"] else emphasis
    return _Edit(marker.line, match.start(), match.end(), f"{indent}{marker.number}. {open_again}")


def _is_known(match: re.Match[str], tokens: str) -> bool:
    known = re.fullmatch(tokens, match["token"] or "") is not None
    return known and match["open"] in ("", "(") and match["close"] in (".", ")") and bool(match["space"])


def _renumbered_inside(run: list[_Marker]) -> Iterator[_Edit]:
    """Numbers in place where marks end the items, which the rules split; else each item on a line of its own."""
    in_place = all(marker.punctuated for marker in run)
    for marker in run:
        match = marker.match
        if marker.first:
            yield _renumbered(marker, r"[0-9]{1,2}")
        elif in_place:
            number = f"{marker.number}." if match["sign"] else f"{match['open']}{marker.number}{match['close']}"
            yield _Edit(marker.line, match.start(), match.end(), f"{match['before']}{number}{match['space']}")
        else:
            yield _Edit(marker.line, match.start(), match.end(), f"\n{marker.number}. ")


def _edited(line: str, edit: _Edit) -> str:
    before = line[: edit.start]
    if edit.text.startswith("\n"):
        before = _AND.sub("", before)
    return before + edit.text + line[edit.end :]
