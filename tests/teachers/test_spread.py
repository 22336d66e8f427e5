"""A store whose rows keep what is likely, spread the rest, and are read as full logits are."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from tiny_teacher import VOCAB, make_sequences, make_teacher, padded

from xtoken._tensor_files import read_tensors, write_tensors
from xtoken.distillation.batch import Batch
from xtoken.errors import DamagedStoreError, NonFiniteError, OptionError, StoreError
from xtoken.losses import LossInputs, LossOptions, PairParts, TeacherTopK, same_vocab_kl
from xtoken.teachers import LiveTeacher, StoreKey, TopKStore
from xtoken.teachers.kept_rows import KeptRows, Rest, pack_rows, unpack_rows
from xtoken.teachers.shard import SPREAD_FORMAT
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.full_logits import FullLogits
from xtoken.tensors.teacher_spread import TeacherSpread
from xtoken.training.dry_run import _signal_bytes
from xtoken.training.signals import teacher_signal

LEAST = 1e-3


def key_of(teacher: LiveTeacher, top_k: int = VOCAB, min_prob: float = LEAST) -> StoreKey:
    return StoreKey(teacher.fingerprint, top_k, "spread", "v" * 8, min_prob=min_prob)


def log_probs_of(teacher: LiveTeacher, ids: np.ndarray) -> np.ndarray:
    logits = teacher.logits(torch.from_numpy(ids)[None], torch.ones(1, len(ids)))[0]
    return logits.double().log_softmax(-1).numpy()


def spread_slowly(
    rows: list[np.ndarray], sequences: list[np.ndarray], min_prob: float
) -> list[np.ndarray]:
    """What is stored of all rows of one file, unrounded, column by column in float64."""
    kept = []
    for log_probs, ids in zip(rows, sequences, strict=True):
        mask = np.exp(log_probs) >= min_prob
        for row in range(len(ids)):
            mask[row, log_probs[row].argmax()] = True
            if row + 1 < len(ids):
                mask[row, ids[row + 1]] = True
        kept.append(mask)
    columns = rows[0].shape[1]
    prior = np.zeros(columns)
    for column in range(columns):
        mass = left = 0.0
        for log_probs, mask in zip(rows, kept, strict=True):
            for row in range(len(mask)):
                if not mask[row, column]:
                    mass += np.exp(log_probs[row, column])
                    left += np.exp(log_probs[row, ~mask[row]]).sum()
        prior[column] = mass / left if left else 0.0
    found = []
    for log_probs, mask in zip(rows, kept, strict=True):
        probs = np.exp(log_probs)
        for row in range(len(mask)):
            out = ~mask[row]
            if out.any():
                probs[row, out] = prior[out] / prior[out].sum() * probs[row, out].sum()
        found.append(probs)
    return found


def every_token(mask: torch.Tensor) -> ChunkBatch:
    """A chunk of one token on both sides for each token but the first of a row padded on the
    right."""
    row, at = mask[:, 1:].nonzero(as_tuple=True)
    return ChunkBatch.from_ranges(row, at + 1, at + 2, at + 1, at + 2)


def test_rows_are_what_is_likely_and_a_prior_of_the_rest(tmp_path: Path) -> None:
    teacher = make_teacher()
    sequences = make_sequences([40, 7, 23])
    store = TopKStore(tmp_path, key_of(teacher))
    assert store.fill(teacher, sequences) == 3
    expected = spread_slowly([log_probs_of(teacher, ids) for ids in sequences], sequences, LEAST)
    for side in ("left", "right"):
        ids, mask = padded(sequences, side)
        signal = store.signal(ids, mask)
        assert isinstance(signal, TeacherSpread)
        assert signal.teacher_fingerprint == "v" * 8
        every = signal.rows(torch.arange(mask.numel()), width=VOCAB).view(*mask.shape, VOCAB)
        sums = every.double().exp().sum(-1)
        torch.testing.assert_close(sums, torch.ones_like(sums), rtol=1e-3, atol=1e-3)
        for row, probs in enumerate(expected):
            found = every[row][mask[row].bool()].double().exp().numpy()
            # Fourth roots in 256 steps of the likely ones; 0.1 nats of the prior's.
            assert np.abs(np.sqrt(found) - np.sqrt(probs)).max() < 5e-3
            few = probs < LEAST
            assert np.abs(np.log(found[few] / probs[few])).max() < 0.15


def test_a_token_that_follows_is_exact_however_rare(tmp_path: Path) -> None:
    teacher = make_teacher()
    (ids,) = make_sequences([60])
    store = TopKStore(tmp_path, key_of(teacher, min_prob=0.05))
    store.fill(teacher, [ids])
    signal = store.signal(*padded([ids], "right"))
    own = torch.from_numpy(ids)[1:]
    expected = torch.from_numpy(log_probs_of(teacher, ids))[torch.arange(59), own]
    assert float(expected.exp().min()) < 1e-4
    found = signal.entries(torch.arange(59), own).double()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(store.get(ids).token_log_probs[:-1], expected, rtol=1e-5, atol=1e-5)


def test_entries_and_columns_are_those_of_whole_rows(tmp_path: Path) -> None:
    teacher = make_teacher()
    sequences = make_sequences([30, 12])
    store = TopKStore(tmp_path, key_of(teacher))
    # Two files, and so two priors in one batch.
    for each in sequences:
        store.fill(teacher, [each])
    ids, mask = padded(sequences, "right")
    signal = store.signal(ids, mask)
    assert len(signal.log_priors) == 2
    full = FullLogits.of(signal, VOCAB - 10)
    assert (full.width, full.positions) == (VOCAB - 10, tuple(ids.shape))
    index = torch.tensor([3, 40, 0, 59, 3])
    rows = full.rows(index)
    assert rows.shape == (5, VOCAB - 10)
    columns = torch.tensor([5, 280, 0, 17])
    assert full.rows(index, columns).equal(rows[:, columns])
    at, column = torch.meshgrid(torch.arange(5), torch.arange(VOCAB - 10), indexing="ij")
    entries = full.entries(index[at.flatten()], column.flatten())
    assert entries.equal(rows.flatten())
    # On a GPU rows are written as wide as the widest, and some places have no token.
    every = torch.arange(ids.numel())
    ragged = signal.rows(every, width=VOCAB)
    padded_rows = signal.log_priors[signal.prior.flatten()] + signal.log_scale.flatten()[:, None]
    signal._write_padded(padded_rows, signal.start.flatten(), signal.count.flatten())
    assert padded_rows.equal(ragged)
    assert int(signal.count[1, 12:].max()) == 0
    assert store.columns_per_token == pytest.approx(len(signal.ids) / 42)
    held = (signal.ids, signal.log_probs, *(getattr(signal, name).flatten()[:42]
            for name in ("start", "count", "prior", "log_scale")))  # fmt: skip
    size = sum(each.numel() * each.element_size() for each in held) / 42
    assert _signal_bytes(store, False) == pytest.approx(size, abs=1)  # as a dry run says
    assert ragged[45].equal(signal.log_priors[signal.prior[1, 15]])


def test_a_loss_reads_it_as_the_logits_that_it_stands_for(tmp_path: Path) -> None:
    teacher = make_teacher()
    sequences = make_sequences([30, 12])
    store = TopKStore(tmp_path, key_of(teacher))
    store.fill(teacher, sequences)
    ids, mask = padded(sequences, "right")
    signal = store.signal(ids, mask)
    dense = signal.rows(torch.arange(ids.numel()), width=VOCAB).view(*ids.shape, VOCAB)
    student = torch.randn(*ids.shape, VOCAB, generator=torch.Generator().manual_seed(0))
    results = []
    for given in (dense, signal):
        for temperature in (1.0, 2.0):
            own = student.clone().requires_grad_()
            inputs = LossInputs(own, given, every_token(mask))
            options = LossOptions(temperature=temperature)
            loss = same_vocab_kl(inputs, PairParts((VOCAB, VOCAB)), options).loss
            results.append((loss.detach(), *torch.autograd.grad(loss, own)))
    for one, other in zip(results[:2], results[2:], strict=True):
        torch.testing.assert_close(one, other)


def test_the_exact_targets_and_the_top_of_it_are_what_is_kept(tmp_path: Path) -> None:
    teacher = make_teacher()
    (ids,) = make_sequences([30])
    store = TopKStore(tmp_path, key_of(teacher))
    store.fill(teacher, [ids])
    item = store.get(ids)
    exact = log_probs_of(teacher, ids)
    named = ~np.isneginf(item.log_probs)
    assert (item.log_probs[:, 1:] <= item.log_probs[:, :-1]).all()
    rows, _ = np.nonzero(named)
    kept = np.exp(exact[rows, item.ids[named]])
    assert np.abs(np.sqrt(np.exp(item.log_probs[named])) - np.sqrt(kept)).max() < 5e-3
    mass = np.bincount(rows, weights=kept, minlength=30)
    np.testing.assert_allclose(np.exp(item.log_probs.astype(np.float64)).sum(1), mass, atol=1e-3)
    top = TeacherTopK.from_logits(store.signal(*padded([ids], "right")), 5)
    np.testing.assert_allclose(item.log_probs[:, :5], top.log_probs[0], rtol=1e-3, atol=1e-3)


def test_at_most_top_k_columns_are_kept_and_the_token_that_follows(tmp_path: Path) -> None:
    teacher = make_teacher()
    (ids,) = make_sequences([50])
    store = TopKStore(tmp_path, key_of(teacher, top_k=4))
    store.fill(teacher, [ids])
    item, exact = store.get(ids), log_probs_of(teacher, ids)
    assert int((~np.isneginf(item.log_probs)).sum(1).max()) == 5
    for row in range(50):
        named = set(item.ids[row][~np.isneginf(item.log_probs[row])].tolist())
        best = set(np.argsort(-exact[row])[:4].tolist())
        assert best <= named <= best | set(ids[row + 1 : row + 2].tolist())


def test_small_files_become_one_with_the_prior_of_all(tmp_path: Path) -> None:
    teacher = make_teacher()
    sequences = make_sequences([900, 800, 1000, 200])
    teacher.model.config.max_position_embeddings = 1024
    at_once = TopKStore(tmp_path / "one", key_of(teacher))
    at_once.fill(teacher, sequences)
    assert at_once.files == 1
    assert at_once.prior_bytes == VOCAB
    # What was begun is finished, in files of their own.
    begun = TopKStore(tmp_path / "two", key_of(teacher))
    begun.fill(teacher, sequences[:2])
    again = TopKStore.open(tmp_path / "two")
    assert again.fill(teacher, sequences) == 2
    assert (again.files, len(again)) == (2, 4)
    for ids in sequences:
        one, other = at_once.get(ids), TopKStore.open(tmp_path / "two").get(ids)
        assert np.array_equal(one.ids, other.ids)
        np.testing.assert_allclose(one.log_probs, other.log_probs, atol=1e-4)


def test_a_prefix_of_what_was_stored_is_stored(tmp_path: Path) -> None:
    teacher = make_teacher()
    (ids,) = make_sequences([33])
    store = TopKStore(tmp_path, key_of(teacher))
    store.fill(teacher, [ids])
    whole, head = store.signal(*padded([ids], "right")), store.signal(*padded([ids[:9]], "right"))
    rows = [each.rows(torch.arange(9), width=VOCAB) for each in (whole, head)]
    torch.testing.assert_close(rows[0], rows[1])
    found = store.get(ids[:9])
    assert found.token_log_probs[-1] == 0.0
    assert len(found.ids) == 9


def test_vocabularies_beyond_sixteen_bits_come_back() -> None:
    columns, tokens = 150_000, np.array([7, 149_999, 65_536, 3])
    rng = np.random.default_rng(0)
    counts = np.array([4, 1, 300, 2])
    ids = [np.sort(rng.choice(columns, count, replace=False)) for count in counts]
    for row, each in enumerate(ids[:-1]):
        if tokens[row + 1] not in each:
            each[0] = tokens[row + 1]
            each.sort()
    probs = [np.full(len(each), 0.9 / len(each)) for each in ids]
    flat = np.log(np.concatenate(probs)).astype(np.float32)
    first = np.cumsum(counts) - counts
    own = np.array([flat[first[row]] for row in range(3)] + [0.0], np.float32)
    rows = KeptRows(counts, np.concatenate(ids), flat, np.log(np.full(4, 0.9, np.float32)), own)
    rest = Rest(rng.random(columns), np.ones(columns))
    arrays = pack_rows([tokens], [rows], rest, 1e-5)
    found = unpack_rows(arrays, tokens, 0, 1e-5)
    assert np.array_equal(found.ids, rows.ids)
    assert np.array_equal(found.counts, counts)
    np.testing.assert_allclose(np.exp(found.log_probs), np.exp(flat), atol=1e-3)
    assert found.log_prior is not None
    expected = np.log(rest.mass / rest.mass.sum())
    likely = expected > expected.max() - 20
    assert np.abs(found.log_prior - expected)[likely].max() < 0.06


def test_a_file_is_opened_without_its_teacher_and_other_settings_are_refused(
    tmp_path: Path,
) -> None:
    teacher = make_teacher()
    sequences = make_sequences([12])
    key = key_of(teacher)
    TopKStore(tmp_path, key).fill(teacher, sequences)
    store = TopKStore.open(tmp_path)
    assert store.key == key
    assert "min_prob" not in replace(key, dtype="uint8", min_prob=None).metadata()
    with pytest.raises(StoreError, match=r"has min_prob = '0.001', expected '0.002'"):
        TopKStore(tmp_path, replace(key, min_prob=0.002))
    with pytest.raises(StoreError, match="has dtype = 'spread', expected 'uint8'"):
        TopKStore(tmp_path, replace(key, dtype="uint8", min_prob=None))
    with pytest.raises(StoreError, match="which needs the teacher's full logits; fill it with fil"):
        store.add(sequences, [store.get(sequences[0])])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("cut", "a row cannot be read|has 0 columns|has .* columns, expected"),
        ("tokens", "lacks the token that follows"),
        ("counts", "columns, expected"),
    ],
)
def test_a_file_that_is_whole_but_wrong_is_refused_when_it_is_read(
    tmp_path: Path, change: str, words: str
) -> None:
    teacher = make_teacher()
    (ids,) = make_sequences([12])
    store = TopKStore(tmp_path, key_of(teacher, min_prob=0.01))
    store.fill(teacher, [ids])
    (path,) = tmp_path.glob("*.safetensors")
    file = read_tensors(path, SPREAD_FORMAT, "", "")
    arrays = {name: array.copy() for name, array in file.arrays.items()}
    if change == "cut":
        arrays["data"] = np.zeros_like(arrays["data"])
    elif change == "tokens":
        arrays["tokens"][1:] = (arrays["tokens"][1:] + 150) % VOCAB
    else:
        arrays["counts"][0] += 1
    write_tensors(path, arrays, file.metadata)
    with pytest.raises(DamagedStoreError, match=words):
        TopKStore.open(tmp_path).get(ids)
    del arrays["prior"]
    write_tensors(path, arrays, file.metadata)
    again = TopKStore.open(tmp_path)
    assert (again.files_discarded, len(again)) == (1, 0)
    assert len(list(tmp_path.glob("*.damaged"))) == 1


def test_a_batch_that_asks_for_nothing_is_of_the_same_kind(tmp_path: Path) -> None:
    teacher = make_teacher()
    sequences = make_sequences([9, 12])
    store = TopKStore(tmp_path, key_of(teacher))
    ids, mask = padded(sequences, "right")
    with pytest.raises(StoreError, match="holds nothing yet"):
        store.unread(ids)
    store.fill(teacher, sequences)
    # Not a stored top-k, which a temperature would be refused for.
    batch = SimpleNamespace(
        teacher={"input_ids": ids, "attention_mask": mask},
        teacher_loss_mask=torch.zeros(ids.shape, dtype=torch.bool),
        asked_tokens=0,
    )
    nothing = teacher_signal(store, cast(Batch, batch))
    assert isinstance(nothing, TeacherSpread)
    assert nothing.width == store.signal(ids, mask).width == VOCAB
    (row,) = nothing.rows(torch.tensor([11]), width=VOCAB)
    torch.testing.assert_close(row.double().exp().sum(), torch.tensor(1.0).double())
    torch.testing.assert_close(row, nothing.log_priors[0])


def test_settings_that_do_not_belong_together_are_refused() -> None:
    for min_prob in (None, 0.0, 0.5, float("nan")):
        with pytest.raises(OptionError, match=r"expected a probability from 1e-9 to 0\.1"):
            StoreKey("t", 4, "spread", min_prob=min_prob)
    with pytest.raises(OptionError, match="pass dtype='spread', which keeps what reaches it"):
        StoreKey("t", 4, "uint8", min_prob=1e-4)
    with pytest.raises(OptionError, match="keeps columns by their own probability; pass min_prob"):
        StoreKey("t", 4, "spread", mass=0.9, min_prob=1e-4)


def test_a_teacher_that_overflows_and_a_folder_that_cannot_be_written_are_refused(
    tmp_path: Path,
) -> None:
    teacher = make_teacher()
    store = TopKStore(tmp_path / "store", key_of(teacher))
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(OSError, match="file"):
        TopKStore(blocked / "store", key_of(teacher))
    teacher.model.lm_head.weight[0] = torch.nan
    with pytest.raises(
        NonFiniteError, match="the teacher predicts nan at position 0 of a sequence"
    ):
        store.fill(teacher, make_sequences([5]))
    assert len(store) == 0
