"""A teacher that runs beside the student: logits on the fly, never a graph."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from xtoken._checks import expect
from xtoken.errors import OptionError
from xtoken.teachers.causal import causal_logits
from xtoken.teachers.load_model import load_causal_lm
from xtoken.teachers.model_fingerprint import model_fingerprint
from xtoken.teachers.model_head import Head, bare_model, find_head, keeps_few_logits, same_logits
from xtoken.teachers.offloaded import working_device
from xtoken.teachers.probe import check_causal, check_kind
from xtoken.tensors.lm_head import LmHead
from xtoken.tensors.teacher_signal import TeacherTopK
from xtoken.tensors.teacher_spread import TeacherSpread


class TeacherSource(Protocol):
    """Anything that gives the teacher's predictions of a padded batch."""

    def signal(self, ids: Tensor, attention_mask: Tensor) -> Tensor | TeacherTopK | TeacherSpread:
        """Return logits [B, T, V], or the likeliest columns of each position."""


class LiveTeacher:
    """A causal language model in evaluation mode, without gradients.

    Args:
        model: called as `model(input_ids=..., attention_mask=...)`, returns an object with `logits`
            `[B, T, V]`; its parameters are frozen here.

    Raises:
        ModelSourceError: an encoder-decoder; where it is first asked, a model of transformers that
            sees the tokens which follow.
        OptionError: an adapter of peft with tokens of its own before the text.
    """

    def __init__(self, model: nn.Module) -> None:
        hint = "pass a causal language model, or LiveTeacher.from_pretrained(...)"
        check_kind(expect(model, nn.Module, "model", hint), "teacher")
        self.model = model.eval().requires_grad_(False)
        self.tokens_computed = 0
        self._fingerprint: str | None = None
        self._head: Head | str | None = None
        self._head_checked = False

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
        **options: object,
    ) -> LiveTeacher:
        """Load a teacher with `transformers`; `options` go to its `from_pretrained`.

        Args:
            device: where to put it; None leaves it on the CPU or where `device_map` has it, which
                may offload what a device has no room for.

        The default is float32: bfloat16 is emulated, and slower, on most CPUs.
        """
        if device is not None and options.get("device_map") is not None:
            raise OptionError(
                f"device = {str(device)!r} and device_map = {options['device_map']!r} both say "
                "where the teacher goes; leave one out"
            )
        model = load_causal_lm(path, side="teacher", dtype=dtype, **options)
        return cls(model.to(device) if device is not None else model)

    @property
    def device(self) -> torch.device:
        """Where the model takes its tokens: that of its parameters, but for those offloaded."""
        return working_device(self.model)

    @property
    def fingerprint(self) -> str:
        """As `model_fingerprint` gives it; computed once, on first use."""
        if self._fingerprint is None:
            self._fingerprint = model_fingerprint(self.model)
        return self._fingerprint

    @torch.no_grad()
    def logits(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the raw next-token logits of a padded batch.

        Args:
            ids: [B, T] int64.
            attention_mask: [B, T], 1 for a token and 0 for padding on either side.
        Returns: [B, T, V] in the dtype of the model, detached, on the device of the model.
        """
        ids, mask = ids.to(self.device), attention_mask.to(self.device)
        logits = causal_logits(self.model, ids, mask, side="teacher")
        self.tokens_computed += int(attention_mask.sum())
        return logits

    def signal(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the teacher signal of a padded batch: its full logits."""
        return self.logits(ids, attention_mask)

    @torch.no_grad()
    def fused(self, inputs: Mapping[str, Tensor]) -> LmHead | str:
        """Hidden states and lm_head, of which a loss makes the logits that it reads; or the reason
        why this model's logits must be made whole.

        The first call compares the logits of the last position with the model's own.

        Args:
            inputs: of the model, see `causal_inputs`.
        """
        check_causal(self.model, "teacher")
        name = type(bare_model(self.model)).__name__
        if self._head is None:
            self._head = find_head(self.model)
        if isinstance(self._head, Head) and not keeps_few_logits(self.model):
            self._head = f"{name} has no logits_to_keep"
        if isinstance(self._head, str):
            return self._head
        if isinstance(self._head.linear.weight, DTensor):
            return f"the lm_head of {name} is sharded after its forward pass"
        if self._head.linear.weight.is_meta:
            return f"the lm_head of {name} is offloaded after its forward pass"
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        with self._head.capture(check=not self._head_checked) as hidden:
            output = self.model(**inputs, use_cache=False, logits_to_keep=1)
        states = self._head.hidden(hidden, inputs["input_ids"])
        if isinstance(states, str):
            self._head = states
            return states
        found = self._head.of(states, None)
        if not self._head_checked and not same_logits(found, output.logits):
            self._head = f"{name} does more to its logits than scale, bias and softcap"
            return self._head
        self._head_checked = True
        self.tokens_computed += int(inputs.get("attention_mask", inputs["input_ids"] >= 0).sum())
        return found
