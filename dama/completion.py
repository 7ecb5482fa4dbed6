"""What an OpenAI-compatible server's reply means: its text and counts, or an error, and whether to ask again."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from httpx import DecodingError

from dama.bounded_http import RedirectError, TooLargeError

SETTINGS = ("max_tokens", "temperature", "top_p", "seed")  # of sampling; each can be left out
_LONGEST_NAMED = 120.0  # seconds that a server may ask to wait
_AGAIN = (408, 409, 425, 429)
_PATH = "/chat/completions"


@dataclass(frozen=True)
class Completion:
    """A reply. text: "" where there is none; finish: why it ends, as the server says it ("stop", "length" ...)."""

    text: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    finish: str = ""


class NoCompletionError(ValueError):
    """A reply with status 200 that is no chat completion."""


class WebPageError(NoCompletionError):
    """A web page in place of a reply, as from a login form or from a wrong address."""


class ReportedError(NoCompletionError):
    """An error that came with status 200. status: the HTTP status that it names, or None; code, param: or ""."""

    def __init__(self, message: str, body: Mapping[str, Any]) -> None:
        super().__init__(message)
        code = str(body.get("code") or body.get("status") or "")
        self.status = int(code) if re.fullmatch(r"[1-5]\d\d", code, re.ASCII) else None
        self.code, self.param = code, str(body.get("param") or "")


# -------------------------------------------------------------------------------------------------------- replies


def read_completion(completion: Any) -> Completion:
    """Read what the openai package made of a reply, any field of which may be missing or of another type.

    Raises NoCompletionError for what is no completion.
    """
    if isinstance(completion, str):
        raise _no_json(completion)
    try:
        choice = completion.choices[0]
        message = choice.message
        content = message.content
    except (AttributeError, TypeError, IndexError, KeyError) as error:
        raise _reported(completion) or NoCompletionError(
            f"expected a chat completion with choices[0].message, got {_shown(completion)!r}"
        ) from error
    text, usage = well_formed(_text_of(content)), getattr(completion, "usage", None)
    return Completion(
        text,
        well_formed(str(getattr(completion, "model", None) or "")),
        _count(_get(usage, "prompt_tokens")),
        _count(_get(usage, "completion_tokens")),
        _finish_of(choice, message, text),
    )


def unreadable(error: ValueError | RecursionError) -> ValueError:
    """The error for a reply whose JSON could not be read."""
    if isinstance(error, json.JSONDecodeError) and _is_page(error.doc):
        return _no_json(error.doc)
    if isinstance(error, RecursionError):
        return NoCompletionError("expected a chat completion, got JSON that is nested too deeply")
    return error


def well_formed(text: str) -> str:
    """The text with unpaired surrogates, which no file can hold, replaced by U+FFFD."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _text_of(content: Any) -> str:
    """The text of a content: a string, None, or a list of chunks, of which those with thoughts do not count."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise NoCompletionError(f"expected text in choices[0].message.content, got {type(content).__name__}")
    return "".join(_chunk_text(chunk) for chunk in content)


def _chunk_text(chunk: Any) -> str:
    if isinstance(chunk, str):
        return chunk
    if _get(chunk, "type") not in (None, "text", "output_text"):
        return ""
    text = _get(chunk, "text")
    text = _get(text, "value") if isinstance(text, dict) else text
    return text if isinstance(text, str) else ""


def _get(holder: Any, name: str) -> Any:
    return holder.get(name) if isinstance(holder, dict) else getattr(holder, name, None)


def _finish_of(choice: Any, message: Any, text: str) -> str:
    """Why the reply ends; a refusal that stands in place of the text counts as the reason, in the server's words."""
    refusal = getattr(message, "refusal", None)
    if isinstance(refusal, str) and refusal.strip() and not text.strip():
        return well_formed(" ".join(f"refusal: {refusal}".split())[:200])
    return well_formed(str(getattr(choice, "finish_reason", None) or ""))[:200]


def _count(value: Any) -> int:
    """A number of tokens; 0 where there is none, also if it is text."""
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        return 0
    return int(number) if math.isfinite(number) and number > 0 else 0


def _is_page(text: str) -> bool:
    return text.lstrip("\ufeff \t\r\n").startswith("<")


def _no_json(text: str) -> NoCompletionError:
    shown = " ".join(text.split())[:200]
    if _is_page(text):
        return WebPageError(f"expected a chat completion, got a web page: {shown!r}")
    return NoCompletionError(f"expected a chat completion with choices[0].message, got {shown!r}")


def _shown(completion: Any) -> str:
    return str(completion)[:200]


def _reported(completion: Any) -> ReportedError | None:
    """The error that a body describes in place of a completion, in one of the usual forms; None for another body."""
    fields = completion if isinstance(completion, dict) else getattr(completion, "model_dump", dict)()
    for body in _error_bodies(fields):
        if isinstance(body, str) and body.strip():
            return ReportedError(well_formed(body), fields)
        if isinstance(body, dict) and (words := body.get("message") or body.get("detail") or body.get("code")):
            return ReportedError(well_formed(str(words)), body)
    return None


def _error_bodies(fields: Mapping[str, Any]) -> Iterator[Any]:
    yield fields.get("error")
    errors = fields.get("errors")
    yield errors[0] if isinstance(errors, list) and errors else errors
    yield fields.get("detail")
    yield fields if fields.get("message") else None


# --------------------------------------------------------------------------------------------------------- errors

_UNREAD = (TooLargeError, DecodingError)  # a server is there, but its reply is of no use

NO_SERVER = "no server answers"
KEY = "the key is refused"
UNKNOWN = "the server knows no such model or address"
ELSEWHERE = "the server redirects to another host, where prompts and images are not sent"
PAGE = "the address leads to a web page and not to an API"
SETTING = "the server refuses a setting"
CREDIT = "the account has no credit left"
NOTHING = "no request is answered"

_KEY_CODES = ("invalid_api_key", "authentication_error", "permission_denied", "unauthorized")
_MODEL_CODES = ("model_not_found", "invalid_model", "model_not_exist")
_CREDIT_CODES = ("insufficient_quota", "billing_hard_limit_reached", "insufficient_balance")
_OF_ONE_REQUEST = re.compile(
    r"(?i)content[_ ]?(?:filter|policy|management)|context[_ ]?(?:length|window)|input tokens|too (?:long|many tokens)|"
    r"prompt is too|inspection"
)
_SETTING_NAME = re.compile(r"\b(?:max_tokens|max_completion_tokens|temperature|top_p|seed)\b")


def status_of(error: Exception) -> int | None:
    """The HTTP status that an error has, or that it names where it came with status 200."""
    status = error.status if isinstance(error, ReportedError) else getattr(error, "status_code", None)
    return status if isinstance(status, int) else None


def hopeless(error: Exception) -> str | None:
    """Why no other request would fare better, or None where this one alone may be at error."""
    import openai

    if isinstance(error.__cause__, RedirectError):
        return ELSEWHERE
    if isinstance(error, WebPageError):
        return PAGE
    if isinstance(error, openai.APIConnectionError):
        late = isinstance(error, openai.APITimeoutError) and "Connect" not in type(error.__cause__).__name__
        return None if late or isinstance(error.__cause__, _UNREAD) else NO_SERVER
    status, code = status_of(error), str(getattr(error, "code", None) or "").lower()
    if status == 402 or code in _CREDIT_CODES:
        return CREDIT
    if status in (401, 403) or code in _KEY_CODES:
        return KEY
    if status in (404, 405) or code in _MODEL_CODES:
        return UNKNOWN
    return SETTING if _refuses_setting(error, status) else None


def _refuses_setting(error: Exception, status: int | None) -> bool:
    """Whether a setting that all requests have is refused; not where a long prompt leaves no room for it."""
    refused = isinstance(error, ReportedError) if status is None else status in (400, 422)
    named = f"{getattr(error, 'param', None) or ''} {error}"
    return refused and bool(_SETTING_NAME.search(named)) and not is_of_one_request(error)


def is_of_one_request(error: Exception) -> bool:
    """Whether the error is about this request's content, such as its length."""
    return bool(_OF_ONE_REQUEST.search(f"{getattr(error, 'code', None) or ''} {error}"))


def remedy_of(reason: str, base_url: str, error: Exception) -> str:
    """What to do about it. base_url: without credentials."""
    if reason == UNKNOWN:
        others = " or ".join(other_addresses(base_url))
        return (
            f"asked was {base_url.rstrip('/')}{_PATH}: give the model's name as the server lists it under "
            f"{base_url.rstrip('/')}/models, or correct the base URL, e.g. to {others}"
        )
    if reason == SETTING:
        named = _SETTING_NAME.search(f"{getattr(error, 'param', None) or ''} {error}")
        name = named[0].replace("max_completion_tokens", "max_tokens") if named else SETTINGS[0]
        return f"leave it to the server: --judge-omit {name} for a judge of eval.evaluate, --omit {name} elsewhere"
    return _REMEDIES[reason]


_REMEDIES = {
    NO_SERVER: "start the server, or correct the base URL (it ends in /v1 for most servers)",
    KEY: "set OPENAI_API_KEY to a key of this server",
    ELSEWHERE: "give the address that it redirects to as the base URL, if that host is to be trusted",
    PAGE: "correct the base URL (it ends in /v1 for most servers), or log in where the server asks for it",
    CREDIT: "pay, or name another server; what was answered is kept",
    NOTHING: "see the server's words; then run the same again",
}


def other_addresses(base_url: str) -> list[str]:
    """What may have been meant: the URL without the endpoint's path, with /v1 and without."""
    parts = urlsplit(base_url)
    path = parts.path.rstrip("/").removesuffix(_PATH)
    root = path.removesuffix("/v1")
    paths = [other for other in (path, f"{root}/v1", root) if other != parts.path.rstrip("/")]
    return [urlunsplit(parts._replace(path=other)) for other in dict.fromkeys(paths)]


def pause_before_retry(error: Exception, failures: int, longest: float) -> float | None:
    """Seconds to wait before the next attempt, or None where another attempt would end alike.

    failures: of this request before this one. longest: seconds, where the server names none.
    """
    import openai

    if isinstance(error.__cause__, (RedirectError, *_UNREAD)) or isinstance(error, WebPageError):
        return None
    headers = getattr(getattr(error, "response", None), "headers", {})
    status = status_of(error)
    if not isinstance(error, openai.APIConnectionError) and (status is not None or isinstance(error, ReportedError)):
        again = status is not None and (status in _AGAIN or status >= 500)
        again = {"true": True, "false": False}.get(headers.get("x-should-retry", ""), again)
        if not again or hopeless(error) == CREDIT:
            return None
    named = _named_pause(headers)
    if named is not None:
        return named if named <= _LONGEST_NAMED else None
    return min(longest, 0.25 * 2**failures) * random.uniform(0.75, 1.0)


def _named_pause(headers: Mapping[str, str]) -> float | None:
    """Seconds that the server asks to wait."""
    from email.utils import parsedate_to_datetime

    for name, a_second in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) / a_second
        except ValueError:
            continue
        return seconds if seconds >= 0 else None  # also where it is no number
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
    except (TypeError, ValueError):
        return None
    from datetime import datetime

    return max(0.0, (date - datetime.now(date.tzinfo)).total_seconds())
