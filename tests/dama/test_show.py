"""dama.hardness.show: which pairs are shown and why, correlations on paper, a page with all inside, a picture."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dama.cli import main
from dama.console import USER_ERROR
from dama.corruptions import names
from dama.hardness.score import hardness_delta, run_hardness, summarize
from dama.hardness.show import by_field, correlations, draw_sheet, pick_groups, sheet_text, write_hardness_page
from dama.pairs import PreferencePair
from dama.stage import StageError, open_stage
from dama.train.data import ImageChoice, PairDataset
from dama.views import CHOSEN, CHOSEN_CORRUPTED, REJECTED

ATTACK = '<script>alert("x")</script>'
COLORS = ("red", "green", "blue")


def record(number: int, chosen: list[float], rejected: list[float], **changes: Any) -> dict[str, Any]:
    """A record of the stage; statement k of an answer is named by its place."""
    return {
        "id": f"p{number}",
        "delta": hardness_delta(chosen, rejected),
        "chosen_statements": [f"Chosen {k}." for k in range(len(chosen))],
        "chosen_scores": chosen,
        "chosen_words": 2 * len(chosen),
        "rejected_statements": [f"Rejected {k}." for k in range(len(rejected))],
        "rejected_scores": rejected,
        "rejected_words": 2 * len(rejected),
        "kind": "edit" if number % 2 else "sampled",
        "source": "VQA",
        "image": f"{COLORS[number % 3]}.png",
    } | changes


RECORDS = [
    record(0, [0.3, 0.3, 0.3], [0.2]),  # delta .7
    record(1, [0.3, 0.2], [0.2, 0.2]),  # .1
    record(2, [0.1], [0.2, 0.2]),  # -.3
    record(3, [0.2], [0.2]),  # 0
    record(4, [0.3], [0.1], chosen_statements=[ATTACK], source=""),  # .2
]


def write_stage(folder: Path, records: list[dict[str, Any]] = RECORDS, **facts: Any) -> Path:
    """A finished stage with its pictures in folder/images."""
    (folder / "images").mkdir(parents=True)
    for color in COLORS:
        Image.new("RGB", (60, 40), color).save(folder / f"images/{color}.png")
    fingerprint = {"pairs": "abc", "clip": {"model": "tiny"}, "reduction": "sum"}
    with open_stage(folder / "hardness", "hardness", fingerprint, [len(records)]) as stage:
        stage.append(records)
        stage.finish(summarize(records, [{"skipped": [], "image_folder": str(folder / "images")} | facts]))
    return folder / "hardness"


class Reader(HTMLParser):
    """Sources of pictures, elements from outside, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.pictures: list[str] = []
        self.scripts, self.text = 0, ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.scripts += tag in ("script", "link", "iframe")
        self.pictures += [str(value) for name, value in attrs if tag == "img" and name == "src"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_groups_on_paper() -> None:
    """For deltas .7 .1 -.3 0 .2: easiest .7 .2, hardest that are ranked rightly 0 .1, negative -.3."""
    groups = pick_groups(RECORDS, 2)
    assert [[row["id"] for row in group.records] for group in groups] == [["p0", "p4"], ["p3", "p1"], ["p2"]]
    assert [group.title for group in pick_groups(RECORDS[:2], 1)] == ["Easiest pairs", "Hardest pairs"]


def test_correlations_on_paper() -> None:
    """With equal scores of 1/4, delta as a sum is a quarter of the difference in statements, r = 1.

    As a mean it is always 0, r undefined. Words are twice the statements.
    """
    rows = [record(number, [0.25] * (number + 1), [0.25]) for number in range(3)]
    assert correlations(rows) == {
        "statements": {"sum": pytest.approx(1.0), "mean": None},
        "words": {"sum": pytest.approx(1.0), "mean": None},
    }


def test_rare_sources_are_put_together() -> None:
    rows = [record(n, [0.1], [0.2], source=source) for n, source in enumerate("aabbccdeff")]
    groups = by_field([*rows, record(10, [0.1], [0.2], source="d")], "source")
    assert {name: len(values) for name, values in groups.items()} == {"a": 2, "b": 2, "c": 2, "d": 2, "2 others": 3}
    assert list(by_field(RECORDS, "source")) == ["VQA", "(no source)"]


def test_the_page_holds_everything_and_nothing_from_outside(tmp_path: Path) -> None:
    folder = write_stage(tmp_path)
    page, picture = write_hardness_page(folder, tmp_path / "out", tmp_path / "images", count=2)
    text = page.read_text()
    reader = Reader(text)
    assert reader.scripts == 0 and "http://" not in re.sub(r'xmlns(:\w+)?="[^"]*"', "", text)
    assert len(reader.pictures) == 5 + 3 * 6 and all(
        source.startswith("data:image/png;base64,") for source in reader.pictures
    )
    assert ATTACK in reader.text and ATTACK not in text
    for part in (
        "Easiest pairs", "δ = +0.7000", "pair p2", "+0.300", "Chosen 2.", "δ = -0.3000", "δ̄ = 0.140000", "as a sum",
        "as a mean", "3 statements, 6 words, scores sum to 0.9000", "source VQA", "20.0%",
    ):  # fmt: skip
        assert part in reader.text
    assert text.count("<svg") == 4  # delta by source and by kind, against statements and words
    with Image.open(picture) as sheet:
        assert sheet.format == "PNG" and sheet.width == 1320 and sheet.height > 1000
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"hardness.html", "hardness.png"}


def test_the_picture_shows_the_pairs_pictures_and_is_the_same_every_time(tmp_path: Path) -> None:
    folder = write_stage(tmp_path)
    sheets = [write_hardness_page(folder, tmp_path / name, tmp_path / "images")[1] for name in ("a", "b")]
    first, second = (sheet.read_bytes() for sheet in sheets)
    assert first == second
    colors = {pixel for _, pixel in Image.open(io.BytesIO(first)).convert("RGB").getcolors(1 << 24)}
    assert {(255, 0, 0), (0, 128, 0), (0, 0, 255)} <= colors


def test_long_answers_are_cut_in_the_picture_with_a_count() -> None:
    text = sheet_text(record(0, [0.1] * 30, [0.2]))
    assert "… 24 more lines" in text and text.count("Chosen") == 6 and text.count("Rejected 0.") == 1


def test_other_scripts_and_given_scores_are_drawn(tmp_path: Path) -> None:
    """No statements with given scores; the plots' font has no Chinese, which must not stop the picture."""
    rows = [
        record(0, [0.3], [0.1], chosen_statements=[], rejected_statements=[]),
        record(1, [0.1], [0.3], chosen_statements=["图中有一只猫。"], fallbacks={"chosen": "added words"}),
    ]
    folder = write_stage(tmp_path, rows, skipped=[{"id": "9", "reason": "x"}])
    page, _ = write_hardness_page(folder, tmp_path / "out", tmp_path / "images")
    text = Reader(page.read_text()).text
    assert "图中有一只猫。" in text and "chosen split by rules (added words)" in text
    assert "1 pairs were left out" in text and "of 4: added words 1" in text


def test_many_pairs_make_no_huge_page(tmp_path: Path) -> None:
    rows = [record(n, [0.001 * n] * (1 + n % 5), [0.2] * (1 + n % 3)) for n in range(4000)]
    page, _ = write_hardness_page(write_stage(tmp_path, rows), tmp_path / "out", tmp_path / "images", 1)
    assert page.stat().st_size < 1_000_000


def test_the_command_by_both_names_and_its_errors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_stage(tmp_path)
    assert main(["hardness", "show", str(folder), "--image_folder", str(tmp_path / "images")]) == 0
    assert f"written to {folder / 'hardness.html'} and {folder / 'hardness.png'}" in capsys.readouterr().out
    assert main(["hardness_show", str(folder), "--out", str(tmp_path / "out"), "--pairs", "0"]) == USER_ERROR
    assert "--pairs 0: expected 1 or more" in capsys.readouterr().err
    (tmp_path / "images").rename(tmp_path / "moved")
    assert main(["hardness", "show", str(folder), "--image_folder", str(tmp_path / "images")]) == USER_ERROR
    assert "give the folder that contains the images now as --image_folder" in capsys.readouterr().err
    assert main(["hardness", "show", str(folder), "--image-folder", str(tmp_path / "moved")]) == 0
    with pytest.raises(StageError, match="no manifest.json"):
        write_hardness_page(tmp_path, tmp_path)


def test_images_inside_the_stages_own_folder_need_no_flag(tmp_path: Path) -> None:
    folder = write_stage(tmp_path)
    assert write_hardness_page(tmp_path / "hardness", tmp_path / "a", tmp_path / "images")
    (tmp_path / "images").rename(folder / "images")
    rewrite_summary(folder, image_folder=str(folder / "images"))
    page, _ = write_hardness_page(folder, tmp_path / "b", count=2)
    assert len(Reader(page.read_text()).pictures) == 5 + 3 * 6


@pytest.mark.parametrize("named", ["images", "..", "/", "hardness/../images", "link", None, 5, ["images"]])
def test_a_manifest_of_somebody_else_shows_no_other_folders_images(named: Any, tmp_path: Path) -> None:
    """Where the stage lies, beside it, at the root, and behind a link inside it."""
    folder = write_stage(tmp_path)
    (folder / "link").symlink_to(tmp_path / "images")
    if isinstance(named, str):
        named = str((folder if named == "link" else tmp_path) / named)
    rewrite_summary(folder, image_folder=named)
    with pytest.raises(StageError, match="image_folder is .*\nRemedy: give the folder .* --image_folder"):
        write_hardness_page(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("image", ["../secret.png", "/etc/hosts", "link.png"])
def test_records_of_somebody_else_lead_out_of_no_folder(image: str, tmp_path: Path) -> None:
    folder = write_stage(tmp_path, [record(0, [0.3], [0.1], image=image)])
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    (tmp_path / "images/link.png").symlink_to(tmp_path / "secret.png")
    with pytest.raises(ValueError, match="image path .* (leaves the image folder|is absolute)"):
        write_hardness_page(folder, tmp_path / "out", tmp_path / "images")


def rewrite_summary(folder: Path, **facts: Any) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["summary"] |= facts
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_records_of_an_earlier_version_are_refused(tmp_path: Path) -> None:
    old = [{k: v for k, v in record.items() if k not in ("image", "source")} for record in RECORDS]
    with pytest.raises(StageError, match="its records have no image, source\nRemedy: an earlier version wrote it"):
        write_hardness_page(write_stage(tmp_path, old), tmp_path)


def test_a_constant_delta_has_no_correlation() -> None:
    """One pair: every figure is defined but r."""
    rows = [record(0, [0.3], [0.1])]
    manifest = {"summary": summarize(rows, [{"skipped": []}]), "fingerprint": {"reduction": "sum"}}
    assert manifest["summary"]["correlations"] == {"statements": None, "words": None}
    picture = {"red.png": Image.new("RGB", (8, 8), "red")}
    assert draw_sheet(manifest, rows, pick_groups(rows, 3), picture).startswith(b"\x89PNG")


@pytest.mark.parametrize("pretrained", ["random", "openai"])
def test_random_weights_are_named_before_any_number(tmp_path: Path, pretrained: str) -> None:
    """In the page's text above the first table, and only where the weights are random."""
    folder = write_stage(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["fingerprint"]["clip"] = {"model": "ViT-B-32", "pretrained": pretrained}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    page, _ = write_hardness_page(folder, tmp_path, tmp_path / "images")
    text = Reader(page.read_text()).text
    before = text[: text.index("RANDOM weights")] if "RANDOM weights" in text else ""
    assert ("RANDOM weights: the CLIP ViT-B-32 was not trained" in text) is (pretrained == "random")
    assert bool(before) is (pretrained == "random") and "+0.1400" not in before


def test_every_pair_shows_its_question(tmp_path: Path) -> None:
    """As text, markup and all; a stage of an earlier version, whose records have none, says so."""
    questions = ["What is it?", ATTACK, "Two\nlines?", "Which \N{DOG FACE}?", ""]
    rows = [row | {"question": question} for row, question in zip(RECORDS, questions)]
    page, _ = write_hardness_page(write_stage(tmp_path / "new", rows), tmp_path / "new", tmp_path / "new/images")
    reader = Reader(page.read_text())
    assert all(f"Question: {question}" in reader.text for question in questions[:4]) and not reader.scripts
    assert "What is it?" in sheet_text(rows[0])
    page, _ = write_hardness_page(write_stage(tmp_path / "old"), tmp_path / "old", tmp_path / "old/images")
    assert "Question: not recorded by the version that wrote this stage" in Reader(page.read_text()).text


def test_a_context_is_shown_before_the_answers(tmp_path: Path) -> None:
    """On the page and on the sheet, as text; a pair without one has no such line."""
    rows = [RECORDS[0] | {"context": f"A red car. {ATTACK}"}, RECORDS[1]]
    page, _ = write_hardness_page(write_stage(tmp_path, rows), tmp_path / "out", tmp_path / "images")
    reader = Reader(page.read_text())
    assert f"Context, read before both answers: A red car. {ATTACK}" in reader.text and not reader.scripts
    assert reader.text.count("Context, read") == 2  # pair p0 is easy and, of two, also among the hard ones
    assert "Context: A red car." in sheet_text(rows[0]) and "Context" not in sheet_text(rows[1])


def test_every_corruption_stands_beside_its_image(tmp_path: Path) -> None:
    """The second images are, pixel by pixel, those that a training with the same seed reads."""
    pairs = [
        PreferencePair(f"p{n}", f"{COLORS[n % 3]}.png", "What?", "A.", "B.", clip_scores=((0.3,), (0.1 * n,)),
                       second_image=f"{COLORS[(n + 1) % 3]}.png")
        for n in range(5)
    ]  # fmt: skip
    (tmp_path / "images").mkdir()
    for number, color in enumerate(COLORS):
        ramp = Image.linear_gradient("L").resize((60, 40)).rotate(60 * number)
        Image.merge("RGB", [ramp, ramp.rotate(90), ramp.rotate(180)]).save(tmp_path / f"images/{color}.png")
    run_hardness(pairs, tmp_path / "images", tmp_path / "own", None, progress=False)
    page, _ = write_hardness_page(tmp_path / "own", tmp_path / "out", tmp_path / "images", 1, corruption_seed=7)
    shown = pictures_by_name(page.read_text())
    assert list(shown) == ["own image", *names()]
    for corruption in names():
        args = SimpleNamespace(corruption=corruption, corruption_seed=7, loss=["mdpo"])
        choice = ImageChoice.of(pairs, (CHOSEN, REJECTED, CHOSEN_CORRUPTED), args)
        as_it_is: Any = lambda image: image  # noqa: E731  (no tensor: the image itself is compared)
        data = PairDataset([], tmp_path / "images", as_it_is)
        expected: Any = data.pixels(choice.images(pairs[0])[-1])  # of p0, whose delta is the largest
        assert shown[corruption].size == expected.size
        assert shown[corruption].tobytes() == expected.tobytes(), corruption
    assert len({image.tobytes() for image in shown.values()}) >= len(shown) - 1  # the two files may be one


def pictures_by_name(page: str) -> dict[str, Image.Image]:
    """The first pair's second images on a page, by corruption."""
    found: dict[str, Image.Image] = {}
    for source, name in re.findall(r'<figure><img src="data:image/png;base64,([^"]*)" alt="([^"]*)">', page):
        found.setdefault(name, Image.open(io.BytesIO(base64.b64decode(source))).convert("RGB"))
    return found
