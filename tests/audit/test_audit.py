"""The audit of a pair: classes of tokens, coverage, the recommendation, the page."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tokenizer_zoo as zoo
from tokenizers import Tokenizer

from xtoken import Projection, Vocab
from xtoken.audit.audit import DEFAULT_LOSS, Audit, audit, recommended_loss
from xtoken.errors import OptionError
from xtoken.vocab.classes import class_of, classes


def build(student: Tokenizer | Vocab, teacher: Tokenizer | Vocab) -> Projection:
    sides = (each if isinstance(each, Vocab) else zoo.vocab(each) for each in (student, teacher))
    return Projection.build(*sides, cache_dir=False)


@pytest.fixture(name="packed", scope="module")
def _packed() -> Audit:
    """DeepSeek packs three digits into a token; this teacher spells one digit a token."""
    return audit(build(zoo.deepseek(), zoo.byte_level_bpe(2000, 1)))


def coverage(result: Audit, name: str) -> tuple[int, int]:
    found = next(item for item in result.classes if item.name == name)
    return found.relaxed, found.total


@pytest.mark.parametrize(
    ("token", "name"),
    [
        (b"7", "one-digit numerals"),
        (b"42", "two-digit numerals"),
        (b"201", "three-digit numerals"),
        (b"2024", "longer numerals"),
        (b" 42", "mixed and other text"),
        (b",", "ASCII punctuation"),
        (b" (", "ASCII punctuation"),
        (b"();", "code symbols"),
        (b" ==", "code symbols"),
        (b"{\n", "code symbols"),
        (b"\n\n", "newline runs"),
        (b"\r\n", "newline runs"),
        (b" ", "space and tab runs"),
        (b"\t\t", "space and tab runs"),
        (b" the", "Latin letters"),
        ("Straße".encode(), "Latin letters"),
        ("привет".encode(), "Cyrillic letters"),
        ("机器".encode(), "Han letters"),
        ("한국".encode(), "Hangul letters"),
        ("नमस्ते".encode(), "Devanagari letters"),
        ("ありがとう".encode(), "Kana letters"),
        ("²".encode(), "mixed and other text"),
        (b"foo_bar", "mixed and other text"),
        ("😀".encode(), "mixed and other text"),
        (b"\xe2\x80", "bytes that are no text alone"),
    ],
)
def test_a_token_has_the_class_that_a_reader_would_give_it(token: bytes, name: str) -> None:
    assert class_of(token) == name


def test_every_used_id_that_is_emitted_has_one_class() -> None:
    vocab = zoo.vocab(zoo.sentencepiece_bpe())
    ids = [token_id for token_id, _ in classes(vocab)]
    assert len(ids) == len(set(ids))
    unseen = set(range(len(vocab))) - set(ids)
    assert unseen
    for token_id in unseen:
        assert vocab.is_byte_fallback(token_id)


def test_numerals_outside_the_common_set_speak_for_the_default_loss(packed: Audit) -> None:
    assert coverage(packed, "two-digit numerals") == (0, 100)
    assert coverage(packed, "three-digit numerals") == (0, 1000)
    assert coverage(packed, "one-digit numerals") == (10, 10)
    assert packed.recommendation == recommended_loss(packed) == DEFAULT_LOSS == "prefix-kl"
    assert "0 of 100 two-digit numerals" in packed.reason
    assert "0 of 1,000 three-digit numerals" in packed.reason


def test_where_all_that_matters_is_shared_the_papers_advice_is_told_beside_the_default() -> None:
    result = audit(build(zoo.byte_level_bpe(4000, 3), zoo.deepseek()))
    relaxed, total = coverage(result, "three-digit numerals")
    assert relaxed == total > 900
    assert result.recommendation == DEFAULT_LOSS
    assert "of the student are in the common set" in result.reason
    assert "the paper advises H-KL there (--loss h-kl)" in result.reason


def test_the_default_of_a_run_is_the_default_of_the_audit() -> None:
    from xtoken.training import DistillConfig

    assert DistillConfig().loss == DEFAULT_LOSS


def test_without_pieces_to_compare_p_kl_is_recommended(packed: Audit) -> None:
    classes = tuple(replace(item, prefixed=0, prefixes=0) for item in packed.classes)
    without = replace(packed, classes=classes)
    assert without.recommendation == "p-kl"
    assert "Prefix KL would add nothing" in without.reason


def test_byte_tokens_that_are_never_emitted_do_not_count_against_a_class() -> None:
    result = audit(build(zoo.sentencepiece_bpe(), zoo.deepseek()))
    assert coverage(result, "one-digit numerals") == (10, 10)
    # Without the byte tokens left out, ten of twenty one-digit numerals would be missing.


def test_numerals_that_only_the_teacher_packs_are_noted() -> None:
    result = audit(build(zoo.byte_level_bpe(2000, 1), zoo.deepseek()))
    assert result.recommendation == DEFAULT_LOSS
    assert any("1,000 three-digit numerals as tokens, the student none" in n for n in result.notes)


def test_the_counts_add_up(packed: Audit) -> None:
    tokens = sum(item.total for item in packed.classes)
    specials = coverage(packed, "special tokens")[1]
    assert tokens == packed.student_tokens + specials
    assert sum(item.strict for item in packed.classes) == packed.common_strict
    assert sum(item.relaxed for item in packed.classes) == packed.common_relaxed
    assert packed.common_strict <= packed.common_relaxed
    for item in packed.classes:
        assert item.strict <= item.relaxed <= item.total
        assert item.spread + item.empty <= item.total
        assert item.prefixed <= item.total
        assert item.prefixes >= item.prefixed


def test_what_prefix_kl_adds_is_counted_by_class(packed: Audit) -> None:
    classes = {item.name: item for item in packed.classes}
    # 2, 20 and 201 to a teacher of single digits: END or a digit after each but the last.
    assert classes["one-digit numerals"].prefixed == 10
    assert classes["two-digit numerals"].prefixes == 2 * classes["two-digit numerals"].total
    assert classes["three-digit numerals"].prefixes == 2 * classes["three-digit numerals"].total
    assert classes["special tokens"].prefixed == 0


def test_sentencepiece_and_byte_level_share_bytes_but_not_strings() -> None:
    result = audit(build(zoo.sentencepiece_bpe(), zoo.byte_level_bpe()))
    assert result.shared_bytes > 1000
    assert result.shared_strings < result.shared_bytes / 2


def test_a_lossy_vocabulary_is_noted() -> None:
    result = audit(build(zoo.byte_level_bpe(), zoo.wordpiece()))
    assert any("WordPiece drops case" in note for note in result.notes)
    assert any("cannot be spelled by the teacher" in note for note in result.notes)


def test_the_audit_needs_tokenizers_and_a_threshold_in_range(
    tmp_path: Path,
) -> None:
    w = build(zoo.byte_level_bpe(), zoo.byte_level_bpe(2000, 1))
    with pytest.raises(OptionError, match="threshold = 2"):
        audit(w, threshold=2)
    w.save(tmp_path / "w.safetensors")
    with pytest.raises(OptionError, match="loaded without its tokenizers"):
        audit(Projection.load(tmp_path / "w.safetensors"))
