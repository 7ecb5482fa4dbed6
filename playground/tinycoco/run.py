"""The two ends of `scripts/dama_tiny.sh`: images and questions before training, table and report after."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from dama.console import digest_of, digest_of_file, log, write_atomic, write_json
from dama.hardness.score import load_hardness
from dama.report import GalleryItem, Hardness, MarkedCaption, Metric, Report, write_report
from dama.stage import open_stage, read_stage
from eval.core.objects import ObjectVocabulary
from eval.core.scores import Score, difference
from eval.core.store import Provenance, read_answers, write_results
from eval.core.types import Record
from eval.objhal import PROTOCOL, format_table, score_captions
from playground.tinycoco import ability
from playground.tinycoco.captions import QUESTIONS
from playground.tinycoco.preferences import parts_of, scene_of, with_second_image
from playground.tinycoco.scenes import Scene, draw, sample_scene
from playground.tinycoco.vocabulary import SYNONYMS

HOME = Path(__file__).parent
PAIRS = HOME / "pairs.json"
SFT = HOME / "weights" / "llava"
CLIP = HOME / "weights" / "clip"
PAINTER = HOME / "scenes.py"
CHUNK = 100  # images that a kill can cost
METRICS = {
    "response_level": Metric("response-level", "lower", unit="%"),
    "mention_level": Metric("mention-level", "lower", unit="%"),
    "object_recall": Metric("object recall", "higher", unit="%"),
    "mean_words": Metric("mean words"),
    "repeated_objects": Metric("repeated objects", "lower", decimals=2),
}
COMPARED = {key: METRICS[key] for key in ("response_level", "object_recall")}
ABILITIES = {
    "ability": Metric("ability", "higher", unit="%"),
    "yes_no": Metric("yes/no accuracy", "higher", unit="%"),
    "yes_ratio": Metric("yes ratio", unit="%"),
}
PANELS = {
    "loss": "Loss",
    "rewards/accuracies": "Reward accuracy",
    "dama/R_bar": "R_bar, running mean of the reward gap",
    "dama/alpha_M": "alpha_M",
}
SMOKE = (
    "Smoke run: it shows that the stages work and nothing about the methods. There are too few pairs, steps and scenes "
    "for a difference to mean anything; run the script without --smoke for results."
)
HOW_TO_READ = (
    "Response-level: share of captions with at least one object that is not in the image; mention-level: share of "
    "named objects that are not there; both should fall while object recall, the share of drawn objects that are "
    "named, stays. Brackets are 95 % bootstrap intervals over scenes."
)
HOW_TO_READ_ABILITY = (
    " Ability: share of short questions about what, color, number and place whose answer is exactly the right one; "
    "half of the yes/no questions about objects are to be answered with yes."
)


def prepare(
    out: Path, pairs: int | None, scenes: int, split: str, source: Path = PAIRS, *, second_images: bool = False
) -> None:
    """Draw the images of the first `pairs` of `source` and of `scenes` held-out scenes; write pairs and questions.

    Args:
        second_images: give each pair the scene without one object that its chosen answer names, and the answer to it.
    """
    rows = json.loads(source.read_text())[:pairs]
    if second_images:
        several = [row for row in rows if len(scene_of(row["image_path"]).categories) > 1]
        if alone := len(rows) - len(several):
            log(f"left out: {alone} pair(s) about one kind of object, which a second image cannot lack")
        rows = [with_second_image(row) for row in several]
    shown = list(dict.fromkeys(name for row in rows for name in (row["image_path"], *row.get("rejected_images", []))))
    held_out = [sample_scene(index, split) for index in range(scenes)]
    everything = [*shown, *(f"{scene.id}.png" for scene in held_out)]
    chunks = [everything[i : i + CHUNK] for i in range(0, len(everything), CHUNK)]
    images = out / "images"
    images.mkdir(parents=True, exist_ok=True)
    questions = {"questions.jsonl": "".join(_question(scene, i) for i, scene in enumerate(held_out)),
                 "ability.jsonl": ability.question_lines(held_out)}  # fmt: skip
    fingerprint = {
        "pairs": digest_of(rows), "scenes": scenes, "split": split, "painter": digest_of_file(PAINTER),
        "questions": digest_of(questions),
    }  # fmt: skip
    with open_stage(out, "scenes", fingerprint, [len(chunk) for chunk in chunks]) as stage:
        if stage.complete:
            return
        stage.fill(lambda number: [_draw_to(images, name) for name in chunks[number]], "scene")
        write_json(out / "pairs.json", rows)
        for name, lines in questions.items():
            write_atomic(out / name, lines)
        stage.finish({"pairs": len(rows), "held_out_scenes": scenes})


def _draw_to(folder: Path, name: str) -> dict[str, Any]:
    scene, without = parts_of(name)
    draw(scene, without).save(folder / name)
    return {"image": name, "objects": [category for category in scene.categories if category != without]}


def _question(scene: Scene, index: int) -> str:
    name = f"{scene.id}.png"
    row = {"question_id": scene.id, "image": name, "image_id": name, "text": QUESTIONS[index % len(QUESTIONS)]}
    return json.dumps(row) + "\n"


# --- After training --------------------------------------------------------------------------------------------------


def vocabulary() -> ObjectVocabulary:
    """TinyCOCO's 32 categories with their synonyms, as Object HalBench's scorer takes them."""
    return ObjectVocabulary.from_mapping(SYNONYMS)


def score_answers(answers: Path) -> Score:
    """Object HalBench in rule mode; the ground truth is what the scene generator drew."""
    captions = sorted(read_answers(answers), key=lambda answer: answer.id)  # the file is in order of length
    truth = {answer.image_id: set(scene_of(answer.image_id).categories) for answer in captions}
    return score_captions(captions, truth, vocabulary())


def score_ability(answers: Path) -> Score:
    """The ability benchmark about the scenes that are asked about."""
    given = read_answers(answers)
    scenes = dict.fromkeys(answer.image_id for answer in given)
    return ability.score(ability.benchmark(map(scene_of, scenes)), given)


def score_model(
    folder: Path, checkpoint: Path, benchmark: str = "captions", scorer: Callable[[Path], Score] = score_answers
) -> Score:
    """Score a model's answers and write results.json beside them."""
    manifest, _ = read_stage(folder, "answers")
    score = scorer(folder / "answers.jsonl")
    write_results(
        folder / "results.json",
        score.metrics,
        Provenance(
            benchmark=f"TinyCOCO {benchmark}",
            protocol=score.protocol,
            checkpoint=str(checkpoint),
            fingerprint=manifest["fingerprint"]["weights"],
            decoding=manifest["fingerprint"]["decoding"],
            counts=score.counts,
        ),
        score.items,
    )
    return score


def report(run: Path, models: dict[str, Path], smoke: bool = False) -> dict[str, Score]:
    """Score run/captions/NAME of each model, print tables, write results.json and the report.

    Where there is run/ability, of models that were asked questions, too, run/ability/NAME is scored as well.

    Args:
        models: name in the table -> checkpoint folder, the one before alignment first.
        smoke: say first that so small a run shows nothing about the methods.
    """
    scores = {name: score_model(run / "captions" / slug(name), checkpoint) for name, checkpoint in models.items()}
    log(f"{format_table(scores)}\n")
    found: dict[str, dict[str, Any]] = {
        name: {key: score.interval(key) for key in METRICS} for name, score in scores.items()
    }
    metrics, how_to_read, said = METRICS, HOW_TO_READ, notes(scores, COMPARED)
    if (run / "ability").is_dir():
        abilities = {
            name: score_model(run / "ability" / slug(name), checkpoint, "ability", score_ability)
            for name, checkpoint in models.items()
        }
        log(f"{ability.format_table(abilities)}\n")
        metrics, how_to_read = METRICS | ABILITIES, HOW_TO_READ + HOW_TO_READ_ABILITY
        said += notes(abilities, ABILITIES)
        for name, score in abilities.items():
            found[name] |= {key: score.interval(key) for key in ABILITIES}
    page = Report(
        title="TinyCOCO: before and after alignment",
        how_to_read=how_to_read,
        metrics=metrics,
        results=found,
        provenance=provenance(run, models, scores),
        notes=said,
        gallery=gallery(scores, 12),
        hardness=hardness(run),
        curves={name: curve(folder) for name, folder in models.items() if (folder / "trainer_state.json").is_file()},
        panels=PANELS,
        warning=SMOKE if smoke else "",
    )
    if smoke:
        log(SMOKE)
    html, markdown = write_report(page, run / "report")
    log(f"report: {html} (the same as Markdown: {markdown})")
    return scores


def slug(name: str) -> str:
    """A model's name as part of a file name."""
    return name.lower().replace(" ", "_")


def notes(scores: dict[str, Score], metrics: Mapping[str, Metric]) -> list[str]:
    """What the paired differences say, in words the intervals allow."""
    names = list(scores)
    lines = []
    for ours, theirs in [(name, names[0]) for name in names[1:]] + [(names[-1], name) for name in names[1:-1]]:
        gaps = difference(scores[ours], scores[theirs], metrics)
        parts = []
        for key, (value, low, high) in gaps.items():
            if value is None or low is None or high is None:
                continue
            clear = "" if low > 0 or high < 0 else ", no clear difference"
            parts.append(f"{metrics[key].name} {value:+.1f} points [{low:+.1f}, {high:+.1f}]{clear}")
        lines.append(f"{ours} against {theirs} on the same scenes: {'; '.join(parts)}.")
    return lines


def gallery(scores: dict[str, Score], count: int) -> list[GalleryItem]:
    """The first scenes on which the models' captions differ in what they invent, then others, in order of scene."""
    models = list(scores)
    items = list(zip(*(scores[name].items for name in models)))
    telling = [row for row in items if len({invented(item) for item in row}) > 1]
    chosen = (telling + [row for row in items if row not in telling])[:count]
    return [
        GalleryItem(
            draw(scene_of(row[0]["image_id"])),
            row[0]["prompt"],
            [MarkedCaption(name, item["text"], marks(item)) for name, item in zip(models, row)],
        )
        for row in chosen
    ]


def invented(item: Record) -> int:
    """Number of objects that a caption names although they are not in the image."""
    return sum(not mention["correct"] for mention in item["mentions"])


def marks(item: Record) -> list[tuple[int, int, Literal["hallucinated", "correct"]]]:
    """Spans of a caption that name an object, and whether it is in the image."""
    return [(m["start"], m["end"], "correct" if m["correct"] else "hallucinated") for m in item["mentions"]]


def hardness(run: Path) -> Hardness:
    """Every pair's delta by kind of pair, and their mean, from the run's hardness stage."""
    _, records = read_stage(run / "hardness", "hardness")
    kinds = sorted({record["kind"] for record in records})
    by_kind = {kind: [record["delta"] for record in records if record["kind"] == kind] for kind in kinds}
    return Hardness(by_kind, load_hardness(run / "hardness").delta_bar)


def curve(checkpoint: Path) -> list[dict[str, Any]]:
    """The training log of a run, one row a logging step."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [row for row in history if "loss" in row]


def provenance(run: Path, models: dict[str, Path], scores: dict[str, Score]) -> dict[str, str]:
    """Lines of the report's footer: what was scored, the number of pairs and each model's training flags."""
    first = next(iter(scores.values()))
    pairs = json.loads((run / "data" / "pairs.json").read_text())
    lines = {
        "scenes": f"{len(first.items)} held out, greedy answers",
        "scorer": f"Object HalBench, rule mode ({PROTOCOL})",
        "pairs": str(len(pairs)),
    }
    for name, folder in models.items():
        card = folder / "dama_provenance.json"
        if card.is_file():
            made = json.loads(card.read_text())
            kept = ("strategy", "variant", "learning_rate", "num_train_epochs", "dpo_beta", "seed")
            flags = ", ".join(f"{flag} {made['flags'][flag]}" for flag in kept if flag in made["flags"])
            lines[name] = f"{flags}; revision {made['revision']}"
    return lines


def parse_models(words: Sequence[str]) -> dict[str, Path]:
    """NAME=FOLDER words, in the order given."""
    models = {}
    for word in words:
        name, sign, folder = word.partition("=")
        if not sign or not Path(folder).is_dir():
            raise ValueError(f"--models: expected NAME=FOLDER with an existing folder, got {word!r}")
        models[name] = Path(folder)
    return models
