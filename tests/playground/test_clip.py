"""TinyCOCO's CLIP: the fast loop is open_clip's forward pass, the converted tower is the same; the shipped one sees."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from playground.tinycoco import clip_training as ct
from playground.tinycoco.scenes import Scene, SceneObject, sample_scene
from playground.tinycoco.vocabulary import CATEGORIES

WEIGHTS = Path(ct.__file__).parent / "weights"
TOWER = WEIGHTS / "llava" / "vision_tower"
SCENES = [sample_scene(index, "validation") for index in range(100)]


@pytest.fixture(scope="module")
def random_pair(tmp_path_factory):
    """A random model written as both folders."""
    folder = tmp_path_factory.mktemp("random")
    torch.manual_seed(0)
    model = ct.new_model(ct.model_config(len(ct.word_pieces()))).eval()
    ct.write_text_tokenizer(folder / "clip")
    ct.save_clip(model, folder / "clip")
    ct.save_tower(model, folder / "vision_tower")
    return folder


def test_the_fast_loop_is_open_clips_forward_pass(random_pair):
    model, tokenize = ct.load_clip(random_pair / "clip")
    pixels = ct.normalise(ct.render(SCENES[:4]))
    ids = tokenize(["a dog", "There is a person in red next to the potted plant.", "zebra crossing"])
    with torch.no_grad():
        pooled = model.visual.ln_post(ct.image_states(model.visual, pixels)[-1][:, 0]) @ model.visual.proj
        torch.testing.assert_close(pooled, model.encode_image(pixels), atol=1e-5, rtol=1e-5)
        theirs = model.encode_text(ids, normalize=True)
        torch.testing.assert_close(ct.embed_tokens(model, ids), theirs, atol=1e-5, rtol=1e-5)


def test_the_conversion_is_exact(random_pair):
    difference = ct.conversion_difference(random_pair / "clip", random_pair / "vision_tower", SCENES[:4])
    assert difference <= 1e-5  # 0.0 where both sides run the same attention kernel


def test_the_conversion_check_sees_a_wrong_tower(random_pair, tmp_path):
    torch.manual_seed(1)
    ct.save_tower(ct.new_model(ct.model_config(len(ct.word_pieces()))), tmp_path)
    assert ct.conversion_difference(random_pair / "clip", tmp_path, SCENES[:2]) > 0.1


def test_the_tower_has_the_hubs_key_names_and_half_precision(random_pair):
    with safe_open(random_pair / "vision_tower" / "model.safetensors", "pt") as file:
        keys = set(file.keys())
        assert file.get_tensor("vision_model.embeddings.class_embedding").dtype == torch.float16
    golden = Path(__file__).parents[1] / "golden" / "clip-vit-tiny-patch14-56" / "model.safetensors"
    with safe_open(golden, "pt") as file:  # three layers there, four here
        expected = {key for key in file.keys() if "position_ids" not in key}  # noqa: SIM118
    fourth = {key.replace("layers.2.", "layers.3.") for key in expected if "layers.2." in key}
    assert keys == expected | fourth


def test_words_are_pieces_and_others_are_spelled(random_pair):
    _, tokenize = ct.load_clip(random_pair / "clip")
    vocabulary = tokenize.tokenizer.get_vocab()
    ids = tokenize(["A DOG, dogs xy"])[0]
    expected = ["<start>", "a", "dog", ",", "dogs", "x", "##y", "<end>", "<pad>"]
    assert ids[:9].tolist() == [vocabulary[piece] for piece in expected]
    assert ids.shape == (77,)
    assert sorted(vocabulary.values()) == list(range(len(ct.word_pieces())))


def test_patch_labels_by_hand():
    """Patches are 16 pixels.

    A dog in (16, 16)-(48, 32) fills patches 1 and 2 of row 1, that is 8 and 9. A bird in (48, 16)-(64, 19) covers 3 of
    the 16 rows of patch 10, 19 %, less than a fifth: background. 4 rows, 25 %, count.
    """

    def labels(bird_bottom: int) -> list[int]:
        objects = (SceneObject("dog", "brown", (16, 16, 48, 32)), SceneObject("bird", "red", (48, 16, 64, bird_bottom)))
        return ct.patch_labels(Scene("x", "park", "sunny", objects)).tolist()

    dog, bird = CATEGORIES.index("dog"), CATEGORIES.index("bird")
    assert {k: c for k, c in enumerate(labels(19)) if c != ct.BACKGROUND} == {8: dog, 9: dog}
    assert {k: c for k, c in enumerate(labels(20)) if c != ct.BACKGROUND} == {8: dog, 9: dog, 10: bird}


def test_area_under_curve_by_hand():
    """Positives 3 and 1, negatives 2 and 1: 3 > 2 and 3 > 1 are won, 1 < 2 is lost, 1 = 1 is half won: 2.5 of 4."""
    scores, labels = torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])
    assert ct.area_under_curve(scores, labels) == pytest.approx(0.625)
    assert ct.area_under_curve(labels, labels) == 1.0


def test_learning_rate_rises_for_150_steps_and_falls_to_zero():
    assert ct.learning_rate(0, 3000) == pytest.approx(2e-3 / 150)
    assert ct.learning_rate(150, 3000) == pytest.approx(2e-3)
    assert ct.learning_rate(1575, 3000) == pytest.approx(1e-3)  # half-way between 150 and 3000: cos(pi / 2) = 0
    assert ct.learning_rate(3000, 3000) == pytest.approx(0.0)


def test_training_learns_and_a_seed_determines_it(random_pair):
    pool = ct.build_pool(64)
    first, second = (ct.train(random_pair / "clip", pool, steps=3, seed=5).state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.manual_seed(5)
    start = ct.new_model(ct.model_config(len(ct.word_pieces()))).state_dict()
    assert not torch.equal(first["visual.proj"], start["visual.proj"])
    assert not torch.equal(first["text_projection"], start["text_projection"])


def test_the_shipped_clip_sees_what_is_drawn():
    assert ct.presence_auc(WEIGHTS / "clip", SCENES) >= 0.99
    _, edits = ct.caption_accuracies(WEIGHTS / "clip", SCENES)
    assert edits >= 0.95
    assert ct.conversion_difference(WEIGHTS / "clip", TOWER, SCENES[:8]) <= 1e-5


def test_the_shipped_files_are_small_and_of_this_code():
    files = [WEIGHTS / "clip" / "open_clip_model.safetensors", TOWER / "model.safetensors"]
    assert sum(path.stat().st_size for path in files) < 5.3e6
    config = json.loads((WEIGHTS / "clip" / "open_clip_config.json").read_text())
    assert config["model_cfg"] == ct.model_config(len(ct.word_pieces()))
