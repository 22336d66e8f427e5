"""What a teacher says of each next token: full logits, or the top k with the rest as a sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xtoken.tensors.rows import block_rows, upcast


@dataclass(frozen=True, eq=False)
class TeacherTopK:
    """The teacher's k best next tokens at each position; the rest of its mass is only a sum.

    Attributes:
        ids: [B, T_t, k] int64 teacher ids, distinct within a row but for pads.
        log_probs: [B, T_t, k] float, log-probabilities under the full vocabulary; -inf pads a
            short row, whatever its id. The tail mass is 1 - sum(exp(log_probs)).
        temperature: > 0, the one the log-probabilities were taken at.
        token_log_probs: [B, T_t] float or None; at position p the log-probability of token p + 1,
            which need not be among the k. The losses on chunk likelihoods ask for it.
    """

    ids: Tensor
    log_probs: Tensor
    temperature: float = 1.0
    token_log_probs: Tensor | None = None

    def __post_init__(self) -> None:
        if self.ids.dtype != torch.int64 or self.ids.dim() != 3:
            raise ValueError(
                f"ids is {self.ids.dtype} {tuple(self.ids.shape)}, expected int64 [B, T_t, k]"
            )
        if self.log_probs.shape != self.ids.shape or not self.log_probs.is_floating_point():
            raise ValueError(
                f"log_probs is {self.log_probs.dtype} {tuple(self.log_probs.shape)}, "
                f"expected float {tuple(self.ids.shape)} like ids"
            )
        if not self.temperature > 0:
            raise ValueError(f"temperature = {self.temperature} must be above 0")

    @classmethod
    @torch.no_grad()
    def from_logits(
        cls,
        logits: Tensor,
        k: int,
        *,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        ids: Tensor | None = None,
    ) -> TeacherTopK:
        """Take the top k of full logits, a few rows at a time.

        Args:
            logits: [B, T_t, V_t'] float.
            k: entries a position, by falling log-probability; more than there are takes all.
            vocab_size: V_t where the lm_head is padded.
            temperature: > 0, divides the logits.
            ids: [B, T_t] int64 tokens, for `token_log_probs`.

        Raises:
            ValueError: logits are not [B, T_t, V_t'], k is below 1, or ids do not fit.
        """
        positions = teacher_positions(logits)
        if k < 1:
            raise ValueError(f"k = {k} must be at least 1")
        if ids is not None and tuple(ids.shape) != positions:
            raise ValueError(
                f"ids has shape {tuple(ids.shape)}, expected {positions} like the logits"
            )
        following = None if ids is None else ids.roll(-1, 1).flatten()  # the last is cut off below
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        flat = logits.flatten(0, 1)[:, :vocab_size]
        size = flat.shape[1]
        if ids is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise ValueError(
                f"ids span [{int(ids.min())}, {int(ids.max())}], outside the teacher vocabulary "
                f"(V_t = {size}); pass the teacher's own ids"
            )
        step = block_rows(size, flat.device)
        for start in range(0, len(flat), step):
            rows = torch.log_softmax(upcast(flat[start : start + step]) / temperature, -1)
            best = torch.topk(rows, min(k, size))
            tokens = rows[:, 0]
            if following is not None:
                tokens = rows.gather(1, following[start : start + step, None]).squeeze(1)
            found.append((best.indices, best.values, tokens.clone()))
        if not found:
            raise ValueError(f"logits has shape {tuple(logits.shape)}: there is no position")
        kept, log_probs, tokens = (torch.cat(part) for part in zip(*found, strict=True))
        shape = (*positions, min(k, size))
        token_log_probs = None
        if ids is not None:
            token_log_probs = tokens.view(positions)
            token_log_probs[:, -1] = 0.0  # nothing follows the last
        return cls(kept.view(shape), log_probs.view(shape), temperature, token_log_probs)

    def to(self, device: torch.device | str) -> TeacherTopK:
        """The same signal on another device."""
        tokens = self.token_log_probs
        return TeacherTopK(
            self.ids.to(device),
            self.log_probs.to(device),
            self.temperature,
            None if tokens is None else tokens.to(device),
        )


Teacher = Tensor | TeacherTopK


def teacher_positions(teacher: Teacher) -> tuple[int, int]:
    """(B, T_t) of a teacher signal."""
    shape = teacher.ids.shape if isinstance(teacher, TeacherTopK) else teacher.shape
    if len(shape) != 3:
        raise ValueError(f"teacher has shape {tuple(shape)}, expected [B, T_t, V_t] logits")
    return shape[0], shape[1]
