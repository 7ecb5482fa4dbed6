"""What the training benchmarks share: shapes, random checkpoints and pairs, memory, the matmul rate, medians."""

from __future__ import annotations

import re
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dama.logps import IGNORE_INDEX
from dama.pairs import PreferencePair
from dama.train.data import ImageChoice
from dama.train.family import PreparedPair
from dama.train.throughput import PairLength
from dama.views import PAIR_VIEWS, View
from llava.constants import IMAGE_TOKEN_INDEX
from llava.train.preprocess import EncodedTurns

TOKENIZER = Path(__file__).resolve().parents[2] / "playground/tinycoco/weights/llava"
SPECIAL_TOKENS = 3


@dataclass(frozen=True)
class Shape:
    """A LLaVA with CLIP, and the positions of a pair's parts, the picture's included."""

    layers: int
    width: int
    heads: int
    intermediate: int
    vocabulary: int
    tower_layers: int
    tower_width: int
    tower_heads: int
    image: int  # pixels a side
    patch: int
    pair: PairLength

    @property
    def patches(self) -> int:
        """Patches of an image, which is square."""
        return (self.image // self.patch) ** 2


SHAPES = {
    "cpu": Shape(4, 512, 8, 1376, 32000, 2, 64, 4, 336, 14, PairLength.of(636, 120, 110)),
    "7b": Shape(32, 4096, 32, 11008, 32000, 24, 1024, 16, 336, 14, PairLength.of(636, 120, 110)),
    "tiny": Shape(2, 64, 4, 128, 960, 2, 32, 2, 56, 14, PairLength.of(40, 12, 9)),
}


def reject_flags(parser: Any, args: Any, counts: Sequence[str], errors: Sequence[str] = ()) -> None:
    """Ends with all errors of the flags, these and those that every benchmark of training can have."""
    wrong = [f"--{name}: expected 1 or more, got {n}" for name in counts if (n := getattr(args, name)) < 1]
    if args.shape == "7b" and not torch.cuda.is_available():
        errors = [*errors, "--shape 7b: expected a GPU, found none"]
    if wrong or errors:
        parser.error("; ".join([*wrong, *errors]))


# --- Random checkpoints and pairs ------------------------------------------------------------------------------------


def configs_of(shape: Shape) -> tuple[Any, Any]:
    """(LlavaConfig, CLIPVisionConfig) of the shape; the tower's folder lies in the checkpoint's."""
    from transformers import CLIPVisionConfig

    from llava.model.language_model.llava_llama import LlavaConfig

    tower = CLIPVisionConfig(
        hidden_size=shape.tower_width, intermediate_size=4 * shape.tower_width, num_hidden_layers=shape.tower_layers,
        num_attention_heads=shape.tower_heads, image_size=shape.image, patch_size=shape.patch,
    )  # fmt: skip
    config = LlavaConfig(
        hidden_size=shape.width, intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, vocab_size=shape.vocabulary, max_position_embeddings=4096, pad_token_id=0,
        mm_vision_tower="vision_tower", mm_hidden_size=shape.tower_width, mm_projector_type="mlp2x_gelu",
        mm_vision_select_layer=-2, mm_vision_select_feature="patch", mm_use_im_start_end=False,
        mm_use_im_patch_token=False, image_aspect_ratio="pad",
    )  # fmt: skip
    return config, tower


def image_processor_of(shape: Shape) -> Any:
    """CLIP's image processor for the shape's side."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    side = shape.image
    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def write_configs(folder: Path, shape: Shape) -> None:
    """A checkpoint's folder without weights, from which memory is estimated and random models are made."""
    config, tower = configs_of(shape)
    config.save_pretrained(folder)
    tower.save_pretrained(folder / "vision_tower")


def write_checkpoint(folder: Path, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """Random weights in LLaVA's layout, the tower and a tokenizer of as many tokens beside them."""
    from transformers import CLIPVisionModel

    from llava.model.language_model.llava_llama import LlavaLlamaForCausalLM

    torch.manual_seed(0)
    config, tower = configs_of(shape)
    CLIPVisionModel(tower).to(dtype).save_pretrained(folder / "vision_tower")
    image_processor_of(shape).save_pretrained(folder / "vision_tower")
    with device:
        LlavaLlamaForCausalLM._from_config(config, dtype=dtype).save_pretrained(folder)
    write_tokenizer(folder, shape.vocabulary)


def write_tokenizer(folder: Path, size: int) -> None:
    """TinyCOCO's tokenizer with meaningless pieces added up to `size`: llava-hf's layout wants a token for each row."""
    from sentencepiece import sentencepiece_model_pb2 as messages

    model = messages.ModelProto()  # type: ignore[attr-defined]  # made when it is imported
    model.ParseFromString((TOKENIZER / "tokenizer.model").read_bytes())
    for number in range(len(model.pieces), size):
        model.pieces.add(piece=f"\u2581<{number}>", score=-float(number))
    (folder / "tokenizer.model").write_bytes(model.SerializeToString())
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(TOKENIZER / name, folder)


def random_pairs(shape: Shape, count: int, views: Sequence[View] = PAIR_VIEWS) -> list[PreparedPair]:
    """Pairs of the shape's lengths, each with an image of its own: image first, then text of random tokens.

    A second answer is as long as the chosen one, a corrupted image is blank.

    Their reference log-probs are those of a model that holds all tokens equally likely, as a random one nearly does.
    """
    generator = torch.Generator().manual_seed(1)
    per_token = -torch.tensor(float(shape.vocabulary)).log().item()

    lengths = {"chosen": shape.pair.chosen, "rejected": shape.pair.rejected, "second": shape.pair.chosen}
    used = {view.answer for view in views}

    def tokens(length: int) -> Tensor:
        return torch.randint(SPECIAL_TOKENS, shape.vocabulary, (length,), generator=generator)

    def answer(prefix: Tensor, length: int) -> EncodedTurns:
        ids = tokens(length)
        return EncodedTurns(torch.cat([prefix, ids]), torch.cat([torch.full_like(prefix, IGNORE_INDEX), ids]))

    def pair(number: int) -> PreparedPair:
        prefix = torch.cat([torch.tensor([1, IMAGE_TOKEN_INDEX]), tokens(shape.pair.prefix - shape.patches - 1)])
        answers = {name: answer(prefix, length) for name, length in lengths.items() if name in used}
        names = PreferencePair(str(number), f"{number}.png", "", "", "")
        return PreparedPair(
            names,
            tuple(answers[view.answer] for view in views),
            ImageChoice(tuple(views), "blank").images(names),
            tuple(per_token * lengths[view.answer] for view in views),
        )

    return [pair(number) for number in range(count)]


def random_images(shape: Shape, count: int) -> Tensor:
    """[count, 3, H, W] pixels as the image processor gives them."""
    return torch.randn(count, 3, shape.image, shape.image, generator=torch.Generator().manual_seed(2))


def write_images(folder: Path, shape: Shape, count: int) -> None:
    """The files that random pairs name: noise, of the size that the tower wants."""
    from PIL import Image

    for number, image in enumerate(random_images(shape, count)):
        pixels = (255 * image.sigmoid()).byte().permute(1, 2, 0)
        Image.fromarray(pixels.numpy()).save(folder / f"{number}.png")


# --- Measuring -------------------------------------------------------------------------------------------------------


def synchronise(device: torch.device) -> None:
    """Wait for the GPU's queued work; return at once on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Timed(NamedTuple):
    """Seconds of a piece of work."""

    clock: float
    processor: float  # of all threads, which other programs hardly change

    def on(self, device: torch.device) -> float:
        """The time that compares best: the clock's of a GPU's work, the processor's of a CPU's."""
        return self.clock if device.type == "cuda" else self.processor


def time_of(work: Callable[[], Any], device: torch.device) -> Timed:
    """Until all of the work is done, on a GPU too."""
    synchronise(device)
    began = time.perf_counter(), time.process_time()
    work()
    synchronise(device)
    return Timed(time.perf_counter() - began[0], time.process_time() - began[1])


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """FLOP/s of large matrix products, the best of several: the floor under any time is the FLOPs over this."""
    side = side or (8192 if device.type == "cuda" else 2048)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    rounds = 10 if device.type == "cuda" else 1

    def products() -> None:
        for _ in range(rounds):
            torch.mm(a, b)

    products()
    return 2 * side**3 * rounds / min(time_of(products, device).on(device) for _ in range(5))


class PeakMemory:
    """Highest memory in use since it was made, above what was in use then: the GPU's, or resident memory (Linux)."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark back
            self.before = self._resident("VmRSS")

    @property
    def bytes(self) -> int:
        """Peak above the use at the start, in bytes: allocated on a GPU, resident on a CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return self._resident("VmHWM") - self.before

    @staticmethod
    def _resident(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
        assert found is not None
        return 1024 * int(found[1])


@dataclass(frozen=True)
class Spread:
    """The median of several values, with the smallest and the largest of them."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float]) -> Spread:
        """Median, minimum and maximum of at least one value."""
        return Spread(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        return f"{self.median:.3g} ({self.low:.3g} to {self.high:.3g})"
