"""dama.hardness.clip: the same features as open_clip's own, whatever the batch, and wrong CLIPs refused."""

from __future__ import annotations

import logging
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from dama.hardness import clip
from dama.hardness.clip import ClipError, ClipScorer, clip_errors, load_clip, weights_digest
from tests.dama.tiny_clip import MODEL_CFG, write_tiny_clip

TEXTS = ["A cat.", "Two dogs are lying on the green grass of a park.", "Yes.", "A man, a woman! " * 9, "图中有一只猫。"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture(scope="module")
def scorer(folder: Path) -> ClipScorer:
    return load_clip(str(folder), None, "cpu")


@pytest.fixture(scope="module")
def vit_b_32() -> ClipScorer:
    return load_clip("ViT-B-32", "random", "cpu")


def test_cut_positions_change_nothing_in_a_text_tower_of_real_size(vit_b_32: ClipScorer) -> None:
    """The whole context of 77 and open_clip's own encode_text, against the positions that are needed."""
    with torch.inference_mode():
        expected = vit_b_32.model.encode_text(vit_b_32.tokens.tokenizer(TEXTS), normalize=True)
    features = vit_b_32.encode_texts(TEXTS)
    assert features.shape == (5, 512)
    assert (features - expected).abs().max() < 1e-6
    assert (features[0] - features[1]).abs().max() > 1e-3  # the tower does tell texts apart


def test_text_features_do_not_depend_on_company_or_order(scorer: ClipScorer, monkeypatch: pytest.MonkeyPatch) -> None:
    together = scorer.encode_texts(TEXTS)
    monkeypatch.setattr(clip, "TEXTS_PER_BATCH", 2)
    alone = torch.cat([scorer.encode_texts([text]) for text in TEXTS])
    assert torch.allclose(together, alone, atol=1e-6)
    assert torch.allclose(together.flip(0), scorer.encode_texts(TEXTS[::-1]), atol=1e-6)
    assert scorer.encode_texts([]).shape[0] == 0


def test_a_separate_text_tower_is_cut_as_well(scorer: ClipScorer) -> None:
    """open_clip keeps the text tower flat in the model or, with custom_text, under `text`."""
    torch.manual_seed(0)
    model = open_clip.CustomTextCLIP(**MODEL_CFG).eval()
    assert set(clip._shortened_text_tower(model, 5)) == {"model.text.positional_embedding", "model.text.attn_mask"}
    separate = replace(scorer, model=model)
    with torch.inference_mode():
        expected = model.encode_text(scorer.tokens.tokenizer(TEXTS), normalize=True)
    assert (separate.encode_texts(TEXTS) - expected).abs().max() < 1e-6


def test_a_folder_with_its_own_tokenizer(tmp_path: Path) -> None:
    """Start, a, red, zebra (unknown, still counted), full stop, end: six tokens. The tower pools at the end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<start>", "<end>", "<unk>", "a", "red", "cat", "."]
    raw = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<end>", unk_token="<unk>", padding_side="right"
    )
    text_cfg: dict[str, Any] = {"context_length": 12, "vocab_size": 8, "width": 32, "heads": 2, "layers": 2}
    text_cfg |= {"pool_type": "eos", "eos_id": 2, "hf_tokenizer_name": "own"}
    folder = write_tiny_clip(tmp_path / "own", config=MODEL_CFG | {"text_cfg": text_cfg})
    tokenizer.save_pretrained(folder)
    scorer = load_clip(str(folder), None, "cpu")
    assert scorer.tokens.context_length == 12
    assert scorer.tokens.count("a red zebra .") == 6
    assert scorer.tokens.count("cat " * 40) == 42
    texts = ["a red cat .", "cat", "a cat . a red cat ."]
    with torch.inference_mode():
        expected = scorer.model.encode_text(scorer.tokens.tokenizer(texts), normalize=True)
    assert (scorer.encode_texts(texts) - expected).abs().max() < 1e-6
    with pytest.raises(ClipError, match="statement of 42 tokens, the text tower takes 12"):
        scorer.encode_texts(["cat " * 40])


def test_a_bidirectional_tower_keeps_its_full_context() -> None:
    config = MODEL_CFG | {"text_cfg": MODEL_CFG["text_cfg"] | {"no_causal_mask": True}}
    assert clip._shortened_text_tower(open_clip.CustomTextCLIP(**config), 5) == {}


def test_a_tokenizer_that_pads_on_the_left_is_refused(scorer: ClipScorer) -> None:
    ids = torch.zeros(1, 77, dtype=torch.long)
    ids[0, -3:] = torch.tensor([49406, 320, 49407])
    with pytest.raises(ClipError, match="pads on the left"):
        scorer._encode_ids(ids, longest=3)


def test_texts_beyond_the_context_are_refused(scorer: ClipScorer) -> None:
    """75 words of one token each, a start and an end token: 77. One more is too long."""
    text = " ".join(["cat"] * 75)
    assert scorer.tokens.count(text) == 77
    assert scorer.encode_texts([text]).shape == (1, 16)
    with pytest.raises(ClipError, match="statement of 78 tokens, the text tower takes 77: 'cat cat"):
        scorer.encode_texts(["A cat.", text + " cat"])


def test_image_features_are_open_clips_own(scorer: ClipScorer, tmp_path: Path) -> None:
    paths = []
    for index in range(7):
        array = np.random.default_rng(index).integers(0, 255, (50, 40 + index, 3), dtype=np.uint8)
        Image.fromarray(array).save(tmp_path / f"{index}.png")
        paths.append(tmp_path / f"{index}.png")
    with torch.inference_mode():
        pixels = torch.stack([scorer.preprocess(Image.open(path).convert("RGB")) for path in paths])
        expected = scorer.model.encode_image(pixels, normalize=True)
    for batch_size, workers in ((1, 0), (3, 0), (32, 0), (3, 2)):
        features = scorer.encode_images(paths, batch_size, workers)
        assert torch.allclose(features, expected, atol=1e-6)
    assert torch.allclose(expected.norm(dim=-1), torch.ones(7), atol=1e-6)


def test_bf16_is_close_and_still_of_length_one(folder: Path, scorer: ClipScorer) -> None:
    rough = load_clip(str(folder), None, "cpu", "bf16")
    features, exact = rough.encode_texts(TEXTS), scorer.encode_texts(TEXTS)
    assert features.dtype == torch.float32
    assert 1e-6 < (features - exact).abs().max() < 0.05
    assert torch.allclose(features.norm(dim=-1), torch.ones(5), atol=1e-6)
    assert rough.identity["precision"] == "bf16"


def test_random_weights_are_seeded_asked_for_and_recorded(vit_b_32: ClipScorer) -> None:
    assert vit_b_32.identity["pretrained"] == "random"
    before = torch.get_rng_state()
    again = load_clip("ViT-B-32", "random", "cpu")
    assert again.identity == vit_b_32.identity
    assert torch.equal(torch.get_rng_state(), before)  # the caller's own draws are not disturbed


def test_identity_knows_the_weights_not_the_path(folder: Path, scorer: ClipScorer, tmp_path: Path) -> None:
    same = load_clip(str(write_tiny_clip(tmp_path / "elsewhere/tiny")), None, "cpu")
    other = load_clip(str(write_tiny_clip(tmp_path / "other/tiny", seed=1)), None, "cpu")
    assert same.identity == scorer.identity
    assert {name for name in other.identity if other.identity[name] != scorer.identity[name]} == {"weights"}


def test_weights_digest_sees_names_and_types() -> None:
    model = torch.nn.Linear(2, 2)
    digest = weights_digest(model)
    assert weights_digest(model.double()) != digest
    assert weights_digest(model.float()) == digest
    model.bias.data[0] += 1e-3
    assert weights_digest(model) != digest


def test_logit_scale_is_the_exponential(scorer: ClipScorer) -> None:
    """open_clip starts at log(1 / 0.07)."""
    assert scorer.logit_scale == pytest.approx(1 / 0.07, rel=1e-6)


def test_quick_gelu_mismatch_is_an_error_with_the_right_name() -> None:
    (fault,) = clip_errors("ViT-L-14-336", "openai")
    assert "QuickGELU mismatch" in fault and fault.endswith("Remedy: --clip ViT-L-14-336-quickgelu")
    assert clip_errors(clip.DEFAULT_MODEL, None) == []
    with pytest.raises(ClipError, match="QuickGELU mismatch"):
        load_clip("ViT-L-14-336", None, "cpu")


def test_open_clips_own_quick_gelu_warning_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A mismatch that only open_clip sees, at loading."""

    def warn(*_: object, **__: object) -> None:
        warnings.warn("QuickGELU mismatch between final model config and pretrained tag", UserWarning, stacklevel=1)

    monkeypatch.setattr(open_clip, "create_model", warn)
    with pytest.raises(ClipError, match="ViT-B-32 .*QuickGELU mismatch"):
        load_clip("ViT-B-32", "random", "cpu")


def test_choices_that_cannot_work_are_named(tmp_path: Path, folder: Path) -> None:
    assert "neither a folder nor an architecture" in clip_errors("ViT-Z-99", None)[0]
    (fault,) = clip_errors("ViT-B-32", "none-such")
    assert "has no such weights" in fault and "openai" in fault and "random" in fault
    (tmp_path / "open_clip_config.json").write_text("{}")
    assert "no open_clip_model.safetensors in it" in clip_errors(str(tmp_path), None)[0]
    assert "has its own weights" in clip_errors(str(folder), "openai")[0]
    assert "has its own weights" in clip_errors("hf-hub:org/name", "openai")[0]
    assert clip_errors("hf-hub:org/name", None) == []
    (tmp_path / "open_clip_model.safetensors").write_bytes(b"")
    with pytest.raises(ClipError, match="its own weights.*missing 'model_cfg'"):
        load_clip(str(tmp_path), None, "cpu")


def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path) -> None:
    """The configuration says three text layers, the file holds two."""
    wrong = write_tiny_clip(tmp_path / "wrong")
    config = wrong / "open_clip_config.json"
    config.write_text(config.read_text().replace('"heads": 2, "layers": 2', '"heads": 2, "layers": 3'))
    with pytest.raises(ClipError, match="Missing key"):
        load_clip(str(wrong), None, "cpu")


def test_tokenizers_that_drop_words_are_refused(tmp_path: Path) -> None:
    """open_clip can be told to leave words out of long texts, at random or by their part of speech."""
    shortens = MODEL_CFG | {"text_cfg": MODEL_CFG["text_cfg"] | {"tokenizer_kwargs": {"reduction_mask": "simple"}}}
    folder = write_tiny_clip(tmp_path / "clip", config=shortens)
    with pytest.raises(ClipError, match=r"its tokenizer \(SimpleTokenizer\) is not supported"):
        load_clip(str(folder), None, "cpu")


def test_coca_scores_as_its_own_functions_say(scorer: ClipScorer) -> None:
    """Its text tower appends a class token and returns more than features; it sees its whole context."""
    pooling = {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    towers = {
        "vision_cfg": MODEL_CFG["vision_cfg"] | pooling,
        "text_cfg": MODEL_CFG["text_cfg"] | {"context_length": 76, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"context_length": 76, "width": 32, "heads": 2, "layers": 1, "attn_pooler_heads": 2},
    }
    model = open_clip.CoCa(embed_dim=16, **towers).eval()
    assert clip._shortened_text_tower(model, 5) == {}
    coca = replace(scorer, model=model, tokens=replace(scorer.tokens, context_length=76))
    ids = open_clip.SimpleTokenizer(context_length=76)(TEXTS)
    pixels = torch.rand(2, 3, 32, 32)
    with torch.inference_mode():
        expected = model.encode_text(ids, normalize=True), model.encode_image(pixels, normalize=True)
    assert (coca.encode_texts(TEXTS) - expected[0]).abs().max() < 1e-6
    assert (coca.encode_pixels(pixels) - expected[1]).abs().max() < 1e-6


def test_siglips_bias_is_part_of_its_logits(scorer: ClipScorer) -> None:
    assert scorer.logit_bias == 0.0
    model = open_clip.CustomTextCLIP(**MODEL_CFG, init_logit_bias=-10)
    assert replace(scorer, model=model).logit_bias == -10.0


def test_importing_does_not_import_open_clip() -> None:
    code = "import sys, dama.hardness.score; sys.exit('open_clip' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0


logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, which these tests ask for
