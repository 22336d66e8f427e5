"""SGLang's native generate: the K best of each prompt token, as flat arrays or nested lists."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from xtoken._files import JsonValue
from xtoken.errors import RefusedRequestError, ServerError
from xtoken.teachers.served.answers import (
    Ids,
    check_echo,
    ids_of,
    items,
    log_probs_of,
    malformed,
    member,
    predictions_of,
    prompt_of,
    token_lists,
)
from xtoken.teachers.served.api import IMPOSSIBLE_ID, ApiName, Question, explained, size_from
from xtoken.teachers.served.client import Connection
from xtoken.teachers.shard import Predictions

_PATH = "/generate"
_TYPES = {
    "idx": {"int32": "<i4", "int64": "<i8"},
    "val": {"float32": "<f4", "float64": "<f8"},
}


class SGLang:
    """`POST /generate` with `return_logprob`, several sequences per request."""

    name: ApiName = "sglang"

    def models(self, connection: Connection) -> list[str]:
        """The name of the model that is served."""
        try:
            answer = connection.get("/model_info")
        except RefusedRequestError:
            answer = connection.get("/get_model_info")  # its name before 0.5.5
        return [str(member(answer, "served_model_name") or member(answer, "model_path"))]

    def vocab_size(self, connection: Connection, model: str) -> int | None:
        """Number of columns of the model, from the refusal of an id that no vocabulary has."""
        body: dict[str, JsonValue] = {
            "input_ids": [0],
            "sampling_params": {"max_new_tokens": 1},
            "return_logprob": True,
            "token_ids_logprob": [IMPOSSIBLE_ID],
        }
        try:
            connection.post(_PATH, body)
        except RefusedRequestError as error:
            return size_from(error, r"valid range is \[0, (\d+)\)")
        return None

    def ask(
        self, connection: Connection, group: Sequence[Ids], question: Question
    ) -> Iterator[Predictions]:
        """Predictions of sequences, in their order."""
        prompts = [prompt_of(ids) for ids in group]
        body: dict[str, JsonValue] = {
            "input_ids": token_lists(prompts),
            "sampling_params": {"max_new_tokens": 1, "temperature": 0},
            "return_logprob": True,
            # The default, -1, gives those of the output alone.
            "logprob_start_len": 0,
            "top_logprobs_num": question.top_k,
            "return_flat_raw_top_logprobs": True,
            "return_flat_raw_top_logprobs_b64": True,
        }
        try:
            answer = connection.post(_PATH, body)
        except RefusedRequestError as error:
            raise explained(error, question.top_k, max(map(len, prompts))) from error
        for prompt, entry in zip(prompts, items(answer, "answers", len(group)), strict=True):
            info = member(entry, "meta_info")
            actual = items(member(info, "input_token_logprobs"), "input_token_logprobs")
            check_echo(prompt, [_pair(item)[1] for item in actual])
            own = [_pair(item)[0] for item in actual[1 : len(prompt)]]
            tokens = log_probs_of(own, "a log-probability")
            shape = (len(prompt) - 1, question.top_k)
            if member(info, "input_top_logprobs_shape") is not None:
                found, log_probs = _flat(info, shape)
            else:
                found, log_probs = _nested(info, shape)
            # JSON has no -inf, and writes it as null, as it does NaN. Where the logits were NaN,
            # so is the whole row.
            tokens[np.isnan(tokens) & ~np.isnan(log_probs).any(1)] = -np.inf
            yield predictions_of(
                found,
                log_probs,
                tokens,
                vocab_size=question.vocab_size,
                length=len(prompt) - 1,
                width=question.width,
            )


def _pair(item: JsonValue) -> list[JsonValue]:
    """[log-probability, id, text] of a token."""
    if not isinstance(item, list) or len(item) < 2:
        raise malformed("a log-probability", item)
    return item


def _flat(info: JsonValue, shape: tuple[int, int]) -> tuple[Ids, NDArray[np.float64]]:
    """Entries of the flat form: rows that follow some null ones."""
    stated = member(info, "input_top_logprobs_shape")
    nulls = member(info, "input_top_logprobs_null_prefix")
    if stated != list(shape) or nulls != 1:
        raise ServerError(
            f"input_top_logprobs has shape {stated} after {nulls} null rows, expected "
            f"{list(shape)} after 1; the server cut the prompt or left rows out: raise "
            "--context-length, and start it with --disable-radix-cache"
        )
    arrays = []
    for name, types in _TYPES.items():
        key = f"input_top_logprobs_{name}_flat_b64"
        content, kind = member(info, key), types.get(str(member(info, f"{key}_dtype")))
        try:
            if not isinstance(content, str) or kind is None:
                raise ValueError(key)
            data = base64.b64decode(content, validate=True)
            arrays.append(np.frombuffer(data, kind).reshape(shape))
        except (binascii.Error, ValueError) as error:
            raise malformed(key, content) from error
    ids = arrays[0].astype(np.int64)
    if (ids < 0).any():
        raise malformed("an id in input_top_logprobs", int(ids.min()))
    return ids, arrays[1].astype(np.float64)


def _nested(info: JsonValue, shape: tuple[int, int]) -> tuple[Ids, NDArray[np.float64]]:
    """Entries of the nested form, of older servers: null, then a list per token."""
    rows = items(member(info, "input_top_logprobs"), "input_top_logprobs")
    if len(rows) != shape[0] + 1 or rows[0] is not None:
        raise ServerError(
            f"input_top_logprobs has {len(rows)} rows for a prompt of {shape[0] + 1} tokens, "
            "expected as many, the first of them null; raise --context-length, and start the "
            "server with --disable-radix-cache"
        )
    content = [items(row, "a row of input_top_logprobs") for row in rows[1:]]
    if any(len(row) != shape[1] for row in content):
        raise ServerError(
            f"input_top_logprobs has rows of other lengths than top_k = {shape[1]}; update the "
            "server"
        )
    pairs = [_pair(entry) for row in content for entry in row]
    values = log_probs_of([pair[0] for pair in pairs], "a log-probability").reshape(shape)
    ids = ids_of([pair[1] for pair in pairs], "an id in input_top_logprobs").reshape(shape)
    # Within the K best null is -inf, unless the whole row is.
    values[np.isnan(values) & ~np.isnan(values).all(1, keepdims=True)] = -np.inf
    return ids, values
