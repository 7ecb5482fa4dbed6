"""A judge's verdicts on answers: asked over HTTP, kept in verdicts.jsonl, turned into metrics and item records.

What MMHal-Bench, LLaVA-Bench and MM-Vet share. A verdict that cannot be read is counted and left out of the means;
only `official_quirks` gives it the value that the original does.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from statistics import stdev
from types import NoneType
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from dama.chat import ChatClient, ChatReply, ChatRequest, ChatSettings, ChatUsage
from dama.chat import after_thoughts as after_thoughts  # read by every benchmark's parse
from dama.console import digest_of, write_atomic
from dama.errors import error_list
from eval.core.official import Fields, field_faults, read_json
from eval.core.statistics import Interval, ratio_interval
from eval.core.types import Answer, Benchmark, Question

if TYPE_CHECKING:
    pass

VERDICTS = "verdicts.jsonl"
CACHE = "judge_cache.jsonl"  # every reply as it came; an interrupted run goes on from it
QUIRKS = "-official-quirks"  # ends the protocol's label where the original's handling is reproduced

Value = TypeVar("Value")
Parts = dict[str, list[float]]
"""metric -> [numerator, denominator]"""


# ------------------------------------------------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class OfficialJudge:
    """The judge that the benchmark's authors used, and its settings."""

    model: str
    temperature: float
    max_tokens: int

    def settings(self, base_url: str, model: str | None = None, **others: Any) -> ChatSettings:
        """These settings for a server, and for another model if one is named; `others` as in ChatSettings."""
        chosen = {"temperature": self.temperature, "max_tokens": self.max_tokens} | others
        return ChatSettings(base_url, model or self.model, **chosen)


@dataclass(frozen=True)
class Verdict:
    """What the judge wrote about one answer; `error` instead of `text` where no reply could be had.

    run: counts from 0 how often the same was asked. request: digest of the messages. version: as the server names it.
    finish: why the text ends, as the server says it.
    """

    id: str
    run: int
    request: str
    text: str | None
    error: str | None
    version: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: str = ""

    @property
    def shown(self) -> str:
        """The text, or why there is none."""
        if self.text:
            return self.text
        return f"({self.error or 'no reply'})" if self.text is None else f"(empty reply, finish reason {self.finish})"


@dataclass(frozen=True)
class JudgeRun:
    """All verdicts on one model's answers. usage: what this run paid for and what its cache held; nothing on replay."""

    name: str
    temperature: float | None  # None where it is left to the server
    prompt_digest: str
    verdicts: tuple[Verdict, ...]
    usage: ChatUsage = field(default_factory=ChatUsage, compare=False)

    @property
    def version(self) -> str:
        """The version, or versions, that the server named: behind an alias such as gpt-4 they change."""
        return ", ".join(sorted({verdict.version for verdict in self.verdicts} - {""}))

    def provenance(self) -> dict[str, Any]:
        """What results.json says of the judge; figures of judges that differ in it may not be compared."""
        named = {"name": self.name, "version": self.version}
        return named | {"prompt_digest": self.prompt_digest, "temperature": self.temperature}

    def cost(self, prompt_price: float, completion_price: float) -> float:
        """Of what this run paid for, in the currency of the prices, which are per million tokens."""
        return (self.usage.prompt_tokens * prompt_price + self.usage.completion_tokens * completion_price) / 1e6

    def summary(self, prices: tuple[float, float] | None = None) -> str:
        """One line on replies and tokens, and on the cost where prices are given, as `cost` takes them."""
        usage = self.usage
        cost = f", cost {self.cost(*prices):.2f}" if prices else ""
        failed = next((f"; failed, e.g. {v.id}: {v.error}" for v in self.verdicts if v.text is None), "")
        return (
            f"judge {self.name} ({self.version or 'version not named'}): {len(self.verdicts)} verdicts; "
            f"{usage.asked} replies paid for, {usage.cached} from the cache, {usage.failed} failed; "
            f"{usage.prompt_tokens} prompt and {usage.completion_tokens} completion tokens{cost}{failed}"
        )

    def save(self, folder: str | Path) -> None:
        """Writes folder/verdicts.jsonl, one verdict a line, each with the judge that gave it."""
        judge = {"judge": self.name, "temperature": self.temperature, "prompt_digest": self.prompt_digest}
        lines = [json.dumps(asdict(verdict) | judge, ensure_ascii=False) + "\n" for verdict in self.verdicts]
        write_atomic(Path(folder) / VERDICTS, "".join(lines))


def ask_judge(
    settings: ChatSettings,
    requests: Sequence[ChatRequest],
    folder: str | Path,
    prompt_digest: str,
    *,
    parse: Callable[[str], Any],
    runs: int = 1,
    tries: int = 1,
) -> JudgeRun:
    """Asks for `runs` independent verdicts on each request and keeps them in folder/verdicts.jsonl.

    A verdict that `parse` makes None of is asked for up to `tries` times, always with the same settings. An interrupted
    run goes on where it stopped, whatever the order of the requests: replies are kept by content.
    """

    def readable(text: str) -> bool:
        return parse(text) is not None

    client = ChatClient(settings, Path(folder) / CACHE)
    verdicts = []
    for run in range(runs):
        drawn = [replace(request, sample=run) for request in requests]
        replies = client.ask(drawn, accept=readable, tries=tries, desc=f"judge, run {run + 1} of {runs}")
        verdicts += [verdict_of(request, replies[request.id]) for request in drawn]
    result = JudgeRun(settings.model, settings.temperature, prompt_digest, tuple(verdicts), client.usage)
    result.save(folder)
    return result


def judge_answers(
    benchmark: Benchmark,
    answers: Iterable[Answer],
    settings: ChatSettings,
    out: str | Path,
    *,
    judge_requests: Callable[[Benchmark, Iterable[Answer]], Sequence[ChatRequest]],
    parse: Callable[[str], Any],
    runs: int = 1,
    tries: int = 1,
    official_quirks: bool = False,
) -> JudgeRun:
    """Asks the judge, `runs` times, and writes out/verdicts.jsonl. Unreadable verdicts are asked for `tries` times.

    `official_quirks` leaves it at the first reply, as the originals do.
    """
    asked = judge_requests(benchmark, answers)
    tries = 1 if official_quirks else tries
    return ask_judge(settings, asked, out, benchmark.prompt_digest, parse=parse, runs=runs, tries=tries)


def verdict_of(request: ChatRequest, reply: ChatReply) -> Verdict:
    tokens = reply.prompt_tokens, reply.completion_tokens
    who = reply.text, reply.error, reply.model
    return Verdict(request.id, request.sample, _digest(request), *who, *tokens, reply.finish)


def _digest(request: ChatRequest) -> str:
    return digest_of(list(request.messages))


def replay(folder: str | Path, requests: Sequence[ChatRequest]) -> JudgeRun:
    """The verdicts that folder/verdicts.jsonl holds on exactly these requests; asks nobody.

    Raises ValueError, naming every fault: a request without verdict, a verdict on another answer, two judges in a file.
    """
    path, remedy = Path(folder) / VERDICTS, "ask the judge about these answers"
    if not path.is_file():
        raise ValueError(f"{path}: missing\nRemedy: {remedy}")
    rows = read_json(path)
    if faults := [fault for i, row in enumerate(rows, 1) for fault in field_faults(f"line {i}", row, _LINE)]:
        raise ValueError(error_list(str(path), faults, remedy))
    judges = {(row["judge"], row["temperature"], row["prompt_digest"]) for row in rows}
    names = [each.name for each in fields(Verdict)]  # files of earlier versions have no finish reason
    verdicts = tuple(Verdict(**{name: row.get(name) for name in names} | {"finish": _finish(row)}) for row in rows)
    asked = {request.id: _digest(request) for request in requests}
    faults = [f"verdict on {v.id!r}: on another answer or prompt" for v in verdicts if asked.get(v.id) != v.request]
    faults += [f"answer {id_!r}: no verdict" for id_ in asked if id_ not in {verdict.id for verdict in verdicts}]
    if len(judges) != 1:
        faults.append(f"expected the verdicts of one judge, got {sorted(map(str, judges))}")
    if faults:
        raise ValueError(error_list(str(path), faults, remedy))
    return JudgeRun(*judges.pop(), verdicts)


_LINE: Fields = {
    "id": (str,),
    "run": (int,),
    "request": (str,),
    "text": (str, NoneType),
    "version": (str,),
    "prompt_tokens": (int,),
    "completion_tokens": (int,),
    "judge": (str,),
    "temperature": (int, float, NoneType),
    "prompt_digest": (str,),
}


def _finish(row: Mapping[str, Any]) -> str:
    return str(row.get("finish") or "")


_DOUBT = r"(?:maybe|perhaps|possibly|could\s+be)"
_NEXT = rf"(?:to|or|and|then|vs|versus|no|wait|{_DOUBT}|but\s+{_DOUBT})"
_MORE_NUMBERS = re.compile(
    rf"[^\w\n(]*(?:\(\s*(?={_NEXT}\b))?(?:(?:{_NEXT}|even|between|out|of|as|high|low)\b[^\w\n(]*){{0,5}}\d"
)


def more_follow(text: str, end: int, scale: str) -> bool:
    """Whether the number that ends at `end` is the first of several, as in "1, 2", "1 or maybe 2", "1/2" and "1-2".

    scale: the best value; "5/6" and "5 out of 6" on a scale to 6 are one number.
    """
    rest = text[end:]
    if re.match(rf"\s*(?:/|out of)\s*{re.escape(scale)}(?:\.0+)?(?![\w.]*\d)", rest):
        return False
    return bool(_MORE_NUMBERS.match(rest))


# -------------------------------------------------------------------------------------------------------- scoring


@dataclass(frozen=True)
class JudgedScore:
    """metrics: name -> value, None where undefined; each is sum(first) / sum(second) of the items' `parts`.

    items: one record for each answer, as in results.json. counts: answers, missing (questions without one), and
    verdicts, of which unparsed (not readable) and failed (no reply). by_run: the first metric in each run of the judge.
    missing: ids of the questions without answer.
    """

    protocol: str
    metrics: Mapping[str, float | None]
    items: tuple[dict[str, Any], ...]
    counts: Mapping[str, int]
    judge: Mapping[str, Any]
    by_run: tuple[float | None, ...]
    missing: tuple[str, ...] = ()

    def interval(self, metric: str) -> Interval:
        """The metric with its 95 % bootstrap interval over pictures."""
        pairs = [item["parts"][metric] for item in self.items]
        columns = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        return ratio_interval(*columns, [item["image_id"] for item in self.items])


@dataclass(frozen=True)
class _Judged(Generic[Value]):
    """An answer with its verdicts, and what was read in each; None where nothing could be."""

    question: Question
    answer: Answer
    verdicts: Sequence[Verdict]
    read: Sequence[Value | None]
    otherwise: Value | None

    def values(self, run: int | None = None) -> list[Value]:
        """What counts, of all runs or of one."""
        chosen = [value for verdict, value in zip(self.verdicts, self.read) if run in (None, verdict.run)]
        filled = [self.otherwise if value is None else value for value in chosen]
        return [value for value in filled if value is not None]


def score_verdicts(
    protocol: str,
    benchmark: Benchmark,
    answers: Iterable[Answer],
    run: JudgeRun,
    metrics: Sequence[str],
    *,
    parse: Callable[[str], Value | None],
    parts: Callable[[Question, Sequence[Value]], Parts],
    wrong: Callable[[Sequence[Value]], bool],
    otherwise: Value | None = None,
) -> JudgedScore:
    """Metrics and records from verdicts. Raises ValueError for an answer that has none.

    parse: a verdict's text -> value or None. parts, wrong: of one answer, from the values of its runs, one at least.
    otherwise: the value of an unreadable verdict; None leaves it out. The first metric also gets its standard deviation
    over runs, as NAME_std.
    """

    def parts_of(item: _Judged[Value], run: int | None = None) -> Parts:
        values = item.values(run)
        return {name: [0.0, 0.0] for name in metrics} | (parts(item.question, values) if values else {})

    items = [
        _Judged(question, answer, verdicts, [parse(v.text or "") for v in verdicts], otherwise)
        for question, answer, verdicts in _joined(benchmark, answers, run)
    ]
    rows = [parts_of(item) for item in items]
    runs = sorted({verdict.run for verdict in run.verdicts})
    by_run = tuple(_ratio([parts_of(item, number) for item in items], metrics[0]) for number in runs)
    figures: dict[str, float | None] = {name: _ratio(rows, name) for name in metrics}
    figures[f"{metrics[0]}_std"] = _deviation(by_run)
    records = [_record(item, row, wrong) for item, row in zip(items, rows)]
    answered = {item.question.id for item in items}
    missing = tuple(question.id for question in benchmark.questions if question.id not in answered)
    counts = _counts(items, missing)
    return JudgedScore(protocol, figures, tuple(records), counts, run.provenance(), by_run, missing)


def _joined(
    benchmark: Benchmark, answers: Iterable[Answer], run: JudgeRun
) -> list[tuple[Question, Answer, list[Verdict]]]:
    """Every answer with its question and its verdicts, by id. ValueError for either without the other, or twice."""
    given = benchmark.answered(answers)
    verdicts: dict[str, list[Verdict]] = {question.id: [] for question, _ in given}
    faults = [f"verdict on {v.id!r}: there is no such answer" for v in run.verdicts if v.id not in verdicts]
    times = Counter((verdict.id, verdict.run) for verdict in run.verdicts)
    faults += [f"verdict on {id_!r}: {n} of them in run {number}" for (id_, number), n in times.items() if n > 1]
    for verdict in sorted(run.verdicts, key=lambda verdict: verdict.run):
        verdicts.get(verdict.id, []).append(verdict)
    faults += [f"answer {id_!r}: no verdict" for id_, found in verdicts.items() if not found]
    if faults:
        raise ValueError(error_list("verdicts", faults, "score the answers that the judge was asked about"))
    return [(question, answer, verdicts[question.id]) for question, answer in given]


def _ratio(rows: Sequence[Parts], metric: str) -> float | None:
    below = sum(row[metric][1] for row in rows)
    return sum(row[metric][0] for row in rows) / below if below else None


def _deviation(values: Sequence[float | None]) -> float | None:
    """Sample standard deviation; None for fewer than two values."""
    known = [value for value in values if value is not None]
    return stdev(known) if len(known) > 1 else None


def _record(item: _Judged[Value], parts: Parts, wrong: Callable[[Sequence[Value]], bool]) -> dict[str, Any]:
    question, values = item.question, item.values()
    return {
        "id": question.id,
        "image_id": question.image_id,
        "image": question.image,
        "prompt": question.prompt,
        "text": item.answer.text,
        "truth": question.truth,
        "wrong": wrong(values) if values else None,
        "spans": [],
        "parts": parts,
        "kinds": list(question.kinds),
        "context": question.context,
        "verdicts": [verdict.shown for verdict in item.verdicts],
        "values": list(item.read),
    }


def _counts(items: Sequence[_Judged[Any]], missing: Sequence[str]) -> dict[str, int]:
    pairs = [pair for item in items for pair in zip(item.verdicts, item.read)]
    return {
        "answers": len(items),
        "missing": len(missing),
        "verdicts": len(pairs),
        "unparsed": sum(verdict.text is not None and value is None for verdict, value in pairs),
        "failed": sum(verdict.text is None for verdict, _ in pairs),
    }


# ---------------------------------------------------------------------------------------------------------- table


def format_scores(rows: Mapping[str, JudgedScore], columns: Mapping[str, tuple[str, int]]) -> str:
    """One aligned line per model; below it what is in no mean, by id. columns: metric -> (title, decimals).

    The first figure comes with its 95 % interval. Unparsed counts the verdicts without a value.
    """
    first = next(iter(columns))
    lines = [["", *(title for title, _ in columns.values()), "unparsed"]]
    for name, score in rows.items():
        cells = [_cell(score.metrics[metric], decimals) for metric, (_, decimals) in columns.items()]
        interval, decimals = score.interval(first), columns[first][1]
        if interval.value is not None:
            cells[0] += f" [{interval.low:.{decimals}f}, {interval.high:.{decimals}f}]"
        counts = score.counts
        lines.append([name, *cells, f"{counts['unparsed'] + counts['failed']} of {counts['verdicts']}"])
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = ["  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]) for line in lines]
    return "\n".join([*table, *(note for name, score in rows.items() for note in _notes(name, score))])


def _cell(value: float | None, decimals: int) -> str:
    return "n/a" if value is None else f"{value:.{decimals}f}"


def _notes(name: str, score: JudgedScore) -> list[str]:
    unread = [item["id"] for item in score.items if None in item["values"]]
    fate = "valued as the original does" if score.protocol.endswith(QUIRKS) else "in no mean"
    notes = {f"unreadable verdicts, {fate}": unread, "no answer": score.missing}
    return [f"{name}: {what}: {', '.join(ids)}" for what, ids in notes.items() if ids]
