"""Read POPE's yes/no answers (Li et al. 2023), count them, and print LLaVA's metrics.

`python -m llava.eval.eval_pope --annotation-dir DIR --question-file Q.jsonl --result-file A.jsonl`
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dama.console import log, report_error
from dama.errors import error_list
from dama.pairs import read_rows

Reply = Literal["yes", "no"]

# LLaVA numbers the three splits' questions in one file: the split's own number plus a multiple of this.
NUMBERS_A_SPLIT = 10_000_000
OFFSETS = {"adversarial": 0, "random": NUMBERS_A_SPLIT, "popular": 2 * NUMBERS_A_SPLIT}

_YES, _NO = frozenset(("yes", "yeah", "yep")), frozenset(("no", "not", "none", "nope", "nothing"))
_WORD = re.compile(r"[^\W_]+(?:['\u2019][^\W_]+)?")

# Negations that are about knowing and not about the image; what cannot be seen is not there, an image is.
_ADVERBS = r"(?:\s+(?:\w+ly|quite|yet|even|so|very|too|100\s*%?|be|to|at|all|for|with|certainty))*"
_KNOWING = (
    r"(?:tell|say|saying|telling|determin\w*|know\w*|confirm\w*|verif\w+|answer\w*|judg\w+|decid\w+|ascertain\w*|assess\w*|"
    r"(?:identif\w+|discern\w*|make\s+out)(?!\s+(?:an?|any)\b)|sure|certain|help|assist|comply|provide|respond|process|interpret|analy\w+|"
    r"understand|recall|remember|conclude|guess|speculate|"
    r"(?:see|view|open|access|load|display|look\s+at)\s+(?:(?:the|this|that|any|an|your|attached|actual)\s+)*"
    r"(?:images?|pictures?|photos?|photographs?|files?|attachments?)\b)"
)
_UNKNOWN = re.compile(
    rf"\b(?:can't|cannot|can\s+not|couldn't|could\s+not|won't|will\s+not|wouldn't|would\s+not|"
    rf"(?:not|\w+n't)\s+(?:be\s+)?able|unable|(?:not|\w+n't)\s+possible|impossible|\w+n't\s+think\s+\w+\s+(?:can|could)){_ADVERBS}\s+{_KNOWING}"
    rf"|\b(?:not|\w+n't){_ADVERBS}\s+(?:sure|certain|clear|enough|sufficient|confident|positive|obvious|known|knowable|specified|"
    r"stated|determinable|determined|discernible|possible\s+to|able\s+to\s+(?:tell|say|see\s+(?:the|this|any)\s+image))\b"
    rf"|\b(?:don't|do\s+not|doesn't|does\s+not|didn't|did\s+not){_ADVERBS}\s+"
    r"(?:know|understand|recall|remember|have\s+(?:enough|sufficient|any\s+(?:idea|information|way)|access|the\s+ability)|"
    r"provide\s+(?:enough|sufficient|any)|(?:see|have)\s+(?:the|an|any|a)\s+(?:image|picture|photo)\b)"
    r"|\bno\s+(?:idea|clue|way\s+(?:to|of)|telling|saying|information|(?:clear\s+)?answer|opinion|comment|"
    r"(?:image|picture|photo)(?:\s+(?:is|was))?\s+(?:provided|attached|given))\b"
    r"|\b(?:\w+n't|not)\s+(?:have\s+|got\s+)*(?:an?|the|any)\s+(?:clue|idea|answer|opinion)\b"
    r"|\b(?:doesn't|does\s+not|didn't|did\s+not)\s+(?:say|specify|state|tell|allow|make\s+(?:it|that|this)\s+clear|"
    r"show\s+enough)\b"
    r"|\b(?:insufficient|inconclusive|inadequate)\b|\bnot\s+applicable\b"
    r"|\bthere\s+(?:is|are)\s+(?:an?\s+|some\s+)?(?:possib\w+|chance|uncertain\w*|ambigu\w+)"
    r"|\b(?:may|might|could|can)\s+be\s+(?:an?\s+)?(?:yes|no)\b"
    r"|\b(?:nothing|none)\s+(?:can|could)\s+be\s+(?:said|determined|told|concluded)\b"
)
_OR = r"(?:\s*[/|]\s*|,?\s+(?:or|and)\s+)"
_BOTH = re.compile(rf"\byes{_OR}no\b|\bno{_OR}yes\b|\bneither\s+(?:yes\s+nor\s+no|no\s+nor\s+yes)\b")
_DECIDED = re.compile(r"\b(?:yes|yeah|yep|no|nope|none|nothing)\b")


# -------------------------------------------------------------------------------------------------- reading answers


def read_answer(text: str) -> Reply | None:
    """What the first sentence says: its first "yes" or negation, or a plain "there is"; None where it says neither.

    Case does not count. "Yes, and it is not small." is yes, "There isn't." no, "A snowboard." and "" are None. So is a
    negation of knowing: "I can't tell.", "I'm not sure.", "No idea."; and "yes or no".
    """
    sentence = text.strip().split(".")[0].lower().replace("\u2019", "'")
    words = _WORD.findall(sentence)
    if is_undecided(sentence):
        return None
    for word in words:
        if word in _YES:
            return "yes"
        if word in _NO or word.endswith("n't"):
            return "no"
    return "yes" if words[:1] == ["there"] and words[1:2] in (["is"], ["are"]) else None


def is_undecided(sentence: str) -> bool:
    """Whether the first thing that a sentence, in lower case, says of yes or no is that it cannot say.

    "No, I'm not sure" has said no before.
    """
    decided = _DECIDED.search(sentence)
    unknown = _UNKNOWN.search(sentence)
    both = _BOTH.search(sentence)
    first = min((found.start() for found in (unknown, both) if found), default=None)
    return first is not None and (decided is None or first <= decided.start())


def official_reading(text: str) -> Reply:
    """As the original: no where "No", "no" or "not" is among the words before the first full stop, all else is yes."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


# ---------------------------------------------------------------------------------------------------------- counting


@dataclass(frozen=True)
class Counts:
    """Answers by what they say and by what is true; `unread` say neither and are right in no case."""

    tp: int = 0
    fp: int = 0
    tn: int = 0
    fn: int = 0
    unread_positive: int = 0  # of questions whose right answer is the positive one
    unread_negative: int = 0

    @property
    def unread(self) -> int:
        """Number of answers that are neither yes nor no."""
        return self.unread_positive + self.unread_negative

    @property
    def answers(self) -> int:
        """Number of answers."""
        return self.tp + self.fp + self.tn + self.fn + self.unread

    def parts(self) -> dict[str, tuple[int, int]]:
        """Metric -> (numerator, denominator). Both are sums over answers, so they may be added before dividing.

        F1 = 2 P R / (P + R) = 2 TP / (answered positive + truly positive).
        """
        said, true = self.tp + self.fp, self.tp + self.fn + self.unread_positive
        return {
            "accuracy": (self.tp + self.tn, self.answers),
            "precision": (self.tp, said),
            "recall": (self.tp, true),
            "f1": (2 * self.tp, said + true),
            "yes_ratio": (said, self.answers),
        }

    def ratios(self) -> dict[str, float | None]:
        """Metric -> value from 0 to 1, None where there is nothing to divide by."""
        return {name: above / below if below else None for name, (above, below) in self.parts().items()}


def count(pairs: Iterable[tuple[str | None, str]], positive: str = "yes") -> Counts:
    """Counts (what the answer says, what is true), either "yes" or "no", the first None where it cannot be read."""
    found = dict.fromkeys(Counts.__dataclass_fields__, 0)
    for said, true in pairs:
        if said is None:
            found["unread_positive" if true == positive else "unread_negative"] += 1
        else:
            found[("t" if said == true else "f") + ("p" if said == positive else "n")] += 1
    return Counts(**found)


def eval_pope(answers: Sequence[Mapping[str, Any]], label_file: str | Path, *, official_quirks: bool = False) -> Counts:
    """Prints and returns the figures of one split. answers: rows with question_id and text, in any order.

    They are joined to the labels by number (modulo NUMBERS_A_SPLIT), and where they say their prompt it must begin with
    the labelled question. Raises ValueError, naming every answer that belongs to no label or to another question.
    """
    labels = {int(row["question_id"]): row for row in read_lines(label_file)}
    given = {int(row["question_id"]) % NUMBERS_A_SPLIT: row for row in answers}
    errors = []
    for number, row in given.items():
        asked = str(row.get("prompt", "")).split("\n")[0]
        if number not in labels:
            errors.append(f"answer {row['question_id']}: no label has this number")
        elif asked and asked != labels[number]["text"]:
            errors.append(f"answer {row['question_id']}: to {asked!r}, but labelled is {labels[number]['text']!r}")
    if len(given) < len(answers):
        errors.append(f"{len(answers) - len(given)} answers more than numbers: some are answered twice")
    if errors:
        raise ValueError(error_list(str(label_file), errors, "give the answers to this file's questions"))
    read = official_reading if official_quirks else read_answer
    counts = count((read(str(row["text"])), labels[number]["label"]) for number, row in given.items())
    _say_figures(counts, missing=len(labels) - len(given))
    return counts


def _say_figures(counts: Counts, missing: int) -> None:
    figures = counts.ratios()
    log("TP\tFP\tTN\tFN\t")
    log(f"{counts.tp}\t{counts.fp}\t{counts.tn}\t{counts.fn}")
    titles = {"accuracy": "Accuracy", "precision": "Precision", "recall": "Recall", "f1": "F1 score",
              "yes_ratio": "Yes ratio"}  # fmt: skip
    for name, title in titles.items():
        log(f"{title}: {'n/a' if figures[name] is None else figures[name]}")
    order = ("f1", "accuracy", "precision", "recall", "yes_ratio")
    log(", ".join("n/a" if figures[name] is None else f"{figures[name]:.3f}" for name in order))
    if counts.unread or missing:
        log(f"Neither yes nor no: {counts.unread}, questions without answer: {missing}")


# ----------------------------------------------------------------------------------------------------------- command


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """The objects of a JSONL file, each with question_id. ValueError names the line that is none; or none is there."""
    rows = []
    for place, row in read_rows(path):
        if isinstance(row, ValueError) or not isinstance(row, dict) or row.get("question_id") is None:
            got = str(row)[:60]
            raise ValueError(f"{path}:{place.split()[-1]}: expected an object with question_id, got {got}")
        rows.append(row)
    if not rows:
        raise ValueError(f"{path}: expected one object with question_id a line, got an empty file")
    return rows


def run(args: argparse.Namespace) -> None:
    """The figures of every split that the annotation folder has a file of."""
    questions = {row["question_id"]: row for row in read_lines(args.question_file)}
    answers = read_lines(args.result_file)
    unknown = [row["question_id"] for row in answers if row["question_id"] not in questions]
    if unknown:
        raise ValueError(f"{args.result_file}: {len(unknown)} answers to no question of {args.question_file}, "
                         f"e.g. {unknown[0]}; give the question file that was answered")  # fmt: skip
    files = sorted(Path(args.annotation_dir).glob("coco_pope_*.json"))
    if not files:
        raise ValueError(f"{args.annotation_dir}: expected coco_pope_SPLIT.json files, got none")
    for file in files:
        split = file.stem.removeprefix("coco_pope_")
        chosen = [row for row in answers if questions[row["question_id"]]["category"] == split]
        log(f"Category: {split}, # samples: {len(chosen)}")
        eval_pope(chosen, file, official_quirks=args.official_quirks)
        log("====================================")


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.eval_pope", description=__doc__)
    parser.add_argument("--annotation-dir", type=str, help="folder with coco_pope_SPLIT.json")
    parser.add_argument("--question-file", type=str, help="JSONL with question_id and category")
    parser.add_argument("--result-file", type=str, help="JSONL with question_id and text")
    parser.add_argument("--official-quirks", action="store_true", help='what is not "no" is yes, as the original reads')
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    parser = build_parser()
    args = parser.parse_args(argv)
    # Not `required`, which LLaVA's flags are not; but nothing works without them.
    missing = [flag for flag in ("annotation_dir", "question_file", "result_file") if getattr(args, flag) is None]
    if missing:
        parser.error("expected " + ", ".join(f"--{flag.replace('_', '-')}" for flag in missing))
    try:
        run(args)
    except Exception as error:
        report_error(error, "eval_pope")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
