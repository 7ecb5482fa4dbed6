"""Time and memory of a DPO step, forward and backward, done in turn plainly, by TRL, and by this repository.

plain         chosen and rejected answers as rows of their own, padded, every image encoded for both, logits of the
              whole vocabulary at all positions: how the released code computes.
trl           TRL's DPOTrainer on the model exported to llava-hf's layout, which also runs the reference model.
trl given     the same with the reference log-probs given, as TRL does not offer it for images.
ours          the shared prefix: every distinct position and image once, logits of the answers only.

Every measurement runs in a fresh process; the ways take turns. Random weights, all but the tower trained, no optimizer,
no activation checkpointing.

    python scripts/bench/dpo_step.py                     # a small model on one CPU thread, about 5 minutes
    python scripts/bench/dpo_step.py --shape 7b          # LLaVA-v1.5-7B's shape in bf16 on a GPU
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from measure import (
    SHAPES,
    PeakMemory,
    Shape,
    Spread,
    Timed,
    matmul_rate,
    random_images,
    random_pairs,
    reject_flags,
    time_of,
    write_checkpoint,
    write_images,
)
from torch import Tensor
from tqdm import tqdm

from dama.console import end_on_interrupt, log, write_json
from dama.logps import get_batch_logps
from dama.losses import preference_loss, reward_gap
from dama.train.throughput import step_flops
from llava.train.family import size_of

BETA = 0.1
PAIRS_A_STEP = 16  # of a full training step
Step = Callable[[], Tensor]  # forward and backward; returns [2B] log-probs, the chosen answers first


@dataclass(frozen=True)
class Settings:
    """What every process needs to know."""

    folder: Path  # checkpoint in LLaVA's layout; the exported one lies in its folder hf
    shape: Shape
    pairs: int
    threads: int
    steps: int

    @property
    def device(self) -> torch.device:
        """The first GPU, else the CPU."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 on a GPU, float32 on a CPU."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def build(self, way: str) -> tuple[Any, Step]:
        """A model and its step."""
        return BUILDERS[way](self)


@dataclass(frozen=True)
class Measured:
    """One process's figures."""

    times: list[Timed]  # of each step
    loaded: int  # bytes in use with the model loaded, before the first step
    peak: int  # bytes above that
    logps: list[float]


@dataclass(frozen=True)
class Floor:
    """What a step cannot be faster than."""

    flops: float  # that the mathematics needs: every distinct position and image once
    rate: float  # FLOP/s of a large matrix product

    @property
    def seconds(self) -> float:
        """Seconds of the step's FLOPs at the rate of a large matrix product."""
        return self.flops / self.rate


@dataclass(frozen=True)
class Training:
    """Figures of whole optimizer steps."""

    pairs_per_second: list[float]
    peak: int  # bytes in all


Runs = dict[str, list[Measured | None]]
Fitting = dict[str, list[Measured]]  # the ways that fit into the memory
FIGURES: dict[str, Callable[[Measured], float]] = {
    "time": lambda run: statistics.median(timed.clock for timed in run.times),
    "processor time": lambda run: statistics.median(timed.processor for timed in run.times),
    "memory above the model": lambda run: run.peak,
    "memory in all": lambda run: run.loaded + run.peak,
}


# --- The ways --------------------------------------------------------------------------------------------------------


def llava(settings: Settings, attention: str) -> Any:
    """The model as training loads it, with its frozen tower."""
    from llava.model.builder import load_llava

    model = load_llava(str(settings.folder), dtype=settings.dtype, attn_implementation=attention)
    model.get_model().load_vision_tower(dtype=settings.dtype)
    return model.to(settings.device).train()


def batch_of(settings: Settings, shared_prefix: bool) -> dict[str, Tensor]:
    """The trainer's own batch, on the device, with the images."""
    from llava.train.dpo_data import DataCollatorForDPODataset

    tokenizer: Any = SimpleNamespace(pad_token_id=0)
    dataset: Any = None  # images are not read from files here
    collate = DataCollatorForDPODataset(tokenizer, dataset, shared_prefix, settings.shape.patches)
    batch = collate.rows(random_pairs(settings.shape, settings.pairs))
    batch["images"] = random_images(settings.shape, settings.pairs).to(settings.dtype)
    return {name: value.to(settings.device) for name, value in batch.items()}


def backward(logps: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Backward through the mean DPO loss."""
    chosen, rejected = logps.chunk(2)
    R = reward_gap(chosen, rejected, batch["ref_chosen"].to(logps), batch["ref_rejected"].to(logps))
    preference_loss(R, BETA).mean().backward()
    return logps.detach()


def plain(settings: Settings) -> tuple[Any, Step]:
    """LLaVA with padded rows, a prefix for each answer, and its step."""
    model = llava(settings, "sdpa")
    return model, plain_step(model, batch_of(settings, shared_prefix=False))


def plain_step(model: Any, batch: dict[str, Tensor]) -> Step:
    """The released code's step on a LLaVA in memory."""
    pictures = torch.cat([batch["images"], batch["images"]])

    def step() -> Tensor:
        _, positions, mask, _, embeds, labels = model.prepare_inputs_labels_for_multimodal(
            batch["input_ids"], None, batch["attention_mask"], None, batch["targets"], pictures
        )
        logits = model(inputs_embeds=embeds, attention_mask=mask, position_ids=positions, use_cache=False).logits
        logps = get_batch_logps(logits.float(), labels)
        assert isinstance(logps, Tensor)
        return backward(logps, batch)

    return step


def ours(settings: Settings) -> tuple[Any, Step]:
    """LLaVA with packed rows that share the prefix, and its step."""
    from llava.model.attention import SHARED_PREFIX

    model, batch = llava(settings, SHARED_PREFIX), batch_of(settings, shared_prefix=True)

    def step() -> Tensor:
        return backward(model(plan=batch["plan"], images=batch["images"], logp_chunk=1024).logps, batch)

    return model, step


def trl(settings: Settings, reference_given: bool = False) -> tuple[Any, Step]:
    """TRL's DPO trainer on the exported checkpoint, and its step."""
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    folder = settings.folder / "hf"
    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype=settings.dtype).train()
    return trl_step(settings, model, processor, reference_given)


def trl_step(
    settings: Settings, model: Any, processor: Any, reference_given: bool, reference: Any = None
) -> tuple[Any, Step]:
    """TRL's step on a model of llava-hf's layout; without a reference model TRL loads the model's folder again."""
    model.model.vision_tower.requires_grad_(False)
    return trl_step_on(settings, model, processor, trl_batch(settings, processor), reference_given, reference)


def trl_step_on(
    settings: Settings, model: Any, processor: Any, batch: dict[str, Tensor], reference_given: bool, reference: Any
) -> tuple[Any, Step]:
    """TRL's step on a batch as its collator would make it."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    config = DPOConfig(
        output_dir=str(settings.folder / "trl"), beta=BETA, max_length=None, gradient_checkpointing=False, bf16=False,
        per_device_train_batch_size=settings.pairs, report_to="none", use_cpu=settings.device.type == "cpu",
    )  # fmt: skip
    kind_of_row = Dataset.from_list([{"images": [], "prompt": "", "chosen": "", "rejected": ""}])
    trainer: Any = DPOTrainer(model, reference, args=config, train_dataset=kind_of_row, processing_class=processor)
    if reference_given:
        trainer.precompute_ref_logps = True

    def step() -> Tensor:
        trainer.compute_loss(trainer.model, dict(batch)).backward()
        said = trainer._metrics["train"]
        return torch.tensor([said["logps/chosen"][-1], said["logps/rejected"][-1]])

    return trainer.model, step


def trl_batch(settings: Settings, processor: Any) -> dict[str, Tensor]:
    """What TRL's collator makes of the same pairs: images twice, a token for each of their positions.

    All rows have their image at the same place.
    """
    from llava.constants import IGNORE_INDEX, IMAGE_TOKEN_INDEX

    batch = batch_of(settings, shared_prefix=False)
    repeats = torch.where(batch["input_ids"][0] == IMAGE_TOKEN_INDEX, settings.shape.patches, 1)
    image = processor.tokenizer.convert_tokens_to_ids(processor.image_token)

    def spread(rows: Tensor) -> Tensor:
        return rows.repeat_interleave(repeats, dim=1)

    return {
        "input_ids": spread(batch["input_ids"].masked_fill(batch["input_ids"] == IMAGE_TOKEN_INDEX, image)),
        "attention_mask": spread(batch["attention_mask"]).long(),
        "completion_mask": spread(batch["targets"] != IGNORE_INDEX).long(),
        "pixel_values": torch.cat([batch["images"], batch["images"]]),
        "ref_chosen_logps": batch["ref_chosen"].to(settings.dtype),
        "ref_rejected_logps": batch["ref_rejected"].to(settings.dtype),
    }


BUILDERS: dict[str, Callable[[Settings], tuple[Any, Step]]] = {
    "plain": plain,
    "trl": trl,
    "trl given": partial(trl, reference_given=True),
    "ours": ours,
}


# --- Running them, each in a process of its own ----------------------------------------------------------------------


def prepare(settings: Settings, with_trl: bool) -> Floor:
    """Writes the random checkpoint, and the same as llava-hf's: whether they agree is seen from the log-probs later."""
    from llava.model.builder import read_checkpoint
    from llava.model.write_hf import write_hf

    write_checkpoint(settings.folder, settings.shape, settings.device, settings.dtype)
    if with_trl:
        (settings.folder / "hf").mkdir()
        write_hf(*read_checkpoint(str(settings.folder)), settings.folder / "hf")
    size = size_of(llava(settings, "sdpa"))
    pairs = [settings.shape.pair.groups] * settings.pairs
    flops = step_flops(size, pairs, [True] * len(pairs), images=len(pairs), frozen_weights=False)
    return Floor(flops, matmul_rate(settings.device, settings.dtype))


def measure(settings: Settings, way: str) -> Measured | None:
    """Steps of one way, after a first one that warms up; None where the memory does not suffice."""
    try:
        model, step = settings.build(way)
        memory = PeakMemory(settings.device)
        logps = step().tolist()
        times = []
        for _ in range(settings.steps):
            model.zero_grad(set_to_none=True)
            times.append(time_of(step, settings.device))
        return Measured(times, memory.before, memory.bytes, logps)
    except torch.OutOfMemoryError:
        return None


def train_fully(settings: Settings) -> Training | None:
    """Three optimizer steps of DAMA's training on all weights; None where the memory does not suffice."""
    from transformers.trainer_callback import PrinterCallback

    from llava.train.arguments import parse_arguments
    from llava.train.dpo_data import DPODataset
    from llava.train.dpo_trainer import LLaVA15DPOTrainer
    from llava.train.family import ImagePreparation
    from llava.train.setup_model import setup_model

    folder, on_gpu = str(settings.folder), settings.device.type == "cuda"
    arguments = parse_arguments(
        ["--task", "DPO", "--model_name_or_path", folder, "--data_path", folder, "--image_folder", folder,
         "--per_device_train_batch_size", str(settings.pairs), "--output_dir", f"{folder}/training",
         "--gradient_accumulation_steps", str(PAIRS_A_STEP // settings.pairs), "--max_steps", "3", "--save_strategy",
         "no", "--optim", "adamw_torch_fused", "--logging_steps", "1", "--report_to", "none", "--disable_tqdm", "True",
         "--check_reference", "False", "--use_cpu", str(not on_gpu), "--bf16", str(on_gpu)]
    )  # fmt: skip
    memory = PeakMemory(settings.device)
    try:
        model, tokenizer, processor = setup_model(arguments)
        pairs = random_pairs(settings.shape, PAIRS_A_STEP)
        write_images(settings.folder, settings.shape, PAIRS_A_STEP)
        dataset = DPODataset(pairs, folder, ImagePreparation(processor, model.config))
        trainer = LLaVA15DPOTrainer(model, tokenizer, arguments[2], train_dataset=dataset)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    except torch.OutOfMemoryError:
        return None
    rates = [row["speed/pairs_per_second"] for row in trainer.state.log_history if "speed/pairs_per_second" in row]
    return Training(rates[1:], memory.before + memory.bytes)


def in_a_process(settings: Settings, work: Callable[..., Any], *arguments: Any) -> Any:
    """What the work returns, done by a new process on its number of threads."""
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=set_up, initargs=(settings.threads,)) as process:
        return process.submit(work, settings, *arguments).result()


def set_up(threads: int) -> None:
    """Fix the number of CPU threads and silence libraries' warnings and progress bars."""
    import transformers

    logging.disable(logging.WARNING)
    torch.set_num_threads(threads)
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    warnings.simplefilter("ignore")


# --- The report ------------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure all ways in turn and print medians and ratios."""
    args = parse_arguments()
    ways = [way for way in args.ways if not way.startswith("trl") or find_spec("trl")]
    if ways != args.ways:
        log("TRL is left out: it is not installed (pip install trl==1.16.0)")
    with tempfile.TemporaryDirectory(dir=args.scratch, prefix="bench_dpo_step_") as folder:
        settings = Settings(Path(folder), SHAPES[args.shape], args.pairs, args.threads, args.steps)
        log(describe(args, settings))
        floor = in_a_process(settings, prepare, any(way.startswith("trl") for way in ways))
        log(f"a step needs {floor.flops / 1e9:.3g} GFLOP; matrix products run at {floor.rate / 1e9:.0f} GFLOP/s")
        runs: Runs = {way: [] for way in ways}
        for _ in tqdm(range(args.repeats), unit="repeat", desc="the ways in turn"):
            for way in ways:
                runs[way].append(in_a_process(settings, measure, way))
        training = in_a_process(settings, train_fully) if args.train else None
    fitting: Fitting = {way: [run for run in of_way if run] for way, of_way in runs.items() if all(of_way)}
    say_figures(settings, runs, fitting, floor)
    ratios = ratios_to_ours(fitting)
    for name, ratio in ratios.items():
        log(f"{name:<46} {ratio}")
    if args.train:
        log(describe_training(training))
    if args.json:
        found = {way: [asdict(run) for run in of_way] for way, of_way in fitting.items()}
        figures = {name: asdict(ratio) for name, ratio in ratios.items()}
        write_json(args.json, {"shape": args.shape, "runs": found, "ratios": figures, "floor": asdict(floor),
                               "training": training and asdict(training)})  # fmt: skip


def describe(args: argparse.Namespace, settings: Settings) -> str:
    """Header of the output: sizes, precision, device and number of repeats."""
    pair = settings.shape.pair
    prefix, chosen, rejected = pair.prefix, pair.chosen, pair.rejected
    device = torch.cuda.get_device_name() if settings.device.type == "cuda" else f"{args.threads} CPU thread(s)"
    return (
        f"shape {args.shape}: {args.pairs} pairs, prefix {prefix} ({settings.shape.patches} of them the picture's), "
        f"answers {chosen} + {rejected} tokens, {str(settings.dtype).removeprefix('torch.')}, {device}; {args.repeats} "
        f"times {args.steps} steps of each way in turn: medians (smallest to largest)"
    )


def say_figures(settings: Settings, runs: Runs, fitting: Fitting, floor: Floor) -> None:
    """A line for each way, and how far their log-probs are apart."""
    log(f"{'':<10}{'s a step':>31}{'processor s a step':>31}{'GB above the model':>31}{'share of peak':>14}")
    for way in runs:
        if way not in fitting:
            log(f"{way:<10} does not fit into the memory")
            continue
        clock, processor, memory = figures_of(fitting[way])
        share = floor.seconds / (clock if settings.device.type == "cuda" else processor).median
        log(f"{way:<10}{str(clock):>31}{str(processor):>31}{str(memory):>31}{share:>14.1%}")
    if "plain" in fitting and len(fitting) > 1:
        apart = {way: difference(of_way[0], fitting["plain"][0]) for way, of_way in fitting.items() if way != "plain"}
        values = ", ".join(f"{way} {value:.1e}" for way, value in apart.items())
        log(f"mean log-probs of the answers against plain, relative: {values}")


def difference(one: Measured, other: Measured) -> float:
    """Of the mean log-probs of the chosen and of the rejected answers, relative; TRL tells no more than these.

    Theirs has rows for 64 more tokens, as llava-hf's vocabularies do, which take log(32064 / 32000) from every token.
    """
    means, others = (torch.tensor(run.logps).view(2, -1).mean(1) for run in (one, other))
    return float(((means - others) / others).abs().max())


def figures_of(of_way: list[Measured]) -> tuple[Spread, Spread, Spread]:
    """(seconds on the clock, seconds of processor time, gigabytes above the loaded model)."""
    times = [timed for run in of_way for timed in run.times]
    peaks = Spread.of([run.peak / 1e9 for run in of_way])
    return Spread.of([timed.clock for timed in times]), Spread.of([timed.processor for timed in times]), peaks


def ratios_to_ours(fitting: Fitting) -> dict[str, Spread]:
    """Each way over ours, turn by turn."""
    ratios = {}
    for way in [way for way in fitting if way != "ours" and "ours" in fitting]:
        turns = list(zip(fitting[way], fitting["ours"], strict=True))
        for name, figure in FIGURES.items():
            ratios[f"{way} / ours, {name}"] = Spread.of([figure(other) / figure(own) for other, own in turns])
    return ratios


def describe_training(training: Training | None) -> str:
    """Line on full-parameter training; None is one that did not fit into memory."""
    head = f"full-parameter training, {PAIRS_A_STEP} pairs a step: "
    if training is None:
        return f"{head}does not fit into the memory"
    return f"{head}{Spread.of(training.pairs_per_second)} pairs/s, peak {training.peak / 1e9:.1f} GB in all"


def parse_arguments() -> argparse.Namespace:
    """Flags; the defaults of --pairs and --train depend on the shape."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="cpu", help="sizes of the model. Default: %(default)s")
    parser.add_argument("--pairs", type=int, metavar="N", help="pairs in a step. Default: 2; 4 for 7b")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="CPU threads. Default: %(default)s")
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="turns of every way. Default: %(default)s")
    parser.add_argument("--steps", type=int, default=2, metavar="N", help="timed steps a turn. Default: %(default)s")
    parser.add_argument(
        "--ways", nargs="+", choices=BUILDERS, default=[*BUILDERS], help="what to measure. Default: all four"
    )
    parser.add_argument(
        "--train", action=argparse.BooleanOptionalAction,
        help=f"also train all weights, {PAIRS_A_STEP} pairs a step: pairs/s and memory. Default: for 7b",
    )  # fmt: skip
    parser.add_argument("--scratch", type=Path, metavar="DIR", help="where the checkpoint (28 GB for 7b) may lie for "
                        "the time being. Default: the system's")  # fmt: skip
    parser.add_argument("--json", type=Path, metavar="FILE", help="all figures: seconds, bytes, nats")
    args = parser.parse_args()
    if args.pairs is None:
        args.pairs = 4 if args.shape == "7b" else 2
    if args.train is None:
        args.train = args.shape == "7b"
    errors = []
    if args.train and (args.pairs < 1 or PAIRS_A_STEP % args.pairs):
        errors.append(f"--pairs {args.pairs}: expected a divisor of {PAIRS_A_STEP} with --train")
    reject_flags(parser, args, ("pairs", "threads", "repeats", "steps"), errors)
    return args


if __name__ == "__main__":
    end_on_interrupt()
    main()
