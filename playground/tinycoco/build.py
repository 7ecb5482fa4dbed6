"""Rebuilds every file that TinyCOCO ships from nothing, measures it, and fails where a figure misses its mark."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dama.console import log, write_atomic, write_json
from dama.hardness.clip import load_clip
from dama.hardness.score import run_hardness, summarize
from dama.pairs import check_pairs, read_pairs
from dama.stage import read_stage
from eval import pope
from eval.core.store import read_answers
from eval.objhal import format_table
from playground.tinycoco import ability, clip_training, sft
from playground.tinycoco.benchmarks import write_benchmarks
from playground.tinycoco.preferences import make_pairs
from playground.tinycoco.run import prepare, score_ability, score_answers
from playground.tinycoco.tokenizer import train_tokenizer

if TYPE_CHECKING:
    from llava.generation.request import Request

OWN = "of_a_build.txt"  # in a folder that a build has made
MARKS = {
    "presence AUC of CLIP": (0.99, 1.0),
    "response-level of SFT, %": (45.0, 65.0),
    "mention-level of SFT, %": (14.0, 25.0),
    "object recall of SFT, %": (85.0, 100.0),
    "pairs": (1500, 1500),
    "weights, MB": (0.0, 8.0),
    "ability of SFT, %": (60.0, 100.0),
    "accuracy on POPE, %": (75.0, 92.0),
    "adversarial below random POPE, points": (8.0, 50.0),
    "yes on absent companions, %": (50.0, 90.0),
}


def build(out: Path, work: Path, seed: int = 0) -> None:
    """Tokenizer, CLIP and its tower, SFT model, pairs: into `out` (weights/ and pairs.json), by way of `work`.

    Files in `out` are replaced when the new ones are measured and keep to their marks. Where they do not, all is left
    in `work`.
    """
    started = time.monotonic()
    clear(work)
    new = work / "new"
    weights = new / "weights"

    heading("tokenizer")
    train_tokenizer(work / "tokenizer")
    heading("CLIP")
    clip_training.build(weights / "clip", work / "vision_tower", seed=seed)
    heading("SFT model")
    sft.new_checkpoint(work / "start", work / "vision_tower", work / "tokenizer", seed)
    sft.ship(sft.train(work, seed=seed), work / "vision_tower", weights / "llava")
    heading("pairs")
    write_json(new / "pairs.json", make_pairs(open_answerer(weights / "llava"), seed))
    minutes = (time.monotonic() - started) / 60
    log(f"build: new files in {new} after {minutes:.0f} minutes; they go to {out} if they keep to their marks")
    judge(measure(new, work))
    publish(new, out)


def publish(new: Path, out: Path) -> None:
    """Replace the files in `out` by those of a build; what it does not have stays."""
    for path in sorted(path for path in new.rglob("*") if path.is_file()):
        write_atomic(out / path.relative_to(new), path.read_bytes())
    log(f"build: weights/ and pairs.json -> {out}")


def clear(work: Path) -> None:
    """Remove what an earlier build has left in its folder.

    Raises:
        FileExistsError: it holds something else.
    """
    if work.exists() and any(work.iterdir()) and not (work / OWN).is_file():
        raise FileExistsError(f"--work {work}: expected a new folder or a build's, found other files; give another")
    shutil.rmtree(work, ignore_errors=True)
    write_atomic(work / OWN, "of python -m playground.tinycoco, which may remove this folder\n")


def measure(out: Path, work: Path) -> dict[str, float]:
    """The figures of the files in `out`, those that MARKS expects, measured anew."""
    heading("figures")
    clear(work / "measured")
    weights = out / "weights"
    clip = clip_training.measure(weights / "clip", weights / "llava" / "vision_tower")
    log("  ".join(f"{name} {value:.6g}" for name, value in clip.items()))
    figures = answer_figures(open_answerer(weights / "llava"), out, work / "measured")
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


def answer_figures(answerer, out: Path, work: Path, split: str = "test", scenes: int = 300) -> dict[str, float]:  # type: ignore[no-untyped-def]
    """Greedy captions of held-out scenes by the SFT model, its abilities, and POPE about the same scenes."""
    from llava.generation.answers import generate_answers
    from llava.generation.questions import read_questions
    from llava.generation.request import Decoding

    def answered(requests: Sequence[Request], images: Path, name: str, tokens: int, batch: int) -> Path:
        generate_answers(answerer, requests, images, data / name, Decoding(tokens), batch_size=batch)
        return data / name / "answers.jsonl"

    data = work / f"answers_{split}"
    prepare(data, 0, scenes, split, out / "pairs.json")
    images = data / "images"
    captions = score_answers(answered(read_questions(data / "questions.jsonl"), images, "captions", 96, 32))
    abilities = score_ability(answered(read_questions(data / "ability.jsonl"), images, "ability", 16, 128))
    write_benchmarks(data / "benchmarks", scenes, split)
    asked = pope.load(data / "benchmarks", "official")
    pope_answers = read_answers(answered(asked.requests(), asked.image_folder, "pope", 16, 128))
    of_pope = pope.score(asked, pope_answers)
    for table in (format_table({"SFT": captions}), ability.format_table({"SFT": abilities}),
                  pope.format_table({"SFT": of_pope})):  # fmt: skip
        log(table)
    figures = {
        "response-level of SFT, %": captions.metrics["response_level"],
        "mention-level of SFT, %": captions.metrics["mention_level"],
        "object recall of SFT, %": captions.metrics["object_recall"],
        "ability of SFT, %": abilities.metrics["ability"],
        "yes on absent companions, %": 100 - (abilities.metrics["companion"] or 0.0),
        "accuracy on POPE, %": of_pope.metrics["mean_accuracy"],
        "adversarial below random POPE, points": (of_pope.metrics["random_accuracy"] or 0.0)
        - (of_pope.metrics["adversarial_accuracy"] or 0.0),
    }
    return {name: value or 0.0 for name, value in figures.items()}


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
