"""What grows with the number of pairs: seconds until the first step, of a call with nothing to do, and peak memory.

Pairs are generated: answers of 60 to 120 words, 1.7 pairs for each small JPEG, TinyCOCO's checkpoint. For every size it
prints the seconds of the functions that prepare data, called one by one, then those of the training command on one
rank; at last the seconds of `--help` of every command.

    python scripts/bench/scale.py --pairs 1000 10000 80000
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from PIL import Image

from dama.console import end_on_interrupt, log, write_atomic

ROOT = Path(__file__).resolve().parents[2]
CHECKPOINT = ROOT / "playground/tinycoco/weights/llava"
PAIRS_PER_IMAGE = 1.7
WORDS = (
    "a the of in on with two three several red wooden small large person table street chair window sign dog bicycle "
    "stands sits holds shows appears near behind left right background foreground image scene light bright"
)
QUESTION = "What is in the image, and what are the people doing there?"
COMMANDS = [
    "llava/train/train_mem.py", "llava/train/train.py", "llava/train/train_dpo.py", "-m dama", "-m dama hardness",
    "-m dama reference", "-m dama doctor", "-m llava.eval.model_vqa", "-m llava.eval.model_vqa_loader",
    "-m llava.eval.run_llava", "-m llava.eval.eval_pope", "-m llava.serve.cli", "-m llava.serve.gradio_web_server",
    "-m llava.model.consolidate", "-m llava.model.apply_delta", "-m llava.model.make_delta", "-m llava.model.export",
    "-m eval.evaluate", "-m eval.compare", "-m eval.summary", "-m eval.download", "-m eval.page",
    "-m playground.tinycoco",
]  # fmt: skip
# Functions of the training command whose own seconds are measured, without those of the others that they call.
SPANS = {
    "reading, checking": ("dama.train.data", "checked_pairs_of"),
    "tokenization": ("dama.train.data", "encode_pairs"),
    "joining": ("dama.train.data", "join_pairs"),
}
FIRST_STEP = re.compile(r"step\s+1\b")
MB = 1e6


def main() -> None:
    """Measure every size in child processes and print seconds and MB; then seconds of --help."""
    args = parse_arguments()
    if args.functions:
        log(json.dumps(seconds_of_functions(args.functions)))
        return
    if args.command:
        sys.exit(run_command(args.command))
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench_scale_") as scratch:
        for count in args.pairs:
            folder = Path(scratch) / str(count)
            write_pairs(folder, count)
            measure(folder, count, args.repeats)
    if not args.no_help:
        log("\n--help, seconds (median)")
        for command in COMMANDS:
            log(f"  {command:<36} {statistics.median(help_seconds(command) for _ in range(args.repeats)):6.2f}")


def parse_arguments() -> argparse.Namespace:
    """Flags; --functions and --command are those of the child processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, nargs="+", default=[1000, 10_000, 80_000], metavar="N", help="sizes")
    parser.add_argument("--repeats", type=int, default=1, metavar="N", help="runs for each median (default: 1)")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="folder for the data (default: the system's)")
    parser.add_argument("--no_help", action="store_true", help="do not measure --help")
    parser.add_argument("--functions", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--command", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------ the data


def write_pairs(folder: Path, count: int) -> None:
    """pairs.jsonl with scores and log-probs inside, so that no stage is needed, and the images."""
    rng = random.Random(count)
    images = max(1, int(count / PAIRS_PER_IMAGE))
    (folder / "images").mkdir(parents=True)
    for number in range(images):
        color = tuple(rng.randrange(256) for _ in range(3))
        Image.new("RGB", (32, 24), color).save(folder / f"images/{number}.jpg", "JPEG")
    write_atomic(folder / "pairs.jsonl", "".join(json.dumps(row_of(i, images, rng)) + "\n" for i in range(count)))


def row_of(number: int, images: int, rng: random.Random) -> dict[str, Any]:
    """A released pair with reference log-probs and scores inside, so that no stage is needed."""

    def answer() -> str:
        return " ".join(rng.choices(WORDS.split(), k=rng.randint(60, 120))).capitalize() + "."

    return {
        "idx": number,
        "image_path": f"{number % images}.jpg",
        "question": QUESTION,
        "chosen": answer(),
        "rejected": answer(),
        "chosen_logits": [rng.random()],
        "rejected_logits": [rng.random()],
        "logps": {"logps": [-100.0, -1.0, [], -120.0, -1.0, []]},
    }


# ----------------------------------------------------------------------------------------------------------- measuring


def measure(folder: Path, count: int, repeats: int) -> None:
    """Print the medians of one size."""
    functions = [json.loads(child("--functions", folder)) for _ in range(repeats)]
    log(f"\n{count} pairs\n  functions, seconds")
    for name in functions[0]:
        log(f"    {name:<28} {statistics.median(run[name] for run in functions):8.2f}")
    cold = [command_seconds(folder, f"cold{i}", folder / f"cache{i}") for i in range(repeats)]
    starts = [command_seconds(folder, f"out{i}", folder / f"cache{i}") for i in range(repeats)]
    idle = [idle_seconds(folder / f"out{i}", folder / f"cache{i}") for i in range(repeats)]
    for title, runs in (("without a cache", cold), ("later", starts)):
        log(f"  training command, {title}, seconds")
        for name in sorted({name for run in runs for name in run}):
            log(f"    {name:<28} {statistics.median(run[name] for run in runs if name in run):8.2f}")
    log(f"  {'called again, finished':<30} {statistics.median(idle):8.2f}")


def child(*words: str | Path) -> str:
    """Run this file with these words in a fresh process and return the last line of its output."""
    line = [sys.executable, __file__, *map(str, words)]
    settings = environment() | {"DAMA_CACHE_HOME": str(Path(words[-1]) / "functions")}
    done = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True, env=settings)
    return done.stdout.splitlines()[-1]


def environment() -> dict[str, str]:
    """Environment of the child processes: one thread, offline, this checkout."""
    return {"OMP_NUM_THREADS": "1"} | dict(os.environ) | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}


def seconds_of_functions(folder: Path) -> dict[str, float]:
    """Each step of preparing data by itself, in this process, and the megabytes that they leave behind."""
    import psutil

    from dama.checked_pairs import check_pair_file, read_pair_file
    from dama.image_table import table_of_images
    from dama.pairs import distinct_images
    from llava.conversation import get_template
    from llava.tokenization import load_tokenizer
    from llava.train.batch_encoding import encode_answers

    seconds: dict[str, float] = {}

    def timed(name: str, work: Callable[[], Any]) -> Any:
        start = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - start
        return result

    tokenizer, images = load_tokenizer(CHECKPOINT), folder / "images"
    before = psutil.Process().memory_info().rss
    timed("reading, parsing", lambda: read_pair_file(folder / "pairs.jsonl"))
    file = timed("reading, cached", lambda: read_pair_file(folder / "pairs.jsonl"))
    names = distinct_images(file.pairs)
    timed("images, opened", lambda: table_of_images(names, images))
    timed("images, unchanged", lambda: table_of_images(names, images))
    checked = timed("checking", lambda: check_pair_file(file, images))
    timed("digests", lambda: checked.fingerprint)
    timed("tokenization", lambda: encode_answers(file.pairs, tokenizer, get_template("v1")))
    encoded = timed("tokens, cached", lambda: encode_answers(file.pairs, tokenizer, get_template("v1")))
    seconds["(tokens, millions)"] = len(encoded.ids) / 1e6
    seconds["(memory, MB)"] = (psutil.Process().memory_info().rss - before) / MB
    return seconds


def command_seconds(folder: Path, out: str, cache: Path) -> dict[str, float]:
    """Of one training of one step with this cache: to the first step, the whole run, spans, and peak memory in MB."""
    start = time.perf_counter()
    seconds: dict[str, float] = {}
    line = [sys.executable, __file__, "--command", str(folder / out)]
    settings = environment() | {"DAMA_CACHE_HOME": str(cache)}
    (folder / f"{out}.spans.json").unlink(missing_ok=True)
    with subprocess.Popen(line, stdout=subprocess.PIPE, text=True, env=settings) as process:
        assert process.stdout is not None
        for text in process.stdout:
            if FIRST_STEP.search(text):
                seconds.setdefault("first step", time.perf_counter() - start)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"the training ended with status {process.returncode}")
    seconds["whole run"] = time.perf_counter() - start
    seconds["(processor)"] = usage.ru_utime + usage.ru_stime
    seconds["(peak memory, MB)"] = usage.ru_maxrss * 1024 / MB
    return seconds | json.loads((folder / f"{out}.spans.json").read_text())


def run_command(out: Path) -> int:
    """Train one step into `out`, and write the seconds of SPANS beside it."""
    spans: dict[str, float] = {}
    inside: list[float] = []  # seconds of the spans within each span that is under way

    def watch(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def watched(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            inside.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole, others = time.perf_counter() - start, inside.pop()
                spans[name] = spans.get(name, 0.0) + whole - others
                if inside:
                    inside[-1] += whole

        return watched

    import importlib

    for name, (module, function) in SPANS.items():
        place = importlib.import_module(module)
        setattr(place, function, watch(name, getattr(place, function)))
    from llava.train.train_mem import main as train

    os.chdir(CHECKPOINT)  # whose config names its vision tower by a relative path
    status = train(flags_of(out))
    write_atomic(out.with_name(f"{out.name}.spans.json"), json.dumps(spans))
    return status


def flags_of(out: Path) -> list[str]:
    """Of a training of one step into `out`."""
    folder = out.parent
    flags = {
        "task": "DPO", "model_name_or_path": CHECKPOINT, "data_path": folder / "pairs.jsonl",
        "image_folder": folder / "images", "output_dir": out, "use_cpu": True, "max_steps": 1, "logging_steps": 1,
        "per_device_train_batch_size": 16, "save_strategy": "no", "report_to": "none", "check_reference": False,
    }  # fmt: skip
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def idle_seconds(out: Path, cache: Path) -> float:
    """Of the training command, whose work is done."""
    start = time.perf_counter()
    line = [sys.executable, str(ROOT / "llava/train/train_mem.py"), *flags_of(out)]
    settings = environment() | {"DAMA_CACHE_HOME": str(cache)}
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, cwd=CHECKPOINT, env=settings)
    return time.perf_counter() - start


def help_seconds(command: str) -> float:
    """Seconds of one --help call, start of the interpreter included."""
    start = time.perf_counter()
    line = [sys.executable, *command.split(), "--help"]
    subprocess.run(line, check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment())
    return time.perf_counter() - start


if __name__ == "__main__":
    end_on_interrupt()
    main()
