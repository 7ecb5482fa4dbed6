"""AMBER: the crediting of nouns step by step, figures on paper, the table of similar words, the official files."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from eval import amber
from eval.amber import Amber, Objects, describe, format_table, load, read_answer, score
from eval.core.nouns import Tagger, Word, rule_tagger
from eval.core.types import Answer

pytestmark = pytest.mark.fast

ASSOCIATIONS = {"person": ["man", "people"], "man": [], "road": ["street"], "street": [], "sky": [], "TV": [],
                "cloud": ["fog"], "dog": [], "shoe": [], "car": []}  # fmt: skip
GENERATIVE = {
    1: ("Describe this image.", ["person", "sky"], ["dog", "cloud"]),
    2: ("Describe this image.", ["TV", "road"], ["car"]),
}
QUESTIONS = [
    (3, "Is there a dog in this image?", "discriminative-hallucination", "no"),
    (4, "Is the sky blue in this image?", "discriminative-attribute-state", "yes"),
    (5, "Is the sky red in this image?", "discriminative-attribute-state", "no"),
    (6, "Is there direct contact between the man and the road?", "relation", "no"),
]
VECTORS = {
    "road": (1, 0),
    "street": (0.9, 0.1),
    "person": (0, 1),
    "man": (0.1, 0.9),
    "cloud": (1, -1),
    "sky": (0.5, -1),
}


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


@pytest.fixture
def folder(tmp_path):
    """The official files' formats, two pictures to describe and four questions."""
    home = tmp_path / "amber"
    generative = [{"id": i, "image": f"AMBER_{i}.jpg", "query": row[0]} for i, row in GENERATIVE.items()]
    asked = [{"id": i, "image": "AMBER_1.jpg", "query": text} for i, text, _, _ in QUESTIONS]
    annotations = [{"id": i, "type": "generative", "truth": t, "hallu": h} for i, (_, t, h) in GENERATIVE.items()]
    annotations += [{"id": i, "type": kind, "truth": truth} for i, _, kind, truth in QUESTIONS]
    write_json(home / "annotations.json", annotations[::-1])  # joined by id, whatever the order
    write_json(home / "query/query_generative.json", generative)
    write_json(home / "query/query_discriminative.json", asked)
    write_json(home / "relation.json", ASSOCIATIONS)
    (home / "safe_words.txt").write_text("shoe\nlight")
    return tmp_path


@pytest.fixture
def bench(folder):
    return load(folder)


TAGGER = rule_tagger(frozenset(word.lower() for word in amber.vocabulary_of(ASSOCIATIONS)))


def answers_to(bench, texts):
    prompts = {question.id: question.prompt for question in bench.questions}
    return [Answer(str(id_), "", prompts[str(id_)], text) for id_, text in texts.items()]


def scored(bench, texts, **quirks):
    return score(bench, answers_to(bench, texts), tagger=TAGGER, **quirks)


# ----------------------------------------------------------------------------------------------------- descriptions


class TestCrediting:
    """truth: person (associated: man, people), road (street), street; hallu: cloud (fog), dog, sky. Safe: shoe."""

    OBJECTS = Objects(("person", "road", "street"), ("cloud", "dog", "sky"))

    def describe(self, bench, *nouns, similar=None):
        found = describe(nouns, self.OBJECTS, replace(bench, similar=similar))
        return found.covered, found.imagined, [int(flag) for flag in found.hallucinated]

    def test_a_safe_word_is_not_hallucinated_and_earns_nothing(self, bench):
        assert self.describe(bench, "shoe") == (0, 0, [0])

    def test_a_truth_word_or_its_association_is_covered_once_however_often_it_is_said(self, bench):
        assert self.describe(bench, "person", "people", "man") == (1, 0, [0, 0, 0])

    def test_a_likely_invention_counts_as_imagined_and_hallucinated(self, bench):
        assert self.describe(bench, "dog", "fog", "cloud") == (0, 2, [1, 1, 1])

    def test_another_noun_is_hallucinated_only(self, bench):
        assert self.describe(bench, "car", "car") == (0, 0, [1, 1])

    def test_similar_to_a_truth_word_is_covered_and_not_hallucinated(self, bench):
        like = lambda one, other: one == other or {one, other} == {"car", "street"}  # noqa: E731
        assert self.describe(bench, "car", similar=like) == (1, 0, [0])

    def test_similar_to_both_is_imagined_and_covered(self, bench):
        """Steps d and e of the code: the first similar invention is credited, and the noun is right all the same."""
        like = lambda one, other: one == other or {one, other} in ({"car", "dog"}, {"car", "road"})  # noqa: E731
        assert self.describe(bench, "car", similar=like) == (1, 1, [0])

    def test_equal_to_one_invention_and_similar_to_an_earlier_one_credits_both(self, bench):
        like = lambda one, other: one == other or {one, other} == {"sky", "cloud"}  # noqa: E731
        assert self.describe(bench, "sky", similar=like) == (0, 2, [1])

    def test_an_earlier_association_shadows_a_later_truth_word(self, bench):
        """As "street" belongs to road, the truth word street is never covered; Cover without shadowing finds it."""
        assert self.describe(bench, "street", "road", "person") == (2, 0, [0, 0, 0])
        found = describe(["street", "road", "person"], self.OBJECTS, bench)
        assert found.parts(self.OBJECTS, 3)["cover_unshadowed"] == [300.0, 3]


def test_figures_on_paper(bench):
    """Picture 1, truth person sky, likely dog cloud. "A man, a dog, a dog under the sky." -> man dog dog sky.

    man covers person, sky sky; both dogs are wrong, dog is a likely invention.
    Picture 2, truth TV road, likely car. "A tv and nothing more." -> TV, which covers TV.
    CHAIR 2 / 5 = 40, Cover 3 / 4 = 75, Hal 1 / 2 = 50, Cog 1 / 3 = 33.3 by the code and 2 / 5 = 40 by the paper,
    words (9 + 5) / 2 = 7.
    """
    found = scored(bench, {1: "A man, a dog, a dog under the sky.", 2: "A tv and nothing more."})
    expected = {"chair": 40.0, "cover": 75.0, "hal": 50.0, "cog": 100 / 3, "cog_paper": 40.0, "cover_unshadowed": 75.0}
    expected["mean_words"] = 7.0
    assert {name: found.metrics[name] for name in expected} == pytest.approx(expected)
    assert found.protocol == "amber-exact-match-fallback-tagger"
    assert found.counts == {"answers": 2, "missing": 0, "unparsed": 0}
    first, second = found.items
    assert (first["wrong"], first["truth"], first["spans"]) == (True, ["person", "sky"], [[9, 12], [16, 19]])
    assert (first["id"], first["image_id"], first["image"]) == ("1", "AMBER_1", "AMBER_1.jpg")
    assert second["nouns"] == [{"noun": "TV", "start": 2, "end": 4, "correct": True}]
    assert json.loads(json.dumps(found.items)) == list(found.items)
    assert found.metrics["amber_score"] is None
    assert found.interval("chair").value == pytest.approx(40.0)


def test_nothing_to_divide_by_is_undefined(bench):
    found = scored(bench, {1: "Quiet."})
    assert (found.metrics["chair"], found.metrics["cog_paper"], found.metrics["cover"]) == (None, None, 0.0)
    assert "n/a" in format_table({"model": found})
    assert found.missing == ("2",)


# -------------------------------------------------------------------------------------------------------- questions


def test_questions_on_paper(bench):
    """Right answers no, yes, no, no; said No, yes., nothing readable, Yes. The positive class is no.

    accuracy 2 / 4, precision 1 / 1, recall 1 / 3, F1 2 / (1 + 3) = 50 %; attribute: accuracy 1 / 2, precision 0 / 0,
    recall 0 / 1, F1 0; existence 100 %; relation: recall 0 / 1.
    """
    found = scored(bench, {3: "No", 4: "yes.", 5: "It is hard to tell.", 6: "Yes, it is."})
    values = {"accuracy": 50.0, "precision": 100.0, "recall": 100 / 3, "f1": 50.0}
    assert {name: found.metrics[name] for name in values} == pytest.approx(values)
    attribute = [found.metrics[f"attribute_{name}"] for name in amber.RATIOS]
    assert attribute == [50.0, None, 0.0, 0.0] == [found.metrics[f"state_{name}"] for name in amber.RATIOS]
    assert [found.metrics[f"existence_{name}"] for name in amber.RATIOS] == [100.0] * 4
    assert (found.metrics["relation_recall"], found.metrics["action_f1"]) == (0.0, None)
    assert [item["wrong"] for item in found.items] == [False, False, None, True]
    assert (found.protocol, found.counts["unparsed"], found.counts["missing"]) == ("amber", 1, 0)
    assert "1 of 4" in format_table({"model": found})


def test_the_amber_score_on_paper(bench):
    """CHAIR 50 (one of man, dog), F1 of "no" 100 on the one question asked: (100 - 50 + 100) / 2 = 75."""
    found = scored(bench, {1: "A man and a dog.", 3: "No"})
    assert found.metrics["amber_score"] == pytest.approx(75.0)
    assert found.missing == ("2", "4", "5", "6")
    assert "model: no answer: 4 of " in format_table({"model": found})


@pytest.mark.parametrize(
    "text, said",
    [
        ("Yes", "yes"), ("no", "no"), (" NO.", "no"), ("**Yes**, it is", "yes"), ("No, there is none", "no"),
        ("Not at all", None), ("Nothing", None), ("", None), ("The answer is yes", None), ("Yesterday", None),
    ],
)  # fmt: skip
def test_the_leading_yes_or_no(text, said):
    assert amber.read_answer(text) == said


def test_requests_and_decoding_by_part(bench):
    assert [request.id for request in amber.BENCHMARK.requests(bench, amber.BENCHMARK.parts[0])] == ["1", "2"]
    (first, *_) = amber.BENCHMARK.requests(bench, amber.BENCHMARK.parts[1])
    assert (first.id, first.prompt, first.image) == ("3", "Is there a dog in this image?", "AMBER_1.jpg")
    assert amber.DECODING["generative"] == {"max_new_tokens": 1024, "num_beams": 1, "temperature": 0.0}
    assert amber.DECODING["discriminative"] == {"max_new_tokens": 16, "num_beams": 1, "temperature": 0.0}


class TestFaultsOfTheOfficialScorer:
    """One test per fault known of the original; with official_quirks they are back."""

    def test_yes_and_no_are_read_in_any_dress(self, bench):
        said = {3: "no", 4: "Yes."}
        assert scored(bench, said).metrics["accuracy"] == 100.0
        quirks = scored(bench, said, official_quirks=True)
        assert (quirks.metrics["accuracy"], quirks.counts["unparsed"]) == (0.0, 2)
        assert quirks.protocol == "amber-official-quirks"

    def test_cog_as_the_paper_defines_it_stands_beside_the_codes(self, bench):
        """Of dog dog sky two are likely inventions: 2 / 3; of the two likely inventions one is named: 1 / 2."""
        found = scored(bench, {1: "A dog, a dog, the sky."})
        assert (found.metrics["cog"], found.metrics["cog_paper"]) == pytest.approx((50.0, 200 / 3))

    def test_nouns_are_compared_in_lower_case(self, bench):
        """The tagger's lemmas keep the capital of a sentence's first word."""
        keeps_case = Tagger("nltk", lambda text: [Word(text[:3], True, 0, 3)])
        answers = answers_to(bench, {1: "Dog"})
        assert score(bench, answers, tagger=keeps_case).metrics["chair"] == 100.0
        assert score(bench, answers, tagger=keeps_case, official_quirks=True).metrics["chair"] is None

    def test_figures_are_not_rounded_before_they_are_used(self, bench):
        """One "no" of three is found: R = 33.33... %, not 33.3 %, and F1 = 2 / (1 + 3)."""
        said = {3: "No", 5: "Yes", 6: "Yes"}
        assert scored(bench, said).metrics["recall"] == 100 / 3
        assert scored(bench, said).metrics["f1"] == 50.0
        assert scored(bench, said, official_quirks=True).metrics["recall"] == 33.3

    def test_a_table_of_a_model_without_vectors_is_refused(self, folder, tmp_path):
        """The small spaCy models have no word vectors, and similarities that mean something else."""
        import spacy

        spacy.blank("en").to_disk(tmp_path / "blank")
        with pytest.raises(ValueError, match="has no word vectors.*\nRemedy: use en_core_web_lg"):
            amber.write_similar_words(folder, str(tmp_path / "blank"))


# ---------------------------------------------------------------------------------------------------- similar words


class TestSimilarWords:
    """Cosines of VECTORS: road-street 0.994, person-man 0.994, cloud-sky 0.949, cloud-road 0.707, all others lower."""

    @pytest.fixture
    def model(self, tmp_path):
        import spacy

        nlp = spacy.blank("en")
        for word, vector in VECTORS.items():
            nlp.vocab.set_vector(word, np.array(vector, dtype=np.float32))
        nlp.to_disk(tmp_path / "model")
        return str(tmp_path / "model")

    def test_computed_once_and_used_afterwards(self, folder, model):
        assert amber.main([str(folder), "--model", model]) == 0
        table = json.loads((folder / "amber" / "similar_words.json").read_text())
        assert table["similar"] == [["cloud", "sky"], ["man", "person"], ["road", "street"]]
        assert table["words"] == sorted({*ASSOCIATIONS, "people", "fog"})
        bench = load(folder)
        assert bench.similar("sky", "cloud") and bench.similar("fog", "fog") and not bench.similar("road", "cloud")
        found = scored(bench, {1: "A cloud."})  # similar to the sky, which is there
        assert (found.metrics["chair"], found.metrics["cog"], found.metrics["cover"]) == (0.0, 50.0, 50.0)
        assert found.protocol == "amber-model-fallback-tagger"  # whose vectors, where they are not the published ones

    def test_with_the_published_model_the_protocol_names_none(self, bench):
        similar = amber.SimilarWords("en_core_web_lg", frozenset())
        answers = answers_to(bench, {1: "A dog."})
        found = score(replace(bench, similar=similar), answers, tagger=Tagger("nltk", TAGGER.words))
        assert found.protocol == "amber"

    def test_a_table_that_was_changed_is_refused(self, folder, model):
        path = amber.write_similar_words(folder, model)
        path.write_text(path.read_text().replace('"sky"', '"dog"', 1))
        with pytest.raises(ValueError, match="expected content of the digest that it names, got another\nRemedy: dele"):
            load(folder)

    def test_a_table_for_other_words_is_refused(self, folder, model):
        amber.write_similar_words(folder, model)
        write_json(folder / "amber" / "relation.json", ASSOCIATIONS | {"cat": []})
        with pytest.raises(ValueError, match="made for 12 words, not for relation.json's"):
            load(folder)

    def test_without_the_model_it_says_what_to_install(self, folder, capsys):
        assert amber.main([str(folder), "--model", "no_such_model"]) == 2
        assert "python -m spacy download no_such_model" in capsys.readouterr().err


class TestLoading:
    def test_a_part_without_its_file_is_left_out(self, folder):
        (folder / "amber/query/query_generative.json").unlink()
        (folder / "amber/relation.json").unlink()
        bench = load(folder)
        assert isinstance(bench, Amber)
        assert [question.id for question in bench.questions] == ["3", "4", "5", "6"]
        (folder / "amber/query/query_discriminative.json").unlink()
        with pytest.raises(ValueError, match=r"(?s)query_generative.json: missing.*query_discriminative.json: missing"):
            load(folder)

    def test_all_faults_at_once(self, folder):
        path = folder / "amber/query/query_discriminative.json"
        rows = json.loads(path.read_text())
        write_json(path, [*rows, rows[0], {"id": 77, "image": "x.jpg", "query": "?"}, rows[0] | {"id": 1}])
        with pytest.raises(ValueError, match=r"(?s)3 errors.*with id 77, got.*with id 1, got.*1 ids are used twice"):
            load(folder)

    def test_an_answer_to_another_question_is_refused(self, bench):
        with pytest.raises(ValueError, match="answer '3': to 'Is it day"):
            score(bench, [Answer("3", "", "Is it day?", "No")])


# -------------------------------------------------------------------------------------------------- official files


@pytest.mark.skipif("DAMA_BENCH_DATA" not in os.environ, reason="DAMA_BENCH_DATA is not set")
class TestOfficialData:
    @pytest.fixture(scope="class")
    def official(self):
        return replace(load(Path(os.environ["DAMA_BENCH_DATA"])), similar=None)

    def figures(self, official, which):
        """Equal words only, every response naming just the objects in one list."""
        sums = {}
        for objects in official.objects.values():
            for name, (above, below) in describe(objects[which], objects, official).parts(objects, 1).items():
                sums[name] = np.add(sums.get(name, 0), (above, below))
        return {name: round(above / below, 1) for name, (above, below) in sums.items()}

    def test_nouns_that_are_the_truth(self, official):
        found = self.figures(official, 0)
        assert [found[name] for name in ("chair", "cover", "hal", "cog")] == [0.0, 93.3, 0.0, 0.0]
        assert found["cover_unshadowed"] == 100.0  # where the code cannot get beyond 93.3

    def test_nouns_that_are_the_likely_inventions(self, official):
        found = self.figures(official, 1)
        assert [found[name] for name in ("chair", "cover", "hal", "cog")] == [91.9, 2.5, 100.0, 90.8]
        assert found["cog_paper"] == 100.0

    def test_words_and_questions_as_counted(self, official):
        assert (len(official.vocabulary), len(official.safe_words), len(official.objects)) == (418, 9, 1004)
        truth = [question.truth for question in official.part("discriminative")]
        assert (truth.count("yes"), truth.count("no")) == (4789, 9427)

    @pytest.mark.parametrize("quirks", [False, True])
    def test_always_no(self, official, quirks):
        """9427 / 14216 = 66.3 %, recall 100 %, F1 = 2 * 9427 / (14216 + 9427) = 79.7 %."""
        answers = [Answer(q.id, "", q.prompt, "No") for q in official.part("discriminative")]
        found = score(official, answers, official_quirks=quirks).metrics
        assert [round(found[name], 1) for name in amber.RATIOS] == [66.3, 66.3, 100.0, 79.7]
        assert (found["existence_accuracy"], round(found["attribute_accuracy"], 1)) == (100.0, 50.0)

    def test_descriptions_made_of_the_truth_through_the_rules(self, official):
        """From text to figures: the rule-based finder may lose a noun, but never makes one up."""
        questions = official.part("generative")
        answers = [Answer(q.id, "", q.prompt, f"There is: {q.truth}.") for q in questions]
        tagger = rule_tagger(frozenset(word.lower() for word in official.vocabulary))
        found = score(official, answers, tagger=tagger).metrics
        assert (found["chair"], found["hal"], found["cog"]) == (0.0, 0.0, 0.0)
        assert found["cover"] > 92


@pytest.mark.parametrize(
    ("text", "said"),
    [("No idea.", None), ("No way to tell", None), ("Yes or no", None), ("No, or yes", None), ("no clue", None),
     ("No, I'm not sure why", "no"), ("Yes, no doubt", "yes"), ("I can't tell", None)],
)  # fmt: skip
def test_an_answer_that_says_neither_is_unparsed(text, said):
    assert read_answer(text) == said
