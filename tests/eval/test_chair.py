"""CHAIR on COCO: metrics on paper, the list of images and its digest, and the official ground truth."""

import gzip
import json
import os
from pathlib import Path

import pytest

from eval.chair import BENCHMARK, PROMPT, load, read_ids, score
from eval.core.types import Answer
from eval.task import Task

pytestmark = pytest.mark.fast

SYNONYMS = "person, man, woman\ndog, puppy\ndining table, table\nchair, seat\ntoilet\n"
TRUTH = {"9": ["person", "dog"], "12": ["dining table", "person"], "310196": []}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "chair_coco").mkdir()
    (tmp_path / "pope").mkdir()
    (tmp_path / "chair_coco/synonyms.txt").write_text(SYNONYMS)
    (tmp_path / "chair_coco/gt_objects_val2014.json").write_text(json.dumps(TRUTH))
    images = [f"COCO_val2014_{int(id_):012d}.jpg" for id_ in ("9", "9", "12", "310196")]
    lines = [json.dumps({"image": image}) + "\n" for image in images]
    (tmp_path / "pope/coco_pope_random.json").write_text("".join(lines))
    return tmp_path


def answers(data, *texts):
    return [Answer(q.id, "", q.prompt, text) for q, text in zip(data.questions, texts, strict=True)]


def test_metrics_on_paper(folder):
    """9: man, puppy, puppy right, table wrong: 1 of 4 mentions, both of 2 objects named.

    12: "a chair and a seat": 2 of 2 wrong, 0 of 2 named. 310196: nothing named, and nothing to name.
    CHAIRs 2 of 3, CHAIRi 3 of 6, recall 2 of 4, words 11 + 5 + 2 of 3.
    """
    data = load(folder)
    said = ("A man with a puppy, a puppy, at a dining table.", "a chair and a seat", "Blue sky")
    found = score(data, answers(data, *said))
    expected = {"chairs": 200 / 3, "chairi": 50, "recall": 50, "mean_words": 6}
    assert found.metrics == pytest.approx(expected)
    assert (found.counts["captions without object"], found.counts["mentions"]) == (1, 6)
    assert found.items[0]["spans"] == [[34, 46]] and found.items[0]["missed"] == []


def test_without_any_object_no_metric_divides_by_zero(folder):
    data = load(folder, image_ids=[310196])
    found = score(data, answers(data, ""))
    assert found.metrics == {"chairs": 0.0, "chairi": None, "recall": None, "mean_words": 0.0}


def test_the_list_of_images_is_part_of_the_protocol(folder):
    data, other = load(folder), load(folder, image_ids=[12, 9])
    assert [q.image for q in data.questions][0] == "COCO_val2014_000000000009.jpg"
    assert data.questions[0].prompt == PROMPT
    protocols = [score(d, answers(d, *["A dog"] * len(d.questions))).protocol for d in (data, other)]
    assert protocols[0] == f"chair-512, 3 images {data.images_digest}"
    assert protocols[1] == f"chair-512, 2 images {other.images_digest}" and data.images_digest != other.images_digest
    assert load(folder, image_ids=[9, 12]).images_digest == other.images_digest


@pytest.mark.parametrize(
    "text",
    ["9\n12\n", "[9, 12]", "COCO_val2014_000000000009.jpg\nCOCO_val2014_000000000012.jpg", '["000000000009.jpg", "12"]',
     '{"image": "9.jpg"}\n{"image": "9.jpg"}\n{"image": "12.jpg"}'],
)  # fmt: skip
def test_lists_of_images(tmp_path, text):
    (tmp_path / "ids").write_text(text)
    assert read_ids(tmp_path / "ids") == [9, 12]


def test_errors_of_the_list(folder):
    (folder / "ids").write_text("9\n9\n")
    with pytest.raises(ValueError, match=r"(?s)ids: 1 error.*9 is listed twice.*correct the list"):
        load(folder, image_ids=folder / "ids")
    (folder / "ids").write_text("9\ndog\n")
    with pytest.raises(ValueError, match="entry 2: expected a COCO id or the name of an image, got 'dog'"):
        load(folder, image_ids=folder / "ids")
    with pytest.raises(ValueError, match="image 10: expected a list of its objects, got None"):
        load(folder, image_ids=[10])


def test_lengths_are_modes_with_answers_of_their_own(folder):
    data = load(folder, "64")
    tasks = {mode.name: Task(BENCHMARK, mode, None).parts(data) for mode in BENCHMARK.modes}
    assert {name: list(parts) for name, parts in tasks.items()} == {
        "512": ["answers"], "128": ["answers_128"], "64": ["answers_64"]
    }  # fmt: skip
    assert [parts[1].max_new_tokens for of in tasks.values() for parts in of.values()] == [512, 128, 64]
    assert score(data, answers(data, "", "", "")).protocol.startswith("chair-64, ")


def test_the_file_of_all_images_serves_as_well(folder):
    path = folder / "chair_coco/gt_objects_val2014.json"
    packed = gzip.compress(json.dumps(TRUTH).encode())
    (folder / "chair_coco/coco2014_gt_objects_chair.json.gz").write_bytes(packed)
    path.unlink()
    assert load(folder).ground_truth["12"] == {"dining table", "person"}


@pytest.mark.skipif("DAMA_BENCH_DATA" not in os.environ, reason="DAMA_BENCH_DATA is not set")
class TestOfficialData:
    @pytest.fixture(scope="class")
    def home(self):
        return Path(os.environ["DAMA_BENCH_DATA"])

    def test_popes_images_are_the_default(self, home):
        data = load(home)
        assert (len(data.questions), data.images_digest) == (500, "0745f954")
        assert data.vocabulary.node_of["minibike"] == "bicycle" and len(data.vocabulary.nodes) == 80

    def test_the_truth_agrees_with_object_halbenchs(self, home):
        """Of 300 images three differ, as the synonym lists do."""
        theirs = json.loads((home / "objhal/gt_objects_300.json").read_text())
        ours = load(home, image_ids=[int(id_) for id_ in theirs]).ground_truth
        unlike = {id_ for id_, nodes in theirs.items() if set(nodes) != ours[id_]}
        assert unlike == {"481285", "132796", "201775"}
