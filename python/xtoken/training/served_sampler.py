"""Answers of a student that a server runs: vLLM, or another with OpenAI's completions."""

from __future__ import annotations

from xtoken._checks import shown
from xtoken._core import Vocab
from xtoken._files import JsonValue
from xtoken.errors import ServerError
from xtoken.teachers.served.answers import ids_of, in_order, items, member
from xtoken.teachers.served.client import Connection, RetryPolicy
from xtoken.training.on_policy import SampleRequest, until_stop

_PATH = "/v1/completions"


class ServedSampler:
    """Asks `POST /v1/completions` with the prompts' ids.

    vLLM answers with ids (`return_token_ids`), which stay as they are. Of a server that answers
    with text alone the student's tokenizer makes ids again. The server samples with the weights
    that it has loaded: whoever trains puts the student's there.

    Args:
        url: of the server; a name and password in it are neither kept nor printed.
        vocab: the student's.
        model: as the server names it; None for the first one that it serves.
        policy: of retries.
        api_key: sent as a bearer token; None for the environment variable `XTOKEN_API_KEY`, if set.

    Raises:
        ServerError: no server is there, or its answer cannot be used.
    """

    def __init__(
        self,
        url: str,
        vocab: Vocab,
        model: str | None = None,
        *,
        policy: RetryPolicy | None = None,
        api_key: str | None = None,
    ) -> None:
        self._connection = Connection(url, policy=policy or RetryPolicy(), api_key=api_key)
        self._vocab = vocab
        self._model = model

    def __call__(self, request: SampleRequest) -> list[list[int]]:
        """The answers, in the order of the prompts."""
        if not request.prompts:
            return []
        prompts: list[JsonValue] = [list(prompt) for prompt in request.prompts]
        body: dict[str, JsonValue] = {
            "model": self._served(),
            "prompt": prompts,
            "max_tokens": request.max_new_tokens,
            "temperature": request.temperature,
            "top_p": request.top_p,
            "seed": request.seed,
            # A server takes what is not said from the model's generation_config.
            "top_k": -1,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": list(request.stops),
            "return_token_ids": True,
        }
        answer = self._connection.post(_PATH, body)
        choices = items(member(answer, "choices"), "choices", len(prompts))
        return [self._ids(choice, request) for choice in in_order(choices)]

    def _ids(self, choice: JsonValue, request: SampleRequest) -> list[int]:
        given = member(choice, "token_ids")
        if isinstance(given, list):
            ids = ids_of(given, "token_ids").tolist()
        else:
            text = member(choice, "text")
            spelled = self._vocab.segment(text.encode()) if isinstance(text, str) else None
            if spelled is None:
                raise ServerError(
                    f"{self._connection.url} answered {shown(text)} without token_ids, which the "
                    "student's vocabulary cannot spell; use a server that returns ids, as vLLM does"
                )
            ids = spelled
        beyond = next((token for token in ids if not 0 <= token < len(self._vocab)), None)
        if beyond is not None:
            raise ServerError(
                f"{self._connection.url} sampled token {beyond}, the student has "
                f"{len(self._vocab)}; it serves another model"
            )
        ids = until_stop(ids, request.stops)
        stopped = member(choice, "finish_reason") == "stop"
        if stopped and request.stops and (not ids or ids[-1] not in request.stops):
            ids.append(request.stops[0])
        return ids

    def _served(self) -> str:
        if self._model is None:
            models = items(member(self._connection.get("/v1/models"), "data"), "models")
            name = member(models[0], "id") if models else None
            if not isinstance(name, str):
                raise ServerError(f"{self._connection.url} serves no model; start it with one")
            self._model = name
        return self._model
