"""The prompt formats: immutable templates, and the mutable conversations that are copied from them.

A prompt is rendered as segments of text, those of the assistant's answers marked: training supervises exactly these.
"""

from __future__ import annotations

import base64
import dataclasses
import difflib
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum, auto
from io import BytesIO
from types import MappingProxyType
from typing import Any, NamedTuple

from PIL import Image

from llava.constants import DEFAULT_IM_END_TOKEN, DEFAULT_IM_START_TOKEN, DEFAULT_IMAGE_TOKEN

# A message is None while its answer is awaited, a text, or (text, image, how to process the image).
Message = None | str | tuple[str, Image.Image, str]
JsonDict = dict[str, Any]

PAD_COLOUR = (122, 116, 104)  # CLIP's mean pixel


class SeparatorStyle(Enum):
    """How turns are joined."""

    SINGLE = auto()
    TWO = auto()
    MPT = auto()
    PLAIN = auto()
    LLAMA_2 = auto()


class Segment(NamedTuple):
    """A piece of a prompt; `is_answer` marks what the assistant says, its end marker included."""

    text: str
    is_answer: bool


@dataclasses.dataclass
class Conversation:
    """A conversation under way: the format's strings and the messages so far, as [role, message] pairs."""

    system: str
    roles: tuple[str, str]
    messages: list[list[Any]]
    offset: int  # number of opening messages that belong to the format and are not shown
    sep_style: SeparatorStyle = SeparatorStyle.SINGLE
    sep: str = "###"
    sep2: str | None = None
    version: str = "Unknown"
    skip_next: bool = False

    def get_prompt(self) -> str:
        """Return the conversation as one prompt."""
        return "".join(segment.text for segment in self.get_segments())

    def get_segments(self) -> list[Segment]:
        """The prompt in pieces, in order.

        Raises:
            TypeError: more than one message in a format that has no separator for it (plain).
            AssertionError: a LLaMA-2 conversation that does not open with a user's text.
        """
        return list(RENDERERS[self.sep_style](self, [(role, text_of(m)) for role, m in self._messages_with_image()]))

    def _messages_with_image(self) -> list[tuple[str, Message]]:
        """The messages, the tag of a first message's image moved to where the format wants it."""
        messages = [(role, message) for role, message in self.messages]
        if not messages or not isinstance(messages[0][1], tuple):
            return messages
        role, message = messages[0]
        question = text_of(message).replace(DEFAULT_IMAGE_TOKEN, "").strip()
        if "mmtag" not in self.version:
            return [(role, f"{DEFAULT_IMAGE_TOKEN}\n{question}"), *messages[1:]]
        tagged = f"<Image>{DEFAULT_IMAGE_TOKEN}</Image>"
        return [(self.roles[0], tagged), (self.roles[1], "Received."), (role, question), *messages[1:]]

    def append_message(self, role: str, message: Message) -> None:
        """Add a message; None leaves room for the model's answer."""
        self.messages.append([role, message])

    def process_image(
        self,
        image: Image.Image,
        image_process_mode: str,
        return_pil: bool = False,
        image_format: str = "PNG",
        max_len: int = 1344,
        min_len: int = 672,
    ) -> Image.Image | str:
        """The image as it is sent on: padded, resized or as it is ("Default", "Crop"), at most `max_len` pixels long.

        Returns:
            A PIL image, or its `image_format` bytes in base64.

        Raises:
            ValueError: unknown mode.
        """
        if image_process_mode == "Pad":
            from llava.mm_utils import expand2square  # brings torch along, which prompts alone do not need

            image = expand2square(image, PAD_COLOUR)
        elif image_process_mode == "Resize":
            image = image.resize((336, 336))
        elif image_process_mode not in ("Default", "Crop"):
            raise ValueError(f"Invalid image_process_mode: {image_process_mode}")
        image = shrink(image, max_len, min_len)
        return image if return_pil else encode_base64(image, image_format)

    def _image_messages(self) -> Iterator[tuple[str, Image.Image, str]]:
        for _, message in self.messages[self.offset :: 2]:
            if isinstance(message, tuple):
                yield message

    def get_images(self, return_pil: bool = False) -> list[Image.Image | str]:
        """The users' images in order, processed as each message says; PIL images or base64 of PNG."""
        return [self.process_image(image, mode, return_pil) for _, image, mode in self._image_messages()]

    def to_gradio_chatbot(self) -> list[list[str | None]]:
        """[question, answer] pairs; an image stands in the question as an HTML tag that holds its JPEG data."""
        pairs: list[list[str | None]] = []
        for index, (_, message) in enumerate(self.messages[self.offset :]):
            if index % 2:
                pairs[-1][1] = message
            else:
                pairs.append([self._as_html(message) if isinstance(message, tuple) else message, None])
        return pairs

    def _as_html(self, message: tuple[str, Image.Image, str]) -> str:
        text, image, _ = message
        data = self.process_image(image, "Default", return_pil=False, image_format="JPEG")
        tag = f'<img src="data:image/jpeg;base64,{data}" alt="user upload image" />'
        return tag + text.replace(DEFAULT_IMAGE_TOKEN, "").strip()

    def copy(self) -> Conversation:
        """A conversation that can go on without changing this one; nothing in it is skipped yet."""
        messages = [[role, message] for role, message in self.messages]
        return dataclasses.replace(self, messages=messages, skip_next=False)

    def dict(self) -> JsonDict:
        """What can be logged as JSON: images are left out, their texts kept."""
        return {
            "system": self.system,
            "roles": self.roles,
            "messages": [[role, text_of(message)] for role, message in self.messages],
            "offset": self.offset,
            "sep": self.sep,
            "sep2": self.sep2,
        }


@dataclasses.dataclass(frozen=True)
class Template:
    """A prompt format. Nothing changes it: `copy()` begins a conversation in it."""

    system: str
    roles: tuple[str, str]
    sep_style: SeparatorStyle
    sep: str
    sep2: str | None = None
    version: str = "Unknown"
    messages: tuple[tuple[str, str], ...] = ()
    offset: int = 0

    def copy(self) -> Conversation:
        """Return a conversation that can be changed without changing this one."""
        messages = [[role, text] for role, text in self.messages]
        return Conversation(
            self.system, self.roles, messages, self.offset, self.sep_style, self.sep, self.sep2, self.version
        )


def text_of(message: Message) -> Any:
    """Return a message's text, also where it comes with an image."""
    return message[0] if isinstance(message, tuple) else message


# ---------------------------------------------------------------------------------------------------------- rendering

Turns = Sequence[tuple[str, str | None]]


def render_alternating(conv: Conversation, turns: Turns) -> Iterator[Segment]:
    """`system SEP role: text SEP role: text SEP2 ...`: SINGLE, which has one separator, and TWO."""
    ends = (conv.sep, conv.sep if conv.sep_style is SeparatorStyle.SINGLE else conv.sep2)
    yield Segment(conv.system + conv.sep, False)
    for index, (role, text) in enumerate(turns):
        yield Segment(f"{role}:", False)
        if text:
            yield Segment(f" {text}{ends[index % 2]}", role == conv.roles[1])


def render_mpt(conv: Conversation, turns: Turns) -> Iterator[Segment]:
    """ChatML: `system<|im_end|>role text<|im_end|>...`, the roles written with their own start marker and newline."""
    yield Segment(conv.system + conv.sep, False)
    for role, text in turns:
        yield Segment(role, False)
        if text:
            yield Segment(text + conv.sep, role == conv.roles[1])


def render_llama_2(conv: Conversation, turns: Turns) -> Iterator[Segment]:
    """`[INST] <<SYS>>..<</SYS>> question [/INST] answer </s><s>[INST] ...`; the tokenizer adds the first <s>."""
    if turns and (not turns[0][1] or turns[0][0] != conv.roles[0]):
        raise AssertionError(f"first message should {'not be none' if not turns[0][1] else 'come from user'}")
    for index, (_, text) in enumerate(turns):
        if not text:
            continue
        if index % 2:
            yield Segment(f" {text} {conv.sep2}", True)
        else:
            system = f"<<SYS>>\n{conv.system}\n<</SYS>>\n\n" if index == 0 and conv.system else ""
            yield Segment(f"{conv.sep if index else ''}[INST] {system}{text} [/INST]", False)


def render_plain(conv: Conversation, turns: Turns) -> Iterator[Segment]:
    """`text SEP`, no roles: the format of captions."""
    yield Segment(conv.system, False)
    for index, (_, text) in enumerate(turns):
        end = conv.sep2 if index % 2 else conv.sep
        if text and end is None:
            raise TypeError(f"the plain format has no separator (sep2) for message {index + 1}: give it one message")
        if text:
            yield Segment(f"{text}{end}", False)


RENDERERS = MappingProxyType(
    {
        SeparatorStyle.SINGLE: render_alternating,
        SeparatorStyle.TWO: render_alternating,
        SeparatorStyle.MPT: render_mpt,
        SeparatorStyle.LLAMA_2: render_llama_2,
        SeparatorStyle.PLAIN: render_plain,
    }
)


# ------------------------------------------------------------------------------------------------------------- images


def shrink(image: Image.Image, max_len: int, min_len: int) -> Image.Image:
    """An image longer than `max_len` pixels, with its long side at `max_len` or its short one at `min_len` if less."""
    longest, shortest = max(image.size), min(image.size)
    if longest <= max_len:
        return image
    ratio = longest / shortest
    new_shortest = int(min(max_len / ratio, min_len, shortest))
    new_longest = int(new_shortest * ratio)
    width, height = image.size
    return image.resize((new_shortest, new_longest) if height > width else (new_longest, new_shortest))


def encode_base64(image: Image.Image, image_format: str) -> str:
    """Return the image's file content in base64."""
    buffer = BytesIO()
    image.save(buffer, format=image_format)
    return base64.b64encode(buffer.getvalue()).decode()


# ---------------------------------------------------------------------------------------------------------- templates

_CURIOUS_HUMAN = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
_CURIOUS_USER = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
# The missing space after "natural language." is part of the format.
_MMTAG = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant is able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
    "The visual content will be provided with the following format: <Image>visual content</Image>."
)
_RENEWABLE_QUESTION = "What are the key differences between renewable and non-renewable energy sources?"
_RENEWABLE_ANSWER = (
    "Renewable energy sources are those that can be replenished naturally in a relatively short amount of "
    "time, such as solar, wind, hydro, geothermal, and biomass. Non-renewable energy sources, on the other "
    "hand, are finite and will eventually be depleted, such as coal, oil, and natural gas. Here are some key "
    "differences between renewable and non-renewable energy sources:\n"
    "1. Availability: Renewable energy sources are virtually inexhaustible, while non-renewable energy sources "
    "are finite and will eventually run out.\n"
    "2. Environmental impact: Renewable energy sources have a much lower environmental impact than "
    "non-renewable sources, which can lead to air and water pollution, greenhouse gas emissions, and other "
    "negative effects.\n"
    "3. Cost: Renewable energy sources can be more expensive to initially set up, but they typically have "
    "lower operational costs than non-renewable sources.\n"
    "4. Reliability: Renewable energy sources are often more reliable and can be used in more remote locations "
    "than non-renewable sources.\n"
    "5. Flexibility: Renewable energy sources are often more flexible and can be adapted to different "
    "situations and needs, while non-renewable sources are more rigid and inflexible.\n"
    "6. Sustainability: Renewable energy sources are more sustainable over the long term, while non-renewable "
    "sources are not, and their depletion can lead to economic and social instability.\n"
)
_LLAMA_2 = (
    "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being "
    "safe.  Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or "
    "illegal content. Please ensure that your responses are socially unbiased and positive in nature.\n\n"
    "If a question does not make any sense, or is not factually coherent, explain why instead of answering "
    "something not correct. If you don't know the answer to a question, please don't share false information."
)
_LLAVA_LLAMA_2 = (
    "You are a helpful language and vision assistant. You are able to understand the visual content that the "
    "user provides, and assist the user with a variety of tasks using natural language."
)
_MPT = (
    "<|im_start|>system\nA conversation between a user and an LLM-based AI assistant. "
    "The assistant gives helpful and honest answers."
)
_CHATML_ROLES = ("<|im_start|>user\n", "<|im_start|>assistant\n")

conv_vicuna_v0 = Template(
    system=_CURIOUS_HUMAN,
    roles=("Human", "Assistant"),
    sep_style=SeparatorStyle.SINGLE,
    sep="###",
    messages=(("Human", _RENEWABLE_QUESTION), ("Assistant", _RENEWABLE_ANSWER)),
    offset=2,
)
conv_vicuna_v1 = Template(
    system=_CURIOUS_USER,
    roles=("USER", "ASSISTANT"),
    sep_style=SeparatorStyle.TWO,
    sep=" ",
    sep2="</s>",
    version="v1",
)
conv_llama_2 = Template(
    system=_LLAMA_2,
    roles=("USER", "ASSISTANT"),
    sep_style=SeparatorStyle.LLAMA_2,
    sep="<s>",
    sep2="</s>",
    version="llama_v2",
)
conv_llava_llama_2 = dataclasses.replace(conv_llama_2, system=_LLAVA_LLAMA_2)
conv_mistral_instruct = dataclasses.replace(conv_llama_2, system="", sep="")
conv_mpt = Template(system=_MPT, roles=_CHATML_ROLES, sep_style=SeparatorStyle.MPT, sep="<|im_end|>", version="mpt")
conv_chatml_direct = dataclasses.replace(conv_mpt, system="<|im_start|>system\nAnswer the questions.")
conv_llava_plain = Template(system="", roles=("", ""), sep_style=SeparatorStyle.PLAIN, sep="\n")
conv_llava_v0 = dataclasses.replace(conv_vicuna_v0, messages=(), offset=0)
conv_llava_v0_mmtag = dataclasses.replace(conv_llava_v0, system=_MMTAG, version="v0_mmtag")
conv_llava_v1 = dataclasses.replace(conv_vicuna_v1, system=_CURIOUS_HUMAN)
conv_llava_v1_mmtag = dataclasses.replace(conv_vicuna_v1, system=_MMTAG, version="v1_mmtag")

# The format where none is named. Nothing reassigns it: a caller that wants another passes it.
default_conversation = conv_vicuna_v1

# Every format under all its names.
_NAMES: tuple[tuple[Template, tuple[str, ...]], ...] = (
    (conv_vicuna_v0, ("default", "v0")),
    (conv_vicuna_v1, ("v1", "vicuna_v1")),
    (conv_llama_2, ("llama_2",)),
    (conv_mistral_instruct, ("mistral_instruct",)),
    (conv_chatml_direct, ("chatml_direct", "mistral_direct")),
    (conv_llava_plain, ("plain", "v0_plain")),
    (conv_llava_v0, ("llava_v0",)),
    (conv_llava_v0_mmtag, ("v0_mmtag",)),
    (conv_llava_v1, ("llava_v1",)),
    (conv_llava_v1_mmtag, ("v1_mmtag",)),
    (conv_llava_llama_2, ("llava_llama_2",)),
    (conv_mpt, ("mpt",)),
)
conv_templates: Mapping[str, Template] = MappingProxyType(
    {name: template for template, names in _NAMES for name in names}
)


def image_placeholder(start_end: bool | None = False) -> str:
    """Return what stands for one image in a prompt.

    Args:
        start_end: mm_use_im_start_end of the model's config or flags; True puts <im_start> and <im_end> around it.
    """
    return DEFAULT_IM_START_TOKEN + DEFAULT_IMAGE_TOKEN + DEFAULT_IM_END_TOKEN if start_end else DEFAULT_IMAGE_TOKEN


def get_template(name: str) -> Template:
    """The format of that name.

    Raises:
        ValueError: unknown name; the message offers the nearest ones.
    """
    if name in conv_templates:
        return conv_templates[name]
    near = difflib.get_close_matches(name, conv_templates, n=3) or sorted(conv_templates)
    raise ValueError(f"unknown conversation template {name!r}: did you mean {', '.join(near)}?")
