"""Preference pairs of TinyCOCO: ranked by what is drawn, of about equal length, three kinds; the shipped files."""

import json
import random

import pytest

from dama.pairs import read_pairs
from playground.tinycoco.captions import truthful_caption
from playground.tinycoco.preferences import (
    SHARES,
    Judged,
    best_and_worst,
    judge,
    scene_of,
    similar_length,
    unrelated_caption,
    written_pairs,
)
from playground.tinycoco.run import CLIP, PAIRS, SFT
from playground.tinycoco.scenes import sample_scene


def test_best_and_worst_on_paper():
    """Fewer inventions and no fewer finds: (0 invented, 2 found) is better than (1, 2); (0, 1) finds less."""
    worse, better, blind = Judged("a b c d", 1, 2), Judged("a b c e", 0, 2), Judged("a b c f", 0, 1)
    assert best_and_worst([worse, better, blind]) == (better, worse)
    assert best_and_worst([worse, blind]) is None
    assert best_and_worst([better, Judged("a b c d e f g h", 2, 2)]) is None  # of very different length


def test_judge_counts_what_is_drawn():
    scene = sample_scene(3, "test")
    caption = truthful_caption(scene, random.Random(0))
    absent = "zebra" if "zebra" not in scene.categories else "horse"
    assert judge(caption, scene).invented == 0 and judge(caption, scene).found >= 2
    assert judge(f"{caption} There is a {absent}.", scene).found == judge(caption, scene).found


@pytest.mark.parametrize("kind", ["edit", "unrelated"])
def test_written_pairs(kind):
    for row in written_pairs(500_000, 20, kind, seed=1):
        scene = scene_of(row["image_path"])
        assert judge(row["chosen"], scene).invented == 0 < judge(row["rejected"], scene).invented
        assert similar_length(row["chosen"], row["rejected"]) or kind == "edit"
        assert json.loads(row["origin_split"])["type"] == kind


def test_unrelated_captions_share_no_object():
    scene = sample_scene(5, "pairs")
    caption = truthful_caption(scene, random.Random(1))
    assert judge(unrelated_caption(scene, caption, random.Random(2)), scene).found == 0


def test_shipped_pairs_are_what_the_world_says():
    pairs = read_pairs(PAIRS)
    assert len(pairs) == sum(SHARES.values()) == 1500
    kinds = {kind: [pair for pair in pairs if pair.kind == kind] for kind in SHARES}
    assert {kind: len(of_kind) for kind, of_kind in kinds.items()} == SHARES
    for pair in pairs:
        scene = scene_of(pair.image)
        assert judge(pair.chosen, scene).invented < judge(pair.rejected, scene).invented, pair.id
    lengths = [(len(pair.chosen.split()), len(pair.rejected.split())) for pair in kinds["sampled"]]
    assert abs(sum(c - r for c, r in lengths)) / sum(c for c, _ in lengths) < 0.1


def test_shipped_weights_fit_in_8_megabytes():
    files = list(SFT.parent.rglob("*.safetensors"))
    assert {path.parent.name for path in files} == {"clip", "llava", "vision_tower"}
    assert sum(path.stat().st_size for path in files) < 8e6
    assert CLIP.is_dir()
