"""One cell of the study: the real trainer on the cell's pairs, answers and held-out pairs on its way, one file."""

from __future__ import annotations

import hashlib
import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from dama.console import digest_of, log, write_atomic, write_json
from dama.losses import reward_gap
from dama.token_weights import NONE
from dama.views import PAIR_VIEWS
from eval.core.types import Answer
from eval.objhal import score_captions
from playground.tinycoco import ability, run
from playground.tinycoco.preferences import scene_of
from playground.tinycoco.scenes import Scene
from playground.tinycoco.study.data import Logps, Pool, Row, logps_of, rows_of
from playground.tinycoco.study.grid import PROBED, STEP_PAIRS, VERSION, Cell, Scale

CAPTION_BATCH, ABILITY_BATCH, PROBE_BATCH = 50, 150, 48
CAPTION_TOKENS, ABILITY_TOKENS = 96, 16
SCORED = ("response_level", "mention_level", "object_recall", "mean_words")
ABILITIES = tuple(metric.name for metric in ability.METRICS)
SIGNIFICANT = 4  # digits of a logged number that a cell's file has
PAIR_COLUMNS = ("step", "id", "R", "alpha_D", "beta", "selected")  # of the pair log
LOG_COLUMNS = ("step", "loss", "grad_norm", "rewards/accuracies", "rewards/margins", "dama/alpha_M", "dama/R_bar")

Ratios = dict[str, list[list[int]]]
"""Metric -> numerator and denominator, scene by scene."""


@dataclass(frozen=True)
class Scenes:
    """Held-out scenes with their questions: `questions.jsonl` and `images/` in a folder of `scenes`."""

    folder: Path

    @cached_property
    def requests(self) -> list[Any]:
        """Questions of questions.jsonl, one for each scene, in the order of the scenes."""
        from llava.generation.questions import read_questions

        return sorted(read_questions(self.folder / "questions.jsonl"), key=lambda request: request.id)

    @property
    def images(self) -> Path:
        """Folder of the images."""
        return self.folder / "images"

    @property
    def scenes(self) -> list[Scene]:
        """The scenes themselves."""
        return [scene_of(str(request.image)) for request in self.requests]


@dataclass(frozen=True)
class World:
    """What all cells share: pairs, their images, scenes."""

    pool: Pool
    images: Path
    held_out: Path  # pairs.json and images/ of the held-out pairs
    test: Scenes
    validation: Scenes

    @property
    def scale(self) -> Scale:
        """Steps, stops and number of probes."""
        return self.pool.scale

    @cached_property
    def asked(self) -> Any:
        """The ability benchmark about the first test scenes."""
        return ability.benchmark(self.test.scenes[: self.scale.asked], self.test.images)

    @cached_property
    def all_questions(self) -> list[list[str]]:
        """Id and prompt of everything that is asked."""
        captions = [request for scenes in (self.test, self.validation) for request in scenes.requests]
        return [[request.id, request.prompt] for request in [*captions, *self.asked.requests()]]

    def fingerprint(self, cell: Cell) -> str:
        """Of everything that a cell's figures depend on; images follow from their names."""
        return digest_of([VERSION, rows_of(self.pool, cell), cell.name, list(cell.flags), self._shared])

    @cached_property
    def _shared(self) -> str:
        """Digest of the inputs that are the same for all cells."""
        return digest_of([list(self.scale), self.all_questions, self.pool.probes, self.pool.reference])


def run_cell(cell: Cell, world: World, out: Path) -> dict[str, Any]:
    """Train, write out/NAME.json and remove intermediate files. Returns the contents of the file.

    stops: step -> captions of "test" scenes; at the end also "ability", held-out "probes", and captions of "validation"
    scenes, by which learning rates are chosen. pairs: PAIR_COLUMNS of the trainer's pair log. tokens: those of a pair's
    views, packed, mean over pairs.
    """
    began = time.monotonic()
    work = out / "work" / cell.name
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    rows = rows_of(world.pool, cell)
    trainer, look = build_trainer(cell, world, rows, work)
    trainer.train()
    look.at(world.scale.steps)
    lines = (work / "trained" / "pair_log.jsonl").read_text().splitlines()
    figures = {
        "cell": vars(cell),
        "fingerprint": world.fingerprint(cell),
        "flipped": sorted(str(row["idx"]) for row in rows if row["flipped"]),
        "tokens": look.tokens,
        "stops": look.figures,
        "log": [rounded(entry, LOG_COLUMNS) for entry in trainer.state.log_history if "loss" in entry],
        "pairs": [rounded(json.loads(line), PAIR_COLUMNS) for line in lines],
        "seconds": time.monotonic() - began,
    }
    write_atomic(out / f"{cell.name}.json", json.dumps(figures, separators=(",", ":")) + "\n")  # hundreds of these
    shutil.rmtree(work)
    return figures


def read_finished(path: Path, fingerprint: str) -> dict[str, Any] | None:
    """What the file made of these inputs holds; None where it is missing, damaged or of other inputs."""
    if not path.is_file():
        return None
    try:
        found = read_object(path)
    except ValueError as error:
        log(str(error))
        return None
    return found if found.get("fingerprint") == fingerprint else None


def read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file of the study. Raises ValueError where the file is missing or not whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"study: {path}: expected a file that the study wrote, got {error}; run it again") from error
    if not isinstance(found, dict):
        raise ValueError(f"study: {path}: expected an object, got {str(found)[:60]}; run it again")
    return found


def rounded(entry: Mapping[str, Any], columns: Sequence[str]) -> dict[str, Any]:
    """These columns of a logged entry, as far as it has them, with numbers of SIGNIFICANT digits."""
    found = {name: entry[name] for name in columns if name in entry}
    return {name: significant(value) if isinstance(value, float) else value for name, value in found.items()}


def significant(value: float) -> float:
    """Rounded to SIGNIFICANT digits."""
    return float(f"{value:.{SIGNIFICANT}g}")


def build_trainer(cell: Cell, world: World, rows: Sequence[Row], work: Path) -> tuple[Any, Look]:
    """The trainer as train_mem.py would build it after `dama reference`, with a Look at its stops."""
    from dama.train.data import hardness_of_pairs, join_pairs, read_checked_pairs
    from dama.train.reference import reference_of_pairs
    from llava.generation.local import Answerer
    from llava.train.arguments import parse_arguments
    from llava.train.dpo_trainer import LLaVA15DPOTrainer
    from llava.train.family import LlavaFamily
    from llava.train.setup_model import setup_model

    write_json(work / "pairs.json", list(rows))
    arguments = parse_arguments(flags_of(cell, world, work), task="DPO")
    _, data_args, args = arguments
    model, tokenizer, processor = setup_model(arguments)
    remember_features(model.get_vision_tower())
    family = LlavaFamily.of(arguments, model, tokenizer)
    pairs, skipped = read_checked_pairs(data_args)
    model.eval()
    folder = reference_folder(cell, world, work, family, arguments, (pairs, skipped))
    data_args.reference = str(folder)  # a flag must name a folder that exists
    hardness = hardness_of_pairs(pairs, None, {}, needed=True)
    reference = reference_of_pairs(pairs, data_args, args, {}, family)
    data = join_pairs(pairs, hardness, reference, family, data_args, args)
    trainer = LLaVA15DPOTrainer(model, tokenizer, args, train_dataset=data.train, delta_bar=data.delta_bar)
    trainer.remove_callback(PrinterCallback)
    answerer = Answerer.of(model, tokenizer, processor, conv_mode="v1")
    probes = Probes(world, family, arguments, work / "probes") if cell.method in PROBED else None
    look = Look(world, answerer, probes)
    look.tokens = statistics.fmean(sum(g.positions for g in family.groups(item)) for item in data.train.prepared)
    trainer.add_callback(look)
    return trainer, look


_FEATURES: dict[tuple[bytes, bool], Tensor] = {}
"""Digest of a batch of images, whether in inference mode -> the vision tower's features."""


def remember_features(tower: Any) -> None:
    """Let a frozen tower answer from _FEATURES: the cells of a process show it the same batches again and again.

    Features of the same batch are the same bits, so that no figure changes; those of an image in another batch might
    differ in their last ones.
    """
    if not tower.is_frozen:
        raise ValueError("study: expected flags that leave the vision tower as it is, got a tower that is trained")
    encode: Callable[[Tensor], Tensor] = tower.forward

    def remembered(images: Tensor) -> Tensor:
        key = hashlib.blake2b(images.contiguous().numpy().data).digest(), torch.is_inference_mode_enabled()
        if key not in _FEATURES:
            _FEATURES[key] = encode(images)
        return _FEATURES[key]

    tower.forward = remembered


def reference_folder(cell: Cell, world: World, work: Path, family: Any, arguments: Any, checked: Any) -> Path:
    """Folder of the pairs' log-probs before alignment, computed once for all cells that read the same views of them.

    checked: of `read_checked_pairs`.
    """
    from dama.train.reference import run_reference

    _, data_args, args = arguments
    views, per_token = args.preference_loss().views, args.token_weights != NONE
    of = [rows_of(world.pool, cell), world.pool.reference, [view.name for view in views], args.corruption, per_token]
    folder = work.parents[1] / "references" / digest_of([VERSION, *of])
    if not folder.is_dir():
        new = work / "reference"
        inputs = (family.with_views(views), data_args, args, *checked, new, PROBE_BATCH)
        run_reference(*inputs, progress=False, per_token=per_token)
        folder.parent.mkdir(exist_ok=True)
        with suppress(OSError):  # another cell has just put the same there
            new.rename(folder)
    return folder


def flags_of(cell: Cell, world: World, work: Path) -> list[str]:
    """Of train_mem.py."""
    chosen = {
        "--model_name_or_path": run.SFT, "--version": "v1", "--image_aspect_ratio": "pad", "--use_cpu": True,
        "--data_path": work / "pairs.json", "--image_folder": world.images,
        "--output_dir": work / "trained",
        "--learning_rate": cell.rate, "--lr_scheduler_type": "cosine", "--warmup_steps": 0.1,
        "--max_steps": world.scale.steps, "--per_device_train_batch_size": STEP_PAIRS, "--model_max_length": 512,
        "--seed": cell.seed, "--data_seed": cell.seed, "--pair_log": True,
        "--save_strategy": "no", "--logging_steps": 1, "--disable_tqdm": True, "--report_to": "none",
    }  # fmt: skip
    return [str(word) for pair in chosen.items() for word in pair] + list(cell.flags)


class Look(TrainerCallback):
    """At each stop: captions of test scenes; at the end also abilities, validation scenes and held-out pairs."""

    tokens = 0.0

    def __init__(self, world: World, answerer: Any, probes: Probes | None) -> None:
        self.world, self.answerer, self.probes = world, answerer, probes
        self.figures: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at the declared stops."""
        if state.global_step in self.world.scale.stops:
            self.at(state.global_step)

    def at(self, step: int) -> None:
        """Once for each step: what a later call repeats is known already."""
        if str(step) in self.figures:
            return
        model = self.answerer.model
        model.eval()
        figures: dict[str, Any] = {"test": captions(self.answerer, self.world.test)}
        if step == self.world.scale.steps:
            figures |= abilities(self.answerer, self.world)
            figures["probes"] = self.probes.gaps() if self.probes else {}
        self.figures[str(step)] = figures
        model.train()


class Probes:
    """Reward gaps of held-out pairs: R of plain DPO against the model before alignment, whatever the objective."""

    def __init__(self, world: World, family: Any, arguments: Any, work: Path) -> None:
        from dama.train.data import read_checked_pairs

        _, data_args, self.args = arguments
        self.world, self.family, self.work = world, family.with_views(PAIR_VIEWS), work
        self.data_args = replace(data_args, data_path=str(world.held_out / "pairs.json"),
                                 image_folder=[str(world.held_out / "images")])  # fmt: skip
        self.pairs, self.skipped = read_checked_pairs(self.data_args)

    def gaps(self) -> dict[str, list[float]]:
        """Third -> R of its pairs, in nats, in the order of `Pool.probes`."""
        from dama.train.reference import run_reference

        inputs = (self.family, self.data_args, self.args, self.pairs, self.skipped)
        run_reference(*inputs, self.work, PROBE_BATCH, overwrite=True, progress=False)
        now, pool = logps_of(self.work), self.world.pool
        return {third: gaps_of(now, pool.reference, ids) for third, ids in pool.probes.items()}


def gaps_of(now: Logps, before: Logps, ids: Sequence[str]) -> list[float]:
    """R of these pairs (Eq. 1), SIGNIFICANT digits."""
    logps = torch.tensor([(*now[id], *before[id]) for id in ids], dtype=torch.float64)
    return [significant(R) for R in reward_gap(*logps.unbind(1)).tolist()]


def answered(answerer: Any, requests: Sequence[Any], images: Path, tokens: int, batch_size: int) -> list[Answer]:
    """Greedy answers to the requests, in their order."""
    from llava.generation.answers import by_length
    from llava.generation.request import Decoding

    ordered = by_length(answerer, requests, images)
    texts: dict[str, str] = {}
    for start in range(0, len(ordered), batch_size):
        batch = ordered[start : start + batch_size]
        found = answerer.answer(batch, images, Decoding(max_new_tokens=tokens))
        texts |= {request.id: answers[0] for request, answers in zip(batch, found)}
    return [Answer(r.id, r.image_id, r.prompt, texts[r.id]) for r in requests]


def captions(answerer: Any, scenes: Scenes) -> Ratios:
    """Captions by rule-mode Object HalBench."""
    answers = answered(answerer, scenes.requests, scenes.images, CAPTION_TOKENS, CAPTION_BATCH)
    truth = {answer.image_id: set(scene_of(answer.image_id).categories) for answer in answers}
    items = score_captions(answers, truth, run.vocabulary()).items
    return {name: [[int(number) for number in item["parts"][name]] for item in items] for name in SCORED}


def abilities(answerer: Any, world: World) -> dict[str, Any]:
    """Metrics of the end alone: "ability" of test scenes, captions of "validation" scenes."""
    asked = world.asked
    answers = answered(answerer, asked.requests(), asked.image_folder, ABILITY_TOKENS, ABILITY_BATCH)
    by_scene: dict[str, dict[str, list[int]]] = {}
    for item in ability.score(asked, answers).items:
        sums = by_scene.setdefault(item["image_id"], {name: [0, 0] for name in ABILITIES})
        for name, parts in item["parts"].items():
            sums[name] = [before + int(part) for before, part in zip(sums[name], parts)]
    found = {name: [sums[name] for sums in by_scene.values()] for name in ABILITIES}
    return {"ability": found, "validation": captions(answerer, world.validation)}


def before_alignment(world: World, out: Path) -> dict[str, Any]:
    """Where every cell starts: out/sft.json."""
    from llava.generation.local import Answerer

    path = out / "sft.json"
    asked = digest_of([VERSION, *world.all_questions])
    if found := read_finished(path, asked):
        return found
    answerer = Answerer(str(run.SFT), conv_mode="v1", device="cpu", dtype=torch.float32)
    found = {"fingerprint": asked, "test": captions(answerer, world.test), **abilities(answerer, world)}
    write_json(path, found)
    return found
