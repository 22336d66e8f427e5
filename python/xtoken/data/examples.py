"""A document under both tokenizers, with its alignment: made once, used in every epoch."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from xtoken._checks import token_limit
from xtoken._core import Vocab
from xtoken.align import Aligner, Alignment, ChunkKind
from xtoken.align.ids import as_ids
from xtoken.data.align_turns import align_by_turns
from xtoken.data.documents import LeftOut
from xtoken.data.encode import Encoder, Printed, print_document
from xtoken.data.loss_mask import Encoded, is_predicted
from xtoken.data.rows import Document, Readable, as_document, reason_of
from xtoken.errors import ArgumentTypeError, BlankTextError, DataError
from xtoken.vocab.fingerprints import PairFingerprint
from xtoken.vocab.source import LoadedTokenizer

BATCH = 256
NO_TOKEN = "no student token in the loss"
Ids = NDArray[np.int64]


@dataclass(frozen=True)
class Example:
    """One document, or a conversation up to one of its answers.

    Args:
        student_ids, teacher_ids: [T_s] and [T_t] int64, without padding.
        student_loss_mask, teacher_loss_mask: [T_s] and [T_t] bool, the tokens a loss may predict.
        alignment: of these ids.
    """

    student_ids: Ids
    teacher_ids: Ids
    student_loss_mask: NDArray[np.bool_]
    teacher_loss_mask: NDArray[np.bool_]
    alignment: Alignment

    @classmethod
    def whole(
        cls,
        student_ids: Sequence[int] | Ids,
        teacher_ids: Sequence[int] | Ids,
        alignment: Alignment,
    ) -> Example:
        """An example all of whose tokens count in the loss."""
        student, teacher = (
            ids.astype(np.int64)
            if isinstance(ids, np.ndarray) and ids.dtype.kind in "iu"
            else as_ids(name, ids, "pass one sequence")
            for name, ids in (("student_ids", student_ids), ("teacher_ids", teacher_ids))
        )
        masks = [np.ones(len(ids), dtype=np.bool_) for ids in (student, teacher)]
        return cls(student, teacher, masks[0], masks[1], alignment)


@dataclass(frozen=True)
class ExampleSet:
    """Examples and what became of the documents.

    Args:
        examples: those with a student token in the loss, in the order of the documents.
        cut: number of examples that were longer than `max_tokens` and lost their tail.
        left_out: examples that no student token in the loss remained of, by document and reason.
    """

    examples: list[Example]
    cut: int
    left_out: tuple[LeftOut, ...] = ()

    @property
    def empty(self) -> int:
        """Number of examples left out."""
        return len(self.left_out)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Example:
        return self.examples[index]


class Made(NamedTuple):
    """What became of a document.

    Args:
        examples: its examples, one per teacher in each entry.
        cut: how many of them lost their tail.
        reasons: why an example of it, or all of it, was left out.
    """

    examples: list[tuple[Example, ...]]
    cut: int
    reasons: list[str]


def make_examples(
    documents: Sequence[Readable],
    student_tokenizer: LoadedTokenizer,
    teacher_tokenizer: LoadedTokenizer,
    *,
    max_tokens: int | None,
    aligner: Aligner | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> ExampleSet:
    """Tokenize documents on both sides and align; `Pair.examples` without the pair.

    Args:
        documents: texts, completions and conversations, as themselves, rows or lists of messages.
        student_tokenizer, teacher_tokenizer: `transformers` tokenizers.
        aligner: of these tokenizers; made here if absent.
        max_tokens, progress: see `encode_examples`, as for the rest.
    """
    if aligner is None:
        aligner = Aligner(
            Vocab.from_tokenizer(student_tokenizer), Vocab.from_tokenizer(teacher_tokenizer)
        )
    encoders = (
        Encoder(student_tokenizer, "student", vocab=aligner.student_vocab),
        Encoder(teacher_tokenizer, "teacher", vocab=aligner.teacher_vocab),
    )
    return encode_examples(documents, encoders, aligner, max_tokens=max_tokens, progress=progress)


def encode_examples(
    documents: Sequence[Readable],
    encoders: tuple[Encoder, Encoder],
    aligner: Aligner,
    *,
    max_tokens: int | None,
    strict: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> ExampleSet:
    """Tokenize documents on both sides and align.

    A text gets the special tokens that each tokenizer adds, and counts whole; of a `Completion`
    what follows the prompt counts. A `Conversation` is printed by each tokenizer's own chat
    template, aligned turn by turn, and only what the assistant says counts; it becomes one example,
    or one for each answer where a template renders earlier turns differently in longer
    conversations (Qwen3 drops earlier thinking).

    An example longer than `max_tokens` on either side is cut at the last chunk boundary where both
    sides fit, so that both still hold the same text.

    Args:
        documents: texts, completions and conversations, as themselves, rows or lists of messages.
        encoders: of student and teacher.
        aligner: of the two.
        max_tokens: longest example on either side, at least 2; None for no limit.
        strict: whether a conversation that a chat template cannot print, or a row that cannot be
            read, ends the call; else it is left out, and named, as a blank text is in either case.
        progress: called with (documents done, documents to do).

    Raises:
        ArgumentTypeError: `documents` is no list.
        OptionError: `max_tokens` is no whole number of at least 2.
        DataError: a conversation cannot be printed, or no example is left.
    """
    (made,) = encode_together(
        documents, encoders[0], encoders[1:], [aligner],
        max_tokens=max_tokens, strict=strict, progress=progress,
    )  # fmt: skip
    return made


def encode_together(
    documents: Sequence[Readable],
    student: Encoder,
    teachers: Sequence[Encoder],
    aligners: Sequence[Aligner],
    *,
    max_tokens: int | None,
    strict: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[ExampleSet, ...]:
    """What `encode_examples` makes, for several teachers of one student.

    All sets have as many examples, of the same student tokens: a conversation is split into its
    answers for all teachers where the template of one asks for it, and a long example is cut where
    a chunk of every teacher ends and all sides fit.

    Args:
        documents, max_tokens, strict, progress: as there.
        student: the encoder of all pairs' student.
        teachers, aligners: one each per teacher.

    Raises: as there.
    """
    # A column of a dataset, an array or a table is as good as a list.
    listed = hasattr(documents, "__len__") and hasattr(documents, "__getitem__")
    if not listed or isinstance(documents, str | bytes | Mapping):
        raise ArgumentTypeError(
            f"documents is a {type(documents).__name__}, expected a list of texts and "
            "conversations; pass one"
        )
    max_tokens = token_limit(max_tokens)
    examples: list[tuple[Example, ...]] = []
    left_out: list[LeftOut] = []
    cut = 0
    for start in range(0, len(documents), BATCH):
        batch: list[Document] = []
        places: list[str] = []
        unread: list[LeftOut] = []
        for index, item in enumerate(documents[start : start + BATCH], start):
            place = f"documents[{index}]"
            try:
                batch.append(as_document(item, place))
                places.append(getattr(batch[-1], "source", place))
            except DataError as error:
                if strict and not isinstance(error, BlankTextError):
                    raise
                unread.append(LeftOut(place, reason_of(error, place)))
        found = encode_documents(
            batch, student, teachers, aligners, max_tokens=max_tokens, strict=strict
        )
        left_out += unread
        for place, made in zip(places, found, strict=True):
            examples += made.examples
            left_out += [LeftOut(place, reason) for reason in made.reasons]
            cut += made.cut
        if progress is not None:
            progress(min(start + BATCH, len(documents)), len(documents))
    if not examples:
        unprinted = next((each for each in left_out if each.reason != NO_TOKEN), None)
        if unprinted is not None:
            raise DataError(f"none of {len(left_out)} documents can be used: {unprinted.reason}")
        raise DataError(
            f"none of {len(left_out)} examples has a student token in the loss within max_tokens = "
            f"{max_tokens}; give longer texts or raise max_tokens"
        )
    return tuple(
        ExampleSet([each[at] for each in examples], cut=cut, left_out=tuple(left_out))
        for at in range(len(teachers))
    )


def encode_documents(
    documents: Sequence[Document],
    student: Encoder,
    teachers: Sequence[Encoder],
    aligners: Sequence[Aligner],
    *,
    max_tokens: int | None,
    strict: bool = True,
) -> list[Made]:
    """What becomes of each document, in one batch; see `encode_together`.

    Args:
        strict: whether a document that cannot be printed ends the call; else it has a reason and
            no example.

    Raises:
        OptionError: `max_tokens` is no whole number of at least 2.
        DataError: a conversation cannot be printed.
    """
    max_tokens = token_limit(max_tokens)
    made = [Made([], 0, []) for _ in documents]
    rows: list[tuple[Printed, ...]] = []
    owners: list[int] = []
    for index, document in enumerate(documents):
        try:
            printed = print_document(document, [student, *teachers])
        except DataError as error:
            if strict:
                raise
            made[index].reasons.append(str(error))
            continue
        rows += printed
        owners += [index] * len(printed)
    sides: list[list[Encoded]] = []
    encoders = (student, *teachers)
    for at, encoder in enumerate(encoders):
        # A teacher with the tokenizer of an earlier side reads the same tokens.
        same = next((sides[other] for other in range(at) if encoders[other].same_as(encoder)), None)
        printed_here = [row[at] for row in rows]
        sides.append(encoder.encode(printed_here, max_tokens=max_tokens) if same is None else same)
    alignments = [
        align_by_turns(aligner, sides[0], side)
        for aligner, side in zip(aligners, sides[1:], strict=True)
    ]
    for at, owner in enumerate(owners):
        encoded = [side[at] for side in sides]
        aligned = [each[at] for each in alignments]
        ends = [len(side.ids) for side in encoded]
        fitting = ends if max_tokens is None else fitting_ends(aligned, max_tokens)
        if fitting != ends:
            encoded = [side.cut(end) for side, end in zip(encoded, fitting, strict=True)]
            aligned = [
                align_by_turns(aligner, encoded[:1], [side])[0]
                for aligner, side in zip(aligners, encoded[1:], strict=True)
            ]
            made[owner] = made[owner]._replace(cut=made[owner].cut + 1)
        if is_predicted(encoded[0].loss_mask):
            each = zip(encoded[1:], aligned, strict=True)
            made[owner].examples.append(tuple(_example(encoded[0], *one) for one in each))
        else:
            made[owner].reasons.append(NO_TOKEN)
    return made


def fit_example(example: Example, aligner: Aligner, max_tokens: int | None) -> Made:
    """An example that was made before, cut where `encode_examples` cuts its document.

    The chunks are those of the whole: what stands behind a chunk does not change it, and the turns
    of a conversation, by which it was aligned, are no longer known. Where two texts differ at the
    cut, whose chunks depend on what follows, those of the document may be others.

    Args:
        aligner: of its pair.
        max_tokens: longest example on either side; None for no limit.

    Raises:
        PairError: the example is of another pair.
    """
    ids = example.student_ids, example.teacher_ids
    if max_tokens is None or max(map(len, ids)) <= max_tokens:
        return Made([(example,)], 0, [])
    pair = PairFingerprint(aligner.student_vocab.fingerprint, aligner.teacher_vocab.fingerprint)
    pair.check(example.alignment.pair, "an example", "make it with this pair's examples")
    alignment = _beginning(example, aligner, _fitting(example.alignment, max_tokens) - 1)
    student, teacher = int(alignment.student_bounds[-1]), int(alignment.teacher_bounds[-1])
    cut = Example(
        ids[0][:student],
        ids[1][:teacher],
        example.student_loss_mask[:student],
        example.teacher_loss_mask[:teacher],
        alignment,
    )
    taught = is_predicted(cut.student_loss_mask)
    return Made([(cut,)], 1, []) if taught else Made([], 1, [NO_TOKEN])


def _beginning(example: Example, aligner: Aligner, chunks: int) -> Alignment:
    """The first chunks of an example."""
    whole = example.alignment
    student_bounds, teacher_bounds = (
        bounds[: chunks + 1] for bounds in (whole.student_bounds, whole.teacher_bounds)
    )
    kind = whole.kind[:chunks]
    student_ids = example.student_ids[: int(student_bounds[-1])]
    made = aligner.align(student_ids, example.teacher_ids[: int(teacher_bounds[-1])])
    pairs = (
        (made.student_bounds, student_bounds),
        (made.teacher_bounds, teacher_bounds),
        (made.kind, kind),
    )
    if all(np.array_equal(left, right) for left, right in pairs):
        return made
    # The text is the same, however it is aligned; of its exact bytes those behind the cut are lost.
    exact = np.repeat(whole.kind == ChunkKind.EXACT, np.diff(whole.student_bounds))
    lost = example.student_ids[len(student_ids) :][exact[len(student_ids) :]]
    sizes = (len(aligner.student_vocab.token_bytes(each)) for each in lost.tolist())
    left = int(whole.byte_counts[2]) - sum(sizes)
    coarse = min(int(whole.byte_counts[3]), int((kind == ChunkKind.MISMATCH).sum()))
    text = made.byte_counts[:2]
    counts = np.array([*text, min(max(left, 0), *text), coarse], dtype=np.int64)
    return Alignment(student_bounds, teacher_bounds, kind, counts, whole.pair)


def _fitting(alignment: Alignment, max_tokens: int) -> int:
    """How many bounds have at most `max_tokens` tokens before them on both sides."""
    student, teacher = alignment.student_bounds, alignment.teacher_bounds
    # Bounds rise, so the fitting ones come first; the bound (0, 0) always fits.
    return int(np.count_nonzero((student <= max_tokens) & (teacher <= max_tokens)))


def fitting_ends(alignments: Sequence[Alignment], max_tokens: int) -> list[int]:
    """The last place where chunks of all end and no side has more than `max_tokens` tokens: the
    tokens of the student up to it, and of each teacher."""
    fitting = [_fitting(alignment, max_tokens) for alignment in alignments]
    common = functools.reduce(
        np.intersect1d,
        [each.student_bounds[:last] for each, last in zip(alignments, fitting, strict=True)],
    )
    end = int(common[-1])
    ends = [end]
    for alignment, last in zip(alignments, fitting, strict=True):
        # Of bounds at one student token the last: a teacher's token may stand alone before it.
        at = int(np.searchsorted(alignment.student_bounds[:last], end, side="right")) - 1
        ends.append(int(alignment.teacher_bounds[at]))
    return ends


def _example(student: Encoded, teacher: Encoded, alignment: Alignment) -> Example:
    return Example(
        student_ids=student.ids,
        teacher_ids=teacher.ids,
        student_loss_mask=student.loss_mask,
        teacher_loss_mask=teacher.loss_mask,
        alignment=alignment,
    )
