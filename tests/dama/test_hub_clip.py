"""Hardness by CLIP, SigLIP and SigLIP 2 in Hugging Face format: the cosines of transformers' own feature functions."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.functional import cosine_similarity
from transformers import AutoModel, AutoProcessor

from dama.cli import main
from dama.hardness.clip import ClipError, ClipScorer, clip_errors, load_clip
from dama.hardness.hub_clip import HubScorer, is_hub_format
from dama.hardness.score import run_hardness
from dama.pairs import PreferencePair
from dama.stage import read_stage
from llava.estimate import checks
from tests.dama.tiny_hub_clip import KINDS, write_hub_clip

TEXTS = ["A cat.", "Two dogs are on the grass.", "A man, a <woman>!", "Yes"]
SIZES = [(40, 30), (32, 32), (20, 64)]
CONTEXTS = {"clip": 77, "siglip": 64, "siglip2": 64}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub_clips")
    return {kind: write_hub_clip(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    for number, (width, height) in enumerate(SIZES):
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def pairs() -> list[PreferencePair]:
    answers = [("A cat. Two dogs are on the grass.", "A bird."), ("Yes", "No, never! A kite."), ("A boat", "A cat.")]
    return [PreferencePair(str(i), f"{i}.png", "What?", *both) for i, both in enumerate(answers)]


def stock_cosines(folder: Path, images: list[Path], texts: list[str], context: int) -> torch.Tensor:
    """[I, S] as a model card says: one text and one image at a time, texts padded to the context."""
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    with torch.inference_mode():
        of_images = [
            model.get_image_features(**processor(images=[Image.open(path)], return_tensors="pt")).pooler_output
            for path in images
        ]
        of_texts = [
            model.get_text_features(
                **processor(text=[text], padding="max_length", max_length=context, truncation=True, return_tensors="pt")
            ).pooler_output
            for text in texts
        ]
    return cosine_similarity(torch.cat(of_images)[:, None], torch.cat(of_texts)[None], dim=-1)


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_transformers_own(kind: str, folders: dict[str, Path], images: Path) -> None:
    """Images of three shapes in a batch, texts of four lengths: 1e-6, and neither all images nor all texts alike."""
    scorer, paths = load_clip(str(folders[kind]), None, "cpu"), sorted(images.iterdir())
    expected = stock_cosines(folders[kind], paths, TEXTS, CONTEXTS[kind])
    found = scorer.encode_images(paths, batch_size=2) @ scorer.encode_texts(TEXTS).T
    assert scorer.tokens.context_length == CONTEXTS[kind]
    assert (found - expected).abs().max() < 1e-6
    assert expected.std(0).min() > 1e-3 and expected.std(1).min() > 1e-3
    assert torch.allclose(scorer.encode_texts(TEXTS[::-1]).flip(0), scorer.encode_texts(TEXTS), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_the_stage_are_these_cosines(
    kind: str, folders: dict[str, Path], images: Path, pairs: list[PreferencePair], tmp_path: Path
) -> None:
    scorer = load_clip(str(folders[kind]), None, "cpu")
    run_hardness(pairs, str(images), tmp_path / "out", scorer, progress=False)
    manifest, records = read_stage(tmp_path / "out", "hardness")
    assert manifest["fingerprint"]["clip"] == scorer.identity
    for record in records:
        sides = [(record[f"{side}_statements"], record[f"{side}_scores"]) for side in ("chosen", "rejected")]
        sums = []
        for statements, scores in sides:
            expected = stock_cosines(folders[kind], [images / record["image"]], statements, CONTEXTS[kind])[0]
            assert torch.allclose(torch.tensor(scores), expected, atol=1e-6)
            sums.append(float(expected.sum()))
        assert record["delta"] == pytest.approx(sums[0] - sums[1], abs=1e-5)


def test_only_siglips_texts_are_padded(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP pools at the last position of its context; CLIP at the end of the text, so that less is computed."""
    widths: dict[str, set[int]] = {}
    for kind, folder in folders.items():
        scorer = load_clip(str(folder), None, "cpu")
        assert isinstance(scorer, HubScorer) and scorer.pads == kind.startswith("siglip")
        stock = scorer.model.get_text_features

        def noted(input_ids: torch.Tensor, kind=kind, stock=stock, **more: torch.Tensor):
            widths.setdefault(kind, set()).add(input_ids.shape[1])
            return stock(input_ids=input_ids, **more)

        monkeypatch.setattr(scorer.model, "get_text_features", noted)
        scorer.encode_texts(["A cat."])
    assert widths["siglip"] == widths["siglip2"] == {64} and max(widths["clip"]) < 10


def test_logits_have_scale_and_bias(folders: dict[str, Path], images: Path) -> None:
    """As transformers' own forward pass gives them for SigLIP: scale x cosine + bias."""
    folder = folders["siglip"]
    model, processor = AutoModel.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
    scorer = load_clip(str(folder), None, "cpu")
    for network in (model, scorer.model):
        network.logit_scale.data.fill_(2.0), network.logit_bias.data.fill_(-9.0)
    inputs = processor(
        text=TEXTS, images=[Image.open(images / "0.png")], padding="max_length", max_length=64, return_tensors="pt"
    )
    with torch.inference_mode():
        expected = model(**inputs).logits_per_image[0]
    cosines = scorer.encode_images([images / "0.png"])[0] @ scorer.encode_texts(TEXTS).T
    assert torch.allclose(scorer.logit_scale * cosines + scorer.logit_bias, expected, atol=1e-4)
    assert scorer.logit_bias == -9.0


@pytest.mark.parametrize("kind", KINDS)
def test_special_tokens_in_an_answer_are_text(kind: str, folders: dict[str, Path]) -> None:
    tokens = load_clip(str(folders[kind]), None, "cpu").tokens
    special = set(tokens.tokenizer.all_special_ids) - {tokens.tokenizer.unk_token_id}
    plain, foreign = (tokens.ids(text) for text in ("a b", "a </s> <eos> <|endoftext|> b"))
    assert sum(i in special for i in foreign) == sum(i in special for i in plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_statement_beyond_the_context_is_refused(kind: str, folders: dict[str, Path]) -> None:
    scorer = load_clip(str(folders[kind]), None, "cpu")
    with pytest.raises(ClipError, match=rf"tokens, the text tower takes {CONTEXTS[kind]}: 'cat cat"):
        scorer.encode_texts(["cat " * 80])


def test_bf16_is_close(folders: dict[str, Path], images: Path) -> None:
    rough, exact = (load_clip(str(folders["siglip2"]), None, "cpu", precision) for precision in ("bf16", "fp32"))
    paths = sorted(images.iterdir())
    assert next(rough.model.parameters()).dtype == torch.bfloat16
    assert (rough.encode_images(paths) * exact.encode_images(paths)).sum(-1).min() > 0.99
    assert rough.encode_images(paths).dtype == torch.float32
    assert rough.identity["weights"] == exact.identity["weights"] and rough.identity != exact.identity


# -------------------------------------------------------------------------------------------------------- the command


def write_rows(path: Path, pairs: list[PreferencePair]) -> Path:
    rows = [
        {"idx": p.id, "image_path": p.image, "question": p.question, "chosen": p.chosen, "rejected": p.rejected}
        for p in pairs
    ]
    path.write_text(json.dumps(rows))
    return path


def test_the_command_is_skipped_when_complete_and_refuses_other_weights(
    folders: dict[str, Path], images: Path, pairs: list[PreferencePair], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data, out = write_rows(tmp_path / "pairs.json", pairs), tmp_path / "out"
    words = ["hardness", "--data", str(data), "--image_folder", str(images), "--out", str(out), "--device", "cpu"]
    assert main([*words, "--clip", str(folders["siglip2"])]) == 0
    said = capsys.readouterr().out
    assert "CLIP siglip2 (local weights, fp32)" in said
    written = (out / "hardness.jsonl").read_bytes(), (out / "hardness.jsonl").stat().st_mtime_ns
    assert main([*words, "--clip", str(folders["siglip2"])]) == 0
    assert ((out / "hardness.jsonl").read_bytes(), (out / "hardness.jsonl").stat().st_mtime_ns) == written
    other = write_hub_clip("siglip2", tmp_path / "siglip2", seed=1)
    assert main([*words, "--clip", str(other)]) != 0
    assert "clip" in capsys.readouterr().err


def test_an_interrupted_stage_goes_on(
    folders: dict[str, Path], images: Path, pairs: list[PreferencePair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image a chunk, stopped in the second: the first chunk's records stay, the result is that of one run."""
    monkeypatch.setattr("dama.hardness.score.IMAGES_PER_CHUNK", 1)
    scorer = load_clip(str(folders["siglip"]), None, "cpu")
    run_hardness(pairs, str(images), tmp_path / "whole", scorer, progress=False)
    stock = ClipScorer.encode_texts
    calls: list[None] = []

    def stops(self: ClipScorer, *given: object) -> torch.Tensor:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return stock(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(ClipScorer, "encode_texts", stops)
    with pytest.raises(KeyboardInterrupt):
        run_hardness(pairs, str(images), tmp_path / "parts", scorer, progress=False)
    kept = len((tmp_path / "parts/hardness.jsonl").read_text().splitlines())
    assert 0 < kept < 3
    run_hardness(pairs, str(images), tmp_path / "parts", scorer, progress=False)
    assert len(calls) == 3 + 3 - kept
    files = [(tmp_path / name / "hardness.jsonl").read_bytes() for name in ("whole", "parts")]
    assert files[0] == files[1]


def test_what_cannot_work_is_named(folders: dict[str, Path], tmp_path: Path) -> None:
    assert is_hub_format(str(folders["clip"])) and is_hub_format("google/siglip2-base-patch16-224")
    assert not any(map(is_hub_format, ("ViT-B-32", "hf-hub:org/name", "./no", "/no/folder", "a/b/c")))
    assert "has its own weights" in clip_errors(str(folders["clip"]), "openai")[0]
    assert clip_errors("org/name", None) == []
    with pytest.raises(ClipError, match=r"(?s)CLIP no-such/siglip: .*Remedy: a folder or hub name of a CLIP or SigLIP"):
        load_clip("no-such/siglip", None, "cpu")
    (tmp_path / "config.json").write_text("{}")
    assert "no preprocessor_config.json or processor_config.json in it" in clip_errors(str(tmp_path), None)[0]


def test_missing_weights_are_not_made_up(tmp_path: Path) -> None:
    folder = write_hub_clip("clip", tmp_path / "clip")
    weights = load_file(folder / "model.safetensors")
    weights.pop("text_projection.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ClipError, match="expected all weights, got none for text_projection.weight"):
        load_clip(str(folder), None, "cpu")


def test_the_doctor_asks_the_hub_for_such_a_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(checks, "hub_has", lambda *given: asked.append(given) or True)
    assert checks.has_clip_weights("google/siglip2-base-patch16-224", "openai")
    assert checks.has_clip_weights("hf-hub:org/name", "openai")
    assert asked == [("google/siglip2-base-patch16-224", "config.json"), ("org/name", "open_clip_config.json")]
