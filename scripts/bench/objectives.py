"""Time and memory of a step, forward and backward, of each pattern of views: packed, and each answer in its own row.

pair            (m: w, l)                    dpo and all objectives on one image
second image    (m: w, l) (m': w)            mdpo, adavip, opa
visual weights  (m: w, l) (m': w, l)         --token_weights visual
symmetric       (m: w, l, w2) (m': w, w2)    symmpo

Every measurement runs in a fresh process, all of one process tree; the ways take turns. Random weights, all but the
tower trained, no optimizer, no activation checkpointing. What packing saves is set beside the tokens and the FLOPs that
it saves: fewer than of the tokens, because every answer token needs its logits either way. In the small model, whose
output layer is larger than its decoder, that is much of the work; at 7b nearly nothing.

    python scripts/bench/objectives.py                     # a small model on one CPU thread, about 5 minutes
    python scripts/bench/objectives.py --shape 7b          # LLaVA-v1.5-7B's shape in bf16 on a GPU
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from dpo_step import Measured, Settings, Step, in_a_process, llava
from measure import (
    SHAPES,
    SPECIAL_TOKENS,
    PeakMemory,
    Shape,
    Spread,
    random_images,
    random_pairs,
    reject_flags,
    time_of,
    write_checkpoint,
)
from tqdm import tqdm

from dama.console import end_on_interrupt, log, write_json
from dama.losses import Loss, ViewLogps
from dama.shared_prefix import PackedGroup
from dama.token_weights import TokenWeights
from dama.train.data import ImageChoice
from dama.train.family import PreparedPair, group_lengths, shown_images
from dama.train.throughput import ModelSize, forward_flops
from dama.views import View, ordered
from llava.train.dpo_data import PairCollator
from llava.train.preprocess import EncodedTurns

SECOND_TOKENS = 115  # of the second image's own answer, at the shape with answers of 120 and 110 tokens
TARGET = 0.85  # share of the saved tokens that should be saved in time
PATTERNS: dict[str, tuple[View, ...]] = {
    "pair": Loss.parse(["dpo"]).views,
    "second image": Loss.parse(["mdpo"]).views,
    "visual weights": ordered(TokenWeights("visual").views),
    "symmetric": Loss.parse(["symmpo"]).views,
}
LOSS_OF = {"pair": "dpo", "second image": "mdpo", "visual weights": "dpo", "symmetric": "symmpo"}
WAYS = {"packed": True, "apart": False}


@dataclass(frozen=True)
class Saved:
    """What packing saves of a pattern: apart over packed."""

    tokens: tuple[int, int]  # of a pair: packed, apart
    flops: float
    time: Spread
    memory: Spread
    logps: float  # largest relative difference of mean log-probs

    @property
    def token_ratio(self) -> float:
        """Tokens apart over tokens packed."""
        return self.tokens[1] / self.tokens[0]


# --- One measurement -------------------------------------------------------------------------------------------------


def pairs_of(shape: Shape, views: tuple[View, ...], count: int) -> list[PreparedPair]:
    """Random pairs with a row for each view; the corrupted image is another one."""
    generator = torch.Generator().manual_seed(3)
    second = max(1, round(SECOND_TOKENS * shape.pair.chosen / 120))
    choice = ImageChoice(views, "blank")
    found = []
    for item in random_pairs(shape, count):
        prefix = item.chosen.input_ids[: item.chosen.unsupervised]
        ids = torch.randint(SPECIAL_TOKENS, shape.vocabulary, (second,), generator=generator)
        rows = {
            "chosen": item.chosen,
            "rejected": item.rejected,
            "second": EncodedTurns(torch.cat([prefix, ids]), torch.cat([torch.full_like(prefix, -100), ids])),
        }
        own = tuple(rows[view.answer] for view in views)
        found.append(replace(item, rows=own, images=choice.images(item.pair), reference=(0.0,) * len(views)))
    return found


def tokens_of(shape: Shape, views: tuple[View, ...]) -> tuple[int, int]:
    """Tokens of one pair with images included: packed, and in rows of their own."""
    (item,) = pairs_of(shape, views, 1)

    def tokens(ids: int) -> int:
        return ids - 1 + shape.patches

    packed: tuple[PackedGroup, ...] = group_lengths(item.rows, views, tokens)
    return sum(group.positions for group in packed), sum(tokens(len(row.input_ids)) for row in item.rows)


def flops_saved(shape: Shape, views: tuple[View, ...]) -> float:
    """FLOPs of one pair in rows of its own over those of it packed, encoding images left out."""
    (item,) = pairs_of(shape, views, 1)
    layer = (4 * shape.width + 3 * shape.intermediate) * shape.width
    output, attention = shape.width * shape.vocabulary, shape.layers * shape.width
    size = ModelSize(shape.layers * layer, output, attention, tower=0, projector=0, patches=0)
    packed: tuple[PackedGroup, ...] = group_lengths(item.rows, views, lambda ids: ids - 1 + shape.patches)
    apart = [PackedGroup(group.prefix, (answer,)) for group in packed for answer in group.answers]
    return forward_flops(size, apart) / forward_flops(size, packed)


def step_of(settings: Settings, pattern: str, packed: bool) -> tuple[Any, Step]:
    """A model and its step: log-probs of all views, the pattern's loss, and its gradients."""
    from llava.model.attention import SHARED_PREFIX

    model, views = llava(settings, SHARED_PREFIX), PATTERNS[pattern]
    items = pairs_of(settings.shape, views, settings.pairs)
    plan = PairCollator(settings.shape.patches, packed, views)(items)["plan"].to(settings.device)
    images = random_images(settings.shape, len(shown_images(items))).to(settings.device, settings.dtype)
    loss, beta = Loss.parse([LOSS_OF[pattern]]), torch.full((settings.pairs,), 0.1, device=settings.device)

    def step() -> torch.Tensor:
        sums = model(plan=plan, images=images, logp_chunk=1024)
        policy, tokens = sums.logps.view(len(views), -1), sums.tokens.view(len(views), -1)
        (loss(ViewLogps(views, policy, policy.detach(), tokens), beta).mean() + 0 * policy.sum()).backward()
        return sums.logps.detach()

    return model, step


def measure(settings: Settings, pattern: str, way: str) -> Measured | None:
    """Steps of one pattern, after a first one that warms up; None where the memory does not suffice."""
    try:
        model, step = step_of(settings, pattern, WAYS[way])
        memory = PeakMemory(settings.device)
        logps = step().tolist()
        times = []
        for _ in range(settings.steps):
            model.zero_grad(set_to_none=True)
            times.append(time_of(step, settings.device))
        return Measured(times, memory.before, memory.bytes, logps)
    except torch.OutOfMemoryError:
        return None


def prepare(settings: Settings) -> None:
    """Write the checkpoint that every measurement loads."""
    write_checkpoint(settings.folder, settings.shape, settings.device, settings.dtype)


# --- The report ------------------------------------------------------------------------------------------------------


def saved_by(settings: Settings, pattern: str, runs: dict[str, list[Measured]]) -> Saved:
    """Apart over packed, turn by turn."""
    turns = list(zip(runs["apart"], runs["packed"], strict=True))

    def seconds(run: Measured) -> float:
        return statistics.median(timed.on(settings.device) for timed in run.times)

    means = [torch.tensor(runs[way][0].logps).view(len(PATTERNS[pattern]), -1).mean(1) for way in WAYS]
    return Saved(
        tokens_of(settings.shape, PATTERNS[pattern]),
        flops_saved(settings.shape, PATTERNS[pattern]),
        Spread.of([seconds(apart) / seconds(packed) for apart, packed in turns]),
        Spread.of([apart.peak / packed.peak for apart, packed in turns]),
        float(((means[0] - means[1]) / means[1]).abs().max()),
    )


def describe(pattern: str, saved: Saved) -> str:
    """A line of the table."""
    packed, apart = saved.tokens
    share = saved.time.median / saved.token_ratio
    return (
        f"{pattern:<15}{packed:>8,}{apart:>8,}{saved.token_ratio:>8.2f}{saved.flops:>7.2f}{str(saved.time):>24}{share:>8.0%}"
        f"{str(saved.memory):>24}{saved.logps:>10.1e}"
    )


def main() -> None:
    """Measure every pattern packed and apart in turn and print what packing saves."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench_objectives_") as folder:
        settings = Settings(Path(folder), SHAPES[args.shape], args.pairs, args.threads, args.steps)
        device = torch.cuda.get_device_name() if settings.device.type == "cuda" else f"{args.threads} CPU thread(s)"
        log(f"shape {args.shape}: {args.pairs} pair(s), {device}; {args.repeats} times {args.steps} steps of each way "
            "in turn: medians (smallest to largest)")  # fmt: skip
        in_a_process(settings, prepare)
        runs: dict[str, dict[str, list[Measured | None]]] = {p: {way: [] for way in WAYS} for p in args.patterns}
        for _ in tqdm(range(args.repeats), unit="repeat", desc="the ways in turn"):
            for pattern in args.patterns:
                for way in WAYS:
                    runs[pattern][way].append(in_a_process(settings, measure, pattern, way))
    log(
        f"{'views':<15}{'packed':>8}{'apart':>8}{'tokens':>8}{'FLOPs':>7}{'time':>24}{'share':>8}{'memory':>24}{'log-probs':>10}"
    )
    figures: dict[str, Saved] = {}
    for pattern, of_pattern in runs.items():
        fitting = {way: [run for run in of_way if run] for way, of_way in of_pattern.items() if all(of_way)}
        if len(fitting) < len(WAYS):
            log(f"{pattern:<15} does not fit into the memory: {', '.join(way for way in WAYS if way not in fitting)}")
            continue
        figures[pattern] = saved_by(settings, pattern, fitting)
        log(describe(pattern, figures[pattern]))
    below = [p for p, saved in figures.items() if saved.time.median < TARGET * saved.token_ratio]
    log(f"below {TARGET:.0%} of the saved tokens: {', '.join(below) or 'none'}")
    if args.json:
        found = {p: asdict(saved) | {"token_ratio": saved.token_ratio} for p, saved in figures.items()}
        write_json(args.json, {"shape": args.shape, "pairs": args.pairs, "patterns": found})


def parse_arguments() -> argparse.Namespace:
    """Flags; counts below 1 are refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu", help="sizes of the model. Default: %(default)s")
    parser.add_argument("--pairs", type=int, default=1, metavar="N", help="pairs in a step. Default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads. Default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of every way. Default: %(default)s")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="timed steps a turn. Default: %(default)s")
    parser.add_argument(
        "--patterns", nargs="+", choices=PATTERNS, default=[*PATTERNS], help="what to measure. Default: all four"
    )
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the checkpoint (28 GB for 7b) may lie for "
                        "the time being. Default: the system's")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures")
    args = parser.parse_args()
    reject_flags(parser, args, ("pairs", "threads", "repeats", "steps"))
    return args


if __name__ == "__main__":
    end_on_interrupt()
    main()
