"""The generation driver: prompts and images in, answers out; batched, sharded, resumable, ignorant of any benchmark.

`python -m llava.eval.generate --model-path M --question-file Q.jsonl --image-folder DIR --out DIR` reads LLaVA's
question files ({"question_id", "image", "text"} a line) and writes DIR/answers.jsonl in LLaVA's answer format. Under
torchrun or srun each process answers its part; `--backend openai` asks a server instead of loading the checkpoint.

LLaVA-1.5 reads the template that --conv-mode names; every other model of images and text that transformers loads, and
adapters over one, answer by their own processor and chat template.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dama.console import log, report_error
from dama.stage import Shard
from llava.generation.answers import run_answers
from llava.generation.flags import (
    AddFolder,
    Given,
    add_backend_flags,
    add_precision_flags,
    add_processor_flags,
    responder_of,
)
from llava.generation.questions import read_questions
from llava.generation.request import Decoding


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(prog="python -m llava.eval.generate", description=__doc__)
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub name; with a server, its model")
    parser.add_argument("--model-base", help="base of a LoRA folder")
    parser.add_argument("--question-file", required=True, help="JSONL with question_id, image, text")
    parser.add_argument(
        "--image-folder", action=AddFolder, required=True,
        help="folder that image paths are relative to; symbolic links may lead into further ones, given the same way",
    )  # fmt: skip
    parser.add_argument("--out", required=True, help="folder for answers.jsonl")
    parser.add_argument(
        "--conv-mode", action=Given, default="vicuna_v1",
        help="prompt template of LLaVA-1.5; other models have their own (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--num-beams", type=int, default=1, help="beams (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, help="nucleus, with a temperature")
    parser.add_argument("--samples", type=int, default=1, help="answers to each question (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--device", help="cuda or cpu (default: what is there)")
    parser.add_argument("--overwrite", action="store_true", help="start anew in --out")
    parser.add_argument(
        "--shard", type=Shard.parse, metavar="I/N", help="this process's part, as 0/4 (default: the launcher's rank)"
    )
    add_precision_flags(parser)
    add_processor_flags(parser)
    add_backend_flags(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = build_parser().parse_args(argv)
    decoding = Decoding(args.max_new_tokens, args.num_beams, args.temperature, args.top_p, args.samples, args.seed)
    shard = args.shard or Shard.from_launcher()
    try:
        responder = responder_of(args)
        manifest = run_answers(
            responder, read_questions(args.question_file), args.image_folder, args.out, decoding,
            batch_size=args.batch_size, shard=shard, overwrite=args.overwrite,
        )  # fmt: skip
    except Exception as error:
        report_error(error, "generate")
        return 2
    if manifest is not None:
        log(f"answers: {manifest['summary']['answers']} -> {Path(args.out) / 'answers.jsonl'}")
        for reason, count in manifest["summary"].get("missing", {}).items():
            log(f"missing: {count}, {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
