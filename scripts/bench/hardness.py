r"""Pairs and images a second of the hardness stage against the direct loop, and where the difference comes from.

The direct loop takes one pair at a time, encodes the image for each answer, and reads every statement at CLIP's full
context. Both get the same work in turn: other crops of photographs, 1.7 pairs an image as in RLAIF-V, no statement
twice, random weights. Beside the clock's time stands the processor's, which other programs hardly change, as long as
threads do not wait by spinning.

    GOMP_SPINCOUNT=0 python scripts/bench/hardness.py --photos FOLDER           # ViT-B-32 on 2 cores, about 5 minutes
    python scripts/bench/hardness.py --photos FOLDER --clip ViT-L-14-336-quickgelu --precision bf16 --device cuda \
        --images 2048 --batch_size 64 --workers 16 --rounds 1
"""

from __future__ import annotations

import argparse
import random
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from measure import Spread, synchronise
from PIL import Image
from tqdm import tqdm

from dama.console import end_on_interrupt, log
from dama.hardness import score
from dama.hardness.clip import ClipScorer, load_clip
from dama.hardness.score import ChunkSplitter, hardness_delta, load_hardness, run_hardness
from dama.hardness.split import split_statements
from dama.pairs import PreferencePair, distinct_images

PAIRS_PER_IMAGE = 1.7
STATEMENTS = (3, 6)  # of an answer, the fewest and the most; RLAIF-V's answers mostly have as many
SENTENCES = (
    "A {} {} is standing next to the {} {} on the {} side of the picture.",
    "The {} {} appears to be placed right behind a {} {} near the {} corner.",
    "There are several {} {}s and one {} {} visible in the {} part of the scene.",
    "In the background, a {} {} can be seen above the {} {} towards the {} edge.",
)
ADJECTIVES = "red blue green wooden small large old bright striped dark round metal yellow white black broken".split()  # noqa: SIM905
NOUNS = "dog car table bench woman bicycle umbrella sign bottle chair tree boat clock window truck horse".split()  # noqa: SIM905
PLACES = "left right upper lower front far near inner outer sunny".split()  # noqa: SIM905


class Seconds(NamedTuple):
    """Duration of one measurement."""

    clock: float
    processor: float  # of all threads and of the processes that decoded


class Setting(NamedTuple):
    """What both ways are given."""

    pairs: list[PreferencePair]
    folder: Path
    scorer: ClipScorer
    batch_size: int
    workers: int


def main() -> None:
    """Time both ways in turn on crops of --photos and print the table."""
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    photos = sorted(path for path in args.photos.iterdir() if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    if not photos:
        sys.exit(f"--photos {args.photos}: no .jpg or .png in it")
    scorer = load_clip(args.clip, "random", args.device, args.precision)
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench_hardness_") as scratch:
        folder = Path(scratch)
        write_crops(photos, folder, args.images)
        setting = Setting(make_pairs(args.images), folder, scorer, args.batch_size, args.workers)
        report(setting, args.rounds, folder)
        if scorer.device.type == "cuda":
            report_waiting(setting, folder / "waiting")


def parse_arguments() -> argparse.Namespace:
    """Flags of the measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True, help="folder of photographs to crop")
    parser.add_argument("--clip", default="ViT-B-32", help="open_clip architecture (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="default: %(default)s")
    parser.add_argument("--images", type=int, default=40, help="distinct pictures (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of both ways in turn (default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=2, help="decoding processes (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="of torch on the CPU (default: %(default)s)")
    parser.add_argument("--scratch", type=Path, help="folder for what is made (default: the system's)")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------------------------- work


def write_crops(photos: Sequence[Path], folder: Path, count: int) -> None:
    """Another part of a photograph for each image, between two thirds of its sides and all, as a JPEG."""
    rng = random.Random(0)
    for number in range(count):
        with Image.open(photos[number % len(photos)]) as photo:
            width, height = (round(side * rng.uniform(2 / 3, 1)) for side in photo.size)
            left, top = rng.randint(0, photo.width - width), rng.randint(0, photo.height - height)
            crop = photo.convert("RGB").crop((left, top, left + width, top + height))
        crop.save(folder / f"{number}.jpg", quality=90)


def make_pairs(images: int) -> list[PreferencePair]:
    """1.7 pairs for each image, their answers of statements that occur nowhere else."""
    rng, said = random.Random(1), set()

    def statement() -> str:
        while True:
            a, b = rng.choices(ADJECTIVES, k=2)
            n, m = rng.sample(NOUNS, 2)
            text = rng.choice(SENTENCES).format(a, n, b, m, rng.choice(PLACES))
            if text not in said:
                said.add(text)
                return text

    def answer() -> str:
        return " ".join(statement() for _ in range(rng.randint(*STATEMENTS)))

    count = round(PAIRS_PER_IMAGE * images)
    return [PreferencePair(str(n), f"{n % images}.jpg", "What is it?", answer(), answer()) for n in range(count)]


# ------------------------------------------------------------------------------------------------------------- ways


@contextmanager
def timed(seconds: list[Seconds], device: torch.device) -> Iterator[None]:
    """Adds the time of what runs inside, on a GPU until it is done."""

    def now() -> Seconds:
        synchronise(device)
        used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
        return Seconds(time.perf_counter(), sum(usage.ru_utime + usage.ru_stime for usage in used))

    before = now()
    yield
    after = now()
    seconds.append(Seconds(after.clock - before.clock, after.processor - before.processor))


def direct(setting: Setting, parts: dict[str, list[Seconds]]) -> dict[str, float]:
    """Delta of each pair by open_clip's own functions, as one would write it down; `parts` gets their times."""
    model, scorer, device = setting.scorer.model, setting.scorer, setting.scorer.device
    deltas = {}
    for pair in tqdm(setting.pairs, "direct loop", unit="pair", leave=False):
        sums = []
        for answer in (pair.chosen, pair.rejected):
            with timed(parts["split, tokenise"], device):
                ids = scorer.tokens.tokenizer(split_statements(answer))
            with timed(parts["decode"], device):
                picture = scorer.preprocess(Image.open(setting.folder / pair.image).convert("RGB"))[None]
            with timed(parts["image encoder"], device), torch.inference_mode():
                image = model.encode_image(picture.to(device, dtype(scorer)), normalize=True)  # type: ignore[operator]
            with timed(parts["text encoder"], device), torch.inference_mode():
                texts = model.encode_text(ids.to(device), normalize=True)  # type: ignore[operator]
            sums.append((texts.float() @ image[0].float()).tolist())
        deltas[pair.id] = hardness_delta(*sums)
    return deltas


def ours(setting: Setting, out: Path) -> dict[str, float]:
    """Delta of each pair by the hardness stage, written to `out`."""
    run_hardness(
        setting.pairs, setting.folder, out, setting.scorer,
        batch_size=setting.batch_size, workers=setting.workers, progress=False,
    )  # fmt: skip
    return load_hardness(out).delta


def dtype(scorer: ClipScorer) -> torch.dtype:
    """Precision of the scorer's encoders."""
    return torch.bfloat16 if scorer.identity["precision"] == "bf16" else torch.float32


def parts_of_ours(setting: Setting, parts: dict[str, list[Seconds]]) -> None:
    """The stage's parts, one after the other and in this process."""
    scorer, device = setting.scorer, setting.scorer.device
    chunks = score._chunks_by_image(setting.pairs)
    answers = [sorted({answer for pair in chunk for answer in (pair.chosen, pair.rejected)}) for chunk in chunks]
    names = [name for chunk in chunks for name in distinct_images(chunk)]
    batches = [
        [setting.folder / name for name in names[start : start + setting.batch_size]]
        for start in range(0, len(names), setting.batch_size)
    ]
    with timed(parts["split, tokenise"], device):
        texts = [ChunkSplitter(answers, scorer.tokens, None)[number] for number in range(len(chunks))]
    with timed(parts["decode"], device):
        pixels = list(scorer.iter_pixels(batches))
    with timed(parts["image encoder"], device):
        for batch in pixels:
            scorer.encode_pixels(batch)
    with timed(parts["text encoder"], device):
        for of_chunk in texts:
            scorer.encode_texts(of_chunk.statements, of_chunk.ids)


# ----------------------------------------------------------------------------------------------------------- report


def no_parts() -> dict[str, list[Seconds]]:
    """An empty list of times for each part of the work."""
    return {name: [] for name in ("decode", "image encoder", "text encoder", "split, tokenise")}


def report(setting: Setting, rounds: int, scratch: Path) -> None:
    """Time `rounds` of both ways after a warm-up and log medians, ratios, parts and the largest difference."""
    statements = sum(len(split_statements(a)) for pair in setting.pairs for a in (pair.chosen, pair.rejected))
    images = len(distinct_images(setting.pairs))
    log(f"{len(setting.pairs)} pairs, {images} pictures, {statements} statements; {setting.scorer.identity['model']}")
    warm_up = setting._replace(pairs=setting.pairs[:4])
    direct(warm_up, no_parts())
    ours(warm_up, scratch / "warm_up")
    of_direct, of_ours, difference = no_parts(), no_parts(), 0.0
    times: dict[str, list[Seconds]] = {"direct loop": [], "this stage": []}
    for number in range(rounds):
        with timed(times["direct loop"], setting.scorer.device):
            expected = direct(setting, of_direct)
        with timed(times["this stage"], setting.scorer.device):
            found = ours(setting, scratch / f"out-{number}")
        parts_of_ours(setting, of_ours)
        difference = max(difference, *(abs(found[id_] - delta) for id_, delta in expected.items()))
    for name, seconds in times.items():
        for kind in Seconds._fields:
            spread = Spread.of([len(setting.pairs) / getattr(each, kind) for each in seconds])
            pictures = Spread.of([images / getattr(each, kind) for each in seconds])
            log(f"{name:<12} pairs a second of {kind:<10} {spread!s:<26} pictures {pictures}")
    for kind in Seconds._fields:
        ratios = [getattr(d, kind) / getattr(o, kind) for d, o in zip(*times.values())]
        log(f"times as fast, by {kind:<10} {Spread.of(ratios)}")
    log(f"largest difference of delta: {difference:.1e}")
    say_parts(of_direct, of_ours, rounds)


def say_parts(of_direct: dict[str, list[Seconds]], of_ours: dict[str, list[Seconds]], rounds: int) -> None:
    """Processor time of a round, the share of all parts, and how many times less it became."""
    log(f"{'processor s':<18}{'direct':>9}{'share':>8}{'stage':>9}{'share':>8}{'less by':>9}")
    totals = [sum(each.processor for part in way.values() for each in part) / rounds for way in (of_direct, of_ours)]
    for name in of_direct:
        before, after = (sum(each.processor for each in way[name]) / rounds for way in (of_direct, of_ours))
        shares = f"{before:>9.2f}{before / totals[0]:>8.1%}{after:>9.2f}{after / totals[1]:>8.1%}"
        log(f"{name:<18}{shares}{before / after:>8.1f}x")


def report_waiting(setting: Setting, scratch: Path) -> None:
    """Pictures a second, and the share of the stage's time in which the GPU has nothing to do.

    Its own time is that of the same encodings with the pixels lying on the GPU.
    """
    scorer, device = setting.scorer, setting.scorer.device
    names = [setting.folder / name for name in distinct_images(setting.pairs)]
    pixels = next(iter(scorer.iter_pixels([names[: setting.batch_size]]))).to(device)
    chunks = score._chunks_by_image(setting.pairs)
    answers = [sorted({answer for pair in chunk for answer in (pair.chosen, pair.rejected)}) for chunk in chunks]
    texts = [ChunkSplitter(answers, scorer.tokens, None)[number] for number in range(len(chunks))]

    def gpu_alone() -> None:
        for _ in range(-(-len(names) // setting.batch_size)):
            scorer.encode_pixels(pixels)
        for of_chunk in texts:
            scorer.encode_texts(of_chunk.statements, of_chunk.ids)

    def seconds(work: Callable[[], Any]) -> float:
        measured: list[Seconds] = []
        with timed(measured, device):
            work()
        return measured[0].clock

    gpu_alone()
    alone = statistics.median(seconds(gpu_alone) for _ in range(3))
    whole = [seconds(partial(ours, setting, scratch / str(number))) for number in range(3)]
    rates = Spread.of([len(names) / each for each in whole])
    log(f"pictures a second: {rates}; the GPU alone: {len(names) / alone:.3g}")
    log(f"share of time that the GPU waits: {Spread.of([max(0.0, 1 - alone / each) for each in whole])}")


if __name__ == "__main__":
    end_on_interrupt()
    main()
