"""A judge's verdicts on answers: asked for over HTTP, stored in verdicts.jsonl, and read from there again."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from types import NoneType
from typing import Any

from dama.chat import ChatClient, ChatReply, ChatRequest, ChatSettings, ChatUsage
from dama.chat import after_thoughts as after_thoughts  # read by every benchmark's parse
from dama.console import digest_of, write_atomic
from dama.errors import error_list
from eval.core.official import Fields, field_errors, read_json

VERDICTS = "verdicts.jsonl"
CACHE = "judge_cache.jsonl"  # every reply as it came; an interrupted run continues from it


# ------------------------------------------------------------------------------------------------------- verdicts


@dataclass(frozen=True)
class Verdict:
    """The judge's reply about one answer; `error` instead of `text` where there was no reply.

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
        """The text, or the reason that there is none."""
        if self.text:
            return self.text
        return f"({self.error or 'no reply'})" if self.text is None else f"(empty reply, finish reason {self.finish})"


@dataclass(frozen=True)
class JudgeRun:
    """All verdicts on one model's answers. usage: paid and cached replies of this run; nothing on replay."""

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
        """Return the judge's entry in results.json; metrics of judges that differ in it are not comparable."""
        named = {"name": self.name, "version": self.version}
        return named | {"prompt_digest": self.prompt_digest, "temperature": self.temperature}

    def cost(self, prompt_price: float, completion_price: float) -> float:
        """Return the cost of this run, in the currency of the prices, which are per million tokens."""
        return (self.usage.prompt_tokens * prompt_price + self.usage.completion_tokens * completion_price) / 1e6

    def summary(self, prices: tuple[float, float] | None = None) -> str:
        """Return one line on replies and tokens, and on the cost where prices are given, as `cost` takes them."""
        usage = self.usage
        cost = f", cost {self.cost(*prices):.2f}" if prices else ""
        failed = next((f"; failed, e.g. {v.id}: {v.error}" for v in self.verdicts if v.text is None), "")
        return (
            f"judge {self.name} ({self.version or 'version not named'}): {len(self.verdicts)} verdicts; "
            f"{usage.asked} replies paid for, {usage.cached} from the cache, {usage.failed} failed; "
            f"{usage.prompt_tokens} prompt and {usage.completion_tokens} completion tokens{cost}{failed}"
        )

    def save(self, folder: str | Path) -> None:
        """Write folder/verdicts.jsonl, one verdict per line, each with the judge that gave it."""
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
    """Ask for `runs` independent verdicts on each request and store them in folder/verdicts.jsonl.

    A verdict that `parse` returns None for is asked for up to `tries` times, always with the same settings. An
    interrupted run continues where it stopped, whatever the order of the requests: replies are stored by content.
    """

    def readable(text: str) -> bool:
        return parse(text) is not None

    client = ChatClient(settings, Path(folder) / CACHE)
    verdicts = []
    for run in range(runs):
        samples = [replace(request, sample=run) for request in requests]
        replies = client.ask(samples, accept=readable, tries=tries, desc=f"judge, run {run + 1} of {runs}")
        verdicts += [verdict_of(request, replies[request.id]) for request in samples]
    result = JudgeRun(settings.model, settings.temperature, prompt_digest, tuple(verdicts), client.usage)
    result.save(folder)
    return result


def verdict_of(request: ChatRequest, reply: ChatReply) -> Verdict:
    """Store a reply, or its error, under the request's digest together with its token counts."""
    tokens = reply.prompt_tokens, reply.completion_tokens
    who = reply.text, reply.error, reply.model
    return Verdict(request.id, request.sample, _digest(request), *who, *tokens, reply.finish)


def _digest(request: ChatRequest) -> str:
    return digest_of(list(request.messages))


def replay(folder: str | Path, requests: Sequence[ChatRequest]) -> JudgeRun:
    """Read the verdicts in folder/verdicts.jsonl on exactly these requests, without asking a judge.

    Raises ValueError, naming every error: a request without verdict, a verdict on another answer, two judges in a file.
    """
    path, remedy = Path(folder) / VERDICTS, "ask the judge about these answers"
    if not path.is_file():
        raise ValueError(f"{path}: missing\nRemedy: {remedy}")
    rows = read_json(path)
    if errors := [error for i, row in enumerate(rows, 1) for error in field_errors(f"line {i}", row, _LINE)]:
        raise ValueError(error_list(str(path), errors, remedy))
    judges = {(row["judge"], row["temperature"], row["prompt_digest"]) for row in rows}
    names = [each.name for each in fields(Verdict)]  # files of earlier versions have no finish reason
    verdicts = tuple(Verdict(**{name: row.get(name) for name in names} | {"finish": _finish(row)}) for row in rows)
    asked = {request.id: _digest(request) for request in requests}
    errors = [f"verdict on {v.id!r}: on another answer or prompt" for v in verdicts if asked.get(v.id) != v.request]
    errors += [f"answer {id_!r}: no verdict" for id_ in asked if id_ not in {verdict.id for verdict in verdicts}]
    if len(judges) != 1:
        errors.append(f"expected the verdicts of one judge, got {sorted(map(str, judges))}")
    if errors:
        raise ValueError(error_list(str(path), errors, remedy))
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
