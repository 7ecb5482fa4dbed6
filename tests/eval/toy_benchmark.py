"""A benchmark in one file: two questions about each image, of opposite truth, and a metric of both of them together."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from eval.core.benchmark import Benchmark, Part, SummaryColumn
from eval.core.metrics import Grouping, Metric
from eval.core.official import read_records
from eval.core.scores import Score, score_items
from eval.core.sources import File, ImageSource, rows_with
from eval.core.types import Answer, BenchmarkData, Parts, Question, Record, record_of

METRICS = (
    Metric("toy_score", "toy score", inputs=("accuracy", "both"), formula=lambda accuracy, both: accuracy + both),
    Metric("accuracy", "accuracy %"),
    Metric("both", "both right %"),
    Metric("silent", "unreadable %", "lower"),
)
FIELDS = {"id": (str,), "image": (str,), "question": (str,), "truth": (str,)}


def load(folder: Path, mode: str) -> BenchmarkData:
    """Read folder/toy/questions.jsonl; images are in folder/toy/images."""
    rows = read_records(folder / f"toy/questions{mode}.jsonl", FIELDS)
    questions = tuple(Question(row["id"], row["image"], row["question"], row["truth"]) for row in rows)
    return BenchmarkData(questions, "", folder / "toy/images")


def both_right(records: Sequence[Record]) -> Parts:
    """100 where all answers of a group are right."""
    return {"both": [100.0 * all(record["wrong"] is False for record in records), 1.0]}


def score(data: BenchmarkData, answers: Iterable[Answer], *, official_quirks: bool = False) -> Score:
    """Compute accuracy over answers, and over images with both answers right."""
    items = []
    for question, answer in data.answered(answers):
        reply = answer.text.strip().lower() if answer.text.strip().lower() in ("yes", "no") else None
        wrong = None if reply is None else reply != question.truth
        parts = {"accuracy": [100.0 * (wrong is False), 1.0], "silent": [100.0 * (reply is None), 1.0]}
        items.append(record_of(question, answer.text, wrong=wrong, parts=parts))
    pairs = Grouping("images", lambda question: question.image, both_right)
    return score_items("toy-quirks" if official_quirks else "toy", METRICS, items, data.questions, groupings=[pairs])


def image_urls(data: Path) -> dict[str, str]:
    """Map the images' names to their URLs."""
    lines = (data / "toy/questions.jsonl").read_text().splitlines()
    return {json.loads(line)["image"]: f"http://toy.invalid/{json.loads(line)['image']}" for line in lines}


BENCHMARK = Benchmark(
    name="toy",
    title="Toy Benchmark",
    wrong="is not the true yes or no",
    files=(File("toy/questions.jsonl", "http://toy.invalid/questions.jsonl", check=rows_with(*FIELDS)),),
    images=ImageSource("toy/images", image_urls, "each from http://toy.invalid/NAME"),
    load=load,
    parts=(Part({"max_new_tokens": 4, "num_beams": 1, "temperature": 0.0}),),
    score=score,
    metrics=METRICS,
    columns=(
        SummaryColumn("toy_score", "Toy", 200, kind="ability"),
        SummaryColumn("silent", "Toy silent", kind="ability"),
    ),
)
