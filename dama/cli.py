"""`python -m dama <command>`: flags, the checks before long work, and the summary of each stage.

A command is two functions: add_<command> gives its help and flags, <command> runs it and imports what is heavy.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from dama.console import end_on_interrupt, report_error, say
from dama.images import missing_folders
from dama.pairs import PairsError, PreferencePair, SkippedPair, check_pairs, distinct_images, parse_pairs
from dama.stage import Shard

DESCRIPTION = """\
Data- and model-aware preference alignment of multimodal LLMs, stage by stage. Each stage writes a folder: records as
JSONL and a manifest.json. It is skipped when its output is complete for the same inputs, continued when it was
interrupted, and refused, with the difference named, when its inputs changed.
"""


class CommandError(ValueError):
    """Faults of a command's flags or files, all in one message."""


class Help(argparse.RawDescriptionHelpFormatter):
    """Paragraphs as written, and room for long flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=110)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; 0 on success, 1 after an error that was reported."""
    if argv is None:
        end_on_interrupt()  # the installed command `dama` is not run by python -m
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["doctor"]:  # its flags are those of training
        from llava.estimate import doctor

        return doctor.main(words[1:])
    parser = build_parser()
    args = parser.parse_args(_words(words))
    try:
        args.run(args)
    except Exception as error:
        report_error(error, f"dama {args.command}")
        return 1
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("dama", description=DESCRIPTION, formatter_class=Help)
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher adds it to LOCAL_RANK
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    add_prepare(commands)
    add_hardness(commands)
    add_hardness_show(commands)
    add_reference(commands)
    add_merge(commands)
    add_synth(commands)
    add_upstream(commands)
    commands.add_parser("doctor", help="what a training will meet here: memory, micro-batch, disk, one batch")
    return parser


def _words(argv: Sequence[str]) -> list[str]:
    """--image-folder is taken as --image_folder and `hardness show` as one command; values are left alone."""
    words = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word) for word in argv]
    return ["hardness_show", *words[2:]] if words[:2] == ["hardness", "show"] else words


def fail(faults: Sequence[str]) -> NoReturn:
    """Reports all faults of a command in one message."""
    raise CommandError("\n\n".join(faults))


# --------------------------------------------------------------------------------------- what commands on pairs share


def add_pair_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that reads pairs and writes a stage."""
    group = parser.add_argument_group("pairs and output")
    group.add_argument("--data", required=True, metavar="FILE", help="pairs: JSON list or JSONL, fields see above")
    group.add_argument(
        "--image_folder", action="append", required=True, metavar="DIR",
        help="folder that the image paths start from. Given more than once, the last folder that "
        "holds a path counts, and symbolic links may lead from one into another",
    )  # fmt: skip
    group.add_argument("--out", required=True, metavar="DIR", help="folder of this stage's output, made when absent")
    group.add_argument("--overwrite", action="store_true", help="start anew where --out holds a stage of other inputs")
    group.add_argument(
        "--on_bad_image",
        choices=("fail", "skip"),
        default="fail",
        help="missing or unreadable images: report all and stop, or leave their pairs out and list them in the "
        "manifest. Default: fail",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=min(8, os.cpu_count() or 1),
        metavar="N",
        help="processes that read and decode images ahead; 0: none. Default: CPU cores, at most 8 (%(default)s)",
    )


def pair_flag_faults(args: argparse.Namespace) -> list[str]:
    """Faults of those flags that can be seen without reading the pairs."""
    faults = []
    if not Path(args.data).is_file():
        faults.append(f"--data {args.data}: no such file")
    faults += [f"--image_folder {folder}: no such folder" for folder in missing_folders(args.image_folder)]
    if args.workers < 0:
        faults.append(f"--workers {args.workers}: expected 0 or more processes")
    out = Path(args.out)
    existing = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        faults.append(f"--out {out}: {existing} is not a folder that can be written to")
    return faults


def load_pairs(args: argparse.Namespace, faults: Sequence[str]) -> tuple[list[PreferencePair], list[SkippedPair]]:
    """The usable pairs of --data and those left out; every image is decoded once.

    Raises CommandError with `faults`, the flags', and all of the pairs' in one message.
    """
    flags = [*pair_flag_faults(args), *faults]
    if not Path(args.data).is_file() or missing_folders(args.image_folder):
        fail(flags)
    try:
        pairs, row_faults = parse_pairs(args.data)
        good, skipped = check_pairs(
            pairs,
            args.image_folder,
            args.on_bad_image,
            subject=args.data,
            faults=row_faults,
            workers=max(1, args.workers),
            progress=int(os.environ.get("RANK", "0")) == 0,
        )
    except PairsError as error:
        fail([*flags, str(error)])
    if flags:
        fail(flags)
    for pair in skipped[:5]:
        say(f"skipped row {pair.id}: {pair.reason}")
    if len(skipped) > 5:
        say(f"... and {len(skipped) - 5} more, all listed in the manifest")
    return good, skipped


def device_faults(device: str) -> list[str]:
    import torch

    if device == "auto" or device == "cpu":
        return []
    if not re.fullmatch(r"cuda(:\d+)?", device):
        return [f"--device {device}: expected auto, cpu, cuda or cuda:N"]
    found = torch.cuda.device_count()
    if int(device.partition(":")[2] or 0) >= found:
        return [f"--device {device}: this machine has {found} CUDA devices that torch can use"]
    return []


def pick_device(device: str) -> str:
    """auto: the CUDA device of this process's rank on its machine where there is one, else the CPU."""
    import torch

    if device != "auto" or not torch.cuda.is_available():
        return "cpu" if device == "auto" else device
    rank = os.environ.get("LOCAL_RANK") or os.environ.get("SLURM_LOCALID") or "0"
    return f"cuda:{int(rank) % torch.cuda.device_count()}"


def add_shard_flag(group: Any) -> None:
    group.add_argument(
        "--shard",
        metavar="I/N",
        help="do only part I (from 0) of N; the last to finish merges them into the bytes of an undivided run. "
        "Default: the rank under torchrun, DeepSpeed's launcher or srun; without one of them all",
    )


@contextmanager
def speaking() -> Iterator[None]:
    """The rank that merged tells the result, whichever it is; otherwise only rank 0 is heard."""
    rank = os.environ.pop("RANK", None)
    try:
        yield
    finally:
        os.environ.update({} if rank is None else {"RANK": rank})


def pick_shard(shard: str | None, faults: list[str]) -> Shard:
    """As the flag or the launcher says; a fault of the flag is added to `faults`."""
    if shard is None:
        return Shard.from_launcher()
    try:
        return Shard.parse(shard)
    except ValueError as error:
        faults.append(f"--{error}")
        return Shard.from_launcher()


# ------------------------------------------------------------------------------------------------------------ prepare


def add_prepare(commands: Any) -> None:
    from dama.prepare import command

    parser = commands.add_parser(
        "prepare", help=command.HELP, description=command.DESCRIPTION, epilog=command.EXAMPLES, formatter_class=Help
    )
    parser.set_defaults(run=command.run)
    command.add_flags(parser)


# ----------------------------------------------------------------------------------------------------------- hardness

HARDNESS = """\
Hardness of each preference pair, for DAMA's data-aware strategy (Eq. 3-5).

Both answers are split into statements S_w and S_l that a CLIP text tower can read. CLIP scores each statement against
the image, and
    delta = sum of scores over S_w - sum of scores over S_l
is large where the preferred answer plainly fits the image better, and small or negative for hard pairs. delta_bar is
the mean of delta over all pairs. Training weighs beta with sigmoid(delta) / sigmoid(delta_bar).

Rules split by default. With --splitter llm a model does it, as in the paper; each of its splits is checked, and rules
split the answers whose words it changed. `python -m dama hardness show OUT` makes a page of the result.

Fields of --data: idx or id, image_path or image, question, chosen, rejected, and optionally kind, origin_dataset,
origin_split (RLAIF-V's names) and chosen_logits, rejected_logits (scores of the released DAMA data, see --from_scores).

Writes OUT/hardness.jsonl   id, delta, statements, scores and number of words of both answers, kind, source, image
       OUT/manifest.json    delta_bar, counts, spread of delta per kind, skipped pairs, and the inputs' fingerprint
       OUT/splits.jsonl     what the LLM replied, with --splitter llm
"""

HARDNESS_EXAMPLES = """\
examples:
  python -m dama hardness --data pairs.json --image_folder images --out runs/hardness
  python -m dama hardness --data pairs.json --image_folder images --out runs/hardness --clip path/to/clip_folder
  python -m dama hardness --data released.json --image_folder images --out runs/hardness --from_scores
  python -m dama hardness --data pairs.json --image_folder images --out runs/hardness --splitter llm \\
      --base_url http://localhost:8000/v1 --judge_model Qwen/Qwen3-8B
  torchrun --nproc_per_node 4 -m dama hardness --data pairs.json --image_folder images --out runs/hardness
"""


def add_hardness(commands: Any) -> None:
    parser = commands.add_parser(
        "hardness",
        help="score how plainly each preferred answer fits its image better",
        description=HARDNESS,
        epilog=HARDNESS_EXAMPLES,
        formatter_class=Help,
    )
    parser.set_defaults(run=hardness)
    add_pair_flags(parser)
    group = parser.add_argument_group("scores")
    group.add_argument(
        "--clip",
        default="ViT-L-14-336-quickgelu",
        metavar="NAME|DIR",
        help="open_clip architecture, hf-hub:ORG/NAME, or a folder with open_clip_config.json and "
        "open_clip_model.safetensors. Default: %(default)s, the CLIP whose vision tower LLaVA-1.5 uses",
    )
    group.add_argument(
        "--pretrained",
        metavar="TAG",
        help="open_clip's name of the weights, fetched at first use, or a file of them; `random` for seeded random "
        "weights (to try things out only). Default: openai; a folder has its own weights",
    )
    group.add_argument(
        "--scale",
        choices=("cosine", "logit"),
        default="cosine",
        help="score: cosine similarity in [-1, 1], or CLIP's logit, about 100 times that. Default: cosine",
    )
    group.add_argument(
        "--reduction",
        choices=("sum", "mean"),
        default="sum",
        help="of an answer's scores: sum (Eq. 5; favours answers with more statements) or mean. Default: sum",
    )
    group.add_argument(
        "--from_scores",
        action="store_true",
        help="take each pair's chosen_logits and rejected_logits instead of running a CLIP",
    )
    group = parser.add_argument_group("statements")
    group.add_argument("--splitter", choices=("rules", "llm"), default="rules", help="what splits. Default: rules")
    group.add_argument("--splitter_model", metavar="DIR", help="llm: a chat model in Hugging Face's format; or")
    group.add_argument("--base_url", metavar="URL", help="llm: an OpenAI-compatible server, its key in OPENAI_API_KEY")
    group.add_argument("--judge_model", metavar="NAME", help="llm: the model's name on that server")
    group.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="llm: requests to the server at a time. Default: 8"
    )
    group.add_argument(
        "--request_timeout", type=float, default=60.0, metavar="SECONDS",
        help="llm: what the server may take for an attempt, of which there are up to 7. Default: 60",
    )  # fmt: skip
    group.add_argument(
        "--omit", nargs="+", default=(), choices=("max_tokens", "temperature"), metavar="SETTING",
        help="llm: settings that the server refuses, to be left to it: max_tokens, temperature",
    )  # fmt: skip
    group = parser.add_argument_group("speed")
    group.add_argument("--batch_size", type=int, default=32, metavar="N", help="images at a time. Default: %(default)s")
    group.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of CLIP's weights and arithmetic. Default: fp32"
    )
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N. Default: auto")
    add_shard_flag(group)


def hardness(args: argparse.Namespace) -> None:
    """Checks everything, loads the CLIP, runs the stage, prints the summary."""
    faults = hardness_flag_faults(args)
    shard = pick_shard(args.shard, faults)
    pairs, skipped = load_pairs(args, faults)
    from dama.hardness.clip import ClipError, load_clip
    from dama.hardness.score import run_hardness

    try:
        device = pick_device(args.device)
        scorer = None if args.from_scores else load_clip(args.clip, args.pretrained, device, args.precision)
    except ClipError as error:
        raise CommandError(str(error)) from error
    if scorer is not None:
        counts = f"{len(pairs)} pairs on {len(distinct_images(pairs))} images"
        part = f", shard {shard}" if shard.count > 1 else ""
        say(f"hardness: {counts}, {_clip_words(scorer.identity)}, {device}{part}")
    manifest = run_hardness(
        pairs,
        args.image_folder,
        args.out,
        scorer,
        scale=args.scale,
        reduction=args.reduction,
        splitter=_llm_splitter(args, shard, device) if args.splitter == "llm" else None,
        batch_size=args.batch_size,
        workers=args.workers,
        shard=shard,
        overwrite=args.overwrite,
        skipped=skipped,
        progress=args.shard is not None or shard.index == 0,
    )
    if manifest is not None:
        with speaking():
            say_hardness(args.out, manifest)


def _llm_splitter(args: argparse.Namespace, shard: Shard, device: str) -> Any:
    from dama.hardness.split_llm import local_splitter, server_splitter

    cache = shard.folder(Path(args.out)) / "splits.jsonl"
    if args.splitter_model:
        return local_splitter(args.splitter_model, cache, device, args.precision)
    return server_splitter(_chat_settings(args), cache)


def _chat_settings(args: argparse.Namespace) -> Any:
    from dama.chat import ChatSettings
    from dama.hardness.split_llm import REPLY_TOKENS

    limits = {"concurrency": args.concurrency, "timeout": args.request_timeout}
    return ChatSettings(args.base_url, args.judge_model, max_tokens=REPLY_TOKENS, **limits).without(args.omit)


def splitter_faults(args: argparse.Namespace) -> list[str]:
    """With --splitter llm there is a server and its model's name, or a local model, and not both; else neither."""
    given = [f"--{name}" for name in ("splitter_model", "base_url", "judge_model") if getattr(args, name) is not None]
    if args.splitter == "rules":
        return [f"{', '.join(given)}: only used by --splitter llm"] if given else []
    if given not in (["--splitter_model"], ["--base_url", "--judge_model"]):
        expected = "--splitter_model DIR, or --base_url URL with --judge_model NAME"
        return [f"--splitter llm: expected {expected}; got {', '.join(given) or 'neither'}"]
    if args.splitter_model and not Path(args.splitter_model).is_dir():
        return [f"--splitter_model {args.splitter_model}: no such folder"]
    try:
        return [] if args.splitter_model or _chat_settings(args) else []
    except ValueError as error:
        return [str(error)]


def hardness_flag_faults(args: argparse.Namespace) -> list[str]:
    faults = device_faults(args.device) + splitter_faults(args)
    if args.batch_size < 1:
        faults.append(f"--batch_size {args.batch_size}: expected 1 image or more")
    if args.from_scores:
        if args.splitter != "rules":
            faults.append("--splitter: answers whose scores are given are not split\nRemedy: leave it out")
        if args.scale != "cosine":
            faults.append("--scale: the scores in the file are taken as they are\nRemedy: leave it out")
        return faults
    from dama.hardness.clip import clip_faults

    return faults + clip_faults(args.clip, args.pretrained)


def _clip_words(identity: dict[str, str]) -> str:
    weights = "RANDOM weights" if identity["pretrained"] == "random" else f"{identity['pretrained']} weights"
    return f"CLIP {identity['model']} ({weights}, {identity['precision']})"


def say_hardness(out: str, manifest: dict[str, Any]) -> None:
    """The stage's figures: counts, spread of delta per kind, a histogram, and where they lie."""
    from dama.stage import read_stage

    summary, time = manifest["summary"], manifest["time"]
    counts = summary["statements"]
    say(f"pairs {summary['pairs']}, left out {len(summary['skipped'])}")
    say(f"statements {counts['chosen']} of chosen answers, {counts['rejected']} of rejected ones")
    if isinstance(manifest["fingerprint"].get("splitter"), dict):
        reasons = ", ".join(f"{reason}: {count}" for reason, count in summary["fallbacks"].items()) or "none"
        say(f"answers split by rules instead of the LLM, of {2 * summary['pairs']}: {reasons}")
    say(f"{'delta of':<24}{'pairs':>8}{'mean':>10}{'sd':>10}{'min':>10}{'max':>10}{'negative':>10}")
    for kind, spread in summary["spread"].items():
        figures = "".join(f"{spread[name]:>10.4f}" for name in ("mean", "sd", "min", "max"))
        say(f"{kind[:23]:<24}{spread['pairs']:>8}{figures}{100 * spread['negative']:>8.1f} %")
    for line in histogram([record["delta"] for record in read_stage(out, "hardness")[1]]):
        say(line)
    for unit, value in summary["correlations"].items():
        if value is not None:
            say(f"correlation of delta with the answers' difference in {unit}: {value:+.2f}")
    say(f"delta_bar = {summary['delta_bar']:.6f}")
    say(f"{time['records']} pairs in {time['seconds']:.1f} s; written to {out}")


def histogram(values: Sequence[float], bins: int = 12, width: int = 50) -> list[str]:
    """One line a bin: its lower edge, a bar as long as its share of the fullest, its count."""
    low, high = min(values), max(values)
    step = (high - low) / bins
    if step == 0:
        return [f"{low:>10.4f} {'#' * width} {len(values)}"]
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / step))] += 1
    bars = ["#" * -(-count * width // max(counts)) for count in counts]
    return [f"{low + index * step:>10.4f} {bar} {count}" for index, (bar, count) in enumerate(zip(bars, counts))]


# ------------------------------------------------------------------------------------------------------ hardness show

HARDNESS_SHOW = """\
What `python -m dama hardness` found, as a page with pictures: how delta is distributed by source and by kind of pair,
how far it is only the answers' difference in length, and the easiest, the hardest and the most negative pairs with
their statements and scores.

Writes OUT/hardness.html   the page, with everything inside
       OUT/hardness.png    the same as one picture
"""


def add_hardness_show(commands: Any) -> None:
    parser = commands.add_parser(
        "hardness_show",
        help="page and picture of what hardness found; also `hardness show`",
        description=HARDNESS_SHOW,
        formatter_class=Help,
    )
    parser.set_defaults(run=hardness_show)
    parser.add_argument("folder", metavar="DIR", help="the --out of `python -m dama hardness`")
    parser.add_argument(
        "--image_folder", action="append", metavar="DIR",
        help="folder of the images, needed where they are not in DIR; may be given more than once",
    )  # fmt: skip
    parser.add_argument("--out", metavar="DIR", help="folder for the page and the picture. Default: DIR")
    parser.add_argument("--pairs", type=int, default=6, metavar="N", help="pairs in each group. Default: %(default)s")


def hardness_show(args: argparse.Namespace) -> None:
    from dama.hardness.show import write_hardness_page

    if args.pairs < 1:
        fail([f"--pairs {args.pairs}: expected 1 or more"])
    written = write_hardness_page(args.folder, args.out or args.folder, args.image_folder, args.pairs)
    say(f"written to {' and '.join(map(str, written))}")


# -------------------------------------------------------------------------------------------------------------- merge

MERGE = """\
Merges the shards of a stage into the bytes of an undivided run. The last shard to finish does it by itself; this is for
shards that were brought together from several disks. Gaps, overlaps and shards of other inputs are refused by name.
"""
SUMMARISED_BY = {  # stage -> the module whose `summarise` makes its summary
    "hardness": "dama.hardness.score",
    "reference": "dama.train.reference",
    "answers": "llava.eval.generate",
}


def add_merge(commands: Any) -> None:
    parser = commands.add_parser(
        "merge", help="join the shards of a stage", description=MERGE, formatter_class=Help
    )  # fmt: skip
    parser.set_defaults(run=merge)
    parser.add_argument("folder", metavar="DIR", help="the stage's --out, with shards/ in it")


def merge(args: argparse.Namespace) -> None:
    from dama.stage import merge_shards, stage_of

    name = stage_of(args.folder)
    if name not in SUMMARISED_BY:
        fail([f"{args.folder} holds the stage {name}, expected one of {', '.join(SUMMARISED_BY)}"])
    merge_shards(args.folder, name, importlib.import_module(SUMMARISED_BY[name]).summarise)


# ---------------------------------------------------------------------------------------------------------- reference

REFERENCE = """\
Reference log-probs: log pi_ref(y | I, x) of both answers of each pair, summed over the answer's tokens ("</s>"
included), in nats. Training compares the policy with them (Eq. 1) and needs no second copy of the model.

It runs on the training's own model set-up and data path: give it the checkpoint, template and image preparation that
training will start from. Training refuses log-probs of another model, of other pairs or of other images.

At the end of each shard 0.5 % of its pairs, at least one, are computed again, each alone; the stage stops where that
gives something else than rounding explains (0.001 nats in fp32, 0.1 in bf16, times the root of the answer's tokens).

Writes OUT/reference.jsonl  id, chosen_logp, rejected_logp, chosen_tokens, rejected_tokens
       OUT/manifest.json    counts, skipped pairs, and the inputs' fingerprint
"""

REFERENCE_EXAMPLES = """\
examples:
  python -m dama reference --model_name_or_path liuhaotian/llava-v1.5-7b --data pairs.json --image_folder images \\
      --precision bf16 --out runs/reference
  deepspeed --include localhost:0,1,2,3 --module dama reference --model_name_or_path liuhaotian/llava-v1.5-7b \\
      --data pairs.json --image_folder images --precision bf16 --out runs/reference
"""


def add_reference(commands: Any) -> None:
    parser = commands.add_parser(
        "reference",
        help="log-probs of both answers under the model that training starts from",
        description=REFERENCE,
        epilog=REFERENCE_EXAMPLES,
        formatter_class=Help,
    )
    parser.set_defaults(run=reference)
    add_pair_flags(parser)
    group = parser.add_argument_group("model")
    group.add_argument("--model_name_or_path", required=True, metavar="NAME|DIR", help="the reference model pi_ref")
    group.add_argument("--version", default="v1", metavar="NAME", help="prompt template. Default: %(default)s")
    group.add_argument(
        "--image_aspect_ratio",
        choices=("pad", "square"),
        help="pad to a square with the mean colour, or resize and cut the centre. Default: the checkpoint's, else pad",
    )
    group.add_argument("--vision_tower", metavar="NAME|DIR", help="CLIP tower. Default: the checkpoint's own")
    group.add_argument(
        "--model_max_length", type=int, default=2048, metavar="N", help="longest sequence in tokens. Default: 2048"
    )
    group.add_argument(
        "--on_long_pair",
        choices=("fail", "skip"),
        default="fail",
        help="pairs longer than that: report all and stop, or leave them out and list them. Default: fail",
    )
    group = parser.add_argument_group("speed")
    group.add_argument("--batch_size", type=int, default=8, metavar="N", help="pairs at a time. Default: %(default)s")
    group.add_argument(
        "--precision", choices=("fp32", "bf16"), default="fp32", help="of weights and arithmetic. Default: fp32"
    )
    group.add_argument(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="auto",
        help="CUDA_VISIBLE_DEVICES chooses among several GPUs. Default: auto",
    )
    add_shard_flag(group)


def reference(args: argparse.Namespace) -> None:
    """Checks flags and pairs, then runs the stage on the training's own code."""
    from llava.supported import validate_supported_model

    validate_supported_model(args.model_name_or_path, "--model_name_or_path")
    faults = device_faults(args.device)
    if args.batch_size < 1:
        faults.append(f"--batch_size {args.batch_size}: expected 1 pair or more")
    shard = pick_shard(args.shard, faults)
    pairs, skipped = load_pairs(args, faults)
    from dama.train.reference import describe
    from llava.train.arguments import DataArguments, ModelArguments, TrainingArguments
    from llava.train.reference import run_reference

    arguments = (
        ModelArguments(
            model_name_or_path=args.model_name_or_path, version=args.version, vision_tower=args.vision_tower
        ),
        DataArguments(
            data_path=args.data,
            image_folder=args.image_folder,
            image_aspect_ratio=args.image_aspect_ratio,
            on_long_pair=args.on_long_pair,
        ),
        TrainingArguments(
            output_dir=args.out,
            task="DPO",
            bf16=args.precision == "bf16",
            use_cpu=pick_device(args.device) == "cpu",
            model_max_length=args.model_max_length,
            dataloader_num_workers=args.workers,
            report_to="none",
        ),
    )
    manifest = run_reference(
        arguments,
        pairs,
        skipped,
        args.out,
        args.batch_size,
        shard=shard,
        overwrite=args.overwrite,
        progress=args.shard is not None or shard.index == 0,
    )
    if manifest is not None:
        with speaking():
            describe(manifest, args.out)


# -------------------------------------------------------------------------------------------------------------- synth


def add_synth(commands: Any) -> None:
    from dama.synth import command

    parser = commands.add_parser(
        command.NAME,
        help=command.HELP,
        description=command.DESCRIPTION,
        epilog=command.EXAMPLES,
        formatter_class=Help,
    )
    command.add_flags(parser)
    parser.set_defaults(run=lambda args: command.run(args, open_checkpoint))


def open_checkpoint(checkpoint: str, device: str) -> Any:
    """A responder of dama.synth that answers with one of this repository's checkpoints."""
    from dama.synth.respond import DrivenResponder, Sampling
    from llava.generation.local import Answerer
    from llava.generation.request import Decoding, Request

    def decoding(sampling: Sampling, seed: int) -> Decoding:
        return Decoding(
            sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            samples=sampling.samples,
            seed=seed,
        )

    return DrivenResponder(lambda: Answerer(checkpoint, device=device), Request, decoding)


# ----------------------------------------------------------------------------------------------------------- upstream

UPSTREAM = """\
Compares this repository with a LLaVA checkout, by syntax tree: files of llava/ and scripts/, public names, signatures,
flags and defaults of the command lines, fields of config.json. Nothing of the checkout is imported or run.

A name counts as there when it can be imported from the same module. What differs is printed with how, what is left out
with why. Ends with status 1 when a name is missing and no reason is known.
"""


def add_upstream(commands: Any) -> None:
    parser = commands.add_parser(
        "upstream",
        help="what is the same, changed, added and left out beside a LLaVA checkout",
        description=UPSTREAM,
        formatter_class=Help,
    )
    parser.set_defaults(run=upstream)
    parser.add_argument("checkout", metavar="PATH_TO_A_LLAVA_CHECKOUT", help="folder with llava/ and scripts/")
    parser.add_argument("--html", metavar="FILE", help="write the comparison as a page, too")
    parser.add_argument("--all", action="store_true", help="list the names that are the same or added, too")


def upstream(args: argparse.Namespace) -> None:
    """Prints the comparison; an error where names are missing without a reason."""
    from dama.upstream import UpstreamError, compare, inventory_of, report_lines, write_page

    ours = Path(__file__).resolve().parents[1]
    if not (ours / "scripts").is_dir():
        fail([f"'{ours}': expected this repository's checkout, with scripts/, got an installed package"])
    try:
        findings = compare(inventory_of(args.checkout), inventory_of(ours))
    except UpstreamError as error:
        raise CommandError(str(error)) from error
    for line in report_lines(findings, everything=args.all):
        say(line)
    if args.html:
        write_page(findings, args.html, str(args.checkout))
        say(f"written to {args.html}")
    missing = [f"{finding.file}  {finding.name}".rstrip() for finding in findings if finding.state == "missing"]
    if missing:
        remedy = "Remedy: implement them, or give the reason in LEFT_OUT of dama/upstream.py"
        fail(["\n  ".join([f"missing without a reason ({len(missing)}):", *missing]) + f"\n{remedy}"])
