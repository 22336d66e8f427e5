"""One call of a loss: checks first, then the sum over blocks of chunks, then the finite check."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from xtoken._checks import expect
from xtoken.errors import OptionError, PairError, ShapeError
from xtoken.losses.engine.boundaries import LeftOut
from xtoken.losses.engine.checks import check_batch, check_finite
from xtoken.losses.engine.compiled import with_compiled
from xtoken.losses.engine.held import Held
from xtoken.losses.engine.loss_spec import LossSpec
from xtoken.losses.engine.merge import ChunkRows, Merge, chunk_rows
from xtoken.losses.engine.prepared import Prepared
from xtoken.losses.engine.row_blocks import BlockLoss, reduce_chunks
from xtoken.losses.engine.student_input import student_rows
from xtoken.losses.engine.student_rows import StudentRows
from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.losses.inputs import LossInputs, LossOptions
from xtoken.losses.output import LossOutput
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.pair_parts import PairParts
from xtoken.tensors.rows import block_rows
from xtoken.tensors.teacher_signal import Teacher, TeacherTopK
from xtoken.tensors.teacher_spread import TeacherSpread
from xtoken.vocab.fingerprints import check_fingerprint

AnyPrepared = TypeVar("AnyPrepared", bound=Prepared)


@dataclass(frozen=True, eq=False)
class LossCall:
    """The checked arguments of one call.

    Attributes:
        source: the student's rows.
        temperature: the one of the options, or the loss's own.
    """

    inputs: LossInputs
    pair: PairParts
    options: LossOptions
    source: StudentRows
    temperature: float

    @property
    def chunks(self) -> ChunkBatch:
        return self.inputs.chunks

    @property
    def teacher(self) -> Teacher:
        return self.inputs.teacher

    @property
    def device(self) -> torch.device:
        return self.source.tensors()[0].device

    def ids(self) -> tuple[Tensor, Tensor]:
        """Both sides' ids, of a loss that needs them."""
        assert self.inputs.student_ids is not None
        assert self.inputs.teacher_ids is not None
        return self.inputs.student_ids, self.inputs.teacher_ids

    def student_chunks(self, merge: Merge | None) -> ChunkRows:
        """The student's rows of each chunk."""
        return chunk_rows(self.chunks, "student", self.source.positions[1], merge)

    def teacher_rows(self, merge: Merge, *, renormalized: bool = False) -> TeacherRows:
        """The teacher's rows of each chunk; see `TeacherRows.build`."""
        return TeacherRows.build(
            self.teacher, self.chunks, self.pair.sizes[1], self.temperature, merge,
            renormalized=renormalized, fold=self.pair.stop_fold,
        )  # fmt: skip

    def root_rows(self, spec: LossSpec, merge: Merge, *, renormalized: bool) -> TeacherRows:
        """The same by cells and without what the student would have joined, where the options ask
        for it."""
        rows = self.teacher_rows(merge, renormalized=renormalized)
        if self.options.cells:
            assert self.pair.cells is not None
            rows = replace(rows, fold=self.pair.cells.fold)
        if not self.options.consistent:
            return rows
        if merge != "chain":
            raise OptionError(
                f"consistent = True with merge = {merge!r}; what the student would have joined is "
                "known at a chunk's first position: pass merge='chain'"
            )
        return replace(rows, left_out=self.prepared(spec, LeftOut))

    def prepared(self, spec: LossSpec, kind: type[AnyPrepared]) -> AnyPrepared:
        """What was prepared with the batch, or, on the CPU without waiting, made now."""
        found = self.inputs.prepared
        if found is None:
            assert spec.prepare is not None
            found = spec.prepare(self.pair, self.chunks, *self.ids())
        made = expect(found, kind, "prepared", f"pass what {spec.name} prepares, or None")
        if made.chunks is not self.chunks.host:
            raise ShapeError(
                f"prepared is of {len(made.chunks.sample)} other chunks than the "
                f"{len(self.chunks)} of the batch; pass both from the same batch"
            )
        return made

    def rows_per_block(self, widest: int) -> int:
        """Chunks worked on at a time, by the widest row that is held of each."""
        return self.options.block_size or block_rows(widest, self.device)


# Makes the loss of a checked call, and says how wide its widest row is.
MakeBlocks = Callable[[LossCall], tuple[BlockLoss, int]]


def run_loss(
    spec: LossSpec, make: MakeBlocks, inputs: LossInputs, pair: PairParts, options: LossOptions
) -> LossOutput:
    """The loss of one batch: the only way from arguments to a `LossOutput`."""
    if torch.compiler.is_compiling():
        # Made here and not by a decorator, which would import the compiler with the losses.
        eager: LossOutput = torch.compiler.disable(run_loss)(spec, make, inputs, pair, options)  # type: ignore[no-untyped-call]
        return eager
    call = checked_call(spec, inputs, pair, options)
    # What is read of the teacher before the blocks are, too: autocast would lower it.
    with torch.autocast(call.device.type, enabled=False):
        loss, widest = make(call)
    rows_per_block = call.rows_per_block(widest)
    result, slope = reduce_chunks(
        with_compiled(loss, options.backend, rows_per_block),
        call.source,
        rows_per_block=rows_per_block,
        normalizer=inputs.normalizer,
        weights=inputs.chunk_weights,
        held=Held.of(
            teacher=inputs.teacher, chunk_weights=inputs.chunk_weights, targets=inputs.targets,
            prefixes=inputs.prefixes, prepared=inputs.prepared,
        ),
    )  # fmt: skip
    return replace(result, loss=check_finite(result.loss, slope, call.source, inputs))


def checked_call(
    spec: LossSpec, inputs: LossInputs, pair: PairParts, options: LossOptions
) -> LossCall:
    """Refuse what does not belong together, and name the call that was meant."""
    expect(inputs, LossInputs, "inputs", "pass LossInputs(student, teacher, chunks)")
    expect(
        pair, PairParts, "pair",
        f"pass PairParts.from_projection(projection, needs={spec.name!r})",
    )  # fmt: skip
    expect(options, LossOptions, "options", "pass LossOptions(...)")
    spec.check_options(options)
    _check_parts(spec, pair, options, inputs)
    source = student_rows(inputs.student, pair.sizes[0])
    check_batch(source, inputs)
    device = source.tensors()[0].device
    for name, tensor in _tensors_of(spec, pair):
        if tensor.device != device:
            raise PairError(
                f"{name} of the pair is on {tensor.device}, the student on {device}; "
                f"pass the parts' .to({str(device)!r}), or distiller.to(...) where one holds them"
            )
    if spec.needs_ids or spec.prepare_for(options) is not None:
        for name, ids in (("student_ids", inputs.student_ids), ("teacher_ids", inputs.teacher_ids)):
            if ids is None:
                raise OptionError(
                    f"{spec.name} needs {name}; pass LossInputs(..., {name}=the ids [B, T] that "
                    "the model was run on)"
                )
    if pair.fingerprint is not None:
        pair.fingerprint.check(
            inputs.chunks.pair, "chunks", "pass the alignments of this pair's Aligner"
        )
        if isinstance(inputs.teacher, TeacherTopK | TeacherSpread):
            check_fingerprint(
                pair.fingerprint.teacher, inputs.teacher.teacher_fingerprint, "teacher", "teacher",
                "pass the predictions of this pair's teacher",
            )  # fmt: skip
    temperature = spec.temperature if options.temperature is None else options.temperature
    return LossCall(inputs, pair, options, source, temperature)


def _check_parts(spec: LossSpec, pair: PairParts, options: LossOptions, inputs: LossInputs) -> None:
    wanted = {
        "projection": ("projection",),
        "tries": ("student_trie", "teacher_trie") if options.mirror else ("student_trie",),
        "strict_common": ("strict_common",),
        "relaxed_common": ("relaxed_common",),
        # What was made before needs no builder.
        "targets": ("targets",) if inputs.targets is None else (),
        "byte_prefixes": ("byte_prefixes",),
        "completions": ("completions",),
        "piece_chains": ("piece_chains",),
        "cells": ("cells",),
    }
    parts = spec.parts_for(options)
    needs = repr(spec.name) if parts == spec.parts else "{" + repr(sorted(parts))[1:-1] + "}"
    for part in sorted(parts):
        for name in wanted[part]:
            if getattr(pair, name) is None:
                raise PairError(
                    f"the pair has no {name}, which {spec.name} needs; "
                    f"pass PairParts.from_projection(projection, needs={needs})"
                )


def _tensors_of(spec: LossSpec, pair: PairParts) -> list[tuple[str, Tensor]]:
    """One tensor of each part that the loss reads."""
    found = []
    if "projection" in spec.parts and pair.projection is not None:
        found.append(("projection", pair.projection.indptr))
    if "tries" in spec.parts and pair.student_trie is not None:
        found.append(("student_trie", pair.student_trie.tokens))
    if "byte_prefixes" in spec.parts and pair.byte_prefixes is not None:
        found.append(("byte_prefixes", pair.byte_prefixes.begins))
    if "completions" in spec.parts and pair.completions is not None:
        found.append(("completions", pair.completions.ptr))
    if pair.cells is not None and spec.on_cells:
        found.append(("cells", pair.cells.fold.column_of))
    if "piece_chains" in spec.parts and pair.piece_chains is not None:
        found.append(("piece_chains", pair.piece_chains.student_ids))
    for name, common in (
        ("strict_common", pair.strict_common),
        ("relaxed_common", pair.relaxed_common),
    ):
        if name in spec.parts and common is not None:
            found.append((name, common.student_ids))
    return found
