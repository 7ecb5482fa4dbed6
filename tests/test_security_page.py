"""docs/security.md: every threat names tests, and each of them is there."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

ROOT = Path(__file__).resolve().parents[1]
LINES = (ROOT / "docs/security.md").read_text(encoding="utf-8").splitlines()
THREATS = [line.strip("| ").split(" | ") for line in LINES if re.match(r"\| \d+ \|", line)]


def test_all_threats_are_listed():
    assert [int(row[0]) for row in THREATS] == list(range(1, 16)) and all(len(row) == 4 for row in THREATS)


@pytest.mark.parametrize("row", THREATS, ids=lambda row: row[0])
def test_its_tests_are_there(row):
    """A name is `FILE::FUNCTION`, or `::FUNCTION` in the file before it; a file alone stands for all its tests."""
    file = None
    names = re.findall(r"`([^`]+)`", row[3])
    assert names
    for name in names:
        path, _, function = name.partition("::")
        file = path or file
        tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
        functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
        assert not function or function in functions, name
