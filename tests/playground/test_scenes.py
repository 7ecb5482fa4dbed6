"""Scenes: a function of (split, index), within the frame, co-occurring as intended; pictures are reproducible."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from playground.tinycoco.scenes import (
    SIZE,
    SKETCHES,
    SPLITS,
    SUPERSAMPLING,
    _paint_object,
    draw,
    sample_scene,
    scene_from_record,
    scene_record,
    without_category,
)
from playground.tinycoco.vocabulary import (
    BACKGROUNDS,
    CATEGORIES,
    COLOURS,
    CONTEXTS,
    PALETTES,
    SYNONYMS,
    find_mentions,
    mentioned_categories,
)

pytestmark = pytest.mark.fast


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(index, "train") for index in range(1500)]


def test_vocabulary_is_closed():
    """Companions share a context, every category is drawn somewhere, no surface form has two categories."""
    assert len(CATEGORIES) == 32
    assert set(CATEGORIES) == set(PALETTES) == set(SKETCHES) == {c for context in CONTEXTS.values() for c in context}
    assert all(companion in context for context in CONTEXTS.values() for companion in context.values())
    assert all(colour in COLOURS for palette in PALETTES.values() for colour in palette)
    forms = [form for synonyms in SYNONYMS.values() for form in synonyms]
    assert len(forms) == len(set(forms))
    assert set(BACKGROUNDS) == set(CONTEXTS)


def test_mentions_prefer_the_longest_form():
    text = "A potted plant and two Mice stand near the traffic light; the plant is no busy carpet."
    assert [m.category for m in find_mentions(text)] == ["potted plant", "mouse", "traffic light", "potted plant"]
    assert mentioned_categories(text) == ["potted plant", "mouse", "traffic light"]
    first = find_mentions(text)[0]
    assert text[first.start : first.end] == "potted plant"


def test_a_scene_is_a_function_of_split_and_index():
    assert sample_scene(7, "test") == sample_scene(7, "test")
    contents = [replace(sample_scene(index, split), id="") for split in SPLITS for index in range(200)]
    assert len(set(contents)) == len(contents), "two splits share a scene"


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="expected one of train, pairs, validation, test, got 'dev'"):
        sample_scene(0, "dev")


def test_objects_are_few_inside_the_frame_and_at_home(scenes):
    for scene in scenes:
        assert 2 <= len(scene.objects) <= 5
        assert set(scene.categories) <= set(CONTEXTS[scene.context])
        assert scene.background in BACKGROUNDS[scene.context]
        for thing in scene.objects:
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= SIZE and 0 <= top < bottom <= SIZE, (scene.id, thing)
            assert thing.colour in (PALETTES[thing.category] or ("",))


def test_companions_co_occur_more_often_than_not_but_far_from_always(scenes):
    pairs = [(CONTEXTS[scene.context][c] in scene.categories) for scene in scenes for c in scene.categories]
    assert 0.5 < np.mean(pairs) < 0.75
    lacking = [any(CONTEXTS[s.context][c] not in s.categories for c in s.categories) for s in scenes]
    assert np.mean(lacking) > 0.65, "too few scenes in which a companion can be invented"


def test_records_round_trip_through_json(scenes):
    for scene in scenes[:50]:
        assert scene_from_record(json.loads(json.dumps(scene_record(scene)))) == scene


def test_pictures_are_reproducible_and_show_their_objects(scenes):
    """Without its first object the picture changes, and it changes inside that object's box (and its shadow) only."""
    for scene in scenes[:60]:
        picture = np.asarray(draw(scene), dtype=int)
        assert picture.shape == (SIZE, SIZE, 3)
        assert (picture == np.asarray(draw(scene))).all()
        thing = scene.objects[0]
        without = np.asarray(draw(replace(scene, objects=scene.objects[1:])), dtype=int)
        changed = np.argwhere(np.abs(picture - without).sum(-1) > 0)
        left, top, right, bottom = thing.box
        assert len(changed) > 0.2 * thing.area
        assert changed[:, 0].min() >= top - 2 and changed[:, 0].max() <= bottom + 4
        assert changed[:, 1].min() >= left - 3 and changed[:, 1].max() <= right + 3


def painted(thing, ground):
    """[336, 336] whether a thing, or its shadow, covers a point: there the canvas below does not matter."""
    canvases = [Image.new("RGB", (SIZE * SUPERSAMPLING,) * 2, color) for color in ("white", "black")]
    for canvas in canvases:
        _paint_object(thing, canvas, ground)
    white, black = (np.asarray(canvas) for canvas in canvases)
    return (white == black).all(-1)


def test_without_a_category_all_else_stays_to_the_pixel(scenes):
    """What changes was seen of it: covered by it and by nothing nearer, in one of a pixel's nine points."""
    for scene in scenes[:60]:
        for category in scene.categories if len(scene.categories) > 1 else ():
            seen = np.zeros((SIZE * SUPERSAMPLING,) * 2, dtype=bool)
            for thing in sorted(scene.objects, key=lambda thing: thing.box[3]):
                cover = painted(thing, (90, 120, 60))
                seen = seen | cover if thing.category == category else seen & ~cover
            seen = seen.reshape(SIZE, SUPERSAMPLING, SIZE, SUPERSAMPLING).any((1, 3))
            whole, without = np.asarray(draw(scene)), np.asarray(draw(scene, category))
            changed = (whole != without).any(-1)
            assert not (changed & ~seen).any() and changed.sum() > 0.6 * seen.sum() > 0, (scene.id, category)
            assert category not in without_category(scene, category).categories


def test_the_only_category_cannot_be_left_out(scenes):
    alone = replace(scenes[0], objects=scenes[0].objects[:1])
    with pytest.raises(ValueError, match=f"{alone.id} without .*: expected one of several categories"):
        without_category(alone, alone.categories[0])
