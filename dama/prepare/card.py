"""The data card: what is in a prepared set, what was left out and why, as JSON and as a page of Markdown."""

from __future__ import annotations

import html
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

Record = dict[str, Any]
TEXTS = ("question", "chosen", "rejected")
NOT_STATED = "(not stated)"
MAX_CELL = 300  # characters of a text from the data in a table of the page
# What GitHub's Markdown makes a link of without brackets, up to the character that is replaced by its number.
_LINKED = [re.compile(pattern, re.IGNORECASE) for pattern in (
    r"(?:https?|ftp|mailto|xmpp):", r"\bwww\.", r"[\w.+-]@(?=[\w-]+\.\w)",
)]  # fmt: skip


class Tally:
    """Counts what the card tells, one record after the other."""

    def __init__(self) -> None:
        self.rows = 0
        self.left_out: Counter[str] = Counter()
        self.contaminated = 0
        self.pairs_of: dict[bool, int] = {False: 0, True: 0}  # held out or not
        self.images: dict[str, tuple[int, int, int]] = {}  # width and height in pixels, bytes
        self.held_out: set[str] = set()
        self.texts_alone = 0
        self.lengths: list[Sequence[int]] = []
        self.sources: Counter[str] = Counter()
        self.generators: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()

    def add_left_out(self, record: Record) -> None:
        """Count a row that was left out."""
        self.rows += 1
        self.left_out[record["reason"]] += 1

    def add_pair(self, record: Record, held_out: bool) -> None:
        """Count a pair."""
        self.rows += 1
        self.pairs_of[held_out] += 1
        self.contaminated += record["contaminated"] is not None
        names = images_of(record)
        self.texts_alone += not names
        self.images |= {name: (size[0], size[1], size[2]) for name, size in zip(names, sizes_of(record), strict=True)}
        if held_out:
            self.held_out.update(names)
        self.lengths.append(record["lengths"])
        self.sources[record["origin_dataset"] or NOT_STATED] += 1
        self.generators[record["generator"] or NOT_STATED] += 1
        self.kinds[record["kind"] or NOT_STATED] += 1

    def card(self, length_unit: str) -> Record:
        """The figures; `length_unit` says what lengths are counted in."""
        lengths = np.array(self.lengths).reshape(-1, len(TEXTS))
        longer = lengths[:, 1] > lengths[:, 2]
        return {
            "counts": {
                "rows": self.rows,
                "pairs": self.pairs_of[False],
                "held_out": self.pairs_of[True],
                "left_out": self.left_out.total(),
                "evaluation_images_kept": self.contaminated,
            },
            "left_out": _ranked(self.left_out),
            "lengths": {
                "unit": length_unit,
                **{name: _spread(column) for name, column in zip(TEXTS, lengths.T)},
                "chosen_longer_than_rejected": round(float(longer.mean()), 4) if len(longer) else None,
            },
            "images": self._images(),
            "sources": _ranked(self.sources),
            "generators": _ranked(self.generators),
            "kinds": _ranked(self.kinds),
        }

    def _images(self) -> Record:
        sizes = np.array(list(self.images.values())).reshape(-1, 3)
        pairs = self.pairs_of[False] + self.pairs_of[True]
        return {
            "distinct": len(self.images),
            "held_out": len(self.held_out),
            "pairs_per_image": round(pairs / len(self.images), 3) if self.images else None,
            "bytes": int(sizes[:, 2].sum()),
            "width": _spread(sizes[:, 0]),
            "height": _spread(sizes[:, 1]),
            "formats": _ranked(Counter(name.rpartition(".")[2] for name in self.images)),
            **({"pairs_of_texts_alone": self.texts_alone} if self.texts_alone else {}),
        }


def images_of(record: Record) -> list[str]:
    """The stored images of a pair, its second one behind its own."""
    own = record["images"] if "images" in record else [record["image"]]
    return [*own, *record.get("rejected_images", ())]


def sizes_of(record: Record) -> list[list[int]]:
    """[width, height, bytes] of each of them."""
    return record["sizes"] if "sizes" in record else [record["size"]]


def _ranked(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def _spread(values: Iterable[int]) -> dict[str, float]:
    """Minimum, median, mean, 95th percentile and maximum; nothing of nothing."""
    array = np.array(list(values))
    if not len(array):
        return {}
    middle, high = np.percentile(array, [50, 95])
    figures = {"min": array.min(), "median": middle, "mean": array.mean(), "p95": high, "max": array.max()}
    return {name: round(float(value), 2) for name, value in figures.items()}


# ---------------------------------------------------------------------------------------------------------- Markdown


def markdown(card: Record) -> str:
    """The card as a page."""
    counts, images, lengths = card["counts"], card["images"], card["lengths"]
    longer = lengths["chosen_longer_than_rejected"]
    settings = [f"| {name} | {_cell(value)} |" for name, value in card["settings"].items()]
    sections = [
        "# Data card",
        f"{counts['rows']:,} rows: {counts['pairs']:,} pairs to train on, {counts['held_out']:,} held out, "
        f"{counts['left_out']:,} left out. Checksum of all files: `{card['checksum']}` (SHA-256 of SHA256SUMS).",
        "## Made from",
        _table(("file", "rows", "bytes", "SHA-256, first 16 digits"), map(dict.values, card["files"])),
        *([_table(("file left aside", "why"), card["left_aside"].items())] if card.get("left_aside") else []),
        "\n".join(["| setting | value |", "|---|---|", *settings]),
        "## Left out",
        _counted("reason", card["left_out"]) if card["left_out"] else "Nothing.",
        f"Every row is listed in dropped.jsonl. Evaluation images among the pairs: {counts['evaluation_images_kept']}.",
        "## Lengths",
        f"In {lengths['unit']}. The chosen answer is the longer one in {_share(longer)} of the pairs.",
        _spreads("text", {name: lengths[name] for name in TEXTS}),
        "## Pictures",
        f"{images['distinct']:,} distinct ones ({images['held_out']:,} of them held out), {images['bytes']:,} bytes, "
        f"{images['pairs_per_image']} pairs each; formats {_cell(images['formats'])}.",
        _spreads("pixels", {name: images[name] for name in ("width", "height")}),
        *([f"{alone:,} pairs are of texts alone."] if (alone := images.get("pairs_of_texts_alone")) else []),
        "## Where the pairs come from",
        *(_counted(name, card[f"{name}s"]) for name in ("source", "generator", "kind")),
    ]
    return "\n\n".join(sections) + "\n"


def _share(value: float | None) -> str:
    return "none" if value is None else f"{100 * value:.1f} %"


def _cell(value: Any) -> str:
    """A value inside a table: text from the data cannot break out of its cell."""
    if isinstance(value, Mapping):
        return ", ".join(f"{_cell(name)} {_cell(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(map(_cell, value)) or "none"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return _plain(str(value))


def _plain(text: str) -> str:
    """Text from the data as Markdown shows it letter by letter: no HTML, no links or images, no cells of its own."""
    text = " ".join(re.sub(r"[\x00-\x1f\x7f-\x9f]", " ", text).split())
    text = text if len(text) <= MAX_CELL else text[:MAX_CELL] + " ..."
    text = re.sub(r"[\\`*\[\]|~]", r"\\\g<0>", html.escape(text, quote=False))
    for pattern in _LINKED:
        text = pattern.sub(lambda found: found[0][:-1] + f"&#{ord(found[0][-1])};", text)
    return text


def _table(header: Sequence[str], rows: Iterable[Iterable[Any]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)])


def _counted(name: str, counts: Mapping[str, int]) -> str:
    return _table((name, "rows" if name == "reason" else "pairs"), counts.items())


def _spreads(name: str, spreads: Mapping[str, Mapping[str, float]]) -> str:
    columns = ("min", "median", "mean", "p95", "max")
    return _table((name, *columns), ([row, *(spread.get(c, "") for c in columns)] for row, spread in spreads.items()))
