"""Rows of which the student reads a part: its chunks lie where the part does, and nowhere else that
spells the same."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny_models import tiny_texts, write_pair
from tokenizer_zoo import byte_level_bpe, sentencepiece_bpe
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtoken import Pair
from xtoken.align import ChunkKind
from xtoken.training import DistillMixin, DistillSettings
from xtoken.training.teacher_columns import add_teacher_side

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:input_ids of a row:UserWarning"),
]

# Numerals and dates: much of it is spelled at several places.
TEXTS = [text for text in tiny_texts(24) if text.isascii()][4:]

STUDENT_TEMPLATE = (
    "{% for m in messages %}{{ '[' + m.role + '] ' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
)
TEACHER_TEMPLATE = (
    "{% for m in messages %}{{ '### ' + m.role + ': ' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("places")
    write_pair(made)
    for side, template in (("student", STUDENT_TEMPLATE), ("teacher", TEACHER_TEMPLATE)):
        tokenizer = AutoTokenizer.from_pretrained(made / side)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(made / side)
    return made


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return Pair(*(AutoTokenizer.from_pretrained(folder / side) for side in ("student", "teacher")))


def sided(pair: Pair, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return list(add_teacher_side(Dataset.from_list(rows), [pair]))


def exact_chunks(row: dict[str, Any]) -> list[tuple[int, int]]:
    """The first tokens of both sides of each exact chunk."""
    kinds, ours, theirs = (
        row[f"teacher0_{name}"][0] for name in ("chunk_kinds", "student_bounds", "teacher_bounds")
    )
    return [
        (a, b) for kind, a, b in zip(kinds, ours[:-1], theirs[:-1], strict=True)
        if kind == ChunkKind.EXACT
    ]  # fmt: skip


def places(pair: Pair, row: dict[str, Any], text: bytes, start: int) -> list[tuple[int, int]]:
    """Where in the text both sides of each exact chunk begin, of ids that begin at `start`."""
    (teacher,) = row["teacher0_input_ids"]
    ours, theirs = (
        [len(vocab.decode_bytes(ids[:end])) for end in range(len(ids) + 1)]
        for vocab, ids in ((pair.student_vocab, row["input_ids"]), (pair.teacher_vocab, teacher))
    )
    spelled = pair.teacher_vocab.decode_bytes(teacher)
    base = start if text[start:].startswith(spelled) else 0
    assert text[base:].startswith(spelled)
    return [(start + ours[a], base + theirs[b]) for a, b in exact_chunks(row)]


def windows(pair: Pair, text: str, width: int, bos: Sequence[int] = ()) -> list[dict[str, Any]]:
    """What a tokenizer's overflow gives: the text beside each window of its ids."""
    (ids,) = pair.student.encode([text], add_special_tokens=False)
    return [
        {"text": text, "input_ids": [*bos, *ids[at : at + width]], "at": at}
        for at in range(0, len(ids), width)
    ]


def start_of(pair: Pair, row: dict[str, Any]) -> int:
    (ids,) = pair.student.encode([row["text"]], add_special_tokens=False)
    return len(pair.student_vocab.decode_bytes(ids[: row["at"]]))


@pytest.mark.parametrize("width", [8, 24])
def test_each_window_of_a_text_is_aligned_with_itself(pair: Pair, width: int) -> None:
    rows = [row for text in TEXTS for row in windows(pair, text, width)]
    with pytest.warns(UserWarning, match="input_ids of a row do not begin its text") as caught:
        made = sided(pair, rows)
    assert len(caught) == 1
    found = []
    for row in made:
        found += places(pair, row, row["text"].encode(), start_of(pair, row))
        if row["at"]:  # of the beginning the teacher's last token may go on behind it
            spelled = pair.teacher_vocab.decode_bytes(row["teacher0_input_ids"][0])
            assert spelled == pair.student_vocab.decode_bytes(row["input_ids"])
    assert [ours for ours, _ in found] == [theirs for _, theirs in found]
    assert len(found) > len(rows) * width / 3


@pytest.mark.parametrize("kind", ["text", "prompt"])
def test_what_trl_keeps_of_the_end_is_aligned_with_the_end(
    folder: Path, pair: Pair, tmp_path: Path, kind: str
) -> None:
    trl = pytest.importorskip("trl")

    class Trainer(DistillMixin, trl.SFTTrainer):
        """What a user writes."""

    rows = [
        {"text": text} if kind == "text" else {"prompt": text[:60], "completion": text[60:]}
        for text in TEXTS
    ]
    made = Trainer(
        AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32),
        args=trl.SFTConfig(
            str(tmp_path), max_length=16, truncation_mode="keep_end", report_to="none",
            use_cpu=True, bf16=False, disable_tqdm=True, shuffle_dataset=False,
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
        teachers=str(folder / "teacher"),
        distill=DistillSettings(loss="p-kl", top_k=32),
    )  # fmt: skip
    found = []
    for text, row in zip(TEXTS, made.train_dataset, strict=True):
        whole = text.encode()
        start = len(whole) - len(pair.student_vocab.decode_bytes(row["input_ids"]))
        assert start > 0
        found += places(pair, row, whole, start)
    assert [ours for ours, _ in found] == [theirs for _, theirs in found]
    assert len(found) > 8 * len(TEXTS)


def test_a_beginning_that_the_text_repeats_is_aligned_with_the_beginning(pair: Pair) -> None:
    text = "the value is 1940, and " * 12
    (ids,) = pair.student.encode([text])
    for length in (3, 7, 20):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (row,) = sided(pair, [{"text": text, "input_ids": ids[:length]}])
        found = places(pair, row, text.encode(), 0)
        assert [ours for ours, _ in found] == [theirs for _, theirs in found]
        assert found


def test_windows_that_cut_characters_are_aligned_with_what_is_whole_in_them(pair: Pair) -> None:
    text = "日本語, naïve: 日本国 in the café, 日本語 日本語 naïve 日本語 in the café. " * 2
    found = 0
    for row in sided(pair, windows(pair, text, 5)):
        start = whole = start_of(pair, row)
        while text.encode()[whole] & 0xC0 == 0x80:
            whole += 1
        offsets = [len(pair.student_vocab.decode_bytes(row["input_ids"][:n])) for n in range(6)]
        (teacher,) = row["teacher0_input_ids"]
        for ours, theirs in exact_chunks(row):
            before = len(pair.teacher_vocab.decode_bytes(teacher[:theirs]))
            assert start + offsets[ours] == whole + before
            found += 1
    assert found > 50


def test_sentencepiece_windows_with_a_bos_of_their_own_are_aligned_whole() -> None:
    pair = Pair(sentencepiece_bpe(), byte_level_bpe())
    bos = [pair.student_vocab.roles["bos"]]
    rows = [row for text in TEXTS for row in windows(pair, " ".join(text.split()), 12, bos)]
    made = sided(pair, rows)
    for row in made:
        ids = row["input_ids"]
        covered = {at for at, _ in exact_chunks(row)}
        assert covered, row["text"]
        spelled = pair.teacher_vocab.decode_bytes(row["teacher0_input_ids"][0])
        piece = pair.student_vocab.decode_bytes(ids)
        assert piece.startswith(spelled) or not row["at"]
        (counts,) = row["teacher0_byte_counts"]
        if row["at"]:
            assert counts[2] == counts[0]  # each byte in an exact chunk


def lowered(tokenizer: Tokenizer) -> Tokenizer:
    state = json.loads(tokenizer.to_str())
    state["normalizer"] = {"type": "Lowercase"}
    return Tokenizer.from_str(json.dumps(state))


def test_the_teacher_reads_the_text_where_a_normalizer_made_the_ids_of_its_beginning() -> None:
    pair = Pair(lowered(byte_level_bpe()), byte_level_bpe(3000, digits=1))
    text = "Python, Or The Reference MANUAL, was Written By GUIDO in 1990 and 1991."
    (ids,) = pair.student.encode([text])
    bos = pair.student_vocab.id_of(b"") or 0
    for kept in (ids, ids[:12], [bos, *ids[:12]]):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (row,) = sided(pair, [{"text": text, "input_ids": kept}])
        spelled = pair.teacher_vocab.decode_bytes(row["teacher0_input_ids"][0])
        assert text.encode().startswith(spelled)
        assert len(spelled) > 20
    # Of its end it reads what the ids spell.
    with pytest.warns(UserWarning, match="do not begin its text"):
        (row,) = sided(pair, [{"text": text, "input_ids": ids[-8:]}])
    spelled = pair.teacher_vocab.decode_bytes(row["teacher0_input_ids"][0])
    assert text.lower().encode().endswith(spelled)


def conversation(text: str) -> list[dict[str, str]]:
    cuts = [0, 30, 80, 100, 150]
    roles = ["user", "assistant", "user", "assistant"]
    said = [text[a:b].strip() for a, b in pairwise(cuts)]
    return [{"role": role, "content": each} for role, each in zip(roles, said, strict=True)]


def turn_places(tokenizer: Any, vocab: Any, messages: Any) -> list[tuple[int, int | None]]:
    """The message that each token of the printed conversation begins in, and where in it; None
    between them."""
    printed = tokenizer.apply_chat_template(messages, tokenize=False)
    spans, end = [], 0
    for message in messages:
        start = printed.index(message["content"], end)
        end = start + len(message["content"])
        spans.append((start, end))
    ids = tokenizer(printed, add_special_tokens=False)["input_ids"]
    sizes = [len(vocab.token_bytes(each)) or len(vocab.special_tokens[each]) for each in ids]
    assert sum(sizes) == len(printed)
    found: list[tuple[int, int | None]] = []
    for at in np.cumsum([0, *sizes[:-1]]).tolist():
        turn = sum(end <= at for _, end in spans)
        inside = turn < len(spans) and spans[turn][0] <= at
        found.append((turn, at - spans[turn][0] if inside else None))
    return found


@pytest.mark.parametrize("part", [slice(-24, None), slice(-60, -20), slice(20, 44), slice(0, 30)])
def test_a_part_of_a_conversation_is_aligned_with_itself_in_the_teachers_printing(
    pair: Pair, part: slice
) -> None:
    tokenizers = pair.student_tokenizer, pair.teacher_tokenizer
    talks = [conversation(text) for text in TEXTS]
    printed = [
        tokenizers[0].apply_chat_template(talk, return_dict=True)["input_ids"] for talk in talks
    ]
    rows = [
        {"messages": talk, "input_ids": ids[part]} for talk, ids in zip(talks, printed, strict=True)
    ]
    ours, theirs = [], []
    for talk, ids, row in zip(talks, printed, sided(pair, rows), strict=True):
        start = range(len(ids))[part][0]
        (teacher,) = row["teacher0_input_ids"]
        # It keeps the conversation before the part, by its own template.
        whole = tokenizers[1].apply_chat_template(talk, return_dict=True)["input_ids"]
        assert teacher == whole[: len(teacher)]
        student_places = turn_places(tokenizers[0], pair.student_vocab, talk)
        teacher_places = turn_places(tokenizers[1], pair.teacher_vocab, talk)
        chunks = exact_chunks(row)
        ours += [student_places[start + a] for a, _ in chunks]
        theirs += [teacher_places[b] for _, b in chunks]
        bounds = [row[f"teacher0_{side}_bounds"][0] for side in ("student", "teacher")]
        assert [each[-1] for each in bounds] == [len(row["input_ids"]), len(teacher)]
        assert all((np.diff(each) >= 0).all() for each in bounds)
        student, _, exact, _ = row["teacher0_byte_counts"][0]
        assert 0 < exact <= student == len(pair.student_vocab.decode_bytes(row["input_ids"]))
    assert ours == theirs
    assert len(ours) > 10 * len(rows)


def test_the_end_of_a_conversation_printed_otherwise_is_read_as_it_is(pair: Pair) -> None:
    """Its place in the teacher's printing is not known: the same words stand in other turns."""
    tokenizer = pair.student_tokenizer
    talks = [conversation(text) for text in TEXTS]
    ids = [
        tokenizer(
            "<think>" + tokenizer.apply_chat_template(talk, tokenize=False).replace("] ", "] * ")
        )["input_ids"]
        for talk in talks
    ]
    rows = [{"messages": talk, "input_ids": each} for talk, each in zip(talks, ids, strict=True)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = sided(pair, [rows[0]])
    teacher = pair.teacher_tokenizer.decode(whole[0]["teacher0_input_ids"][0])
    assert teacher.startswith("### user: ")
    ends = [row | {"input_ids": row["input_ids"][-45:]} for row in rows]
    with pytest.warns(UserWarning, match="are no part of its conversation"):
        made = sided(pair, ends)
    for row in made:
        spelled = pair.student_vocab.decode_bytes(row["input_ids"])
        assert spelled.startswith(pair.teacher_vocab.decode_bytes(row["teacher0_input_ids"][0]))
        found = places(pair, row, spelled, 0)
        assert [a for a, _ in found] == [b for _, b in found]
