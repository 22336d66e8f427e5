"""What ends a turn: read off the template's output, in the loss mask, one chunk of both sides."""

from __future__ import annotations

import copy
import functools
import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from chat_families import ENDINGS, Ending, ending, family
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xtoken import Aligner, ChunkKind, Pair, Vocab
from xtoken.data import (
    Conversation,
    Encoded,
    Encoder,
    StopTokens,
    align_by_turns,
    stop_pairs,
    stop_tokens,
    turn_end_chunks,
)
from xtoken.data.chat_template import ChatTemplate
from xtoken.errors import DataError, FormatError
from xtoken.tensors.chunks import ChunkBatch

TALK = Conversation.from_messages(
    [
        {"role": "system", "content": "Answer."},
        {"role": "user", "content": "Are you there?"},
        {"role": "assistant", "content": "Yes, I am."},
        {"role": "user", "content": "And now?"},
        {"role": "assistant", "content": "Still here"},
    ]
)
ANSWERS = ["Yes, I am.", "Still here"]


@functools.cache
def vocab(name: str) -> Vocab:
    return Vocab.from_tokenizer(ending(name).tokenizer)


@functools.cache
def encoder(name: str, blocks: str = "none") -> Encoder:
    return Encoder(ending(name, blocks=blocks).tokenizer, vocab=vocab(name))


def ends(rows: list[Encoded], tokenizer: Any) -> list[tuple[str, ...]]:
    """The markers that end each turn in the loss mask, in order."""
    found = []
    for row in rows:
        for (start, end), (first, last) in zip(row.turns, row.stops, strict=True):
            if row.loss_mask[start:end].all() and end > start:
                assert last == end
                found.append(tuple(tokenizer.convert_ids_to_tokens(row.ids[first:last].tolist())))
    return found


def expected_ends(how: Ending, rows: list[Encoded]) -> list[tuple[str, ...]]:
    """Of one sequence, or of one for each answer, which is then the last."""
    return [how.earlier, how.last] if len(rows) == 1 else [how.last, how.last]


@pytest.mark.parametrize("name", ENDINGS)
def test_what_ends_a_turn_is_what_the_template_prints_after_an_answer(name: str) -> None:
    how = ending(name)
    stops = stop_tokens(how.tokenizer)
    assert list(stops.end_of_turn) == how.ids(tuple(dict.fromkeys(how.last + how.earlier)))
    assert list(stops.eos) == how.ids((how.eos,))
    assert stops.all == {*stops.end_of_turn, *stops.eos}


@pytest.mark.parametrize(
    ("name", "marker"),
    [
        ("smollm2", "<|im_end|>"),
        ("deepseek", "<｜end▁of▁sentence｜>"),
        ("llama3", "<|eot_id|>"),
        ("gemma", "<end_of_turn>"),
        ("mistral", "</s>"),
        ("qwen3", "<|im_end|>"),
    ],
)
def test_what_ends_a_turn_of_a_well_known_family_is_found(name: str, marker: str) -> None:
    tokenizer = family(name).tokenizer
    assert stop_tokens(tokenizer).end_of_turn == (tokenizer.convert_tokens_to_ids(marker),)


def test_a_generation_config_adds_ends_of_text_and_a_tokenizer_without_template_has_its_eos() -> (
    None
):
    how = ending("gpt-oss")
    other = how.ids(("<|endoftext|>", "<|return|>"))
    for config in ({"eos_token_id": other}, SimpleNamespace(eos_token_id=other)):
        assert stop_tokens(how.tokenizer, None, config).eos == tuple(other[::-1])
    assert stop_tokens(how.tokenizer, None, {"eos_token_id": 3}).eos == (other[1], 3)
    for empty in ({}, {"eos_token_id": None}, None):
        assert stop_tokens(how.tokenizer, None, empty).eos == (other[1],)
    bare = PreTrainedTokenizerFast(
        tokenizer_object=how.tokenizer.backend_tokenizer, eos_token="<|return|>"
    )
    assert stop_tokens(bare) == StopTokens((), (other[1],))


@pytest.mark.parametrize("wrong", ["abc", True, 1.5, [[1]], {"a": 1}, [None]], ids=repr)
def test_what_is_no_id_in_a_generation_config_is_refused(wrong: object) -> None:
    with pytest.raises(FormatError, match=r"has eos_token_id = .*, expected a token id or a list"):
        stop_tokens(ending("gpt-oss").tokenizer, None, {"eos_token_id": wrong})


def test_a_generation_config_that_is_no_object_is_refused(tmp_path: Path) -> None:
    ending("gpt-oss").tokenizer.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("[2]")
    with pytest.raises(FormatError, match="holds a list, expected an object; write it again"):
        _ = Pair(tmp_path, tmp_path).aligner


def test_a_chat_template_that_is_no_text_is_refused() -> None:
    tokenizer = copy.copy(ending("gpt-oss").tokenizer)
    tokenizer.chat_template = 5
    with pytest.raises(DataError, match="the teacher's chat template is a int, expected a text"):
        ChatTemplate(tokenizer, side="teacher")


@pytest.mark.parametrize("blocks", ["none", "content"])
@pytest.mark.parametrize("name", ENDINGS)
def test_the_end_of_a_turn_is_in_the_loss_mask_whatever_the_template_does_around_it(
    name: str, blocks: str
) -> None:
    how = ending(name, blocks=blocks)
    rows = encoder(name, blocks).encode_conversation(TALK)
    assert ends(rows, how.tokenizer) == expected_ends(how, rows)
    said = [
        how.tokenizer.decode(row.ids[start:stop])
        for row in rows
        for (start, _), (stop, _) in zip(row.turns, row.stops, strict=True)
    ]
    assert [text.strip() for text in said] == ANSWERS
    # Nothing behind a marker is learned.
    for row in rows:
        outside = np.ones(len(row.ids), dtype=bool)
        for start, end in row.turns:
            outside[start:end] = False
        assert not row.loss_mask[outside].any()


@pytest.mark.parametrize(("student", "teacher"), [*itertools.product(ENDINGS, ENDINGS)])
def test_the_ends_of_a_turn_are_one_chunk_of_both_sides_stops_inside_both_masks(
    student: str, teacher: str
) -> None:
    from xtoken.data.encode import print_document

    sides = encoder(student), encoder(teacher)
    printed = print_document(TALK, sides)
    left = sides[0].encode([row[0] for row in printed])
    right = sides[1].encode([row[1] for row in printed])
    aligner = Aligner(vocab(student), vocab(teacher))
    for alignment, mine, theirs in zip(
        align_by_turns(aligner, left, right), left, right, strict=True
    ):
        chunks = turn_end_chunks(alignment, mine, theirs)
        assert len(chunks) == len(mine.turns)
        for chunk in chunks:
            s, t = alignment.student_bounds[chunk], alignment.teacher_bounds[chunk]
            assert alignment.student_bounds[chunk + 1] - s == 1
            assert alignment.teacher_bounds[chunk + 1] - t == 1
            assert alignment.kind[chunk] in (ChunkKind.SPECIAL, ChunkKind.EXACT)
            assert int(mine.ids[s]) in sides[0].stops.all
            assert int(theirs.ids[t]) in sides[1].stops.all
            assert mine.loss_mask[s]
            assert theirs.loss_mask[t]
            # What is said ends on both sides just before.
            assert alignment.kind[chunk - 1] == ChunkKind.EXACT
        assert (alignment.student_bounds[-1], alignment.teacher_bounds[-1]) == (
            len(mine.ids),
            len(theirs.ids),
        )
        batch = ChunkBatch.from_alignments([alignment])
        assert len(batch) == len(alignment)


def test_the_end_of_a_call_of_tools_is_learned_and_paired_as_an_end_of_turn() -> None:
    how = ending("gpt-oss")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(how.tokenizer.backend_tokenizer.to_str()),
        eos_token="<|return|>",
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    tokenizer.chat_template = how.tokenizer.chat_template.replace(
        "{% if message['role'] == 'assistant' and loop.last",
        "{% if message.tool_calls %}{{ message.tool_calls[0].function | tojson }}{{ '<|call|>' }}"
        "{% elif message['role'] == 'assistant' and loop.last",
    )
    names = ("<|return|>", "<|end|>", "<|call|>")
    assert stop_tokens(tokenizer).end_of_turn == tuple(tokenizer.convert_tokens_to_ids([*names]))
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "me"}}}
    talk = Conversation.from_messages(
        [TALK.messages[1], {"role": "assistant", "content": "", "tool_calls": [call]}]
    )
    (left,) = Encoder(tokenizer).encode_conversation(talk)
    assert ends([left], tokenizer) == [("<|call|>",)]
    other = PreTrainedTokenizerFast(
        tokenizer_object=ending("chatml").tokenizer.backend_tokenizer, eos_token="<|endoftext|>"
    )
    other.chat_template = ending("chatml").tokenizer.chat_template.replace(
        " + message['content'] }}",
        " + message['content'] }}{% if message.tool_calls %}"
        "{{ message.tool_calls[0].function | tojson }}{% endif %}",
    )
    (right,) = Encoder(other).encode_conversation(talk)
    aligner = Aligner(Vocab.from_tokenizer(tokenizer), Vocab.from_tokenizer(other))
    (alignment,) = align_by_turns(aligner, [left], [right])
    (chunk,) = turn_end_chunks(alignment, left, right)
    assert alignment.kind[chunk] == ChunkKind.SPECIAL


def test_a_cut_keeps_ends_of_turns_whole_or_leaves_them_out() -> None:
    (left,) = encoder("chatml").encode_conversation(TALK)
    (right,) = encoder("gemma3").encode_conversation(TALK)
    aligner = Aligner(vocab("chatml"), vocab("gemma3"))
    (whole,) = align_by_turns(aligner, [left], [right])
    for s, t in zip(whole.student_bounds, whole.teacher_bounds, strict=True):
        cut = left.cut(int(s)), right.cut(int(t))
        (alignment,) = align_by_turns(aligner, [cut[0]], [cut[1]])
        expected = [end for end in turn_end_chunks(whole, left, right) if end < len(alignment)]
        assert turn_end_chunks(alignment, *cut).tolist() == expected


def test_stops_of_two_sides_pair_end_of_turn_with_end_of_turn_and_eos_with_eos() -> None:
    left, right = StopTokens((5,), (7, 5)), StopTokens((2, 3), (9,))
    assert stop_pairs(left, right) == [(5, 2), (5, 3), (7, 9), (5, 9)]
    assert stop_pairs(left, StopTokens((), (9,))) == [(7, 9), (5, 9)]
    assert stop_pairs(StopTokens((), ()), right) == []


def phi(*, rstrip: bool, template: str) -> Any:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(
        [
            AddedToken(text, special=True, rstrip=rstrip, normalized=False)
            for text in ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
        ]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    tokenizer.chat_template = template
    return tokenizer


BLOCKS = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' }}"
    "{% generation %}{{ INSIDE }}{% endgeneration %}{{ AFTER }}"
    "{% else %}{{ '<|user|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


@pytest.mark.parametrize("rstrip", [False, True])
@pytest.mark.parametrize(
    ("inside", "after"),
    [
        ("m['content'] + '<|end|>'", "'\n'"),
        ("m['content'] + '<|end|>\n'", "''"),
        ("m['content']", "'<|end|>\n'"),
    ],
)
def test_a_marker_that_swallows_the_line_break_stays_in_the_mask_of_generation_blocks(
    inside: str, after: str, rstrip: bool
) -> None:
    template = BLOCKS.replace("INSIDE", inside).replace("AFTER", after)
    tokenizer = phi(rstrip=rstrip, template=template)
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}] * 2
    (row,) = Encoder(tokenizer).encode_conversation(Conversation.from_messages(messages))
    said = tokenizer.convert_ids_to_tokens(row.ids[row.loss_mask].tolist())
    assert said == ["h", "o", "<|end|>"] * 2
    if after == "'\n'":
        theirs = tokenizer.apply_chat_template(
            messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
        )
        assert row.loss_mask.tolist() == [kept == 1 for kept in theirs["assistant_masks"]]


def test_a_marker_typed_at_the_end_of_an_answer_does_not_hide_the_marker_behind_it() -> None:
    for name, blocks in itertools.product(
        ("chatml", "gemma3", "unknown names"), ("none", "content")
    ):
        how = ending(name, blocks=blocks)
        (marker,) = how.last
        talk = Conversation.from_messages(
            [
                {"role": "user", "content": "What ends a turn?"},
                {"role": "assistant", "content": f"It is {marker}"},
            ]
        )
        (row,) = encoder(name, blocks).encode_conversation(talk)
        said = how.tokenizer.convert_ids_to_tokens(row.ids[row.loss_mask].tolist())
        assert said[-2:] == [marker, marker]


@pytest.mark.parametrize("end", ["inside", "outside", "unmarked"])
def test_an_end_of_plain_text_is_learned_whole_with_generation_blocks_and_without(
    end: str,
) -> None:
    answer = {
        "inside": "{% generation %}{{ m['content'] + '\n### End\n' }}{% endgeneration %}",
        "outside": "{% generation %}{{ m['content'] }}{% endgeneration %}{{ '\n### End\n' }}",
        "unmarked": "{{ m['content'] + '\n### End\n' }}",
    }[end]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=ending("eos after each").tokenizer.backend_tokenizer, eos_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '### ' + m['role'] + '\n' }}{% if m['role'] == 'assistant' %}"
        + answer
        + "{% else %}{{ m['content'] + '\n### End\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '### assistant\n' }}{% endif %}"
    )
    (row,) = Encoder(tokenizer).encode_conversation(TALK)
    said = [tokenizer.decode(row.ids[start:end]) for start, end in row.turns]
    assert said == [f"{text}\n### End" for text in ANSWERS]
    assert stop_tokens(tokenizer).end_of_turn == ()
    assert all(start == end for start, end in row.stops)


@pytest.mark.parametrize("name", ["chatml", "gemma3", "phi4"])
def test_losses_see_the_end_of_a_turn_in_the_mask_of_a_batch(name: str) -> None:
    (left,) = encoder(name).encode_conversation(TALK)
    (right,) = encoder("gemma4").encode_conversation(TALK)
    (alignment,) = align_by_turns(Aligner(vocab(name), vocab("gemma4")), [left], [right])
    for side, bounds in ((left, alignment.student_bounds), (right, alignment.teacher_bounds)):
        at = torch.from_numpy(bounds[turn_end_chunks(alignment, left, right)])
        assert torch.from_numpy(side.loss_mask)[at].all()
