"""LLaVA-Bench (In-the-Wild; Liu et al. 2023): 60 questions; a judge compares each answer with text-only GPT-4's.

    data = load(folder)                                     # questions and the official judge prompt
    verdicts = JUDGE.ask(data, answers, JUDGE.settings(url), out)    # or replay(out, judge_requests(...))
    score(data, answers, verdicts); format_table({name: score})

Different from the original scorer on purpose: questions, contexts, references and answers are joined by id and not line
by line, an interrupted run is resumed by content and not by count, and a review without readable scores is counted and
in no mean instead of (-1, -1). `official_quirks` averages (-1, -1) in, and reads scores as narrowly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from dama.chat import ChatRequest
from eval.core.benchmark import Benchmark, Mode, Part, SummaryColumn
from eval.core.judge import JudgeRun, Verdict, after_thoughts
from eval.core.judged import Judge, score_verdicts
from eval.core.metrics import Metric
from eval.core.official import digest_of_text, raise_errors, read_json, read_records
from eval.core.scores import Score, Table, TableColumn
from eval.core.sources import GITHUB_RAW, File, ImageSource, files_of, rows_with
from eval.core.types import Answer, BenchmarkData, Parts, Question

PROTOCOL = "llava-bench-in-the-wild"
DECODING: dict[str, Any] = {"max_new_tokens": 1024, "num_beams": 1, "temperature": 0.0}
KINDS = ("conv", "detail", "complex")

Scores = tuple[float, float]
"""The judge's scores of the reference and of the answer, 1 to 10."""

_PREFIX = "llava_bench_"
_RULE_SHA256 = "2ce22b562d6008864970ea863ac8a4d385ea6f2e64ab1313a23f825202a9529d"
_SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
_QUESTION = {"question_id": (int, str), "image": (str,), "text": (str,), "category": (str,)}
_CONTEXT = {"image": (str,), "caption": (str, list)}
_REFERENCE = {"question_id": (int, str), "text": (str,)}
_REVIEW = {"question_id": (int, str), "content": (str,)}
_TWO_NUMBERS = re.compile(r"[\s*|]*(\d+(?:\.\d+)?)[\s,;|*]+(\d+(?:\.\d+)?)[\s.*|]*")


def load(folder: str | Path, mode: str = "") -> BenchmarkData:
    """Read questions.jsonl, context.jsonl, answers_gpt4.jsonl and rule.json in folder/llava_bench. There is one mode.

    Raises ValueError, naming file and fields, also where a question has no context or no reference answer.
    """
    del mode
    source = Path(folder) / "llava_bench"
    path = source / "questions.jsonl"
    rows = read_records(path, _QUESTION)
    contexts = {row["image"]: row["caption"] for row in read_records(source / "context.jsonl", _CONTEXT)}
    references = {str(r["question_id"]): r["text"] for r in read_records(source / "answers_gpt4.jsonl", _REFERENCE)}
    errors, ids = [], [str(row["question_id"]) for row in rows]
    for i, (row, id_) in enumerate(zip(rows, ids)):
        if id_ in ids[:i]:
            errors.append(f"record {i}: field 'question_id': {id_!r} is used before")
        if row["category"].removeprefix(_PREFIX) not in KINDS:
            errors.append(f"record {i}: field 'category': expected one of {', '.join(KINDS)}, got {row['category']!r}")
        if row["image"] not in contexts:
            errors.append(f"record {i}: field 'image': {row['image']!r} is not in context.jsonl")
        if id_ not in references:
            errors.append(f"record {i}: field 'question_id': {id_!r} is not in answers_gpt4.jsonl")
    raise_errors(path, errors)
    questions = tuple(_question(row, contexts[row["image"]], references[id_]) for row, id_ in zip(rows, ids))
    return BenchmarkData(questions, _rule(source / "rule.json"), source / "images")


def _question(row: Mapping[str, Any], caption: str | list[str], reference: str) -> Question:
    context = caption if isinstance(caption, str) else "\n".join(caption)
    kind = row["category"].removeprefix(_PREFIX)
    return Question(str(row["question_id"]), row["image"], row["text"], reference, (kind,), context)


def _rule(path: Path) -> str:
    """Read the judge's instruction, which is the same for all three kinds of question."""
    rules = read_json(path)
    prompts = {}
    for kind in KINDS:
        rule = rules.get(_PREFIX + kind) if isinstance(rules, dict) else None
        prompts[kind] = str(rule.get("prompt")) if isinstance(rule, dict) else ""
    raise_errors(
        path,
        [
            f"field {_PREFIX + kind!r}: expected a prompt of SHA-256 {_RULE_SHA256}, got {prompt[:40]!r}"
            for kind, prompt in prompts.items()
            if digest_of_text(prompt) != _RULE_SHA256
        ],
    )
    return prompts[KINDS[0]]


def judge_requests(
    data: BenchmarkData, answers: Iterable[Answer], *, official_quirks: bool = False
) -> list[ChatRequest]:
    """Ask with context, question, reference, answer and official instruction. The original's requests are the same."""
    del official_quirks
    system = {"role": "system", "content": _SYSTEM}
    filled = {q.id: _filled(data.judge_prompt, q, answer) for q, answer in data.answered(answers)}
    return [ChatRequest(id_, (system, {"role": "user", "content": text})) for id_, text in filled.items()]


def _filled(rule: str, question: Question, answer: Answer) -> str:
    sections = [f"[Context]\n{question.context}", f"[Question]\n{question.prompt}"]
    for number, text in enumerate((question.truth, answer.text), 1):
        sections += [f"[Assistant {number}]\n{text}", f"[End of Assistant {number}]"]
    return "\n\n".join([*sections, f"[System]\n{rule}", ""])


def parse(text: str) -> Scores | None:
    """Read the two scores of the first line, separated by blanks or commas; None unless it is two numbers up to 10."""
    lines = after_thoughts(text).splitlines()
    match = _TWO_NUMBERS.fullmatch(lines[0]) if lines else None
    if match is None or max(float(match[1]), float(match[2])) > 10:
        return None
    return float(match[1]), float(match[2])


def parse_official(text: str) -> Scores | None:
    """Read as the original: the first line with blanks for commas, split at single blanks; so "8, 6" is none."""
    words = text.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, words)
    except ValueError:
        return None
    return (first, second) if math.isfinite(first + second) else None


JUDGE = Judge(
    "gpt-4-0314",
    temperature=0.2,
    max_tokens=1024,
    requests=judge_requests,
    parse=parse,
    parse_official=parse_official,
    unreadable=(-1.0, -1.0),
)


def read_reviews(*paths: str | Path, judge_prompt: str = "") -> JudgeRun:
    """Read the verdicts of official review files, each file one run: JSONL with question_id and content."""
    verdicts = [
        Verdict(str(row["question_id"]), run, "", row["content"], None, "")
        for run, path in enumerate(paths)
        for row in read_records(Path(path), _REVIEW)
    ]
    return JudgeRun(JUDGE.model, JUDGE.temperature, digest_of_text(judge_prompt)[:16], tuple(verdicts))


METRICS = (
    Metric("relative", "relative score"),
    *(Metric(f"relative_{kind}", f"relative {kind}") for kind in KINDS),
    Metric("reference_score", "reference score", None, 2),
    Metric("answer_score", "answer score", decimals=2),
    Metric("relative_std", "relative std", None, 2),
)


def score(
    data: BenchmarkData, answers: Iterable[Answer], verdicts: JudgeRun, *, official_quirks: bool = False
) -> Score:
    """Compute METRICS: 100 x mean score of the answers / mean score of the references, by kind too, and both means.

    Wrong is an answer that is scored below its reference.
    """
    return score_verdicts(
        PROTOCOL,
        JUDGE,
        METRICS,
        data,
        answers,
        verdicts,
        parts=_parts,
        wrong=lambda pairs: sum(answer - reference for reference, answer in pairs) < 0,
        official_quirks=official_quirks,
    )


def _parts(question: Question, pairs: Sequence[Scores]) -> Parts:
    reference, answer = (sum(scores) / len(pairs) for scores in zip(*pairs))
    names = ("relative", *(f"relative_{kind}" for kind in question.kinds))
    means = {"reference_score": [reference, 1.0], "answer_score": [answer, 1.0]}
    return means | {name: [100 * answer, reference] for name in names}


format_table = Table(
    (
        TableColumn("relative", "all", interval=True),
        *(TableColumn(f"relative_{kind}", kind) for kind in KINDS),
        TableColumn("reference_score", "reference", 2),
        TableColumn("answer_score", "answer", 2),
    ),
    protocol=False,
    note="unreadable verdicts, in no mean",
)


# ------------------------------------------------------------------------------------------------------- benchmark

_LLAVA = f"{GITHUB_RAW}/haotian-liu/LLaVA/c121f0432da27facab705978f83c4ada465e46fd"
_DATA_SET = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild/resolve/main"
_RULE = {"rule.json": (9098, "dd7345a44ce9f7a24e51a30ee030cdab32346f9d08e3359c80545ff1312b1e07")}
_ROWS = {
    "questions.jsonl": ("question_id", "image", "text", "category"),
    "context.jsonl": ("image", "caption"),
    "answers_gpt4.jsonl": ("question_id", "text"),
}


def _image_urls(data: Path) -> dict[str, str]:
    names = {row["image"] for row in read_json(data / "llava_bench/questions.jsonl")}
    return {name: f"{_DATA_SET}/images/{quote(name)}" for name in sorted(names)}


BENCHMARK = Benchmark(
    name="llavabench",
    title="LLaVA-Bench (In-the-Wild)",
    wrong="is scored below the reference answer",
    files=(
        *files_of("llava_bench", f"{_LLAVA}/llava/eval/table", _RULE),
        *(
            File(f"llava_bench/{name}", f"{_DATA_SET}/{name}", check=rows_with(*fields))
            for name, fields in _ROWS.items()
        ),
    ),
    images=ImageSource("llava_bench/images", _image_urls, f"each from {_DATA_SET}/images/NAME"),
    load=load,
    parts=(Part(DECODING),),
    score=score,
    metrics=METRICS,
    columns=(SummaryColumn("relative", "LLaVA-Bench", kind="ability"),),
    modes=(Mode(judged=True),),
    judge=JUDGE,
    table=format_table,
    published_file=Path(__file__).with_name("llavabench_published.json"),
)
