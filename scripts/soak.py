"""Kills a stage with `kill -9` at random moments, starts it again, and compares the end with an undisturbed run's.

Every kill hits the whole process group (launcher and ranks) a random time after a sign of progress: a line in the
log, a new checkpoint folder, a grown file of records. Half of them come within milliseconds of the sign.
"""

from __future__ import annotations

import argparse
import fcntl
import filecmp
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from dama.console import end_on_interrupt, log, report_error
from dama.train.checkpoints import missing_files
from dama.train.provenance import PROVENANCE_FILE
from dama.train.signing import SEAL_FILE

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ROOT / "playground" / "tinycoco" / "weights"
INPUTS = "../inputs"  # as a run's folder sees it
DATA = f"{INPUTS}/data"
OUT, LOG = "out", "log.txt"  # in a run's folder
SAVE_EVERY = 2  # steps of training
LOOK, START_LOOK = 0.001, 0.01  # seconds between two looks at a run's signs, and before its first one
CLOSE = 0.005  # seconds after a sign that still count as the same moment
NOT_COMPARED = {"training_args.bin"}  # has its own folder and time in it
TIME_FIELDS = re.compile(r"^speed/|_runtime$|_per_second$")
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore", "DS_ACCELERATOR": "cpu",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}  # fmt: skip


class Sign(NamedTuple):
    """That a phase began: `kind` of it, and which one."""

    kind: str
    number: int = 0


START = Sign("start")


@dataclass(frozen=True)
class Job:
    """What is killed, started in one folder for its inputs, one for the undisturbed run and one for the killed."""

    prepare: list[list[str]]
    command: list[str]  # writes into OUT
    signs: Callable[[Path], dict[Sign, int]]  # of a run's folder: sign -> time of its file, 0 where it has none
    phases: dict[str, str]  # what goes on after a sign of each kind; the last kind comes once, at the end
    on_disk: Callable[[Path], str]
    continuation: Callable[[Path], str]  # what the log must say once a start has found what is on the disk
    patience: int = 1  # signs of the wanted kind, at most, after which a kill comes


# --------------------------------------------------------------------------------------------------------- the jobs


def jobs(kills: int, ranks: int = 1, port: int = 0) -> dict[str, Job]:
    """The table: inputs large enough for that many kills to find work left."""
    python = sys.executable
    data = ["--image_folder", f"{DATA}/images", "--data", f"{DATA}/pairs.json"]
    llava = str(WEIGHTS / "llava")
    score = [python, "-m", "dama", "hardness", *data, "--clip", str(WEIGHTS / "clip")]
    logps = [python, "-m", "dama", "reference", *data, "--model_name_or_path", llava, "--model_max_length", "512"]
    answer = [python, "-m", "llava.eval.generate", "--model-path", llava, "--question-file", f"{DATA}/questions.jsonl",
              "--image-folder", f"{DATA}/images", "--conv-mode", "v1", "--max-new-tokens", "48"]  # fmt: skip

    rows = [python, "-c", MULTIPLY, "data/pairs.json", "rows.jsonl", str(512 * (kills + 2))]
    check = [python, "-m", "dama", "prepare", f"{INPUTS}/rows.jsonl", "--image_folder", f"{DATA}/images"]

    def scenes(pairs: int, questions: int = 1) -> list[str]:
        sizes = ["--pairs", str(pairs), "--scenes", str(questions)]
        return [python, "-m", "playground.tinycoco", "scenes", "--out", "data", *sizes]

    return {
        "train": Job(
            [scenes(64), [*score, "--out", "hardness"], [*logps, "--out", "reference"], *([BUILD_OPS] * (ranks > 1))],
            train_command(3 * kills, ranks, port),
            training_signs, TRAINING_PHASES, checkpoints_on_disk, continues_from_checkpoint, patience=2,
        ),
        "prepare": stage("prepare", [scenes(64), rows], [*check, "--hold_out", "0.1"]),
        "hardness": stage("hardness", [scenes(min(1500, 64 * (kills + 3)))], score),
        "reference": stage("reference", [scenes(4 * (2 * kills + 4))], [*logps, "--batch_size", "4"]),
        "generate": stage("answers", [scenes(1, 4 * (2 * kills + 4))], [*answer, "--batch-size", "4"]),
    }  # fmt: skip


# Writes argv[3] rows into argv[2]: the pairs of argv[1] again and again, each time with other words.
MULTIPLY = """
import itertools, json, sys
pairs = json.load(open(sys.argv[1]))
with open(sys.argv[2], "w") as file:
    for number, pair in zip(range(int(sys.argv[3])), itertools.cycle(pairs)):
        again = {"idx": str(number), "chosen": f"{pair['chosen']} That is {number}."}
        file.write(json.dumps(pair | again) + chr(10))
"""


def stage(name: str, prepare: list[list[str]], command: list[str]) -> Job:
    """A row for a stage of dama.stage, which writes OUT/name.jsonl and its manifest."""

    def records(folder: Path) -> bytes:
        path = folder / OUT / f"{name}.jsonl"
        return path.read_bytes() if path.is_file() else b""

    def is_complete(folder: Path) -> bool:
        path = folder / OUT / "manifest.json"
        return path.is_file() and json.loads(path.read_bytes())["complete"]

    def signs(folder: Path) -> dict[Sign, int]:
        number = records(folder).count(b"\n")
        return ({Sign("chunk", number): 0} if number else {}) | ({Sign("complete"): 0} if is_complete(folder) else {})

    def on_disk(folder: Path) -> str:
        *whole, rest = records(folder).split(b"\n")
        return f"{len(whole)} records" + (" (the next cut short)" if rest else "")

    def continuation(folder: Path) -> str:
        return "complete in" if is_complete(folder) else "continues at record" if records(folder) else ""

    phases = {"start": "start-up", "chunk": "the chunk after record {}", "complete": "the end"}
    return Job(prepare, [*command, "--out", OUT], signs, phases, on_disk, continuation)


# DeepSpeed compiles its CPU operation at the first start; a kill then would only test the compiler.
BUILD_OPS = [sys.executable, "-c", "from deepspeed.comm.torch import build_shm_op; build_shm_op()"]

TRAINING_PHASES = {
    "start": "start-up",
    "step": "step {}",
    "evaluation": "the evaluation after step {}",
    "save": "the save of checkpoint-{}",
    "rotation": "the removal of those before checkpoint-{}",
    "final": "the save of the final model",
}


def train_command(steps: int, ranks: int, port: int) -> list[str]:
    """As in dama_tiny.sh, smaller, with a held-out evaluation and a checkpoint every other step."""
    script = str(ROOT / "llava" / "train" / "train_mem.py")
    plain = [sys.executable, script]
    zero = ["--deepspeed", str(ROOT / "scripts" / "zero2.json")]
    launched = ["deepspeed", "--quiet", "--num_gpus", str(ranks), "--master_port", str(port), script, *zero]
    every = ["--save_steps", str(SAVE_EVERY), "--eval_steps", str(SAVE_EVERY), "--logging_steps", "1"]
    return [
        *(launched if ranks > 1 else plain), "--task", "DPO", "--use_cpu", "True", "--strategy", "both",
        "--model_name_or_path", str(WEIGHTS / "llava"), "--version", "v1", "--model_max_length", "512",
        "--data_path", f"{DATA}/pairs.json", "--image_folder", f"{DATA}/images",
        "--hardness", f"{INPUTS}/hardness", "--reference", f"{INPUTS}/reference", "--eval_pairs", "8",
        "--learning_rate", "2e-5", "--max_steps", str(steps), "--per_device_train_batch_size", str(8 // ranks),
        "--save_strategy", "steps", "--eval_strategy", "steps", *every, "--save_total_limit", "1",
        "--metric_for_best_model", "eval_loss", "--output_dir", OUT,
    ]  # fmt: skip


def training_signs(folder: Path) -> dict[Sign, int]:
    """Signs of a training's folder with their file times in ns; 0 where a log line is the only trace."""
    log, out = folder / LOG, folder / OUT
    text = log.read_text(errors="replace") if log.is_file() else ""
    done = [int(step) for step in re.findall(r"step +(\d+) training:", text)]
    signs = {Sign("step", n + 1) if n % SAVE_EVERY else Sign("evaluation", n): 0 for n in done}
    # Not out.glob: the trial save makes and removes the folder while this looks.
    for checkpoint in (out / name for name in files_in(out) if re.fullmatch(r"checkpoint-\d+", name)):
        number = int(checkpoint.name.rpartition("-")[2])
        # A folder that a kill left is written anew: its newest file tells when.
        signs[Sign("save", number)] = max((stamp(checkpoint / name) for name in files_in(checkpoint)), default=0)
        if ended := stamp(checkpoint / "trainer_state.json"):
            signs[Sign("rotation", number)] = ended
    model = max(stamp(out / name) for name in ("model.safetensors", "adapter_model.safetensors", "mm_projector.bin"))
    ends = {Sign("final"): model, Sign("done"): stamp(out / PROVENANCE_FILE)}
    return signs | {sign: written for sign, written in ends.items() if written}


def stamp(path: Path) -> int:
    """When a file was written last, in nanoseconds; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def files_in(folder: Path) -> list[str]:
    """Names in a folder; none if it does not exist."""
    try:
        return os.listdir(folder)
    except FileNotFoundError:  # removed since it was seen
        return []


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders of the output folder, by step."""
    return sorted((folder / OUT).glob("checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))


def checkpoints_on_disk(folder: Path) -> str:
    """Names of the checkpoints for a log line, incomplete ones marked."""
    marks = [path.name + (" (cut short)" if missing_files(path) else "") for path in checkpoints(folder)]
    return ", ".join(marks) or "no checkpoint"


def continues_from_checkpoint(folder: Path) -> str:
    """Text that a resumed training must log; empty without a complete checkpoint."""
    whole = [path.name for path in checkpoints(folder) if not missing_files(path)]
    return f"continuing from {OUT}/{whole[-1]}\n" if whole else ""


# -------------------------------------------------------------------------------------------------------- one start


class SoakError(Exception):
    """The job did not do what it should have done under kills."""


class Run:
    """A command in a process group of its own, and the signs that it has given since its start.

    Use it in a `with` block: whatever happens in it, nothing of the group is left after it.
    """

    def __init__(self, job: Job, folder: Path) -> None:
        self.job, self.folder = job, folder
        (folder / LOG).unlink(missing_ok=True)
        self._before, self._continuation = job.signs(folder), job.continuation(folder)
        self.signs: list[tuple[float, Sign]] = [(0.0, START)]  # seconds since the start
        self._began = time.monotonic()
        with open(folder / LOG, "wb") as log:
            fcntl.flock(log, fcntl.LOCK_EX)  # until the last process that writes to it has ended
            self.process = subprocess.Popen(
                job.command, cwd=folder, env=os.environ | ENVIRONMENT, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    @property
    def seconds(self) -> float:
        """Seconds since the command started."""
        return time.monotonic() - self._began

    def wait_for(self, kind: str | None, count: int = 1, limit: float = 3600.0) -> Sign | None:
        """The `count`-th sign of that kind since the start; None when the command has ended before.

        Raises SoakError where it ended with an error, has not ended after `limit` seconds, or began anew although there
        was something to continue from.
        """
        while True:
            ended = self.process.poll() is not None
            self._look()
            found = [sign for _, sign in self.signs if sign.kind == kind]
            if len(found) >= count or (ended and self.process.returncode == 0):
                if self._continuation not in self.log() and (ended or len(self.signs) > 1):
                    raise SoakError(f"expected a line {self._continuation!r} in the log:\n{self.log()[-3000:]}")
                return None if len(found) < count else found[count - 1]
            if ended or self.seconds > limit:
                what = f"ended with exit code {self.process.returncode}" if ended else f"hung for {limit:g} s"
                raise SoakError(f"the command {what}; the end of its log:\n{self.log()[-3000:]}")
            time.sleep(START_LOOK if len(self.signs) == 1 else LOOK)

    def linger(self, delay: float) -> float:
        """Lets so many seconds of the phase pass that began last, or all of it; returns how many passed."""
        count, began = len(self.signs), self.signs[-1][0]
        while self.seconds < began + delay and len(self.signs) == count and self.process.poll() is None:
            time.sleep(LOOK)
            self._look()
        return self.seconds - began

    def _look(self) -> None:
        known = {sign for _, sign in self.signs}
        now = self.job.signs(self.folder)
        fresh = [sign for sign in now if sign not in known and now[sign] > self._before.get(sign, -1)]
        self.signs += [(self.seconds, sign) for sign in fresh]

    def kill(self) -> None:
        """Send SIGKILL to the whole group; return when none of it is left, nor anybody who writes to the log."""
        if group := members(self.process.pid):
            os.killpg(self.process.pid, signal.SIGKILL)
        while group:
            time.sleep(LOOK)
            group = members(self.process.pid)
        self.process.wait()
        with open(self.folder / LOG, "rb") as log:
            fcntl.flock(log, fcntl.LOCK_SH)

    def log(self) -> str:
        """Output of the command so far."""
        return (self.folder / LOG).read_text(errors="replace")


def members(group: int) -> list[int]:
    """Processes of a group that still live; those that only wait to be buried do not count."""
    return [process.pid for process in psutil.process_iter() if _belongs(process, group)]


def _belongs(process: psutil.Process, group: int) -> bool:
    try:
        return os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False


# ------------------------------------------------------------------------------------------------------------ kills


def plan_kills(phases: Sequence[str], kills: int, draw: random.Random) -> list[str]:
    """The kind of sign that each kill waits for: all about equally often, in random order, the end's once and last."""
    *during, end = phases
    kinds = [during[i % len(during)] for i in range(kills - 1)]
    draw.shuffle(kinds)
    return [*kinds, end]


def typical_gaps(signs: Sequence[tuple[float, Sign]], end: float) -> dict[str, float]:
    """Seconds from a sign of each kind to the next sign, the median of an undisturbed run that ended at `end`."""
    times = [*(at for at, _ in signs), end]
    gaps: dict[str, list[float]] = {}
    for (at, sign), after in zip(signs, times[1:]):
        gaps.setdefault(sign.kind, []).append(after - at)
    return {kind: statistics.median(values) for kind, values in gaps.items()}


def kill_once(job: Job, folder: Path, kind: str, gap: float, draw: random.Random, limit: float) -> str | None:
    """Starts the job and kills it in that phase; says when and what it left. None where the job ended before."""
    _, *repeated, _ = job.phases
    count = draw.randint(1, job.patience) if kind in repeated else 1
    delay = draw.uniform(0, gap if kind == START.kind or draw.random() < 0.5 else min(CLOSE, gap))
    with Run(job, folder) as run:
        sign = run.wait_for(kind, count, limit)
        passed = run.linger(delay)
        if sign is None or run.process.poll() is not None:
            return None
        seconds = run.seconds
    phase = job.phases[kind].format(sign.number)
    return f"at {seconds:5.1f} s, {1000 * passed:6.1f} ms into {phase}; on disk: {job.on_disk(folder)}"


# ------------------------------------------------------------------------------------------------------- comparison


def results(out: Path) -> dict[str, Path]:
    """The files that count, by relative name: no temporary ones, and none of a checkpoint that is not whole."""
    cut_short = {path for path in out.glob("checkpoint-*") if missing_files(path)}
    return {
        path.relative_to(out).as_posix(): path
        for path in sorted(out.rglob("*"))
        if path.is_file() and path.name not in NOT_COMPARED and not path.name.startswith(".")
        if not cut_short.intersection(path.parents)
    }


def compare(one: Path, other: Path) -> tuple[int, list[str]]:
    """(files compared, what differs): bytes, or JSON without its time fields where a file has such."""
    mine, theirs = results(one), results(other)
    differences = [f"{name}: only in {one if name in mine else other}" for name in sorted(mine.keys() ^ theirs.keys())]
    both = sorted(mine.keys() & theirs.keys())
    return len(both), differences + [f"{name}: differs" for name in both if not same(mine[name], theirs[name])]


def same(one: Path, other: Path) -> bool:
    """Whether two files have equal content, fields aside that name times or paths."""
    if one.name == SEAL_FILE:  # has the digests of files that are not compared, or not byte by byte
        return unsigned(json.loads(one.read_text())) == unsigned(json.loads(other.read_text()))
    if one.name not in ("trainer_state.json", "manifest.json", "adapter_config.json"):
        return filecmp.cmp(one, other, shallow=False)
    return comparable(json.loads(one.read_text())) == comparable(json.loads(other.read_text()))


def unsigned(seal: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's seal without digests and signature."""
    return {name: value for name, value in seal.items() if name not in ("sha256", "signature")}


def comparable(value: Any, field: str = "") -> Any:
    """JSON without the fields that depend on time, and with PEFT's set of modules, written as it comes, in order."""
    if isinstance(value, dict):
        return {k: comparable(v, k) for k, v in value.items() if k != "time" and not TIME_FIELDS.search(k)}
    if isinstance(value, list):
        return sorted(value) if field == "target_modules" else [comparable(item) for item in value]
    return value


# ----------------------------------------------------------------------------------------------------- the whole way


def soak(job: Job, work: Path, kills: int, seed: int) -> str:
    """Prepares, runs undisturbed, kills, compares; returns the good verdict. Raises SoakError."""
    draw = random.Random(seed)
    inputs, undisturbed, killed = (make_folder(work / name) for name in ("inputs", "undisturbed", "killed"))
    for command in job.prepare:
        done = subprocess.run(command, cwd=inputs, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
        if done.returncode:
            raise SoakError(f"{' '.join(command)}\n{done.stdout[-1500:]}{done.stderr[-1500:]}")
    with Run(job, undisturbed) as whole:
        whole.wait_for(None)
    gaps, limit = typical_gaps(whole.signs, whole.seconds), 60 + 10 * round(whole.seconds)
    log(f"undisturbed: {whole.seconds:.1f} s, {len(whole.signs)} signs of progress")
    if silent := ", ".join(kind for kind in job.phases if kind not in gaps):
        raise SoakError(f"the undisturbed run gave no sign of {silent}; the end of its log:\n{whole.log()[-3000:]}")
    plan, cut_short = plan_kills(list(job.phases), kills, draw), 0
    for number, kind in enumerate(plan, 1):
        remove_stale_locks(work)
        told = kill_once(job, killed, kind, gaps[kind], draw, limit)
        if told is None and number < kills:
            raise SoakError(f"the job had ended before kill {number} of {kills}: nothing was left to hit")
        log(f"kill {number:>2}/{kills} {told or 'came too late: the job had just ended'}")
        cut_short += "cut short" in (told or "")
    remove_stale_locks(work)
    with Run(job, killed) as last:
        last.wait_for(None, limit=limit)
    files, differences = compare(undisturbed / OUT, killed / OUT)
    if differences:
        raise SoakError("\n".join([f"{len(differences)} of {files} files differ:", *differences]))
    hit = ", ".join(f"{plan.count(kind)} {kind}" for kind in job.phases)
    return f"{kills} kills ({hit}; {cut_short} left something cut short): {files} files as undisturbed, bit by bit"


def make_folder(path: Path) -> Path:
    """Create a new folder with its parents. Raises FileExistsError."""
    path.mkdir(parents=True)
    return path


def free_port() -> int:
    """A TCP port of the loopback interface that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def remove_shared_memory(port: int) -> None:
    """DeepSpeed on CPUs leaves 66 MB a rank behind, named by the port, where a run is killed before its first step."""
    for buffer in Path("/dev/shm").glob(f"deepspeed_*_{port}_*"):
        buffer.unlink()


def remove_stale_locks(work: Path) -> None:
    """Torch's extension loader waits for ever on the lock of a process that was killed while it held it."""
    for lock in (work / "extensions").glob("*/lock"):
        lock.unlink()
        log(f"removed {lock.name} of {lock.parent.name}, which a killed start held")


def build_parser() -> argparse.ArgumentParser:
    """Parser of the soak test; unknown flags belong to the command that is killed."""
    parser = argparse.ArgumentParser(prog="soak.sh", description=__doc__)
    parser.add_argument("job", choices=sorted(jobs(1)), help="what is killed; further flags go to its command")
    parser.add_argument("--kills", type=int, default=20, help="how often (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (default: %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="train: 1 is without DeepSpeed (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "soak", help="scratch (default: %(default)s)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Kill one job again and again; return 1 where it did not continue properly, 2 after an error."""
    args, further = build_parser().parse_known_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f"{args.job}-", dir=args.work))
    ENVIRONMENT["TORCH_EXTENSIONS_DIR"] = str(work / "extensions")
    port = free_port()
    job = jobs(args.kills, args.ranks, port)[args.job]
    job.command.extend(further)
    try:
        verdict = soak(job, work, args.kills, args.seed)
    except SoakError as error:
        log(f"soak {args.job}: FAILED, seed {args.seed}: {error}\n(everything is kept in {work})")
        return 1
    except Exception as error:
        report_error(error, "soak")
        return 2
    finally:
        remove_shared_memory(port)
    shutil.rmtree(work)
    log(f"soak {args.job}: PASSED, seed {args.seed}: {verdict}")
    return 0


if __name__ == "__main__":
    end_on_interrupt()
    sys.exit(main())
