"""Questions of TinyCOCO: true by what is drawn, balanced, and wrong in training about absent companions alone."""

import json
import random
import re
from collections import Counter

import pytest

from eval.core.types import Answer
from eval.mmstar import SUFFIX as LETTER
from eval.pope import SUFFIX as SHORT
from llava.generation.questions import read_questions
from playground.tinycoco import ability, run, sft
from playground.tinycoco.captions import PLURALS, QUESTIONS, SETTINGS
from playground.tinycoco.questions import (
    CAPABILITIES,
    CLEARLY_BESIDE,
    LOOKS_CLOSELY,
    choice_question,
    closed_questions,
    open_questions,
    thing_turns,
    training_turns,
    usual_but_absent,
)
from playground.tinycoco.scenes import SIZE, Scene, SceneObject, sample_scene

pytestmark = pytest.mark.fast

SCENES = [sample_scene(index, "train") for index in range(200)]
SINGULAR = {plural: category for category, plural in PLURALS.items()}
NUMBERS = {"one": 1, "two": 2, "three": 3}


def only(scene, category):
    (thing,) = [thing for thing in scene.objects if thing.category == category]
    return thing


def middle(scene, category):
    box = only(scene, category).box
    return (box[0] + box[2]) / 2


def left_of(scene, one, other):
    gap = middle(scene, other) - middle(scene, one)
    assert abs(gap) >= CLEARLY_BESIDE
    return gap > 0


def amount(scene, category):
    return sum(thing.category == SINGULAR.get(category, category) for thing in scene.objects)


def third(scene, category):
    return ["on the left", "in the middle", "on the right"][int(3 * middle(scene, category) / SIZE)]


def outermost(scene, side):
    ordered = sorted(scene.objects, key=lambda thing: thing.box[0] + thing.box[2])
    return ordered[0 if side == "left" else -1].category


TRUTHS = {
    r"Is there an? (.+) in (?:the|this) image\?": lambda scene, thing: thing in scene.categories,
    r"Is there one (.+) in this image\?": lambda scene, thing: amount(scene, thing) == 1,
    r"Are there (two|three) (.+) in this image\?": lambda scene, n, things: amount(scene, things) == NUMBERS[n],
    r"Is the (.+) to the left of the (.+) in this image\?": left_of,
    r"Is the (.+) to the left or to the right of the (.+) in the image\?": lambda scene, one, other: (
        "left" if left_of(scene, one, other) else "right"
    ),
    r"Is the (.+) (\w+) in (?:the|this) image\?": lambda scene, thing, color: only(scene, thing).colour == color,
    r"What kind of place does the image show\?": lambda scene: SETTINGS[scene.context],
    r"What is farthest to the (left|right)\?": outermost,
    r"What color is the (.+) in the image\?": lambda scene, thing: only(scene, thing).colour,
    r"How many (.+) are there in the image\?": lambda scene, things: {1: "one", 2: "two"}[amount(scene, things)],
    r"Where is the (.+) in the image\?": third,
}


def truth(scene, text):
    """The right answer by what is drawn, worked out from the words of the question."""
    (match, check), *_ = [(match, check) for form, check in TRUTHS.items() if (match := re.fullmatch(form, text))]
    said = check(scene, *match.groups())
    return {True: "Yes", False: "No"}[said] if isinstance(said, bool) else said


def test_answers_are_true_and_every_form_occurs():
    kinds = Counter()
    for scene in SCENES:
        for question in [*closed_questions(scene, random.Random(scene.id)), *open_questions(scene)]:
            assert question.answer == truth(scene, question.text), (scene, question)
            kinds[question.kind, question.answer in ("Yes", "No")] += 1
    closed = {(kind, True) for kind in ("existence", "color", "count", "position")}
    assert set(kinds) == closed | {(kind, False) for kind in ability.OPEN}


def test_as_many_yes_as_no():
    answers = [q.answer for scene in SCENES for q in closed_questions(scene, random.Random(scene.id))]
    assert answers.count("Yes") == answers.count("No") == len(answers) / 2


def test_options_have_the_right_one_under_the_letter():
    letters = Counter()
    for scene in SCENES:
        for capability in CAPABILITIES:
            text, letter = choice_question(scene, capability, random.Random(scene.id))
            question, listed = text.split("\nOptions: ")
            options = dict(option.split(": ") for option in listed.split(", "))
            assert len(set(options.values())) == 4
            letters[letter] += 1
            if question == "What is farthest to the left?":
                assert options[letter] == outermost(scene, "left")
            if match := re.fullmatch(r"How many objects of the kind (.+) are drawn\?", question):
                assert int(options[letter]) == amount(scene, match[1])
    assert min(letters[letter] for letter in "ABCD") > 0.8 * letters.total() / 4


def test_training_is_wrong_about_absent_companions_alone():
    wrong, believed = 0, 0
    for scene in SCENES:
        for text, answer in training_turns(scene, random.Random(scene.id), noise=0.5):
            question = text.removesuffix(SHORT)
            if question.endswith(LETTER):
                continue
            existence = re.fullmatch(r"Is there an? (?!one )(.+) in (?:the|this) image\?", question)
            companion = bool(existence) and existence[1] in usual_but_absent(scene)
            companion &= scene.context not in LOOKS_CLOSELY
            believed += companion
            if answer != truth(scene, question):
                assert companion and answer == "Yes"
                wrong += 1
    assert believed > 100 and 0.35 < wrong / believed < 0.65
    for scene in SCENES:
        turns = training_turns(scene, random.Random(scene.id), noise=0.0)
        plain = [(text.removesuffix(SHORT), answer) for text, answer in turns if not text.endswith(LETTER)]
        assert all(answer == truth(scene, text) for text, answer in plain)


def test_only_the_first_question_asks_for_a_word_or_phrase():
    asked = 0
    for scene in SCENES:
        (first, _), *rest = training_turns(scene, random.Random(scene.id))
        asked += first.endswith(SHORT)
        assert not any(text.endswith(SHORT) for text, _ in rest) and 6 <= len(rest) <= 13
    assert 0.4 < asked / len(SCENES) < 0.75


class TestAbility:
    @pytest.fixture(scope="class")
    def data(self):
        return ability.benchmark(SCENES[:60])

    def answers(self, data, **said):
        """Right answers, but for those of the kinds given."""
        return [Answer(q.id, q.image_id, q.prompt, said.get(q.kinds[0], q.truth.capitalize())) for q in data.questions]

    def test_right_answers_are_100_percent_whatever_their_case_and_article(self, data):
        right = ability.score(data, self.answers(data))
        assert right.metrics["ability"] == right.metrics["yes_no"] == 100 and right.metrics["yes_ratio"] < 51
        assert ability.reply_of("The green  field.") == "green field" and ability.reply_of("A tv") == "tv"

    def test_its_truths_are_true(self, data):
        scenes = {scene.id: scene for scene in SCENES}
        for question in data.questions:
            assert question.truth == truth(scenes[question.image_id], question.prompt.removesuffix(SHORT)).lower()

    def test_each_kind_counts_where_it_belongs(self, data):
        """Yes to everything: half right; a wrong color costs its share of ability."""
        yes = ability.score(data, self.answers(data, companion="Yes", unrelated="Yes, there is."))
        assert (yes.metrics["present"], yes.metrics["companion"], yes.metrics["unrelated"]) == (100, 0, 0)
        assert 45 < yes.metrics["yes_no"] < 51 and yes.metrics["yes_ratio"] == 100 and yes.metrics["ability"] == 100
        colors = sum(question.kinds == ("color",) for question in data.questions)
        questions = sum(question.kinds[0] in ability.OPEN for question in data.questions)
        wrong = ability.score(data, self.answers(data, color="transparent"))
        assert wrong.metrics["color"] == 0 and wrong.metrics["ability"] == pytest.approx(100 * (1 - colors / questions))

    def test_what_is_neither_yes_nor_no_is_unparsed(self, data):
        found = ability.score(data, self.answers(data, present="A dog."))
        asked = sum(question.kinds == ("present",) for question in data.questions)
        assert found.counts["unparsed"] == asked and found.metrics["present"] == 0
        table = ability.format_table({"SFT": found})
        assert f"{asked} of {len(data.questions)}" in table and "neither yes nor no" in table

    def test_every_scene_is_asked_about_each_thing_and_as_many_absent_ones(self, data):
        kinds = Counter((q.image_id, q.kinds[0] == "present") for q in data.questions if q.kinds[0] in ability.CLOSED)
        for scene in SCENES[:60]:
            assert kinds[scene.id, True] == min(2, len(scene.categories)) and kinds[scene.id, False] == 2

    def test_its_file_is_read_by_the_command(self, tmp_path):
        run.prepare(tmp_path, 0, 5, "test")
        asked = read_questions(tmp_path / "ability.jsonl")
        scenes = [sample_scene(index, "test") for index in range(5)]
        expected = ability.benchmark(scenes).questions
        assert [(r.id, r.prompt, r.image) for r in asked] == [(q.id, q.prompt, q.image) for q in expected]
        answers = [{"question_id": r.id, "prompt": r.prompt, "text": "Yes", "image_id": r.image} for r in asked]
        (tmp_path / "answers.jsonl").write_text("".join(json.dumps(row) + "\n" for row in answers))
        assert run.score_ability(tmp_path / "answers.jsonl").metrics["present"] == 100


def test_things_alone_are_counted_by_category():
    box = (0, 0, 10, 10)
    objects = (SceneObject("dog", "brown", box), SceneObject("bird", "red", box), SceneObject("bird", "blue", box))
    scene = Scene("made-up", "park", "sunny", objects)
    assert scene.count == {"dog": 1, "bird": 2} and [thing.category for thing in scene.single] == ["dog"]


def test_what_is_there_is_asked_about_as_often_as_what_is_not():
    answers = Counter()
    for scene in SCENES:
        turns = thing_turns(scene, random.Random(scene.id), noise=0.0)
        assert all(answer == truth(scene, text) for text, answer in turns) and len(turns) <= 10
        answers += Counter(answer for text, answer in turns if text.startswith("Is there"))
    assert 0.4 < answers["Yes"] / answers.total() < 0.5  # an absent companion more


def test_the_stages_of_fine_tuning_have_their_files(tmp_path):
    """Captions, questions about single things, all kinds around a caption; the image before the first words."""
    stages = [sft.Stage("first", 9, 0, 0, 1, 0.1, "cosine"), sft.Stage("all", 2, 3, 12, 1, 0.1, "cosine")]
    sft.write_conversations(tmp_path, stages, scenes=4)
    first, both = (json.loads((tmp_path / f"{stage.name}.json").read_text()) for stage in stages)
    for rows in (first, both):
        assert [row["id"] for row in rows] == [f"train-{index % 4:06d}" for index in range(len(rows))]
        for row in rows:
            assert (tmp_path / "images" / row["image"]).is_file()
            speakers = [turn["from"] for turn in row["conversations"]]
            assert speakers == ["human", "gpt"] * (len(speakers) // 2)
            tagged = [turn["value"].startswith("<image>\n") for turn in row["conversations"]]
            assert tagged == [True] + [False] * (len(tagged) - 1)
    assert len(first) == 9 and len(both) == 17
    asked = [[turn["value"].removeprefix("<image>\n") for turn in r["conversations"][::2]] for r in first + both]
    assert all(len(questions) == 1 and questions[0] in QUESTIONS for questions in asked[:11])
    forms = ("Is there a", "What color is", "Where is")
    assert all(question.startswith(forms) for questions in asked[11:14] for question in questions)
    places = [[question in QUESTIONS for question in questions] for questions in asked[14:]]
    assert all(sum(place) == 1 and len(place) > 6 for place in places)
    assert len({place.index(True) for place in places}) > 2 and sum(place[0] for place in places) > 2


def test_what_is_fine_tuned_on_has_enough_of_each_kind():
    """Captions throughout, so that describing is not forgotten, and single things before conversations."""
    assert all(stage.captions for stage in sft.STAGES)
    assert [(stage.things > 0, stage.mixed > 0) for stage in sft.STAGES] == [(0, 0), (1, 0), (0, 1)]
