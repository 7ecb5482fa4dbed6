"""The examples of docs/howto: blocks of Python that name their file, and the commands that run them.

The first line of a block is a comment: the path of a new file, or a path with the line that the code goes above, below
or in place of.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.conftest import ROOT

PAGES = sorted((ROOT / "docs/howto").glob("add_*.md"))
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HEADER = re.compile(r"# (?P<file>[\w/]+\.py)(?:, (?P<side>above|below|in place of) the line (?P<line>.+))?")


@dataclass(frozen=True)
class Example:
    """One block: a new file, or code at a line of a file.

    Attributes:
        side: "above", "below" or "in place of"; empty for a new file. line: how the line begins.
    """

    file: str
    side: str
    line: str
    code: str

    def apply(self, root: Path) -> None:
        """Write the file, or insert the code into it.

        Raises:
            ValueError: the file does not have exactly one such line.
        """
        path = root / self.file
        if not self.side:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.code)
            return
        lines = path.read_text().splitlines(keepends=True)
        found = [number for number, line in enumerate(lines) if line.startswith(self.line)]
        if len(found) != 1:
            raise ValueError(f"{self.file}: expected one line that begins with {self.line!r}, got {len(found)}")
        code = self.code + "\n\n" * (self.side == "above")
        before = found[0] + (self.side == "below")
        after = before + (self.side == "in place of")
        path.write_text("".join([*lines[:before], code, *lines[after:]]))


def blocks(page: Path, language: str) -> list[str]:
    """The contents of a page's fenced blocks in a language."""
    return [content for name, content in BLOCK.findall(page.read_text()) if name == language]


def examples(page: Path) -> list[Example]:
    """The blocks of Python of a page. Raises ValueError for one that does not name its file."""
    found = []
    for block in blocks(page, "python"):
        header, _, code = block.partition("\n")
        named = HEADER.fullmatch(header)
        if named is None:
            raise ValueError(f"{page.name}: expected a comment that names a file, got {header!r}")
        found.append(Example(named["file"], named["side"] or "", named["line"] or "", code))
    return found


def code_of(page: str, file: str, side: str = "") -> str:
    """The code that a page, by its name, puts into a file on that side of a line."""
    (code,) = (e.code for e in examples(ROOT / "docs/howto" / page) if (e.file, e.side) == (file, side))
    return code
