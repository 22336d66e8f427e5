"""Projections on disk: round trip, wrong pairs, damaged files, the cache, the .pt tables."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import multiprocessing
import os
import pickle
import random
import struct
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizer_zoo as zoo
import torch
from cache_worker import build_and_count
from safetensors import safe_open

from xtoken import Projection, Vocab, __version__
from xtoken._files import cache_directory
from xtoken.errors import (
    FormatError,
    OptionError,
    PairError,
    ShapeError,
    UnavailableCacheWarning,
    XTokenError,
)
from xtoken.projection.cache import build_cached, cache_key
from xtoken.projection.file import read_arrays, save, write_arrays
from xtoken.projection.options import ProjectionOptions

ARRAYS = ("indptr", "indices", "weights", "rules", "pieces_indptr", "pieces")


@pytest.fixture(name="w", scope="module")
def _w() -> Projection:
    """DeepSeek packs three digits into a token; this teacher spells one digit a token."""
    pair = zoo.vocab(zoo.deepseek()), zoo.vocab(zoo.byte_level_bpe(2000, 1))
    return Projection.build(*pair, cache_dir=False)


@pytest.fixture(name="path")
def _path(w: Projection, tmp_path: Path) -> Path:
    w.save(tmp_path / "w.safetensors")
    return tmp_path / "w.safetensors"


def assert_equal(one: Projection, other: Projection) -> None:
    for name in ARRAYS:
        assert np.array_equal(getattr(one, name), getattr(other, name)), name
        assert getattr(one, name).dtype == getattr(other, name).dtype
    assert one.shape == other.shape
    assert one.options == other.options


# Save and load.


def test_a_saved_projection_loads_as_it_was(w: Projection, path: Path) -> None:
    assert_equal(w, Projection.load(path))
    loaded = Projection.load(path, w.student, w.teacher)
    assert_equal(w, loaded)
    assert str(loaded.explain("201")) == str(w.explain("201"))
    assert loaded.stats() == w.stats()
    with pytest.raises(OptionError, match=r"pass both tokenizers to Projection\.load"):
        Projection.load(path).explain("201")


def test_equal_projections_are_equal_files(w: Projection, tmp_path: Path) -> None:
    """safetensors shuffles the metadata of each file."""
    for number in range(6):
        w.save(tmp_path / str(number))
    files = [(tmp_path / str(number)).read_bytes() for number in range(6)]
    assert len(set(files)) == 1
    (length,) = struct.unpack_from("<Q", files[0])
    assert length % 8 == 0  # the data are aligned
    header = json.loads(files[0][8 : 8 + length])
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])
    with safe_open(tmp_path / "0", "np") as file:
        assert file.metadata() == header["__metadata__"]
        for name, array in read_arrays(tmp_path / "0")[0].items():
            assert np.array_equal(file.get_tensor(name), array), name
    assert_equal(w, Projection.load(tmp_path / "0"))


def test_the_file_names_its_pair_its_options_and_the_library(w: Projection, path: Path) -> None:
    _, metadata = read_arrays(path)
    assert metadata["student_fingerprint"] == w.student_fingerprint
    assert metadata["teacher_fingerprint"] == w.teacher_fingerprint
    assert json.loads(metadata["options"])["decay"] == 0.1
    assert metadata["library_version"] == __version__


def test_a_projection_of_another_pair_is_refused_by_side(w: Projection, path: Path) -> None:
    other = zoo.byte_level_bpe(2000, 2)
    with pytest.raises(PairError, match=r"another teacher: V = 2000.*build W for this pair"):
        Projection.load(path, w.student, other)
    with pytest.raises(PairError, match="another student: V = 129280"):
        Projection.load(path, other, w.teacher)
    with pytest.raises(PairError, match="student and teacher are swapped"):
        Projection.load(path, w.teacher, w.student)


def test_a_tokenizer_with_the_same_tokens_but_other_merges_is_another_one(
    w: Projection, path: Path, tmp_path: Path
) -> None:
    state = json.loads(zoo.byte_level_bpe(2000, 1).to_str())
    state["model"]["merges"].reverse()
    teacher = Vocab.from_tokenizer_json(json.dumps(state).encode())
    assert teacher.fingerprint == w.teacher_fingerprint
    with pytest.raises(PairError, match="built for a teacher with the same tokens that segments"):
        Projection.load(path, w.student, teacher)
    Projection.build(w.teacher, w.student, cache_dir=False).save(tmp_path / "mirror")
    with pytest.raises(PairError, match="built for a student with the same tokens that segments"):
        Projection.load(tmp_path / "mirror", teacher, w.student)


@pytest.mark.parametrize("kept", [0, 5, 100, 20_000, -1])
def test_a_truncated_file_is_called_truncated(path: Path, kept: int) -> None:
    content = path.read_bytes()
    path.write_bytes(content[:kept])
    with pytest.raises(FormatError, match=rf"{path.name} is truncated"):
        Projection.load(path)


def test_an_altered_file_is_called_altered(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(FormatError, match="was altered: its checksum differs"):
        Projection.load(path)
    content[-20] ^= 1
    altered = bytes(content).replace(b'\\"decay\\": 0.1', b'\\"decay\\": 0.2')
    assert altered != bytes(content)
    path.write_bytes(altered)
    with pytest.raises(FormatError, match="was altered"):
        Projection.load(path)


def test_what_is_no_projection_is_refused_with_what_it_is(tmp_path: Path, w: Projection) -> None:
    from safetensors.numpy import save_file

    path = tmp_path / "file"
    with pytest.raises(FileNotFoundError, match=r"does not exist.*Projection\.save"):
        Projection.load(path)
    save_file({"x": np.zeros(3)}, path)
    with pytest.raises(FormatError, match="holds no projection"):
        Projection.load(path)
    path.write_bytes(b"PK\x03\x04 not a table" * 10)
    with pytest.raises(FormatError, match=r"not a safetensors file.*import_topk_pt"):
        Projection.load(path)
    path.write_bytes(pickle.dumps({"a": 1}) * 20)
    with pytest.raises(FormatError, match="not a safetensors file"):
        Projection.load(path)
    path.write_bytes(struct.pack("<Q", 8) + b"12345678")
    with pytest.raises(FormatError, match="not a safetensors file"):
        Projection.load(path)
    with pytest.raises(OSError, match="No such file"):
        w.save(tmp_path / "missing" / "w.safetensors")


def test_a_file_of_a_newer_format_asks_for_an_update(
    w: Projection, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xtoken.projection.file.FORMAT_VERSION", 2)
    save(w, path)
    monkeypatch.undo()
    with pytest.raises(FormatError, match=r"has format 2.*update xtoken"):
        Projection.load(path)


def test_an_interrupted_write_leaves_the_old_file_and_nothing_beside_it(
    w: Projection, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_bytes()

    def fail(_descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        w.save(path)
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


# The cache.


def test_processes_that_start_at_once_build_once(tmp_path: Path) -> None:
    arguments = [(str(tmp_path / "log"), str(tmp_path / "cache"))] * 8
    with multiprocessing.get_context("spawn").Pool(8) as pool:
        assert pool.starmap(build_and_count, arguments) == [3] * 8
    assert (tmp_path / "log").read_text() == "built\n"


def test_the_cache_is_read_back_and_told_apart_by_pair_and_options(tmp_path: Path) -> None:
    student, teacher = zoo.byte_level_bpe(), zoo.byte_level_bpe(2000, 1)
    first = Projection.build(student, teacher, cache_dir=tmp_path)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == 1
    stamp = files[0].stat().st_mtime_ns
    again = Projection.build(student, teacher, cache_dir=tmp_path)
    assert_equal(first, again)
    assert str(again.explain("201")) == str(first.explain("201"))
    assert files[0].stat().st_mtime_ns == stamp
    Projection.build(student, teacher, decay=0.2, cache_dir=tmp_path)
    Projection.build(teacher, student, cache_dir=tmp_path)
    roles = Vocab.from_tokenizer(student).with_roles({"eos": None})
    Projection.build(roles, teacher, cache_dir=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4


def test_a_damaged_cache_file_is_built_again(tmp_path: Path) -> None:
    pair = zoo.byte_level_bpe(), zoo.byte_level_bpe(2000, 1)
    first = Projection.build(*pair, cache_dir=tmp_path)
    file = next(tmp_path.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:1000])
    assert_equal(Projection.build(*pair, cache_dir=tmp_path), first)
    assert_equal(Projection.load(file), first)


def test_a_cache_that_cannot_be_written_does_not_stop_the_build(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    pair = zoo.byte_level_bpe(), zoo.byte_level_bpe(2000, 1)
    with pytest.warns(UnavailableCacheWarning, match="is computed and not kept") as warned:
        w = Projection.build(*pair, cache_dir=tmp_path / "file" / "cache")
    assert len(warned) == 1
    # Once per folder, not per call: a second warning would be an error here.
    Projection.build(*pair, cache_dir=tmp_path / "file" / "cache")
    assert w.stats()["exact"] > 1000


def test_a_full_disk_under_the_cache_costs_the_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("xtoken._files.to_disk", full)
    pair = zoo.byte_level_bpe(), zoo.byte_level_bpe(2000, 1)
    with pytest.warns(UnavailableCacheWarning, match="No space left"):
        w = Projection.build(*pair, cache_dir=tmp_path)
    assert w.stats()["exact"] > 1000
    assert not list(tmp_path.glob("*.safetensors")) + list(tmp_path.glob(".*.xtoken-tmp"))


def test_a_cache_on_a_file_system_without_locks_is_used_without_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    pair = zoo.byte_level_bpe(), zoo.byte_level_bpe(2000, 1)
    first = Projection.build(*pair, cache_dir=tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    content = file.read_bytes()
    assert_equal(Projection.build(*pair, cache_dir=tmp_path), first)
    file.unlink()
    Projection.build(*pair, cache_dir=tmp_path)  # the lock's file is there
    assert file.read_bytes() == content


def test_an_error_of_the_build_is_none_of_the_cache(tmp_path: Path) -> None:
    vocab = Vocab.from_tokens([b"a", b"b", b"ab"], ranked=True)
    error, calls = TimeoutError(110, "Connection timed out"), []

    def build() -> Projection:
        calls.append(1)
        raise error

    with pytest.raises(TimeoutError) as raised:
        build_cached(Projection, vocab, vocab, ProjectionOptions(), tmp_path, build)
    assert raised.value is error
    assert len(calls) == 1


def test_rows_that_sum_to_other_than_one_are_refused_though_the_checksum_fits(
    w: Projection, path: Path
) -> None:
    arrays, metadata = read_arrays(path)
    for factor, total in ((2, "2.0000"), (0, "0.0000")):
        weights = arrays["weights"].copy()
        weights[: int(arrays["indptr"][1])] *= factor
        write_arrays(path, {**arrays, "weights": weights}, metadata)
        with pytest.raises(ShapeError, match=rf"row \d+ of W sums to {total}.*build W again"):
            Projection.load(path)


def test_rows_by_hand_are_distributions_by_falling_weight(w: Projection) -> None:
    with pytest.raises(ShapeError, match=r"row \d+ of W sums to 0\.5000.*its with_weights"):
        replace(w, weights=w.weights / 2)
    row = int(np.flatnonzero(np.diff(w.indptr) > 1)[0])
    part = slice(w.indptr[row], w.indptr[row + 1])
    weights = w.weights.copy()
    weights[part] = weights[part][::-1]
    with pytest.raises(ShapeError, match=rf"row {row} of W is not sorted by falling weight"):
        replace(w, weights=weights)
    # The remedy.
    assert np.array_equal(w.with_weights(w.weights / 2).indices, w.indices)
    assert w.with_weights(weights).csr.row(row)[0].tolist() == w.indices[part][::-1].tolist()


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_every_flipped_bit_and_every_cut_is_found_or_harmless(tmp_path: Path, kind: str) -> None:
    """Seeded; XTOKEN_FLIPS=1500 draws more."""
    pair = _pair()
    path = tmp_path / f"w.{kind}"
    w = Projection.build(*pair, cache_dir=False)
    if kind == "pt":
        w.export_topk_pt(path)
    else:
        w.save(path)
    content, draws = path.read_bytes(), random.Random(0)

    def read() -> Projection:
        return Projection.import_topk_pt(path, *pair) if kind == "pt" else Projection.load(path)

    expected = read()
    for _ in range(int(os.environ.get("XTOKEN_FLIPS", "150"))):
        altered = bytearray(content)
        bit = draws.randrange(8 * len(content))
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        with contextlib.suppress(XTokenError):
            found = read()
            assert np.array_equal(found.indptr, expected.indptr), bit
            assert np.array_equal(found.indices, expected.indices), bit
            assert np.array_equal(found.weights, expected.weights), bit
    for _ in range(30):
        path.write_bytes(content[: draws.randrange(len(content))])
        with pytest.raises(FormatError, match=r"truncated or not|is truncated"):
            read()


@pytest.mark.parametrize("name", ["tokenizer.json", "w.safetensors", "empty", "text.zip"])
def test_a_wrong_file_in_place_of_a_table_is_one_line(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "text.zip":
        with zipfile.ZipFile(path, "w") as file:
            file.writestr("a/data.pkl", "text")
    else:
        path.write_bytes({"tokenizer.json": b'{"model": {}}', "empty": b""}.get(name, b"\0" * 99))
    with pytest.raises(FormatError) as refused:
        Projection.import_topk_pt(path, *_pair())
    assert "\n" not in str(refused.value)


def test_a_header_nested_too_deeply_and_an_f8_tensor_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "deep.safetensors"
    header = b'{"a":' + b"[" * 10**5 + b"]" * 10**5 + b"}"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(FormatError, match="nested too deeply"):
        Projection.load(path)
    deep_shape = b'{"a":{"dtype":"F32","shape":' + b"[" * 10**5 + b"]" * 10**5 + b"}}"
    path.write_bytes(struct.pack("<Q", len(deep_shape)) + deep_shape)
    with pytest.raises(FormatError, match="nested too deeply"):
        Projection.load(path)
    metadata = '{"__metadata__":{"format":"xtoken-projection"},'
    header = (metadata + '"a":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}').encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0")
    with pytest.raises(FormatError, match="tensor a has dtype 'F8_E4M3', expected one of U8"):
        Projection.load(path)


def test_the_environment_says_where_the_cache_is_and_whether(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XTOKEN_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    assert cache_directory(False) is None
    assert cache_directory("there") == Path("there")
    for off in ("off", "0", ""):
        monkeypatch.setenv("XTOKEN_CACHE", off)
        assert cache_directory() is None
    monkeypatch.delenv("XTOKEN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_directory() == tmp_path / "x" / "xtoken"


def test_the_cache_key_is_stable() -> None:
    student, teacher = (Vocab.from_tokens([b"a"], ranked=True) for _ in range(2))
    options = ProjectionOptions()
    assert cache_key(student, teacher, options) == cache_key(student, teacher, options)
    assert cache_key(student, teacher, replace(options, top_k=5)) != cache_key(
        student, teacher, options
    )


# Tables of NeMo-RL and TRL.


def test_a_table_has_the_layout_that_nemo_rl_and_trl_read(w: Projection, tmp_path: Path) -> None:
    w.export_topk_pt(tmp_path / "w.pt")
    table = torch.load(tmp_path / "w.pt", weights_only=True)
    assert table["indices"].dtype == torch.int64
    assert table["likelihoods"].dtype == torch.float32
    assert table["indices"].shape == table["likelihoods"].shape == (w.shape[0], 4)
    assert w.student is not None
    assert w.teacher is not None
    numeral = table["indices"][w.student.id_of(b"201")].tolist()
    assert numeral == [*(w.teacher.id_of(digit) for digit in (b"2", b"0", b"1")), -1]
    weights = table["likelihoods"][w.student.id_of(b"201")].tolist()
    assert [round(weight, 4) for weight in weights] == [0.9009, 0.0901, 0.0090, 0.0]
    # Their strict rule: the first likelihood is 1.0 and the second index -1.
    strict = (table["likelihoods"][:, 0] == 1.0) & (table["indices"][:, 1] == -1)
    assert bool(strict[w.student.id_of(b" the")])
    assert not bool(strict[w.student.id_of(b"201")])


def test_a_table_holds_the_papers_cases(tmp_path: Path) -> None:
    ascii_bytes = [bytes([byte]) for byte in range(128)]
    student = Vocab.from_tokens([*ascii_bytes, b"201", b"Hundreds", b"reds"], ranked=True)
    pieces = [b"Hu", b"nd", b"Hund", b"re", b"ds", b"reds"]
    teacher = Vocab.from_tokens([*ascii_bytes, *pieces], ranked=True)
    Projection.build(student, teacher, cache_dir=False).export_topk_pt(tmp_path / "w.pt")
    table = torch.load(tmp_path / "w.pt", weights_only=True)

    def row(token: bytes) -> list[tuple[bytes, float]]:
        indices = table["indices"][student.id_of(token)].tolist()
        weights = table["likelihoods"][student.id_of(token)].tolist()
        assert all((t == -1) == (x == 0) for t, x in zip(indices, weights, strict=True))
        return [
            (teacher.token_bytes(t), round(x, 4))
            for t, x in zip(indices, weights, strict=True)
            if t >= 0
        ]

    assert row(b"201") == [(b"2", 0.9009), (b"0", 0.0901), (b"1", 0.0090)]
    assert row(b"Hundreds") == [(b"Hund", 0.9091), (b"reds", 0.0909)]
    assert row(b"reds") == [(b"reds", 1.0)]


def test_a_table_comes_back_as_it_was(w: Projection, tmp_path: Path) -> None:
    w.export_topk_pt(tmp_path / "w.pt")
    back = Projection.import_topk_pt(tmp_path / "w.pt", w.student, w.teacher)
    for name in ("indptr", "indices"):
        assert np.array_equal(getattr(back, name), getattr(w, name))
    np.testing.assert_allclose(back.weights, w.weights, rtol=1e-6)
    assert back.stats()["exact"] == w.stats()["exact"]
    assert back.stats()["empty"] == w.stats()["empty"]
    assert back.explain("201").rule == "imported"
    assert np.array_equal(back.common_set(), w.common_set())
    back.save(tmp_path / "w.safetensors")
    assert_equal(Projection.load(tmp_path / "w.safetensors"), back)


def _pair() -> tuple[Vocab, Vocab]:
    student = Vocab.from_tokens([b"ab", b"c", b""], {2: "<s>"}, ranked=True)
    return student, Vocab.from_tokens([b"a", b"b", b"c"], ranked=True)


def _table(path: Path, **changes: Any) -> Path:
    table = {
        "indices": torch.tensor([[1, 0], [2, -1], [-1, -1], [-1, -1]]),
        "likelihoods": torch.tensor([[0.25, 0.75], [1.0, 0.0], [0.0, 0.0], [0.0, 0.0]]),
    }
    torch.save(table | changes, path)
    return path


def test_a_foreign_table_may_hold_padded_rows_in_any_order(tmp_path: Path) -> None:
    back = Projection.import_topk_pt(_table(tmp_path / "w.pt"), *_pair())
    assert back.indices.tolist() == [0, 1, 2]
    assert back.weights.tolist() == [0.75, 0.25, 1.0]
    assert [back.explain(i).rule for i in range(3)] == ["imported", "exact", "unpaired"]


def test_one_id_twice_in_a_row_is_one_entry(tmp_path: Path) -> None:
    path = _table(
        tmp_path / "w.pt",
        indices=torch.tensor([[1, 0, 1], [2, 2, -1], [-1, -1, -1]]),
        likelihoods=torch.tensor([[0.25, 0.375, 0.375], [0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]),
    )
    back = Projection.import_topk_pt(path, *_pair())
    assert back.indices.tolist() == [1, 0, 2]
    assert back.weights.tolist() == [0.625, 0.375, 1.0]
    assert back.explain(1).rule == "exact"
    assert back.to_torch().to_dense().tolist() == [[0.375, 0.625, 0], [0, 0, 1], [0, 0, 0]]
    doubled = replace(back, indices=np.array([1, 1, 2]))
    with pytest.raises(ShapeError, match="row 0 has column 1 twice; add up its weights"):
        doubled.to_torch()


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        (
            {"indices": torch.zeros(2, 2)},
            FormatError,
            "expected dense tensors of whole numbers.*one shape",
        ),
        ({"indices": None}, FormatError, "expected tensors 'indices' and 'likelihoods'"),
        (
            {"indices": torch.tensor([[3, 0], [2, -1], [-1, -1], [-1, -1]])},
            ShapeError,
            r"\[0, 3\); expected|expected columns in \[0, 3\)",
        ),
        (
            {"indices": torch.tensor([[-2, 0], [2, -1], [-1, -1], [-1, -1]])},
            FormatError,
            "indices holds -2",
        ),
        (
            {"likelihoods": torch.tensor([[0.25, 0.2], [1.0, 0], [0, 0], [0, 0]])},
            FormatError,
            "row 0 sums to 0.4500.*normalize=True",
        ),
        (
            {"likelihoods": torch.tensor([[0.25, float("nan")], [1.0, 0], [0, 0], [0, 0]])},
            FormatError,
            "negative or non-finite",
        ),
        (
            {
                "indices": torch.tensor([[0, 1], [2, -1]]),
                "likelihoods": torch.tensor([[0.5, 0.5], [1, 0]]),
            },
            ShapeError,
            "holds 2 rows, the student tokenizer 3 tokens",
        ),
        ({"student_fingerprint": "0" * 64}, PairError, "another student"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    path = _table(tmp_path / "w.pt", **changes)
    with pytest.raises(error, match=message):
        Projection.import_topk_pt(path, *_pair())


def test_rows_are_scaled_when_asked(tmp_path: Path) -> None:
    path = _table(
        tmp_path / "w.pt", likelihoods=torch.tensor([[0.3, 0.1], [0.5, 0], [0, 0], [0, 0]])
    )
    back = Projection.import_topk_pt(path, *_pair(), normalize=True)
    assert back.weights.tolist() == [0.75, 0.25, 1.0]


class _Hostile:
    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, ("echo owned > owned",))


def test_a_foreign_pickle_is_refused_and_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"indices": _Hostile()}, "w.pt")
    with pytest.raises(FormatError, match="a pickle can run code"):
        Projection.import_topk_pt("w.pt", *_pair())
    Path("w.pt").write_bytes(b"not a torch file")
    with pytest.raises(FormatError, match="not a torch file"):
        Projection.import_topk_pt("w.pt", *_pair())
    torch.save([1], "w.pt")
    with pytest.raises(FormatError, match="holds a list"):
        Projection.import_topk_pt("w.pt", *_pair())
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Projection.import_topk_pt("none.pt", *_pair())
    assert not Path("owned").exists()


# Learned weights.


def test_a_learned_w_is_saved_and_loaded_like_w(w: Projection, tmp_path: Path) -> None:
    from xtoken.tensors.projection import SparseProjection

    module = SparseProjection.from_projection(w, learnable=True)
    np.testing.assert_allclose(module.values().detach().numpy(), w.weights, rtol=1e-5)
    optimizer = torch.optim.SGD(module.parameters(), lr=50.0)
    probs = torch.rand(4, w.shape[0], generator=torch.Generator().manual_seed(0))
    probs = probs / probs.sum(1, keepdim=True)
    assert w.teacher is not None
    target = w.teacher.id_of(b"0")
    for _ in range(3):
        optimizer.zero_grad()
        (-module.project(probs)[:, target].log().sum()).backward()
        optimizer.step()
    learned = w.with_weights(module.values().detach())
    assert learned.options.origin == "learned"
    np.testing.assert_allclose(learned.csr.row_sums(), w.csr.row_sums(), atol=1e-6)
    assert not np.array_equal(learned.weights, w.weights)
    learned.save(tmp_path / "w.safetensors")
    loaded = Projection.load(tmp_path / "w.safetensors", w.student, w.teacher)
    assert_equal(learned, loaded)
    again = SparseProjection.from_projection(loaded, learnable=True)
    with torch.no_grad():
        torch.testing.assert_close(again.project(probs), module.project(probs))


def test_weights_that_do_not_fit_are_refused(w: Projection) -> None:
    with pytest.raises(ShapeError, match="weights has shape"):
        w.with_weights([1.0])
    bad = w.weights.copy()
    bad[3] = np.nan
    with pytest.raises(ShapeError, match="negative or non-finite"):
        w.with_weights(bad)
    with pytest.raises(OptionError, match="row 0 are all 0"):
        w.with_weights(np.zeros(len(w.weights)))
