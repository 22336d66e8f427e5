"""The demo's material: real text, a real teacher, and a student whose tokenizer packs digits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from demo.__main__ import OPTIONS
from demo.corpus import Corpus, build_corpus, sample, write_jsonl
from demo.student import prepare_student
from xtoken import Vocab
from xtoken.data import read_texts
from xtoken.training.config import DistillConfig
from xtoken.training.evaluate import DIGIT, NUMERAL


def test_a_student_with_random_weights_is_trained_at_a_rate_of_its_own() -> None:
    given = dict(zip(OPTIONS[::2], OPTIONS[1::2], strict=False))
    assert (given["--learning-rate"], given["--warmup-steps"]) == ("3e-3", "10")
    assert DistillConfig().learning_rate < 1e-4


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return build_corpus(seed=0)


def test_the_corpus_holds_prose_and_numbers_on_both_sides(corpus: Corpus) -> None:
    for part, least in ((corpus.train, 100_000), (corpus.held_out, 5_000)):
        for kind in ("prose", "numbers"):
            assert sum(len(item.text) for item in part if item.kind == kind) > least
    numbers = "".join(item.text for item in corpus.train if item.kind == "numbers")
    assert len(re.findall(r"\b[0-9]{2,3}\b", numbers)) > 8_000


def test_no_paragraph_or_sentence_is_both_trained_on_and_held_out(corpus: Corpus) -> None:
    def pieces(kind: str, side: str) -> set[str]:
        mark = "\n" if kind == "numbers" else "\n\n"
        part = corpus.train if side == "train" else corpus.held_out
        texts = [item.text.split(mark) for item in part if item.kind == kind]
        return {" ".join(piece.split()) for pieces in texts for piece in pieces}

    for kind in ("prose", "numbers"):
        shared = pieces(kind, "train") & pieces(kind, "held_out")
        # A long paragraph is cut at line ends: a bare line such as `pass` may occur on both sides.
        assert not [piece for piece in shared if len(piece) > 60]


def test_no_document_is_on_both_sides(corpus: Corpus) -> None:
    train, held_out = (
        {item.source for item in part if item.source.startswith("pydoc_data")}
        for part in (corpus.train, corpus.held_out)
    )
    assert train
    assert held_out
    assert not train & held_out


def test_the_corpus_is_the_same_for_a_seed(corpus: Corpus, monkeypatch: pytest.MonkeyPatch) -> None:
    assert build_corpus(seed=0) == corpus
    # The prose, which takes a second to read, is the same for all.
    prose = [document for document in corpus.train if document.kind == "prose"]
    monkeypatch.setattr("demo.corpus.prose_documents", lambda: prose)
    assert build_corpus(seed=1) != build_corpus(seed=0)
    assert sample(corpus.train, 50, 0.4, seed=3) == sample(corpus.train, 50, 0.4, seed=3)


def test_a_sample_has_the_asked_share_of_numbers_and_is_read_back(
    corpus: Corpus, tmp_path: Path
) -> None:
    drawn = sample(corpus.train, 50, 0.4, seed=0)
    assert sum(item.kind == "numbers" for item in drawn) == 20
    assert len(set(drawn)) == 50
    write_jsonl(drawn, tmp_path / "data.jsonl")
    assert read_texts(tmp_path / "data.jsonl") == [item.text for item in drawn]


def test_the_student_packs_every_numeral_of_up_to_three_digits(
    corpus: Corpus, tmp_path: Path
) -> None:
    texts = [item.text for item in corpus.train]
    prepare_student(tmp_path / "one", texts, seed=0)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "one")
    assert len(tokenizer) == 8192
    for numeral in [f"{n:0{width}}" for width in (1, 2, 3) for n in range(10**width)]:
        assert len(tokenizer(numeral, add_special_tokens=False).input_ids) == 1
    assert tokenizer.tokenize("12345") == ["123", "45"]

    vocab = Vocab.from_tokenizer(tokenizer)
    known = [vocab.token_bytes(i) for i in range(len(vocab)) if not vocab.is_special(i)]
    assert sum(bool(NUMERAL.fullmatch(token)) for token in known) == 1100
    assert sum(bool(DIGIT.fullmatch(token)) for token in known) == 10

    prepare_student(tmp_path / "two", texts, seed=0)
    prepare_student(tmp_path / "three", texts, seed=1)
    one, two, three = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict()
        for name in ("one", "two", "three")
    )
    assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert not torch.equal(one["lm_head.weight"], three["lm_head.weight"])
