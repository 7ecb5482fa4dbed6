"""`python -m dama hardness`: flags, checks before long work, and the summary."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dama.console import log
from dama.finished import StageCall
from dama.flags import (
    CommandError,
    add_batch_flags,
    add_pair_flags,
    add_shard_flag,
    device_errors,
    load_pairs,
    logging_on_every_rank,
    paths_missing,
    pick_device,
    pick_shard,
)
from dama.pairs import distinct_images
from dama.stage import Shard

if TYPE_CHECKING:
    from dama.hardness.clip import ClipScorer

DESCRIPTION = """\
Hardness of each preference pair, for DAMA's data-aware strategy (Eq. 3-5).

Both answers are split into statements S_w and S_l that a CLIP text tower can read. CLIP scores each statement against
the image, and
    delta = sum of scores over S_w - sum of scores over S_l
is large if the preferred answer plainly fits the image better, and small or negative for hard pairs. delta_bar is
the mean of delta over all pairs. Training weighs beta with sigmoid(delta) / sigmoid(delta_bar).

Answers are split by rules, or with --splitter llm by a model as in the paper. Each of its splits is checked; answers
whose words it changed are split by rules. `python -m dama hardness show OUT` makes a page of the result.

Fields of --data: idx or id, image_path or image, question, chosen, rejected, and optionally kind, origin_dataset,
origin_split (RLAIF-V's names) and chosen_logits, rejected_logits (scores of the released DAMA data, see --from_scores).

Writes OUT/hardness.jsonl   id, delta, statements, scores and number of words of both answers, kind, source, image
       OUT/manifest.json    delta_bar, counts, spread of delta per kind, skipped pairs, and the inputs' fingerprint
       OUT/splits.jsonl     what the LLM replied, with --splitter llm
"""

EXAMPLES = """\
examples:
  python -m dama hardness --data pairs.json --image_folder images --out runs/hardness
  python -m dama hardness --data pairs.json --image_folder images --out runs/hardness --clip path/to/clip_folder
  python -m dama hardness --data pairs.json --image_folder images --out runs/hardness \\
      --clip google/siglip2-so400m-patch14-384
  python -m dama hardness --data released.json --image_folder images --out runs/hardness --from_scores
  python -m dama hardness --data pairs.json --image_folder images --out runs/hardness --splitter llm \\
      --base_url http://localhost:8000/v1 --judge_model Qwen/Qwen3-8B
  torchrun --nproc_per_node 4 -m dama hardness --data pairs.json --image_folder images --out runs/hardness
"""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags of the stage."""
    add_pair_flags(parser)
    _add_score_flags(parser.add_argument_group("scores"))
    _add_splitter_flags(parser.add_argument_group("statements"))
    group = parser.add_argument_group("speed")
    add_batch_flags(group, "images", 32)
    group.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N (default: auto)")
    add_shard_flag(group)


def _add_score_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--clip", default="ViT-L-14-336-quickgelu", metavar="NAME|DIR",
        help="open_clip architecture, hf-hub:ORG/NAME, or a folder with open_clip_config.json and "
        "open_clip_model.safetensors; or a CLIP or SigLIP in Hugging Face format, as a folder or ORG/NAME such as "
        "google/siglip2-so400m-patch14-384 (default: %(default)s, the CLIP whose vision tower LLaVA-1.5 uses)",
    )  # fmt: skip
    group.add_argument(
        "--pretrained", metavar="TAG",
        help="open_clip's name of the weights, downloaded on first use, or a file of weights; `random` for seeded "
        "random weights, only to try things out (default: openai; a folder has its own weights)",
    )  # fmt: skip
    group.add_argument(
        "--scale", choices=("cosine", "logit"), default="cosine",
        help="score: cosine similarity in [-1, 1], or CLIP's logit, about 100 times that (default: cosine)",
    )  # fmt: skip
    group.add_argument(
        "--reduction", choices=("sum", "mean"), default="sum",
        help="reduction of an answer's scores: sum (Eq. 5; favors answers with more statements) or mean (default: sum)",
    )  # fmt: skip
    group.add_argument(
        "--from_scores", action="store_true",
        help="take each pair's chosen_logits and rejected_logits instead of running a CLIP",
    )  # fmt: skip


def _add_splitter_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--splitter", choices=("rules", "llm"), default="rules",
        help="how answers are split into statements (default: rules)",
    )  # fmt: skip
    group.add_argument(
        "--splitter_model", metavar="DIR",
        help="chat model in Hugging Face format that splits, with --splitter llm; alternative to --base_url",
    )  # fmt: skip
    group.add_argument(
        "--base_url", metavar="URL",
        help="OpenAI-compatible server that splits, with --splitter llm; its key is read from OPENAI_API_KEY",
    )  # fmt: skip
    group.add_argument("--judge_model", metavar="NAME", help="name of the model on that server")
    group.add_argument(
        "--concurrency",
        type=int,
        default=8,
        metavar="N",
        help="concurrent requests to the server (default: 8)",
    )
    group.add_argument(
        "--request_timeout", type=float, default=60.0, metavar="SECONDS",
        help="request timeout in seconds; a request is tried up to 7 times (default: 60)",
    )  # fmt: skip
    group.add_argument(
        "--omit", nargs="+", default=(), choices=("max_tokens", "temperature"), metavar="SETTING",
        help="settings that the server rejects, left out of requests: max_tokens, temperature",
    )  # fmt: skip


def run(args: argparse.Namespace) -> None:
    """Check all inputs, load the CLIP, run the stage, print the summary."""
    call = StageCall.begin("hardness", args)
    if (done := call.manifest()) is not None:
        log_summary(args.out, done)
        return
    errors = flag_errors(args)
    shard = pick_shard(args.shard, errors)
    checked = load_pairs(args, errors)
    from dama.hardness.score import run_hardness

    device = pick_device(args.device)
    scorer = None if args.from_scores else _load_scorer(args, device)
    if scorer is not None:
        shown = sum(bool(pair.image) for pair in checked.pairs)
        counts = f"{shown} pairs on {len(distinct_images(checked.pairs))} images"
        if alone := len(checked.pairs) - shown:
            log(f"hardness: {alone} pairs of texts alone are not scored; training gives them delta_bar")
        part = f", shard {shard}" if shard.count > 1 else ""
        log(f"hardness: {counts}, {_clip_words(scorer.identity)}, {device}{part}")
    manifest = run_hardness(
        checked.pairs,
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
        skipped=checked.skipped,
        progress=args.shard is not None or shard.index == 0,
        data=checked.fingerprint,
    )
    if manifest is not None:
        call.remember(checked.table)
        with logging_on_every_rank():
            log_summary(args.out, manifest)


def _load_scorer(args: argparse.Namespace, device: str) -> ClipScorer:
    from dama.hardness.clip import ClipError, load_clip

    try:
        return load_clip(args.clip, args.pretrained, device, args.precision)
    except ClipError as error:
        raise CommandError(str(error)) from error


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


def splitter_errors(args: argparse.Namespace) -> list[str]:
    """Check that --splitter llm has a server with its model's name, or a local model, and not both."""
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


def flag_errors(args: argparse.Namespace) -> list[str]:
    """Collect errors of the flags that need no look at the pairs."""
    errors = device_errors(args.device) + splitter_errors(args)
    if args.batch_size < 1:
        errors.append(f"--batch_size {args.batch_size}: expected 1 image or more")
    if args.from_scores:
        if args.splitter != "rules":
            errors.append("--splitter: answers whose scores are given are not split\nRemedy: leave it out")
        if args.scale != "cosine":
            errors.append("--scale: the scores in the file are taken as they are\nRemedy: leave it out")
        return errors
    if paths_missing(args):  # reported at once: the imports below take seconds
        return errors
    from dama.hardness.clip import clip_errors

    return errors + clip_errors(args.clip, args.pretrained)


def _clip_words(identity: dict[str, str]) -> str:
    weights = "RANDOM weights" if identity["pretrained"] == "random" else f"{identity['pretrained']} weights"
    return f"CLIP {identity['model']} ({weights}, {identity['precision']})"


def log_summary(out: str, manifest: dict[str, Any]) -> None:
    """Log counts, spread of delta per kind, a histogram and the output folder."""
    from dama.stage import read_stage

    summary, time = manifest["summary"], manifest["time"]
    counts = summary["statements"]
    log(f"pairs {summary['pairs']}, left out {len(summary['skipped'])}")
    log(f"statements {counts['chosen']} of chosen answers, {counts['rejected']} of rejected ones")
    if isinstance(manifest["fingerprint"].get("splitter"), dict):
        reasons = ", ".join(f"{reason}: {count}" for reason, count in summary["fallbacks"].items()) or "none"
        log(f"answers split by rules instead of the LLM, of {2 * summary['pairs']}: {reasons}")
    log(f"{'delta of':<24}{'pairs':>8}{'mean':>10}{'sd':>10}{'min':>10}{'max':>10}{'negative':>10}")
    for kind, spread in summary["spread"].items():
        metrics = "".join(f"{spread[name]:>10.4f}" for name in ("mean", "sd", "min", "max"))
        log(f"{kind[:23]:<24}{spread['pairs']:>8}{metrics}{100 * spread['negative']:>8.1f} %")
    for line in histogram([record["delta"] for record in read_stage(out, "hardness")[1]]):
        log(line)
    for unit, value in summary["correlations"].items():
        if value is not None:
            log(f"correlation of delta with the answers' difference in {unit}: {value:+.2f}")
    log(f"delta_bar = {summary['delta_bar']:.6f}")
    log(f"{time['records']} pairs in {time['seconds']:.1f} s; written to {out}")


def histogram(values: Sequence[float], bins: int = 12, width: int = 50) -> list[str]:
    """Format one line per bin: lower edge, a bar relative to the fullest bin, count."""
    low, high = min(values), max(values)
    step = (high - low) / bins
    if step == 0:
        return [f"{low:>10.4f} {'#' * width} {len(values)}"]
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / step))] += 1
    bars = ["#" * -(-count * width // max(counts)) for count in counts]
    return [f"{low + index * step:>10.4f} {bar} {count}" for index, (bar, count) in enumerate(zip(bars, counts))]
