"""Credentials are taken out of every text that is shown, logged or stored."""

from __future__ import annotations

import os
import re

HIDDEN = "[redacted]"
ENVIRONMENT = ("OPENAI_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")  # their values are never shown
SHORTEST = 6  # characters of a secret of the environment: a shorter one, such as "none", is a word

# Headers whose whole value is secret.
_HEADERS = r"(?:proxy-)?authorization|(?:set-)?cookie"
# Fields of headers, JSON, query strings, assignments and command lines; a tokenizer's "token ids: 7" is none of them.
# Repetitions are bounded, since otherwise a long text would take quadratic time.
_FIELDS = (
    r"(?:[a-z]{1,20}[-_]){0,5}(?:api[-_ ]?key|access[-_]?key|secret|password|passwd|pwd|credential|signature|token)"
    r"|aws_(?:secret_)?access_key(?:_id)?|sig"
)
_SPLIT = r"\\{0,4}[\"']?\s{0,4}[:=]\s{0,4}"  # between name and value; quotes may be escaped, for JSON stands in JSON
_RULES = (
    # User and password of a URL, up to the last @ before the path: passwords may contain one.
    (r"\b([a-z][a-z0-9+.-]{0,20}:/{1,2})[^\s/?#\"'<>]{0,500}@", rf"\1{HIDDEN}@"),
    (r"(?<![:\w/])(//)[^\s/?#\"'<>@]{1,500}@", rf"\1{HIDDEN}@"),
    (rf"(?<![a-z0-9])((?:{_HEADERS}){_SPLIT}\\*[\"']?)[^\"'\\\r\n]+", rf"\1{HIDDEN}"),
    (r"\b(bearer\s+)[\w.~+/=:-]{6,}", rf"\1{HIDDEN}"),
    (r"\b(basic\s+)(?-i:(?=[a-z/+]*[A-Z0-9=]))[\w+/=]{8,}", rf"\1{HIDDEN}"),
    (rf"(?<![a-z0-9])((?:{_FIELDS}){_SPLIT})(\\*[\"'])(?!\[redacted\])(?:(?!\2).)+", rf"\1\2{HIDDEN}"),
    (rf"(?<![a-z0-9])((?:{_FIELDS}){_SPLIT})(?!\[redacted\])[^\s\"'\\,;&}}<>]+", rf"\1{HIDDEN}"),
    (rf"(?<!\S)(--?(?:{_FIELDS})\s+)(?!-)\S+", rf"\1{HIDDEN}"),
    # Keys of known form.
    (r"\b[spr]k[-_][a-z0-9_-]{8,}", HIDDEN),
    (r"\b(?:hf_[a-z0-9]{8,}|gh[oprsu]_[a-z0-9]{16,}|github_pat_\w{16,}|gsk_\w{8,}|nvapi-[\w-]{8,})", HIDDEN),
    (r"\b(?-i:AIza[\w-]{20,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|xox[a-z]-[\w-]{8,}|eyJ[\w-]{4,}\.[\w-]{4,}\.[\w-]*)", HIDDEN),
)
RULES = tuple((re.compile(pattern, re.IGNORECASE), replacement) for pattern, replacement in _RULES)


def redact(text: str) -> str:
    """The text without passwords, keys and tokens, which become [redacted].

    Recognized are user and password in a URL, the values of Authorization and similar headers and fields, keys of known
    form, and the values of the variables of ENVIRONMENT wherever a server repeats them.
    """
    for name in ENVIRONMENT:
        value = os.environ.get(name, "").strip()
        if len(value) >= SHORTEST:
            text = text.replace(value, HIDDEN)
    for pattern, replacement in RULES:
        text = pattern.sub(replacement, text)
    return text
