"""Removes credentials from text of others before it is shown, logged or stored."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterable
from urllib.parse import quote, unquote, urlsplit

HIDDEN = "[redacted]"
_SHORTEST = 4  # characters of a known secret: a shorter one is part of too many words

_ENVIRONMENT = re.compile(r"(?i)(?:^|_)(?:api_?key|token|secret|password|secret_access_key)$")
_PATTERNS = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # scheme://user:password@host
        (r"(?i)\b([a-z][a-z0-9+.-]*://)[^\s/?#\"'<>]+@", rf"\1{HIDDEN}@"),
        # ?token=... and &key=...
        (r"(?i)([?&](?:[\w-]*key|[\w-]*token|sig|signature|secret|password|auth)=)[^\s&#\"'<>]+", rf"\1{HIDDEN}"),
        # Cookie: a=b; c=d
        (r"(?i)\b((?:set-)?cookie[\"']?\s*[:=]\s*[\"']?)[^\"'\r\n]+", rf"\1{HIDDEN}"),
        # Authorization: Bearer ..., "x-api-key": "..."
        (
            r"(?i)((?:proxy-)?authorization[\"']?\s*[:=]\s*[\"']?)(?:(?:bearer|basic|digest|token)\s+)?[^\s\"',;<>]+",
            rf"\1{HIDDEN}",
        ),
        (
            r"(?i)\b((?:x-)?(?:api[-_ ]?key|access[-_ ]?token|auth[-_ ]?token|secret[-_ ]?key|password)"
            r"[\"']?\s*(?:provided)?[:=]\s*[\"']?)[^\s\"',;<>]+",
            rf"\1{HIDDEN}",
        ),
        (r"(?i)\b(bearer\s+)(?=\S*\d|\S{20})[\w.~+/=-]{8,}", rf"\1{HIDDEN}"),
        (r"\b(?:sk|pk|rk)-[\w-]{8,}|\bhf_[A-Za-z0-9]{8,}|\bgh[oprsu]_[A-Za-z0-9]{8,}", HIDDEN),
        (r"\beyJ[\w-]{8,}\.[\w-]{8,}\.[\w-]*", HIDDEN),  # a JSON Web Token
    )
]
_BASIC = re.compile(r"(?i)\b(basic\s+)([A-Za-z0-9+/=_-]{4,})")


def redacted(text: str, secrets: Iterable[str] = (), *, known_only: bool = False) -> str:
    """The text without credentials.

    Removed are `secrets`, the values of environment variables such as OPENAI_API_KEY, and what looks like a
    credential: user and password in a URL, authorization headers, cookies, keys in a query, API keys.

    Args:
        known_only: leave out what only looks like one, as for a model's answer, whose words must not change.
    """
    known = {*secrets, *_environment_secrets()}
    for secret in sorted(known, key=lambda secret: (-len(secret), secret)):  # one may be part of another
        if len(secret) >= _SHORTEST:
            text = text.replace(secret, HIDDEN)
    if known_only:
        return text
    for pattern, replacement in _PATTERNS:
        text = pattern.sub(replacement, text)
    return _BASIC.sub(_without_basic, text)


def _environment_secrets() -> set[str]:
    return {value for name, value in os.environ.items() if _ENVIRONMENT.search(name) and len(value) >= 2 * _SHORTEST}


def _without_basic(match: re.Match[str]) -> str:
    """`Basic` and base64 of user:password; "basic understanding" stays."""
    try:
        decoded = base64.b64decode(match[2] + "=" * (-len(match[2]) % 4), validate=True)
    except (binascii.Error, ValueError):
        return match[0]
    return match[1] + HIDDEN if b":" in decoded else match[0]


def secrets_of_url(url: str) -> frozenset[str]:
    """The credentials inside a URL, in every form in which a server may echo them; empty where it has none."""
    try:
        netloc = urlsplit(url).netloc
    except ValueError:  # no URL
        return frozenset()
    user, found, _ = netloc.rpartition("@")
    if not found:
        return frozenset()
    name, _, password = user.partition(":")
    pair = f"{unquote(name)}:{unquote(password)}"
    encoded = base64.b64encode(pair.encode()).decode()
    return frozenset({user, pair, encoded, password or name, unquote(password or name), quote(password or name)})
