"""Step `context`: each answer's first wrong sentence, found by a marker, against its correction, after what was right.

A pair reads the right sentences so far as its context and is trained on the next one alone (SENTINEL, arXiv
2507.12455). The marker is a model behind a server that sees the image, or rules where the truth is known (TinyCOCO).
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dama.chat import ChatClient, ChatRequest, ChatSettings, after_thoughts, image_part
from dama.console import digest_of, log, write_atomic
from dama.hardness.split import sentence_spans
from dama.images import resolve_image
from dama.stage import Record, open_stage
from dama.synth.prompts import CONTEXT, RESPOND, SynthError, chunks_of, read_step, step_folder
from dama.texts import IMAGE_TOKEN, visible_text

CONTEXT_PAIRS = "context_pairs.jsonl"
ANSWERS_PER_CHUNK = 32  # what a kill can cost
RIGHT = "no wrong sentence"
NO_MARK = "the marker gave no readable mark"
NO_CORRECTION = "no correction, or one that is the wrong sentence itself"
MARK_TOKENS = 1024
MARK_PROMPT = """\
Here is an answer to a question about the image, sentence by sentence. Find the first sentence that says something about
the image that is wrong.

Question: {question}

Answer:
{sentences}

Reply with one JSON object and nothing else: {"first_error": NUMBER, "correction": "TEXT"}. NUMBER is that sentence's
number, or 0 where all sentences are right. TEXT is one sentence that could stand in its place and is right; it is empty
where NUMBER is 0."""


class Answered(NamedTuple):
    """An answer to be marked: its image, the question, and its sentences as they stand in the text."""

    id: str
    image: Path
    question: str
    sentences: tuple[str, ...]


class Mark(NamedTuple):
    """The index of the first wrong sentence, and what is right in its place; an index of -1 where all are right."""

    sentence: int = -1
    correction: str = ""


class Marker(Protocol):
    """Whatever finds the first wrong sentence of answers."""

    name: str

    def identity(self) -> Record:
        """What the marks depend on, for the fingerprint."""

    def mark(self, items: Sequence[Answered]) -> list[Mark | None]:
        """One mark for each; None where the marker gives none."""


class JudgeMarker:
    """A model behind an OpenAI-compatible server that sees the image; no mark where it gives none in three tries.

    Args:
        cache: a JSONL file of replies, which an interrupted run goes on with.
    """

    def __init__(self, settings: ChatSettings, cache: Path | None = None) -> None:
        self.name, self.settings = f"judge:{settings.model}", settings
        self.client = ChatClient(settings, cache)

    def identity(self) -> Record:
        """Identify the marker in the fingerprint."""
        settings = {"model": self.settings.model, "temperature": self.settings.temperature}
        return {"kind": "judge", **settings, "prompt": digest_of(MARK_PROMPT)}

    def mark(self, items: Sequence[Answered]) -> list[Mark | None]:
        """Ask about every answer."""
        counts = {str(number): len(item.sentences) for number, item in enumerate(items)}
        requests = [ChatRequest(str(number), (self._turn(item),)) for number, item in enumerate(items)]
        most = max(counts.values(), default=0)
        replies = self.client.ask(
            requests, accept=lambda text: read_mark(text, most) is not None, tries=3, desc=self.name
        )
        return [
            None if reply.text is None else read_mark(reply.text, counts[number]) for number, reply in replies.items()
        ]

    @staticmethod
    def _turn(item: Answered) -> Record:
        numbered = "\n".join(f"{number}. {text}" for number, text in enumerate(item.sentences, start=1))
        slots = {"{question}": item.question, "{sentences}": numbered}
        text = re.sub("|".join(map(re.escape, slots)), lambda slot: slots[slot[0]], MARK_PROMPT)
        kind = "png" if item.image.suffix == ".png" else "jpeg"
        return {"role": "user", "content": [image_part(item.image.read_bytes(), kind), {"type": "text", "text": text}]}


def read_mark(text: str, sentences: int) -> Mark | None:
    """The mark that a reply holds, after its thoughts, fenced or not; None where it is another text."""
    found = re.search(r"\{.*\}", after_thoughts(text), re.DOTALL)
    try:
        reply = json.loads(found[0]) if found else None
    except (ValueError, RecursionError):
        return None
    number = reply.get("first_error") if isinstance(reply, dict) else None
    correction = reply.get("correction") if isinstance(reply, dict) else None
    if type(number) is not int or not 0 <= number <= sentences or not isinstance(correction or "", str):
        return None
    return Mark(number - 1, (correction or "").strip())


# --------------------------------------------------------------------------------------------------------------- step


def run_context(marker: Marker, out: str | Path, *, overwrite: bool = False) -> Record:
    """Mark every answer of the step `respond`; records in out/stages/context, then write the pairs. Return counts.

    A record is {id, image, question, answer, responder, first_error, correction, context, fault}.

    Raises:
        SynthError: no pair is left.
    """
    manifest, answered = read_step(out, RESPOND)
    folder = Path(manifest["summary"]["image_folder"])
    usable = [record for record in answered if not record["fault"]]
    chunks = chunks_of(usable, ANSWERS_PER_CHUNK)
    fingerprint = {"answers": manifest["digest"], "marker": {marker.name: marker.identity()}}
    sizes = [len(chunk) for chunk in chunks]
    with open_stage(step_folder(out, CONTEXT), CONTEXT, fingerprint, sizes, overwrite=overwrite) as stage:
        stage.fill(lambda number: _marked(marker, chunks[number], folder), "answer")
        stage.conclude(_summarize, {"without_answer": len(answered) - len(usable), "image_folder": str(folder)})
    return write_pairs(out)


def _marked(marker: Marker, answers: Sequence[Record], folder: Path) -> list[Record]:
    items = [
        Answered(
            f"{record['id']}-{record['responder']}-{record['sample']}", resolve_image(folder, record["image"]),
            record["question"], tuple(record["text"][start:end] for start, end in sentence_spans(record["text"])),
        )
        for record in answers
    ]  # fmt: skip
    return [_record(*given) for given in zip(answers, items, marker.mark(items), strict=True)]


def _record(answer: Record, item: Answered, mark: Mark | None) -> Record:
    record = {
        "id": item.id, "image": answer["image"], "question": item.question, "answer": answer["text"],
        "responder": answer["responder"], "context": "", "first_error": "", "correction": "", "fault": "",
    }  # fmt: skip
    if mark is None:
        return record | {"fault": NO_MARK}
    if mark.sentence < 0:
        return record | {"fault": RIGHT}
    start, _ = sentence_spans(answer["text"])[mark.sentence]
    wrong = item.sentences[mark.sentence]
    record |= {"context": answer["text"][:start].rstrip(), "first_error": wrong, "correction": mark.correction}
    usable = visible_text(mark.correction) not in ("", visible_text(wrong)) and IMAGE_TOKEN not in mark.correction
    return record if usable else record | {"fault": NO_CORRECTION}


def _summarize(records: Sequence[Record], facts: Sequence[Record]) -> Record:
    left_out = Counter(record["fault"] for record in records if record["fault"])
    kept = [record for record in records if not record["fault"]]
    return {
        "answers": len(records), "pairs": len(kept), "with_context": sum(bool(record["context"]) for record in kept),
        "left_out": dict(sorted(left_out.items())), **facts[0],
    }  # fmt: skip


def write_pairs(out: str | Path) -> Record:
    """Write out/context_pairs.jsonl of a complete step, with repeated pairs once; return the step's counts.

    Raises:
        SynthError: no pair is left.
    """
    manifest, records = read_step(out, CONTEXT)
    summary, path = manifest["summary"], Path(out) / CONTEXT_PAIRS
    rows = {digest_of([r[name] for name in ("image", "question", "context", "first_error", "correction")]): pair_row(r)
            for r in records if not r["fault"]}  # fmt: skip
    if not rows:
        remedy = "ask for more --samples, or give another --marker"
        raise SynthError(f"synth: no context pair in {len(records)} answers: {summary['left_out']}\nRemedy: {remedy}")
    repeated = summary["pairs"] - len(rows)
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows.values()))
    log(f"{CONTEXT}: {len(rows)} pairs in {path}, {repeated} repeated ones left out")
    return summary


def pair_row(record: Record) -> dict[str, Any]:
    """A pair as training reads it."""
    return {
        "idx": record["id"],
        "image_path": record["image"],
        "question": record["question"],
        **({"context": record["context"]} if record["context"] else {}),
        "chosen": record["correction"],
        "rejected": record["first_error"],
        "origin_dataset": "synth",
        "origin_split": json.dumps({"model": record["responder"], "type": CONTEXT}),
    }
