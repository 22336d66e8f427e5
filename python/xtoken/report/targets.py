"""What each loss compares at each chunk, with the probabilities of real models.

Every number is the library's own: the losses are called as in training, on this one text, and what
they compare is read off their blocks. Nothing of a loss is written down a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from xtoken.data.examples import Ids
from xtoken.errors import PairError, XTokenError
from xtoken.losses.engine.row_blocks import Block, BlockLoss
from xtoken.losses.engine.run import LossCall, checked_call
from xtoken.losses.exact_kl.block import BlockTargets
from xtoken.losses.exact_kl.loss import exact_kl_blocks
from xtoken.losses.p_kl.block import PKLBlocks
from xtoken.losses.p_kl.loss import p_kl_blocks
from xtoken.losses.prefix_kl.loss import prefix_kl_blocks
from xtoken.losses.prefix_kl.targets import PrefixBlock
from xtoken.losses.registry import find_loss
from xtoken.report.aligned_text import AlignedText, Chunk
from xtoken.report.comparisons import LINES, Comparison, Line, LossView
from xtoken.report.page import percent
from xtoken.report.structure import PairStructure
from xtoken.teachers.forward import causal_logits
from xtoken.tensors.pair_parts import LossName
from xtoken.tensors.sparse_ops import log_project
from xtoken.tensors.target_batch import TargetBatch
from xtoken.trie import PieceTrie
from xtoken.vocab.side import Side

# Rows of the vocabulary's width that are turned into probabilities at a time.
_ROWS = 64


@torch.no_grad()
def text_logits(model: nn.Module, side: Side, ids: Ids) -> Tensor:
    """A model's logits [1, T, V'] of a text.

    Args:
        model: of the side.
        ids: [T] of the text.

    Raises:
        PairError: the model is of another tokenizer.
        OptionError: the text is longer than the model has positions.
    """
    size, columns = len(side.vocab), int(model.get_output_embeddings().weight.shape[0])  # type: ignore[operator]
    # Some lack a few columns for tokens that no text reaches; more are padding.
    if columns < size - max(64, size // 100) or int(ids.max(initial=0)) >= columns:
        raise PairError(
            f"the {side.name}'s tokenizer has {size} tokens, its model {columns} columns; this is "
            "another model's tokenizer: pass the model that belongs to it"
        )
    rows = torch.from_numpy(np.array(ids))[None]
    return causal_logits(model.eval(), rows, torch.ones_like(rows)).float()


def token_probabilities(logits: Tensor, ids: Ids, vocab_size: int) -> list[float | None]:
    """The probability of each token given those before it; None for the first.

    Args:
        logits: [1, T, V'] of the text; columns from `vocab_size` on are padding.
        ids: [T] of the text.
    """
    found: list[float | None] = [None]
    following = torch.from_numpy(np.array(ids[1:]))
    for start in range(0, len(following), _ROWS):
        wanted = following[start : start + _ROWS]
        rows = logits[0, start : start + len(wanted), :vocab_size].log_softmax(-1)
        found += rows.gather(1, wanted[:, None])[:, 0].exp().tolist()
    return found


@torch.no_grad()
def model_views(
    text: AlignedText, chunks: list[Chunk], teacher: Tensor, student: Tensor | None
) -> list[list[LossView]]:
    """For each chunk what P-KL, prefix KL and exact KL compare there.

    Args:
        teacher: [1, T_t, V_t'] the teacher's logits of the text.
        student: [1, T_s, V_s'] the student's; None where there is no model of it.

    Returns: for each chunk its losses; none for a chunk that no loss counts.
    """
    found: list[list[LossView]] = [[] for _ in chunks]
    at = [chunk.index for chunk in chunks if chunk.counted]
    makers: tuple[tuple[LossName, Callable[[_Case], Iterator[LossView]]], ...] = (
        ("p-kl", _p_kl),
        ("prefix-kl", _prefix_kl),
        ("exact-kl", _exact_kl),
    )
    structure = PairStructure(text.pair.projection)
    for name, make in makers:
        try:
            case = _case(text, name, structure, [chunks[i] for i in at], teacher, student)
            views = list(make(case))
        except XTokenError as error:
            views = [LossView(name, (), note=str(error)) for _ in at]
        for index, view in zip(at, views, strict=True):
            found[index].append(view)
    return found


@dataclass(frozen=True, eq=False)
class _Case:
    """One loss of one text.

    Attributes:
        chunks: the counted ones, in the loss's order.
        has_student: whether the student's rows are a model's.
    """

    call: LossCall
    structure: PairStructure
    chunks: list[Chunk]
    student_ids: list[int]
    teacher_ids: list[int]
    has_student: bool

    def rows(self, loss: BlockLoss, chunk: int) -> tuple[Tensor, Block]:
        """What the loss reads of the student for one chunk."""
        index, segments = loss.student.block(chunk, chunk + 1)
        return self.call.source.rows(index, loss.columns), Block(chunk, chunk + 1, segments)

    def value(self, loss: BlockLoss, rows: Tensor, block: Block) -> float | None:
        """The loss of one chunk in nats."""
        if not self.has_student:
            return None
        return float(loss.forward(rows, block, loss.params)[0].sum())


def _case(
    text: AlignedText,
    name: LossName,
    structure: PairStructure,
    chunks: list[Chunk],
    teacher: Tensor,
    student: Tensor | None,
) -> _Case:
    distiller = text.pair.distiller(name)
    batch = distiller.prepared(distiller.collator([text.example]))
    has_student = student is not None
    if student is None:  # the losses take one; nothing of it is shown
        student = torch.zeros(1, len(text.example.student_ids), text.pair.sizes[0])
    term = distiller.term(student, teacher, batch, len(chunks))
    call = checked_call(find_loss(name), term.inputs, term.pair, term.options)
    return _Case(
        call,
        structure,
        chunks,
        text.example.student_ids.tolist(),
        text.example.teacher_ids.tolist(),
        has_student,
    )


def _p_kl(case: _Case) -> Iterator[LossView]:
    assert case.call.pair.projection is not None
    loss, _ = p_kl_blocks(case.call, case.call.pair.projection)
    for at, chunk in enumerate(case.chunks):
        rows, block = case.rows(loss, at)
        own = case.teacher_ids[chunk.teacher[0]]
        table, dropped = _columns(case, loss, rows, block, own, "teacher tokens that W reaches")
        notes = []
        if not any(line.own for line in table.lines):
            token = case.structure.teacher(own)
            notes.append(f"what the text has, {token}, is reached by no row of W and left out")
        if dropped >= 5e-4:
            notes.append(f"{percent(dropped)} of the teacher's mass is on tokens that W misses")
        yield LossView("p-kl", (table,), case.value(loss, rows, block), "; ".join(notes))


def _columns(
    case: _Case, loss: PKLBlocks, rows: Tensor, block: Block, own: int, title: str
) -> tuple[Comparison, float]:
    """What P-KL compares at a chunk, and the teacher's mass elsewhere."""
    columns = loss.part.columns
    log_teacher = loss.teacher.log_probs(block.start, block.stop, columns)[0]
    mass = float(log_teacher.exp().sum())
    student = None
    if case.has_student:
        inputs = rows if loss.part.rows is None else rows[:, _places(loss)]
        student = log_project(inputs, loss.params[0], loss.part.map)[0].softmax(-1)
    ids = torch.arange(len(log_teacher)) if columns is None else columns
    table = _ranked(
        title,
        log_teacher.softmax(-1),
        student,
        lambda place: case.structure.teacher(int(ids[place])),
        (ids == own).nonzero().flatten().tolist(),
        "tokens",
    )
    return table, max(0.0, 1.0 - mass)


def _places(loss: PKLBlocks) -> Tensor:
    """Where the rows of W's part are among the student columns that are read."""
    assert loss.part.rows is not None
    if loss.columns is None:
        return loss.part.rows
    return torch.searchsorted(loss.columns, loss.part.rows)


def _prefix_kl(case: _Case) -> Iterator[LossView]:
    loss, _ = prefix_kl_blocks(case.call)
    for at, chunk in enumerate(case.chunks):
        rows, block = case.rows(loss, at)
        first = rows[:1]
        own = case.teacher_ids[chunk.teacher[0]]
        inner = Block(at, at + 1, None)
        tables = [_columns(case, loss.root, first, inner, own, "the first piece")[0]]
        for part in loss.parts:
            items = part.block(block)
            if items is not None:
                tables += _slots(case, items, rows, chunk)
        note = "" if len(tables) > 1 else "nothing beyond the first piece"
        yield LossView("prefix-kl", tuple(tables), case.value(loss, rows, block), note)


def _slots(case: _Case, items: PrefixBlock, rows: Tensor, chunk: Chunk) -> list[Comparison]:
    structure = case.structure
    assert structure.tries is not None
    trie = structure.tries.teacher if items.mirrored else structure.tries.student
    ids = case.student_ids if items.mirrored else case.teacher_ids
    start, end = chunk.student if items.mirrored else chunk.teacher
    row = torch.zeros_like(items.chunk)
    log_student = items.student_log_mass(items.pick(rows, row))
    tables = []
    for item, depth in enumerate(items.depth.tolist()):
        slots = slice(items.layout.slot_ends[item], items.layout.slot_ends[item + 1])
        path = " ".join(structure.spelled(trie, piece) for piece in ids[start : start + depth])
        title = f"after {path}"
        if not bool(items.targets.counted[item]):
            tables.append(Comparison(f"{title}: left out, the teacher has too little there", ()))
            continue
        valid = items.targets.valid[slots]
        pieces = items.layout.piece[slots][valid].tolist()
        own = ids[start + depth] if start + depth < end else -1
        masses = log_student[slots][valid].softmax(-1) if case.has_student else None
        tables.append(
            _ranked(
                title,
                items.targets.probs[slots][valid],
                masses,
                partial(_piece_name, structure, trie, pieces),
                [place for place, piece in enumerate(pieces) if piece == own],
                "ways to go on",
            )
        )
    return tables


def _piece_name(structure: PairStructure, trie: PieceTrie, pieces: list[int], place: int) -> str:
    return structure.spelled(trie, pieces[place])


def _exact_kl(case: _Case) -> Iterator[LossView]:
    loss, _ = exact_kl_blocks(case.call)
    targets = loss.targets
    for at in range(len(case.chunks)):
        begin, end = int(targets.chunk_ptr[at]), int(targets.chunk_ptr[at + 1])
        if begin == end:
            yield LossView("exact-kl", (), note="no target: nothing is known of this place")
            continue
        rows, block = case.rows(loss, at)
        log_student = BlockTargets.of(loss, rows.dtype, block).log_student(rows)
        groups = int(targets.group_ptr[end] - targets.group_ptr[begin])
        tables, done = [], 0
        for place in range(begin, end):
            first, last = int(targets.group_ptr[place]), int(targets.group_ptr[place + 1])
            own_slots = [*range(done, done + last - first), groups + place - begin]
            done += last - first
            probs = torch.cat([targets.probs[first:last].double(), targets.tails[place, None]])
            is_open = bool(targets.open[place])
            if is_open:  # the rest is the student's own, up to the most that it may be
                rest = probs[-1] if case.has_student else torch.zeros(()).double()
                rest = torch.minimum(rest, log_student[own_slots[-1]].exp().double())
                probs = torch.cat([probs[:-1] * (1 - rest), rest[None]])
            students = log_student[own_slots].exp() if case.has_student else None
            # A row predicts the token after it.
            token = case.student_ids[int(targets.rows[place]) + 1]
            tables.append(_groups(case, targets, (first, last), probs, students, token))
            if is_open:
                most = f"all other tokens: at most {float(targets.tails[place]):.0%}"
                title = f"{tables[-1].title}; {most}"
                tables[-1] = replace(tables[-1], title=title)
        yield LossView("exact-kl", tuple(tables), case.value(loss, rows, block))


def _groups(
    case: _Case,
    targets: TargetBatch,
    groups: tuple[int, int],
    probs: Tensor,
    students: Tensor | None,
    own: int,
) -> Comparison:
    members = [
        targets.tokens[int(targets.token_ptr[group]) : int(targets.token_ptr[group + 1])].tolist()
        for group in range(*groups)
    ]

    def label(place: int) -> str:
        if place == len(members):
            return "all other tokens"
        return _group_name(case.structure, members[place], own)

    return _ranked(
        f"student tokens at {case.structure.student(own)}",
        probs,
        students,
        label,
        [place for place, tokens in enumerate(members) if own in tokens],
        "groups",
        [len(tokens) for tokens in members],
    )


def _group_name(structure: PairStructure, tokens: list[int], own: int) -> str:
    """The tokens of a group, the text's own or the shortest first."""
    vocab = structure.projection.vocabularies()[0]
    ranked = sorted(tokens, key=lambda t: (t != own, len(vocab.token_bytes(t)), t))
    shown = " ".join(structure.student(token) for token in ranked[:3])
    return shown if len(tokens) <= 3 else f"{shown} …"


def _ranked(
    title: str,
    teacher: Tensor,
    student: Tensor | None,
    label: Callable[[int], str],
    own: list[int],
    what: str,
    sizes: list[int] | None = None,
) -> Comparison:
    """The teacher's most probable entries, the text's own, and the others as one line."""
    best = torch.topk(teacher, min(len(teacher), LINES)).indices.tolist()
    shown = best + [place for place in own if place not in best]
    if len(teacher) == len(shown) + 1:  # a line of its own takes no more room than the rest's
        shown = torch.argsort(teacher, descending=True, stable=True).tolist()
    lines = [
        Line(
            label(place),
            place in own,
            teacher=float(teacher[place]),
            student=None if student is None else float(student[place]),
            tokens=None if sizes is None or place >= len(sizes) else sizes[place],
        )
        for place in shown
    ]
    left = len(teacher) - len(shown)
    if not left:
        return Comparison(title, tuple(lines))
    others = torch.ones(len(teacher), dtype=torch.bool)
    others[shown] = False
    rest = Line(
        f"{left:,} other {what}",
        teacher=float(teacher[others].sum()),
        student=None if student is None else float(student[others].sum()),
    )
    return Comparison(title, tuple(lines), rest)
