"""The prompt formats against LLaVA's: every template, every kind of message, and what cannot be changed by accident."""

import base64
import dataclasses
import json
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image

from llava import constants, conversation
from llava.conversation import conv_templates, default_conversation, get_template, image_placeholder

pytestmark = pytest.mark.fast

GOLDEN = json.loads((Path(__file__).parents[1] / "golden/a_conversation.json").read_text())
Q1, A1, Q2, A2 = (GOLDEN["inputs"][key] for key in ("Q1", "A1", "Q2", "A2"))
PICTURE = Image.new("RGB", (12, 8), (200, 30, 30))
MESSAGES = {
    "empty": [],
    "one_turn_open": [Q1, None],
    "two_turn_open": [Q1, A1, Q2, None],
    "two_turn_closed": [Q1, A1, Q2, A2],
    "inline_image_two_turn_closed": [f"<image>\n{Q1}", A1, Q2, A2],
    "tuple_image_open": [(f"<image>\n{Q1}", PICTURE, "Pad"), None],
    "tuple_second_turn": [Q1, A1, (f"{Q2}<image>", PICTURE, "Pad"), None],
    "empty_string_user": ["", None],
    "leading_s_char": ["s> <<leading", None],
}


def talk(name, messages):
    conv = conv_templates[name].copy()
    for index, message in enumerate(messages):
        conv.append_message(conv.roles[index % 2], message)
    return conv


def test_names_are_llavas_and_aliases_are_one_object():
    assert list(conv_templates) == list(GOLDEN["templates"])
    for name, expected in GOLDEN["templates"].items():
        aliases = [other for other in conv_templates if other != name and conv_templates[other] is conv_templates[name]]
        assert sorted(aliases) == sorted(expected["same_object_as"]), name
    assert [n for n in conv_templates if conv_templates[n] is default_conversation] == ["v1", "vicuna_v1"]
    assert [style.name for style in conversation.SeparatorStyle] == GOLDEN["separator_styles"]
    assert {key: getattr(constants, key) for key in GOLDEN["constants"]} == GOLDEN["constants"]


@pytest.mark.parametrize("name", GOLDEN["templates"])
def test_fields(name):
    template, expected = conv_templates[name], GOLDEN["templates"][name]
    for field in ("system", "sep", "sep2", "version", "offset"):
        assert getattr(template, field) == expected[field], field
    assert template.sep_style.name == expected["sep_style"]
    assert list(template.roles) == expected["roles"]
    assert len(template.messages) == expected["n_initial_messages"]


@pytest.mark.parametrize("case", MESSAGES)
@pytest.mark.parametrize("name", GOLDEN["templates"])
def test_prompt(name, case):
    expected = GOLDEN["templates"][name]["prompts"][case]
    conv = talk(name, MESSAGES[case])
    if isinstance(expected, str):
        assert conv.get_prompt() == expected
    else:
        # The kind of exception is LLaVA's; plain's message says more than "can only concatenate str".
        words = "no separator" if name.endswith("plain") else expected["message"]
        with pytest.raises({"TypeError": TypeError, "AssertionError": AssertionError}[expected["error"]], match=words):
            conv.get_prompt()


def test_segments_mark_the_answers_with_their_end_markers():
    def answers(name):
        return [s.text for s in talk(name, [Q1, A1, Q2, A2]).get_segments() if s.is_answer]

    assert answers("v1") == [f" {A1}</s>", f" {A2}</s>"]
    assert answers("llava_v0") == [f" {A1}###", f" {A2}###"]
    assert answers("llava_llama_2") == [f" {A1} </s>", f" {A2} </s>"]
    assert answers("mpt") == [f"{A1}<|im_end|>", f"{A2}<|im_end|>"]


def test_llama_2_opens_with_the_user():
    conv = conv_templates["llama_2"].copy()
    conv.append_message(conv.roles[1], "Hello")
    with pytest.raises(AssertionError, match="first message should come from user"):
        conv.get_prompt()


def test_templates_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        default_conversation.system = "x"
    with pytest.raises(TypeError, match="does not support item assignment"):
        conv_templates["v1"] = conv_templates["mpt"]
    conv = conv_templates["v0"].copy()
    conv.messages[0][1] = "changed"
    conv.append_message("Human", "more")
    assert conv_templates["v0"].copy().messages[0][1].startswith("What are the key differences")
    assert len(conv_templates["v0"].messages) == 2


def test_copy_of_a_conversation_goes_its_own_way():
    conv = talk("v1", [Q1, None])
    conv.skip_next = True
    other = conv.copy()
    other.messages[-1][-1] = A1
    assert conv.messages[-1][-1] is None
    assert (conv.skip_next, other.skip_next) == (True, False)


def test_unknown_template_names_the_nearest():
    assert get_template("vicuna_v1") is default_conversation
    with pytest.raises(ValueError, match="unknown conversation template 'vicuna_v2': did you mean vicuna_v1"):
        get_template("vicuna_v2")


def test_dict_leaves_the_image_out():
    conv = talk("llava_v1", [(f"{Q1}\n<image>", PICTURE, "Pad"), A1])
    assert json.loads(json.dumps(conv.dict())) == GOLDEN["dict_with_image"]


@pytest.mark.parametrize("key", GOLDEN["get_images_return_pil_sizes"])
def test_size_of_processed_images(key):
    """big, "Default": 3000 x 1000 is 3 : 1, so the long side comes to 1344 pixels, the short one to 1344 / 3 = 448."""
    sizes = {"wide": (120, 70), "tall": (50, 93), "big": (3000, 1000), "bigtall": (900, 2800)}
    mode, name = key.split("|")
    conv = talk("v1", [(Q1, Image.new("RGB", sizes[name]), mode)])
    assert list(conv.get_images(return_pil=True)[0].size) == GOLDEN["get_images_return_pil_sizes"][key]


def test_images_travel_as_png_in_base64():
    conv = talk("v1", [(Q1, PICTURE, "Default"), A1, Q2, A2])
    (data,) = conv.get_images()
    image = Image.open(BytesIO(base64.b64decode(data)))
    assert (image.format, image.size, image.getpixel((3, 3))) == ("PNG", (12, 8), (200, 30, 30))


def test_padding_is_of_clips_mean_colour():
    image = talk("v1", []).process_image(PICTURE, "Pad", return_pil=True)
    assert image.size == (12, 12)
    assert (image.getpixel((0, 1)), image.getpixel((0, 2))) == ((122, 116, 104), (200, 30, 30))


def test_unknown_image_mode():
    with pytest.raises(ValueError, match=GOLDEN["process_image_bad_mode"]["message"]):
        talk("v1", []).process_image(PICTURE, "Nope")


def test_gradio_pairs():
    expected = GOLDEN["to_gradio_chatbot"]
    ((question, answer),) = talk("v1", [(f"<image>\n{Q1}", PICTURE, "Default"), A1]).to_gradio_chatbot()
    assert question.startswith(expected["prefix"])
    assert question.endswith(expected["suffix"].split("==", 1)[1])
    assert answer == expected["answer"]
    assert talk("v0", [Q1, None]).to_gradio_chatbot() == [[Q1, None]]


def test_prompts_need_neither_torch_nor_transformers():
    code = (
        "import sys, llava, llava.conversation as c; c.get_template('v1').copy().get_prompt(); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


def test_image_placeholder_follows_the_start_end_flag():
    assert image_placeholder() == image_placeholder(None) == "<image>"
    assert image_placeholder(True) == "<im_start><image><im_end>"
