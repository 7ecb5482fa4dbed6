"""Rows of preference data sets, each in the layout of its authors, brought under one set of names (RLAIF-V's)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dama.texts import IMAGE_TOKEN

SYSTEM, USER, ASSISTANT = "system", "user", "assistant"
ROLES = {"human": USER, "gpt": ASSISTANT}  # LLaVA's names of the two sides, and TRL's
ANSWERS = ("chosen", "rejected")
FIELDS = (
    *("question", "prompt", "query", "chosen", "rejected", "response", "rejected_response"),
    *("history", "messages", "rejected_messages", "conversations", "rejected_conversations", "text"),
    *("image", "image_path", "images", "idx", "id", "origin_dataset", "origin_split", "generator", "kind"),
    *("logps", "chosen_logits", "rejected_logits"),
    *("context", "answer", "first_error", "correction", "rejected_images", "second"),
)
"""Every field that is read, in any layout."""


Conversation = tuple[tuple[str, str], ...]
"""(role, text) of every turn; IMAGE_TOKEN in a text is where an image is shown."""


class NamedRow(dict[str, Any]):
    """A row under RLAIF-V's names without its null fields.

    `called` maps a name to what the row's file calls it, where that differs; `found` lists the file's own fields. Both
    are for messages, which must name what the user can find in the file.
    """

    def __init__(
        self, values: Mapping[str, Any], called: Mapping[str, str] | None = None, found: Sequence[str] | None = None
    ) -> None:
        super().__init__({name: value for name, value in values.items() if value is not None})
        self.called = dict(called or {})
        self.found = sorted(map(str, self) if found is None else found)

    def name(self, *fields: str) -> str:
        """What the file calls a field; of several with one meaning those that the file has, or all."""
        own = [self.called[field] for field in fields if field in self.called]
        return " or ".join(own or fields)

    def put(self, field: str, value: Any, *, called: str) -> None:
        """Set a field that the file has under another name."""
        self[field] = value
        self.called[field] = self.called.pop(called, called)

    def replaced(self, **values: Any) -> NamedRow:
        """A copy with other values of some fields."""
        return NamedRow({**self, **values}, self.called, self.found)


def text_of(row: Mapping[str, Any], *names: str) -> str:
    """The first of these fields that the row has, as valid Unicode text. Raises ValueError naming the file's field."""
    named = row if isinstance(row, NamedRow) else NamedRow(row)
    name = next((name for name in names if name in named), None)
    if name is None:
        raise ValueError(f"no field {named.name(*names)}; it has {', '.join(named.found) or 'none'}")
    return checked_text(named.name(name), named[name])


def checked_text(name: str, value: Any) -> str:
    """The value where it is valid Unicode text. Raises ValueError naming the field."""
    if not isinstance(value, str):
        raise ValueError(f"field {name}: expected text, got {type(value).__name__}")
    if not value.isascii() and has_half_character(value):
        raise ValueError(f"field {name}: half of a surrogate pair, which is no character")
    return value


def has_half_character(text: str) -> bool:
    """Whether the text contains an unpaired surrogate code point."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def json_field(name: str, value: Any) -> Any:
    """The value, parsed where it is text. Raises ValueError naming the field."""
    try:
        return json.loads(value) if isinstance(value, str) else value
    except json.JSONDecodeError as error:
        raise ValueError(f"field {name}: not JSON (column {error.colno})") from error
    except (ValueError, RecursionError) as error:  # a number of too many digits, too many brackets
        raise ValueError(f"field {name}: JSON with too long a number or too many brackets") from error


# ----------------------------------------------------------------------------------------------------------- layouts


def named_fields(row: Mapping[str, Any]) -> NamedRow:
    """The row under RLAIF-V's names, with plain texts, a path or several (`images`), and the turns of its `prompt`.

    Layouts are told apart by their fields:
        RLAIF-V        question, chosen, rejected
        TRL            prompt, chosen, rejected, each text or a list of messages; the prompt inside both, too
        RLHF-V         text, a JSON text of question, chosen and rejected
        ms-swift       messages (or query, response) and rejected_response or rejected_messages
        LLaMA-Factory  conversations or messages with the question; chosen and rejected, a message each
        PDS-DPO        conversations and rejected_conversations
        first errors   answer, first_error (its first wrong sentence) and correction: a pair with a context (SENTINEL)
    each with image, image_path or images, one image or a list; an empty list says that the pair is of texts alone.
    Messages become the field `prompt`, see Conversation; where all is one text, there is only the question.

    Raises ValueError, naming the fields of the file, where this is not one conversation with two answers.
    """
    row = NamedRow(row, row.called, row.found) if isinstance(row, NamedRow) else NamedRow(row)
    if "chosen" not in row:
        _name_answers(row)
    if "chosen" not in row and "first_error" in row:
        _name_first_error(row)
    _name_question(row)
    for name in ("question", *ANSWERS):
        if name in row:
            row[name] = _parsed_messages(row[name])
    row["history"] = _earlier_turns(row)
    if row["history"] or any(isinstance(row.get(name), list | dict) for name in ("question", *ANSWERS)):
        _set_plain_texts(row)
    _name_images(row)
    return row


def _name_answers(row: NamedRow) -> None:
    """Set chosen and rejected, and what belongs to them, of the layouts that call them something else."""
    if "rejected_conversations" in row:
        _rename(row, "chosen", "conversations")
        _rename(row, "rejected", "rejected_conversations")
    elif "rejected_response" in row or "rejected_messages" in row:
        _rename(row, "rejected", "rejected_response" if "rejected_response" in row else "rejected_messages")
        _rename(row, "chosen", next((name for name in ("messages", "conversations") if name in row), "response"))
        _share_question(row)
    elif "text" in row and "rejected" not in row:
        _name_inside_text(row)


def _name_first_error(row: NamedRow) -> None:
    """An answer whose first wrong sentence is marked: what is before it is the context of two sentences.

    Raises ValueError where the sentence is not in the answer exactly once, or a field is missing.
    """
    answer, wrong = text_of(row, "answer"), text_of(row, "first_error").strip()
    if not wrong or answer.count(wrong) != 1:
        found = f"{answer.count(wrong)} times" if wrong else "an empty text"
        raise ValueError(f"field {row.name('first_error')}: expected a sentence of {row.name('answer')}, got {found}")
    row["context"] = answer[: answer.index(wrong)].rstrip()
    row["rejected"], row["chosen"] = wrong, text_of(row, "correction").strip()
    row.called |= {"rejected": row.name("first_error"), "chosen": row.name("correction")}


def _rename(row: NamedRow, field: str, old: str) -> None:
    if old in row:
        row.put(field, json_field(row.name(old), row.pop(old)) if old.endswith("s") else row.pop(old), called=old)


def _share_question(row: NamedRow) -> None:
    """ms-swift's messages end in the chosen answer; the rejected one has the same question before it."""
    turns = row.get("chosen")
    if isinstance(turns, list) and turns and "question" not in row and not _has_user(row["rejected"]):
        row["question"], row["chosen"] = turns[:-1], turns[-1:]
        row.called["question"] = row.called["chosen"]


def _has_user(value: Any) -> bool:
    messages = value if isinstance(value, list) else []
    return any(isinstance(message, dict) and _role(message) == "user" for message in messages)


def _name_inside_text(row: NamedRow) -> None:
    """RLHF-V keeps a record with the three texts as JSON in one field."""
    inside = json_field(row.name("text"), row["text"])
    if not isinstance(inside, dict):
        got = type(inside).__name__
        raise ValueError(f"field {row.name('text')}: expected JSON of question, chosen and rejected, got {got}")
    for field in ("question", *ANSWERS):
        if inside.get(field) is not None and field not in row:
            row[field] = inside[field]
            row.called[field] = f"{row.name('text')}.{field}"
    row.found = sorted({*row.found, *(f"{row.name('text')}.{field}" for field in inside)})


def _name_question(row: NamedRow) -> None:
    names = [name for name in ("prompt", "query", "conversations", "messages") if name in row]
    for name in names:
        value = row.pop(name)
        if "question" not in row:
            turns = value if name in ("prompt", "query") else json_field(row.name(name), value)
            row.put("question", turns, called=name)


def _parsed_messages(value: Any) -> Any:
    """A list of messages that a table holds as JSON text; any other text is the text itself."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[{", "{")):
        return value
    try:
        parsed = json.loads(value)
    except (ValueError, RecursionError):
        return value
    messages = parsed if isinstance(parsed, list) else [parsed]
    known = all(isinstance(message, dict) and _role(message) and _content(message) is not None for message in messages)
    return parsed if messages and known else value


def _earlier_turns(row: NamedRow) -> list[dict[str, Any]]:
    """The messages of ms-swift's history: [question, answer] of every earlier turn."""
    history = json_field(row.name("history"), row.get("history")) or []
    if not isinstance(history, list) or not all(isinstance(turn, list) and len(turn) == 2 for turn in history):
        got = str(history)[:60]
        raise ValueError(f"field {row.name('history')}: expected a list of [question, answer], got {got}")
    return [{"role": role, "content": text} for turn in history for role, text in zip((USER, ASSISTANT), turn)]


def _set_plain_texts(row: NamedRow) -> None:
    """prompt, question, chosen and rejected of a conversation that is told twice and ends in two ways."""
    (prompt, chosen), (other, rejected) = (_prompt_and_answer(row, name) for name in ANSWERS)
    if prompt != other:
        names = " and ".join(row.name(name) for name in ANSWERS)
        raise ValueError(f"fields {names}: their conversations ask different questions")
    if "question" not in row:
        row.called["question"] = row.name("chosen")
    row |= {"prompt": prompt, "question": prompt[-1][1], "chosen": chosen, "rejected": rejected}


def _prompt_and_answer(row: NamedRow, answer: str) -> tuple[Conversation, str]:
    turns = [*_turns(row, "history", USER), *_turns(row, "question", USER), *_turns(row, answer, ASSISTANT)]
    roles = [role for role, _ in turns]
    spoken = roles[1:] if roles[:1] == [SYSTEM] else roles
    if not spoken or len(spoken) % 2 or spoken != [USER, ASSISTANT] * (len(spoken) // 2):
        expected = "expected turns of user and assistant by turns, the last one the answer"
        raise ValueError(f"field {row.name(answer)}: {expected}, got {', '.join(roles) or 'nothing'}")
    return tuple((role, text.strip()) for role, text in turns[:-1]), turns[-1][1]


def _turns(row: NamedRow, field: str, role: str) -> list[tuple[str, str]]:
    """(role, text) of every message; a plain text is one message of the given role, an empty system message none."""
    name, value = row.name(field), row.get(field)
    if value is None:
        return []
    if isinstance(value, str):
        return [(role, checked_text(name, value))]
    messages = [value] if isinstance(value, dict) else value
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise ValueError(f"field {name}: expected text or a list of messages, got {str(value)[:60]}")
    turns = [_message(name, message) for message in messages]
    return [turn for turn in turns if turn[0] != "system" or turn[1].strip()]


def _message(name: str, message: dict[str, Any]) -> tuple[str, str]:
    """Role and text of {role, content} or {from, value}; of a content of parts its texts, and where its images are."""
    content = _content(message)
    if isinstance(content, list) and all(isinstance(part, dict) for part in content):
        content = "".join(_part(name, part) for part in content)
    if not isinstance(content, str):
        raise ValueError(f"field {name}: a message without text ({str(message)[:60]})")
    return _role(message), checked_text(name, content)


def _part(name: str, part: Mapping[str, Any]) -> str:
    kind = part.get("type") or "text"
    if kind in ("image", "image_url"):
        return IMAGE_TOKEN
    if kind != "text":
        raise ValueError(f"field {name}: expected parts of type text or image, got {kind}")
    return checked_text(f"{name}.text", part.get("text"))


def _role(message: dict[str, Any]) -> str:
    role = next((message[key] for key in ("role", "from") if message.get(key) is not None), "")
    return ROLES.get(str(role), str(role))


def _content(message: dict[str, Any]) -> Any:
    return next((message[key] for key in ("content", "value") if message.get(key) is not None), None)


def _name_images(row: NamedRow) -> None:
    """Set image from one image under any of its names, `images` from several or from none.

    An image is a path, bytes, or {path, bytes}, which becomes the path where it has no bytes.
    """
    images = row.pop("images", None)
    if images is not None and "image" not in row and "image_path" not in row:
        row.put("image", images, called="images")
    for name in ("image", "image_path"):
        value = _parsed_list(row.get(name))
        if not isinstance(value, list):
            value = [value]
        elif len(value) != 1:
            row.put("images", [_path_alone(image) for image in value], called=row.name(name))
        if name in row:
            row[name] = _path_alone(value[0]) if value else None
    if "images" in row:
        for name in ("image", "image_path"):
            row.pop(name, None)


def _path_alone(image: Any) -> Any:
    """The path of {path, bytes} without bytes; anything else as it is."""
    alone = isinstance(image, dict) and isinstance(image.get("path"), str) and image.get("bytes") is None
    return image["path"] if alone else image


def _parsed_list(value: Any) -> Any:
    """A list that a table holds as JSON text; any other value is itself."""
    if not isinstance(value, str) or not (value.startswith("[") and value.endswith("]")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
