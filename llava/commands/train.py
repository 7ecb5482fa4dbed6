"""`python -m dama train`: train_mem.py --task DPO for LLaVA-1.5 and any other vision-language model."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from dama.console import log

DESCRIPTION = """\
Preference training of a vision-language model with DAMA or any objective of docs/objectives.md, on pairs whose hardness
and reference log-probs the stages have written. The flags are those of llava/train/train_mem.py --task DPO, which does
the same; --model, --data and --out are short for --model_name_or_path, --data_path and --output_dir.

LLaVA-1.5 in its own layout is trained by its own code; any other model that transformers loads as one of images and
text through its own processor and chat template, the answers to an image sharing one pass over image and question where
the model's attention allows it.
"""

EXAMPLES = """\
examples:
  python -m dama train --model Qwen/Qwen2.5-VL-3B-Instruct --data pairs.jsonl --image_folder images \\
      --hardness runs/hardness --reference runs/reference --bf16 True --out runs/dama
  deepspeed --include localhost:0,1,2,3 --module dama train --deepspeed zero2 --model M ...
  python -m dama train --help_all      also every flag of transformers' TrainingArguments
"""

SHORT = {"--model": "--model_name_or_path", "--data": "--data_path", "--out": "--output_dir"}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add help: the flags of training are passed on."""
    parser.add_argument("-h", "--help", action=_Help, nargs=0, help="show this page and the flags of training")
    parser.add_argument("--help_all", action="store_true", help="list every flag of transformers too")


def run(args: argparse.Namespace) -> int:
    """Pass the flags on to training and return its exit status."""
    from llava.train.train_mem import main

    words = ["--help_all"] if args.help_all else training_flags(args.rest)
    return main(words, program="dama train")


class _Help(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        from llava.train.flag_help import USAGE
        from llava.train.flag_names import training_help

        parser.print_help()
        log(training_help().removeprefix(USAGE))
        parser.exit()


def training_flags(words: Sequence[str]) -> list[str]:
    """The flags as train_mem.py calls them, with the task."""
    translated = []
    for word in words:
        flag, equals, value = word.partition("=")
        translated.append(SHORT.get(flag, flag) + equals + value)
    return ["--task", "DPO", *translated]
