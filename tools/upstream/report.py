"""The comparison as text and as a page, and docs/left_out.md."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from dama.console import write_atomic
from dama.pages import render_page
from tools.upstream.comparison import STATES, Finding
from tools.upstream.reasons import CHANGED, LEFT_OUT


def report_lines(findings: list[Finding], everything: bool = False) -> list[str]:
    """The comparison as text: a line for each file, one below it for each name that is not the same."""
    lines = []
    for finding in findings:
        if not finding.name:
            lines.append(f"{finding.file:<50} {finding.state}" + (f"  {finding.reason}" if finding.reason else ""))
        elif everything or finding.state not in ("same", "added"):
            why = " - ".join(text for text in (finding.how, finding.reason) if text)
            lines.append(f"    {finding.state:<21} {finding.name}" + (f": {why}" if why else ""))
    return [*lines, "", *summary(findings)]


def summary(findings: list[Finding]) -> list[str]:
    """Files and names by state."""
    lines = []
    for title, group in (("files", [f for f in findings if not f.name]), ("names", [f for f in findings if f.name])):
        counts = Counter(finding.state for finding in group)
        lines.append(f"{title}: " + ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state]))
    return lines


def write_page(findings: list[Finding], path: str | Path, subject: str) -> None:
    """The comparison as one self-contained HTML page."""
    files = [finding for finding in findings if not finding.name]
    names = {file.file: [f for f in findings if f.name and f.file == file.file] for file in files}
    page = render_page(
        "page.html.jinja", Path(__file__).parent, subject=subject, files=files, names=names, totals=summary(findings)
    )
    write_atomic(path, page)


def left_out_page() -> str:
    """docs/left_out.md: the tables above, patterns of one reason together."""
    lines = [
        "# What differs from LLaVA, and why",
        "",
        "Written by `python -m tools.upstream --left-out > docs/left_out.md` from the tables in "
        "`tools/upstream/reasons.py`.",
        "`python -m tools.upstream PATH_TO_A_LLAVA_CHECKOUT` compares a checkout with this repository, name by name.",
        "A star stands for any characters; `FILE:NAME` is a name, `Class.member` or `--flag` in a file.",
    ]
    for title, table in (("Left out", LEFT_OUT), ("Changed", CHANGED)):
        lines += ["", f"## {title}"]
        for reason in dict.fromkeys(table.values()):
            lines += ["", reason, ""]
            lines += [f"- `{pattern}`" for pattern in table if table[pattern] == reason]
    return "\n".join(lines) + "\n"
