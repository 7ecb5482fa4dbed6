"""Time and memory of a DPO step of a Qwen2.5-VL, forward and backward, done in turn by TRL and by this repository.

rows          chosen and rejected answers as rows of their own through the stock model, padded, images encoded for both,
              logits of the answers' tokens.
trl           TRL's DPOTrainer on the same model, which also runs the reference model.
trl given     the same with the reference log-probs given, as TRL does not offer it for images.
ours          the shared prefix through the same unmodified model: every distinct position and image once, logits of the
              answers only.

Every measurement runs in a fresh process; the ways take turns. Random weights, all but the vision encoder trained, no
optimizer, no activation checkpointing.

    PYTHONPATH=. python scripts/bench/vlm_step.py                  # a small model on one CPU thread, about 5 minutes
    PYTHONPATH=. python scripts/bench/vlm_step.py --shape 7b       # Qwen2.5-VL-7B's shape in bf16 on a GPU
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from dpo_step import (
    BETA,
    Fitting,
    Runs,
    Settings,
    Step,
    in_a_process,
    measure,
    ratios_to_ours,
    trl_step_on,
)
from measure import Spread, reject_flags
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from dama.console import end_on_interrupt, log, write_json
from dama.logps import IGNORE_INDEX
from dama.losses import Loss, preference_loss, reward_gap
from dama.models.batch import PairBatch, PairCollator
from dama.models.family import install
from dama.models.images import ImageInputs, join_images
from dama.models.way import Way
from dama.pairs import PreferencePair
from dama.train.family import ImageRef, PreparedPair
from dama.train.rows import EncodedRow
from tests.models.tiny_hub import EXTRA, qwen_processor, tokenizer

MERGE, PATCH = 2, 14


@dataclass(frozen=True)
class QwenShape:
    """Sizes of a Qwen2.5-VL and of its pairs."""

    layers: int
    width: int
    intermediate: int
    vocabulary: int
    tower_layers: int
    tower_width: int
    tower_heads: int
    tower_intermediate: int
    full_attention: tuple[int, ...]  # layers of the tower without windows
    heads: int = 28
    key_heads: int = 4
    grid: int = 48  # patches along each side of an image
    question: int = 60  # tokens of the prompt without its image
    chosen: int = 120
    rejected: int = 110

    @property
    def image_tokens(self) -> int:
        """Tokens of an image after the merge of neighboring patches."""
        return (self.grid // MERGE) ** 2


SHAPES = {
    "tiny": QwenShape(2, 56, 64, 400, 2, 32, 2, 32, (1,), heads=7, key_heads=1, grid=8, question=8, chosen=9,
                      rejected=7),
    "cpu": QwenShape(4, 448, 2368, 32000, 4, 160, 4, 428, (3,)),
    "7b": QwenShape(28, 3584, 18944, 152064, 32, 1280, 16, 3420, (7, 15, 23, 31)),
}  # fmt: skip


@dataclass(frozen=True)
class QwenSettings(Settings):
    """Settings whose shape is a Qwen2.5-VL's."""

    shape: Any  # QwenShape

    def build(self, way: str) -> tuple[Any, Step]:
        """A model and its step."""
        model = model_in(self)
        if way in OWN_WAYS:
            return model, step_of(self, model, OWN_WAYS[way])
        return trl_step_on(self, model, qwen_processor(tokenizer()), trl_batch(self), way == "trl given", None)


OWN_WAYS = {"rows": Way.ROWS, "ours": Way.KERNEL}
WAYS = ("rows", "trl", "trl given", "ours")


def config_of(shape: QwenShape) -> Any:
    """The config of a Qwen2.5-VL of this shape."""
    from transformers import Qwen2_5_VLConfig

    tok = tokenizer()
    half = shape.width // shape.heads // 2
    sections = [half // 4, half * 3 // 8, half - half // 4 - half * 3 // 8]  # 16, 24, 24 of 64
    ids = {f"{name}_token_id": tok.convert_tokens_to_ids(EXTRA[f"{name}_token"]) for name in ("image", "video")}
    return Qwen2_5_VLConfig(
        vision_config={
            "depth": shape.tower_layers, "hidden_size": shape.tower_width, "out_hidden_size": shape.width,
            "num_heads": shape.tower_heads, "intermediate_size": shape.tower_intermediate, "patch_size": PATCH,
            "fullatt_block_indexes": list(shape.full_attention),
        },
        text_config={
            "vocab_size": shape.vocabulary, "hidden_size": shape.width, "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.layers, "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.key_heads, "max_position_embeddings": 32768, "bos_token_id": None,
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections},
        },
        **ids, vision_start_token_id=tok.convert_tokens_to_ids(EXTRA["vision_bos_token"]),
    )  # fmt: skip


def random_model(shape: QwenShape, device: torch.device, dtype: torch.dtype) -> Any:
    """A random model whose vision encoder is frozen, made on the device."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            model = Qwen2_5_VLForConditionalGeneration(config_of(shape))
    finally:
        torch.set_default_dtype(before)
    model.model.visual.requires_grad_(False)
    return model.train()


def model_in(settings: QwenSettings) -> Any:
    """The checkpoint that all ways start from."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    folder = settings.folder / "model"
    model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=settings.dtype)
    model.model.visual.requires_grad_(False)
    return model.to(settings.device).train()


# --- The ways --------------------------------------------------------------------------------------------------------


def random_items(shape: QwenShape, count: int) -> list[PreparedPair]:
    """Pairs of random tokens, each about an image of its own."""
    generator = torch.Generator().manual_seed(1)
    image = tokenizer().convert_tokens_to_ids(EXTRA["image_token"])

    def tokens(length: int) -> Tensor:  # none of the special ones
        return torch.randint(0, 256, (length,), generator=generator)

    def row(prefix: Tensor, answer: Tensor) -> EncodedRow:
        return EncodedRow(torch.cat([prefix, answer]), torch.cat([torch.full_like(prefix, IGNORE_INDEX), answer]))

    def item(number: int) -> PreparedPair:
        pair = PreferencePair(str(number), f"{number}.png", "?", "a", "b")
        prefix = torch.cat([tokens(8), torch.full((shape.image_tokens,), image), tokens(shape.question - 8)])
        rows = (row(prefix, tokens(shape.chosen)), row(prefix, tokens(shape.rejected)))
        return PreparedPair(pair, rows, (ImageRef(pair.own_images),) * 2, (-500.0, -480.0))

    return [item(number) for number in range(count)]


def random_images(shape: QwenShape, count: int) -> list[ImageInputs]:
    """Inputs of as many images."""
    generator = torch.Generator().manual_seed(2)
    patches, values = shape.grid**2, 3 * 2 * PATCH * PATCH
    grid = torch.tensor([[1, shape.grid, shape.grid]])
    return [
        ImageInputs({"pixel_values": torch.randn(patches, values, generator=generator), "image_grid_thw": grid})
        for _ in range(count)
    ]


def backward(logps: Tensor, items: list[PreparedPair]) -> Tensor:
    """Backward through the mean DPO loss."""
    chosen, rejected = logps.chunk(2)
    reference = torch.tensor([item.reference for item in items], dtype=torch.float64).T.to(logps)
    preference_loss(reward_gap(chosen, rejected, *reference), BETA).mean().backward()
    return logps.detach()


def step_of(settings: QwenSettings, model: Any, way: Way) -> Step:
    """Forward and backward by dama.models."""
    items = random_items(settings.shape, settings.pairs)
    batch: PairBatch = PairCollator(way, Loss.parse(["dpo"]).views)(items)["pairs"].to(settings.device)
    images = [image.to(settings.device) for image in random_images(settings.shape, settings.pairs)]
    install(model, way)
    return lambda: backward(model(pairs=batch, images=images, chunk=1024).logps, items)


def trl_batch(settings: QwenSettings) -> dict[str, Tensor]:
    """What TRL's collator makes of the same pairs: rows of the chosen answers, then of the rejected, images twice."""
    items = random_items(settings.shape, settings.pairs)
    rows = [item.rows[view] for view in range(2) for item in items]
    images = join_images(random_images(settings.shape, settings.pairs) * 2)
    ids = pad_sequence([row.input_ids for row in rows], True)
    image = tokenizer().convert_tokens_to_ids(EXTRA["image_token"])
    batch = {
        "input_ids": ids,
        "attention_mask": pad_sequence([torch.ones_like(row.input_ids) for row in rows], True),
        "completion_mask": pad_sequence([(row.labels != IGNORE_INDEX).long() for row in rows], True),
        "mm_token_type_ids": (ids == image).long(),
        "ref_chosen_logps": torch.tensor([item.reference[0] for item in items], dtype=settings.dtype),
        "ref_rejected_logps": torch.tensor([item.reference[1] for item in items], dtype=settings.dtype),
        "pixel_values": images["pixel_values"].to(settings.dtype),
        "image_grid_thw": images["image_grid_thw"],
    }
    return {name: value.to(settings.device) for name, value in batch.items()}


# --- Running them ----------------------------------------------------------------------------------------------------


def prepare(settings: QwenSettings) -> SimpleNamespace:
    """Write the random checkpoint; its numbers of weights."""
    model = random_model(settings.shape, settings.device, settings.dtype)
    model.save_pretrained(settings.folder / "model")
    qwen_processor(tokenizer()).save_pretrained(settings.folder / "model")
    tower = sum(p.numel() for p in model.model.visual.parameters())
    return SimpleNamespace(tower=tower, others=sum(p.numel() for p in model.parameters()) - tower)


def main() -> None:
    """Measure all ways in turn and print times and ratios."""
    args = parse_arguments()
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench_vlm_step_") as folder:
        shape = SHAPES[args.shape]
        settings = QwenSettings(Path(folder), shape, args.pairs, args.threads, args.steps)
        found = in_a_process(settings, prepare)
        log(describe(args, settings, found))
        runs: Runs = {way: [] for way in args.ways}
        for _ in tqdm(range(args.repeats), unit="repeat", desc="the ways in turn"):
            for way in args.ways:
                runs[way].append(in_a_process(settings, measure, way))
    fitting: Fitting = {way: [run for run in of_way if run] for way, of_way in runs.items() if all(of_way)}
    for way, of_way in runs.items():
        log(f"{way:<10} {say(of_way) if way in fitting else 'does not fit into the memory'}")
    ratios = ratios_to_ours(fitting)
    for name, ratio in ratios.items():
        log(f"{name:<46} {ratio}")
    if args.json:
        write_json(args.json, {name: vars(ratio) for name, ratio in ratios.items()})


def say(of_way: list[Any]) -> str:
    """Seconds, memory and the mean log-prob of the chosen answers, by which ways that compute the same are known."""
    times = Spread.of([timed.clock for run in of_way for timed in run.times])
    memory = Spread.of([run.peak / 1e9 for run in of_way])
    logps = of_way[0].logps
    mean = sum(logps[: len(logps) // 2]) / (len(logps) // 2)
    return f"{times} s a step, {memory} GB above the model, mean log-prob of the chosen answers {mean:.4f}"


def describe(args: argparse.Namespace, settings: QwenSettings, found: SimpleNamespace) -> str:
    """Header of the output: sizes, weights, lengths, device and number of repeats."""
    shape: QwenShape = settings.shape
    device = torch.cuda.get_device_name() if settings.device.type == "cuda" else f"{args.threads} CPU thread(s)"
    return (
        f"Qwen2.5-VL, shape {args.shape}: {shape.layers} layers of width {shape.width}, {shape.heads} query and "
        f"{shape.key_heads} key heads, vocabulary {shape.vocabulary}, {found.others / 1e6:.1f} M weights; vision "
        f"encoder of {shape.tower_layers} layers of width {shape.tower_width}, {found.tower / 1e6:.1f} M weights; "
        f"{args.pairs} pairs, prefix {shape.image_tokens} + {shape.question}, answers {shape.chosen} + "
        f"{shape.rejected} tokens, {str(settings.dtype).removeprefix('torch.')}, {device}; {args.repeats} times "
        f"{args.steps} steps of each way in turn: medians (smallest to largest)"
    )


def parse_arguments() -> argparse.Namespace:
    """Flags; counts below 1 are refused."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu", help="sizes of the model. Default: %(default)s")
    parser.add_argument("--pairs", type=int, default=2, metavar="N", help="pairs in a step. Default: %(default)s")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads. Default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="turns of every way. Default: %(default)s")
    parser.add_argument("--steps", type=int, default=1, metavar="N", help="timed steps a turn. Default: %(default)s")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=[*WAYS], help="what to measure. Default: all four")
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the checkpoint may lie for the time being")
    parser.add_argument("--json", type=Path, metavar="FILE", help="the ratios")
    args = parser.parse_args()
    reject_flags(parser, args, ("pairs", "threads", "repeats", "steps"))
    return args


if __name__ == "__main__":
    end_on_interrupt()
    main()
