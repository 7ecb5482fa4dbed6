"""Answer a file of questions in LLaVA's format, batched and resumable.

`python -m llava.eval.model_vqa --model-path M --question-file Q.jsonl --image-folder DIR --answers-file A.jsonl`
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
from typing import Any, TypeVar

from dama.console import log, report_error, write_atomic
from llava.generation.answers import generate_answers
from llava.generation.flags import AddFolder, Given, add_precision_flags, add_processor_flags, answerer_of
from llava.generation.questions import prompt_of_row, read_question_rows
from llava.generation.request import Decoding, Request
from llava.mm_utils import get_model_name_from_path

Item = TypeVar("Item")


def split_list(lst: list[Item], n: int) -> list[list[Item]]:
    """At most `n` consecutive parts of equal length, the last one perhaps shorter."""
    size = max(1, math.ceil(len(lst) / n))
    return [lst[i : i + size] for i in range(0, len(lst), size)]


def get_chunk(lst: list[Item], n: int, k: int) -> list[Item]:
    """Part `k` of `n`; empty where the list is too short for that many. ValueError unless 0 <= k < n."""
    if not 0 <= k < n:
        raise ValueError(f"--chunk-idx: expected 0 to {n - 1} with --num-chunks {n}, got {k}")
    parts = split_list(lst, n)
    return parts[k] if k < len(parts) else []


def eval_model(args: Any) -> None:
    """Writes `args.answers_file`, a line for each question of the chunk, in the order of the questions.

    Answers are kept batch by batch in a folder beside it, "<answers file>.parts": an interrupted run continues there,
    and a run with other inputs is refused, the difference named (`--overwrite` starts anew).
    """
    rows = get_chunk(read_question_rows(args.question_file), args.num_chunks, args.chunk_idx)
    # Question ids may repeat (MME asks twice about each image), so a question goes by its place in the chunk.
    requests = [Request(str(i), prompt_of_row(row), row.get("image")) for i, row in enumerate(rows)]
    answerer = answerer_of(args)
    decoding = Decoding(args.max_new_tokens, args.num_beams, args.temperature, args.top_p, seed=args.seed)
    records = generate_answers(
        answerer, requests, args.image_folder, f"{args.answers_file}.parts", decoding,
        batch_size=args.batch_size, overwrite=args.overwrite,
    )  # fmt: skip
    name = get_model_name_from_path(args.model_path)
    answers = [answer_line(row, record["text"], name) for row, record in zip(rows, records)]
    write_atomic(args.answers_file, "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers))
    log(f"answers: {len(answers)} questions -> {args.answers_file}")


def answer_line(row: dict[str, Any], text: str, model_id: str) -> dict[str, Any]:
    """LLaVA's answer to a question. The id is made from the content, so that the same run gives the same file."""
    content = json.dumps([row["question_id"], row["text"], text, model_id])
    return {
        "question_id": row["question_id"],
        "prompt": row["text"],
        "text": text,
        "answer_id": hashlib.sha256(content.encode()).hexdigest()[:22],
        "model_id": model_id,
        "metadata": {},
    }


def build_parser(prog: str, max_new_tokens: int, description: str | None) -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(prog=f"python -m llava.eval.{prog}", description=description)
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--model-base", help="base of a LoRA folder")
    parser.add_argument(
        "--image-folder", action=AddFolder, default="",
        help="folder that image paths are relative to (default: the working directory); symbolic links may lead into "
        "further ones, given the same way",
    )  # fmt: skip
    parser.add_argument("--question-file", required=True, help="JSONL with question_id, image (optional), text")
    parser.add_argument("--answers-file", default="answer.jsonl", help="JSONL to write (default: %(default)s)")
    parser.add_argument(
        "--conv-mode", action=Given, default="llava_v1",
        help="prompt template of LLaVA-1.5; other models have their own (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--num-chunks", type=int, default=1, help="parts of the questions (default: %(default)s)")
    parser.add_argument("--chunk-idx", type=int, default=0, help="the part to answer, from 0 (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.2, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top_p", "--top-p", type=float, help="nucleus, with a temperature")
    parser.add_argument("--num_beams", "--num-beams", type=int, default=1, help="beams (default: %(default)s)")
    parser.add_argument(
        "--max_new_tokens", "--max-new-tokens", type=int, default=max_new_tokens,
        help="tokens of an answer (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=16, help="questions at a time (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--device", help="cuda or cpu (default: what is there)")
    parser.add_argument("--overwrite", action="store_true", help="start anew")
    add_precision_flags(parser)
    add_processor_flags(parser)
    return parser


def run(parser: argparse.ArgumentParser, argv: list[str] | None) -> int:
    """Run a parser's command and return its exit status."""
    args = parser.parse_args(argv)
    try:
        eval_model(args)
    except Exception as error:
        report_error(error, parser.prog.rpartition(".")[2])
        return 2
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    return run(build_parser("model_vqa", 1024, __doc__), argv)


if __name__ == "__main__":
    sys.exit(main())
