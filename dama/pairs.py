"""Preference pairs (I, x, y_w, y_l): what one is, reading files of them, the checks before long work."""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, repeat
from pathlib import Path
from typing import Any, BinaryIO

from dama.console import digest_of
from dama.errors import error_list
from dama.images import ImageFolder, find_image_errors, missing_folders, resolve_image
from dama.styles import (
    USER,
    Conversation,
    NamedRow,
    checked_text,
    has_half_character,
    json_field,
    named_fields,
    text_of,
)
from dama.texts import IMAGE_TOKEN, visible_text, without_image_tokens

BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TOO_DEEP = "its values are nested too deep"
FILE_REMEDY = "correct or remove these rows"


class PairsError(ValueError):
    """Faults of a file of pairs, all in one message."""


@dataclass(frozen=True, slots=True)
class ReferenceLogps:
    """log pi_ref(y | I, x) of both answers: sums over the answer's tokens, in nats."""

    chosen: float
    rejected: float


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One row of D. Answers are kept exactly as in the file; the question comes without its image placeholder."""

    id: str
    image: str  # relative to the image folder; the first of several
    question: str
    chosen: str
    rejected: str
    kind: str = ""
    source: str = ""
    reference: ReferenceLogps | None = None
    clip_scores: tuple[tuple[float, ...], tuple[float, ...]] | None = None  # per statement of y_w, of y_l
    second_image: str | None = None  # relative to the image folder: what an objective compares the image with
    second: str | None = None  # the right answer for the second image
    context: str | None = None  # what the assistant has said before both answers: read, not trained on
    more_images: tuple[str, ...] = ()  # shown after `image`, which is empty in a pair of texts alone
    conversation: Conversation = ()  # what is before both answers, where that is not images and then a question

    @property
    def own_images(self) -> tuple[str, ...]:
        """The images that its prompt shows, in their order; none in a pair of texts alone."""
        return (self.image, *self.more_images) if self.image else ()

    @property
    def images(self) -> tuple[str, ...]:
        """Its own images, and its second one where it has one."""
        return self.own_images if self.second_image is None else (*self.own_images, self.second_image)

    @property
    def prompt(self) -> Conversation:
        """All that is before both answers, an IMAGE_TOKEN where an image is shown."""
        return self.conversation or ((USER, IMAGE_TOKEN * len(self.own_images) + self.question),)

    @property
    def place(self) -> str:
        """What keeps pairs together when some are held out, see `place_of`."""
        return place_of(self.image, self.id)

    @property
    def is_plain(self) -> bool:
        """Whether it asks one question about one image, as the pairs of LLaVA-1.5's papers do."""
        return bool(self.image) and not self.more_images and not self.conversation


@dataclass(frozen=True, slots=True)
class SkippedPair:
    """A pair that was left out on request, and why."""

    id: str
    reason: str


# ---------------------------------------------------------------------------------------------------------- reading


def read_pairs(path: str | Path) -> list[PreferencePair]:
    """Read preference pairs from JSON or JSONL.

    The layout is RLAIF-V's, the released DAMA code's (the same with `logps` and `*_logits`), or any that `named_fields`
    knows. Fields: idx or id (a digest of the content where absent), image_path or image or images, question, chosen,
    rejected, context, origin_dataset, origin_split, kind; kind falls back to origin_split's "type". Whether it is a
    list or one record a line is seen from the first character. Raises PairsError naming every torn line and every row
    with a bad field.
    """
    pairs, errors = parse_pairs(path)
    if errors:
        raise PairsError(error_list(str(path), errors, FILE_REMEDY))
    return pairs


def parse_pairs(path: str | Path) -> tuple[list[PreferencePair], list[str]]:
    """read_pairs with the errors of single rows returned, for check_pairs to report together with its own."""
    path = Path(path)
    if not path.is_file():
        raise PairsError(f"{path}: no such file\nRemedy: give a JSON or JSONL file of preference pairs")
    pairs, errors = [], []
    for place, row in read_rows(path):
        try:
            if isinstance(row, ValueError):
                raise row
            pairs.append(pair_from_row(row))
        except ValueError as error:
            errors.append(f"{place}: {error}")
        except RecursionError:
            errors.append(f"{place}: {TOO_DEEP}")
    if not pairs and not errors:
        raise PairsError(f"{path}: no pairs in it\nRemedy: expected a JSON list of records or one record a line")
    return pairs, errors


def read_rows(path: str | Path) -> Iterator[tuple[str, Any]]:
    """(place, row) of every record of a JSON list, or of JSON lines one at a time.

    A line that cannot be read comes as the ValueError that says why. Raises PairsError for a list that cannot.
    """
    with Path(path).open("rb") as file:
        if _first_character(file) == b"[":
            yield from ((f"row {number}", row) for number, row in enumerate(_json_list(path, file.read()), start=1))
            return
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield f"line {number}", _row_of_line(line)


def _first_character(file: BinaryIO) -> bytes:
    """The first byte that is no white space; the file then stands at its start, or after a byte order mark."""
    if file.read(3) != BYTE_ORDER_MARK:
        file.seek(0)
    start = file.tell()
    first = next((line.lstrip()[:1] for line in file if line.strip()), b"")
    file.seek(start)
    return first


def _json_list(path: str | Path, content: bytes) -> list[Any]:
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise PairsError(f"{path}: byte {error.start} is not UTF-8\nRemedy: save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        remedy = "the file is torn or not JSON; write it again"
        raise PairsError(f"{path}, line {error.lineno}: {error.msg}\nRemedy: {remedy}") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, too many brackets
        raise PairsError(f"{path}: not JSON of preference pairs ({error})\nRemedy: write it again") from error


def _row_of_line(line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return ValueError(f"byte {error.start} is not UTF-8")
    except json.JSONDecodeError as error:
        return ValueError(f"not JSON, perhaps torn (at column {error.colno})")
    except (ValueError, RecursionError):
        return ValueError("not JSON of a preference pair (a number too long, or brackets too deep)")


def pair_from_row(row: Any) -> PreferencePair:
    """The pair that one record holds, whatever its layout. Raises ValueError naming the field that is bad."""
    if not isinstance(row, dict):
        raise ValueError(f"expected a record with named fields, got {type(row).__name__}")
    return pair_of_fields(named_fields(row))


def pair_of_fields(row: NamedRow) -> PreferencePair:
    """The pair of a row whose fields are named already. Raises ValueError naming the file's field that is bad."""
    images, context = image_paths(row), _context(row)
    question, conversation = placed_images(row, len(images))
    chosen, rejected = text_of(row, "chosen"), text_of(row, "rejected")
    first, *more = images or ("",)
    content: list[Any] = [first, question, chosen, rejected, *([context] if context else [])]
    content += [more, conversation] if more or conversation else []
    return PreferencePair(
        id=id_of_row(row) or digest_of(content),
        image=first,
        question=question,
        chosen=chosen,
        rejected=rejected,
        kind=text_of(row, "kind") if row.get("kind") is not None else _kind_of_split(row.get("origin_split")),
        source=text_of(row, "origin_dataset") if row.get("origin_dataset") is not None else "",
        reference=_reference(row.get("logps")),
        clip_scores=_clip_scores(row),
        second_image=_second_image(row),
        second=text_of(row, "second") if row.get("second") is not None else None,
        context=context,
        more_images=tuple(more),
        conversation=conversation,
    )


def image_paths(row: NamedRow) -> tuple[str, ...]:
    """The paths of a row's images; none only where it says so with an empty list."""
    if "images" not in row:
        return (text_of(row, "image_path", "image"),)
    name = row.name("images")
    return tuple(checked_text(name, path) for path in row["images"])


def placed_images(row: NamedRow, images: int) -> tuple[str, Conversation]:
    """(the last question without placeholders, the conversation where it is more than images and that question).

    A prompt without placeholders shows its images first, as TRL reads it.

    Raises:
        ValueError: it has another number of placeholders than images.
    """
    turns = row["prompt"] if "prompt" in row else ((USER, text_of(row, "question")),)
    placeholders = sum(text.count(IMAGE_TOKEN) for _, text in turns)
    if [role for role, _ in turns] == [USER] and (images == 1 or placeholders in (0, images)):
        question = without_image_tokens(turns[0][1], images) if placeholders else turns[0][1]
        if IMAGE_TOKEN not in question or placeholders > images:  # of one too many text_errors tells
            return question, ()
    if placeholders not in (0, images):
        raise ValueError(
            f"field {row.name('question')}: expected as many {IMAGE_TOKEN} as images, {images}, or none, got "
            f"{placeholders}"
        )
    if images and not placeholders:
        first = next(number for number, (role, _) in enumerate(turns) if role == USER)
        turns = (*turns[:first], (USER, IMAGE_TOKEN * images + turns[first][1]), *turns[first + 1 :])
    return turns[-1][1].replace(IMAGE_TOKEN, "").strip(), tuple(turns)


def _context(row: NamedRow) -> str | None:
    """The field `context` without white space at its end; None where nothing is left."""
    return text_of(row, "context").rstrip() or None if row.get("context") is not None else None


def _second_image(row: dict[str, Any]) -> str | None:
    """The path in `rejected_images`: text, or a list of one text or of one {"path": text}, as ms-swift has it."""
    value = row.get("rejected_images")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, dict):
        value = value.get("path")
    if value is None and row.get("rejected_images") in (None, []):
        return None
    if not isinstance(value, str) or not value:
        got = repr(row.get("rejected_images"))[:60]
        raise ValueError(f"field rejected_images: expected one image path, or a list of one, got {got}")
    return value


def id_of_row(row: dict[str, Any]) -> str | None:
    """The row's own id as text, None where it has none. Raises ValueError where it is no id."""
    name = next((name for name in ("idx", "id") if row.get(name) is not None), None)
    if name is None:
        return None
    value, field = row[name], row.name(name) if isinstance(row, NamedRow) else name
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).strip():
        raise ValueError(f"field {field}: expected an integer or text, got {repr(value)[:60]}")
    if not str(value).isascii() and has_half_character(str(value)):
        raise ValueError(f"field {field}: half of a surrogate pair, which is no character")
    return str(value)


def _kind_of_split(origin_split: Any) -> str:
    """RLAIF-V keeps the question's type inside a JSON text; any other origin_split names no kind."""
    try:
        fields = json_field("origin_split", origin_split)
    except ValueError:
        return ""
    kind = fields.get("type") if isinstance(fields, dict) else None
    return kind if isinstance(kind, str) else ""


def _numbers(name: str, values: Any) -> tuple[float, ...]:
    numeric = isinstance(values, list) and all(type(value) in (int, float) for value in values)
    if not numeric or not all(-sys.float_info.max <= value <= sys.float_info.max for value in values):
        raise ValueError(f"field {name}: expected a list of finite numbers, got {str(values)[:60]}")
    return tuple(float(value) for value in values)


def _reference(value: Any) -> ReferenceLogps | None:
    """Released layout: win sum, win average, win per token, then the same of rej; bare or under `logps`."""
    if value is None:
        return None
    fields = json_field("logps", value)
    fields = fields.get("logps") if isinstance(fields, dict) else fields
    if not isinstance(fields, list) or len(fields) != 6:
        found = f"{len(fields)} of them" if isinstance(fields, list) else type(fields).__name__
        raise ValueError(f"field logps: expected six entries (sum, average, per token; twice), got {found}")
    return ReferenceLogps(*_numbers("logps", [fields[0], fields[3]]))


def _clip_scores(row: dict[str, Any]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    names = ("chosen_logits", "rejected_logits")
    if all(row.get(name) is None for name in names):
        return None
    chosen, rejected = (_numbers(name, json_field(name, row.get(name))) for name in names)
    return chosen, rejected


# ----------------------------------------------------------------------------------------------------------- images


def distinct_images(pairs: Iterable[PreferencePair]) -> list[str]:
    """Relative paths of the pairs' own images in order of first use."""
    return list(dict.fromkeys(image for pair in pairs for image in pair.own_images))


def all_images(pairs: Iterable[PreferencePair]) -> list[str]:
    """Relative paths of all images, second ones included, in order of first use."""
    return list(dict.fromkeys(image for pair in pairs for image in pair.images))


def place_of(image: str, id_: str) -> str:
    """What a pair is held out with: its (first) image, or itself where it is of texts alone."""
    return image or f"text {id_}"


def image_digests(pairs: Sequence[PreferencePair], image_folder: ImageFolder, workers: int = 4) -> dict[str, str]:
    """First 16 hex digits of the SHA-256 of each distinct image's bytes, by relative path."""
    names = all_images(pairs)

    def digest(name: str) -> str:
        return hashlib.sha256(resolve_image(image_folder, name).read_bytes()).hexdigest()[:16]

    with ThreadPoolExecutor(max(1, workers)) as pool:
        return dict(zip(names, pool.map(digest, names), strict=True))


def pairs_fingerprint(pairs: Sequence[PreferencePair]) -> str:
    """A digest of every field of every pair, in order: another file, order or answer gives another one.

    It is `digest_of` the list of their fields, without the text of that list in memory.
    """
    encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
    digest = hashlib.sha256()
    for start, pair in zip(chain("[", repeat(",")), pairs):
        digest.update(f"{start}{encode(fields_of(pair))}".encode())
    digest.update(b"]" if pairs else b"[]")
    return digest.hexdigest()[:16]


def fields_of(pair: PreferencePair) -> list[Any]:
    """All fields as JSON values, in the dataclass's order.

    The last ones only as far as the pair has them, so that a pair keeps the fingerprint that earlier versions gave it.
    """
    reference = pair.reference and (pair.reference.chosen, pair.reference.rejected)
    texts = [pair.id, pair.image, pair.question, pair.chosen, pair.rejected, pair.kind, pair.source]
    fields = [*texts, reference, pair.clip_scores]
    if pair.more_images or pair.conversation:
        return [*fields, pair.second_image, pair.second, pair.context, pair.more_images, pair.conversation]
    if pair.context is not None:
        return [*fields, pair.second_image, pair.second, pair.context]
    return fields if pair.second_image is None and pair.second is None else [*fields, pair.second_image, pair.second]


# ----------------------------------------------------------------------------------------------------------- checks


def check_pairs(
    pairs: Sequence[PreferencePair],
    image_folder: ImageFolder,
    on_bad_image: str = "fail",
    *,
    subject: str = "pairs",
    errors: Sequence[str] = (),
    workers: int = 4,
    progress: bool = False,
    images: tuple[dict[str, str], dict[str, str]] | None = None,
    texts: bool = True,
) -> tuple[list[PreferencePair], list[SkippedPair]]:
    """Good pairs, and those left out because their image is missing or unreadable (only with on_bad_image="skip").

    All other problems are errors always: empty or equal answers, duplicate ids, image placeholders inside the text,
    image paths that leave the folder. Raises PairsError with every error in one message, after `errors` known before;
    `subject` heads it. `images` are the reasons that `find_image_errors` gives, where they are known already; without
    `texts` the errors of `all_text_errors` are among `errors`.
    """
    if on_bad_image not in ("fail", "skip"):
        raise ValueError(f"on_bad_image: expected fail or skip, got {on_bad_image!r}")
    validate_folders(image_folder)
    errors = [*errors, *(all_text_errors(pairs) if texts else [])]
    outside, bad = images or find_image_errors(all_images(pairs), image_folder, workers, progress)
    blocking = outside if on_bad_image == "skip" else outside | bad
    errors += [_error(pair, blocking[name], name) for pair in pairs for name in pair.images if name in blocking]
    if errors:
        remedies = [FILE_REMEDY, *image_remedies(len(bad) if on_bad_image == "fail" else 0, len(all_images(pairs)))]
        raise PairsError(error_list(subject, errors, "; ".join(remedies)))
    if not bad and pairs:
        return list(pairs), []
    first_bad = [(pair, next((name for name in pair.images if name in bad), None)) for pair in pairs]
    good = [pair for pair, name in first_bad if name is None]
    skipped = [SkippedPair(pair.id, f"{bad[name]}: {name}") for pair, name in first_bad if name is not None]
    if not good:
        reasons = [f"row {skip.id}: {skip.reason}" for skip in skipped]
        raise PairsError(error_list(subject, reasons, "no pair is left; is this the right image folder?"))
    return good, skipped


def image_remedies(bad: int, every: int) -> list[str]:
    """What helps where `bad` of all, `every`, images are missing or unreadable."""
    if not bad:
        return []
    wrong = ["is this the right --image_folder? None of its images can be used"] if bad == every > 1 else []
    return [*wrong, "--on_bad_image skip leaves out rows whose image is missing or unreadable"]


def validate_folders(image_folder: ImageFolder) -> None:
    """Raise PairsError naming an image folder that does not exist."""
    for folder in missing_folders(image_folder):
        remedy = "give the folder the image paths start from"
        raise PairsError(f"image folder {folder}: no such folder\nRemedy: {remedy}")


def all_text_errors(pairs: Sequence[PreferencePair]) -> list[str]:
    """Ids that several pairs have, then what is wrong with each pair's texts."""
    return [*_duplicate_errors(pairs), *(_error(pair, reason) for pair in pairs for reason in text_errors(pair))]


def _error(pair: PreferencePair, reason: str, image: str = "") -> str:
    return f"row {pair.id} (image {image or pair.image}): {reason}"


def _duplicate_errors(pairs: Sequence[PreferencePair]) -> list[str]:
    counts = Counter(pair.id for pair in pairs)
    return [f"id {id_!r} is used by {count} rows, expected one" for id_, count in counts.items() if count > 1]


def text_errors(pair: PreferencePair) -> Iterator[str]:
    """Why its texts make no preference pair: empty or equal to a reader's eye, or with a placeholder inside."""
    answers = {"chosen": pair.chosen, "rejected": pair.rejected}
    if pair.second is not None:
        answers["second"] = pair.second
    seen = {name: visible_text(answer) for name, answer in answers.items()}
    for name, answer in answers.items():
        if not seen[name]:
            yield f"the {name} answer is empty" + (", it has invisible characters only" if answer.strip() else "")
    if seen["chosen"] and seen["chosen"] == seen["rejected"]:
        differ = "" if pair.chosen.strip() == pair.rejected.strip() else " but for what cannot be seen"
        yield f"chosen and rejected answer are equal{differ}, so there is no preference to learn"
    if not visible_text(pair.question):
        yield "the question is empty"
    for name, text in {"question": pair.question, "context": pair.context or "", **answers}.items():
        if IMAGE_TOKEN in text:
            yield f"{name}: {IMAGE_TOKEN} inside the text would be read as one more image"
