"""The command's flags and its steps: every choice checked at once, then the steps that were asked for, in order."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dama.completion import SETTINGS
from dama.console import log
from dama.flags import device_errors, pick_device
from dama.redact import redacted
from dama.stage import Record
from dama.synth.images import FORMATS, GUIDANCE, DiffusersPainter, TextToImage, run_images
from dama.synth.prompts import (
    CONTEXT,
    IMAGES,
    RANK_IMAGES,
    RANK_RESPONSES,
    RESPOND,
    STEPS,
    SynthError,
    read_prompts,
    step_folder,
)

if TYPE_CHECKING:
    from dama.synth.context import Marker
    from dama.synth.respond import Responder
    from dama.synth.rewards import Reward

DESCRIPTION = """\
Preference pairs without people, the way of PDS-DPO / Synth-Align (arXiv 2412.17417): pictures are drawn from prompts,
models answer a question about each, and a reward model's best answer is preferred over its worst.

  images          several candidates to each prompt, by guidance scale
  rank-images     the candidate that the image reward likes best is kept
  respond         vision-language models answer, several samples each
  rank-responses  chosen = best, rejected = worst answer, by the response reward
  context         pairs of an answer's first wrong sentence and its correction, behind what was said before it; --marker
                  finds it in every answer of `respond` (SENTINEL, arXiv 2507.12455)
  report          the page again, with --hardness for delta
Without a step the first four run. Each is skipped when complete for the same inputs and continued when interrupted.

A REWARD is KIND:WHAT, and several are combined by mean rank:
  clip:NAME|DIR        open_clip model; cosine of picture and statement          sees the picture
  image-text:NAME|DIR  Hugging Face model with logits_per_image (PickScore ...)  sees the picture
  judge:MODEL          grade by an OpenAI-compatible server (--base_url)         sees the picture
  http:URL             any model behind an endpoint, see below                   sees the picture
  http-text:URL        the same, without the picture                             does NOT see it
  text:NAME|DIR        Hugging Face sequence classifier (ArmoRM ...)             does NOT see it
An endpoint is sent {"items": [{"image": BASE64 or null, "question", "text"}]} and replies {"scores": [...]}.
A RESPONDER is llava:NAME|DIR (a checkpoint of this repository), hf:NAME|DIR (any image-text-to-text model) or
server:MODEL (--base_url).

Never a pair, but counted and listed: refused, black, one-coloured or not-a-number pictures, candidates that are the
same, empty and repeated answers, rewards that are no number or all the same.

Writes OUT/pairs.jsonl    --data of the other commands, with --image_folder OUT
       OUT/pds_dpo.json   the same in PDS-DPO's format
       OUT/images/        each prompt's picture
       OUT/dropped.jsonl  prompts and pictures without a pair, and why; summary.json counts
       OUT/report.html    pictures, candidates, scores, chosen and rejected
       OUT/context_pairs.jsonl  of the step `context`: --data of the other commands, as pairs.jsonl
       OUT/stages/        what each step made
"""
EXAMPLES = """\
examples:
  python -m dama synth --prompts art.txt nature.txt --questions art_q.txt nature_q.txt --out data/synth \\
      --responder hf:llava-hf/llava-v1.6-mistral-7b-hf --responder hf:llava-hf/llava-v1.6-vicuna-7b-hf
  python -m dama synth rank-responses --out data/synth --reward text:Skywork/Skywork-Reward-V2-Llama-3.1-8B
  python -m dama synth context --out data/synth --marker judge:gpt-4o --base_url https://api.openai.com/v1
  python -m dama synth respond --pictures data/synth --out data/round2 --responder llava:checkpoints/round1 --samples 8
"""
REPORT = "report"
DEFAULT_T2I = "stabilityai/stable-diffusion-3-medium-diffusers"
DEFAULT_REWARD = "clip:ViT-L-14-336-quickgelu"
REWARD_KINDS = ("clip", "image-text", "judge", "http", "text", "http-text")
BLIND_KINDS = ("text:", "http-text:")
RESPONDER_KINDS = ("llava", "hf", "server")

CHECKPOINTS = "llava.eval.responder"  # module whose `open_checkpoint` serves llava:CHECKPOINT


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add all flags of the command."""
    steps = (*STEPS, CONTEXT, REPORT)
    parser.add_argument("step", nargs="?", choices=steps, help="one of the steps above. Default: the first four")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the run, made when absent")
    parser.add_argument("--overwrite", action="store_true", help="start a step anew where its inputs changed")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of pictures and answers. Default: %(default)s"
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu, cuda or cuda:N. Default: auto")
    parser.add_argument("--base_url", metavar="URL", help="OpenAI-compatible server, its key in OPENAI_API_KEY")
    parser.add_argument(
        "--omit", nargs="+", default=(), choices=SETTINGS, metavar="SETTING",
        help=f"settings that the server refuses, to be left to it: {', '.join(SETTINGS)}",
    )  # fmt: skip
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="run the code that comes with rewards and responders (ArmoRM needs it). It may do anything: read it first",
    )
    _add_picture_flags(parser.add_argument_group("pictures"))
    _add_answer_flags(parser.add_argument_group("answers"))
    _add_pair_flags(parser.add_argument_group("pairs"))


def _add_picture_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--prompts",
        nargs="+",
        default=[],
        metavar="FILE",
        help="a prompt a line, or JSONL with prompt, question and perhaps id; line 3 of art.txt is art-3",
    )
    group.add_argument("--questions", nargs="+", default=[], metavar="FILE", help="a question a line, to each of those")
    group.add_argument(
        "--text_to_image", default=DEFAULT_T2I, metavar="NAME|DIR", help="diffusers pipeline. Default: %(default)s"
    )
    group.add_argument(
        "--guidance",
        nargs="+",
        type=float,
        default=list(GUIDANCE),
        metavar="SCALE",
        help="a candidate for each. Default: 5 7 9 11",
    )
    group.add_argument("--steps", type=int, default=28, metavar="N", help="of denoising. Default: %(default)s")
    group.add_argument("--size", type=int, nargs=2, metavar=("W", "H"), help="in pixels. Default: the model's own")
    group.add_argument("--image_batch", type=int, default=4, metavar="N", help="drawn at once. Default: %(default)s")
    group.add_argument("--image_format", choices=tuple(FORMATS), default="jpg", help="of files. Default: jpg")
    group.add_argument("--image_reward", action="append", metavar="REWARD", help=f"Default: {DEFAULT_REWARD}")
    group.add_argument("--image_threshold", type=float, metavar="X", help="least score to be kept. Default: none")


def _add_answer_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--responder", action="append", default=[], metavar="RESPONDER", help="may be given more than once"
    )
    group.add_argument("--pictures", metavar="DIR", help="ask about the pictures of the run in DIR instead of --out's")
    group.add_argument("--samples", type=int, default=1, metavar="N", help="answers of each. Default: %(default)s")
    group.add_argument("--temperature", type=float, default=1.0, metavar="T", help="Default: %(default)s")
    group.add_argument("--top_p", type=float, metavar="P", help="nucleus. Default: all tokens")
    group.add_argument("--max_new_tokens", type=int, default=1000, metavar="N", help="Default: %(default)s")
    group.add_argument("--batch_size", type=int, default=8, metavar="N", help="pictures at once. Default: %(default)s")
    group.add_argument("--load_4bit", action="store_true", help="hf: weights in 4 bits, by bitsandbytes")
    group.add_argument(
        "--concurrency", type=int, default=8, metavar="N", help="requests to a server at a time. Default: 8"
    )


def _add_pair_flags(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--reward", action="append", metavar="REWARD", help=f"Default: {DEFAULT_REWARD}")
    group.add_argument(
        "--reduction",
        choices=("mean", "min"),
        default="mean",
        help="clip, image-text: of an answer's statements, so that length earns nothing. Default: mean",
    )
    group.add_argument(
        "--margin", type=float, default=0.0, metavar="X", help="least difference of the scores. Default: 0"
    )
    group.add_argument(
        "--length_balance",
        type=float,
        default=float("inf"),
        metavar="SHARE",
        help="largest difference of the numbers of words, as a share of the longer's, e.g. 0.25. Default: any",
    )
    group.add_argument(
        "--near_duplicate",
        type=float,
        default=1.0,
        metavar="SHARE",
        help="share of words in common, in order, from which two answers make no pair, e.g. 0.9. Default: 1, none",
    )
    group.add_argument(
        "--marker", metavar="judge:MODEL", help="context: model behind --base_url that marks each answer's first error"
    )
    group.add_argument("--hardness", metavar="DIR", help="report: `python -m dama hardness`'s --out for these pairs")


# -------------------------------------------------------------------------------------------------------------- steps


def run(args: argparse.Namespace, artist: TextToImage | None = None, marker: Marker | None = None) -> None:
    """The steps that were asked for. `artist` draws the images in place of diffusers, `marker` marks first errors.

    Raises SynthError for all errors of the flags at once, before anything is loaded.
    """
    steps = [args.step] if args.step else [step for step in STEPS if not (args.pictures and step in STEPS[:2])]
    errors = flag_errors(args, steps, marker)
    if errors:
        raise SynthError("\n\n".join(errors))
    from dama.synth.respond import release_memory

    device = pick_device(args.device)
    if IMAGES in steps:
        _images(args, artist, device)
        release_memory()
    if RANK_IMAGES in steps:
        _rank_images(args, device)
        release_memory()
    if RESPOND in steps:
        _respond(args, device)
    if RANK_RESPONSES in steps:
        _rank_responses(args, device)
    if CONTEXT in steps:
        _context(args, marker)
    if RANK_RESPONSES in steps or REPORT in steps:
        from dama.synth.page import write_page

        log(f"report: {write_page(args.out, args.hardness)}")


def _images(args: argparse.Namespace, artist: TextToImage | None, device: str) -> None:
    size = args.size and tuple(args.size)
    manifest = run_images(
        artist or DiffusersPainter(args.text_to_image, steps=args.steps, size=size, device=device),
        read_prompts(args.prompts, args.questions),
        args.out,
        guidance=args.guidance,
        seed=args.seed,
        batch_size=args.image_batch,
        suffix=args.image_format,
        overwrite=args.overwrite,
    )
    log_counts(IMAGES, "candidate images", ("candidates", "usable", "faults"), manifest["summary"])


def _rank_images(args: argparse.Namespace, device: str) -> None:
    from dama.synth.rank import run_rank_images

    rewards = [open_reward(args, word, RANK_IMAGES, device) for word in args.image_reward or [DEFAULT_REWARD]]
    manifest = run_rank_images(rewards, args.out, threshold=args.image_threshold, overwrite=args.overwrite)
    log_counts(RANK_IMAGES, "prompts", ("prompts", "pictures", "left_out"), manifest["summary"])


def _respond(args: argparse.Namespace, device: str) -> None:
    from dama.synth.respond import Sampling, run_respond

    summary = run_respond(
        [open_responder(args, word, device) for word in args.responder],
        args.out,
        Sampling(args.samples, args.temperature, args.max_new_tokens, args.top_p),
        pictures=args.pictures,
        seed=args.seed,
        batch_size=args.batch_size,
        overwrite=args.overwrite,
    )["summary"]
    log(f"{RESPOND}: {summary['answers']} answers, mean words {summary['mean_words']}")
    for reason, count in summary["faults"].items():
        log(f"{count:>9}  {reason}")


def _rank_responses(args: argparse.Namespace, device: str) -> None:
    from dama.synth.pairs import DROPPED, PAIRS, PDS_DPO, run_rank_responses
    from dama.synth.rank import Filters

    rewards = [open_reward(args, word, RANK_RESPONSES, device) for word in args.reward or [DEFAULT_REWARD]]
    filters = Filters(args.margin, args.length_balance, args.near_duplicate)
    summary = run_rank_responses(rewards, args.out, filters, overwrite=args.overwrite)
    log_counts(RANK_RESPONSES, "pictures", ("pictures", "pairs", "left_out"), summary)
    for name, made in summary["rewards"].items():
        log(f"reward {name}: {'sees' if made['sees_image'] else 'never sees'} the picture")
    log(f"pairs: {Path(args.out) / PAIRS}, with --image_folder {summary['image_folder']}")
    log(f"beside it {PDS_DPO} in PDS-DPO's format, and {DROPPED}: what was left out")


def _context(args: argparse.Namespace, marker: Marker | None) -> None:
    from dama.chat import ChatSettings
    from dama.synth.context import MARK_TOKENS, JudgeMarker, run_context

    if marker is None:
        model = args.marker.partition(":")[2]
        settings = ChatSettings(
            args.base_url, model, max_tokens=MARK_TOKENS, concurrency=args.concurrency, give_up=True
        ).without(args.omit)
        marker = JudgeMarker(settings, step_folder(args.out, CONTEXT) / "replies.jsonl")
    summary = run_context(marker, args.out, overwrite=args.overwrite)
    log_counts(CONTEXT, "answers", ("answers", "pairs", "left_out"), summary)
    log(f"{CONTEXT}: {summary['with_context']} pairs have a context, with --image_folder {summary['image_folder']}")


def log_counts(step: str, of: str, keys: tuple[str, str, str], summary: Record) -> None:
    """How many there were and are left, and a line for each reason; `keys` of the summary for these three."""
    had, left, why = keys
    log(f"{step}: {summary[had]} {of}, {summary[left]} {left}")
    for reason, count in summary[why].items():
        log(f"{count:>9}  {reason}")


def flag_errors(args: argparse.Namespace, steps: Sequence[str], marker: Marker | None = None) -> list[str]:
    """What is wrong with the flags that these steps use, seen without loading anything."""
    errors = _number_errors(args) + device_errors(args.device)
    if IMAGES in steps and not args.prompts:
        errors.append("--prompts: expected files of prompts\nRemedy: a text a line, with --questions; or JSONL")
    if RESPOND in steps:
        errors += _kind_errors("--responder", args.responder, RESPONDER_KINDS, args.base_url)
        if not args.responder:
            errors.append(f"--responder: expected one or more, as KIND:WHAT, KIND one of {', '.join(RESPONDER_KINDS)}")
        if args.samples > 1 and args.temperature == 0:
            errors.append(f"--samples {args.samples}: all would be the same with --temperature 0")
        if args.samples * len(args.responder) < 2 and RANK_RESPONSES in steps:
            errors.append("--samples: a pair takes two answers to an image; give more samples or responders")
    if CONTEXT in steps and marker is None:
        errors += _kind_errors("--marker", [args.marker or ""], ("judge",), args.base_url)
    for step, flag in ((RANK_IMAGES, "image_reward"), (RANK_RESPONSES, "reward")):
        if step in steps:
            errors += _kind_errors(f"--{flag}", getattr(args, flag) or [], REWARD_KINDS, args.base_url)
    for word in args.image_reward or []:
        if word.startswith(BLIND_KINDS):
            remedy = "give clip:, image-text:, judge: or http:"
            errors.append(f"--image_reward {word}: it never sees the picture\nRemedy: {remedy}")
    if args.hardness and not Path(args.hardness).is_dir():
        errors.append(f"--hardness {args.hardness}: no such folder")
    return errors


def _number_errors(args: argparse.Namespace) -> list[str]:
    errors = [
        f"--{name} {getattr(args, name)}: expected 1 or more"
        for name in ("steps", "image_batch", "samples", "max_new_tokens", "batch_size", "concurrency")
        if getattr(args, name) < 1
    ]
    errors += [
        f"--{name} {getattr(args, name)}: expected 0 or more"
        for name in ("temperature", "margin", "length_balance")
        if not getattr(args, name) >= 0
    ]
    if not 0 < args.near_duplicate <= 1:
        errors.append(f"--near_duplicate {args.near_duplicate}: expected a share above 0, at most 1")
    return errors


def _kind_errors(flag: str, words: Sequence[str], kinds: Sequence[str], base_url: str | None) -> list[str]:
    errors = []
    for word in words:
        kind, colon, what = word.partition(":")
        if kind not in kinds or not colon or not what:
            errors.append(f"{flag} {redacted(word)}: expected KIND:WHAT with KIND one of {', '.join(kinds)}")
        elif kind in ("judge", "server") and not base_url:
            errors.append(f"{flag} {word}: expected the server's URL as --base_url, got none")
        elif kind.startswith("http") and not what.startswith(("http://", "https://")):
            errors.append(f"{flag} {redacted(word)}: expected {kind}:http://HOST/PATH")
    return errors


def open_reward(args: argparse.Namespace, word: str, step: str, device: str) -> Reward:
    """The reward that KIND:WHAT names; its weights are loaded when it scores."""
    from dama.chat import ChatSettings
    from dama.synth import rewards

    kind, _, what = word.partition(":")
    if kind == "text":
        return rewards.TextReward(what, device=device, trust_remote_code=args.trust_remote_code)
    if kind == "image-text":
        trust = args.trust_remote_code
        return rewards.ImageTextReward(what, device=device, reduction=args.reduction, trust_remote_code=trust)
    if kind == "judge":
        settings = ChatSettings(
            args.base_url, what, max_tokens=rewards.JUDGE_TOKENS, concurrency=args.concurrency, give_up=True
        ).without(args.omit)
        return rewards.JudgeReward(settings, step_folder(args.out, step) / "replies.jsonl")
    if kind in ("http", "http-text"):
        return rewards.EndpointReward(what, sees_image=kind == "http")
    return rewards.ClipReward(what, device=device, reduction=args.reduction)


def open_responder(args: argparse.Namespace, word: str, device: str) -> Responder:
    """Open the responder that KIND:WHAT names; its weights are loaded at the first answer."""
    from dama.synth.respond import HfResponder, ServedResponder

    kind, _, what = word.partition(":")
    if kind == "llava":
        return importlib.import_module(CHECKPOINTS).open_checkpoint(what, device)
    if kind == "hf":
        trust = args.trust_remote_code
        return HfResponder(what, device=device, load_4bit=args.load_4bit, trust_remote_code=trust)
    cache = step_folder(args.out, RESPOND) / "replies.jsonl"
    return ServedResponder(what, args.base_url, cache, concurrency=args.concurrency, omit=args.omit)
