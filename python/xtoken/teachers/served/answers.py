"""From a server's numbers to predictions: what a log-probability may not be is refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken._files import JsonValue
from xtoken.errors import ServerError
from xtoken.targets.rows import repeated_column
from xtoken.teachers.shard import Predictions
from xtoken.vocab.head_size import most_columns

Ids = NDArray[np.int64]

# vLLM's word for -inf.
_NO_MASS = -9999.0
# Of a sum of probabilities in float32, or of logits in bfloat16 that were normalized in it.
_MASS_TOLERANCE = 1e-3
_INTEGERS: frozenset[type] = frozenset({int})
_NUMBERS: frozenset[type] = frozenset({int, float, type(None)})


def predictions_of(
    ids: Ids,
    log_probs: NDArray[Any],
    token_log_probs: NDArray[Any],
    *,
    vocab_size: int,
    length: int,
    width: int,
) -> Predictions:
    """Checked predictions of one sequence from the rows that a server gave.

    Args:
        ids: [T, K] of the entries; -1 pads a row.
        log_probs: [T, K], in any order within a row.
        token_log_probs: [T], of the tokens that follow in the prompt of `prompt_of`.
        vocab_size: V_t.
        length: T.
        width: K of what is returned; shorter rows are padded with -inf.

    Returns: rows by falling log-probability.

    Raises:
        ServerError: rows are missing, a number is NaN or above 0, probabilities sum to more
            than 1, an id comes twice or lies outside the vocabulary.
    """
    if len(ids) != length:
        raise ServerError(
            f"the answer has {len(ids)} rows for a prompt of {length + 1} tokens, expected "
            f"{length}; the server cut the prompt or left rows out: raise its context length "
            "(--max-model-len, --context-length), and start it without prefix caching"
        )
    values = np.where(log_probs <= _NO_MASS, -np.inf, log_probs).astype(np.float32)
    values[ids < 0] = -np.inf
    tokens = np.where(token_log_probs <= _NO_MASS, -np.inf, token_log_probs).astype(np.float32)
    tokens[-1] = 0.0  # the token that was added
    _check(ids, values, tokens, vocab_size)
    order = np.argsort(-values, axis=1, kind="stable")
    sorted_ids = np.zeros((length, width), np.int64)
    sorted_values = np.full((length, width), -np.inf, np.float32)
    count = values.shape[1]
    sorted_ids[:, :count] = np.maximum(np.take_along_axis(ids, order, 1), 0)
    sorted_values[:, :count] = np.take_along_axis(values, order, 1)
    # Rounding in the server's softmax may leave 1e-7 above 0.
    return Predictions(sorted_ids, np.minimum(sorted_values, 0.0), np.minimum(tokens, 0.0))


def ids_of(values: Sequence[JsonValue], name: str) -> Ids:
    """Token ids of an answer, int64.

    Raises:
        ServerError: one is no integer of at least 0. What lies outside the vocabulary is left to
            `predictions_of`, which knows it.
    """
    found = _array(values, name, _INTEGERS, np.int64)
    if (found < 0).any():
        raise malformed(name, values[int((found < 0).argmax())])
    return found


def log_probs_of(values: Sequence[JsonValue], name: str) -> NDArray[np.float64]:
    """Log-probabilities of an answer; null, as JSON writes NaN and infinity, is NaN.

    Raises:
        ServerError: one is no number.
    """
    return _array(values, name, _NUMBERS, np.float64)


def _array(
    values: Sequence[JsonValue], name: str, kinds: frozenset[type], dtype: type[Any]
) -> NDArray[Any]:
    # By set, as an answer has millions of them. NumPy would read text, and true as 1.
    if not kinds.issuperset(map(type, values)):
        raise malformed(name, next(value for value in values if type(value) not in kinds))
    try:
        return np.array(values, dtype)
    except OverflowError as error:
        raise malformed(name, max(values, key=_size)) from error


def _size(value: JsonValue) -> float | int:
    return abs(value) if isinstance(value, int | float) else 0


def in_order(choices: Sequence[JsonValue]) -> list[JsonValue]:
    """The choices of an answer by their `index`, which servers may send in any order.

    Raises:
        ServerError: they are not numbered from 0 on.
    """
    places = ids_of([member(choice, "index") for choice in choices], "index")
    if sorted(places.tolist()) != list(range(len(choices))):
        raise malformed("index", places.tolist())
    return [choices[at] for at in np.argsort(places)]


def prompt_of(ids: Ids) -> Ids:
    """A sequence and one more token, so that the server scores what follows the last one too."""
    return np.append(ids, ids[-1:])


def _check(
    ids: Ids, values: NDArray[np.float32], tokens: NDArray[np.float32], vocab_size: int
) -> None:
    bad = np.isnan(values).any(1) | np.isnan(tokens)
    if bad.any():
        raise ServerError(
            f"a log-probability at position {int(bad.argmax())} is NaN: the logits overflowed "
            "in the server; start it with --dtype bfloat16 or --dtype float32"
        )
    mass = np.exp(values).sum(1)
    bad = (mass > 1 + _MASS_TOLERANCE) | (tokens > _MASS_TOLERANCE)
    if bad.any():
        place = int(bad.argmax())
        raise ServerError(
            f"the probabilities at position {place} sum to {float(mass[place]):.4g}, expected at "
            "most 1; the server must give log-probabilities of the raw logits "
            "(--logprobs-mode raw_logprobs)"
        )
    repeated = repeated_column(ids, np.where(ids < 0, -np.inf, values))
    if repeated is not None:
        raise ServerError(
            f"id {repeated[1]} comes twice at position {repeated[0]}; the answer is damaged: "
            "update the server"
        )
    # Columns past the tokenizer's are padding of the lm_head, and have next to no mass.
    foreign = np.where(ids >= vocab_size, np.exp(values), 0).sum(1)
    if (foreign > _MASS_TOLERANCE).any():
        place = int(foreign.argmax())
        raise ServerError(
            f"the server gives {float(foreign[place]):.3g} of its mass to ids such as "
            f"{int(ids[place].max())}, outside the teacher vocabulary (V_t = {vocab_size}); pass "
            "vocab= of the tokenizer that is served"
        )
    highest = int(ids.max(initial=0))
    if highest >= most_columns(vocab_size):
        raise ServerError(
            f"the answer names id {highest}, which no head of the teacher vocabulary (V_t = "
            f"{vocab_size}) has; pass vocab= of the tokenizer that is served, or update the server"
        )


def check_echo(sent: Ids, returned: JsonValue) -> None:
    """Refuse an answer whose prompt is not the one that was sent.

    Args:
        sent: [T].
        returned: the ids that the server says it scored; None where it says nothing.
    """
    if returned is None:
        return
    if not isinstance(returned, list):
        raise malformed("prompt_token_ids", returned)
    count = min(len(sent), len(returned))
    if list(sent[:count]) == returned[:count]:
        ids_of(returned[:count], "the prompt")  # true would be 1
        if len(returned) >= len(sent):
            return
        raise ServerError(
            f"the server scored {len(returned)} of the {len(sent)} ids that were sent; raise its "
            "context length (--max-model-len, --context-length)"
        )
    place = next(index for index in range(count) if sent[index] != returned[index])
    raise foreign_ids(place, int(sent[place]), returned[place])


def foreign_ids(place: int, sent: int, returned: JsonValue) -> ServerError:
    """The error where a prompt did not come back as it went."""
    found = "nothing" if returned is None else _shown(returned)
    return ServerError(
        f"id {sent} at position {place} came back as {found}; the server changes the prompt "
        "(an added BOS, a chat template, a proxy): send to the engine's own port, and use api= of "
        "that engine"
    )


def malformed(name: str, value: object) -> ServerError:
    """The error where a part of an answer has another form."""
    return ServerError(
        f"{name} of the answer is {_shown(value)!r}; the server speaks another format: check "
        "url= and api= (vllm, vllm-tokens or sglang), and the server's version"
    )


def _shown(value: object) -> str:
    try:
        return str(value)[:80]
    except RecursionError:
        return "deeply nested"


def member(value: JsonValue, key: str) -> JsonValue:
    """An entry of a JSON object; None where it is absent."""
    if not isinstance(value, dict):
        raise malformed(f"the parent of {key!r}", value)
    return value.get(key)


def items(value: JsonValue, name: str, count: int | None = None) -> list[JsonValue]:
    """A JSON list, of `count` items where given."""
    if not isinstance(value, list):
        raise malformed(name, value)
    if count is not None and len(value) != count:
        raise ServerError(
            f"{name} of the answer has {len(value)} items, expected {count}, one per sequence; "
            "check api= and the server's version"
        )
    return value


def token_lists(group: Sequence[Ids]) -> list[JsonValue]:
    """Sequences of ids as JSON."""
    return [[int(token) for token in ids] for ids in group]
