"""Rebuilds every file that TinyCOCO ships from nothing, measures it, and fails where a figure misses its mark."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path

from dama.console import log, write_json
from dama.hardness.clip import load_clip
from dama.hardness.score import run_hardness, summarize
from dama.pairs import check_pairs, read_pairs
from dama.stage import read_stage
from eval.objhal import format_table
from playground.tinycoco import clip_training, sft
from playground.tinycoco.preferences import make_pairs
from playground.tinycoco.run import prepare, score_answers
from playground.tinycoco.tokenizer import train_tokenizer

MARKS = {
    "presence AUC of CLIP": (0.99, 1.0),
    "response-level of SFT, %": (45.0, 65.0),
    "mention-level of SFT, %": (14.0, 25.0),
    "object recall of SFT, %": (85.0, 100.0),
    "pairs": (1500, 1500),
    "weights, MB": (0.0, 8.0),
    "minutes": (0.0, 30.0),
}


def build(out: Path, work: Path, seed: int = 0) -> None:
    """Tokenizer, CLIP and its tower, SFT model, pairs: into `out` (weights/ and pairs.json), by way of `work`."""
    started = time.monotonic()
    weights = out / "weights"
    shutil.rmtree(weights, ignore_errors=True)
    shutil.rmtree(work, ignore_errors=True)

    heading("tokenizer")
    train_tokenizer(work / "tokenizer")
    heading("CLIP")
    clip_training.build(weights / "clip", work / "vision_tower", seed=seed)
    heading("SFT model")
    sft.write_conversations(work / "sft", sft.SCENES, sft.NOISE, seed)
    sft.new_checkpoint(work / "start", work / "vision_tower", work / "tokenizer", seed)
    sft.fine_tune(
        work / "start", work / "sft", work / "trained", epochs=sft.EPOCHS, learning_rate=sft.LEARNING_RATE, seed=seed
    )
    sft.ship(work / "trained", work / "vision_tower", weights / "llava")
    heading("pairs")
    write_json(out / "pairs.json", make_pairs(open_answerer(weights / "llava"), seed))
    minutes = (time.monotonic() - started) / 60
    judge(measure(out, work) | {"minutes": minutes})


def measure(out: Path, work: Path) -> dict[str, float]:
    """The figures of the files in `out`, those that MARKS expects, measured anew."""
    heading("figures")
    shutil.rmtree(work / "measured", ignore_errors=True)
    weights = out / "weights"
    clip = clip_training.measure(weights / "clip", weights / "llava" / "vision_tower")
    log("  ".join(f"{name} {value:.6g}" for name, value in clip.items()))
    figures = caption_figures(open_answerer(weights / "llava"), out, work / "measured")
    say_hardness(out, work / "measured")
    return figures | {
        "presence AUC of CLIP": clip["presence AUC"],
        "pairs": len(read_pairs(out / "pairs.json")),
        "weights, MB": sum(f.stat().st_size for f in weights.rglob("*.safetensors")) / 1e6,
    }


def heading(text: str) -> None:
    """Log the title of a build step."""
    log(f"== {text}")


def open_answerer(checkpoint: Path):  # type: ignore[no-untyped-def]
    """Load a checkpoint for generation on the CPU, with the v1 prompt."""
    from llava.generation.local import Answerer

    return Answerer(str(checkpoint), conv_mode="v1", device="cpu")


def caption_figures(answerer, out: Path, work: Path, split: str = "test", scenes: int = 300) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Greedy captions of held-out scenes by the SFT model."""
    from llava.generation.answers import generate_answers
    from llava.generation.questions import read_questions
    from llava.generation.request import Decoding

    data = work / f"captions_{split}"
    prepare(data, 0, scenes, split, out / "pairs.json")
    questions = read_questions(data / "questions.jsonl")
    generate_answers(answerer, questions, data / "images", data / "answers", Decoding(96), batch_size=32)
    score = score_answers(data / "answers" / "answers.jsonl")
    log(format_table({"SFT": score}))
    return {
        "response-level of SFT, %": score.metrics["response_level"] or 0.0,
        "mention-level of SFT, %": score.metrics["mention_level"] or 0.0,
        "object recall of SFT, %": score.metrics["object_recall"] or 0.0,
    }


def say_hardness(out: Path, work: Path) -> None:
    """Spread of delta for each kind of pair."""
    data = work / "pairs"
    prepare(data, None, 0, "test", out / "pairs.json")
    pairs, _ = check_pairs(read_pairs(out / "pairs.json"), data / "images")
    run_hardness(
        pairs, data / "images", work / "hardness", load_clip(str(out / "weights" / "clip"), None, "cpu", "fp32")
    )
    for kind, spread in summarize(read_stage(work / "hardness", "hardness")[1])["spread"].items():
        log(f"delta of {kind}: {json.dumps(spread)}")


def judge(figures: dict[str, float]) -> None:
    """Prints every figure beside its mark; raises when one is missed."""
    missed = []
    for name, value in figures.items():
        low, high = MARKS[name]
        holds = low <= value <= high
        log(f"{'ok  ' if holds else 'MISS'} {name}: {value:.4g} (expected {low:g} to {high:g})")
        if not holds:
            missed.append(name)
    if missed:
        raise ValueError(f"TinyCOCO's files missed their mark: {', '.join(missed)}")
