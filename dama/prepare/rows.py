"""What becomes of one row: a pair with its image stored, or the reason why it is left out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dama.console import digest_of
from dama.images import ImageError
from dama.pairs import TOO_DEEP, PreferencePair, id_of_row, pair_of_fields, text_errors
from dama.prepare.card import NOT_STATED
from dama.prepare.contamination import Benchmarks, contamination
from dama.prepare.images import ImageStore, RowImage, image_bytes, images_of_row, second_image_of_row, sha256
from dama.styles import NamedRow, named_fields
from dama.texts import visible_text

MAX_CHARACTERS = 100_000  # of a question or an answer; a preference pair's have some hundred words
OF_THE_CARD = ("place", "size", "sizes", "lengths", "contaminated")  # fields of a record that training has no use for
MAX_DETAIL = 300  # characters of a row that are repeated in a message

UNREADABLE = "unreadable row"
OTHER_GENERATOR = "other generator"
EVALUATION = "evaluation image"
BAD_TEXT = "unusable text"
BAD_IMAGE = "unusable image"
REPEATED_PAIR = "repeated pair"
REPEATED_ID = "repeated id"

Record = dict[str, Any]
CountTokens = Callable[[Sequence[str]], list[int]]


class LeftOutError(ValueError):
    """A row that is left out: one of the reasons above, and what in this row."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Rules:
    """What a row must be. `generators` are folded names, none: any."""

    generators: frozenset[str]
    benchmarks: Benchmarks  # their images are left out
    keep_contaminated: bool


def folded(name: str) -> str:
    """A generator's name without case, dashes, underscores and spaces."""
    return re.sub(r"[-_\s]", "", name.casefold())


def generator_of(row: Record) -> str:
    """The model that wrote the answers: the field generator, else "model" of origin_split, else all of its text."""
    name = row.get("generator")
    if name is None:
        name = row.get("origin_split")
        with suppress(ValueError, RecursionError, TypeError):  # text that is not JSON, or no text
            name = json.loads(name)  # type: ignore[arg-type]
        if isinstance(name, dict):
            name = name.get("model")
    return clean(name) if isinstance(name, str) and name.strip() else NOT_STATED


def record_of(place: str, row: Any, rules: Rules, image_folder: Path, store: ImageStore) -> Record:
    """The stage's record of one row: the pair as training reads it with its figures, or why it is left out.

    `image_folder` is where image paths start, for an image that is not inside the row.
    """
    try:
        return {"place": clean(place), **_pair_record(row, rules, image_folder, store)}
    except LeftOutError as error:
        return {"place": clean(place), **_identity(row), "reason": error.reason, "detail": clean(str(error))}
    except RecursionError:
        return {"place": clean(place), **_identity(row), "reason": UNREADABLE, "detail": TOO_DEEP}


def _identity(row: Any) -> Record:
    """Id and image of a row that is left out, as far as it has them."""
    identity: Record = {}
    # No record at all, of other types, or nested too deep: the reason says so.
    with suppress(ValueError, AttributeError, RecursionError):
        identity["idx"] = clean(id_of_row(row) or "")
        identity["image"] = clean(" ".join(name for image in images_of_row(row) for name in image.names))
    return {name: text for name, text in identity.items() if text}


def clean(text: str) -> str:
    """Short enough to list, and safe to write and to print: control characters and halves of surrogates escaped."""
    text = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda found: f"\\x{ord(found[0]):02x}", text[: MAX_DETAIL + 1])
    text = text.encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= MAX_DETAIL else text[:MAX_DETAIL] + " ..."


def _pair_record(row: Any, rules: Rules, image_folder: Path, store: ImageStore) -> Record:
    row, own, second, generator = _readable(row)
    images = own + second
    if rules.generators and folded(generator) not in rules.generators:
        raise LeftOutError(OTHER_GENERATOR, generator)
    dataset = row.get("origin_dataset")
    names = [name for image in images for name in image.names]
    evaluated = contamination(names, dataset if isinstance(dataset, str) else "", rules.benchmarks)
    if evaluated is not None and not rules.keep_contaminated:
        raise LeftOutError(EVALUATION, evaluated)
    try:
        found = [image_bytes(image, image_folder) for image in images]
        digests = [sha256(data) for data in found]
        pair = _checked_pair(row, digests[: len(own)], digests[len(own) :])
        stored = [store.add(data, digest) for data, digest in zip(found, digests, strict=True)]
    except ImageError as error:
        raise LeftOutError(BAD_IMAGE, str(error)) from error
    sizes = [[image.width, image.height, image.bytes] for image in stored]
    names = [image.name for image in stored[: len(own)]]
    return {
        "idx": pair.id,
        "image": names[0] if names else "",
        **({} if len(names) == 1 else {"images": names}),
        **({"rejected_images": [image.name for image in stored[len(own) :]]} if second else {}),
        "question": pair.question,
        **({"prompt": [{"role": r, "content": text} for r, text in pair.conversation]} if pair.conversation else {}),
        "chosen": pair.chosen,
        "rejected": pair.rejected,
        **({"context": pair.context} if pair.context else {}),
        **({"second": pair.second} if pair.second else {}),
        "kind": pair.kind,
        "origin_dataset": pair.source,
        "generator": "" if generator == NOT_STATED else generator,
        "origin_image": clean(" ".join(image.names[0] for image in own if image.names)),
        **_scores(row),
        **({"size": sizes[0]} if len(sizes) == 1 else {"sizes": sizes}),
        "contaminated": evaluated,
    }


def _readable(row: Any) -> tuple[NamedRow, tuple[RowImage, ...], tuple[RowImage, ...], str]:
    """The row under our names, its images, its second image where it has one, and its generator."""
    try:
        if isinstance(row, ValueError):
            raise row
        if not isinstance(row, dict):
            raise ValueError(f"expected a record with named fields, got {type(row).__name__}")
        row = named_fields(row)
        return row, images_of_row(row), second_image_of_row(row), generator_of(row)
    except ValueError as error:
        raise LeftOutError(UNREADABLE, str(error)) from error


def _checked_pair(row: NamedRow, digests: Sequence[str], second: Sequence[str]) -> PreferencePair:
    """The pair with its images' digests for names, so that an absent id is the digest of pair and images."""
    named: Record = {"images": list(digests)} if "images" in row else {"image_path": digests[0]}
    if second:
        named["rejected_images"] = list(second)
    try:
        pair = pair_of_fields(row.replaced(**named))
    except ValueError as error:
        raise LeftOutError(UNREADABLE, str(error)) from error
    texts = {"question": pair.question, "chosen": pair.chosen, "rejected": pair.rejected, "id": pair.id}
    texts |= {name: text for name in ("context", "second") if (text := getattr(pair, name))}
    texts |= {"earlier turns": "".join(text for _, text in pair.conversation)}
    long = [f"{name}: {len(text)} characters" for name, text in texts.items() if len(text) > MAX_CHARACTERS]
    errors = [f"{error}, more than {MAX_CHARACTERS}" for error in long] or list(text_errors(pair))
    if errors:
        raise LeftOutError(BAD_TEXT, "; ".join(errors))
    return pair


def _scores(row: Record) -> Record:
    """The released DAMA code's scores as JSON text, the form in which their NaN is still JSON."""
    names = [name for name in ("logps", "chosen_logits", "rejected_logits") if row.get(name) is not None]
    return {name: row[name] if isinstance(row[name], str) else json.dumps(row[name]) for name in names}


def add_lengths(records: Sequence[Record], count: CountTokens) -> None:
    """Give every pair its field lengths: tokens of question, chosen and rejected answer."""
    pairs = [record for record in records if "reason" not in record]
    lengths = count([pair[name] for pair in pairs for name in ("question", "chosen", "rejected")])
    for index, pair in enumerate(pairs):
        pair["lengths"] = lengths[3 * index : 3 * index + 3]


def pair_key(record: Record) -> str:
    """The same for rows of the same image whose question and answers look the same."""
    names = [name for name in ("question", "chosen", "rejected", "context", "second") if name in record]
    told = [[turn["role"], visible_text(turn["content"])] for turn in record.get("prompt", ())]
    more = [record.get("images", []), told] if "images" in record or told else []
    return digest_of([
        record["image"], *record.get("rejected_images", ()), *(visible_text(record[name]) for name in names), *more
    ])  # fmt: skip


def written(record: Record) -> Record:
    """The row of a pair in pairs.jsonl, each thing under one name."""
    row = {name: value for name, value in record.items() if name not in OF_THE_CARD}
    for name, other in (("images", "image"), ("prompt", "question")):
        if name in row:
            del row[other]
    return row
