"""python -m scripts.gpu: what scripts/gpu_check.sh starts. Blocks in turn, each in a process with a time limit."""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing import get_context, set_forkserver_preload
from pathlib import Path
from typing import Any

from dama.console import log, write_json
from scripts.gpu.child import run_in_child

PROGRAM = "gpu_check"
MINUTES = 8.0
REHEARSAL_LIMIT = 600  # seconds of a block: CPUs of login nodes are shared


@dataclass(frozen=True)
class Block:
    """What a block measures, its time limit in seconds, and the packages without which it is left out."""

    title: str
    limit: int
    needs: tuple[str, ...] = ()


BLOCKS = {
    "kernels": Block("attention kernels against padded rows", 60),
    "tiny": Block("trainings of the golden checkpoint against the CPU's losses", 90),
    "step7b": Block("step of the 7B shape: phases, memory, levers, padded rows, TRL", 180),
    "lora7b": Block("LoRA on the 7B shape at 1, 4 and 16 pairs", 75),
    "qlora7b": Block("QLoRA on the 7B shape at 1, 4 and 8 pairs", 75, ("bitsandbytes",)),
    "vlm7b": Block("step of Qwen2.5-VL-7B's shape: packed, compiled, rows apart, TRL", 120),
    "noise": Block("rounding noise of log-probs and R", 60),
    "zero2": Block("ZeRO-2 engine with NCCL on 8 layers", 75, ("deepspeed",)),
    "generation": Block("generation on the 7B shape", 60),
    "hardness": Block("images a second of CLIP ViT-L-14-336", 45, ("open_clip",)),
}


def parser() -> argparse.ArgumentParser:
    """Parser of the command; importing a block is left to its own process."""
    p = argparse.ArgumentParser(prog=PROGRAM, description="Measure on one GPU what cannot be tested without one.")
    p.add_argument("--out", type=Path, help="results as JSON (default: runs/gpu_check/CARD.json)")
    p.add_argument("--blocks", type=names, default=list(BLOCKS), metavar="A,B",
                   help=f"blocks to run (default: all: {','.join(BLOCKS)})")  # fmt: skip
    p.add_argument("--minutes", type=float, default=MINUTES, help="time limit of all blocks (default: %(default)g)")
    p.add_argument("--rehearse", action="store_true", help="run small shapes on a simulated GPU; times mean nothing")
    return p


def names(text: str) -> list[str]:
    """Block names of a comma-separated list. Raises ArgumentTypeError for an unknown one."""
    chosen = text.split(",")
    unknown = [name for name in chosen if name not in BLOCKS]
    if unknown:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(BLOCKS)}, got {', '.join(unknown)}")
    return chosen


# --- Child processes -------------------------------------------------------------------------------------------------


def prepare_environment(rehearse: bool) -> None:
    """Variables that children get, with the null device in rehearsals.

    Raises:
        llava.rehearsal.build.RehearsalError: no rehearsal is possible on this machine.
    """
    if rehearse:
        from llava.rehearsal.launch import environment

        os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        os.environ.update(environment())
        set_forkserver_preload(["scripts.gpu.block", "scripts.gpu.step7b", "deepspeed", "tests.cuda.trainings"])
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", PYTHONUNBUFFERED="1")


def describe_machine() -> dict[str, Any] | None:
    """Card, driver and versions; None where there is no GPU, about which the child has reported."""
    command = [sys.executable, "-m", "scripts.gpu.machine"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    return json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None


def run_child(name: str, results: Path, log: Path, limit: float, rehearse: bool) -> int | None:
    """Exit status of a block's process; None where it ran past `limit` seconds and was killed, with all it started.

    In rehearsals, where no driver is in the way, processes are forked from one that has imported what takes seconds.
    """
    context = get_context("forkserver") if rehearse else get_context("spawn")
    child = context.Process(target=run_in_child, args=(name, results, log))
    child.start()
    try:
        child.join(limit)
        return child.exitcode
    finally:
        if child.pid and child.is_alive():
            with suppress(ProcessLookupError):  # it has a group of its own from its first line on
                os.killpg(child.pid, signal.SIGKILL)
            child.kill()
            child.join()


def run_block(name: str, out: Path, limit: float, rehearse: bool) -> dict[str, Any]:
    """Status, seconds and results of a block; what it measured before it ran out of time or crashed is kept."""
    missing = [package for package in BLOCKS[name].needs if not importlib.util.find_spec(package)]
    if missing:
        return {"status": "left out", "line": f"{', '.join(missing)} not installed", "seconds": 0.0}
    if limit <= 0:
        return {"status": "left out", "line": "no time left; see --blocks and --minutes", "seconds": 0.0}
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    results, log = folder / f"{name}.json", folder / f"{name}.log"
    results.unlink(missing_ok=True)
    log.write_text("")
    began = time.monotonic()
    status = run_child(name, results, log, limit, rehearse)
    seconds = round(time.monotonic() - began, 1)
    found = json.loads(results.read_text()) if results.exists() else {"line": "", "cases": {}, "left_out": {}}
    if status is None:
        found["line"] = f"stopped after {limit:.0f} s, {len(found['cases'])} cases done; {found['line']}".rstrip("; ")
    elif status:
        found["line"] = f"{problem_of(found, log)}; {found['line']}".rstrip("; ")
    return {"status": "timed out" if status is None else "failed" if status else "ok", "seconds": seconds, **found}


def problem_of(found: dict[str, Any], log: Path) -> str:
    """Why a block failed: its cases with errors, or the last line of the log."""
    wrong = [f"{name}: {case['error']}" for name, case in found["cases"].items() if "error" in case]
    lines = log.read_text(errors="replace").strip().splitlines()
    more = f" and {len(wrong) - 1} more" * (len(wrong) > 1)
    return f"{(wrong or lines[-1:] or ['no output'])[0][:200]}{more} (see {log})"


# --- All of them -----------------------------------------------------------------------------------------------------


def revision() -> str | None:
    """REVISION of the environment (a copy without .git has no other), or git's."""
    if os.environ.get("REVISION"):
        return os.environ["REVISION"]
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def main(argv: list[str] | None = None) -> int:
    """Run the blocks, each in its own process, and write the results after each; return the exit code."""
    args = parser().parse_args(argv)
    began = time.monotonic()
    prepare_environment(args.rehearse)
    machine = describe_machine()
    if machine is None:
        return 2
    card = re.sub(r"[^A-Za-z0-9]+", "-", machine["card"]) + "-rehearsed" * args.rehearse
    out = args.out or Path("runs/gpu_check") / f"{card}.json"
    results = {
        "rehearsed": args.rehearse,  # times then mean nothing
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "revision": revision(),
        **machine,
        "blocks": {},
    }
    log(f"{machine['card']}, {machine['memory_gib']} GiB, driver {machine['driver']}, torch "
        f"{machine['versions']['torch']}{', REHEARSED: times mean nothing' * args.rehearse}")  # fmt: skip
    for name in args.blocks:
        left = 60 * args.minutes - (time.monotonic() - began)
        limit = REHEARSAL_LIMIT if args.rehearse else min(BLOCKS[name].limit, left)
        block = results["blocks"][name] = run_block(name, out, limit, args.rehearse)
        write_json(out, results)
        log(f"{name:<11}{block['status']:<10}{block['seconds']:>6.1f} s  {block['line']}")
    log(f"results: {out}")
    return 0 if all(block["status"] in ("ok", "left out") for block in results["blocks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
