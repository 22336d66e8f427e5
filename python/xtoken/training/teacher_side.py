"""The teachers' side of rows that another trainer has tokenized for the student."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Protocol, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken._core import Vocab
from xtoken.align import Alignment, AlignmentBatch, ChunkKind, Coverage
from xtoken.data.align_turns import align_by_turns
from xtoken.data.conversations import Conversation
from xtoken.data.examples import Example
from xtoken.data.loss_mask import NO_RANGES, Encoded
from xtoken.distillation import MultiBatch
from xtoken.distillation.batch import Batch
from xtoken.distillation.collate import pad_id
from xtoken.errors import DataError, OptionError
from xtoken.pair import Pair
from xtoken.teachers import TargetStore
from xtoken.tensors.chunks import ChunkBatch
from xtoken.training.batches import BATCH_ROWS, IGNORED, TEACHER_SIDE, BatchRows
from xtoken.training.routing import Routes
from xtoken.training.teaching import AnyBatch

Ids = NDArray[np.int64]

# So many bytes stand at one place of a conversation by no chance.
_TELLING = 40

_COLUMNS = ("input_ids", "student_bounds", "teacher_bounds", "chunk_kinds", "byte_counts")


def column(teacher: int, name: str) -> str:
    """The name of a column of one teacher."""
    return f"teacher{teacher}_{name}"


def columns(teachers: int) -> list[str]:
    """The names of the columns that `add_teacher_side` adds."""
    return [column(index, name) for index in range(teachers) for name in _COLUMNS]


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
    """
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
            f"input_ids of a row {fault} (they spell {_shown(self._spelled(ids))}), and others may "
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


def _shown(spelled: bytes) -> str:
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


class TeacherSideCollator:
    """Adds the teachers' side to what a collator makes of the student's: padded rows, or rows
    packed into one without padding (`position_ids` that start again).

    Args:
        collator: of the student's columns.
        pairs: one per teacher.
        targets: one per teacher whose loss reads targets from stored predictions, else None.
        prepare: one per teacher, a `Distiller`'s `prepared`: what its loss would otherwise ask a
            GPU for.

    Rows without the columns of `add_teacher_side` pass through, as in evaluation.
    """

    def __init__(
        self,
        collator: Callable[[list[Any]], Any],
        pairs: Sequence[Pair],
        targets: Sequence[TargetStore | None] = (),
        prepare: Sequence[Callable[[Batch], Batch]] = (),
    ) -> None:
        self.collator = collator
        self._prepare = prepare
        self._targets = list(targets) or [None] * len(pairs)
        self._names = columns(len(pairs))
        self._fingerprints = [pair.fingerprints for pair in pairs]
        self._pad_ids = [pad_id(pair.teacher.source) for pair in pairs]
        self._student_vocab = pairs[0].student_vocab if pairs else None
        self._warned = False

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """The student's inputs, and the teachers' side under `TEACHER_SIDE`.

        Raises:
            DataError: the collator changed the number of the student's tokens.
            OptionError: packed documents share a padded row, where attention would mix them.
        """
        plain = [{k: v for k, v in row.items() if k not in self._names} for row in rows]
        inputs = self.collator(plain)
        # Where datasets are joined, those of one are None in the rows of the others.
        if not all(row.get(name) is not None for row in rows for name in self._names):
            return inputs
        apart: list[Ids] = []
        batches = tuple(
            self._batch(index, rows, inputs, apart) for index in range(len(self._pad_ids))
        )
        if self._prepare:
            both = zip(self._prepare, batches, strict=True)
            batches = tuple(prepare(batch) for prepare, batch in both)
        side: AnyBatch = batches[0] if len(batches) == 1 else MultiBatch(batches)
        found = {**inputs, TEACHER_SIDE: side}
        if apart:
            self._warn(apart[0])
            found[BATCH_ROWS] = BatchRows(not_distilled=len(apart))
        return found

    def _warn(self, ids: Ids) -> None:
        if self._warned or self._student_vocab is None:
            return
        self._warned = True
        shown = _shown(self._student_vocab.decode_bytes(ids[:40].tolist()))
        warnings.warn(
            "a row is not distilled, and others like it will not be (rows_not_distilled in the log "
            "counts them): the student's tokens in the loss and the teacher's spell nothing in "
            f"common; it begins {shown}; look at one with pair.align(text), or compare both chat "
            "templates",
            stacklevel=3,
        )

    def _batch(
        self, index: int, rows: Sequence[Mapping[str, Any]], inputs: Any, apart: list[Ids]
    ) -> Batch:
        """That of one teacher; adds the documents that it has nothing to say of to `apart`."""
        pair = self._fingerprints[index]
        documents: list[list[tuple[Ids, Alignment]]] = []
        for row in rows:
            ids, *arrays = (row[column(index, name)] for name in _COLUMNS)
            documents.append(
                [
                    (
                        np.asarray(teacher, dtype=np.int64),
                        Alignment(
                            np.asarray(student_bounds, dtype=np.int64),
                            np.asarray(teacher_bounds, dtype=np.int64),
                            np.asarray(kinds, dtype=np.uint8),
                            np.asarray(counts, dtype=np.int64),
                            pair,
                        ),
                    )
                    for teacher, student_bounds, teacher_bounds, kinds, counts in zip(
                        ids, *arrays, strict=True
                    )
                ]
            )
        student_ids: Tensor = inputs["input_ids"]
        mask = inputs["labels"] != IGNORED
        if "attention_mask" not in inputs and "position_ids" in inputs:
            flat = [each for row in documents for each in row]
            batch = self._packed(index, flat, inputs, mask)
            apart += _without_chunks(batch, [_is_asked(alignment) for _, alignment in flat])
            return self._with_targets(index, flat, batch)
        if any(len(row) != 1 for row in documents):
            raise OptionError(
                "packed documents share a padded row, in which each would see those before it; "
                "pack with packing_strategy='bfd', or set padding_free=True"
            )
        attention = inputs.get("attention_mask")
        if attention is None:
            attention = torch.ones_like(student_ids)
        whole = [row[0] for row in documents]
        batch = self._padded(index, whole, inputs, attention, mask)
        apart += _without_chunks(batch, [_is_asked(alignment) for _, alignment in whole])
        return self._with_targets(index, whole, batch)

    def _with_targets(
        self, index: int, documents: Sequence[tuple[Ids, Alignment]], batch: Batch
    ) -> Batch:
        """The batch with the targets of its documents, where the predictions are stored."""
        store = self._targets[index]
        if store is None:
            return batch
        attention = batch.student.get("attention_mask")
        ids = batch.student_ids
        own = ids[attention.bool()] if attention is not None else ids.flatten()
        ends = np.cumsum([int(alignment.student_bounds[-1]) for _, alignment in documents])
        students = np.split(own.numpy()[: ends[-1]], ends[:-1])
        examples = [
            Example.whole(student, teacher, alignment)
            for student, (teacher, alignment) in zip(students, documents, strict=True)
        ]
        if not store.knows(examples):
            return batch
        made = store.targets(examples, threads=torch.get_num_threads())
        if attention is None:
            made = made.chained(
                [(len(each.student_ids), len(each.alignment.kind)) for each in examples]
            )
        return batch.with_targets(made, store.builder.tokens)

    def _padded(
        self,
        index: int,
        documents: Sequence[tuple[Ids, Alignment]],
        inputs: Any,
        attention: Tensor,
        mask: Tensor,
    ) -> Batch:
        lengths = attention.sum(-1).tolist()
        offsets = attention.argmax(-1)
        for (_, alignment), length in zip(documents, lengths, strict=True):
            _check_length(int(alignment.student_bounds[-1]), int(length))
        mask = mask.clone()
        first = torch.arange(len(mask), device=mask.device), offsets
        mask[first] = False  # nothing predicts a first token
        width = max(len(teacher) for teacher, _ in documents)
        shape = (len(documents), width)
        ids = torch.full(shape, self._pad_ids[index], dtype=torch.int64, device="cpu")
        seen = torch.zeros_like(ids)
        for row, (teacher, _) in enumerate(documents):
            ids[row, : len(teacher)] = torch.from_numpy(teacher)
            seen[row, : len(teacher)] = 1
        teacher_mask = seen.bool()
        teacher_mask[:, 0] = False
        asked = torch.tensor([_is_asked(each) for _, each in documents], device="cpu")
        chunks = ChunkBatch.usable_from_alignments(
            [alignment for _, alignment in documents],
            mask,
            teacher_mask,
            student_offsets=offsets.tolist(),
        )
        student = {"input_ids": inputs["input_ids"], "attention_mask": attention}
        return Batch(
            student=student,
            teacher={"input_ids": ids, "attention_mask": seen},
            student_loss_mask=mask,
            teacher_loss_mask=teacher_mask,
            chunks=chunks,
            tokens=int(mask[:, 1:].sum()),
            coverage=_coverage([alignment for _, alignment in documents]),
            pair=self._fingerprints[index],
            asked_tokens=None if bool(asked.all()) else int(mask[asked, 1:].sum()),
        )

    def _packed(
        self,
        index: int,
        documents: Sequence[tuple[Ids, Alignment]],
        inputs: Any,
        mask: Tensor,
    ) -> Batch:
        positions: Tensor = inputs["position_ids"]
        total = sum(int(alignment.student_bounds[-1]) for _, alignment in documents)
        _check_length(total, int(positions.numel()), at_most=True)
        starts = positions == 0
        lengths = [len(teacher) for teacher, _ in documents]
        places = [torch.arange(length, device="cpu") for length in lengths]
        teacher_positions = torch.cat(places)[None]
        teacher_starts = teacher_positions == 0
        mask = mask & ~starts
        teacher_mask = ~teacher_starts
        joined = _chained([alignment for _, alignment in documents])
        # The masks hold no token that begins a document, so no chunk lies in two.
        chunks = ChunkBatch.usable_from_alignments([joined], mask, teacher_mask)
        ids = torch.from_numpy(np.concatenate([teacher for teacher, _ in documents]))[None]
        asked = np.array([_is_asked(alignment) for _, alignment in documents])
        owner = np.repeat(asked, [int(each.student_bounds[-1]) for _, each in documents])
        own = mask[0, : len(owner)] & torch.from_numpy(owner)
        return Batch(
            student={"input_ids": inputs["input_ids"], "position_ids": positions},
            teacher={"input_ids": ids, "position_ids": teacher_positions},
            student_loss_mask=mask,
            teacher_loss_mask=teacher_mask,
            chunks=chunks,
            tokens=int(mask[:, 1:].sum()),
            coverage=_coverage([alignment for _, alignment in documents]),
            pair=self._fingerprints[index],
            asked_tokens=None if bool(asked.all()) else int(own[1:].sum()),
        )


def _without_chunks(batch: Batch, asked: Sequence[bool]) -> list[Ids]:
    """The student's tokens of documents that it learns and that are for this teacher, but in which
    no chunk counts."""
    ids, learned = batch.student_ids.flatten().numpy(), batch.student_loss_mask
    rows, width = learned.shape
    starts = np.arange(rows) * width
    if "attention_mask" not in batch.teacher:  # packed documents, in the same order on both sides
        starts = (batch.student["position_ids"].flatten() == 0).nonzero().flatten().numpy()
    owner = np.searchsorted(starts, np.arange(rows * width), side="right") - 1
    learns = np.bincount(owner, learned.flatten().numpy(), len(starts)) > 0
    first = batch.chunks.sample * width + batch.chunks.student_start
    taught = np.bincount(owner[first.numpy()], minlength=len(starts)) > 0
    apart = learns[: len(asked)] & ~taught[: len(asked)] & np.array(asked)
    return [ids[owner == at] for at in apart.nonzero()[0]]


def _is_asked(alignment: Alignment) -> bool:
    """Whether the document is for this teacher."""
    return bool(alignment.byte_counts.any())


def _coverage(alignments: Sequence[Alignment]) -> Coverage:
    """Of the documents that are for this teacher."""
    own = [each for each in alignments if _is_asked(each)]
    return AlignmentBatch.stack(own).coverage if own else Coverage(*[0] * len(fields(Coverage)))


def _check_length(ours: int, theirs: int, *, at_most: bool = False) -> None:
    if ours != theirs and not (at_most and ours < theirs):
        raise DataError(
            f"a row has {ours} student tokens, the collator made {theirs} of them; the chunks no "
            "longer fit: let it only pad"
        )


def _chained(alignments: Sequence[Alignment]) -> Alignment:
    """Documents one behind another as one sequence."""
    student, teacher = (
        np.concatenate(
            ([0], *(b[1:] + start for b, start in zip(bounds, _starts(bounds), strict=True)))
        ).astype(np.int64)
        for bounds in (
            [each.student_bounds for each in alignments],
            [each.teacher_bounds for each in alignments],
        )
    )
    return Alignment(
        student,
        teacher,
        np.concatenate([each.kind for each in alignments]),
        np.sum([each.byte_counts for each in alignments], axis=0, dtype=np.int64),
        alignments[0].pair,
    )


def _starts(bounds: Sequence[Ids]) -> list[int]:
    ends = np.cumsum([0, *(int(each[-1]) for each in bounds)])
    return [int(end) for end in ends[:-1]]
