"""Answers a second: the driver's batches against one question at a time, which is what LLaVA's model_vqa does.

Both in turn on the same questions and the same loaded checkpoint, greedy. Answers must be the same; where two differ,
the logits of the first differing token are looked at: a gap below TIE is a tie that the last bits of a sum decided.

    python scripts/bench/generate.py                    # on a CPU: TinyCOCO's checkpoint, then a wider random one
    python scripts/bench/generate.py --shape 7b         # LLaVA-v1.5-7B's shape, random, in bf16 on a GPU
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from measure import SHAPES, TOKENIZER, Shape, Spread, Timed, time_of, write_checkpoint, write_images
from torch import Tensor
from tqdm import tqdm

from dama.console import end_on_interrupt, log, write_json
from dama.train.throughput import PairLength
from llava.generation.answers import by_length
from llava.generation.local import Answerer
from llava.generation.request import Decoding, Request

sys.path.append(str(Path(__file__).resolve().parents[2]))  # playground is not installed
from playground.tinycoco.captions import QUESTIONS
from playground.tinycoco.scenes import draw, sample_scene

TIE = {torch.float32: 1e-3, torch.bfloat16: 0.1}  # of logits, which are of order 1 to 10
# An image of 64 patches, as TinyCOCO's, before a language model whose weights no cache holds: 116 MB a token.
WIDE = Shape(4, 512, 8, 1376, 32000, 2, 64, 4, 112, 14, PairLength.of(0, 0, 0))


@dataclass(frozen=True)
class Comparison:
    """One question at a time against batches: times of each round, and how the answers compare.

    tokens: of all answers of a round. ties: answers that differ from a tie on; other: that differ for no such reason.
    """

    shape: str
    device: str
    answers: int
    tokens: int
    batch: int
    alone: list[Timed]
    together: list[Timed]
    ties: int
    other: int

    @property
    def ratio(self) -> Spread:
        """By the clock."""
        return Spread.of([one.clock / many.clock for one, many in zip(self.alone, self.together)])

    @property
    def processor_ratio(self) -> Spread:
        """By processor time, which other programs on the machine hardly change; of no meaning on a GPU."""
        return Spread.of([one.processor / many.processor for one, many in zip(self.alone, self.together)])

    def __str__(self) -> str:
        alone, together = (Spread.of([self.answers / t.clock for t in times]) for times in (self.alone, self.together))
        same = self.answers - self.ties - self.other
        return (
            f"{self.shape} on {self.device}, {self.tokens / self.answers:.0f} tokens an answer: {alone} answers/s one "
            f"by one, {together} in batches of {self.batch}; {self.ratio} times as many ({self.processor_ratio} by "
            f"processor time); of {self.answers} answers {same} are the same, {self.ties} differ from a tie on, "
            f"{self.other} otherwise"
        )


def compare(answerer: Answerer, requests: Sequence[Request], images: Path, decoding: Decoding, args: argparse.Namespace,
            shape: str) -> Comparison:  # fmt: skip
    """`args.rounds` rounds of both in turn, after one that is not counted."""
    device = torch.device(answerer.device)
    ordered = by_length(answerer, requests, images)
    batches = [ordered[i : i + args.batch] for i in range(0, len(ordered), args.batch)]
    answers: dict[int, list[Tensor]] = {}

    def answer(size: int) -> None:
        groups = batches if size > 1 else [[request] for request in ordered]
        bar = tqdm(groups, desc=f"{shape}, {size} at a time", leave=False)
        answers[size] = [row for group in bar for row in answerer.new_tokens(group, images, decoding).cpu()]

    answerer.new_tokens(batches[0], images, decoding)
    alone, together = [], []
    for _ in range(args.rounds):
        alone.append(time_of(lambda: answer(1), device))
        together.append(time_of(lambda: answer(args.batch), device))
    pairs = [(trimmed(a, answerer), trimmed(b, answerer)) for a, b in zip(answers[1], answers[args.batch])]
    gaps = [gap(answerer, r, images, a, b) for r, (a, b) in zip(ordered, pairs) if a.tolist() != b.tolist()]
    ties = sum(value < TIE[answerer.dtype] for value in gaps)
    tokens = sum(len(a) for a, _ in pairs)
    return Comparison(
        shape, answerer.device, len(ordered), tokens, args.batch, alone, together, ties, len(gaps) - ties
    )  # fmt: skip


def trimmed(ids: Tensor, answerer: Answerer) -> Tensor:
    """Up to and with the end of text; what follows is padding."""
    ends = (ids == answerer.tokenizer.eos_token_id).nonzero()
    return ids[: int(ends[0]) + 1] if len(ends) else ids


@torch.inference_mode()
def gap(answerer: Answerer, request: Request, images: Path, one: Tensor, other: Tensor) -> float:
    """Difference of the two tokens' logits where the answers part."""
    k = next(i for i, (a, b) in enumerate(zip(one, other)) if a != b)
    ids = torch.cat([answerer.token_ids(request), one[:k]])[None].to(answerer.device)
    pixels, _ = answerer.pixels(request, images)
    logits = answerer.model(ids, images=pixels[None].to(answerer.device, answerer.dtype)).logits[0, -1].float()
    return abs(float(logits[one[k]] - logits[other[k]]))


# --- What is asked ---------------------------------------------------------------------------------------------------


def tinycoco(folder: Path, count: int) -> Iterator[Request]:
    """Held-out scenes, and questions of several lengths."""
    for i in range(count):
        scene = sample_scene(i, "test")
        draw(scene).save(folder / f"{i}.png")
        yield Request(str(i), QUESTIONS[i % len(QUESTIONS)], f"{i}.png")


def noise(folder: Path, shape: Shape, count: int) -> Iterator[Request]:
    """Write `count` random images and yield a question about each."""
    write_images(folder, shape, count)
    for i in range(count):
        yield Request(str(i), QUESTIONS[i % len(QUESTIONS)], f"{i}.png")


def measure(name: str, folder: Path, args: argparse.Namespace) -> Comparison:
    """Compare batched generation with one answer at a time, for one shape."""
    device = "cuda" if torch.cuda.is_available() and name == "7b" else "cpu"
    images = folder / "images"
    images.mkdir(parents=True)
    if name == "tinycoco":
        checkpoint, requests = TOKENIZER, list(tinycoco(images, args.answers))
    else:
        shape, checkpoint = {"wide": WIDE, "7b": SHAPES["7b"]}[name], folder / "checkpoint"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        write_checkpoint(checkpoint, shape, torch.device(device), dtype)
        requests = list(noise(images, shape, args.answers))
    answerer = Answerer(str(checkpoint), conv_mode="v1", device=device)
    return compare(answerer, requests, images, Decoding(args.tokens), args, name)


def main() -> None:
    """Measure the requested shapes; print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", nargs="+", choices=("tinycoco", "wide", "7b"), default=["tinycoco", "wide"],
        help="sizes of the model, measured one after another (default: tinycoco wide)",
    )  # fmt: skip
    parser.add_argument("--answers", type=int, default=16, help="questions of a round (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="questions at a time (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=128, help="of an answer at most (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="of both in turn (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch on a CPU (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = []
    for name in args.shape:
        with tempfile.TemporaryDirectory() as folder:
            found.append(measure(name, Path(folder), args))
        log(str(found[-1]))
    if args.json:
        write_json(args.json, [asdict(comparison) for comparison in found])


if __name__ == "__main__":
    end_on_interrupt()
    main()
