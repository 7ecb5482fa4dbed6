"""Flags that say where answers come from."""

from __future__ import annotations

import argparse
from typing import Any

from dama.redact import redacted
from llava.generation.local import Answerer
from llava.generation.request import Responder
from llava.generation.served import ServedAnswerer


class AddFolder(argparse.Action):
    """Collects the folders of a flag that may be given more than once."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        """Append one folder."""
        setattr(namespace, self.dest, [*(getattr(namespace, self.dest) or []), values])


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


def responder_of(args: argparse.Namespace) -> Responder:
    """As the flags say. Raises ValueError where they do not fit together."""
    if args.backend == "openai":
        if not args.base_url:
            raise ValueError("--base-url: expected the server's URL with --backend openai, got none")
        return ServedAnswerer(args.model_path, args.base_url, concurrency=args.concurrency, omit=args.omit)
    if args.base_url:
        raise ValueError(f"--base-url {redacted(args.base_url)}: the checkpoint is loaded here; add --backend openai")
    return Answerer(args.model_path, args.model_base, conv_mode=args.conv_mode, device=args.device)
