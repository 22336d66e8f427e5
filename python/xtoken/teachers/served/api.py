"""What differs between servers: how predictions are asked for, and how answers look."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from xtoken.errors import RefusedRequestError, ServerError
from xtoken.teachers.served.client import Connection
from xtoken.teachers.shard import Predictions

Ids = NDArray[np.int64]
ApiName = Literal["vllm", "vllm-tokens", "sglang"]

# No vocabulary has this id: the refusal names the size of the one that is served.
IMPOSSIBLE_ID = 2**31 - 1


@dataclass(frozen=True)
class ChosenIds:
    """Ids that are scored at each position besides the K best, known before the server is asked.

    Args:
        choose: from the ids of a sequence [T] to [T, width] int64, row `p` for the prediction
            of token `p + 1`; -1 pads a row, ids may also be among the K best.
        width: entries of a row, at most.
        name: part of the fingerprint: other rules, other name.
    """

    choose: Callable[[Ids], Ids]
    width: int
    name: str

    def __call__(self, ids: Ids) -> Ids:
        """The checked rows of a sequence."""
        rows = np.asarray(self.choose(ids), np.int64)
        if rows.ndim != 2 or len(rows) != len(ids) or rows.shape[1] > self.width:
            raise ServerError(
                f"chosen ids of a sequence have shape {rows.shape}, expected "
                f"[{len(ids)}, at most {self.width}]: one row per token"
            )
        return rows


@dataclass(frozen=True)
class Question:
    """What is asked of each position.

    Attributes:
        model: the name that the server knows its model by.
        top_k: the K best.
        vocab_size: V_t of the teacher's tokenizer.
        chosen: further ids; for `vllm-tokens` alone.
    """

    model: str
    top_k: int
    vocab_size: int
    chosen: ChosenIds | None = None

    @property
    def width(self) -> int:
        """Entries of a row of predictions."""
        return self.top_k + (0 if self.chosen is None else self.chosen.width)


class Api(Protocol):
    """One server's dialect."""

    name: ApiName

    def models(self, connection: Connection) -> list[str]:
        """Names of the models that are served."""

    def vocab_size(self, connection: Connection, model: str) -> int | None:
        """Number of columns of the model; None where the server does not tell."""

    def ask(
        self, connection: Connection, group: Sequence[Ids], question: Question
    ) -> Iterator[Predictions]:
        """Predictions of sequences, none empty, in their order, as they arrive."""


def size_from(error: RefusedRequestError, pattern: str) -> int | None:
    """The vocabulary's size in a refusal, or None where it does not stand there."""
    found = re.search(pattern, error.reason)
    return None if found is None else int(found[1])


def explained(error: RefusedRequestError, top_k: int, longest: int) -> ServerError:
    """A refusal with the flag or argument that helps."""
    reason = error.reason
    cap = re.search(r"greater than max allowed: (\d+)", reason)
    if cap is not None:
        return ServerError(
            f"top_k = {top_k} is above the server's cap of {cap[1]}; start vLLM with "
            f"--max-logprobs -1, or pass top_k={cap[1]}"
        )
    if "V2 model runner" in reason:
        return ServerError(
            "this vLLM does not score chosen ids; start it with VLLM_USE_V2_MODEL_RUNNER=1, or "
            "pass api='vllm'"
        )
    if re.search(r"context length|model length|max_model_len", reason):
        return ServerError(
            f"a sequence of {longest} tokens is longer than the server's context ({reason}); raise "
            "--max-model-len (vLLM) or --context-length (SGLang), or pass a smaller max_tokens"
        )
    return error
