"""Published results: metrics of models as printed elsewhere, with their protocol as far as it is stated."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Standing = Literal["same", "unknown", "other"]


@dataclass(frozen=True)
class Published:
    """One model's metrics from one publication. protocol, judge: None where the publication does not state them.

    sources: name of the publication -> the part of it that was read.
    """

    model: str
    metrics: Mapping[str, float]
    protocol: str | None
    judge: str | None
    sources: Mapping[str, str]
    note: str = ""

    def standing(self, protocol: str, judge: Mapping[str, Any] | None) -> Standing:
        """Compare with a result of this protocol and judge: made the same way, another way, or not stated."""
        judges = (judge["name"], judge["version"]) if judge else ()
        if self.protocol not in (None, protocol) or (judges and self.judge not in (None, *judges)):
            return "other"
        return "unknown" if self.protocol is None or (judges and self.judge is None) else "same"

    def record(self, protocol: str, judge: Mapping[str, Any] | None) -> dict[str, Any]:
        """Return the entry as JSON has it, with `comparable` to a result of this protocol and judge."""
        return {
            "model": self.model,
            "metrics": dict(self.metrics),
            "protocol": self.protocol,
            "judge": self.judge,
            "comparable": {"same": True, "other": False, "unknown": None}[self.standing(protocol, judge)],
            "sources": dict(self.sources),
            "note": self.note,
        }


def read_published(path: Path | None) -> tuple[Published, ...]:
    """Read a benchmark's file of published results, in its order; none without a file."""
    if path is None:
        return ()
    content = json.loads(path.read_text(encoding="utf-8"))
    return tuple(
        Published(
            row["model"],
            row["metrics"],
            row["protocol"],
            row.get("judge"),
            {name: content["sources"][name] for name in row["sources"]},
            row.get("note", ""),
        )
        for row in content["entries"]
    )
