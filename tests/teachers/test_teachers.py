"""Teachers: a live model, and the store of its predictions."""

from __future__ import annotations

import copy
import errno
import os
import random
import struct
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_teacher import TOP_K, VOCAB, key_of, make_sequences, make_teacher, padded

from xtoken.errors import NonFiniteError, OptionError, PairError, StoreError
from xtoken.teachers import LiveTeacher, Predictions, StoreKey, TopKStore
from xtoken.teachers.shard import Shard, write_shard
from xtoken.teachers.store import TOKENS_PER_SHARD


def test_a_live_teacher_holds_no_graph_and_keeps_its_evaluation_mode() -> None:
    teacher = make_teacher()
    logits = teacher.logits(*padded(make_sequences([5, 9]), "right"))
    assert not logits.requires_grad
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert teacher.tokens_computed == 14


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_on_either_side_changes_no_logit_of_a_token(side: str) -> None:
    teacher = make_teacher()
    sequences = make_sequences([3, 11, 7])
    ids, mask = padded(sequences, side)
    logits = teacher.logits(ids, mask)
    for row, sequence in enumerate(sequences):
        alone = teacher.logits(torch.from_numpy(sequence)[None], torch.ones(1, len(sequence)))
        torch.testing.assert_close(logits[row, mask[row] == 1], alone[0], rtol=1e-4, atol=1e-5)


def test_the_fingerprint_is_that_of_the_weights(tmp_path: Path) -> None:
    teacher = make_teacher()
    assert teacher.fingerprint == make_teacher().fingerprint
    assert teacher.fingerprint != make_teacher(seed=1).fingerprint
    teacher.model.save_pretrained(tmp_path)
    assert LiveTeacher.from_pretrained(tmp_path).fingerprint == teacher.fingerprint


@pytest.mark.parametrize(
    ("changed", "same"),
    [
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, False),
        ({"rms_norm_eps": 1e-3}, False),
        ({"eos_token_id": 3, "use_cache": False, "architectures": ["Other"]}, True),
    ],
)
def test_the_fingerprint_is_of_what_the_config_has_the_model_do_with_its_weights(
    changed: dict[str, object], same: bool
) -> None:
    ids, seen = torch.arange(6)[None], torch.ones(1, 6)
    teacher, other = make_teacher(), make_teacher()
    cls, config = type(other.model), copy.deepcopy(other.model.config)
    for name, value in changed.items():
        setattr(config, name, value)
    rebuilt = cls(config)
    rebuilt.load_state_dict(teacher.model.state_dict())
    other = LiveTeacher(rebuilt)
    assert (other.fingerprint == teacher.fingerprint) is same
    assert torch.equal(other.logits(ids, seen), teacher.logits(ids, seen)) is same


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_store_returns_what_the_live_teacher_says(tmp_path: Path, side: str) -> None:
    teacher = make_teacher()
    sequences = make_sequences([2, 40, 9, 1])
    store = TopKStore(tmp_path, key_of(teacher))
    assert store.fill(teacher, sequences) == 4
    ids, mask = padded(sequences, side)
    signal = store.signal(ids, mask)
    expected = teacher.logits(ids, mask).log_softmax(-1)
    for row, sequence in enumerate(sequences):
        real = mask[row] == 1
        top = expected[row, real].topk(TOP_K)
        assert torch.equal(signal.ids[row, real], top.indices)
        torch.testing.assert_close(signal.log_probs[row, real], top.values, rtol=1e-4, atol=1e-4)
        rows = torch.arange(len(sequence) - 1)
        actual = expected[row, real][rows, torch.from_numpy(sequence)[1:]]
        stored = signal.token_log_probs[row, real]
        torch.testing.assert_close(stored[:-1], actual, rtol=1e-4, atol=1e-4)
        assert stored[-1] == 0


def test_a_second_epoch_and_a_second_run_compute_nothing(tmp_path: Path) -> None:
    teacher = make_teacher()
    sequences = make_sequences([30] * 8 + [5])
    first = TopKStore(tmp_path, key_of(teacher))
    seen: list[tuple[int, int]] = []
    first.fill(teacher, sequences, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (245, 245)
    computed = teacher.tokens_computed
    assert first.fill(teacher, sequences) == 0
    second = TopKStore(tmp_path, key_of(teacher))
    assert second.fill(teacher, sequences[::-1]) == 0
    assert teacher.tokens_computed == computed
    assert np.array_equal(second.get(sequences[3]).log_probs, first.get(sequences[3]).log_probs)
    more = make_sequences([12], seed=9)
    assert second.fill(teacher, [*sequences, *more, *more]) == 1
    assert teacher.tokens_computed == computed + 12


def test_many_tokens_go_into_several_files_and_all_are_found(tmp_path: Path) -> None:
    teacher = make_teacher()
    sequences = make_sequences([250] * (TOKENS_PER_SHARD // 250 + 2))
    TopKStore(tmp_path, key_of(teacher)).fill(teacher, sequences)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2
    store = TopKStore(tmp_path, key_of(teacher))
    assert all(ids in store for ids in sequences)
    assert len(store) == len(sequences)


def test_a_truncated_file_is_discarded_and_computed_again(tmp_path: Path) -> None:
    teacher = make_teacher()
    sequences = make_sequences([30, 20])
    TopKStore(tmp_path, key_of(teacher)).fill(teacher, sequences)
    (path,) = tmp_path.glob("*.safetensors")
    content = path.read_bytes()
    expected = TopKStore(tmp_path, key_of(teacher)).get(sequences[0])
    for length in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:length])
        store = TopKStore(tmp_path, key_of(teacher))
        assert store.files_discarded == 1
        assert len(store) == 0
        assert store.fill(teacher, sequences) == 2
        assert np.array_equal(store.get(sequences[0]).log_probs, expected.log_probs)


def test_a_file_of_another_teacher_or_setting_is_refused_and_kept(tmp_path: Path) -> None:
    teacher, other = make_teacher(), make_teacher(seed=1)
    TopKStore(tmp_path, key_of(teacher)).fill(teacher, make_sequences([9]))
    with pytest.raises(StoreError, match=r"has teacher = .*use another folder, or move the"):
        TopKStore(tmp_path, key_of(other))
    with pytest.raises(StoreError, match="has top_k = '17', expected '18'"):
        TopKStore(tmp_path, StoreKey(teacher.fingerprint, 18, "float32"))
    with pytest.raises(StoreError, match="has dtype = 'float32', expected 'float16'"):
        TopKStore(tmp_path, key_of(teacher, "float16"))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    teacher = make_teacher()
    teacher.model.save_pretrained(tmp_path)
    with pytest.raises(StoreError, match="holds no teacher predictions"):
        TopKStore(tmp_path, key_of(teacher))


def stored(tmp_path: Path, lengths: tuple[int, ...] = (3, 2)) -> tuple[LiveTeacher, Path]:
    """A store of one small file."""
    teacher = make_teacher()
    TopKStore(tmp_path, key_of(teacher)).fill(teacher, make_sequences(list(lengths)))
    (path,) = tmp_path.glob("*.safetensors")
    return teacher, path


def test_every_flipped_bit_and_every_cut_of_a_file_is_found(tmp_path: Path) -> None:
    """Seeded; XTOKEN_FLIPS=750 draws more."""
    teacher, path = stored(tmp_path)
    content, draws = path.read_bytes(), random.Random(0)
    for _ in range(int(os.environ.get("XTOKEN_FLIPS", "150"))):
        altered = bytearray(content)
        bit = draws.randrange(8 * len(content))
        altered[bit // 8] ^= 1 << bit % 8
        path.write_bytes(altered)
        with pytest.raises(StoreError) as found:
            Shard(path, key_of(teacher))
        assert "\n" not in str(found.value), bit
    for _ in range(30):
        path.write_bytes(content[: draws.randrange(len(content))])
        with pytest.raises(StoreError):
            Shard(path, key_of(teacher))


def test_a_flipped_bit_is_computed_again_and_the_damaged_file_is_kept(tmp_path: Path) -> None:
    teacher, path = stored(tmp_path)
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    store = TopKStore(tmp_path, key_of(teacher))
    assert (len(store), store.files_discarded) == (0, 1)
    assert path.with_name(path.name + ".damaged").read_bytes() == content
    assert store.fill(teacher, make_sequences([3, 2])) == 2
    assert len(TopKStore(tmp_path, key_of(teacher))) == 2


def test_a_file_that_lacks_a_tensor_is_damaged(tmp_path: Path) -> None:
    teacher, path = stored(tmp_path)
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"starts"', b'"startz"'))
    with pytest.raises(StoreError, match="was altered: its checksum differs"):
        Shard(path, key_of(teacher))
    (length,) = struct.unpack("<Q", content[:8])
    path.write_bytes(content[:8] + b"[" * length + content[8 + length :])
    with pytest.raises(StoreError, match="is not a safetensors file"):
        Shard(path, key_of(teacher))


def test_a_file_that_cannot_be_opened_is_an_error_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, path = stored(tmp_path)

    def refused(*_: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr("xtoken._tensor_files._header", refused)
    with pytest.raises(StoreError, match=r"cannot be opened \(Permission denied\); correct its"):
        TopKStore(tmp_path, key_of(teacher))
    assert path.exists()


def test_foreign_files_are_never_touched(tmp_path: Path) -> None:
    teacher = make_teacher()
    for name in ("model.safetensors", "0" * 24 + ".safetensors.bak"):
        (tmp_path / name).write_bytes(b"not whole")
    with pytest.raises(StoreError, match="it is not of this store: move it elsewhere"):
        TopKStore(tmp_path, key_of(teacher))
    assert (tmp_path / "model.safetensors").read_bytes() == b"not whole"


def test_files_are_as_readable_as_the_umask_says(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        _, path = stored(tmp_path)
    finally:
        os.umask(before)
    assert path.stat().st_mode & 0o777 == 0o640


def test_what_a_killed_writer_left_is_removed_and_what_a_living_one_writes_stays(
    tmp_path: Path,
) -> None:
    code = (
        "import os, sys; from xtoken._files import write_atomically\n"
        "write_atomically(sys.argv[1], lambda file: os.kill(os.getpid(), 9))"
    )
    target = tmp_path / "w.safetensors"
    subprocess.run([sys.executable, "-c", code, str(target)], check=False)
    (left,) = tmp_path.glob(".*.xtoken-tmp")
    parts = left.name.split("-")
    alive = tmp_path / "-".join([parts[0], str(os.getpid()), *parts[2:]])
    alive.write_bytes(b"half")
    teacher = make_teacher()
    assert len(TopKStore(tmp_path, key_of(teacher))) == 0
    assert not left.exists()
    assert alive.exists()
    os.utime(alive, (0, 0))
    TopKStore(tmp_path, key_of(teacher))
    assert not alive.exists()


def test_predictions_that_no_softmax_gives_are_not_stored(tmp_path: Path) -> None:
    key = StoreKey("teacher", 2, "float32")
    ids = np.array([[0, 1], [4, 2]])
    log_probs = np.log(np.array([[0.5, 0.25], [0.6, 0.4]], dtype=np.float32))
    good = Predictions(ids, log_probs, np.zeros(2, dtype=np.float32))
    write_shard(tmp_path / "good", key, [b"d" * 16], [np.arange(2)], [good])
    nan = log_probs.copy()
    nan[1, 1] = np.nan
    for wrong, error, message in (
        ({"log_probs": nan}, NonFiniteError, r"nan at position 1 of a sequence of 2.*float32"),
        ({"log_probs": log_probs + 9}, StoreError, r"position 1 sum to 8103.*not logits"),
        ({"ids": np.array([[3, 3], [4, 2]])}, StoreError, "names a teacher column twice"),
        ({"ids": np.array([[-1, 3], [4, 2]])}, StoreError, "or below 0"),
    ):
        with pytest.raises(error, match=message):
            write_shard(
                tmp_path / "wrong", key, [b"d" * 16], [np.arange(2)], [replace(good, **wrong)]
            )
    assert not (tmp_path / "wrong").exists()


def test_a_teacher_that_overflows_leaves_nothing_in_the_store(tmp_path: Path) -> None:
    teacher = make_teacher()
    next(teacher.model.parameters()).data.fill_(float("nan"))
    store = TopKStore(tmp_path, key_of(teacher))
    with pytest.raises(NonFiniteError, match="it overflows in its dtype"):
        store.fill(teacher, make_sequences([4]))
    assert not list(tmp_path.iterdir())


def test_predictions_of_another_tokenizer_are_refused(tmp_path: Path) -> None:
    teacher = make_teacher()
    key = replace(key_of(teacher), tokenizer="a" * 64)
    TopKStore(tmp_path, key).fill(teacher, make_sequences([4]))
    with pytest.raises(PairError, match=r"teacher tokenizer aaaaaaaaaaaa, expected bbbbbbbbbbbb"):
        TopKStore(tmp_path, replace(key, tokenizer="b" * 64))
    store = TopKStore(tmp_path, replace(key, tokenizer=""))
    assert len(store) == 1
    with pytest.raises(PairError, match="fill a store of another folder"):
        TopKStore(tmp_path, key).require_tokenizer("c" * 64)


def test_a_full_disk_costs_the_store_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher = make_teacher()
    sequences = make_sequences([6, 4])
    expected = TopKStore(tmp_path / "whole", key_of(teacher))
    expected.fill(teacher, sequences)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("xtoken._files.to_disk", full)
    store = TopKStore(tmp_path / "full", key_of(teacher), required=False)
    with pytest.warns(UserWarning, match="No space left on device"):
        store.fill(teacher, sequences)
    assert len(store) == 2
    assert store.fill(teacher, sequences) == 0
    for ids in sequences:
        assert np.array_equal(store.get(ids).log_probs, expected.get(ids).log_probs)
    assert not list((tmp_path / "full").iterdir())
    needed = TopKStore(tmp_path / "full", key_of(teacher))
    with pytest.raises(OSError, match="No space left"):
        needed.fill(teacher, sequences)


def test_an_unfinished_write_is_never_read(tmp_path: Path) -> None:
    teacher = make_teacher()
    (tmp_path / ".writing-abc").write_bytes(b"half")
    assert len(TopKStore(tmp_path, key_of(teacher))) == 0


def test_half_precision_stays_within_its_rounding(tmp_path: Path) -> None:
    teacher = make_teacher()
    (ids,) = make_sequences([40])
    exact = TopKStore(tmp_path / "32", key_of(teacher))
    half = TopKStore(tmp_path / "16", key_of(teacher, "float16"))
    exact.fill(teacher, [ids])
    half.fill(teacher, [ids])
    np.testing.assert_allclose(half.get(ids).log_probs, exact.get(ids).log_probs, rtol=2**-11)


def test_bad_requests_name_what_is_wrong(tmp_path: Path) -> None:
    teacher = make_teacher()
    store = TopKStore(tmp_path, key_of(teacher))
    (ids,) = make_sequences([6])
    with pytest.raises(StoreError, match=r"this sequence of 6 teacher tokens .*call fill\(\)"):
        store.get(ids)
    with pytest.raises(StoreError, match="is for teacher"):
        store.fill(make_teacher(seed=1), [ids])
    with pytest.raises(OptionError, match="dtype = 'int8'"):
        TopKStore(tmp_path, key_of(teacher, "int8"))
    with pytest.raises(OptionError, match="top_k = 0"):
        TopKStore(tmp_path, StoreKey(teacher.fingerprint, 0, "float32"))
    wide = TopKStore(tmp_path, StoreKey(teacher.fingerprint, VOCAB + 1, "float32"))
    with pytest.raises(OptionError, match="the teacher has 300 columns; pass a smaller top_k"):
        wide.fill(teacher, [ids])
