"""Scenes of TinyCOCO: sampled from (split, index) alone, kept as JSON, drawn as 112 x 112 images when needed.

First what is in a scene and where; then the painter, with a background for each context and a sketch in unit
coordinates for each category.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from playground.tinycoco.vocabulary import BACKGROUNDS, COLOURS, CONTEXTS, PALETTES

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

SIZE = 112  # pixels, both sides
SUPERSAMPLING = 3  # drawn larger and averaged, since PIL's primitives have hard edges
SPLITS = ("train", "pairs", "validation", "test")

RGB = tuple[int, int, int]
Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the finished image


@dataclass(frozen=True)
class SceneObject:
    """One drawn thing; `style` in 0..5 varies details that no caption names."""

    category: str
    colour: str  # "" where the category comes in one color only
    box: Box
    flip: bool = False
    style: int = 0

    @property
    def centre(self) -> tuple[float, float]:
        """Center of the box, in pixels."""
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def area(self) -> int:
        """Area of the box, in pixels."""
        return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])


@dataclass(frozen=True)
class Scene:
    """What is to be seen: a context, its look, and 2 to 5 objects."""

    id: str
    context: str
    background: str
    objects: tuple[SceneObject, ...]

    @property
    def categories(self) -> tuple[str, ...]:
        """The distinct categories present, largest first."""
        ordered = sorted(self.objects, key=lambda thing: -thing.area)
        return tuple(dict.fromkeys(thing.category for thing in ordered))

    @property
    def count(self) -> Counter[str]:
        """How many objects there are of each category."""
        return Counter(thing.category for thing in self.objects)

    @property
    def single(self) -> list[SceneObject]:
        """The objects that are the only ones of their category."""
        count = self.count
        return [thing for thing in self.objects if count[thing.category] == 1]


def scene_record(scene: Scene) -> dict[str, Any]:
    """The scene as plain JSON values."""
    return asdict(scene) | {"objects": [asdict(thing) | {"box": list(thing.box)} for thing in scene.objects]}


def scene_from_record(record: dict[str, Any]) -> Scene:
    """The inverse of scene_record."""
    objects = tuple(SceneObject(**(thing | {"box": tuple(thing["box"])})) for thing in record["objects"])
    return Scene(record["id"], record["context"], record["background"], objects)


# ---- sampling

PULL = 0.3  # chance that the next object is the companion of one already there
TWICE = 0.15  # chance that a category which comes in numbers comes twice
IN_NUMBERS = ("apple", "banana", "cup", "bird", "cow", "sheep", "person", "car")
LARGEST_OVERLAP = 0.10  # of the smaller box

# Category -> (width / height, least and greatest height in pixels).
SHAPES: dict[str, tuple[float, float, float]] = {
    "person": (0.46, 42, 60), "bicycle": (1.5, 27, 36), "car": (1.95, 21, 31), "bus": (1.7, 32, 44),
    "traffic light": (0.40, 48, 66), "stop sign": (0.52, 44, 58), "dog": (1.3, 22, 32), "cat": (0.95, 26, 36),
    "bird": (1.35, 17, 25), "horse": (1.2, 34, 48), "cow": (1.45, 26, 36), "sheep": (1.25, 23, 33),
    "bench": (1.75, 22, 31), "kite": (0.85, 30, 42), "surfboard": (0.36, 46, 60), "umbrella": (1.1, 42, 54),
    "boat": (1.25, 24, 32), "pizza": (1.25, 36, 50), "fork": (0.30, 42, 56), "cup": (1.15, 24, 34),
    "bottle": (0.36, 42, 56), "apple": (0.95, 22, 30), "banana": (1.5, 20, 28), "couch": (1.75, 29, 38),
    "tv": (1.3, 27, 36), "clock": (1.0, 21, 28), "potted plant": (0.75, 32, 44), "laptop": (1.35, 28, 38),
    "keyboard": (2.5, 17, 23), "mouse": (0.85, 18, 24), "refrigerator": (0.55, 56, 64), "oven": (0.92, 38, 46),
}  # fmt: skip

# Context -> the band in which the bottoms of standing things lie.
GROUND: dict[str, tuple[int, int]] = {
    "street": (72, 108), "park": (66, 108), "field": (62, 108), "beach": (76, 108), "kitchen": (104, 109),
    "room": (82, 108), "office": (70, 107),
}  # fmt: skip
SHELF = 35  # the kitchen's shelf, which carries what is small
ON_SHELF = ("cup", "bottle", "apple", "banana")


def sample_scene(index: int, split: str) -> Scene:
    """Scene number `index` of a split: a function of these two alone, so nothing needs to be stored or downloaded."""
    if split not in SPLITS:
        raise ValueError(f"split of a scene: expected one of {', '.join(SPLITS)}, got {split!r}")
    rng = random.Random(f"tinycoco/{split}/{index}")
    context = rng.choice(sorted(CONTEXTS))
    placed: list[SceneObject] = []
    while len(placed) < 2:  # rarely, a second object finds no room
        placed = _place(_sample_categories(context, rng), context, rng)
    return Scene(f"{split}-{index:06d}", context, rng.choice(BACKGROUNDS[context]), tuple(placed))


def _sample_categories(context: str, rng: random.Random) -> list[str]:
    companions = CONTEXTS[context]
    wanted = rng.choices((2, 3, 4, 5), weights=(30, 35, 23, 12))[0]
    chosen = [rng.choice(sorted(companions))]
    while len(chosen) < wanted:
        absent_companions = [companions[c] for c in chosen if companions[c] not in chosen]
        if absent_companions and rng.random() < PULL:
            chosen.append(rng.choice(absent_companions))
        else:
            chosen.append(rng.choice(sorted(set(companions) - set(chosen))))
    countable = [category for category in chosen if category in IN_NUMBERS]
    if countable and len(chosen) < 5 and rng.random() < TWICE:
        chosen.append(rng.choice(countable))
    return chosen


def _place(categories: list[str], context: str, rng: random.Random) -> list[SceneObject]:
    """Boxes that hardly overlap, the largest placed first; what finds no room even when smaller is left out (rare)."""
    placed: list[SceneObject] = []
    for category in sorted(categories, key=lambda c: -SHAPES[c][0] * SHAPES[c][2] ** 2):
        for attempt in range(60):
            box = _propose_box(category, context, max(0.7, 0.99**attempt), rng)
            if all(_overlap(box, other.box) <= LARGEST_OVERLAP for other in placed):
                colour = rng.choice(PALETTES[category]) if PALETTES[category] else ""
                placed.append(SceneObject(category, colour, box, rng.random() < 0.5, rng.randrange(6)))
                break
    return placed


def _propose_box(category: str, context: str, shrink: float, rng: random.Random) -> Box:
    aspect, low, high = SHAPES[category]
    height = rng.uniform(low, high) * shrink
    bottom = _bottom(category, context, height, rng)
    if context in ("street", "park", "field", "beach") and category not in ("kite", "boat"):
        near, far = GROUND[context][1], GROUND[context][0]
        height *= 0.82 + 0.26 * max(0.0, (bottom - far) / (near - far))  # nearer is larger
    if context == "kitchen" and category in ON_SHELF:
        height = min(height, SHELF - 5)
    width = height * aspect
    left = rng.uniform(2, max(2.0, SIZE - 2 - width))
    return round(left), round(bottom - height), round(left + width), round(bottom)


def _bottom(category: str, context: str, height: float, rng: random.Random) -> float:
    if context == "table":
        return rng.uniform(height + 3, SIZE - 4)
    if category == "kite":
        return rng.uniform(height + 2, height + 20)
    if category == "clock":
        return rng.uniform(height + 3, height + 9) if context != "kitchen" else height + rng.uniform(2, 6)
    if category == "boat":
        return rng.uniform(48, 58)
    if category == "bird" and rng.random() < 0.5:
        return rng.uniform(height + 2, height + 22)  # in the air
    if context == "kitchen" and category in ON_SHELF:
        return SHELF
    return rng.uniform(*GROUND[context])


def _overlap(one: Box, other: Box) -> float:
    """Area in common, as a share of the smaller box."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    smaller = min((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    return max(0, width) * max(0, height) / smaller


# ---- painting


def shade(colour: RGB, factor: float) -> RGB:
    """Darker below 1, towards white above 1 (2 is white)."""
    if factor <= 1:
        return tuple(round(c * factor) for c in colour)  # type: ignore[return-value]
    return tuple(round(c + (255 - c) * (factor - 1)) for c in colour)  # type: ignore[return-value]


class Pen:
    """Draws in unit coordinates of a box, (0, 0) its upper left corner, mirrored where the object is flipped."""

    def __init__(self, draw: ImageDraw.ImageDraw, box: tuple[float, float, float, float], flip: bool = False) -> None:
        self.draw, self.flip = draw, flip
        self.left, self.top, self.width, self.height = box[0], box[1], box[2] - box[0], box[3] - box[1]

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Pixel coordinates of a point of the unit box."""
        return self.left + (1 - x if self.flip else x) * self.width, self.top + y * self.height

    def span(self, x0: float, y0: float, x1: float, y1: float) -> tuple[float, float, float, float]:
        """Pixel box (left, top, right, bottom) of two corners, ordered as PIL wants them also when mirrored."""
        (a, b), (c, d) = self.at(x0, y0), self.at(x1, y1)
        return min(a, c), min(b, d), max(a, c), max(b, d)

    def ellipse(self, x0: float, y0: float, x1: float, y1: float, fill: RGB) -> None:
        """Fill the ellipse that two corners of the unit box span."""
        self.draw.ellipse(self.span(x0, y0, x1, y1), fill=fill)

    def disc(self, x: float, y: float, radius: float, fill: RGB) -> None:
        """A round disc; the radius is a share of the box's height."""
        (a, b), r = self.at(x, y), radius * self.height
        self.draw.ellipse((a - r, b - r, a + r, b + r), fill=fill)

    def ring(self, x: float, y: float, radius: float, thickness: float, fill: RGB) -> None:
        """Outline a circle; radius and thickness are shares of the box's height."""
        (a, b), r = self.at(x, y), radius * self.height
        self.draw.ellipse((a - r, b - r, a + r, b + r), outline=fill, width=self.pixels(thickness))

    def rect(self, x0: float, y0: float, x1: float, y1: float, fill: RGB, radius: float = 0.0) -> None:
        """Fill a rectangle; the radius of its corners is a share of the box's height."""
        self.draw.rounded_rectangle(self.span(x0, y0, x1, y1), radius * self.height, fill=fill)

    def poly(self, points: list[tuple[float, float]], fill: RGB) -> None:
        """Fill the polygon with these corners, in unit coordinates."""
        self.draw.polygon([self.at(x, y) for x, y in points], fill=fill)

    def line(self, points: list[tuple[float, float]], fill: RGB, thickness: float = 0.05) -> None:
        """Draw connected segments; the thickness is a share of the box's height."""
        self.draw.line([self.at(x, y) for x, y in points], fill=fill, width=self.pixels(thickness), joint="curve")

    def pixels(self, share: float) -> int:
        """A share of the box's height in pixels, at least 2."""
        return max(2, round(share * self.height))


Sketch = Callable[[Pen, RGB, int], None]  # pen, color, style
DARK, STEEL, GLASS, WOOD = (44, 44, 52), (176, 182, 190), (176, 216, 236), (150, 98, 56)
SKINS = ((246, 206, 172), (224, 172, 130), (160, 108, 72), (112, 74, 50), (240, 194, 160), (190, 136, 96))
HAIRS = ((60, 40, 28), (28, 26, 30), (188, 136, 64), (110, 64, 36), (150, 60, 34), (86, 82, 84))


def _person(pen: Pen, colour: RGB, style: int) -> None:
    skin, hair, trousers = SKINS[style], HAIRS[(style * 5 + 2) % 6], ((52, 62, 98), (88, 76, 66), DARK)[style % 3]
    if style % 2:  # long hair behind the head
        pen.ellipse(0.24, 0.0, 0.76, 0.34, hair)
    pen.poly([(0.34, 0.56), (0.48, 0.56), (0.46, 0.96), (0.30, 0.96)], trousers)
    pen.poly([(0.52, 0.56), (0.66, 0.56), (0.70, 0.96), (0.54, 0.96)], trousers)
    pen.rect(0.24, 0.94, 0.46, 1.0, DARK, 0.02)
    pen.rect(0.54, 0.94, 0.76, 1.0, DARK, 0.02)
    pen.line([(0.30, 0.34), (0.13, 0.54)], shade(colour, 0.85), 0.085)
    pen.line([(0.70, 0.34), (0.87, 0.50)], shade(colour, 0.85), 0.085)
    pen.disc(0.13, 0.56, 0.042, skin)
    pen.disc(0.87, 0.52, 0.042, skin)
    pen.rect(0.26, 0.27, 0.74, 0.62, colour, 0.08)
    pen.rect(0.43, 0.20, 0.57, 0.30, skin)
    pen.disc(0.5, 0.135, 0.115, skin)
    pen.draw.pieslice(pen.span(0.23, 0.0, 0.77, 0.26), 180, 360, fill=hair)
    pen.disc(0.42, 0.145, 0.014, DARK)
    pen.disc(0.58, 0.145, 0.014, DARK)


def _bicycle(pen: Pen, colour: RGB, style: int) -> None:
    for x in (0.22, 0.78):
        pen.ring(x, 0.68, 0.32, 0.055, DARK)
        for k in range(3):
            dx, dy = 0.19 * math.cos(k * 1.05 + style), 0.29 * math.sin(k * 1.05 + style)
            pen.line([(x - dx, 0.68 - dy), (x + dx, 0.68 + dy)], STEEL, 0.012)
    pen.line([(0.22, 0.68), (0.38, 0.30), (0.68, 0.28), (0.47, 0.70), (0.22, 0.68)], colour, 0.075)
    pen.line([(0.38, 0.30), (0.47, 0.70)], colour, 0.075)
    pen.line([(0.78, 0.68), (0.66, 0.12), (0.77, 0.07)], colour, 0.07)
    pen.line([(0.38, 0.30), (0.36, 0.16)], DARK, 0.05)
    pen.rect(0.27, 0.10, 0.45, 0.17, DARK, 0.03)
    pen.disc(0.47, 0.70, 0.065, DARK)


def _car(pen: Pen, colour: RGB, style: int) -> None:
    roof = 0.04 if style % 2 else 0.10
    pen.poly([(0.16, 0.48), (0.30, roof), (0.68, roof), (0.86, 0.48)], shade(colour, 0.88))
    pen.poly([(0.22, 0.46), (0.33, roof + 0.08), (0.47, roof + 0.08), (0.47, 0.46)], GLASS)
    pen.poly([(0.52, 0.46), (0.52, roof + 0.08), (0.65, roof + 0.08), (0.78, 0.46)], GLASS)
    pen.rect(0.0, 0.42, 1.0, 0.84, colour, 0.16)
    pen.rect(0.0, 0.68, 1.0, 0.80, shade(colour, 0.75), 0.05)
    pen.line([(0.495, 0.46), (0.495, 0.68)], shade(colour, 0.7), 0.03)
    pen.ellipse(0.93, 0.48, 1.0, 0.62, (255, 240, 170))
    pen.ellipse(0.0, 0.48, 0.06, 0.60, (200, 40, 40))
    for x in (0.22, 0.78):
        pen.disc(x, 0.80, 0.20, DARK)
        pen.disc(x, 0.80, 0.09, STEEL)


def _bus(pen: Pen, colour: RGB, style: int) -> None:
    pen.rect(0.0, 0.0, 1.0, 0.88, colour, 0.10)
    pen.rect(0.0, 0.55, 1.0, 0.64, shade(colour, 1.55))
    for k in range(4):
        pen.rect(0.05 + 0.18 * k, 0.14, 0.20 + 0.18 * k, 0.46, GLASS, 0.03)
    pen.rect(0.79, 0.12, 0.90, 0.80, shade(GLASS, 0.82), 0.02)
    pen.line([(0.845, 0.12), (0.845, 0.80)], shade(colour, 0.6), 0.02)
    pen.rect(0.94, 0.12, 1.0, 0.48, GLASS, 0.02)
    pen.rect(0.28, 0.03, 0.66, 0.10, DARK)
    pen.ellipse(0.94, 0.68, 1.0, 0.78, (255, 240, 170))
    for x in (0.18, 0.68):
        pen.disc(x, 0.86, 0.14, DARK)
        pen.disc(x, 0.86, 0.06, STEEL)


def _traffic_light(pen: Pen, colour: RGB, style: int) -> None:
    pen.rect(0.43, 0.5, 0.57, 1.0, (96, 100, 106))
    pen.rect(0.28, 0.96, 0.72, 1.0, (80, 84, 90))
    pen.rect(0.12, 0.0, 0.88, 0.60, (232, 186, 44), 0.05)
    pen.rect(0.19, 0.03, 0.81, 0.57, (34, 36, 42), 0.04)
    lamps = ((236, 50, 44), (250, 196, 40), (52, 206, 96))
    for k, lamp in enumerate(lamps):
        pen.disc(0.5, 0.125 + 0.175 * k, 0.078, lamp if k == style % 3 else shade(lamp, 0.42))


def _stop_sign(pen: Pen, colour: RGB, style: int) -> None:
    pen.rect(0.45, 0.4, 0.56, 1.0, (120, 124, 130))
    for radius, fill in ((0.50, (246, 246, 246)), (0.445, (200, 30, 36))):
        corners = [(math.cos(math.pi / 8 + k * math.pi / 4), math.sin(math.pi / 8 + k * math.pi / 4)) for k in range(8)]
        pen.poly([(0.5 + radius * x, 0.27 + radius * y * 0.54) for x, y in corners], fill)
    plain = Pen(pen.draw, pen.span(0.10, 0.20, 0.90, 0.34))  # letters are never mirrored
    letters = [
        [(0.20, 0.05), (0.02, 0.05), (0.02, 0.5), (0.20, 0.5), (0.20, 0.95), (0.02, 0.95)],
        [(0.27, 0.05), (0.47, 0.05), (0.37, 0.05), (0.37, 1.0)],
        [(0.55, 0.05), (0.72, 0.05), (0.72, 0.95), (0.55, 0.95), (0.55, 0.05)],
        [(0.80, 1.0), (0.80, 0.05), (0.98, 0.05), (0.98, 0.5), (0.80, 0.5)],
    ]
    for strokes in letters:
        plain.line(strokes, (250, 250, 250), 0.22)


def _four_legs(pen: Pen, xs: tuple[float, ...], top: float, width: float, fill: RGB) -> None:
    for k, x in enumerate(xs):
        pen.rect(x, top, x + width, 1.0, shade(fill, 0.8 if k % 2 else 1.0), 0.03)


def _dog(pen: Pen, colour: RGB, style: int) -> None:
    pen.line([(0.12, 0.48), (0.02, 0.18)], colour, 0.10)
    _four_legs(pen, (0.12, 0.24, 0.54, 0.65), 0.62, 0.09, colour)
    pen.rect(0.08, 0.38, 0.76, 0.76, colour, 0.18)
    pen.ellipse(0.58, 0.06, 0.90, 0.54, colour)
    pen.rect(0.76, 0.26, 1.0, 0.48, shade(colour, 1.25), 0.09)
    pen.ellipse(0.57, 0.04, 0.70, 0.46, shade(colour, 0.55))
    pen.disc(0.975, 0.29, 0.055, DARK)
    pen.disc(0.79, 0.22, 0.045, DARK)
    pen.line([(0.60, 0.56), (0.76, 0.56)], (214, 50, 50), 0.07)
    if style % 2:
        pen.poly([(0.86, 0.46), (0.93, 0.46), (0.90, 0.62)], (238, 120, 140))


def _cat(pen: Pen, colour: RGB, style: int) -> None:
    dark = shade(colour, 0.68)
    pen.line([(0.70, 0.92), (0.93, 0.90), (0.96, 0.66), (0.88, 0.54)], dark, 0.09)
    pen.ellipse(0.20, 0.40, 0.82, 1.0, colour)
    pen.ellipse(0.36, 0.55, 0.66, 1.0, shade(colour, 1.35))
    pen.poly([(0.20, 0.0), (0.46, 0.14), (0.20, 0.34)], colour)
    pen.poly([(0.80, 0.0), (0.54, 0.14), (0.80, 0.34)], colour)
    pen.poly([(0.25, 0.07), (0.38, 0.15), (0.26, 0.24)], (240, 160, 170))
    pen.poly([(0.75, 0.07), (0.62, 0.15), (0.74, 0.24)], (240, 160, 170))
    pen.ellipse(0.17, 0.10, 0.83, 0.56, colour)
    for k in (-1, 0, 1):
        pen.line([(0.5 + 0.09 * k, 0.11), (0.5 + 0.07 * k, 0.21)], dark, 0.035)
    for x in (0.36, 0.64):
        pen.ellipse(x - 0.075, 0.26, x + 0.075, 0.40, (196, 220, 90))
        pen.ellipse(x - 0.03, 0.27, x + 0.03, 0.40, (24, 24, 28))
    pen.poly([(0.45, 0.42), (0.55, 0.42), (0.5, 0.48)], (226, 120, 130))
    for y in (0.43, 0.49):
        pen.line([(0.40, 0.45), (0.08, y)], shade(colour, 0.4), 0.012)
        pen.line([(0.60, 0.45), (0.92, y)], shade(colour, 0.4), 0.012)


def _bird(pen: Pen, colour: RGB, style: int) -> None:
    pen.poly([(0.25, 0.55), (0.0, 0.34), (0.04, 0.66)], shade(colour, 0.7))
    pen.line([(0.45, 0.8), (0.43, 1.0)], (226, 140, 40), 0.05)
    pen.line([(0.55, 0.8), (0.56, 1.0)], (226, 140, 40), 0.05)
    pen.ellipse(0.16, 0.34, 0.78, 0.88, colour)
    pen.ellipse(0.34, 0.58, 0.74, 0.88, shade(colour, 1.5))
    pen.disc(0.74, 0.32, 0.215, colour)
    if style % 2:
        pen.poly([(0.26, 0.50), (0.58, 0.52), (0.28, 0.0)], shade(colour, 0.65))
    else:
        pen.ellipse(0.20, 0.42, 0.58, 0.70, shade(colour, 0.65))
    pen.poly([(0.87, 0.24), (1.0, 0.36), (0.87, 0.44)], (244, 160, 40))
    pen.disc(0.77, 0.27, 0.06, (20, 20, 24))
    pen.disc(0.78, 0.25, 0.02, (255, 255, 255))


def _horse(pen: Pen, colour: RGB, style: int) -> None:
    mane = shade(colour, 0.5) if max(colour) > 80 else (120, 96, 80)
    pen.poly([(0.10, 0.36), (0.0, 0.42), (0.02, 0.74), (0.09, 0.66)], mane)
    _four_legs(pen, (0.11, 0.21, 0.53, 0.62), 0.56, 0.07, colour)
    for x in (0.11, 0.21, 0.53, 0.62):
        pen.rect(x, 0.95, x + 0.075, 1.0, DARK)
    pen.rect(0.08, 0.33, 0.70, 0.66, colour, 0.14)
    pen.poly([(0.52, 0.42), (0.70, 0.56), (0.88, 0.22), (0.74, 0.06)], colour)
    pen.poly([(0.72, 0.04), (0.86, 0.08), (1.0, 0.30), (0.93, 0.38), (0.78, 0.26)], colour)
    pen.line([(0.52, 0.38), (0.62, 0.20), (0.72, 0.05)], mane, 0.09)
    pen.poly([(0.73, 0.07), (0.75, 0.0), (0.81, 0.07)], colour)
    pen.poly([(0.94, 0.24), (1.0, 0.30), (0.93, 0.38), (0.89, 0.33)], shade(colour, 1.4))
    pen.disc(0.84, 0.15, 0.022, (16, 16, 20))


def _cow(pen: Pen, colour: RGB, style: int) -> None:
    hide, pink = (246, 242, 234), (240, 170, 170)
    pen.line([(0.06, 0.34), (0.02, 0.66)], colour, 0.05)
    _four_legs(pen, (0.10, 0.22, 0.54, 0.65), 0.62, 0.08, hide)
    pen.ellipse(0.28, 0.66, 0.46, 0.84, pink)
    pen.rect(0.05, 0.24, 0.76, 0.76, hide, 0.16)
    for x, y, r in ((0.20, 0.38, 0.13), (0.42, 0.56, 0.14), (0.60, 0.34, 0.11))[: 2 + style % 2]:
        pen.ellipse(x - 1.0 * r, y - r, x + 0.9 * r, y + 1.1 * r, colour)
    pen.poly([(0.71, 0.14), (0.69, 0.0), (0.77, 0.12)], (226, 210, 170))
    pen.poly([(0.90, 0.14), (0.96, 0.0), (0.97, 0.14)], (226, 210, 170))
    pen.ellipse(0.60, 0.14, 0.74, 0.30, colour)
    pen.rect(0.70, 0.10, 0.98, 0.58, hide, 0.12)
    pen.rect(0.70, 0.10, 0.84, 0.36, colour, 0.10)
    pen.rect(0.71, 0.42, 1.0, 0.62, pink, 0.09)
    pen.disc(0.79, 0.26, 0.04, DARK if colour != COLOURS["black"] else (250, 250, 250))
    pen.disc(0.91, 0.26, 0.04, DARK)
    pen.disc(0.80, 0.52, 0.025, (150, 80, 80))
    pen.disc(0.91, 0.52, 0.025, (150, 80, 80))


def _sheep(pen: Pen, colour: RGB, style: int) -> None:
    face = (66, 58, 58)
    _four_legs(pen, (0.20, 0.32, 0.54, 0.65), 0.66, 0.07, face)
    puffs = [(0.14, 0.48), (0.26, 0.30), (0.44, 0.24), (0.61, 0.32), (0.70, 0.50), (0.58, 0.66), (0.38, 0.68),
             (0.22, 0.64)]  # fmt: skip
    for x, y in puffs:
        pen.disc(x, y + 0.03, 0.165, shade(colour, 0.82))
    for x, y in [*puffs, (0.42, 0.46)]:
        pen.disc(x, y, 0.15 if (x, y) in puffs else 0.26, colour)
    pen.ellipse(0.64, 0.24, 0.80, 0.38, face)
    pen.ellipse(0.72, 0.20, 0.99, 0.64, face)
    pen.disc(0.78, 0.20, 0.10, colour)
    pen.disc(0.86, 0.36, 0.045, (250, 250, 250))
    pen.disc(0.87, 0.37, 0.02, (0, 0, 0))


def _bench(pen: Pen, colour: RGB, style: int) -> None:
    iron = (70, 72, 78)
    for x in (0.10, 0.84):
        pen.rect(x, 0.0, x + 0.05, 1.0, iron)
        pen.rect(x - 0.03, 0.94, x + 0.10, 1.0, iron)
    for y in (0.04, 0.22, 0.40):
        pen.rect(0.0, y, 1.0, y + 0.13, shade(colour, 1.12), 0.02)
    pen.poly([(0.04, 0.58), (0.96, 0.58), (1.0, 0.74), (0.0, 0.74)], colour)
    pen.line([(0.02, 0.66), (0.98, 0.66)], shade(colour, 0.65), 0.03)


def _kite(pen: Pen, colour: RGB, style: int) -> None:
    light, tail = shade(colour, 1.5), shade(colour, 0.8)
    pen.line([(0.5, 0.62), (0.36, 0.74), (0.56, 0.86), (0.40, 1.0)], DARK, 0.02)
    for x, y in ((0.40, 0.74), (0.53, 0.86), (0.42, 0.97)):
        pen.poly([(x, y), (x - 0.10, y - 0.045), (x - 0.10, y + 0.045)], tail)
        pen.poly([(x, y), (x + 0.10, y - 0.045), (x + 0.10, y + 0.045)], tail)
    pen.poly([(0.5, 0.0), (0.98, 0.28), (0.5, 0.66), (0.02, 0.28)], colour)
    pen.poly([(0.5, 0.0), (0.98, 0.28), (0.5, 0.28)], light)
    pen.poly([(0.02, 0.28), (0.5, 0.28), (0.5, 0.66)], light)


def _surfboard(pen: Pen, colour: RGB, style: int) -> None:
    half = [(0.5, 0.0), (0.78, 0.10), (0.96, 0.34), (1.0, 0.60), (0.88, 0.86), (0.66, 1.0)]
    outline = half + [(1 - x, y) for x, y in reversed(half[1:])]
    pen.poly(outline, shade(colour, 0.72))
    pen.poly([(0.5 + 0.8 * (x - 0.5), 0.02 + 0.95 * y) for x, y in outline], colour)
    stripe = (252, 252, 250) if colour != COLOURS["white"] else (40, 150, 190)
    pen.rect(0.44, 0.06, 0.56, 0.96, stripe)
    pen.poly([(0.12, 0.46), (0.88, 0.30), (0.88, 0.42), (0.12, 0.58)], stripe)
    pen.poly([(0.12, 0.64), (0.88, 0.48), (0.88, 0.54), (0.12, 0.70)], stripe)


def _umbrella(pen: Pen, colour: RGB, style: int) -> None:
    pen.rect(0.475, 0.06, 0.525, 1.0, (120, 90, 64))
    pen.rect(0.47, 0.0, 0.53, 0.10, (120, 90, 64), 0.02)
    span, white = pen.span(0.0, 0.04, 1.0, 0.92), (250, 246, 236)
    for k in range(6):
        pen.draw.pieslice(span, 180 + 30 * k, 210 + 30 * k, fill=white if k % 2 else colour)
    rim = [0.5 - 0.5 * math.cos(k * math.pi / 6) for k in range(7)]
    for k in range(6):  # the scallops hang below their segments
        pen.ellipse(rim[k], 0.43, rim[k + 1], 0.53, white if k % 2 ^ pen.flip else colour)


def _boat(pen: Pen, colour: RGB, style: int) -> None:
    pen.rect(0.47, 0.0, 0.51, 0.74, (110, 80, 56))
    pen.poly([(0.53, 0.04), (0.53, 0.64), (0.94, 0.64)], (250, 248, 242))
    pen.poly([(0.45, 0.12), (0.45, 0.64), (0.12, 0.64)], (240, 150, 70) if style % 2 else (250, 220, 120))
    pen.poly([(0.0, 0.70), (1.0, 0.70), (0.84, 1.0), (0.18, 1.0)], colour)
    pen.poly([(0.0, 0.70), (1.0, 0.70), (0.96, 0.78), (0.05, 0.78)], shade(colour, 0.65))


def _pizza(pen: Pen, colour: RGB, style: int) -> None:
    pen.ellipse(0.0, 0.0, 1.0, 1.0, (196, 128, 60))
    pen.ellipse(0.06, 0.06, 0.94, 0.94, (214, 70, 42))
    pen.ellipse(0.09, 0.09, 0.91, 0.91, (250, 206, 92))
    for k in range(7):
        angle, reach = k * 0.9 + style, 0.27 if k else 0.0
        x, y = 0.5 + reach * math.cos(angle), 0.5 + reach * math.sin(angle)
        pen.ellipse(x - 0.09, y - 0.09, x + 0.09, y + 0.09, (190, 44, 36))
        pen.ellipse(x + 0.08, y + 0.08, x + 0.15, y + 0.11, (60, 130, 60))
    for angle in (0.3 + style, 1.87 + style):
        dx, dy = 0.46 * math.cos(angle), 0.46 * math.sin(angle)
        pen.line([(0.5 - dx, 0.5 - dy), (0.5 + dx, 0.5 + dy)], (206, 140, 56), 0.02)


def _fork(pen: Pen, colour: RGB, style: int) -> None:
    for fill, shift in (((96, 102, 112), 0.04), ((206, 212, 220), 0.0)):
        for x in (0.10, 0.33, 0.56, 0.79):
            pen.rect(x + shift, 0.0, x + 0.12 + shift, 0.32, fill, 0.02)
        pen.rect(0.10 + shift, 0.24, 0.91 + shift, 0.42, fill, 0.07)
        pen.rect(0.40 + shift, 0.38, 0.60 + shift, 1.0, fill, 0.03)
    pen.rect(0.36, 0.70, 0.68, 1.0, (206, 212, 220), 0.05)


def _cup(pen: Pen, colour: RGB, style: int) -> None:
    pen.ellipse(0.02, 0.84, 0.80, 1.0, shade(colour, 0.6))
    pen.draw.ellipse(pen.span(0.60, 0.24, 0.98, 0.72), outline=shade(colour, 0.8), width=pen.pixels(0.10))
    pen.poly([(0.06, 0.16), (0.76, 0.16), (0.66, 0.94), (0.16, 0.94)], colour)
    pen.poly([(0.58, 0.16), (0.76, 0.16), (0.66, 0.94), (0.54, 0.94)], shade(colour, 0.82))
    pen.ellipse(0.06, 0.05, 0.76, 0.27, shade(colour, 1.4))
    pen.ellipse(0.11, 0.08, 0.71, 0.25, (92, 56, 34))
    if style % 2:
        pen.disc(0.34, 0.58, 0.11, shade(colour, 1.6) if colour != COLOURS["white"] else (226, 80, 90))


def _bottle(pen: Pen, colour: RGB, style: int) -> None:
    pen.rect(0.33, 0.0, 0.67, 0.09, (200, 60, 50) if style % 2 else (222, 186, 80), 0.02)
    pen.rect(0.36, 0.07, 0.64, 0.36, colour)
    pen.poly([(0.36, 0.26), (0.64, 0.26), (0.98, 0.46), (0.02, 0.46)], colour)
    pen.rect(0.02, 0.42, 0.98, 1.0, colour, 0.05)
    pen.rect(0.02, 0.55, 0.98, 0.83, (244, 236, 212))
    pen.rect(0.18, 0.62, 0.82, 0.67, shade(colour, 0.8))
    pen.rect(0.28, 0.72, 0.72, 0.76, shade(colour, 0.8))
    pen.rect(0.10, 0.46, 0.22, 0.96, shade(colour, 1.45), 0.02)


def _apple(pen: Pen, colour: RGB, style: int) -> None:
    pen.ellipse(0.02, 0.20, 0.62, 0.98, shade(colour, 0.9))
    pen.ellipse(0.38, 0.20, 0.98, 0.98, shade(colour, 0.82))
    pen.ellipse(0.10, 0.22, 0.90, 1.0, colour)
    pen.ellipse(0.18, 0.32, 0.36, 0.58, shade(colour, 1.5))
    pen.line([(0.5, 0.30), (0.54, 0.04)], (96, 62, 36), 0.06)
    pen.poly([(0.54, 0.16), (0.70, 0.0), (0.88, 0.06), (0.74, 0.20)], (70, 160, 70))


def _banana(pen: Pen, colour: RGB, style: int) -> None:
    outer = [(0.5 + 0.5 * math.cos(t), -0.06 + 1.06 * math.sin(t)) for t in _arc(0.12, math.pi - 0.12)]
    inner = [(0.5 + 0.40 * math.cos(t), -0.08 + 0.50 * math.sin(t)) for t in _arc(math.pi - 0.25, 0.25)]
    middle = [(0.5 + 0.47 * math.cos(t), -0.06 + 0.82 * math.sin(t)) for t in _arc(math.pi - 0.2, 0.2)]
    pen.poly(outer + inner, (250, 212, 50))
    pen.poly(outer + middle, (226, 172, 30))
    pen.poly([(0.02, 0.02), (0.13, 0.0), (0.14, 0.14), (0.01, 0.16)], (110, 84, 30))
    pen.poly([(0.90, 0.0), (0.97, 0.02), (0.99, 0.13), (0.88, 0.11)], (84, 62, 28))


def _arc(start: float, end: float, steps: int = 10) -> list[float]:
    return [start + (end - start) * k / steps for k in range(steps + 1)]


def _couch(pen: Pen, colour: RGB, style: int) -> None:
    dark = shade(colour, 0.75)
    for x in (0.10, 0.84):
        pen.rect(x, 0.90, x + 0.06, 1.0, (70, 48, 34))
    pen.rect(0.06, 0.0, 0.94, 0.70, dark, 0.16)
    pen.rect(0.12, 0.06, 0.49, 0.60, shade(colour, 0.92), 0.10)
    pen.rect(0.51, 0.06, 0.88, 0.60, shade(colour, 0.92), 0.10)
    pen.rect(0.08, 0.54, 0.92, 0.94, dark, 0.08)
    pen.rect(0.14, 0.50, 0.495, 0.72, shade(colour, 1.15), 0.07)
    pen.rect(0.505, 0.50, 0.86, 0.72, shade(colour, 1.15), 0.07)
    pen.rect(0.0, 0.34, 0.15, 0.94, colour, 0.10)
    pen.rect(0.85, 0.34, 1.0, 0.94, colour, 0.10)
    if style % 2:
        pen.poly([(0.18, 0.28), (0.34, 0.24), (0.37, 0.54), (0.20, 0.56)], (246, 216, 120))


def _tv(pen: Pen, colour: RGB, style: int) -> None:
    pen.rect(0.0, 0.86, 1.0, 1.0, (128, 84, 50), 0.02)
    pen.rect(0.44, 0.74, 0.56, 0.88, (60, 60, 66))
    pen.rect(0.03, 0.0, 0.97, 0.78, (26, 26, 30), 0.05)
    sky, ground = ((96, 172, 230), (92, 168, 92)) if style % 2 else ((70, 92, 176), (226, 150, 110))
    pen.rect(0.08, 0.06, 0.92, 0.70, sky)
    pen.poly([(0.08, 0.70), (0.08, 0.54), (0.36, 0.34), (0.58, 0.56), (0.74, 0.44), (0.92, 0.60), (0.92, 0.70)], ground)
    pen.disc(0.74, 0.20, 0.08, (255, 240, 180))


def _clock(pen: Pen, colour: RGB, style: int) -> None:
    pen.disc(0.5, 0.5, 0.5, shade(colour, 0.55) if colour == COLOURS["white"] else colour)
    pen.disc(0.5, 0.5, 0.40, (252, 250, 244))
    for k in range(12):
        x, y = math.cos(k * math.pi / 6), math.sin(k * math.pi / 6)
        pen.line([(0.5 + 0.30 * x, 0.5 + 0.30 * y), (0.5 + 0.37 * x, 0.5 + 0.37 * y)], DARK, 0.045)
    for angle, reach in ((style * 1.05, 0.19), (style * 2.3 + 1, 0.29)):
        pen.line([(0.5, 0.5), (0.5 + reach * math.cos(angle), 0.5 + reach * math.sin(angle))], DARK, 0.06)
    pen.disc(0.5, 0.5, 0.05, (200, 50, 50))


def _potted_plant(pen: Pen, colour: RGB, style: int) -> None:
    green = ((52, 138, 66), (72, 156, 70), (38, 118, 74))[style % 3]
    for k, (x, y) in enumerate(((0.06, 0.22), (0.94, 0.24), (0.22, 0.03), (0.78, 0.05), (0.5, 0.0))):
        side = (y - 0.66) * 0.22, (0.5 - x) * 0.30 + 0.10 * (x == 0.5)
        middle = ((x + 0.5) / 2, (y + 0.66) / 2)
        bulges = [(middle[0] + sign * side[0], middle[1] + sign * side[1]) for sign in (1, -1)]
        pen.poly([(0.5, 0.68), bulges[0], (x, y), bulges[1]], shade(green, 0.85 + 0.12 * (k % 3)))
        pen.line([(0.5, 0.68), (x, y)], shade(green, 0.65), 0.015)
    pen.poly([(0.22, 0.66), (0.78, 0.66), (0.69, 1.0), (0.31, 1.0)], (196, 102, 62))
    pen.rect(0.18, 0.62, 0.82, 0.72, (216, 122, 78), 0.02)


def _laptop(pen: Pen, colour: RGB, style: int) -> None:
    keys = shade(colour, 0.5) if max(colour) > 80 else (90, 92, 98)
    pen.rect(0.10, 0.0, 0.90, 0.70, shade(colour, 0.75), 0.05)
    pen.rect(0.14, 0.05, 0.86, 0.63, ((44, 110, 190), (30, 60, 110), (60, 150, 170))[style % 3])
    for k in range(3):
        pen.rect(0.20, 0.14 + 0.14 * k, 0.56 + 0.08 * (k % 2), 0.19 + 0.14 * k, (226, 240, 250))
    pen.rect(0.68, 0.14, 0.80, 0.34, (250, 190, 80))
    pen.poly([(0.10, 0.70), (0.90, 0.70), (1.0, 0.93), (0.0, 0.93)], shade(colour, 1.1))
    pen.poly([(0.16, 0.73), (0.84, 0.73), (0.89, 0.83), (0.11, 0.83)], keys)
    pen.poly([(0.40, 0.86), (0.60, 0.86), (0.61, 0.91), (0.39, 0.91)], shade(colour, 0.7))
    pen.rect(0.0, 0.92, 1.0, 1.0, shade(colour, 0.62), 0.03)


def _keyboard(pen: Pen, colour: RGB, style: int) -> None:
    key = shade(colour, 0.72) if max(colour) > 80 else (120, 122, 130)
    pen.rect(0.0, 0.08, 1.0, 1.0, shade(colour, 0.6), 0.12)
    pen.rect(0.0, 0.0, 1.0, 0.90, colour, 0.12)
    for row in range(3):
        for column in range(10):
            x = 0.045 + 0.092 * column
            pen.rect(x, 0.10 + 0.19 * row, x + 0.066, 0.235 + 0.19 * row, key)
    pen.rect(0.22, 0.67, 0.76, 0.80, key)


def _mouse(pen: Pen, colour: RGB, style: int) -> None:
    line = (90, 94, 100) if max(colour) > 80 else (190, 194, 200)
    pen.line([(0.5, 0.30), (0.56, 0.12), (0.82, 0.03), (1.0, 0.08)], (70, 72, 80), 0.05)
    pen.ellipse(0.10, 0.24, 0.92, 1.0, shade(colour, 0.55))
    pen.ellipse(0.08, 0.20, 0.90, 0.95, colour)
    pen.line([(0.49, 0.22), (0.49, 0.54)], line, 0.04)
    pen.line([(0.11, 0.54), (0.87, 0.54)], line, 0.04)
    pen.rect(0.43, 0.30, 0.55, 0.46, (220, 80, 60) if style % 2 else line, 0.05)


def _refrigerator(pen: Pen, colour: RGB, style: int) -> None:
    pen.rect(0.06, 0.96, 0.94, 1.0, DARK)
    pen.rect(0.0, 0.0, 1.0, 0.98, shade(colour, 0.84), 0.03)
    pen.rect(0.05, 0.015, 0.95, 0.34, colour, 0.02)
    pen.rect(0.05, 0.365, 0.95, 0.96, colour, 0.02)
    pen.rect(0.12, 0.16, 0.20, 0.31, (110, 116, 124), 0.01)
    pen.rect(0.12, 0.41, 0.20, 0.62, (110, 116, 124), 0.01)
    if style % 2:
        pen.rect(0.52, 0.09, 0.72, 0.18, (250, 210, 90))
        pen.rect(0.64, 0.44, 0.80, 0.53, (110, 190, 120))


def _oven(pen: Pen, colour: RGB, style: int) -> None:
    for x in (0.12, 0.56):
        pen.rect(x, 0.0, x + 0.30, 0.05, (60, 60, 66), 0.02)
    pen.rect(0.0, 0.04, 1.0, 1.0, shade(colour, 0.8) if max(colour) > 80 else colour, 0.03)
    pen.rect(0.0, 0.04, 1.0, 0.24, shade(colour, 1.12), 0.02)
    for k in range(4):
        pen.disc(0.17 + 0.22 * k, 0.145, 0.058, (210, 70, 60) if k == style % 4 else (150, 154, 162))
    pen.rect(0.08, 0.30, 0.92, 0.90, shade(colour, 0.92) if max(colour) > 80 else (66, 66, 74), 0.03)
    pen.rect(0.14, 0.34, 0.86, 0.40, STEEL, 0.03)
    pen.rect(0.17, 0.46, 0.83, 0.82, (40, 32, 32), 0.03)
    pen.ellipse(0.28, 0.60, 0.72, 0.80, (242, 150, 54))
    pen.rect(0.22, 0.74, 0.78, 0.78, (90, 80, 78))


SKETCHES: dict[str, Sketch] = {
    "person": _person, "bicycle": _bicycle, "car": _car, "bus": _bus, "traffic light": _traffic_light,
    "stop sign": _stop_sign, "dog": _dog, "cat": _cat, "bird": _bird, "horse": _horse, "cow": _cow, "sheep": _sheep,
    "bench": _bench, "kite": _kite, "surfboard": _surfboard, "umbrella": _umbrella, "boat": _boat, "pizza": _pizza,
    "fork": _fork, "cup": _cup, "bottle": _bottle, "apple": _apple, "banana": _banana, "couch": _couch, "tv": _tv,
    "clock": _clock, "potted plant": _potted_plant, "laptop": _laptop, "keyboard": _keyboard, "mouse": _mouse,
    "refrigerator": _refrigerator, "oven": _oven,
}  # fmt: skip

SKIES: dict[str, tuple[RGB, RGB]] = {  # at the top and at the horizon
    "sunny": ((104, 180, 240), (206, 234, 250)),
    "cloudy": ((150, 164, 180), (212, 218, 224)),
    "evening": ((92, 84, 156), (250, 176, 128)),
}
WALLS: dict[str, RGB] = {"white": (240, 236, 228), "blue": (176, 204, 226), "green": (186, 216, 186),
                         "pink": (244, 208, 212)}  # fmt: skip
TABLES: dict[str, RGB] = {"wooden": (196, 142, 88), "white": (236, 230, 220), "blue": (130, 164, 204),
                          "checkered": (246, 240, 232)}  # fmt: skip


def _sky(pen: Pen, look: str, horizon: float, rng: random.Random) -> None:
    top, low = SKIES[look]
    bands = 24
    for k in range(bands):
        mix = k / (bands - 1)
        band = tuple(round(a + (b - a) * mix) for a, b in zip(top, low))
        pen.rect(0, horizon * k / bands, 1, horizon * (k + 1) / bands, band)  # type: ignore[arg-type]
    if look == "cloudy" or rng.random() < 0.5:
        for _ in range(3 if look == "cloudy" else 1):
            _cloud(pen, rng.random(), rng.uniform(0.04, 0.2), shade(low, 1.5 if look != "evening" else 1.2))
    if look != "cloudy":
        pen.disc(rng.uniform(0.06, 0.94), 0.09 if look == "sunny" else horizon - 0.06, 0.055, (255, 236, 150))


def _cloud(pen: Pen, x: float, y: float, fill: RGB) -> None:
    for dx, dy, r in ((-0.09, 0.015, 0.035), (-0.03, -0.01, 0.05), (0.04, 0.0, 0.045), (0.10, 0.015, 0.03)):
        pen.disc(x + dx, y + dy, r, fill)


def _evening(colour: RGB, look: str) -> RGB:
    """The ground's color in the light of the sky."""
    return shade(colour, {"sunny": 1.0, "cloudy": 0.9, "evening": 0.72}[look])


def _paint_street(pen: Pen, look: str, rng: random.Random) -> None:
    _sky(pen, look, 0.56, rng)
    x = -0.05
    while x < 1:
        width, top = rng.uniform(0.14, 0.26), rng.uniform(0.16, 0.40)
        wall = _evening(rng.choice(((206, 176, 150), (176, 186, 200), (222, 206, 176), (190, 150, 140))), look)
        pen.rect(x, top, x + width, 0.60, wall)
        for row in range(int((0.54 - top) / 0.09)):
            for column in range(int(width / 0.07)):
                lit = look == "evening" and rng.random() < 0.5
                left, up = x + 0.025 + 0.068 * column, top + 0.03 + 0.09 * row
                pen.rect(left, up, left + 0.035, up + 0.045, (255, 224, 130) if lit else shade(wall, 0.72))
        x += width
    pen.rect(0, 0.58, 1, 0.66, _evening((198, 194, 188), look))
    pen.rect(0, 0.66, 1, 1, _evening((118, 120, 126), look))
    for k in range(5):
        pen.rect(0.02 + 0.22 * k, 0.815, 0.13 + 0.22 * k, 0.835, _evening((236, 232, 210), look))


def _paint_park(pen: Pen, look: str, rng: random.Random) -> None:
    _sky(pen, look, 0.50, rng)
    pen.rect(0, 0.47, 1, 1, _evening((128, 190, 98), look))
    for _ in range(rng.randint(3, 5)):
        x, height = rng.random(), rng.uniform(0.14, 0.22)
        pen.rect(x - 0.012, 0.50 - height / 2, x + 0.012, 0.52, _evening((120, 84, 56), look))
        leaf = _evening(rng.choice(((84, 156, 84), (104, 168, 80), (66, 138, 86))), look)
        for dx, dy in ((-0.06, 0.0), (0.06, 0.0), (0.0, -0.06)):
            pen.disc(x + dx, 0.48 - height + dy + 0.05, 0.075, leaf)
    left, right = rng.uniform(0.2, 0.5), rng.uniform(0.5, 0.9)
    pen.poly([(left, 0.50), (left + 0.05, 0.50), (right, 1.0), (right - 0.4, 1.0)], _evening((222, 204, 164), look))


def _paint_field(pen: Pen, look: str, rng: random.Random) -> None:
    _sky(pen, look, 0.46, rng)
    for k in range(2):
        x = rng.uniform(-0.1, 0.7)
        pen.ellipse(x - 0.3, 0.30 + 0.05 * k, x + 0.7, 0.80, _evening(((118, 168, 120), (138, 184, 112))[k], look))
    pen.rect(0, 0.44, 1, 1, _evening((164, 200, 96), look))
    for _ in range(14):
        x, y = rng.random(), rng.uniform(0.54, 0.98)
        pen.line([(x, y), (x + 0.01, y - 0.03)], _evening((120, 168, 70), look), 0.008)
    fence = _evening((168, 128, 88), look)
    for k in range(7):
        pen.rect(0.02 + 0.16 * k, 0.42, 0.045 + 0.16 * k, 0.54, fence)
    pen.rect(0, 0.445, 1, 0.465, fence)
    pen.rect(0, 0.495, 1, 0.515, fence)


def _paint_beach(pen: Pen, look: str, rng: random.Random) -> None:
    _sky(pen, look, 0.34, rng)
    pen.rect(0, 0.33, 1, 0.60, _evening((60, 150, 196), look))
    for _ in range(9):
        x, y = rng.random(), rng.uniform(0.36, 0.54)
        pen.rect(x, y, x + rng.uniform(0.05, 0.12), y + 0.008, _evening((150, 206, 230), look))
    pen.rect(0, 0.56, 1, 1, _evening((238, 216, 164), look))
    for k in range(9):
        pen.ellipse(-0.05 + 0.125 * k, 0.53, 0.12 + 0.125 * k, 0.585, _evening((240, 246, 248), look))
        pen.ellipse(-0.05 + 0.125 * k, 0.55, 0.12 + 0.125 * k, 0.605, _evening((238, 216, 164), look))
    for _ in range(16):
        pen.disc(rng.random(), rng.uniform(0.62, 0.99), 0.005, _evening((206, 180, 126), look))


def _paint_table(pen: Pen, look: str, rng: random.Random) -> None:
    colour = TABLES[look]
    pen.rect(0, 0, 1, 1, colour)
    if look == "wooden":
        for k in range(1, 6):
            pen.rect(0, k / 6, 1, k / 6 + 0.012, shade(colour, 0.82))
            x, y = rng.random(), k / 6 - rng.uniform(0.05, 0.1)
            pen.rect(x, y, x + 0.25, y + 0.01, shade(colour, 0.9))
    elif look == "checkered":
        offset = rng.uniform(0, 0.14)
        for k in range(-1, 7):
            pen.rect(offset + 0.16 * k, 0, offset + 0.16 * k + 0.08, 1, (240, 196, 192))
            pen.rect(0, offset + 0.16 * k, 1, offset + 0.16 * k + 0.08, (240, 196, 192))
        for k in range(-1, 7):
            for j in range(-1, 7):
                x, y = offset + 0.16 * j, offset + 0.16 * k
                pen.rect(x, y, x + 0.08, y + 0.08, (228, 150, 148))
    else:
        pen.rect(0.03, 0.03, 0.97, 0.97, shade(colour, 0.93))
        pen.rect(0.045, 0.045, 0.955, 0.955, colour)


def _paint_kitchen(pen: Pen, look: str, rng: random.Random) -> None:
    wall = WALLS[look]
    pen.rect(0, 0, 1, 0.84, wall)
    for k in range(1, 9):
        pen.rect(0, 0.105 * k, 1, 0.105 * k + 0.006, shade(wall, 0.93))
        pen.rect(0.125 * k, 0, 0.125 * k + 0.006, 0.84, shade(wall, 0.93))
    pen.rect(0, 0.84, 1, 1, (190, 164, 136))
    for k in range(5):
        pen.poly([(0.25 * k - 0.02, 0.84), (0.25 * k, 0.84), (0.3 * k - 0.1, 1), (0.3 * k - 0.13, 1)], (170, 144, 118))
    pen.rect(0, SHELF / SIZE, 1, SHELF / SIZE + 0.03, WOOD)
    pen.rect(0, SHELF / SIZE + 0.03, 1, SHELF / SIZE + 0.042, shade(wall, 0.8))


def _paint_room(pen: Pen, look: str, rng: random.Random) -> None:
    wall = WALLS[look]
    pen.rect(0, 0, 1, 0.68, wall)
    if rng.random() < 0.5:
        for k in range(9):
            pen.rect(0.02 + 0.12 * k, 0, 0.06 + 0.12 * k, 0.68, shade(wall, 0.96))
    pen.rect(0, 0.66, 1, 0.69, (250, 248, 244))
    pen.rect(0, 0.69, 1, 1, (190, 142, 100))
    for k in range(4):
        pen.rect(0, 0.75 + 0.07 * k, 1, 0.756 + 0.07 * k, (170, 122, 84))
    if rng.random() < 0.7:
        x = rng.uniform(-0.1, 0.3)
        pen.ellipse(x, 0.80, x + 0.8, 0.98, rng.choice(((206, 120, 110), (120, 150, 180), (214, 190, 140))))


def _paint_office(pen: Pen, look: str, rng: random.Random) -> None:
    wall = WALLS[look]
    pen.rect(0, 0, 1, 0.56, wall)
    if rng.random() < 0.6:
        x = rng.choice((0.05, 0.60))
        pen.rect(x, 0.06, x + 0.34, 0.40, (250, 250, 248))
        pen.rect(x + 0.02, 0.08, x + 0.32, 0.38, (190, 222, 242))
        pen.rect(x + 0.16, 0.08, x + 0.18, 0.38, (250, 250, 248))
    desk = rng.choice(((206, 164, 116), (176, 128, 86), (222, 196, 160)))
    pen.rect(0, 0.54, 1, 1, desk)
    pen.rect(0, 0.54, 1, 0.565, shade(desk, 1.3))
    pen.rect(0, 0.96, 1, 1, shade(desk, 0.72))


PAINTERS: dict[str, Callable[[Pen, str, random.Random], None]] = {
    "street": _paint_street, "park": _paint_park, "field": _paint_field, "beach": _paint_beach, "table": _paint_table,
    "kitchen": _paint_kitchen, "room": _paint_room, "office": _paint_office,
}  # fmt: skip
FLYING = ("kite", "clock", "boat")  # these cast no shadow on the ground below them


def draw(scene: Scene, without: str | None = None) -> Image.Image:
    """The image of a scene, RGB, SIZE x SIZE; the same scene is always the same image.

    Args:
        without: a category that is left out. Where nothing of it was to be seen, every pixel stays what it is.
    """
    canvas = _background(scene)
    grounds = {thing: _paint_object(thing, canvas) for thing in _far_to_near(scene)}
    if without is not None:
        canvas = _background(scene)
        for thing in _far_to_near(scene):
            if thing.category != without:  # a shadow on the one that is left out keeps its color
                _paint_object(thing, canvas, grounds[thing])
    return canvas.reduce(SUPERSAMPLING)


def without_category(scene: Scene, category: str) -> Scene:
    """What draw(scene, category) shows.

    Raises:
        ValueError: the scene has no such object, or no other.
    """
    if category not in scene.categories or len(scene.categories) == 1:
        raise ValueError(f"{scene.id} without '{category}': expected one of several categories {scene.categories}")
    return replace(scene, objects=tuple(thing for thing in scene.objects if thing.category != category))


def _background(scene: Scene) -> Image.Image:
    from PIL import Image, ImageDraw

    side = SIZE * SUPERSAMPLING
    canvas = Image.new("RGB", (side, side))
    pen = Pen(ImageDraw.Draw(canvas, "RGB"), (0, 0, side, side))
    PAINTERS[scene.context](pen, scene.background, random.Random(scene.id))
    return canvas


def _far_to_near(scene: Scene) -> list[SceneObject]:
    """What stands nearer covers what is behind."""
    return sorted(scene.objects, key=lambda thing: thing.box[3])


def _paint_object(thing: SceneObject, canvas: Image.Image, ground: RGB | None = None) -> RGB:
    """Paint a thing and its shadow on the ground, whose color is returned; by default that below its middle."""
    from PIL import ImageDraw

    left, top, right, bottom = (edge * SUPERSAMPLING for edge in thing.box)
    pen = Pen(ImageDraw.Draw(canvas, "RGB"), (left, top, right, bottom), thing.flip)
    if ground is None:
        x, y = round((left + right) / 2), min(bottom - 1, canvas.height - 1)
        r, g, b = canvas.getpixel((min(max(x, 0), canvas.width - 1), y))  # type: ignore[misc]
        ground = r, g, b
    in_the_air = thing.category in FLYING or (thing.category == "bird" and thing.box[3] < 60)
    if not in_the_air:
        pen.ellipse(0.04, 1 - 0.05, 0.98, 1 + 0.05, shade(ground, 0.78))
    sketch_colour = COLOURS[thing.colour] if thing.colour else COLOURS["gray"]
    SKETCHES[thing.category](pen, sketch_colour, thing.style)
    return ground
