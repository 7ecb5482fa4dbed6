"""Object HalBench: metrics on paper in both modes, the judge over HTTP, the faults of the official scorer."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import pytest

from dama.chat import ChatSettings
from eval import objhal
from eval.core.judge import JudgeRun, Verdict, replay
from eval.core.nouns import Tagger, Word, rule_tagger
from eval.core.scores import difference
from eval.core.types import Answer
from eval.objhal import METRICS, format_table, score, score_captions
from tests.eval.test_objects import LINES, VOCABULARY, nodes
from tests.openai_server import VERSION, ScriptedServer, failure

pytestmark = pytest.mark.fast

PROMPT = "List the objects of this answer.\n\nQ: {question}\nA: {answer}\n\nAs a JSON list."


def answer(text, image="1", id="a"):
    return Answer(id, image, "Describe.", text)


def test_metrics_on_paper():
    """Pictures: 1 {dog, person}, 2 {bus}, 3 {bear}.

    1 "A dog, a dog, a bus."  mentions dog dog bus: 1 of 3 hallucinated; finds dog of 2; dog repeated; 6 words
    2 "A bus."                mentions bus: 0 of 1; finds 1 of 1; 2 words
    3 "Nothing here at all"   no mention; finds 0 of 1; 4 words
    response level 1 / 2 = 50 %, CHAIRs 1 / 3 = 33.3 %, mention level 1 / 4 = 25 %, recall 2 / 4 = 50 %,
    words 12 / 3 = 4, repeated 1 / 3.
    """
    texts = {"1": "A dog, a dog, a bus.", "2": "A bus.", "3": "Nothing here at all"}
    truth = {"1": ["dog", "person"], "2": ["bus"], "3": ["bear"]}
    score = score_captions([answer(text, image, image) for image, text in texts.items()], truth, VOCABULARY)
    assert score.metrics == pytest.approx(
        {
            "response_level": 50.0,
            "chairs": 100 / 3,
            "mention_level": 25.0,
            "object_recall": 50.0,
            "mean_words": 4.0,
            "repeated_objects": 1 / 3,
        }
    )
    intervals = [score.interval(metric.name) for metric in METRICS]
    assert all(interval.low <= interval.value <= interval.high for interval in intervals)
    assert score.protocol == "objhal-rules"
    assert score.counts == {
        "answers": 3,
        "missing": 0,
        "unparsed": 0,
        "answers_without_object": 1,
        "mentions": 4,
        "hallucinated_mentions": 1,
        "objects_in_pictures": 4,
    }


def test_every_occurrence_counts():
    """Three times dog and one bus: 1 of 4. Counting surfaces once, as the judge mode does, would give 1 of 2."""
    score = score_captions([answer("dog dog dog bus")], {"1": ["dog"]}, VOCABULARY)
    assert score.metrics["mention_level"] == 25.0


def test_item_record_and_spans():
    (item,) = score_captions([answer("A dog near a bus.")], {"1": ["dog", "bear"]}, VOCABULARY).items
    record = item
    assert json.loads(json.dumps(record)) == record
    assert (record["truth"], record["missed"]) == (["bear", "dog"], ["bear"])
    assert (record["wrong"], record["spans"]) == (True, [[13, 16]])
    assert record["parts"]["mention_level"] == [100.0, 2]
    assert record["mentions"][1] == {"surface": "bus", "node": "bus", "start": 13, "end": 16, "correct": False}


def test_repetition_is_of_the_same_word():
    texts = {"a": "a man and a woman", "b": "a dog, two dogs, a dog and a bus, a bus"}
    captions = [answer(text, id=name) for name, text in texts.items()]
    assert [item["repeated_objects"] for item in score_captions(captions, {"1": []}, VOCABULARY).items] == [0, 2]


class TestFaultsOfTheOfficialScorer:
    """One test per fault known of the original: none may come back."""

    def test_nothing_mentioned_is_undefined_not_a_division_by_zero(self):
        score = score_captions([answer("A quiet scene.")], {"1": []}, VOCABULARY)
        assert score.metrics["response_level"] is None
        assert score.metrics["mention_level"] is None
        assert score.metrics["object_recall"] is None
        assert score.metrics["chairs"] == 0.0
        assert "n/a" in format_table({"model": score})

    def test_no_caption_at_all_is_undefined(self):
        assert set(score_captions([], {}, VOCABULARY).metrics.values()) == {None}

    def test_a_phrase_does_not_drop_the_other_nouns(self):
        assert nodes("a traffic light beside a dog and a man") == ["traffic light", "dog", "person"]

    def test_case_hides_nothing(self):
        assert nodes("A TRAFFIC LIGHT, a Dog and an iPhone") == ["traffic light", "dog", "cell phone"]

    @pytest.mark.parametrize("text", ["()", "[]", "", "-1\n<no_response>", "Assistant:"])
    def test_empty_and_broken_answers_are_scored_as_naming_nothing(self, text):
        (item,) = score_captions([answer(text)], {"1": ["dog"]}, VOCABULARY).items
        assert (item["mentions"], item["missed"]) == ([], ["dog"])

    def test_the_same_input_has_the_same_score(self):
        captions = [answer("dog bus" if i % 3 else "bear", str(i), str(i)) for i in range(30)]
        truth = {str(i): ["dog"] for i in range(30)}
        first, again = (score_captions(captions, truth, VOCABULARY).metrics for _ in range(2))
        assert first == again


def test_the_speaker_tag_is_no_word():
    (item,) = score_captions([answer("Assistant: A  dog\n\nsleeps.")], {"1": ["dog"]}, VOCABULARY).items
    assert item["words"] == 3


def test_picture_without_ground_truth_is_named():
    with pytest.raises(ValueError, match="answer 'a': image_id '9' is not among the 1 images with ground truth"):
        score_captions([answer("dog", "9")], {"1": ["dog"]}, VOCABULARY)


def test_ground_truth_outside_the_vocabulary_is_named():
    with pytest.raises(ValueError, match=r"ground truth of image '1': \['unicorn'\] are no nodes"):
        score_captions([answer("dog")], {"1": ["dog", "unicorn"]}, VOCABULARY)


def test_paired_difference_on_paper():
    """8 pictures, two objects named in each: one model always errs in the second, the other never: 50 - 0."""
    truth = {str(i): ["dog", "bear"] for i in range(8)}
    wrong = score_captions([answer("dog bus", i, i) for i in truth], truth, VOCABULARY)
    right = score_captions([answer("dog bear", i, i) for i in reversed(truth)], truth, VOCABULARY)
    names = [metric.name for metric in METRICS]
    changes = difference(wrong, right, names)
    assert list(changes) == names
    assert changes["mention_level"] == (50.0, 50.0, 50.0)
    assert changes["object_recall"] == (-50.0, -50.0, -50.0)
    with pytest.raises(ValueError, match="got 1 question ids in only one of the two"):
        difference(wrong, score_captions([answer("dog", i, i) for i in list(truth)[1:]], truth, VOCABULARY), names)


def test_table_is_aligned():
    good = score_captions([answer("dog")], {"1": ["dog"]}, VOCABULARY)
    table = format_table({"SFT": good, "a longer name": good})
    heading, *rows = table.splitlines()
    for title in ("response-level", "mention-level", "object recall", "mean words", "repeated objects"):
        assert title in heading
    assert len({len(line) for line in (heading, *rows)}) == 1
    assert "100.0 [100.0, 100.0]" in rows[0]
    assert rows[1].startswith("a longer name")


# ------------------------------------------------------------------------------------------------ with a judge


PICTURES = {11: ["bear", "dog"], 12: ["person"], 13: ["toilet"], 14: []}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The official files' formats, four pictures, a prompt of our own."""
    monkeypatch.setattr(objhal, "_PROMPT_SHA256", sha256(PROMPT.encode()).hexdigest())
    home = tmp_path / "data" / "objhal"
    home.mkdir(parents=True)
    rows = [
        {"org_idx": 100 + i, "image_id": picture, "question": f"Describe picture {i}."}
        for i, picture in enumerate(PICTURES)
    ]
    (home / "obj_halbench_300_questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (home / "gt_objects_300.json").write_text(json.dumps({str(key): value for key, value in PICTURES.items()}))
    (home / "synonyms_refine.txt").write_text("\n".join(LINES))
    (tmp_path / "data" / "prompts").mkdir()
    (tmp_path / "data" / "prompts" / "objhal_extract.txt").write_text(PROMPT + "\n")
    return tmp_path / "data"


@pytest.fixture
def bench(folder):
    return objhal.load(folder)


def answers_of(bench, *texts):
    return [Answer(q.id, "", q.prompt, text) for q, text in zip(bench.questions, texts)]


def verdicts(bench, answers, *texts):
    """A run of the judge that said this about the answers that it is asked about."""
    asked = objhal.judge_requests(bench, answers)
    found = [Verdict(request.id, 0, "", text, None, "v1") for request, text in zip(asked, texts)]
    return JudgeRun("judge", 0.0, bench.prompt_digest, tuple(found))


FOUR = ("A dog sits near a bus.", "A man and a woman, a MAN.", "The toilet has a seat.", "Nothing to see here.")


class TestLoading:
    def test_questions_pictures_and_truth(self, bench):
        (first, *_) = bench.requests()
        assert (first.id, first.prompt, first.image) == ("100", "Describe picture 0.", "COCO_val2014_000000000011.jpg")
        assert bench.ground_truth[first.image_id] == {"bear", "dog"}
        assert bench.judge_prompt == PROMPT
        assert objhal.DECODING == {"max_new_tokens": 1024, "num_beams": 3, "temperature": 0.0}

    def test_the_prompt_is_read_out_of_a_script_that_is_never_run(self, folder):
        (folder / "prompts" / "objhal_extract.txt").unlink()
        script = f"raise SystemExit('run!')\nother = 'x'\ntemplate = {PROMPT + chr(10)!r}\n"
        (folder / "objhal" / "eval_gpt_obj_halbench.py").write_text(script)
        assert objhal.load(folder).judge_prompt == PROMPT

    def test_another_prompt_is_refused(self, folder):
        (folder / "prompts" / "objhal_extract.txt").write_text("List objects: {answer}")
        with pytest.raises(ValueError, match="objhal_extract.txt: expected a text of SHA-256"):
            objhal.load(folder)

    def test_rules_need_no_prompt_and_a_judge_does(self, folder):
        (folder / "prompts" / "objhal_extract.txt").unlink()
        bench = objhal.load(folder)
        answers = answers_of(bench, *FOUR)
        assert score(bench, answers).protocol == "objhal-rules"
        with pytest.raises(ValueError, match="expected the judge's prompt in prompts/objhal_extract.txt or"):
            objhal.judge_requests(bench, answers)

    def test_all_faults_of_the_truth_at_once(self, folder):
        path = folder / "objhal" / "gt_objects_300.json"
        path.write_text(json.dumps({"11": ["unicorn"], "12": [], "13": []}))
        with pytest.raises(ValueError, match=r"(?s)2 errors.*11: \['unicorn'\] are no nodes.*14: expected a list"):
            objhal.load(folder)

    def test_a_question_number_used_twice_is_refused(self, folder):
        path = folder / "objhal" / "obj_halbench_300_questions.jsonl"
        path.write_text(path.read_text() + path.read_text().splitlines()[0])
        with pytest.raises(ValueError, match="'org_idx': 100 is used more than once"):
            objhal.load(folder)

    def test_truth_from_cocos_annotations(self):
        """Instances give dog, captions person; pictures not asked for are left out."""
        instances = {
            "categories": [{"id": 18, "name": "dog"}, {"id": 6, "name": "bus"}],
            "annotations": [{"image_id": 1, "category_id": 18}, {"image_id": 2, "category_id": 6}],
        }
        captions = {"annotations": [{"image_id": 1, "caption": "Two men by a train track."}]}
        assert objhal.ground_truth_from_coco(instances, captions, [1, 3], VOCABULARY) == {1: ["dog", "person"], 3: []}


class TestAskingTheJudge:
    def test_one_system_message_with_both_slots_filled(self, bench):
        answers = answers_of(bench, "Assistant: The {question} is a dog.")
        (request,) = objhal.judge_requests(bench, answers)
        text = PROMPT.replace("{question}", "Describe picture 0.").replace("{answer}", "The {question} is a dog.")
        assert request.messages == ({"role": "system", "content": text},)

    def test_three_words_or_fewer_name_nothing_and_nobody_is_asked(self, bench):
        answers = answers_of(bench, "Assistant: a brown dog", "", "A very brown dog.")
        assert [request.id for request in objhal.judge_requests(bench, answers)] == ["102"]
        found = score(bench, answers, verdicts(bench, answers, '["dog"]'), tagger=rule_tagger(VOCABULARY.words))
        assert found.counts | {"answers": 3, "mentions": 1, "answers_without_object": 2, "unparsed": 0} == found.counts

    def test_over_http_from_answers_to_figures(self, bench, tmp_path, monkeypatch):
        """Pictures {bear, dog}, {person}, {toilet}, {}.

        dog, bus                    1 of 2 hallucinated, 1 of 2 found
        man, woman, man             2 mentions of a person, each word once; 1 of 1 found
        toilet, seat                the seat goes with the toilet; 1 of 1 found
        no list in either try       unparsed: in none of these
        response level 1 / 3, CHAIRs 1 / 3, mention level 1 / 5, recall 3 / 4, words (6 + 7 + 5 + 4) / 4 = 5.5
        """
        lists = ['["dog", "bus"]', '```json\n["man", "woman", "man"]\n```', "['toilet', 'seat']", "I see nothing"]
        server = ScriptedServer(lambda call: lists[[text in call.text for text in FOUR].index(True)])
        answers = answers_of(bench, *FOUR)
        with server as url:
            run = objhal.JUDGE.ask(bench, answers, objhal.JUDGE.settings(url, "local"), tmp_path, tries=2)
        monkeypatch.setattr(objhal, "spacy_tagger", lambda: None)  # as where its pipeline is not installed
        found = score(bench, answers, run)
        assert found.protocol == "objhal-llm-fallback-tagger"
        values = {"response_level": 100 / 3, "chairs": 100 / 3, "mention_level": 20.0, "object_recall": 75.0}
        assert found.metrics == pytest.approx(values | {"mean_words": 5.5, "repeated_objects": 1 / 3})
        assert [item["wrong"] for item in found.items] == [True, False, False, None]
        assert (found.counts["unparsed"], found.counts["mentions"], len(server.calls)) == (1, 5, 5)
        judge = {"name": "local", "version": VERSION, "prompt_digest": bench.prompt_digest, "temperature": 0.0}
        assert found.judge == judge
        assert {call.body["temperature"] for call in server.calls} == {0.0}
        again = score(bench, answers, replay(tmp_path, objhal.judge_requests(bench, answers)))
        assert (again.items, again.metrics) == (found.items, found.metrics)
        assert "model: no readable list from the judge: 1 of 4" in format_table({"model": found})

    def test_a_request_that_fails_is_unparsed_too(self, bench, tmp_path):
        server = ScriptedServer(lambda call: failure(500) if "bus" in call.text else '["man"]')
        answers = answers_of(bench, FOUR[0], FOUR[1])
        with server as url:
            settings = ChatSettings(url, "local", retries=0)
            run = objhal.JUDGE.ask(bench, answers[::-1], settings, tmp_path)
        found = score(bench, answers, run, tagger=rule_tagger(VOCABULARY.words))
        assert [item["wrong"] is None for item in found.items] == [True, False]
        assert found.missing == ("102", "103")
        assert "model: no answer: 2 of 4" in format_table({"model": found})

    def test_answers_and_verdicts_must_fit(self, bench):
        answers = answers_of(bench, *FOUR)
        run = verdicts(bench, answers, "[]", "[]", "[]", "[]")
        with pytest.raises(ValueError, match=r"(?s)2 errors.*verdict on '102'.*verdict on '103': there is no such"):
            score(bench, answers[:2], run)
        with pytest.raises(ValueError, match="answer '103': no verdict"):
            score(bench, answers, replace(run, verdicts=run.verdicts[:3]))

    def test_rules_have_no_quirks(self, bench):
        with pytest.raises(ValueError, match="expected no official_quirks, got them; they are those of objhal-llm"):
            score(bench, answers_of(bench, *FOUR), official_quirks=True)


@pytest.mark.parametrize(
    "text, objects",
    [
        ('["dog", "cat"]', ["dog", "cat"]),
        ("[]", []),
        ("()", []),
        (" ( ). ", []),
        ("```json\n()\n```", None),
        ('```json\n["dog"]\n```', ["dog"]),
        ("Sure!\n['dog', 'cat']\nAnything else?", ["dog", "cat"]),
        ('{"objects": ["dog"]}', ["dog"]),
        ('Not ["cat"] but:\n["dog"]', ["dog"]),
        ('<think>["cat"]</think>["dog"]', ["dog"]),
        ('["dog", ["cat", "bird"]]', ["dog", "cat", "bird"]),  # all names of lists inside lists
        ('[["dog"], ["cat"]]', ["dog", "cat"]),
        ('[["dog", "cat"]]', ["dog", "cat"]),
        ('["dog [brown]", "cat",]', ["dog [brown]", "cat"]),
        ('See [1]: ["dog"]', ["dog"]),
        ('["dog" "cat"]', None),  # no comma: one name or two?
        ("['dog' 'cat', 'bird']", None),
        ('["dog""cat"]', None),
        ('["dog"] ["cat"]', None),  # which of the two?
        ('["dog"],\n["cat"]', None),
        ('["dog"] and ["cat"]', None),
        ('{"there": ["dog"], "absent": ["cat"]}', None),
        ('["dog"] or ["cat"]', None),
        ('["dog"] plus ["cat"]', None),
        ('["dog"], but also ["cat"]', None),
        ('Sentence 1: ["dog"]\nSentence 2: ["cat"]', None),
        ('Objects: ["dog"]\nNo other objects: []', None),
        ('["dog"]. I left out ["tree"], which is implied.', None),
        ('["dog", "cat"]\nFinal answer: ["dog"]', ["dog"]),
        ('["dog"]\nAgain: ["dog"]', ["dog"]),
        ('[1, ["dog"]]', None),
        ('["dog", cat]', None),
        ('["dog", null]', None),
        ('["dog",, "cat"]', None),
        ('["dog"] but ["cat", ', None),
        ('["object_1", ..., "object_n"]', None),
        ('["dog", "ca', None),
        ("[1, 2]", None),
        ("-1\n<no_response>", None),
        ("dog, cat", None),
        ("", None),
    ],
)
def test_reading_the_judges_list(text, objects):
    assert objhal.parse(text) == objects


class TestWhatTheJudgeNames:
    TAGGER = rule_tagger(VOCABULARY.words)

    def item(self, bench, text, objects, **others):
        answers = answers_of(bench, text)
        (item,) = score(
            bench, answers, verdicts(bench, answers, json.dumps(objects)), tagger=self.TAGGER, **others
        ).items
        return item

    def test_each_surface_string_counts_once(self, bench):
        item = self.item(bench, "Men, a man and a woman here.", ["Men", "man", "woman", "man"])
        assert [mention["surface"] for mention in item["mentions"]] == ["man", "woman"]

    def test_places_are_those_of_the_text_and_all_occurrences_are_marked(self, bench):
        item = self.item(bench, "A bus, two buses and a dog.", ["buses", "dog"])
        assert item["spans"] == [[2, 5], [11, 16]]
        assert [(m["surface"], m["start"], m["end"]) for m in item["mentions"]] == [("bus", 2, 5), ("dog", 23, 26)]
        assert item["repeated_objects"] == 1

    def test_what_the_text_does_not_say_counts_without_a_place(self, bench):
        item = self.item(bench, "Someone rides along the road.", ["bus"])
        assert [(m["surface"], m["start"], m["end"]) for m in item["mentions"]] == [("bus", 0, 0)]
        assert (item["spans"], item["wrong"]) == ([], True)

    def test_the_label_says_whose_nouns(self, bench):
        answers = answers_of(bench, *FOUR)
        run = verdicts(bench, answers, "[]", "[]", "[]", "[]")
        trf = Tagger("en_core_web_trf", self.TAGGER.words)
        assert score(bench, answers, run, tagger=trf).protocol == "objhal-llm"
        quirks = score(bench, answers, run, tagger=self.TAGGER, official_quirks=True)
        assert quirks.protocol == "objhal-llm-fallback-tagger-official-quirks"


class TestFaultsOfTheOfficialJudgePath:
    """One test per fault known of the original: none may come back, and official_quirks has those that are no crash."""

    TAGGER = rule_tagger(VOCABULARY.words)

    def mentioned(self, bench, text, reply, **quirks):
        answers = answers_of(bench, text)
        (item,) = score(bench, answers, verdicts(bench, answers, reply), tagger=self.TAGGER, **quirks).items
        return None if item["wrong"] is None else [mention["surface"] for mention in item["mentions"]]

    @pytest.mark.parametrize("quirks, calls, unparsed", [(False, 1, 0), (True, 3, 1)])
    def test_empty_parentheses_are_an_empty_list_and_not_asked_for_again(
        self, bench, tmp_path, quirks, calls, unparsed
    ):
        server = ScriptedServer(lambda call: "()")
        answers = answers_of(bench, FOUR[3])
        with server as url:
            settings = objhal.JUDGE.settings(url)
            run = objhal.JUDGE.ask(bench, answers, settings, tmp_path, tries=3, official_quirks=quirks)
        found = score(bench, answers, run, tagger=self.TAGGER, official_quirks=quirks)
        assert (len(server.calls), found.counts["unparsed"]) == (calls, unparsed)
        assert {call.body["temperature"] for call in server.calls} == {0.2 if quirks else 0.0}
        assert found.judge["temperature"] == (0.2 if quirks else 0.0)

    def test_no_response_is_no_crash(self, bench):
        assert self.mentioned(bench, FOUR[0], "-1\n<no_response>") is None
        assert self.mentioned(bench, FOUR[0], "-1\n<no_response>", official_quirks=True) is None

    def test_no_coco_object_at_all_is_undefined_not_a_division_by_zero(self, bench):
        answers = answers_of(bench, *FOUR)
        run = verdicts(bench, answers, '["sky"]', "[]", "[]", "[]")
        found = score(bench, answers, run, tagger=self.TAGGER)
        assert (found.metrics["response_level"], found.metrics["mention_level"]) == (None, None)

    def test_a_phrase_drops_no_noun(self, bench):
        reply = '["dog beneath traffic lights"]'
        assert self.mentioned(bench, FOUR[0], reply) == ["traffic light", "dog"]
        assert self.mentioned(bench, FOUR[0], reply, official_quirks=True) == ["traffic light"]

    def test_case_hides_nothing(self, bench):
        lemmas = {"a Bus": [("a", False), ("Bus", True)], "a iPhone": [("a", False), ("iPhone", True)]}
        words = {text: [Word(*w, 10 * i, 10 * i + 9) for i, w in enumerate(row)] for text, row in lemmas.items()}
        answers = answers_of(bench, FOUR[0])
        run = verdicts(bench, answers, '["Bus", "iPhone"]')
        ours = score(bench, answers, run, tagger=Tagger("t", words.get))
        theirs = score(bench, answers, run, tagger=Tagger("t", words.get), official_quirks=True)
        assert [m["node"] for m in ours.items[0]["mentions"]] == ["bus", "cell phone"]
        assert [m["surface"] for m in theirs.items[0]["mentions"]] == ["iPhone"]

    @pytest.mark.parametrize(
        "text, theirs",
        [('["dog"]', ["dog"]), ('Here:\n["dog"]', ["dog"]), ('["dog"]\nDone.', None), ("['dog']", None), ("()", None)],
    )
    def test_what_the_original_reads(self, text, theirs):
        assert objhal.parse_official(text) == theirs


@pytest.mark.skipif("DAMA_BENCH_DATA" not in os.environ, reason="DAMA_BENCH_DATA is not set")
class TestOfficialData:
    """The 300 questions, the official prompt and the ground truth."""

    @pytest.fixture(scope="class")
    def official(self):
        return objhal.load(Path(os.environ["DAMA_BENCH_DATA"]))

    def test_300_pictures_with_954_objects_and_8_prompts_in_turn(self, official):
        assert len(official.questions) == len(official.ground_truth) == 300
        assert sum(map(len, official.ground_truth.values())) == 954
        prompts = [question.prompt for question in official.questions]
        assert len(set(prompts)) == 8 and prompts[8:] == prompts[:-8]
        assert official.ground_truth["COCO_val2014_000000276731"] == frozenset()

    def test_captions_made_of_the_ground_truth_have_no_hallucination_and_full_recall(self, official):
        found = score(official, [Answer(q.id, "", q.prompt, q.truth) for q in official.questions])
        assert found.counts["objects_in_pictures"] == found.counts["mentions"] == 954
        assert (found.metrics["response_level"], found.metrics["object_recall"]) == (0.0, 100.0)
        assert found.counts["answers_without_object"] == 1  # picture 276731 holds none

    def test_lists_made_of_the_ground_truth_likewise(self, official):
        answers = [Answer(q.id, "", q.prompt, f"This picture clearly shows: {q.truth}.") for q in official.questions]
        lists = [json.dumps(sorted(official.ground_truth[q.image_id])) for q in official.questions]
        tagger = rule_tagger(official.vocabulary.words)
        found = score(official, answers, verdicts(official, answers, *lists), tagger=tagger)
        assert (found.counts["mentions"], found.counts["unparsed"]) == (954, 0)
        assert (found.metrics["mention_level"], found.metrics["object_recall"]) == (0.0, 100.0)
        assert found.protocol == "objhal-llm-fallback-tagger"
