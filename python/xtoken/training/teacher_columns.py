"""Columns of the teachers' side, for rows that another trainer has tokenized for the student."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, cast

import numpy as np
from numpy.typing import NDArray

from xtoken._core import Vocab
from xtoken.align import Alignment, ChunkKind
from xtoken.data.align_turns import align_by_turns
from xtoken.data.conversations import Conversation
from xtoken.data.loss_mask import NO_RANGES, Encoded
from xtoken.distillation.collate import pad_id
from xtoken.pair import Pair
from xtoken.training.routing import Routes

Ids = NDArray[np.int64]

# So many bytes stand at one place of a conversation by no chance.
_TELLING = 40

# Of one teacher, without its number.
COLUMNS = ("input_ids", "student_bounds", "teacher_bounds", "chunk_kinds", "byte_counts")


def column(teacher: int, name: str) -> str:
    """The name of a column of one teacher."""
    return f"teacher{teacher}_{name}"


def columns(teachers: int) -> list[str]:
    """The names of the columns that `add_teacher_side` adds."""
    return [column(index, name) for index in range(teachers) for name in COLUMNS]


class RowSide(Protocol):
    """A dataset of `datasets`, or a stream of it."""

    def map(self, function: Callable[..., Any], **options: Any) -> Any:
        """The dataset with what the function returns of each row."""


def add_teacher_side(
    dataset: RowSide,
    pairs: Sequence[Pair],
    *,
    text_field: str = "text",
    eos: str | None = None,
    num_proc: int | None = None,
    routes: Routes | None = None,
) -> RowSide:
    """Add each teacher's ids and chunks to rows that hold `input_ids` of the student.

    The teacher's ids are those of the text: of `messages` by its own chat template, of `prompt` and
    `completion`, of the text column; where none of them is there, of what the ids spell. They end
    with the teacher's end of text where the student's do. Rows of several documents
    (`seq_lengths`) keep them apart.

    A row may hold a part of its text that does not begin it (cut with `keep_end`, or by windows).
    Of a conversation the teacher then reads what stands before the part as well; of a text, which
    may be far longer than a model takes, the part alone, as the student does. Where the part of a
    conversation stands is not known if the ids are printed otherwise: the teacher reads what they
    spell. The first row whose teacher reads less than its text is named in a warning.

    Args:
        dataset: of `datasets`; all that it holds stays.
        pairs: one per teacher.
        text_field: the column of plain texts.
        eos: what was appended to the texts for the student, and is not text.
        num_proc: processes that tokenize; a stream knows none.
        routes: which teachers a row is for; None is for all.

    Raises:
        DataError: a row cannot be used; the message says why.
        OptionError: `routes` are by a column that is not there.
    """
    if routes is not None:
        routes.check_columns(dataset)
    sides = [_Side(pair, text_field, eos) for pair in pairs]

    def add(row: Mapping[str, Any]) -> dict[str, Any]:
        asked = None if routes is None else routes.of(row)
        return {
            column(index, name): value
            for index, side in enumerate(sides)
            for name, value in side.columns(row, asked is None or asked[index]).items()
        }

    options = {} if num_proc is None else {"num_proc": num_proc}
    return cast(RowSide, dataset.map(add, **options))


class _Side:
    """Makes the columns of one teacher."""

    def __init__(self, pair: Pair, text_field: str, eos: str | None) -> None:
        self._pair = pair
        self._text_field = text_field
        self._eos = eos
        self._stops = set(pair.student_vocab.stops)
        self._warned = False
        self._encoders = pair.encoders()
        self._is_same = self._encoders[0].same_as(self._encoders[1])

    def columns(self, row: Mapping[str, Any], asked: bool = True) -> dict[str, Any]:
        ids = np.asarray(row["input_ids"], dtype=np.int64)
        lengths = row.get("seq_lengths") or [len(ids)]
        ends = np.cumsum(lengths)
        documents = [ids[end - length : end] for length, end in zip(lengths, ends, strict=True)]
        whole = row if len(documents) == 1 else {}
        make = self._document if asked else self._nothing
        made = [make(each, whole) for each in documents]
        return {
            "input_ids": [teacher.tolist() for teacher, _ in made],
            "student_bounds": [each.student_bounds.tolist() for _, each in made],
            "teacher_bounds": [each.teacher_bounds.tolist() for _, each in made],
            "chunk_kinds": [each.kind.tolist() for _, each in made],
            "byte_counts": [each.byte_counts.tolist() for _, each in made],
        }

    def _document(self, ids: Ids, row: Mapping[str, Any]) -> tuple[Ids, Alignment]:
        if self._is_same and len(ids):
            # A teacher with the student's tokenizer reads the same tokens, however they were made.
            return self._cut(ids, self._pair.aligner.align(ids, ids))
        conversation = _conversation(row)
        if conversation is not None:
            turns = self._of_turns(ids, conversation)
            if turns is not None:
                return self._cut(*turns)
            self._warn(ids, "are no part of its conversation as the chat template prints it")
        text = self._text(row) if conversation is None else None
        if text is not None and not self._begins(ids, text):
            self._warn(ids, "do not begin its text")
            text = None
        teacher = self._teacher_ids(ids, text)
        if not len(teacher):
            teacher = np.array([pad_id(self._pair.teacher.source)], dtype=np.int64)
        return self._cut(teacher, self._pair.aligner.align(ids, teacher))

    def _nothing(self, ids: Ids, row: Mapping[str, Any]) -> tuple[Ids, Alignment]:
        """For a row of other teachers: a single token, and no bytes, by which it is known."""
        return np.array([pad_id(self._pair.teacher.source)], dtype=np.int64), Alignment(
            np.array([0, len(ids)], dtype=np.int64),
            np.array([0, 1], dtype=np.int64),
            np.array([ChunkKind.MISMATCH], dtype=np.uint8),
            np.zeros(4, dtype=np.int64),
            self._pair.fingerprints,
        )

    def _text(self, row: Mapping[str, Any]) -> str | None:
        if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
            text = str(row["prompt"] + row["completion"])
        elif isinstance(row.get(self._text_field), str):
            text = str(row[self._text_field])
        else:
            return None
        return text.removesuffix(self._eos) if self._eos else text

    def _spelled(self, ids: Ids) -> bytes:
        """What ids of the student spell, without the end of the text."""
        body = ids[:-1] if len(ids) and int(ids[-1]) in self._stops else ids
        return self._pair.student_vocab.decode_bytes(body.tolist())

    def _begins(self, ids: Ids, text: str) -> bool:
        """Whether the ids are of the text's beginning: any other part would be aligned with
        whatever place spells the same."""
        spelled = self._spelled(ids)
        # No character is less than a byte.
        if text[: len(spelled)].encode(errors="replace").startswith(spelled):
            return True
        if isinstance(self._pair.student.source, Vocab):
            return False
        # A normalizer, or special tokens in the text.
        (whole,) = self._encoders[0].encode([text], max_tokens=len(ids))
        return self._spelled(whole.ids).startswith(spelled)

    def _teacher_ids(self, ids: Ids, text: str | None) -> Ids:
        if text is None:
            # A cut may fall inside a character.
            text = self._spelled(ids).decode("utf-8", errors="ignore")
        (encoded,) = self._pair.teacher.encode([text])
        end = self._pair.teacher_vocab.roles.get("eos")
        stops = len(ids) > 0 and int(ids[-1]) in self._stops
        if stops and end is not None and (not encoded or encoded[-1] != end):
            encoded.append(end)
        return np.asarray(encoded, dtype=np.int64)

    def _of_turns(self, ids: Ids, conversation: Conversation) -> tuple[Ids, Alignment] | None:
        """None where it is not known which part of the conversation the ids are."""
        # The last one holds the whole conversation, where a template asks for one per answer.
        teacher = self._encoders[1].encode_conversation(conversation)[-1]
        whole = self._encoders[0].encode_conversation(conversation)[-1]
        start = _place(ids, whole.ids)
        if start is not None:
            student = whole.cut(start + len(ids))
        elif self._opens(ids, whole.ids, conversation):
            # The trainer prints the conversation otherwise: where its turns lie is not known.
            student, start = Encoded(ids, np.ones(len(ids), dtype=np.bool_), NO_RANGES), 0
        else:
            return None
        (alignment,) = align_by_turns(self._pair.aligner, [student], [teacher])
        if start:
            alignment = self._from(start, ids, teacher.ids, alignment)
        return teacher.ids, alignment

    def _opens(self, ids: Ids, whole: Ids, conversation: Conversation) -> bool:
        """Whether ids that are printed otherwise begin as the conversation does."""
        spelled, printed = self._spelled(ids), self._spelled(whole)
        if printed.startswith(spelled) or printed[:_TELLING] in spelled:
            return True
        at = told = 0
        for message in conversation.messages:
            # Templates change what the assistant says: they leave its thinking out.
            if message["role"] == "assistant" or told >= _TELLING:
                continue
            (said,) = self._encoders[0].encode([message["content"].strip()], max_tokens=_TELLING)
            opening = self._spelled(said.ids)[:_TELLING]
            at = spelled.find(opening, at)
            if at < 0:
                return False
            at, told = at + len(opening), told + len(opening)
        return True

    def _from(self, start: int, ids: Ids, teacher: Ids, alignment: Alignment) -> Alignment:
        """That of the student's tokens from `start` on, with the teacher's before them alone."""
        at = int(np.searchsorted(alignment.student_bounds, start))
        # A chunk that the cut lies in is none.
        alone, before = int(alignment.student_bounds[at]) - start, int(alignment.teacher_bounds[at])
        kind = np.repeat(
            np.array([ChunkKind.STUDENT_ONLY, ChunkKind.TEACHER_ONLY], dtype=np.uint8),
            [alone, before],
        )
        student_bounds = np.concatenate(
            [
                np.arange(alone + 1),
                np.full(before, alone),
                alignment.student_bounds[at + 1 :] - start,
            ]
        )
        kind = np.concatenate([kind, alignment.kind[at:]])
        sizes = _sizes(self._pair.student_vocab, ids)
        exact = np.repeat(kind == ChunkKind.EXACT, np.diff(student_bounds))
        counts = [
            sizes.sum(),
            _sizes(self._pair.teacher_vocab, teacher[before:]).sum(),
            sizes[exact].sum(),
            min(int(alignment.byte_counts[3]), int((kind == ChunkKind.MISMATCH).sum())),
        ]
        return Alignment(
            student_bounds,
            np.concatenate(
                [np.zeros(alone, dtype=np.int64), np.arange(before + 1),
                 alignment.teacher_bounds[at + 1 :]]
            ),
            kind,
            np.array(counts, dtype=np.int64),
            alignment.pair,
        )  # fmt: skip

    def _warn(self, ids: Ids, fault: str) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"input_ids of a row {fault} (they spell {shown(self._spelled(ids))}), and others may "
            "be so: of such rows the teacher reads what the ids spell, without what stands before "
            "them; keep the beginning (truncation_mode='keep_start', no later windows) to have it "
            "read the text",
            stacklevel=3,
        )

    def _cut(self, teacher: Ids, alignment: Alignment) -> tuple[Ids, Alignment]:
        """Leave out the teacher's tokens behind the last chunk that both sides have."""
        both = (np.diff(alignment.student_bounds) > 0) & (np.diff(alignment.teacher_bounds) > 0)
        found = both.nonzero()[0]
        last = int(found[-1]) + 1 if len(found) else 0
        # Where nothing corresponds the row is not distilled; a model needs a token all the same.
        end = max(1, int(alignment.teacher_bounds[last]))
        kept = np.minimum(alignment.teacher_bounds, end)
        # A chunk of nothing on both sides would follow.
        keep = np.concatenate(([True], (np.diff(alignment.student_bounds) + np.diff(kept)) > 0))
        kind = alignment.kind[keep[1:]]
        cut = Alignment(
            alignment.student_bounds[keep], kept[keep], kind, alignment.byte_counts, alignment.pair
        )
        return teacher[:end], cut


def _place(part: Ids, whole: Ids) -> int | None:
    """Where a part begins: 0 where it begins the whole, None where it lies nowhere or at several
    places."""
    last = len(whole) - len(part)
    if last < 0:
        return None
    if not len(part):
        return 0
    starts = (whole[: last + 1] == part[0]).nonzero()[0].tolist()
    found = [at for at in starts if np.array_equal(whole[at : at + len(part)], part)]
    return found[0] if found and (len(found) == 1 or found[0] == 0) else None


def _sizes(vocab: Vocab, ids: Ids) -> Ids:
    """The bytes of each token."""
    return np.array([len(vocab.token_bytes(each)) for each in ids.tolist()], dtype=np.int64)


def shown(spelled: bytes) -> str:
    """What stands in a message for text of a row."""
    text = spelled.decode(errors="replace")
    return repr(text if len(text) <= 60 else f"{text[:57]}...")


def _conversation(row: Mapping[str, Any]) -> Conversation | None:
    messages = row.get("messages")
    if messages is None and isinstance(row.get("prompt"), list):
        completion = row.get("completion")
        messages = [*row["prompt"], *(completion if isinstance(completion, list) else [])]
    if not messages:
        return None
    tools = row.get("tools")
    tools = json.loads(tools) if isinstance(tools, str) else tools
    return Conversation.from_messages(messages, tools=tools)
