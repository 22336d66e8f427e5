"""Conversations as they are read: their form, their equality, and files of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from xtoken.data import Conversation, keep_apart, read_documents, read_texts, split_held_out
from xtoken.errors import DataError

USER = {"role": "user", "content": "2 + 2?"}
ASSISTANT = {"role": "assistant", "content": "4"}


def write_lines(path: Path, *lines: Any) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def numbered(count: int) -> list[Conversation]:
    return [
        Conversation.from_messages([{"role": "user", "content": f"{n} + 1?"}, ASSISTANT])
        for n in range(count)
    ]


def test_a_conversation_ends_with_the_last_answer() -> None:
    talk = Conversation.from_messages([USER, ASSISTANT, USER, ASSISTANT, USER])
    assert talk.messages == [USER, ASSISTANT, USER, ASSISTANT]
    assert talk.answer_ends == [2, 4]


def test_what_a_message_holds_beside_role_and_content_is_kept_but_for_nulls() -> None:
    message = {"tool_calls": None, "name": "x", "content": "hi", "role": "user"}
    talk = Conversation.from_messages([message, ASSISTANT])
    assert talk.messages[0] == {"role": "user", "content": "hi", "name": "x"}


def test_conversations_are_equal_by_their_messages_and_do_not_change() -> None:
    messages = [dict(USER), dict(ASSISTANT)]
    talk = Conversation.from_messages(messages, source="a.jsonl:1")
    same = Conversation.from_messages([dict(reversed(m.items())) for m in messages], source="b")
    assert talk == same
    assert len({talk, same}) == 1
    messages[0]["content"] = "changed"
    talk.messages[0]["content"] = "changed"
    assert talk.messages == [USER, ASSISTANT]


def test_a_file_may_hold_texts_and_conversations(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "data.jsonl",
        {"text": "plain"},
        {"messages": [USER, ASSISTANT]},
        {"text": None, "messages": [USER, ASSISTANT]},
        {"text": "text first", "messages": [USER, ASSISTANT]},
        {"text": " "},
    )
    talk = Conversation.from_messages([USER, ASSISTANT])
    documents = read_documents(path)
    assert documents == ["plain", talk, talk, "text first"]
    assert isinstance(documents[1], Conversation)
    assert documents[1].source == f"{path}:2"


def test_a_named_field_holds_texts_or_conversations(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "data.jsonl", {"chat": [USER, ASSISTANT]}, {"chat": "plain"})
    talk = Conversation.from_messages([USER, ASSISTANT])
    assert read_documents(path, field="chat") == [talk, "plain"]
    with pytest.raises(DataError, match=r"data\.jsonl:1 has messages in field 'chat', expected a"):
        read_texts(path, text_field="chat")


def test_the_split_of_conversations_is_disjoint_and_stays_when_more_come() -> None:
    talks = numbered(60)
    split = split_held_out([*talks, talks[0], "a text"], 0.3)
    assert split.dropped == 1
    assert not set(split.train) & set(split.held_out)
    assert len(split.train) + len(split.held_out) == 61
    assert set(split_held_out(talks[:30], 0.3).held_out) <= set(split.held_out)
    apart = keep_apart(talks[:10], talks[8:12])
    assert (apart.train, apart.held_out, apart.dropped) == (talks[:8], talks[8:12], 2)


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ("hello", r"messages = 'hello', expected a list of objects with role and content; write"),
        (None, r"messages = None, expected a list"),
        ([], r"none of 0 messages is of role 'assistant'"),
        ([USER], r"none of 1 messages is of role 'assistant', expected at least one"),
        ([ASSISTANT], r"messages\[0\] is of role 'assistant', expected 'system' or 'user'"),
        ([USER, "4"], r"messages\[1\] = '4', expected an object with role and content"),
        (
            [USER, {"role": "gpt", "content": "4"}],
            r"messages\[1\]\.role = 'gpt', expected a role among system, developer, user, ass.*ren",
        ),
        (
            [{"role": ["user"], "content": "4"}],
            r"messages\[0\]\.role = \['user'\], expected a role",
        ),
        (
            [{"from": "human", "value": "4"}],
            r"messages\[0\] has fields \['from', 'value'\], expected a role",
        ),
        ([{"role": "user"}, ASSISTANT], r"messages\[0\]\.content = None, expected a string"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "4"}]}, ASSISTANT],
            r"messages\[0\]\.content = \[\{'type': 'text', 'text': '4'\}\], expected a string",
        ),
        ([USER, {"role": "assistant", "content": 4}], r"messages\[1\]\.content = 4, expected a st"),
        (
            [USER, {"role": "assistant", "content": " \n"}],
            r"messages\[1\]\.content = ' \\n', expected what the assistant says; leave",
        ),
        (
            [{"role": "user", "content": "ab\ud83d"}, ASSISTANT],
            r"messages\[0\]\.content holds half a character, '\\ud83d', at 2",
        ),
        (
            [
                USER,
                ASSISTANT | {"tool_calls": [{"function": {"name": "a", "arguments": ["\ud83d"]}}]},
            ],
            r"messages\[1\]\.tool_calls\[0\]\.function\.arguments\[0\] holds half a character",
        ),
        (
            [USER, ASSISTANT | {"extra": {"\ud83d": 1}}],
            r"a key of messages\[1\]\.extra holds half a character",
        ),
        (
            [USER, ASSISTANT | {"weight": 0.5}],
            r"messages\[1\]\.weight = 0\.5, expected 0 or 1, as an answer is learned or it is",
        ),
        (
            [USER, ASSISTANT | {"train": "no"}],
            r"messages\[1\]\.train = 'no', expected False or True",
        ),
        (
            [USER, ASSISTANT | {"weight": 0}],
            r"every message of role 'assistant' has weight 0 or train false, expected at least one",
        ),
    ],
)
def test_messages_of_another_form_are_refused_with_the_place(messages: Any, message: str) -> None:
    with pytest.raises(DataError, match=f"chats:3: {message}"):
        Conversation.from_messages(messages, source="chats:3")


def test_values_that_json_has_not_are_refused() -> None:
    with pytest.raises(DataError, match="messages or tools hold what JSON cannot"):
        Conversation.from_messages([USER | {"when": {1, 2}}, ASSISTANT])


def test_tools_are_part_of_a_conversation_and_read_beside_it(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "add"}}
    path = write_lines(
        tmp_path / "data.jsonl",
        {"messages": [USER, ASSISTANT], "tools": [tool]},
        {"messages": [USER, ASSISTANT], "tools": None},
        {"messages": [USER, ASSISTANT], "tools": []},
    )
    first, *others = read_documents(path)
    assert isinstance(first, Conversation)
    assert first.tools == [tool]
    assert others == [Conversation.from_messages([USER, ASSISTANT])] * 2
    assert first not in others
    with pytest.raises(DataError, match=r":1: tools = 'add', expected a list of objects, the JSON"):
        read_documents(write_lines(path, {"messages": [USER, ASSISTANT], "tools": "add"}))
    with pytest.raises(DataError, match=r"tools = \['add'\], expected a list of objects"):
        Conversation.from_messages([USER, ASSISTANT], tools=["add"])


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(DataError) as raised:
        Conversation.from_messages([{"role": "x" * 1000, "content": ""}])
    assert len(str(raised.value)) < 250


def test_bad_lines_are_named_with_the_remedy(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    with pytest.raises(DataError, match=r"data\.jsonl:2: messages\[1\]\.role = 'gpt'"):
        read_documents(
            write_lines(
                path,
                {"messages": [USER, ASSISTANT]},
                {"messages": [USER, {"role": "gpt", "content": "4"}]},
            )
        )
    with pytest.raises(DataError, match=r":1: messages = None, expected a list"):
        read_documents(write_lines(path, {"messages": None}))
    with pytest.raises(DataError, match=r":1 has no string in field 'text' and no messages; name"):
        read_documents(write_lines(path, {"prompt": "2 + 2?"}))
    with pytest.raises(DataError, match=r":1 has no string in field 'body' and no list of mess"):
        read_documents(write_lines(path, {"body": 3}), field="body")
    with pytest.raises(DataError, match=r":1 has no string in field 'text' and no messages"):
        read_documents(write_lines(path, ["text"]))


def test_nulls_that_arrow_adds_at_any_depth_are_dropped_and_those_in_lists_and_strings_stay() -> (
    None
):
    call = {
        "type": "function",
        "id": None,
        "function": {
            "name": "lookup",
            "arguments": {
                "city": "Paris",
                "unit": None,
                "at": {"x": None, "y": [None, {"z": None}]},
            },
        },
    }
    as_text = {"function": {"name": "f", "arguments": '{"unit": null}'}}
    tool = {
        "type": "function",
        "function": {
            "name": "lookup",
            "parameters": {
                "properties": {
                    "city": {"type": "string", "enum": ["Paris", None], "default": None},
                    "unit": None,
                }
            },
        },
    }
    talk = Conversation.from_messages(
        [USER, {"role": "assistant", "content": None, "tool_calls": [call, as_text]}], tools=[tool]
    )
    assert talk.messages[1]["tool_calls"] == [
        {
            "type": "function",
            "function": {
                "name": "lookup",
                "arguments": {"city": "Paris", "at": {"y": [None, {}]}},
            },
        },
        as_text,
    ]
    assert talk.tools is not None
    assert talk.tools[0]["function"]["parameters"] == {
        "properties": {"city": {"type": "string", "enum": ["Paris", None]}}
    }
    # What was given is left as it was.
    assert call["id"] is None


def test_tool_calls_that_arrow_wrote_are_taught_as_they_were_made(tmp_path: Path) -> None:
    def row(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        call = {"type": "function", "function": {"name": name, "arguments": arguments}}
        answer = {"role": "assistant", "content": "", "tool_calls": [call]}
        return {"messages": [USER | {"tool_calls": None}, answer]}

    path = write_lines(
        tmp_path / "data.jsonl",
        row("lookup", {"city": "Paris", "a": None, "b": None}),
        row("add", {"city": None, "a": 1, "b": 2}),
    )
    made = []
    for talk in read_documents(path):
        assert isinstance(talk, Conversation)
        assert list(talk.messages[0]) == ["role", "content"]
        made.append(talk.messages[1]["tool_calls"][0]["function"]["arguments"])
    assert made == [{"city": "Paris"}, {"a": 1, "b": 2}]


def test_a_conversation_ends_with_the_last_answer_that_is_learned() -> None:
    talk = Conversation.from_messages([USER, ASSISTANT, USER, ASSISTANT | {"weight": 0}])
    assert talk.messages == [USER, ASSISTANT]
    talk = Conversation.from_messages([USER, ASSISTANT | {"weight": 0}, USER, ASSISTANT])
    assert talk.answers_learned == [False, True]


def test_messages_nested_too_deeply_are_refused_in_one_line() -> None:
    deep: Any = "x"
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(DataError, match="a:1: messages or tools are nested too deeply; flatten"):
        Conversation.from_messages([USER | {"extra": deep}, ASSISTANT], source="a:1")
    with pytest.raises(DataError, match="nested too deeply"):
        Conversation.from_messages([USER, ASSISTANT], tools=[{"x": deep}])
