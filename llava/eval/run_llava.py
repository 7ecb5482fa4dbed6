"""Answer one question about one image or several on standard output.

`python -m llava.eval.run_llava --model-path CHECKPOINT --image-file photo.jpg --query "What is this?"`
"""

from __future__ import annotations

import argparse
import re
import sys
from threading import Event
from typing import Any

from PIL import Image

from dama.console import log, report_error
from llava.constants import IMAGE_PLACEHOLDER
from llava.generation.flags import Given, add_processor_flags
from llava.generation.request import Decoding
from llava.serve import images
from llava.serve.chat import DEFAULT_CONV_MODE
from llava.serve.checkpoints import open_model


def image_parser(args: Any) -> list[str]:
    """The files or URLs of `args.image_file`, which `args.sep` separates."""
    return args.image_file.split(args.sep)


def load_image(image_file: str) -> Image.Image:
    """The image in a file or behind an http(s) URL, as RGB; ValueError names what is wrong with it."""
    return images.load_image(image_file)


def load_images(image_files: list[str]) -> list[Image.Image]:
    """Load several images, see `load_image`."""
    return [load_image(image_file) for image_file in image_files]


def eval_model(args: Any) -> str:
    """Prints the answer and returns it.

    Args:
        args: an object with model_path, model_base, image_file, sep, query, conv_mode (None: llava_v1), temperature,
            top_p, num_beams and max_new_tokens; it may have those of `add_processor_flags`, for other models. Any
            other field, such as LLaVA's model_name, is not looked at.

    Raises:
        ValueError: an image cannot be used, the query has another number of <image-placeholder> than of images, or a
            field means nothing to the model.
    """
    images = load_images(image_parser(args))
    flags = {"device": None, "load_8bit": False, "load_4bit": False, "conv_mode_given": args.conv_mode is not None}
    model = open_model(argparse.Namespace(**flags | vars(args)), args.model_path, args.model_base)
    decoding = Decoding(args.max_new_tokens, args.num_beams, args.temperature, args.top_p)
    query = with_images(model.literal(args.query), model.image_tokens(), len(images), model.after_image)
    prompt = model.render([(query, None)])
    *_, answer = "", *model.stream(prompt, images, decoding, Event())
    log(answer)
    return answer


def with_images(query: str, image_tokens: str, count: int, after_image: str = "\n") -> str:
    """The query with the tokens of `count` images at its placeholders, or else before it, `after_image` behind each."""
    if IMAGE_PLACEHOLDER not in query:
        return (image_tokens + after_image) * count + query
    if query.count(IMAGE_PLACEHOLDER) != count:
        raise ValueError(f"--query: expected {count} {IMAGE_PLACEHOLDER}, got {query.count(IMAGE_PLACEHOLDER)}")
    return re.sub(IMAGE_PLACEHOLDER, lambda _: image_tokens, query)


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.run_llava", description=__doc__)
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--model-base", help="base of a LoRA folder")
    parser.add_argument("--image-file", required=True, help="an image or its URL; several with --sep between them")
    parser.add_argument("--query", required=True, help=f"the question; {IMAGE_PLACEHOLDER} says where an image goes")
    parser.add_argument("--conv-mode", action=Given, help=f"prompt template of a LLaVA (default: {DEFAULT_CONV_MODE})")
    parser.add_argument("--sep", default=",", help="between several --image-file (default: '%(default)s')")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top_p", "--top-p", type=float, help="nucleus, with a temperature")
    parser.add_argument("--num_beams", "--num-beams", type=int, default=1, help="beams (default: %(default)s)")
    parser.add_argument(
        "--max_new_tokens", "--max-new-tokens", type=int, default=512, help="tokens of an answer (default: %(default)s)"
    )
    add_processor_flags(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = build_parser().parse_args(argv)
    try:
        eval_model(args)
    except Exception as error:
        report_error(error, "run_llava")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
