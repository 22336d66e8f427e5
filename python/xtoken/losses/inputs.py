"""What every loss takes: the tensors of one batch, and the options of all losses by one name."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal, get_args

import torch
from torch import Tensor

from xtoken._checks import check_choice, check_flag, check_number, expect
from xtoken.errors import OptionError, ShapeError
from xtoken.losses.engine.divergence import Direction
from xtoken.losses.engine.merge import Merge
from xtoken.losses.engine.prepared import Prepared
from xtoken.losses.engine.student_input import Student, check_student
from xtoken.losses.prefix_kl.compared_prefixes import PreparedPrefixes
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.host import readable
from xtoken.tensors.target_batch import TargetBatch
from xtoken.tensors.teacher_signal import Teacher, check_temperature, teacher_positions

Scope = Literal["chunk", "microbatch"]
Chooser = Literal["teacher", "student"]
# Rows that a compiled block may be filled up to.
_MOST_COMPILED = 2**16


@dataclass(frozen=True, eq=False)
class LossInputs:
    """One batch as a loss takes it.

    Attributes:
        student: [B, T_s, V_s'] float logits, raw; they carry the gradient. Or an `LmHead` (fused:
            the logits are never made) or a `VocabShard`. Columns from V_s on are dropped.
        teacher: [B, T_t, V_t'] float logits, raw, detached here, columns from V_t on dropped; or
            a `TeacherTopK`, whose unstored tokens have no known probability; or an `LmHead`, whose
            logits are made where they are read.
        chunks: the chunks to count, from `ChunkBatch.usable_from_alignments`.
        student_ids, teacher_ids: [B, T_s] and [B, T_t] int64, the tokens that the models were run
            on. Prefix KL and ALM read them; the others compare their shapes with the logits'.
        normalizer: what the sum over chunks is divided by, > 0; their number where None. With
            gradient accumulation the number of the whole step, in data parallel that of
            `global_normalizer`.
        chunk_weights: [C] float, a factor on each chunk's loss, not on metrics or normalizer.
        targets: exact targets of these chunks, where they were made before; read by exact-kl alone.
        prefixes: of prefix KL, from `prepare_prefixes` on the batch while it was on the CPU. Where
            None they are made in the loss, which on another device waits for the ids.
        prepared: the same of the other losses that look the ids up, from `LossSpec.prepare`.

    Raises:
        ArgumentTypeError: a value of another class; the message says which call makes it.
        ShapeError: shapes that do not fit.
        OptionError: a normalizer that is not above 0.

    >>> chunks = ChunkBatch.from_mask(torch.tensor([[False, True, True]]))
    >>> inputs = LossInputs(torch.zeros(1, 3, 5), torch.zeros(1, 3, 5), chunks)
    >>> len(inputs.chunks)
    2
    """

    student: Student
    teacher: Teacher
    chunks: ChunkBatch
    student_ids: Tensor | None = None
    teacher_ids: Tensor | None = None
    normalizer: float | Tensor | None = None
    chunk_weights: Tensor | None = None
    targets: TargetBatch | None = None
    prefixes: PreparedPrefixes | None = None
    prepared: Prepared | None = None

    def __post_init__(self) -> None:
        check_student(self.student)
        teacher_positions(self.teacher)
        expect(
            self.chunks, ChunkBatch, "chunks",
            "pass ChunkBatch.usable_from_alignments(alignments, student_mask, teacher_mask)",
        )  # fmt: skip
        for name, ids in (("student_ids", self.student_ids), ("teacher_ids", self.teacher_ids)):
            if ids is not None:
                expect(ids, Tensor, name, f"pass {name} as an int64 tensor [B, T]")
                if ids.dtype != torch.int64:
                    raise ShapeError(f"{name} is {ids.dtype}, expected torch.int64")
        if self.targets is not None:
            expect(self.targets, TargetBatch, "targets", "pass TargetBatch.from_targets(...)")
        if self.prepared is not None:
            expect(self.prepared, Prepared, "prepared", "pass what the loss's spec prepares")
        if self.chunk_weights is not None:
            expect(
                self.chunk_weights, Tensor, "chunk_weights", "pass a float tensor, one per chunk"
            )
            if tuple(self.chunk_weights.shape) != (len(self.chunks),):
                raise ShapeError(
                    f"chunk_weights has shape {tuple(self.chunk_weights.shape)}, expected "
                    f"({len(self.chunks)},): one per chunk"
                )
        if self.normalizer is not None:
            check_normalizer(self.normalizer)


@dataclass(frozen=True)
class LossOptions:
    """The options of all losses; each loss refuses one that it does not read.

    Attributes:
        direction: "forward" is KL(teacher || student), "reverse" KL(student || teacher), "jsd" the
            generalized Jensen-Shannon divergence.
        beta: the teacher's share of the mean in "jsd", inside (0, 1).
        temperature: above 0; divides both sides' logits, and the loss is multiplied by its square.
            In ALM the root taken of the likelihoods. None means the loss's own, 1 (100 for ALM).
        merge: from the predictor rows of a chunk to one distribution: "chain" the first one's,
            "last" the last one's, "mean" that of the mean logits.
        top_k: teacher columns kept among those that W reaches; None or more than there are keeps
            all. With a `TeacherTopK` in chunk scope the columns are the stored ones, `top_k` the
            best of them. In exact-kl None is 512 of full logits, also under `min_prob=0`: all of
            them would have to be sorted. Of a `TeacherTopK` it reads all.
        top_k_scope: "chunk", each chunk's own best columns; "microbatch", one set for the batch by
            total teacher mass (sparser work, and the cheapest path).
        top_k_by: whose likeliest columns the `top_k` are, those of the teacher or of the student as
            it is, without a gradient through the choice. The student's suit reverse KL: what it
            would say is compared, and not what it would never say. With a `TeacherTopK` it chooses
            among the stored ones. In chunk scope alone.
        tail_bucket: one more column on each side for all mass outside the kept ones, the student's
            on empty rows of W included. True refuses a tail in which the student cannot have mass;
            "auto" has one exactly where W reaches columns outside the kept ones.
        common_weight, uld_weight: factors of the partial KL and of the sorted L1, >= 0.
        max_depth: longest prefix of prefix KL, and most teacher tokens of a path of exact KL; None
            for no limit, 0 for the root alone.
        depth_weights: weight of depth 0, 1, ...; the last one holds for all deeper ones. The
            default is the plain sum.
        min_mass: a prefix at which no token ends is skipped where the teacher has less than this
            on its children together; in [0, 1).
        end: False leaves out END and the depth at the chunk's own end, for ablations.
        mirror: whether chunks of several student tokens and one teacher token are compared beyond
            the root.
        cells, consistent, carry_levels, sure: the corrections of exact targets, where exact-kl
            makes them; see `xtoken.targets.TargetOptions`, whose `levels` is `carry_levels`. Of
            p-kl and of prefix-kl's root the first two. None means the loss's own: on in exact-kl,
            off in the others.
        min_prob: teacher columns below this probability, or not among the `top_k`, are one tail in
            exact-kl's targets; in [0, 1).
        chain_rule: whether exact-kl weighs each depth by its parent's mass, and not by
            `depth_weights`. None means by direction: not in "forward", where the plain sum teaches
            more, and in the others, which have no weights of depths.
        mismatch_weight: factor of partition-kl, >= 0, on chunks that are not one token on both
            sides.
        student_top_k: shared tokens that strict-top-k compares at each chunk, the student's
            likeliest; None for all of them.
        mask_spaces: whether bpm leaves out positions whose token is spaces and tabs alone.
        full_metrics: the metrics that cost too: `top1_agreement`, and, from whole student rows
            where the loss needs only some columns, `empty_row_mass`.
        block_size: chunks worked on at a time; None chooses by cache size.
        compiled: True runs the block function by `torch.compile`, or a backend of it by name: once
            for all batches, with the same values. What a kernel or the core computes needs none.

    Raises:
        OptionError: a value outside its range.

    >>> LossOptions(top_k=512, tail_bucket="auto").temperature is None
    True
    >>> LossOptions(beta=2.0, direction="jsd")
    Traceback (most recent call last):
    ...
    xtoken.OptionError: beta = 2.0 must be inside (0, 1); its ends are direction='forward' and \
'reverse'
    """

    direction: Direction = "forward"
    beta: float = 0.5
    temperature: float | None = None
    merge: Merge = "chain"
    top_k: int | None = None
    top_k_scope: Scope = "chunk"
    top_k_by: Chooser = "teacher"
    tail_bucket: bool | Literal["auto"] = False
    common_weight: float = 1.0
    uld_weight: float = 1.0
    max_depth: int | None = None
    depth_weights: tuple[float, ...] = (1.0,)
    min_mass: float = 1e-3
    end: bool = True
    mirror: bool = True
    cells: bool | None = None
    consistent: bool | None = None
    carry_levels: int = 1
    min_prob: float = 2e-4
    sure: bool = False
    chain_rule: bool | None = None
    mismatch_weight: float = 1.0
    student_top_k: int | None = 16
    mask_spaces: bool = True
    full_metrics: bool = False
    block_size: int | None = None
    compiled: bool | str = False

    def __post_init__(self) -> None:
        if torch.compiler.is_compiling():  # options made inside a traced step
            return
        check_choice("direction", self.direction, get_args(Direction))
        beta = "must be inside (0, 1); its ends are direction='forward' and 'reverse'"
        check_number("beta", self.beta, 0, inside=True, rule=beta)
        if self.beta >= 1:
            raise OptionError(f"beta = {self.beta!r} {beta}")
        if self.temperature is not None:
            check_temperature(self.temperature)
        check_choice("merge", self.merge, get_args(Merge))
        if self.top_k is not None:
            rule = "must be a whole number of at least 1, or None for all columns"
            check_number("top_k", self.top_k, 1, rule=rule, whole=True)
        if self.student_top_k is not None:
            rule = "must be a whole number of at least 1, or None for all shared tokens"
            check_number("student_top_k", self.student_top_k, 1, rule=rule, whole=True)
        check_choice("top_k_scope", self.top_k_scope, get_args(Scope))
        check_choice("top_k_by", self.top_k_by, get_args(Chooser))
        check_choice("tail_bucket", self.tail_bucket, (False, True, "auto"))
        for name in ("common_weight", "uld_weight", "mismatch_weight"):
            rule = "must not be negative: a finite factor of at least 0"
            check_number(name, getattr(self, name), 0, rule=rule)
        if self.max_depth is not None:
            rule = "must be a whole number of at least 0, or None for no limit"
            check_number("max_depth", self.max_depth, 0, rule=rule, whole=True)
        rule = "must be a whole number of at least 0: earlier rows that may run past a boundary"
        check_number("carry_levels", self.carry_levels, 0, rule=rule, whole=True)
        self._check_depth_weights()
        # Whole numbers among them may be too large for a tensor's.
        for name in ("beta", "temperature", "common_weight", "uld_weight", "mismatch_weight"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else float(value))
        rule = "must be a probability below 1"
        for name in ("min_mass", "min_prob"):
            value = getattr(self, name)
            check_number(name, value, 0, rule=rule)
            if value >= 1:
                raise OptionError(f"{name} = {value!r} {rule}")
        for name in ("end", "mirror", "full_metrics", "sure", "mask_spaces"):
            check_flag(name, getattr(self, name))
        for name in ("cells", "consistent", "chain_rule"):
            if getattr(self, name) is not None:
                check_flag(name, getattr(self, name))
        self._check_compiled()
        if self.block_size is not None:
            rule = "must be a whole number of at least 1, or None to choose it by cache size"
            check_number("block_size", self.block_size, 1, rule=rule, whole=True)

    def _check_compiled(self) -> None:
        known = isinstance(self.compiled, bool)
        if isinstance(self.compiled, str):
            known = self.compiled in torch.compiler.list_backends(exclude_tags=())
        if not known:
            raise OptionError(
                f"compiled = {self.compiled!r}, expected True, False or the name of a backend of "
                "torch.compile, such as 'aot_eager'"
            )
        if self.compiled and (self.block_size or 0) > _MOST_COMPILED:
            raise OptionError(
                f"compiled = {self.compiled!r} with block_size = {self.block_size}: each block is "
                f"filled up to its size; pass {_MOST_COMPILED} at most, or None"
            )

    def _check_depth_weights(self) -> None:
        weights = self.depth_weights
        good = isinstance(weights, tuple | list) and len(weights) > 0
        if not good or not all(
            isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x <= 1e9
            for x in weights
        ):
            raise OptionError(
                f"depth_weights = {weights!r}, expected one finite weight from 0 to 1e9 for "
                "depth 0, 1, ...; the last holds for all deeper ones"
            )
        object.__setattr__(self, "depth_weights", tuple(map(float, weights)))

    @property
    def backend(self) -> str | None:
        """Of `torch.compile`; None where nothing is compiled."""
        if isinstance(self.compiled, str):
            return self.compiled
        return "inductor" if self.compiled else None

    def changed(self) -> list[str]:
        """The names of the options that are not at their defaults."""
        return [
            field.name
            for field in fields(self)
            if getattr(self, field.name) != getattr(DEFAULT_OPTIONS, field.name)
        ]


DEFAULT_OPTIONS = LossOptions()
# What is divided by less is no longer finite.
_LEAST_NORMALIZER = 1e-6


def check_normalizer(normalizer: object) -> None:
    """Raise OptionError unless the normalizer is above 0, where that can be seen without waiting
    for a GPU: on a device the loss tells it."""
    rule = "must be above 0: a number of chunks, or None for those of this batch"
    if not isinstance(normalizer, Tensor):
        check_number("normalizer", normalizer, _LEAST_NORMALIZER, rule=rule)
        return
    if normalizer.numel() != 1:
        raise ShapeError(f"normalizer has shape {tuple(normalizer.shape)}, expected a scalar")
    if readable(normalizer):
        check_number("normalizer", normalizer.item(), _LEAST_NORMALIZER, rule=rule)
