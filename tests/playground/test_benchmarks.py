"""TinyCOCO's editions of the benchmarks: read and scored by the same commands as the originals, and true."""

import json
import re
from collections import Counter

import pytest
from PIL import Image

from eval import amber, evaluate, objhal, pope
from eval.core.types import Answer
from playground.tinycoco.benchmarks import write_benchmarks
from playground.tinycoco.captions import PLURALS
from playground.tinycoco.run import SFT
from playground.tinycoco.scenes import sample_scene
from playground.tinycoco.vocabulary import companion_of

pytestmark = pytest.mark.fast

SCENES = 60


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tinycoco")
    write_benchmarks(folder, SCENES, "test")
    return folder


@pytest.fixture(scope="module")
def scenes():
    return {f"test-{index:06d}": sample_scene(index, "test") for index in range(SCENES)}


def perfect(questions):
    return [Answer(question.id, "", question.prompt, question.truth.capitalize()) for question in questions]


def test_pictures_lie_where_the_benchmarks_look(folder):
    for bench in (pope.load(folder, "official"), amber.load(folder)):
        names = {question.image for question in bench.questions}
        assert len(names) == SCENES
        for name in names:
            with Image.open(bench.image_folder / name) as picture:
                assert picture.size == (112, 112)


def test_the_same_scenes_give_the_same_files(folder, tmp_path):
    write_benchmarks(tmp_path, SCENES, "test")
    for name in ("pope/coco_pope_adversarial.json", "amber/annotations.json", "downloads.json"):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


class TestPope:
    @pytest.fixture(scope="class")
    def bench(self, folder):
        return pope.load(folder, "official")

    def test_its_answers_are_true(self, bench, scenes):
        for question in bench.questions:
            (thing,) = re.fullmatch(r"Is there an? (.+) in the image\?\n.*", question.prompt).groups()
            assert (thing in scenes[question.image_id].categories) is (question.truth == "yes")

    def test_half_yes_and_the_same_positives_in_all_splits(self, bench):
        by_split = {split: [q for q in bench.questions if q.kinds == (split,)] for split in pope.SPLITS}
        for questions in by_split.values():
            assert Counter(q.truth for q in questions) == {"yes": len(questions) // 2, "no": len(questions) // 2}
        positives = [[(q.image, q.prompt) for q in qs if q.truth == "yes"] for qs in by_split.values()]
        assert positives[0] == positives[1] == positives[2]

    def test_negatives_are_usual_ones_where_they_should_be(self, bench, scenes):
        """Popular: first the absent category that most scenes have; adversarial: more companions than at random."""
        often = Counter(category for scene in scenes.values() for category in scene.categories)
        popular = [q for q in bench.questions if q.kinds == ("popular",) and q.truth == "no"]
        for question in {q.image: q for q in reversed(popular)}.values():  # the first of each scene
            (thing,) = re.match(r"Is there an? (.+) in", question.prompt).groups()
            absent = set(often) - set(scenes[question.image_id].categories)
            assert often[thing] == max(often[category] for category in absent)

        def companions(split):
            found = 0
            for question in (q for q in bench.questions if q.kinds == (split,) and q.truth == "no"):
                scene = scenes[question.image_id]
                (thing,) = re.match(r"Is there an? (.+) in", question.prompt).groups()
                found += thing in {companion_of(category, scene.context) for category in scene.categories}
            return found

        assert companions("adversarial") > 3 * companions("random")

    def test_from_perfect_answers_to_100_percent(self, bench):
        found = pope.score(bench, perfect(bench.questions))
        assert (found.metrics["mean_f1"], found.metrics["random_yes_ratio"]) == (100.0, 50.0)
        assert "pope-official" in pope.format_table({"perfect": found})

    def test_llavas_command_reads_its_label_files(self, bench, folder, tmp_path, capsys):
        from llava.eval.eval_pope import main

        questions = [{"question_id": int(q.id), "category": q.kinds[0]} for q in bench.questions]
        replies = [{"question_id": int(q.id), "prompt": q.prompt, "text": q.truth} for q in bench.questions]
        for name, rows in (("q", questions), ("a", replies)):
            (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        flags = {"annotation-dir": folder / "pope", "question-file": tmp_path / "q", "result-file": tmp_path / "a"}
        assert main([f"--{name}={value}" for name, value in flags.items()]) == 0
        assert capsys.readouterr().out.count("1.000, 1.000, 1.000, 1.000, 0.500") == 3


class TestAmber:
    @pytest.fixture(scope="class")
    def bench(self, folder):
        return amber.load(folder)

    def test_its_answers_are_true(self, bench, scenes):
        singular = {plural: category for category, plural in PLURALS.items()}
        checks = {
            r"Is there an? (.+) in this image\?": lambda scene, thing: thing in scene.categories,
            r"Is there one (.+) in this image\?": lambda scene, thing: count(scene, thing) == 1,
            r"Are there two (.+) in this image\?": lambda scene, things: count(scene, singular[things]) == 2,
            r"Are there three (.+) in this image\?": lambda scene, things: count(scene, singular[things]) == 3,
            r"Is the (.+) to the left of the (.+) in this image\?": left_of,
            r"Is the (.+) (\w+) in this image\?": lambda scene, thing, colour: only(scene, thing).colour == colour,
        }
        for question in bench.part("discriminative"):
            fits = [(match, check) for form, check in checks.items() if (match := re.fullmatch(form, question.prompt))]
            match, check = fits[0]
            assert check(scenes[question.image_id], *match.groups()) is (question.truth == "yes"), question

    def test_all_dimensions_but_action_and_both_answers(self, bench):
        kinds = Counter((question.kinds[-1], question.truth) for question in bench.questions)
        assert kinds[("existence", "yes")] == kinds[("action", "yes")] == kinds[("action", "no")] == 0
        assert kinds[("existence", "no")] > 30
        for dimension in ("state", "number", "relation"):
            assert kinds[(dimension, "yes")] == kinds[(dimension, "no")] > 30

    def test_from_perfect_answers_to_100_percent(self, bench):
        found = amber.score(bench, perfect(bench.questions))
        assert (found.metrics["f1"], found.metrics["existence_recall"], found.metrics["action_f1"]) == (
            100.0,
            100.0,
            None,
        )
        assert found.protocol.startswith("amber") and found.metrics["amber_score"] == 100.0
        assert (found.metrics["chair"], found.metrics["cover"], found.metrics["cog"]) == (0.0, 100.0, 0.0)
        assert "100.0" in amber.format_table({"perfect": found})


class TestObjHal:
    def test_what_is_drawn_is_the_truth(self, folder, scenes):
        bench = objhal.load(folder)
        for question, scene in zip(bench.questions, scenes.values(), strict=True):
            assert bench.ground_truth[question.image_id] == set(scene.categories)


@pytest.mark.parametrize(("name", "metric"), [("objhal", "response_level"), ("amber", "chair"), ("pope", "mean_f1")])
def test_the_command_takes_the_edition_and_says_so(name, metric, folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DAMA_BENCH_DATA", str(folder))
    words = [name, str(SFT), "--out", str(tmp_path), "--limit", "3", "--device", "cpu", "--max-new-tokens", "24"]
    assert evaluate.main(words) == 0
    (results,) = tmp_path.glob("*/*/results.json")
    found = json.loads(results.read_text())
    assert metric in found["metrics"] and re.search(r", data [0-9a-f]{8}, ", found["provenance"]["protocol"])
    assert found["provenance"]["counts"]["answers"] >= 3 and "page: " in capsys.readouterr().out


def count(scene, category):
    return sum(thing.category == category for thing in scene.objects)


def only(scene, category):
    (thing,) = [thing for thing in scene.objects if thing.category == category]
    return thing


def left_of(scene, one, other):
    return only(scene, one).centre[0] < only(scene, other).centre[0]
