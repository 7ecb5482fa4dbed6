"""Asking an OpenAI-compatible server: concurrent, retried, cached by content.

The key is read from OPENAI_API_KEY and never written; a server that wants none is asked without one. The server is not
trusted: replies are bounded in bytes and time, stay on its host, and lose credentials and what no file can hold.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tqdm import tqdm

from dama.completion import (
    NOTHING,
    SETTINGS,
    Completion,
    hopeless,
    is_of_one_request,
    pause_before_retry,
    read_completion,
    remedy_of,
    unreadable,
    well_formed,
)
from dama.console import digest_of, log, printable, regular_file, writing
from dama.redact import redacted, secrets_of_url

if TYPE_CHECKING:
    from openai import AsyncOpenAI

_LONGEST_PAUSE = 8.0  # seconds between two attempts where the server names none
_SCOUTS = 3  # requests that may fail, one after the other, before the server has answered any
_SEEDS_A_SAMPLE = 1000  # room for the tries of one sample before the next sample's seeds begin

Accept = Callable[[str], bool]
_Group = tuple[Sequence["ChatRequest"], int]
"""Requests of equal content, and the try to go on with."""


class ChatError(RuntimeError):
    """The server cannot be used at all: not there, key or setting refused, address unknown, no request answered."""


@dataclass(frozen=True)
class ChatSettings:
    """Whom to ask and how. base_url ends in the API's version, e.g. http://127.0.0.1:8000/v1.

    temperature, max_tokens (of the reply), top_p, seed: sampling, part of the cache key; None leaves it to the server.
    concurrency: requests under way at once. timeout: seconds that the server may be silent; an attempt may take twice
    that in all. retries: attempts after the first. give_up: whether it is an error that no request is answered.
    """

    base_url: str
    model: str
    temperature: float | None = 0.0
    max_tokens: int | None = 512
    top_p: float | None = None
    seed: int | None = None
    concurrency: int = 8
    timeout: float = 60.0
    retries: int = 6
    give_up: bool = False

    def __post_init__(self) -> None:
        errors = []
        if not _is_address(self.base_url):
            errors.append(f"base_url: expected http://HOST/v1 or https://HOST/v1, got {self.shown_url!r}")
        if not self.model:
            errors.append("model: expected the name that the server gives it, got an empty one")
        for name, least in (("temperature", 0), ("max_tokens", 1), ("concurrency", 1), ("retries", 0)):
            if getattr(self, name) is not None and getattr(self, name) < least:
                errors.append(f"{name}: expected {least} or more, got {getattr(self, name)}")
        if self.timeout <= 0:
            errors.append(f"timeout: expected more than 0 seconds, got {self.timeout}")
        if errors:
            raise ValueError("chat settings: " + "; ".join(errors))

    @property
    def shown_url(self) -> str:
        """The base URL without its credentials."""
        return redacted(self.base_url)

    def without(self, names: Collection[str]) -> ChatSettings:
        """These settings, of which some, named as in `dama.completion.SETTINGS`, are left to the server."""
        unknown = [name for name in names if name not in SETTINGS]
        if unknown:
            raise ValueError(f"chat settings: expected some of {', '.join(SETTINGS)}, got {', '.join(unknown)}")
        left_out: dict[str, Any] = dict.fromkeys(names)
        return replace(self, **left_out)


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, an unfinished [::1
        return False


@dataclass(frozen=True)
class ChatRequest:
    """One conversation to be continued, in OpenAI's format, images as data URLs. `id` is the caller's.

    sample: which of several independent draws for the same messages this is; one draw is asked for once and kept.
    """

    id: str
    messages: tuple[dict[str, Any], ...]
    sample: int = 0


@dataclass(frozen=True)
class ChatReply:
    """What came back: text, or error where nothing usable did. `model` is the version that the server names.

    finish: why the text ends, in the server's words, such as "stop" and "length". An empty text is no answer.
    """

    id: str
    text: str | None
    error: str | None
    model: str
    prompt_tokens: int
    completion_tokens: int
    cached: bool
    finish: str = ""

    @property
    def answer(self) -> str:
        """The text without a reasoning model's thoughts, stripped; "" where there is none."""
        return after_thoughts(self.text or "")

    @property
    def missing(self) -> str:
        """Why there is no answer, or ""."""
        if self.answer:
            return ""
        if self.text is None:
            return self.error or "no reply"
        if self.finish.startswith("refusal"):
            return self.finish
        why = "thoughts without an answer" if self.text.strip() else "empty reply"
        return f"{why}, finish reason {self.finish or 'not named'}"


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


def _validate_ids(requests: Sequence[ChatRequest]) -> None:
    repeated = [id_ for id_, count in Counter(request.id for request in requests).items() if count > 1]
    if repeated:
        raise ValueError(f"chat requests: {len(repeated)} ids are used more than once, e.g. {repeated[0]!r}")


class ChatClient:
    """Asks one model with one setting. cache: a JSONL file that is only appended to; None remembers in memory."""

    def __init__(self, settings: ChatSettings, cache: str | Path | None = None) -> None:
        self.settings = settings
        self.usage = ChatUsage()
        self._path = None if cache is None else Path(cache)
        self._entries = _read_cache(self._path) if self._path is not None else {}
        self._secrets = secrets_of_url(settings.base_url) | {os.environ.get("OPENAI_API_KEY", "")}

    def ask(
        self,
        requests: Sequence[ChatRequest],
        *,
        accept: Accept | None = None,
        tries: int = 1,
        desc: str = "chat",
        on_reply: Callable[[ChatReply], None] | None = None,
    ) -> dict[str, ChatReply]:
        """Id -> reply, in the order of the requests; on_reply sees each as it comes.

        A text that `accept` turns down is asked for anew, up to `tries` times in all; if none is accepted the last one
        is returned. Requests of equal content are asked once. A request that fails for good is a reply with an error.
        Requests go one by one until the server has answered this client once. Raises ChatError where before that one
        fails in a way in which all others would; and, with `give_up` and nothing in the cache, where several fail, or
        all.
        """
        _validate_ids(requests)
        accept = accept or (lambda _: True)
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
        seed = None if settings.seed is None else settings.seed + _SEEDS_A_SAMPLE * request.sample + number
        chosen = {"temperature": settings.temperature, "max_tokens": settings.max_tokens, "top_p": settings.top_p}
        return {name: value for name, value in (chosen | {"seed": seed}).items() if value is not None}

    def _key(self, request: ChatRequest, number: int) -> str:
        question = {"model": self.settings.model, "messages": list(request.messages), "sample": request.sample}
        return digest_of(question | {"sampling": self._sampling(request, number), "try": number})

    def _recall(self, request: ChatRequest, accept: Accept, tries: int) -> tuple[Completion | None, int]:
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

    def _from_cache(self, entry: Completion) -> ChatReply:
        self.usage.cached += 1
        self.usage.cached_prompt_tokens += entry.prompt_tokens
        self.usage.cached_completion_tokens += entry.completion_tokens
        return _reply(entry, cached=True)

    async def _ask_server(
        self,
        groups: Sequence[_Group],
        accept: Accept,
        tries: int,
        keep: Callable[[Sequence[ChatRequest], ChatReply], None],
    ) -> None:
        import openai

        from dama.bounded_http import BoundedClient

        settings = self.settings
        room = asyncio.Semaphore(settings.concurrency)
        async with openai.AsyncOpenAI(
            base_url=settings.base_url,
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            timeout=settings.timeout,
            max_retries=0,  # `_once` repeats, and knows what is worth it
            http_client=BoundedClient(settings.timeout),  # type: ignore[arg-type]  # of httpx, which it takes as well
        ) as server:

            async def settle(group: _Group) -> tuple[ChatReply, Exception | None]:
                return await self._settle(server, group[0][0], group[1], accept, tries)

            async def one(group: _Group) -> None:
                async with room:
                    keep(group[0], (await settle(group))[0])

            rest = await self._scout(groups, settle, keep)
            tasks = [asyncio.create_task(one(group)) for group in rest]
            try:
                await asyncio.gather(*tasks)
            finally:  # where the caller's on_reply raises, the others stop before their connections close
                for task in tasks:
                    task.cancel()

    async def _scout(
        self,
        groups: Sequence[_Group],
        settle: Callable[[_Group], Awaitable[tuple[ChatReply, Exception | None]]],
        keep: Callable[[Sequence[ChatRequest], ChatReply], None],
    ) -> Sequence[_Group]:
        """Ask one by one until the server answers, and returns the groups that are left.

        Where the server, the key or the address is wrong, the others need not find out too. Raises ChatError.
        """
        asked: list[tuple[_Group, ChatReply]] = []
        failures = 0
        while len(asked) < len(groups) and not self.usage.asked:
            group = groups[len(asked)]
            reply, error = await settle(group)
            asked.append((group, reply))
            if error is None:
                break
            failures += not is_of_one_request(error)
            tried = failures == _SCOUTS or len(asked) == len(groups)
            none = tried and self.settings.give_up and not self.usage.cached
            if reason := hopeless(error) or (NOTHING if none else None):
                raise ChatError(self._unusable(reason, error)) from error
            if failures == _SCOUTS:
                break
        for group, reply in asked:
            keep(group[0], reply)
        return groups[len(asked) :]

    async def _settle(
        self, server: AsyncOpenAI, request: ChatRequest, start: int, accept: Accept, tries: int
    ) -> tuple[ChatReply, Exception | None]:
        """Try `start`, `start` + 1 ... until one is accepted; a failure ends it, and is returned beside the reply."""
        import openai

        for number in range(start, tries):
            try:
                entry = await self._once(server, request, number)
            except (openai.APIError, ValueError) as error:
                self.usage.failed += 1
                return self._failed(request, error), error
            self._remember(request, number, entry)
            if accept(entry.text):
                break
            self.usage.rejected += 1
        return _reply(entry, cached=False), None

    async def _once(self, server: AsyncOpenAI, request: ChatRequest, number: int) -> Completion:
        """One try's reply, asked for again where the failure may pass."""
        import openai

        failures = 0
        while True:
            try:
                return self._clean(await self._attempt(server, request, number))
            except (openai.APIError, ValueError) as error:
                pause = pause_before_retry(error, failures, _LONGEST_PAUSE)
                if pause is None or failures == self.settings.retries:
                    raise
            await asyncio.sleep(pause)
            failures += 1

    async def _attempt(self, server: AsyncOpenAI, request: ChatRequest, number: int) -> Completion:
        try:
            completion = await server.chat.completions.create(
                model=self.settings.model,
                messages=list(request.messages),  # type: ignore[arg-type]
                **self._sampling(request, number),
            )
        except (ValueError, RecursionError) as error:
            raise unreadable(error) from error
        return read_completion(completion)

    def _clean(self, entry: Completion) -> Completion:
        """Without the credentials that the server was sent and may echo."""
        text, model = (redacted(part, self._secrets, known_only=True) for part in (entry.text, entry.model))
        return replace(entry, text=text, model=model, finish=redacted(entry.finish, self._secrets))

    def _failed(self, request: ChatRequest, error: Exception) -> ChatReply:
        return ChatReply(request.id, None, self._describe(error), "", 0, 0, cached=False)

    def _describe(self, error: Exception) -> str:
        """One line: kind, message, and what the connection library said below it; no credentials."""
        cause = f" ({error.__cause__})" if str(error.__cause__ or "") else ""
        return " ".join(redacted(well_formed(f"{type(error).__name__}: {error}{cause}"), self._secrets).split())[:500]

    def _remember(self, request: ChatRequest, number: int, entry: Completion) -> None:
        self.usage.asked += 1
        self.usage.prompt_tokens += entry.prompt_tokens
        self.usage.completion_tokens += entry.completion_tokens
        key = self._key(request, number)
        self._entries[key] = entry
        if self._path is not None:
            line = json.dumps({"key": key, "id": request.id, "try": number, **asdict(entry)}, ensure_ascii=False)
            _append(self._path, line)

    def _unusable(self, reason: str, error: Exception) -> str:
        where = f"{self.settings.shown_url}, model {self.settings.model}"
        remedy = remedy_of(reason, self.settings.shown_url, error)
        return f"chat: {reason} ({where}): {self._describe(error)}\nRemedy: {remedy}"


def _reply(entry: Completion, *, cached: bool) -> ChatReply:
    tokens = entry.prompt_tokens, entry.completion_tokens
    return ChatReply("", entry.text, None, entry.model, *tokens, cached, entry.finish)


_THOUGHTS = (
    r"(?:think|thinking|thoughts?|reasoning(?:_content)?|reason|reflection|analysis|rationale|scratchpad|cot|"
    r"(?:inner|internal)_(?:monologue|thoughts?))"
)
_TAG = re.compile(
    rf"<(?P<slash>/?)(?:seed:)?{_THOUGHTS}(?:\s[^<>]*)?>|\[(?P<square>/?)THINK\]|◁(?P<arrow>/?)think▷|"
    rf"<\|(?:begin_of_|start_)?(?P<bar>/|end_of_|end_)?{_THOUGHTS}\|>|<unused9(?:4|(?P<unused>5))>",
    re.IGNORECASE,
)
_ANSWER = re.compile(  # what some templates put around the answer itself
    r"(?:<(?:answer|conclusion)>|<\|(?:begin_of_(?:solution|box)|start_response)\|>)\s*(.*?)\s*"
    r"(?:</(?:answer|conclusion)>|<\|(?:end_of_(?:solution|box)|end_response)\|>|\Z)\s*",
    re.IGNORECASE | re.DOTALL,
)
_CHANNEL = "<|channel|>"
_BARE_CHANNEL = re.compile(r"\A\s*(?:assistant)?analysis.*assistantfinal", re.DOTALL)  # the same without its markers
_MARGIN = " \t\r\n\ufeff\u200b"


def after_thoughts(text: str) -> str:
    """What a reasoning model says in the end, without the thoughts that some servers send along.

    Thoughts end with the last closing tag; the opening one may be missing, since some templates end with it. "" where
    the thoughts are not closed. Tags around all of the answer are left out.
    """
    if _CHANNEL in text:  # <|channel|>analysis<|message|>...<|end|>...<|channel|>final<|message|>...
        _, found, text = text.rpartition(f"{_CHANNEL}final<|message|>")
        return text.partition("<|")[0].strip() if found else ""
    text = _BARE_CHANNEL.sub("", text)
    closing = [tag for tag in _TAG.finditer(text) if any(tag.groups())]
    rest = (text[closing[-1].end() :] if closing else text).strip(_MARGIN)
    if _TAG.match(rest):
        return ""
    answer = _ANSWER.fullmatch(rest)
    return answer[1] if answer else rest.strip()


_KEPT = ("text", "model", "prompt_tokens", "completion_tokens")


def _read_cache(path: Path) -> dict[str, Completion]:
    """Key -> reply; lines torn by a kill are counted, said and asked for again."""
    if not path.exists():
        return {}
    entries, torn = {}, 0
    with path.open("rb") as file:
        for line in file:
            try:
                row = json.loads(line)
                key = row.pop("key")
                entries[key] = Completion(**{name: row[name] for name in _KEPT}, finish=row.get("finish", ""))
            except (ValueError, TypeError, KeyError, AttributeError):
                torn += bool(line.strip())
    if torn:
        log(f"chat: {path}: {torn} unreadable lines skipped, {len(entries)} replies kept")
    return entries


def _append(path: Path, line: str) -> None:
    """One write a line, so that processes that share the file do not mix theirs; a torn last line is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path, len(line)), open(path, "ab+", buffering=0, opener=regular_file) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            torn = file.read(1) != b"\n"
        else:
            torn = False
        file.write((("\n" if torn else "") + line + "\n").encode("utf-8"))


def image_part(data: bytes, kind: str = "jpeg") -> dict[str, Any]:
    """The part of a turn that shows an image, given as the bytes of its file."""
    import base64

    url = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
    return {"type": "image_url", "image_url": {"url": url}}
