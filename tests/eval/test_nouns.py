import json
import shutil
from pathlib import Path

import pytest

from eval.core.nouns import FALLBACK, nltk_tagger, rule_tagger, singularize, spacy_tagger

pytestmark = pytest.mark.fast

KNOWN = frozenset(
    ("dog", "man", "bench", "can", "watch", "water", "orange", "light", "painting", "glass", "train", "cup", "person",
     "female", "park", "bird")
)  # fmt: skip


def nouns(text, tagger=None):
    return [word.lemma for word in (tagger or rule_tagger(KNOWN)).words(text) if word.noun and word.lemma in KNOWN]


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
    assert singularize(plural, {singular}) == singular


@pytest.mark.parametrize("word", ["skis", "scissors", "bus", "sheep", "people", "children", "tennis", "oxen"])
def test_a_known_word_stays_as_it_is(word):
    assert singularize(word, {word, "ski", "scissor", "bu", "person", "child", "tenni", "ox"}) == word


@pytest.mark.parametrize("word, known", [("skies", "ski"), ("bass", "bas"), ("dress", "dres"), ("cat", "ca")])
def test_words_that_only_look_like_plurals(word, known):
    assert singularize(word, {known}) == word


class TestRules:
    @pytest.mark.parametrize(
        "text, expected",
        [
            ("The image features two brown dogs on a bench.", ["dog", "bench"]),
            ("People can be seen near the water.", ["person", "water"]),
            ("A can and a soda can stand beside some cans.", ["can", "can", "can"]),
            ("They watch the dog, and a man wears a watch.", ["dog", "man", "watch"]),
            ("He wants to park next to water, close to a park.", ["water", "park"]),
            ("An orange cup beside an orange.", ["cup", "orange"]),
            ("A light brown dog under the light.", ["dog", "light"]),
            ("A man painting a bird; the painting shows a train.", ["man", "bird", "painting", "train"]),
            ("A female skier and another female.", ["female"]),
            ("The boat can train them. Glasses!", ["glass"]),
        ],
    )
    def test_words_that_are_nouns_in_some_places_only(self, text, expected):
        assert nouns(text) == expected

    def test_places_in_the_text(self):
        text = "Two  Dogs, a man's cup"
        found = [text[word.start : word.end] for word in rule_tagger(KNOWN).words(text) if word.noun]
        assert found == ["Dogs", "man", "cup"]

    def test_marks_never_overlap(self):
        words = rule_tagger(KNOWN).words("A dog, two dogs and the men's watch on a bench near the water.")
        assert all(one.start < one.end <= other.start for one, other in zip(words, words[1:]))

    def test_it_has_the_label_of_the_fallback(self):
        assert rule_tagger(KNOWN).name == FALLBACK == "fallback-tagger"


class TestSpacy:
    """On a real pipeline that is as small as one can be: a table of tags and lemmas."""

    @pytest.fixture(scope="class")
    def pipeline(self, tmp_path_factory):
        import spacy

        nlp = spacy.blank("en")
        ruler = nlp.add_pipe("attribute_ruler")
        for word, tag, lemma in (("a", "DT", "a"), ("Traffic", "NNP", "Traffic"), ("lights", "NNS", "light")):
            ruler.add([[{"ORTH": word}]], {"TAG": tag, "LEMMA": lemma})
        folder = tmp_path_factory.mktemp("spacy") / "tiny"
        nlp.to_disk(folder)
        return str(folder)

    def test_lemmas_tags_and_places(self, pipeline):
        tagger = spacy_tagger(pipeline)
        assert [(w.lemma, w.noun) for w in tagger.words("a Traffic lights")] == [
            ("a", False), ("Traffic", True), ("light", True),
        ]  # fmt: skip
        assert [(w.start, w.end) for w in tagger.words("a Traffic lights")] == [(0, 1), (2, 9), (10, 16)]
        assert tagger.name == pipeline

    def test_a_pipeline_that_is_not_there_is_none(self, tmp_path):
        assert spacy_tagger(str(tmp_path / "none")) is None

    @pytest.mark.parametrize(
        ("old", "new"),
        [
            ('factory = "attribute_ruler"', 'factory = "curated_transformer"'),  # E002, as en_core_web_trf's without it
            ('"@scorers"', '"@no_such_registry"'),
            ('lang = "en"', 'lang = "none"'),
            ("[nlp]", "[nlp"),
        ],
    )
    def test_a_pipeline_that_cannot_be_made_is_none(self, pipeline, tmp_path, capsys, old, new):
        """A factory, a registry, a language that is not installed; a damaged configuration."""
        broken = Path(shutil.copytree(pipeline, tmp_path / "broken"))
        config = (broken / "config.cfg").read_text()
        changed = config.replace(old, new) if old in config else config.replace("[nlp]", new)
        assert changed != config
        (broken / "config.cfg").write_text(changed)
        assert spacy_tagger(str(broken)) is None
        assert "cannot be loaded: " in capsys.readouterr().out

    def test_a_pipeline_that_tags_nothing_is_none(self, tmp_path, capsys):
        import spacy

        spacy.blank("en").to_disk(tmp_path / "blank")
        assert spacy_tagger(str(tmp_path / "blank")) is None
        assert "has no tagger" in capsys.readouterr().out


def write_nltk_data(folder, tags, nouns):
    """Files of nltk's own format, with a handful of words in them."""
    home = folder / "taggers" / "averaged_perceptron_tagger_eng"
    home.mkdir(parents=True)
    for name, value in (("weights", {}), ("tagdict", tags), ("classes", sorted({*tags.values()}))):
        (home / f"averaged_perceptron_tagger_eng.{name}.json").write_text(json.dumps(value))
    punkt = folder / "tokenizers" / "punkt_tab" / "english"
    punkt.mkdir(parents=True)
    for name in ("collocations.tab", "sent_starters.txt", "abbrev_types.txt", "ortho_context.tab"):
        (punkt / name).write_text("")
    wordnet = folder / "corpora" / "wordnet"
    wordnet.mkdir(parents=True)
    parts = ("noun", "verb", "adj", "adv")
    for name in ("lexnames", "index.sense", *(f"{kind}.{part}" for kind in ("index", "data") for part in parts)):
        (wordnet / name).write_text("")
    for part in parts:
        (wordnet / f"{part}.exc").write_text("men man\n" if part == "noun" else "")
    (wordnet / "index.noun").write_text("".join(f"{noun} n 1 0 1 0 00000001\n" for noun in nouns))


class TestNltk:
    """On data in nltk's own formats."""

    TAGS = {"Dogs": "NNS", "dogs": "NNS", "TVs": "NNS", "run": "VBP", "``": "``", "''": "''", "men": "NNS", ".": "."}

    @pytest.fixture
    def data(self, tmp_path, monkeypatch):
        import nltk
        from nltk.corpus.reader import WordNetCorpusReader
        from nltk.corpus.util import LazyCorpusLoader

        write_nltk_data(tmp_path, self.TAGS, ["dog", "tv", "man"])
        monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
        monkeypatch.setattr(nltk.corpus, "wordnet", LazyCorpusLoader("wordnet", WordNetCorpusReader, None))

    @pytest.mark.filterwarnings("ignore:The multilingual functions")
    def test_lemmas_tags_and_places(self, data):
        text = 'Dogs run "TVs".'
        words = nltk_tagger().words(text)
        assert [(w.lemma, text[w.start : w.end]) for w in words if w.noun] == [("dog", "Dogs"), ("tv", "TVs")]
        assert [w.lemma for w in nltk_tagger(lower=False).words("Dogs dogs men") if w.noun] == ["Dogs", "dog", "man"]

    def test_without_data_it_is_none(self, tmp_path, monkeypatch):
        import nltk

        monkeypatch.setattr(nltk.data, "path", [str(tmp_path)])
        assert nltk_tagger() is None
