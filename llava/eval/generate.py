"""The generation driver: prompts and images in, answers out; batched, resumable, and ignorant of any benchmark.

`python -m llava.eval.generate --model-path M --question-file Q.jsonl --image-folder DIR --out DIR` reads LLaVA's
question files ({"question_id", "image", "text"} a line) and writes DIR/answers.jsonl in LLaVA's answer format.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dama.console import digest_of, report_error, say
from dama.pairs import UNREADABLE, fault_list, load_image, resolve_image
from dama.stage import open_stage
from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN
from llava.conversation import get_template
from llava.mm_utils import process_images, tokenizer_image_token
from llava.model.builder import load_pretrained_model
from llava.model.fingerprint import digest_of_checkpoint

STAGE = "answers"


@dataclass(frozen=True, slots=True)
class Request:
    """One question about one picture, or about none."""

    id: str
    prompt: str
    image: str | None = None  # relative to the image folder
    image_id: str = ""


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn; part of every result. temperature 0 is greedy (or beam search)."""

    max_new_tokens: int = 1024
    num_beams: int = 1
    temperature: float = 0.0
    top_p: float | None = None
    samples: int = 1  # answers to each question; more than one needs a temperature
    seed: int = 0

    def options(self) -> dict[str, Any]:
        chosen: dict[str, Any] = {"max_new_tokens": self.max_new_tokens, "num_beams": self.num_beams, "use_cache": True}
        chosen["do_sample"] = self.temperature > 0
        if self.temperature > 0:
            chosen |= {"temperature": self.temperature, "top_p": self.top_p, "num_return_sequences": self.samples}
        return chosen


class Answerer:
    """A checkpoint that answers: loaded once, asked in batches.

    Args:
        model_path: checkpoint folder or hub name. model_base: the base of a LoRA folder.
        conv_mode: prompt template. dtype: of all weights; bfloat16 on a GPU and float32 on a CPU when None.
    """

    def __init__(
        self,
        model_path: str,
        model_base: str | None = None,
        *,
        conv_mode: str = "vicuna_v1",
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = dtype or (torch.bfloat16 if self.device.startswith("cuda") else torch.float32)
        self.model_path, self.template = model_path, get_template(conv_mode)
        self.tokenizer, self.model, self.image_processor, _ = load_pretrained_model(
            model_path, model_base, Path(model_path).name, device=self.device, dtype=self.dtype
        )
        # A model may name its end of text; ours stops there and pads with it.
        self.pad_token_id = self.tokenizer.pad_token_id

    def token_ids(self, request: Request) -> Tensor:
        """[T] ids of the prompt, up to where the answer begins."""
        question = request.prompt
        if request.image is not None:
            image = DEFAULT_IMAGE_TOKEN
            if getattr(self.model.config, "mm_use_im_start_end", False):
                image = DEFAULT_IM_START_TOKEN + image + DEFAULT_IM_END_TOKEN
            question = f"{image}\n{question}"
        conversation = self.template.copy()
        conversation.append_message(conversation.roles[0], question)
        conversation.append_message(conversation.roles[1], None)
        return tokenizer_image_token(conversation.get_prompt(), self.tokenizer, return_tensors="pt")

    def pixels(self, request: Request, image_folder: str | Path) -> Tensor:
        picture = load_image(resolve_image(image_folder, str(request.image)))
        return process_images([picture], self.image_processor, self.model.config)[0]

    @torch.inference_mode()
    def answer(self, requests: Sequence[Request], image_folder: str | Path, decoding: Decoding) -> list[list[str]]:
        """`decoding.samples` answers to each request, stripped of white space at both ends."""
        ids = [self.token_ids(request) for request in requests]
        width = max(len(row) for row in ids)
        input_ids = torch.full((len(ids), width), self.pad_token_id)
        mask = torch.zeros((len(ids), width), dtype=torch.bool)
        for i, row in enumerate(ids):
            input_ids[i, width - len(row) :], mask[i, width - len(row) :] = row, True
        pictures = [self.pixels(request, image_folder) for request in requests if request.image is not None]
        images = torch.stack(pictures).to(self.device, self.dtype) if pictures else None
        new = self.model.generate(
            input_ids.to(self.device),
            images=images,
            attention_mask=mask.to(self.device),
            pad_token_id=self.pad_token_id,
            **decoding.options(),
        )
        texts = [text.strip() for text in self.tokenizer.batch_decode(new, skip_special_tokens=True)]
        return [texts[i : i + decoding.samples] for i in range(0, len(texts), decoding.samples)]


def generate_answers(
    answerer: Answerer,
    requests: Sequence[Request],
    image_folder: str | Path,
    out: str | Path,
    decoding: Decoding,
    *,
    batch_size: int = 16,
    overwrite: bool = False,
) -> list[dict[str, Any]]:
    """Answers every request and keeps the answers in `out`/answers.jsonl as they come; resumes by chunk.

    Batches hold prompts of similar length. Returns the records {"question_id", "image_id", "prompt", "text",
    "model_id", "sample"} in the order of the requests.
    """
    check_requests(requests, image_folder)
    by_length = sorted(requests, key=lambda r: (r.image is None, len(answerer.token_ids(r)), r.id))
    chunks = list(_chunks(by_length, batch_size))
    fingerprint = {
        "requests": digest_of([[r.id, r.prompt, r.image] for r in requests]),
        "model": answerer.model_path,
        "weights": digest_of_checkpoint(answerer.model_path),
        "template": answerer.template.version,
        "decoding": asdict(decoding),
        "batch_size": batch_size,
        "precision": str(answerer.dtype).removeprefix("torch."),
    }
    sizes = [len(chunk) * decoding.samples for chunk in chunks]
    with open_stage(out, STAGE, fingerprint, sizes, overwrite=overwrite) as stage:
        done = stage.records_done // decoding.samples
        with tqdm(total=len(requests), initial=done, desc=STAGE, unit="answer", disable=stage.complete) as bar:
            for number in range(stage.chunks_done, len(chunks)):
                chunk = chunks[number]
                torch.manual_seed(decoding.seed * 1_000_003 + number)
                texts = answerer.answer(chunk, image_folder, decoding)
                stage.append([_record(r, t, k, answerer) for r, ts in zip(chunk, texts) for k, t in enumerate(ts)])
                bar.update(len(chunk))
        records = stage.records()
        if not stage.complete:
            words = sum(len(record["text"].split()) for record in records)
            stage.finish({"answers": len(records), "mean_words": words / max(1, len(records))})
    order = {request.id: i for i, request in enumerate(requests)}
    return sorted(records, key=lambda record: (order[record["question_id"]], record["sample"]))


def _record(request: Request, text: str, sample: int, answerer: Answerer) -> dict[str, Any]:
    return {
        "question_id": request.id,
        "image_id": request.image_id or (request.image or ""),
        "prompt": request.prompt,
        "text": text,
        "model_id": Path(answerer.model_path).name,
        "sample": sample,
    }


def _chunks(items: Sequence[Request], size: int) -> Iterator[Sequence[Request]]:
    """Consecutive runs of at most `size`, with and without picture apart."""
    for has_image in (True, False):
        part = [item for item in items if (item.image is not None) is has_image]
        yield from (part[i : i + size] for i in range(0, len(part), size))


def check_requests(requests: Sequence[Request], image_folder: str | Path) -> None:
    """Raises, naming every fault: ids used twice, pictures that are missing or that Pillow cannot open."""
    faults = [f"id {id_!r} is used {n} times" for id_, n in Counter(r.id for r in requests).items() if n > 1]
    for name in dict.fromkeys(request.image for request in requests if request.image is not None):
        try:
            with Image.open(resolve_image(image_folder, name)) as picture:
                picture.verify()
        except UNREADABLE as error:
            faults.append(f"image {name}: {error}")
    if faults:
        raise ValueError(fault_list("questions", faults, "correct the question file or the image folder"))


def read_questions(path: str | Path) -> list[Request]:
    """LLaVA's question file, one JSON object a line: question_id, image (optional), text (or prompt), image_id."""
    requests = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            text = row.get("text", row.get("prompt"))
            if "question_id" not in row or not isinstance(text, str):
                raise ValueError(f"{path}:{number}: expected question_id and text, got fields {sorted(row)}")
            image = row.get("image")
            requests.append(Request(str(row["question_id"]), text, image, str(row.get("image_id", image or ""))))
    return requests


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m llava.eval.generate", description=__doc__)
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub name")
    parser.add_argument("--model-base", help="base of a LoRA folder")
    parser.add_argument("--question-file", required=True, help="JSONL with question_id, image, text")
    parser.add_argument("--image-folder", required=True, help="folder that image paths are relative to")
    parser.add_argument("--out", required=True, help="folder for answers.jsonl")
    parser.add_argument("--conv-mode", default="vicuna_v1", help="prompt template (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts at a time (default: %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="tokens of an answer (default: %(default)s)")
    parser.add_argument("--num-beams", type=int, default=1, help="beams (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, help="nucleus, with a temperature")
    parser.add_argument("--samples", type=int, default=1, help="answers to each question (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: %(default)s)")
    parser.add_argument("--device", help="cuda or cpu (default: what is there)")
    parser.add_argument("--overwrite", action="store_true", help="start anew in --out")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    decoding = Decoding(args.max_new_tokens, args.num_beams, args.temperature, args.top_p, args.samples, args.seed)
    try:
        requests = read_questions(args.question_file)
        answerer = Answerer(args.model_path, args.model_base, conv_mode=args.conv_mode, device=args.device)
        generate_answers(
            answerer, requests, args.image_folder, args.out, decoding,
            batch_size=args.batch_size, overwrite=args.overwrite,
        )  # fmt: skip
    except Exception as error:
        report_error(error, "generate")
        return 2
    say(f"answers: {len(requests)} questions -> {Path(args.out) / 'answers.jsonl'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
