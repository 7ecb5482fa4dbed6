"""The prompt form of models without a chat template whose processors take a prefix and a suffix.

What such a processor writes around a question and behind an answer becomes a template of one question about an image,
so that everything else reads these models like any other.
"""

from __future__ import annotations

import inspect
from typing import Any

from PIL import Image

QUESTION, ANSWER = "Is it?", "Yes."
SIZE = 32  # pixels of the image that the processor is asked about
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ message['content'][0]['text'] + END }}"
    "{% elif message['role'] == 'user' and loop.first %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ IMAGE }}{% endif %}{% endfor %}{{ LEAD }}"
    "{% for part in message['content'] %}{% if part['type'] != 'image' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{{ TAIL }}{% else %}{{ raise_exception('this model takes one question: no system prompt, no conversation') }}"
    "{% endif %}{% endfor %}"
)


def takes_suffix(processor: Any) -> bool:
    """Whether a processor takes a prompt's answer as its `suffix`: its model was trained on a prefix and a suffix."""
    return processor is not None and "suffix" in inspect.signature(processor.__call__).parameters


def suffix_template(processor: Any) -> str:
    """A chat template of the processor's own prompt form.

    Raises:
        ValueError: the processor writes questions or answers in a form that no template can repeat.
    """
    tokenizer, token = processor.tokenizer, processor.image_token
    blank = Image.new("RGB", (SIZE, SIZE))
    found = processor(text=[f"{token}{QUESTION}"], images=[blank], suffix=[ANSWER])
    ids, kinds = found["input_ids"][0], found["token_type_ids"][0]
    prompt, answer = (tokenizer.decode([i for i, kind in zip(ids, kinds) if kind == part]) for part in (0, 1))
    lead, asked, tail = prompt.replace(token, "").partition(QUESTION)
    start, answered, end = answer.partition(ANSWER)
    if not asked or not answered or start:
        raise ValueError(
            f"processor {type(processor).__name__}: expected question and answer as they are, got {prompt[-80:]!r} and "
            f"{answer!r}; give a model with a chat template"
        )
    parts = {"IMAGE": token, "LEAD": lead, "TAIL": tail, "END": end}
    return "".join(f"{{% set {name} = {text!r} %}}" for name, text in parts.items()) + TEMPLATE
