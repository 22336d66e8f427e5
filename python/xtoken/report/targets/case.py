"""One loss of one text: its call as in training, and what it reads at each chunk."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken.losses.engine.merge import merge_rows
from xtoken.losses.engine.row_blocks import Block, BlockLoss
from xtoken.losses.engine.run import LossCall, checked_call
from xtoken.losses.registry import find_loss
from xtoken.report.aligned_text import AlignedText, Chunk
from xtoken.report.structure import PairStructure
from xtoken.tensors.pair_parts import LossName
from xtoken.tensors.stop_fold import StopFold, folded_logits


@dataclass(frozen=True, eq=False)
class Case:
    """One loss of one text.

    Attributes:
        chunks: the counted ones, in the loss's order.
        student_ids, teacher_ids: of the text.
        has_student: whether the student's rows are a model's.
    """

    name: LossName
    call: LossCall
    structure: PairStructure
    chunks: list[Chunk]
    student_ids: list[int]
    teacher_ids: list[int]
    has_student: bool

    @classmethod
    def of(
        cls,
        text: AlignedText,
        name: LossName,
        structure: PairStructure,
        chunks: list[Chunk],
        teacher: Tensor,
        student: Tensor | None,
    ) -> Case:
        """The loss of this name with its own options.

        Raises:
            XTokenError: the loss does not suit the pair.
        """
        distiller = text.pair.distiller(name)
        batch = distiller.prepared(distiller.collator([text.example]))
        has_student = student is not None
        if student is None:  # the losses take one; nothing of it is shown
            student = torch.zeros(1, len(text.example.student_ids), text.pair.sizes[0])
        term = distiller.term(student, teacher, batch, len(chunks))
        return cls(
            name,
            checked_call(find_loss(name), term.inputs, term.pair, term.options),
            structure,
            chunks,
            text.example.student_ids.tolist(),
            text.example.teacher_ids.tolist(),
            has_student,
        )

    def rows(self, loss: BlockLoss, chunk: int) -> tuple[Tensor, Block]:
        """What the loss reads of the student for one chunk."""
        index, segments = loss.student.block(chunk, chunk + 1)
        return self.call.source.rows(index, loss.columns), Block(chunk, chunk + 1, segments)

    def log_student(self, rows: Tensor, fold: StopFold | None = None) -> Tensor:
        """[n, V_s] the student's log-probabilities, as the losses over whole rows take them."""
        return torch.log_softmax(folded_logits(rows, self.call.temperature, fold), -1)

    def log_student_of_chunk(
        self, rows: Tensor, block: Block, fold: StopFold | None = None
    ) -> Tensor:
        """[1, V_s] the same of the one row that a chunk's rows are merged to."""
        return self.log_student(merge_rows(rows, block.segments, len(block)), fold)

    def value(self, loss: BlockLoss, rows: Tensor, block: Block) -> float | None:
        """The loss of one chunk in nats; None without a student."""
        if not self.has_student:
            return None
        return float(loss.forward(rows, block, loss.params)[0].sum())

    def metrics(self, loss: BlockLoss, rows: Tensor, block: Block) -> dict[str, float]:
        """The loss's own metrics of one chunk; without a student those of it mean nothing."""
        sums = loss.forward(rows, block, loss.params)[1]
        return dict(zip(loss.metric_names, sums.tolist(), strict=True))

    def own(self, chunk: Chunk) -> tuple[int, int]:
        """The first student and teacher token of a chunk."""
        return self.student_ids[chunk.student[0]], self.teacher_ids[chunk.teacher[0]]
