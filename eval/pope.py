"""POPE (Li et al. 2023): is there a ... in the image? Three splits of yes/no questions on 500 COCO pictures.

    pope = load(folder)                          # LLaVA's 2910 + 3000 + 3000 questions, or variant="official", 3 x 3000
    requests(pope), DECODING                     # for llava.eval.generate
    score(pope, answers); format_table({name: score})

Reading and counting are those of llava/eval/eval_pope.py. Different from the original on purpose: answers are joined by
id and not by order, and what says neither yes nor no is unparsed and right nowhere, instead of yes, which
`official_quirks` makes of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from eval.core.judge import QUIRKS
from eval.core.official import field_faults, refuse_faults
from eval.core.scores import Score, format_scores, mean, ratios, record, score_of
from eval.core.types import Answer, Benchmark, Question
from llava.eval.eval_pope import OFFSETS, count, official_reading, read_answer, read_lines

if TYPE_CHECKING:
    from llava.generation.request import Request

Variant = Literal["llava", "official"]

DECODING: dict[str, Any] = {"max_new_tokens": 128, "num_beams": 1, "temperature": 0.0}  # of llava.eval.generate
SPLITS = ("random", "popular", "adversarial")
SUFFIX = "\nAnswer the question using a single word or phrase."
RATIOS = ("accuracy", "precision", "recall", "f1", "yes_ratio")

_HOMES: dict[Variant, str] = {"llava": "pope/llava_variant", "official": "pope"}
_FIELDS = {"question_id": (int,), "image": (str,), "text": (str,), "label": (str,)}


@dataclass(frozen=True, kw_only=True)
class Pope(Benchmark):
    """The questions of all splits; a question's `kinds` is its split, its `truth` yes or no. No judge is asked."""

    variant: Variant


def load(folder: str | Path, variant: Variant = "llava") -> Pope:
    """coco_pope_SPLIT.json of folder/pope (official) or folder/pope/llava_variant, pictures in folder/coco/val2014.

    Questions are numbered over all splits as LLaVA's question file does. Raises ValueError, naming file and fields.
    """
    home = Path(folder) / _HOMES[variant]
    files = {split: home / f"coco_pope_{split}.json" for split in SPLITS}
    refuse_faults(home, [f"{file.name}: missing" for file in files.values() if not file.is_file()])
    questions = [question for split, file in files.items() for question in _read_split(split, file)]
    return Pope(tuple(questions), "", Path(folder) / "coco/val2014", variant=variant)


def _read_split(split: str, file: Path) -> list[Question]:
    rows = read_lines(file)
    faults = [fault for i, row in enumerate(rows) for fault in field_faults(f"record {i}", row, _FIELDS)]
    refuse_faults(file, faults)
    numbers = [row["question_id"] for row in rows]
    twice = len(numbers) - len(set(numbers))
    faults = [f"field 'question_id': {twice} numbers are used twice"] if twice else []
    faults += [
        f"record {i}: field 'label': expected yes or no, got {row['label']!r}"
        for i, row in enumerate(rows)
        if row["label"] not in ("yes", "no")
    ]
    refuse_faults(file, faults)
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


def requests(pope: Pope) -> list[Request]:
    """What the model is asked: the question with LLaVA's suffix."""
    return pope.requests()


def score(pope: Pope, answers: Iterable[Answer], *, official_quirks: bool = False) -> Score:
    """In percent: RATIOS of each split, named SPLIT_RATIO; yes is the positive class, the yes-ratio is the model's.

    mean_f1 and mean_accuracy are means over the three splits, undefined where one of them is.
    """
    read = official_reading if official_quirks else read_answer
    items = []
    for question, answer in pope.answered(answers):
        said, (split,) = read(answer.text), question.kinds
        counted = count([(said, question.truth)]).parts()
        parts = {f"{split}_{name}": [100.0 * counted[name][0], float(counted[name][1])] for name in RATIOS}
        wrong = None if said is None else said != question.truth
        items.append(record(question, answer, wrong=wrong, parts=parts, split=split, said=said))
    by_split = ratios(items, [f"{split}_{name}" for split in SPLITS for name in RATIOS])
    means = {f"mean_{name}": mean(by_split[f"{split}_{name}"] for split in SPLITS) for name in ("f1", "accuracy")}
    return score_of(f"pope-{pope.variant}" + QUIRKS * official_quirks, means | by_split, items, pope.questions)


def format_table(rows: Mapping[str, Score]) -> str:
    """One line per model: mean F1, then accuracy, F1 and yes-ratio of each split."""
    columns = {"mean_f1": ("mean F1", 2)}
    for split in SPLITS:
        titles = {"accuracy": f"{split} acc", "f1": "F1", "yes_ratio": "yes"}
        columns |= {f"{split}_{name}": (title, 2) for name, title in titles.items()}
    return format_scores(rows, columns)
