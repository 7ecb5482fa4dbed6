"""pytest -p tests.cuda.everything, in a child: every test runs with all its numbers computed."""

from collections.abc import Iterator

import pytest

from llava.rehearsal.mode import NullMode


@pytest.fixture(autouse=True)
def null_mode() -> Iterator[NullMode]:
    with NullMode(everything=True) as mode:
        yield mode
