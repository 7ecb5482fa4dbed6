"""Step `respond`: several answers to each picture's question, sampled from one or several vision-language models."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dama.chat import ChatClient, ChatRequest, ChatSettings, after_thoughts, image_part
from dama.completion import well_formed
from dama.console import digest_of, log
from dama.images import load_image, resolve_image
from dama.notices import without_loading_bars
from dama.remote_code import remote_code_refused
from dama.special_tokens import escaped, placeholders
from dama.stage import Record, open_stage
from dama.synth.prompts import (
    RANK_IMAGES,
    RESPOND,
    SynthError,
    checkpoint_identity,
    chunks_of,
    read_step,
    step_folder,
)

NO_ANSWER = "the model gave no answer"
SEEDS_A_RUN = 1_000_003  # chunks of one seed before the next one's begin


class Question(NamedTuple):
    """What is asked about an image; `image` is relative to the image folder."""

    id: str
    image: str
    text: str


class Sampling(NamedTuple):
    """How answers are drawn: `samples` of them to each question."""

    samples: int = 1
    temperature: float = 1.0
    max_new_tokens: int = 1000
    top_p: float | None = None


class Responder(Protocol):
    """Whatever answers questions about images."""

    name: str

    def identity(self) -> Record:
        """What the answers depend on besides questions and sampling, for the fingerprint."""

    def answer(self, questions: Sequence[Question], images: Path, sampling: Sampling, seed: int) -> list[list[str]]:
        """`sampling.samples` answers to each; an empty text where the model gives none."""

    def release(self) -> None:
        """Give the memory back; it has answered all."""


class HfResponder:
    """A Hugging Face image-text-to-text model with its own chat template, loaded when it is first needed.

    Args:
        load_4bit: quantize the weights to 4 bits by bitsandbytes, as PDS-DPO does.
        trust_remote_code: run the code that comes with the checkpoint, which may do anything.
    """

    def __init__(
        self, name: str, *, device: str = "cpu", load_4bit: bool = False, trust_remote_code: bool = False
    ) -> None:
        self.name, self.checkpoint, self.device, self.load_4bit = Path(name).name, name, device, load_4bit
        self.trust_remote_code = trust_remote_code

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor, BitsAndBytesConfig

        dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        trust = {"trust_remote_code": self.trust_remote_code}
        options: dict[str, Any] = {"dtype": dtype, **trust}
        if self.load_4bit:
            options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=dtype)
        remedy = "give another model, or --trust_remote_code once you have read its code"
        with remote_code_refused(f"responder {self.checkpoint}", remedy), without_loading_bars():
            model = AutoModelForImageTextToText.from_pretrained(self.checkpoint, **options)
            processor = AutoProcessor.from_pretrained(self.checkpoint, **trust)
        processor.tokenizer.padding_side = "left"
        return processor, (model if self.load_4bit else model.to(self.device)).eval()

    def identity(self) -> Record:
        """Identify the model and its settings in the fingerprint."""
        return checkpoint_identity(self.checkpoint) | {"kind": "hf", "load_4bit": self.load_4bit}

    def answer(self, questions: Sequence[Question], images: Path, sampling: Sampling, seed: int) -> list[list[str]]:
        """Answer each question with one text per sample."""
        import torch

        processor, model = self._loaded
        shown = [load_image(resolve_image(images, question.image)) for question in questions]
        texts = [escaped(question.text, processor.tokenizer, *placeholders(processor)) for question in questions]
        turns = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}] for text in texts]
        prompts = processor.apply_chat_template(turns, add_generation_prompt=True)
        inputs = processor(text=prompts, images=shown, padding=True, return_tensors="pt").to(model.device)
        torch.manual_seed(seed)
        with torch.inference_mode():
            ids = model.generate(**inputs, **self._options(sampling))
        answers = processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        return chunks_of([answer.strip() for answer in answers], sampling.samples)

    @staticmethod
    def _options(sampling: Sampling) -> dict[str, Any]:
        options: dict[str, Any] = {"max_new_tokens": sampling.max_new_tokens, "do_sample": sampling.temperature > 0}
        if sampling.temperature > 0:
            options |= {"temperature": sampling.temperature, "num_return_sequences": sampling.samples, "top_k": 0}
            options |= {} if sampling.top_p is None else {"top_p": sampling.top_p}
        return options

    def release(self) -> None:
        """Free the memory of the model."""
        self.__dict__.pop("_loaded", None)
        release_memory()


class ServedResponder:
    """A model behind an OpenAI-compatible server.

    Args:
        cache: a JSONL file of its replies. omit: settings that are left to the server.
    """

    def __init__(
        self,
        model: str,
        base_url: str,
        cache: Path | None = None,
        *,
        concurrency: int = 8,
        omit: Sequence[str] = (),
    ) -> None:
        self.name, self.base_url, self.cache, self.concurrency = model, base_url, cache, concurrency
        self.omit = tuple(sorted(set(omit)))
        self._answered = False  # whether a chunk before this one was

    def identity(self) -> Record:
        """Identify the model and its settings in the fingerprint."""
        return {"kind": "server", "model": self.name} | ({"omitted": list(self.omit)} if self.omit else {})

    def answer(self, questions: Sequence[Question], images: Path, sampling: Sampling, seed: int) -> list[list[str]]:
        """Answer each question with one text per sample."""
        settings = ChatSettings(
            self.base_url,
            self.name,
            temperature=sampling.temperature,
            max_tokens=sampling.max_new_tokens,
            top_p=sampling.top_p,
            seed=seed,
            concurrency=self.concurrency,
            timeout=600.0,
            give_up=not self._answered,
        ).without(self.omit)
        asked = [
            ChatRequest(f"{question.id}#{sample}", (self._turn(question, images),), sample)
            for question in questions
            for sample in range(sampling.samples)
        ]
        client = ChatClient(settings, self.cache)
        replies = client.ask(asked, desc=self.name).values()
        self._answered = True
        missing = [f"{reply.id}: {reply.missing}" for reply in replies if reply.missing]
        if missing:
            log(f"{RESPOND}: {self.name}: {len(missing)} of {len(asked)} requests without answer, e.g. {missing[0]}")
        return chunks_of([reply.answer for reply in replies], sampling.samples)

    @staticmethod
    def _turn(question: Question, image_folder: Path) -> Record:
        path = resolve_image(image_folder, question.image)
        shown = image_part(path.read_bytes(), "png" if path.suffix == ".png" else "jpeg")
        return {"role": "user", "content": [shown, {"type": "text", "text": question.text}]}

    def release(self) -> None:
        """Nothing is held here."""


class DrivenResponder:
    """A responder with a generation driver of another package inside: it is handed in, so that none is imported here.

    Args:
        make: loads or opens the driver, which has name, identity() and answer(requests, image_folder, decoding).
        request: (id, prompt, image) -> the driver's request. decoding: (sampling, seed) -> its decoding.
    """

    def __init__(
        self,
        make: Callable[[], Any],
        request: Callable[[str, str, str], Any],
        decoding: Callable[[Sampling, int], Any],
    ) -> None:
        self._make, self._request, self._decoding = make, request, decoding
        self.name: str = self._driver.name

    @cached_property
    def _driver(self) -> Any:
        return self._make()

    def identity(self) -> Record:
        """Identify the model and its settings in the fingerprint."""
        return {"kind": "checkpoint"} | self._driver.identity()

    def answer(self, questions: Sequence[Question], images: Path, sampling: Sampling, seed: int) -> list[list[str]]:
        """Answer each question with one text per sample."""
        import torch

        torch.manual_seed(seed)
        requests = [self._request(question.id, question.text, question.image) for question in questions]
        return self._driver.answer(requests, images, self._decoding(sampling, seed))

    def release(self) -> None:
        """Free the memory of the model."""
        self.__dict__.pop("_driver", None)
        release_memory()


def release_memory() -> None:
    """What nobody holds any more goes back to the GPU before the next model comes."""
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


# --------------------------------------------------------------------------------------------------------------- step


def run_respond(
    responders: Sequence[Responder],
    out: str | Path,
    sampling: Sampling,
    *,
    pictures: str | Path | None = None,
    seed: int = 0,
    batch_size: int = 8,
    overwrite: bool = False,
) -> Record:
    """Ask every responder about every image; records in out/stages/respond, one responder after the other.

    A record is {id, question, image, responder, sample, text, fault}. images: the --out of another run whose images
    are asked about (on-policy rounds). A chunk is seeded by its number, so a resumed run draws what an undisturbed one
    draws.
    """
    _validate_distinct(responders)
    home = Path(pictures or out)
    manifest, ranked = read_step(home, RANK_IMAGES)
    questions = [Question(record["id"], record["image"], record["question"]) for record in ranked if record["image"]]
    if not questions:
        raise SynthError(f"synth: no picture is left in {home}: {manifest['summary']['left_out']}")
    batches = chunks_of(questions, batch_size)
    chunks = [(responder, batch) for responder in responders for batch in batches]
    settings = {"sampling": sampling._asdict(), "seed": seed, "batch_size": batch_size}
    fingerprint = _inputs(questions, ranked, responders) | settings
    sizes = [len(batch) * sampling.samples for _, batch in chunks]

    def answered(number: int) -> list[Record]:
        responder, batch = chunks[number]
        answers = responder.answer(batch, home, sampling, seed * SEEDS_A_RUN + number)
        if (number + 1) % len(batches) == 0:
            responder.release()
        return _records(responder.name, batch, answers)

    with open_stage(step_folder(out, RESPOND), RESPOND, fingerprint, sizes, overwrite=overwrite) as stage:
        stage.fill(answered, "answer")
        return stage.conclude(_summarize, {"image_folder": str(home)}) or {}


def _validate_distinct(responders: Sequence[Responder]) -> None:
    names = [name for name, count in Counter(responder.name for responder in responders).items() if count > 1]
    if names:
        raise SynthError(f"--responder: {', '.join(names)} is given more than once; ask for more --samples instead")


def _inputs(questions: Sequence[Question], ranked: Sequence[Record], responders: Sequence[Responder]) -> Record:
    """Digests of the questions and images, and who answers them."""
    return {
        "questions": digest_of([list(question) for question in questions]),
        "pictures": digest_of([record["digest"] for record in ranked]),
        "responders": {responder.name: responder.identity() for responder in responders},
    }


def _records(name: str, batch: Sequence[Question], answers: Sequence[Sequence[str]]) -> list[Record]:
    """What was said in the end, by a model of any kind; one that only thinks gives no answer."""
    return [
        {"id": question.id, "question": question.text, "image": question.image, "responder": name, "sample": sample,
         "text": text, "fault": "" if text.strip() else NO_ANSWER}
        for question, texts in zip(batch, answers)
        for sample, text in enumerate(well_formed(after_thoughts(text)) for text in texts)
    ]  # fmt: skip


def _summarize(records: list[Record], facts: list[Record]) -> Record:
    words = Counter({name: 0 for name in dict.fromkeys(record["responder"] for record in records)})
    for record in records:
        words[record["responder"]] += len(record["text"].split())
    each = len(records) / max(1, len(words))
    errors = Counter(record["fault"] for record in records if record["fault"])
    return {"answers": len(records), "mean_words": {name: round(count / each, 2) for name, count in words.items()},
            "faults": dict(errors), **facts[0]}  # fmt: skip
