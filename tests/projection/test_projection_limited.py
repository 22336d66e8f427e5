"""W between the first tokens of both sides, for heads that are narrower than a tokenizer."""

from __future__ import annotations

import numpy as np
import pytest
import tokenizer_zoo as zoo
from hypothesis import given
from hypothesis import strategies as st

from xtoken import Projection, Vocab
from xtoken.errors import ShapeError


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
