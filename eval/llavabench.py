"""LLaVA-Bench (In-the-Wild; Liu et al. 2023): 60 questions; a judge compares each answer with text-only GPT-4's.

    benchmark = load(folder)                                # questions and the official judge prompt
    requests(benchmark), DECODING                           # for llava.eval.generate
    run = judge(benchmark, answers, JUDGE.settings(url), out)        # or replay(out, judge_requests(...))
    score(benchmark, answers, run); format_table({name: score})

Different from the original scorer on purpose: questions, contexts, references and answers are joined by id and not line
by line, an interrupted run is resumed by content and not by count, and a review without readable scores is counted and
in no mean instead of (-1, -1). `official_quirks` averages (-1, -1) in, and reads scores as narrowly.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dama.chat import ChatRequest
from eval.core.judge import (
    QUIRKS,
    JudgedScore,
    JudgeRun,
    OfficialJudge,
    Parts,
    Verdict,
    after_thoughts,
    format_scores,
    judge_answers,
    score_verdicts,
)
from eval.core.official import digest_of_text, read_json, read_records, refuse_faults
from eval.core.types import Answer, Benchmark, Question

if TYPE_CHECKING:
    from llava.generation.request import Request

PROTOCOL = "llava-bench-in-the-wild"
DECODING: dict[str, Any] = {"max_new_tokens": 1024, "num_beams": 1, "temperature": 0.0}  # of llava.eval.generate
JUDGE = OfficialJudge("gpt-4-0314", temperature=0.2, max_tokens=1024)
KINDS = ("conv", "detail", "complex")
METRICS = ("relative", *(f"relative_{kind}" for kind in KINDS), "reference_score", "answer_score")

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


def load(folder: str | Path) -> Benchmark:
    """questions.jsonl, context.jsonl, answers_gpt4.jsonl, rule.json and images/ of folder/llava_bench.

    Raises ValueError, naming file and fields, also where a question has no context or no reference answer.
    """
    home = Path(folder) / "llava_bench"
    path = home / "questions.jsonl"
    rows = read_records(path, _QUESTION)
    contexts = {row["image"]: row["caption"] for row in read_records(home / "context.jsonl", _CONTEXT)}
    references = {str(r["question_id"]): r["text"] for r in read_records(home / "answers_gpt4.jsonl", _REFERENCE)}
    faults, ids = [], [str(row["question_id"]) for row in rows]
    for i, (row, id_) in enumerate(zip(rows, ids)):
        if id_ in ids[:i]:
            faults.append(f"record {i}: field 'question_id': {id_!r} is used before")
        if row["category"].removeprefix(_PREFIX) not in KINDS:
            faults.append(f"record {i}: field 'category': expected one of {', '.join(KINDS)}, got {row['category']!r}")
        if row["image"] not in contexts:
            faults.append(f"record {i}: field 'image': {row['image']!r} is not in context.jsonl")
        if id_ not in references:
            faults.append(f"record {i}: field 'question_id': {id_!r} is not in answers_gpt4.jsonl")
    refuse_faults(path, faults)
    questions = tuple(_question(row, contexts[row["image"]], references[id_]) for row, id_ in zip(rows, ids))
    return Benchmark(questions, _rule(home / "rule.json"), home / "images")


def _question(row: Mapping[str, Any], caption: str | list[str], reference: str) -> Question:
    context = caption if isinstance(caption, str) else "\n".join(caption)
    kind = row["category"].removeprefix(_PREFIX)
    return Question(str(row["question_id"]), row["image"], row["text"], reference, (kind,), context)


def _rule(path: Path) -> str:
    """The judge's instruction, which is one text for all three kinds of question."""
    rules = read_json(path)
    prompts = {}
    for kind in KINDS:
        rule = rules.get(_PREFIX + kind) if isinstance(rules, dict) else None
        prompts[kind] = str(rule.get("prompt")) if isinstance(rule, dict) else ""
    refuse_faults(
        path,
        [
            f"field {_PREFIX + kind!r}: expected a prompt of SHA-256 {_RULE_SHA256}, got {prompt[:40]!r}"
            for kind, prompt in prompts.items()
            if digest_of_text(prompt) != _RULE_SHA256
        ],
    )
    return prompts[KINDS[0]]


def requests(benchmark: Benchmark) -> list[Request]:
    """What the model is asked: the raw question."""
    return benchmark.requests()


def judge_requests(
    benchmark: Benchmark, answers: Iterable[Answer], *, official_quirks: bool = False
) -> list[ChatRequest]:
    """What the judge is asked: context, question, reference, answer, official instruction; the quirks are elsewhere."""
    system = {"role": "system", "content": _SYSTEM}
    filled = {q.id: _filled(benchmark.judge_prompt, q, answer) for q, answer in benchmark.answered(answers)}
    return [ChatRequest(id_, (system, {"role": "user", "content": text})) for id_, text in filled.items()]


def _filled(rule: str, question: Question, answer: Answer) -> str:
    sections = [f"[Context]\n{question.context}", f"[Question]\n{question.prompt}"]
    for number, text in enumerate((question.truth, answer.text), 1):
        sections += [f"[Assistant {number}]\n{text}", f"[End of Assistant {number}]"]
    return "\n\n".join([*sections, f"[System]\n{rule}", ""])


def parse(text: str) -> Scores | None:
    """The two scores of the first line, separated by blanks or commas; None where it is not two numbers up to 10."""
    lines = after_thoughts(text).splitlines()
    match = _TWO_NUMBERS.fullmatch(lines[0]) if lines else None
    if match is None or max(float(match[1]), float(match[2])) > 10:
        return None
    return float(match[1]), float(match[2])


judge = partial(judge_answers, judge_requests=judge_requests, parse=parse)


def parse_official(text: str) -> Scores | None:
    """As the original: the first line with blanks for commas, split at single blanks; so "8, 6" is none."""
    words = text.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, words)
    except ValueError:
        return None
    return (first, second) if math.isfinite(first + second) else None


def read_reviews(*paths: str | Path, judge_prompt: str = "") -> JudgeRun:
    """The verdicts of official review files, each file one run: JSONL with question_id and content."""
    verdicts = [
        Verdict(str(row["question_id"]), run, "", row["content"], None, "")
        for run, path in enumerate(paths)
        for row in read_records(Path(path), _REVIEW)
    ]
    return JudgeRun(JUDGE.model, JUDGE.temperature, digest_of_text(judge_prompt)[:16], tuple(verdicts))


def score(
    benchmark: Benchmark, answers: Iterable[Answer], run: JudgeRun, *, official_quirks: bool = False
) -> JudgedScore:
    """METRICS: 100 x mean score of the answers / mean score of the references, in all and by kind, and both means.

    Wrong is an answer that is scored below its reference.
    """
    return score_verdicts(
        PROTOCOL + QUIRKS * official_quirks,
        benchmark,
        answers,
        run,
        METRICS,
        parse=parse_official if official_quirks else parse,
        parts=_parts,
        wrong=lambda pairs: sum(answer - reference for reference, answer in pairs) < 0,
        otherwise=(-1.0, -1.0) if official_quirks else None,
    )


def _parts(question: Question, pairs: Sequence[Scores]) -> Parts:
    reference, answer = (sum(scores) / len(pairs) for scores in zip(*pairs))
    names = ("relative", *(f"relative_{kind}" for kind in question.kinds))
    means = {"reference_score": [reference, 1.0], "answer_score": [answer, 1.0]}
    return means | {name: [100 * answer, reference] for name in names}


def format_table(rows: Mapping[str, JudgedScore]) -> str:
    """One line per model, with the ids of what is in no mean below."""
    columns = {"relative": ("all", 1)} | {f"relative_{kind}": (kind, 1) for kind in KINDS}
    return format_scores(rows, columns | {"reference_score": ("reference", 2), "answer_score": ("answer", 2)})
