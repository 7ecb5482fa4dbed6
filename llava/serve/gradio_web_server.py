"""A chat about an image in the browser, with one model or with two side by side, in one process.

`python -m llava.serve.gradio_web_server --model-path CHECKPOINT --compare BASE`, then open http://127.0.0.1:7860.
As in eval.evaluate, --compare names the baseline, which is shown first.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from dama.console import log, report_error
from dama.images import FORMATS
from dama.redact import redacted
from llava.conversation import shrink
from llava.generation.flags import Given, add_processor_flags
from llava.generation.request import Decoding
from llava.serve.chat import DEFAULT_CONV_MODE, ChatModel, History, replies_together
from llava.serve.checkpoints import open_model
from llava.serve.examples import Example, read_examples, style_of
from llava.serve.guard import Guard, is_loopback
from llava.serve.images import MAX_BYTES, SUFFIXES, read_image
from llava.serve.mentions import ObjectVocabulary, read_vocabulary
from llava.serve.server_model import ServerModel
from llava.serve.transcript import COPY, DOWNLOAD, as_json

EPILOG = """With --openai-base-url the models are those of a server, for which a checkpoint is exported first:
  python -m llava.model.export --to hf CHECKPOINT EXPORTED
  vllm serve EXPORTED --served-model-name aligned          # http://127.0.0.1:8000/v1
  transformers serve EXPORTED                              # the same address
  python -m llava.serve.gradio_web_server --openai-base-url http://127.0.0.1:8000/v1 --model-path aligned
A server's key is taken from the environment's OPENAI_API_KEY."""

CSS = """
.gradio-container { width: 100% !important; max-width: 1500px !important; margin: auto !important; }
#head h1 { margin: 0; }
#notice { font-size: 0.9em; opacity: 0.8; }
/* The question stays in sight, however long the page is; the padding lets the page scroll past it. */
#asking { position: fixed; bottom: 0; left: 0; right: 0; z-index: 60; gap: 8px; width: auto;
    padding: 8px max(16px, calc(50vw - 734px)); background: var(--body-background-fill);
    border-top: 1px solid var(--border-color-primary); }
.gradio-container { padding-bottom: 190px !important; }
#examples { gap: 8px; flex-wrap: nowrap; }
#examples button { min-width: 0; height: 76px; padding: 0 0 2px; align-items: flex-end; font-size: 0.8em; color: white;
    background-size: cover; background-position: center; text-shadow: 0 0 3px black, 0 0 3px black, 0 0 3px black; }
#keep { gap: 8px; justify-content: flex-end; }
#keep button { flex: 0 0 auto; min-width: 130px; }
#copy.done::after { content: " \2713"; }
#buttons { gap: 8px; flex-wrap: nowrap; }
#buttons button { min-width: 0; padding-left: 4px; padding-right: 4px; }
@media (max-width: 640px) {
    .gradio-container { padding: 8px 8px 190px !important; }
    #asking textarea { max-height: 5.5em; }
    #buttons button { font-size: 0.85em; }
    .chat { height: 40vh !important; min-height: 200px !important; }
    #preview { height: 112px !important; }
}
mark { border-radius: 4px; padding: 0 3px; }
mark.absent { background: #fecaca; color: #7f1d1d !important; }
mark.present { background: #d1fae5; color: #064e3b !important; }
"""

# Answers are below the fold of a narrow window, where the columns stand one below the other.
SHOW_ANSWERS = """() => {
    if (innerWidth <= 640) document.getElementById("chat-0").scrollIntoView({ behavior: "smooth", block: "start" });
}"""

# Limits on what one visitor, and all together, may take. Those of the page's fields hold for requests without the page.
QUESTION_LENGTH, LISTED_LENGTH = 8000, 2000  # characters
TURNS = 100  # of a conversation
TOKENS = (16, 1024)  # of an answer
IMAGE_SIDE = (1344, 672)  # pixels that an image's longer and shorter side are shrunk to, as in LLaVA's own page
IMAGES_AT_ONCE = 1  # decoded at the same time: one of 89 million pixels takes up to 600 MB
SESSIONS = 200  # kept at the same time; the oldest go first
SESSION_S = 3600.0  # seconds until a session is forgotten that nobody uses
WAITING = 64  # events in the queue
PULSE_S = 0.5  # seconds after which an answer that does not grow is looked at: has its reader left?


# ------------------------------------------------------------------------------------------------------ conversations


@dataclass
class Turn:
    """A question and its answers."""

    question: str
    answers: list[str]  # one from each model


class Session:
    """One user's conversation. A copy is a new, empty one: Gradio copies the initial state for every user.

    Not a dataclass: Gradio would turn it into a dictionary.
    """

    def __init__(self) -> None:
        self.image: Image.Image | None = None
        self.image_name = ""
        self.turns: list[Turn] = []
        self.listed = ""  # objects in the image, as the user lists them
        self.stop = Event()
        self.busy = False

    def __deepcopy__(self, memo: Any) -> Session:
        return Session()

    def history(self, model: int) -> History:
        """Return one model's earlier questions and answers."""
        return [(turn.question, turn.answers[model]) for turn in self.turns]

    def begin(self, image: Image.Image | None, name: str = "") -> None:
        """A new conversation, the running answer of the old one stopped."""
        self.stop.set()
        self.image, self.image_name, self.turns = image, name, []

    def ask(self, models: Sequence[ChatModel], question: str, decoding: Decoding) -> Iterator[None]:
        """Adds a turn whose answers grow, all at the same time; yields when they have. ValueError: cannot be asked."""
        stop = self.stop = Event()
        image, histories = self.image, [self.history(i) for i in range(len(models))]
        replies = [model.reply(past, question, image, decoding, stop) for model, past in zip(models, histories)]
        turn = Turn(question, [""] * len(models))
        self.turns.append(turn)
        self.busy = True
        try:
            yield
            for turn.answers in replies_together(replies, PULSE_S):
                yield
        finally:
            stop.set()
            self.busy = False
            if not any(turn.answers) and turn in self.turns:
                self.turns.remove(turn)


def as_html(text: str, vocabulary: ObjectVocabulary | None, listed: str) -> str:
    """The text with its objects marked: `present` where the user's list has them, `absent` where not.

    Nothing is marked without a list. The text comes from a model, so none of it is markup, see `as_text`.
    """
    if vocabulary is None or not listed.strip():
        return as_text(text)
    names, parts, end = vocabulary.names(listed), [], 0
    for mention in vocabulary.mentions(text):
        kind = "present" if mention.name in names else "absent"
        parts.append(_references(text[end : mention.start]))
        parts.append(f'<mark class="{kind}">{_references(text[mention.start : mention.end])}</mark>')
        end = mention.end
    return _indented("".join(parts) + _references(text[end:]))


def as_text(text: str) -> str:
    """Text for Gradio's Markdown that shows as it is: neither HTML nor Markdown, no link, and no image that loads.

    Every ASCII character that is neither letter, digit nor space becomes a character reference, which Markdown takes
    for text; so do white spaces that open a line, which could begin a block of code.
    """
    return _indented(_references(text))


def _references(text: str) -> str:
    return re.sub(r"[!-/:-@\[-`{-~]", lambda match: f"&#{ord(match[0])};", text)


def _indented(text: str) -> str:
    return re.sub(r"^[ \t]+", lambda match: "&nbsp;" * len(match[0].expandtabs(4)), text, flags=re.MULTILINE)


def messages(session: Session, model: int, vocabulary: ObjectVocabulary | None) -> list[dict[str, str]]:
    """A model's side of the conversation for Gradio's chatbot."""
    shown = []
    for turn in session.turns:
        shown.append({"role": "user", "content": as_text(turn.question)})
        if turn.answers[model]:
            shown.append({"role": "assistant", "content": as_html(turn.answers[model], vocabulary, session.listed)})
    return shown


def open_upload(path: str) -> tuple[Image.Image, str]:
    """(image, shrunk to IMAGE_SIDE; what to show the user) of an uploaded file. ValueError: it is refused."""
    file = Path(path)
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file.name}: more than {MAX_BYTES >> 20} MiB")
    return open_content(file.read_bytes(), file.name)


def open_content(content: bytes, name: str) -> tuple[Image.Image, str]:
    """As `open_upload`, of a file's bytes."""
    image = read_image(content, name)
    small = shrink(image, *IMAGE_SIDE)
    shrunk = "" if small.size == image.size else f", shrunk from {image.width} x {image.height}"
    return small, f"{name}, {small.width} x {small.height}{shrunk}, shown as the model sees it"


def decoding_of(temperature: float, top_p: float, max_tokens: float) -> Decoding:
    """One setting for all models of the page. ValueError: a value that the page's fields do not give."""
    ranges = (
        ("temperature", temperature, 0, 1),
        ("top p", top_p, 0.05, 1),
        ("tokens of an answer", max_tokens, *TOKENS),
    )
    for name, value, least, most in ranges:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
            raise ValueError(f"{name}: expected {least} to {most}, got {str(value)[:20]}")
    return Decoding(max_new_tokens=int(max_tokens), temperature=temperature, top_p=top_p if temperature > 0 else None)


def limited(name: str, text: Any, length: int) -> str:
    """The text. ValueError: it is none, or longer than `length` characters."""
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected text, got {type(text).__name__}")
    if len(text) > length:
        raise ValueError(f"{name}: expected at most {length:,} characters, got {len(text):,}")
    return text


# ---------------------------------------------------------------------------------------------------------------- page


class Page:
    """The components, and what happens when they are used; every handler answers with updates of components."""

    def __init__(self, models: Sequence[ChatModel], vocabulary: ObjectVocabulary | None, concurrency_count: int):
        self.models, self.vocabulary, self.concurrency_count = models, vocabulary, concurrency_count
        self.examples = read_examples()
        # Threads of their own: each one's heap keeps the size of its largest image.
        self.preparing = ThreadPoolExecutor(IMAGES_AT_ONCE)

    def build(self) -> None:
        """Lays the page out and ties it up, inside a `gr.Blocks`."""
        import gradio as gr

        gr.Markdown("# Chat about an image\n" + self._introduction(), elem_id="head")
        self.session = gr.State(Session(), time_to_live=SESSION_S)
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                self._build_left()
            with gr.Column(scale=8, min_width=320):
                self._build_chats()
        with gr.Column(elem_id="asking"):
            self._build_question()
        self._connect()

    def _introduction(self) -> str:
        side_by_side = ""
        if len(self.models) > 1:
            side_by_side = " Two models answer the same question side by side, the baseline first."
        marks = ""
        if self.vocabulary is not None:
            marks = (
                " List what is in the image, and objects in the answers are marked:"
                ' <mark class="present">listed</mark> or <mark class="absent">not listed</mark>.'
            )
        return f"Choose an image or one of the examples, and ask about it.{side_by_side}{marks}"

    def _build_left(self) -> None:
        import gradio as gr

        self.file = gr.File(label="Image", file_types=list(SUFFIXES), type="filepath", height=130, elem_id="upload")
        refuse_addresses(self.file)
        self.notice = gr.Markdown(f"{', '.join(FORMATS)}; at most {MAX_BYTES >> 20} MiB", elem_id="notice")
        with gr.Row(elem_id="examples"):
            self.example_buttons = [gr.Button(e.title, elem_id=f"example-{i}") for i, e in enumerate(self.examples)]
        self.preview = gr.Image(
            show_label=False, interactive=False, format="jpeg", height=220, buttons=[], visible=False, elem_id="preview"
        )
        self.listed = gr.Textbox(
            label="Objects in the image", placeholder="dog, bench, traffic light", elem_id="listed",
            info="Separated by commas; others that an answer names are marked.",
            visible=self.vocabulary is not None, max_length=LISTED_LENGTH,
        )  # fmt: skip
        for_both = ", the same for both models" if len(self.models) > 1 else ""
        with gr.Accordion(f"Decoding{for_both}", open=False):
            self.temperature = gr.Slider(
                0.0, 1.0, 0.0, step=0.1, label="Temperature", info="0: greedy, the default", elem_id="temperature"
            )
            self.top_p = gr.Slider(0.05, 1.0, 0.7, step=0.05, label="Top p", info="used with a temperature above 0")
            self.max_tokens = gr.Slider(*TOKENS, 512, step=16, label="Tokens of an answer", elem_id="max-tokens")

    def _build_chats(self) -> None:
        import gradio as gr

        with gr.Row():
            self.chats = [
                gr.Chatbot(
                    label=model.name, height="52vh", min_height=280, buttons=[], latex_delimiters=[],
                    feedback_options=None, elem_id=f"chat-{i}", elem_classes="chat",
                )
                for i, model in enumerate(self.models)
            ]  # fmt: skip
        with gr.Row(elem_id="keep"):
            self.copy = gr.Button("Copy", size="sm", interactive=False, elem_id="copy")
            self.save = gr.Button("Download", size="sm", interactive=False, elem_id="download")
        self.conversation = gr.Textbox(visible="hidden", elem_id="conversation")

    def _build_question(self) -> None:
        import gradio as gr

        to_both = " to both models" if len(self.models) > 1 else ""
        self.question = gr.Textbox(
            label=f"Your question{to_both}", placeholder="Ask about the image, then press Enter", max_lines=6,
            autofocus=True, elem_id="question", max_length=QUESTION_LENGTH,
        )  # fmt: skip
        with gr.Row(elem_id="buttons"):
            self.send = gr.Button("Send", variant="primary", elem_id="send")
            self.stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
            self.again = gr.Button("Regenerate", interactive=False, elem_id="regenerate")
            self.clear = gr.Button("Clear", interactive=False, elem_id="clear")

    def _connect(self) -> None:
        import gradio as gr

        decoding = [self.temperature, self.top_p, self.max_tokens]
        # One queue for both, so that no more than this many users are answered at the same time.
        answering: dict[str, Any] = {
            "concurrency_limit": self.concurrency_count, "concurrency_id": "answers", "show_progress": "hidden",
            "api_visibility": "private",
        }  # fmt: skip
        at_once: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
        view = [*self.chats, self.send, self.stop, self.again, self.clear, self.copy, self.save, self.conversation]
        asked = [self.session, self.question, self.listed, *decoding]
        sends = [self.question.submit, self.send.click]
        gr.on([*sends, self.again.click], None, None, None, js=SHOW_ANSWERS, **at_once)
        gr.on(sends, self.ask, asked, [self.question, *view], **answering).then(
            self.view, self.session, view, **at_once
        )
        self.again.click(self.regenerate, [self.session, self.listed, *decoding], view, **answering).then(
            self.view, self.session, view, **at_once
        )
        # Not through the queue: it must arrive while an answer is under way.
        self.stop.click(lambda session: session.stop.set(), self.session, None, **at_once)
        clears = [self.clear.click, *(chat.clear for chat in self.chats)]
        gr.on(clears, self.clear_history, self.session, view, **at_once)
        relisted = [*self.chats, self.conversation]
        gr.on([self.listed.submit, self.listed.blur], self.relist, [self.session, self.listed], relisted, **at_once)
        for button, script in ((self.copy, COPY), (self.save, DOWNLOAD)):
            button.click(None, self.conversation, None, js=script, **at_once)
        chosen = [self.file, self.preview, self.notice, *view]
        # Through the queue, for only there can a handler put a warning on the page.
        self.file.upload(self.choose, [self.session, self.file], chosen, concurrency_limit=IMAGES_AT_ONCE,
                         concurrency_id="images", show_progress="hidden", api_visibility="private")  # fmt: skip
        for button, example in zip(self.example_buttons, self.examples):
            button.click(
                partial(self.choose_example, example), [self.session, self.question],
                [self.question, self.listed, self.preview, self.notice, *view], **at_once,
            )  # fmt: skip

    # Handlers.

    def view(self, session: Session) -> list[Any]:
        """The chats and the buttons as they are to be now."""
        import gradio as gr

        chats = [messages(session, i, self.vocabulary) for i in range(len(self.models))]
        idle, has_turns = not session.busy, bool(session.turns)
        active = (idle, session.busy, *[idle and has_turns] * 4)
        return [*chats, *(gr.update(interactive=value) for value in active), self.transcript(session)]

    def transcript(self, session: Session) -> Any:
        """The conversation to copy and download, once its last answer is complete."""
        import gradio as gr

        if session.busy:
            return gr.skip()
        turns = [(turn.question, turn.answers) for turn in session.turns]
        return as_json(session.image_name, session.listed, [model.name for model in self.models], turns)

    def ask(
        self, session: Session, question: str, listed: str | None, temperature: float, top_p: float, max_tokens: int
    ) -> Iterator[list[Any]]:
        """Stream the models' answers to a question into the page."""
        import gradio as gr

        try:
            session.listed = self.objects(listed)
            question = limited("the question", question, QUESTION_LENGTH)
            decoding = decoding_of(temperature, top_p, max_tokens)
            if not question.strip() or session.busy:
                yield [question, *self.view(session)]
                return
            if len(session.turns) >= TURNS:
                raise ValueError(f"the conversation has {TURNS} questions, the most it can hold: begin a new one")
            for _ in session.ask(self.models, question.strip(), decoding):
                yield ["", *self.view(session)]
        except Exception as error:
            # A ValueError is meant for the visitor; of any other the machine's owner learns more than the visitor.
            warn(str(error) if isinstance(error, ValueError) else "The model failed; the server's log says why.")
            if not isinstance(error, ValueError):
                report_error(error, "gradio_web_server")
            yield [gr.skip() if not isinstance(question, str) else question[:QUESTION_LENGTH], *self.view(session)]

    def regenerate(
        self, session: Session, listed: str | None, temperature: float, top_p: float, max_tokens: int
    ) -> Iterator[list[Any]]:
        """The last question once more."""
        question = "" if session.busy or not session.turns else session.turns.pop().question
        for _, *view in self.ask(session, question, listed, temperature, top_p, max_tokens):
            yield view

    def clear_history(self, session: Session) -> list[Any]:
        """Begin a new conversation about the same image."""
        session.begin(session.image, session.image_name)
        return self.view(session)

    def objects(self, listed: str | None) -> str:
        """The list that a visitor typed. A page without vocabulary does not show its field, and sends None for it."""
        return "" if listed is None else limited("the list of objects", listed, LISTED_LENGTH)

    def relist(self, session: Session, listed: str | None) -> list[Any]:
        """Mark the answers by another list of objects."""
        session.listed = self.objects(listed)
        return [*(messages(session, i, self.vocabulary) for i in range(len(self.models))), self.transcript(session)]

    def choose(self, session: Session, path: str) -> list[Any]:
        """Another image begins another conversation; a file that is refused changes nothing."""
        import gradio as gr

        try:
            image, notice = self.preparing.submit(open_upload, path).result()
        except ValueError as error:
            warn(f"Refused: {error}")
            return [None, gr.skip(), as_text(f"Refused: {error}"), *self.view(session)]
        finally:
            Path(path).unlink(missing_ok=True)  # Gradio's own copy of what was uploaded
        session.begin(image, Path(path).name)
        return [None, gr.update(value=image, visible=True), as_text(notice), *self.view(session)]

    def choose_example(self, example: Example, session: Session, question: str) -> list[Any]:
        """Begin a conversation about an example; its question does not replace one that the user has typed."""
        import gradio as gr

        image, notice = open_content(example.content(), example.file)
        session.begin(image, example.file)
        session.listed = example.objects if self.vocabulary is not None else ""
        asked = gr.skip() if isinstance(question, str) and question.strip() else example.question
        return [asked, session.listed, gr.update(value=image, visible=True), as_text(notice), *self.view(session)]


def refuse_addresses(component: Any) -> None:
    """Let a component take uploaded files only. Gradio would download a "file" that names an address, of any size."""
    import gradio as gr

    taken = component.async_move_resource_to_block_cache

    async def uploaded(path: Any) -> str | None:
        if "://" in str(path):
            raise gr.Error("expected an uploaded file, got an address")
        return await taken(path)

    component.async_move_resource_to_block_cache = uploaded


def warn(message: str) -> None:
    """A note in the corner of the page of the user whose event is being handled."""
    import gradio as gr

    gr.Warning(html.escape(redacted(message), quote=False))


def build_demo(
    models: Sequence[ChatModel], vocabulary: ObjectVocabulary | None = None, *, concurrency_count: int = 4
) -> Any:
    """The page as a `gradio.Blocks`: one chat for each of the one or two models.

    Args:
        vocabulary: the objects that are marked in answers; no marks, and no list to type, when None.
        concurrency_count: users that are answered at the same time, the others wait.
    """
    import gradio as gr

    with gr.Blocks(title="LLaVA", analytics_enabled=False, delete_cache=(600, 600), fill_width=True) as demo:
        Page(models, vocabulary, concurrency_count).build()
    return demo.queue(max_size=WAITING, api_open=False)


def serve(
    demo: Any, host: str, port: int | None, *, share: bool = False, wait: bool = True, names: Iterable[str] = ()
) -> str:
    """Serves the page and returns its address, after Ctrl-C unless `wait` is off.

    Only files that Gradio itself made in its temporary folder (GRADIO_TEMP_DIR) can be fetched. Where `host` is of this
    machine alone, so must be the name that a browser asks for; `names` adds those of a proxy in front of the page.
    """
    import gradio as gr

    any_name, allowed = share or not is_loopback(host), {name.lower() for name in names}

    @asynccontextmanager
    async def guarded(app: Any) -> AsyncIterator[None]:
        # Around all of Gradio's own middleware, which would add its CORS headers to a refusal.
        folder = os.environ["GRADIO_TEMP_DIR"]
        app.middleware_stack = Guard(app.middleware_stack, folder, MAX_BYTES, names=allowed, any_name=any_name)
        yield

    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, address, shared = demo.launch(
        server_name=host, server_port=port, share=share, max_file_size=MAX_BYTES, allowed_paths=[], footer_links=[],
        show_error=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, quiet=True,
        prevent_thread_lock=True, inbrowser=False, theme=theme, css=CSS + style_of(read_examples()),
        state_session_capacity=SESSIONS, app_kwargs={"lifespan": guarded},
    )  # fmt: skip
    if shared:
        allowed.add(urlsplit(shared).netloc.lower())
    if wait:
        log(f"serving on {address} (Ctrl-C ends)")
        demo.block_thread()
    return address


def private_cache() -> tempfile.TemporaryDirectory[str]:
    """An empty folder, readable by this user only, in which Gradio keeps uploads; no usage figures are sent.

    To be called before `build_demo`, and kept until the end.
    """
    folder = tempfile.TemporaryDirectory(prefix="llava-chat-")
    os.environ |= {
        "GRADIO_TEMP_DIR": folder.name,
        "GRADIO_EXAMPLES_CACHE": str(Path(folder.name) / "examples"),
        "GRADIO_ANALYTICS_ENABLED": "False",
    }
    return folder


# ------------------------------------------------------------------------------------------------------------- command


def build_parser() -> argparse.ArgumentParser:
    """Return the command's parser."""
    parser = argparse.ArgumentParser(
        prog="python -m llava.serve.gradio_web_server", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub name (or its name at the server)")
    parser.add_argument("--model-base", help="base of a LoRA folder")
    parser.add_argument(
        "--compare", metavar="BASE", help="the baseline, which answers beside --model-path and is shown first"
    )
    parser.add_argument("--compare-base", help="base of a LoRA folder that --compare names")
    parser.add_argument(
        "--openai-base-url",
        nargs="+",
        metavar="URL",
        help="server of --model-path; a second URL if --compare's is another",
    )
    parser.add_argument("--vocabulary", help='objects to mark: lines "name, synonym, synonym ..."')
    parser.add_argument(
        "--conv-mode", action=Given, default=DEFAULT_CONV_MODE,
        help="prompt template of LLaVA-1.5; other models have their own (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--device", help="cuda or cpu (default: what is there)")
    parser.add_argument("--load-8bit", action="store_true", help="weights in 8 bits (bitsandbytes, GPU)")
    parser.add_argument("--load-4bit", action="store_true", help="weights in 4 bits (bitsandbytes, GPU)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    parser.add_argument(
        "--allow-host", nargs="+", default=[], metavar="NAME", help="names of a proxy that leads to this machine's page"
    )
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument(
        "--concurrency-count", type=int, default=4, help="users answered at the same time (default: %(default)s)"
    )
    parser.add_argument("--share", action="store_true", help="a public address through Gradio's servers")
    add_processor_flags(parser)
    return parser


def build_models(args: argparse.Namespace) -> list[ChatModel]:
    """The model that the flags name, behind its baseline where --compare names one."""
    urls = args.openai_base_url or []
    wanted = [(args.model_path, args.model_base, urls[:1])]
    if args.compare:
        wanted.insert(0, (args.compare, args.compare_base, urls[-1:]))
    if urls:
        return [ServerModel(url, name) for name, _, (url,) in wanted]
    return [open_model(args, path, base) for path, base, _ in wanted]


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit status."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a plain end would leave the uploads behind
    with private_cache():
        try:
            vocabulary = read_vocabulary(args.vocabulary) if args.vocabulary else None
            models = build_models(args)
            demo = build_demo(models, vocabulary, concurrency_count=args.concurrency_count)
            serve(demo, args.host, args.port, share=args.share, names=args.allow_host)
        except Exception as error:
            report_error(error, "gradio_web_server")
            if isinstance(error, ImportError):
                log("The page needs Gradio: pip install -e '.[serve]' in a clone, else pip install 'gradio>=6.31,<7'")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
