"""W between the first tokens of both sides, for heads that are narrower than a tokenizer."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tokenizer_zoo as zoo
from hypothesis import given
from hypothesis import strategies as st

from xtoken import Projection, Vocab
from xtoken.audit import audit
from xtoken.errors import OptionError, ShapeError, TokenIdError
from xtoken.projection.file import save


@given(st.data())
def test_the_rest_is_left_out_and_rows_sum_to_one_again(data: st.DataObject) -> None:
    spelled = st.lists(st.binary(min_size=1, max_size=3), min_size=3, max_size=9, unique=True)
    singles = [bytes([byte]) for byte in range(256)]
    student, teacher = (
        Vocab.from_tokens(singles + [t for t in data.draw(spelled) if len(t) > 1], ranked=True)
        for _ in range(2)
    )
    whole = Projection.build(student, teacher, cache_dir=False, threads=1)
    rows = data.draw(st.integers(1, whole.shape[0]))
    columns = data.draw(st.integers(1, whole.shape[1]))
    cut = whole.limited(rows, columns)
    assert cut.shape == (rows, columns)
    dense, expected = (np.zeros(whole.shape) for _ in range(2))
    for w, out in ((whole, expected), (cut, dense)):
        out[w.csr.row_of(), w.indices] = w.weights
    expected = expected[:rows, :columns]
    sums = expected.sum(1, keepdims=True)
    expected = np.divide(expected, sums, out=np.zeros_like(expected), where=sums > 0)
    assert np.allclose(dense[:rows, :columns], expected, atol=1e-6)
    for s in range(rows):
        pieces = whole.token_pieces(s)
        assert cut.token_pieces(s) == (pieces if all(p < columns for p in pieces) else [])


def test_nothing_changes_where_nothing_is_cut() -> None:
    pair = zoo.vocab(zoo.byte_level_bpe()), zoo.vocab(zoo.deepseek())
    w = Projection.build(*pair, cache_dir=False)
    same = w.limited(*w.shape)
    assert np.array_equal(same.indices, w.indices)
    assert np.allclose(same.weights, w.weights, atol=1e-7)
    assert np.array_equal(same.rules, w.rules)


def test_numbers_outside_the_vocabularies_are_refused() -> None:
    vocab = Vocab.from_tokens([b"a", b"b"], ranked=True)
    w = Projection.build(vocab, vocab, cache_dir=False)
    with pytest.raises(ShapeError, match="rows = 3, expected 1 to 2"):
        w.limited(3, 1)
    with pytest.raises(ShapeError, match="columns = 0, expected 1 to 2"):
        w.limited(1, 0)


def test_a_part_is_explained_and_counted_and_not_saved_as_the_whole(tmp_path: Path) -> None:
    w = Projection.build(zoo.deepseek(), zoo.byte_level_bpe(2000, 1), cache_dir=False)
    assert w.student is not None
    assert w.teacher is not None
    last = w.shape[0] - 1
    part = w.limited(last, 1990)
    assert part.explain(5).entries == w.explain(5).entries
    for call in (part.explain, part.token_pieces):
        with pytest.raises(TokenIdError, match=f"token id {last} is outside this part of"):
            call(last)
    narrow = w.limited(w.student.id_of(b"7"), w.shape[1])
    assert narrow.stats()["rows"] == narrow.shape[0]
    assert narrow.stats()["numerals_1"] < 10 == w.stats()["numerals_1"]
    path = tmp_path / "w.safetensors"
    for call in (lambda: part.save(path), lambda: audit(part)):
        with pytest.raises(OptionError, match=rf"between the first {last} student and 1990 teach"):
            call()
    w.limited(*w.shape).save(path)
    Projection.load(path, w.student, w.teacher)
    # As an earlier version saved it.
    save(replace(part, whole=None), path)
    with pytest.raises(ShapeError, match=rf"is W for {last} tokens of the student.*save it whole"):
        Projection.load(path, w.student, w.teacher)
    save(replace(w.limited(w.shape[0], 1990), whole=None), path)
    with pytest.raises(ShapeError, match=r"is W for 1990 tokens of the teacher.* has 2000:"):
        Projection.load(path, w.student, w.teacher)
