"""A conversation about an image in the terminal, answers streamed.

`python -m llava.serve.cli --model-path CHECKPOINT --image-file photo.jpg`. An empty line or Ctrl-D ends it.
"""

from __future__ import annotations

import argparse
import io
import sys
from collections.abc import Iterator
from threading import Event
from typing import Any

from PIL import Image

from dama.console import log, printable, report_error
from llava.generation.flags import Given, add_processor_flags
from llava.generation.request import Decoding
from llava.serve import images
from llava.serve.chat import DEFAULT_CONV_MODE
from llava.serve.checkpoints import open_model
from llava.serve.hub_model import HubModel
from llava.serve.local_model import LocalModel


def load_image(image_file: str) -> Image.Image:
    """The image in a file or behind an http(s) URL, as RGB; ValueError names what is wrong with it."""
    return images.load_image(image_file)


def main(args: argparse.Namespace) -> int:
    """Asks and answers until the input ends; 2 where the image or the checkpoint cannot be used."""
    try:
        decoding = Decoding(max_new_tokens=args.max_new_tokens, temperature=args.temperature, top_p=args.top_p)
        image = load_image(args.image_file)
        model = open_model(args, args.model_path, args.model_base)
    except Exception as error:
        report_error(error, "cli")
        return 2
    keep_undecodable_bytes(sys.stdin)
    converse(model, image, decoding, debug=args.debug)
    return 0


def converse(model: LocalModel | HubModel, image: Image.Image, decoding: Decoding, debug: bool = False) -> None:
    """Read questions and stream answers until the input ends."""
    user, assistant = model.roles
    history: list[tuple[str, str]] = []
    while question := read_line(f"{user}: "):
        write(f"{assistant}: ")
        try:
            prompt = model.prompt(history, question, has_image=True)
            answer = show(model.stream(prompt, [image], decoding, Event()))
        except ValueError as error:
            log(f"error: {error}")
            continue
        history.append((question, answer))
        if debug:
            log(f"\n{ {'prompt': prompt, 'outputs': answer} }\n")
    log("exit...")


def read_line(prompt: str) -> str:
    """What the user types; empty at the end of the input or after Ctrl-C. What is no text is asked for again."""
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            log()
            return ""
        except UnicodeDecodeError as error:
            log(f"error: byte {error.start} is not {error.encoding}; type it again")
            continue
        if not any("\ud800" <= character <= "\udfff" for character in line):
            return line
        log(f"error: the line holds bytes that are not {sys.stdin.encoding}; type it again")


def keep_undecodable_bytes(stream: Any) -> None:
    """Reads bytes that are no text as lone surrogates, so that they spoil their own line and none behind it."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="surrogateescape")


def show(texts: Iterator[str]) -> str:
    """Writes a growing answer as it comes; Ctrl-C stops the answer, not the conversation."""
    shown = ""
    try:
        for text in texts:
            write(text.removeprefix(shown))
            shown = text
    except KeyboardInterrupt:
        write(" [stopped]")
    log()
    return shown


def write(text: str) -> None:
    """Write text to standard output, control characters made visible."""
    sys.stdout.write(printable(text))
    sys.stdout.flush()


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(prog="python -m llava.serve.cli", description=__doc__)
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--model-base", help="base of a LoRA folder")
    parser.add_argument("--image-file", required=True, help="an image, or the URL of one")
    parser.add_argument("--device", help="cuda or cpu (default: what is there)")
    parser.add_argument(
        "--conv-mode", action=Given,
        help=f"prompt template of LLaVA-1.5; other models have their own (default: {DEFAULT_CONV_MODE})",
    )  # fmt: skip
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, help="nucleus, with a temperature")
    parser.add_argument("--max-new-tokens", type=int, default=512, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--load-8bit", action="store_true", help="weights in 8 bits (bitsandbytes, GPU)")
    parser.add_argument("--load-4bit", action="store_true", help="weights in 4 bits (bitsandbytes, GPU)")
    parser.add_argument("--debug", action="store_true", help="show every prompt as the model reads it")
    add_processor_flags(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(build_parser().parse_args()))
