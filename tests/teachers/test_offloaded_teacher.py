"""Teachers of which accelerate keeps weights on the CPU or the disk while they are not used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from xtoken.errors import ModelSourceError, OptionError
from xtoken.teachers import LiveTeacher, StoreKey, TopKStore

MODULES = ("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head")
SOME_ON_DISK = {**dict.fromkeys(MODULES, "cpu"), "model.layers": "disk"}


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    ids = torch.arange(5, 25).view(2, 10)
    return ids, torch.ones_like(ids)


def loaded(folder: Path) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    return model


WAYS: dict[str, Callable[[Path, Path], LiveTeacher]] = {
    "all on the CPU": lambda folder, _: LiveTeacher(cpu_offload(loaded(folder), "cpu")),
    "all on disk": lambda folder, out: LiveTeacher(disk_offload(loaded(folder), out, "cpu")),
    "some on disk": lambda folder, out: LiveTeacher.from_pretrained(
        folder / "teacher", device_map=SOME_ON_DISK, offload_folder=out
    ),
}


@pytest.mark.parametrize("way", WAYS)
def test_an_offloaded_teacher_is_the_same_teacher(
    folder: Path, tmp_path: Path, batch: tuple[Tensor, Tensor], way: str
) -> None:
    ids, mask = batch
    whole = LiveTeacher(loaded(folder))
    teacher = WAYS[way](folder, tmp_path / "offloaded")
    assert any(each.is_meta for each in teacher.model.parameters())
    assert teacher.device == torch.device("cpu")
    torch.testing.assert_close(teacher.logits(ids, mask), whole.logits(ids, mask), rtol=0, atol=0)
    assert teacher.fingerprint == whole.fingerprint
    head = teacher.fused({"input_ids": ids, "attention_mask": mask})
    if way == "some on disk":
        assert not isinstance(head, str)
    else:
        assert head == "the lm_head of LlamaForCausalLM is offloaded after its forward pass"
    store = TopKStore(tmp_path / "store", StoreKey(whole.fingerprint, 8, "float32"))
    assert store.fill(teacher, [each.numpy() for each in ids]) == len(ids)


def test_a_model_without_numbers_is_no_teacher(folder: Path, batch: tuple[Tensor, Tensor]) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder / "teacher"))
    teacher = LiveTeacher(model)
    with pytest.raises(ModelSourceError, match="is on the meta device, without numbers"):
        teacher.logits(*batch)
    with pytest.raises(ModelSourceError, match="is on the meta device, without numbers"):
        _ = teacher.fingerprint


def test_a_device_beside_a_device_map_is_refused(folder: Path) -> None:
    with pytest.raises(OptionError, match="both say where the teacher goes"):
        LiveTeacher.from_pretrained(folder / "teacher", device="cpu", device_map="auto")


class Uniform(nn.Module):
    """A model that needs no weights."""

    def forward(self, input_ids: Tensor, **_: Any) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 7))


def test_a_model_without_weights_takes_tokens_on_the_cpu(batch: tuple[Tensor, Tensor]) -> None:
    teacher = LiveTeacher(Uniform())
    assert teacher.device == torch.device("cpu")
    assert teacher.logits(*batch).shape == (2, 10, 7)
