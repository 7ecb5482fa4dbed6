"""CHAIR on COCO (Rohrbach et al. 2018): which objects do detailed descriptions of COCO images name that are not there?

    data = load(folder)                                     # POPE's 500 images, or image_ids=FILE
    score(data, answers); format_table({name: score})

CHAIRs is the share of captions with such an object, CHAIRi the share of such mentions among all mentions, every
occurrence counted; recall the share of the objects in the images that are named. Papers choose 500 images by different
seeds, so the digest of the list is part of the protocol, and figures of different lists are refused as not comparable.
Words are matched with the original synonym list by the rules of eval.core.objects. Different from the original on
purpose: a caption that names no object is no error, a metric with denominator 0 is None.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dama.console import digest_of
from dama.errors import error_list
from eval.core.benchmark import Benchmark, Mode, Part, SummaryColumn, TradeOff
from eval.core.metrics import Metric
from eval.core.objects import ObjectVocabulary, ground_truth_from_coco
from eval.core.official import raise_errors, read_json
from eval.core.scores import Score, Table, TableColumn, score_items
from eval.core.sources import (
    CAPTIONS,
    COCO_ANNOTATIONS,
    COCO_FOLDER,
    COCO_NAME,
    COCO_SOURCE,
    GITHUB_RAW,
    INSTANCES,
    File,
    ImageSource,
    coco_urls,
    files_of,
    members,
)
from eval.core.types import Answer, BenchmarkData, Parts, Question, Record, record_of
from eval.pope import IMAGES_FILE

PROMPT = "Please describe this image in detail."
DECODING: dict[str, Any] = {"num_beams": 1, "temperature": 0.0}
LENGTHS = (512, 128, 64)  # new tokens, as papers have them

_ID = re.compile(r"(?:.*[_/-])?0*(\d+?)(?:\.\w+)?")  # a COCO id, or the name of its image
_FOLDER = "chair_coco"
_TRUTH, _TRUTH_OF_ALL = f"{_FOLDER}/gt_objects_val2014.json", f"{_FOLDER}/coco2014_gt_objects_chair.json.gz"


# ---------------------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True, kw_only=True)
class Chair(BenchmarkData):
    """A question's id is its image's COCO id. ground_truth: id -> the nodes in the image, possibly none."""

    ground_truth: Mapping[str, frozenset[str]]
    vocabulary: ObjectVocabulary
    mode: str

    @property
    def images_digest(self) -> str:
        """First 8 hexadecimal digits of the digest of the image ids; their order does not count."""
        return digest_of(sorted(int(question.id) for question in self.questions))[:8]


def load(folder: str | Path, mode: str = "512", image_ids: str | Path | Iterable[int] | None = None) -> Chair:
    """Read synonyms and ground truth in folder/chair_coco; images are in folder/coco/val2014.

    mode: new tokens. image_ids: COCO ids, or a file of them, one per line or as a JSON list, or as names of images;
    those of POPE if None. Raises ValueError, naming file and fields, also for ids that repeat or have no ground truth.
    """
    source = Path(folder) / _FOLDER
    synonyms = source / "synonyms.txt"
    raise_errors(synonyms, [] if synonyms.is_file() else ["missing"])
    vocabulary = ObjectVocabulary.from_synonym_lines(synonyms.read_text(encoding="utf-8").splitlines())
    path = Path(folder) / IMAGES_FILE.path if image_ids is None else image_ids
    ids = read_ids(path) if isinstance(path, (str, Path)) else [int(id_) for id_ in path]
    where = Path(path) if isinstance(path, (str, Path)) else Path("image ids")
    _raise_errors(where, [f"{id_} is listed twice" for id_, count in Counter(ids).items() if count > 1])
    truth = _read_truth(Path(folder), ids, vocabulary)
    questions = tuple(
        Question(str(id_), COCO_NAME.format(id_), PROMPT, ", ".join(sorted(truth[str(id_)]))) for id_ in ids
    )
    return Chair(questions, "", Path(folder) / COCO_FOLDER, ground_truth=truth, vocabulary=vocabulary, mode=mode)


def read_ids(path: str | Path) -> list[int]:
    """Read COCO ids: numbers or image names, one per line, a JSON list of these, or lines of objects with "image".

    An image that several lines of objects are about counts once. Raises ValueError that names the line.
    """
    path = Path(path)
    raise_errors(path, [] if path.is_file() else ["missing"])  # by default POPE's
    text = path.read_text(encoding="utf-8").strip()
    listed = json.loads(text) if text.startswith("[") else text.splitlines()
    if text.startswith("{"):
        listed = list(dict.fromkeys(json.loads(line)["image"] for line in listed))
    found = [_ID.fullmatch(str(entry).strip()) for entry in listed]
    errors = [f"entry {number}: expected a COCO id or the name of an image, got {str(entry)[:60]!r}"
              for number, (entry, match) in enumerate(zip(listed, found), 1) if match is None]  # fmt: skip
    _raise_errors(path, errors if listed else ["expected image ids, got none"])
    return [int(match[1]) for match in found if match is not None]


def id_of(row: Mapping[str, Any], data: Chair | None = None) -> str | None:
    """Return the id of a caption by its image, None without one."""
    del data
    found = [
        _ID.fullmatch(str(row[name])) for name in ("image_id", "question_id", "image") if row.get(name) is not None
    ]
    return next((str(int(match[1])) for match in found if match is not None), None)


def _raise_errors(path: Path, errors: Sequence[str]) -> None:
    if errors:
        raise ValueError(error_list(str(path), errors, "correct the list of images"))


def _read_truth(folder: Path, ids: Iterable[int], vocabulary: ObjectVocabulary) -> dict[str, frozenset[str]]:
    """Read id -> nodes of these images from the file made of COCO's annotations, or from that of all images."""
    path, packed = folder / _TRUTH, folder / _TRUTH_OF_ALL
    if packed.is_file() and not path.is_file():
        path, rows = packed, json.loads(gzip.decompress(packed.read_bytes()))
    else:
        rows = read_json(path)
    raise_errors(path, [] if isinstance(rows, dict) else [f"expected an object, got {type(rows).__name__}"])
    errors = []
    for id_ in ids:
        nodes = rows.get(str(id_))
        if not isinstance(nodes, list):
            errors.append(f"image {id_}: expected a list of its objects, got {nodes!r}")
        elif unknown := sorted(set(nodes) - vocabulary.nodes):
            errors.append(f"image {id_}: {unknown} are no nodes of synonyms.txt")
    raise_errors(path, errors)
    return {str(id_): frozenset(rows[str(id_)]) for id_ in ids}


# -------------------------------------------------------------------------------------------------------------- score

METRICS = (
    Metric("chairs", "CHAIRs %", "lower"),
    Metric("chairi", "CHAIRi %", "lower"),
    Metric("recall", "recall %"),
    Metric("mean_words", "mean words", None),
)


def score(data: Chair, answers: Iterable[Answer]) -> Score:
    """Compute CHAIRs, CHAIRi and recall in percent, and the mean length in words."""
    items = [_record(question, answer, data) for question, answer in data.answered(answers)]
    counts = {
        "captions without object": sum(not item["mentions"] for item in items),
        "mentions": sum(len(item["mentions"]) for item in items),
    }
    protocol = f"chair-{data.mode}, {len(data.questions)} images {data.images_digest}"
    return score_items(protocol, METRICS, items, data.questions, counts=counts)


def _record(question: Question, answer: Answer, data: Chair) -> Record:
    truth, mentions = data.ground_truth[question.id], data.vocabulary.mentions(answer.text)
    wrong = [mention for mention in mentions if mention.node not in truth]
    found = truth & {mention.node for mention in mentions}
    parts: Parts = {
        "chairs": [100.0 * bool(wrong), 1.0],
        "chairi": [100.0 * len(wrong), float(len(mentions))],
        "recall": [100.0 * len(found), float(len(truth))],
        "mean_words": [float(len(answer.text.split())), 1.0],
    }
    return record_of(
        question,
        answer.text,
        wrong=bool(wrong),
        parts=parts,
        truth=sorted(truth),
        spans=[[mention.start, mention.end] for mention in wrong],
        mentions=[
            {"surface": m.surface, "node": m.node, "start": m.start, "end": m.end, "correct": m.node in truth}
            for m in mentions
        ],
        missed=sorted(truth - found),
    )


format_table = Table(
    (
        TableColumn("chairs", "CHAIRs %", interval=True),
        TableColumn("chairi", "CHAIRi %", interval=True),
        TableColumn("recall", "recall %", interval=True),
        TableColumn("mean_words", "mean words", interval=True),
    ),
    unparsed=False,
)


# ---------------------------------------------------------------------------------------------------------- benchmark

_SOURCE = f"{GITHUB_RAW}/LisaAnne/Hallucination/6e4d33c4bedf6dfcd24c61bf527f40714717be47/data"
_SYNONYMS = {"synonyms.txt": (3577, "b685537b36fe21b791c87151b96a991ceb582edff19f3da204dcc7a7905502f2")}


def _make_ground_truth(package: Path, data: Path) -> bytes:
    """Return id -> the objects in the image, of all images of val2014, from COCO's annotations."""
    lines = (data / f"{_FOLDER}/synonyms.txt").read_text(encoding="utf-8").splitlines()
    contents = {name: json.loads(content) for name, content in members(package, (INSTANCES, CAPTIONS))}
    images = [row["id"] for row in contents[INSTANCES]["images"]]
    vocabulary = ObjectVocabulary.from_synonym_lines(lines)
    objects = ground_truth_from_coco(contents[INSTANCES], contents[CAPTIONS], images, vocabulary)
    return json.dumps({str(image): found for image, found in objects.items()}).encode()


def _image_urls(data: Path) -> dict[str, str]:
    return coco_urls(COCO_NAME.format(id_) for id_ in read_ids(data / IMAGES_FILE.path))


def _url_of(name: str) -> str:
    return coco_urls([name])[name]


BENCHMARK = Benchmark(
    name="chair",
    title="CHAIR on COCO",
    wrong="names an object that is not in the image",
    files=(
        *files_of(_FOLDER, _SOURCE, _SYNONYMS),
        File(_TRUTH, package=COCO_ANNOTATIONS, make=_make_ground_truth, instead=_TRUTH_OF_ALL),
        IMAGES_FILE,
    ),
    images=ImageSource(COCO_FOLDER, _image_urls, COCO_SOURCE, url_of=_url_of),
    load=load,
    parts=(Part(DECODING),),
    score=score,
    metrics=METRICS,
    columns=(
        SummaryColumn("chairs", "CHAIRs"),
        SummaryColumn("chairi", "CHAIRi", rim=50),
        SummaryColumn("recall", "CHAIR recall"),
        SummaryColumn("mean_words", "CHAIR words", rim=None),
    ),
    modes=tuple(
        Mode(
            str(tokens),
            f"captions of at most {tokens} tokens",
            answers="answers" if tokens == LENGTHS[0] else f"answers_{tokens}",
            quirks=False,
            decoding={"max_new_tokens": tokens},
        )
        for tokens in LENGTHS
    ),
    trade_off=TradeOff("recall", ("chairs", "chairi")),
    table=format_table,
    published_file=Path(__file__).with_name("chair_published.json"),
    id_of=id_of,
    takes_image_ids=True,
)
