"""Conversations: lists of messages, checked once, so that what follows can rely on their form."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from xtoken.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")

Message = dict[str, Any]


@dataclass(frozen=True)
class Conversation:
    """Messages up to the last one of the assistant; those after it teach nothing.

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
                `tool_calls` may have no content.
            tools: a list of JSON schemas of functions, for the chat template; None for no tools.
            source: where they were read.
        Raises:
            DataError: if a message has another form, the assistant speaks first or never, or says
                nothing.
        """
        if not isinstance(messages, list | tuple):
            raise DataError(
                f"{source}: messages = {_shown(messages)}, expected a list of objects with role "
                "and content; write them as OpenAI and TRL do"
            )
        checked = [_checked(message, at, source) for at, message in enumerate(messages)]
        roles = [message["role"] for message in checked]
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
        if tools is not None and not (
            isinstance(tools, list | tuple) and all(isinstance(tool, Mapping) for tool in tools)
        ):
            raise DataError(
                f"{source}: tools = {_shown(tools)}, expected a list of objects, the JSON schemas "
                "of functions; write them as OpenAI and TRL do"
            )
        last = len(roles) - roles[::-1].index("assistant")
        try:
            return cls(json.dumps(checked[:last]), json.dumps(tools or None), source)
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
    rest = {str(key): value for key, value in message.items() if value is not None}
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
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{name}.content holds half a character, {content[error.start]!r}, at {error.start}; "
            "expected Unicode text; write whole characters"
        ) from error
    return {"role": role, "content": content} | rest


def _speaks(message: Mapping[str, Any]) -> bool:
    return bool(message.get("tool_calls") or message.get("reasoning_content"))


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
