"""vLLM's tokens in and out: the K best as JSON, chosen ids as one array of numbers."""

from __future__ import annotations

import base64
import binascii
import io
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from xtoken._files import JsonValue
from xtoken.errors import RefusedRequestError, ServerError
from xtoken.teachers.served.answers import (
    Ids,
    check_echo,
    items,
    malformed,
    member,
    predictions_of,
    prompt_of,
    token_lists,
)
from xtoken.teachers.served.api import IMPOSSIBLE_ID, ApiName, Question, explained, size_from
from xtoken.teachers.served.client import Connection
from xtoken.teachers.served.vllm import VllmCompletions, read_rows
from xtoken.teachers.shard import Predictions

_PATH = "/inference/v1/generate"


class VllmTokens:
    """`POST /inference/v1/generate`: one sequence per request, ids of the caller's choice.

    With `top_k = 0` only the chosen ids are asked for, and the token that follows.
    """

    name: ApiName = "vllm-tokens"

    def models(self, connection: Connection) -> list[str]:
        """Names of the models that are served."""
        return VllmCompletions().models(connection)

    def vocab_size(self, connection: Connection, model: str) -> int | None:
        """Number of columns of the model, from the refusal of an id that no vocabulary has."""
        parameters: dict[str, JsonValue] = {
            "max_tokens": 1,
            "prompt_logprob_token_ids": [[IMPOSSIBLE_ID]],
        }
        try:
            connection.post(
                _PATH, {"model": model, "token_ids": [0, 0], "sampling_params": parameters}
            )
        except RefusedRequestError as error:
            return size_from(error, r"Vocabulary size: (\d+)")
        return None

    def ask(
        self, connection: Connection, group: Sequence[Ids], question: Question
    ) -> Iterator[Predictions]:
        """Predictions of sequences, in their order, as they arrive."""
        for ids in group:
            yield _ask_one(connection, ids, question)


def _ask_one(connection: Connection, ids: Ids, question: Question) -> Predictions:
    prompt = prompt_of(ids)
    # The token that follows is a chosen id as well, and the last of its row.
    chosen = prompt[1:, None]
    if question.chosen is not None:
        chosen = np.concatenate([_distinct(question.chosen(ids)), chosen], axis=1)
    parameters: dict[str, JsonValue] = {
        "max_tokens": 1,
        "temperature": 1.0,
        "prompt_logprob_token_ids": token_lists(list(chosen)),
        "prompt_logprob_start": 0,
    }
    if question.top_k:
        parameters["prompt_logprobs"] = question.top_k
    body: dict[str, JsonValue] = {
        "model": question.model,
        "token_ids": token_lists([prompt])[0],
        "sampling_params": parameters,
        "return_token_ids": True,
    }
    try:
        answer = connection.post(_PATH, body)
    except RefusedRequestError as error:
        raise explained(error, max(question.top_k, chosen.shape[1]), len(prompt)) from error
    check_echo(prompt, member(answer, "prompt_token_ids"))
    scores = read_array(member(answer, "prompt_token_id_logprobs"), chosen.shape)
    found, log_probs, tokens = chosen[:, :-1], scores[:, :-1], scores[:, -1]
    if question.top_k:
        rows = items(member(answer, "prompt_logprobs"), "prompt_logprobs")
        best, best_log_probs, _ = read_rows(prompt, rows, question.top_k)
        # A chosen id that is among the K best would count twice.
        known = (found[:, :, None] == best[:, None, :]).any(2)
        found = np.concatenate([best, np.where(known, -1, found)], axis=1)
        log_probs = np.concatenate([best_log_probs, log_probs], axis=1)
    return predictions_of(
        found,
        log_probs,
        tokens,
        vocab_size=question.vocab_size,
        length=len(ids),
        width=question.width,
    )


def _distinct(chosen: Ids) -> Ids:
    """Rows without repeated ids: -1 in place of all but the first."""
    count = chosen.shape[1]
    earlier = np.tril(np.ones((count, count), bool), -1)
    repeated = ((chosen[:, :, None] == chosen[:, None, :]) & earlier).any(2)
    return np.where(repeated, -1, chosen)


def read_array(value: JsonValue, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The float32 array of a base64 `.npy`.

    Raises:
        ServerError: it is absent, damaged, or of another shape or type.
    """
    if not isinstance(value, str):
        raise ServerError(
            "the answer has no prompt_token_id_logprobs; the server does not score chosen ids: it "
            "needs vLLM 0.33 or later, else pass api='vllm'"
        )
    try:
        # Not np.load, which opens archives too.
        array = np.lib.format.read_array(
            io.BytesIO(base64.b64decode(value, validate=True)), allow_pickle=False
        )
    # A damaged header may name any size, and any type.
    except (
        binascii.Error,
        ValueError,
        TypeError,
        ArithmeticError,
        EOFError,
        OSError,
        MemoryError,
    ) as error:
        raise malformed("prompt_token_id_logprobs", value) from error
    if array.shape != shape or array.dtype != np.float32:
        raise ServerError(
            f"prompt_token_id_logprobs is {array.dtype} {array.shape}, expected float32 {shape}: "
            "one row per predicted token; the server cut the prompt: raise --max-model-len"
        )
    scores: NDArray[np.float32] = array
    return scores
