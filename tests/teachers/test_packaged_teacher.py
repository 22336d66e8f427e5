"""The model that a package carries: what the demo makes of it, and what a store keeps of it."""

from __future__ import annotations

import copy
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_arrays import ArrayReader
from loss_cases import loss_of
from test_spread import every_token, key_of
from tiny_teacher import padded
from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_gguf_pytorch_utils

from demo.teacher import gguf_path, prepare_teacher
from xtoken.losses import PairParts
from xtoken.teachers import LiveTeacher, TopKStore
from xtoken.tensors.projection import SparseProjection


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Half a gigabyte, which no test needs afterwards."""
    load = modeling_gguf_pytorch_utils.load_gguf_checkpoint
    metadata = functools.cache(load)

    def load_once(path: str, return_tensors: bool = False, **given: Any) -> dict[str, Any]:
        return load(path, True, **given) if return_tensors else copy.deepcopy(metadata(path))

    with pytest.MonkeyPatch.context() as patch:
        # transformers reads the whole file at each call, and makes the same names for each tensor.
        patch.setattr(gguf, "GGUFReader", functools.cache(ArrayReader))
        patch.setattr(gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map))
        patch.setattr(modeling_gguf_pytorch_utils, "load_gguf_checkpoint", load_once)
        made = prepare_teacher(tmp_path_factory.mktemp("packaged") / "teacher")
        yield made
    shutil.rmtree(made)


def test_the_teacher_is_the_packaged_model_with_its_own_pre_tokenizer(
    folder: Path, texts: dict[str, str]
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("In 2024 it") == ["In", "Ġ", "2", "0", "2", "4", "Ġit"]
    file = gguf_path()
    as_read = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # GPT-2's pre-tokenizer keeps the last space before a digit apart from the others.
    assert as_read.tokenize("at   7") == ["at", "ĠĠ", "Ġ", "7"]
    assert tokenizer.tokenize("at   7") == ["at", "ĠĠĠ", "7"]

    model = AutoModelForCausalLM.from_pretrained(folder)
    assert model.dtype == torch.float32
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    ids = tokenizer(texts["english"][:400], return_tensors="pt").input_ids
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss
    # Real weights read English; random ones would give ln 49152 = 10.8.
    assert float(loss) < 5.0
    assert prepare_teacher(folder) == folder


def test_the_losses_of_a_real_teacher_are_within_half_a_percent_of_full_logits(
    folder: Path, tmp_path: Path, texts: dict[str, str]
) -> None:
    """The student is the same model with at most eight tokens of context, so that both are real."""
    teacher = LiveTeacher.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    kinds, length = ("english", "code", "maths"), 64
    sequences = [np.array(tokenizer(texts[kind]).input_ids[:length]) for kind in kinds]
    store = TopKStore(tmp_path / "store", key_of(teacher, 8192, 1e-5))
    store.fill(teacher, sequences)
    tokens = sum(map(len, sequences))
    assert store.file_bytes / tokens < 1_500
    ids, mask = padded(sequences, "right")
    size = len(tokenizer)
    short = ids.view(-1, 8)
    student = teacher.logits(short, torch.ones_like(short))[..., :size].view(*ids.shape, size)
    full = teacher.logits(ids, mask)
    chunks, identity = every_token(mask), SparseProjection.identity(size)
    pairs = {"p-kl": PairParts((size, size), projection=identity)}
    pairs["same-vocab-kl"] = PairParts((size, size))
    for name, pair in pairs.items():
        results = []
        for given in (full, store.signal(ids, mask)):
            own = student.clone().requires_grad_()
            loss = loss_of(name, own, given, chunks, pair, top_k=None).loss
            results.append((float(loss.detach()), *torch.autograd.grad(loss, own)))
        (exact, slope), (value, found_slope) = results
        assert value == pytest.approx(exact, rel=5e-3), name
        cosine = torch.cosine_similarity(slope.flatten(), found_slope.flatten(), 0)
        assert float(cosine) > 0.9995, name
