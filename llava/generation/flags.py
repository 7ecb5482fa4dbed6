"""Flags that say where answers come from."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from dama.models.loading import ProcessorOptions
from dama.redact import redacted
from llava.generation.hub import HubAnswerer
from llava.generation.local import Answerer
from llava.generation.request import Responder
from llava.generation.served import ServedAnswerer
from llava.supported import answers_by_hub, validate_supported_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PROCESSOR_FLAGS = ("system_prompt", "min_pixels", "max_pixels", "processor_option")


class AddFolder(argparse.Action):
    """Collects the folders of a flag that may be given more than once."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Append one folder."""
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), values])


class Given(argparse.Action):
    """Stores a value, and under DEST_given that the flag was there; its default may be one that was given, too."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Store both."""
        setattr(namespace, self.dest, values)
        setattr(namespace, f"{self.dest}_given", True)


def add_backend_flags(parser: argparse.ArgumentParser) -> None:
    """Where the answers come from."""
    group = parser.add_argument_group("backend")
    group.add_argument(
        "--backend",
        choices=("local", "openai"),
        default="local",
        help="load the checkpoint here, or ask an OpenAI-compatible server that runs it (default: %(default)s)",
    )
    group.add_argument("--base-url", metavar="URL", help="of that server, e.g. http://127.0.0.1:8000/v1")
    group.add_argument("--concurrency", type=int, default=16, help="requests to it at once (default: %(default)s)")
    group.add_argument(
        "--omit",
        nargs="+",
        default=(),
        choices=("max_tokens", "temperature", "top_p", "seed"),
        metavar="SETTING",
        help="settings that the server refuses, to be left to it: max_tokens, temperature, top_p, seed",
    )


def add_precision_flags(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """The precision of the weights."""
    parser.add_argument("--dtype", choices=tuple(DTYPES), help="of the weights (default: bfloat16, on a CPU float32)")
    parser.add_argument(
        "--bits", type=int, choices=(16, 8, 4), default=16,
        help="8 or 4: quantize the weights by bitsandbytes, on a GPU (default: %(default)s)",
    )  # fmt: skip


def add_processor_flags(parser: argparse.ArgumentParser) -> None:
    """How models other than LLaVA-1.5 read prompts and images, as in `dama train`."""
    group = parser.add_argument_group("models other than LLaVA-1.5 (give what their training was given)")
    group.add_argument(
        "--system_prompt", "--system-prompt", default="", metavar="TEXT",
        help="text of a system turn before each question (default: none)",
    )  # fmt: skip
    for name, what in (("min", "fewest"), ("max", "most")):
        group.add_argument(
            f"--{name}_pixels", f"--{name}-pixels", type=int, metavar="N",
            help=f"{what} pixels that an image is scaled to, where the resolution follows the image "
            "(default: the checkpoint's)",
        )  # fmt: skip
    group.add_argument(
        "--processor_option", "--processor-option", nargs="+", default=[], metavar="NAME=VALUE",
        help="options of the image processor, each value as JSON",
    )  # fmt: skip


def responder_of(args: argparse.Namespace) -> Responder:
    """As the flags say. Raises ValueError where they do not fit together."""
    if args.backend == "openai":
        if not args.base_url:
            raise ValueError("--base-url: expected the server's URL with --backend openai, got none")
        if given := ", ".join(f"--{name}" for name in PROCESSOR_FLAGS if getattr(args, name, None)):
            raise ValueError(f"{given}: expected with a checkpoint loaded here; the server prepares its prompts itself")
        return ServedAnswerer(args.model_path, args.base_url, concurrency=args.concurrency, omit=args.omit)
    if args.base_url:
        raise ValueError(f"--base-url {redacted(args.base_url)}: the checkpoint is loaded here; add --backend openai")
    return answerer_of(args)


def answerer_of(args: argparse.Namespace) -> Answerer | HubAnswerer:
    """The checkpoint at `args.model_path`, loaded here. Raises ValueError for a model that nothing here runs."""
    precision: dict[str, Any] = {"dtype": DTYPES.get(getattr(args, "dtype", None) or ""), "device": args.device}
    precision["bits"] = getattr(args, "bits", 16)
    if is_hub_answerer(args):
        return HubAnswerer(args.model_path, args.model_base, options=processor_options(args), **precision)
    return Answerer(args.model_path, args.model_base, conv_mode=args.conv_mode, **precision)


def is_hub_answerer(args: argparse.Namespace) -> bool:
    """Whether the checkpoint answers by its own chat template.

    Raises:
        ValueError: a model that nothing here runs, or flags that mean nothing to it.
    """
    is_hub = answers_by_hub(args.model_path, args.model_base)
    if is_hub and getattr(args, "conv_mode_given", False):
        raise ValueError(
            f"--conv-mode {args.conv_mode}: expected with LLaVA-1.5 only, got {args.model_path}, whose own chat "
            "template is used; leave it out"
        )
    if is_hub:
        return True
    validate_supported_model(args.model_path, "--model-path")
    validate_supported_model(args.model_base, "--model-base")
    wrong = [f"--{name}" for name in PROCESSOR_FLAGS if getattr(args, name, None)]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)}: expected with models other than LLaVA-1.5, got {args.model_path}, whose prompt "
            "template (--conv-mode) and image preparation are its own; leave out"
        )
    return False


def processor_options(args: argparse.Namespace) -> ProcessorOptions:
    """The flags of `add_processor_flags`; callers from before them give none."""
    given = {name: value for name in PROCESSOR_FLAGS if (value := getattr(args, name, None))}
    return ProcessorOptions(**given | {"processor_option": tuple(given.get("processor_option", ()))})
