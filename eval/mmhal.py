"""MMHal-Bench (Sun et al. 2023): 96 questions on OpenImages images; a judge rates each answer from 0 to 6.

    data = load(folder)                                     # questions and the official judge prompt
    verdicts = JUDGE.ask(data, answers, JUDGE.settings(url), out)    # or replay(out, judge_requests(...))
    score(data, answers, verdicts); format_table({name: score})

Different from the original scorers on purpose: answers are joined by id and not by order, a verdict without a readable
rating is counted and in no mean instead of 0, and a judge that names another version than asked for is recorded, not
asked again without end. `official_quirks` gives unreadable verdicts the original's 0, and reads ratings as narrowly.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from dama.chat import ChatRequest
from eval.core.benchmark import Benchmark, Mode, Part, SummaryColumn, TradeOff
from eval.core.judge import JudgeRun, after_thoughts, more_follow
from eval.core.judged import Judge, score_verdicts
from eval.core.metrics import Metric
from eval.core.official import official_prompt, raise_errors, read_json, read_records
from eval.core.record import RECORD, read_record
from eval.core.scores import Score, Table, TableColumn
from eval.core.sources import GITHUB_RAW, File, ImageSource, is_script
from eval.core.types import Answer, BenchmarkData, Parts, Question

PROTOCOL = "mmhal"
DECODING: dict[str, Any] = {"max_new_tokens": 1024, "num_beams": 3, "temperature": 0.0}
KINDS = ("attribute", "adversarial", "comparison", "counting", "relation", "environment", "holistic", "other")
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


def load(folder: str | Path, mode: str = "") -> BenchmarkData:
    """Read folder/mmhal/mmhal-bench_answer_template.json; images are in folder/mmhal/images. There is one mode.

    The judge prompt is folder/prompts/mmhal_judge.txt, or a string in folder/mmhal/eval_gpt_mmhal.py; the official one,
    or one that folder/downloads.json records. An image is named by its image_id, or as on its Flickr page. Raises
    ValueError, naming file and fields.
    """
    del mode
    source = Path(folder) / "mmhal"
    path = source / "mmhal-bench_answer_template.json"
    rows = read_records(path, _FIELDS)
    errors = [
        f"record {i}: field 'question_type': expected one of {', '.join(KINDS)}, got {row['question_type']!r}"
        for i, row in enumerate(rows)
        if row["question_type"] not in KINDS
    ]
    ids = [row["image_id"] for row in rows]
    errors += [f"record {i}: field 'image_id': {id_!r} is used before" for i, id_ in enumerate(ids) if id_ in ids[:i]]
    raise_errors(path, errors)
    recorded = read_record(Path(folder) / RECORD).get(_PROMPT, {}).get("sha256")  # of an edition such as TinyCOCO's
    prompt = official_prompt([Path(folder) / _PROMPT, source / "eval_gpt_mmhal.py"], _PROMPT_SHA256, recorded)
    return BenchmarkData(tuple(_question(row, source / "images") for row in rows), prompt, source / "images")


def _question(row: Mapping[str, Any], images: Path) -> Question:
    source = PurePosixPath(row["image_src"]).name
    own = row["image_id"] + PurePosixPath(source).suffix
    image = source if (images / source).is_file() and not (images / own).is_file() else own
    contents = ", ".join(map(str, row["image_content"]))
    return Question(row["image_id"], image, row["question"], row["gt_answer"], (row["question_type"],), contents)


def judge_requests(
    data: BenchmarkData, answers: Iterable[Answer], *, official_quirks: bool = False
) -> list[ChatRequest]:
    """Ask with the official prompt, its four slots filled, without image. The original's requests are the same."""
    del official_quirks
    if data.judge_prompt.count("{}") != _SLOTS:
        raise ValueError(f"MMHal's judge prompt: expected {_SLOTS} slots, got {data.judge_prompt.count('{}')}")
    return [
        ChatRequest(question.id, ({"role": "user", "content": _filled(data.judge_prompt, question, answer)},))
        for question, answer in data.answered(answers)
    ]


def _filled(template: str, question: Question, answer: Answer) -> str:
    return template.format(question.context, question.prompt, question.truth, answer.text)


def parse(text: str) -> int | None:
    """Read the rating, 0 to 6; None where there is none, where two differ, or where one is none of these numbers."""
    text = _SCALE.sub("", after_thoughts(text).lower())
    matches = list(_RATING.finditer(text))
    found = {match[1] for match in matches}
    several = any(more_follow(text, match.end(), str(_BEST)) or match.end() > match.end(1) for match in matches)
    rating = found.pop() if len(found) == 1 and not several else ""
    return int(rating) if re.fullmatch("[0-6]", rating) else None


def parse_official(text: str) -> int | None:
    """Read as the original: exactly one of "rating: 0" ... "rating: 6" occurs; so "**Rating**: 5" is none, 10 is 1."""
    found = [rating for rating in range(7) if f"rating: {rating}" in text.lower()]
    return found[0] if len(found) == 1 else None


JUDGE = Judge(
    "gpt-4-1106-preview",
    temperature=0.0,
    max_tokens=512,
    requests=judge_requests,
    parse=parse,
    parse_official=parse_official,
    unreadable=0,
)
METRICS = (
    Metric("score", "score (0 to 6)", decimals=2),
    Metric("hallucination_rate", "hallucination %", "lower"),
    Metric("informativeness", "informativeness", decimals=2),
    Metric("mean_words", "mean words", None),
    *(Metric(f"score_{kind}", f"score {kind}", decimals=2) for kind in KINDS),
    Metric("score_std", "score std", None, 2),
)


def score(
    data: BenchmarkData, answers: Iterable[Answer], verdicts: JudgeRun, *, official_quirks: bool = False
) -> Score:
    """Compute METRICS: mean rating (0 to 6), hallucination rate in percent, informativeness, words, ratings by type.

    Ratings below 3 say that an answer hallucinates; wrong is one whose mean is. Informativeness is RLHF-V's: how
    informative the rating says that an answer is, with or without hallucination, 0 to 1.
    """
    return score_verdicts(
        PROTOCOL,
        JUDGE,
        METRICS,
        data,
        answers,
        verdicts,
        parts=_parts,
        wrong=lambda ratings: sum(ratings) / len(ratings) < HALLUCINATED_BELOW,
        of_text=lambda text: {"mean_words": [float(len(text.split())), 1.0]},
        official_quirks=official_quirks,
    )


def _parts(question: Question, ratings: Sequence[int]) -> Parts:
    runs = len(ratings)
    rating = sum(ratings) / runs
    informative = sum(r - 3 if r >= HALLUCINATED_BELOW else r for r in ratings) / (3 * runs)
    hallucinated = sum(r < HALLUCINATED_BELOW for r in ratings) / runs
    means = {"score": rating, "hallucination_rate": 100 * hallucinated, "informativeness": informative}
    means |= {f"score_{kind}": rating for kind in question.kinds}
    return {name: [mean, 1.0] for name, mean in means.items()}


format_table = Table(
    (
        TableColumn("score", "score", 2, interval=True),
        TableColumn("hallucination_rate", "hallucination %"),
        TableColumn("informativeness", "informativeness", 2),
        TableColumn("mean_words", "words"),
        *(TableColumn(f"score_{kind}", kind, 2) for kind in KINDS),
    ),
    protocol=False,
    note="unreadable verdicts, in no mean",
)


# ------------------------------------------------------------------------------------------------------- benchmark

_RLAIF_V = f"{GITHUB_RAW}/RLHF-V/RLAIF-V/83d917b2e8118ca8e7877a796d72af9bb3e6b356/eval"
_QUESTIONS = "mmhal/mmhal-bench_answer_template.json"


def _image_urls(data: Path) -> dict[str, str]:
    """Map names to URLs: by image_id, or as on the Flickr page where a file of that name is there."""
    urls = {}
    for row in read_json(data / _QUESTIONS):
        source = PurePosixPath(row["image_src"])
        own = row["image_id"] + source.suffix
        urls[source.name if (data / "mmhal/images" / source.name).is_file() else own] = row["image_src"]
    return urls


BENCHMARK = Benchmark(
    name="mmhal",
    title="MMHal-Bench",
    wrong="is rated below 3 of 6",
    files=(
        File(
            _QUESTIONS,
            f"{_RLAIF_V}/data/mmhal-bench_answer_template.json",
            "28ed24e19ffef292597c35f1dad37760b2e0a088b3b40ca3b50f105fc1b951bb",
            50519,
        ),
        File("mmhal/eval_gpt_mmhal.py", f"{_RLAIF_V}/eval_gpt_mmhal.py", instead=_PROMPT, check=is_script),
    ),
    images=ImageSource(
        "mmhal/images",
        _image_urls,
        "each from its image_src in mmhal-bench_answer_template.json (some of these links may be dead), or by hand "
        "from the data set Shikhar/MMHal-Bench on Hugging Face",
    ),
    load=load,
    parts=(Part(DECODING),),
    score=score,
    metrics=METRICS,
    columns=(
        SummaryColumn("score", "MMHal", rim=6, decimals=2),
        SummaryColumn("hallucination_rate", "MMHal hal."),
        SummaryColumn("mean_words", "MMHal words", rim=None),
    ),
    modes=(Mode(judged=True),),
    judge=JUDGE,
    trade_off=TradeOff("mean_words", ("hallucination_rate", "score")),
    table=format_table,
    published_file=Path(__file__).with_name("mmhal_published.json"),
)
