"""Credentials are taken out of every text of others that is shown, logged or stored."""

from __future__ import annotations

import base64
import binascii
import os
import re
from collections.abc import Iterable
from urllib.parse import quote, unquote, urlsplit

HIDDEN = "[redacted]"
ENVIRONMENT = re.compile(r"(?i)(?:^|_)(?:api_?key|token|secret|password|secret_access_key)$")  # variables with secrets
SHORTEST = 6  # characters of a secret of the environment: a shorter one, such as "none", is a word
SHORTEST_KNOWN = 4  # of one that a caller names: a shorter one is part of too many words

# Headers whose whole value is secret.
_HEADERS = r"(?:proxy-)?authorization|(?:set-)?cookie"
# Fields of headers, JSON, query strings, assignments and command lines; a tokenizer's "token ids: 7" is none of them.
# Repetitions are bounded, since otherwise a long text would take quadratic time.
_FIELDS = (
    r"(?:[a-z]{1,20}[-_]){0,5}(?:api[-_ ]?key|access[-_]?key|secret|password|passwd|pwd|credential|signature|token)"
    r"|(?:[a-z]{1,20}[-_]){0,5}(?:(?:secret|private|subscription|account)[-_]?key|passphrase|j?session[-_]?id)"
    r"|(?-i:[a-z]{1,20}(?:Token|Secret|Password|ApiKey|AccessKey))|x-auth|aws_(?:secret_)?access_key(?:_id)?|sig"
)
# Those of the fields that are no words of other texts, in lists and markup too.
_SURE = rf"{_HEADERS}|(?:[a-z]{{1,20}}[-_]){{0,5}}(?:api[-_ ]?key|access[-_]?key|secret|password|auth[-_]token)"
_ENTITY = r"(?:&quot;|&apos;|&#0{0,4}3[49];|&#x0{0,4}2[27];)"  # a quote in an HTML page
# Between name and value; quotes may be escaped, for JSON stands in JSON, and all of it may stand in HTML or in a URL.
_SPLIT = rf"(?:\\{{0,4}}[\"']|{_ENTITY})?\s{{0,40}}(?:[:=]>?|&#0{{0,4}}58;|%3[ad])\s{{0,40}}{_ENTITY}?"
_PARAMETER = r"[\w-]{1,60}=(?:\\?\"[^\"\r\n]{0,2000}\"|'[^'\r\n]{0,2000}'|[^\s,;=\"'\\]{1,2000}(?![=\w]))[,;\s]{0,4}"
_RULES = (
    # User and password of a URL, up to the last @ before the path: passwords may contain one.
    (r"\b([a-z][a-z0-9+.-]{0,20}:/{1,2})[^\s/?#\"'<>]{0,500}@", rf"\1{HIDDEN}@"),
    (r"(?<![:\w/])(//)[^\s/?#\"'<>@]{1,500}@", rf"\1{HIDDEN}@"),
    (r"(%3a(?:%2f){1,2})(?:(?!%2f)[^\s/?#\"'<>&]){1,500}%40", rf"\1{HIDDEN}%40"),
    # The same without a scheme, as in the errors of resolvers.
    (
        r"(?<![\w:/.%+@-])(?!mailto:)[\w.%+~-]{1,100}:[^\s/?#\"'<>@:,]{1,200}@"
        r"(?=[\w.-]{1,99}(?:\.\w|:\d|[\"']))",
        f"{HIDDEN}@",
    ),
    (r"(?<!\S)((?:-u|--user|--proxy-user)[\s=]\s{0,4})[^\s:]{0,200}:\S+", rf"\1{HIDDEN}"),
    # Authorization: Digest username="...", response="..."
    (rf"(?<![a-z0-9])((?:{_HEADERS}){_SPLIT})(?:[a-z0-9-]{{1,20}}\s{{1,4}})?(?:{_PARAMETER})+", rf"\1{HIDDEN} "),
    # ["Authorization", "..."] and {"Authorization": ["..."]}
    (
        rf"(?<![a-z0-9])((?:{_SURE})\\*[\"']\s{{0,4}},\s{{0,4}}b?\\*[\"'])"
        rf"(?!\[redacted\])[^\"'\\\r\n]+",
        rf"\1{HIDDEN}",
    ),
    (rf"(?<![a-z0-9])((?:{_SURE}){_SPLIT}[\[(])(?!\[?redacted\])[^\])\r\n]+", rf"\1{HIDDEN}"),
    # <api_key>...</api_key> and <td>Authorization</td><td>...</td>
    (
        rf"(?<![a-z0-9/])((?:{_SURE})(?:>|</\w{{1,20}}>\s{{0,4}}<\w{{1,20}}>)\s{{0,4}})"
        rf"(?!\[redacted\])[^<\r\n]+",
        rf"\1{HIDDEN}",
    ),
    (rf"(?<![a-z0-9])((?:{_HEADERS}){_SPLIT}\\*[\"']?)(?![\s\[])[^\"'\\\r\n]+", rf"\1{HIDDEN}"),
    (r"\b(bearer\s+[\"']?)[\w.~+/=:-]{6,}", rf"\1{HIDDEN}"),
    (r"\b(basic\s+)(?-i:(?=[a-z/+]*[A-Z0-9=]))[\w+/=]{8,}", rf"\1{HIDDEN}"),
    (rf"(?<![a-z0-9])((?:{_FIELDS}){_SPLIT})(\\*[\"'])(?!\[redacted\])(?:(?!\2).)+", rf"\1\2{HIDDEN}"),
    (rf"(?<![a-z0-9])((?:{_FIELDS}){_SPLIT})(?!\[redacted\])[^\s\"'\\,;&}}<>]+", rf"\1{HIDDEN}"),
    (rf"(?<!\S)(--?(?:{_FIELDS})\s+)(?!-)\S+", rf"\1{HIDDEN}"),
    # Keys of known form.
    (r"(-----BEGIN [A-Z ]{0,30}PRIVATE KEY-----)(?:(?!-----)[\s\S]){1,9999}", rf"\1{HIDDEN}"),
    (r"\b[spr]k[-_][a-z0-9_-]{8,}", HIDDEN),
    (r"\b(?:hf_[a-z0-9]{8,}|gh[oprsu]_[a-z0-9]{16,}|github_pat_\w{16,}|gsk_\w{8,}|nvapi-[\w-]{8,})", HIDDEN),
    (r"\b(?:glpat-[\w-]{12,}|xai-\w{16,}|npm_\w{16,}|r8_\w{16,})", HIDDEN),
    (r"\b(?-i:AIza[\w-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|xox[a-z]-[\w-]{8,}|eyJ[\w-]{4,}\.[\w-]{4,}\.[\w-]*)", HIDDEN),
)
# ?key=... and &auth=... of an address
_QUERY = re.compile(r"(?i)([?&](?:[\w-]{0,40}key|sig|auth)=)(?!\[redacted\])[^\s&#\"'<>]+")
_BASIC = re.compile(r"(?i)\b(basic\s+)([A-Za-z0-9+/=_-]{4,})")
RULES = tuple((re.compile(pattern, re.IGNORECASE), replacement) for pattern, replacement in _RULES)


def redacted(text: str, secrets: Iterable[str] = (), *, known_only: bool = False) -> str:
    """The text without credentials.

    Removed are `secrets`, the values of environment variables such as OPENAI_API_KEY, and what looks like a
    credential: user and password in a URL, authorization headers, cookies, keys in a query, API keys.

    Args:
        text: text of any origin.
        secrets: further values to remove.
        known_only: leave out what only looks like one, as for a model's answer, whose words must not change.
    """
    known = {*secrets, *_environment_secrets()}
    for secret in sorted(known, key=lambda secret: (-len(secret), secret)):  # one may be part of another
        if len(secret) >= SHORTEST_KNOWN:
            text = text.replace(secret, HIDDEN)
    if known_only:
        return text
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    return _BASIC.sub(_without_basic, _QUERY.sub(rf"\1{HIDDEN}", text))


def _environment_secrets() -> set[str]:
    values = {value.strip() for name, value in os.environ.items() if ENVIRONMENT.search(name)}
    return {value for value in values if len(value) >= SHORTEST}


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
