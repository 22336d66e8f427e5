"""Conversations under real tokenizers: what is printed, and what of it the assistant says."""

from __future__ import annotations

import copy
import datetime
import functools
from typing import Any

import pytest
import tokenizer_zoo as zoo
from chat_families import DUMMY_PREFIX, LLAMA3, QWEN3, Family, family
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from xtoken import Vocab
from xtoken.data import Conversation, Encoded, Encoder
from xtoken.data.chat_template import ChatTemplate
from xtoken.data.loss_mask import RenderingEncoder
from xtoken.errors import DataError

from reference_loss_mask import walked_mask

KNOWN = ("smollm2", "deepseek", "llama3", "gemma", "mistral")
# Questions and answers in turn.
CONTENTS = {
    "plain": ["What is 12 * 12?", "It is 144."],
    "several turns": ["Hi", "Hello! How can I help?", "Count to 3.", "1, 2, 3", "Thanks", "Bye."],
    "one word": ["user", "assistant", "assistant", "user", "user", "user"],
    "the same twice": ["Say it again, please.", "Say it again, please.", "Again", "Again"],
    "code": ["Indent it:\n\tif x:\n\t\treturn 2024", "```python\n\tif x:\n\t\treturn 2_024\n```"],
    "scripts": ["机器学习?", "从教师那里学到了 2024 年。", "اَلْعَرَبِيَّةُ", "नमस्ते 안녕 👩‍👩‍👧‍👦 e\u0301"],
    "white space": ["  \n hi \t", "\n\n  indented answer \n\n", " ", "\ttab first, spaces last   "],
    "empty question": ["", "Are you there?"],
}


def conversation(contents: list[str], *, system: str | None = None) -> Conversation:
    messages = [{"role": "system", "content": system}] if system is not None else []
    for at, content in enumerate(contents):
        messages.append({"role": ("user", "assistant")[at % 2], "content": content})
    return Conversation.from_messages(messages)


@functools.cache
def encoder(tokenizer: Any) -> Encoder:
    return Encoder(tokenizer, vocab=vocab_of(tokenizer))


@functools.cache
def vocab_of(tokenizer: Any) -> Vocab:
    return Vocab.from_tokenizer(tokenizer)


def encode(talk: Conversation, tokenizer: Any) -> Encoded:
    (encoded,) = encoder(tokenizer).encode_conversation(talk)
    return encoded


def said(encoded: Encoded, tokenizer: Any) -> list[str]:
    """What the assistant says, turn by turn, markers included."""
    return [
        tokenizer.decode(encoded.ids[start:end].tolist(), clean_up_tokenization_spaces=False)
        for start, end in encoded.turns.tolist()
    ]


@functools.cache
def with_template(tokenizer: Any, template: str) -> Any:
    changed = copy.copy(tokenizer)
    changed.chat_template = template
    return changed


@pytest.mark.parametrize("case", CONTENTS)
@pytest.mark.parametrize("name", KNOWN)
def test_the_mask_is_that_of_walking_the_tokens_byte_by_byte(name: str, case: str) -> None:
    known = family(name)
    assert known.pieces is not None
    talk = conversation(CONTENTS[case], system=None if name == "gemma" else "Be brief.")
    encoded = encode(talk, known.tokenizer)
    expected = walked_mask(
        encoded.ids.tolist(), vocab_of(known.tokenizer), known.pieces(talk.messages)
    )
    assert encoded.loss_mask.tolist() == expected


PIECES = ["a", " b", "\n", " ", "\t", "2024", "é", "e\u0301", "你好", "👍🏽", "x = [1]", "\u2028"]
MARKERS = ["<|im_end|>", "<|im_start|>", "<|eot_id|>", "<｜end▁of▁sentence｜>", "user", "assistant"]
ANYTHING = st.lists(st.sampled_from(PIECES + MARKERS), max_size=8).map("".join)


@given(questions=st.lists(ANYTHING, min_size=1, max_size=3), data=st.data())
@pytest.mark.parametrize("name", ["smollm2", "deepseek", "llama3"])
def test_any_answer_is_in_the_mask_whole_and_nothing_else_is(
    name: str, questions: list[str], data: st.DataObject
) -> None:
    known = family(name)
    assert known.pieces is not None
    contents = []
    for question in questions:
        contents += [question, data.draw(ANYTHING.filter(str.strip))]
    talk = conversation(contents)
    encoded = encode(talk, known.tokenizer)
    expected = walked_mask(
        encoded.ids.tolist(), vocab_of(known.tokenizer), known.pieces(talk.messages)
    )
    assert encoded.loss_mask.tolist() == expected


@pytest.mark.parametrize("name", KNOWN)
def test_an_ordinary_answer_has_the_tokens_of_its_piece_alone(name: str) -> None:
    known = family(name)
    assert known.pieces is not None
    talk = conversation(CONTENTS["several turns"])
    encoded = encode(talk, known.tokenizer)
    pieces = known.pieces(talk.messages)
    # Llama-2's kind puts a space before a text that begins with a word.
    strip = 1 if name == "mistral" else 0
    answers = [text[strip:] for text, is_said in pieces if is_said]
    alone = [known.tokenizer(text, add_special_tokens=False).input_ids for text in answers]
    assert [encoded.ids[start:end].tolist() for start, end in encoded.turns.tolist()] == alone


@pytest.mark.parametrize("name", [*KNOWN, "qwen3"])
def test_ids_are_those_of_the_tokenizers_own_template_with_one_bos(name: str) -> None:
    tokenizer = family(name).tokenizer
    for contents in CONTENTS.values():
        talk = conversation(contents[:2])
        encoded = encode(talk, tokenizer)
        text = tokenizer.apply_chat_template(talk.messages, tokenize=False)
        assert encoded.ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
        if name not in ("smollm2", "qwen3"):  # whose <|im_start|> stands at every turn
            assert encoded.ids.tolist().count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("name", [*KNOWN, "qwen3"])
def test_the_end_of_the_turn_is_learned_and_the_line_break_after_it_is_not(name: str) -> None:
    tokenizer = family(name).tokenizer
    encoded = encode(conversation(CONTENTS["plain"]), tokenizer)
    ends = {"gemma": "<end_of_turn>", "smollm2": "<|im_end|>"}.get(name, tokenizer.eos_token)
    ((_, end),) = encoded.turns.tolist()
    assert tokenizer.convert_ids_to_tokens(int(encoded.ids[end - 1])) == ends
    assert encoded.loss_mask.sum() > 1
    assert not encoded.loss_mask[end:].any()


@pytest.mark.parametrize("name", KNOWN)
def test_the_prompt_of_an_answer_is_what_the_model_would_be_given(name: str) -> None:
    tokenizer = family(name).tokenizer
    talk = conversation(CONTENTS["several turns"])
    encoded = encode(talk, tokenizer)
    for (start, _), end in zip(encoded.turns.tolist(), talk.answer_ends, strict=True):
        prompt = tokenizer.apply_chat_template(
            talk.messages[: end - 1], tokenize=False, add_generation_prompt=True
        )
        prompt_ids = tokenizer(prompt, add_special_tokens=False).input_ids
        assert encoded.ids[:start].tolist() == prompt_ids


def generation_blocks(inside: str, after: str) -> str:
    return (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{% if message['role'] == 'assistant' %}{% generation %}{{ " + inside + " }}"
        "{% endgeneration %}{{ " + after + " }}"
        "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


@pytest.mark.parametrize(
    ("inside", "after"),
    [
        ("message['content'] + '<|im_end|>\n'", "''"),
        ("message['content'] + '<|im_end|>'", "'\n'"),
        ("message['content']", "'<|im_end|>\n'"),
    ],
)
@pytest.mark.parametrize("case", CONTENTS)
def test_generation_blocks_give_the_same_mask_wherever_they_end(
    inside: str, after: str, case: str
) -> None:
    tokenizer = family("smollm2").tokenizer
    talk = conversation(CONTENTS[case], system="Be brief.")
    marked = encode(talk, with_template(tokenizer, generation_blocks(inside, after)))
    plain = encode(talk, tokenizer)
    assert marked.ids.tolist() == plain.ids.tolist()
    assert marked.loss_mask.tolist() == plain.loss_mask.tolist()


def test_a_template_that_drops_earlier_thoughts_gives_one_sequence_for_each_answer() -> None:
    tokenizer = family("qwen3").tokenizer
    talk = conversation(
        ["One?", "<think>\nfirst thought\n</think>\n\nA.", "Two?", "B.", "Three?", "C."]
    )
    assert ChatTemplate(tokenizer).whole(talk) is None
    encoded = Encoder(tokenizer).encode_conversation(talk)
    assert [said(row, tokenizer) for row in encoded] == [
        ["<think>\nfirst thought\n</think>\n\nA.<|im_end|>"],
        ["<think>\n\n</think>\n\nB.<|im_end|>"],
        ["<think>\n\n</think>\n\nC.<|im_end|>"],
    ]
    for row, end in zip(encoded, talk.answer_ends, strict=True):
        # Each answer stands after the very prompt that the model gets at this point.
        prompt = tokenizer.apply_chat_template(
            talk.messages[: end - 1], tokenize=False, add_generation_prompt=True
        )
        start = int(row.loss_mask.argmax())
        assert row.ids[:start].tolist() == tokenizer(prompt, add_special_tokens=False).input_ids
        assert "first thought" not in prompt


def test_one_answer_needs_no_second_sequence() -> None:
    tokenizer = family("qwen3").tokenizer
    talk = conversation(["One?", "<think>\nhm\n</think>\n\nA."])
    assert said(encode(talk, tokenizer), tokenizer) == ["<think>\nhm\n</think>\n\nA.<|im_end|>"]


def test_of_generation_blocks_too_the_last_answer_can_be_taken_alone() -> None:
    tokenizer = with_template(
        family("smollm2").tokenizer, generation_blocks("message['content'] + '<|im_end|>'", "'\n'")
    )
    talk = conversation(CONTENTS["several turns"])
    rendering = ChatTemplate(tokenizer).last(talk, talk.messages[:4])
    (encoded,) = RenderingEncoder(tokenizer)([rendering])
    assert said(encoded, tokenizer) == ["1, 2, 3<|im_end|>"]


def test_messages_after_the_last_answer_are_left_out() -> None:
    tokenizer = family("smollm2").tokenizer
    asked = conversation([*CONTENTS["plain"], "And 13 * 13?"])
    assert encode(asked, tokenizer).ids.tolist() == (
        encode(conversation(CONTENTS["plain"]), tokenizer).ids.tolist()
    )


def test_a_template_without_generation_prompt_leaves_the_header_out_of_the_mask() -> None:
    template = LLAMA3[: LLAMA3.index("{% if add_generation_prompt")]
    tokenizer = family("llama3").tokenizer
    for contents in CONTENTS.values():
        talk = conversation(contents)
        bare = encode(talk, with_template(tokenizer, template))
        assert bare.loss_mask.tolist() == encode(talk, tokenizer).loss_mask.tolist()


def test_a_prompt_that_the_history_does_not_have_gives_way_to_the_history() -> None:
    # As DeepSeek-R1's: the prompt opens a thought, which the history drops.
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{{ message['content'].split('</think>')[-1] }}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
    )
    tokenizer = with_template(family("smollm2").tokenizer, template)
    talk = conversation(["One?", "<think>\nhm\n</think>A.", "Two?", "B."])
    assert said(encode(talk, tokenizer), tokenizer) == ["A.<|im_end|>", "B.<|im_end|>"]


def test_an_end_that_only_the_last_turn_gets_is_learned_in_every_turn() -> None:
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] }}"
        "{{ '<|im_end|>' if loop.last and message['role'] == 'assistant' else '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    )
    tokenizer = with_template(family("smollm2").tokenizer, template)
    talk = conversation(CONTENTS["several turns"])
    assert [said(row, tokenizer) for row in Encoder(tokenizer).encode_conversation(talk)] == [
        [" Hello! How can I help?<|im_end|>"],
        [" 1, 2, 3<|im_end|>"],
        [" Bye.<|im_end|>"],
    ]


def test_a_word_with_the_space_that_the_prompt_ends_in_is_in_the_mask() -> None:
    template = (
        "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    tokenizer = with_template(family("smollm2").tokenizer, template)
    encoded = encode(conversation(["Hi", "Hello there"]), tokenizer)
    # " Hello" holds the prompt's space. With no control token, the line break ends the turn.
    assert said(encoded, tokenizer) == [" Hello there\n"]
    # The same within the blocks by which a template says what is learned.
    template = (
        "{% for message in messages %}[{{ message['role'] }}] {% generation %}"
        "{{ message['content'] }}{{ eos_token }}{% endgeneration %}\n{% endfor %}"
    )
    tokenizer = with_template(family("smollm2").tokenizer, template)
    talk = conversation(["Hi", "the"])
    mask = tokenizer.apply_chat_template(
        talk.messages, return_dict=True, return_assistant_tokens_mask=True
    )
    encoded = encode(talk, tokenizer)
    assert said(encoded, tokenizer)[-1] == f" the{tokenizer.eos_token}"
    kept = zip(mask["input_ids"], mask["assistant_masks"], strict=True)
    theirs = [token for token, is_kept in kept if is_kept]
    assert tokenizer.decode(theirs).endswith(f" the{tokenizer.eos_token}")


def test_a_token_that_holds_a_letter_of_the_prompt_is_not_in_the_mask() -> None:
    template = (
        "{% for message in messages %}{{ message['role'] + ': re' + message['content'] + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ 'assistant: re' }}{% endif %}"
    )
    tokenizer = with_template(family("smollm2").tokenizer, template)
    encoded = encode(conversation(["Hi", "turn there"]), tokenizer)
    assert said(encoded, tokenizer) == [" there\n"]


def test_a_marker_in_a_message_is_the_control_token_as_transformers_has_it() -> None:
    tokenizer = family("smollm2").tokenizer
    talk = conversation(["What is <|im_end|>?", "<|im_end|> ends a turn."])
    encoded = encode(talk, tokenizer)
    assert said(encoded, tokenizer) == ["<|im_end|> ends a turn.<|im_end|>"]
    text = tokenizer.apply_chat_template(talk.messages, tokenize=False)
    assert encoded.ids.tolist() == tokenizer(text, add_special_tokens=False).input_ids
    # Elsewhere it is text.
    assert said(encode(talk, family("deepseek").tokenizer), family("deepseek").tokenizer) == [
        "<|im_end|> ends a turn.<｜end▁of▁sentence｜>"
    ]


def test_a_message_keeps_what_else_it_holds_for_the_template() -> None:
    template = (
        "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
        "{{ message['content'] }}{% for call in message['tool_calls'] or [] %}"
        "{{ call['function']['name'] + '(' + call['function']['arguments']['x'] | tojson + ')' }}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    tokenizer = with_template(family("smollm2").tokenizer, template)
    call = {"type": "function", "function": {"name": "root", "arguments": {"x": 2}}}
    talk = Conversation.from_messages(
        [
            {"role": "user", "content": "Root of 2?"},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "content": "1.414"},
            {"role": "assistant", "content": "About 1.4."},
        ]
    )
    assert said(encode(talk, tokenizer), tokenizer) == ["root(2)<|im_end|>", "About 1.4.<|im_end|>"]


@pytest.mark.parametrize("marked", [False, True])
def test_tools_are_printed_and_not_said(marked: bool) -> None:
    template = (
        "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}"
        "{% endfor %}{{ '<|im_end|>\n' }}{% endif %}"
    ) + generation_blocks("message['content'] + '<|im_end|>'", "'\n'")
    if not marked:
        template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = with_template(family("smollm2").tokenizer, template)
    tools = [{"type": "function", "function": {"name": "root", "parameters": {}}}]
    messages = conversation(CONTENTS["plain"]).messages
    encoded = encode(Conversation.from_messages(messages, tools=tools), tokenizer)
    assert '"name": "root"' in tokenizer.decode(encoded.ids.tolist())
    assert said(encoded, tokenizer) == ["It is 144.<|im_end|>"]
    bare = encode(Conversation.from_messages(messages), tokenizer)
    assert bare.ids.tolist() == encoded.ids.tolist()[-len(bare.ids) :]


def test_the_callers_tokenizer_keeps_its_settings() -> None:
    tokenizer = copy.deepcopy(family("llama3").tokenizer)
    backend = tokenizer.backend_tokenizer
    backend.enable_truncation(4)
    backend.enable_padding(length=64)
    before = backend.to_str()
    talk = conversation(CONTENTS["plain"])
    assert encode(talk, tokenizer).ids.tolist() == (
        encode(talk, family("llama3").tokenizer).ids.tolist()
    )
    assert backend.to_str() == before


def test_a_tokenizer_that_cannot_print_conversations_is_refused() -> None:
    talk = conversation(CONTENTS["plain"])
    bare = PreTrainedTokenizerFast(tokenizer_object=zoo.deepseek())
    with pytest.raises(DataError, match=r"teacher's tokenizer has no chat template.*set tokenizer"):
        Encoder(bare, "teacher").encode_conversation(talk)
    with pytest.raises(DataError, match="student's tokenizer has no chat template"):
        Encoder(zoo.deepseek()).encode_conversation(talk)

    class Slow:
        chat_template = LLAMA3

        def get_chat_template(self) -> str:
            return LLAMA3

    with pytest.raises(DataError, match="tokenizer is Slow, expected a fast one"):
        RenderingEncoder(Slow())


def test_what_a_template_refuses_is_told_with_the_place() -> None:
    messages = conversation(CONTENTS["plain"], system="Be brief.").messages
    talk = Conversation.from_messages(messages, source="chats.jsonl:7")
    message = (
        r"chats\.jsonl:7: the student's chat template cannot print it \(System role not supported\)"
    )
    with pytest.raises(DataError, match=message):
        Encoder(family("gemma").tokenizer).encode_conversation(talk)
    broken = with_template(family("llama3").tokenizer, "{{ messages[0]['content'] + 1 }}")
    with pytest.raises(DataError, match=r"chats\.jsonl:7: the student's chat template cannot"):
        Encoder(broken).encode_conversation(talk)


def test_a_template_that_hides_or_blurs_the_answer_is_refused() -> None:
    talk = conversation(CONTENTS["plain"])
    tokenizer = family("smollm2").tokenizer
    with pytest.raises(DataError, match="so that it cannot be told from what surrounds it; give"):
        Encoder(with_template(tokenizer, "{{ messages[0]['content'] }}")).encode_conversation(talk)
    nothing = "{% for message in messages %}{% generation %}{% endgeneration %}{% endfor %}text"
    with pytest.raises(DataError, match="marks nothing as generated; put"):
        Encoder(with_template(tokenizer, nothing)).encode_conversation(talk)


def test_the_families_here_print_what_their_pieces_say() -> None:
    for name in KNOWN:
        known: Family = family(name)
        assert known.pieces is not None
        for contents in CONTENTS.values():
            talk = conversation(contents)
            pieces = known.pieces(talk.messages)
            if name == "mistral":
                pieces = [(piece, is_said) for piece, is_said in pieces if piece != DUMMY_PREFIX]
            text = known.tokenizer.apply_chat_template(talk.messages, tokenize=False)
            assert text == "".join(piece for piece, _ in pieces)
    assert "<think>" in QWEN3


THINKING_BLOCKS = (
    "{% set ns = namespace(query=0) %}{% for m in messages %}"
    "{% if m['role'] == 'user' %}{% set ns.query = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{% set said = m['content'] %}{% if loop.index0 < ns.query %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ said + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("blocks", [False, True])
def test_no_answer_is_learned_without_its_thought_with_generation_blocks_or_without(
    blocks: bool,
) -> None:
    template = THINKING_BLOCKS
    if not blocks:
        template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = with_template(family("smollm2").tokenizer, template)
    contents = ["1+1?", "<think>\nsum\n</think>\n\n2", "2+2?", "<think>\nmore\n</think>\n\n4"]
    rows = Encoder(tokenizer).encode_conversation(conversation(contents))
    assert [said(row, tokenizer) for row in rows] == [
        [contents[1] + "<|im_end|>"],
        [contents[3] + "<|im_end|>"],
    ]


CALLS = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] }}"
    "{% for call in m.tool_calls or [] %}{{ '<call>' + (call.function | tojson) + '</call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def calling(content: str, *names: str) -> Conversation:
    calls = [{"type": "function", "function": {"name": name, "arguments": {}}} for name in names]
    return Conversation.from_messages(
        [
            {"role": "user", "content": "Go."},
            {"role": "assistant", "content": content, "tool_calls": calls},
            {"role": "tool", "content": "Done."},
            {"role": "assistant", "content": "It is done."},
        ],
        source="calls.jsonl:3",
    )


@pytest.mark.parametrize("content", ["", "I will call walk and run."])
@pytest.mark.parametrize("blocks", [False, True])
def test_a_template_that_drops_tool_calls_is_refused_with_the_line(
    content: str, blocks: bool
) -> None:
    template = generation_blocks("message['content'] + '<|im_end|>'", "'\n'")
    if not blocks:
        template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = with_template(family("smollm2").tokenizer, template)
    with pytest.raises(DataError, match=r"calls\.jsonl:3: the student's chat template prints noth"):
        Encoder(tokenizer).encode_conversation(calling(content, "walk"))


def test_a_template_that_prints_one_call_of_two_is_refused_and_one_that_prints_both_is_not() -> (
    None
):
    talk = calling("", "walk", "run")
    whole = with_template(family("smollm2").tokenizer, CALLS)
    assert '"name": "run"' in said(encode(talk, whole), whole)[0]
    first = CALLS.replace("m.tool_calls or []", "(m.tool_calls or [])[:1]")
    with pytest.raises(DataError, match=r"prints nothing of messages\[1\]\.tool_calls\[1\]"):
        Encoder(with_template(family("smollm2").tokenizer, first)).encode_conversation(talk)


def test_an_answer_of_which_only_the_frame_is_printed_is_refused() -> None:
    talk = Conversation.from_messages(
        [
            {"role": "user", "content": "Go."},
            {"role": "assistant", "content": "", "reasoning_content": "Hm."},
        ]
    )
    with pytest.raises(
        DataError, match=r"prints nothing of messages\[1\], of role 'assistant'; le"
    ):
        Encoder(family("smollm2").tokenizer).encode_conversation(talk)


@pytest.mark.parametrize("role", ["system", "tool", "developer"])
def test_a_message_that_a_template_leaves_out_is_refused(role: str) -> None:
    template = (
        "{% for m in messages %}{% if m['role'] in ('user', 'assistant') %}"
        "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    messages = [
        {"role": "user", "content": "Go."},
        {"role": role, "content": "Go"},
        {"role": "assistant", "content": "Gone."},
    ]
    tokenizer = with_template(family("smollm2").tokenizer, template)
    with pytest.raises(DataError, match=rf"prints nothing of messages\[1\], of role '{role}'"):
        Encoder(tokenizer).encode_conversation(Conversation.from_messages(messages))


@pytest.mark.parametrize("flag", [{"weight": 0}, {"train": False}])
@pytest.mark.parametrize("name", ["smollm2", "qwen3", "blocks"])
def test_an_answer_of_weight_0_is_read_and_not_learned(name: str, flag: dict[str, Any]) -> None:
    tokenizer = family("smollm2" if name == "blocks" else name).tokenizer
    if name == "blocks":
        inside = "message['content'] + '<|im_end|>'"
        tokenizer = with_template(tokenizer, generation_blocks(inside, "'\n'"))
    messages = conversation(CONTENTS["several turns"]).messages
    messages[3] |= flag
    talk = Conversation.from_messages(messages)
    assert talk.answers_learned == [True, False, True]
    rows = Encoder(tokenizer).encode_conversation(talk)
    learned = "".join(tokenizer.decode(row.ids[row.loss_mask].tolist()) for row in rows)
    assert "1, 2, 3" not in learned
    assert learned.count("<|im_end|>") == 2
    assert "1, 2, 3" in tokenizer.decode(rows[-1].ids.tolist())


DATED = (
    "{% macro day() %}{{ strftime_now('%-d %B, 100%%') }}{% endmacro %}"
    "{{ 'Today is ' + strftime_now('%Y-%m-%d') + ', ' + day() + '\n' }}"
    "{% if strftime_now is defined %}{{ 'known\n' }}{% endif %}"
)


@pytest.mark.parametrize("blocks", [False, True])
def test_a_template_that_prints_the_date_prints_the_day_of_the_run(blocks: bool) -> None:
    template = DATED + generation_blocks("message['content'] + '<|im_end|>'", "'\n'")
    if not blocks:
        template = template.replace("{% generation %}", "").replace("{% endgeneration %}", "")
    tokenizer = with_template(family("smollm2").tokenizer, template)
    talk = conversation(CONTENTS["plain"])
    day = datetime.date(2031, 7, 4)
    (row,) = Encoder(tokenizer, date=day).encode_conversation(talk)
    text = tokenizer.decode(row.ids.tolist())
    assert text.startswith("Today is 2031-07-04, 4 July, 100%\nknown\n<|im_start|>user")
    (again,) = Encoder(copy.deepcopy(tokenizer), date=day).encode_conversation(talk)
    assert again.ids.tolist() == row.ids.tolist()
    assert said(row, tokenizer) == ["It is 144.<|im_end|>"]


def test_without_a_given_day_the_date_is_todays_and_templates_without_one_say_so() -> None:
    tokenizer = with_template(
        family("smollm2").tokenizer,
        DATED + generation_blocks("message['content'] + '<|im_end|>'", "'\n'"),
    )
    talk = conversation(CONTENTS["plain"])
    before = tokenizer.apply_chat_template(talk.messages, tokenize=False)
    (row,) = Encoder(tokenizer).encode_conversation(talk)
    after = tokenizer.apply_chat_template(talk.messages, tokenize=False)
    assert tokenizer.decode(row.ids.tolist()) in (before, after)
    assert ChatTemplate(tokenizer).prints_date
    assert not ChatTemplate(family("smollm2").tokenizer).prints_date


def with_arguments(arguments: object) -> Conversation:
    call = {"type": "function", "function": {"name": "find", "arguments": arguments}}
    return Conversation.from_messages(
        [
            {"role": "user", "content": "Go."},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
    )


def test_arguments_of_a_call_that_come_out_in_another_notation_are_refused() -> None:
    tokenizer = family("smollm2").tokenizer
    as_object, as_text = with_arguments({"city": "Paris"}), with_arguments('{"city": "Paris"}')
    to_json = with_template(tokenizer, CALLS)
    raw = with_template(
        tokenizer, CALLS.replace("(call.function | tojson)", "call.function.arguments ~ ''")
    )
    assert '{"city": "Paris"}' in said(encode(as_object, to_json), to_json)[0]
    assert '{"city": "Paris"}' in said(encode(as_text, raw), raw)[0]
    with pytest.raises(
        DataError, match=r"prints messages\[1\]\.tool_calls\[0\]\.function\.arguments"
    ):
        Encoder(to_json).encode_conversation(as_text)
    with pytest.raises(DataError, match=r"arguments as Python has it; write them as a string of J"):
        Encoder(raw).encode_conversation(as_object)
