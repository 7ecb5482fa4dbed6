"""What the terminal and the browser share: pictures from outside, models that stream answers, objects to be marked.

A model is a checkpoint in this process (`LocalModel`) or one behind an OpenAI-compatible server (`ServerModel`).
"""

from __future__ import annotations

import http.client
import io
import json
import os
import queue
import re
import socket
import time
import urllib.parse
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread, Timer
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList

from dama.images import FORMATS, MAX_PIXELS, UNREADABLE, ImageError, as_rgb, exceeded_limit, open_image
from dama.redact import redacted, secrets_of_url
from llava.constants import DEFAULT_IMAGE_TOKEN
from llava.conversation import SeparatorStyle, encode_base64, get_template, image_placeholder
from llava.generation.request import Decoding
from llava.mm_utils import KeywordsStoppingCriteria, encode_prompt, literal, process_images
from llava.model.builder import load_pretrained_model

# What LLaVA's commands choose for a LLaVA-v1.5 checkpoint. They guess it from the folder's name; here it is said.
DEFAULT_CONV_MODE = "llava_v1"

# ----------------------------------------------------------------------------------------------------------- pictures

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".bmp", ".tif", ".tiff")
MAX_BYTES = 20 * 2**20  # of a download or an upload
MAX_SECONDS = 30.0  # of a download


class ImageRefused(ValueError):
    """An image that can be read and is not taken, and why."""


def read_image(data: bytes, name: str) -> Image.Image:
    """The first frame as RGB, the way LLaVA's models saw pictures: EXIF rotation not applied, transparency dropped.

    CMYK is converted; of 16-bit grey the high byte is kept (Pillow's own conversion would clip nearly all to white).

    Raises:
        ValueError: not an image, damaged, 32 bits a pixel and channel, or too large in area, side or ratio of sides.
    """
    try:
        with open_image(io.BytesIO(data)) as image:
            if limit := exceeded_limit(image.size):
                size = f"{image.width} x {image.height}"
                raise ImageRefused(f"{name}: {size} is {limit}; make the picture smaller or crop it")
            if image.mode in ("I", "F"):
                raise ImageRefused(f"{name}: 32 bits a pixel and channel (mode {image.mode}), expected 8 or 16")
            return as_rgb(image)
    except ImageRefused:
        raise
    except ImageError as error:
        raise ValueError(f"{name}: not a picture that can be read; expected {', '.join(FORMATS)}") from error
    except Image.DecompressionBombError as error:
        raise ValueError(f"{name}: more than {MAX_PIXELS:,} pixels; make the picture smaller") from error
    except UNREADABLE as error:
        raise ValueError(f"{name}: the picture is damaged ({error})") from error


def load_image(image_file: str) -> Image.Image:
    """The picture in a file or behind an http(s) URL, see `read_image`.

    Raises:
        ValueError: no such file, it cannot be downloaded within the limits, or `read_image` refuses it.
    """
    if image_file.startswith(("http://", "https://")):
        return read_image(download(image_file), redacted(image_file))
    try:
        return read_image(Path(image_file).read_bytes(), image_file)
    except OSError as error:
        raise ValueError(f"{image_file}: cannot be read ({error.strerror})") from error


def download(url: str, max_bytes: int = MAX_BYTES, max_seconds: float = MAX_SECONDS) -> bytes:
    """The picture's bytes. Raises ValueError: unreachable, another content type, too large or too slow.

    The time is that of all: connections, redirects, headers and content, however many bytes the server sends meanwhile.
    """
    deadline, shown = time.monotonic() + max_seconds, redacted(url)
    sockets: list[socket.socket] = []
    timer = Timer(max_seconds, _shut, [sockets])
    timer.daemon = True
    timer.start()
    try:
        request = urllib.request.Request(url, headers={"User-Agent": "llava"})
        with _web_only(sockets, deadline).open(request, timeout=min(10.0, max_seconds)) as reply:
            if time.monotonic() > deadline:  # a connection that was shut here looks like the end of the headers
                raise TimeoutError
            kind = reply.headers.get_content_type()
            if not kind.startswith("image/") and kind != "application/octet-stream":
                raise ValueError(f"{shown}: expected a picture, the server sends {kind}")
            return _read_within(reply, shown, max_bytes, deadline)
    except (OSError, http.client.HTTPException) as error:  # URLError, HTTPError and timeouts are OSErrors
        if time.monotonic() > deadline:
            raise ValueError(f"{shown}: not downloaded in time; the server is too slow") from error
        problem = redacted(str(getattr(error, "reason", None) or error), secrets_of_url(url))
        raise ValueError(f"{shown}: cannot be downloaded ({problem})") from error
    finally:
        timer.cancel()


def _web_only(sockets: list[socket.socket], deadline: float) -> urllib.request.OpenerDirector:
    """urllib's opener without ftp:, file: and data:, to which a server may redirect; `sockets` gets what it opens."""

    def watched(base: type[http.client.HTTPConnection]) -> type[http.client.HTTPConnection]:
        class Connection(base):  # type: ignore[misc, valid-type]
            def connect(self) -> None:
                if time.monotonic() > deadline:  # the timer will not come again
                    raise TimeoutError("no time left")
                super().connect()
                sockets.append(self.sock)

        return Connection

    class Plain(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(watched(http.client.HTTPConnection), req)

    class Secure(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(watched(http.client.HTTPSConnection), req)

    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler, Plain, Secure, urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor, urllib.request.HTTPDefaultErrorHandler, urllib.request.UnknownHandler,
    ):  # fmt: skip
        opener.add_handler(handler())
    return opener


def _shut(sockets: Iterable[socket.socket]) -> None:
    for each in sockets:
        with suppress(OSError):  # closed already
            each.shutdown(socket.SHUT_RDWR)


def _read_within(reply: Any, shown: str, max_bytes: int, deadline: float) -> bytes:
    content = bytearray()
    while block := reply.read1(1 << 16):
        content += block
        if len(content) > max_bytes:
            raise ValueError(f"{shown}: more than {max_bytes / 2**20:.0f} MiB")
    if time.monotonic() > deadline:  # where the connection was shut from here, what came may be a part
        raise ValueError(f"{shown}: not downloaded in time; the server is too slow")
    return bytes(content)


# ------------------------------------------------------------------------------------------------------------- models

History = Sequence[tuple[str, str]]  # earlier questions and answers


class ChatModel(Protocol):
    """Answers in a conversation about one picture, or about none."""

    name: str

    def reply(
        self, history: History, question: str, image: Image.Image | None, decoding: Decoding, stop: Event
    ) -> Iterator[str]:
        """The answer so far, whenever it has grown; ends early once `stop` is set. ValueError: cannot be asked."""


class LocalModel:
    """A checkpoint in this process.

    Args:
        model_path: checkpoint folder or hub name. model_base: the base of a LoRA folder.
        conv_mode: prompt template. device: cuda or cpu; what is there when None.
    """

    def __init__(
        self,
        model_path: str,
        model_base: str | None = None,
        *,
        conv_mode: str = DEFAULT_CONV_MODE,
        device: str | None = None,
        load_8bit: bool = False,
        load_4bit: bool = False,
    ) -> None:
        self.name, self.template = Path(model_path).name, get_template(conv_mode)
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.float16 if self.device.startswith("cuda") else torch.float32
        self.tokenizer, self.model, self.image_processor, _ = load_pretrained_model(
            model_path, model_base, self.name, load_8bit, load_4bit, device=self.device, dtype=self.dtype
        )

    def reply(
        self, history: History, question: str, image: Image.Image | None, decoding: Decoding, stop: Event
    ) -> Iterator[str]:
        prompt = self.prompt(history, question, image is not None)
        return self.stream(prompt, [] if image is None else [image], decoding, stop)

    def prompt(self, history: History, question: str, has_image: bool) -> str:
        """The conversation as the model reads it, the picture at its start. Unanswered questions are left out."""
        turns: list[tuple[str, str | None]] = [(asked, answer) for asked, answer in history if answer]
        turns.append((question, None))
        if any(DEFAULT_IMAGE_TOKEN in text for turn in turns for text in turn if text):
            raise ValueError(f"the text holds {DEFAULT_IMAGE_TOKEN}, which stands for a picture; write it differently")
        turns = [(self.literal(asked), answer and self.literal(answer)) for asked, answer in turns]
        if has_image:
            turns[0] = (f"{self.image_tokens()}\n{turns[0][0]}", turns[0][1])
        return self.render(turns)

    def literal(self, text: str) -> str:
        """A user's text for a prompt: the spelling of a special token in it stays text."""
        return literal(text, self.tokenizer)

    def image_tokens(self) -> str:
        """What stands for a picture in a prompt of this model."""
        return image_placeholder(getattr(self.model.config, "mm_use_im_start_end", False))

    def render(self, turns: Sequence[tuple[str, str | None]]) -> str:
        conversation = self.template.copy()
        for asked, answer in turns:
            conversation.append_message(conversation.roles[0], asked)
            conversation.append_message(conversation.roles[1], answer)
        return conversation.get_prompt()

    def stream(self, prompt: str, images: Sequence[Image.Image], decoding: Decoding, stop: Event) -> Iterator[str]:
        """The answer to a rendered prompt so far, whenever it has grown (with beams, only at its end).

        Raises:
            ValueError: the prompt leaves no room for an answer, or has not one image token for each image.
        """
        inputs = self._inputs(prompt, images, decoding)
        tokens: queue.Queue[int | BaseException | None] = queue.Queue()
        abandoned = Event()
        criteria = StoppingCriteriaList([_Stopped(stop, abandoned)])
        end = self._end()
        if end != self.tokenizer.eos_token:
            criteria.append(KeywordsStoppingCriteria([end], self.tokenizer, torch.zeros(1, 0)))
        streamer = None if decoding.num_beams > 1 else _TokenQueue(tokens)
        options = inputs | {"stopping_criteria": criteria, "streamer": streamer}
        worker = Thread(target=self._generate, args=(options, tokens), daemon=True)
        worker.start()
        try:
            yield from self._texts(tokens, end)
        finally:
            abandoned.set()
            worker.join()

    def _generate(self, options: dict[str, Any], tokens: queue.Queue[int | BaseException | None]) -> None:
        """In a thread of its own: tokens into the queue, then None or what went wrong."""
        try:
            new = self.model.generate(**options)
            if options["streamer"] is None:
                for token in new[0].tolist():
                    tokens.put(token)
            tokens.put(None)
        except BaseException as error:  # noqa: B036 - raised again by the reader
            tokens.put(error)

    def _texts(self, tokens: queue.Queue[int | BaseException | None], end: str) -> Iterator[str]:
        ids: list[int] = []
        shown = ""
        while (item := tokens.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            ids.append(item)
            if not tokens.empty():
                continue  # the reader is slower than the model: decode what has come since at once
            text = self._decode(ids, end)
            # A character of several tokens shows as U+FFFD until its last one is there.
            if text != shown and not text.endswith("\ufffd"):
                shown = text
                yield shown
        if (text := self._decode(ids, end)) != shown:
            yield text

    def _decode(self, ids: list[int], end: str) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).split(end)[0].strip()

    def _end(self) -> str:
        """The template's mark at the end of an answer."""
        two = self.template.sep_style in (SeparatorStyle.TWO, SeparatorStyle.LLAMA_2)
        return (self.template.sep2 if two else self.template.sep) or self.tokenizer.eos_token

    def _inputs(self, prompt: str, images: Sequence[Image.Image], decoding: Decoding) -> dict[str, Any]:
        ids = encode_prompt(prompt, self.tokenizer)
        places = prompt.count(DEFAULT_IMAGE_TOKEN)
        if places != len(images):
            raise ValueError(f"expected one {DEFAULT_IMAGE_TOKEN} for each picture, got {places} for {len(images)}")
        pixels = self._pixels(images)
        used = len(ids) + sum(self._positions(image) - 1 for image in (() if pixels is None else pixels))
        room = self.context() - used
        if room < 1:
            raise ValueError(f"the conversation has {used} tokens, {self.name} holds {self.context()}: begin a new one")
        return decoding.options() | {
            "inputs": ids[None].to(self.device),
            "images": pixels,
            "image_sizes": [image.size for image in images] or None,
            "pad_token_id": self.tokenizer.pad_token_id,
            "max_new_tokens": min(room, decoding.max_new_tokens),
        }

    def _pixels(self, images: Sequence[Image.Image]) -> Any:
        """[N, 3, H, W], for "anyres" [N, crops, 3, H, W] or a list where the numbers of crops differ; None for none."""
        if not images:
            return None
        pixels = process_images(images, self.image_processor, self.model.config)
        if isinstance(pixels, Tensor):
            return pixels.to(self.device, self.dtype)
        return [image.to(self.device, self.dtype) for image in pixels]

    def _positions(self, image: Tensor) -> int:
        """How many positions a processed picture takes in the sequence."""
        tower: Any = self.model.get_vision_tower()
        return tower.num_patches * (image.shape[0] if image.dim() == 4 else 1)

    def context(self) -> int:
        """Tokens of prompt, picture and answer together."""
        config = self.model.config
        return min(config.max_position_embeddings, getattr(config, "tokenizer_model_max_length", None) or 1 << 30)


class _TokenQueue:
    """A streamer of transformers: puts each new token of the one row into a queue."""

    def __init__(self, tokens: queue.Queue[int | BaseException | None]) -> None:
        self.tokens = tokens

    def put(self, value: Tensor) -> None:
        for token in value.flatten().tolist():  # the prompt comes first: empty, for it is given as embeddings
            self.tokens.put(token)

    def end(self) -> None:
        pass


class _Stopped(StoppingCriteria):
    """Stops generation at the next token once one of the events is set."""

    def __init__(self, *events: Event) -> None:
        self.events = events

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        stopped = any(event.is_set() for event in self.events)
        return torch.full((input_ids.shape[0],), stopped, device=input_ids.device, dtype=torch.bool)


class ServerModel:
    """A model behind an OpenAI-compatible server, such as vLLM with an exported checkpoint.

    Args:
        base_url: up to and with "/v1". name: the model's name there. The environment's OPENAI_API_KEY is sent along.
    """

    connect_s = 10.0
    timeout_s = 60.0  # without a byte from the server
    answer_s = 600.0  # of a whole answer, however slowly it comes

    def __init__(self, base_url: str, name: str) -> None:
        address = urllib.parse.urlsplit(base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ValueError(f"server '{redacted(base_url)}': expected a URL such as http://127.0.0.1:8000/v1")
        self.name, self.base_url, self.address = name, base_url.rstrip("/"), address

    def reply(
        self, history: History, question: str, image: Image.Image | None, decoding: Decoding, stop: Event
    ) -> Iterator[str]:
        body = self._body(history, question, image, decoding)
        finished = Event()
        deadline = time.monotonic() + self.answer_s
        try:
            connection = self._connect()
            # The socket is shut from outside, since a reader that waits for the next line sees no event.
            Thread(target=_shut_when, args=(connection.sock, stop, finished, deadline), daemon=True).start()
            yield from self._texts(connection, body, stop)
        except (OSError, http.client.HTTPException, ValueError) as error:
            if not stop.is_set():
                slow = f"no end of the answer within {self.answer_s:g} s" if time.monotonic() > deadline else ""
                problem = slow or error or type(error).__name__
                raise ValueError(redacted(f"server {self.base_url}: {problem}")) from error
        finally:
            finished.set()

    def _body(self, history: History, question: str, image: Image.Image | None, decoding: Decoding) -> dict[str, Any]:
        messages: list[dict[str, Any]] = []
        for asked, answer in [*((q, a) for q, a in history if a), (question, None)]:
            messages.append({"role": "user", "content": asked})
            if answer:
                messages.append({"role": "assistant", "content": answer})
        if image is not None:
            url = {"url": "data:image/png;base64," + encode_base64(image, "PNG")}
            text = {"type": "text", "text": messages[0]["content"]}
            messages[0]["content"] = [{"type": "image_url", "image_url": url}, text]
        body = {"model": self.name, "messages": messages, "stream": True, "max_tokens": decoding.max_new_tokens}
        body["temperature"] = decoding.temperature
        return body | ({"top_p": decoding.top_p} if decoding.top_p is not None else {})

    def _connect(self) -> http.client.HTTPConnection:
        secure = self.address.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self.address.hostname or "", self.address.port, timeout=self.connect_s)
        connection.connect()
        connection.sock.settimeout(self.timeout_s)
        return connection

    def _texts(self, connection: http.client.HTTPConnection, body: dict[str, Any], stop: Event) -> Iterator[str]:
        headers = {"Content-Type": "application/json", "Accept": "text/event-stream"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        path = self.address.path.rstrip("/") + "/chat/completions"
        with closing(connection):
            connection.request("POST", path, json.dumps(body), headers)
            response = connection.getresponse()
            if response.status != 200:
                said = " ".join(response.read(500).decode("utf-8", "replace").split())
                raise ValueError(f"status {response.status} for {self.name!r}: {said}")
            text = ""
            for piece in _pieces(_lines(response)):
                if stop.is_set():
                    return
                text += piece
                if len(text) > MAX_ANSWER:
                    raise ValueError(f"the answer has more than {MAX_ANSWER:,} characters")
                yield text.strip()
            if not text.strip():
                raise ValueError("expected a stream of events with an answer, got none or an answer without text")


MAX_ANSWER = 100_000  # characters
MAX_LINE, MAX_REPLY = 1 << 20, 1 << 26  # bytes of a line of a streamed answer, and of all its lines


def _lines(response: http.client.HTTPResponse) -> Iterator[bytes]:
    """The reply's lines. ValueError: one, or all together, are longer than any answer."""
    received = 0
    while line := response.readline(MAX_LINE + 1):
        received += len(line)
        if len(line) > MAX_LINE or received > MAX_REPLY:
            raise ValueError(f"the server sends without end, {received / 2**20:.0f} MiB so far")
        yield line


def _pieces(lines: Iterable[bytes]) -> Iterator[str]:
    """The new text in each event of a streamed chat completion, up to its [DONE].

    Fields that are null or absent carry no text; ValueError where one has another type than the protocol's.
    """
    for line in lines:
        data = line.decode("utf-8").strip().removeprefix("data:").strip()
        if data == "[DONE]":
            return
        if not line.startswith(b"data:") or not data:
            continue  # comments and blank lines
        try:
            event = _field({"event": json.loads(data)}, "event", dict)
        except RecursionError as error:
            raise ValueError("an event of the server is nested too deeply") from error
        if event.get("error"):
            raise ValueError(f"the server broke off: {event['error']}")
        for choice in _field(event, "choices", list):
            delta = _field(_field({"choice": choice}, "choice", dict), "delta", dict)
            if piece := _field(delta, "content", str):
                # Half of a surrogate pair could not be shown or sent on.
                yield piece.encode("utf-8", "replace").decode("utf-8")


def _field(record: dict[str, Any], name: str, kind: type) -> Any:
    """The field; an empty value of the kind where it is null or absent. ValueError: another type."""
    value = record.get(name)
    if value is None:
        return kind()
    if not isinstance(value, kind):
        got = f"{type(value).__name__} {str(value)[:60]!r}"
        raise ValueError(f"an event of the server: expected {name} to be {kind.__name__} or null, got {got}")
    return value


def _shut_when(sock: socket.socket, stop: Event, finished: Event, deadline: float) -> None:
    while not finished.wait(0.05):
        if stop.is_set() or time.monotonic() > deadline:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                return  # closed already
            return


def replies_together(replies: Sequence[Iterator[str]], pulse_s: float | None = None) -> Iterator[list[str]]:
    """The texts so far of several answers that are made at the same time, whenever one has grown.

    They are repeated every `pulse_s` seconds without news, so that the reader of a silent model can leave. Raises what
    the first failing one raises; the others go on until they are stopped.
    """
    events: queue.Queue[tuple[int, str | BaseException | None]] = queue.Queue()

    def pump(index: int, reply: Iterator[str]) -> None:
        try:
            for text in reply:
                events.put((index, text))
            events.put((index, None))
        except BaseException as error:  # noqa: B036 - raised again by the reader
            events.put((index, error))

    for index, reply in enumerate(replies):
        Thread(target=pump, args=(index, reply), daemon=True).start()
    texts, running = [""] * len(replies), len(replies)
    while running:
        try:
            index, item = events.get(timeout=pulse_s)
        except queue.Empty:
            yield list(texts)
            continue
        if isinstance(item, BaseException):
            raise item
        if item is None:
            running -= 1
            continue
        texts[index] = item
        if events.empty():  # else the reader is slower than the models: show the latest only
            yield list(texts)
    yield list(texts)


# ------------------------------------------------------------------------------------------------------------ marking


@dataclass(frozen=True, slots=True)
class Mention:
    """An object that a text names: characters [start, end)."""

    start: int
    end: int
    name: str


class ObjectVocabulary:
    """Words for objects. Each line "name, synonym, synonym ..."; plurals in -s, -es and -ies need not be listed."""

    def __init__(self, lines: Iterable[str]) -> None:
        self.name_of: dict[str, str] = {}
        for line in lines:
            words = [" ".join(word.lower().split()) for word in line.split(",") if word.strip()]
            for word in words:
                for form in (word, word + "s", word + "es", *([word[:-1] + "ies"] if word.endswith("y") else [])):
                    self.name_of.setdefault(form, words[0])
        if not self.name_of:
            raise ValueError("vocabulary: expected lines of object names, got none")
        longest_first = sorted(self.name_of, key=len, reverse=True)
        self._pattern = re.compile(rf"\b(?:{'|'.join(map(re.escape, longest_first))})\b", re.IGNORECASE)

    def mentions(self, text: str) -> list[Mention]:
        """Every object that `text` names, from left to right, by its longest phrase ("dining table", not "table")."""
        return [Mention(m.start(), m.end(), self.name_of[m.group().lower()]) for m in self._pattern.finditer(text)]

    def names(self, listed: str) -> frozenset[str]:
        """The objects of a comma-separated list; a word that the vocabulary lacks stands for itself."""
        words = [" ".join(word.lower().split()) for word in listed.split(",") if word.strip()]
        return frozenset(self.name_of.get(word, word) for word in words)


def read_vocabulary(path: str | Path) -> ObjectVocabulary:
    with open(path, encoding="utf-8") as file:
        return ObjectVocabulary(file)
