"""The chat page: its conversations and marks, a model behind a server, and the page itself in a headless Chromium."""

import copy
import html
import http.client
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from PIL import Image

from llava.generation.request import Decoding
from llava.serve import gradio_web_server as page
from llava.serve.examples import FOLDER, INDEX, read_examples
from llava.serve.gradio_web_server import Session, Turn
from llava.serve.images import load_image
from llava.serve.local_model import LocalModel
from llava.serve.mentions import ObjectVocabulary
from llava.serve.server_model import ServerModel
from llava.serve.transcript import as_json
from playground.tinycoco.examples import write_examples
from tests.conftest import GOLDEN

ROOT = Path(__file__).resolve().parents[2]
VOCABULARY = ObjectVocabulary(["dog, puppy", "cat", "bench"])


class Echo:
    """A model that repeats the question word by word."""

    def __init__(self, name):
        self.name = name

    def reply(self, history, question, image, decoding, stop):
        words = [self.name, str(len(history)), *question.split()]
        for end in range(1, len(words) + 1):
            if stop.is_set():
                return
            yield " ".join(words[:end])


# -------------------------------------------------------------------------------------------------------------- marks


def test_marks():
    """The list has dog, by its synonym; the text is no markup."""
    text = "Two dogs & a <b>cat</b> (concat)."
    marked = page.as_html(text, VOCABULARY, "Puppy, bench")
    assert re.findall(r"<[^>]*>", marked) == ['<mark class="present">', "</mark>", '<mark class="absent">', "</mark>"]
    assert html.unescape(re.sub(r"<[^>]*>", "", marked)) == text
    for vocabulary, listed in ((None, "dog"), (VOCABULARY, "  ")):
        unmarked = page.as_html(text, vocabulary, listed)
        assert html.unescape(unmarked) == text and "<" not in unmarked


@pytest.mark.parametrize("text", ["&nbsp;x", "&amp;lt;", "a  b", "x\n", ""])
def test_text_of_a_model_is_no_markup(text):
    assert html.unescape(page.as_text(text)) == text


# ------------------------------------------------------------------------------------------------------ conversations


def ask(session, question):
    for _ in session.ask([Echo("A"), Echo("B")], question, Decoding()):
        yield copy.copy(session.turns[-1].answers), session.busy


def test_two_models_answer_each_with_its_own_history():
    session = Session()
    seen = list(ask(session, "why not?"))
    assert seen[0] == (["", ""], True) and seen[-1] == (["A 0 why not?", "B 0 why not?"], True)
    list(ask(session, "so?"))
    assert session.history(1) == [("why not?", "B 0 why not?"), ("so?", "B 1 so?")] and not session.busy
    assert page.messages(session, 0, None)[2:] == [
        {"role": "user", "content": "so&#63;"}, {"role": "assistant", "content": "A 1 so&#63;"},
    ]  # fmt: skip


def test_users_do_not_share_a_conversation():
    session = Session()
    list(ask(session, "why?"))
    other = copy.deepcopy(session)
    assert other.turns == [] and other.stop is not session.stop


def test_another_picture_begins_anew_and_stops_the_answer():
    session = Session()
    running = session.ask([Echo("A")], "one two three", Decoding())
    next(running)
    stop, picture = session.stop, Image.new("RGB", (2, 2))
    session.begin(picture)
    assert stop.is_set() and session.turns == [] and session.image is picture
    list(running)
    assert session.turns == []  # the old answer does not come back


def test_a_question_that_fails_leaves_no_turn():
    class Full(Echo):
        def reply(self, *args):
            raise ValueError("begin a new one")
            yield

    session = Session()
    with pytest.raises(ValueError, match="begin a new one"):
        list(session.ask([Full("A")], "why?", Decoding()))
    assert session.turns == [] and not session.busy


def test_what_is_shown_of_an_answer_that_has_not_begun():
    session = Session()
    session.turns = [Turn("a < b?", ["", "Yes"])]
    assert page.messages(session, 0, None) == [{"role": "user", "content": page.as_text("a < b?")}]


def test_upload(tmp_path):
    Image.new("RGB", (3, 2)).save(tmp_path / "a.gif")
    image, notice = page.open_upload(str(tmp_path / "a.gif"))
    assert image.size == (3, 2) and notice == "a.gif, 3 x 2, shown as the model sees it"
    Image.new("RGB", (4000, 3000)).save(tmp_path / "large.png")
    image, notice = page.open_upload(str(tmp_path / "large.png"))
    assert image.size == (896, 672) and notice.startswith("large.png, 896 x 672, shrunk from 4000 x 3000, ")
    with open(tmp_path / "b.png", "wb") as file:
        file.truncate(page.MAX_BYTES + 1)
    with pytest.raises(ValueError, match="b.png: more than 20 MiB"):
        page.open_upload(str(tmp_path / "b.png"))


def test_the_examples_are_scenes_of_tinycoco(tmp_path):
    """As `python -m playground.tinycoco examples` writes them; small, since every visitor loads them."""
    write_examples(tmp_path)
    assert (FOLDER / INDEX).read_bytes() == (tmp_path / INDEX).read_bytes()
    assert {path.name for path in FOLDER.iterdir()} == {INDEX, *(example.file for example in read_examples())}
    for example in read_examples():
        with Image.open(FOLDER / example.file) as shipped, Image.open(tmp_path / example.file) as drawn:
            assert shipped.tobytes() == drawn.tobytes()
        assert len(example.content()) < 8000


def test_a_conversation_to_keep():
    whole = json.loads(as_json("a.png", "dog", ["base", "aligned"], [("why?", ["A 1", "B\n2"]), ("so?", ["A 3", ""])]))
    assert whole["record"]["turns"][0] == {
        "question": "why?", "answers": [{"model": "base", "answer": "A 1"}, {"model": "aligned", "answer": "B\n2"}],
    }  # fmt: skip
    paragraphs = ["Image: a.png", "Objects: dog", "User: why?", "base: A 1", "aligned: B\n2", "User: so?", "base: A 3"]
    assert whole["text"] == "\n\n".join([*paragraphs, "aligned: \n"])
    assert json.loads(as_json("", "", ["m"], []))["record"] == {"image": "", "objects": "", "turns": []}


def test_the_flags_name_the_models(in_golden):
    def models(*flags):
        return page.build_models(page.build_parser().parse_args(["--model-path", "llava-v1.5-tiny", *flags]))

    assert [type(m).__name__ for m in models("--device", "cpu", "--compare", "llava-v1.5-tiny")] == ["LocalModel"] * 2
    urls = ("http://a:1/v1", "http://b:2/v1")
    served = models("--compare", "base", "--openai-base-url", *urls)
    assert [(m.base_url, m.name) for m in served] == [(urls[1], "base"), (urls[0], "llava-v1.5-tiny")]
    with pytest.raises(ValueError, match="server 'a:1': expected a URL such as http://127.0.0.1:8000/v1"):
        models("--openai-base-url", "a:1")
    assert page.build_parser().get_default("host") == "127.0.0.1" and not page.build_parser().get_default("share")


# ------------------------------------------------------------------------------------------------------------- server


class Completions(BaseHTTPRequestHandler):
    """An OpenAI-compatible server: streams "word 0 word 1 ..." slowly, or fails as the model's name says."""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, self.headers.get("Authorization"), body))
        if body["model"] == "absent":
            self.send_error(404, "no such model")
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            self.wfile.write(b': a comment\n\ndata: {"choices": [{"delta": {"role": "assistant"}}]}\n\n')
            for word in range(3 if body["model"] in ("short", "breaks") else 400):
                event = {"choices": [{"delta": {"content": f"word {word} "}}]}
                self.wfile.write(b"data: " + json.dumps(event).encode() + b"\n\n")
                if body["model"] == "hangs":
                    self.server.gone.wait(20)
                time.sleep(0.01)
            if body["model"] == "breaks":
                self.wfile.write(b'data: {"error": {"message": "engine died"}}\n\n')
            self.wfile.write(b"data: [DONE]\n\n")
        except OSError:
            self.server.gone.set()

    def log_message(self, *args):
        pass


@pytest.fixture()
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Completions)
    server.asked, server.gone, server.daemon_threads = [], threading.Event(), True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    yield server
    server.gone.set()
    server.shutdown()


def served(server, name, stop=None, image=None):
    decoding = Decoding(max_new_tokens=7, temperature=0.5, top_p=0.9)
    history = [("a?", ""), ("b?", "B.")]
    return ServerModel(server.url + "/", name).reply(history, "c?", image, decoding, stop or threading.Event())


def test_a_model_behind_a_server(server, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    texts = list(served(server, "short", image=Image.new("RGB", (2, 2))))
    assert texts == ["word 0", "word 0 word 1", "word 0 word 1 word 2"]
    path, key, body = server.asked[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer secret")
    first = body["messages"][0].pop("content")
    assert first[0]["image_url"]["url"].startswith("data:image/png;base64,") and first[1]["text"] == "b?"
    assert body == {
        "model": "short", "stream": True, "max_tokens": 7, "temperature": 0.5, "top_p": 0.9,
        "messages": [{"role": "user"}, {"role": "assistant", "content": "B."}, {"role": "user", "content": "c?"}],
    }  # fmt: skip


def test_stop_closes_the_connection(server):
    stop, texts = threading.Event(), []
    for text in served(server, "long", stop):
        texts.append(text)
        if len(texts) == 3:
            stop.set()
    assert len(texts) < 10 and server.gone.wait(2)


def test_stop_reaches_a_server_that_says_nothing(server):
    stop = threading.Event()
    threading.Timer(0.2, stop.set).start()
    assert list(served(server, "hangs", stop)) == ["word 0"]


def test_servers_that_fail(server):
    with pytest.raises(ValueError, match="status 404 for 'absent': .*no such model"):
        list(served(server, "absent"))
    with pytest.raises(ValueError, match="server http://127.0.0.1:9/v1: .*refused"):
        list(ServerModel("http://127.0.0.1:9/v1", "m").reply([], "a?", None, Decoding(), threading.Event()))
    with pytest.raises(ValueError, match="the server broke off: .*engine died"):
        list(served(server, "breaks"))


# ------------------------------------------------------------------------------------------------------------ browser


@pytest.fixture(scope="module")
def models():
    """Two tiny checkpoints with different answers; `pace` seconds a token, and every token counted."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(GOLDEN)
        for name in ("base", "aligned"):
            model = LocalModel("llava-v1.5-tiny", conv_mode="vicuna_v1", device="cpu")
            model.name, model.pace, model.made = name, 0.0, 0
            model.model.model.register_forward_hook(lambda *_, model=model: count(model))
            found.append(model)
    with torch.no_grad():
        head = found[1].model.lm_head.weight
        head[3:] = head[3:].flip(0)
    return found


def count(model):
    model.made += 1
    time.sleep(model.pace)


def greedy(model, question, picture, tokens=32):
    texts = model.reply([], question, picture, Decoding(max_new_tokens=tokens), threading.Event())
    return list(texts)[-1]


QUESTION = "What is in the picture?"
FIELDS = ("#question textarea", "#listed input, #listed textarea")


@pytest.fixture(scope="module")
def picture():
    return load_image(str(GOLDEN / "images" / "wide.png"))


@pytest.fixture(scope="module")
def words(models, picture):
    """A word of each model's answer."""
    return [max(letters(greedy(model, QUESTION, picture)), key=len) for model in models]


def letters(text):
    """The words of a text, whatever Markdown makes of its other characters."""
    return ["".join(c for c in word if c.isascii() and c.isalnum()) for word in text.split()]


@pytest.fixture(scope="module")
def address(models, words):
    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRADIO_TEMP_DIR", "GRADIO_EXAMPLES_CACHE", "GRADIO_ANALYTICS_ENABLED"):
            patch.setenv(name, "")  # set back in the end
        with page.private_cache():
            demo = page.build_demo(models, ObjectVocabulary(words))
            yield page.serve(demo, "127.0.0.1", None, wait=False)
            demo.close(verbose=False)


@pytest.fixture(scope="module")
def browser(address, tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and driver, "needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    profile = tmp_path_factory.mktemp("profile")
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-background-networking",
                 "window-size=1440,900", f"user-data-dir={profile}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


class Screen:
    """The page as a user handles it."""

    def __init__(self, chrome, address):
        self.chrome = chrome
        chrome.get(address)
        self.until(lambda: all(map(self.find, ("#question textarea", "#upload input[type=file]", "#clear"))))

    def find(self, selector):
        return self.chrome.find_elements("css selector", selector)

    def until(self, condition, seconds=20):
        from selenium.common.exceptions import StaleElementReferenceException

        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                if found := condition():
                    return found
            except StaleElementReferenceException:
                pass
            time.sleep(0.05)
        raise AssertionError(f"waited {seconds} s in vain; the page shows:\n{self.find('body')[0].text}")

    def upload(self, path):
        # The page replaces the input after an upload.
        self.until(lambda: self.find("#upload input[type=file]"))[0].send_keys(str(path))

    def fill(self, selector, text):
        field = self.find(selector)[0]
        field.send_keys("\ue009a\ue000" + text)  # control + a
        field.send_keys("\ue007")  # enter

    def click(self, name):
        self.until(lambda: self.enabled(name))
        self.find(f"#{name}")[0].click()

    def enabled(self, name):
        return self.find(f"#{name}")[0].is_enabled()

    def answers(self):
        """What each model's last answer shows."""
        last = [self.find(f"#chat-{i} [data-testid=bot]")[-1:] for i in range(2)]
        return [element.text for found in last for element in found]

    def ask(self, question):
        self.fill("#question textarea", question)

    def text(self, selector):
        return "\n".join(element.text for element in self.find(selector))


@pytest.fixture()
def screen(browser, address, models):
    for model in models:
        model.pace = 0.0
    return Screen(browser, address)


def set_decoding(screen, temperature, tokens):
    screen.find("button.label-wrap")[0].click()
    screen.until(lambda: any(field.is_displayed() for field in screen.find("#max-tokens input[type=number]")))
    screen.fill("#temperature input[type=number]", temperature)
    screen.fill("#max-tokens input[type=number]", tokens)


def test_two_models_side_by_side(screen, models, picture, words):
    """Upload, ask, read both answers, see what is marked, ask again, clear."""
    set_decoding(screen, "0", "32")
    screen.upload(GOLDEN / "images" / "wide.png")
    screen.until(lambda: screen.find("#preview img"))
    assert f"wide.png, {picture.width} x {picture.height}, shown as the model sees it" in screen.text("#notice")
    screen.fill("#listed input, #listed textarea", words[0])
    screen.ask(QUESTION)
    expected = [letters(greedy(model, QUESTION, picture)) for model in models]
    assert expected[0] != expected[1]
    screen.until(lambda: [letters(text) for text in screen.answers()] == expected)
    assert words[0] in screen.text("#chat-0 mark.present") and words[1] in screen.text("#chat-1 mark.absent")
    assert [screen.text(f"#chat-{i} label") for i in range(2)] == ["base", "aligned"]

    screen.click("regenerate")
    screen.until(lambda: screen.enabled("regenerate"))
    screen.until(lambda: [letters(text) for text in screen.answers()] == expected)
    screen.ask("<i>Why</i>?")
    screen.until(lambda: len(screen.find("#chat-0 [data-testid=bot]")) == 2 and screen.enabled("send"))
    assert "<i>Why</i>?" in screen.text("#chat-1 [data-testid=user]")
    screen.click("clear")
    screen.until(lambda: not screen.find("[data-testid=user]") and not screen.enabled("clear"))


def box(screen, selector):
    """Left, top, right and bottom of an element in the window, and the window's own width and height."""
    script = (
        "const r = document.querySelector(arguments[0]).getBoundingClientRect();"
        "return [r.left, r.top, r.right, r.bottom, innerWidth, innerHeight]"
    )
    return screen.chrome.execute_script(script, selector)


@pytest.fixture()
def window(browser):
    def resize(width, height):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    yield resize
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("size", [(390, 844), (390, 600), (1440, 900), (1024, 600)])
def test_the_question_is_in_sight(window, browser, address, models, picture, size):
    """On a phone and on a desktop, at first, beside a picture and long answers, and at every place of the page."""
    window(*size)
    screen = Screen(browser, address)

    def check():
        assert browser.execute_script("return document.documentElement.scrollWidth - innerWidth") <= 0
        for selector in ("#question textarea", "#question label", "#send", "#stop", "#regenerate", "#clear"):
            left, top, right, bottom, width, height = box(screen, selector)
            assert 0 <= left < right <= width and 0 <= top < bottom <= height, selector

    check()
    last = len(read_examples()) - 1
    assert 0 <= box(screen, "#example-0")[0] < box(screen, f"#example-{last}")[2] <= size[0]
    assert browser.execute_script("return scrollY") == 0
    assert "Your question to both models" in screen.text("#question label")
    screen.upload(GOLDEN / "images" / "wide.png")
    screen.until(lambda: screen.find("#preview img"))
    check()
    screen.ask(QUESTION)
    screen.until(lambda: len(screen.answers()) == 2 and all(screen.answers()))
    check()
    screen.until(lambda: -1 <= box(screen, "#chat-0")[1] < box(screen, "#asking")[1] - 100)  # read without scrolling
    for place in ("document.body.scrollHeight", "0"):
        browser.execute_script(f"window.scrollTo(0, {place})")
        check()
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    assert box(screen, "#chat-1")[3] <= box(screen, "#asking")[1]  # nothing stays hidden behind it


def test_greedy_is_the_default_for_both(screen, models, picture):
    screen.upload(GOLDEN / "images" / "wide.png")
    screen.until(lambda: screen.find("#preview img"))
    assert "Decoding, the same for both models" in screen.text("button.label-wrap")
    screen.ask(QUESTION)
    expected = [letters(greedy(model, QUESTION, picture, tokens=512)) for model in models]
    screen.until(lambda: [letters(text) for text in screen.answers()] == expected)


def test_an_example_to_ask_about_and_the_conversation_to_keep(screen, models, words, tmp_path):
    """A click chooses image, question and objects; what was said is copied as text and downloaded as JSON."""
    allowed = {"origin": screen.chrome.current_url.rstrip("/"), "permissions": ["clipboardReadWrite"]}
    screen.chrome.execute_cdp_cmd("Browser.grantPermissions", allowed)
    where = {"behavior": "allow", "downloadPath": str(tmp_path)}
    screen.chrome.execute_cdp_cmd("Browser.setDownloadBehavior", where)
    set_decoding(screen, "0", "32")
    assert not screen.enabled("copy") and not screen.enabled("download")
    example = read_examples()[1]
    assert "data:image/png" in screen.find("#example-1")[0].value_of_css_property("background-image")
    screen.click("example-1")
    screen.until(lambda: screen.find("#preview img"))
    assert example.file in screen.text("#notice")
    shown = {selector: screen.find(selector)[0].get_attribute("value") for selector in FIELDS}
    assert list(shown.values()) == [example.question, example.objects]
    screen.click("send")
    image = load_image(str(FOLDER / example.file))
    answers = [greedy(model, example.question, image) for model in models]
    screen.until(lambda: [letters(text) for text in screen.answers()] == [letters(answer) for answer in answers])

    screen.click("copy")
    screen.until(lambda: "done" in screen.find("#copy")[0].get_attribute("class"))
    copied = screen.chrome.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert f"User: {example.question}\n\nbase: {answers[0]}\n\naligned: {answers[1]}\n" in copied
    screen.click("download")
    file = tmp_path / "conversation.json"
    screen.until(file.is_file)
    (turn,) = json.loads(file.read_text())["turns"]
    assert turn == {
        "question": example.question,
        "answers": [{"model": model.name, "answer": answer} for model, answer in zip(models, answers)],
    }

    screen.find("#question textarea")[0].send_keys("And now?")
    screen.click("example-0")
    screen.until(lambda: read_examples()[0].file in screen.text("#notice"))
    assert screen.find("#question textarea")[0].get_attribute("value") == "And now?"  # typed, so it stays
    screen.until(lambda: not screen.answers() and not screen.enabled("copy"))


class Visits(BaseHTTPRequestHandler):
    """A foreign host that counts who comes."""

    def do_GET(self):
        self.server.visits.append(self.path)
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args):
        pass


class Says:
    """A model that answers the same to everything."""

    name = "m"

    def __init__(self, text):
        self.text = text

    def reply(self, history, question, image, decoding, stop):
        yield self.text


MARKUP = """![x](URL/md) ![y][r] [link](URL/link) <URL/auto> URL/bare www.URL [a](javascript:alert(1))
[r]: URL/ref
<img src="URL/img"><video poster="URL/poster"></video><iframe src="URL/frame"></iframe>
<style>@import "URL/css";</style><link rel="prefetch" href="URL/pre"><svg><image href="URL/svg"/></svg>
<mark style="background:url(URL/style)">m</mark><script>fetch("URL/js")</script><base href="URL/base">
&lt;img src=URL/entity&gt; &#60;img src=URL/number&#62; $$\\includegraphics{URL/tex}$$ `code` **bold** __b__ ~~s~~

    indented ![x](URL/code)
```mermaid
graph LR; A-->B; click A "URL/mermaid"
```
# heading
> quote
- item
1. one
| a | b |
|---|---|
| ![t](URL/table) | \\* |
"""


@pytest.fixture()
def foreign():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Visits)
    server.visits = []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    yield server
    server.shutdown()


def test_an_answer_shows_as_text_and_loads_nothing(browser, address, foreign):
    answer = MARKUP.replace("URL", foreign.url)
    demo = page.build_demo([Says(answer)], VOCABULARY)
    try:
        screen = Screen(browser, page.serve(demo, "127.0.0.1", None, wait=False))
        browser.get_log("browser")
        screen.ask(answer.replace("\n", " "))
        shown = screen.until(lambda: screen.text("#chat-0 [data-testid=bot]"))
        assert [line.split() for line in shown.splitlines() if line.strip()] == [
            line.split() for line in answer.splitlines() if line.strip()
        ]
        assert "![x]" in screen.text("#chat-0 [data-testid=user]")
        inside = "#chat-0 .message :is(a, img, video, iframe, style, link, svg, script, base, table, h1, code, li)"
        assert screen.find(inside) == []
        assert foreign.visits == []
        # Even markup that got through would load nothing.
        browser.execute_script("new Image().src = arguments[0]; fetch(arguments[0]).catch(() => 0)", foreign.url)
        time.sleep(0.5)
        assert foreign.visits == [] and "Content Security Policy" in str(browser.get_log("browser"))
    finally:
        demo.close(verbose=False)


def test_a_page_has_all_that_its_policy_lets_it_load(browser, address):
    browser.get_log("browser")
    Screen(browser, address)
    assert [entry for entry in browser.get_log("browser") if "Content Security Policy" in entry["message"]] == []


def test_what_goes_wrong_is_shown_without_credentials(browser, address, server):
    """Every model that fails leaves a note on the page; a question whose answer failed stays in its field."""
    base = server.url.replace("http://", "http://user:S3CRET@")
    demo = page.build_demo([ServerModel(base, "short"), Fails()])
    try:
        screen = Screen(browser, page.serve(demo, "127.0.0.1", None, wait=False))
        screen.ask("why?")
        screen.until(lambda: "The model failed; the server's log says why." in screen.text(".toast-wrap"))
        assert "out of memory" not in screen.text("body")
        assert screen.find("#question textarea")[0].get_attribute("value") == "why?"
    finally:
        demo.close(verbose=False)
    demo = page.build_demo([ServerModel(base, "breaks")])
    try:
        screen = Screen(browser, page.serve(demo, "127.0.0.1", None, wait=False))
        screen.ask("why?")
        screen.until(lambda: "engine died" in screen.text(".toast-wrap"))
        assert "S3CRET" not in browser.page_source and "[redacted]@127.0.0.1" in screen.text(".toast-wrap")
    finally:
        demo.close(verbose=False)


class Fails:
    name = "fails"

    def reply(self, history, question, image, decoding, stop):
        raise RuntimeError("out of memory at /home/someone")
        yield


def wait_until_silent(models, seconds=0.4):
    """The tokens made so far, once neither model makes more."""
    made = None
    end = time.monotonic() + 5
    while made != (made := [model.made for model in models]):
        assert time.monotonic() < end, "the models go on"
        time.sleep(seconds)
    return sum(made)


def test_the_tiny_models_have_much_to_say(models):
    """What the tests of stopping rest on: neither model ends an answer of 400 tokens by itself."""
    for model in models:
        model.pace, model.made = 0.0, 0
        greedy(model, QUESTION, None, tokens=400)
        assert model.made == 400


def test_stop(screen, models):
    """400 tokens at 50 ms would take 20 s; stopped, both models fall silent and the next question is answered."""
    for model in models:
        model.pace, model.made = 0.05, 0
    set_decoding(screen, "0", "400")
    screen.ask(QUESTION)
    screen.until(lambda: len(screen.answers()) == 2)
    assert not screen.enabled("send") and not screen.enabled("clear")
    screen.click("stop")
    assert wait_until_silent(models) < 200
    screen.until(lambda: screen.enabled("send") and not screen.enabled("stop"))
    assert all(letters(text) for text in screen.answers())  # what there was is kept
    for model in models:
        model.pace = 0.0
    screen.ask("And now?")
    screen.until(lambda: len(screen.find("#chat-1 [data-testid=bot]")) == 2)


def test_a_closed_page_stops_its_answers(screen, models):
    for model in models:
        model.pace, model.made = 0.05, 0
    set_decoding(screen, "0", "400")
    screen.ask(QUESTION)
    screen.until(lambda: len(screen.answers()) == 2)
    screen.chrome.get("about:blank")
    assert wait_until_silent(models) < 300


def test_bad_files_are_refused(screen, tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    screen.upload(tmp_path / "notes.txt")
    screen.until(lambda: "Invalid file type: notes.txt. Only .png, .jpg" in screen.text(".toast-wrap"))
    (tmp_path / "notes.png").write_text("hello")
    screen.upload(tmp_path / "notes.png")
    refusal = "Refused: notes.png: not an image that can be read; expected PNG, JPEG"
    screen.until(lambda: refusal in screen.text("#notice") and refusal in screen.text(".toast-wrap"))
    with open(tmp_path / "huge.png", "wb") as file:
        file.truncate(page.MAX_BYTES + 1)
    screen.upload(tmp_path / "huge.png")
    screen.until(lambda: "maximum allowed size of 20" in screen.text(".toast-wrap"))
    assert not screen.find("#preview img")
    screen.upload(GOLDEN / "images" / "tall.png")  # none of it does harm
    screen.until(lambda: screen.find("#preview img"))


def test_the_page_talks_to_this_machine_only(screen, address):
    screen.chrome.get_log("performance")
    screen.chrome.get("about:blank")
    Screen(screen.chrome, address)
    events = [json.loads(entry["message"])["message"] for entry in screen.chrome.get_log("performance")]
    urls = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert len(urls) > 5
    assert [url for url in urls if not url.startswith((address, "data:", "blob:"))] == []


# --------------------------------------------------------------------------------------------------- the server's files


def status(url, data=None, **headers):
    request = urllib.request.Request(url, data, {"Content-Type": "application/json", **headers})
    try:
        with urllib.request.urlopen(request, timeout=10) as reply:
            return reply.status, reply.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


@pytest.mark.parametrize(
    "path",
    ["/etc/passwd", "//etc/passwd", "/etc/../etc/passwd", "%2Fetc%2Fpasswd", "../../../../etc/passwd", __file__,
     "setup.py", "file:///etc/passwd", "/proc/self/environ", "http://127.0.0.1:1/"],
)  # fmt: skip
@pytest.mark.parametrize("route", ["gradio_api/file=", "file=", "gradio_api/file/", "static/", "assets/"])
def test_no_file_of_the_server_is_readable(address, route, path):
    host = http.client.HTTPConnection(address.split("//")[1].strip("/"), timeout=10)
    host.request("GET", f"/{route}{path}")  # as it is, dots and all
    reply = host.getresponse()
    said = reply.read().decode("utf-8", "replace")
    assert reply.status in (403, 404) and "root:" not in said and "import pytest" not in said
    host.close()


def test_a_path_is_no_upload(address, models):
    """A request that names a file of the server in place of an uploaded one is refused."""
    config = json.loads(status(f"{address}config")[1])
    upload = next(d["id"] for d in config["dependencies"] if any(t[1] == "upload" for t in d["targets"]))
    assert all(d["api_visibility"] == "private" for d in config["dependencies"])
    for path in ("/etc/passwd", str(GOLDEN / "images" / "wide.png")):
        file = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "a.png"}
        join = {"data": [None, file], "fn_index": upload, "session_hash": "h", "trigger_id": 1, "event_data": None}
        assert status(f"{address}gradio_api/queue/join", json.dumps(join).encode())[0] == 200
        said = status(f"{address}gradio_api/queue/data?session_hash=h")[1]
        assert '"success":false' in said and "root:" not in said and "shown as the model" not in said
        assert Path(path).exists()


def test_the_command_ends_clean(tmp_path):
    """It says where it listens, on this machine only, and leaves no upload behind when it is terminated."""
    program = [sys.executable, "-m", "llava.serve.gradio_web_server", "--model-path", "m", "--compare", "n"]
    server = subprocess.Popen(
        [*program, "--openai-base-url", "http://127.0.0.1:9/v1"], stdout=subprocess.PIPE, text=True, cwd=ROOT,
        env=os.environ | {"TMPDIR": str(tmp_path)},
    )  # fmt: skip
    try:
        said = server.stdout.readline()
        address = re.fullmatch(r"serving on (http://127.0.0.1:\d+/) \(Ctrl-C ends\)\n", said).group(1)
        assert status(address)[0] == 200 and len(list(tmp_path.glob("llava-chat-*"))) == 1
    finally:
        server.terminate()
    assert server.wait(20) == 143
    assert list(tmp_path.glob("llava-chat-*")) == []


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert page.main(["--model-path", "m", "--openai-base-url", "http://127.0.0.1:9/v1"]) == 2
    assert "The page needs Gradio: pip install -e '.[serve]'" in capsys.readouterr().out
