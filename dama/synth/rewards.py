"""Reward models behind one protocol: of texts alone, of images and texts, a judge on a server, any HTTP endpoint.

A reward of several statements is the mean over them (or their worst), as a CLIP reads only a sentence or two. What a
model gives no number for is NaN.
"""

from __future__ import annotations

import asyncio
import base64
import math
import re
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from dama.chat import ChatClient, ChatRequest, ChatSettings, after_thoughts, image_part
from dama.completion import well_formed
from dama.console import digest_of
from dama.hardness import split
from dama.hardness.clip import ClipScorer, load_clip
from dama.images import load_image
from dama.notices import without_loading_bars
from dama.redact import redacted, secrets_of_url
from dama.remote_code import remote_code_refused
from dama.special_tokens import escaped
from dama.stage import Record
from dama.synth.prompts import checkpoint_identity

REDUCTIONS: dict[str, Callable[[Sequence[float]], float]] = {"mean": statistics.fmean, "min": min}
JUDGE_TOKENS = 8
TRUST = "give another model, or --trust_remote_code once you have read its code"
JUDGE_PROMPT = """\
Below is a picture, what was asked about it, and an answer. Grade the answer from 0 to 100: 100 where everything it says
can be seen in the picture and it answers what was asked, 0 where nothing does. Each thing it names that is not to be
seen costs a lot; length in itself earns nothing.

Asked: {question}

Answer: {text}

Reply with the number alone."""
JUDGE_PROMPT_OF_PICTURES = """\
Grade how faithfully the picture shows this description, from 0 to 100. Anything missing, added or malformed costs.

Description: {text}

Reply with the number alone."""


class Judged(NamedTuple):
    """What is scored: an answer to a question about an image; or, with no question, a picture's description."""

    image: Path
    question: str
    text: str


class Reward(Protocol):
    """Whatever scores texts about images; higher is better."""

    name: str
    sees_image: bool

    def identity(self) -> Record:
        """What the scores depend on, for the fingerprint."""

    def score(self, items: Sequence[Judged]) -> list[float]:
        """One number for each, NaN where the model gives none."""


class TextReward:
    """A Hugging Face sequence classifier of question and answer; it never sees the image.

    Takes the tokenizer's chat template where there is one, as ArmoRM does, else the two texts as a pair. The score is
    the model's output `score` where its code gives one, else the only logit. Texts are scored one by one, so that no
    score depends on what else is in a batch; one beyond the model's positions gets NaN.

    Args:
        trust_remote_code: run the code that comes with the checkpoint, which may do anything.
    """

    sees_image = False

    def __init__(self, name: str, *, device: str = "cpu", trust_remote_code: bool = False) -> None:
        self.name, self.device, self.trust_remote_code = f"text:{Path(name).name}", device, trust_remote_code
        self.checkpoint = name

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        trust = {"trust_remote_code": self.trust_remote_code}
        dtype = torch.bfloat16 if self.device.startswith("cuda") else torch.float32
        with remote_code_refused(f"reward {self.checkpoint}", TRUST), without_loading_bars():
            model = AutoModelForSequenceClassification.from_pretrained(self.checkpoint, dtype=dtype, **trust)
            tokenizer = AutoTokenizer.from_pretrained(self.checkpoint, **trust)
        return tokenizer, model.to(self.device).eval()

    def identity(self) -> Record:
        """Identify the reward in the fingerprint."""
        return checkpoint_identity(self.checkpoint) | {"kind": "text"}

    def score(self, items: Sequence[Judged]) -> list[float]:
        """Score each item; NaN for an item without a score."""
        import torch

        _, model = self._loaded
        longest = getattr(model.config, "max_position_embeddings", None)
        scores = []
        for item in items:
            inputs = self._encoded(item)
            if longest and inputs["input_ids"].shape[1] > longest:
                scores.append(math.nan)
                continue
            with torch.inference_mode():
                scores.append(_single(model(**inputs.to(self.device)), self.checkpoint))
        return scores

    def _encoded(self, item: Judged) -> Any:
        tokenizer, _ = self._loaded
        if tokenizer.chat_template is None:
            return tokenizer(item.question, item.text, return_tensors="pt", split_special_tokens=True)
        question, text = escaped(item.question, tokenizer), escaped(item.text, tokenizer)
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
        return tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)


def _single(output: Any, name: str) -> float:
    scores = getattr(output, "score", None)
    if scores is None:
        scores = output.logits
    if scores.numel() != 1:
        remedy = "give a model with one, or one that computes `score`, with --trust_remote_code where it is in its code"
        raise ValueError(f"reward {name}: {scores.numel()} outputs, expected one\nRemedy: {remedy}")
    return float(scores.float().reshape(()))


class ClipReward:
    """Cosine of the image with each statement, by an open_clip model (see dama.hardness.clip).

    Args:
        reduction: of an answer's statements, mean or min.
    """

    sees_image = True

    def __init__(
        self, model: str, pretrained: str | None = None, *, device: str = "cpu", reduction: str = "mean"
    ) -> None:
        self.name, self.model, self.pretrained = f"clip:{Path(model).name}", model, pretrained
        self.device, self.reduction = device, reduction

    @cached_property
    def scorer(self) -> ClipScorer:
        """Load the CLIP."""
        return load_clip(self.model, self.pretrained, self.device)

    def identity(self) -> Record:
        """Identify the reward in the fingerprint."""
        return {**self.scorer.identity, "kind": "clip", "reduction": self.reduction, "splitter": split.VERSION}

    def score(self, items: Sequence[Judged]) -> list[float]:
        """Score each item; NaN for an item without a score."""
        tokens = self.scorer.tokens
        parts = [_statements(item.text, tokens.count, tokens.context_length) for item in items]
        paths = list(dict.fromkeys(item.image for item in items))
        images = dict(zip(paths, self.scorer.encode_images(paths)))
        distinct = list(dict.fromkeys(statement for part in parts for statement in part))
        texts = dict(zip(distinct, self.scorer.encode_texts(distinct)))
        reduce = REDUCTIONS[self.reduction]
        cosines = [[float(texts[statement] @ images[item.image]) for statement in p] for item, p in zip(items, parts)]
        return [reduce(values) if values else math.nan for values in cosines]


def _statements(text: str, count: Callable[[str], int], limit: int) -> list[str]:
    whole = split.split_statements(text)
    return [piece for statement in whole for piece in split.fit_to_context(statement, count, limit)]


class ImageTextReward:
    """A Hugging Face model that gives `logits_per_image` for an image and texts: CLIP, SigLIP, PickScore.

    Args:
        trust_remote_code: run the code that comes with the checkpoint, which may do anything.
    """

    sees_image = True

    def __init__(
        self, name: str, *, device: str = "cpu", reduction: str = "mean", trust_remote_code: bool = False
    ) -> None:
        self.name, self.checkpoint, self.device = f"image-text:{Path(name).name}", name, device
        self.reduction, self.trust_remote_code = reduction, trust_remote_code

    @cached_property
    def _loaded(self) -> tuple[Any, Any]:
        from transformers import AutoModel, AutoProcessor

        trust = {"trust_remote_code": self.trust_remote_code}
        with remote_code_refused(f"reward {self.checkpoint}", TRUST), without_loading_bars():
            processor = AutoProcessor.from_pretrained(self.checkpoint, **trust)
            model = AutoModel.from_pretrained(self.checkpoint, **trust)
        processor.tokenizer.split_special_tokens = True  # "<|endoftext|>" in an answer is text
        return processor, model.to(self.device).eval()

    def identity(self) -> Record:
        """Identify the reward in the fingerprint."""
        return checkpoint_identity(self.checkpoint) | {"kind": "image-text", "reduction": self.reduction}

    def score(self, items: Sequence[Judged]) -> list[float]:
        """Score each item; NaN for an item without a score."""
        return [self._score(item) for item in items]

    def _score(self, item: Judged) -> float:
        import torch

        processor, model = self._loaded
        limit = model.config.text_config.max_position_embeddings
        parts = _statements(item.text, lambda text: len(processor.tokenizer(text).input_ids), limit)
        if not parts:
            return math.nan
        inputs = processor(
            text=parts, images=load_image(item.image), return_tensors="pt", padding="max_length", max_length=limit
        )
        with torch.inference_mode():
            logits = model(**inputs.to(self.device)).logits_per_image[0]
        return REDUCTIONS[self.reduction](logits.float().tolist())


class JudgeReward:
    """A grade from 0 to 100 by a model behind an OpenAI-compatible server; NaN where it gives none after three tries.

    Args:
        sees_image: send the image along. cache: a JSONL file of replies, which an interrupted run goes on with.
    """

    def __init__(self, settings: ChatSettings, cache: Path | None = None, *, sees_image: bool = True) -> None:
        self.name, self.sees_image = f"judge:{settings.model}", sees_image
        self.settings = settings
        self.client = ChatClient(settings, cache)

    def identity(self) -> Record:
        """Identify the reward in the fingerprint."""
        prompts = digest_of([JUDGE_PROMPT, JUDGE_PROMPT_OF_PICTURES])
        return {"kind": "judge", "model": self.settings.model, "temperature": self.settings.temperature,
                "sees_image": self.sees_image, "prompts": prompts}  # fmt: skip

    def score(self, items: Sequence[Judged]) -> list[float]:
        """Score each item; NaN for an item without a score."""
        requests = [ChatRequest(str(number), (self._turn(item),)) for number, item in enumerate(items)]
        replies = self.client.ask(requests, accept=lambda text: read_grade(text) is not None, tries=3, desc=self.name)
        grades = [None if reply.text is None else read_grade(reply.text) for reply in replies.values()]
        return [math.nan if grade is None else grade for grade in grades]

    def _turn(self, item: Judged) -> Record:
        template = JUDGE_PROMPT if item.question else JUDGE_PROMPT_OF_PICTURES
        slots = {"{question}": item.question, "{text}": item.text}
        text = re.sub("|".join(map(re.escape, slots)), lambda slot: slots[slot[0]], template)
        if not self.sees_image:
            return {"role": "user", "content": text}
        kind = "png" if item.image.suffix == ".png" else "jpeg"
        return {"role": "user", "content": [image_part(item.image.read_bytes(), kind), {"type": "text", "text": text}]}


def read_grade(text: str) -> float | None:
    """The number that the reply consists of, after its thoughts; None where it is another text or outside 0 to 100."""
    found = re.fullmatch(r"\D{0,20}?(?<![-\u2212.])(\d+(?:\.\d+)?)(?:\s*/\s*100)?\W*", after_thoughts(text))
    grade = float(found[1]) if found else math.inf
    return grade if grade <= 100 else None


class EndpointReward:
    """A reward model of any kind behind HTTP, such as ImageReward or ArmoRM in an environment of its own.

    It is sent {"items": [{"image": BASE64 or null, "question": ..., "text": ...}]} by POST and replies with
    {"scores": [number or null, ...]}, as many as there were items. Credentials in the URL are sent and never stored.
    """

    def __init__(self, url: str, *, sees_image: bool = True, timeout: float = 300.0) -> None:
        self.url, self.sees_image, self.timeout = url, sees_image, timeout
        self.shown_url = redacted(url)
        self.name = f"http:{self.shown_url}"

    def identity(self) -> Record:
        """Identify the reward in the fingerprint."""
        return {"kind": "http", "url": self.shown_url, "sees_image": self.sees_image}

    def score(self, items: Sequence[Judged]) -> list[float]:
        """Score each item; NaN for an item without a score."""
        import httpx

        images = [base64.b64encode(item.image.read_bytes()).decode() if self.sees_image else None for item in items]
        body = [{"image": image, "question": item.question, "text": item.text} for item, image in zip(items, images)]
        try:
            scores = asyncio.run(self._post({"items": body}))["scores"]
            if len(scores) != len(items):
                raise ValueError(f"{len(scores)} scores for {len(items)} items")
            return [math.nan if score is None else float(score) for score in scores]
        except (httpx.HTTPError, ValueError, KeyError, TypeError, RecursionError) as error:
            remedy = 'it must reply {"scores": [a number for each item]}; then run this again, it continues'
            said = redacted(well_formed(f"{type(error).__name__}: {error}"), secrets_of_url(self.url))
            raise ValueError(f"reward {self.shown_url}: {said}\nRemedy: {remedy}") from error

    async def _post(self, body: Record) -> Any:
        """The reply's JSON; a server that is not there yet is tried five times more."""
        import httpx

        from dama.bounded_http import BoundedClient

        async with BoundedClient(self.timeout, transport=httpx.AsyncHTTPTransport(retries=5)) as client:
            return (await client.post(self.url, json=body)).raise_for_status().json()
