"""Captions: true where they claim to be, wrong by one companion where meant to be; whole words for the tokenizer."""

import json
import random
import re
from pathlib import Path

import pytest

from playground.tinycoco.captions import (
    QUESTIONS,
    hallucinated_categories,
    noisy_caption,
    one_word_edit,
    truthful_caption,
)
from playground.tinycoco.scenes import Scene, SceneObject, sample_scene
from playground.tinycoco.tokenizer import SYSTEM_PROMPT, corpus, train_tokenizer
from playground.tinycoco.vocabulary import CONTEXTS, SYNONYMS, mentioned_categories

pytestmark = pytest.mark.fast

SCENES = [sample_scene(index, "train") for index in range(400)]
GOLDEN = Path(__file__).parents[1] / "golden" / "llava-v1.5-tiny"


def rng_of(scene: Scene, salt: str = "") -> random.Random:
    return random.Random(scene.id + salt)


def test_truthful_captions_name_what_is_there_and_nothing_else():
    named = present = 0
    for scene in SCENES:
        caption = truthful_caption(scene, rng_of(scene))
        assert hallucinated_categories(caption, scene) == []
        assert 1 <= caption.count(".") <= 4
        named, present = named + len(mentioned_categories(caption)), present + len(scene.categories)
    assert named / present > 0.96


def test_positions_and_colours_are_true():
    """A red car at the left edge and a green bus at the right edge leave one truth for each word."""
    objects = (SceneObject("car", "red", (2, 70, 40, 100)), SceneObject("bus", "green", (70, 70, 110, 100)))
    scene = Scene("made-up", "street", "sunny", objects)
    told = [truthful_caption(scene, random.Random(seed)) for seed in range(300)]
    text = " ".join(told).lower()
    assert {"a red car", "a green bus", "to the left of the bus", "to the right of the car"} <= set(
        re.findall(r"a red car|a green bus|to the (?:left|right) of the (?:bus|car)", text)
    )
    assert not re.search(r"green car|red bus|to the left of the car|to the right of the bus", text)
    assert not re.search(r"car is on the right|bus is on the left", text)


def test_noise_names_one_or_two_absent_companions_of_what_is_present():
    wrong = 0
    for scene in SCENES:
        caption = noisy_caption(scene, rng_of(scene), 1.0)
        invented = hallucinated_categories(caption, scene)
        companions = {CONTEXTS[scene.context][category] for category in scene.categories}
        assert set(invented) <= companions and len(invented) <= 2
        if companions - set(scene.categories) and set(scene.categories) <= set(mentioned_categories(caption)):
            assert invented, caption
        wrong += bool(invented)
        assert caption.count(".") <= 4
        assert hallucinated_categories(noisy_caption(scene, rng_of(scene), 0.0), scene) == []
    assert 0.6 < wrong / len(SCENES) < 0.85


def test_captions_are_functions_of_scene_and_rng():
    for scene in SCENES[:20]:
        for tell in (truthful_caption, lambda s, r: noisy_caption(s, r, 0.5)):
            assert tell(scene, random.Random(3)) == tell(scene, random.Random(3))


def test_an_edit_makes_exactly_one_object_wrong():
    for scene in SCENES:
        caption = truthful_caption(scene, rng_of(scene))
        edited = one_word_edit(caption, scene, rng_of(scene, "edit"))
        assert len(hallucinated_categories(edited, scene)) == 1
        assert abs(len(edited.split()) - len(caption.split())) <= 4
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", edited, re.IGNORECASE), edited


def test_an_edit_keeps_the_number():
    objects = tuple(SceneObject("apple", "red", (10 + 40 * k, 40, 40 + 40 * k, 70)) for k in range(2))
    scene = Scene("made-up", "table", "white", objects)
    edits = {one_word_edit("There are two apples on the table.", scene, random.Random(seed)) for seed in range(20)}
    assert edits == {"There are two bananas on the table.", "There are two apples and a banana on the table."}


def test_an_edit_needs_something_to_edit():
    with pytest.raises(ValueError, match="one_word_edit of train-000000: expected a caption that names a drawn object"):
        one_word_edit("Nothing to be seen.", SCENES[0], random.Random(0))


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from sentencepiece import SentencePieceProcessor

    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(folder)
    return folder, SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


def test_the_vocabulary_has_whole_words_for_all_that_is_said(tokenizer):
    _, pieces = tokenizer
    assert pieces.get_piece_size() <= 1000
    said = [truthful_caption(scene, rng_of(scene)) for scene in SCENES] + list(QUESTIONS) + [SYSTEM_PROMPT]
    words = {word for text in said for word in re.findall(r"[A-Za-z]+", text)} - {"s"}
    assert {word for word in words if len(pieces.encode(word)) != 1} == set()


def test_the_pieces_are_llama_like(tokenizer):
    _, pieces = tokenizer
    assert [pieces.id_to_piece(k) for k in (0, 1, 2, 3, 258)] == ["<unk>", "<s>", "</s>", "<0x00>", "<0xFF>"]
    assert pieces.encode("questions.USER:", out_type=str)[1:] == [".", "USER", ":"]
    assert pieces.encode("USER", out_type=str) == ["\u2581", "USER"]  # one piece, but two after a space
    assert pieces.decode(pieces.encode("Unseen: caf\u00e9  37!")) == "Unseen: caf\u00e9  37!"
    assert len(pieces.encode("42", out_type=str)) == 3  # the space and each digit


def test_tokenizer_files_are_those_of_a_llava_checkpoint(tokenizer):
    folder, _ = tokenizer
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        assert json.loads((folder / name).read_text()) == json.loads((GOLDEN / name).read_text())


def test_training_is_reproducible(tokenizer, tmp_path):
    folder, _ = tokenizer
    train_tokenizer(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_only_the_last_word_of_a_prompt_line_is_user():
    assert not any(" USER" in line for line in corpus(50))
    assert set(SYNONYMS) == {c for line in corpus(50) for c in mentioned_categories(line)}
