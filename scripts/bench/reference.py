"""How the reference stage, or a training step, scales: its time against the number of pairs and their lengths.

Next to each time stand the number of distinct tokens and the ratio to the floor: the FLOPs of the distinct tokens at
the speed of a large matrix product, measured here. With the shared prefix and without, in turn; random weights.

    python scripts/bench/reference.py                    # a small model on one CPU thread, about 4 minutes
    python scripts/bench/reference.py --step             # forward and backward of a training step, about 15 minutes
    python scripts/bench/reference.py --shape 7b         # LLaVA-v1.5-7B's shape in bf16 on a GPU
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from accelerate.utils import send_to_device
from measure import (
    SHAPES,
    Shape,
    Spread,
    matmul_rate,
    random_images,
    random_pairs,
    reject_flags,
    time_of,
    write_checkpoint,
)
from tqdm import tqdm

from dama.console import end_on_interrupt, log, write_json
from dama.losses import Loss
from dama.train.reference import plan_batches
from dama.train.throughput import PairLength, forward_flops
from llava.estimate.one_batch import first_loss
from llava.model.attention import SHARED_PREFIX
from llava.model.builder import load_llava
from llava.train.dpo_data import PairCollator
from llava.train.family import size_of

PAIRS, ANSWERS, PREFIX = (0.5, 1, 2, 4), (0.25, 0.5, 1, 2), (1, 1.25, 1.5, 2)  # multiples of the shape's own
LINE = "{:<8}{:>6}{:>8}{:>11}{:>8}{:>31}{:>15}{:>9}{:>31}"


@dataclass(frozen=True)
class Case:
    """What is computed for one row of the table."""

    varied: str
    pairs: int
    length: PairLength

    @property
    def tokens(self) -> int:
        """Distinct positions of the language model's input."""
        return self.pairs * self.length.tokens


@dataclass(frozen=True)
class Row:
    """A case, its floor, and the times with the shared prefix and without, in seconds."""

    case: Case
    floor: float
    shared: list[float]
    plain: list[float]


def cases(shape: Shape, pairs: int) -> list[Case]:
    """One length varied at a time, the others as in the shape."""
    base = shape.pair

    def times(factor: float, length: int) -> int:
        return max(1, round(factor * length))

    def answers(factor: float) -> PairLength:
        return PairLength.of(base.prefix, times(factor, base.chosen), times(factor, base.rejected))

    def prefix(factor: float) -> PairLength:
        return PairLength.of(times(factor, base.prefix), base.chosen, base.rejected)

    varied = [Case("pairs", times(factor, pairs), base) for factor in PAIRS]
    varied += [Case("answers", pairs, answers(factor)) for factor in ANSWERS]
    return varied + [Case("prefix", pairs, prefix(factor)) for factor in PREFIX]


def work(model: Any, shape: Shape, case: Case, args: argparse.Namespace, shared_prefix: bool) -> Callable[[], None]:
    """The stage's work on pairs whose images are read already: batches, tower, one pass, log-probs.

    Of a training step the same with gradients: micro-batches forward and backward, without optimizer.
    """
    collate = PairCollator(model.get_vision_tower().tokens_per_image, shared_prefix)
    settings = SimpleNamespace(
        device=model.device, logp_chunk=1024, dpo_beta=0.1, preference_loss=lambda: Loss.parse(["dpo"])
    )
    batches = plan_batches(random_pairs(replace(shape, pair=case.length), case.pairs), args.batch_size)
    images = random_images(shape, args.batch_size)

    def run() -> None:
        for items in batches:
            batch = send_to_device(collate(items) | {"images": images[: len(items)]}, model.device)
            if args.step:
                first_loss(model, batch, settings).backward()
            else:
                with torch.no_grad():
                    model(**batch, logp_chunk=settings.logp_chunk).logps.tolist()

    return run


def measure(model: Any, shape: Shape, case: Case, rate: float, args: argparse.Namespace) -> Row:
    """Time a case with shared and with plain prefixes in turn, after one warm-up of each."""
    size = size_of(model)
    passes = 3 if args.step else 1
    flops = case.pairs * (passes * forward_flops(size, case.length.groups) + 2 * size.tower * size.patches)
    shared, plain = (work(model, shape, case, args, way) for way in (True, False))
    shared(), plain()
    times = [[time_of(way, model.device).on(model.device) for way in (shared, plain)] for _ in range(args.repeats)]
    return Row(case, flops / rate, *map(list, zip(*times)))


def load(shape: Shape, device: torch.device) -> Any:
    """A random model as the stage loads it."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory(prefix="bench_reference_") as folder:
        write_checkpoint(Path(folder), shape, device, dtype)
        model = load_llava(folder, dtype=dtype, attn_implementation=SHARED_PREFIX)
        model.get_model().load_vision_tower(dtype=dtype)
        return model.to(device).eval()  # nothing in it is random in training either


def main() -> None:
    """Measure every case and print one line for each."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    shape = SHAPES[args.shape]
    model = load(shape, device)
    rate = matmul_rate(device, model.dtype)
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{args.threads} CPU thread(s)"
    what = "training step" if args.step else "reference stage"
    log(
        f"{what}, shape {args.shape}, {str(model.dtype).removeprefix('torch.')}, {name}: matrix products at "
        f"{rate / 1e9:.0f} GFLOP/s; batches of {args.batch_size}; {'' if device.type == 'cuda' else 'processor '}"
        f"seconds, medians (smallest to largest) of {args.repeats}"
    )
    rows = [measure(model, shape, case, rate, args) for case in tqdm(cases(shape, args.pairs), unit="case")]
    log(LINE.format("", "pairs", "prefix", "answers", "tokens", "shared", "/ 1000 tokens", "/ floor", "plain / shared"))
    for row in rows:
        log(describe(row))
    if args.json:
        write_json(args.json, {"shape": args.shape, "flops_per_second": rate, "rows": [asdict(row) for row in rows]})


def describe(row: Row) -> str:
    """Row of the table."""
    case, time = row.case, Spread.of(row.shared)
    return LINE.format(
        case.varied, case.pairs, case.length.prefix, f"{case.length.chosen} + {case.length.rejected}", case.tokens,
        str(time), f"{1000 * time.median / case.tokens:.3g}", f"{time.median / row.floor:.2f}",
        str(Spread.of([plain / shared for plain, shared in zip(row.plain, row.shared, strict=True)])),
    )  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    """Flags; counts below 1 are refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--step", action="store_true", help="a training step instead of the reference stage")
    parser.add_argument("--shape", choices=SHAPES, default="cpu", help="sizes of the model. Default: %(default)s")
    parser.add_argument(
        "--pairs", type=int, default=4, metavar="N", help="pairs, where not varied. Default: %(default)s"
    )
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="pairs at a time. Default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads. Default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of both ways. Default: %(default)s")
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures: seconds, tokens, FLOP/s")
    args = parser.parse_args()
    reject_flags(parser, args, ("pairs", "batch_size", "threads", "repeats"))
    return args


if __name__ == "__main__":
    end_on_interrupt()
    main()
