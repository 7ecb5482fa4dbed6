"""The things of TinyCOCO: 32 COCO categories, the words that name them, where they occur, who goes with whom.

CONTEXTS is behind both the co-occurrence in scenes and the noise in captions: a model hallucinates what is usual.
"""

from __future__ import annotations

import re
from typing import NamedTuple

# Category -> every surface form a caption may use, the category's own name first (the format of CHAIR's synonym list).
SYNONYMS: dict[str, tuple[str, ...]] = {
    "person": (
        "person",
        "people",
        "persons",
        "man",
        "men",
        "woman",
        "women",
        "boy",
        "boys",
        "girl",
        "girls",
        "child",
        "children",
        "pedestrian",
        "pedestrians",
    ),
    "bicycle": ("bicycle", "bicycles", "bike", "bikes"),
    "car": ("car", "cars", "automobile", "automobiles"),
    "bus": ("bus", "buses"),
    "traffic light": (
        "traffic light",
        "traffic lights",
        "traffic signal",
        "traffic signals",
        "stoplight",
        "stoplights",
    ),
    "stop sign": ("stop sign", "stop signs"),
    "dog": ("dog", "dogs", "puppy", "puppies"),
    "cat": ("cat", "cats", "kitten", "kittens"),
    "bird": ("bird", "birds", "seagull", "seagulls"),
    "horse": ("horse", "horses", "pony", "ponies"),
    "cow": ("cow", "cows", "cattle"),
    "sheep": ("sheep", "lamb", "lambs"),
    "bench": ("bench", "benches"),
    "kite": ("kite", "kites"),
    "surfboard": ("surfboard", "surfboards"),
    "umbrella": ("umbrella", "umbrellas", "parasol", "parasols"),
    "boat": ("boat", "boats", "sailboat", "sailboats"),
    "pizza": ("pizza", "pizzas"),
    "fork": ("fork", "forks"),
    "cup": ("cup", "cups", "mug", "mugs"),
    "bottle": ("bottle", "bottles"),
    "apple": ("apple", "apples"),
    "banana": ("banana", "bananas"),
    "couch": ("couch", "couches", "sofa", "sofas"),
    "tv": ("tv", "tvs", "television", "televisions"),
    "clock": ("clock", "clocks"),
    "potted plant": ("potted plant", "potted plants", "plant", "plants", "houseplant", "houseplants"),
    "laptop": ("laptop", "laptops"),
    "keyboard": ("keyboard", "keyboards"),
    "mouse": ("mouse", "mice"),
    "refrigerator": ("refrigerator", "refrigerators", "fridge", "fridges"),
    "oven": ("oven", "ovens", "stove", "stoves"),
}
CATEGORIES: tuple[str, ...] = tuple(SYNONYMS)

# Context -> category -> its usual companion there.
CONTEXTS: dict[str, dict[str, str]] = {
    "street": {
        "car": "traffic light",
        "traffic light": "car",
        "bus": "stop sign",
        "stop sign": "bus",
        "bicycle": "person",
        "person": "bicycle",
    },
    "park": {"person": "dog", "dog": "person", "bench": "bird", "bird": "bench", "kite": "person", "bicycle": "bench"},
    "field": {"cow": "sheep", "sheep": "cow", "horse": "person", "person": "horse", "dog": "sheep", "bird": "cow"},
    "beach": {
        "person": "surfboard",
        "surfboard": "person",
        "umbrella": "bird",
        "boat": "bird",
        "bird": "boat",
        "kite": "person",
    },
    "table": {"pizza": "fork", "fork": "pizza", "cup": "bottle", "bottle": "cup", "apple": "banana", "banana": "apple"},
    "kitchen": {
        "refrigerator": "oven",
        "oven": "refrigerator",
        "cup": "bottle",
        "bottle": "cup",
        "apple": "banana",
        "banana": "apple",
        "clock": "oven",
        "cat": "refrigerator",
    },
    "room": {"couch": "tv", "tv": "couch", "cat": "couch", "dog": "couch", "potted plant": "clock", "clock": "tv"},
    "office": {
        "laptop": "mouse",
        "mouse": "laptop",
        "keyboard": "mouse",
        "cup": "laptop",
        "clock": "potted plant",
        "potted plant": "laptop",
    },
}

# Context -> the looks it comes in: the weather, the color of the walls, the table's top.
BACKGROUNDS: dict[str, tuple[str, ...]] = {
    **{place: ("sunny", "cloudy", "evening") for place in ("street", "park", "field", "beach")},
    **{place: ("white", "blue", "green", "pink") for place in ("kitchen", "room", "office")},
    "table": ("wooden", "white", "blue", "checkered"),
}

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (210, 48, 44),
    "blue": (48, 96, 200),
    "green": (56, 150, 72),
    "yellow": (244, 200, 46),
    "orange": (238, 132, 40),
    "purple": (134, 78, 176),
    "pink": (238, 130, 168),
    "white": (242, 242, 238),
    "black": (46, 46, 52),
    "gray": (140, 146, 154),
    "brown": (136, 88, 52),
}

# Category -> colors it comes in; an empty tuple means that captions never name a color for it.
PALETTES: dict[str, tuple[str, ...]] = {
    "person": ("red", "blue", "green", "yellow", "purple", "orange"),
    "bicycle": ("red", "blue", "black", "green"),
    "car": ("red", "blue", "yellow", "white", "black", "green"),
    "bus": ("red", "yellow", "blue", "green", "white"),
    "traffic light": (), "stop sign": (),
    "dog": ("brown", "black", "white", "orange"), "cat": ("orange", "black", "gray", "white"),
    "bird": ("blue", "red", "white", "yellow"), "horse": ("brown", "black", "white"), "cow": ("black", "brown"),
    "sheep": ("white", "gray"), "bench": ("brown", "green", "blue"), "kite": ("red", "yellow", "blue", "purple"),
    "surfboard": ("red", "yellow", "blue", "white", "green"), "umbrella": ("red", "blue", "green", "orange"),
    "boat": ("white", "red", "blue"),
    "pizza": (), "fork": (), "cup": ("white", "red", "blue", "green", "yellow"), "bottle": ("green", "brown", "blue"),
    "apple": ("red", "green"), "banana": (),
    "couch": ("red", "blue", "green", "gray", "brown"), "tv": (), "clock": ("white", "red", "blue", "black"),
    "potted plant": (), "laptop": ("gray", "black", "white"), "keyboard": ("white", "black"),
    "mouse": ("white", "black"), "refrigerator": ("white", "gray", "red"), "oven": ("black", "white", "gray"),
}  # fmt: skip

_NODE_OF = {form: category for category, forms in SYNONYMS.items() for form in forms}
# Longest form first, so that "potted plant" is found before "plant".
_FORMS = "|".join(sorted(map(re.escape, _NODE_OF), key=len, reverse=True))
_MENTION = re.compile(rf"\b({_FORMS})\b", re.IGNORECASE)


class Mention(NamedTuple):
    """A category named in a text: its node, and the characters [start, end) that name it."""

    category: str
    start: int
    end: int


def find_mentions(text: str) -> list[Mention]:
    """Every naming of a category in `text`, in reading order, repetitions included."""
    return [Mention(_NODE_OF[m.group(1).lower()], m.start(), m.end()) for m in _MENTION.finditer(text)]


def mentioned_categories(text: str) -> list[str]:
    """The distinct categories named in `text`, in the order of their first naming."""
    return list(dict.fromkeys(mention.category for mention in find_mentions(text)))


def companion_of(category: str, context: str) -> str | None:
    """Who usually accompanies `category` in `context`; None where the category does not belong there."""
    return CONTEXTS[context].get(category)
