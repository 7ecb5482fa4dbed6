"""A chat about a picture in the browser, with one model or with two side by side, in one process:
`python -m llava.serve.gradio_web_server --model-path BASE --compare ALIGNED`, then open http://127.0.0.1:7860.
"""

from __future__ import annotations

import argparse
import html
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Any

from PIL import Image

from dama.console import report_error, say
from llava.conversation import shrink
from llava.eval.generate import Decoding
from llava.serve.chat import (
    DEFAULT_CONV_MODE,
    FORMATS,
    MAX_BYTES,
    SUFFIXES,
    ChatModel,
    History,
    LocalModel,
    ObjectVocabulary,
    ServerModel,
    read_image,
    read_vocabulary,
    replies_together,
)

EPILOG = """With --openai-base-url the models are those of a server, for which a checkpoint is exported first:
  python -m llava.model.export --to hf CHECKPOINT EXPORTED
  vllm serve EXPORTED --served-model-name aligned          # http://127.0.0.1:8000/v1
  transformers serve EXPORTED                              # the same address
  python -m llava.serve.gradio_web_server --openai-base-url http://127.0.0.1:8000/v1 --model-path aligned
A server's key is taken from the environment's OPENAI_API_KEY."""

CSS = """
.gradio-container { width: 100% !important; max-width: 1500px !important; margin: auto !important; }
#notice { font-size: 0.9em; opacity: 0.8; }
mark { border-radius: 4px; padding: 0 3px; }
mark.absent { background: #fecaca; color: #7f1d1d !important; }
mark.present { background: #d1fae5; color: #064e3b !important; }
"""


# ------------------------------------------------------------------------------------------------------ conversations


@dataclass
class Turn:
    question: str
    answers: list[str]  # one from each model


class Session:
    """One user's conversation. A copy is a new, empty one: Gradio copies the initial state for every user.

    Not a dataclass: Gradio would turn it into a dictionary.
    """

    def __init__(self) -> None:
        self.image: Image.Image | None = None
        self.turns: list[Turn] = []
        self.listed = ""  # objects in the picture, as the user lists them
        self.stop = Event()
        self.busy = False

    def __deepcopy__(self, memo: Any) -> Session:
        return Session()

    def history(self, model: int) -> History:
        return [(turn.question, turn.answers[model]) for turn in self.turns]

    def begin(self, image: Image.Image | None) -> None:
        """A new conversation, the running answer of the old one stopped."""
        self.stop.set()
        self.image, self.turns = image, []

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
            for turn.answers in replies_together(replies):
                yield
        finally:
            stop.set()
            self.busy = False
            if not any(turn.answers) and turn in self.turns:
                self.turns.remove(turn)


def as_html(text: str, vocabulary: ObjectVocabulary | None, listed: str) -> str:
    """The text with its objects marked: `present` where the user's list has them, `absent` where not.

    Nothing is marked without a list. The text is escaped: it comes from a model and is no markup.
    """
    if vocabulary is None or not listed.strip():
        return html.escape(text, quote=False)
    names, parts, end = vocabulary.names(listed), [], 0
    for mention in vocabulary.mentions(text):
        kind = "present" if mention.name in names else "absent"
        parts.append(html.escape(text[end : mention.start], quote=False))
        parts.append(f'<mark class="{kind}">{html.escape(text[mention.start : mention.end])}</mark>')
        end = mention.end
    return "".join(parts) + html.escape(text[end:], quote=False)


def messages(session: Session, model: int, vocabulary: ObjectVocabulary | None) -> list[dict[str, str]]:
    """A model's side of the conversation for Gradio's chatbot."""
    shown = []
    for turn in session.turns:
        shown.append({"role": "user", "content": html.escape(turn.question, quote=False)})
        if turn.answers[model]:
            shown.append({"role": "assistant", "content": as_html(turn.answers[model], vocabulary, session.listed)})
    return shown


def open_upload(path: str) -> tuple[Image.Image, str]:
    """(picture, what to tell the user) of an uploaded file. ValueError: it is refused."""
    file = Path(path)
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file.name}: more than {MAX_BYTES >> 20} MiB")
    image = read_image(file.read_bytes(), file.name)
    return image, f"{file.name}, {image.width} x {image.height}, shown as the model sees it"


# ---------------------------------------------------------------------------------------------------------------- page


class Page:
    """The components, and what happens when they are used; every handler answers with updates of components."""

    def __init__(self, models: Sequence[ChatModel], vocabulary: ObjectVocabulary | None, concurrency_count: int):
        self.models, self.vocabulary, self.concurrency_count = models, vocabulary, concurrency_count

    def build(self) -> None:
        """Lays the page out and ties it up, inside a `gr.Blocks`."""
        import gradio as gr

        gr.Markdown("# LLaVA\n" + self._introduction(), elem_id="head")
        self.session = gr.State(Session())
        with gr.Row():
            with gr.Column(scale=3, min_width=280):
                self._build_left()
            with gr.Column(scale=8, min_width=480):
                self._build_right()
        self._connect()

    def _introduction(self) -> str:
        side_by_side = " The models answer side by side." if len(self.models) > 1 else ""
        marks = ""
        if self.vocabulary is not None:
            marks = (
                " List what is in the picture, and objects in the answers are marked:"
                ' <mark class="present">listed</mark> or <mark class="absent">not listed</mark>.'
            )
        return f"Choose a picture and ask about it.{side_by_side}{marks}"

    def _build_left(self) -> None:
        import gradio as gr

        self.file = gr.File(label="Picture", file_types=list(SUFFIXES), type="filepath", height=130, elem_id="upload")
        self.notice = gr.Markdown(f"{', '.join(FORMATS)}; at most {MAX_BYTES >> 20} MiB", elem_id="notice")
        self.preview = gr.Image(
            show_label=False, interactive=False, format="jpeg", height=280, buttons=[], visible=False, elem_id="preview"
        )
        self.listed = gr.Textbox(
            label="Objects in the picture", placeholder="dog, bench, traffic light", elem_id="listed",
            info="Separated by commas; others that an answer names are marked.", visible=self.vocabulary is not None,
        )  # fmt: skip
        with gr.Accordion("Decoding", open=False):
            self.temperature = gr.Slider(
                0.0, 1.0, 0.2, step=0.1, label="Temperature", info="0 is greedy", elem_id="temperature"
            )
            self.top_p = gr.Slider(0.05, 1.0, 0.7, step=0.05, label="Top p", info="with a temperature")
            self.max_tokens = gr.Slider(16, 1024, 512, step=16, label="Tokens of an answer", elem_id="max-tokens")

    def _build_right(self) -> None:
        import gradio as gr

        with gr.Row():
            self.chats = [
                gr.Chatbot(
                    label=model.name, height="58vh", min_height=320, buttons=[], latex_delimiters=[],
                    feedback_options=None, elem_id=f"chat-{i}",
                )
                for i, model in enumerate(self.models)
            ]  # fmt: skip
        self.question = gr.Textbox(
            show_label=False, placeholder="Ask about the picture, then press Enter", max_lines=6, autofocus=True,
            elem_id="question", max_length=8000,
        )  # fmt: skip
        with gr.Row():
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
        view = [*self.chats, self.send, self.stop, self.again, self.clear]
        asked = [self.session, self.question, self.listed, *decoding]
        gr.on([self.question.submit, self.send.click], self.ask, asked, [self.question, *view], **answering).then(
            self.view, self.session, view, **at_once
        )
        self.again.click(self.regenerate, [self.session, self.listed, *decoding], view, **answering).then(
            self.view, self.session, view, **at_once
        )
        # Not through the queue: it must arrive while an answer is under way.
        self.stop.click(lambda session: session.stop.set(), self.session, None, **at_once)
        clears = [self.clear.click, *(chat.clear for chat in self.chats)]
        gr.on(clears, self.clear_history, self.session, view, **at_once)
        gr.on([self.listed.submit, self.listed.blur], self.relist, [self.session, self.listed], self.chats, **at_once)
        chosen = [self.file, self.preview, self.notice, *view]
        # Through the queue, for only there can a handler put a warning on the page.
        self.file.upload(self.choose, [self.session, self.file], chosen, concurrency_limit=None, show_progress="hidden",
                         api_visibility="private")  # fmt: skip

    # Handlers.

    def view(self, session: Session) -> list[Any]:
        """The chats and the buttons as they are to be now."""
        import gradio as gr

        chats = [messages(session, i, self.vocabulary) for i in range(len(self.models))]
        idle, has_turns = not session.busy, bool(session.turns)
        active = (idle, session.busy, idle and has_turns, idle and has_turns)
        return [*chats, *(gr.update(interactive=value) for value in active)]

    def ask(
        self, session: Session, question: str, listed: str, temperature: float, top_p: float, max_tokens: int
    ) -> Iterator[list[Any]]:
        session.listed = listed
        decoding = Decoding(max_new_tokens=int(max_tokens), temperature=temperature, top_p=top_p)
        if not question.strip() or session.busy:
            yield [question, *self.view(session)]
            return
        try:
            for _ in session.ask(self.models, question.strip(), decoding):
                yield ["", *self.view(session)]
        except ValueError as error:
            warn(str(error))
            yield [question, *self.view(session)]

    def regenerate(
        self, session: Session, listed: str, temperature: float, top_p: float, max_tokens: int
    ) -> Iterator[list[Any]]:
        """The last question once more."""
        question = "" if session.busy or not session.turns else session.turns.pop().question
        for _, *view in self.ask(session, question, listed, temperature, top_p, max_tokens):
            yield view

    def clear_history(self, session: Session) -> list[Any]:
        session.begin(session.image)
        return self.view(session)

    def relist(self, session: Session, listed: str) -> Any:
        session.listed = listed
        chats = [messages(session, i, self.vocabulary) for i in range(len(self.models))]
        return chats if len(chats) > 1 else chats[0]

    def choose(self, session: Session, path: str) -> list[Any]:
        """Another picture begins another conversation; a file that is refused changes nothing."""
        import gradio as gr

        try:
            image, notice = open_upload(path)
        except ValueError as error:
            warn(f"Refused: {error}")
            return [None, gr.skip(), html.escape(f"Refused: {error}"), *self.view(session)]
        session.begin(image)
        small = shrink(image, max_len=1344, min_len=672)
        return [None, gr.update(value=small, visible=True), html.escape(notice), *self.view(session)]


def warn(message: str) -> None:
    """A note in the corner of the page of the user whose event is being handled."""
    import gradio as gr

    gr.Warning(html.escape(message))


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
    return demo


def serve(demo: Any, host: str, port: int | None, *, share: bool = False, wait: bool = True) -> str:
    """Serves the page and returns its address, after Ctrl-C unless `wait` is off.

    Only files that Gradio itself made in its temporary folder (GRADIO_TEMP_DIR) can be fetched.
    """
    import gradio as gr

    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    _, address, _ = demo.launch(
        server_name=host, server_port=port, share=share, max_file_size=MAX_BYTES, allowed_paths=[], footer_links=[],
        show_error=False, enable_monitoring=False, ssr_mode=False, pwa=False, mcp_server=False, quiet=True,
        prevent_thread_lock=True, inbrowser=False, theme=theme, css=CSS,
    )  # fmt: skip
    if wait:
        say(f"serving on {address} (Ctrl-C ends)")
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
    parser = argparse.ArgumentParser(
        prog="python -m llava.serve.gradio_web_server", description=__doc__, epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model-path", required=True, help="checkpoint folder or hub name (or its name at the server)")
    parser.add_argument("--model-base", help="base of a LoRA folder")
    parser.add_argument("--compare", help="a second checkpoint, which answers beside the first")
    parser.add_argument("--compare-base", help="its base, if it is a LoRA folder")
    parser.add_argument(
        "--openai-base-url", nargs="+", metavar="URL", help="server of the models; a second URL for --compare's"
    )
    parser.add_argument("--vocabulary", help='objects to mark: lines "name, synonym, synonym ..."')
    parser.add_argument("--conv-mode", default=DEFAULT_CONV_MODE, help="prompt template (default: %(default)s)")
    parser.add_argument("--device", help="cuda or cpu (default: what is there)")
    parser.add_argument("--load-8bit", action="store_true", help="weights in 8 bits (bitsandbytes, GPU)")
    parser.add_argument("--load-4bit", action="store_true", help="weights in 4 bits (bitsandbytes, GPU)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    parser.add_argument("--port", type=int, help="port (default: the first free one from 7860)")
    parser.add_argument(
        "--concurrency-count", type=int, default=4, help="users answered at the same time (default: %(default)s)"
    )
    parser.add_argument("--share", action="store_true", help="a public address through Gradio's servers")
    return parser


def build_models(args: argparse.Namespace) -> list[ChatModel]:
    """The one or two models that the flags name."""
    wanted = [(args.model_path, args.model_base)]
    if args.compare:
        wanted.append((args.compare, args.compare_base))
    if args.openai_base_url:
        urls = args.openai_base_url
        return [ServerModel(urls[min(i, len(urls) - 1)], name) for i, (name, _) in enumerate(wanted)]
    options = {"conv_mode": args.conv_mode, "device": args.device}
    bits = {"load_8bit": args.load_8bit, "load_4bit": args.load_4bit}
    return [LocalModel(path, base, **options, **bits) for path, base in wanted]


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # a plain end would leave the uploads behind
    with private_cache():
        try:
            vocabulary = read_vocabulary(args.vocabulary) if args.vocabulary else None
            models = build_models(args)
            demo = build_demo(models, vocabulary, concurrency_count=args.concurrency_count)
            serve(demo, args.host, args.port, share=args.share)
        except Exception as error:
            report_error(error, "gradio_web_server")
            if isinstance(error, ImportError):
                say("The page needs Gradio: pip install -e '.[serve]'")
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
