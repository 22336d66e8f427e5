"""What a teacher says of each next token: full logits, or the top k with the rest as a sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import InitVar, dataclass

import torch
from torch import Tensor

from xtoken._checks import check_number, expect
from xtoken.errors import NonFiniteError, OptionError, ShapeError, TokenIdError
from xtoken.targets.rows import repeated_column
from xtoken.tensors.full_logits import FullLogits
from xtoken.tensors.lm_head import LmHead, check_floats
from xtoken.tensors.rows import block_rows, upcast
from xtoken.tensors.teacher_spread import TeacherSpread

# What the rounding of log-probabilities may add to a mass of 1.
_MASS_TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 2e-2}
_HALF_TOLERANCE = 6e-2


@dataclass(frozen=True, eq=False)
class TeacherTopK:
    """The teacher's k best next tokens at each position; the rest of its mass is only a sum.

    Attributes:
        ids: [B, T_t, k] int64 teacher ids, distinct within a row but for pads.
        log_probs: [B, T_t, k] float, log-probabilities under the full vocabulary; -inf pads a
            short row, whatever its id. The tail mass is 1 - sum(exp(log_probs)).
        temperature: above 0, the one the log-probabilities were taken at.
        token_log_probs: [B, T_t] float or None; at position p the log-probability of token p + 1,
            which need not be among the k. The losses on chunk likelihoods ask for it.
        vocab_size: V_t where known; no id is beyond it.
        teacher_fingerprint: of the teacher's vocabulary, where known.

    Args:
        validate: look at the numbers: log-probabilities of distinct ids that sum to 1 at most. On
            the CPU alone, where it waits for nothing; False for what was checked before.

    Raises:
        ShapeError: dtypes or shapes that do not fit.
        OptionError: numbers that are no log-probabilities, or a token twice in a row.
        TokenIdError: an id below 0, or beyond `vocab_size`.
        NonFiniteError: a log-probability that is NaN.

    >>> signal = TeacherTopK(torch.tensor([[[7, 2]]]), torch.tensor([[[-0.1, -3.0]]]))
    >>> signal.ids.shape[2]
    2
    """

    ids: Tensor
    log_probs: Tensor
    temperature: float = 1.0
    token_log_probs: Tensor | None = None
    vocab_size: int | None = None
    teacher_fingerprint: str | None = None
    validate: InitVar[bool] = True

    def __post_init__(self, validate: bool) -> None:
        hint = "pass TeacherTopK.from_logits(logits, k), or tensors ids and log_probs"
        expect(self.ids, Tensor, "ids", hint)
        expect(self.log_probs, Tensor, "log_probs", hint)
        if self.ids.dtype != torch.int64 or self.ids.dim() != 3:
            raise ShapeError(
                f"ids is {self.ids.dtype} {tuple(self.ids.shape)}, expected int64 [B, T_t, k]"
            )
        if self.log_probs.shape != self.ids.shape or not self.log_probs.is_floating_point():
            raise ShapeError(
                f"log_probs is {self.log_probs.dtype} {tuple(self.log_probs.shape)}, "
                f"expected float {tuple(self.ids.shape)} like ids"
            )
        tokens = self.token_log_probs
        if tokens is not None and (
            tokens.shape != self.ids.shape[:2] or not tokens.is_floating_point()
        ):
            raise ShapeError(
                f"token_log_probs is {tokens.dtype} {tuple(tokens.shape)}, "
                f"expected float {tuple(self.ids.shape[:2])} like ids"
            )
        check_temperature(self.temperature)
        if validate and self.ids.device.type == "cpu" and not torch.compiler.is_compiling():
            _check_numbers(self)

    @classmethod
    @torch.no_grad()
    def from_logits(
        cls,
        logits: Tensor | LmHead | TeacherSpread,
        k: int,
        *,
        vocab_size: int | None = None,
        temperature: float = 1.0,
        ids: Tensor | None = None,
        teacher_fingerprint: str | None = None,
        positions: Tensor | None = None,
    ) -> TeacherTopK:
        """Take the top k of full logits, a few rows at a time.

        Args:
            logits: [B, T_t, V_t'] float; or an `LmHead` or a `TeacherSpread`, whose rows are never
                kept.
            k: entries per position, by falling log-probability; more than there are takes all.
            vocab_size: V_t where the lm_head is padded.
            temperature: above 0; divides the logits.
            ids: [B, T_t] int64 tokens, for `token_log_probs`.
            teacher_fingerprint: of the teacher's vocabulary, where known.
            positions: [B, T_t] bool, those that are read; at the others nothing is stored. None for
                all.

        Raises:
            ShapeError: logits are not [B, T_t, V_t'], or ids or positions do not fit.
            OptionError: k is below 1, or a temperature that is not above 0.
            TokenIdError: an id outside the vocabulary.
            NonFiniteError: a logit is NaN or +inf.

        >>> TeacherTopK.from_logits(torch.tensor([[[0.0, 2.0, 1.0]]]), 2).ids.tolist()
        [[[1, 2]]]
        """
        shape = teacher_positions(logits)
        check_number("k", k, 1, rule="must be at least 1", whole=True)
        check_temperature(temperature)
        if vocab_size is not None:
            rule = "must be a whole number of at least 1, or None for all columns"
            check_number("vocab_size", vocab_size, 1, rule=rule, whole=True)
        for name, given in (("ids", ids), ("positions", positions)):
            if given is not None and tuple(given.shape) != shape:
                raise ShapeError(
                    f"{name} has shape {tuple(given.shape)}, expected {shape} like the logits"
                )
        following = None if ids is None else ids.roll(-1, 1).flatten()  # the last is cut off below
        found: list[tuple[Tensor, Tensor, Tensor]] = []
        flat = FullLogits.of(logits, vocab_size)
        size = flat.width
        if ids is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < size:
            raise TokenIdError(
                f"ids span [{int(ids.min())}, {int(ids.max())}], outside the teacher vocabulary "
                f"(V_t = {size}); pass the teacher's own ids"
            )
        if not shape[0] * shape[1]:
            raise ShapeError(f"logits of {list(shape)} positions: there is no position")
        step = block_rows(size, flat.device)
        places = torch.arange(shape[0] * shape[1], device=flat.device)
        if positions is not None:
            places = places[positions.flatten().to(flat.device)]
        for index in torch.split(places, step):
            rows = torch.log_softmax(flat.rows(index) / temperature, -1)
            best = torch.topk(rows, min(k, size))
            tokens = rows[:, 0]
            if following is not None:
                tokens = rows.gather(1, following[index, None]).squeeze(1)
            found.append((best.indices, best.values, tokens.clone()))
        kept, log_probs, tokens = (torch.cat(part) for part in zip(*found, strict=True))
        nan = torch.isnan(log_probs[:, 0])  # NaN is first in a top k
        if bool(nan.any()):
            row, position = divmod(int(places[nan.nonzero()[0]]), shape[1])
            raise NonFiniteError(
                f"logits[{row}, {position}] holds NaN or +inf, "
                "expected finite logits or -inf; look at the teacher's precision and its mask"
            )
        if positions is not None:
            count = shape[0] * shape[1]
            nothing = log_probs.new_full((count, kept.shape[1]), -torch.inf)
            kept = kept.new_zeros(nothing.shape).index_copy(0, places, kept)
            log_probs = nothing.index_copy(0, places, log_probs)
            tokens = tokens.new_zeros(count).index_copy(0, places, tokens)
        token_log_probs = None
        if ids is not None:
            token_log_probs = tokens.view(shape)
            token_log_probs[:, -1] = 0.0  # nothing follows the last
        return cls(
            kept.view(*shape, -1), log_probs.view(*shape, -1), temperature, token_log_probs,
            vocab_size, teacher_fingerprint, validate=False,
        )  # fmt: skip

    def to(self, device: torch.device | str) -> TeacherTopK:
        """The same signal on another device."""
        return self.map_tensors(lambda tensor: tensor.to(device))

    def pin_memory(self) -> TeacherTopK:
        """The same signal in pinned memory, for a copy to a GPU that waits for nothing."""
        return self.map_tensors(Tensor.pin_memory)

    def require_temperature(self, asked: float, asks: str) -> None:
        """Refuse log-probabilities of another temperature, as they lack what rescaling needs.

        Args:
            asked: the temperature that they must be of.
            asks: who asks for it, with a verb, in the message.

        Raises:
            OptionError: they are of another.
        """
        if self.temperature != asked:
            raise OptionError(
                f"the stored top-k was taken at temperature {self.temperature}, {asks} {asked}; "
                "pass the teacher's full logits, or TeacherTopK.from_logits(..., "
                f"temperature={asked}) of them"
            )

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> TeacherTopK:
        """The same signal with `move` of each of its tensors."""
        tokens = self.token_log_probs
        return TeacherTopK(
            move(self.ids),
            move(self.log_probs),
            self.temperature,
            None if tokens is None else move(tokens),
            self.vocab_size,
            self.teacher_fingerprint,
            validate=False,
        )


Teacher = Tensor | TeacherTopK | TeacherSpread | LmHead


def teacher_positions(teacher: Teacher) -> tuple[int, int]:
    """(B, T_t) of a teacher signal."""
    expect(
        teacher, (Tensor, TeacherTopK, TeacherSpread, LmHead), "teacher",
        "pass the teacher's logits [B, T_t, V_t'], a TeacherTopK of them, or an LmHead",
    )  # fmt: skip
    if isinstance(teacher, LmHead):
        return teacher.hidden.shape[0], teacher.hidden.shape[1]
    if isinstance(teacher, TeacherSpread):
        return teacher.positions
    if isinstance(teacher, Tensor):
        check_floats("teacher", teacher, "pass the teacher's logits [B, T_t, V_t']")
    shape = teacher.shape if isinstance(teacher, Tensor) else teacher.ids.shape
    if len(shape) != 3:
        raise ShapeError(f"teacher has shape {tuple(shape)}, expected [B, T_t, V_t] logits")
    return shape[0], shape[1]


def check_temperature(temperature: object) -> None:
    """Raise OptionError unless the temperature is a finite number above 0."""
    check_number(
        "temperature", temperature, 0, inside=True,
        rule="must be above 0 and finite; 1.0 leaves the logits as they are",
    )  # fmt: skip


def _check_numbers(signal: TeacherTopK) -> None:
    """Raise unless each row is a part of a distribution over distinct tokens."""
    log_probs, ids = upcast(signal.log_probs.detach()), signal.ids
    if ids.numel() == 0:
        return
    tolerance = _MASS_TOLERANCE.get(signal.log_probs.dtype, _HALF_TOLERANCE)
    mass = torch.exp(log_probs).sum(-1)  # NaN fails the test below too
    if not bool((mass <= 1 + tolerance).all()):
        row = (~(mass <= 1 + tolerance)).nonzero()[0].tolist()
        if bool(torch.isnan(mass[*row])):
            raise NonFiniteError(
                f"log_probs[{row[0]}, {row[1]}] holds NaN, expected log-probabilities or -inf; "
                "the teacher overflowed: compute its predictions again"
            )
        raise OptionError(
            f"log_probs[{row[0]}, {row[1]}] sums to {float(mass[*row]):.4g} as probabilities, "
            "expected 1 at most: log-probabilities under the full vocabulary; "
            "pass logits through TeacherTopK.from_logits"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0:
        raise TokenIdError(f"ids hold {low}; pad a short row with log_probs = -inf")
    if signal.vocab_size is not None and high >= signal.vocab_size:
        raise TokenIdError(
            f"ids hold {high}, outside the teacher vocabulary (V_t = {signal.vocab_size}); "
            "pass the predictions of this teacher"
        )
    width = ids.shape[-1]
    found = repeated_column(ids.numpy().reshape(-1, width), log_probs.numpy().reshape(-1, width))
    if found is not None:
        at = divmod(found[0], ids.shape[1])
        raise OptionError(
            f"ids[{at[0]}, {at[1]}] names token {found[1]} twice, expected distinct "
            "tokens; pad a short row with log_probs = -inf"
        )
