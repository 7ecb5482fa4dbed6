"""The answers stage: batched, sharded, resumable, and independent of any benchmark."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dama.console import digest_of
from dama.errors import error_list
from dama.image_table import table_of_images
from dama.images import ImageFolder
from dama.stage import WHOLE, Record, Shard, open_stage, read_stage
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.generation.request import Decoding, Request, Responder
from llava.generation.served import ServedAnswerer

STAGE = "answers"
FLAGS = {
    "requests": "--question-file (content)", "pictures": "--image-folder (content)", "model": "--model-path",
    "weights": "--model-path (content)", "base": "--model-base", "template": "--conv-mode", "tokenizer": "tokenizer",
    "chat_template": "--system_prompt, or the chat template", "precision": "precision",
    "image_processor": "--min_pixels, --max_pixels or --processor_option, or the image processor",
    "batch_size": "--batch-size", "decoding.max_new_tokens": "--max-new-tokens", "decoding.num_beams": "--num-beams",
    "decoding.temperature": "--temperature", "decoding.top_p": "--top-p", "decoding.samples": "--samples",
    "decoding.seed": "--seed",
}  # fmt: skip


def run_answers(
    responder: Responder,
    requests: Sequence[Request],
    image_folder: ImageFolder,
    out: str | Path,
    decoding: Decoding,
    *,
    batch_size: int = 16,
    shard: Shard = WHOLE,
    overwrite: bool = False,
) -> Record | None:
    """Answers the shard's requests and keeps the answers in `out` as they come; resumes by batch.

    Batches hold prompts of similar length, and so does answers.jsonl until the last answer is there; then it is put in
    the order of the requests. A line of `out`/answers.jsonl is {"question_id", "image_id", "prompt", "text",
    "model_id", "sample"}; a server's also has its "finish_reason" and, where there is no answer, the reason as
    "missing". Returns the manifest of the whole stage, or None while
    other shards are unfinished; the last one merges.
    """
    fingerprint = fingerprint_of(responder, requests, image_folder, decoding, batch_size)
    sizes = [len(chunk) * decoding.samples for chunk in _chunks(requests, batch_size)]
    with open_stage(out, STAGE, fingerprint, sizes, shard=shard, overwrite=overwrite, flags=FLAGS) as stage:
        # Only now, because the length of a prompt takes the model's tokenizer.
        chunks = list(_chunks(by_length(responder, requests, image_folder), batch_size)) if stage.to_do else []
        total, done = (records // decoding.samples for records in (stage.total, stage.records_done))
        silent = stage.complete or shard.index > 0
        with tqdm(total=total, initial=done, desc=STAGE, unit="answer", disable=silent) as bar:
            for number in stage.to_do:
                chunk = chunks[number]
                torch.manual_seed(decoding.seed * 1_000_003 + number)
                stage.append(_records(responder, chunk, image_folder, decoding))
                bar.update(len(chunk))
        return stage.conclude(summarize, {}, place_of(requests, decoding.samples))


def place_of(requests: Sequence[Request], samples: int) -> Callable[[Record], int]:
    """Where an answer belongs in answers.jsonl: by its question, then by its sample."""
    order = {request.id: i * samples for i, request in enumerate(requests)}
    return lambda record: order[record["question_id"]] + record["sample"]


def fingerprint_of(
    responder: Responder,
    requests: Sequence[Request],
    image_folder: ImageFolder,
    decoding: Decoding,
    batch_size: int,
) -> Record:
    """Whatever answers depend on. Raises ValueError for errors of the requests."""
    return {
        "requests": digest_of([[r.id, r.prompt, r.image] for r in requests]),
        "pictures": digest_of(check_requests(requests, image_folder)),
        **responder.identity(),
        "decoding": asdict(decoding),
        "batch_size": batch_size,
    }


def by_length(responder: Responder, requests: Sequence[Request], image_folder: ImageFolder) -> list[Request]:
    """Shortest prompt first; the id settles ties, so that the order is always the same."""
    lengths = {request.id: responder.length(request, image_folder) for request in requests}
    return sorted(requests, key=lambda request: (lengths[request.id], request.id))


def summarize(records: list[Record], _: list[Record]) -> Record:
    """The manifest's summary of all answers."""
    words = sum(len(record["text"].split()) for record in records)
    missing = Counter(record["missing"] for record in records if record.get("missing"))
    summary = {"answers": len(records), "mean_words": words / max(1, len(records))}
    return summary | ({"missing": dict(missing.most_common())} if missing else {})


def generate_answers(
    responder: Responder,
    requests: Sequence[Request],
    image_folder: ImageFolder,
    out: str | Path,
    decoding: Decoding,
    *,
    batch_size: int = 16,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """All answers of `run_answers`, in the order of the requests."""
    run_answers(responder, requests, image_folder, out, decoding, batch_size=batch_size, overwrite=overwrite)
    # An earlier revision left them in the order of the batches.
    return sorted(read_stage(out, STAGE)[1], key=place_of(requests, decoding.samples))


def _records(
    responder: Responder, requests: Sequence[Request], image_folder: ImageFolder, decoding: Decoding
) -> list[Record]:
    if not isinstance(responder, ServedAnswerer):
        texts = responder.answer(requests, image_folder, decoding)
        return [_record(r, text, k, responder) for r, group in zip(requests, texts) for k, text in enumerate(group)]
    return [
        _record(request, reply.text, sample, responder)
        | {"finish_reason": reply.finish}
        | ({"missing": reply.missing} if reply.missing else {})
        for request, group in zip(requests, responder.replies(requests, image_folder, decoding))
        for sample, reply in enumerate(group)
    ]


def _record(request: Request, text: str, sample: int, responder: Responder) -> dict[str, Any]:
    return {
        "question_id": request.id,
        "image_id": request.image_id or (request.image or ""),
        "prompt": request.prompt,
        "text": text,
        "model_id": responder.name,
        "sample": sample,
    }


def _chunks(items: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    """Consecutive runs of at most `size`, with and without image apart."""
    for has_image in (True, False):
        part = [item for item in items if (item.image is not None) is has_image]
        yield from (part[i : i + size] for i in range(0, len(part), size))


def check_requests(requests: Sequence[Request], image_folder: ImageFolder) -> dict[str, str]:
    """Image -> digest of its file, every image decoded once.

    Raises:
        ValueError: naming every error: ids used twice, image tags in a prompt, images that cannot be used.
    """
    errors = [f"id {id_!r} is used {n} times" for id_, n in Counter(r.id for r in requests).items() if n > 1]
    errors += [
        f"question {r.id}: {DEFAULT_IMAGE_TOKEN} inside the text would be read as one more image"
        for r in requests if DEFAULT_IMAGE_TOKEN in r.prompt
    ]  # fmt: skip
    askers: dict[str, str] = {}
    for request in requests:
        if request.image is not None:
            askers.setdefault(request.image, request.id)
    table = table_of_images(list(askers), image_folder)
    errors += [f"question {askers[name]}: image {name}: {error}" for name, error in (table.outside | table.bad).items()]
    if errors:
        raise ValueError(error_list("questions", errors, "correct the question file or the image folder"))
    return {name: table.good[name].digest for name in askers}
