"""Token ids and decoded text against the slow LlamaTokenizer of transformers 4.37, saving, and other tokenizers."""

import json
import pickle
import random
import re
from pathlib import Path

import pytest
import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, TextStreamer

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_PATCH_TOKEN
from llava.tokenization import LlamaTokenizer, load_tokenizer

pytestmark = pytest.mark.fast

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "b_tokenizer_encode.json").read_text())
FOLDERS = {"legacy_false": "llava-v1.5-tiny", "legacy_true": "tokenizer-legacy"}
SPECIAL = {"<unk>": 0, "<s>": 1, "</s>": 2}


@pytest.fixture(params=FOLDERS)
def rule(request):
    return request.param


@pytest.fixture
def tokenizer(rule):
    return load_tokenizer(FOLDER / FOLDERS[rule])


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: repr(case["text"][:30]))
def test_ids_and_text(case, rule, tokenizer):
    ids = tokenizer(case["text"]).input_ids
    assert case[rule] == {
        "ids": ids,
        "tokens": tokenizer.convert_ids_to_tokens(ids),
        "ids_no_special": tokenizer(case["text"], add_special_tokens=False).input_ids,
        "decode": tokenizer.decode(ids),
        "decode_skip": tokenizer.decode(ids, skip_special_tokens=True),
    }


def test_what_is_set_explicitly(tokenizer):
    meta = GOLDEN["meta"]
    assert (len(tokenizer), tokenizer.vocab_size) == (meta["len"], meta["vocab_size"])
    assert (tokenizer.pad_token, tokenizer.pad_token_id) == (meta["pad_token"], meta["pad_token_id"])
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id) == (1, 2, 0)
    assert (tokenizer.model_max_length, tokenizer.padding_side) == (meta["model_max_length"], "right")
    assert sorted(tokenizer.all_special_tokens) == sorted(meta["all_special_tokens"])
    other = load_tokenizer(FOLDER / "llava-v1.5-tiny", model_max_length=64, padding_side="left")
    assert (other.model_max_length, other.padding_side) == (64, "left")


def test_padding_and_truncation():
    expected = json.loads((FOLDER / "b_tokenizer_image_token.json").read_text())["batch_pad_truncate_maxlen6"]
    tokenizer = load_tokenizer(FOLDER / "llava-v1.5-tiny", model_max_length=6)
    batch = tokenizer(expected["texts"], padding="longest", truncation=True)
    assert (batch.input_ids, batch.attention_mask) == (expected["input_ids"], expected["attention_mask"])


def sentencepiece_ids(text, processor, legacy):
    """The slow tokenizer's rule: stretches between special tokens go to sentencepiece, the dummy prefix set by hand."""
    if not legacy:
        text = "\u2581" + text.replace("\u2581", " ") if text else ""
    parts = [part for part in re.split("(<unk>|<s>|</s>)", text) if part]
    if not legacy and len(parts) > 1 and parts[0] == "\u2581":
        parts = parts[1:]
    return [1] + [i for part in parts for i in ([SPECIAL[part]] if part in SPECIAL else processor.encode(part))]


def test_ids_are_sentencepieces_on_random_text(rule, tokenizer):
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString((FOLDER / FOLDERS[rule] / "tokenizer.model").read_bytes())
    proto.normalizer_spec.add_dummy_prefix = rule == "legacy_true"
    processor = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString())
    words = "the cat USER: ASSISTANT: \n \n\n \t é 日本 🐱 </s> <s> <unk> \u2581 xxxxx 12 3. don't \u00a0 \u200b ﬁ"
    pieces = [*words.split(" "), " ", "  "]
    draw = random.Random(0)
    for _ in range(500):
        text = "".join(draw.choice(pieces) + draw.choice(["", " "]) for _ in range(draw.randint(0, 12)))
        assert tokenizer(text).input_ids == sentencepiece_ids(text, processor, rule == "legacy_true"), repr(text)


def test_a_checkpoint_that_does_not_say_is_legacy(tmp_path):
    source = FOLDER / "llava-v1.5-tiny"
    (tmp_path / "tokenizer.model").write_bytes((source / "tokenizer.model").read_bytes())
    config = json.loads((source / "tokenizer_config.json").read_text())
    del config["legacy"], config["add_bos_token"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer("Hi</s>USER: x").input_ids == [1, 598, 934, 2, 312, 307, 957, 840]
    assert tokenizer.pad_token == "<unk>"


def test_saved_in_llamas_layout_with_its_added_tokens(tmp_path, rule, tokenizer):
    assert tokenizer.add_tokens([DEFAULT_IMAGE_PATCH_TOKEN], special_tokens=True) == 1
    assert tokenizer.add_tokens([DEFAULT_IM_START_TOKEN, DEFAULT_IM_END_TOKEN], special_tokens=True) == 2
    text = "Hi<im_start>x<im_end>y <im_patch>"
    ids = tokenizer(text).input_ids
    assert [i for i in ids if i >= 1000] == [1001, 1002, 1000]
    assert "im_" not in tokenizer.decode(ids, skip_special_tokens=True)
    tokenizer.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "special_tokens_map.json",
        "tokenizer.model",
        "tokenizer_config.json",
    ]
    again = load_tokenizer(tmp_path)
    assert type(again) is LlamaTokenizer
    assert again(text).input_ids == ids
    for case in GOLDEN["cases"]:
        assert again(case["text"]).input_ids == case[rule]["ids"]
    stock = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(stock), stock.legacy, stock.pad_token) == (1003, rule == "legacy_true", "<unk>")
    assert stock("The cat is red.<im_end>").input_ids == again("The cat is red.<im_end>").input_ids


def test_batches_streams_and_pickles(capsys, tokenizer):
    texts = ["The cat is red.", "Hello"]
    ids = [tokenizer(text).input_ids for text in texts]
    assert tokenizer.batch_decode(ids, skip_special_tokens=True) == texts
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    for token in ids[0]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert capsys.readouterr().out == "The cat is red.\n"
    assert pickle.loads(pickle.dumps(tokenizer))(" Hello").input_ids == tokenizer(" Hello").input_ids


def test_llama_with_a_tokenizer_json_only_is_read_as_it_is(tmp_path):
    stock = AutoTokenizer.from_pretrained(FOLDER / "llava-v1.5-tiny")
    stock.save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    tokenizer = load_tokenizer(tmp_path, padding_side="left")
    assert type(tokenizer) is not LlamaTokenizer
    assert tokenizer("The cat is red.").input_ids == [1, 273, 702, 267, 523, 953]
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<unk>")


def test_another_family_gets_its_end_token_as_pad(tmp_path):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(["a cat"], trainers.BpeTrainer(special_tokens=special, show_progress=False))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>").save_pretrained(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.bos_token, tokenizer.pad_token, tokenizer.padding_side) == (None, "<|im_end|>", "right")
    assert tokenizer.decode(tokenizer("a cat<|im_end|>").input_ids) == "a cat<|im_end|>"
