"""The student's forward pass in a Trainer: its logits, or hidden states and head in their place."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from xtoken.errors import OptionError
from xtoken.losses.engine.student_input import Student
from xtoken.teachers.model_head import Head, bare_model, find_head, keeps_few_logits, same_logits
from xtoken.tensors.lm_head import LmHead
from xtoken.training.router_loss import RouterLoss, router_loss
from xtoken.training.settings import DistillSettings

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ForwardsStudent(_Base):
    """The part of `DistillMixin` that runs the student."""

    distill_settings: DistillSettings
    _head: Head | str | None = None
    _head_model: nn.Module | None = None
    _head_checked = False

    def _student(
        self, model: nn.Module, inputs: dict[str, Any]
    ) -> tuple[Student, RouterLoss | None]:
        """The student's logits, or hidden states and head where those are all that is needed; and
        what its routers are balanced by."""
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        with self._precision():
            head = self._fused_head(model)
            if head is None:
                output = model(**inputs, use_cache=False)
                logits: Tensor = output.logits
                return logits, router_loss(self._unwrapped(model), output)
            with head.capture(check=not self._head_checked) as hidden:
                output = model(**inputs, use_cache=False, logits_to_keep=1)
        states = head.hidden(hidden, inputs["input_ids"])
        if isinstance(states, str):
            self._head = states
            return self._student(model, inputs)
        rows = self._head_of(head, states, model)
        if not self._head_checked:
            self._head_checked = True
            if not same_logits(rows, output.logits):
                self._head = _does_more(self._student_name(model))
                return self._student(model, inputs)
        return rows, router_loss(self._unwrapped(model), output)

    def _fused_head(self, model: nn.Module) -> Head | None:
        wanted = self.distill_settings.fused
        # An autocast would round the logits to 16 bits; of hidden states the product is float32.
        plain = self.args.device.type == "cpu" and self._autocast_dtype() is None
        if wanted is False or (wanted == "auto" and plain):
            return None
        head = self._usable_head(model)
        if isinstance(head, Head) and not keeps_few_logits(self.accelerator.unwrap_model(model)):
            head = self._head = f"{self._student_name(model)} has no logits_to_keep"
        if isinstance(head, str):
            if wanted is True:
                raise OptionError(f"fused = True, but {head}; set it to False or 'auto'")
            return None
        return head

    def _usable_head(self, model: nn.Module) -> Head | str:
        bare = bare_model(self._unwrapped(model))
        if self._head_model is not bare:
            # `model_init` makes another student in each `train`.
            self._head_model, self._head, self._head_checked = bare, None, False
        if self._head is None:
            fsdp1 = self.is_fsdp_enabled and not self.accelerator.is_fsdp2
            if fsdp1 or self.is_deepspeed_enabled:
                self._head = "the lm_head is sharded outside of the model's forward pass"
            else:
                self._head = find_head(self.accelerator.unwrap_model(model))
        return self._head

    def _checked_head(self, model: nn.Module, inputs: dict[str, Any]) -> Head | str:
        """The head of a model whose logits another loss makes, or why it cannot be used.

        The first call compares it with the model's own logits of a few tokens.
        """
        head = self._usable_head(model)
        if isinstance(head, str) or self._head_checked:
            return head
        self._head_checked = True
        ids, mask = inputs["input_ids"], inputs.get("attention_mask")
        row = 0 if mask is None else int(mask.sum(-1).argmax())
        few = ids[row]
        if mask is not None and bool(mask[row].any()):
            few = few[mask[row] != 0]
        # The step's own random numbers, for dropout, are left to the step.
        with torch.no_grad(), self._same_random_numbers(), head.capture(check=True) as hidden:
            output = self._unwrapped(model)(input_ids=few[None, :8], use_cache=False)
        states = head.hidden(hidden, few[None, :8])
        if isinstance(states, str):
            head = self._head = states
        elif not same_logits(self._head_of(head, states, model), output.logits):
            head = self._head = _does_more(self._student_name(model))
        return head

    def _same_random_numbers(self) -> contextlib.AbstractContextManager[None]:
        """Give torch's random numbers back as they were before the block."""
        device = self.args.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    def _unwrapped(self, model: nn.Module) -> nn.Module:
        """The model below data parallel and torch.compile, with its adapters."""
        unwrapped = self.accelerator.unwrap_model(model)
        return cast(nn.Module, getattr(unwrapped, "_orig_mod", unwrapped))

    def _student_name(self, model: nn.Module) -> str:
        return type(bare_model(self._unwrapped(model))).__name__

    def _head_of(self, head: Head, hidden: Tensor, model: nn.Module) -> LmHead:
        """The losses' input after a forward pass; a sharded head is gathered until the backward
        pass, which reduces its gradient with those of the rest."""
        if self.is_fsdp_enabled:
            cast(Any, model).unshard()
        return head.of(hidden, self._autocast_dtype())

    def _autocast_dtype(self) -> torch.dtype | None:
        """The dtype in which an autocast would make the logits."""
        kind = str(self.accelerator.mixed_precision)
        return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind)

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()


def _does_more(name: str) -> str:
    return f"{name} does more to its logits than scale, bias and softcap"
