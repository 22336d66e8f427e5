"""The projection W: its rules against a plain reference, its laws, the paper's numbers."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tokenizer_zoo as zoo
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from xtoken import Projection, Vocab
from xtoken._core import PROJECTION_RULES
from xtoken.audit import audit
from xtoken.errors import (
    ArgumentTypeError,
    OptionError,
    ShapeError,
    TokenIdError,
    UnsupportedTokenizerError,
)

import reference_projection as reference

BYTES = [bytes([byte]) for byte in range(256)]


def ranked(*tokens: bytes) -> Vocab:
    """All single bytes, then these tokens; merged as a rank file does."""
    return Vocab.from_tokens([*BYTES, *tokens], ranked=True)


def build(student: object, teacher: object, **options: object) -> Projection:
    return Projection.build(student, teacher, cache_dir=False, **options)  # type: ignore[arg-type]


def row(w: Projection, token: bytes) -> list[tuple[bytes, float]]:
    """The entries of a student token, teacher tokens by their bytes."""
    return [(entry.token_bytes, entry.weight) for entry in w.explain(token).entries]


# The paper's numbers.


@pytest.fixture(name="packed", scope="module")
def _packed() -> Projection:
    """DeepSeek packs three digits into a token; this teacher spells one digit a token."""
    return build(zoo.deepseek(), zoo.byte_level_bpe(2000, 1))


def test_the_numeral_201_is_spread_as_in_the_paper(packed: Projection) -> None:
    entries = row(packed, b"201")
    assert [token for token, _ in entries] == [b"2", b"0", b"1"]
    assert [round(weight, 4) for _, weight in entries] == [0.9009, 0.0901, 0.0090]


def test_an_equal_token_has_weight_one_and_nothing_else(packed: Projection) -> None:
    assert row(packed, b" the") == [(b" the", 1.0)]
    assert packed.explain(b" the").rule == "exact"


def test_hundreds_is_spread_over_hund_and_reds() -> None:
    student = ranked(b"Hundreds")
    teacher = ranked(b"Hu", b"nd", b"Hund", b"re", b"ds", b"reds")
    assert row(build(student, teacher), b"Hundreds") == [
        (b"Hund", pytest.approx(1 / 1.1)),
        (b"reds", pytest.approx(0.1 / 1.1)),
    ]


def test_decay_zero_puts_all_mass_on_the_first_piece(packed: Projection) -> None:
    w = build(packed.student, packed.teacher, decay=0)
    assert row(w, b"201") == [(b"2", 1.0)]
    assert set(np.diff(w.indptr).tolist()) <= {0, 1}


# Twins: the whole vocabulary of real pairs.


def sentencepiece_pair() -> tuple[Tokenizer, Tokenizer]:
    return zoo.deepseek(), zoo.sentencepiece_bpe()


PAIRS: dict[str, Callable[[], tuple[Tokenizer, Tokenizer]]] = {
    "DeepSeek, one digit a token": lambda: (zoo.deepseek(), zoo.byte_level_bpe(2000, 1)),
    "one digit a token, DeepSeek": lambda: (zoo.byte_level_bpe(2000, 1), zoo.deepseek()),
    "DeepSeek, SentencePiece": sentencepiece_pair,
    "SentencePiece, DeepSeek": lambda: sentencepiece_pair()[::-1],
    "DeepSeek, Unigram": lambda: (zoo.deepseek(), zoo.unigram()),
    "Unigram, byte-level": lambda: (zoo.unigram(), zoo.byte_level_bpe()),
    "byte-level, SentencePiece without byte tokens": lambda: (
        zoo.byte_level_bpe(),
        zoo.sentencepiece_bpe(3000, False),
    ),
}


# The reverse rule segments the teacher's vocabulary too: a small one is enough.
@pytest.mark.parametrize(
    ("pair", "options"),
    [(pair, {}) for pair in PAIRS]
    + [(list(PAIRS)[at], {"reverse": True}) for at in (1, 5, 6)]
    + [(list(PAIRS)[5], {"decay": 1.0, "max_pieces": 6, "top_k": 3})],
)
def test_every_row_of_a_real_pair_is_that_of_the_plain_reference(
    pair: str, options: dict[str, Any]
) -> None:
    student_tokenizer, teacher_tokenizer = PAIRS[pair]()
    student, teacher = map(zoo.vocab, (student_tokenizer, teacher_tokenizer))
    w = build(student, teacher, **options)
    expected = reference.projection(
        student,
        teacher,
        reference.hugging_face_segment(student_tokenizer, student),
        reference.hugging_face_segment(teacher_tokenizer, teacher),
        **options,
    )
    made = [s for s, (rule, _) in enumerate(expected) if rule != "special"]
    assert [PROJECTION_RULES[w.rules[s]] for s in made] == [expected[s][0] for s in made]
    lengths = np.array([len(expected[s][1]) for s in made])
    assert np.array_equal(np.diff(w.indptr)[made], lengths)
    entries = np.isin(w.csr.row_of(), made)
    flat = [entry for s in made for entry in expected[s][1]]
    assert w.indices[entries].tolist() == [t for t, _ in flat]
    np.testing.assert_allclose(w.weights[entries], [weight for _, weight in flat], rtol=1e-6)
    split = sum(rule == "forward" for rule, _ in expected)
    assert split > 100


def test_all_pieces_of_rows_that_split_are_the_models_own_even_where_they_are_not_text() -> None:
    student_tokenizer, teacher_tokenizer = zoo.deepseek(), zoo.byte_level_bpe(2000, 1)
    w = build(student_tokenizer, teacher_tokenizer)
    assert w.student is not None
    assert w.teacher is not None
    segment = reference.hugging_face_segment(teacher_tokenizer, w.teacher)
    not_text = 0
    for s in np.flatnonzero(w.rules == PROJECTION_RULES.index("forward")).tolist():
        token = w.student.token_bytes(s)
        assert w.token_pieces(s) == segment(token)
        not_text += token.decode(errors="replace").count("�") > 0
    assert not_text > 500


# Laws.


@pytest.mark.parametrize("pair", PAIRS)
def test_rows_sum_to_one_or_are_empty_and_fall_in_weight(pair: str) -> None:
    w = build(*map(zoo.vocab, PAIRS[pair]()), top_k=3)
    sums = w.csr.row_sums()
    lengths = np.diff(w.indptr)
    np.testing.assert_allclose(sums[lengths > 0], 1, atol=3e-7)
    assert lengths.max() <= 3
    assert w.weights.min() > 0
    rows = w.csr.row_of()
    same_row = rows[1:] == rows[:-1]
    assert (w.weights[1:] <= w.weights[:-1])[same_row].all()
    stats = w.stats()
    assert stats["empty"] == int((lengths == 0).sum())
    assert sum(stats[rule] for rule in PROJECTION_RULES) == len(lengths)


@pytest.mark.parametrize("make", [zoo.deepseek, zoo.sentencepiece_bpe, zoo.unigram, zoo.wordpiece])
def test_equal_vocabularies_give_the_identity_up_to_ids_that_are_not_emitted(
    make: Callable[[], Tokenizer],
) -> None:
    w = build(zoo.vocab(make()), zoo.vocab(make()))
    ids = np.arange(len(w.rules))
    lone = np.diff(w.indptr) == 1
    assert lone.sum() == len(ids) - w.stats()["unused"]
    partner = np.full(len(ids), -1)
    partner[lone] = w.indices
    duplicate = w.rules == PROJECTION_RULES.index("duplicate")
    assert (partner[lone & ~duplicate] == ids[lone & ~duplicate]).all()
    assert w.student is not None
    for s in ids[duplicate].tolist():
        assert w.student.token_bytes(s) == w.student.token_bytes(int(partner[s]))


def test_the_answer_does_not_depend_on_threads() -> None:
    pair = zoo.vocab(zoo.deepseek()), zoo.vocab(zoo.sentencepiece_bpe())
    one = build(*pair, threads=1, reverse=True)
    for threads in (2, 7, None):
        other = build(*pair, threads=threads, reverse=True)
        for name in ("indptr", "indices", "weights", "rules", "pieces_indptr", "pieces"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


def test_two_builds_run_at_once_without_the_gil() -> None:
    vocabs = zoo.vocab(zoo.deepseek()), zoo.vocab(zoo.byte_level_bpe())
    results: list[Projection] = []
    threads = [
        threading.Thread(target=lambda: results.append(build(*vocabs, threads=1))) for _ in "ab"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert len(results) == 2
    assert np.array_equal(results[0].weights, results[1].weights)


tokens = st.lists(st.binary(min_size=1, max_size=4), max_size=12, unique=True).map(
    lambda found: [token for token in found if len(token) > 1]
)


@given(student=tokens, teacher=tokens, decay=st.floats(0, 1), top_k=st.integers(1, 5))
def test_projecting_a_distribution_keeps_its_mass(
    student: list[bytes], teacher: list[bytes], decay: float, top_k: int
) -> None:
    w = build(ranked(*student), ranked(*teacher), decay=decay, top_k=top_k, threads=1)
    probs = np.random.default_rng(0).dirichlet(np.ones(w.shape[0]))
    transposed = w.transposed()
    projected = np.bincount(transposed.row_of(), transposed.weights * probs[transposed.indices])
    assert projected.sum() == pytest.approx(1, abs=1e-6)
    assert w.stats()["empty"] == 0


# Duplicates, empty rows, special tokens, canonical and reverse rules.


def test_of_equal_teacher_tokens_the_row_goes_to_the_one_that_its_tokenizer_emits() -> None:
    teacher = zoo.vocab(zoo.sentencepiece_bpe())
    letter, fallback = teacher.id_of(b"A"), 3 + ord("A")
    assert teacher.token_bytes(fallback) == b"A"
    assert letter != fallback
    w = build(ranked(), teacher)
    assert w.explain(b"A").entries[0].teacher_id == letter
    # No normal token spells half a character: its byte token is what the tokenizer emits.
    assert w.explain(b"\xe2").entries[0].teacher_id == 3 + 0xE2


def test_a_student_id_that_is_never_emitted_is_a_duplicate_outside_the_common_set() -> None:
    student = zoo.vocab(zoo.sentencepiece_bpe())
    w = build(student, ranked())
    assert w.explain(3 + ord("A")).rule == "duplicate"
    pairs = dict(w.common_set("strict").tolist())
    assert 3 + ord("A") not in pairs
    assert pairs[student.id_of(b"A")] == ord("A")


def test_what_the_teacher_cannot_spell_is_an_empty_row_and_counted() -> None:
    teacher = Vocab.from_tokens([b"a", b"b"], ranked=True)
    w = build(Vocab.from_tokens([b"ab", b"", b"ax"]), teacher)
    assert np.diff(w.indptr).tolist() == [2, 0, 0]
    assert w.stats()["unspellable"] == 1
    assert w.stats()["unused"] == 1
    assert w.explain(2).reason == "the teacher cannot spell these bytes"
    assert "nothing" in str(w.explain(2))


def test_more_pieces_than_max_pieces_keep_the_first() -> None:
    w = build(ranked(b"abcdef"), ranked(), max_pieces=2)
    assert [token for token, _ in row(w, b"abcdef")] == [b"a", b"b"]
    assert len(w.token_pieces(256)) == 6


def test_of_pieces_with_equal_weights_the_first_stay_first() -> None:
    student, teacher = ranked(b"zyxwvuts", b"zyzyxw"), ranked()
    w = build(student, teacher, decay=1.0, max_pieces=8)
    assert row(w, b"zyxwvuts") == [(bytes([byte]), 0.25) for byte in b"zyxw"]
    found = row(build(student, teacher, decay=1.0, max_pieces=8, top_k=3), b"zyzyxw")
    assert [token for token, _ in found] == [b"z", b"y", b"x"]
    assert [weight for _, weight in found] == pytest.approx([0.4, 0.4, 0.2])
    assert [t for t, _ in row(w.with_weights(w.weights), b"zyxwvuts")] == [b"z", b"y", b"x", b"w"]
    # What teacher tokens give back comes after, by rising id.
    w = build(ranked(b"ba"), ranked(b"aa", b"ac", b"ab"), decay=1.0, reverse="all")
    assert [t for t, _ in row(w, b"ba")] == [b"b", b"a"]
    assert [t for t, _ in row(w, b"a")] == [b"a", b"aa", b"ac", b"ab"]


def test_equal_pieces_add_up() -> None:
    assert row(build(ranked(b"aaa"), ranked()), b"aaa") == [(b"a", 1.0)]


def test_special_tokens_pair_by_role_and_not_by_looks() -> None:
    student = Vocab.from_tokens([b"a", b"", b""], {1: "<s>", 2: "</s>"})
    teacher = Vocab.from_tokens(
        [b"a", b"", b"", b""], {1: "<s>", 2: "<bos>", 3: "<eos>"}, roles={"bos": 2, "eos": 3}
    )
    w = build(student, teacher)
    assert w.indices.tolist() == [0, 2, 3]
    assert w.explain("<s>").rule == "role"


def test_special_roles_declares_pairs_and_takes_roles_away() -> None:
    student = Vocab.from_tokens([b"a", b"", b""], {1: "<s>", 2: "</s>"})
    teacher = Vocab.from_tokens([b"a", b"", b"", b""], {1: "<x>", 2: "<bos>", 3: "<eos>"})
    w = build(student, teacher, special_roles={"bos": ("<s>", 1), "eos": None})
    assert np.diff(w.indptr).tolist() == [1, 1, 0]
    assert w.indices.tolist() == [0, 1]
    with pytest.raises(TokenIdError, match=r"special_roles\['eot'\]\[1\] = '<nope>'.*<x>, <bos>"):
        build(student, teacher, special_roles={"eot": (1, "<nope>")})
    with pytest.raises(TokenIdError, match=r"special_roles\['eot'\]\[0\] = 9 is outside"):
        build(student, teacher, special_roles={"eot": (9, 1)})
    with pytest.raises(OptionError, match='"header": None'):
        build(student, teacher, special_roles={"header": None})


def test_canonical_differences_count_unless_declared() -> None:
    student, teacher = ranked(b" ,", b"The", b"_x", b" x"), ranked(b"the", b" x")
    w = build(student, teacher)
    assert w.explain(b" ,").rule == "forward"
    w = build(student, teacher, canonical=["punctuation_space", "case"])
    assert row(w, b" ,") == [(b",", 1.0)]
    assert row(w, b"The") == [(b"the", 1.0)]
    assert w.explain(b" ,").rule == "canonical"
    assert w.explain(b"_x").rule == "forward"
    assert row(w, b"A") == [(b"A", 1.0)]


def test_a_teacher_token_that_splits_gives_weight_back_where_no_exact_partner_stands() -> None:
    student, teacher = ranked(b"ab", b"bc"), ranked(b"bcd")
    assert row(build(student, teacher), b"bc")[0] == (b"b", pytest.approx(1 / 1.1))
    w = build(student, teacher, reverse=True)
    assert [token for token, _ in row(w, b"bc")] == [b"b", b"bcd", b"c"]
    assert row(w, b"d") == [(b"d", 1.0)]
    with_exact = build(student, teacher, reverse="all")
    assert [token for token, _ in row(with_exact, b"d")] == [b"d", b"bcd"]


def test_a_row_that_only_a_longer_teacher_token_reaches_is_made_by_the_reverse_rule() -> None:
    student = Vocab.from_tokens([b"a", b"b"], ranked=True)
    w = build(student, Vocab.from_tokens([b"ab"], ranked=True), reverse=True)
    assert [PROJECTION_RULES[rule] for rule in w.rules] == ["reverse", "reverse"]
    assert w.indices.tolist() == [0, 0]


# Common set.


def test_the_strict_common_set_is_equal_bytes_and_equal_roles(packed: Projection) -> None:
    assert packed.student is not None
    assert packed.teacher is not None
    pairs = packed.common_set("strict")
    assert len(set(pairs[:, 0])) == len(set(pairs[:, 1])) == len(pairs)
    for s, t in pairs.tolist():
        same = packed.student.token_bytes(s) == packed.teacher.token_bytes(t)
        assert same or PROJECTION_RULES[packed.rules[s]] == "role"
    assert packed.student.id_of(b"201") not in pairs[:, 0]


def test_the_relaxed_common_set_is_one_to_one_by_weight_then_lowest_id() -> None:
    student = ranked(b"xa", b"xb", b"x!", b"!!")
    teacher = Vocab.from_tokens([*BYTES[:120], b"", *BYTES[121:], b"x", b"ya"], ranked=True)
    w = build(student, teacher, decay=0.5)
    x = teacher.id_of(b"x")
    strict = {tuple(pair) for pair in w.common_set("strict").tolist()}
    assert (ord("x"), x) in strict
    assert strict <= {tuple(pair) for pair in w.common_set("relaxed").tolist()}
    # Without the exact claim, the lowest id of equal weights wins.
    student = Vocab.from_tokens([b"", *BYTES[:120], *BYTES[121:], b"xa", b"xb"])
    w = build(student, teacher, decay=0.5)
    pairs = dict(w.common_set(threshold=0.6).tolist())
    assert pairs[student.id_of(b"xa")] == x
    assert student.id_of(b"xb") not in pairs
    assert student.id_of(b"xa") not in dict(w.common_set(threshold=0.7).tolist())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "loose"}, "mode = 'loose'.*'strict' or 'relaxed'"),
        ({"threshold": 0}, "threshold = 0 "),
        ({"threshold": float("nan")}, "threshold = nan"),
    ],
)
def test_a_common_set_out_of_range_is_refused(
    packed: Projection, arguments: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        packed.common_set(**arguments)  # type: ignore[arg-type]


# Explanations, forms, slices.


def test_an_explanation_reads_as_a_sentence(packed: Projection) -> None:
    text = str(packed.explain("201"))
    assert text.startswith("'201' [")
    assert "'2' (0.9009), '0' (0.0901), '1' (0.0090)" in text
    assert "the teacher's own segmentation" in text
    assert packed.explain("201").pieces == ("'2'", "'0'", "'1'")
    assert packed.explain(b"\xe2").token == r"b'\xe2'"


def test_a_text_that_is_no_single_token_is_explained_by_its_spelling(packed: Projection) -> None:
    with pytest.raises(TokenIdError, match=r"spelled ' the'.*pass a single token"):
        packed.explain(" the the")
    with pytest.raises(TokenIdError, match="token id 200000 is outside"):
        packed.explain(200_000)
    with pytest.raises(TokenIdError, match="token id -1 is outside"):
        packed.token_pieces(-1)


def test_the_transposed_form_and_the_slices_are_those_of_the_dense_matrix() -> None:
    w = build(ranked(b"abc", b"abd", b"xy"), ranked(b"ab"))
    dense = w.to_torch().to_dense().numpy()
    assert dense.shape == w.shape
    assert dense.sum() == pytest.approx(w.shape[0])
    assert np.array_equal(w.transposed().to_torch().to_dense().numpy(), dense.T)
    rows = w.row_slice(200, 258)
    assert np.array_equal(rows.to_torch().to_dense().numpy(), dense[200:258])
    columns = [256, 3, ord("c")]
    part = w.column_slice(columns)
    assert np.array_equal(part.to_torch().to_dense().numpy(), dense[:, columns])
    assert w.row_slice(5, 5).shape == (0, 257)
    for start, stop in ((-1, 3), (4, 3), (0, 260)):
        with pytest.raises(ShapeError, match="rows"):
            w.row_slice(start, stop)
    with pytest.raises(ShapeError, match=r"columns lie in \[0, 257\]"):
        w.column_slice([0, 257])
    with pytest.raises(ShapeError, match="twice"):
        w.column_slice([1, 1])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: w.with_weights(["a"] * 3), ArgumentTypeError, "weights is <U1, expected numb"),
        (lambda w: w.with_weights([[1], [1, 2]]), ArgumentTypeError, "weights cannot be read"),
        (lambda w: w.limited(2.0, 1), ArgumentTypeError, "rows is float, expected a whole numb"),
        (lambda w: w.limited(2, True), ArgumentTypeError, "columns is bool, expected a whole"),
        (lambda w: w.row_slice(0.0, 1), ArgumentTypeError, "start is float, expected a whole"),
        (lambda w: w.row_slice(0, None), ArgumentTypeError, "stop is NoneType, expected a whole"),
        (lambda w: w.column_slice(0), ShapeError, r"columns has shape \(\), expected whole"),
        (lambda w: w.column_slice([[0, 1]]), ShapeError, r"columns has shape \(1, 2\), expected"),
        (lambda w: w.column_slice([0.5]), ArgumentTypeError, "columns is float64, expected whole"),
        (lambda w: w.column_slice([True]), ArgumentTypeError, "columns is bool, expected whole"),
        (lambda w: w.csr.row(-1), ShapeError, r"row -1 is not inside \[0, 259\)"),
        (lambda w: w.csr.row(259), ShapeError, r"row 259 is not inside \[0, 259\)"),
        (lambda w: w.token_pieces(0.5), ArgumentTypeError, "student_id is float, expected a whole"),
        (lambda w: w.to_torch("nowhere"), OptionError, "device = 'nowhere', which torch does not"),
        (lambda w: w.to_torch(dtype=torch.int64), OptionError, r"dtype = torch\.int64 holds no"),
        (lambda w: w.to_torch(dtype="float32"), ArgumentTypeError, "dtype is str, expected dtype"),
        (lambda w: audit(None), ArgumentTypeError, "projection is NoneType, expected Projection"),
    ],
)
def test_what_is_no_number_no_row_and_no_device_is_refused_in_one_line(
    call: Callable[[Projection], object], error: type[Exception], message: str
) -> None:
    w = build(ranked(b"abc", b"abd", b"xy"), ranked(b"ab"))
    with pytest.raises(error, match=message) as refused:
        call(w)
    assert "\n" not in str(refused.value)
    assert w.column_slice([]).shape == (259, 0)


def test_to_torch_takes_a_dtype(packed: Projection) -> None:
    w = packed.to_torch(dtype=torch.float64)
    assert w.dtype == torch.float64
    probs = torch.full((1, w.shape[0]), 1 / w.shape[0], dtype=torch.float64)
    reached = (np.diff(packed.indptr) > 0).mean()
    assert float((probs @ w).sum()) == pytest.approx(reached, abs=1e-6)


def test_a_projection_pickles(packed: Projection) -> None:
    copy = pickle.loads(pickle.dumps(packed))
    assert np.array_equal(copy.weights, packed.weights)
    assert str(copy.explain("201")) == str(packed.explain("201"))
    assert repr(copy) == repr(packed)


# Bad input.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top_k": 0}, "top_k = 0 .*at least 1"),
        ({"top_k": -3}, "top_k = -3 .*at least 1"),
        ({"max_pieces": 0}, "max_pieces = 0"),
        ({"decay": -0.1}, "decay = -0.1 .*0 <= decay <= 1"),
        ({"decay": 1.5}, "decay = 1.5"),
        ({"decay": float("nan")}, "decay = nan"),
        ({"threads": 0}, "threads = 0 .*at least 1"),
        ({"threads": -2}, "threads = -2"),
        ({"reverse": "sometimes"}, "reverse = 'sometimes'"),
        ({"canonical": ["nfkc"]}, 'canonical = "nfkc" .*punctuation_space'),
        ({"name_similarity": float("nan")}, "name_similarity = nan"),
        ({"name_similarity": 0}, "name_similarity = 0"),
    ],
)
def test_an_option_out_of_range_is_refused_by_name(
    options: dict[str, object], message: str
) -> None:
    with pytest.raises(OptionError, match=message):
        build(ranked(), ranked(), **options)


def test_canonical_of_another_class_is_refused_by_name() -> None:
    # An array of no dimension says that it can be iterated over, and cannot.
    for wrong in (np.array(0.5), 5, [1], None):
        with pytest.raises(ArgumentTypeError, match=r"canonical = .*; pass names of differences"):
            build(ranked(), ranked(), canonical=wrong)


def test_a_teacher_without_a_model_serves_exact_rows_and_is_refused_for_others() -> None:
    teacher = Vocab.from_tokens([b"a", b"b"])
    assert build(Vocab.from_tokens([b"b", b"a"]), teacher).indices.tolist() == [1, 0]
    with pytest.raises(UnsupportedTokenizerError, match=r"teacher vocabulary has no .*model"):
        build(Vocab.from_tokens([b"ab"]), teacher)


def test_what_is_no_tokenizer_is_refused() -> None:
    with pytest.raises(TypeError, match="int is not a tokenizer"):
        build(3, ranked())
