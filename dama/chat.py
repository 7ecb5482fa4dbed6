"""Asking an OpenAI-compatible server: concurrent, retried, cached by content.

The key is read from OPENAI_API_KEY and never written; a server that wants none is asked without one.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from dama.console import digest_of, printable, say

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_LONGEST_PAUSE = 8.0  # seconds between two attempts after an answer that was no answer
_SEEDS_A_SAMPLE = 1000  # room for the tries of one sample before the next sample's seeds begin

Accept = Callable[[str], bool]


class ChatError(RuntimeError):
    """The server cannot be used at all: not there, key refused, model or address unknown to it."""


@dataclass(frozen=True)
class ChatSettings:
    """Whom to ask and how. base_url ends in the API's version, e.g. http://127.0.0.1:8000/v1.

    temperature, max_tokens (of the reply), top_p, seed: sampling, part of the cache key; None leaves it to the server.
    concurrency: requests under way at once. timeout: seconds an attempt. retries: attempts after the first.
    """

    base_url: str
    model: str
    temperature: float = 0.0
    max_tokens: int = 512
    top_p: float | None = None
    seed: int | None = None
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 6

    def __post_init__(self) -> None:
        faults = []
        if not self.base_url.startswith(("http://", "https://")):
            faults.append(f"base_url: expected http://HOST/v1 or https://HOST/v1, got {self.base_url!r}")
        if not self.model:
            faults.append("model: expected the name that the server gives it, got an empty one")
        for name, least in (("temperature", 0), ("max_tokens", 1), ("concurrency", 1), ("retries", 0)):
            if getattr(self, name) < least:
                faults.append(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if self.timeout <= 0:
            faults.append(f"timeout: expected more than 0 seconds, got {self.timeout}")
        if faults:
            raise ValueError("chat settings: " + "; ".join(faults))


@dataclass(frozen=True)
class ChatRequest:
    """One conversation to be continued, in OpenAI's format, pictures as data URLs. `id` is the caller's.

    sample: which of several independent draws for the same messages this is; one draw is asked for once and kept.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    sample: int = 0


@dataclass(frozen=True)
class ChatReply:
    """What came back: text, or error where nothing usable did. `model` is the version that the server names."""

    id: str
    text: str | None
    error: str | None
    model: str
    prompt_tokens: int
    completion_tokens: int
    cached: bool


@dataclass
class ChatUsage:
    """Counts of one client so far; tokens that were paid for now, and those that the cache saved, apart.

    asked: replies from the server. cached: replies from the cache. rejected: replies that `accept` turned down, of
    both. failed: requests left without a reply.
    """

    asked: int = 0
    cached: int = 0
    rejected: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_prompt_tokens: int = 0
    cached_completion_tokens: int = 0


@dataclass(frozen=True)
class _Entry:
    """A reply as the cache keeps it."""

    text: str
    model: str
    prompt_tokens: int
    completion_tokens: int


class ChatClient:
    """Asks one model with one setting. cache: a JSONL file that is only appended to; None remembers in memory."""

    def __init__(self, settings: ChatSettings, cache: str | Path | None = None) -> None:
        self.settings = settings
        self.usage = ChatUsage()
        self._path = None if cache is None else Path(cache)
        self._entries = _read_cache(self._path) if self._path is not None else {}

    def ask(
        self,
        requests: Sequence[ChatRequest],
        *,
        accept: Accept | None = None,
        tries: int = 1,
        desc: str = "chat",
        on_reply: Callable[[ChatReply], None] | None = None,
    ) -> dict[str, ChatReply]:
        """id -> reply, in the order of the requests; on_reply sees each as it comes.

        A text that `accept` turns down is asked for anew, up to `tries` times in all; if none is accepted the last one
        is returned. Requests of equal content are asked once. A request that fails for good is a reply with an error.
        Raises ChatError where the very first request finds no server, or is told that key or model are refused.
        """
        repeated = [id_ for id_, count in Counter(request.id for request in requests).items() if count > 1]
        if repeated:
            raise ValueError(f"chat requests: {len(repeated)} ids are used more than once, e.g. {repeated[0]!r}")
        accept = accept or (lambda text: True)
        replies: dict[str, ChatReply] = {}
        with tqdm(total=len(requests), desc=printable(desc), unit="reply", disable=not requests) as bar:

            def keep(group: Sequence[ChatRequest], reply: ChatReply) -> None:
                for request in group:
                    replies[request.id] = replace(reply, id=request.id)
                    if on_reply is not None:
                        on_reply(replies[request.id])
                    bar.update()

            open_groups = []
            for group in self._by_content(requests):
                entry, number = self._recall(group[0], accept, tries)
                if entry is not None:
                    keep(group, self._from_cache(entry))
                else:
                    open_groups.append((group, number))
            if open_groups:
                asyncio.run(self._ask_server(open_groups, accept, tries, keep))
        return {request.id: replies[request.id] for request in requests}

    def _by_content(self, requests: Sequence[ChatRequest]) -> list[list[ChatRequest]]:
        groups: dict[str, list[ChatRequest]] = {}
        for request in requests:
            groups.setdefault(self._key(request, 0), []).append(request)
        return list(groups.values())

    def _sampling(self, request: ChatRequest, number: int) -> dict[str, Any]:
        """What the server is told beside the messages; `number` counts the tries from 0."""
        settings = self.settings
        chosen: dict[str, Any] = {"temperature": settings.temperature, "max_tokens": settings.max_tokens}
        if settings.top_p is not None:
            chosen["top_p"] = settings.top_p
        if settings.seed is not None:
            chosen["seed"] = settings.seed + _SEEDS_A_SAMPLE * request.sample + number
        return chosen

    def _key(self, request: ChatRequest, number: int) -> str:
        question = {"model": self.settings.model, "messages": list(request.messages), "sample": request.sample}
        return digest_of(question | {"sampling": self._sampling(request, number), "try": number})

    def _recall(self, request: ChatRequest, accept: Accept, tries: int) -> tuple[_Entry | None, int]:
        """The reply that the cache settles the request with, or None and the try to go on with."""
        entry = None
        for number in range(tries):
            entry = self._entries.get(self._key(request, number))
            if entry is None:
                return None, number
            if accept(entry.text):
                break
            self.usage.rejected += 1
        return entry, tries

    def _from_cache(self, entry: _Entry) -> ChatReply:
        self.usage.cached += 1
        self.usage.cached_prompt_tokens += entry.prompt_tokens
        self.usage.cached_completion_tokens += entry.completion_tokens
        return _reply(entry, cached=True)

    async def _ask_server(
        self,
        groups: Sequence[tuple[Sequence[ChatRequest], int]],
        accept: Accept,
        tries: int,
        keep: Callable[[Sequence[ChatRequest], ChatReply], None],
    ) -> None:
        import openai

        settings = self.settings
        room = asyncio.Semaphore(settings.concurrency)
        async with openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=settings.timeout,
            max_retries=settings.retries,
        ) as server:

            async def one(group: Sequence[ChatRequest], number: int, *, first: bool = False) -> None:
                async with room:
                    keep(group, await self._settle(server, group[0], number, accept, tries, first))

            # One goes ahead: where there is no server, or the key is refused, the others need not find out too.
            await one(*groups[0], first=True)
            tasks = [asyncio.create_task(one(group, number)) for group, number in groups[1:]]
            try:
                await asyncio.gather(*tasks)
            finally:  # where the caller's on_reply raises, the others stop before their connections close
                for task in tasks:
                    task.cancel()

    async def _settle(
        self, server: AsyncOpenAI, request: ChatRequest, start: int, accept: Accept, tries: int, first: bool
    ) -> ChatReply:
        """Tries `start`, `start` + 1 ... until one is accepted; a failure ends it."""
        import openai

        for number in range(start, tries):
            try:
                entry = await self._once(server, request, number)
            except (openai.APIError, ValueError) as error:
                if first and number == start and (reason := _hopeless(error)):
                    raise ChatError(self._unusable(reason, error)) from error
                self.usage.failed += 1
                return ChatReply(request.id, None, _describe(error), "", 0, 0, cached=False)
            self._remember(request, number, entry)
            if accept(entry.text):
                break
            self.usage.rejected += 1
        return _reply(entry, cached=False)

    async def _once(self, server: AsyncOpenAI, request: ChatRequest, number: int) -> _Entry:
        """One try's reply. Errors of transport and status the library repeats; answers it cannot read we repeat."""
        failures = 0
        while True:
            try:
                completion = await server.chat.completions.create(
                    model=self.settings.model,
                    messages=list(request.messages),  # type: ignore[arg-type]
                    **self._sampling(request, number),
                )
                return _entry(completion)
            except ValueError:
                if failures == self.settings.retries:
                    raise
            await asyncio.sleep(min(_LONGEST_PAUSE, 0.25 * 2**failures))
            failures += 1

    def _remember(self, request: ChatRequest, number: int, entry: _Entry) -> None:
        self.usage.asked += 1
        self.usage.prompt_tokens += entry.prompt_tokens
        self.usage.completion_tokens += entry.completion_tokens
        key = self._key(request, number)
        self._entries[key] = entry
        if self._path is not None:
            line = json.dumps({"key": key, "id": request.id, "try": number, **asdict(entry)}, ensure_ascii=False)
            _append(self._path, line)

    def _unusable(self, reason: str, error: Exception) -> str:
        where = f"{self.settings.base_url}, model {self.settings.model}"
        return f"chat: {reason} ({where}): {_describe(error)}\nRemedy: {_REMEDIES[reason]}"


_REMEDIES = {
    "no server answers": "start the server, or correct the base URL (it ends in /v1 for most servers)",
    "the key is refused": "set OPENAI_API_KEY to a key of this server",
    "the server knows no such model or address": "give the model's name as the server lists it under /models",
}


def _hopeless(error: Exception) -> str | None:
    """Why no other request would fare better, or None where this one alone may be at fault."""
    import openai

    if isinstance(error, (openai.AuthenticationError, openai.PermissionDeniedError)):
        return "the key is refused"
    if isinstance(error, openai.NotFoundError):
        return "the server knows no such model or address"
    late = isinstance(error, openai.APITimeoutError) and "Connect" not in type(error.__cause__).__name__
    return "no server answers" if isinstance(error, openai.APIConnectionError) and not late else None


def _entry(completion: Any) -> _Entry:
    """Reads a completion, whose fields the server may have left out; no text at all counts as an empty one.

    Raises ValueError for what is no completion.
    """
    try:
        text = completion.choices[0].message.content or ""
    except (AttributeError, TypeError, IndexError) as error:
        got = str(completion)[:200]
        raise ValueError(f"expected a chat completion with choices[0].message, got {got!r}") from error
    if not isinstance(text, str):
        raise ValueError(f"expected text in choices[0].message.content, got {type(text).__name__}")
    usage = getattr(completion, "usage", None)
    tokens = [getattr(usage, name, None) or 0 for name in ("prompt_tokens", "completion_tokens")]
    return _Entry(text, str(getattr(completion, "model", None) or ""), *tokens)


def _reply(entry: _Entry, *, cached: bool) -> ChatReply:
    return ChatReply("", entry.text, None, entry.model, entry.prompt_tokens, entry.completion_tokens, cached)


def _describe(error: Exception) -> str:
    """One line: kind, message, and what the connection library said below it."""
    cause = f" ({error.__cause__})" if str(error.__cause__ or "") else ""
    return " ".join(f"{type(error).__name__}: {error}{cause}".split())[:500]


def _read_cache(path: Path) -> dict[str, _Entry]:
    """key -> reply; lines torn by a kill are counted, said and asked for again."""
    if not path.exists():
        return {}
    entries, torn = {}, 0
    with open(path, "rb") as file:
        for line in file:
            try:
                row = json.loads(line)
                key = row.pop("key")
                entries[key] = _Entry(*(row[name] for name in ("text", "model", "prompt_tokens", "completion_tokens")))
            except (ValueError, TypeError, KeyError, AttributeError):
                torn += bool(line.strip())
    if torn:
        say(f"chat: {path}: {torn} unreadable lines skipped, {len(entries)} replies kept")
    return entries


def _append(path: Path, line: str) -> None:
    """One write a line, so that processes that share the file do not mix theirs; a torn last line is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        else:
            torn = False
        file.write((("\n" if torn else "") + line + "\n").encode("utf-8"))


def picture(data: bytes, kind: str = "jpeg") -> dict[str, Any]:
    """The part of a turn that shows a picture, given as the bytes of its file."""
    import base64

    url = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return {"type": "image_url", "image_url": {"url": url}}
