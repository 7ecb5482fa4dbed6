"""Object HalBench by rules: words, plurals, two-word rules, the metrics on paper, the faults of the official scorer."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from eval.core.types import Answer
from eval.objhal import (
    METRICS,
    Mention,
    ObjectVocabulary,
    difference,
    format_table,
    score_captions,
    singularise,
)

LINES = [
    "person, man, woman, child, baby, adult, policeman",
    "dog, puppy",
    "bear",
    "bus",
    "train",
    "airplane, plane, jet",
    "traffic light, street light",
    "tie, bow, bow tie",
    "skis, ski",
    "wine glass",
    "knife",
    "chair, seat",
    "toilet",
    "oven, stove, stove top oven",
    "cell phone, iPhone",
    "scissors",
    "",
]
VOCABULARY = ObjectVocabulary.from_synonym_lines(LINES)


def nodes(text, vocabulary=VOCABULARY):
    return [mention.node for mention in vocabulary.mentions(text)]


def surfaces(text, vocabulary=VOCABULARY):
    return [mention.surface for mention in vocabulary.mentions(text)]


def answer(text, image="1", id="a"):
    return Answer(id, image, "Describe.", text)


def test_mentions_carry_offsets_of_the_text_as_written():
    text = "Two Men watch the Traffic  Lights."
    man, light = VOCABULARY.mentions(text)
    assert (man, light) == (Mention("man", "person", 4, 7), Mention("traffic light", "traffic light", 18, 33))
    assert [text[m.start : m.end] for m in (man, light)] == ["Men", "Traffic  Lights"]


def test_offsets_survive_letters_that_change_length_in_lower_case():
    text = "İİ dog"  # lower() would make each capital two characters long
    (mention,) = VOCABULARY.mentions(text)
    assert text[mention.start : mention.end] == "dog"


@pytest.mark.parametrize(
    "plural, singular",
    [
        ("dogs", "dog"), ("buses", "bus"), ("boxes", "box"), ("couches", "couch"), ("dishes", "dish"),
        ("glasses", "glass"), ("vases", "vase"), ("horses", "horse"), ("oranges", "orange"), ("knives", "knife"),
        ("calves", "calf"), ("gloves", "glove"), ("stoves", "stove"), ("puppies", "puppy"), ("ties", "tie"),
        ("taxis", "taxi"), ("buffaloes", "buffalo"), ("canoes", "canoe"), ("sofas", "sofa"), ("men", "man"),
        ("women", "woman"), ("policemen", "policeman"), ("children", "child"), ("grandchildren", "grandchild"),
        ("mice", "mouse"), ("geese", "goose"), ("oxen", "ox"), ("people", "person"), ("thieves", "thief"),
        ("tvs", "tv"),
    ],
)  # fmt: skip
def test_plurals(plural, singular):
    assert singularise(plural, {singular}) == singular


@pytest.mark.parametrize("word", ["skis", "scissors", "bus", "sheep", "people", "children", "tennis", "oxen"])
def test_a_known_word_stays_as_it_is(word):
    assert singularise(word, {word, "ski", "scissor", "bu", "person", "child", "tenni", "ox"}) == word


@pytest.mark.parametrize("word, known", [("skies", "ski"), ("bass", "bas"), ("dress", "dres"), ("cat", "ca")])
def test_words_that_only_look_like_plurals(word, known):
    assert singularise(word, {known}) == word


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a traffic light", ["traffic light"]),
        ("a stop traffic, light", []),
        ("a baby bear and an adult bear", ["bear", "bear"]),
        ("a baby", ["person"]),
        ("two baby dogs", ["dog"]),
        ("a passenger jet", ["airplane"]),
        ("passenger trains", ["train"]),
        ("a bow tie", ["tie"]),
        ("a bow and a tie", ["tie", "tie"]),
        ("wine glasses", ["wine glass"]),
        ("a glass of wine", []),
        ("train tracks", []),
        ("a train on the train track", ["train"]),
        ("a stove top oven", ["oven"]),
        ("a stove, an oven", ["oven", "oven"]),
        ("a toilet seat", ["toilet"]),
        ("a toilet with its seat", ["toilet"]),
        ("a seat", ["chair"]),
        ("the man's dog", ["person", "dog"]),
        ("the dogs' man", ["dog", "person"]),
        ("a dog-like robot", []),
        ("dog/bear", ["dog", "bear"]),
        ("a pair of scissors, skis", ["scissors", "skis"]),
    ],
)
def test_words_and_phrases(text, expected):
    assert nodes(text) == expected


def test_mapping_includes_the_node_itself_and_the_shared_phrase_rules():
    vocabulary = ObjectVocabulary.from_mapping({"train": (), "potted plant": ("houseplant", "plant")})
    assert nodes("Trains, potted plants, plants, train tracks", vocabulary) == ["train", "potted plant", "potted plant"]
    assert vocabulary.nodes == {"train", "potted plant"}


def test_a_phrase_that_is_its_own_node_is_not_redirected():
    """CHAIR's rule "bow tie" -> tie would lose the object in a vocabulary that has no tie."""
    assert nodes("a bow tie", ObjectVocabulary.from_mapping({"bow tie": ()})) == ["bow tie"]


def test_a_word_of_two_nodes_is_refused():
    with pytest.raises(ValueError, match="'seat' belongs to 'chair' and to 'bench'"):
        ObjectVocabulary.from_mapping({"chair": ("seat",), "bench": ("seat",)})


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
    values = {name: interval.value for name, interval in score.metrics.items()}
    assert values == pytest.approx(
        {
            "response_level": 50.0,
            "chairs": 100 / 3,
            "mention_level": 25.0,
            "object_recall": 50.0,
            "mean_words": 4.0,
            "repeated_objects": 1 / 3,
        }
    )
    assert all(interval.low <= interval.value <= interval.high for interval in score.metrics.values())
    assert score.protocol == "objhal-rules"
    assert score.counts() == {
        "answers": 3,
        "answers_without_object": 1,
        "mentions": 4,
        "hallucinated_mentions": 1,
        "objects_in_pictures": 4,
    }


def test_every_occurrence_counts():
    """Three times dog and one bus: 1 of 4. Counting surfaces once, as the judge mode does, would give 1 of 2."""
    score = score_captions([answer("dog dog dog bus")], {"1": ["dog"]}, VOCABULARY)
    assert score.metrics["mention_level"].value == 25.0


def test_item_record_and_spans():
    (item,) = score_captions([answer("A dog near a bus.")], {"1": ["dog", "bear"]}, VOCABULARY).items
    assert item.spans() == [(2, 5, "correct"), (13, 16, "hallucinated")]
    record = item.record()
    assert json.loads(json.dumps(record)) == record
    assert record["missed"] == ["bear"]
    assert record["mentions"][1] == {"surface": "bus", "node": "bus", "start": 13, "end": 16, "correct": False}


def test_repetition_is_of_the_same_word():
    texts = {"a": "a man and a woman", "b": "a dog, two dogs, a dog and a bus, a bus"}
    captions = [answer(text, id=name) for name, text in texts.items()]
    assert [item.repeated for item in score_captions(captions, {"1": []}, VOCABULARY).items] == [0, 2]


class TestFaultsOfTheOfficialScorer:
    """One test per fault known of the original: none may come back."""

    def test_nothing_mentioned_is_undefined_not_a_division_by_zero(self):
        score = score_captions([answer("A quiet scene.")], {"1": []}, VOCABULARY)
        assert score.metrics["response_level"].value is None
        assert score.metrics["mention_level"].value is None
        assert score.metrics["object_recall"].value is None
        assert score.metrics["chairs"].value == 0.0
        assert "n/a" in format_table({"model": score})

    def test_no_caption_at_all_is_undefined(self):
        assert all(interval.value is None for interval in score_captions([], {}, VOCABULARY).metrics.values())

    def test_a_phrase_does_not_drop_the_other_nouns(self):
        assert nodes("a traffic light beside a dog and a man") == ["traffic light", "dog", "person"]

    def test_case_hides_nothing(self):
        assert nodes("A TRAFFIC LIGHT, a Dog and an iPhone") == ["traffic light", "dog", "cell phone"]

    @pytest.mark.parametrize("text", ["()", "[]", "", "-1\n<no_response>", "Assistant:"])
    def test_empty_and_broken_answers_are_scored_as_naming_nothing(self, text):
        (item,) = score_captions([answer(text)], {"1": ["dog"]}, VOCABULARY).items
        assert (item.mentions, item.record()["missed"]) == ((), ["dog"])

    def test_the_same_input_has_the_same_score(self):
        captions = [answer("dog bus" if i % 3 else "bear", str(i), str(i)) for i in range(30)]
        truth = {str(i): ["dog"] for i in range(30)}
        first, again = (score_captions(captions, truth, VOCABULARY).metrics for _ in range(2))
        assert first == again


def test_the_speaker_tag_is_no_word():
    (item,) = score_captions([answer("Assistant: A  dog\n\nsleeps.")], {"1": ["dog"]}, VOCABULARY).items
    assert item.words == 3


def test_picture_without_ground_truth_is_named():
    with pytest.raises(ValueError, match="answer 'a': image_id '9' is not among the 1 pictures with ground truth"):
        score_captions([answer("dog", "9")], {"1": ["dog"]}, VOCABULARY)


def test_ground_truth_outside_the_vocabulary_is_named():
    with pytest.raises(ValueError, match=r"ground truth of picture '1': \['unicorn'\] are no nodes"):
        score_captions([answer("dog")], {"1": ["dog", "unicorn"]}, VOCABULARY)


def test_paired_difference_on_paper():
    """8 pictures, two objects named in each: one model always errs in the second, the other never: 50 - 0."""
    truth = {str(i): ["dog", "bear"] for i in range(8)}
    wrong = score_captions([answer("dog bus", i, i) for i in truth], truth, VOCABULARY)
    right = score_captions([answer("dog bear", i, i) for i in reversed(truth)], truth, VOCABULARY)
    changes = difference(wrong, right)
    assert changes.keys() == METRICS.keys()
    assert changes["mention_level"] == (50.0, 50.0, 50.0)
    assert changes["object_recall"] == (-50.0, -50.0, -50.0)
    with pytest.raises(ValueError, match="1 question ids are in one of the two scores only"):
        difference(wrong, score_captions([answer("dog", i, i) for i in list(truth)[1:]], truth, VOCABULARY))


def test_table_is_aligned():
    good = score_captions([answer("dog")], {"1": ["dog"]}, VOCABULARY)
    table = format_table({"SFT": good, "a longer name": good})
    heading, *rows = table.splitlines()
    for title in ("response-level", "mention-level", "object recall", "mean words", "repeated objects"):
        assert title in heading
    assert len({len(line) for line in (heading, *rows)}) == 1
    assert "100.0 [100.0, 100.0]" in rows[0]
    assert rows[1].startswith("a longer name")


@pytest.mark.skipif("DAMA_BENCH_DATA" not in os.environ, reason="DAMA_BENCH_DATA is not set")
class TestOfficialData:
    """The official synonym file, its two-word rules and the ground truth of the 300 pictures."""

    @pytest.fixture(scope="class")
    def folder(self):
        return Path(os.environ["DAMA_BENCH_DATA"]) / "objhal"

    @pytest.fixture(scope="class")
    def vocabulary(self, folder):
        return ObjectVocabulary.from_synonym_lines((folder / "synonyms_refine.txt").read_text().splitlines())

    @pytest.fixture(scope="class")
    def truth(self, folder):
        return json.loads((folder / "gt_objects_300.json").read_text())

    def test_80_nodes_and_407_words(self, vocabulary):
        assert (len(vocabulary.nodes), len(vocabulary.node_of)) == (80, 407)

    def test_every_synonym_is_found_as_itself_and_as_its_plural(self, vocabulary):
        uncountable = {"people", "children", "cattle", "oxen", "skis", "scissors"}
        for word, node in vocabulary.node_of.items():
            assert nodes(word, vocabulary) == [node], word
            if word not in uncountable:
                assert nodes(f"two {plural_of(word)}", vocabulary) == [node], plural_of(word)

    @pytest.mark.parametrize("age", ["baby", "adult"])
    @pytest.mark.parametrize(
        "animal", ["bird", "cat", "dog", "horse", "sheep", "cow", "elephant", "bear", "zebra", "giraffe"]
    )
    def test_young_and_old_animals_are_no_persons(self, vocabulary, age, animal):
        assert surfaces(f"the {age} {animal}", vocabulary) == [animal]

    @pytest.mark.parametrize(
        "text, expected",
        [
            ("baby animals", []), ("an adult cub", []), ("passenger jets", ["airplane"]),
            ("a passenger train", ["train"]),
            ("a passenger", ["person"]), ("bow ties", ["tie"]), ("a toilet seat", ["toilet"]), ("a seat", ["chair"]),
            ("wine glasses", ["wine glass"]), ("a wine glas", ["wine glass"]), ("home plate", []), ("train tracks", []),
            ("motor bikes", ["motorcycle"]), ("a sports ball", ["sports ball"]), ("tennis rackets", ["tennis racket"]),
            ("remote controls", ["remote"]), ("coffee tables", ["dining table"]), ("laptop computers", ["laptop"]),
            ("a pedestrian and her brother", ["person", "person"]), ("hot dogs", ["hot dog"]),
            ("teddy bears", ["teddy bear"]), ("fire hydrants", ["fire hydrant"]), ("street lights", ["traffic light"]),
            ("pocketknives", ["knife"]), ("knives", ["knife"]), ("iPhones", ["cell phone"]),
        ],
    )  # fmt: skip
    def test_two_word_rules(self, vocabulary, text, expected):
        assert nodes(text, vocabulary) == expected

    def test_captions_made_of_the_ground_truth_have_no_hallucination_and_full_recall(self, vocabulary, truth):
        captions = [answer(", ".join(objects), image, image) for image, objects in truth.items()]
        score = score_captions(captions, truth, vocabulary)
        assert score.counts()["objects_in_pictures"] == 954
        assert score.counts()["mentions"] == 954
        assert score.metrics["response_level"].value == 0.0
        assert score.metrics["object_recall"].value == 100.0
        assert score.counts()["answers_without_object"] == 1  # picture 276731 holds none


def plural_of(word):
    """The spelling of an English plural, by rules independent of the code under test."""
    head, _, last = word.rpartition(" ")
    irregular = {"man": "men", "woman": "women", "child": "children", "mouse": "mice", "goose": "geese", "ox": "oxen"}
    irregular |= {"calf": "calves", "knife": "knives", "thief": "thieves", "person": "people"}
    for ending, replacement in irregular.items():
        if last.endswith(ending) and (last == ending or ending in ("man", "child", "knife")):
            return f"{head} {last.removesuffix(ending)}{replacement}".strip()
    if last.endswith("y") and last[-2] not in "aeiou":
        last = last[:-1] + "ie"
    elif last.endswith(("s", "x", "ch", "sh")):
        last += "e"
    return f"{head} {last}s".strip()
