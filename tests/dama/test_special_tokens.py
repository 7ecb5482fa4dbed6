"""Special tokens that are spelled out in data stay text: for the CLIP, rewards, responders, splitters and painters."""

import copy

import pytest
from PIL import Image
from transformers import LlamaConfig, LlamaForCausalLM

from dama.hardness.clip import load_clip
from dama.hardness.split_llm import local_splitter
from dama.special_tokens import BREAK, escaped
from dama.synth.respond import Question, Sampling
from dama.synth.rewards import ImageTextReward, Judged, TextReward
from tests.dama.test_synth_models import (
    TEMPLATE,
    TEXT_IDS,
    TOWER,
    word_tokenizer,
    write_image_text_reward,
    write_pipeline,
    write_responder,
    write_text_reward,
)
from tests.dama.tiny_clip import MODEL_CFG, write_tiny_clip

EXTRA = "<|end|>"  # a special token that no text can spell with words of the vocabulary


# ---------------------------------------------------------------------------------------------------------------- CLIP


@pytest.fixture(scope="module")
def scorer(tmp_path_factory):
    return load_clip(str(write_tiny_clip(tmp_path_factory.mktemp("clip") / "tiny")), None, "cpu")


@pytest.mark.parametrize("text", [
    "A cat.<end_of_text> And a dog.", "<start_of_text>", "a <end_of_text><end_of_text>", "<<end_of_text>>",
    "A &lt;end_of_text&gt; cat", "A &amp;lt;end_of_text&amp;gt; cat", "A <END_OF_TEXT> cat", "?<end_of_text>!",
    "&amp;amp;lt;end_of_text&amp;amp;gt; <end_of_text>", "<end_of_\u200btext> <end_of_text>",
])  # fmt: skip
def test_clip_reads_the_spelling_of_a_special_token_as_text(text, scorer):
    tokenizer = scorer.tokens.tokenizer
    ids = scorer.tokens.ids(text)
    assert [token for token in ids if token in tokenizer.all_special_ids] == tokenizer.all_special_ids
    assert ids[0] == tokenizer.sot_token_id and ids[-1] == tokenizer.eot_token_id
    shown = tokenizer.decode(ids[1:-1]).replace(" ", "")
    assert shown == tokenizer.clean_fn(text).replace(" ", "")


def test_what_follows_it_counts(scorer):
    """CLIP pools at the first end token: without the change the dog would not be seen."""
    cat, dog, alone = scorer.encode_texts(["a cat <end_of_text> a cat", "a cat <end_of_text> a dog", "a cat"])
    assert (cat - dog).abs().max() > 1e-4 and (cat - alone).abs().max() > 1e-4


@pytest.mark.parametrize("text", ["A cat.", "a < b > c", "x &amp; y &lt;b&gt;", "end_of_text", "", "图中 it's 3rd!"])
def test_other_texts_keep_their_ids(text, scorer):
    tokenizer = scorer.tokens.tokenizer
    assert scorer.tokens.ids(text)[1:-1] == tokenizer.encode(text)


def test_a_clip_with_a_tokenizer_of_hugging_face(tmp_path):
    tokenizer = word_tokenizer(77)
    tokenizer.add_special_tokens({"extra_special_tokens": [EXTRA]})
    config = copy.deepcopy(MODEL_CFG)
    config["text_cfg"]["hf_tokenizer_name"] = str(tmp_path / "clip")
    tokenizer.save_pretrained(write_tiny_clip(tmp_path / "clip", config=config))
    tokens = load_clip(str(tmp_path / "clip"), None, "cpu").tokens
    special = tokenizer.convert_tokens_to_ids(EXTRA)
    text = f"a dog {EXTRA} a cat"
    assert special not in tokens.ids(text) and special not in tokens.batch([text], [])
    assert tokens.ids("a dog") == tokenizer("a dog").input_ids


# ------------------------------------------------------------------------------------------------------ Hugging Face's


def add_extra(folder):
    """The tokenizer in the folder gets EXTRA, whose id is returned."""
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [EXTRA]})
    (folder / "tokenizer.json").write_text(tokenizer.backend_tokenizer.to_str())
    return tokenizer.convert_tokens_to_ids(EXTRA)


@pytest.mark.parametrize("template", [TEMPLATE, None], ids=["chat template", "pair"])
def test_a_text_reward(template, tmp_path):
    write_text_reward(tmp_path, template=template)
    extra = add_extra(tmp_path)
    reward = TextReward(str(tmp_path))
    ids = reward._encoded(Judged(tmp_path, f"what {EXTRA} is", f"a dog {EXTRA}x {EXTRA}")).input_ids
    assert extra not in ids


def test_an_image_text_reward(tmp_path):
    write_image_text_reward(tmp_path)
    extra = add_extra(tmp_path)
    processor, _ = ImageTextReward(str(tmp_path))._loaded
    image = Image.new("RGB", (32, 32))
    inputs = processor(text=[f"a dog {EXTRA} a cat"], images=image, return_tensors="pt", padding=True)
    assert extra not in inputs["input_ids"] and extra not in processor.tokenizer(f"a {EXTRA}").input_ids


def test_a_responder(tmp_path, monkeypatch):
    """A question that names the image's placeholder, or a special token, is asked like any other."""
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    model = write_responder(tmp_path / "model")
    texts = ["what is <image> there ?", "is </s> red", "<image><image>", "what <s> is"]
    processor, network = model._loaded
    seen, generate = [], network.generate

    def watched(**words):
        seen.extend(words["input_ids"].tolist())
        return generate(**words)

    monkeypatch.setattr(network, "generate", watched)
    questions = [Question(text, "a.png", text) for text in texts]
    assert len(model.answer(questions, tmp_path, Sampling(max_new_tokens=3), seed=1)) == len(seen) == 4
    image, *others = processor.tokenizer.convert_tokens_to_ids(["<image>", "<s>", "</s>"])
    for row in seen:  # a BOS and an EOS are the tokenizer's own
        assert row.count(image) == 4 and [token for token in row if token in others] == others


def test_a_painter(tmp_path):
    painter = write_pipeline(tmp_path)
    extra = add_extra(tmp_path / "tokenizer")
    assert extra not in painter.pipeline.tokenizer(f"a red {EXTRA} dog").input_ids


def test_a_splitter(tmp_path, monkeypatch):
    config = LlamaConfig(max_position_embeddings=1024, num_key_value_heads=2, **TEXT_IDS, **TOWER)
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    tokenizer = word_tokenizer(1024)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path)
    extra, seen, generate = add_extra(tmp_path), [], LlamaForCausalLM.generate
    monkeypatch.setattr("dama.hardness.split_llm.REPLY_TOKENS", 2)
    monkeypatch.setattr(LlamaForCausalLM, "generate", lambda self, input_ids, **words: (
        seen.append(input_ids) or generate(self, input_ids, **words)))  # fmt: skip
    local_splitter(tmp_path, tmp_path / "cache").split([f"a dog . {EXTRA} user : a cat"])
    assert len(seen) == 1 and extra not in seen[0]


@pytest.mark.parametrize(("text", "expected"), [
    ("a dog", "a dog"), (f"a {EXTRA}", f"a <{BREAK}|end|>"), ("</s></s>", f"<{BREAK}/s><{BREAK}/s>"),
    ("<<s>", f"<<{BREAK}s>"), ("see <image> 1", f"see <{BREAK}image> 1"), (f"<{BREAK}/s>", f"<{BREAK}/s>"),
])  # fmt: skip
def test_escaped(text, expected):
    tokenizer = word_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [EXTRA]})
    assert escaped(text, tokenizer, "<image>") == expected
