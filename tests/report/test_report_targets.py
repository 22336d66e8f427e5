"""What the page shows of each loss: it adds up to the loss, and it is what the models say."""

from __future__ import annotations

import copy
import math
import re
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pytest
import tokenizer_zoo as zoo
import torch
from chat_families import family

from xtoken import Pair
from xtoken.data.conversations import Conversation
from xtoken.data.rows import Document
from xtoken.losses import LOSSES, LossName
from xtoken.report.aligned_text import AlignedText, Chunk, aligned_text
from xtoken.report.comparisons import Comparison, Line, LossView
from xtoken.report.targets.models import text_logits
from xtoken.report.targets.views import MAKERS, model_views
from xtoken.teachers.load_model import load_causal_lm
from xtoken.vocab.display import visible_token

# Digits cut differently, spaces alone, a chunk of several tokens on both sides.
TEXT = "In 196 a computer of 4,096 words flew 384 km.\n    Bread and 201 in 1969."


@dataclass(frozen=True, eq=False)
class Shown:
    """A text, what the models say of it, and what is shown of its counted chunks."""

    text: AlignedText
    student: torch.Tensor
    teacher: torch.Tensor

    @property
    def pair(self) -> Pair:
        return self.text.pair

    @property
    def chunks(self) -> list[Chunk]:
        return [chunk for chunk in self.text.chunks() if chunk.counted]

    def views(self, name: LossName, *, student: bool = True) -> list[LossView]:
        found = self._both if student else self._targets
        return [view for views in found for view in views if view.loss == name]

    @cached_property
    def _both(self) -> list[list[LossView]]:
        return model_views(self.text, self.text.chunks(), self.teacher, self.student)

    @cached_property
    def _targets(self) -> list[list[LossView]]:
        return model_views(self.text, self.text.chunks(), self.teacher, None)

    def softmax(self, side: str, chunk: Chunk, place: int = 0) -> np.ndarray:
        """float64 [V], what a side says of a token of a chunk."""
        logits, start = (
            (self.student, chunk.student[0])
            if side == "student"
            else (self.teacher, chunk.teacher[0])
        )
        size = self.pair.sizes[side == "teacher"]
        return logits[0, start + place - 1, :size].double().softmax(-1).numpy()


@pytest.fixture(name="shown", scope="module")
def _shown(folder: Path) -> Shown:
    pair = Pair(folder / "student", folder / "teacher", cache_dir=False)
    text = aligned_text(pair, TEXT, limit=1000)
    models = [load_causal_lm(folder / name, side=name) for name in ("student", "teacher")]
    return _of(text, *models)


@pytest.fixture(name="same", scope="module")
def _same(folder: Path) -> Shown:
    """One vocabulary, and a teacher that is another model."""
    pair = Pair(folder / "student", folder / "student", cache_dir=False)
    student = load_causal_lm(folder / "student", side="student")
    teacher = copy.deepcopy(student)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in teacher.parameters():
            weight += 0.2 * torch.randn(weight.shape, generator=generator)
    return _of(aligned_text(pair, TEXT, limit=1000), student, teacher)


def _of(text: AlignedText, student: torch.nn.Module, teacher: torch.nn.Module) -> Shown:
    example, sides = text.example, text.pair.sides
    return Shown(
        text,
        text_logits(student, sides[0], example.student_ids),
        text_logits(teacher, sides[1], example.teacher_ids),
    )


def lines_of(table: Comparison) -> list[Line]:
    return [*table.lines, *([table.rest] if table.rest is not None else [])]


def added(view: LossView) -> float:
    """The sum of what all lines of all tables add."""
    return sum(line.adds or 0.0 for table in view.comparisons for line in lines_of(table))


def losses_of_chunks(shown: Shown, name: LossName) -> list[float]:
    """The library's loss of each chunk alone, the others weighted with 0."""
    distiller = shown.pair.distiller(name)
    batch = distiller.prepared(distiller.collator([shown.text.example]))
    term = distiller.term(shown.student, shown.teacher, batch, 1.0)
    found = []
    for at in range(len(batch.chunks)):
        weights = torch.zeros(len(batch.chunks))
        weights[at] = 1.0
        inputs = replace(term.inputs, chunk_weights=weights)
        found.append(float(LOSSES[name].function(inputs, term.pair, term.options).loss))
    return found


def test_every_loss_of_the_registry_is_shown() -> None:
    assert set(MAKERS) == set(LOSSES)


@pytest.mark.parametrize("name", sorted(set(LOSSES) - {"same-vocab-kl"}))
def test_what_is_shown_of_a_chunk_adds_up_to_its_loss(shown: Shown, name: LossName) -> None:
    views = shown.views(name)
    losses = losses_of_chunks(shown, name)
    assert [view.value for view in views] == pytest.approx(losses, abs=2e-5)
    assert [added(view) for view in views] == pytest.approx(losses, abs=2e-5)
    assert max(losses) > 1e-3


@pytest.mark.parametrize("case", ["several on both sides", "a conversation"])
def test_all_losses_add_up_for_pairs_of_other_families(case: str) -> None:
    """With logits drawn at random, wider than the vocabularies."""
    document: Document = "In 201 km\n   机器学习 👍🏽 café\ta\u0301\x00\x07"
    if case == "a conversation":  # stop tokens of several names
        pair = Pair(*(family(name).tokenizer for name in ("llama3", "qwen3")), cache_dir=False)
        turns = (("user", "How far?"), ("assistant", "It is 384,400 km.\n    机 é 👍🏽"))
        document = Conversation.from_messages([{"role": r, "content": c} for r, c in turns])
    else:
        pair = Pair(zoo.byte_level_bpe(), zoo.sentencepiece_bpe(), cache_dir=False)
    text = aligned_text(pair, document, limit=500)
    generator = torch.Generator().manual_seed(0)
    ids = text.example.student_ids, text.example.teacher_ids
    student, teacher = (
        4 * torch.randn(1, len(own), size + 8, generator=generator)
        for own, size in zip(ids, pair.sizes, strict=True)
    )
    shown = Shown(text, student, teacher)
    shapes = {chunk.shape for chunk in shown.chunks}
    assert shapes > ({"1:1", "2:1"} if case == "a conversation" else {"1:1", "2:3"})
    for name in set(LOSSES) - {"same-vocab-kl"}:
        losses = losses_of_chunks(shown, name)
        assert [added(view) for view in shown.views(name)] == pytest.approx(losses, rel=2e-5)


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_it_adds_up_where_both_sides_have_one_vocabulary(same: Shown, name: LossName) -> None:
    losses = losses_of_chunks(same, name)
    assert [added(view) for view in same.views(name)] == pytest.approx(losses, abs=2e-5)
    assert max(losses) > 1e-5


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_a_line_adds_what_its_two_probabilities_make(
    shown: Shown, same: Shown, name: LossName
) -> None:
    checked = 0
    for view in (same if name == "same-vocab-kl" else shown).views(name):
        for table in view.comparisons:
            counts = re.search(r"; counts (\S+) times$", table.title)
            times = float(counts[1]) if counts else 1.0
            for line in table.lines:
                if line.adds is None:
                    continue
                t, s = line.teacher, line.student
                assert t is not None
                assert s is not None
                if "rank by rank" in table.title:
                    expected = abs(t - s)
                elif "that it began" in table.title:
                    expected = -t * math.log(s)
                elif name == "strict-top-k":
                    expected = s * math.log(s / t)
                else:
                    expected = t * math.log(t / s) if t else 0.0
                assert line.adds == pytest.approx(times * expected, abs=1e-5)
                checked += 1
    assert checked > 20


def test_the_common_part_of_gold_is_two_whole_softmaxes(shown: Shown) -> None:
    common = shown.pair.projection.common_set("strict", 0.6)
    names = {visible_token(shown.pair.teacher_vocab, t): (s, t) for s, t in common.tolist()}
    for chunk, view in zip(shown.chunks, shown.views("gold"), strict=True):
        table = view.comparisons[0]
        p, q = shown.softmax("student", chunk), shown.softmax("teacher", chunk)
        for line in table.lines:
            student, teacher = names[line.label.split(" | ")[0]]
            assert line.teacher == pytest.approx(q[teacher], abs=1e-6)
            assert line.student == pytest.approx(p[student], abs=1e-6)
        assert sum(line.teacher or 0 for line in lines_of(table)) == pytest.approx(
            q[common[:, 1]].sum(), abs=1e-5
        )


def test_uld_shows_both_sides_by_falling_probability(shown: Shown) -> None:
    for chunk, view in zip(shown.chunks, shown.views("uld"), strict=True):
        (table,) = view.comparisons
        ranks = [line for line in table.lines if not line.own][:4]
        for side in ("student", "teacher"):
            expected = np.sort(shown.softmax(side, chunk))[::-1]
            # The text's own tokens stand among the ranks wherever they are.
            for line in ranks:
                assert np.abs(expected - getattr(line, side)).min() < 1e-7
            if not any(line.own for line in table.lines[:4]):
                assert [getattr(line, side) for line in ranks] == pytest.approx(
                    expected[:4].tolist(), abs=1e-6
                )


def test_alm_shows_the_products_of_the_tokens_probabilities(shown: Shown) -> None:
    example = shown.text.example
    for chunk, view in zip(shown.chunks, shown.views("alm"), strict=True):
        (line,) = view.comparisons[0].lines
        for side, ids, (start, end) in (
            ("student", example.student_ids, chunk.student),
            ("teacher", example.teacher_ids, chunk.teacher),
        ):
            product = math.prod(
                shown.softmax(side, chunk, at)[ids[start + at]] for at in range(end - start)
            )
            assert getattr(line, side) == pytest.approx(product, rel=1e-3)
            toss = view.comparisons[1].lines
            shares = {each.label: getattr(each, side) for each in toss}
            assert shares["this chunk"] == pytest.approx(product**0.01, abs=1e-5)


def test_strict_top_k_shows_the_students_choice_and_says_where_there_is_none(
    shown: Shown,
) -> None:
    common = shown.pair.projection.common_set("strict", 0.6)
    compared = 0
    for chunk, view in zip(shown.chunks, shown.views("strict-top-k"), strict=True):
        if chunk.shape != "1:1":
            assert view.value == 0
            assert not view.comparisons
            assert view.note.startswith(f"a chunk of {chunk.shape} tokens counts as 0")
            continue
        compared += 1
        p = shown.softmax("student", chunk)[common[:, 0]]
        best = np.sort(p)[::-1][:16]
        lines = [line for line in view.comparisons[0].lines if not line.own]
        assert lines[0].student == pytest.approx(best[0] / best.sum(), rel=1e-4) or any(
            line.own for line in view.comparisons[0].lines[:1]
        )
    assert 0 < compared < len(shown.chunks)
    without = shown.views("strict-top-k", student=False)
    assert any("no model of it is given" in view.note for view in without)


def test_bpm_and_escd_show_where_teacher_tokens_begin(shown: Shown) -> None:
    own, other = shown.pair.student_vocab, shown.pair.teacher_vocab
    texts = {own.token_bytes(token): token for token in range(len(own)) if own.token_bytes(token)}
    for at, chunk in enumerate(shown.chunks):
        if chunk.shape != "1:1":
            continue
        q = shown.softmax("teacher", chunk)
        masses: dict[str, float] = {}
        for token in range(len(other)):
            data = other.token_bytes(token)
            cuts = (data[:end] for end in range(len(data), 0, -1))
            begun = next((cut for cut in cuts if cut in texts), None)
            if begun is not None:
                name = visible_token(own, texts[begun])
                masses[name] = masses.get(name, 0.0) + float(q[token])
        for name in ("bpm", "escd"):
            view = shown.views(name)[at]
            for line in view.comparisons[0].lines:
                if not line.label.startswith("the complement"):
                    assert line.teacher == pytest.approx(masses[line.label], abs=1e-5)


def test_bpm_leaves_out_spaces_and_says_so(shown: Shown) -> None:
    titles = [table.title for view in shown.views("bpm") for table in view.comparisons]
    assert any(title.endswith("left out, spaces alone") for title in titles)


def test_partition_kl_shows_what_else_a_chunk_could_have_been(shown: Shown) -> None:
    shapes = [chunk.shape for chunk in shown.chunks]
    chunk = shown.chunks[shapes.index("1:3")]
    (table,) = shown.views("partition-kl")[shapes.index("1:3")].comparisons
    named = {line.label: line for line in table.lines}
    assert {"this chunk", "all the rest"} < set(named)
    pieces = shown.pair.tries.student
    own = int(shown.text.example.student_ids[chunk.student[0]])
    prefix = pieces.pieces(own).tolist()[:-1]
    first = [int(i) for i in shown.text.example.teacher_ids[slice(*chunk.teacher)]]
    q = [shown.softmax("teacher", chunk, at) for at in range(3)]
    p = shown.softmax("student", chunk)
    vocab = shown.pair.student_vocab
    others = {
        visible_token(vocab, token): pieces.pieces(token).tolist()
        for token in range(len(vocab))
        if len(pieces.pieces(token)) == 3 and pieces.pieces(token).tolist()[:-1] == prefix
    }
    assert len(others) > 3
    for label, line in named.items():
        if label in others:
            expected = q[0][first[0]] * q[1][first[1]] * q[2][others[label][-1]]
            assert line.teacher == pytest.approx(expected, rel=1e-3)
            token = next(t for t in range(len(vocab)) if visible_token(vocab, t) == label)
            assert line.student == pytest.approx(p[token], rel=1e-3)


def test_a_loss_that_does_not_suit_the_pair_says_so_in_one_sentence(shown: Shown) -> None:
    for view in shown.views("same-vocab-kl"):
        assert not view.comparisons
        assert view.value is None
        assert view.note == "it needs one vocabulary on both sides, and this pair has two"


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_without_a_student_the_targets_are_the_same_and_nothing_else_is_told(
    shown: Shown, name: LossName
) -> None:
    for view, whole in zip(shown.views(name, student=False), shown.views(name), strict=True):
        assert view.value is None
        lines = [line for table in view.comparisons for line in lines_of(table)]
        assert all(line.student is None and line.adds is None for line in lines)
        if name == "strict-top-k":  # which the student chooses
            assert not lines
            continue
        for table, other in zip(view.comparisons, whole.comparisons, strict=True):
            if "at most" in table.title:  # an open target takes its rest from the student
                continue
            totals = [sum(x.teacher or 0.0 for x in lines_of(each)) for each in (table, other)]
            assert totals[0] == pytest.approx(totals[1], abs=1e-5)
