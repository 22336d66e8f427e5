"""Prefix KL: the brute-force twin, the chain rule, and what must not change it."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from gradients import gradcheck
from hypothesis import given
from hypothesis import strategies as st
from loss_cases import loss_of as any_loss_of
from loss_cases import p_kl
from prefix_cases import PrefixCase, csr_of, make_prefix_case
from torch import Tensor

from xtoken.errors import NonFiniteError, OptionError, PairError, ShapeError, TokenIdError
from xtoken.losses import (
    LOSSES,
    LmHead,
    LossInputs,
    LossOptions,
    PairParts,
    TeacherTopK,
    TrieSlots,
    first_pieces,
)
from xtoken.losses.prefix_kl import block as prefix_kl_blocks
from xtoken.losses.prefix_kl.compared_prefixes import prepare_prefixes
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.projection import SparseProjection
from xtoken.tensors.segments import segment_logsumexp
from xtoken.trie import PieceTrie

from reference_prefix_kl import prefix_kl as reference_prefix_kl

DIRECTIONS = ("forward", "reverse", "jsd")


def loss_of(case: PrefixCase, *, logits: Tensor | None = None, stored_k=None, **options):
    batch = case.batch
    teacher = batch.teacher_logits
    if stored_k is not None:
        teacher = TeacherTopK.from_logits(
            teacher, stored_k, vocab_size=batch.v_t, temperature=options.get("temperature", 1.0)
        )
    given = {"chunks": batch.usable, "pair": case.pair, "teacher": teacher, **case.ids(), **options}
    student = batch.student_logits if logits is None else logits
    return any_loss_of("prefix-kl", student, **given)


def prefix_kl(student, teacher, projection, student_trie, chunks, *, teacher_trie=None, **given):
    """Prefix KL with parts made by hand; no mirror without a `teacher_trie`."""
    pair = PairParts(
        projection.shape, projection=projection, student_trie=student_trie,
        teacher_trie=teacher_trie,
    )  # fmt: skip
    given.setdefault("mirror", teacher_trie is not None)
    return any_loss_of("prefix-kl", student, teacher, chunks, pair, **given)


def twin_of(case: PrefixCase, **options) -> Tensor:
    batch = case.batch
    return reference_prefix_kl(
        batch.student_logits, batch.teacher_logits, case.student_pieces, case.teacher_pieces,
        batch.usable, batch.student_ids, batch.teacher_ids, **options,
    )  # fmt: skip


def assert_like_the_twin(case: PrefixCase, **options) -> None:
    twin_options = dict(options)
    expected = twin_of(case, **twin_options)
    found = loss_of(case, normalizer=1.0, **options).loss
    torch.testing.assert_close(found, expected)
    gradients = [torch.autograd.grad(x, case.batch.student_logits)[0] for x in (found, expected)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("stored_k", [None, 4])
@pytest.mark.parametrize("seed", range(4))
def test_value_and_gradient_are_those_of_the_brute_force_twin(seed, stored_k, direction) -> None:
    case = make_prefix_case(seed, batch=2, chunks=8)
    assert_like_the_twin(case, direction=direction, stored_k=stored_k)


@pytest.mark.parametrize(
    "options",
    [
        {"max_depth": 0},
        {"max_depth": 1},
        {"depth_weights": (0.5, 2.0, 0.25)},
        {"depth_weights": (0.0, 1.0)},
        {"end": False},
        {"end": False, "direction": "reverse"},
        {"mirror": False},
        {"min_mass": 0.3},
        {"temperature": 2.0},
    ],
    ids=str,
)
def test_every_option_means_what_the_twin_makes_of_it(options) -> None:
    for seed in range(3):
        assert_like_the_twin(make_prefix_case(seed, batch=2, chunks=8), **options)


@pytest.mark.parametrize(
    "options", [{}, {"stored_k": 4, "top_k": 4, "tail_bucket": True}, {"end": False}], ids=str
)
def test_the_closed_forms_are_what_autograd_finds(options, monkeypatch) -> None:
    case = make_prefix_case(9, batch=3, chunks=10)
    options = {**options, "temperature": 1.3, "depth_weights": (0.5, 2.0)}
    taken = {"forward_kl_below": 0, "forward_kl_next": 0}

    def counted(name: str):
        closed = getattr(prefix_kl_blocks, name)

        def count(*args):
            made = closed(*args)
            taken[name] += made is not None
            return made

        return count

    monkeypatch.setattr(prefix_kl_blocks, "native_prefix_pass", lambda *_: None)
    for name in taken:
        monkeypatch.setattr(prefix_kl_blocks, name, counted(name))
    found = loss_of(case, **options)
    assert all(taken.values()), taken
    for name in taken:
        monkeypatch.setattr(prefix_kl_blocks, name, lambda *args: None)
    wanted = loss_of(case, **options)
    torch.testing.assert_close(found.loss, wanted.loss)
    torch.testing.assert_close(found.metrics, wanted.metrics)
    gradients = [torch.autograd.grad(x.loss, case.batch.student_logits)[0] for x in (found, wanted)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("stored_k", [None, 5])
def test_gradcheck(direction, stored_k) -> None:
    case = make_prefix_case(3, batch=1, chunks=5)

    def function(logits: Tensor) -> Tensor:
        return loss_of(case, logits=logits, direction=direction, stored_k=stored_k).loss

    assert gradcheck(function, (case.batch.student_logits,), eps=1e-6, atol=1e-6)


def test_one_tokenizer_on_both_sides_gives_the_plain_kl() -> None:
    size, generator = 12, torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 7, size, generator=generator) for _ in range(2))
    ids = torch.randint(0, size, (2, 7), generator=generator)
    pieces = [[i] for i in range(size)]
    trie = TrieSlots(PieceTrie.from_pieces(pieces, size))
    mirror = TrieSlots(PieceTrie.from_pieces(pieces, size, side="student"))
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[:, 0] = False
    chunks = ChunkBatch.from_mask(mask)
    identity = SparseProjection.identity(size)
    out = prefix_kl(
        student, teacher, identity, trie, chunks, student_ids=ids, teacher_ids=ids,
        teacher_trie=mirror,
    )  # fmt: skip
    root = p_kl(student, teacher, identity, chunks).loss
    torch.testing.assert_close(out.loss, root, rtol=1e-6, atol=0)
    plain = torch.nn.functional.kl_div(
        student[:, :-1].log_softmax(-1), teacher[:, :-1].log_softmax(-1), log_target=True,
        reduction="sum",
    )  # fmt: skip
    torch.testing.assert_close(out.loss, plain / 12)
    assert float(out.metrics["prefixes"]) == 0


def complete_pair(letters: int, depth: int) -> tuple[list[list[int]], PieceTrie]:
    """A student with one token for every string of 1 to `depth` pieces."""
    pieces = [
        list(string)
        for length in range(1, depth + 1)
        for string in itertools.product(range(letters), repeat=length)
    ]
    return pieces, PieceTrie.from_pieces(pieces, letters + 1)


def walk_all_tokens(student_row: Tensor, depth: int, letters: int):
    """Every student token as a one-chunk sample, under a teacher whose rows depend on the prefix.

    Teacher ids are a start piece and the token's pieces. Piece `letters` ends a token: after the
    longest ones the teacher says nothing else. Returns what `prefix_kl` takes, and P_T.
    """
    pieces, trie = complete_pair(letters, depth)
    generator = torch.Generator().manual_seed(5)
    after: dict[tuple[int, ...], Tensor] = {}
    for length in range(depth + 1):
        for prefix in itertools.product(range(letters), repeat=length):
            row = torch.randn(letters + 1, generator=generator, dtype=torch.float64)
            if length == 0:  # a token is at least one piece
                row[letters] = -torch.inf
            if length == depth:
                row[:letters] = -torch.inf
            after[prefix] = row
    count = len(pieces)
    teacher = torch.zeros(count, depth + 1, letters + 1, dtype=torch.float64)
    teacher_ids = torch.zeros(count, depth + 1, dtype=torch.int64)
    log_p_t = torch.zeros(count, dtype=torch.float64)
    for token, sequence in enumerate(pieces):
        for d in range(len(sequence) + 1):
            row = after[tuple(sequence[:d])]
            teacher[token, d] = row
            following = sequence[d] if d < len(sequence) else letters
            log_p_t[token] += row.log_softmax(-1)[following]
        teacher_ids[token, 1 : len(sequence) + 1] = torch.tensor(sequence)
    sample = torch.arange(count)
    one = torch.ones_like(sample)
    lengths = torch.tensor([len(sequence) for sequence in pieces])
    chunks = ChunkBatch.from_ranges(sample, one, one + 1, one, one + lengths)
    student = student_row.expand(count, 2, count).contiguous()
    slots = TrieSlots(trie)
    projection = first_pieces(csr_of(pieces, letters + 1, 0.1), slots)
    call = (student, teacher, projection, slots)
    ids = {"student_ids": torch.zeros(count, 2, dtype=torch.int64), "teacher_ids": teacher_ids}
    return call, chunks, ids, log_p_t


def loss_by_token(call, chunks, ids) -> Tensor:
    losses = [
        prefix_kl(*call, chunks.select(torch.tensor([c])), **ids).loss for c in range(len(chunks))
    ]
    return torch.stack(losses)


@pytest.mark.parametrize(("letters", "depth"), [(3, 3), (4, 2)])
def test_the_path_terms_average_to_the_kl_over_student_tokens_by_the_chain_rule(
    letters, depth
) -> None:
    count = sum(letters**length for length in range(1, depth + 1))
    logits = torch.randn(count, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    call, chunks, ids, log_p_t = walk_all_tokens(logits, depth, letters)
    p_t = log_p_t.exp()
    assert float(p_t.sum()) == pytest.approx(1.0)
    by_enumeration = (p_t * (log_p_t - logits.log_softmax(-1))).sum()
    torch.testing.assert_close((p_t * loss_by_token(call, chunks, ids)).sum(), by_enumeration)


def test_a_student_with_the_teachers_conditionals_has_no_loss_and_no_gradient() -> None:
    call, chunks, ids, log_p_t = walk_all_tokens(torch.zeros(39, dtype=torch.float64), 3, 3)
    student = log_p_t.expand(39, 2, 39).clone().requires_grad_()
    for direction in DIRECTIONS:
        out = prefix_kl(student, *call[1:], chunks, **ids, direction=direction)
        assert float(out.loss.detach()) == pytest.approx(0.0, abs=1e-12)
        (gradient,) = torch.autograd.grad(out.loss, student)
        assert float(gradient.abs().max()) < 1e-12


@given(seed=st.integers(0, 10_000), direction=st.sampled_from(DIRECTIONS), stored=st.booleans())
def test_it_is_never_negative(seed, direction, stored) -> None:
    case = make_prefix_case(seed, batch=1, chunks=6, scale=6.0)
    loss = loss_of(case, direction=direction, stored_k=3 if stored else None).loss
    assert not loss.isnan()
    assert float(loss.detach()) >= -1e-12


def test_padding_side_length_and_lm_head_padding_change_nothing() -> None:
    right = make_prefix_case(2, batch=3, padded=0)
    left = make_prefix_case(2, batch=3, left=True, padded=5)
    for source, target in ((right, left),):
        for side in ("student", "teacher"):
            mask = getattr(source.batch, f"{side}_mask"), getattr(target.batch, f"{side}_mask")
            ids = getattr(source.batch, f"{side}_ids"), getattr(target.batch, f"{side}_ids")
            ids[1][mask[1]] = ids[0][mask[0]]
            rows = [getattr(b, f"{side}_logits").detach() for b in (source.batch, target.batch)]
            rows[1][mask[1]] = torch.nn.functional.pad(rows[0][mask[0]], (0, 5), value=30.0)
    for stored_k in (None, 4):
        torch.testing.assert_close(
            loss_of(left, stored_k=stored_k).loss, loss_of(right, stored_k=stored_k).loss
        )
    (gradient,) = torch.autograd.grad(loss_of(left).loss, left.batch.student_logits)
    assert not gradient[..., left.batch.v_s :].any()
    assert not gradient[~left.batch.student_mask][:, :].any()


def test_how_a_batch_is_cut_changes_neither_loss_nor_gradient() -> None:
    case = make_prefix_case(4, batch=4, chunks=7)
    logits, usable = case.batch.student_logits, case.batch.usable
    whole = loss_of(case, normalizer=len(usable)).loss
    (expected,) = torch.autograd.grad(whole, logits)
    for block_size in (1, 2, 1000):
        loss = loss_of(case, normalizer=len(usable), block_size=block_size).loss
        torch.testing.assert_close(loss, whole)
        torch.testing.assert_close(torch.autograd.grad(loss, logits)[0], expected)
    parts = [
        loss_of(case, normalizer=len(usable), chunks=usable.select(usable.sample == b)).loss
        for b in range(4)
    ]
    torch.testing.assert_close(sum(parts), whole)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), logits)[0], expected)


def test_prompt_tokens_and_unaligned_chunks_have_no_gradient() -> None:
    case = make_prefix_case(1, batch=2, chunks=10)
    batch = case.batch
    mask = batch.student_mask.clone()
    mask[:, :6] = False
    usable = batch.chunks.usable(mask, batch.teacher_mask)
    (gradient,) = torch.autograd.grad(loss_of(case, chunks=usable).loss, batch.student_logits)
    assert gradient.any()
    # Row p predicts token p + 1.
    assert not gradient[:, : 6 - 1].any()


def test_chunk_weights_scale_the_whole_loss_of_a_chunk() -> None:
    case = make_prefix_case(4, batch=2, chunks=8)
    usable, logits = case.batch.usable, case.batch.student_logits
    weights = torch.rand(len(usable), generator=torch.Generator().manual_seed(0))
    parts = [
        weight * loss_of(case, normalizer=1.0, chunks=usable.select(torch.tensor([c]))).loss
        for c, weight in enumerate(weights)
    ]
    for block_size in (2, None):
        whole = loss_of(case, normalizer=1.0, chunk_weights=weights, block_size=block_size).loss
        torch.testing.assert_close(whole, sum(parts))
        torch.testing.assert_close(
            torch.autograd.grad(whole, logits)[0],
            torch.autograd.grad(sum(parts), logits, retain_graph=True)[0],
        )


def test_no_usable_chunk_gives_zero_with_a_graph() -> None:
    case = make_prefix_case(0)
    empty = case.batch.usable.select(torch.zeros(len(case.batch.usable), dtype=torch.bool))
    out = loss_of(case, chunks=empty)
    assert (out.loss.item(), out.num_chunks.item()) == (0.0, 0)
    assert not torch.autograd.grad(out.loss, case.batch.student_logits)[0].any()


def test_the_fused_path_agrees_with_logits() -> None:
    case = make_prefix_case(5, batch=2, chunks=8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    rows = case.batch.student_logits.shape
    hidden = torch.randn(*rows[:2], 6, generator=generator, dtype=torch.float64).requires_grad_()
    weight = torch.randn(rows[2], 6, generator=generator, dtype=torch.float64).requires_grad_()
    plain = loss_of(case, logits=hidden @ weight.T).loss
    fused = loss_of(case, logits=LmHead(hidden, weight), block_size=3).loss
    torch.testing.assert_close(fused, plain)
    for found, expected in zip(
        torch.autograd.grad(fused, (hidden, weight)),
        torch.autograd.grad(plain, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("options", [{}, {"top_k": 3, "tail_bucket": True}, {"temperature": 2.0}])
def test_a_teacher_by_hidden_states_and_head_is_the_teacher_of_the_logits(
    options: dict[str, Any],
) -> None:
    case = make_prefix_case(5, batch=2, chunks=8, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    rows = case.batch.teacher_logits.shape
    hidden = torch.randn(*rows[:2], 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(rows[2], 6, generator=generator, dtype=torch.float64)
    plain = loss_of(case, teacher=hidden @ weight.T, **options)
    fused = loss_of(case, teacher=LmHead(hidden, weight), block_size=3, **options)
    torch.testing.assert_close(fused.loss, plain.loss)
    torch.testing.assert_close(
        *(torch.autograd.grad(each.loss, case.batch.student_logits) for each in (fused, plain))
    )


def test_the_root_options_are_those_of_p_kl() -> None:
    case = make_prefix_case(6, batch=2, chunks=8)
    for options in (
        {"top_k": 3},
        {"top_k": 3, "top_k_scope": "microbatch"},
        {"top_k": 3, "tail_bucket": True},
        {"direction": "reverse", "temperature": 1.5},
    ):
        batch = case.batch
        root = p_kl(
            batch.student_logits, batch.teacher_logits, case.projection, batch.usable, **options
        )
        torch.testing.assert_close(loss_of(case, max_depth=0, **options).loss, root.loss)
        beyond = loss_of(case, **options)
        tau = options.get("temperature", 1.0)
        torch.testing.assert_close(
            beyond.loss, root.loss + beyond.metrics["prefix_kl"] * tau**2, check_dtype=False
        )


@pytest.mark.parametrize("mirror", [True, False])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_what_lies_beyond_the_root_does_not_depend_on_the_columns_of_the_root(
    direction, mirror
) -> None:
    # Without the mirrored construction only some columns of the student are read.
    few = {"top_k": 3, "top_k_scope": "microbatch"}
    for seed in range(3):
        case = make_prefix_case(seed, batch=2, chunks=8, v_s=40, dtype=torch.float64)
        logits = case.batch.student_logits

        def beyond(case=case, logits=logits, **options) -> tuple[Tensor, Tensor]:
            options = {"direction": direction, "mirror": mirror, **options}
            whole = loss_of(case, block_size=3, **options)
            root = loss_of(case, max_depth=0, **options)
            value = whole.loss - root.loss
            return value, torch.autograd.grad(value, logits)[0]

        torch.testing.assert_close(beyond(**few), beyond())


def test_it_tells_one_numeral_from_another_where_p_kl_cannot() -> None:
    # Student: 2, 20, 201, 27, 9; teacher: digits, and "." as 10.
    pieces = [[2], [2, 0], [2, 0, 1], [2, 7], [9]]
    trie = TrieSlots(PieceTrie.from_pieces(pieces, 11))
    projection = first_pieces(csr_of(pieces, 11, 0.1), trie)
    student = torch.zeros(1, 2, 5, requires_grad=True)
    teacher = torch.full((1, 4, 11), -9.0)
    for position, piece in enumerate((2, 0, 1, 10)):
        teacher[0, position, piece] = 9.0
    one = torch.tensor([1])
    chunks = ChunkBatch.from_ranges(torch.tensor([0]), one, one + 1, one, one + 3)
    ids = {"student_ids": torch.tensor([[4, 2]]), "teacher_ids": torch.tensor([[9, 2, 0, 1]])}
    root = p_kl(student, teacher, projection, chunks).loss
    (blind,) = torch.autograd.grad(root, student)
    assert torch.allclose(blind[0, 0, 0], blind[0, 0, :4])
    out = prefix_kl(student, teacher, projection, trie, chunks, **ids)
    (seeing,) = torch.autograd.grad(out.loss, student)
    up = -seeing[0, 0]
    assert up.argmax() == 2  # 201
    assert up[3] < 0  # 27
    assert float(out.metrics["prefixes"]) == 2


def test_stored_top_k_of_the_whole_vocabulary_is_the_full_teacher() -> None:
    case = make_prefix_case(7, batch=2, chunks=8)
    full, stored = loss_of(case), loss_of(case, stored_k=case.batch.v_t)
    torch.testing.assert_close(stored.loss, full.loss)
    assert float(stored.metrics["prefix_teacher_mass"]) == pytest.approx(1.0)
    some = loss_of(case, stored_k=3).metrics["prefix_teacher_mass"]
    assert 0 < float(some) < 1


def test_the_padding_of_a_short_stored_row_hides_no_stored_id() -> None:
    case = make_prefix_case(7, batch=2, chunks=8)
    stored = TeacherTopK.from_logits(case.batch.teacher_logits, 4, vocab_size=case.batch.v_t)
    pads = (*stored.ids.shape[:2], 2)
    padded = TeacherTopK(
        torch.cat([stored.ids, stored.ids[..., :1].expand(pads)], -1),
        torch.cat([stored.log_probs, torch.full(pads, -torch.inf)], -1),
    )
    expected = loss_of(case, stored_k=4, max_depth=9)
    found = loss_of(case, teacher=padded)
    torch.testing.assert_close(found.metrics["prefix_kl"], expected.metrics["prefix_kl"])


def test_small_ends_keep_their_digits_in_float32() -> None:
    """A teacher all but sure to go on: END is 1 minus nearly everything."""
    pieces = [[0], [0, 0], [0, 1]]
    trie = TrieSlots(PieceTrie.from_pieces(pieces, 3))
    projection = first_pieces(csr_of(pieces, 3, 0.1), trie)
    one = torch.tensor([1])
    chunks = ChunkBatch.from_ranges(torch.tensor([0]), one, one + 1, one, one + 1)
    ids = {"student_ids": torch.zeros(1, 2).long(), "teacher_ids": torch.tensor([[2, 0]])}
    teacher = torch.tensor([[[0.0, 0.0, 0.0], [10.0, 8.0, -10.0]]])
    student = torch.tensor([[[-10.0, 10.0, 8.0], [0.0, 0.0, 0.0]]])
    for signal in (teacher, TeacherTopK.from_logits(teacher, 3)):
        out = prefix_kl(student, signal, projection, trie, chunks, **ids, direction="reverse")
        # The conditionals agree: the same three logits on both sides.
        assert float(out.metrics["prefix_kl"]) == pytest.approx(0.0, abs=1e-6)


def test_logits_without_mass_below_a_prefix_are_skipped_and_infinite_ones_refused() -> None:
    case = make_prefix_case(0, batch=2, chunks=8)
    logits = case.batch.student_logits.detach().clone()
    logits[..., : case.batch.v_s - 1] = -torch.inf
    out = loss_of(case, logits=logits.requires_grad_(), direction="reverse")
    assert not math.isnan(float(out.metrics["prefix_kl"]))
    assert not torch.autograd.grad(out.loss, logits)[0].isnan().any()
    logits = case.batch.student_logits.detach().clone()
    sample, position = int(case.batch.usable.sample[1]), int(case.batch.usable.student_start[1])
    logits[sample, position - 1, 1] = torch.nan
    with pytest.raises(
        NonFiniteError, match=rf"student_logits\[{sample}, {position - 1}, 1\] = nan"
    ):
        loss_of(case, logits=logits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_depth": -1}, "max_depth = -1"),
        ({"depth_weights": ()}, r"depth_weights = \(\)"),
        ({"depth_weights": (1.0, -1.0)}, "from 0 to 1e9"),
        ({"min_mass": 1.0}, "min_mass = 1.0"),
        ({"min_prob": 1.0}, "min_prob = 1.0"),
        ({"min_prob": -0.1}, "min_prob = -0.1"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"direction": "sideways"}, "direction = 'sideways'"),
        ({"top_k": 0}, "top_k = 0"),
    ],
)
def test_options_outside_their_range_are_refused(options, message) -> None:
    with pytest.raises(OptionError, match=message):
        loss_of(make_prefix_case(0), **options)


def test_what_belongs_to_another_pair_or_batch_is_refused() -> None:
    case, other = make_prefix_case(0), make_prefix_case(0, v_s=20)
    batch, pair = case.batch, case.pair
    parts = {"projection": pair.projection, "student_trie": pair.student_trie}
    with pytest.raises(PairError, match="student_trie has 20 tokens and 13 pieces, expected 16"):
        PairParts((16, 13), **{**parts, "student_trie": other.pair.student_trie})
    with pytest.raises(PairError, match="teacher_trie has 13 tokens and 20 pieces, expected 13"):
        PairParts((16, 13), **parts, teacher_trie=other.pair.teacher_trie)
    with pytest.raises(PairError, match="projection is 16 x 13, expected 20 x 13"):
        PairParts((20, 13), projection=pair.projection)
    with pytest.raises(PairError, match="W is 16 x 13, the trie of 20"):
        first_pieces(case.projection, other.pair.student_trie)
    with pytest.raises(PairError, match="the pair has no teacher_trie, which prefix-kl needs"):
        loss_of(case, pair=PairParts((16, 13), **parts))
    with pytest.raises(ShapeError, match="teacher_ids has shape"):
        loss_of(case, teacher_ids=batch.teacher_ids[:, :-1])
    outside = batch.teacher_ids.clone()
    outside[batch.teacher_mask] = 99
    with pytest.raises(TokenIdError, match=r"= 99 is outside the teacher vocabulary \(V = 13\)"):
        loss_of(case, teacher_ids=outside)
    stored = TeacherTopK.from_logits(batch.teacher_logits, 4, vocab_size=13, temperature=2.0)
    with pytest.raises(OptionError, match="temperature 2"):
        loss_of(case, teacher=stored)


@pytest.mark.parametrize(
    ("prepared", "message"),
    [
        ({"mirror": False}, "prepared with mirror = False, the loss asks for True"),
        ({"max_depth": 1}, "prepared with max_depth = 1"),
        ({"last_depth": False}, "end = False, the loss asks for None and True"),
    ],
)
def test_prefixes_of_other_options_are_refused(prepared, message) -> None:
    case = make_prefix_case(0)
    batch, pair = case.batch, case.pair
    student, teacher = pair.student_trie.trie, pair.teacher_trie.trie
    mirror = prepared.pop("mirror", True)
    ids = batch.usable, batch.student_ids, batch.teacher_ids
    made = prepare_prefixes(student, teacher if mirror else None, *ids, **prepared)
    inputs = LossInputs(batch.student_logits, batch.teacher_logits, *ids, prefixes=made)
    with pytest.raises(OptionError, match=message):
        LOSSES["prefix-kl"].function(inputs, pair, LossOptions())
    if not mirror:  # what was prepared for more serves less
        without = LOSSES["prefix-kl"].function(inputs, pair, LossOptions(mirror=False)).loss
        whole = replace(inputs, prefixes=prepare_prefixes(student, teacher, *ids))
        found = LOSSES["prefix-kl"].function(whole, pair, LossOptions(mirror=False)).loss
        assert torch.equal(found, without)


def test_a_pair_makes_first_pieces_of_any_w() -> None:
    case = make_prefix_case(8, batch=2, chunks=8)
    pair = case.pair
    several = PairParts(
        pair.sizes,
        projection=csr_of(case.student_pieces, case.batch.v_t, 0.1),
        student_trie=pair.student_trie,
        teacher_trie=pair.teacher_trie,
    )
    assert bool((several.projection.indptr.diff() > 1).any())
    for options in ({"max_depth": 2}, {"mirror": False}):
        found, wanted = (loss_of(case, pair=x, **options).loss for x in (several, pair))
        torch.testing.assert_close(found, wanted)
    assert next(iter(several.student_trie.buffers())).dtype == torch.int64


def test_first_pieces_keeps_the_special_pairs_of_w() -> None:
    trie = TrieSlots(PieceTrie.from_pieces([[0, 1], [], [], [1]], 4))
    w = SparseProjection.from_csr([0, 2, 3, 3, 4], [1, 0, 3, 1], [0.6, 0.4, 1.0, 1.0], (4, 4))
    first = first_pieces(w, trie)
    assert first.indptr.tolist() == [0, 1, 2, 2, 3]
    assert first.indices.tolist() == [0, 3, 1]
    assert first.weights.tolist() == [1.0, 1.0, 1.0]


def test_a_compiled_step_runs_it_eagerly() -> None:
    case = make_prefix_case(8, batch=2, chunks=8)
    logits = case.batch.student_logits.detach()
    step = torch.compile(lambda logits: loss_of(case, logits=logits).loss + 1, backend="eager")
    torch.testing.assert_close(step(logits), loss_of(case, logits=logits).loss + 1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_costs_only_the_rounding_of_the_logits(dtype) -> None:
    case = make_prefix_case(9, batch=2, chunks=8, dtype=torch.float32)
    case.projection.to(torch.float32)
    rounded = case.batch.student_logits.detach().to(dtype).requires_grad_()
    raised = rounded.detach().double().requires_grad_()
    losses = [loss_of(case, logits=logits).loss for logits in (rounded, raised)]
    assert losses[0].dtype == torch.float32
    torch.testing.assert_close(losses[0].double(), losses[1].double(), rtol=1e-5, atol=1e-5)
    gradients = [
        torch.autograd.grad(loss, logits)[0]
        for loss, logits in zip(losses, (rounded, raised), strict=True)
    ]
    assert gradients[0].dtype == dtype
    tolerance = torch.finfo(dtype).eps
    torch.testing.assert_close(gradients[0].double(), gradients[1], rtol=tolerance, atol=1e-4)


def test_segment_logsumexp_survives_empty_segments_and_missing_mass() -> None:
    values = torch.tensor([0.0, 1.0, -torch.inf, -torch.inf], dtype=torch.float64)
    segment = torch.tensor([0, 0, 2, 2])
    values.requires_grad_()
    found = segment_logsumexp(values, segment, 4)
    assert found[0].item() == pytest.approx(math.log(1 + math.e))
    assert torch.isneginf(found[1:]).all()
    (gradient,) = torch.autograd.grad(found[[0, 2]].sum(), values)
    assert not gradient.isnan().any()
    assert gradient[2:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("seed", range(4))
def test_a_teacher_row_that_matters_and_is_nan_is_told(seed: int) -> None:
    case = make_prefix_case(seed, batch=2, chunks=8)
    teacher = case.batch.teacher_logits
    expected = loss_of(case).loss
    told = 0
    for row in range(teacher.shape[0] * teacher.shape[1]):
        at = divmod(row, teacher.shape[1])
        kept = teacher[at].clone()
        teacher[at] = kept.roll(1) * 1.5
        if loss_of(case).loss != expected:
            teacher[at] = torch.nan
            with pytest.raises(NonFiniteError, match=r"teacher\["):
                loss_of(case)
            told += 1
        teacher[at] = kept
    assert told > 3
