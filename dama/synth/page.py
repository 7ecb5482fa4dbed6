"""The run as a page: what was left out and why, how chosen and rejected differ, images and answers with scores."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dama.console import write_atomic
from dama.hardness.score import STAGE as HARDNESS
from dama.hardness.split import split_statements
from dama.images import load_image, resolve_image
from dama.pages import render_page
from dama.report import url_of
from dama.stage import Record, read_stage
from dama.synth.prompts import IMAGES, RANK_IMAGES, RANK_RESPONSES, RESPOND, numbers, read_step, step_folder

PAGE = "report.html"
LEAD = (
    "Pictures are drawn from prompts and the best of several kept; models answer a question about each; the answer "
    "that a reward model likes best is preferred over the one it likes least. Nobody labelled anything, so a pair is "
    "as good as its rewards."
)
BLIND = "It never sees the picture: it can tell how an answer is written, not whether it is true."


def write_page(out: str | Path, hardness: str | Path | None = None, count: int = 12) -> Path:
    """Write out/report.html with `count` pairs; `hardness` is the folder of that stage for these pairs, for delta."""
    manifest, ranked = read_step(out, RANK_RESPONSES)
    home = Path(manifest["summary"]["image_folder"])
    pictures, painted = read_step(home, RANK_IMAGES)
    painted_by_id = {record["id"]: record for record in painted}
    pairs = [record for record in ranked if not record["fault"]]
    deltas = None if hardness is None else _deltas(hardness)
    page = render_page(
        "synth.html.jinja",
        report={"title": "Preference pairs from reward models", "how_to_read": LEAD},
        steps=_steps(out, home),
        rewards=_rewards(pictures["summary"]["rewards"], "pictures")
        + _rewards(manifest["summary"]["rewards"], "answers"),
        differences=differences(pairs, deltas),
        notes=_notes(pairs, manifest["summary"], deltas),
        pairs=[_pair_view(record, painted_by_id[record["id"]], home) for record in pairs[:count]],
        left_out=[
            {"id": record["id"], "fault": record["fault"], "text": record.get("prompt") or record["question"]}
            for record in [*painted, *ranked]
            if record["fault"]
        ][:count],
    )
    path = Path(out) / PAGE
    write_atomic(path, page)
    return path


def _steps(out: str | Path, home: Path) -> list[dict[str, Any]]:
    """What each step had and left, and why it left things out."""
    images, ranked, answers, chosen = (
        read_step(folder, step)[0]["summary"]
        for folder, step in ((home, IMAGES), (home, RANK_IMAGES), (out, RESPOND), (out, RANK_RESPONSES))
    )
    usable = answers["answers"] - sum(answers["faults"].values())
    rows = [
        ("images", "candidate pictures", images["candidates"], images["usable"], images["faults"]),
        ("rank-images", "prompts", ranked["prompts"], ranked["pictures"], ranked["left_out"]),
        ("respond", "answers", answers["answers"], usable, answers["faults"]),
        ("rank-responses", "pictures", chosen["pictures"], chosen["pairs"], chosen["left_out"]),
        ("", "answers to them", answers["answers"], answers["answers"] - sum(chosen["answers_left_out"].values()),
         chosen["answers_left_out"]),
    ]  # fmt: skip
    return [{"step": s, "of": of, "had": had, "left": left, "reasons": list(why.items())}
            for s, of, had, left, why in rows]  # fmt: skip


def _rewards(rewards: Record, of: str) -> list[dict[str, Any]]:
    return [{"name": name, "of": of, "sees_image": made["sees_image"]} for name, made in rewards.items()]


def _deltas(folder: str | Path) -> dict[str, float]:
    return {record["id"]: record["delta"] for record in read_stage(folder, HARDNESS)[1]}


def differences(pairs: Sequence[Record], deltas: dict[str, float] | None = None) -> list[dict[str, Any]]:
    """Words, statements and score of chosen and rejected: means, and the share of pairs in which chosen has more."""
    said = [(record["answers"][record["chosen"]], record["answers"][record["rejected"]]) for record in pairs]
    measures = {
        "words": lambda answer: len(answer["text"].split()),
        "statements": lambda answer: len(split_statements(answer["text"])),
        "score": lambda answer: answer["score"],
    }
    rows = []
    for name, measure in measures.items():
        both = [(measure(chosen), measure(rejected)) for chosen, rejected in said]
        means = [statistics.fmean(side) for side in zip(*both)] if both else [0.0, 0.0]
        more = sum(chosen > rejected for chosen, rejected in both) / max(1, len(both))
        rows.append({"name": name, "chosen": f"{means[0]:.3g}", "rejected": f"{means[1]:.3g}",
                     "difference": f"{means[0] - means[1]:+.3g}", "more": f"{100 * more:.0f} %"})  # fmt: skip
    if deltas:
        known = [deltas[record["id"]] for record in pairs if record["id"] in deltas]
        positive = sum(delta > 0 for delta in known) / max(1, len(known))
        rows.append({"name": "δ (chosen less rejected, by CLIP)", "chosen": "", "rejected": "",
                     "difference": f"{statistics.fmean(known):+.3g}", "more": f"{100 * positive:.0f} %"})  # fmt: skip
    return rows


def _notes(pairs: Sequence[Record], summary: Record, deltas: dict[str, float] | None) -> list[str]:
    notes = []
    blind = [name for name, made in summary["rewards"].items() if not made["sees_image"]]
    if blind:
        notes.append(f"{', '.join(blind)}: {BLIND}")
    if summary["not_best_and_worst"]:
        notes.append(
            f"In {summary['not_best_and_worst']} of {summary['pairs']} pairs the filters took other answers than the "
            "best and the worst."
        )
    if deltas is None:
        notes.append("No δ here: run `python -m dama hardness` on pairs.jsonl, then `synth report --hardness DIR`.")
    elif missing := sum(record["id"] not in deltas for record in pairs):
        notes.append(f"{missing} pairs have no δ in that folder.")
    return notes


def _pair_view(record: Record, painted: Record, home: Path) -> dict[str, Any]:
    folder = step_folder(home, IMAGES)
    candidates = [
        {"source": url_of(load_image(folder / candidate["image"])) if candidate["image"] else None,
         "best": row == painted["best"], "fault": candidate["fault"],
         "words": f"{_scores(candidate)}; guidance {candidate['guidance']:g}"}
        for row, candidate in enumerate(painted["candidates"])
    ]  # fmt: skip
    sides = {record["chosen"]: "chosen", record["rejected"]: "rejected"}
    order = sorted(range(len(record["answers"])), key=lambda row: -(record["answers"][row]["score"] or float("-inf")))
    answers = [
        {"side": sides.get(row, ""), "text": answer["text"], "fault": answer["fault"],
         "words": f"{_scores(answer)}; {answer['responder']}"}
        for row, answer in ((row, record["answers"][row]) for row in order)
    ]  # fmt: skip
    return {"id": record["id"], "prompt": painted["prompt"], "question": record["question"],
            "source": url_of(load_image(resolve_image(home, record["image"]))), "candidates": candidates,
            "answers": answers}  # fmt: skip


def _scores(judged: Record) -> str:
    """The score, and where several rewards made it theirs."""
    parts = [f"{name} {numbers([score])}" for name, score in judged["scores"].items()]
    return numbers([judged["score"]]) + (f" ({', '.join(parts)})" if len(parts) > 1 else "")
