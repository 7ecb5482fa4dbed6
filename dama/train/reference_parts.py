"""A finished reference folder, view by view: the stage itself, and in its folder `added` the views added to it later.

Each part is a complete stage of its own, made from the same inputs, so that what is finished is never written again and
an interrupted addition continues like any stage. Log-probs of single tokens are in a flat float32 file beside a part's
records: the tokens of its views, one view after the other, record by record.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dama.stage import MANIFEST, Attachment, Record, StageError, differences, read_stage
from dama.views import PAIR_VIEWS, View

STAGE = "reference"
ADDED = "added"  # the folder, inside the stage's, with a folder for each addition
TOKEN_TYPE = np.dtype("<f4")  # of log-probs of single tokens
VIEW_FIELDS = ("views", "corruption", "per_token")  # of a fingerprint: what a part holds, not what it is made from

TokenValues = tuple[NDArray[np.float32] | None, ...]  # by view; None where no reference is used


def views_of(record: Record) -> list[str]:
    """Names of the views whose log-probs a record holds."""
    return [name.removesuffix("_logp") for name in record if name.endswith("_logp")]


def tokens_of(record: Record) -> list[int]:
    """Answer tokens of each of a record's views."""
    return [record[f"{name}_tokens"] for name in views_of(record)]


TOKEN_FILE = Attachment("tokens.f32", lambda record: TOKEN_TYPE.itemsize * sum(tokens_of(record)))


@dataclass(frozen=True)
class Wanted:
    """What is asked of a reference folder.

    Attributes:
        corruption: how the second image is made, as in a fingerprint.
        per_token: whether log-probs of single tokens are wanted.
    """

    views: tuple[View, ...]
    corruption: str
    per_token: bool = False

    @property
    def folder(self) -> str:
        """Name of the folder of an addition that holds just this."""
        names = ["+".join(view.name for view in self.views)]
        names += ["tokens"] if self.per_token else []
        names += [self.corruption.replace(", seed ", "-")] if any(view.corrupted for view in self.views) else []
        return "-".join(names)


@dataclass(frozen=True)
class Part:
    """One complete stage of a reference folder."""

    folder: Path
    fingerprint: Record

    @property
    def views(self) -> list[str]:
        """Names of the stored views; stages of earlier versions have the pair's two."""
        return self.fingerprint.get("views") or [view.name for view in PAIR_VIEWS]

    @property
    def corruption(self) -> str:
        """How corrupted images were made, `none` where no view has one."""
        return self.fingerprint.get("corruption", "none")

    @property
    def per_token(self) -> bool:
        """Whether each answer token's log-prob is stored, not only their sum."""
        return "per_token" in self.fingerprint

    @property
    def inputs(self) -> Record:
        """What the part is made from."""
        return {name: value for name, value in self.fingerprint.items() if name not in VIEW_FIELDS}

    def holds(self, view: View, wanted: Wanted) -> bool:
        """Whether a view's log-probs are here as they are wanted."""
        same_image = not view.corrupted or self.corruption == wanted.corruption
        return view.name in self.views and same_image and (self.per_token or not wanted.per_token)

    def __str__(self) -> str:
        per_token = " per token" if self.per_token else ""
        made_by = f" ({self.corruption})" if any(name.endswith("_corrupted") for name in self.views) else ""
        return f"{', '.join(self.views)}{per_token}{made_by}"


def complete_parts(folder: str | Path) -> list[Part]:
    """The parts of a folder, the stage itself first; none where that is not complete."""
    root = Path(folder)
    manifests = [(path, _complete_manifest(path)) for path in (root, *sorted(root.glob(f"{ADDED}/*")))]
    if manifests[0][1] is None:
        return []
    return [Part(path, manifest["fingerprint"]) for path, manifest in manifests if manifest is not None]


def _complete_manifest(folder: Path) -> Record | None:
    """Manifest of a complete stage. One that cannot be read is none, and reported by who opens that stage."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    complete = isinstance(manifest, dict) and manifest.get("complete") and manifest.get("stage") == STAGE
    return manifest if complete else None


def missing_views(parts: Sequence[Part], wanted: Wanted) -> tuple[View, ...]:
    """The views that no part holds as they are wanted."""
    return tuple(view for view in wanted.views if not any(part.holds(view, wanted) for part in parts))


def remove_additions(folder: str | Path) -> None:
    """Remove what was added to a stage that is about to be made anew."""
    shutil.rmtree(Path(folder) / ADDED, ignore_errors=True)


@dataclass(frozen=True)
class StoredLogps:
    """Reference log-probs of pairs by id, for the wanted views in their order.

    Attributes:
        sums: nats. tokens: log-probs of single tokens where they are wanted, else empty.
        fingerprint: of the parts that were read.
    """

    sums: dict[str, tuple[float, ...]]
    tokens: dict[str, TokenValues]
    fingerprint: Record


def read_parts(folder: str | Path, wanted: Wanted) -> StoredLogps:
    """Read the wanted views of a folder that holds them all, see `missing_views`.

    Raises:
        StageError: a part is unfinished or damaged, or an addition was made from other inputs than the stage.
    """
    base, *_ = parts = complete_parts(folder)
    chosen = [next(part for part in parts if part.holds(view, wanted)) for view in wanted.views]
    used = [part for part in parts if part in chosen]
    for part in used:
        if lines := differences(base.inputs, part.inputs):
            remedy = "remove that folder, and add its views again with `python -m dama reference`"
            raise StageError(f"{part.folder}: made from other inputs ({'; '.join(lines)})\nRemedy: {remedy}")
    read = {part.folder: _read(part, wanted.per_token) for part in used}
    columns = [(view.name, read[part.folder]) for view, part in zip(wanted.views, chosen)]
    ids = columns[0][1]
    sums = {id_: tuple(values[id_][0][name] for name, values in columns) for id_ in ids}
    tokens = {id_: tuple(values[id_][1][name] for name, values in columns) for id_ in ids} if wanted.per_token else {}
    added = [{name: part.fingerprint.get(name) for name in VIEW_FIELDS} for part in used if part != base]
    return StoredLogps(sums, dict(tokens), base.fingerprint | ({"added": added} if added else {}))


def _read(part: Part, per_token: bool) -> dict[str, tuple[dict[str, float], dict[str, Any]]]:
    """Of each pair: the sum of each view, and its log-probs of single tokens."""
    _, records = read_stage(part.folder, STAGE)
    sums = {record["id"]: {name: record[f"{name}_logp"] for name in views_of(record)} for record in records}
    if not per_token:
        return {id_: (values, {}) for id_, values in sums.items()}
    values = np.fromfile(part.folder / TOKEN_FILE.name, TOKEN_TYPE)
    ends = iter(list(accumulate((n for record in records for n in tokens_of(record)), initial=0))[1:])
    tokens = {
        record["id"]: {
            name: values[end - count : end] for name, count, end in zip(views_of(record), tokens_of(record), ends)
        }
        for record in records
    }
    return {id_: (values_of_pair, tokens[id_]) for id_, values_of_pair in sums.items()}
