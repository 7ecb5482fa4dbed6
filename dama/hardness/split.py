"""Splits an answer into statements short enough for CLIP (S_w and S_l of Eq. 3-4), by rules, in the answer's words.

Lines and list items first, then sentences, then clauses where both pieces can stand alone. Where a rule is in doubt it
does not split: a statement that is too long costs little, one torn from its subject gets a meaningless score.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

from dama.hardness.markers import numbered_markers

VERSION = "rules-3"  # part of the stage's fingerprint: raise it with any change of what split_statements returns
BEFORE_MARKERS = "rules-2"  # the version that did not know numbered_markers, and splits other answers alike


class Split(NamedTuple):
    """An answer's statements; `fallback` says why they come from the rules where something else was asked first."""

    statements: list[str]
    fallback: str = ""


# ------------------------------------------------------------------------------------------------------------ lines

BULLET = re.compile(r"^\s*(?:[-*•‣–]\s+|#{1,6}\s+|\(?(?:\d{1,2}|[a-z])[.)]\s+)")
_INLINE_NUMBER = re.compile(r"(?<=[:;.!?])\s+(?=\(?\d{1,2}[.)]\s+\S)")
_INLINE_LIST = re.compile(r"(?:^|[:;.!?]\s+)\(?1[.)]\s.*[:;.!?]\s+\(?2[.)]\s")  # "1." alone may end a sentence
_EMPHASIS = re.compile(r"(\*\*|__)(?=\S)(.+?)(?<=\S)\1")
_RULE = re.compile(r"^[^\w]*$")


def _lines(answer: str) -> list[str]:
    """The answer's paragraphs and list items without their markers; lines broken inside a sentence are joined."""
    lines: list[str] = []
    for raw in answer.replace("\r\n", "\n").split("\n"):
        item = BULLET.match(raw)
        parts = _INLINE_NUMBER.split(raw.strip()) if _INLINE_LIST.search(raw) else [raw]
        parts = [_EMPHASIS.sub(r"\2", BULLET.sub("", part)).strip() for part in parts]
        text = parts[0]
        if _RULE.match("".join(parts)):
            lines.append("")  # keeps the paragraphs around it apart
        elif lines and lines[-1] and not item and text[0].islower() and lines[-1][-1] not in ".!?:;":
            lines[-1] += " " + " ".join(parts)
        else:
            lines.extend(parts)
    return [line for line in lines if line]


# -------------------------------------------------------------------------------------------------------- sentences

_OPENERS = (
    "The|There|This|That|These|Those|It|Its|In|On|At|A|An|He|She|They|We|I|You|One|Two|Another|Some|Several|Overall|"
    "Additionally|Also|Both|However|While|With|Behind|Next|His|Her|Their|No|Yes"
)
_OPENER = re.compile(rf"\s+[\"'“‘(]?(?:{_OPENERS})\b")
# A dot after these never ends a sentence; after the second group it does where a new sentence plainly begins.
_TITLE = re.compile(
    r"(?:^|[\s(\"“])(?:Mr|Mrs|Ms|Dr|Prof|St|Mt|Gen|Capt|Sgt|Rev|Hon|vs|e\.g|i\.e|cf|ca|approx|Fig)$", re.I
)
_SHORT = re.compile(
    r"(?:^|[\s(\"“])(?:etc|al|Inc|Ltd|Co|Corp|Jr|Sr|Ave|Blvd|Rd|ft|lbs?|oz|min|a\.m|p\.m|(?:[A-Z]\.)*[A-Z]|[a-z])$"
)
_NUMBER_WORD = re.compile(
    r"(?:^|[\s('\"“-])(?:Nos?|pp?|Vol|Bldg|Apt|Rm|Jan|Feb|Mar|Apr|Jun|Jul|Aug|Sept?|Oct|Nov|Dec|"
    r"Mon|Tues?|Wed|Thu(?:rs?)?|Fri|Sat|Sun)$"
)
_ASCII_END = re.compile(r"(?:\.{3,}|…|[.!?]+)[\"'”’)\]]*(?=\s|$)")
_OTHER_END = re.compile(r"[。！？｡।॥؟۔]+[\"'”’）」』]*")  # these end a sentence with or without a space
_GLUED = re.compile(r"(?<=[a-z]{3})\.(?=(?:The|There|This|These|It|In|A|An|On|He|She|They|Overall|Additionally)\b)")
_ENCLOSED = re.compile(r"\"[^\"]{0,300}\"|“[^”]{0,300}”|\([^()]{0,300}\)|「[^」]{0,300}」|『[^』]{0,300}』")
_PARTICLE = re.compile("[とのがはをにもでへ、]")  # what follows a Japanese quotation inside its sentence


def _sentences(line: str) -> Iterator[str]:
    line = _GLUED.sub(". ", line)
    enclosed = [match.span() for match in _ENCLOSED.finditer(line)]
    start = 0
    ends = sorted([*_ASCII_END.finditer(line), *_OTHER_END.finditer(line)], key=lambda match: match.start())
    for match in ends:
        inside = any(left < match.start() and match.end() < right for left, right in enclosed)
        if inside or (match.group()[-1] in "」』" and _PARTICLE.match(line, match.end())):
            continue
        if match.re is _OTHER_END or _ends_sentence(line, match):
            yield line[start : match.end()].strip()
            start = match.end()
    yield line[start:].strip()


def _ends_sentence(line: str, match: re.Match[str]) -> bool:
    """Whether a run of ASCII terminators followed by a space, or by nothing, closes a sentence."""
    before, mark, after = line[: match.start()], match.group(), line[match.end() :]
    first = after.lstrip(" \t\"'“‘(")[:1]
    if not first or first.islower():
        return not first
    if mark[0] != "." or mark.startswith(".."):
        return True
    if _TITLE.search(before):
        return False
    if _NUMBER_WORD.search(before):
        return not first.isdigit()
    return not _SHORT.search(before) or bool(_OPENER.match(after))


# ---------------------------------------------------------------------------------------------------------- clauses

_DETERMINER = (
    r"(?:the|an?|another|two|three|four|five|six|seven|eight|nine|ten|several|many|some|various|multiple|most|\d+)"
)
_BE = r"(?:is|are|was|were|has|have|can be|appears?|seems?)"
_ACTS = (
    r"(?:stands?|sits?|lies|hangs?|wears|holds|shows|features|contains|includes|displays|depicts|adds|creates|"
    r"surrounds|fills|rests|serves|reads|says)"
)
# Never a noun, as "stands" or "features" may be.
_IS = re.compile(rf"\b(?:{_BE}|sits|hangs|wears|contains|includes|depicts|reads|says)\b", re.I)
_FINITE = re.compile(rf"\b(?:{_BE}|{_ACTS}|looks?|can|could|will|may|might|would)\b", re.I)
_RELATIVE = re.compile(r"\b(?:that|which|who|whom|whose|where|when|if|because|although|whether|so)\b", re.I)
_ASIDE = re.compile(r",\s+(?:which|who|whose|where)\b[^,;]*,", re.I)
_SUBORDINATE = re.compile(r"^(?:while|when|if|as|although|though|because|since|whether|unless|after|before)\b", re.I)
# No subject of its own: "the other is", "some are", "one of them has"
_DEPENDENT = r"(?:\s+(?:others?|rest|latter|former|second|third|more))*"
_HOLLOW = re.compile(rf"^{_DETERMINER}{_DEPENDENT}\s+(?:{_BE}|{_ACTS}|of)\b", re.I)
_SUBJECT = re.compile(
    rf"({_DETERMINER})\s+((?:(?!(?:and|or|that|which|who|where)\b)[\w'’-]+\s+){{1,6}}?)(?:{_BE}|{_ACTS})\s+\S", re.I
)
_PARTICIPLE = (
    r"(?:\w{3,}ing|located|placed|parked|positioned|scattered|seated|arranged|filled|visible|seen|mounted|attached|"
    r"lit|lined|stacked|displayed)"
)
_SCENE = re.compile(
    rf"{_DETERMINER}\s+(?!(?:of|others?|rest|latter|former)\b)(?:(?!(?:and|or|that|which|who)\b)[\w'’-]+\s+){{1,5}}?"
    rf"{_PARTICIPLE}\b",
    re.I,
)

# Two that belong together, before the word that joins them; "the dog is not": what it is stands in the other clause.
_UNPAIRED = re.compile(r"\b(?:between|both|not only)\b(?!.*\b(?:and|but)\b)", re.I)
_ELLIPTICAL = re.compile(
    r"\b(?:is|are|was|were|has|have|do|does|did|can|could|will|would)(?:\s+not|n['’]t)?"
    r"(?:,?\s+(?:too|either|as well))?[.!?]*$"
)
_ADVERB = re.compile(r"(?:however|meanwhile|also|additionally|therefore|instead),?\s+", re.I)
_PLAIN_SUBJECT = re.compile(rf"(?:there|no one|nobody|everyone|everything|nothing)\s+{_BE}\s", re.I)

_BARE = re.compile(r"\s+(?:and|while)\s+")
_JOINTS = [
    re.compile(r"\s*;\s+(?:and\s+|but\s+|while\s+)?"),
    re.compile(r",\s+(?:and|but|while|whereas)\s+"),
    _BARE,
]
_WITH = re.compile(rf",\s+(?:and\s+)?with\s+(?={_DETERMINER}\s)", re.I)


def _clauses(sentence: str) -> list[str]:
    """The sentence cut, from left to right, at every joint whose two sides can stand alone."""
    if _SUBORDINATE.match(sentence):
        return [sentence]
    pieces, start = [], 0
    for joint in _joints(sentence):
        if joint.start() > start and _holds(joint, sentence[start : joint.start()], sentence[joint.end() :]):
            pieces.append(sentence[start : joint.start()])
            start = joint.end()
    return [*pieces, sentence[start:]]


def _joints(sentence: str) -> list[re.Match[str]]:
    """Possible cuts from left to right, none in quotes or parentheses; a comma's joint before the bare word in it."""
    enclosed = [match.span() for match in _ENCLOSED.finditer(sentence)]
    found = [match for pattern in [*_JOINTS, _WITH] for match in pattern.finditer(sentence)]
    free = [match for match in found if not any(left < match.start() < right for left, right in enclosed)]
    return sorted(free, key=lambda match: (match.start(), match.re is _BARE))


def _holds(joint: re.Match[str], left: str, right: str) -> bool:
    """Whether both sides of a joint can stand alone."""
    verbs = _IS if joint.re is _BARE else _FINITE
    if not _has_main_verb(left, verbs) or _UNPAIRED.search(left):
        return False
    return _SCENE.match(right) is not None if joint.re is _WITH else _is_clause(right)


def _has_main_verb(text: str, verbs: re.Pattern[str]) -> bool:
    """A finite verb before any relative clause, whose verb would be another one's, or after one between commas."""
    return bool(verbs.search(_RELATIVE.split(_ASIDE.sub("", text), maxsplit=1)[0]))


def _is_clause(text: str) -> bool:
    """Begin with "there is", or with a subject that names something and, within six words, its verb."""
    text = text[match.end() :] if (match := _ADVERB.match(text)) else text
    if _ELLIPTICAL.search(text):
        return False
    if _PLAIN_SUBJECT.match(text):
        return True
    subject = _SUBJECT.match(text)
    if subject is None or _HOLLOW.match(text):
        return False
    # "a man and a woman are": a singular before a plural verb is the second half of a compound subject
    singular = subject.group(1).lower() in ("a", "an", "another")
    verb = text[subject.end(2) :].split(maxsplit=1)[0].lower()
    return not (singular and verb in ("are", "were", "have", "appear", "seem", "stand", "sit", "hang"))


# ------------------------------------------------------------------------------------------------------- statements


def split_statements(answer: str) -> list[str]:
    """Statements of an answer, in its order and its words: only list marks, joining words and commas are left out.

    Each begins with a capital and ends with a mark, so that equal statements are equal texts. Never empty for an
    answer that has a character other than white space.
    """
    lines = _lines(numbered_markers(answer))
    pieces = (piece for line in lines for sentence in _sentences(line) for piece in _clauses(sentence))
    statements = [as_statement(piece) for piece in pieces if re.search(r"\w", piece)]
    return statements or ([answer.strip()] if answer.strip() else [])


def sentence_spans(text: str) -> list[tuple[int, int]]:
    """Where each sentence of a text begins and ends, line by line; pieces without a letter or digit are left out."""
    spans, start = [], 0
    for line in text.splitlines():
        for sentence in _sentences(line):
            if re.search(r"\w", sentence) and (found := text.find(sentence, start)) >= 0:
                start = found + len(sentence)
                spans.append((found, start))
    return spans


def version_for(answers: Iterable[str]) -> str:
    """The oldest version of the rules that gives the same statements of all these answers.

    So that scores of answers without the lists that VERSION added stay valid.
    """
    return VERSION if any(numbered_markers(answer) != answer for answer in answers) else BEFORE_MARKERS


def as_statement(piece: str) -> str:
    """White space made even, a capital in front, and a mark at the end where there is none."""
    text = " ".join(piece.split()).rstrip(" ,;:，、；：")
    if not re.search(r"[.!?…。！？｡।॥؟۔][\"'”’)\]）」』]*$", text):
        text += "。" if re.search(r"[\u3040-\u30ff\u3400-\u9fff]$", text) else "."
    return text[0].upper() + text[1:]


_CLAUSE_MARK = re.compile(r"[,;:，、；：]\s*|\s+[–—-]\s+|\s+(?=\()|(?<=[.!?])\s+")
_SPACE = re.compile(r"\s+")


def fit_to_context(statement: str, count_tokens: Callable[[str], int], limit: int) -> list[str]:
    """Pieces of a statement of at most `limit` tokens each, start and end tokens counted; nothing is cut away.

    Too long a text is halved at the clause mark nearest to its middle, else between words, else between characters,
    and the halves again.
    """
    if count_tokens(statement) <= limit:
        return [statement]
    if len(statement) < 2:
        raise ValueError(f"the single character {statement!r} takes {count_tokens(statement)} tokens, limit is {limit}")
    cut = _cut_near_middle(statement)
    halves = (statement[:cut].strip(), statement[cut:].strip())
    return [piece for half in halves if half for piece in fit_to_context(half, count_tokens, limit)]


def _cut_near_middle(text: str) -> int:
    """A place to cut, between the first and last fifth of the text for clause marks and words."""
    for pattern in (_CLAUSE_MARK, _SPACE):
        places = [match.end() for match in pattern.finditer(text)]
        central = [place for place in places if len(text) / 5 <= place <= len(text) * 4 / 5]
        if central:
            return min(central, key=lambda place: abs(place - len(text) / 2))
    return len(text) // 2
