"""Preference pairs with every check done: rows, texts and images, each file read once whatever runs on it.

What parsing and checking a large file gave is kept in the user's cache (dama/cache.py), under the digest of its bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from dama.cache import cache_name, code_digest, shared
from dama.console import atomic_file, digest_of, digest_of_file
from dama.image_table import ImageTable, table_of_images
from dama.images import ImageFolder
from dama.pairs import (
    PreferencePair,
    ReferenceLogps,
    SkippedPair,
    all_images,
    all_text_errors,
    check_pairs,
    fields_of,
    pairs_fingerprint,
    parse_pairs,
    validate_folders,
)

LARGE = 1 << 20  # bytes of a file from which on what it holds is kept
SOURCES = ("dama/checked_pairs.py", "dama/pairs.py", "dama/styles.py", "dama/texts.py")


class PairFile(NamedTuple):
    """A file of pairs. Errors are those of `parse_pairs`, and of texts and ids."""

    pairs: list[PreferencePair]
    row_errors: list[str]
    text_errors: list[str]
    fingerprint: str  # of all pairs


@dataclass(frozen=True)
class CheckedPairs:
    """Pairs that can be used, those that were left out, and the images of both.

    Attributes:
        whole: fingerprint of both together.
    """

    pairs: list[PreferencePair]
    skipped: list[SkippedPair]
    table: ImageTable
    whole: str

    @cached_property
    def fingerprint(self) -> dict[str, str]:
        """Digests of the pairs and of the bytes of their images."""
        pairs = pairs_fingerprint(self.pairs) if self.skipped else self.whole
        return {"pairs": pairs, "images": digest_of(self.table.digests_of(self.pairs))}


def read_pair_file(path: str | Path) -> PairFile:
    """Read and check the rows of a file, or what was kept of it. Raises PairsError where there are none."""
    if not Path(path).is_file() or Path(path).stat().st_size < LARGE:
        return _parsed(path)
    name = cache_name("pairs", digest_of_file(path), code_digest(*SOURCES))
    return shared(name, lambda: _parsed(path), _read_kept, _keep)


def _parsed(path: str | Path) -> PairFile:
    pairs, errors = parse_pairs(path)
    return PairFile(pairs, errors, all_text_errors(pairs), pairs_fingerprint(pairs))


def check_pair_file(
    file: PairFile,
    image_folder: ImageFolder,
    on_bad_image: str = "fail",
    *,
    subject: str = "pairs",
    workers: int = 4,
    progress: bool = False,
) -> CheckedPairs:
    """Check the images of a file's pairs, each opened at most once. Arguments and errors are those of `check_pairs`."""
    validate_folders(image_folder)
    table = table_of_images(all_images(file.pairs), image_folder, workers, progress)
    errors = [*file.row_errors, *file.text_errors]
    good, skipped = check_pairs(
        file.pairs, image_folder, on_bad_image, subject=subject, errors=errors, images=table.errors, texts=False
    )
    return CheckedPairs(good, skipped, table, file.fingerprint)


# ------------------------------------------------------------------------------------------------- the kept file


def _keep(file: PairFile, path: Path) -> None:
    """Write the pairs, a line each after the fingerprint; a file with errors is not kept."""
    if file.row_errors or file.text_errors:
        return
    with atomic_file(path, 0) as output:
        output.write(f"{json.dumps(file.fingerprint)}\n".encode())
        for pair in file.pairs:
            output.write(f"{json.dumps(fields_of(pair))}\n".encode())


def _read_kept(path: Path) -> PairFile | None:
    """The pairs of a kept file, None where it is absent or damaged."""
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            fingerprint = json.loads(file.readline())
            return PairFile([_pair(_line_value(line)) for line in file], [], [], str(fingerprint))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError, RecursionError):
        return None


DECODE = json.JSONDecoder().raw_decode


def _line_value(line: str) -> Any:
    """The value of a line of JSON, at a third of what json.loads costs. Raises ValueError."""
    value, end = DECODE(line)
    if line[end:] != "\n":
        raise ValueError(f"expected the end of the line, got {line[end:]!r}")
    return value


def _pair(fields: Sequence[Any]) -> PreferencePair:
    id_, image, question, chosen, rejected, kind, source, logps, scores = fields[:9]
    reference = None if logps is None else ReferenceLogps(*logps)
    clip_scores = None if scores is None else (tuple(scores[0]), tuple(scores[1]))
    second_image, second, context = (*fields[9:12], None, None, None)[:3]
    more, turns = fields[12:] or ((), ())
    return PreferencePair(
        id_, image, question, chosen, rejected, kind, source, reference, clip_scores, second_image, second, context,
        tuple(more), tuple((role, text) for role, text in turns),
    )  # fmt: skip
