"""Rows of the first sheet of an .xlsx workbook, as VLMEvalKit writes its predictions; needs no further package."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGEST_PART = 1 << 28  # bytes of one unpacked file of the workbook

_SHEET = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_RELATED = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"
_ESCAPED = re.compile(r"_x([0-9A-Fa-f]{4})_")  # how a workbook writes control characters


def read_xlsx(path: str | Path) -> list[dict[str, Any]]:
    """Read the first sheet: its first row has the columns' names, each other row becomes a dict without empty cells.

    Text stays text, whole numbers become int, other numbers float, truth values bool. Raises ValueError for a file that
    is no workbook, for columns of one name, and for cells beyond the named columns.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            shared = _shared_strings(archive)
            rows = [row for row in _rows(_part(archive, _first_sheet(archive)), shared) if row]
    except (zipfile.BadZipFile, KeyError, ET.ParseError, IndexError, OSError) as error:
        raise ValueError(f"{path}: expected an .xlsx workbook, got another file ({error})") from error
    if not rows:
        raise ValueError(f"{path}: expected rows, got an empty sheet")
    names = {column: str(value) for column, value in rows[0].items()}
    if len(set(names.values())) < len(names):
        raise ValueError(f"{path}: expected columns of different names, got {', '.join(names.values())}")
    unnamed = {column for row in rows[1:] for column in row if column not in names}
    if unnamed:
        raise ValueError(f"{path}: expected a name in the first row of each column, got none for {sorted(unnamed)}")
    return [{names[column]: value for column, value in row.items()} for row in rows[1:]]


def _part(archive: zipfile.ZipFile, name: str) -> ET.Element:
    """Parse a file of the workbook. Raises KeyError where it is missing, OSError where it is too large."""
    if archive.getinfo(name).file_size > LARGEST_PART:
        raise OSError(f"{name} has more than {LARGEST_PART} bytes")
    return ET.fromstring(archive.read(name))


def _first_sheet(archive: zipfile.ZipFile) -> str:
    """Return the path of the first sheet in the workbook."""
    sheet = next(_part(archive, "xl/workbook.xml").iter(f"{_SHEET}sheet"), None)
    if sheet is None:
        raise KeyError("it has no sheet")
    links = {link.get("Id"): link.get("Target", "") for link in _part(archive, "xl/_rels/workbook.xml.rels")}
    target = links[sheet.get(_RELATED)]
    return target.lstrip("/") if target.startswith("/") else f"xl/{target}"


def _shared_strings(archive: zipfile.ZipFile) -> list[str]:
    """Return the texts that cells refer to by number."""
    if "xl/sharedStrings.xml" not in archive.namelist():
        return []
    return [_text(entry) for entry in _part(archive, "xl/sharedStrings.xml").iter(f"{_SHEET}si")]


def _text(entry: ET.Element) -> str:
    """Join the runs of a text, without hints on its pronunciation."""
    runs = [entry, *entry.iter(f"{_SHEET}r")]
    texts = (run.find(f"{_SHEET}t") for run in runs)
    return _unescaped("".join(text.text or "" for text in texts if text is not None))


def _unescaped(text: str) -> str:
    return _ESCAPED.sub(lambda match: chr(int(match[1], 16)), text)


def _rows(sheet: ET.Element, shared: list[str]) -> Iterator[dict[str, Any]]:
    """Yield column, as in "B", -> value for each row; empty cells are left out."""
    for row in sheet.iter(f"{_SHEET}row"):
        cells = {re.sub(r"\d+", "", cell.get("r", "")): _value(cell, shared) for cell in row.iter(f"{_SHEET}c")}
        yield {column: value for column, value in cells.items() if value is not None}


def _value(cell: ET.Element, shared: list[str]) -> Any:
    kind, content = cell.get("t", "n"), cell.find(f"{_SHEET}v")
    if kind == "inlineStr":
        inline = cell.find(f"{_SHEET}is")
        return None if inline is None else _text(inline)
    if content is None or content.text is None:
        return None
    if kind == "s":
        return shared[int(content.text)]
    if kind == "b":
        return content.text == "1"
    if kind in ("str", "e", "d"):
        return _unescaped(content.text)
    number = float(content.text)
    return int(number) if number.is_integer() else number
