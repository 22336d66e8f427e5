"""Conversations: lists of messages, checked once, so that what follows can rely on their form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xtoken._checks import half_character
from xtoken.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, Any]

# Fields by which data says that an answer is not to be learned, with their values.
_LEARNED: dict[str, tuple[object, object]] = {"weight": (0, 1), "train": (False, True)}


@dataclass(frozen=True)
class Conversation:
    """Messages up to the last one of the assistant that is learned; those after it teach nothing.

    Hashable, and equal to another with the same messages, wherever each was read.

    Args:
        json: the messages as JSON; see `from_messages`.
        tools_json: the tools that the assistant may call, as JSON.
        source: where they were read, for messages about them.
    """

    json: str
    tools_json: str = "null"
    source: str = field(default="conversation", compare=False)

    @classmethod
    def from_messages(
        cls, messages: object, *, tools: object = None, source: str = "conversation"
    ) -> Conversation:
        """Check messages in the form of OpenAI and TRL.

        Args:
            messages: a list of `{"role": ..., "content": ...}` with strings. Roles are system,
                developer, user, assistant and tool. What else a message holds (`tool_calls`,
                `reasoning_content`) is handed to the chat template. An assistant message with
                `tool_calls` may have no content; one with `"weight": 0` (OpenAI) or
                `"train": false` is read and not learned.
            tools: a list of JSON schemas of functions, for the chat template; None for no tools.
            source: where they were read.

        A field of an object that is null counts as absent, at any depth of messages and tools:
        Arrow gives each object the fields of all others, and its nulls cannot be told from meant
        ones. A null in a list stays (`"enum": ["a", null]`), and so does one inside a string
        (`"arguments": "{\\"unit\\": null}"`).

        Raises:
            DataError: if a message has another form, the assistant speaks first or never, or says
                nothing, or a string holds half a character.
        """
        try:
            return cls._from_messages(messages, tools, source)
        except RecursionError as error:
            raise DataError(
                f"{source}: messages or tools are nested too deeply; flatten them"
            ) from error

    @classmethod
    def _from_messages(cls, messages: object, tools: object, source: str) -> Conversation:
        if not isinstance(messages, list | tuple):
            raise DataError(
                f"{source}: messages = {_shown(messages)}, expected a list of objects with role "
                "and content; write them as OpenAI and TRL do"
            )
        checked = [_checked(message, at, source) for at, message in enumerate(messages)]
        roles = [message["role"] for message in checked]
        learned = [at for at, message in enumerate(checked, 1) if _is_learned(message)]
        if "assistant" not in roles:
            raise DataError(
                f"{source}: none of {len(roles)} messages is of role 'assistant', expected at "
                "least one, as only what the assistant says is learned; leave the line out"
            )
        if roles[0] == "assistant":
            raise DataError(
                f"{source}: messages[0] is of role 'assistant', expected 'system' or 'user', as "
                "nothing prompts it; leave the message out or put a prompt before it"
            )
        if not learned:
            raise DataError(
                f"{source}: every message of role 'assistant' has weight 0 or train false, "
                "expected at least one that is learned; leave the line out"
            )
        if tools is not None and not (
            isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)
        ):
            raise DataError(
                f"{source}: tools = {_shown(tools)}, expected a list of objects, the JSON schemas "
                "of functions; write them as OpenAI and TRL do"
            )
        tools = without_nulls(tools) or None
        for name, value in (("messages", checked), ("tools", tools)):
            place, fault = _half_within(value, name) or ("", "")
            if fault:
                raise DataError(f"{source}: {place} {fault}")
        try:
            return cls(json.dumps(checked[: learned[-1]]), json.dumps(tools), source)
        except (TypeError, ValueError) as error:
            raise DataError(
                f"{source}: messages or tools hold what JSON cannot ({error}); use strings, "
                "numbers, lists and objects"
            ) from error

    @property
    def messages(self) -> list[Message]:
        """The messages, a fresh copy each time."""
        return json.loads(self.json)  # type: ignore[no-any-return]

    @property
    def tools(self) -> list[Message] | None:
        """The tools, a fresh copy each time; None without any."""
        return json.loads(self.tools_json)  # type: ignore[no-any-return]

    @property
    def answer_ends(self) -> list[int]:
        """How many messages there are up to each one of the assistant, that one included."""
        roles = [message["role"] for message in self.messages]
        return [at for at, role in enumerate(roles, 1) if role == "assistant"]

    @property
    def answers_learned(self) -> list[bool]:
        """Whether each message of the assistant is learned; see `weight` in `from_messages`."""
        answers = [message for message in self.messages if message["role"] == "assistant"]
        return [_is_learned(message) for message in answers]


def _checked(message: object, at: int, source: str) -> Message:
    name = f"{source}: messages[{at}]"
    if not isinstance(message, Mapping):
        raise DataError(
            f"{name} = {_shown(message)}, expected an object with role and content; write "
            '{"role": "user", "content": "..."}'
        )
    role = message.get("role")
    if role not in ROLES:
        found = f".role = {_shown(role)}" if "role" in message else f" has fields {list(message)}"
        raise DataError(f"{name}{found}, expected a role among {', '.join(ROLES)}; rename it")
    # Chat templates print a None as "None".
    rest = {str(key): without_nulls(value) for key, value in message.items() if value is not None}
    content = rest.get("content")
    if role == "assistant" and rest.get("tool_calls"):
        content = rest.setdefault("content", "")
    if not isinstance(content, str):
        raise DataError(
            f"{name}.content = {_shown(content)}, expected a string; join the text of its parts"
        )
    if role == "assistant" and not content.strip() and not _speaks(rest):
        raise DataError(
            f"{name}.content = {content!r}, expected what the assistant says; leave the line out"
        )
    for key, allowed in _LEARNED.items():
        if role == "assistant" and key in rest and rest[key] not in allowed:
            raise DataError(
                f"{name}.{key} = {_shown(rest[key])}, expected {allowed[0]!r} or {allowed[1]!r}, "
                "as an answer is learned or it is not; leave the field out"
            )
    return {"role": role, "content": content} | rest


def _is_learned(message: Mapping[str, Any]) -> bool:
    return message["role"] == "assistant" and all(message.get(key, True) for key in _LEARNED)


def without_nulls(value: Any) -> Any:
    """Drop the fields that are null, at any depth; nulls in lists stay."""
    if isinstance(value, Mapping):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(item) for item in value]
    return value


def _half_within(value: object, place: str) -> tuple[str, str] | None:
    """Return the first string that holds half a character, by its place, and what it holds."""
    if isinstance(value, str):
        fault = half_character(value)
        return None if fault is None else (place, fault)
    items: list[tuple[str, object]] = []
    if isinstance(value, Mapping):
        for key, item in value.items():
            shown = f"{place}.{key}" if isinstance(key, str) and key.isidentifier() else place
            items += [(f"a key of {place}", key), (shown, item)]
    elif isinstance(value, list | tuple):
        items += [(f"{place}[{at}]", item) for at, item in enumerate(value)]
    return next((found for where, item in items if (found := _half_within(item, where))), None)


def _speaks(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls") or message.get("reasoning_content"))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
