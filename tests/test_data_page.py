"""docs/data.md: each example row is read by the real code and gives the pair that the page describes."""

import json
import re
from pathlib import Path

import pytest

from dama.pairs import PreferencePair, ReferenceLogps, check_pairs, pair_from_row, read_pairs
from dama.prepare.rows import BAD_IMAGE, BAD_TEXT, EVALUATION, OTHER_GENERATOR, REPEATED_ID, REPEATED_PAIR, UNREADABLE
from dama.prepare.sources import TARGETS
from tests.dama.prepare_sets import lines, picture, prepare, write_lines

pytestmark = pytest.mark.fast

PAGE = (Path(__file__).resolve().parents[1] / "docs/data.md").read_text(encoding="utf-8")
KINDS = PAGE.partition("## Kinds of rows\n")[2].partition("\n## ")[0]
ROWS = {
    section.split("\n", 1)[0]: json.loads(section.partition("```json\n")[2].partition("```")[0])
    for section in re.split(r"^### ", KINDS, flags=re.M)[1:]
}
QUESTION, SHORT, DOG = "What is in this image?", "A street.", "A street and a dog."
PEOPLE, DOGS = "A street with people.", "A street with people and two dogs."
IMAGE = "<image>"
PLAIN = ((("user", f"{IMAGE}{QUESTION}"),), ("street.jpg",), SHORT, DOG)
SENTENCE = ((("user", f"{IMAGE}Describe this image."),), ("street.jpg",), "Two people share an umbrella.",
            "Two dogs wait at the crossing.")  # fmt: skip
RAIN = {"context": "A street in the rain."}
# Heading -> prompt, images, chosen and rejected answer, and every other field that is not at its default.
EXPECTED: dict[str, tuple] = {
    "RLAIF-V": (
        PLAIN[0], PLAIN[1], PEOPLE, DOGS, {"id": "1", "kind": "detailed_description", "source": "COCO"},
    ),
    "Released DAMA file": (
        *PLAIN, {"id": "2", "reference": ReferenceLogps(-4.5, -9.0), "clip_scores": ((0.25,), (0.22, 0.11))},
    ),
    "RLHF-V": (*PLAIN, {}),
    "TRL": (*PLAIN, {}),
    "TRL message lists": (*PLAIN, {}),
    "ms-swift": (*PLAIN, {}),
    "LLaMA-Factory": (*PLAIN, {}),
    "PDS-DPO": (*PLAIN, {}),
    "Several images": (
        (("user", f"Before: {IMAGE} After: {IMAGE} What changed?"),), ("before.jpg", "after.jpg"),
        "The shop has closed.", "A dog has appeared.", {},
    ),
    "Conversation": (
        (
            ("system", "Answer briefly."), ("user", f"{IMAGE}What color is the door?"), ("assistant", "Red."),
            ("user", "And the roof?"),
        ),
        ("street.jpg",), "Gray.", "Red as well.", {},
    ),
    "Text only": ((("user", "What is 2 + 2?"),), (), "4", "5", {}),
    "Second image": (PLAIN[0], PLAIN[1], PEOPLE, DOGS, {"second_image": "street_edited.jpg"}),
    "Second answer": (
        PLAIN[0], PLAIN[1], PEOPLE, DOGS, {"second_image": "station.jpg", "second": "A station with people."},
    ),
    "Context": (*SENTENCE, RAIN),
    "First error": (*SENTENCE, RAIN),
}  # fmt: skip
OTHER_FIELDS = ("kind", "source", "reference", "clip_scores", "second_image", "second", "context")
DEFAULTS = PreferencePair("", "", "", "", "")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An image folder with every image that the rows name."""
    names = sorted(set(re.findall(r"\w+\.jpg", KINDS)))
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(picture(number, "JPEG"))
    return tmp_path


def test_every_kind_on_the_page_is_expected_here() -> None:
    assert list(ROWS) == list(EXPECTED) == re.findall(r"^### (.+)$", KINDS, re.M)
    assert KINDS.count("```json") == len(ROWS)


@pytest.mark.parametrize("kind", EXPECTED)
def test_an_example_row_gives_the_pair_that_the_page_describes(kind: str) -> None:
    pair = pair_from_row(ROWS[kind])
    *texts, other = EXPECTED[kind]
    assert [pair.prompt, pair.own_images, pair.chosen, pair.rejected] == texts
    assert {name: value for name in OTHER_FIELDS if (value := getattr(pair, name)) != getattr(DEFAULTS, name)} == {
        name: value for name, value in other.items() if name != "id"
    }
    assert pair.id == other["id"] if "id" in other else len(pair.id) == 16


def test_all_rows_together_are_a_file_that_passes_the_checks(folder: Path) -> None:
    """Rows with the same content in other layouts have the same digest as id, so each gets an id of its own here."""
    rows = [row | {"idx": f"row-{number}"} for number, row in enumerate(ROWS.values())]
    pairs = read_pairs(write_lines(folder / "pairs.jsonl", rows))
    assert check_pairs(pairs, folder) == (pairs, [])
    listed = folder / "pairs.json"
    listed.write_text(json.dumps(rows), encoding="utf-8")
    assert read_pairs(listed) == pairs


@pytest.mark.parametrize("kind", EXPECTED)
def test_prepare_keeps_prompt_answers_context_and_second_image(kind: str, folder: Path) -> None:
    prepare(write_lines(folder / "rows.jsonl", [ROWS[kind]]), "--image_folder", folder, "--out", folder / "out")
    assert not lines(folder / "out/dropped.jsonl")
    (pair,) = read_pairs(folder / "out/pairs.jsonl")
    prompt, images, chosen, rejected, other = EXPECTED[kind]
    assert (pair.prompt, pair.chosen, pair.rejected, pair.context) == (prompt, chosen, rejected, other.get("context"))
    assert len(pair.own_images) == len(images)
    assert (pair.second_image is not None) is ("second_image" in other) and pair.second == other.get("second")


def test_the_page_names_every_reason_and_column_of_prepare() -> None:
    reasons = {UNREADABLE, OTHER_GENERATOR, EVALUATION, BAD_TEXT, BAD_IMAGE, REPEATED_PAIR, REPEATED_ID}
    table = PAGE.partition("reason in `dropped.jsonl`")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(.+?)` \|", table, re.M)) == reasons
    (columns,) = re.findall(r"^\| `--column NAME=COLUMN` \| .*; names are (.+?) \|$", PAGE, re.M)
    assert columns.split(", ") == list(TARGETS)
