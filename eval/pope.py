"""POPE (Li et al. 2023): is there a ... in the image? Three splits of yes/no questions on 500 COCO images.

    pope = load(folder)                          # LLaVA's 2910 + 3000 + 3000 questions, or mode "official", 3 x 3000
    score(pope, answers); format_table({name: score})

Reading and counting are those of llava/eval/eval_pope.py. Different from the original on purpose: answers are joined by
id and not by order, and an answer that is neither yes nor no is unparsed and right in no metric, instead of yes, which
`official_quirks` makes of it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.core.benchmark import Benchmark, Mode, Part, SummaryColumn
from eval.core.metrics import Metric
from eval.core.official import field_errors, raise_errors
from eval.core.scores import QUIRKS, Score, Table, TableColumn, score_items
from eval.core.sources import COCO_FOLDER, COCO_SOURCE, GITHUB_RAW, ImageSource, coco_urls, files_of
from eval.core.types import Answer, BenchmarkData, Question, record_of
from llava.eval.eval_pope import OFFSETS, count, official_reading, read_answer, read_lines

DECODING: dict[str, Any] = {"max_new_tokens": 128, "num_beams": 1, "temperature": 0.0}
SPLITS = ("random", "popular", "adversarial")
SUFFIX = "\nAnswer the question using a single word or phrase."
RATIOS = ("accuracy", "precision", "recall", "f1", "yes_ratio")

_FOLDERS = {"llava": "pope/llava_variant", "official": "pope"}
_FIELDS = {"question_id": (int,), "image": (str,), "text": (str,), "label": (str,)}


@dataclass(frozen=True, kw_only=True)
class Pope(BenchmarkData):
    """The questions of all splits; a question's `kinds` is its split, its `truth` yes or no. No judge is asked."""

    mode: str


def load(folder: str | Path, mode: str = "llava") -> Pope:
    """Read coco_pope_SPLIT.json of folder/pope (official) or folder/pope/llava_variant (llava).

    Questions are numbered over all splits as LLaVA's question file does. Raises ValueError, naming file and fields.
    """
    source = Path(folder) / _FOLDERS[mode]
    files = {split: source / f"coco_pope_{split}.json" for split in SPLITS}
    raise_errors(source, [f"{file.name}: missing" for file in files.values() if not file.is_file()])
    questions = [question for split, file in files.items() for question in _read_split(split, file)]
    return Pope(tuple(questions), "", Path(folder) / COCO_FOLDER, mode=mode)


def id_of(row: Mapping[str, Any], data: Any = None) -> str | None:
    """Return the id of a row that has its split as `category`, or its place in lmms-eval's order of the splits."""
    del data
    number, split = str(row.get("question_id")), row.get("category")
    if split is None and isinstance(row.get("doc_id"), int):
        split = ("adversarial", "popular", "random")[min(row["doc_id"] // 3000, 2)]
    return str(OFFSETS[split] + int(number)) if split in SPLITS and number.isdigit() else None


def _read_split(split: str, file: Path) -> list[Question]:
    rows = read_lines(file)
    raise_errors(file, [error for i, row in enumerate(rows) for error in field_errors(f"record {i}", row, _FIELDS)])
    numbers = [row["question_id"] for row in rows]
    twice = len(numbers) - len(set(numbers))
    errors = [f"field 'question_id': {twice} numbers are used twice"] if twice else []
    errors += [
        f"record {i}: field 'label': expected yes or no, got {row['label']!r}"
        for i, row in enumerate(rows)
        if row["label"] not in ("yes", "no")
    ]
    raise_errors(file, errors)
    return [
        Question(
            id=str(OFFSETS[split] + row["question_id"]),
            image=row["image"],
            prompt=row["text"] + SUFFIX,
            truth=row["label"],
            kinds=(split,),
        )
        for row in rows
    ]


# -------------------------------------------------------------------------------------------------------- scoring


def _mean_of(ratio: str, title: str) -> Metric:
    """The mean of a ratio over the splits, undefined where one of them is."""
    inputs = tuple(f"{split}_{ratio}" for split in SPLITS)
    return Metric(f"mean_{ratio}", title, decimals=2, inputs=inputs, formula=lambda *splits: sum(splits) / len(splits))


METRICS = (
    _mean_of("f1", "mean F1"),
    _mean_of("accuracy", "mean accuracy"),
    *(
        Metric(f"{split}_{ratio}", f"{split} {title}", None if ratio == "yes_ratio" else "higher", 2)
        for split in SPLITS
        for ratio, title in zip(RATIOS, ("accuracy", "precision", "recall", "F1", "yes ratio"))
    ),
)


def score(pope: Pope, answers: Iterable[Answer], *, official_quirks: bool = False) -> Score:
    """Compute, in percent, RATIOS of each split, named SPLIT_RATIO, and the means of F1 and accuracy over the splits.

    Yes is the positive class; the yes ratio is the model's.
    """
    read = official_reading if official_quirks else read_answer
    items = []
    for question, answer in pope.answered(answers):
        reply, (split,) = read(answer.text), question.kinds
        counted = count([(reply, question.truth)]).parts()
        parts = {f"{split}_{name}": [100.0 * counted[name][0], float(counted[name][1])] for name in RATIOS}
        wrong = None if reply is None else reply != question.truth
        items.append(record_of(question, answer.text, wrong=wrong, parts=parts, split=split, said=reply))
    return score_items(f"pope-{pope.mode}" + QUIRKS * official_quirks, METRICS, items, pope.questions)


format_table = Table(
    (
        TableColumn("mean_f1", "mean F1", 2),
        *(
            TableColumn(f"{split}_{ratio}", title, 2)
            for split in SPLITS
            for ratio, title in (("accuracy", f"{split} acc"), ("f1", "F1"), ("yes_ratio", "yes"))
        ),
    ),
    note="unparsed, right in no metric, which lowers accuracy and recall",
)


# ------------------------------------------------------------------------------------------------------- benchmark

_REPOSITORY = f"{GITHUB_RAW}/RUCAIBox/POPE"
_OFFICIAL = f"{_REPOSITORY}/3df3ba1b110ecce25696989577fad583b67d4239/output/coco"
_OF_LLAVA = f"{_REPOSITORY}/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"


_FILES = files_of(
    "pope",
    _OFFICIAL,
    {
        "coco_pope_random.json": (368166, "ac25245170b975a5bdf9080b23fd431dfe6be458bc038259c1f4f09a6bef7994"),
        "coco_pope_popular.json": (370190, "72c1a8ad45d0c13514f5f22598261df41d3b533854d29682e924db50ed8aa753"),
        "coco_pope_adversarial.json": (370401, "420b3407db1fa9f1187a805dca41cb7b97fd91504e6c2179706188c107fb8ef8"),
    },
)
IMAGES_FILE = _FILES[0]  # names the 500 images


def _image_urls(data: Path) -> dict[str, str]:
    # The file is called .json and has one question per line; all splits and modes are about the same 500 images.
    lines = (data / IMAGES_FILE.path).read_text(encoding="utf-8").splitlines()
    return coco_urls(json.loads(line)["image"] for line in lines)


BENCHMARK = Benchmark(
    name="pope",
    title="POPE",
    wrong="is not the labeled yes or no",
    files=(
        *_FILES,
        *files_of(
            "pope/llava_variant",
            _OF_LLAVA,
            {
                "coco_pope_random.json": (360212, "c16b65d2df6d70bb0814c8a4375833d39cdb09928fd936d3fc546491efa37f35"),
                "coco_pope_popular.json": (370234, "5b16653023bf4f64d57eb0d168259de6627f5cde7538b85ebed3cc33034aa6cc"),
                "coco_pope_adversarial.json": (
                    370459,
                    "1d8f0906a9b50c05640f6f23abfac97523be2a1bed28f7eadc63b811699b2d26",
                ),
            },
        ),
    ),
    images=ImageSource(COCO_FOLDER, _image_urls, COCO_SOURCE),
    load=load,
    parts=(Part(DECODING),),
    score=score,
    metrics=METRICS,
    columns=(SummaryColumn("mean_f1", "POPE F1"),),
    modes=(Mode("llava", "8,910 questions"), Mode("official", "9,000 questions", answers="answers_official")),
    stratum=lambda question: question.kinds[0],
    table=format_table,
    id_of=id_of,
    published_file=Path(__file__).with_name("pope_published.json"),
)
