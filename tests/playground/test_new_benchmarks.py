"""TinyCOCO's HallusionBench, MMStar and CHAIR: true, in the official formats, and run end to end by the commands."""

import json
import re
from collections import Counter

import pytest
from PIL import Image

from eval import chair, evaluate, hallusionbench, mmstar
from eval.core.types import Answer
from playground.tinycoco.benchmarks import write_benchmarks
from playground.tinycoco.hallusionbench import JUDGE_PROMPT, asked_about, edited, judge_prompt
from playground.tinycoco.judge import JudgeServer
from playground.tinycoco.run import SFT
from playground.tinycoco.scenes import sample_scene

pytestmark = pytest.mark.fast

SCENES = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tinycoco")
    write_benchmarks(folder, SCENES, "test")
    return folder


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(index, "test") for index in range(SCENES)]


def perfect(data):
    return [Answer(q.id, "", q.prompt, q.truth.capitalize()) for q in data.questions]


class TestHallusionBench:
    def test_its_answers_are_true(self, folder, scenes):
        data = hallusionbench.load(folder)
        for question in data.questions:
            _, _, number, figure, _ = question.id.split("_")
            shown = question.kinds[2] == hallusionbench.EDITED
            scene = edited(scenes[int(number)]) if shown else scenes[int(number)]
            if match := re.fullmatch(r"Is there an? (.+) in the image\?", question.prompt):
                truth = match[1] in scene.categories
            else:
                thing, color = re.fullmatch(r"Is the (.+) (\w+) in the image\?", question.prompt).groups()
                truth = any((each.category, each.colour) == (thing, color) for each in scene.objects)
            assert truth is (question.truth == "yes"), question

    def test_pairs_need_the_figure(self, folder):
        """Half the sets are asked without a figure, too, and some truths change with the figure."""
        data = hallusionbench.load(folder)
        kinds = Counter((q.kinds[0], q.kinds[2]) for q in data.questions)
        assert kinds[("VS", hallusionbench.NO_IMAGE)] == kinds[("VS", hallusionbench.ORIGINAL)] > 10
        always = hallusionbench.score(data, [Answer(q.id, "", q.prompt, "Yes") for q in data.questions]).metrics
        assert always["question_accuracy"] > always["pair_accuracy"] + 10
        right = hallusionbench.score(data, perfect(data)).metrics
        assert {right[f"{name}_accuracy"] for name in ("question", "pair", "figure", "easy", "hard")} == {100.0}

    def test_every_set_asks_about_its_edit(self):
        """Also where no color can change and the last object is not the only one of its kind."""
        for scene in (sample_scene(index, "test") for index in range(300)):
            truths = [(now, after) for _, now, after in asked_about(scene, edited(scene))]
            assert any(now != after for now, after in truths), scene.id

    def test_images_are_there(self, folder):
        data = hallusionbench.load(folder)
        for name in {q.image for q in data.questions if q.image}:
            with Image.open(data.image_folder / name) as image:
                assert image.size == (112, 112)

    @pytest.mark.parametrize(
        "answer, verdict", [("Yes, it is.", "correct"), ("no", "incorrect"), ("Perhaps", "unclear"), ("", "unclear")]
    )
    def test_the_rules_that_judge(self, answer, verdict):
        filled = JUDGE_PROMPT.format(question="Q?", gt_answer_details="Yes: Q?", prediction=answer)
        assert judge_prompt(filled) == verdict and judge_prompt("Another") is None


class TestMMStar:
    def test_its_answers_are_true(self, folder, scenes):
        data = mmstar.load(folder)
        assert len({q.kinds[0] for q in data.questions}) >= 5
        for question, scene in zip(data.questions, scenes, strict=True):
            option = mmstar.options_of(question.prompt)[question.truth]
            count = Counter(thing.category for thing in scene.objects)
            text = question.prompt.split("\n")[0]
            truths = {
                "What is the setting?": scene.context,
                "How many objects are drawn, and one more?": str(len(scene.objects) + 1),
                "How many different kinds of objects are drawn?": str(len(count)),
                "What is farthest to the left?": min(scene.objects, key=lambda thing: thing.centre[0]).category,
            }
            if match := re.fullmatch(r"How many objects of the kind (.+) are drawn\?", text):
                truths[text] = str(count[match[1]])
            if match := re.fullmatch(r"Which color does the (.+) have\?", text):
                (truths[text],) = (thing.colour for thing in scene.objects if thing.category == match[1])
            assert option == truths[text]

    def test_from_perfect_answers_to_100_percent(self, folder):
        data = mmstar.load(folder, "blind")
        found = mmstar.score(data, perfect(data))
        assert (found.metrics["total"], found.metrics["blind_total"], found.metrics["multimodal_gain"]) == (100, 100, 0)


def test_chair_has_the_scenes_as_truth(folder, scenes):
    data = chair.load(folder)
    assert data.ground_truth == {str(i): set(scene.categories) for i, scene in enumerate(scenes)}
    said = [Answer(q.id, "", q.prompt, f"There is {q.truth}.") for q in data.questions]
    found = chair.score(data, said).metrics
    assert (found["chairs"], found["chairi"], found["recall"]) == (0.0, 0.0, 100.0)


def run(folder, out, monkeypatch, *words):
    monkeypatch.setenv("DAMA_BENCH_DATA", str(folder))
    flags = ["--out", str(out), "--conv-mode", "v1", "--device", "cpu", "--max-new-tokens", "8"]
    return evaluate.main([words[0], str(SFT), *flags, *words[1:]])


def results(path):
    return json.loads((path / "results.json").read_text())


def test_gain_and_leakage_by_the_command(folder, tmp_path, monkeypatch, capsys):
    """The model alone first; then with and without images, the latter answered once for both."""
    assert run(folder, tmp_path, monkeypatch, "mmstar", "--mode", "text_only") == 0
    alone = tmp_path / SFT.name / "mmstar/text_only/results.json"
    assert run(folder, tmp_path, monkeypatch, "mmstar", "--blind", "--text_only", str(alone)) == 0
    found = results(tmp_path / SFT.name / "mmstar/blind")
    assert found["metrics"]["leakage"] == 0.0 and found["metrics"]["text_only_total"] is not None
    assert found["metrics"]["multimodal_gain"] == found["metrics"]["total"] - found["metrics"]["blind_total"]
    assert len(found["items"]) == SCENES and re.search(r"^mmstar, data [0-9a-f]{8}, ", found["provenance"]["protocol"])
    assert "answers_blind: " not in capsys.readouterr().err


def test_flags_that_do_not_fit(folder, tmp_path, monkeypatch, capsys):
    assert run(folder, tmp_path, monkeypatch, "chair", "--text_only", "none.json", "--blind") == 2
    error = capsys.readouterr().err
    assert "--mode blind: expected 512 or 128 or 64 for chair" in error
    assert "--text_only: chair does not take it" in error and "expected a file, got none" in error
    assert run(folder, tmp_path, monkeypatch, "mmstar", "--text_only", "none.json") == 2
    assert "add --blind" in capsys.readouterr().err
    assert run(folder, tmp_path, monkeypatch, "mmstar", "--blind", "--mode", "image") == 2
    assert "--blind: expected no other mode, got --mode image" in capsys.readouterr().err


def test_chair_about_chosen_images(folder, tmp_path, monkeypatch):
    (tmp_path / "ids.txt").write_text("3\n5\n")
    assert run(folder, tmp_path, monkeypatch, "chair", "--image_ids", str(tmp_path / "ids.txt")) == 0
    found = results(tmp_path / SFT.name / "chair")
    assert [item["id"] for item in found["items"]] == ["3", "5"]
    assert found["provenance"]["protocol"].startswith("chair-512, 2 images ")


def test_hallusionbench_with_the_rules_as_judge(folder, tmp_path, monkeypatch):
    """Both modes share the answers, and so they agree where the rules read as the judge does."""
    import threading

    assert run(folder, tmp_path, monkeypatch, "hallusionbench", "--limit", "2") == 0
    with JudgeServer(0) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = ["--mode", "llm", "--judge-base-url", server.url, "--judge-model", "rules"]
        assert run(folder, tmp_path, monkeypatch, "hallusionbench", "--limit", "2", *flags) == 0
        server.shutdown()
    home = tmp_path / SFT.name / "hallusionbench_first2"
    rules, judged = results(home), results(home / "llm")
    assert rules["metrics"] == judged["metrics"] and judged["provenance"]["judge"]["name"] == "rules"
    assert rules["provenance"]["protocol"].startswith("hallusionbench-rules, data ")
