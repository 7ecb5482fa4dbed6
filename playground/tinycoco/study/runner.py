"""`python -m playground.tinycoco study`: prepares the world once, then runs the declared cells on the given cores.

What is finished is kept; the same command continues. A cell that fails is listed and does not stop the others.
"""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from threading import RLock
from typing import Any

from tqdm import tqdm

from dama.console import log, write_json
from playground.tinycoco import run
from playground.tinycoco.preferences import SHARES, make_pairs
from playground.tinycoco.study import archive
from playground.tinycoco.study.analysis import Study, last_stop, no_cells, plain_ratio, read_cell
from playground.tinycoco.study.cell import Scenes, World, before_alignment, run_cell
from playground.tinycoco.study.claims import summary, verdicts_on
from playground.tinycoco.study.data import read_pool
from playground.tinycoco.study.findings import Findings
from playground.tinycoco.study.grid import FULL, Cell, Scale, declare, hours_of
from playground.tinycoco.study.page import NUMBERS, PAGE, quote, write_study
from playground.tinycoco.study.workers import each_outcome

FIRST_HELD_OUT = 300_000  # scene of the pairs' stream; the shipped pairs' are below it
ARCHIVES = "study_cells"  # folder beside the page
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def main(
    out: Path | None, docs: Path | None, cores: int, quick: bool, again: int | None, page: bool, unpack: Path | None
) -> int:
    """The command: cells, then the page, the tables that quote it, and the archives; with `again` only repetitions.

    page: only the page, of what is finished, and without `docs` into the study's folder, as where a cell failed.
    unpack: archives to begin with. Returns 1 where a cell failed or came out otherwise.
    """
    cells = declare(quick)
    folder = out or Path("runs/study_quick" if quick else "runs/study")
    if unpack:
        archive.unpack(unpack, folder)
    if page and not list((folder / "cells").glob("*.json")):
        raise no_cells(folder)
    world = read_world(folder) if page and not unpack else prepare_world(folder)
    if again is not None:
        return int(run_again(cells, world, folder, again) > 0)
    failed = not page and run_study(cells, world, folder, cores)
    findings = Findings(Study.read(folder, cells, world.fingerprint), world.pool)
    docs = docs or (folder if quick or page or failed else Path("docs"))
    numbers = write_study(findings, docs)
    text = summary(numbers)
    log(text)
    log(f"study: {docs / PAGE}, {docs / NUMBERS}")
    if not page:
        quote(text, docs / "tinycoco.md")
        quote(verdicts_on(numbers["claims"]), docs.parent / "README.md")
        archive.pack(cells, findings.study.cells, folder, docs / ARCHIVES)
    return int(failed)


def prepare_world(folder: Path, scale: Scale = FULL) -> World:
    """Pairs, scenes, hardness and the held-out pairs' log-probs, by the commands that `scripts/dama_tiny.sh` runs."""
    from dama.cli import main as dama

    run.prepare(folder / "pool", scale.pool, 0, "test", second_images=True)
    run.prepare(folder / "test", 0, scale.test, "test")
    run.prepare(folder / "validation", 0, scale.validation, "validation")
    source = folder / "held_out_pairs.json"
    if not source.is_file():
        write_json(source, held_out_pairs(3 * scale.probes))
    run.prepare(folder / "held_out", None, 0, "test", source)
    data, held_out = (["--data", folder / name / "pairs.json", "--image_folder", folder / name / "images"]
                      for name in ("pool", "held_out"))  # fmt: skip
    stages = [
        ["hardness", *data, "--clip", run.CLIP, "--out", folder / "hardness"],
        ["hardness", *held_out, "--clip", run.CLIP, "--out", folder / "held_out_hardness"],
        ["reference", *held_out, "--model_name_or_path", run.SFT, "--model_max_length", 512,
         "--out", folder / "reference"],
    ]  # fmt: skip
    for words in stages:
        if dama([str(word) for word in words]):
            raise RuntimeError(f"python -m dama {words[0]}: failed, see above")
    return read_world(folder, scale)


def held_out_pairs(count: int) -> list[dict[str, Any]]:
    """Pairs of scenes that no shipped pair is about, made as those are and in the same shares; always the same."""
    from llava.generation.local import Answerer

    whole = sum(SHARES.values())
    shares = {kind: math.ceil(count * share / whole) for kind, share in SHARES.items()}
    log(f"study: {sum(shares.values())} held-out pairs are sampled from the model before alignment")
    return make_pairs(Answerer(str(run.SFT), conv_mode="v1", device="cpu"), 0, shares, FIRST_HELD_OUT)


def read_world(folder: Path, scale: Scale = FULL) -> World:
    """What `prepare_world` has prepared."""
    pool = read_pool(folder, scale)
    return World(
        pool, folder / "pool/images", folder / "held_out", Scenes(folder / "test"), Scenes(folder / "validation")
    )


def run_study(cells: Sequence[Cell], world: World, folder: Path, cores: int) -> bool:
    """Runs what is not finished yet: folder/cells/NAME.json of each, folder/failed.json of those that ended badly.

    Returns whether any did.
    """
    os.environ.update(ONE_THREAD)
    out = folder / "cells"
    out.mkdir(parents=True, exist_ok=True)
    before_alignment(world, out)
    to_do = [cell for cell in cells if not is_finished(cell, world, out)]
    log(
        f"study: {len(cells)} cells declared, {len(cells) - len(to_do)} finished; {cores} at a time, about "
        f"{hours_of(len(to_do), cores):.1f} hours"
    )
    failed: dict[str, str] = {}
    bar = tqdm(total=len(cells), initial=len(cells) - len(to_do), desc="study", unit="cell")
    with bar, closing(each_outcome(partial(run_cell, world=world, out=out), to_do, cores, _quiet_worker)) as outcomes:
        for cell, (figures, error) in outcomes:
            if error:
                failed[cell.name] = error
            bar.write(f"{cell.name}: FAILED: {error}" if error else line_of(figures))
            bar.update()
    write_json(folder / "failed.json", failed)
    if failed:
        log(f"study: {len(failed)} failed, listed in {folder / 'failed.json'}; the same command tries them again")
    return bool(failed)


def _quiet_worker() -> None:
    """One thread, and no lines of the trainer's between those of the study."""
    import warnings

    import torch
    from transformers.utils import logging

    torch.set_num_threads(1)
    tqdm.set_lock(RLock())  # of its own; multiprocessing's would count as leaked where the worker is ended
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore")


def is_finished(cell: Cell, world: World, out: Path) -> bool:
    """Whether the cell's file exists and was made from the same inputs."""
    return read_cell(out, cell, world.fingerprint(cell)) is not None


def line_of(figures: dict[str, Any]) -> str:
    """Log line of a finished cell: response-level and recall on the test scenes at its last stop."""
    last, cell = last_stop(figures)["test"], Cell(**figures["cell"])
    response, recall = (plain_ratio([last], metric) for metric in ("response_level", "object_recall"))
    return f"{cell.name:<44} response-level {response:5.1f}  recall {recall:5.1f}  {figures['seconds']:5.0f} s"


def run_again(cells: Sequence[Cell], world: World, folder: Path, count: int) -> int:
    """Repeat `count` cells, chosen at random, and compare; return how many came out differently."""
    out = folder / "cells"
    finished = [cell for cell in cells if is_finished(cell, world, out)]
    if not finished:
        raise no_cells(folder)
    _quiet_worker()
    different = 0
    for cell in random.SystemRandom().sample(finished, min(count, len(finished))):
        was = json.loads((out / f"{cell.name}.json").read_text())
        now = run_cell(cell, world, folder / "again")
        same = json.dumps(was["stops"]) == json.dumps(now["stops"])
        different += not same
        log(f"{line_of(now)}  {'the same to the last caption' if same else 'was ' + line_of(was)}")
    return different
