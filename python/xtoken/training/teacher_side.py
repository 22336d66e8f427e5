"""A collator that adds the teachers' side to the student's batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from xtoken.align import Alignment, AlignmentBatch, Coverage
from xtoken.data.examples import Example
from xtoken.distillation import MultiBatch
from xtoken.distillation.batch import Batch
from xtoken.distillation.collate import pad_id
from xtoken.errors import DataError, OptionError
from xtoken.pair import Pair
from xtoken.teachers import TargetStore
from xtoken.tensors.chunks import ChunkBatch
from xtoken.training.batches import BATCH_ROWS, IGNORED, TEACHER_SIDE, BatchRows
from xtoken.training.teacher_columns import COLUMNS, Ids, column, columns, shown
from xtoken.training.teaching import AnyBatch


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
        text = shown(self._student_vocab.decode_bytes(ids[:40].tolist()))
        warnings.warn(
            "a row is not distilled, and others like it will not be (rows_not_distilled in the log "
            "counts them): the student's tokens in the loss and the teacher's spell nothing in "
            f"common; it begins {text}; look at one with pair.align(text), or compare both chat "
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
            ids, *arrays = (row[column(index, name)] for name in COLUMNS)
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
        chunks = ChunkBatch.usable_from_alignments(
            [joined],
            mask,
            teacher_mask,
            student_document_starts=starts.reshape(mask.shape),
            teacher_document_starts=teacher_starts,
        )
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
