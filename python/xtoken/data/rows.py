"""What a row of a dataset is: a text, a conversation, or a prompt and its completion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from xtoken._checks import half_character
from xtoken.data.completions import Completion
from xtoken.data.conversations import Conversation
from xtoken.errors import ArgumentTypeError, BlankTextError, DataError

Document: TypeAlias = str | Conversation | Completion

Readable: TypeAlias = Document | Mapping[str, Any] | Sequence[Mapping[str, Any]]
"""What `as_document` reads: a document, a row with one, or a list of messages."""

# Columns of messages, never of a text.
_LISTS = ("messages", "conversations")

# ShareGPT's names of who speaks, by the role of OpenAI and TRL.
_SPEAKERS = {
    "human": "user", "user": "user",
    "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant", "model": "assistant",
    "function_call": "assistant",
    "system": "system", "developer": "developer",
    "tool": "tool", "observation": "tool", "function_response": "tool", "function": "tool",
}  # fmt: skip


def document_of(row: Mapping[str, object], *, field: str | None = None, source: str) -> Document:
    """The document in a row.

    Args:
        row: by column: `text`; `messages` (roles and contents, as OpenAI and TRL write them);
            `prompt` and `completion`, both texts or both lists of messages; or ShareGPT's
            `conversations` (`from` and `value`, with a column `system` or without). Beside messages
            may be `tools`, a list of JSON schemas. Lists may be the JSON of one, as CSV has them.
            The first of these that is not null counts.
        field: the column that holds the text or the messages, where it is none of these.
        source: where the row was read, for messages.

    Raises:
        DataError: the row holds nothing of the kind, or something that cannot be used; a
            `BlankTextError` where its text is blank.

    >>> document_of({"prompt": "2 + 2 = ", "completion": "4"}, source="row 0").completion
    '4'
    >>> talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    >>> [each["role"] for each in document_of({"conversations": talk}, source="row 0").messages]
    ['user', 'assistant']
    """
    if field is not None:
        return _of_field(
            row, field, source, "no list of messages; name the field that holds either"
        )
    field = _column(row)
    if field == "prompt":
        return _prompted(row, source)
    shown = ", ".join(map(repr, list(row)[:8])) or "nothing"
    remedy = (
        "no messages; name the field that holds the text or the messages, or give 'prompt' and "
        f"'completion' or ShareGPT's 'conversations': it has {shown}"
    )
    return _of_field(row, field, source, remedy)


def as_document(item: object, source: str, *, also: str = "") -> Document:
    """The document that an item is.

    Args:
        source: its place, for messages.
        also: what else may stand there.

    Raises:
        ArgumentTypeError: it is none.
        DataError: it cannot be used.
    """
    if isinstance(item, str):
        check_not_blank(item, source)
        return item
    if isinstance(item, Conversation | Completion):
        return item
    if isinstance(item, Mapping):
        return document_of(item, source=source)
    if isinstance(item, list | tuple):
        return document_of({"messages": item}, source=source)
    raise ArgumentTypeError(
        f"{source} is a {type(item).__name__}; pass a text, a list of messages, or a row with one "
        f"of them{also}"
    )


def _column(row: Mapping[str, object]) -> str:
    for name in ("text", "messages", "prompt", "conversations"):
        if row.get(name) is not None and (name != "prompt" or "completion" in row):
            return name
    return "messages" if "messages" in row else "text"


def _of_field(row: Mapping[str, object], field: str, source: str, remedy: str) -> Document:
    found = row.get(field)
    if field in _LISTS and isinstance(found, str):
        parsed = _from_json(found)
        if isinstance(parsed, str):
            raise DataError(
                f"{source}: {field} = {found[:60]!r}, expected a list of messages or the JSON of "
                "one; a text belongs in the column 'text'"
            )
        found = parsed
    if isinstance(found, str):
        check_text(found, f"{source}: field {field!r}")
        check_not_blank(found, source)
        return found
    if isinstance(found, list | tuple) or field in _LISTS:
        return _conversation(found, row, source)
    raise DataError(f"{source} has no string in field {field!r} and {remedy}")


def _prompted(row: Mapping[str, object], source: str) -> Document:
    prompt, completion = (_messages_or_text(row.get(name)) for name in ("prompt", "completion"))
    if isinstance(prompt, str) and isinstance(completion, str):
        for name, text in (("prompt", prompt), ("completion", completion)):
            check_text(text, f"{source}: field {name!r}")
        return Completion(prompt, completion, source)
    if isinstance(prompt, list | tuple) and isinstance(completion, list | tuple):
        return _conversation([*prompt, *completion], row, source, answer_from=len(prompt))
    raise DataError(
        f"{source}: prompt is a {type(prompt).__name__} and completion a "
        f"{type(completion).__name__}; pass two texts, or two lists of messages"
    )


def _messages_or_text(value: object) -> object:
    """The messages that a text holds as JSON; a text that holds none is one."""
    found = _from_json(value)
    messages = isinstance(found, list) and all(
        isinstance(each, dict) and ("role" in each or "from" in each) for each in found
    )
    return found if messages and found else value


def _conversation(
    messages: object, row: Mapping[str, object], source: str, *, answer_from: int = 0
) -> Conversation:
    if isinstance(messages, list | tuple):
        messages = [_message(each, at, source) for at, each in enumerate(messages)]
        for message in messages[:answer_from]:
            # What a prompt has of the assistant was said; the completion is learned.
            if isinstance(message, dict) and message.get("role") == "assistant":
                message["weight"] = 0
        system = row.get("system")
        if isinstance(system, str) and system.strip() and messages:
            first = messages[0]
            if not (isinstance(first, Mapping) and first.get("role") == "system"):
                messages.insert(0, {"role": "system", "content": system})
    return Conversation.from_messages(messages, tools=_from_json(row.get("tools")), source=source)


def _message(message: object, at: int, source: str) -> object:
    """A message as OpenAI writes it; what is none is refused with the conversation."""
    if not isinstance(message, Mapping):
        return message
    given = dict(message)
    if given.get("role") is None and "from" in given:
        speaker, value = given.pop("from"), given.pop("value", None)
        if speaker not in _SPEAKERS:
            raise DataError(
                f"{source}: messages[{at}].from = {str(speaker)[:60]!r}, expected one of "
                f"{', '.join(_SPEAKERS)}; rename it"
            )
        given |= {"role": _SPEAKERS[speaker], "content": value}
        if speaker == "function_call":
            given |= {"content": "", "tool_calls": _calls(value, at, source)}
    if isinstance(given.get("tool_calls"), str):
        given["tool_calls"] = _from_json(given["tool_calls"])
    return given


def _calls(value: object, at: int, source: str) -> list[dict[str, Any]]:
    """The calls that a `function_call` of ShareGPT holds as JSON: one, or a list."""
    found = _from_json(value)
    calls = found if isinstance(found, list) else [found]
    functions = [dict(each) for each in calls if isinstance(each, Mapping) and "name" in each]
    if not functions or len(functions) != len(calls):
        raise DataError(
            f"{source}: messages[{at}].value = {str(value)[:60]!r}, expected the JSON of a "
            "function call with name and arguments"
        )
    return [{"type": "function", "function": each} for each in functions]


def _from_json(value: object) -> object:
    """The value of a string of JSON, as datasets keep what Arrow has no type for; else as it is."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def check_text(text: str, place: str) -> None:
    """Refuse a text with half a character, which no tokenizer takes.

    Raises: DataError, which begins with the place.
    """
    fault = half_character(text)
    if fault is not None:
        raise DataError(f"{place} {fault}")


def check_not_blank(text: str, source: str) -> None:
    """Refuse a text of white space alone."""
    if not text.strip():
        raise BlankTextError(f"{source}: its text is blank; leave it out")


def reason_of(error: DataError, source: str) -> str:
    """Why the row at `source` cannot be used, without the place, which stands beside it."""
    if isinstance(error, BlankTextError):
        return "its text is blank"
    return str(error).removeprefix(source).lstrip(": ")
