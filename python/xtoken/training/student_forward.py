"""The student's forward pass in a Trainer: its logits, or hidden states and head in their place."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn
from transformers import Trainer

from xtoken.errors import OptionError
from xtoken.losses.engine.student_input import Student
from xtoken.teachers.model_head import Head, find_head, keeps_few_logits, same_logits
from xtoken.tensors.lm_head import LmHead
from xtoken.training.settings import DistillSettings

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class ForwardsStudent(_Base):
    """The part of `DistillMixin` that runs the student."""

    distill_settings: DistillSettings
    _head: Head | str | None = None
    _head_checked = False

    def _student(self, model: nn.Module, inputs: dict[str, Any]) -> Student:
        """The student's logits, or hidden states and head where those are all that is needed."""
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        with self._precision():
            head = self._fused_head(model)
            if head is None:
                logits: Tensor = model(**inputs, use_cache=False).logits
                return logits
            with head.capture() as hidden:
                output = model(**inputs, use_cache=False, logits_to_keep=1)
        rows = self._head_of(head, hidden[0], model)
        if not self._head_checked:
            self._head_checked = True
            if not same_logits(rows, output.logits):
                name = type(self.accelerator.unwrap_model(model)).__name__
                self._head = f"{name} does more to its logits than scale, bias and softcap"
                return self._student(model, inputs)
        return rows

    def _fused_head(self, model: nn.Module) -> Head | None:
        wanted = self.distill_settings.fused
        # An autocast would round the logits to 16 bits; of hidden states the product is float32.
        plain = self.args.device.type == "cpu" and self._autocast_dtype() is None
        if wanted is False or (wanted == "auto" and plain):
            return None
        head = self._usable_head(model)
        if isinstance(head, Head) and not keeps_few_logits(self.accelerator.unwrap_model(model)):
            head = self._head = f"{type(model).__name__} has no logits_to_keep"
        if isinstance(head, str):
            if wanted is True:
                raise OptionError(f"fused = True, but {head}; set it to False or 'auto'")
            return None
        return head

    def _usable_head(self, model: nn.Module) -> Head | str:
        if self._head is None:
            fsdp1 = self.is_fsdp_enabled and not self.accelerator.is_fsdp2
            if fsdp1 or self.is_deepspeed_enabled:
                self._head = "the lm_head is sharded outside of the model's forward pass"
            else:
                self._head = find_head(self.accelerator.unwrap_model(model))
        return self._head

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
