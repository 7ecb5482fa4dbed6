"""Splits answers into statements by an LLM, as the paper does: over an OpenAI-compatible server or with a local model.

Each split is checked against its answer: where it adds a word that carries content, or loses most of them, or there is
no split at all, the rules split this answer instead, and the reason is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from dama.chat import ChatClient, ChatRequest, ChatSettings, after_thoughts
from dama.console import digest_of, regular_file, writing
from dama.hardness.clip import PRECISIONS, weights_digest
from dama.hardness.markers import numbered_markers
from dama.hardness.split import BULLET, Split, as_statement, split_statements
from dama.remote_code import remote_code_refused
from dama.special_tokens import escaped

PROMPT = """\
Split the text at the end into statements, one on each line.

- A statement is one short sentence that says one thing, and that is understood without the others.
- Take the words of the text. Only where it says it, he, she or they, put the thing or person that is meant instead.
- Say everything that the text says, in the same order, and nothing else.
- Write no numbers, bullets, headings or remarks of your own.

Text:
"""
REPLY_TOKENS = 1024
LOCAL_BATCH = 8  # answers that a local model splits at a time
NO_REPLY, NO_STATEMENTS, ADDED, LOST = "no reply", "no statements", "added words", "lost words"  # why rules split

Ask = Callable[[Sequence[str]], list[str | None]]
"""Answers -> the model's replies to PROMPT with each, None where there is none."""


@dataclass(frozen=True)
class LlmSplitter:
    """Asks for splits and checks them. `identity` is what they depend on, for a stage's fingerprint."""

    ask: Ask
    identity: dict[str, str]

    def split(self, answers: Sequence[str]) -> dict[str, Split]:
        """The split of each answer, with the reason where rules had to make it."""
        replies = self.ask(answers)
        return {answer: checked_split(answer, reply) for answer, reply in zip(answers, replies, strict=True)}


def server_splitter(settings: ChatSettings, cache: str | Path) -> LlmSplitter:
    """Ask an OpenAI-compatible server. Replies are kept in the file `cache`, by content."""
    client = ChatClient(settings, cache)

    def ask(answers: Sequence[str]) -> list[str | None]:
        requests = [ChatRequest(digest_of(answer), (_message(answer),)) for answer in answers]
        replies = client.ask(requests, accept=lambda text: bool(read_statements(text)), tries=2, desc="splitting")
        return [replies[request.id].text for request in requests]

    return LlmSplitter(ask, {"llm": settings.model, "prompt": digest_of(PROMPT)})


def local_splitter(folder: str | Path, cache: str | Path, device: str = "cpu", precision: str = "fp32") -> LlmSplitter:
    """Split with a local chat model in Hugging Face format, greedily, in batches.

    Replies are cached in the file `cache` by the content of the batch: rounding, and with it a word now and then,
    depends on what a text is padded to.

    Raises ValueError for a model without a chat template.
    """
    from transformers import pipeline

    with remote_code_refused(f"--splitter_model {folder}", "take a model of a kind that transformers has"):
        tokenizer, model = _load_chat_model(folder, precision)
    if not tokenizer.chat_template:
        remedy = "take a chat (instruct) model"
        raise ValueError(f"--splitter_model {folder}: its tokenizer has no chat template\nRemedy: {remedy}")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    chat = pipeline("text-generation", model=model, tokenizer=tokenizer, device=device)
    identity = {"llm": Path(folder).name, "prompt": digest_of(PROMPT), "precision": precision}
    identity |= {"weights": weights_digest(model)}
    batches = _Batches(Path(cache))

    def generate(batch: Sequence[str]) -> list[str]:
        with torch.inference_mode():
            made = chat(
                [[_message(escaped(answer, tokenizer))] for answer in batch], batch_size=LOCAL_BATCH, do_sample=False,
                max_new_tokens=REPLY_TOKENS, return_full_text=False,
            )  # fmt: skip
        return [reply[0]["generated_text"] for reply in made]

    return LlmSplitter(lambda answers: batches.ask(answers, identity, generate), identity)


def _load_chat_model(folder: str | Path, precision: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    own: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left", **own)
    return tokenizer, AutoModelForCausalLM.from_pretrained(
        folder, dtype=PRECISIONS[precision], use_safetensors=True, **own
    )


def _message(answer: str) -> dict[str, str]:
    return {"role": "user", "content": PROMPT + answer}


class _Batches:
    """A local model's replies to batches, also in a JSONL file that is only appended to, a line each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.replies: dict[str, list[str]] = {}
        if path.exists():
            content = path.read_bytes()
            whole = content[: content.rfind(b"\n") + 1]  # a kill may have torn the last line
            with open(path, "rb+", opener=regular_file) as file:
                file.truncate(len(whole))
            self.replies = {row["key"]: row["replies"] for row in map(json.loads, whole.splitlines())}

    def ask(
        self, answers: Sequence[str], identity: dict[str, str], generate: Callable[[Sequence[str]], list[str]]
    ) -> list[str | None]:
        """Return the reply to each answer; batches of similar length that are not stored yet are generated."""
        ordered = sorted(answers, key=lambda answer: (len(answer), answer))
        replies: dict[str, str] = {}
        for start in range(0, len(ordered), LOCAL_BATCH):
            batch = ordered[start : start + LOCAL_BATCH]
            key = digest_of([identity, batch])
            if key not in self.replies:
                self.add(key, generate(batch))
            replies |= zip(batch, self.replies[key], strict=True)
        return [replies[answer] for answer in answers]

    def add(self, key: str, replies: list[str]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"key": key, "replies": replies}, ensure_ascii=False) + "\n"
        with writing(self.path, len(line)), open(self.path, "ab", buffering=0, opener=regular_file) as file:
            file.write(line.encode("utf-8"))
        self.replies[key] = replies


# --------------------------------------------------------------------------------------------------------- checking


def read_statements(reply: str) -> list[str]:
    """The lines of a reply as statements: no thoughts, no list marks, no announcement such as "Here they are:"."""
    lines = [BULLET.sub("", line).strip() for line in numbered_markers(after_thoughts(reply)).splitlines()]
    lines = [line for line in lines if re.search(r"\w", line)]
    if lines and lines[0].endswith(":"):
        del lines[0]
    return [as_statement(line) for line in lines]


def checked_split(answer: str, reply: str | None) -> Split:
    """The reply's statements where they say what the answer says, in its words; else the rules' and the reason."""
    statements = [] if reply is None else read_statements(reply)
    if reply is None:
        reason = NO_REPLY
    elif not statements:
        reason = NO_STATEMENTS
    elif added_words(answer, statements):
        reason = ADDED
    elif _loses_most(answer, statements):
        reason = LOST
    else:
        return Split(statements)
    return Split(split_statements(answer), reason)


def added_words(answer: str, statements: Sequence[str]) -> list[str]:
    """Words of the statements that carry content and are, in no inflection, words of the answer."""
    known = _forms_of_all(answer)
    return [word for text in statements for word in _content(text) if not known & _forms(word)]


def _loses_most(answer: str, statements: Sequence[str]) -> bool:
    """Whether more than half of the answer's content is in no statement, as where a reply breaks off."""
    words, kept = list(_content(answer)), _forms_of_all(" ".join(statements))
    return 2 * sum(not kept & _forms(word) for word in words) > len(words)


# Writing systems without spaces between words: a character is taken for a word.
_UNSPACED = r"[\u0e00-\u0e7f\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff]"
_WORD = re.compile(rf"{_UNSPACED}|\d+(?:[.,:]\d+)*|(?:(?!{_UNSPACED})[^\W\d_])+(?:['’](?!{_UNSPACED})[^\W\d_]+)*")
_HOLDING_TOGETHER = """
a an the this that these those there here it its he she they we i you his her hers him them their theirs one ones which
who whom whose what where when while and or but nor so as if then than also too both each either of in on at by to from
with for into onto about is are was were be been being am has have had having do does did done can could will would may
might shall should some any other another such very more most 的 了 是 有 在 着 它 他 她 们 这 那 一 个 和
"""
_FUNCTION_WORDS = frozenset(_HOLDING_TOGETHER.split())
_ENDINGS = [
    (re.compile(pattern), put)
    for pattern, put in (
        (r"['’]s?$", ""),
        (r"s$", ""),
        (r"(?:(?<=[sxzo])|(?<=[cs]h))es$", ""),
        (r"i(?:es|ed)$", "y"),
        (r"(?<=.)(?:ing|ed)$", ""),
        (r"(?<=.)(?:ing|ed)$", "e"),
        (r"([b-df-hj-np-tv-z])\1(?:ing|ed)$", r"\1"),
        (r"(?<=.)ying$", "ie"),
    )
]


def _content(text: str) -> Iterator[str]:
    """Lower-case words of a text but for those that only hold others together, contracted ("it's") or not."""
    words = (match.group().lower() for match in _WORD.finditer(text))
    return (word for word in words if re.split("['’]", word)[0] not in _FUNCTION_WORDS)


@lru_cache(100_000)
def _forms(word: str) -> frozenset[str]:
    """The word and what it may be an inflection of: standing -> standing, stand, stande."""
    return frozenset([word, *(pattern.sub(put, word) for pattern, put in _ENDINGS)])


def _forms_of_all(text: str) -> set[str]:
    return set().union(*map(_forms, _content(text)))
