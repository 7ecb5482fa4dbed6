"""Tokens a second of the generation driver (llava.eval.generate) on the 7B shape, greedy, at two batch sizes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from measure import image_processor_of, time_of, write_images, write_tokenizer

from llava.generation.local import Answerer
from llava.generation.request import Decoding, Request
from llava.rehearsal import training
from llava.rehearsal.launch import is_rehearsed
from llava.tokenization import load_tokenizer
from scripts.gpu.block import Report
from scripts.gpu.models import plan_of, shape_of

BATCHES = (1, 16)
TOKENS = 8 if is_rehearsed() else 128
PROMPT = "Describe the picture in detail."


def measure(report: Report) -> None:
    """Time greedy generation at every batch size."""
    device = torch.device("cuda", 0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        answerer = answerer_in(folder)
        write_images(folder, shape_of(), max(BATCHES))
        requests = [Request(str(i), PROMPT, f"{i}.png") for i in range(max(BATCHES))]
        for batch in BATCHES:
            with report.case(f"batch {batch}") as found:
                made: list[int] = []

                def answer(batch: int = batch, made: list[int] = made) -> None:
                    made.append(answerer.new_tokens(requests[:batch], folder, Decoding(TOKENS)).numel())

                answer()
                torch.cuda.reset_peak_memory_stats()
                seconds = time_of(answer, device).clock
                found |= {"tokens": made[-1], "seconds": round(seconds, 3)}
                found["tokens_per_second"] = round(made[-1] / seconds, 1)
                found["peak_bytes"] = torch.cuda.max_memory_allocated()
    rates = [f"batch {batch}: {report.cases[f'batch {batch}'].get('tokens_per_second', 'error')}" for batch in BATCHES]
    report.line = f"tokens/s, the images' encoding included: {', '.join(rates)}"


def answerer_in(folder: Path) -> Answerer:
    """The driver's answerer of a random model on the GPU, which never ends an answer before its limit."""
    shape = shape_of()
    plan = plan_of(folder, shape)
    write_tokenizer(folder, shape.vocabulary)
    tokenizer = load_tokenizer(str(folder), model_max_length=4096, padding_side="right")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.unk_token
    model = training.build(plan, torch.bfloat16).eval()
    model.set_attn_implementation("sdpa")
    model.config.use_cache = True
    model.generation_config.eos_token_id = None
    return Answerer.of(model, tokenizer, image_processor_of(shape), conv_mode="v1")
