"""Targets of a batch made in the step, where none were made before."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from xtoken.align.alignment import Alignment, ChunkKind
from xtoken.losses.inputs import LossInputs, LossOptions
from xtoken.targets import TargetBuilder, TargetExample, TargetOptions
from xtoken.targets.rows import within
from xtoken.tensors.host_chunks import WholeText
from xtoken.tensors.target_batch import TargetBatch
from xtoken.tensors.teacher_signal import TeacherTopK, teacher_positions

# Of full logits so many columns are looked at; the rest is tail. To sort all of 128,256 takes two
# to four times as long.
DEFAULT_TOP_K = 512
_NO_LIMIT = 255

_Documents = list[tuple[int, tuple[int, int], Alignment]]


def target_options(options: LossOptions) -> TargetOptions:
    """The builder's options among the loss's."""
    depth = _NO_LIMIT if options.max_depth is None else min(options.max_depth, _NO_LIMIT)
    return TargetOptions(
        cells=options.cells is not False,
        consistent=options.consistent is not False,
        levels=options.carry_levels,
        max_depth=depth,
        min_prob=options.min_prob,
        sure=options.sure,
    )


@torch.no_grad()
def batch_targets(
    builder: TargetBuilder, inputs: LossInputs, options: LossOptions, teacher_size: int
) -> TargetBatch:
    """The targets of the batch's chunks, from the teacher's signal.

    What precedes a chunk that counts is read too, where the chunks were made of whole alignments.
    Of others the text of a sample is what its chunks hold: what follows a gap between them is
    treated as the start of a text.

    Raises:
        OptionError: predictions at a temperature other than 1.
    """
    assert inputs.student_ids is not None
    assert inputs.teacher_ids is not None
    chunks = inputs.chunks.to("cpu")
    sample = chunks.sample.numpy()
    bounds = [
        getattr(chunks, name).numpy()
        for name in ("student_start", "student_end", "teacher_start", "teacher_end")
    ]
    documents = _documents(chunks.host.text, inputs)
    teacher = inputs.teacher
    first_read = bounds[2] - 1
    if documents is not None:
        begin = _document_starts(documents, sample, bounds[2])
        first_read = np.maximum(first_read - options.carry_levels, begin)
    read = _read(sample, first_read, bounds[3], teacher_positions(teacher))
    if not isinstance(teacher, TeacherTopK):
        kept = options.top_k or DEFAULT_TOP_K
        teacher = TeacherTopK.from_logits(
            teacher, kept, vocab_size=teacher_size, positions=torch.from_numpy(read)
        )
    teacher.require_temperature(1.0, "exact targets are of")
    kinds = chunks.kind.numpy()
    student_ids, teacher_ids = inputs.student_ids.cpu().numpy(), inputs.teacher_ids.cpu().numpy()
    columns = teacher.ids.cpu().numpy()
    # Nothing is built where no chunk counts, as in a long prompt.
    log_probs = np.where(read[..., None], teacher.log_probs.float().cpu().numpy(), -np.inf)
    columns = np.where(np.isneginf(log_probs), -1, within(columns, teacher_size))
    if documents is None:
        documents = []
        for row in range(len(student_ids)):
            mine = np.flatnonzero(sample == row)
            mine = mine[np.argsort(bounds[0][mine], kind="stable")]
            starts = [side[mine] for side in bounds]
            alignment = _with_gaps(starts[0], starts[1], starts[2], starts[3], kinds[mine])
            documents.append((row, (0, 0), alignment))
    examples = []
    for row, (first, other_first), alignment in documents:
        own = slice(first, first + int(alignment.student_bounds[-1]))
        other = slice(other_first, other_first + int(alignment.teacher_bounds[-1]))
        examples.append(
            TargetExample(
                _inside(student_ids[row, own], alignment.student_bounds, alignment.kind),
                _inside(teacher_ids[row, other], alignment.teacher_bounds, alignment.kind),
                alignment,
                log_probs[row, other],
                columns[row, other],
                validate=False,
            )
        )
    threads = torch.get_num_threads()
    targets = builder.build(examples, target_options(options), threads=threads)
    made = TargetBatch.from_targets(
        targets, builder.tokens, chunks, student_ids.shape[1],
        [first for _, (first, _), _ in documents], [row for row, _, _ in documents],
    )  # fmt: skip
    return made.to(inputs.student_ids.device)


def _documents(text: WholeText | None, inputs: LossInputs) -> _Documents | None:
    """The documents that the chunks are of; None where they are not known, or fit other ids."""
    assert inputs.student_ids is not None
    assert inputs.teacher_ids is not None
    found = None if text is None else text.documents()
    if found is None or len(found) == 0:
        return None
    rows = len(inputs.student_ids)
    widths = inputs.student_ids.shape[1], inputs.teacher_ids.shape[1]
    for row, firsts, alignment in found:
        lasts = alignment.student_bounds[-1], alignment.teacher_bounds[-1]
        if row >= rows or any(
            first + int(last) > width
            for first, last, width in zip(firsts, lasts, widths, strict=True)
        ):
            return None
    return found


def _document_starts(
    documents: _Documents, sample: NDArray[np.int64], start: NDArray[np.int64]
) -> NDArray[np.int64]:
    """[C] the teacher's column at which the document of each chunk begins."""
    begins = np.array([(row, first) for row, (_, first), _ in documents], np.int64)
    keys = begins[:, 0] * 2**32 + begins[:, 1]  # in order, as the documents are
    found: NDArray[np.int64] = begins[np.searchsorted(keys, sample * 2**32 + start, "right") - 1, 1]
    return found


def _read(
    sample: np.ndarray[tuple[int], np.dtype[np.int64]],
    start: np.ndarray[tuple[int], np.dtype[np.int64]],
    end: np.ndarray[tuple[int], np.dtype[np.int64]],
    positions: tuple[int, int],
) -> NDArray[np.bool_]:
    """[B, T_t] the rows from each start to each end, which chunks read: those that predict their
    tokens, and what follows them. Padding, of which a model may say anything, is not among them."""
    steps = np.zeros((positions[0], positions[1] + 1), np.int64)
    np.add.at(steps, (sample, start.clip(0)), 1)
    np.add.at(steps, (sample, end), -1)
    return steps.cumsum(1)[:, :-1] > 0


def _with_gaps(
    student_start: np.ndarray[tuple[int], np.dtype[np.int64]],
    student_end: np.ndarray[tuple[int], np.dtype[np.int64]],
    teacher_start: np.ndarray[tuple[int], np.dtype[np.int64]],
    teacher_end: np.ndarray[tuple[int], np.dtype[np.int64]],
    kinds: np.ndarray[tuple[int], np.dtype[np.int64]],
) -> Alignment:
    """Chunks in order as an alignment that tiles both sides, with what is between them as
    mismatched chunks."""
    before_student = np.concatenate([[0], student_end[:-1]])[: len(student_start)]
    before_teacher = np.concatenate([[0], teacher_end[:-1]])[: len(teacher_start)]
    gap = (student_start > before_student) | (teacher_start > before_teacher)
    # A gap is a chunk before its chunk.
    place = np.arange(len(gap)) + np.cumsum(gap)
    total = len(gap) + int(gap.sum())
    student, teacher = np.zeros(total + 1, np.int64), np.zeros(total + 1, np.int64)
    student[place + 1], teacher[place + 1] = student_end, teacher_end
    student[place], teacher[place] = student_start, teacher_start
    kind = np.full(total, int(ChunkKind.MISMATCH), np.uint8)
    kind[place] = kinds
    return Alignment(student, teacher, kind, np.zeros(4, np.int64))


def _inside(
    ids: np.ndarray[tuple[int], np.dtype[np.int64]],
    bounds: np.ndarray[tuple[int], np.dtype[np.int64]],
    kinds: np.ndarray[tuple[int], np.dtype[np.uint8]],
) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Ids with those in gaps, which may be padding of any number, as 0."""
    keep = np.repeat(kinds != int(ChunkKind.MISMATCH), np.diff(bounds))
    return np.where(keep, ids, 0)
