"""A live teacher in the trainer by its hidden states and head: the same losses, no whole logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from own_heads import OWN_HEADS, give_head
from test_distill_trainer import TEXTS, Watch, family, logged, make, student_of
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtoken import Pair
from xtoken.errors import OptionError
from xtoken.losses.registry import LOSSES
from xtoken.teachers import LiveTeacher
from xtoken.tensors.lm_head import LmHead
from xtoken.training import Teacher
from xtoken.training.signals import teacher_signal

CROSS = sorted(set(LOSSES) - {"same-vocab-kl"})


def teacher_of(folder: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)


def run(
    folder: Path, out: Path, teacher: nn.Module, **options: Any
) -> tuple[dict[str, float], dict[str, torch.Tensor], int]:
    """What a step logs, its gradient, and the positions of the widest logits of the teacher."""
    watch, widest = Watch(), Watch()
    widest.see(teacher)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    trainer = make(
        folder, out, student_of(folder), callbacks=[watch],
        teachers=[Teacher(teacher, tokenizer=tokenizer)], options={"max_steps": 1, **options},
    )  # fmt: skip
    trainer.train()
    return logged(trainer)[0], watch.gradient, widest.positions


def same(one: Any, other: Any) -> None:
    for name in ("ce", "kd", "loss"):
        assert other[0][name] == pytest.approx(one[0][name], rel=1e-4), name
    scale = max(float(value.abs().max()) for value in one[1].values())
    for name, value in one[1].items():
        torch.testing.assert_close(other[1][name], value, rtol=1e-3, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("loss", CROSS)
def test_every_loss_is_that_of_whole_logits(folder: Path, tmp_path: Path, loss: str) -> None:
    top_k = {"top_k": 32} if "top_k" in LOSSES[cast(Any, loss)].options else {"top_k": 512}
    found = [
        run(folder, tmp_path, teacher_of(folder), loss=loss, fused_teacher=fused, **top_k)
        for fused in (False, True)
    ]
    assert found[0][2] > 2
    assert found[1][2] == 2
    same(*found)


@pytest.mark.parametrize("name", ["gemma2", "cohere", "granite"])
def test_p_kl_over_all_columns_with_heads_that_scale_and_cap(
    folder: Path, tmp_path: Path, name: str
) -> None:
    size = Pair(folder / "student", folder / "teacher").sizes[1]
    options = {"loss": "p-kl", "top_k": None}
    found = [
        run(folder, tmp_path, family(name, size), fused_teacher=fused, **options)
        for fused in (False, True)
    ]
    assert found[1][2] == 2
    same(*found)


@pytest.mark.parametrize("weighting", [None, "ce", "entropy", "max_prob"])
def test_several_teachers_and_rows_of_some_alone(
    folder: Path, tmp_path: Path, weighting: str | None
) -> None:
    found = []
    for fused in (False, True):
        rows = [
            {"text": text, "for": name}
            for text, name in zip(TEXTS, ("one", ["two"], None) * 6, strict=False)
        ]
        sources = [
            Teacher(teacher_of(folder), AutoTokenizer.from_pretrained(folder / "teacher"),
                    loss="p-kl", name="one"),
            Teacher(str(folder / "student"), loss="same-vocab-kl", name="two"),
        ]  # fmt: skip
        watch = Watch()
        trainer = make(
            folder, tmp_path, student_of(folder), callbacks=[watch], teachers=sources,
            train_dataset=rows,
            options={
                "max_steps": 1, "fused_teacher": fused, "teacher_column": "for", "kd_weight": 1.0,
                "teacher_weighting": weighting,
            },
        )  # fmt: skip
        trainer.train()
        found.append((logged(trainer)[0], watch.gradient))
    same(*found)


def test_packed_and_left_padded_rows_have_the_rows_of_logits(folder: Path) -> None:
    pair = Pair(folder / "student", folder / "teacher")
    source = LiveTeacher(teacher_of(folder))
    distiller = pair.distiller("p-kl")
    batch = distiller.collate(TEXTS[:3])
    left = {
        "input_ids": batch.teacher_ids.flip(1),
        "attention_mask": batch.teacher["attention_mask"].flip(1),
    }
    lengths = batch.teacher["attention_mask"].sum(1).tolist()
    ids = torch.cat([row[:length] for row, length in zip(batch.teacher_ids, lengths, strict=True)])
    positions = torch.cat([torch.arange(length) for length in lengths])
    packed = {"input_ids": ids[None], "position_ids": positions[None]}
    for inputs in (left, packed):
        case = Case(inputs)
        fused = teacher_signal(source, cast(Any, case), True)
        whole = teacher_signal(source, cast(Any, case), False)
        assert isinstance(fused, LmHead)
        assert isinstance(whole, torch.Tensor)
        shown = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        rows = fused.rows(torch.arange(shown.numel()), width=whole.shape[2])
        torch.testing.assert_close(rows.view(whole.shape)[shown], whole[shown])


class Case:
    """The teacher's side of a batch."""

    asked_tokens = None

    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        self.teacher = inputs


@pytest.mark.parametrize("kind", OWN_HEADS)
def test_a_head_that_does_more_is_refused_by_name_and_auto_says_so(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[nn.Linear]
) -> None:
    def own() -> nn.Module:
        teacher = teacher_of(folder)
        give_head(teacher, kind)
        return teacher

    with pytest.raises(OptionError, match=r"fused_teacher = True, but LlamaForCausalLM does more"):
        run(folder, tmp_path, own(), fused_teacher=True)
    # What an accelerator is asked, this machine has none.
    monkeypatch.setattr("xtoken.training.signals.is_fused", lambda source, fused: bool(fused))
    with pytest.warns(UserWarning, match=r"logits are made whole, .*: LlamaForCausalLM does more"):
        found = run(folder, tmp_path, own(), fused_teacher="auto")
    assert found[2] > 2
    assert run(folder, tmp_path, teacher_of(folder), fused_teacher="auto")[2] == 2


def test_on_the_cpu_auto_takes_the_logits(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path, teacher_of(folder), fused_teacher="auto")[2] > 2


def test_a_model_that_is_none_of_transformers_says_why(folder: Path) -> None:
    plain = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8))
    ids = torch.from_numpy(np.zeros((1, 3), dtype=np.int64))
    found = LiveTeacher(plain).fused({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert found == "Sequential is no model of transformers"


def test_a_teacher_in_parts_of_deepspeed_is_refused(folder: Path, tmp_path: Path) -> None:
    teacher = teacher_of(folder)
    weight = teacher.lm_head.weight
    # As stage 3 leaves a parameter: its shape beside, nothing in it.
    weight.ds_shape, weight.data = weight.shape, torch.empty(0)
    with pytest.raises(OptionError, match=r"were cut over processes by DeepSpeed's stage 3 when"):
        run(folder, tmp_path, teacher)


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 8), reason="an older torch.compile"
)
def test_a_compiled_teacher_gives_its_hidden_states(folder: Path) -> None:
    teacher = teacher_of(folder)
    ids = torch.tensor([[5, 6, 7, 8]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    plain = LiveTeacher(teacher).fused(inputs)
    compiled = LiveTeacher(torch.compile(teacher, backend="eager")).fused(inputs)
    assert isinstance(plain, LmHead)
    assert isinstance(compiled, LmHead), compiled
    torch.testing.assert_close(compiled.hidden, plain.hidden)
