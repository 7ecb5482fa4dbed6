"""Answers to a benchmark's questions: made in this process, or by one process for each GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from dama.console import write_atomic
from dama.errors import error_list
from dama.images import ImageFolder, folders_of
from dama.stage import StageError, read_stage
from llava.generation.answers import STAGE, fingerprint_of, run_answers
from llava.generation.local import Answerer
from llava.generation.request import Decoding, Request, Responder


class AnsweringError(RuntimeError):
    """Processes that failed."""


def ensure_answers(
    responder: Responder,
    requests: Sequence[Request],
    images: ImageFolder,
    folder: Path,
    decoding: Decoding,
    args: Namespace,
) -> None:
    """Complete folder/answers.jsonl, as the stage of llava.generation.answers.

    args: processes, batch_size, overwrite, and what is passed to the other processes: model_base, device, dtype, bits,
    LLaVA-1.5's conv_mode, and the flags of processors.
    They read the questions from FOLDER.questions.jsonl, which jobs of a cluster may use, too.
    """
    if args.processes == 1 or is_answered(responder, requests, images, folder, decoding, args):
        run_answers(
            responder, requests, images, folder, decoding, batch_size=args.batch_size, overwrite=args.overwrite
        )  # fmt: skip
        return
    questions = folder.with_name(f"{folder.name}.questions.jsonl")
    write_atomic(questions, "".join(_question_line(request) for request in requests))
    spawn(args.processes, _command(responder, questions, images, folder, decoding, args))


def is_answered(
    responder: Responder,
    requests: Sequence[Request],
    images: ImageFolder,
    folder: Path,
    decoding: Decoding,
    args: Namespace,
) -> bool:
    """Whether the stage is complete for these inputs."""
    try:
        manifest = read_stage(folder, STAGE)[0]
    except StageError:
        return False
    current = fingerprint_of(responder, requests, images, decoding, args.batch_size)
    return not args.overwrite and manifest["fingerprint"] == json.loads(json.dumps(current))


def _question_line(request: Request) -> str:
    row = {"question_id": request.id, "image": request.image, "image_id": request.image_id, "text": request.prompt}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _command(
    responder: Responder, questions: Path, images: ImageFolder, folder: Path, decoding: Decoding, args: Namespace
) -> list[str]:
    """Return the command of one process; its environment holds its rank."""
    flags = {
        "--model-path": getattr(responder, "model_path", responder.name),
        "--model-base": args.model_base,
        "--question-file": questions,
        "--out": folder,
        "--conv-mode": args.conv_mode if isinstance(responder, Answerer) else None,
        "--batch-size": args.batch_size,
        "--max-new-tokens": decoding.max_new_tokens,
        "--num-beams": decoding.num_beams,
        "--temperature": decoding.temperature,
        "--device": args.device,
        "--dtype": args.dtype,
        "--bits": args.bits,
        "--system_prompt": args.system_prompt or None,
        "--min_pixels": args.min_pixels,
        "--max_pixels": args.max_pixels,
    }
    words = [str(word) for flag, value in flags.items() if value is not None for word in (flag, value)]
    words += ["--processor_option", *args.processor_option] * bool(args.processor_option)
    words += [word for image_folder in folders_of(images) for word in ("--image-folder", str(image_folder))]
    return [sys.executable, "-m", "llava.eval.generate", *words, *["--overwrite"] * args.overwrite]


def spawn(count: int, command: Sequence[str]) -> None:
    """Run the command as `count` processes, one per GPU if there are GPUs. Raises AnsweringError if one fails."""
    children = []
    try:
        for rank in range(count):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
            children.append(subprocess.Popen(command, env=os.environ | place))
        status = {rank: child.wait() for rank, child in enumerate(children)}
    finally:
        for child in children:
            if child.poll() is None:
                child.terminate()
    failed = [f"process {rank} of {count} ended with status {code}" for rank, code in status.items() if code]
    if failed:
        raise AnsweringError(
            error_list("generation", failed, "see its messages above; run the same again, it continues")
        )
