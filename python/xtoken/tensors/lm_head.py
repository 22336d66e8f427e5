"""Hidden states and an lm_head, of which logits are made a part at a time and never kept."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken._checks import expect, shown
from xtoken.errors import OptionError, ShapeError

# Chosen columns of an lm_head copied at a time: 8 MB of float32 weights at 2,048 features.
_TILE = 1024

HALVES = (torch.float16, torch.bfloat16)
_FLOATS = (torch.float32, torch.float64, *HALVES)
# A product of 16-bit numbers that is given in float32 as it was summed; on GPUs, from torch 2.8 on.
_HAS_OUT_DTYPE = tuple(int(x) for x in torch.__version__.split(".")[:2]) >= (2, 8)


@dataclass(frozen=True, eq=False)
class LmHead:
    """Hidden states and the lm_head that would turn them into logits: the fused losses' input.

    logits = softcap * tanh(scale * (hidden @ weight.T + bias) / softcap), made a block of rows at a
    time and never kept. Pass it wherever a loss takes the logits of a student or a teacher.

    Attributes:
        hidden: [B, T, H] float, the last hidden states, after the final norm.
        weight: [V', H] float.
        bias: [V'] float or None.
        scale: factor on the logits (Cohere's logit_scale; 1 / Granite's logits_scaling).
        softcap: Gemma-2's final_logit_softcapping, > 0, or None.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def __post_init__(self) -> None:
        check_floats("hidden", self.hidden, "pass the last hidden states, [B, T, H]")
        check_floats("weight", self.weight, "pass model.lm_head.weight, dequantized")
        if self.bias is not None:
            check_floats("bias", self.bias, "pass model.lm_head.bias, or None")
        for name in ("scale", "softcap"):
            value = getattr(self, name)
            if name == "softcap" and value is None:
                continue
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise OptionError(
                    f"{name} = {shown(value)}, expected a number, which gets no gradient; pass "
                    "float(...) of it"
                )
            if not math.isfinite(value):
                raise OptionError(f"{name} = {value}, expected a finite number")
        if self.hidden.dim() != 3 or self.weight.dim() != 2:
            raise ShapeError(
                f"hidden {tuple(self.hidden.shape)} and weight {tuple(self.weight.shape)}: "
                "expected [B, T, H] and [V, H]"
            )
        if self.hidden.shape[2] != self.weight.shape[1]:
            raise ShapeError(
                f"hidden has {self.hidden.shape[2]} features, weight {self.weight.shape[1]}; "
                "pass the lm_head of the model that made the hidden states"
            )
        if self.bias is not None and self.bias.shape != self.weight.shape[:1]:
            raise ShapeError(
                f"bias has shape {tuple(self.bias.shape)}, expected ({self.weight.shape[0]},)"
            )
        if self.softcap is not None and not self.softcap > 0:
            raise OptionError(f"softcap = {self.softcap} must be above 0, or None for no cap")

    def rows(self, index: Tensor, columns: Tensor | None = None, *, width: int) -> Tensor:
        """[N, K] logits of flattened positions, float32 or float64.

        Args:
            index: [N] int64 positions.
            columns: [K] int64; None for the first `width`.
        """
        hidden = self.hidden.flatten(0, 1).index_select(0, index)
        parts = []
        for tile in head_tiles(columns, width):
            part = product(hidden, self.weight[tile].t())
            parts.append(part if self.bias is None else part + self.bias[tile].to(part.dtype))
        return self._ended(parts[0] if len(parts) == 1 else torch.cat(parts, 1))

    def entries(self, index: Tensor, columns: Tensor) -> Tensor:
        """[S] logits at (position, column) pairs, float32 or float64."""
        hidden = self.hidden.flatten(0, 1)
        parts = [torch.zeros(0, dtype=product_dtype(hidden, self.weight), device=hidden.device)]
        for some, column in zip(
            torch.split(index, _TILE), torch.split(columns, _TILE), strict=True
        ):
            wide = parts[0].dtype
            part = (hidden[some].to(wide) * self.weight[column].to(wide)).sum(1)
            parts.append(part if self.bias is None else part + self.bias[column].to(wide))
        return self._ended(torch.cat(parts))

    def _ended(self, raw: Tensor) -> Tensor:
        if self.scale != 1.0:
            raw = raw * self.scale
        return raw if self.softcap is None else self.softcap * torch.tanh(raw / self.softcap)


def check_floats(name: str, tensor: object, hint: str) -> None:
    """Refuse what is no tensor of floats that can be read.

    Raises:
        ArgumentTypeError: no tensor.
        ShapeError: another dtype, such as that of quantized weights; a sparse one, or on `meta`.
    """
    found = expect(tensor, Tensor, name, hint)
    if found.dtype not in _FLOATS:
        raise ShapeError(f"{name} is {found.dtype}, expected float32, bfloat16, ...; {hint}")
    if found.layout != torch.strided:
        raise ShapeError(f"{name} is {found.layout}, expected a dense tensor; pass .to_dense()")
    if found.device.type == "meta":
        raise ShapeError(f"{name} is on the device meta and holds nothing; load the model first")


def head_tiles(columns: Tensor | None, width: int) -> list[Tensor | slice]:
    """Columns of an lm_head that are worked on together: a chosen column's weights are copied, and
    the copy is kept small; all of them are used in place."""
    if columns is None:
        return [slice(0, width)]
    return list(torch.split(columns, _TILE))


def product_dtype(left: Tensor, right: Tensor) -> torch.dtype:
    """Of a product of these: float32, or float64 where one of them is."""
    return torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)


def product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right in float32 or float64, under an autocast too: logits rounded to 16 bits would
    change the gradient of a small KL by a fifth."""
    if torch.is_autocast_enabled(left.device.type):
        with torch.autocast(left.device.type, enabled=False):
            return product(left, right)
    both = left.dtype if left.dtype == right.dtype else None
    if both in HALVES and left.device.type == "cuda" and _HAS_OUT_DTYPE:
        return torch.mm(left, right, out_dtype=torch.float32)
    wide = product_dtype(left, right)
    return left.to(wide) @ right.to(wide)
