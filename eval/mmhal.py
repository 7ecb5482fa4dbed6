"""MMHal-Bench (Sun et al. 2023): 96 questions on OpenImages pictures; a judge rates each answer from 0 to 6.

    benchmark = load(folder)                                # questions and the official judge prompt
    requests(benchmark), DECODING                           # for llava.eval.generate, in the RLAIF-V protocol
    run = judge(benchmark, answers, JUDGE.settings(url), out)        # or replay(out, judge_requests(...))
    score(benchmark, answers, run); format_table({name: score})

Different from the original scorers on purpose: answers are joined by id and not by order, a verdict without a readable
rating is counted and in no mean instead of 0, and a judge that names another version than asked for is recorded, not
asked for ever. `official_quirks` gives unreadable verdicts the original's 0, and reads ratings as narrowly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from dama.chat import ChatRequest
from eval.core.judge import (
    QUIRKS,
    JudgedScore,
    JudgeRun,
    OfficialJudge,
    Parts,
    after_thoughts,
    format_scores,
    judge_answers,
    more_follow,
    score_verdicts,
)
from eval.core.official import official_prompt, read_records, refuse_faults
from eval.core.types import Answer, Benchmark, Question
from eval.download import RECORD, read_record

if TYPE_CHECKING:
    from llava.generation.request import Request

PROTOCOL = "mmhal"
DECODING: dict[str, Any] = {"max_new_tokens": 1024, "num_beams": 3, "temperature": 0.0}  # of llava.eval.generate
JUDGE = OfficialJudge("gpt-4-1106-preview", temperature=0.0, max_tokens=512)
KINDS = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
METRICS = ("score", "hallucination_rate", "informativeness", *(f"score_{kind}" for kind in KINDS))
HALLUCINATED_BELOW = 3  # ratings 0, 1 and 2 say that the answer hallucinates

_PROMPT_SHA256 = "2db099baee2b452ef26411b0be54e390817430773b7024d03dde4d0f1b742a19"
_PROMPT = "prompts/mmhal_judge.txt"
_SLOTS = 4
_FIELDS = {
    "question_type": (str,),
    "image_id": (str,),
    "image_src": (str,),
    "image_content": (list,),
    "question": (str,),
    "gt_answer": (str,),
}
# "Rating: 5", "**Rating**: 5", "rating 5,"
_RATING = re.compile(r"\brating\b(?:\W{0,6}?|\s+(?:is|should\s+be|would\s+be|becomes)\s+)(-?\d+(?:[.,]\d+)?)\w*")
_SCALE = re.compile(r"\brating\b\W{0,6}?[01]\s*(?:[-–]|to)\s*6\b")  # "rating (0-6)", which rates nothing
_BEST = 6


def load(folder: str | Path) -> Benchmark:
    """Questions from folder/mmhal/mmhal-bench_answer_template.json, pictures in folder/mmhal/images.

    The judge prompt: folder/prompts/mmhal_judge.txt, or a string in folder/mmhal/eval_gpt_mmhal.py; the official one,
    or one that folder/downloads.json records. A picture is called by its image_id, or as its Flickr page calls it.
    Raises ValueError, naming file and fields.
    """
    home = Path(folder) / "mmhal"
    path = home / "mmhal-bench_answer_template.json"
    rows = read_records(path, _FIELDS)
    faults = [
        f"record {i}: field 'question_type': expected one of {', '.join(KINDS)}, got {row['question_type']!r}"
        for i, row in enumerate(rows)
        if row["question_type"] not in KINDS
    ]
    ids = [row["image_id"] for row in rows]
    faults += [f"record {i}: field 'image_id': {id_!r} is used before" for i, id_ in enumerate(ids) if id_ in ids[:i]]
    refuse_faults(path, faults)
    recorded = read_record(Path(folder) / RECORD).get(_PROMPT, {}).get("sha256")  # of an edition such as TinyCOCO's
    prompt = official_prompt([Path(folder) / _PROMPT, home / "eval_gpt_mmhal.py"], _PROMPT_SHA256, recorded)
    return Benchmark(tuple(_question(row, home / "images") for row in rows), prompt, home / "images")


def _question(row: Mapping[str, Any], images: Path) -> Question:
    source = PurePosixPath(row["image_src"]).name
    own = row["image_id"] + PurePosixPath(source).suffix
    image = source if (images / source).is_file() and not (images / own).is_file() else own
    contents = ", ".join(map(str, row["image_content"]))
    return Question(row["image_id"], image, row["question"], row["gt_answer"], (row["question_type"],), contents)


def requests(benchmark: Benchmark) -> list[Request]:
    """What the model is asked: the raw question."""
    return benchmark.requests()


def judge_requests(
    benchmark: Benchmark, answers: Iterable[Answer], *, official_quirks: bool = False
) -> list[ChatRequest]:
    """What the judge is asked: the official prompt with its four slots filled, no picture; the quirks are elsewhere."""
    if benchmark.judge_prompt.count("{}") != _SLOTS:
        raise ValueError(f"MMHal's judge prompt: expected {_SLOTS} slots, got {benchmark.judge_prompt.count('{}')}")
    return [
        ChatRequest(question.id, ({"role": "user", "content": _filled(benchmark.judge_prompt, question, answer)},))
        for question, answer in benchmark.answered(answers)
    ]


def _filled(template: str, question: Question, answer: Answer) -> str:
    return template.format(question.context, question.prompt, question.truth, answer.text)


def parse(text: str) -> int | None:
    """The rating, 0 to 6; None where there is none, where two differ, or where one is none of these numbers."""
    text = _SCALE.sub("", after_thoughts(text).lower())
    matches = list(_RATING.finditer(text))
    found = {match[1] for match in matches}
    several = any(more_follow(text, match.end(), str(_BEST)) or match.end() > match.end(1) for match in matches)
    rating = found.pop() if len(found) == 1 and not several else ""
    return int(rating) if re.fullmatch("[0-6]", rating) else None


judge = partial(judge_answers, judge_requests=judge_requests, parse=parse)


def parse_official(text: str) -> int | None:
    """As the original: exactly one of "rating: 0" ... "rating: 6" occurs; so "**Rating**: 5" is none, 10 is 1."""
    found = [rating for rating in range(7) if f"rating: {rating}" in text.lower()]
    return found[0] if len(found) == 1 else None


def score(
    benchmark: Benchmark, answers: Iterable[Answer], run: JudgeRun, *, official_quirks: bool = False
) -> JudgedScore:
    """METRICS: mean rating (0 to 6), hallucination rate in percent (rating below 3), informativeness, mean by type.

    Wrong is an answer whose mean rating is below 3. Informativeness is RLHF-V's: how informative the rating says that
    an answer is, with or without hallucination, 0 to 1.
    """
    return score_verdicts(
        PROTOCOL + QUIRKS * official_quirks,
        benchmark,
        answers,
        run,
        METRICS,
        parse=parse_official if official_quirks else parse,
        parts=_parts,
        wrong=lambda ratings: sum(ratings) / len(ratings) < HALLUCINATED_BELOW,
        otherwise=0 if official_quirks else None,
    )


def _parts(question: Question, ratings: Sequence[int]) -> Parts:
    runs = len(ratings)
    rating = sum(ratings) / runs
    informative = sum(r - 3 if r >= HALLUCINATED_BELOW else r for r in ratings) / (3 * runs)
    hallucinated = sum(r < HALLUCINATED_BELOW for r in ratings) / runs
    means = {"score": rating, "hallucination_rate": 100 * hallucinated, "informativeness": informative}
    means |= {f"score_{kind}": rating for kind in question.kinds}
    return {name: [mean, 1.0] for name, mean in means.items()}


def format_table(rows: Mapping[str, JudgedScore]) -> str:
    """One line per model, with the ids of what is in no mean below."""
    columns = {"score": ("score", 2), "hallucination_rate": ("hallucination %", 1)}
    return format_scores(rows, columns | {f"score_{kind}": (kind, 2) for kind in KINDS})
