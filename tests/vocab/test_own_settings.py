"""A tokenizer with settings of its own is the same tokenizer as one that is printed and read."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import tokenizer_zoo as zoo
from tokenizers import AddedToken, Tokenizer

from xtoken import Pair
from xtoken.vocab.side import with_own_settings

PARTS = ("model", "normalizer", "pre_tokenizer", "added_tokens")
TEXT = "Hello, <mark> <|im_end|>world  12345 naïve\u0301 <MARK>!\n\n"


@pytest.mark.parametrize(
    "make",
    [zoo.deepseek, zoo.byte_level_bpe, zoo.sentencepiece_bpe, zoo.unigram, zoo.wordpiece],
)
@pytest.mark.parametrize("marked", [False, True])
def test_it_is_the_tokenizer(make: Callable[[], Tokenizer], marked: bool) -> None:
    tokenizer = Tokenizer.from_str(make().to_str())
    if marked:
        kept = tokenizer.id_to_token(300)  # has an id already
        tokenizer.add_tokens(["plain", AddedToken("<mark>", lstrip=True, normalized=True), kept])
        tokenizer.add_special_tokens([AddedToken("<|im_end|>", rstrip=True), "<|last|>"])
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=50)
    tokenizer.encode_special_tokens = marked
    before = tokenizer.to_str()
    made = with_own_settings(tokenizer)
    parts, expected = json.loads(made.to_str()), json.loads(before)
    assert {name: parts[name] for name in PARTS} == {name: expected[name] for name in PARTS}
    assert (parts["truncation"], parts["padding"]) == (None, None)
    plain = Tokenizer.from_str(before)
    plain.no_truncation()
    plain.no_padding()
    plain.encode_special_tokens = marked
    found = made.encode(TEXT, add_special_tokens=False)
    assert found.ids == plain.encode(TEXT, add_special_tokens=False).ids
    # Nothing that is set or added later reaches the other.
    made.add_tokens(["another"])
    made.enable_truncation(7)
    assert tokenizer.to_str() == before
    tokenizer.add_tokens(["<one more>"])
    assert made.token_to_id("<one more>") is None


def test_what_a_tokenizer_is_set_to_after_a_pair_was_made_changes_no_batch() -> None:
    sides = [
        Tokenizer.from_str(zoo.byte_level_bpe(*size).to_str()) for size in ((900, 3), (700, 1))
    ]
    distiller = Pair(*sides, cache_dir=False).distiller("p-kl", ce_weight=1.0)
    before = distiller.collate([TEXT])
    for set_to in (
        lambda tokenizer: tokenizer.enable_padding(length=128),
        lambda tokenizer: tokenizer.enable_truncation(6),
    ):
        for tokenizer in sides:
            set_to(tokenizer)
        after = distiller.collate([TEXT])
        assert after.student_ids.tolist() == before.student_ids.tolist()
        assert after.teacher_ids.tolist() == before.teacher_ids.tolist()
        assert after.tokens == before.tokens
