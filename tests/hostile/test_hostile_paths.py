"""Whatever stands where a path belongs, the answer is one of our errors, in one line."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from drawing import count, generator
from mutate_json import mutant

from xtoken import Pair, Projection, Vocab, XTokenError
from xtoken._files import sealed
from xtoken.data import load_rows, read_documents
from xtoken.data.stream import DocumentStream
from xtoken.errors import ArgumentTypeError, FailedWriteError, FormatError, MissingFileError
from xtoken.report.curves import draw_curves
from xtoken.teachers import StoreKey, TopKStore
from xtoken.training import DistillConfig, last_whole_checkpoint, load_models
from xtoken.training.metrics_log import read_history
from xtoken.vocab import Side, load_tokenizer

NO_PATHS = (5, 1.5, b"x", True, object(), [None], {"a": 1})
NO_NAMES = (
    *("a\0b", "a\ud800", "a" * 300, "a" * 5000, "a/" * 2500, "a" * 300 + "/b"),
    Path("a" * 300),
)


def pair() -> Pair:
    student = Vocab.from_tokens([b"ab", b"a", b"b", b""], {3: "<e>"}, ranked=True)
    teacher = Vocab.from_tokens([b"b", b"a", b""], {2: "<f>"}, ranked=True)
    return Pair(
        student, teacher, cache_dir=False,
        canonical=["case"], reverse=True, special_roles={"eot": ("<e>", "<f>")},
    )  # fmt: skip


PAIR = pair()
STUDENT, TEACHER = PAIR.student_vocab, PAIR.teacher_vocab
READERS: dict[str, Callable[..., object]] = {
    "Pair": lambda path: Pair(path, TEACHER).sizes,
    "Side.encode": lambda path: Side("student", Path(path)).encode(["a"]),
    "Vocab.from_path": Vocab.from_path,
    "load_tokenizer": load_tokenizer,
    "Projection.build": lambda path: Projection.build(STUDENT, path, cache_dir=False),
    "Pair.load": Pair.load,
    "Projection.load": Projection.load,
    "import_topk_pt": lambda path: Projection.import_topk_pt(path, STUDENT, TEACHER),
    "read_documents": read_documents,
    "read_documents of several": lambda path: read_documents([path]),
    "load_rows": load_rows,
    "DocumentStream": DocumentStream,
    "TopKStore.open": TopKStore.open,
    "DistillConfig.load": DistillConfig.load,
    "load_models": load_models,
    "last_whole_checkpoint": last_whole_checkpoint,
    "read_history": read_history,
}
WRITERS: dict[str, Callable[..., object]] = {
    "Pair.save": PAIR.save,
    "Projection.save": PAIR.projection.save,
    "export_topk_pt": PAIR.projection.export_topk_pt,
    "DistillConfig.save": DistillConfig().save,
    "TopKStore": lambda path: TopKStore(path, StoreKey("t", 6, "float32", "v" * 64)),
    "draw_curves": lambda path: draw_curves({"run": [{"step": 1, "loss": 1.0}]}, path),
}


@pytest.mark.parametrize("name", [*READERS, *WRITERS])
def test_what_is_no_path_is_refused_by_its_class(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call = {**READERS, **WRITERS}[name]
    values = NO_PATHS if name != "Side.encode" else ()
    for value in values:
        with pytest.raises(ArgumentTypeError) as error:
            call(value)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", [*READERS, *WRITERS])
def test_a_name_that_no_file_has_is_refused_in_one_line(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    call = {**READERS, **WRITERS}[name]
    for value in NO_NAMES:
        with pytest.raises(MissingFileError if name in READERS else FailedWriteError) as error:
            call(value)
        text = str(error.value)
        assert "\n" not in text
        assert text.encode()  # it can be printed
        assert len(text) < 1000
    assert not list(tmp_path.iterdir())


def test_a_cache_that_cannot_be_is_done_without_and_no_path_is_refused(tmp_path: Path) -> None:
    for value in NO_NAMES[:-1]:
        with pytest.warns(UserWarning, match="cannot be used"):
            found = Projection.build(STUDENT, TEACHER, cache_dir=value)
        assert found.shape == PAIR.sizes
        with warnings.catch_warnings(action="ignore"):
            store = TopKStore(value, StoreKey("t", 6, "float32", "v" * 64), required=False)
        assert not len(store)
    for none in (5, b"x", object()):
        with pytest.raises(ArgumentTypeError, match=r"cache_dir is a \w+, expected a path; pass a"):
            Projection.build(STUDENT, TEACHER, cache_dir=none)  # type: ignore[arg-type]


WRONG_DESCRIPTIONS: dict[str, dict[str, object]] = {
    "no files": {"files": None},
    "files in a list": {"files": ["student.vocab"]},
    "a checksum that is a number": {"files": {"student.vocab": 5}},
    "no options": {"options": None},
    "a role that is no pair": {"options": {"special_roles": {"eot": 5}}},
    "no fingerprint": {"fingerprint": None},
    "a vocabulary by number": {"student": 5},
    "no label": {"teacher_label": None},
}


@pytest.mark.parametrize("left_out", [True, False])
@pytest.mark.parametrize("name", WRONG_DESCRIPTIONS)
def test_a_saved_pair_whose_description_lacks_a_part_is_refused(
    name: str, left_out: bool, tmp_path: Path
) -> None:
    changed = WRONG_DESCRIPTIONS[name]
    (key,) = changed
    PAIR.save(tmp_path)
    file = tmp_path / "pair.json"
    content = json.loads(file.read_text())
    del content["checksum"], content[key]
    file.write_text(sealed(content if left_out else {**content, **changed}))
    if left_out and key == "teacher_label":  # as earlier versions wrote it
        assert "teacher" in repr(Pair.load(tmp_path))
        return
    with pytest.raises(FormatError, match=rf"pair\.json has .* for '{key}', which Pair\.save"):
        Pair.load(tmp_path)
    PAIR.save(tmp_path)  # as it says
    assert Pair.load(tmp_path).fingerprint == PAIR.fingerprint


def test_a_saved_pair_of_any_description_is_read_or_refused(tmp_path: Path) -> None:
    PAIR.save(tmp_path)
    file = tmp_path / "pair.json"
    document = json.loads(file.read_text())
    del document["checksum"]
    rng = generator("pair.json")
    refused = []
    for _ in range(count(400, 20_000)):
        try:
            text = sealed(json.loads(mutant(document, rng, gently=True)))
        except (ValueError, RecursionError):
            continue
        file.write_text(text)
        try:
            repr(Pair.load(tmp_path))
        except XTokenError as error:
            refused.append(str(error))
    assert refused
    assert not any("\n" in each for each in refused)
