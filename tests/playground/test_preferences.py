"""Preference pairs of TinyCOCO: ranked by what is drawn, of about equal length, three kinds; the shipped files."""

import json
import random

import pytest

from dama.pairs import check_pairs, read_pairs
from playground.tinycoco.captions import hallucinated_categories, truthful_caption
from playground.tinycoco.preferences import (
    SHARES,
    Judged,
    best_and_worst,
    judge,
    scene_of,
    similar_length,
    unrelated_caption,
    with_second_image,
    written_pairs,
)
from playground.tinycoco.run import CLIP, PAIRS, SFT, prepare
from playground.tinycoco.scenes import sample_scene
from playground.tinycoco.vocabulary import mentioned_categories


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


def test_the_second_image_lacks_what_the_chosen_answer_names():
    """The answer beside it is right for it, and about as long. Of the shipped pairs, one has one kind of object."""
    shipped = json.loads(PAIRS.read_text())
    rows = [with_second_image(row) for row in shipped if len(scene_of(row["image_path"]).categories) > 1]
    assert len(rows) == len(shipped) - 1
    for row in rows:
        first, second = scene_of(row["image_path"]), scene_of(row["rejected_images"][0])
        (missing,) = set(first.categories) - set(second.categories)
        assert missing in mentioned_categories(row["chosen"]) or not set(mentioned_categories(row["chosen"])) & set(
            first.categories
        )
        assert not hallucinated_categories(row["second"], second) and missing not in mentioned_categories(row["second"])
    lengths = [[len(row[name].split()) for row in rows] for name in ("chosen", "second")]
    assert 0.75 < sum(lengths[1]) / sum(lengths[0]) < 1.05  # it has one thing less to tell of
    assert rows[0] == with_second_image(json.loads(PAIRS.read_text())[0])


def test_second_images_are_drawn_for_the_corruption_field(tmp_path, caplog):
    source = json.loads(PAIRS.read_text())
    alone = next(row for row in source if len(scene_of(row["image_path"]).categories) == 1)
    (tmp_path / "source.json").write_text(json.dumps([*source[:6], alone]))
    prepare(tmp_path, None, 0, "test", tmp_path / "source.json", second_images=True)
    assert "left out: 1 pair(s)" in caplog.text
    pairs, skipped = check_pairs(read_pairs(tmp_path / "pairs.json"), tmp_path / "images")
    assert len(pairs) == 6 and not skipped
    for pair in pairs:
        assert pair.second and (tmp_path / "images" / pair.second_image).is_file()
        assert (tmp_path / "images" / pair.second_image).read_bytes() != (tmp_path / "images" / pair.image).read_bytes()
