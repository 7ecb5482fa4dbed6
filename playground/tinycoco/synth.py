"""TinyCOCO's stand-ins for `python -m dama synth`: prompts, a scene generator that draws them, the truth, the report.

python -m playground.tinycoco.synth prompts | pairs | truth | report      as scripts/synthalign_tiny.sh calls them
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dama.console import digest_of_file, log, report_error, write_atomic
from dama.hardness.split import sentence_spans
from dama.report import Report, write_report
from dama.stage import Record
from dama.synth import command
from dama.synth.context import Answered, Mark
from dama.synth.images import Drawn
from dama.synth.prompts import CONTEXT, RANK_IMAGES, RANK_RESPONSES, read_step
from eval.core.scores import Score
from eval.core.statistics import LEVEL, RESAMPLES
from eval.objhal import PROTOCOL, format_table
from playground.tinycoco import run, scenes
from playground.tinycoco.captions import PLACES, QUESTIONS, SETTINGS, hallucinated_categories, truthful_caption
from playground.tinycoco.preferences import best_and_worst, judge
from playground.tinycoco.scenes import Scene, draw, sample_scene
from playground.tinycoco.vocabulary import BACKGROUNDS, CONTEXTS, mentioned_categories

FIRST_SCENE = 300_000  # prompts describe scenes of the pairs' stream that no other pair shows
MISTAKES = {5.0: 0.6, 11.0: 0.2}  # guidance -> chance of a wrong object: the more guidance, the closer to the prompt
VERSION = 1  # of painted_scene: raise it with any change of what is drawn
BLACK = 0.01  # chance of a black image, as half-precision decoders give now and then


# ------------------------------------------------------------------------------------------------- prompts, images


def write_prompts(path: Path, count: int) -> None:
    """Descriptions of scenes that are never shown, and a question about each."""
    rng = random.Random("synth/prompts")
    rows = []
    for index in range(count):
        scene = sample_scene(FIRST_SCENE + index, "pairs")
        rows.append(
            {
                "id": f"{scene.context}-{index + 1}",
                "prompt": truthful_caption(scene, rng),
                "question": rng.choice(QUESTIONS),
            }
        )
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))


class SceneArtist:
    """Draws what a prompt names; as an image model would, now and then something else, or nothing."""

    def identity(self) -> Record:
        """Fields of the fingerprint; another painter means other images."""
        return {"model": "TinyCOCO", "painter": digest_of_file(run.PAINTER), "version": VERSION}

    def draw(self, prompts: Sequence[str], guidance: float, seeds: Sequence[int]) -> list[Drawn]:
        """One image for each prompt and seed, black where the artist draws nothing."""
        scenes_drawn = (painted_scene(prompt, guidance, seed) for prompt, seed in zip(prompts, seeds))
        return [Drawn(black() if scene is None else draw(scene)) for scene in scenes_drawn]


def black() -> Any:
    """An image of a scene's size with nothing on it."""
    from PIL import Image

    return Image.new("RGB", (scenes.SIZE, scenes.SIZE))


def painted_scene(prompt: str, guidance: float, seed: int) -> Scene | None:
    """The scene that the artist draws: a function of these three alone, so the truth needs no file. None is black."""
    rng = random.Random(f"tinycoco/synth/{prompt}/{seed}")
    if rng.random() < BLACK:
        return None
    context = context_of(prompt)
    categories = mentioned_categories(prompt)
    if rng.random() < float(np.interp(guidance, list(MISTAKES), list(MISTAKES.values()))):
        place = rng.randrange(len(categories))
        categories[place] = rng.choice(sorted(set(CONTEXTS[context]) - set(categories)) or categories)
    placed = scenes._place(categories, context, rng)
    return Scene(f"synth-{seed}-{prompt}", context, rng.choice(BACKGROUNDS[context]), tuple(placed))


def context_of(prompt: str) -> str:
    """Where the prompt says that it is. Raises ValueError where it says nothing."""
    for context in CONTEXTS:
        if PLACES[context] in prompt.lower() or f"photo of a {SETTINGS[context]}" in prompt.lower():
            return context
    named = set(mentioned_categories(prompt))
    fits = [context for context, things in CONTEXTS.items() if named <= set(things)]
    if not fits:
        raise ValueError(f"prompt {prompt!r}: expected one of the places {', '.join(PLACES.values())}")
    return fits[0]


# ------------------------------------------------------------------------------------------------------------- truth


def scenes_of(images: Path) -> dict[str, Scene]:
    """Prompt's id -> what its image really shows."""
    _, records = read_step(images, RANK_IMAGES)
    shown = {}
    for record in records:
        if record["image"] is not None:
            best = record["candidates"][record["best"]]
            scene = painted_scene(record["prompt"], best["guidance"], best["seed"])
            assert scene is not None, f"{record['id']}: a black picture was kept"
            shown[record["id"]] = scene
    return shown


def write_true_pairs(images: Path, answered: Path, path: Path) -> None:
    """Pairs of the same answers ranked by what is drawn: fewest inventions over most, of similar length."""
    shown = scenes_of(images)
    _, records = read_step(answered, RANK_RESPONSES)
    rows = []
    for record in records:
        pair = best_and_worst([judge(answer["text"], shown[record["id"]]) for answer in record["answers"]])
        if pair is not None:
            rows.append(
                {"idx": record["id"], "image_path": record["image"], "question": record["question"],
                 "chosen": pair[0].text, "rejected": pair[1].text, "origin_dataset": "TinyCOCO",
                 "origin_split": json.dumps({"model": "tinycoco-sft", "type": "truth"})}
            )  # fmt: skip
    write_atomic(path, "".join(json.dumps(row) + "\n" for row in rows))
    log(f"pairs ranked by truth: {len(rows)} of {len(records)} images")


class TruthMarker:
    """Marks the first sentence that names something the scene lacks; the correction is a true sentence of the scene.

    Args:
        images: run that drew the images.
    """

    name = "truth"

    def __init__(self, images: Path) -> None:
        self.shown = scenes_of(images)

    def identity(self) -> Record:
        """Fields of the fingerprint; another painter means other truths."""
        return {"kind": "rules", "painter": digest_of_file(run.PAINTER), "version": VERSION}

    def mark(self, items: Sequence[Answered]) -> list[Mark | None]:
        """One mark for each answered item, by what its scene contains."""
        return [self._mark(item, self.shown[item.image.stem]) for item in items]

    @staticmethod
    def _mark(item: Answered, scene: Scene) -> Mark:
        wrong = (k for k, text in enumerate(item.sentences) if hallucinated_categories(text, scene))
        first = next(wrong, -1)
        if first < 0:
            return Mark()
        return Mark(first, true_sentence(scene, item.sentences[:first], random.Random(f"context/{item.id}")))


def true_sentence(scene: Scene, before: Sequence[str], rng: random.Random) -> str:
    """A true sentence to go on with after `before`: one that names something new, where the captions tried have one."""
    named = set(mentioned_categories(" ".join(before)))
    tried: list[str] = []
    for _ in range(20):
        caption = truthful_caption(scene, rng)
        sentences = [caption[start:end] for start, end in sentence_spans(caption)]
        tried += sentences[1:] if before else sentences[:1]
    tried = tried or sentences
    return max(tried, key=lambda text: len(set(mentioned_categories(text)) - named))


def reward_figures(pictures: Path, answered: Path) -> dict[str, str]:
    """How far the rewards agree with the truth: images kept, answers ordered, pairs."""
    _, painted = read_step(pictures, RANK_IMAGES)
    shown = scenes_of(pictures)
    fits = [[_fits(record["prompt"], c) for c in record["candidates"] if c["image"]] for record in painted]
    kept = [_fits(record["prompt"], record["candidates"][record["best"]]) for record in painted if record["image"]]
    _, records = read_step(answered, RANK_RESPONSES)
    agree, differ, right, wrong, pairs = 0, 0, 0, 0, 0
    for record in records:
        scored = [
            (a["score"], judge(a["text"], shown[record["id"]]).invented) for a in record["answers"] if not a["fault"]
        ]
        for row, (score, invented) in enumerate(scored):
            for other, others in scored[:row]:
                if invented != others:
                    differ += 1
                    agree += (score > other) == (invented < others)
        if not record["fault"]:
            pairs += 1
            chosen, rejected = (
                judge(record["answers"][record[side]]["text"], shown[record["id"]]).invented
                for side in ("chosen", "rejected")
            )
            right, wrong = right + (chosen < rejected), wrong + (chosen > rejected)
    everything = [fit for of_prompt in fits for fit in of_prompt]
    return {
        "pictures that show what was asked": f"{share(sum(everything), len(everything))} of all candidates, "
        f"{share(sum(kept), len(kept))} of those that the image reward kept",
        "answers ordered as the truth orders them": f"{share(agree, differ)} of {differ} couples",
        "pairs": f"{pairs}; chosen invents less in {share(right, pairs)}, more in {share(wrong, pairs)}",
    }


def _fits(prompt: str, candidate: Record) -> bool:
    scene = painted_scene(prompt, candidate["guidance"], candidate["seed"])
    return scene is not None and set(scene.categories) == set(mentioned_categories(prompt))


def share(part: int, whole: int) -> str:
    """Percentage as text; 0.0 % of nothing."""
    return f"{100 * part / max(1, whole):.1f} %"


# ------------------------------------------------------------------------------------------------------------ report


def gain_reached(before: Score, ours: Score, truth: Score, metric: str) -> tuple[float, float, float]:
    """(before - ours) / (before - truth) in percent, with its 95 % bootstrap interval over scenes.

    NaN where the truth gains nothing.
    """
    parts = np.array(
        [[item["parts"][metric] for item in sorted(score.items, key=lambda item: item["id"])]
         for score in (before, ours, truth)], dtype=float
    )  # fmt: skip
    value = float(_reached(parts.sum(axis=1)[None])[0])
    if np.isnan(value):
        return value, value, value
    drawn = np.random.default_rng(0).integers(parts.shape[1], size=(RESAMPLES, parts.shape[1]))
    blocks = np.array_split(drawn, 50)  # all at once would take a gigabyte
    samples = np.concatenate([_reached(parts[:, rows].sum(axis=2).swapaxes(0, 1)) for rows in blocks])
    low, high = np.nanquantile(samples, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return value, float(low), float(high)


def _reached(sums: Any) -> Any:
    """[B, 3 models, (numerator, denominator)] -> [B] percent, NaN where the truth gains nothing."""
    rates = sums[..., 0] / sums[..., 1]
    ours, most = rates[:, 0] - rates[:, 1], rates[:, 0] - rates[:, 2]
    return 100 * np.divide(ours, most, out=np.full(ours.shape, np.nan), where=most != 0)


def gain_notes(scores: dict[str, Score]) -> list[str]:
    """How much of what ranking by the truth gains each round reaches; the first is before, the last the truth's."""
    names, notes = list(scores), []
    for name in names[1:-1]:
        for metric, title in (("response_level", "response-level"), ("mention_level", "mention-level")):
            value, low, high = gain_reached(scores[names[0]], scores[name], scores[names[-1]], metric)
            reached = "no share" if np.isnan(value) else f"{value:.0f} % [{low:.0f}, {high:.0f}]"
            notes.append(f"{name}: {reached} of the {title} gain that ranking the same answers by the truth brings.")
    return notes


def report(home: Path, models: dict[str, Path], smoke: bool = False) -> dict[str, Score]:
    """Print the table and write home/report. models: before alignment first, each round, ranked by truth last.

    smoke: say first that so small a run shows nothing about the methods.
    """
    scores = {name: run.score_model(home / "captions" / run.slug(name), folder) for name, folder in models.items()}
    log(format_table(scores))
    notes = run.notes(scores, run.COMPARED) + gain_notes(scores)
    figures = reward_figures(home / "pictures", home / "round-1")
    notes += [f"{what}: {value}." for what, value in figures.items()]
    for note in notes:
        log(note)
    page = Report(
        title="TinyCOCO: pairs from reward models alone",
        how_to_read=run.HOW_TO_READ + " Candidates, scores and pairs: round-1/report.html.",
        metrics=run.METRICS,
        results={name: {key: result.interval(key) for key in run.METRICS} for name, result in scores.items()},
        provenance=figures | {"scorer": f"Object HalBench, rule mode ({PROTOCOL})"},
        notes=notes,
        gallery=run.gallery(scores, 12),
        curves={name: run.curve(folder) for name, folder in models.items() if name in list(models)[1:]},
        panels=run.PANELS,
        warning=run.SMOKE if smoke else "",
    )
    if smoke:
        log(run.SMOKE)
    html, markdown = write_report(page, home / "report")
    log(f"report: {html} (the same as Markdown: {markdown})")
    return scores


# ---------------------------------------------------------------------------------------------------------- commands


def build_parser() -> argparse.ArgumentParser:
    """Parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="python -m playground.tinycoco.synth", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    prompts = commands.add_parser("prompts", help="write prompts and questions")
    prompts.add_argument("--out", type=Path, required=True, help="prompts.jsonl")
    prompts.add_argument("--count", type=int, required=True, help="how many")
    command.add_flags(commands.add_parser("pairs", help="`python -m dama synth` with the scene generator as artist"))
    truth = commands.add_parser("truth", help="pairs of the same answers ranked by what is drawn")
    truth.add_argument("--pictures", type=Path, required=True, help="run that drew the pictures")
    truth.add_argument("--answers", type=Path, required=True, help="run that ranked the answers")
    truth.add_argument("--out", type=Path, required=True, help="pairs.jsonl")
    table = commands.add_parser("report", help="score captions, print the table, write the report")
    table.add_argument("--run", type=Path, required=True, help="folder with pictures/, round-1/, captions/")
    table.add_argument("--models", nargs="+", required=True, metavar="NAME=FOLDER", help="before first, truth last")
    table.add_argument("--smoke", action="store_true", help="say in the report that so small a run shows nothing")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; return the exit code, 1 after an error."""
    args = build_parser().parse_args(argv)
    try:
        if args.command == "prompts":
            write_prompts(args.out, args.count)
        elif args.command == "pairs":
            marker = TruthMarker(Path(args.pictures or args.out)) if args.step == CONTEXT else None
            command.run(args, SceneArtist(), marker)
        elif args.command == "truth":
            write_true_pairs(args.pictures, args.answers, args.out)
        else:
            report(args.run, run.parse_models(args.models), args.smoke)
    except Exception as error:
        report_error(error, "tinycoco synth")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
