"""Models whose hidden states or head are not where they are in most: fused, or refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from own_heads import give_head
from small_models import small_model
from test_distill_trainer import Watch, logged, make, student_of
from test_fused_teacher import run, same, teacher_of
from torch import nn

from xtoken import Pair
from xtoken.errors import ModelSourceError, OptionError
from xtoken.teachers import LiveTeacher
from xtoken.teachers.probe import check_causal


class Packed(nn.Linear):
    """A layer that keeps two numbers of 4 bits in a byte, as quantized ones do."""

    def __init__(self, plain: nn.Linear) -> None:
        super().__init__(plain.in_features, plain.out_features, bias=False)
        self.whole = plain.weight.detach()
        packed = torch.zeros(plain.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(hidden, self.whole)


def sizes(folder: Path) -> tuple[int, int]:
    return Pair(folder / "student", folder / "teacher").sizes


def trained(folder: Path, out: Path, model: nn.Module, **options: Any) -> Any:
    watch = Watch()
    watch.see(model)
    trainer = make(folder, out, model, callbacks=[watch], options={"max_steps": 1, **options})
    trainer.train()
    return logged(trainer)[0], watch.gradient, watch.positions


@pytest.mark.parametrize("name", ["opt", "bart's decoder"])
def test_a_student_that_calls_its_inner_decoder_gives_its_hidden_states(
    folder: Path, tmp_path: Path, name: str
) -> None:
    found = [
        trained(folder, tmp_path, small_model(name, sizes(folder)[0]), fused=fused)
        for fused in (False, True)
    ]
    assert found[0][2] > 1
    assert found[1][2] == 2
    same(*found)


@pytest.mark.parametrize("name", ["opt", "bart's decoder"])
def test_so_does_a_teacher(folder: Path, tmp_path: Path, name: str) -> None:
    found = [
        run(folder, tmp_path, small_model(name, sizes(folder)[1]), fused_teacher=fused)
        for fused in (False, True)
    ]
    assert found[1][2] == 2
    same(*found)


def test_a_student_that_calls_its_inner_decoder_learns_beside_a_loss_of_the_trainers_own(
    folder: Path, tmp_path: Path
) -> None:
    trainer = make(
        folder, tmp_path, small_model("opt", sizes(folder)[0]),
        options={"max_steps": 1, "label_smoothing_factor": 0.1},
    )  # fmt: skip
    trainer.train()
    assert logged(trainer)[0]["kd"] > 0


_PACKED = r"the lm_head of LlamaForCausalLM keeps its weights as torch.uint8 \(\d+, 1\)"
# Of the student, and of the teacher, which trains nothing.
CASES: dict[str, tuple[str, str]] = {
    "rembert": (
        "RemBertForCausalLM trains cls.predictions.dense.weight, which is neither in its decoder "
        "nor its lm_head's weight",
        "RemBertForCausalLM has 32 features, and its lm_head takes 64",
    ),
    "packed": (_PACKED, _PACKED),
}


@pytest.mark.parametrize("name", CASES)
def test_a_head_of_other_hidden_states_is_refused_by_name_and_auto_takes_the_logits(
    folder: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def model(side: int) -> nn.Module:
        if name == "rembert":
            return small_model(name, sizes(folder)[side])
        made = student_of(folder) if side == 0 else teacher_of(folder)
        made.lm_head = Packed(made.lm_head)
        return made

    try:
        check_causal(model(1))
    except ModelSourceError:
        pytest.skip("the RemBert of an older transformers sees what follows, decoder or not")
    student, teacher = CASES[name]
    with pytest.raises(OptionError, match=f"fused = True, but {student}; set it to False"):
        trained(folder, tmp_path, model(0), fused=True)
    with pytest.raises(OptionError, match=f"fused_teacher = True, but {teacher}; set it to"):
        run(folder, tmp_path, model(1), fused_teacher=True)
    # What an accelerator is asked, this machine has none.
    monkeypatch.setattr("xtoken.training.signals.is_fused", lambda source, fused: bool(fused))
    with pytest.warns(UserWarning, match=f"logits are made whole, .*: {teacher}"):
        assert run(folder, tmp_path, model(1), fused_teacher="auto")[2] > 2


def test_a_scale_that_is_the_name_of_a_rule_does_not_stop_a_run(
    folder: Path, tmp_path: Path
) -> None:
    found = [
        run(folder, tmp_path, small_model("mpt with a rule", sizes(folder)[1]), fused_teacher=fused)
        for fused in (False, True)
    ]
    same(*found)


def test_a_head_that_is_called_by_the_name_of_its_input_makes_its_logits(folder: Path) -> None:
    class Named(nn.Linear):
        def __call__(self, hidden: torch.Tensor) -> Any:
            return super().__call__(input=hidden)

    teacher = teacher_of(folder)
    give_head(teacher, Named)
    ids = torch.arange(5, 25).view(2, 10)
    found = LiveTeacher(teacher).fused({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    assert found == "LlamaForCausalLM does more to its logits than scale, bias and softcap"
