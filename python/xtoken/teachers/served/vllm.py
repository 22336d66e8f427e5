"""vLLM's OpenAI-compatible completions: the K best of each prompt token, as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from xtoken._files import JsonValue
from xtoken.errors import RefusedRequestError, ServerError
from xtoken.teachers.served.answers import (
    Ids,
    check_echo,
    foreign_ids,
    ids_of,
    in_order,
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

_PATH = "/v1/completions"
# Of an entry without a rank.
_LAST_RANK = 2**31
# Ten digits are more than 32 bits.
_ID_LENGTHS = frozenset(range(1, 11))


class VllmCompletions:
    """`POST /v1/completions` with `prompt_logprobs`, several sequences per request."""

    name: ApiName = "vllm"

    def models(self, connection: Connection) -> list[str]:
        """Names of the models that are served."""
        data = items(member(connection.get("/v1/models"), "data"), "data")
        return [str(member(entry, "id")) for entry in data]

    def vocab_size(self, connection: Connection, model: str) -> int | None:
        """Number of columns of the model, from the refusal of an id that no vocabulary has."""
        body: dict[str, JsonValue] = {
            "model": model,
            "prompt": [0],
            "max_tokens": 1,
            "logprob_token_ids": [IMPOSSIBLE_ID],
        }
        try:
            connection.post(_PATH, body)
        except RefusedRequestError as error:
            return size_from(error, r"Vocabulary size: (\d+)")
        return None  # an older server, which does not know the field

    def ask(
        self, connection: Connection, group: Sequence[Ids], question: Question
    ) -> Iterator[Predictions]:
        """Predictions of sequences, in their order."""
        prompts = [prompt_of(ids) for ids in group]
        body: dict[str, JsonValue] = {
            "model": question.model,
            "prompt": token_lists(prompts),
            "max_tokens": 1,
            # Never the default of the model's generation_config.
            "temperature": 1.0,
            "prompt_logprobs": question.top_k,
            "return_token_ids": True,
        }
        try:
            answer = connection.post(_PATH, body)
        except RefusedRequestError as error:
            raise explained(error, question.top_k, max(map(len, prompts))) from error
        choices = items(member(answer, "choices"), "choices", len(group))
        for prompt, choice in zip(prompts, in_order(choices), strict=True):
            check_echo(prompt, member(choice, "prompt_token_ids"))
            rows = items(member(choice, "prompt_logprobs"), "prompt_logprobs")
            found = read_rows(prompt, rows, question.top_k)
            yield predictions_of(
                *found, vocab_size=question.vocab_size, length=len(prompt) - 1, width=question.width
            )


def read_rows(
    prompt: Ids, rows: Sequence[JsonValue], top_k: int
) -> tuple[Ids, NDArray[np.float64], NDArray[np.float64]]:
    """The K best of each predicted token, and the log-probability of that token itself.

    Args:
        prompt: [T + 1] ids as they were sent.
        rows: `prompt_logprobs`: null, then an object per token, of K or K + 1 entries in no order.
        top_k: K.

    Returns: [T, K] ids and log-probabilities, by rank; [T] of the tokens that follow.

    Raises:
        ServerError: a row is missing or has another number of entries, or lacks its own token.
    """
    if not rows or rows[0] is not None or len(rows) != len(prompt):
        raise ServerError(
            f"prompt_logprobs has {len(rows)} entries for a prompt of {len(prompt)} tokens, "
            "expected as many, the first null; the server cut the prompt: raise --max-model-len"
        )
    entries: list[dict[str, Any]] = []
    for place, row in enumerate(rows[1:], 1):
        if not isinstance(row, dict) or len(row) not in (top_k, top_k + 1):
            count = len(row) if isinstance(row, dict) else "no"
            raise ServerError(
                f"prompt_logprobs has {count} entries at position {place}, expected {top_k} or "
                f"{top_k + 1}; the server left some out: start vLLM with --no-enable-prefix-caching"
            )
        entries.append(row)
    width = top_k + 1
    found = np.full((len(entries), width), -1, np.int64)
    log_probs = np.full((len(entries), width), -np.inf)
    ranks = np.full((len(entries), width), _LAST_RANK, np.int64)
    try:
        for index, entry in enumerate(entries):
            count = len(entry)
            values = entry.values()
            found[index, :count] = _keys(entry)
            log_probs[index, :count] = log_probs_of(
                [value["logprob"] for value in values], "a log-probability"
            )
            ranks[index, :count] = ids_of(
                [value.get("rank") or _LAST_RANK for value in values], "a rank"
            )
    except (TypeError, KeyError, AttributeError) as error:
        raise malformed("prompt_logprobs", entries[index]) from error
    own = found == prompt[1:, None]  # [T, K + 1]
    if not own.any(1).all():
        place = int((~own.any(1)).argmax()) + 1
        raise foreign_ids(place, int(prompt[place]), None)
    tokens = np.where(own, log_probs, 0.0).sum(1)
    # By rank; an entry without one by its value. The token's own entry may come after the K best.
    order = np.lexsort((-log_probs, ranks), axis=1)[:, :top_k]
    return np.take_along_axis(found, order, 1), np.take_along_axis(log_probs, order, 1), tokens


def _keys(entry: dict[str, Any]) -> Ids:
    """The ids that the entries of a position are named after."""
    name = "an id in prompt_logprobs"
    # Of all keys at once, as there are millions of them.
    text, lengths = "".join(entry), set(map(len, entry))
    if not text.isdecimal() or not text.isascii() or not lengths.issubset(_ID_LENGTHS):
        raise malformed(name, next(key for key in entry if not _is_id(key)))
    return np.fromiter(map(int, entry), np.int64, len(entry))


def _is_id(key: str) -> bool:
    """Whether it is spelled as JSON spells an id; int() reads signs, spaces and all scripts."""
    return key.isdecimal() and key.isascii() and len(key) in _ID_LENGTHS
