"""A teacher of random weights, and sequences of its tokens."""

from __future__ import annotations

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from xtoken.teachers import LiveTeacher, StoreKey

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
