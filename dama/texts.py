"""What a reader sees of a text: spaces and invisible characters made alike, the image placeholder removed."""

from __future__ import annotations

import re
import unicodedata

IMAGE_TOKEN = "<image>"

_LINE_END = re.compile("\r\n|[\r\x0b\x0c\x85\u2028\u2029]")
_BLANK = "\u115f\u1160\u2800\u3164\uffa0"  # letters and symbols that show nothing but take the room of one
# Controls, soft hyphen, joiners and marks of direction, variation selectors, byte order mark, tags.
_INVISIBLE = (
    "\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u00ad\u034f\u061c\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f\u202a-\u202e"
    "\u2060-\u206f\ufe00-\ufe0f\ufeff\ufff0-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
# Between two characters beyond ASCII a joiner changes what is seen: Persian letters, Indic clusters, emoji of several.
_JOINER = "(?<![^\x00-\x7f])[\u200c\u200d]|[\u200c\u200d](?![^\x00-\x7f])"
_UNSEEN = re.compile(f"[{_INVISIBLE}]+")
_UNSEEN_JOINER = re.compile(_JOINER)
_SPACES = re.compile(rf"(?:[{_BLANK}]|[^\S\n])+")
_AROUND_LINE_END = re.compile(" ?\n ?")
_EDGE = "".join(map(chr, [*range(0x21), 0x7F, 0x85, 0xA0, 0xAD, 0x1680, *range(0x2000, 0x2010), *range(0x2028, 0x2030),
                          0x205F, *range(0x2060, 0x2070), 0x3000, 0xFEFF]))  # fmt: skip


def visible_text(text: str) -> str:
    """The text for comparisons: two texts that look alike give the same one, a text that shows nothing the empty one.

    Unicode's composed form (NFC), one kind of line end, runs of spaces as one space, no invisible characters, and no
    space at either end of a line.
    """
    if text.isascii() and text.replace("\n", "").isprintable():  # most texts: nothing but spaces can differ
        return "\n".join(" ".join(line.split()) for line in text.split("\n")).strip()
    text = _LINE_END.sub("\n", unicodedata.normalize("NFC", text))
    text = _UNSEEN_JOINER.sub("", _UNSEEN.sub("", text))
    return _AROUND_LINE_END.sub("\n", _SPACES.sub(" ", text)).strip()


def without_image_tokens(question: str, images: int = 1) -> str:
    """The question without the placeholders of its images at its start, or of a single one at its end.

    The white space around them goes, too. Where they stand otherwise the question stays as it is.
    """
    head, tail = question.lstrip(_EDGE), question.rstrip(_EDGE)
    if images < 2 and not head.startswith(IMAGE_TOKEN):
        return tail.removesuffix(IMAGE_TOKEN).rstrip(_EDGE) if tail.endswith(IMAGE_TOKEN) else question
    for _ in range(max(images, 1)):
        if not head.startswith(IMAGE_TOKEN):
            return question
        head = head.removeprefix(IMAGE_TOKEN).lstrip(_EDGE)
    return head
