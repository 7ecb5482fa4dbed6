"""eval.page: the records of all six benchmarks, hostile text, and the page in a headless Chromium."""

from __future__ import annotations

import base64
import json
import re
import shutil
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval import amber, benchmarks, llavabench, mmhal, mmvet, objhal, pope
from eval.core.judge import JudgeRun, Verdict
from eval.core.nouns import rule_tagger
from eval.core.scores import cell
from eval.core.store import Provenance, write_results
from eval.core.types import Answer, BenchmarkData, Question
from eval.page import is_of_kind, main, write_page
from eval.page_images import ALL_IMAGES, SIDE, read_images
from eval.page_items import ItemView, item_view, marked, packed, state_of, tags_of, unpacked
from eval.results import read_all
from playground.tinycoco.vocabulary import SYNONYMS
from tests.eval import tiny_bench

ATTACK = '<script>document.title = "owned"</script><img src=x onerror="document.title=\'owned\'">'


# ----------------------------------------------------------------------------------------------------------- records

Texts = list[str]


def scored_objhal(folder: Path, texts: Texts) -> Any:
    tiny_bench.objhal(folder)
    bench = objhal.load(folder)
    score = objhal.score(bench, answers(bench.questions, texts))
    return score, bench.image_folder


def scored_amber(folder: Path, texts: Texts) -> Any:
    tiny_bench.amber(folder)
    bench = amber.load(folder)
    score = amber.score(bench, answers(bench.questions, texts), tagger=rule_tagger(frozenset(SYNONYMS)))
    return score, bench.image_folder


def scored_pope(folder: Path, texts: Texts) -> Any:
    tiny_bench.pope(folder)
    bench = pope.load(folder)
    score = pope.score(bench, answers(bench.questions, texts))
    return score, bench.image_folder


def judged(module: Any, kinds: Texts, verdicts: Texts) -> Callable[[Path, Texts], Any]:
    """Four questions with a judge's verdicts."""

    def scored(folder: Path, texts: Texts) -> Any:
        tiny_bench.paint(folder / "images", {f"{i}.jpg": scene for i, scene in enumerate(tiny_bench.scenes(4))})
        questions = tuple(
            Question(str(i), f"{i}.jpg", f"What is in picture {i}?", f"Truth {i}.", (kind,), f"Context {i}.")
            for i, kind in enumerate(kinds)
        )
        bench = BenchmarkData(questions, "prompt", folder / "images")
        given = tuple(Verdict(q.id, 0, "", text, None, "v1") for q, text in zip(questions, verdicts))
        score = module.score(bench, answers(questions, texts), JudgeRun("judge", 0.0, "digest", given))
        return score, bench.image_folder

    return scored


def answers(questions: Any, texts: Texts) -> list[Answer]:
    return [Answer(q.id, "", q.prompt, texts[i % len(texts)]) for i, q in enumerate(questions)]


SCORED: dict[str, Callable[[Path, Texts], Any]] = {
    "objhal": scored_objhal,
    "amber": scored_amber,
    "pope": scored_pope,
    "mmhal": judged(mmhal, ["attribute", "counting"] * 2, ["Rating: 5", "Rating: 1", "none", "Rating: 6"]),
    "llavabench": judged(llavabench, ["conv", "detail", "complex", "conv"], ["8 6", "7 9", "8 8", "what?"]),
    "mmvet": judged(mmvet, ["ocr", "rec", "math", "rec"], ["1.0", "0.0", "0.5", "?"]),
}
SAID = {
    "objhal": ["A dog and a cat.", "A surfboard with a kite.", f"A horse. {ATTACK}"],
    "amber": ["A dog and a cat.", "Yes", "No, it is not.", "Perhaps."],
    "pope": ["Yes", "No", "Perhaps."],
}


def run_of(folder: Path, benchmark: str, name: str = "base", texts: Texts | None = None) -> tuple[Path, Path]:
    """results.json of a run of the real scorer, and the folder of its pictures."""
    said = texts or SAID.get(benchmark, [ATTACK, "Two cars.", "A \N{SMILING FACE WITH SUNGLASSES} dog.", ""])
    score, images = SCORED[benchmark](folder / "data", said)
    facts = Provenance(benchmark, score.protocol, f"runs/{name}", name, {"num_beams": 1}, score.counts, score.judge)
    path = folder / name / benchmark / "results.json"
    write_results(path, score.metrics, facts, score.items)
    return path, images


class Reader(HTMLParser):
    """The page's elements, and the JSON and the text in it."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.data: dict[str, Any] = {}
        self.text, self._id = "", ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        facts = dict(attrs)
        assert not any(name.startswith("on") for name in facts), facts
        self._id = str(facts["id"]) if "id" in facts and tag == "script" else ""

    def handle_data(self, data: str) -> None:
        if self._id:
            name = self._id.removesuffix("-data")
            self.data[name] = unpacked(data) if name == "items" else json.loads(data)
            self._id = ""
        else:
            self.text += data


def read(page: Path) -> Reader:
    return Reader(page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("benchmark", SCORED)
def test_every_benchmark(tmp_path: Path, benchmark: str) -> None:
    """All items, each with its picture, its truth, its answer word for word, and what became of it."""
    path, images = run_of(tmp_path, benchmark)
    page = read(write_page(path, tmp_path / "page.html", images))
    content = json.loads(path.read_text())
    items = page.data["items"]
    assert [item.id for item in items] == [row["id"] for row in content["items"]]
    for item, row in zip(items, content["items"]):
        (answer,) = item.answers
        assert "".join(piece for piece, _ in answer.pieces) == row["text"]
        wrong = [piece for piece, kind in answer.pieces if kind == "hallucinated"]
        assert wrong == [row["text"][start:end] for start, end in row["spans"]]
        assert item.state == answer.outcome == {True: "wrong", False: "right", None: "unparsed"}[row["wrong"]]
        assert item.truth == (row["truth"] if isinstance(row["truth"], list) else [row["truth"]])
        data, width, height = page.data["images"][item.image_number]
        assert base64.b64decode(data)[8:12] == b"WEBP" and max(width, height) <= SIDE
    assert {item.state for item in items} >= {"wrong"} and page.tags.count("script") == 4
    assert ATTACK not in (tmp_path / "page.html").read_text()
    first = next(name for name, value in content["metrics"].items() if value is not None)
    assert cell(content["metrics"][first], benchmarks.named(benchmark).metric(first).decimals) in page.text


def test_what_the_scorers_found_is_said(tmp_path: Path) -> None:
    facts = {}
    for benchmark in SCORED:
        path, images = run_of(tmp_path, benchmark)
        items = read(write_page(path, tmp_path / "page.html", images)).data["items"]
        facts[benchmark] = [item.answers[0].facts for item in items]
    assert facts["mmhal"] == [["judged 5"], ["judged 1"], ["judged unreadable"], ["judged 6"]]
    assert facts["llavabench"][0] == ["judged 6 (reference 8)"]
    assert facts["mmvet"][2] == ["judged 0.5"]
    assert facts["pope"][:3] == [["read as yes"], ["read as no"], []]
    assert facts["objhal"][1][0] == "2 hallucinated" and facts["objhal"][1][1].startswith("not named: ")


def test_marks_do_not_overlap_and_count_characters_not_bytes() -> None:
    """Wrong before right; an emoji is one character here and two in a browser."""
    record = {"text": "\N{DOG FACE} a hot dog, a dog", "spans": [[4, 11]]}
    named = [{"start": s, "end": e, "correct": c} for s, e, c in ((8, 11, True), (15, 18, True), (0, 0, True))]
    assert marked(record | {"mentions": named}) == [
        ("\N{DOG FACE} a ", None), ("hot dog", "hallucinated"), (", a ", None), ("dog", "correct")
    ]  # fmt: skip


def test_states_and_tags() -> None:
    records = [{"wrong": wrong} for wrong in (True, False, None)]
    assert [state_of(records[i:j]) for i, j in ((0, 1), (0, 2), (1, 3))] == ["wrong", "wrong right", "unparsed"]
    assert tags_of({"part": "discriminative", "dimensions": ["attribute", "state"]})[1:] == ["attribute", "state"]
    assert tags_of({"kinds": ["rec", "ocr"]}) == ["rec", "ocr"] and tags_of({"split": "random"}) == ["random"]
    tags = ("rec", "random", "counting")
    assert [is_of_kind(m, tags) for m in ("rec", "random_f1", "score_counting", "mean_f1", "recall")] == [
        True, True, True, False, False
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------------------- pictures


def test_pictures_are_made_small_and_stay_in_their_folder(tmp_path: Path) -> None:
    home = tmp_path / "images"
    home.mkdir()
    Image.new("RGBA", (1200, 300), "red").save(home / "wide.png")
    (home / "text.jpg").write_text("no picture")
    Image.new("RGB", (4, 4)).save(tmp_path / "outside.png")
    images, errors = read_images(["wide.png", "text.jpg", "../outside.png", "absent.png"], home)
    assert list(images) == ["wide.png"] and images["wide.png"][1:] == (SIDE, SIDE // 4)
    assert [error.split(" ")[0] for error in errors] == ["text.jpg", "../outside.png", "absent.png"]
    assert "leaves the image folder" in errors[1]
    with pytest.raises(ValueError, match="expected 1 images, got none that can be shown, e.g. absent.png"):
        read_images(["absent.png"], home)


def test_images_share_the_size_of_a_page(tmp_path: Path) -> None:
    """Thirty images full of noise: smaller and coarser where they have less, and never more than that."""
    noise = np.random.default_rng(0).integers(0, 255, (30, 48, 64, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).resize((640, 480), Image.Resampling.BICUBIC).save(tmp_path / f"{number}.png")
    names = [f"{number}.png" for number in range(30)]
    widths = []
    for limit in (9_000_000, 300_000, 100_000):
        images, errors = read_images(names, tmp_path, limit)
        assert errors == [] and sum(len(image.data) for image in images.values()) <= limit
        widths.append(images["0.png"].width)
    assert widths[0] == SIDE and widths == sorted(widths, reverse=True) and widths[-1] < SIDE


def test_equal_images_are_stored_once(tmp_path: Path) -> None:
    path, images = run_of(tmp_path, "objhal")
    first, *others = sorted(images.iterdir())
    for other in others:
        shutil.copy(first, other)
    page = read(write_page(path, tmp_path / "page.html", images))
    assert len(page.data["images"]) == 1 and {item.image_number for item in page.data["items"]} == {0}


def test_items_are_packed_and_unpacked() -> None:
    """Every field of an item is the same after packing, and equal texts are stored once."""
    record = {"id": "1", "image": "a.jpg", "prompt": "What?", "truth": ["dog", "cat"], "wrong": True, "spans": [[2, 5]],
              "text": "A cat, a \N{DOG FACE}.", "context": "No cat.", "kinds": ["rec"], "verdicts": ["", "1"],
              "values": [None, 1.0]}  # fmt: skip
    silent = record | {"text": "", "spans": [], "wrong": None, "missing": "refusal"}
    items = [item_view([record, silent], {"a.jpg": 3}), item_view([record, record], {})]
    assert unpacked(packed(items)) == items and isinstance(items[0], ItemView)
    assert len(packed(items * 50)) < 2 * len(packed(items))


def test_missing_pictures_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, images = run_of(tmp_path, "objhal")
    gone = sorted(images.iterdir())[0]
    gone.unlink()
    page = read(write_page(path, tmp_path / "page.html", images))
    assert f"Images that could not be shown: 1, e.g. {gone.name}" in page.text
    assert f"image left out: {gone.name}" in capsys.readouterr().out
    assert [item.image_number for item in page.data["items"]] == [-1, 0, 1, 2, 3, 4]


def test_two_results_must_be_comparable(tmp_path: Path) -> None:
    path, images = run_of(tmp_path, "objhal")
    other, _ = run_of(tmp_path, "pope")
    with pytest.raises(ValueError, match="not comparable"):
        write_page(path, tmp_path / "page.html", images, other, names=["a", "b"])
    assert not (tmp_path / "page.html").exists()


def test_names_are_escaped_and_nothing_is_loaded(tmp_path: Path) -> None:
    path, images = run_of(tmp_path, "objhal")
    text = write_page(path, tmp_path / "page.html", images, names=[ATTACK]).read_text()
    assert ATTACK not in text and "&lt;script&gt;" in text and "http://" not in text and "https://" not in text
    assert re.search(r"default-src 'none'; .*script-src 'sha256-[\w+/=]{44}'", text)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, images = run_of(tmp_path, "objhal")
    other, _ = run_of(tmp_path, "objhal", "aligned", ["A dog."])
    assert main([str(path), str(other), "--images", str(images)]) == 0
    assert f"page: {path.with_name('page.html')}, 6 items, 6 images" in capsys.readouterr().out
    text = read(path.with_name("page.html")).text
    assert "Object HalBench: base beside aligned" in text and "Difference" in text
    assert main([str(path), "--images", str(tmp_path)]) == 2
    assert "give the benchmark's image folder as --images" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    assert chromium and driver, "needs chromium and chromedriver (Debian: apt-get install chromium chromium-driver)"
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for flag in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "window-size=1360,1000",
                 f"user-data-dir={tmp_path_factory.mktemp('profile')}"):  # fmt: skip
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()


class Screen:
    """The page as a reader handles it."""

    def __init__(self, chrome: Any, page: Path) -> None:
        self.chrome = chrome
        chrome.get(page.as_uri())
        self.until(lambda: self.find("body[data-ready]"))

    def find(self, selector: str) -> list[Any]:
        return self.chrome.find_elements("css selector", selector)

    def texts(self, selector: str) -> list[str]:
        return [element.text for element in self.find(selector)]

    def ids(self) -> list[str]:
        return self.texts(".item .id")

    def click(self, words: str) -> None:
        (label,) = (label for label in self.find("#filters label") if label.text.startswith(words))
        label.click()

    def search(self, words: str) -> None:
        field = self.find("input[type=search]")[0]
        field.send_keys("\ue009a\ue000\ue003")  # control + a, delete
        field.send_keys(words)

    def until(self, condition: Callable[[], Any], seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.find("body")[0].text
            time.sleep(0.05)


@pytest.fixture(scope="module")
def two_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Object HalBench on six scenes: the base invents in every second answer, the aligned model in the last."""
    folder = tmp_path_factory.mktemp("two")
    scenes = tiny_bench.scenes(6)
    true = [f"There is a {sorted(scene.categories)[0]}." for scene in scenes]
    absent = [next(word for word in SYNONYMS if word not in scene.categories) for scene in scenes]
    false = [f"{text} And a {word}. {ATTACK}" for text, word in zip(true, absent)]
    base, images = run_of(folder, "objhal", "base", [(true, false)[i % 2][i] for i in range(6)])
    aligned, _ = run_of(folder, "objhal", "aligned", [*true[:5], false[5]])
    return write_page(base, folder / "page.html", images, aligned)


def test_filters_change_what_is_shown(browser: Any, two_runs: Path) -> None:
    screen = Screen(browser, two_runs)
    every = [str(100 + i) for i in range(6)]
    assert screen.ids() == every and screen.texts("#count") == ["6 of 6 items"]
    assert screen.texts("#filters label") == [
        "All 6", "Wrong → right 2", "Right → wrong 0", "Wrong in both 1", "Right in both 3", "Unparsed 0"
    ]  # fmt: skip
    for words, expected in (("Wrong →", ["101", "103"]), ("Wrong in", ["105"]), ("Right in", ["100", "102", "104"])):
        screen.click(words)
        assert screen.ids() == expected and screen.texts("#count") == [f"{len(expected)} of 6 items"]
    screen.click("All")
    assert screen.ids() == every


def test_search(browser: Any, two_runs: Path) -> None:
    """In questions, answers, truth and ids, in any case; where nothing is like it, one click shows all again."""
    screen = Screen(browser, two_runs)
    invented = screen.find(".answer mark.hallucinated")[0].text
    having = [card.text for card in screen.find(".item") if invented in card.text.lower()]
    screen.search(invented.upper())
    assert len(screen.ids()) == len(having) < 6
    screen.search("103")
    assert screen.ids() == ["103"]
    screen.click("Right in")
    assert screen.ids() == [] and screen.find("#none")[0].is_displayed()
    screen.find("#none button")[0].click()
    screen.until(lambda: len(screen.ids()) == 6)


def test_both_answers_with_their_marks(browser: Any, two_runs: Path) -> None:
    screen = Screen(browser, two_runs)
    card = screen.find(".item")[1]
    heads = [box.text.split() for box in card.find_elements("css selector", ".answer h3")]
    assert heads == [["base", "✗", "wrong"], ["aligned", "✓", "right"]]
    wrong = card.find_elements("css selector", ".answer.wrong mark")
    assert [mark.get_attribute("class") for mark in wrong] == ["correct", "hallucinated"]
    picture = card.find_elements("css selector", "img")[0]
    assert picture.get_property("naturalWidth") > 0
    assert "response-level" in screen.texts(".metrics tbody tr")[0]


def test_a_models_text_is_only_text(browser: Any, two_runs: Path) -> None:
    """No script of an answer runs, and none would if it were markup: the policy allows the page's own alone."""
    screen = Screen(browser, two_runs)
    assert ATTACK in screen.find(".item .text")[2].text
    assert browser.title == "Object HalBench: base beside aligned"
    assert len(screen.find(".item img")) == 6 and screen.find(".item script") == []
    assert browser.get_log("browser") == []
    browser.execute_script(
        "const made = document.createElement('div'); made.innerHTML = arguments[0]; document.body.append(made);"
        "const script = document.createElement('script'); script.textContent = 'document.title = \"owned\"';"
        "document.body.append(script);",
        ATTACK,
    )
    screen.until(lambda: any("Content Security Policy" in line["message"] for line in browser.get_log("browser")))
    assert browser.title == "Object HalBench: base beside aligned"


def test_the_keyboard_reaches_everything(browser: Any, two_runs: Path) -> None:
    """/ goes to the search, the arrows change the filter, j and k go from item to item."""

    def active(script: str) -> Any:
        return browser.execute_script(f"return document.activeElement.{script}")

    screen = Screen(browser, two_runs)
    body = screen.find("body")[0]
    body.send_keys("/")
    assert active("name") == "words"
    browser.switch_to.active_element.send_keys("j103")
    assert active("value") == "j103"
    browser.execute_script("document.activeElement.blur(); document.getElementById('filters').reset()")
    screen.until(lambda: len(screen.ids()) == 6)
    screen.find("input[type=radio]")[0].send_keys("\ue015")  # arrow down
    assert screen.ids() == ["101", "103"]
    browser.execute_script("document.activeElement.blur()")
    for key, expected in (("j", "101"), ("j", "103"), ("k", "101")):
        browser.switch_to.active_element.send_keys(key)
        assert active("getAttribute('aria-label')") == f"Item {expected}"


def test_two_thousand_items_are_built_as_one_scrolls(browser: Any, tmp_path: Path) -> None:
    path, images = run_of(tmp_path, "pope")
    content = json.loads(path.read_text())
    row = content["items"][0]
    content["items"] = [row | {"id": str(i), "text": f"Yes {i}"} for i in range(2000)]
    content["metrics"] = {name: above / below for name, (above, below) in row["parts"].items() if below}
    path.write_text(json.dumps(content))
    screen = Screen(browser, write_page(path, tmp_path / "page.html", images))
    assert len(screen.find(".item")) < 100 and screen.texts("#count") == ["2,000 of 2,000 items"]
    before = len(screen.find(".item"))
    browser.execute_script("window.scrollTo(0, document.body.scrollHeight)")
    screen.until(lambda: len(screen.find(".item")) > before)
    screen.search("yes 1999")
    assert screen.ids() == ["1999"]
    screen.search("yes 1")
    assert screen.texts("#count") == ["1,111 of 2,000 items"] and len(screen.find(".item")) < 100


def test_fifteen_thousand_items_of_two_models_are_a_small_page(browser: Any, tmp_path: Path) -> None:
    """Items and everything but images take less than 3 of 12 MB; images are limited to 9. All can be searched."""
    runs = []
    for name in ("base", "aligned"):
        path, images = run_of(tmp_path, "amber", name, [f"{name} has seen a dog.", "Yes", "No", "Perhaps."])
        content = json.loads(path.read_text())
        row = next(row for row in content["items"] if row["part"] == "discriminative")
        texts = [f"{('Yes', 'No')[n % 3 > 0]}, {name} says of {n * 7919 % 15220}." for n in range(15220)]
        content["items"] = [row | {"id": str(n), "prompt": f"Is there a {n}?", "text": t} for n, t in enumerate(texts)]
        content["metrics"] = {metric: above / below for metric, (above, below) in row["parts"].items() if below}
        path.write_text(json.dumps(content))
        runs.append(path)
    page = write_page(runs[0], tmp_path / "page.html", images, runs[1])
    assert page.stat().st_size < 3_000_000 and ALL_IMAGES <= 9_000_000
    screen = Screen(browser, page)
    assert screen.texts("#count") == ["15,220 of 15,220 items"]
    screen.search("there a 15219?")
    assert screen.ids() == ["15219"]
    assert screen.texts(".item .text")[1] == f"Yes, aligned says of {15219 * 7919 % 15220}."
    assert browser.get_log("browser") == []


@pytest.mark.parametrize("benchmark", ["amber", "mmhal"])
def test_one_run_and_its_kinds(browser: Any, tmp_path: Path, benchmark: str) -> None:
    path, images = run_of(tmp_path, benchmark)
    screen = Screen(browser, write_page(path, tmp_path / "page.html", images))
    kind = {"amber": "existence", "mmhal": "counting"}[benchmark]
    screen.find(f"option[value={kind}]")[0].click()
    (run,) = read_all([path])
    having = [id_ for id_, row in run.items.items() if kind in tags_of(row)]
    assert screen.ids() == having and 0 < len(having) < len(run.items)
    assert all(kind in text for text in screen.texts(".item .meta"))
    if benchmark == "mmhal":
        screen.find(".verdicts summary")[0].click()
        assert screen.texts(".verdicts p")[0] == "Rating: 1"


@pytest.fixture
def phone(browser: Any) -> Iterator[Any]:
    """The browser with a screen of 390 x 844 CSS pixels."""
    size = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    yield browser
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def box_of(element: Any) -> tuple[float, float]:
    """Left and right edge in CSS pixels of the window."""
    edges = element.parent.execute_script(
        "const box = arguments[0].getBoundingClientRect(); return [box.left, box.right]", element
    )
    return edges[0], edges[1]


def test_on_a_phone_the_verdict_is_one_hinted_scroll_away(phone: Any, two_runs: Path) -> None:
    """The page itself does not scroll sideways; after a scroll of the table a row has its name and its verdict."""
    screen = Screen(phone, two_runs)
    assert phone.execute_script("return document.documentElement.scrollWidth") == 390
    (hint,) = screen.find(".sideways")
    assert hint.is_displayed() and "verdict" in hint.text
    name, verdict = screen.find("table.two tbody th")[0], screen.find("table.two td.words")[0]
    assert box_of(verdict)[0] > 390
    phone.execute_script("document.querySelector('.metrics').scrollLeft = 10000")
    assert 0 <= box_of(name)[0] < box_of(name)[1] <= box_of(verdict)[0] and box_of(verdict)[1] <= 390
    region = screen.find(".metrics")[0]
    assert (region.get_attribute("tabindex"), region.get_attribute("role")) == ("0", "region")


def test_wide_there_is_no_hint_and_a_single_run_has_none(browser: Any, two_runs: Path, tmp_path: Path) -> None:
    screen = Screen(browser, two_runs)
    assert not screen.find(".sideways")[0].is_displayed() and screen.texts("table.two thead th")[-1] == "Verdict"
    path, images = run_of(tmp_path, "objhal")
    assert Screen(browser, write_page(path, tmp_path / "page.html", images)).find(".sideways") == []


def test_on_a_phone_a_single_run_shows_its_values(phone: Any, tmp_path: Path) -> None:
    path, images = run_of(tmp_path, "pope")
    screen = Screen(phone, write_page(path, tmp_path / "page.html", images))
    values = screen.find(".metrics .value, .metrics .interval")
    assert values and all(0 <= box_of(value)[0] < box_of(value)[1] <= 390 for value in values)


def test_the_numbers_of_a_scale_stand_on_one_line_apart(phone: Any, two_runs: Path) -> None:
    screen = Screen(phone, two_runs)
    script = "return [...arguments[0].children].map(s => { const r = document.createRange(); r.selectNodeContents(s); "
    script += "const b = r.getBoundingClientRect(); return [b.left, b.right, r.getClientRects().length]; })"
    for size in (390, 1280):
        phone.execute_cdp_cmd(
            "Emulation.setDeviceMetricsOverride",
            {"width": size, "height": 844, "deviceScaleFactor": 1, "mobile": False},
        )
        for scale in screen.find(".scale"):
            low, zero, high = phone.execute_script(script, scale)
            assert (low[2], zero[2], high[2]) == (1, 1, 1)
            assert low[1] < zero[0] < zero[1] < high[0], size


def test_every_interval_bar_has_a_scale_that_fits_its_numbers(browser: Any, two_runs: Path) -> None:
    """A dot at x percent between the ends -r and +r is the difference: -r + 2 r x / 100."""
    screen = Screen(browser, two_runs)
    rows = [row for row in screen.find("table.two tbody tr") if row.find_elements("css selector", ".bar")]
    assert rows
    for row in rows:
        low, zero, high = (float(text.text.replace("\N{MINUS SIGN}", "-")) for text in
                           row.find_elements("css selector", ".scale span"))  # fmt: skip
        dot = browser.execute_script("return parseFloat(arguments[0].querySelector('.bar b').style.left)", row)
        shown = row.find_elements("css selector", ".value")[-1].text.replace("\N{MINUS SIGN}", "-")
        assert (low, zero) == (-high, 0)
        assert low + 2 * high * dot / 100 == pytest.approx(float(shown), abs=0.15 + high / 500)
