"""A tokenizer is told by what its ids depend on, wherever it lies and whatever it was asked for."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizer_zoo as zoo
from datasets.fingerprint import Hasher
from tokenizers import AddedToken, Tokenizer, normalizers, processors
from transformers import PreTrainedTokenizerFast

from xtoken import Pair, Projection, Vocab
from xtoken.data import Conversation, Encoder
from xtoken.errors import PairError
from xtoken.vocab.content import content_digest
from xtoken.vocab.side import Side

BEGIN = processors.TemplateProcessing(
    single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", 0)]
)
MARKED = "hi <|end_of_text|> you"


def plain() -> Tokenizer:
    return Tokenizer.from_str(zoo.byte_level_bpe(500).to_str())


def fast(**options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=plain(),
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        **options,
    )


def begins(tokenizer: Tokenizer) -> None:
    tokenizer.post_processor = BEGIN


def lowers(tokenizer: Tokenizer) -> None:
    tokenizer.normalizer = normalizers.Lowercase()


def strips(tokenizer: Tokenizer) -> None:
    tokenizer.add_tokens([AddedToken("<|new|>", lstrip=True, special=True)])


def splits(tokenizer: Tokenizer) -> None:
    tokenizer.encode_special_tokens = True


CHANGES: list[Callable[[Tokenizer], None]] = [begins, lowers, strips, splits]


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_ids_changes_the_digest(change: Callable[[Tokenizer], None]) -> None:
    tokenizer = plain()
    before = content_digest(tokenizer)
    assert before == content_digest(plain())
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding()
    tokenizer.encode("what it was asked for")
    assert content_digest(tokenizer, again=True) == before
    change(tokenizer)
    assert content_digest(tokenizer) != before


@pytest.mark.parametrize("change", [begins, lowers, strips])
def test_rows_of_a_tokenizer_that_was_altered_on_the_disk_are_made_anew(
    tmp_path: Path, change: Callable[[Tokenizer], None]
) -> None:
    for name in ("student", "teacher"):
        (tmp_path / name).mkdir()
        plain().save(str(tmp_path / name / "tokenizer.json"))

    def hashed() -> str:
        pair = Pair(tmp_path / "student", tmp_path / "teacher", cache_dir=False)
        found: str = Hasher.hash(pair.tokenize)
        return found

    first = hashed()
    assert hashed() == first
    other = plain()
    change(other)
    other.save(str(tmp_path / "teacher" / "tokenizer.json"))
    assert hashed() != first


def test_a_pair_of_paths_that_was_changed_in_memory_is_refused_in_another_process(
    tmp_path: Path,
) -> None:
    for name in ("student", "teacher"):
        fast().save_pretrained(tmp_path / name)
    pair = Pair(tmp_path / "student", tmp_path / "teacher", cache_dir=False)
    # As trainers do it.
    pair.student_tokenizer.pad_token = pair.student_tokenizer.eos_token
    assert pickle.loads(pickle.dumps(pair)).align(MARKED) == pair.align(MARKED)
    pair.teacher_tokenizer.backend_tokenizer.post_processor = BEGIN
    with pytest.raises(
        PairError, match=r"teacher tokenizer of .* is not as it was when it was sent"
    ):
        pickle.loads(pickle.dumps(pair)).align(MARKED)


def test_special_tokens_that_are_text_stay_so_in_other_processes() -> None:
    tokenizer = plain()
    splits(tokenizer)
    side = Side("student", tokenizer)
    assert len(side.encode([MARKED])[0]) > 4
    assert pickle.loads(pickle.dumps(side)).encode([MARKED]) == side.encode([MARKED])


def test_special_tokens_that_are_text_stay_so_in_a_saved_pair(tmp_path: Path) -> None:
    tokenizer = plain()
    splits(tokenizer)
    pair = Pair(tokenizer, plain(), cache_dir=False)
    pair.save(tmp_path)
    saved = Pair.load(tmp_path)
    for each in (saved, pickle.loads(pickle.dumps(saved))):
        assert each.student.encode([MARKED]) == pair.student.encode([MARKED])
        assert each.teacher.encode([MARKED]) == pair.teacher.encode([MARKED])


def test_a_teacher_that_splits_special_tokens_reads_its_own_ids() -> None:
    student, teacher = fast(), fast(split_special_tokens=True)
    (example,) = Pair(student, teacher, cache_dir=False).examples([MARKED]).examples
    assert example.student_ids.tolist() == student(MARKED).input_ids
    assert example.teacher_ids.tolist() == teacher(MARKED).input_ids
    assert len(example.teacher_ids) > len(example.student_ids)


def test_a_post_processor_that_is_set_later_is_seen() -> None:
    student, teacher = fast(), fast()
    pair = Pair(student, teacher, cache_dir=False)
    assert pair.examples(["hi you"]).examples[0].teacher_ids[0] != 0
    teacher.backend_tokenizer.post_processor = BEGIN
    assert pair.examples(["hi you"]).examples[0].teacher_ids[0] == 0
    truncating = plain()
    truncating.enable_truncation(64)
    side = Side("student", truncating)
    assert side.encode(["hi you"])[0][0] != 0
    begins(truncating)
    assert side.encode(["hi you"])[0] == truncating.encode("hi you").ids


def test_a_call_that_splits_special_tokens_leaves_conversations_as_they_are() -> None:
    tokenizer = fast(
        chat_template="{% for m in messages %}{{ m.content }}<|end_of_text|>{% endfor %}"
    )
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "you"}]
    tokenizer(MARKED, split_special_tokens=True)
    (found,) = Encoder(tokenizer).encode_conversation(Conversation.from_messages(talk))
    expected = tokenizer.apply_chat_template(talk)
    assert found.ids.tolist() == list(getattr(expected, "input_ids", expected))


def by_class(directory: Path) -> Path:
    """Up to three digits in a token of the file; the class has one, whatever stands there."""
    tokenizer = plain()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<|end_of_text|>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def test_a_directory_is_what_the_class_of_its_tokenizer_makes_of_it(tmp_path: Path) -> None:
    directory = by_class(tmp_path)
    read = [
        Side("student", directory).vocab,
        Vocab.from_tokenizer(Side("student", directory).tokenizer),
        Projection.build(directory, plain(), cache_dir=False).student,
    ]
    pieces = {tuple(vocab.segment(b"2023")) for vocab in read if vocab is not None}
    ids = Side("student", directory).encode(["2023"])[0]
    assert pieces == {tuple(ids)}
    assert tuple(ids) != tuple(plain().encode("2023").ids)
    assert len({vocab.model_fingerprint for vocab in read if vocab is not None}) == 1


def test_a_vocabulary_of_another_model_is_refused(tmp_path: Path) -> None:
    """As of the same tokens, cut otherwise."""
    directory = by_class(tmp_path)
    side = Side("student", directory, vocab=Vocab.from_path(directory))
    with pytest.raises(PairError, match="reads as fingerprint"):
        side.encode(["2023"])
