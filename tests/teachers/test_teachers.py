"""Teachers: a live model, and the store of its predictions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from xtoken.errors import StoreError
from xtoken.teachers import LiveTeacher, StoreKey, TopKStore
from xtoken.teachers.store import TOKENS_A_SHARD

VOCAB, TOP_K = 300, 17


def make_teacher(seed: int = 0) -> LiveTeacher:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.3,
        )
        return LiveTeacher(LlamaForCausalLM(config))


def make_sequences(lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.integers(0, VOCAB, length, dtype=np.int64) for length in lengths]


def key_of(teacher: LiveTeacher, dtype: str = "float32") -> StoreKey:
    return StoreKey(teacher.fingerprint, TOP_K, dtype)


def padded(sequences: list[np.ndarray], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, sequences))
    ids = torch.full((len(sequences), width), 7)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        ids[row, place] = torch.from_numpy(sequence)
        mask[row, place] = 1
    return ids, mask


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
    sequences = make_sequences([250] * (TOKENS_A_SHARD // 250 + 2))
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
    with pytest.raises(StoreError, match=r"has teacher = .*remove it or use another folder"):
        TopKStore(tmp_path, key_of(other))
    with pytest.raises(StoreError, match="has top_k = '17', expected '18'"):
        TopKStore(tmp_path, StoreKey(teacher.fingerprint, 18, "float32"))
    with pytest.raises(StoreError, match="has dtype = 'float32', expected 'float16'"):
        TopKStore(tmp_path, key_of(teacher, "float16"))
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_a_foreign_safetensors_file_is_refused(tmp_path: Path) -> None:
    teacher = make_teacher()
    teacher.model.save_pretrained(tmp_path)
    with pytest.raises(StoreError, match="has format = "):
        TopKStore(tmp_path, key_of(teacher))


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
    with pytest.raises(StoreError, match="dtype = 'int8'"):
        TopKStore(tmp_path, key_of(teacher, "int8"))
    with pytest.raises(StoreError, match="top_k = 0"):
        TopKStore(tmp_path, StoreKey(teacher.fingerprint, 0, "float32"))
    wide = TopKStore(tmp_path, StoreKey(teacher.fingerprint, VOCAB + 1, "float32"))
    with pytest.raises(StoreError, match="the teacher has 300 columns; pass a smaller top_k"):
        wide.fill(teacher, [ids])
