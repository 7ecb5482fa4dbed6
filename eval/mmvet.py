"""MM-Vet (Yu et al. 2023): 218 questions on 200 pictures; a grader says how right each answer is, from 0 to 1.

    benchmark = load(folder)                                # questions and the official grader prompt
    requests(benchmark), DECODING                           # for llava.eval.generate
    run = judge(benchmark, answers, JUDGE.settings(url), out, runs=5)   # or replay(out, judge_requests(...))
    score(benchmark, answers, run); format_table({name: score})

Different from the original grader on purpose: "|" and line breaks in an answer do not break the table row it stands in,
the grader has room for more than 3 tokens, what it wrote unreadably is asked for again at the same temperature and not
at 0.5, 1, 1.5 and 2, and is counted and in no mean instead of 0 in the end. `official_quirks` does all as the original.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dama.chat import ChatClient, ChatRequest, ChatSettings, ChatUsage
from eval.core.judge import (
    CACHE,
    QUIRKS,
    JudgedScore,
    JudgeRun,
    OfficialJudge,
    Parts,
    Verdict,
    after_thoughts,
    ask_judge,
    format_scores,
    more_follow,
    score_verdicts,
    verdict_of,
)
from eval.core.official import field_faults, official_prompt, read_json, refuse_faults
from eval.core.types import Answer, Benchmark, Question

if TYPE_CHECKING:
    from llava.generation.request import Request

PROTOCOL = "mm-vet"
DECODING: dict[str, Any] = {"max_new_tokens": 1024, "num_beams": 1, "temperature": 0.0}  # of llava.eval.generate
JUDGE = OfficialJudge("gpt-4-0613", temperature=0.0, max_tokens=128)
TRIES = 5
KINDS = ("rec", "ocr", "know", "gen", "spat", "math")
METRICS = ("total", *KINDS)
HALF_RIGHT = 0.5

_PROMPT_SHA256 = "f23108ec5f7a92d29c2e270842bb9cc7423b0504eeafd433894744f88a3fa872"
_QUESTION = {"imagename": (str,), "question": (str,), "answer": (str,), "capability": (list,)}
_GRADES = {"model": (list,), "content": (list,)}
_DECIMAL_FIRST = re.compile(r"[\s*|]*(\d*\.\d+)(?!\.?\d)")  # not the beginning of 0.5.1
_BEST = "1"
_NUMBER = re.compile(r"(?<![\w.])-?\d*\.?\d+(?!\.?\d)")
_QUIRK_TOKENS = 3
_QUIRK_WARMER = 0.5
_QUIRK_ENDING = "\nPredict the correctness of the answer (digit): "


def load(folder: str | Path) -> Benchmark:
    """Questions from folder/mmvet/mm-vet.json, pictures in folder/mmvet/images.

    The grader prompt: folder/prompts/mmvet_grader.txt, or a string in folder/mmvet/mm-vet_evaluator.py. Raises
    ValueError, naming file and fields.
    """
    home = Path(folder) / "mmvet"
    path = home / "mm-vet.json"
    rows = read_json(path)
    if not isinstance(rows, dict) or not rows:
        refuse_faults(path, [f"expected an object of questions, got {type(rows).__name__}"])
    faults = [fault for id_, row in rows.items() for fault in field_faults(f"question {id_}", row, _QUESTION)]
    refuse_faults(path, faults)
    unknown = {id_: [name for name in row["capability"] if name not in KINDS] for id_, row in rows.items()}
    faults = [
        f"question {id_}: field 'capability': expected some of {', '.join(KINDS)}, got {names}"
        for id_, names in unknown.items()
        if names
    ]
    refuse_faults(path, faults)
    prompt = official_prompt([Path(folder) / "prompts/mmvet_grader.txt", home / "mm-vet_evaluator.py"], _PROMPT_SHA256)
    questions = (
        Question(id_, row["imagename"], row["question"], row["answer"], tuple(row["capability"]))
        for id_, row in rows.items()
    )
    return Benchmark(tuple(questions), prompt, home / "images")


def requests(benchmark: Benchmark) -> list[Request]:
    """What the model is asked: the raw question."""
    return benchmark.requests()


def judge_requests(
    benchmark: Benchmark, answers: Iterable[Answer], *, official_quirks: bool = False
) -> list[ChatRequest]:
    """What the grader is asked: the official table with one more row, whose last cell is left to it."""
    cell = str if official_quirks else _cell
    return [
        ChatRequest(question.id, ({"role": "user", "content": f"{benchmark.judge_prompt}\n{row}"},))
        for question, answer in benchmark.answered(answers)
        for row in [f"{cell(question.prompt)} | {cell(_alternatives(question.truth))} | {cell(answer.text)} | "]
    ]


def _alternatives(truth: str) -> str:
    return truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")


def _cell(text: str) -> str:
    """Text that stays within its cell of a Markdown table."""
    return re.sub(r"\s*[\r\n]\s*", " ", text).replace("|", r"\|")


def judge(
    benchmark: Benchmark,
    answers: Iterable[Answer],
    settings: ChatSettings,
    out: str | Path,
    *,
    runs: int = 1,
    tries: int = TRIES,
    official_quirks: bool = False,
) -> JudgeRun:
    """Asks the grader, `runs` times (the paper: 5), and writes out/verdicts.jsonl. Unreadable: up to `tries` times."""
    asked = judge_requests(benchmark, answers, official_quirks=official_quirks)
    if official_quirks:
        return _judge_as_original(asked, settings, out, benchmark.prompt_digest, runs)
    return ask_judge(settings, asked, out, benchmark.prompt_digest, parse=parse, runs=runs, tries=tries)


def _judge_as_original(
    asked: Sequence[ChatRequest], settings: ChatSettings, out: str | Path, prompt_digest: str, runs: int
) -> JudgeRun:
    """3 tokens a grade; the unreadable ones again with another ending, at a temperature 0.5 higher each time."""
    settings = settings if settings.max_tokens is None else replace(settings, max_tokens=_QUIRK_TOKENS)
    start = settings.temperature  # None: left to the server
    warmth = [None if start is None else start + _QUIRK_WARMER * k for k in range(TRIES)]
    warmer = [replace(settings, temperature=temperature) for temperature in warmth]
    clients = [ChatClient(each, Path(out) / CACHE) for each in warmer]
    verdicts: dict[tuple[int, str], Verdict] = {}
    for run in range(runs):
        pending = [replace(request, sample=run) for request in asked]
        for k, client in enumerate(clients):
            endings = [replace(r, messages=_ended(r, _QUIRK_ENDING if k else "")) for r in pending]
            replies = client.ask(endings, desc=f"grader, run {run + 1}, try {k + 1}")
            verdicts |= {(run, r.id): verdict_of(r, replies[r.id]) for r in pending}
            pending = [r for r in pending if parse_official(verdicts[run, r.id].text or "") is None]
    usage = ChatUsage(*map(sum, zip(*(astuple(client.usage) for client in clients))))
    result = JudgeRun(settings.model, settings.temperature, prompt_digest, tuple(verdicts.values()), usage)
    result.save(out)
    return result


def _ended(request: ChatRequest, ending: str) -> tuple[dict[str, Any], ...]:
    (turn,) = request.messages
    return (turn | {"content": turn["content"] + ending},)


def parse(text: str) -> float | None:
    """The correctness, 0 to 1: a decimal fraction that the text begins with, or the only number in it; else None.

    A whole number before others ("1 of 2 elements is right: 0.5") is no grade.
    """
    text = after_thoughts(text)
    first = _DECIMAL_FIRST.match(text)
    if first and more_follow(text, first.end(), _BEST):  # "0.5, 0.7" and "0.5 to 0.7"
        return None
    numbers = {float(first[1])} if first else {float(number) for number in _NUMBER.findall(text)}
    grade = numbers.pop() if len(numbers) == 1 else -1.0
    return grade if 0 <= grade <= 1 else None


def parse_official(text: str) -> float | None:
    """As the original: the text up to the first blank, if it is a number from 0 to 1."""
    try:
        grade = float(text.split(" ")[0])
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def read_grades(path: str | Path) -> JudgeRun:
    """The verdicts of an official grade file: question -> what the grader wrote in each run, and its model."""
    rows = read_json(Path(path))
    refuse_faults(Path(path), [fault for id_, row in rows.items() for fault in field_faults(id_, row, _GRADES)])
    verdicts = [
        Verdict(id_, run, "", text, None, model)
        for id_, row in rows.items()
        for run, (text, model) in enumerate(zip(row["content"], row["model"]))
    ]
    return JudgeRun(JUDGE.model, JUDGE.temperature, "", tuple(verdicts))


def score(
    benchmark: Benchmark, answers: Iterable[Answer], run: JudgeRun, *, official_quirks: bool = False
) -> JudgedScore:
    """METRICS: 100 x mean correctness, over all questions and over those that need each capability.

    Over several runs an answer counts with its mean. Wrong is an answer that is less than half right.
    """
    return score_verdicts(
        PROTOCOL + QUIRKS * official_quirks,
        benchmark,
        answers,
        run,
        METRICS,
        parse=parse_official if official_quirks else parse,
        parts=_parts,
        wrong=lambda grades: sum(grades) / len(grades) < HALF_RIGHT,
        otherwise=0.0 if official_quirks else None,
    )


def _parts(question: Question, grades: Sequence[float]) -> Parts:
    return {name: [100 * sum(grades) / len(grades), 1.0] for name in ("total", *question.kinds)}


def format_table(rows: Mapping[str, JudgedScore]) -> str:
    """One line per model, with the ids of what is in no mean below."""
    return format_scores(rows, {name: (name, 1) for name in METRICS} | {"total_std": ("std over runs", 1)})
