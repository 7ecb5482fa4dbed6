"""Ids and labels against LLaVA's recorded ones, and the rows that LLaVA blanked on a mismatch, supervised here."""

import copy
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from llava.conversation import conv_templates
from llava.mm_utils import tokenizer_image_token
from llava.tokenization import load_tokenizer
from llava.train import preprocess as prep
from llava.train.preprocess import encode_turns, preprocess, preprocess_multimodal, preprocess_v1, render_supervised

pytestmark = pytest.mark.fast

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = json.loads((FOLDER / "c_preprocess.json").read_text())
CONVERSATIONS = GOLDEN["conversations"]
V1 = conv_templates["v1"]
CHAT_CASES = [
    (name, template, case, variant)
    for name in ("preprocess_v1", "preprocess_llama_2", "preprocess_mpt")
    for template in GOLDEN[name]
    for case in GOLDEN[name][template]
    for variant in GOLDEN[name][template][case]
]


@pytest.fixture(scope="module")
def tokenizers():
    cut = load_tokenizer(FOLDER / "llava-v1.5-tiny", model_max_length=64)
    plain = load_tokenizer(FOLDER / "llava-v1.5-tiny")
    legacy = load_tokenizer(FOLDER / "tokenizer-legacy")
    return {"legacy_false": plain, "legacy_true": legacy, "legacy_false_maxlen64": cut}


@pytest.fixture(scope="module")
def tokenizer(tokenizers):
    return tokenizers["legacy_false"]


def only_row(value):
    """The one row of a batch as a list, whether it is a tensor [1, T], a list of tensors or of numbers."""
    row = value[0] if isinstance(value, torch.Tensor) or not isinstance(value[0], int) else value
    return row.tolist() if isinstance(row, torch.Tensor) else row


def assert_equal(batch, expected, blanked=False):
    """`blanked`: LLaVA lost count in this row, so its labels, blank or displaced, are no measure."""
    assert isinstance(batch["input_ids"], torch.Tensor) == (expected["container"] == "Tensor")
    assert only_row(batch["input_ids"]) == only_row(expected["input_ids"])
    if not blanked:
        assert only_row(batch["labels"]) == only_row(expected["labels"])


def supervised(turns, tokenizer, template=V1, has_image=False):
    row = encode_turns(turns, tokenizer, template, has_image)
    return render_supervised(row.input_ids, row.labels, tokenizer)


def spell(tokens, tokenizer):
    """The tokens as one text; the "x" in front keeps the decoder from taking off a leading space."""
    return tokenizer.convert_tokens_to_string(["x", *tokens]).removeprefix("x")


def turns_of(name):
    return [(turn["from"], turn["value"]) for turn in CONVERSATIONS[name]["turns"]]


# -------------------------------------------------------------------------------------------------- LLaVA's own values


@pytest.mark.parametrize(("name", "template", "case", "variant"), CHAT_CASES)
def test_chat_formats(name, template, case, variant, tokenizers):
    conversation = copy.deepcopy(CONVERSATIONS[case])
    batch = getattr(prep, name)(
        [conversation["turns"]], tokenizers[variant], conversation["has_image"], template=conv_templates[template]
    )
    recorded = GOLDEN[name][template][case]
    assert_equal(batch, recorded[variant], blanked="mismatch" in recorded["legacy_false"]["printed"])
    assert conversation == CONVERSATIONS[case]  # the data are left as they were


def test_which_rows_llava_lost_count_in():
    """Only these are excused above: each is answered for below, by name."""
    lost = {(n, c) for n, t, c, _ in CHAT_CASES if "mismatch" in GOLDEN[n][t][c]["legacy_false"]["printed"]}
    cured = {"open_ended_last_human", "answer_contains_eos_text", "unk_in_text", "empty_answer_image"}
    assert lost == (
        {("preprocess_v1", case) for case in cured | {"human_contains_ASSISTANT"}}
        | {("preprocess_llama_2", case) for case in cured}
        | {("preprocess_mpt", case) for case in GOLDEN["preprocess_mpt"]["chatml_direct"]}
    )


@pytest.mark.parametrize("variant", ["legacy_false", "legacy_true"])
@pytest.mark.parametrize("case", GOLDEN["preprocess_plain"])
def test_captions(case, variant, tokenizers):
    source = copy.deepcopy(GOLDEN["preprocess_plain_conversations"][case])
    expected = GOLDEN["preprocess_plain"][case][variant]
    if "error" in expected:
        with pytest.raises(AssertionError, match="the plain format is for a turn with <image> and its caption"):
            prep.preprocess_plain([source], tokenizers[variant])
    else:
        assert_equal(prep.preprocess_plain([source], tokenizers[variant]), expected)
    assert source == GOLDEN["preprocess_plain_conversations"][case]


@pytest.mark.parametrize(
    ("template", "case"), [(t, c) for t, cases in GOLDEN["preprocess_dispatch"].items() for c in cases]
)
def test_dispatch_on_the_template(template, case, tokenizer):
    source = GOLDEN["preprocess_plain_conversations"][case] if template == "plain" else CONVERSATIONS[case]["turns"]
    expected = GOLDEN["preprocess_dispatch"][template][case]
    batch = preprocess([source], tokenizer, template=conv_templates[template])
    assert_equal(batch, expected, blanked="mismatch" in expected["printed"])


def test_batch_of_two(tokenizer):
    expected = GOLDEN["preprocess_v1_batch_of_two_text"]
    batch = preprocess_v1([CONVERSATIONS[name]["turns"] for name in ("single_text", "multi_text")], tokenizer)
    assert batch["input_ids"].tolist() == expected["input_ids"]
    assert batch["labels"].tolist() == expected["labels"]


@pytest.mark.parametrize("case", GOLDEN["preprocess_multimodal"], ids=lambda case: case["template"] + case["value"][:9])
def test_preprocess_multimodal(case):
    sources = [[{"from": "human", "value": case["value"]}, {"from": "gpt", "value": "x <image>"}]]
    before = copy.deepcopy(sources)
    args = SimpleNamespace(is_multimodal=case["is_multimodal"], mm_use_im_start_end=case["mm_use_im_start_end"])
    (source,) = preprocess_multimodal(sources, args, template=conv_templates[case["template"]])
    assert [turn["value"] for turn in source] == case["out"]
    assert [turn["from"] for turn in source] == ["human", "gpt"]
    assert sources == before


# ------------------------------------------------------------------------- what is supervised, as text a reader can see


def test_the_answer_and_its_end_marker_are_supervised(tokenizer):
    turns = [("human", "<image>\nWhat?"), ("gpt", "A cat."), ("human", "Sure?"), ("gpt", "No.")]
    assert supervised(turns, tokenizer, has_image=True) == ["▁A", "▁cat", ".", "</s>", "▁", "N", "o", ".", "</s>"]
    assert supervised(turns, tokenizer, conv_templates["llava_llama_2"], True) == (
        ["▁A", "▁cat", ".", "▁", "</s>", "▁", "N", "o", ".", "▁", "</s>"]
    )


def test_rows_that_llava_blanked_are_supervised(tokenizer):
    """LLaVA cut the prompt at " ASSISTANT: " and "</s>" and compared lengths, so text that holds these was lost."""

    def spelt(name, has_image=False):
        return spell(supervised(turns_of(name), tokenizer, has_image=has_image), tokenizer)

    assert spelt("open_ended_last_human") == " A bus.</s>"
    assert spelt("human_contains_ASSISTANT") == " ASSISTANT: hi</s> Bye.</s>"
    assert spelt("answer_contains_eos_text") == " A bus.</s> and more</s> Bye.</s>"
    assert spelt("unk_in_text", has_image=True) == " It is <unk> ok.</s>"  # the pad id is the unk id


def test_an_empty_answer_supervises_nothing(tokenizer):
    assert supervised(turns_of("empty_answer_image"), tokenizer, has_image=True) == []


def test_chatml_with_the_end_marker_in_pieces_is_supervised(tokenizer):
    """<|im_end|> is nine tokens in LLaMA's vocabulary; LLaVA's counting, made for one, blanked every such row."""
    answers = supervised(turns_of("single_text"), tokenizer, conv_templates["chatml_direct"])
    assert spell(answers, tokenizer) == "The cat is red.<|im_end|>"


def test_an_image_in_an_answer_keeps_its_place(tokenizer):
    assert supervised(turns_of("image_in_answer"), tokenizer, has_image=True)[:3] == ["▁", "<image>", "▁"]


@pytest.mark.parametrize("name", CONVERSATIONS)
@pytest.mark.parametrize("template", ["v1", "v1_mmtag", "llava_llama_2", "mistral_instruct", "mpt"])
def test_ids_are_those_of_the_prompt_and_labels_spell_the_answers(name, template, tokenizer):
    turns, has_image = turns_of(name), CONVERSATIONS[name]["has_image"]
    conversation = conv_templates[template].copy()
    for index, (_, text) in enumerate(turns):
        conversation.append_message(conversation.roles[index % 2], text)
    row = encode_turns(turns, tokenizer, conv_templates[template], has_image)
    prompt = conversation.get_prompt()
    ids = tokenizer_image_token(prompt, tokenizer) if has_image else tokenizer(prompt).input_ids
    assert row.input_ids.tolist() == ids
    spelt = spell(render_supervised(row.input_ids, row.labels, tokenizer), tokenizer)
    answers = "".join(segment.text for segment in conversation.get_segments() if segment.is_answer)
    # An image splits the text, and each piece begins with one space of its own.
    assert spelt == answers.replace("<image>", "<image> ")


def test_a_preference_pair_shares_its_prompt(tokenizer):
    question = ("human", "<image>\nWhat is in the picture?")
    rows = [encode_turns([question, ("gpt", text)], tokenizer, V1, has_image=True) for text in ("A cat.", "A red dog.")]
    prompts = [row.input_ids[row.labels == -100].tolist() for row in rows]
    assert (
        prompts[0]
        == prompts[1]
        == tokenizer_image_token(
            V1.copy().get_prompt() + "USER: <image>\nWhat is in the picture? ASSISTANT:", tokenizer
        )
    )
    assert [row.input_ids.dtype for row in rows] == [torch.int64] * 2


def test_encode_turns_never_cuts(tokenizers):
    row = encode_turns(turns_of("long_text"), tokenizers["legacy_false_maxlen64"], V1, has_image=False)
    assert row.input_ids.shape == row.labels.shape == (168,)


def test_an_opening_answer_is_left_out(tokenizer):
    turns = turns_of("single_text")
    assert supervised([("gpt", "Hello."), *turns], tokenizer) == supervised(turns, tokenizer)


# -------------------------------------------------------------------------------------------------- other tokenizers


@pytest.fixture(scope="module")
def byte_level():
    """A tokenizer of Qwen's kind: no BOS, <|im_start|> and <|im_end|> one token each, line breaks merged."""
    backend = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s*\n+|\s?\w+|[^\s\w]+|\s+"), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, to_bytes])
    special = ["<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(["a cat\n\n on\n\n a mat\n\n"] * 9, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")


def test_chatml_on_a_byte_level_tokenizer(byte_level):
    turns = [("human", "<image>\nWhere?"), ("gpt", "on a mat"), ("human", "é?"), ("gpt", "é")]
    answers = supervised(turns, byte_level, conv_templates["chatml_direct"], has_image=True)
    assert answers == ["on", "Ġa", "Ġmat", "<|im_end|>", "Ã", "©", "<|im_end|>"]


def test_an_answer_that_begins_inside_a_token_is_refused(byte_level):
    """The prompt ends with a line break and the answer opens with one: together they are one token."""
    with pytest.raises(ValueError, match="must begin and end between tokens, but character 100 .* change the spaces"):
        supervised([("human", "x"), ("gpt", "\na cat")], byte_level, conv_templates["chatml_direct"])


# ------------------------------------------------------------------------------------------------------------- refusals


def test_turns_must_alternate(tokenizer):
    with pytest.raises(ValueError, match="turn 2 is from 'human', expected 'gpt'"):
        supervised([("human", "a"), ("human", "b")], tokenizer)
    with pytest.raises(ValueError, match="turn 1 is from 'user', expected 'human'"):
        supervised([("user", "a"), ("gpt", "b")], tokenizer)


def test_a_thin_name_refuses_another_style(tokenizer):
    with pytest.raises(ValueError, match="style is MPT, expected TWO"):
        preprocess_v1([CONVERSATIONS["single_text"]["turns"]], tokenizer, template=conv_templates["mpt"])
