"""One cell of the study: the real trainer on the cell's pairs, captions and held-out pairs at every stop, one file."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers.trainer_callback import PrinterCallback, TrainerCallback

from dama.console import digest_of, write_json
from eval.core.types import Answer
from eval.objhal import score_captions
from playground.tinycoco import run
from playground.tinycoco.preferences import scene_of
from playground.tinycoco.study.data import Pool, Row, given_row, rows_of
from playground.tinycoco.study.grid import STEP_PAIRS, VERSION, Cell, Scale

MAX_NEW_TOKENS = 96
CAPTION_BATCH = 50
SCORED = ("response_level", "mention_level", "object_recall", "mean_words")


@dataclass(frozen=True)
class Scenes:
    """Held-out images with their questions: `questions.jsonl` and `images/` in a folder of `scenes`."""

    folder: Path

    @cached_property
    def requests(self) -> list[Any]:
        """Questions of questions.jsonl, one for each scene."""
        from llava.generation.questions import read_questions

        return read_questions(self.folder / "questions.jsonl")


@dataclass(frozen=True)
class World:
    """What all cells share."""

    pool: Pool
    images: Path
    test: Scenes
    validation: Scenes

    @property
    def scale(self) -> Scale:
        """Steps, stops and number of probes."""
        return self.pool.scale

    @cached_property
    def asked(self) -> list[list[str]]:
        """Id and prompt of all scenes' questions."""
        return [[request.id, request.prompt] for s in (self.test, self.validation) for request in s.requests]

    def fingerprint(self, cell: Cell) -> str:
        """Of everything that a cell's figures depend on."""
        return digest_of([VERSION, rows_of(self.pool, cell), cell.name, list(cell.flags), self.asked, list(self.scale)])


def run_cell(cell: Cell, world: World, out: Path) -> dict[str, Any]:
    """Trains, and writes out/NAME.json; what it needs on the way is removed. Returns the figures.

    stops: step -> captions of "test" scenes and "probes"; at the end also captions of "validation" scenes, by which
    learning rates are chosen. pairs: the trainer's pair log.
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
        "stops": look.figures,
        "log": [entry for entry in trainer.state.log_history if "loss" in entry],
        "pairs": [json.loads(line) for line in lines],
        "seconds": time.monotonic() - began,
    }
    write_json(out / f"{cell.name}.json", figures)
    shutil.rmtree(work)
    return figures


def build_trainer(cell: Cell, world: World, rows: Sequence[Row], work: Path) -> tuple[Any, Look]:
    """The trainer as train_mem.py would build it, told to be looked at on its way."""
    from dama.train.data import hardness_of_pairs, join_pairs, read_checked_pairs
    from dama.train.reference import reference_of_pairs
    from llava.generation.local import Answerer
    from llava.train.arguments import parse_arguments
    from llava.train.dpo_trainer import LLaVA15DPOTrainer
    from llava.train.family import LlavaFamily
    from llava.train.setup_model import setup_model

    arguments = parse_arguments(flags_of(cell, world, work), task="DPO")
    model, tokenizer, processor = setup_model(arguments)
    family = LlavaFamily.of(arguments, model, tokenizer)

    def prepared(rows: Sequence[Row], name: str) -> Any:
        """What training would make of these rows."""
        arguments[1].data_path = str(work / f"{name}.json")
        write_json(arguments[1].data_path, list(rows))
        pairs, _ = read_checked_pairs(arguments[1])
        hardness = hardness_of_pairs(pairs, None, {}, needed=True)
        reference = reference_of_pairs(pairs, *arguments[1:], {}, family)
        return join_pairs(pairs, hardness, reference, family, arguments[1], arguments[2])

    data = prepared(rows, "pairs")
    trainer = LLaVA15DPOTrainer(model, tokenizer, arguments[2], train_dataset=data.train, delta_bar=data.delta_bar)
    trainer.remove_callback(PrinterCallback)
    held_out = {f"held_out_{third}": ids for third, ids in world.pool.probes.items()}
    probes = {name: prepared([given_row(world.pool, id) for id in ids], name).train for name, ids in held_out.items()}
    look = Look(world, trainer, Answerer.of(model, tokenizer, processor, conv_mode="v1"), probes)
    trainer.add_callback(look)
    return trainer, look


def flags_of(cell: Cell, world: World, work: Path) -> list[str]:
    """Of train_mem.py; `build_trainer` names the data that it has written."""
    chosen = {
        "--model_name_or_path": run.SFT, "--version": "v1", "--image_aspect_ratio": "pad", "--use_cpu": True,
        "--data_path": run.PAIRS, "--image_folder": world.images, "--output_dir": work / "trained",
        "--learning_rate": cell.rate, "--lr_scheduler_type": "cosine", "--warmup_steps": 0.1,
        "--max_steps": world.scale.steps, "--per_device_train_batch_size": STEP_PAIRS, "--model_max_length": 512,
        "--per_device_eval_batch_size": 48, "--seed": cell.seed, "--data_seed": cell.seed, "--pair_log": True,
        "--save_strategy": "no", "--logging_steps": 1, "--disable_tqdm": True, "--report_to": "none",
    }  # fmt: skip
    return [str(word) for pair in chosen.items() for word in pair] + list(cell.flags)


class Look(TrainerCallback):
    """At each stop: captions of held-out scenes, and reward gaps of held-out pairs."""

    def __init__(self, world: World, trainer: Any, answerer: Any, probes: dict[str, Any]) -> None:
        self.world, self.trainer, self.answerer, self.probes = world, trainer, answerer, probes
        self.figures: dict[str, Any] = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure at the declared stops without changing what the trainer logs."""
        if state.global_step in self.world.scale.stops:
            logged = control.should_log
            self.at(state.global_step)
            control.should_log = logged  # which evaluating has taken back

    def at(self, step: int) -> None:
        """Once for each step: what a later call repeats is known already."""
        if str(step) in self.figures:
            return
        self.trainer.model.eval()
        figures = {"test": captions(self.answerer, self.world.test)}
        if step == self.world.scale.steps:
            figures["validation"] = captions(self.answerer, self.world.validation)
        figures["probes"] = {name: self.reward_figures(data) for name, data in self.probes.items()}
        self.figures[str(step)] = figures
        self.trainer.model.train()

    def reward_figures(self, pairs: Any) -> dict[str, float]:
        """Loss, accuracy and margin (nats, with beta) of held-out pairs."""
        found = self.trainer.evaluate(pairs, metric_key_prefix="p")
        kept = {"loss": "p_loss", "accuracy": "p_rewards/accuracies", "margin": "p_rewards/margins"}
        return {name: found[key] for name, key in kept.items()}


def captions(answerer: Any, scenes: Scenes) -> dict[str, Any]:
    """Greedy captions by rule-mode Object HalBench: for each metric numerators and denominators, scene by scene."""
    from llava.generation.answers import by_length
    from llava.generation.request import Decoding

    requests = by_length(answerer, scenes.requests, scenes.folder / "images")
    texts: dict[str, str] = {}
    for start in range(0, len(requests), CAPTION_BATCH):
        batch = requests[start : start + CAPTION_BATCH]
        found = answerer.answer(batch, scenes.folder / "images", Decoding(max_new_tokens=MAX_NEW_TOKENS))
        texts |= {request.id: answers[0] for request, answers in zip(batch, found)}
    ordered = sorted(requests, key=lambda request: request.id)
    answers = [Answer(r.id, r.image_id, r.prompt, texts[r.id]) for r in ordered]
    truth = {answer.image_id: set(scene_of(answer.image_id).categories) for answer in answers}
    items = score_captions(answers, truth, run.vocabulary()).items
    return {name: [[int(number) for number in item["parts"][name]] for item in items] for name in SCORED}


def sft_captions(world: World, out: Path) -> dict[str, Any]:
    """Where every cell starts: out/sft.json."""
    from llava.generation.local import Answerer

    path = out / "sft.json"
    asked = digest_of([VERSION, *world.asked])
    if path.is_file() and (found := json.loads(path.read_text()))["fingerprint"] == asked:
        return found
    answerer = Answerer(str(run.SFT), conv_mode="v1", device="cpu", dtype=torch.float32)
    found = {"fingerprint": asked, "test": captions(answerer, world.test)}
    found["validation"] = captions(answerer, world.validation)
    write_json(path, found)
    return found
