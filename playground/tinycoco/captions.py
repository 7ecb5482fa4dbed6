"""What is said about a scene: questions, truthful captions, captions that name an absent companion, one-word edits.

All functions are pure in (scene, rng); how often each companion is invented is the caller's choice.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass

from playground.tinycoco.scenes import SIZE, Scene, SceneObject
from playground.tinycoco.vocabulary import CONTEXTS, PALETTES, companion_of, find_mentions, mentioned_categories

QUESTIONS: tuple[str, ...] = (
    "Describe this image in detail.",
    "What can you see in this picture?",
    "Please describe the scene.",
    "What is shown in the photo?",
    "Write a short description of the image.",
)

PLURALS = {"person": "people", "sheep": "sheep", "apple": "apples", "banana": "bananas", "cup": "cups", "bird": "birds",
           "cow": "cows", "car": "cars"}  # fmt: skip
SPOKEN = {"couch": ("couch", "sofa"), "tv": ("tv", "television"), "bicycle": ("bicycle", "bike"), "cup": ("cup", "mug"),
          "potted plant": ("potted plant", "plant"), "refrigerator": ("refrigerator", "fridge")}  # fmt: skip
PLACES = {
    "street": "on the street", "park": "in the park", "field": "in a field", "beach": "at the beach",
    "table": "on the table", "kitchen": "in a kitchen", "room": "in a living room", "office": "in an office",
}  # fmt: skip
SETTINGS = {
    "street": "city street", "park": "park", "field": "green field", "beach": "beach", "table": "table",
    "kitchen": "kitchen", "room": "living room", "office": "office",
}  # fmt: skip
LOOKS = {"sunny": "on a sunny day", "cloudy": "on a cloudy day", "evening": "in the evening"}

COLOUR_SAID = 0.45  # chance that a caption names an object's color
SMALLEST_LEFT_OUT = 0.06  # chance that the smallest of three or more things is not mentioned
MOST_SENTENCES = 4
INVENTS_AGAIN = 0.65  # chance of a second invention after the first
MOST_INVENTIONS = 2
OWN_SENTENCE = 0.85  # share of inventions that get a sentence of their own


@dataclass(frozen=True)
class Thing:
    """What a caption mentions at once: a category, how many of it, and where (None for two of a kind)."""

    category: str
    name: str  # the word chosen for it, singular
    colour: str  # "" when it is not said
    count: int = 1
    centre: tuple[float, float] | None = None

    @property
    def noun(self) -> str:
        """The chosen word, in the plural for two of a kind."""
        return PLURALS[self.category] if self.count > 1 else self.name

    @property
    def verb(self) -> str:
        """Form of `be` that agrees with the count."""
        return "are" if self.count > 1 else "is"

    @property
    def indefinite(self) -> str:
        """'a red car', 'two apples', 'a person in blue'."""
        person = self.category == "person"
        words = f"{self.colour} {self.noun}" if self.colour and not person else self.noun
        tail = f" in {self.colour}" if self.colour and person else ""
        return (f"two {words}" if self.count > 1 else f"{article(words)} {words}") + tail

    @property
    def definite(self) -> str:
        """The noun with its article, as in 'the apples'."""
        return f"the {self.noun}"


@dataclass(frozen=True)
class Plan:
    """A caption before it is worded: the opening sentence's things, then (thing, what it is beside) per further one."""

    opening: list[Thing]
    singles: list[tuple[Thing, Thing]]


def article(words: str) -> str:
    """Indefinite article by the first letter, which is enough for TinyCOCO's words."""
    return "an" if words[0].lower() in "aeiou" else "a"


def truthful_caption(scene: Scene, rng: random.Random) -> str:
    """One to four sentences that name nearly all that is drawn, and nothing else."""
    return _tell(scene, _plan(_things(scene, rng), rng), rng)


def noisy_caption(scene: Scene, rng: random.Random, rate: float) -> str:
    """A caption that with probability `rate` also names an absent companion of something it has named, or two such.

    Scenes in which every companion is present stay truthful, so the share of wrong captions is below `rate`.
    """
    things = _things(scene, rng)
    plan = _plan(things, rng)
    hosts = [(thing, absent) for thing in things if (absent := _absent_companion(thing.category, scene))]
    chance, invented = rate, set[str]()
    for host, absent in rng.sample(hosts, len(hosts)):
        if absent in invented or len(invented) == MOST_INVENTIONS or rng.random() >= chance:
            break
        plan = _with_invention(plan, host, _invent(absent, host, rng), rng)
        invented.add(absent)
        chance = INVENTS_AGAIN
    return _tell(scene, plan, rng)


def hallucinated_categories(text: str, scene: Scene) -> list[str]:
    """The categories that `text` names and the scene lacks, in the order of their first naming."""
    return [category for category in mentioned_categories(text) if category not in scene.categories]


def one_word_edit(caption: str, scene: Scene, rng: random.Random) -> str:
    """The caption with one object wrong: a present thing replaced by an absent one, or an absent one put beside it.

    The absent thing is the present one's usual companion where possible. ValueError when nothing present is named.
    """
    present = [mention for mention in find_mentions(caption) if mention.category in scene.categories]
    if not present:
        raise ValueError(f"one_word_edit of {scene.id}: expected a caption that names a drawn object, got {caption!r}")
    taken = {*scene.categories, *mentioned_categories(caption)}
    mention = rng.choice([m for m in present if companion_of(m.category, scene.context) not in taken] or present)
    intruder = _intruder(mention.category, scene.context, taken, rng)
    if rng.random() < 0.5:
        return _replace(caption, mention.start, mention.end, intruder)
    return f"{caption[: mention.end]} and {article(intruder)} {intruder}{caption[mention.end :]}"


def _intruder(category: str, context: str, taken: set[str], rng: random.Random) -> str:
    companion = companion_of(category, context)
    if companion and companion not in taken:
        return companion
    return rng.choice(sorted(set(CONTEXTS[context]) - taken) or sorted(set(PALETTES) - taken))


def _replace(caption: str, start: int, end: int, intruder: str) -> str:
    """Puts the intruder in the place of the word, in its number and capitals, with the article that it needs."""
    word = caption[start:end]
    plural = word.lower() in PLURALS.values() and re.search(r"\btwo (\w+ )?$", caption[:start])
    new = _plural(intruder) if plural else intruder
    before = caption[:start]
    if not plural:
        before = re.sub(r"\b([Aa])n? $", lambda m: f"{m.group(1)}{'n' if article(intruder) == 'an' else ''} ", before)
    return before + (new.capitalize() if word[0].isupper() else new) + caption[end:]


def _plural(noun: str) -> str:
    irregular = {"mouse": "mice", "bus": "buses", "bench": "benches", "couch": "couches", **PLURALS}
    return irregular.get(noun, noun + "s")


def _things(scene: Scene, rng: random.Random) -> list[Thing]:
    """What the caption will mention, roughly from the largest to the smallest."""
    count = Counter(thing.category for thing in scene.objects)
    firsts: dict[str, SceneObject] = {}
    for thing in sorted(scene.objects, key=lambda o: -o.area * rng.uniform(0.75, 1.25)):
        firsts.setdefault(thing.category, thing)
    drawn = list(firsts.values())
    if len(drawn) > 2 and rng.random() < SMALLEST_LEFT_OUT:
        drawn.pop()
    return [_thing(o.category, o.colour, count[o.category], o.centre, rng) for o in drawn]


def _thing(category: str, colour: str, count: int, centre: tuple[float, float] | None, rng: random.Random) -> Thing:
    said = colour if count == 1 and rng.random() < COLOUR_SAID else ""
    names = SPOKEN.get(category, (category,))
    name = names[0] if rng.random() < 0.7 else names[-1]
    return Thing(category, name, said, count, centre if count == 1 else None)


def _absent_companion(category: str, scene: Scene) -> str | None:
    companion = companion_of(category, scene.context)
    return companion if companion not in scene.categories else None


def _invent(category: str, host: Thing, rng: random.Random) -> Thing:
    """An absent thing that is told exactly as a present one would be, at a place beside its host."""
    x, y = host.centre or (SIZE / 2, SIZE / 2)
    beside = min(max(x + rng.choice((-30, -10, 10, 30)), 10), SIZE - 10)
    return _thing(category, rng.choice(PALETTES[category] or ("",)), 1, (beside, y), rng)


def _plan(things: list[Thing], rng: random.Random) -> Plan:
    opening = min(len(things), rng.choices((1, 2, 3, 4), weights=(30, 40, 22, 8))[0])
    opening = max(opening, len(things) - (MOST_SENTENCES - 1))
    singles = [(things[k], rng.choice(things[:k])) for k in range(opening, len(things))]
    return Plan(things[:opening], singles)


def _with_invention(plan: Plan, host: Thing, invented: Thing, rng: random.Random) -> Plan:
    """The invention after its host: mostly in a sentence of its own, otherwise in the opening list."""
    opening, singles = list(plan.opening), list(plan.singles)
    if host in opening and rng.random() >= OWN_SENTENCE:
        opening.insert(opening.index(host) + 1, invented)
        return Plan(opening, singles)
    place = next((k + 1 for k, (thing, _) in enumerate(singles) if thing is host), 0)
    singles.insert(place, (invented, host))
    if len(singles) == MOST_SENTENCES:
        opening.append(singles.pop(0)[0])
    return Plan(opening, singles)


def _tell(scene: Scene, plan: Plan, rng: random.Random) -> str:
    further = [_single(thing, other, rng) for thing, other in plan.singles]
    return " ".join([_opening(scene, plan.opening, rng), *further])


def _opening(scene: Scene, group: list[Thing], rng: random.Random) -> str:
    listed, verb = _list(group), "are" if len(group) > 1 else group[0].verb
    place, look = PLACES[scene.context], LOOKS.get(scene.background, "")
    setting = SETTINGS[scene.context]
    when = f" {look}" if look and rng.random() < 0.3 else ""
    templates = (
        f"The image shows {listed} {place}{when}.",
        f"There {group[0].verb} {listed} {place}{when}.",
        f"In this picture, {listed} {verb} {place}{when}.",
        f"This is a photo of {article(setting)} {setting} with {listed}{when}.",
        f"{_capital(listed)} {verb} {place}{when}.",
    )
    return rng.choices(templates, weights=(4, 3, 2, 3, 2))[0]


def _single(thing: Thing, other: Thing, rng: random.Random) -> str:
    """A sentence of its own for one thing, placed in the image or beside another thing that has been named."""
    beside = _beside(thing, other, rng)
    templates = (
        f"There {thing.verb} also {thing.indefinite} {beside} {other.definite}.",
        f"{_capital(thing.indefinite)} can be seen {beside} {other.definite}.",
        f"{_capital(beside)} {other.definite}, there {thing.verb} {thing.indefinite}.",
        f"{_capital(thing.indefinite)} {thing.verb} {_where(thing)}.",
        f"There {thing.verb} also {thing.indefinite} {_where(thing)}.",
    )
    return rng.choices(templates, weights=(3, 1, 1, 2, 4))[0]


def _beside(thing: Thing, other: Thing, rng: random.Random) -> str:
    if thing.centre and other.centre and abs(thing.centre[0] - other.centre[0]) >= 14 and rng.random() < 0.4:
        return "to the left of" if thing.centre[0] < other.centre[0] else "to the right of"
    return "next to" if rng.random() < 0.6 else "near"


def _where(thing: Thing) -> str:
    if thing.centre is None:
        return "in the picture"
    return third_of(thing.centre)


def third_of(centre: tuple[float, float]) -> str:
    """In words, the third of the image's width that a place is in."""
    third = int(3 * centre[0] / SIZE)
    return ("on the left", "in the middle", "on the right")[min(max(third, 0), 2)]


def _list(things: list[Thing]) -> str:
    phrases = [thing.indefinite for thing in things]
    if len(phrases) == 1:
        return phrases[0]
    return ", ".join(phrases[:-1]) + f" and {phrases[-1]}"


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]
