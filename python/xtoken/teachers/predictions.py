"""What a teacher says of one sequence, checked, and cut to the mass that is kept."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from xtoken.errors import NonFiniteError, StoreError
from xtoken.targets.rows import repeated_column

# A softmax in float32 or bfloat16 sums to 1 within this.
_MASS_TOLERANCE = 1e-2


def overflow(value: float, position: int, length: int) -> NonFiniteError:
    """The error of a log-probability that no softmax gives, in a sequence of `length` tokens."""
    return NonFiniteError(
        f"the teacher predicts {value} at position {position} of a sequence of {length} tokens; it "
        "overflows in its dtype: load it in float32, or leave the text out"
    )


@dataclass(frozen=True)
class Predictions:
    """Teacher predictions of one token sequence; row `i` predicts token `i + 1`.

    Attributes:
        ids: [T, K] int64, teacher columns, falling log-probability.
        log_probs: [T, K] float32, natural logarithm, of the full softmax; -inf pads a short row.
        token_log_probs: [T] float32, of the token that follows; 0 at the last, which none follows.
    """

    ids: NDArray[np.int64]
    log_probs: NDArray[np.float32]
    token_log_probs: NDArray[np.float32]

    def check(self) -> None:
        """Refuse what no softmax gives, before it is stored for good.

        Raises:
            NonFiniteError: a log-probability is NaN or above 0 without bound.
            StoreError: the rows of a position have more than all mass, or name a column twice.
        """
        for name in ("log_probs", "token_log_probs"):
            values = getattr(self, name)
            # -inf is a column that the teacher rules out.
            bad = np.isnan(values) | np.isposinf(values)
            if bad.any():
                position = int(np.argwhere(bad)[0][0])
                raise overflow(float(values[bad][0]), position, len(values))
        mass = np.exp(self.log_probs.astype(np.float64)).sum(axis=-1)
        if len(mass) and float(mass.max()) > 1 + _MASS_TOLERANCE:
            position = int(mass.argmax())
            raise StoreError(
                f"the predictions of position {position} sum to {mass[position]:.4g}, expected at "
                "most 1; pass log-probabilities under the full softmax, not logits"
            )
        if repeated_column(self.ids, self.log_probs) is not None or (self.ids < 0).any():
            raise StoreError("a position names a teacher column twice or below 0; pass each once")

    def within(self, mass: float) -> Predictions:
        """The likeliest columns of each row that together reach `mass`, or all where none do."""
        probs = np.exp(self.log_probs.astype(np.float64))
        before = np.cumsum(probs, axis=-1) - probs
        kept = before < mass
        kept[:, 0] = True
        return replace(self, log_probs=np.where(kept, self.log_probs, np.float32(-np.inf)))

    def head(self, length: int) -> Predictions:
        """The predictions of the first `length` tokens alone."""
        tokens = self.token_log_probs[:length].copy()
        tokens[-1:] = 0.0
        return Predictions(self.ids[:length], self.log_probs[:length], tokens)
