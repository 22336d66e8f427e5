"""What a store keeps of predictions, in which bytes, and what it is found by."""

from __future__ import annotations

import errno
import fcntl
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_teacher import TOP_K, make_sequences, make_teacher, padded

from xtoken._files import read_json, sealed, unsealed
from xtoken._tensor_files import read_tensors, write_tensors
from xtoken.errors import DamagedStoreError, MissingFileError, OptionError, StoreError
from xtoken.teachers import Predictions, StoreKey, TopKStore
from xtoken.teachers.shard import FORMAT, Shard, write_shard
from xtoken.teachers.store import _digest
from xtoken.teachers.store_notes import StoreNotes

WIDE = 200


def filled(folder: Path, lengths: list[int], **settings: object) -> tuple[TopKStore, list]:
    teacher = make_teacher()
    key = StoreKey(teacher.fingerprint, WIDE, "float32", **settings)  # type: ignore[arg-type]
    store = TopKStore(folder, key)
    sequences = make_sequences(lengths)
    store.fill(teacher, sequences)
    return store, sequences


def test_a_mass_keeps_the_fewest_columns_that_reach_it(tmp_path: Path) -> None:
    whole, sequences = filled(tmp_path / "whole", [30, 9])
    for dtype in ("float32", "float16", "uint8"):
        teacher = make_teacher()
        key = StoreKey(teacher.fingerprint, WIDE, dtype, mass=0.9)
        store = TopKStore(tmp_path / dtype, key)
        store.fill(teacher, sequences)
        for ids in sequences:
            exact, kept = whole.get(ids), store.get(ids)
            probs = np.exp(exact.log_probs.astype(np.float64))
            for row in range(len(ids)):
                count = int((np.cumsum(probs[row]) < 0.9).sum()) + 1
                named = ~np.isneginf(kept.log_probs[row])
                assert named.sum() == min(count, WIDE)
                assert np.array_equal(kept.ids[row, named], exact.ids[row, : named.sum()])


def test_log_probabilities_of_one_byte_keep_the_mass_and_stay_within_a_step(tmp_path: Path) -> None:
    whole, sequences = filled(tmp_path / "whole", [40])
    teacher = make_teacher()
    store = TopKStore(tmp_path / "small", StoreKey(teacher.fingerprint, WIDE, "uint8"))
    store.fill(teacher, sequences)
    exact, found = whole.get(sequences[0]), store.get(sequences[0])
    assert np.array_equal(exact.ids, found.ids)
    # Half a step, and what restores the sum.
    assert np.abs(found.log_probs - exact.log_probs).max() < 0.05
    masses = [np.exp(each.log_probs.astype(np.float64)).sum(-1) for each in (exact, found)]
    np.testing.assert_allclose(masses[1], masses[0], rtol=1e-3)


def test_columns_that_exceed_sixteen_bits_take_three_bytes_and_come_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for largest, expected in ((2**16, 2), (2**18, 3)):
        ids = np.stack([rng.permutation(largest)[:5] for _ in range(4)])
        ids[0, 0] = largest - 1
        ids[0, 1:] = [0, 1, 2, 3]
        item = Predictions(ids, np.full((4, 5), -3.0, np.float32), np.zeros(4, np.float32))
        key = StoreKey("t", 5, "float16")
        path = tmp_path / f"{largest}.safetensors"
        tokens = np.array([largest - 1, 5, 6, 7])
        write_shard(path, key, [b"d" * 16], [tokens], [item])
        shard = Shard(path, key)
        assert np.array_equal(shard.read(0).ids, ids)
        assert np.array_equal(shard.tokens(0), tokens)
        arrays = read_tensors(path, FORMAT, "", "").arrays
        names = [name for name in ("ids", "ids_high") if name in arrays]
        assert sum(arrays[name].itemsize for name in names) == expected


def test_a_prefix_of_what_was_stored_is_stored(tmp_path: Path) -> None:
    store, sequences = filled(tmp_path, [33, 64, 7])
    teacher = make_teacher()
    alone = TopKStore(tmp_path / "alone", replace(store.key))
    for ids in sequences:
        for length in {1, 2, len(ids) // 2, len(ids) - 1} - {0}:
            head = ids[:length]
            assert head in store
            alone.fill(teacher, [head])
            found, expected = store.get(head), alone.get(head)
            np.testing.assert_allclose(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(
                found.token_log_probs, expected.token_log_probs, rtol=1e-4, atol=1e-4
            )
            assert found.token_log_probs[-1] == 0
    other = sequences[1][:20].copy()
    other[-1] = (other[-1] + 1) % 300
    assert other not in store
    assert np.append(sequences[0], 5) not in store
    assert store.fill(teacher, [ids[:5] for ids in sequences]) == 0


def test_short_rows_of_a_batch_are_padded_to_its_longest(tmp_path: Path) -> None:
    whole, sequences = filled(tmp_path / "whole", [12, 5])
    teacher = make_teacher()
    store = TopKStore(tmp_path / "cut", StoreKey(teacher.fingerprint, WIDE, "float32", mass=0.5))
    store.fill(teacher, sequences)
    signal, full = (each.signal(*padded(sequences, "right")) for each in (store, whole))
    width = signal.ids.shape[2]
    assert width == max(store.get(ids).ids.shape[1] for ids in sequences) < WIDE
    named = ~signal.log_probs.isneginf()
    assert signal.ids[0][named[0]].equal(full.ids[0, :, :width][named[0]])


def test_a_store_is_opened_without_its_teacher(tmp_path: Path) -> None:
    store, sequences = filled(tmp_path, [9], mass=0.8, tokenizer="v" * 8)
    again = TopKStore.open(tmp_path)
    assert again.key == store.key
    assert np.array_equal(again.get(sequences[0]).ids, store.get(sequences[0]).ids)
    with pytest.raises(MissingFileError, match="does not exist; fill one with xtoken teach --out"):
        TopKStore.open(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="no teacher predictions; pass the folder that xtoken te"):
        TopKStore.open(tmp_path / "empty")


def test_files_with_rows_of_one_length_are_still_read(tmp_path: Path) -> None:
    """As releases before 0.4 wrote them."""
    teacher = make_teacher()
    (ids,) = make_sequences([6])
    item = Predictions(
        np.argsort(np.random.default_rng(0).random((6, 300)))[:, :TOP_K],
        np.full((6, TOP_K), -4.0, np.float32),
        np.full(6, -1.0, np.float32),
    )
    metadata = {"format": "xtoken-teacher-top-k-2", "teacher": teacher.fingerprint}
    metadata |= {"top_k": str(TOP_K), "dtype": "float32", "tokenizer": ""}
    arrays = {
        "digests": np.frombuffer(_digest(ids), np.uint8)[None],
        "starts": np.array([0, 6]),
        "ids": item.ids.astype(np.int32),
        "log_probs": item.log_probs,
        "token_log_probs": item.token_log_probs,
    }
    write_tensors(tmp_path / ("0" * 24 + ".safetensors"), arrays, metadata)
    store = TopKStore.open(tmp_path)
    assert store.key == StoreKey(teacher.fingerprint, TOP_K, "float32")
    found = store.get(ids)
    assert np.array_equal(found.ids, item.ids)
    assert np.array_equal(found.log_probs, item.log_probs)
    assert ids[:3] not in store  # their tokens are not known
    assert store.fill(teacher, [ids]) == 0


def test_settings_out_of_range_are_refused() -> None:
    for mass in (0.0, 1.0, 1.5, -0.1):
        with pytest.raises(OptionError, match="expected a share inside"):
            StoreKey("t", 4, "float32", mass=mass)
    with pytest.raises(OptionError, match="dtype = 'int4', expected one of 'float32', 'float16', "):
        StoreKey("t", 4, "int4")


@pytest.mark.parametrize("place", ["first", "last"])
@pytest.mark.parametrize("damage", ["empty", "header", "key", "tensor"])
def test_a_store_is_opened_whichever_file_of_it_is_damaged(
    tmp_path: Path, place: str, damage: str
) -> None:
    store, _ = filled(tmp_path, [20])
    store.fill(make_teacher(), make_sequences([11, 12]))
    paths = sorted(tmp_path.glob("*.safetensors"))
    assert len(paths) == 2
    path = paths[0] if place == "first" else paths[-1]
    content = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "header": content[:20] + b"\xff" + content[21:],
            "key": content.replace(f'"top_k":"{WIDE}"'.encode(), b'"top_k":"199"'),
            "tensor": content[:-1] + bytes([content[-1] ^ 1]),
        }[damage]
    )
    found = TopKStore.open(tmp_path)
    assert found.key == store.key
    assert found.files_discarded == 1
    assert 0 < len(found) < 3
    assert [each.name for each in tmp_path.glob("*.damaged")] == [f"{path.name}.damaged"]
    for each in tmp_path.glob("*.safetensors"):
        each.write_bytes(b"")
    with pytest.raises(DamagedStoreError, match=r"is damaged .*; remove it"):
        TopKStore.open(tmp_path)


def test_notes_that_lack_something_are_told_in_one_line(tmp_path: Path) -> None:
    whole = StoreNotes("teacher", "2026-01-01", 512, 3, 40, True, ("teach",))
    whole.save(tmp_path)
    assert StoreNotes.of(tmp_path) == whole
    values = unsealed(read_json(tmp_path / "store.json", "notes"))
    assert values is not None
    lacking = [{k: v for k, v in values.items() if k != name} for name in values]
    odd = [values | {"arguments": "teach"}, values | {"arguments": [1]}, values | {"more": 1}]
    for each in (*lacking, *odd):
        (tmp_path / "store.json").write_text(sealed(each))
        with pytest.raises(StoreError, match=r"store.json was altered, or is of a newer version"):
            StoreNotes.of(tmp_path)
    for content in ("", "[]", "{}", "[" * 100_000):
        (tmp_path / "store.json").write_text(content)
        with pytest.raises(StoreError, match=r"store.json was altered, or is of a newer version"):
            StoreNotes.of(tmp_path)


def test_what_a_damaged_file_had_is_told_as_damage_and_the_command_names_the_folder_of_now(
    tmp_path: Path,
) -> None:
    store, sequences = filled(tmp_path / "first", [30])
    store.fill(make_teacher(), more := make_sequences([9, 8], seed=5))
    sequences += more
    made = ("teach", "--data", "a b.jsonl", "--out", "first", "--top-k", "200")
    whole = StoreNotes("teacher", "2026-01-01", 512, 3, 47, True, made)
    whole.save(tmp_path / "first")
    folder = (tmp_path / "first").rename(tmp_path / "moved here")
    other = make_sequences([7], seed=9)
    command = rf"; run: xtoken teach --data 'a b.jsonl' --out '{folder}' --top-k 200$"
    texts = "it was filled with other texts, or another chat template or date"
    added = (
        rf"; run, with this data as DATA: xtoken teach --data DATA --out '{folder}' --top-k 200$"
    )
    with pytest.raises(StoreError, match=rf"lacks 1 of the 1 .*; {texts}{added}"):
        TopKStore.open(folder).require(other)
    path = min(folder.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for _ in range(2):  # the second time it is set aside already
        with pytest.raises(StoreError, match=rf"; its file {path.name} is damaged{command}"):
            TopKStore.open(folder).require(sequences)
    with pytest.raises(StoreError, match=rf"stored; its file {path.name} is damaged\); call fill"):
        TopKStore.open(folder).get(sequences[1])
    replace(whole, complete=False).save(folder)
    end = rf"; its file {path.name} is damaged, or it was not filled to the end{command}"
    with pytest.raises(StoreError, match=end):
        TopKStore.open(folder).require(sequences)
    replace(whole, sequences=1).save(folder)
    either = rf"; its file {path.name} is damaged, or {texts}{command}"
    with pytest.raises(StoreError, match=either):
        TopKStore.open(folder).require(other)
    # Once they are computed again, damage is no cause.
    whole.save(folder)
    TopKStore(folder, store.key).fill(make_teacher(), sequences)
    TopKStore.open(folder).require(sequences)
    assert path.exists()
    with pytest.raises(StoreError, match=rf"; {texts}{added}"):
        TopKStore.open(folder).require(other)
    replace(whole, max_tokens=5).save(folder)
    longer = r"cut at 5 tokens, one here has 7: .*; run: xtoken .* --top-k 200 --max-tokens 7$"
    with pytest.raises(StoreError, match=longer):
        TopKStore.open(folder).require(other)


def test_a_damaged_file_is_set_aside_on_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, sequences = filled(tmp_path, [30, 9])
    (path,) = tmp_path.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, "flock", refuse)
    (tmp_path / ".lock").touch()
    found = TopKStore(tmp_path, store.key)
    assert (len(found), found.files_discarded) == (0, 1)
    assert found.fill(make_teacher(), sequences) == 2
    assert path.exists()
    assert path.with_name(path.name + ".damaged").exists()
