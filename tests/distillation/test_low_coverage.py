"""Chunks that teach little of a text are warned of on every path that counts them."""

import collections
import json
import sys
import warnings
from pathlib import Path

import pytest
import torch
from tokenizer_zoo import byte_level_bpe, wordpiece

import xtoken
from xtoken.cli import main
from xtoken.errors import LowCoverageWarning

SHORT = "naïve café Ärger"
TEXT = " ".join([SHORT] * 20)
ADVICE = (
    r"chunks teach \d+% of the student's tokens; likely cause: the (student|teacher)'s WordPiece"
)


@pytest.fixture(scope="module")
def pair() -> xtoken.Pair:
    return xtoken.Pair(wordpiece(), byte_level_bpe())


@pytest.fixture(autouse=True)
def no_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path))


def logits(pair: xtoken.Pair, batch) -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(
        torch.zeros(*ids.shape, size)
        for ids, size in zip((batch.student_ids, batch.teacher_ids), pair.sizes, strict=True)
    )


def test_collation_warns_once(pair: xtoken.Pair) -> None:
    distiller = pair.distiller("p-kl")
    with pytest.warns(LowCoverageWarning, match=ADVICE):
        distiller.collate([TEXT])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller.collate([TEXT])


def test_a_batch_that_something_else_collated_is_warned_of_by_the_loss(pair: xtoken.Pair) -> None:
    distiller = pair.distiller("p-kl")
    batch = distiller.prepared(distiller.collator(distiller.examples([TEXT])))
    with pytest.warns(LowCoverageWarning, match=ADVICE):
        distiller(*logits(pair, batch), batch)


def test_each_of_several_teachers_is_warned_of(pair: xtoken.Pair) -> None:
    student, lossy = pair.teacher.source, pair.student.source
    pairs = [xtoken.Pair(student, teacher) for teacher in (student, lossy)]
    distiller = xtoken.distiller([one.distiller("p-kl") for one in pairs])
    batch = distiller.collate([TEXT])
    student, *signals = (
        logits(one, part)[side]
        for one, part, side in zip(
            (pairs[0], *pairs), (batch.batches[0], *batch.batches), (0, 1, 1), strict=True
        )
    )
    with pytest.warns(LowCoverageWarning, match=ADVICE) as warned:
        distiller(student, signals, batch)
    assert len([each for each in warned if each.category is LowCoverageWarning]) == 1


def test_small_batches_add_up(pair: xtoken.Pair) -> None:
    distiller = pair.distiller("p-kl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        distiller.collate([SHORT])
    with pytest.warns(LowCoverageWarning, match=ADVICE):
        collections.deque((distiller.collate([SHORT]) for _ in range(40)), maxlen=0)


def test_a_good_beginning_hides_nothing(pair: xtoken.Pair) -> None:
    distiller = pair.distiller("p-kl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(20):
            distiller.collate([" ".join(["answer"] * 100)])
    with pytest.warns(LowCoverageWarning, match=ADVICE):
        distiller.collate([TEXT])


def test_no_teacher_no_warning(pair: xtoken.Pair) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pair.distiller("ce").collate([TEXT])
        pair.distiller("p-kl", kd_weight=0.0, ce_weight=1.0).collate([TEXT])


@pytest.mark.parametrize("corpus", [False, True], ids=["text", "corpus"])
def test_align_warns_in_one_line(
    pair: xtoken.Pair,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    corpus: bool,
) -> None:
    for side in pair.sides:
        (tmp_path / side.name).mkdir()
        side.source.save(str(tmp_path / side.name / "tokenizer.json"))
    (tmp_path / "text.txt").write_text(TEXT)
    (tmp_path / "texts.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    arguments = ["align", "--student", str(tmp_path / "student")]
    arguments += ["--teacher", str(tmp_path / "teacher")]
    if corpus:
        arguments += ["--batch", str(tmp_path / "texts.jsonl"), "--out", str(tmp_path / "out")]
    else:
        arguments.append(str(tmp_path / "text.txt"))
    monkeypatch.setattr(sys, "argv", ["xtoken", *arguments])
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        with pytest.raises(SystemExit) as stopped:
            main()
    assert not stopped.value.code
    lines = capsys.readouterr().err.splitlines()
    (line,) = [each for each in lines if each.startswith("warning:")]
    assert "of the bytes of one and the same text are in EXACT chunks; likely cause" in line
