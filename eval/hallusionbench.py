"""HallusionBench (Guan et al. 2024): 1,129 yes/no questions on figures and edited figures, scored alone and in groups.

    data = load(folder)                                     # the questions, and the judge's prompt where it is there
    score(data, answers)                                    # hallusionbench-rules: the leading yes or no
    verdicts = JUDGE.ask(data, answers, JUDGE.settings(url), out)
    score(data, answers, verdicts)                          # hallusionbench-llm: a judge compares with the reference

178 questions on figures ("visual supplement") are also asked without the figure; there, not knowing is right. A group
is right where all its questions are. Different from the original on purpose: an empty answer is never sent to the
judge, so it cannot be "correct"; a failed request or an unreadable verdict is counted and in no metric instead of
"unclear"; a verdict is read by words, so that "not correct" is not correct. `official_quirks` does as the original.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import NoneType
from typing import Any, Literal

from dama.chat import ChatRequest
from dama.errors import error_list
from eval.core.benchmark import Benchmark, Mode, Part, SummaryColumn
from eval.core.judge import JudgeRun, after_thoughts
from eval.core.judged import Judge
from eval.core.metrics import Grouping, Metric
from eval.core.official import REMEDY, Fields, digest_of_text, raise_errors, read_json, read_records
from eval.core.record import RECORD, read_record
from eval.core.scores import QUIRKS, Score, Table, TableColumn, score_items
from eval.core.sources import GITHUB_RAW, File, ImageSource, archive_with, is_script
from eval.core.types import Answer, BenchmarkData, Parts, Question, Record, record_of
from eval.yes_no import read_leading

RULES, JUDGED = "hallusionbench-rules", "hallusionbench-llm"
DECODING: dict[str, Any] = {"max_new_tokens": 128, "num_beams": 1, "temperature": 0.0}
NO_IMAGE, ORIGINAL, EDITED = "without image", "original image", "edited image"

Verdict = Literal["correct", "incorrect", "unclear"]

_INPUTS = {"0": NO_IMAGE, "1": ORIGINAL, "2": EDITED}
_TRUTHS = {"0": "no", "1": "yes"}
_KEY = ("category", "subcategory", "set_id", "figure_id", "question_id")
_FIELDS: Fields = dict.fromkeys((*_KEY, "visual_input", "question", "gt_answer_details", "gt_answer"), (str,)) | {
    "filename": (str, NoneType)
}
_INDEX = re.compile(r"(?<![^_])V[DS]_[^_]+_\d+_\d+_\d+$")  # VLMEvalKit puts the benchmark's name before it
_QUESTIONS = "hallusionbench/HallusionBench.json"
_PROMPT = "prompts/hallusionbench_judge.txt"
_SCRIPT = "hallusionbench/utils.py"
_PROMPT_SHA256 = "bb0c7f8346a25581883a92126afb50d76606dc495b330897fc5ec348846511cd"  # of the text with its three slots
_SLOTS = ("{question}", "{gt_answer_details}", "{prediction}")


# ---------------------------------------------------------------------------------------------------------- questions


@dataclass(frozen=True, kw_only=True)
class HallusionBench(BenchmarkData):
    """A question's `kinds` are its category, subcategory and visual input; `context` is the reference answer."""


def load(folder: str | Path, mode: str = "rules") -> HallusionBench:
    """Read folder/hallusionbench/HallusionBench.json; both modes have the same questions.

    Images are in folder/hallusionbench/images. The judge's prompt is folder/prompts/hallusionbench_judge.txt, or is put
    together from the official script folder/hallusionbench/utils.py, which never runs; rules need none. Raises
    ValueError, naming file and fields.
    """
    del mode
    path = Path(folder) / _QUESTIONS
    rows = read_records(path, _FIELDS)
    times = Counter(map(_id_of, rows))
    errors = [f"question {id_!r}: {count} questions have this {', '.join(_KEY)}" for id_, count in times.items()
              if count > 1]  # fmt: skip
    errors += [error for number, row in enumerate(rows) for error in _row_errors(number, row)]
    raise_errors(path, errors)
    prompt = _judge_prompt(Path(folder))
    return HallusionBench(tuple(map(_question, rows)), prompt, Path(folder) / "hallusionbench/images")


def _id_of(row: Mapping[str, Any]) -> str:
    return "_".join(str(row[name]) for name in _KEY)


def id_of(row: Mapping[str, Any], data: Any = None) -> str | None:
    """Return the id of a row that has the official file's fields, or VLMEvalKit's index; None for another."""
    del data
    if all(name in row for name in _KEY):
        return _id_of(row)
    found = _INDEX.search(str(row.get("index", "")))
    return found[0] if found else None


def _row_errors(number: int, row: Mapping[str, Any]) -> list[str]:
    allowed = {"category": ("VD", "VS"), "visual_input": tuple(_INPUTS), "gt_answer": tuple(_TRUTHS)}
    errors = [
        f"record {number}: field {name!r}: expected one of {', '.join(values)}, got {row[name]!r}"
        for name, values in allowed.items()
        if row[name] not in values
    ]
    if (row["visual_input"] == "0") is not (row["filename"] is None):
        errors.append(f"record {number}: visual_input {row['visual_input']!r} with filename {row['filename']!r}")
    return errors


def _question(row: Mapping[str, Any]) -> Question:
    image = "" if row["filename"] is None else str(PurePosixPath(row["filename"]))  # "./VD/map/0_0.png" has no "./"
    kinds = (row["category"], row["subcategory"], _INPUTS[row["visual_input"]])
    return Question(
        _id_of(row), image, row["question"], _TRUTHS[row["gt_answer"]], kinds, context=row["gt_answer_details"]
    )


# -------------------------------------------------------------------------------------------------------------- judge


def _judge_prompt(folder: Path) -> str:
    """Return the official prompt with its slots, or one that downloads.json records; "" where there is none."""
    own, script = folder / _PROMPT, folder / _SCRIPT
    if not own.is_file() and not script.is_file():
        return ""
    path = own if own.is_file() else script
    text = path.read_text(encoding="utf-8")
    forms = (text, text.strip()) if path == own else (prompt_in(text),)
    recorded = read_record(folder / RECORD).get(_PROMPT, {}).get("sha256")  # of an edition such as TinyCOCO's
    for form in forms:
        if digest_of_text(form) in (_PROMPT_SHA256, recorded):
            return form
    raise ValueError(
        f"{path}: expected a judge's prompt of SHA-256 {_PROMPT_SHA256}, got {digest_of_text(forms[-1])}\n"
        f"Remedy: {REMEDY}"
    )


def prompt_in(script: str) -> str:
    """Put the prompt together that the official script builds piece by piece, with slots for what it fills in.

    The script is parsed and never run. "" where it has no such function.
    """
    for node in ast.walk(ast.parse(script)):
        if isinstance(node, ast.FunctionDef) and node.name == "evaluate_by_chatgpt":
            pieces = [each.value for each in ast.walk(node) if _builds_prompt(each)]  # type: ignore[attr-defined]
            return "".join(_piece(value) for value in pieces)
    return ""


def _builds_prompt(node: ast.AST) -> bool:
    """Whether the statement is `prompt = ...` or `prompt += ...`."""
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AugAssign) else []
    return any(isinstance(target, ast.Name) and target.id == "prompt" for target in targets)


def _piece(value: ast.expr) -> str:
    """Return a literal as it is, `sample["name"]` as the slot {name}, any other expression as the answer's slot."""
    if isinstance(value, ast.Constant):
        return str(value.value)
    index = value.slice if isinstance(value, ast.Subscript) else None
    return f"{{{index.value!s}}}" if isinstance(index, ast.Constant) else _SLOTS[-1]


def judge_requests(
    data: HallusionBench, answers: Iterable[Answer], *, official_quirks: bool = False
) -> list[ChatRequest]:
    """Ask about each answer that is not empty; the original asks about all. Raises ValueError without a prompt."""
    if not data.judge_prompt or any(data.judge_prompt.count(slot) != 1 for slot in _SLOTS):
        raise ValueError(
            f"HallusionBench: expected the judge's prompt with {', '.join(_SLOTS)} in {_PROMPT} or {_SCRIPT}, got "
            f"{data.judge_prompt[:60]!r}\nRemedy: {REMEDY}"
        )
    return [
        ChatRequest(question.id, ({"role": "user", "content": _filled(data.judge_prompt, question, answer)},))
        for question, answer in data.answered(answers)
        if official_quirks or answer.text.strip()
    ]


def _filled(template: str, question: Question, answer: Answer) -> str:
    """Fill all slots at once, so that braces in an answer stay braces."""
    texts = dict(zip(_SLOTS, (question.prompt, question.context, answer.text)))
    return re.sub("|".join(map(re.escape, texts)), lambda slot: texts[slot[0]], template)


_VERDICT = re.compile(r"\b(?:(not|isn['’]t)\s+)?(correct|incorrect|unclear)\b")


def parse(text: str) -> Verdict | None:
    """Read the one verdict that the reply gives; None where it gives none, or several."""
    found = {
        "incorrect" if negated and verdict == "correct" else None if negated else verdict
        for negated, verdict in _VERDICT.findall(after_thoughts(text).lower())
    }
    (verdict,) = found if len(found) == 1 else (None,)
    return verdict  # type: ignore[return-value]


def parse_official(text: str) -> Verdict:
    """Read as the original: "incorrect" anywhere, else "correct" anywhere, else unclear, also for an empty reply."""
    text = text.lower()
    return "incorrect" if "incorrect" in text else "correct" if "correct" in text else "unclear"


JUDGE = Judge(
    "gpt-4",
    temperature=0.0,
    max_tokens=16,
    requests=judge_requests,
    parse=parse,
    parse_official=parse_official,
    repeats=False,
)


# -------------------------------------------------------------------------------------------------------------- score


def _set_and_question(question: Question) -> str:
    """Name the pair group: the same question about all figures of a set."""
    set_, _, number = question.id.rsplit("_", 2)
    return f"{set_}_{number}"


def _figure(question: Question) -> str | None:
    """Name the figure; None for a question on a figure that is not shown."""
    return None if _may_be_unclear(question) else question.id.rsplit("_", 1)[0]


def _may_be_unclear(question: Question) -> bool:
    """Whether not knowing is right: the figure that the question is on is not shown."""
    return question.kinds[0] == "VS" and question.id.rsplit("_", 2)[1] == "0"


def _only(edited: bool, question: Question) -> str | None:
    """Name the pair group of questions on edited images, or of all others."""
    return _set_and_question(question) if (question.kinds[2] == EDITED) is edited else None


def _all_right(metric: str, records: Sequence[Record]) -> Parts:
    """100 where all answers are right; nothing where a verdict is missing that decides it."""
    rights = [record["right"] for record in records]
    return {} if None in rights and False not in rights else {metric: [100.0 * all(rights), 1.0]}


GROUPINGS = (
    Grouping("pairs", _set_and_question, partial(_all_right, "pair_accuracy")),
    Grouping("figures", _figure, partial(_all_right, "figure_accuracy")),
    Grouping("easy pairs", partial(_only, False), partial(_all_right, "easy_accuracy")),
    Grouping("hard pairs", partial(_only, True), partial(_all_right, "hard_accuracy")),
)
METRICS = (
    Metric("question_accuracy", "question accuracy %", decimals=2),
    Metric("pair_accuracy", "pair accuracy %", decimals=2),
    Metric("figure_accuracy", "figure accuracy %", decimals=2),
    Metric("easy_accuracy", "easy %", decimals=2),
    Metric("hard_accuracy", "hard %", decimals=2),
    Metric("vd_accuracy", "visual dependent %", decimals=2),
    Metric("vs_accuracy", "visual supplement %", decimals=2),
    Metric("yes_difference", "yes difference (points)", None, 2),
    Metric("false_positive_share", "false positives among wrong %", None, 2),
    Metric("mean_words", "mean words", None),
)


def score(
    data: HallusionBench,
    answers: Iterable[Answer],
    verdicts: JudgeRun | None = None,
    *,
    official_quirks: bool = False,
) -> Score:
    """Score by the leading yes or no, or from a judge's verdicts where they are given.

    In percent: accuracy over questions, over groups of all questions that share set and number (pair), figure, or that
    are a pair's part on edited images (hard) or on others (easy). yes_difference: share of yes among the answers that
    can be read minus the share among their truths. false_positive_share: share of yes among the wrong ones of these.
    Raises ValueError for an answer that the judge was not asked about.
    """
    answered = data.answered(answers)
    if verdicts is None:
        if official_quirks:
            raise ValueError(
                f"{RULES}: expected no official_quirks, got them; they are those of {JUDGED}\n"
                "Remedy: give the judge's verdicts, or leave them out"
            )
        items = [_by_rules(question, answer) for question, answer in answered]
        counts = {"unparsed": sum(item["said"] is None for item in items)}
        return score_items(RULES, METRICS, items, data.questions, groupings=GROUPINGS, counts=counts)
    given = _joined(answered, verdicts, official_quirks)
    read = parse_official if official_quirks else parse
    items = [_by_judge(question, answer, given.get(question.id), read) for question, answer in answered]
    return score_items(
        JUDGED + QUIRKS * official_quirks,
        METRICS,
        items,
        data.questions,
        groupings=GROUPINGS,
        counts=_judge_counts(verdicts, read),
        judge=verdicts.provenance(),
    )


def _by_rules(question: Question, answer: Answer) -> Record:
    said = read_leading(answer.text)
    verdict: Verdict = "unclear" if said is None else "correct" if said == question.truth else "incorrect"
    return _record(question, answer, verdict, said)


def _by_judge(question: Question, answer: Answer, reply: str | None, read: Callable[[str], Verdict | None]) -> Record:
    """Score from the reply of the judge, None where it gave none or was not asked, since the answer is empty."""
    empty = reply is None and not answer.text.strip()
    verdict = "unclear" if empty else read(reply or "")
    other = {"yes": "no", "no": "yes"}[question.truth]
    said = {"correct": question.truth, "incorrect": other}.get(verdict or "")
    shown = ["(not asked: the answer is empty)" if empty else reply or "(no reply)"]
    return _record(question, answer, verdict, said) | {"verdicts": shown}


def _record(question: Question, answer: Answer, verdict: Verdict | None, said: str | None) -> Record:
    """Return a record; `right` is None where there is no verdict, and then the answer is in no metric."""
    right = verdict and (verdict == "correct" or (verdict == "unclear" and _may_be_unclear(question)))
    undecided = verdict in (None, "unclear") and not right
    return record_of(
        question,
        answer.text,
        wrong=None if undecided else not right,
        parts=_parts(question, answer, right, said),
        kinds=list(question.kinds),
        context=question.context,
        right=right,
        said=said,
    )


def _parts(question: Question, answer: Answer, right: bool | None, said: str | None) -> Parts:
    parts: Parts = {"mean_words": [float(len(answer.text.split())), 1.0]}
    if right is not None:
        parts["question_accuracy"] = parts[f"{question.kinds[0].lower()}_accuracy"] = [100.0 * right, 1.0]
    if said is not None:
        parts["yes_difference"] = [100.0 * ((said == "yes") - (question.truth == "yes")), 1.0]
        parts["false_positive_share"] = [100.0 * (said == "yes" != question.truth), float(said != question.truth)]
    return parts


def _joined(answered: Sequence[tuple[Question, Answer]], run: JudgeRun, official_quirks: bool) -> dict[str, str | None]:
    """Return answer id -> reply of the judge. ValueError for either without the other."""
    replies = {verdict.id: verdict.text for verdict in run.verdicts}
    asked = {question.id for question, answer in answered if official_quirks or answer.text.strip()}
    errors = [f"answer {id_!r}: no verdict" for id_ in sorted(asked - replies.keys())]
    errors += [f"verdict on {id_!r}: there is no such answer" for id_ in sorted(replies.keys() - asked)]
    if errors:
        raise ValueError(error_list("verdicts", errors, "score the answers that the judge was asked about"))
    return replies


def _judge_counts(run: JudgeRun, read: Callable[[str], Verdict | None]) -> dict[str, int]:
    return {
        "verdicts": len(run.verdicts),
        "unparsed": sum(verdict.text is not None and read(verdict.text) is None for verdict in run.verdicts),
        "failed": sum(verdict.text is None for verdict in run.verdicts),
    }


format_table = Table(
    (
        TableColumn("question_accuracy", "question", 2),
        TableColumn("pair_accuracy", "pair", 2),
        TableColumn("figure_accuracy", "figure", 2),
        TableColumn("easy_accuracy", "easy", 2),
        TableColumn("hard_accuracy", "hard", 2),
        TableColumn("yes_difference", "yes diff", 2),
        TableColumn("false_positive_share", "FP share", 2),
        TableColumn("mean_words", "words"),
    ),
    note="no yes or no, or no clear verdict, and so not right",
)


# ---------------------------------------------------------------------------------------------------------- benchmark

_REPOSITORY = f"{GITHUB_RAW}/tianyi-lab/HallusionBench/main"  # the digest below says which version
_PACKAGE = File(
    "hallusionbench/hallusion_bench.zip",
    by_hand="by hand, from the Google Drive that the README of github.com/tianyi-lab/HallusionBench links to",
    check=archive_with(),
)


def _image_urls(data: Path) -> dict[str, str]:
    names = [row["filename"] for row in read_json(data / _QUESTIONS)]
    return {str(PurePosixPath(name)): "" for name in names if name is not None}


BENCHMARK = Benchmark(
    name="hallusionbench",
    title="HallusionBench",
    wrong="contradicts the labeled yes or no, or the reference answer",
    files=(
        File(
            _QUESTIONS,
            f"{_REPOSITORY}/HallusionBench.json",
            "ca6e0fb677dd56e5fb0e2700d06c58d01f8a6ae66e0f1773b2ac48c0a095d051",
            431987,
        ),
        File(_SCRIPT, f"{_REPOSITORY}/utils.py", instead=_PROMPT, judge_only=True, check=is_script),
    ),
    images=ImageSource(
        "hallusionbench/images", _image_urls, f"taken out of {_PACKAGE.path}, {_PACKAGE.source}", _PACKAGE
    ),
    load=load,
    parts=(Part(DECODING),),
    score=score,
    metrics=METRICS,
    columns=(
        SummaryColumn("question_accuracy", "HallusionB."),
        SummaryColumn("figure_accuracy", "HallusionB. fig.", rim=None),
        SummaryColumn("pair_accuracy", "HallusionB. pair", rim=None),
    ),
    modes=(
        Mode("rules", "the leading yes or no, no judge", quirks=False),
        Mode("llm", "a judge compares with the reference answer; not comparable with rules", judged=True),
    ),
    judge=JUDGE,
    stratum=lambda question: " ".join(question.kinds),
    table=format_table,
    published_file=Path(__file__).with_name("hallusionbench_published.json"),
    id_of=id_of,
)
