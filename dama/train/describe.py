"""What the reference stage logs about its result. Importing this module is quick."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dama.console import log


def describe(manifest: dict[str, Any], out: str | Path) -> None:
    """Log the stage's closing lines."""
    summary, verified = manifest["summary"], manifest["summary"]["verified"]
    views = list(summary["tokens"])
    log(
        f"reference: {summary['pairs']} pairs in {manifest['fingerprint']['precision']}, {len(summary['skipped'])} "
        f"skipped, {' + '.join(str(summary['tokens'][view]) for view in views)} answer tokens, mean log-prob "
        f"{' / '.join(format(summary['mean_logp'][view], '.2f') for view in views)} ({' / '.join(views)}), "
        f"{manifest['time']['seconds']:.1f} s -> {out}"
    )
    log(
        f"reference: {verified['pairs']} pairs computed again, each alone: log-probs differ by at most "
        f"{verified['max_difference']:.2g} nats"
    )
    for skip in summary["skipped"]:
        log(f"  skipped {skip['id']}: {skip['reason']}")
