"""The command that LLaVA's scripts start: `train_mem.py --task LM` fine-tunes, `--task DPO` aligns with DAMA."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from dama.console import end_on_interrupt, report_error


def main(argv: Sequence[str] | None = None) -> int:
    if argv is None:
        end_on_interrupt()
    try:
        run(sys.argv[1:] if argv is None else argv)
    except Exception as error:
        report_error(error, "train_mem.py")
        return 2
    return 0


def run(argv: Sequence[str]) -> None:
    """Parses the flags and trains. What is imported here takes seconds."""
    import transformers

    from llava.train import train as sft
    from llava.train import train_dpo
    from llava.train.arguments import parse_arguments

    # Loading and saving take a blink or have their own line; the bar that is left is the training's.
    transformers.utils.logging.disable_progress_bar()
    arguments = parse_arguments(argv)
    task = train_dpo if arguments[2].task == "DPO" else sft
    task.run(arguments)


if __name__ == "__main__":
    sys.exit(main())
