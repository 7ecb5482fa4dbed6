"""MM-Vet (Yu et al. 2023): 218 questions on 200 images; a grader says how right each answer is, from 0 to 1.

    data = load(folder)                                     # questions and the official grader prompt
    verdicts = JUDGE.ask(data, answers, JUDGE.settings(url), out, runs=5)   # or replay(out, judge_requests(...))
    score(data, answers, verdicts); format_table({name: score})

Different from the original grader on purpose: "|" and line breaks in an answer do not break the table row it stands in,
the grader has room for more than 3 tokens, an unreadable verdict is asked for again at the same temperature and not at
0.5, 1, 1.5 and 2, and is counted and in no mean instead of 0 in the end. `official_quirks` does all as the original.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any

from dama.chat import ChatClient, ChatRequest, ChatSettings, ChatUsage
from eval.core.benchmark import Benchmark, Mode, Part, SummaryColumn
from eval.core.judge import CACHE, JudgeRun, Verdict, after_thoughts, more_follow, verdict_of
from eval.core.judged import Judge, score_verdicts
from eval.core.metrics import Metric
from eval.core.official import field_errors, official_prompt, raise_errors, read_json
from eval.core.scores import Score, Table, TableColumn
from eval.core.sources import GITHUB_RAW, File, ImageSource, archive_with, is_script, members, questions_with
from eval.core.transfer import TransferError
from eval.core.types import Answer, BenchmarkData, Parts, Question

PROTOCOL = "mm-vet"
DECODING: dict[str, Any] = {"max_new_tokens": 1024, "num_beams": 1, "temperature": 0.0}
TRIES = 5
KINDS = ("rec", "ocr", "know", "gen", "spat", "math")
HALF_RIGHT = 0.5

_PROMPT_SHA256 = "f23108ec5f7a92d29c2e270842bb9cc7423b0504eeafd433894744f88a3fa872"
_QUESTION = {"imagename": (str,), "question": (str,), "answer": (str,), "capability": (list,)}
_GRADES = {"model": (list,), "content": (list,)}
_DECIMAL_FIRST = re.compile(r"[\s*|]*(\d*\.\d+)(?!\.?\d)")  # not the beginning of 0.5.1
_BEST = "1"
_NUMBER = re.compile(r"(?<![\w.])-?\d*\.?\d+(?!\.?\d)")
_OFFICIAL_TOKENS = 3
_OFFICIAL_WARMER = 0.5
_OFFICIAL_ENDING = "\nPredict the correctness of the answer (digit): "


def load(folder: str | Path, mode: str = "") -> BenchmarkData:
    """Read folder/mmvet/mm-vet.json; images are in folder/mmvet/images. There is one mode.

    The grader prompt is folder/prompts/mmvet_grader.txt, or a string in folder/mmvet/mm-vet_evaluator.py. Raises
    ValueError, naming file and fields.
    """
    del mode
    source = Path(folder) / "mmvet"
    path = source / "mm-vet.json"
    rows = read_json(path)
    if not isinstance(rows, dict) or not rows:
        raise_errors(path, [f"expected an object of questions, got {type(rows).__name__}"])
    errors = [error for id_, row in rows.items() for error in field_errors(f"question {id_}", row, _QUESTION)]
    raise_errors(path, errors)
    unknown = {id_: [name for name in row["capability"] if name not in KINDS] for id_, row in rows.items()}
    errors = [
        f"question {id_}: field 'capability': expected some of {', '.join(KINDS)}, got {names}"
        for id_, names in unknown.items()
        if names
    ]
    raise_errors(path, errors)
    prompt = official_prompt(
        [Path(folder) / "prompts/mmvet_grader.txt", source / "mm-vet_evaluator.py"], _PROMPT_SHA256
    )
    questions = (
        Question(id_, row["imagename"], row["question"], row["answer"], tuple(row["capability"]))
        for id_, row in rows.items()
    )
    return BenchmarkData(tuple(questions), prompt, source / "images")


def judge_requests(
    data: BenchmarkData, answers: Iterable[Answer], *, official_quirks: bool = False
) -> list[ChatRequest]:
    """Ask with the official table and one more row, whose last cell is left to the grader."""
    cell = str if official_quirks else _cell
    return [
        ChatRequest(question.id, ({"role": "user", "content": f"{data.judge_prompt}\n{row}"},))
        for question, answer in data.answered(answers)
        for row in [f"{cell(question.prompt)} | {cell(_alternatives(question.truth))} | {cell(answer.text)} | "]
    ]


def _alternatives(truth: str) -> str:
    return truth.replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")


def _cell(text: str) -> str:
    """Escape text so that it stays within its cell of a Markdown table."""
    return re.sub(r"\s*[\r\n]\s*", " ", text).replace("|", r"\|")


def _ask_as_original(
    settings: ChatSettings, requests: Sequence[ChatRequest], out: str | Path, prompt_digest: str, *, runs: int = 1
) -> JudgeRun:
    """Ask for 3 tokens; for unreadable ones again with another ending, at a temperature 0.5 higher each time."""
    settings = settings if settings.max_tokens is None else replace(settings, max_tokens=_OFFICIAL_TOKENS)
    start = settings.temperature  # None: left to the server
    warmth = [None if start is None else start + _OFFICIAL_WARMER * k for k in range(TRIES)]
    warmer = [replace(settings, temperature=temperature) for temperature in warmth]
    clients = [ChatClient(each, Path(out) / CACHE) for each in warmer]
    verdicts: dict[tuple[int, str], Verdict] = {}
    for run in range(runs):
        pending = [replace(request, sample=run) for request in requests]
        for k, client in enumerate(clients):
            endings = [replace(r, messages=_ended(r, _OFFICIAL_ENDING if k else "")) for r in pending]
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
    """Read the correctness, 0 to 1: a decimal fraction that the text begins with, or the only number in it; else None.

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
    """Read as the original: the text up to the first blank, if it is a number from 0 to 1."""
    try:
        grade = float(text.split(" ")[0])
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


JUDGE = Judge(
    "gpt-4-0613",
    temperature=0.0,
    max_tokens=128,
    requests=judge_requests,
    parse=parse,
    parse_official=parse_official,
    unreadable=0.0,
    tries=TRIES,
    ask_official=_ask_as_original,
)


def read_grades(path: str | Path) -> JudgeRun:
    """Read the verdicts of an official grade file: question -> the grader's text in each run, and its model."""
    rows = read_json(Path(path))
    raise_errors(Path(path), [error for id_, row in rows.items() for error in field_errors(id_, row, _GRADES)])
    verdicts = [
        Verdict(id_, run, "", text, None, model)
        for id_, row in rows.items()
        for run, (text, model) in enumerate(zip(row["content"], row["model"]))
    ]
    return JudgeRun(JUDGE.model, JUDGE.temperature, "", tuple(verdicts))


METRICS = (
    Metric("total", "total"),
    *(Metric(kind, kind) for kind in KINDS),
    Metric("total_std", "total std", None),
)


def score(
    data: BenchmarkData, answers: Iterable[Answer], verdicts: JudgeRun, *, official_quirks: bool = False
) -> Score:
    """Compute METRICS: 100 x mean correctness, over all questions and over those that need each capability.

    Over several runs an answer counts with its mean. Wrong is an answer that is less than half right.
    """
    return score_verdicts(
        PROTOCOL,
        JUDGE,
        METRICS,
        data,
        answers,
        verdicts,
        parts=_parts,
        wrong=lambda grades: sum(grades) / len(grades) < HALF_RIGHT,
        official_quirks=official_quirks,
    )


def _parts(question: Question, grades: Sequence[float]) -> Parts:
    return {name: [100 * sum(grades) / len(grades), 1.0] for name in ("total", *question.kinds)}


format_table = Table(
    (
        TableColumn("total", "total", interval=True),
        *(TableColumn(kind, kind) for kind in KINDS),
        TableColumn("total_std", "std over runs"),
    ),
    protocol=False,
    note="unreadable verdicts, in no mean",
)


# ------------------------------------------------------------------------------------------------------- benchmark

_MM_VET = f"{GITHUB_RAW}/yuweihao/MM-Vet/acde843e02dae30047bb456ee4a8ab28dee7e0ae"
_PACKAGE = File(
    "mmvet/mm-vet.zip",
    "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip",
    check=archive_with("mm-vet.json"),
)


def _make_questions(package: Path, data: Path) -> bytes:
    """Return mm-vet.json out of the package."""
    del data
    found = dict(members(package, ("mm-vet.json",)))
    if not found:
        raise TransferError("it has no mm-vet.json")
    return found["mm-vet.json"]


def _image_urls(data: Path) -> dict[str, str]:
    return {row["imagename"]: "" for row in read_json(data / "mmvet/mm-vet.json").values()}


BENCHMARK = Benchmark(
    name="mmvet",
    title="MM-Vet",
    wrong="is graded less than half right",
    files=(
        File(
            "mmvet/mm-vet.json",
            package=_PACKAGE,
            make=_make_questions,
            check=questions_with("imagename", "question", "answer", "capability"),
        ),
        File(
            "mmvet/mm-vet_evaluator.py",
            f"{_MM_VET}/mm-vet_evaluator.py",
            instead="prompts/mmvet_grader.txt",
            check=is_script,
        ),
    ),
    images=ImageSource("mmvet/images", _image_urls, f"taken out of {_PACKAGE.path}, {_PACKAGE.source}", _PACKAGE),
    load=load,
    parts=(Part(DECODING),),
    score=score,
    metrics=METRICS,
    columns=(SummaryColumn("total", "MM-Vet", kind="ability"),),
    modes=(Mode(judged=True),),
    judge=JUDGE,
    table=format_table,
    published_file=Path(__file__).with_name("mmvet_published.json"),
)
