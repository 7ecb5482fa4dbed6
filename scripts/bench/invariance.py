"""The same ten DAMA steps on 1 x 16, 2 x 8, 1 x 4 x 4 and 2 x 4 x 2 (ranks x pairs x micro-batches): how far apart?

Real DeepSpeed ranks (ZeRO-2, CPU) on 40 pairs of TinyCOCO, so that every third step is an incomplete one of 8 pairs.
About 2 minutes on 2 cores. tests/llava/invariance.json was written by it with --json.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from dama.console import end_on_interrupt, log, write_json

ROOT = Path(__file__).resolve().parents[2]
WORLD = ROOT / "playground/tinycoco/weights"
LAYOUTS = ((1, 16, 1), (2, 8, 1), (1, 4, 4), (2, 4, 2))
FIGURES = ("loss", "grad_norm", "dama/R_bar", "dama/alpha_M", "dama/R_mean", "dama/selected")
PAIRS, STEPS = 40, 10
Run = dict[str, Any]


def command(*words: object, ranks: int = 0) -> None:
    """One of the repository's commands; with `ranks` under DeepSpeed's launcher."""
    binaries = Path(sys.executable).parent
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [binaries / "deepspeed", "--quiet", "--num_gpus", ranks, "--master_port", port]
    line = [str(word) for word in [*(launcher if ranks else [sys.executable]), *words]]
    environment = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"PATH": f"{binaries}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=False)
    if done.returncode:
        said = done.stdout[-2000:] + done.stderr[-3000:]
        raise RuntimeError(f"{' '.join(line)}\nended with {done.returncode}:\n{said}")


def prepare(folder: Path) -> list[object]:
    """Pictures, hardness and reference log-probs of the pairs; the flags that name them."""
    images, pairs = folder / "data/images", folder / "data/pairs.json"
    common = ["--data", pairs, "--image_folder", images]
    command("-m", "playground.tinycoco", "scenes", "--out", folder / "data", "--pairs", PAIRS, "--scenes", 1)
    command("-m", "dama", "hardness", *common, "--clip", WORLD / "clip", "--out", folder / "hardness")
    command("-m", "dama", "reference", *common, "--model_name_or_path", WORLD / "llava", "--model_max_length", 512,
            "--out", folder / "reference")  # fmt: skip
    return ["--data_path", pairs, "--image_folder", images, "--hardness", folder / "hardness", "--reference",
            folder / "reference"]  # fmt: skip


def train(folder: Path, data: list[object], layout: tuple[int, int, int], zero: int) -> Run:
    """Figures of every step, and which pairs each step selected."""
    ranks, batch, accumulation = layout
    command(
        "llava/train/train_mem.py", "--deepspeed", f"scripts/zero{zero}.json", "--use_cpu", True, "--task", "DPO",
        "--model_name_or_path", WORLD / "llava", "--model_max_length", 512, *data, "--max_steps", STEPS,
        "--per_device_train_batch_size", batch, "--gradient_accumulation_steps", accumulation,
        "--learning_rate", 1e-4, "--lr_scheduler_type", "constant", "--logging_steps", 1, "--save_strategy", "no",
        "--disable_tqdm", True, "--pair_log", True, "--output_dir", folder, ranks=ranks,
    )  # fmt: skip
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    rows = [row for row in history if "loss" in row]
    pairs = [json.loads(line) for line in (folder / "pair_log.jsonl").read_text().splitlines()]
    run: Run = {name: [row[name] for row in rows] for name in FIGURES}
    run["R"] = [row["R"] for row in pairs]
    run["selected pairs"] = [[row["id"] for row in pairs if row["step"] == k and row["selected"]] for k in range(STEPS)]
    return run


def deviations(runs: dict[str, Run]) -> dict[str, dict[str, float]]:
    """For each figure the largest and the mean absolute difference from the first run, over runs and steps."""
    first, *others = runs.values()
    table = {}
    for name in (*FIGURES, "R"):
        apart = [abs(a - b) for run in others for a, b in zip(run[name], first[name], strict=True)]
        table[name] = {"max": max(apart), "mean": sum(apart) / len(apart)}
    same = [run["selected pairs"] == first["selected pairs"] for run in others]
    return table | {"selected pairs": {"runs that differ": float(same.count(False))}}


def main() -> None:
    """Train in every layout and log how far each trajectory deviates from the first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for the trajectories and deviations")
    parser.add_argument("--zero", type=int, choices=(2, 3), default=2, help="DeepSpeed's ZeRO stage")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        data = prepare(Path(scratch))
        runs = {}
        for layout in LAYOUTS:
            name = "x".join(map(str, layout))
            runs[name] = train(Path(scratch) / name, data, layout, args.zero)
            log(f"{name:>8}: loss {runs[name]['loss'][-1]:.6f}  R_bar {runs[name]['dama/R_bar'][-1]:+.6f}")
    table = deviations(runs)
    for figure, values in table.items():
        log(f"{figure:>16}: " + "  ".join(f"{name} {value:.2e}" for name, value in values.items()))
    if args.json:
        write_json(args.json, {"deviations": table, "runs": runs})


if __name__ == "__main__":
    end_on_interrupt()
    main()
