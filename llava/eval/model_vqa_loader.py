"""model_vqa for short answers, as LLaVA's benchmark scripts call it: the same flags, 128 tokens an answer.

LLaVA keeps the two apart because only this one loads images in worker processes; here both batch.
"""

from __future__ import annotations

import sys

from llava.eval.model_vqa import build_parser, eval_model, get_chunk, run, split_list

__all__ = ["eval_model", "get_chunk", "main", "split_list"]


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(build_parser("model_vqa_loader", 128, __doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
