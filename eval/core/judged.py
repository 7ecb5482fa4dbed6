"""A judge as the benchmark's authors used it, and the score that its verdicts give.

A verdict that cannot be read is counted and left out of the means; only `official_quirks` gives it the value that the
original scorer does.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any, Generic, TypeVar

from dama.chat import ChatRequest, ChatSettings
from dama.errors import error_list
from eval.core.judge import JudgeRun, Verdict, ask_judge
from eval.core.metrics import Grouping, Metric, ratios
from eval.core.scores import QUIRKS, Score, score_items
from eval.core.types import Answer, BenchmarkData, Parts, Question, Record, record_of

Value = TypeVar("Value")


def ask_once(
    settings: ChatSettings, requests: Sequence[ChatRequest], folder: str | Path, prompt_digest: str, *, runs: int = 1
) -> JudgeRun:
    """Ask for `runs` verdicts and take each first reply, as most original scorers do."""
    return ask_judge(settings, requests, folder, prompt_digest, parse=lambda text: text, runs=runs)


@dataclass(frozen=True)
class Judge:
    """The judge that the benchmark's authors used, its settings, and how its verdicts are asked for and read.

    requests: (data, answers, official_quirks=) -> one request per answer. parse, parse_official: a verdict's text ->
    value, None where it cannot be read; the second as the original scorer does. unreadable: the value that the original
    scorer gives a verdict that it cannot read, None where it gives none. tries: how often a verdict is asked for until
    it can be read. repeats: whether several verdicts on each answer may be asked for. ask_official: as `ask_once`, what
    the original scorer does.
    """

    model: str
    temperature: float
    max_tokens: int
    requests: Callable[..., list[ChatRequest]]
    parse: Callable[[str], Any]
    parse_official: Callable[[str], Any]
    unreadable: Any = None
    tries: int = 3
    repeats: bool = True
    ask_official: Callable[..., JudgeRun] = ask_once

    def settings(self, base_url: str, model: str | None = None, **others: Any) -> ChatSettings:
        """Return these settings for a server, and another model if one is named; `others` as in ChatSettings."""
        chosen = {"temperature": self.temperature, "max_tokens": self.max_tokens} | others
        return ChatSettings(base_url, model or self.model, **chosen)

    def ask(
        self,
        data: BenchmarkData,
        answers: Iterable[Answer],
        settings: ChatSettings,
        out: str | Path,
        *,
        runs: int = 1,
        tries: int | None = None,
        official_quirks: bool = False,
    ) -> JudgeRun:
        """Ask for `runs` verdicts on each answer and write out/verdicts.jsonl.

        Unreadable verdicts are asked for up to `tries` times; official_quirks asks as the original scorer does.
        """
        requests = self.requests(data, answers, official_quirks=official_quirks)
        if official_quirks:
            return self.ask_official(settings, requests, out, data.prompt_digest, runs=runs)
        times = self.tries if tries is None else tries
        return ask_judge(settings, requests, out, data.prompt_digest, parse=self.parse, runs=runs, tries=times)


@dataclass(frozen=True)
class _Judged(Generic[Value]):
    """An answer with its verdicts, and the value that each was read as; None for an unreadable one."""

    question: Question
    answer: Answer
    verdicts: Sequence[Verdict]
    read: Sequence[Value | None]
    unreadable: Value | None

    def values(self, run: int | None = None) -> list[Value]:
        """Return the values that count, of all runs of the judge or of one."""
        chosen = [value for verdict, value in zip(self.verdicts, self.read) if run in (None, verdict.run)]
        filled = [self.unreadable if value is None else value for value in chosen]
        return [value for value in filled if value is not None]


def score_verdicts(
    protocol: str,
    judge: Judge,
    metrics: Sequence[Metric],
    data: BenchmarkData,
    answers: Iterable[Answer],
    run: JudgeRun,
    *,
    parts: Callable[[Question, Sequence[Any]], Parts],
    wrong: Callable[[Sequence[Any]], bool],
    of_text: Callable[[str], Parts] = lambda text: {},
    groupings: Sequence[Grouping] = (),
    official_quirks: bool = False,
) -> Score:
    """Compute a score from verdicts. Raises ValueError for an answer that has none.

    metrics: NAME_std of the first, where it is listed, is its standard deviation over runs of the judge. parts, wrong:
    of one answer, from the values of its verdicts, at least one. of_text: parts that do not depend on verdicts.
    """
    first = metrics[0].name
    listed = [metric.name for metric in metrics if metric.formula is None]
    of_items = [name for name in listed if name != f"{first}_std"]

    def parts_of(item: _Judged[Any], number: int | None = None) -> Parts:
        values = item.values(number)
        judged = parts(item.question, values) if values else {}
        return {name: [0.0, 0.0] for name in of_items} | judged | of_text(item.answer.text)

    items = _read(judge, _joined(data, answers, run), official_quirks)
    runs = sorted({verdict.run for verdict in run.verdicts})
    by_run = tuple(ratios([{"parts": parts_of(item, number)} for item in items], of_items)[first] for number in runs)
    return score_items(
        protocol + QUIRKS * official_quirks,
        metrics,
        [_record(item, parts_of(item), wrong) for item in items],
        data.questions,
        groupings=groupings,
        others={f"{first}_std": _deviation(by_run)} if len(of_items) < len(listed) else None,
        counts=_counts(items),
        judge=run.provenance(),
        by_run=by_run,
    )


def _read(
    judge: Judge, joined: Iterable[tuple[Question, Answer, list[Verdict]]], official_quirks: bool
) -> list[_Judged[Any]]:
    """Read the text of every verdict as a value."""
    parse, unreadable = (judge.parse_official, judge.unreadable) if official_quirks else (judge.parse, None)
    return [
        _Judged(question, answer, verdicts, [parse(v.text or "") for v in verdicts], unreadable)
        for question, answer, verdicts in joined
    ]


def _joined(
    data: BenchmarkData, answers: Iterable[Answer], run: JudgeRun
) -> list[tuple[Question, Answer, list[Verdict]]]:
    """Join every answer with its question and verdicts, by id. ValueError for either without the other, or twice."""
    given = data.answered(answers)
    verdicts: dict[str, list[Verdict]] = {question.id: [] for question, _ in given}
    errors = [f"verdict on {v.id!r}: there is no such answer" for v in run.verdicts if v.id not in verdicts]
    times = Counter((verdict.id, verdict.run) for verdict in run.verdicts)
    errors += [f"verdict on {id_!r}: {n} of them in run {number}" for (id_, number), n in times.items() if n > 1]
    for verdict in sorted(run.verdicts, key=lambda verdict: verdict.run):
        verdicts.get(verdict.id, []).append(verdict)
    errors += [f"answer {id_!r}: no verdict" for id_, found in verdicts.items() if not found]
    if errors:
        raise ValueError(error_list("verdicts", errors, "score the answers that the judge was asked about"))
    return [(question, answer, verdicts[question.id]) for question, answer in given]


def _deviation(values: Sequence[float | None]) -> float | None:
    """Sample standard deviation; None for fewer than two values."""
    known = [value for value in values if value is not None]
    return stdev(known) if len(known) > 1 else None


def _record(item: _Judged[Any], parts: Parts, wrong: Callable[[Sequence[Any]], bool]) -> Record:
    question, values = item.question, item.values()
    return record_of(
        question,
        item.answer.text,
        wrong=wrong(values) if values else None,
        parts=parts,
        kinds=list(question.kinds),
        context=question.context,
        verdicts=[verdict.shown for verdict in item.verdicts],
        values=list(item.read),
    )


def _counts(items: Sequence[_Judged[Any]]) -> Mapping[str, int]:
    pairs = [pair for item in items for pair in zip(item.verdicts, item.read)]
    return {
        "verdicts": len(pairs),
        "unparsed": sum(verdict.text is not None and value is None for verdict, value in pairs),
        "failed": sum(verdict.text is None for verdict, _ in pairs),
    }
