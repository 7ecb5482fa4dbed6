"""Talking to a model: pictures of every kind taken or refused by name, streamed answers, the terminal."""

import io
import json
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from llava.eval import model_vqa, model_vqa_loader, run_llava
from llava.generation.local import Answerer
from llava.generation.request import Decoding, Request
from llava.serve import cli, gradio_web_server
from llava.serve.chat import replies_together
from llava.serve.images import download, load_image, read_image
from llava.serve.local_model import LocalModel
from llava.serve.mentions import ObjectVocabulary
from tests.conftest import GOLDEN
from tests.dama.test_untrusted_server import Dripping

RED, BLUE = (255, 0, 0), (0, 0, 255)
GREEDY = Decoding(max_new_tokens=12)


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def pixels(data):
    image = read_image(data, "photo")
    assert image.mode == "RGB"
    return np.asarray(image)


# ----------------------------------------------------------------------------------------------------------- pictures


def test_of_a_gif_the_first_frame():
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, BLUE)]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert (pixels(data) == RED).all()


def test_cmyk_is_converted():
    """Full cyan ink and no other: no red, all green, all blue."""
    assert abs(pixels(encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 0)), "JPEG")).astype(int) - (0, 255, 255)).max() < 8


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_of_16_bits_the_high_byte(kind):
    """0x8012 = 128 * 256 + 18 is 128 of 255. Pillow's conversion would give 255 to all but the first."""
    grey = Image.fromarray(np.array([[0, 0x0100, 0x8012, 0xFFFF]], dtype=np.uint16))
    assert pixels(encoded(grey, kind))[0].tolist() == [[0] * 3, [1] * 3, [128] * 3, [255] * 3]


def test_exif_rotation_is_not_applied():
    """As in LLaVA: the models saw pictures the way they are stored."""
    image = Image.new("RGB", (16, 8), RED)
    image.paste(BLUE, (8, 0, 16, 8))
    exif = Image.Exif()
    exif[0x0112] = 6  # "rotate by 90 degrees to show"
    stored = pixels(encoded(image, "JPEG", exif=exif))
    assert stored.shape == (8, 16, 3)
    assert stored[4, 2, 0] > 200 and stored[4, 13, 2] > 200


def test_transparency_is_dropped():
    assert (pixels(encoded(Image.new("RGBA", (2, 2), (*RED, 0)))) == RED).all()


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1), (1, 200)])
def test_one_pixel_wide(size, in_golden):
    image = read_image(encoded(Image.new("RGB", size, RED)), "line.png")
    assert image.size == size
    model = LocalModel("llava-v1.5-tiny", device="cpu")
    assert list(model.reply([], "What is it?", image, GREEDY, threading.Event()))[-1]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("size", "reason"),
    [
        ((10_001, 9_999), "scan.png: 10001 x 9999 is more than 89,478,485 pixels"),
        ((19_000, 9_500), "scan.png: more than 89,478,485 pixels"),
        ((9_460, 100), "scan.png: 9460 x 100 is a side longer than 9,459 pixels"),
        ((201, 1), "scan.png: 201 x 1 is one side more than 200 times the other"),
    ],
)
def test_too_large(size, reason):
    with pytest.raises(ValueError, match=f"{reason}; make the image smaller"):
        read_image(encoded(Image.new("1", size)), "scan.png")


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"hello", "x: not an image that can be read; expected PNG, JPEG"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "x: not an image"),
        (b"", "x: not an image"),
        (encoded(Image.effect_noise((64, 64), 9))[:900], r"x: the image is damaged \(image file is truncated"),
        (encoded(Image.new("F", (2, 2)), "TIFF"), r"x: 32 bits a pixel and channel \(mode F\), expected 8 or 16"),
        (encoded(Image.new("L", (2, 2)), "PPM"), "x: not an image"),
    ],
)
def test_refused(data, reason):
    with pytest.raises(ValueError, match=reason):
        read_image(data, "x")


class Pages(BaseHTTPRequestHandler):
    """A web server of pictures and of what must not be taken for one."""

    def do_GET(self):
        kind = {"/page": "text/html; charset=utf-8"}.get(self.path, "image/png")
        moved = {
            "/slowly-round": "/slowly-round",
            "/moved": "/ok",
            "/to-file": "file:///etc/passwd",
            "/to-ftp": "ftp://127.0.0.1/a.png",
        }
        time.sleep(0.2 if self.path == "/slowly-round" else 0)
        self.send_response(302 if self.path in moved else 404 if self.path == "/gone" else 200)
        self.send_header("Content-Type", kind)
        if self.path in moved:
            self.send_header("Location", moved[self.path])
        self.end_headers()
        if self.path == "/ok":
            self.wfile.write(encoded(Image.new("RGB", (5, 3), BLUE)))
        for _ in range(60 if self.path == "/drip" else 0):
            time.sleep(0.02)
            self.wfile.write(b"x")
        if self.path == "/large":
            self.wfile.write(b"x" * 3000)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def web():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()


def test_picture_from_a_url(web):
    assert load_image(f"{web}/ok").size == load_image(f"{web}/moved").size == (5, 3)


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("page", "page: expected an image, the server sends text/html"),
        ("gone", r"gone: cannot be downloaded \(Not Found\)"),
        ("large", "large: more than 0 MiB"),
        ("drip", "drip: not downloaded in time"),
        ("to-file", "to-file: cannot be downloaded .*Redirection to url 'file:///etc/passwd' is not allowed"),
        ("to-ftp", r"to-ftp: cannot be downloaded \(unknown url type: ftp\)"),
    ],
)
def test_downloads_have_limits(web, page, reason):
    with pytest.raises(ValueError, match=reason):
        download(f"{web}/{page}", max_bytes=2000, max_seconds=0.2 if page == "drip" else 60)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nX-Padding: ",
        b"HTTP/1.1 100 Continue\r\n\r\n" * 5,
        b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n",
    ],
)
def test_a_server_that_drips_its_headers_ends_too(head):
    """A byte now and then, before the status, in a header or in the content, keeps no limit from firing."""
    with Dripping(head) as url, pytest.raises(ValueError, match="not downloaded in time"):
        download(f"{url}/a.png", max_seconds=0.4)


def test_a_chain_of_slow_redirects_ends_too(web):
    with pytest.raises(ValueError, match="slowly-round: not downloaded in time"):
        download(f"{web}/slowly-round", max_seconds=0.5)


def test_an_address_is_shown_without_its_credentials(web):
    for address in (f"{web.replace('//', '//user:S3CRET@')}/ok", "http://127.0.0.1:9/a?api_key=S3CRET"):
        with pytest.raises(ValueError, match="cannot be downloaded") as caught:
            load_image(address)
        assert "S3CRET" not in str(caught.value)


def test_unreachable_and_missing(tmp_path):
    with pytest.raises(ValueError, match="http://127.0.0.1:9/a.png: cannot be downloaded .*refused"):
        load_image("http://127.0.0.1:9/a.png")
    with pytest.raises(ValueError, match=r"none.png: cannot be read \(No such file"):
        load_image(str(tmp_path / "none.png"))


# ------------------------------------------------------------------------------------------------------------- models


@pytest.fixture()
def model(in_golden):
    return LocalModel("llava-v1.5-tiny", device="cpu")


@pytest.fixture()
def picture():
    return load_image(str(GOLDEN / "images" / "wide.png"))


def test_a_streamed_answer_is_the_drivers(model, picture):
    answerer = Answerer("llava-v1.5-tiny", conv_mode="llava_v1", device="cpu")
    for question, image in (("What is it?", "wide.png"), ("Say something.", None)):
        expected = answerer.answer([Request("q", question, image)], GOLDEN / "images", GREEDY)[0][0]
        texts = list(model.reply([], question, picture if image else None, GREEDY, threading.Event()))
        assert texts[-1] == expected and len(texts) > 1
        assert all(after.startswith(before) for before, after in zip(texts, texts[1:]))


def test_beams_come_at_the_end(model, picture):
    prompt = model.prompt([], "What is it?", True)
    beams = Decoding(max_new_tokens=8, num_beams=3)
    expected = Answerer("llava-v1.5-tiny", conv_mode="llava_v1", device="cpu").answer(
        [Request("q", "What is it?", "wide.png")], GOLDEN / "images", beams
    )
    assert list(model.stream(prompt, [picture], beams, threading.Event()))[-1] == expected[0][0]


def test_the_prompt_of_a_conversation(model):
    """LLaVA's: the picture in the first question only. A question whose answer was stopped at once is left out."""
    system = model.template.system
    prompt = model.prompt([("What?", ""), ("Where?", "There.")], "Why?", True)
    assert prompt == f"{system} USER: <image>\nWhere? ASSISTANT: There.</s>USER: Why? ASSISTANT:"


def forward_count(model):
    calls = []
    model.model.model.register_forward_hook(lambda *_: calls.append(time.sleep(0.005)))
    return calls


def test_stop_stops_the_model(model, picture):
    calls, stop = forward_count(model), threading.Event()
    for text in model.reply([], "What is it?", picture, Decoding(max_new_tokens=400), stop):
        if len(text) > 20:
            stop.set()
    assert 3 < len(calls) < 60


def test_an_abandoned_answer_stops_too(model, picture):
    calls = forward_count(model)
    texts = model.reply([], "What is it?", picture, Decoding(max_new_tokens=400), threading.Event())
    next(texts)
    texts.close()
    made = len(calls)
    time.sleep(0.1)
    assert len(calls) == made < 60


def test_a_template_with_its_own_end_mark(in_golden, picture):
    """v0 ends answers with ###, which no token of the model means: generation stops when the text shows it."""
    model = LocalModel("llava-v1.5-tiny", conv_mode="llava_v0", device="cpu")
    whole = list(model.reply([], "What is it?", picture, Decoding(max_new_tokens=20), threading.Event()))[-1]
    mark = whole.split()[2]
    model._end = lambda: mark
    cut = list(model.reply([], "What is it?", picture, Decoding(max_new_tokens=20), threading.Event()))[-1]
    assert LocalModel._end(model) == "###" and cut == whole.split(mark)[0].strip() != whole


def test_what_cannot_be_asked(model, picture):
    with pytest.raises(ValueError, match="the text holds <image>, which stands for an image"):
        model.prompt([], "What is <image>?", True)
    with pytest.raises(ValueError, match=r"the conversation has \d+ tokens, llava-v1.5-tiny holds 512: begin"):
        next(model.reply([], "why " * 400, picture, GREEDY, threading.Event()))
    with pytest.raises(ValueError, match="expected one <image> for each image, got 0 for 1"):
        next(model.stream("Why?", [picture], GREEDY, threading.Event()))


def test_the_answer_ends_where_the_context_does(model, picture):
    """Of 512, a prompt of T ids, one of which is a picture of 16 positions, leaves 512 - (T - 1 + 16)."""
    prompt = model.prompt([], "why " * 50, True)
    asked = Decoding(max_new_tokens=500)
    ids = model._inputs(prompt, [picture], asked)["inputs"]
    assert model._inputs(prompt, [picture], asked)["max_new_tokens"] == 512 - (ids.shape[1] - 1 + 16) < 500
    assert model._inputs(prompt, [picture], GREEDY)["max_new_tokens"] == GREEDY.max_new_tokens


def test_a_failing_model_is_heard(model, picture):
    def fails(**options):
        raise RuntimeError("out of memory")

    model.model.generate = fails
    with pytest.raises(RuntimeError, match="out of memory"):
        list(model.reply([], "What?", picture, GREEDY, threading.Event()))
    with pytest.raises(RuntimeError, match="out of memory"):
        list(replies_together([iter(["a"]), model.reply([], "What?", picture, GREEDY, threading.Event())]))


def test_answers_that_are_made_together():
    first, second = ["a", "ab"], ["x", "xy", "xyz"]
    seen = list(replies_together([iter(first), iter(second)]))
    assert seen[-1] == ["ab", "xyz"]
    assert all(a in ("", *first) and b in ("", *second) for a, b in seen)


def test_objects_in_a_text():
    vocabulary = ObjectVocabulary(["person, man, woman\n", "dining table\n", "table\n", "berry\n", "\n", "bus\n"])
    text = "A Man at the dining table, two berries, buses; a businessman and a table."
    assert [(text[m.start : m.end], m.name) for m in vocabulary.mentions(text)] == [
        ("Man", "person"), ("dining table", "dining table"), ("berries", "berry"), ("buses", "bus"), ("table", "table"),
    ]  # fmt: skip
    assert vocabulary.names(" Woman, sofa,,  dining  table") == {"person", "sofa", "dining table"}
    with pytest.raises(ValueError, match="vocabulary: expected lines of object names, got none"):
        ObjectVocabulary(["\n"])


# ----------------------------------------------------------------------------------------------------------- terminal


def run_cli(monkeypatch, capsys, typed, *flags):
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    base = ["--model-path", "llava-v1.5-tiny", "--image-file", "images/wide.png", "--device", "cpu"]
    code = cli.main(cli.build_parser().parse_args([*base, "--temperature", "0", "--max-new-tokens", "8", *flags]))
    return code, capsys.readouterr().out


def test_a_conversation(in_golden, monkeypatch, capsys, model, picture):
    code, out = run_cli(monkeypatch, capsys, "What is it?\nWhy?\n")
    eight = Decoding(max_new_tokens=8)
    first = list(model.reply([], "What is it?", picture, eight, threading.Event()))[-1]
    second = list(model.reply([("What is it?", first)], "Why?", picture, eight, threading.Event()))[-1]
    assert code == 0
    assert out == f"USER: ASSISTANT: {first}\nUSER: ASSISTANT: {second}\nUSER: \nexit...\n"


def test_an_empty_line_ends_it(in_golden, monkeypatch, capsys):
    assert run_cli(monkeypatch, capsys, "\nWhat is it?\n") == (0, "USER: exit...\n")


def test_a_question_that_cannot_be_asked_ends_nothing(in_golden, monkeypatch, capsys):
    code, out = run_cli(monkeypatch, capsys, "What is <image>?\nWhat is it?\n", "--debug")
    assert code == 0 and "error: the text holds <image>" in out
    assert out.count("'prompt':") == 1 and "USER: <image>\\nWhat is it? ASSISTANT:" in out


def test_control_c_stops_the_answer_only(capsys):
    def interrupted():
        yield "The"
        yield "The cat"
        raise KeyboardInterrupt

    assert cli.show(interrupted()) == "The cat"
    assert capsys.readouterr().out == "The cat [stopped]\n"


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--image-file", "images/none.png"], "images/none.png: cannot be read"),
        (["--image-file", "README.md"], "README.md: not an image"),
        (["--conv-mode", "vicuna1"], "unknown conversation template 'vicuna1': did you mean vicuna_v1"),
        (["--model-path", "images"], "checkpoint 'images': expected config.json"),
    ],
)
def test_bad_input(in_golden, capsys, flags, reason):
    base = ["--model-path", "llava-v1.5-tiny", "--image-file", "images/wide.png", "--device", "cpu"]
    assert cli.main(cli.build_parser().parse_args([*base, *flags])) == 2
    said = capsys.readouterr()
    assert said.out == "" and f"cli: error: {reason}" in said.err


# Defaults that cannot be LLaVA's: a checkpoint of another kind, files that do not exist, a device that may be missing.
OTHER_DEFAULTS = {"--model-path", "--question-file", "--device"}


@pytest.mark.parametrize(
    ("file", "parser"),
    [
        ("llava/serve/cli.py", cli.build_parser()),
        ("llava/eval/run_llava.py", run_llava.build_parser()),
        ("llava/eval/model_vqa.py", model_vqa.build_parser("model_vqa", 1024, None)),
        ("llava/eval/model_vqa_loader.py", model_vqa.build_parser("model_vqa_loader", 128, None)),
    ],
)
def test_llavas_flags(file, parser):
    inventory = json.loads((GOLDEN / "api_inventory.json").read_text())["upstream_llava"]["argparse_flags"][file]
    ours = {option: action for action in parser._actions for option in action.option_strings}
    for flag in inventory:
        name = flag["flags"][0]
        assert name in ours
        if "default" in flag and name not in OTHER_DEFAULTS:
            assert repr(ours[name].default) == flag["default"], name
        assert ours[name].required == (flag.get("required") == "True" or name in OTHER_DEFAULTS - {"--device"}), name


@pytest.mark.parametrize("module", [cli, run_llava, gradio_web_server, model_vqa, model_vqa_loader])
def test_help_is_readable(module, capsys):
    with pytest.raises(SystemExit, match="0"):
        if module is cli:
            cli.build_parser().parse_args(["--help"])
        module.main(["--help"])
    text = capsys.readouterr().out
    assert f"usage: python -m {module.__name__} " in text and module.__doc__.split("\n")[0] in " ".join(text.split())


# What a terminal or a pipe can hold that is no text, each followed by questions that are answered.
NO_TEXT = {
    "Latin-1": "Où est-il ?".encode("latin-1"),
    "UTF-16": "What?".encode("utf-16"),
    "half a character": "😀".encode()[:2],
    "a lone surrogate": "\ud83d".encode("utf-8", "surrogatepass"),
    "a byte alone": b"\xff",
    "an image": b"\x89PNG\x1a",
}


@pytest.mark.parametrize("name", NO_TEXT)
@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # as Python sets it in UTF-8 and in C locales
def test_bytes_that_are_no_text_are_asked_for_again(in_golden, monkeypatch, capsys, name, errors):
    typed = NO_TEXT[name] + b"\nWhat is it?\n" + NO_TEXT[name] + b"\nIs it red?\n\n"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(typed), "utf-8", errors))
    flags = ["--model-path", "llava-v1.5-tiny", "--image-file", "images/wide.png", "--device", "cpu"]
    assert cli.main(cli.build_parser().parse_args([*flags, "--temperature", "0", "--max-new-tokens", "4"])) == 0
    said = capsys.readouterr().out
    assert said.count("error: the line holds bytes that are not utf-8; type it again") == 2
    assert said.count("ASSISTANT: ") == 2 and "exit..." in said


def test_nothing_but_such_bytes_ends_at_the_end_of_the_input(monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), "utf-8", "strict"))
    cli.keep_undecodable_bytes(sys.stdin)
    assert cli.read_line("") == ""
    assert "type it again" in capsys.readouterr().out
