"""Step `rank-responses`: best and worst answer of each image become a pair; both output formats, what is left out.

pairs.jsonl has the fields that every command of this repository reads, pds_dpo.json PDS-DPO's.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from dama.console import write_atomic, write_json
from dama.images import resolve_image
from dama.stage import Record, open_stage
from dama.synth.prompts import (
    RANK_IMAGES,
    RANK_RESPONSES,
    RESPOND,
    SynthError,
    by_prompt,
    chunks_of,
    numbers,
    read_step,
    step_folder,
)
from dama.synth.rank import (
    ALL_TIED,
    NO_NUMBER,
    PROMPTS_PER_CHUNK,
    TOO_FEW,
    Filters,
    choose,
    combine,
    rewards_identity,
    score_all,
)
from dama.synth.rewards import Judged, Reward
from dama.texts import IMAGE_TOKEN

PAIRS, PDS_DPO, DROPPED, SUMMARY = "pairs.jsonl", "pds_dpo.json", "dropped.jsonl", "summary.json"
SAME_ANSWER = "the same text as another answer"
PLACEHOLDER = f"{IMAGE_TOKEN} inside the text"


def run_rank_responses(
    rewards: Sequence[Reward], out: str | Path, filters: Filters, *, overwrite: bool = False
) -> Record:
    """Choose a pair for each image; records in out/stages/rank-responses, then writes the outputs.

    A record is {id, image, question, chosen, rejected, error, answers: [{responder, sample, text, error, scores,
    score}]}; chosen and rejected are rows of `answers`, null where there is no pair, and `fault` says why.
    """
    manifest, answered = read_step(out, RESPOND)
    folder = Path(manifest["summary"]["image_folder"])
    groups = list(by_prompt(answered).values())
    chunks = chunks_of(groups, PROMPTS_PER_CHUNK)
    identity = rewards_identity(rewards)
    given = {name: value if value != float("inf") else None for name, value in vars(filters).items()}
    fingerprint = {"answers": manifest["digest"], "rewards": identity, "filters": given}
    sizes = [len(chunk) for chunk in chunks]
    with open_stage(step_folder(out, RANK_RESPONSES), RANK_RESPONSES, fingerprint, sizes, overwrite=overwrite) as stage:
        stage.fill(lambda number: _rank_chunk(rewards, chunks[number], folder, filters), "picture")
        stage.conclude(_summarize, {"rewards": identity, "image_folder": str(folder)})
    return write_outputs(out)


def _rank_chunk(
    rewards: Sequence[Reward], groups: Sequence[Sequence[Record]], folder: Path, filters: Filters
) -> list[Record]:
    answers = [_with_errors(group) for group in groups]
    items = [
        Judged(resolve_image(folder, group[0]["image"]), group[0]["question"], answer["text"])
        for group, of_picture in zip(groups, answers)
        for answer in of_picture
        if not answer["fault"]
    ]
    by_item = {name: iter(scores) for name, scores in score_all(rewards, items).items()}
    for answer in (answer for of_picture in answers for answer in of_picture):
        answer["scores"] = {name: None if answer["fault"] else next(by_item[name]) for name in by_item}
    return [_paired(group[0], of_picture, filters) for group, of_picture in zip(groups, answers)]


def _with_errors(group: Sequence[Record]) -> list[Record]:
    """The answers to one question, with what makes one unusable before any reward sees it."""
    answers, seen = [], set()
    for record in group:
        text, error = record["text"], record["fault"]
        if not error and IMAGE_TOKEN in text:
            error = PLACEHOLDER
        if not error and text.strip() in seen:
            error = SAME_ANSWER
        seen.add(text.strip())
        answers.append({"responder": record["responder"], "sample": record["sample"], "text": text, "fault": error})
    return answers


def _paired(first: Record, answers: Sequence[Record], filters: Filters) -> Record:
    names = answers[0]["scores"]
    combined = combine({name: [answer["scores"][name] for answer in answers] for name in names})
    for answer, score in zip(answers, combined):
        answer["score"] = score
        if score is None and not answer["fault"]:
            answer["fault"] = NO_NUMBER
    choice = choose([answer["text"] for answer in answers], combined, filters)
    error = choice.error
    if error == TOO_FEW:
        causes = Counter(answer["fault"] for answer in answers if answer["fault"])
        error += f" ({', '.join(f'{cause}: {count}' for cause, count in sorted(causes.items()))})" if causes else ""
    elif error == ALL_TIED:
        error += f" ({numbers([score for score in combined if score is not None][:1])})"
    chosen, rejected = (None, None) if error else (choice.chosen, choice.rejected)
    return {"id": first["id"], "image": first["image"], "question": first["question"], "chosen": chosen,
            "rejected": rejected, "fault": error, "answers": list(answers)}  # fmt: skip


def _summarize(records: list[Record], facts: list[Record]) -> Record:
    left_out = Counter(record["fault"].partition(" (")[0] for record in records if record["fault"])
    answers = Counter(answer["fault"] for record in records for answer in record["answers"] if answer["fault"])
    moved = sum(_is_moved(record) for record in records)
    return {
        "pictures": len(records),
        "pairs": len(records) - left_out.total(),
        "not_best_and_worst": moved,  # pairs that the filters chose other answers for
        "left_out": dict(sorted(left_out.items())),
        "answers_left_out": dict(sorted(answers.items())),
        **facts[0],
    }


def _is_moved(record: Record) -> bool:
    if record["fault"]:
        return False
    scores = [answer["score"] for answer in record["answers"] if answer["score"] is not None]
    chosen, rejected = (record["answers"][record[side]]["score"] for side in ("chosen", "rejected"))
    return (chosen, rejected) != (max(scores), min(scores))


# ------------------------------------------------------------------------------------------------------------ outputs


def write_outputs(out: str | Path) -> Record:
    """Write pairs.jsonl, pds_dpo.json, dropped.jsonl and summary.json from the finished step; returns the summary.

    Raises SynthError, with the reasons and their counts, where no pair is left.
    """
    out = Path(out)
    manifest, records = read_step(out, RANK_RESPONSES)
    summary = manifest["summary"]
    kept = [record for record in records if not record["fault"]]
    _, painted = read_step(summary["image_folder"], RANK_IMAGES)
    dropped = [
        {"id": record["id"], "step": step, "reason": record["fault"]}
        for step, of_step in ((RANK_IMAGES, painted), (RANK_RESPONSES, records))
        for record in of_step
        if record["fault"]
    ]
    write_atomic(out / DROPPED, _lines(dropped))
    write_json(out / SUMMARY, summary)
    if not kept:
        remedy = f"see {out / DROPPED}; loosen the filters, ask for more samples, or give another reward"
        raise SynthError(f"synth: no pair is left of {len(records)} pictures: {summary['left_out']}\nRemedy: {remedy}")
    write_atomic(out / PAIRS, _lines([pair_row(record) for record in kept]))
    write_json(out / PDS_DPO, [pds_dpo_row(record) for record in kept])
    return summary


def _lines(rows: Sequence[Record]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def pair_row(record: Record) -> Record:
    """RLAIF-V's fields, and the scores. The image path starts at the run's --out (of --images, where given)."""
    chosen, rejected = (record["answers"][record[side]] for side in ("chosen", "rejected"))
    return {
        "idx": record["id"],
        "image_path": record["image"],
        "question": record["question"],
        "chosen": chosen["text"],
        "rejected": rejected["text"],
        "origin_dataset": "synth",
        "origin_split": json.dumps({"model": chosen["responder"], "type": "synth", "rejected": rejected["responder"]}),
        "chosen_score": chosen["score"],
        "rejected_score": rejected["score"],
    }


def pds_dpo_row(record: Record) -> Record:
    """The record of PDS-DPO's data file."""
    human = {"from": "human", "value": f"{IMAGE_TOKEN} {record['question']}"}
    said = [
        [human, {"from": "gpt", "value": record["answers"][record[side]]["text"]}] for side in ("chosen", "rejected")
    ]
    return {"id": record["id"], "image": record["image"], "conversations": said[0], "rejected_conversations": said[1]}
