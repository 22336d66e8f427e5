"""A teacher behind HTTP: vLLM or SGLang give its predictions, in this process no weights are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from xtoken._checks import expect
from xtoken._core import Vocab
from xtoken._files import JsonValue
from xtoken.errors import (
    OptionError,
    RefusedRequestError,
    ServerError,
    TokenIdError,
    UnavailableServerError,
    XTokenError,
)
from xtoken.losses import TeacherTopK
from xtoken.teachers.predict import padded_signal
from xtoken.teachers.served.answers import items, member
from xtoken.teachers.served.api import Api, ApiName, ChosenIds, Question
from xtoken.teachers.served.client import Connection, RetryPolicy
from xtoken.teachers.served.probe import ENTRIES, Probe, fixed_prompt
from xtoken.teachers.served.sglang import SGLang
from xtoken.teachers.served.vllm import VllmCompletions
from xtoken.teachers.served.vllm_tokens import VllmTokens
from xtoken.teachers.shard import Predictions
from xtoken.vocab.head_size import most_columns

Ids = NDArray[np.int64]

_APIS: dict[ApiName, type[Api]] = {
    "vllm": VllmCompletions,
    "vllm-tokens": VllmTokens,
    "sglang": SGLang,
}


@dataclass(frozen=True)
class Answered:
    """Sequences with their predictions, of one request."""

    sequences: list[Ids]
    predictions: list[Predictions]

    @property
    def tokens(self) -> int:
        """Number of tokens of the sequences."""
        return sum(map(len, self.sequences))


_Outcome: TypeAlias = tuple[Answered, ServerError | None]


class ServedTeacher:
    """The top-k log-probabilities of a model that a server runs.

    Nothing is asked before predictions or the fingerprint are needed; then the server's model and
    vocabulary are compared with what was passed here.

    Args:
        url: where the server listens, such as `http://localhost:8000`; a name and password in it
            are sent, and neither kept nor printed.
        vocab: the teacher's `Vocab`, its tokenizer, or the number of its ids. With a tokenizer the
            server's is compared by the text of some tokens too.
        top_k: entries kept per position.
        api: the server's dialect; `auto` asks the server.
        model: as the server names it; None where it serves one.
        chosen: further ids to score at each position (`vllm-tokens` alone).
        temperature: 1, as that of a request does not reach the log-probabilities of its prompt.
        concurrency: requests under way at once.
        timeout: seconds that the server may be silent.
        retries: tries after the first, with exponential backoff.
        backoff: seconds before the second try.
        tokens_per_request: prompts of a request hold at most so many tokens, or one sequence.
        api_key: sent as a bearer token; None for the environment variable `XTOKEN_API_KEY`, if set.

    Raises:
        OptionError: a value is outside its range.
        MissingExtraError: the extra `serve` is not installed.
    """

    def __init__(
        self,
        url: str,
        *,
        vocab: object,
        top_k: int,
        api: ApiName | Literal["auto"] = "auto",
        model: str | None = None,
        chosen: ChosenIds | None = None,
        temperature: float = 1.0,
        concurrency: int = 8,
        timeout: float = 120.0,
        retries: int = 5,
        backoff: float = 0.5,
        tokens_per_request: int = 4096,
        api_key: str | None = None,
    ) -> None:
        expect(url, str, "url", "pass an address such as http://localhost:8000")
        if temperature != 1:
            raise OptionError(
                f"temperature = {temperature}, but a served teacher answers at 1, and a top-k "
                "cannot be rescaled; pass temperature=1, or run the teacher here with "
                "LiveTeacher.from_pretrained"
            )
        if api != "auto" and api not in _APIS:
            raise OptionError(f"api = {api!r}, expected auto or one of {', '.join(_APIS)}")
        if chosen is not None and api not in ("auto", "vllm-tokens"):
            raise OptionError(f"api = {api!r} does not score chosen ids; pass api='vllm-tokens'")
        limits = {
            "top_k": (top_k, 0 if chosen is not None else 1),
            "concurrency": (concurrency, 1),
            "retries": (retries, 0),
            "tokens_per_request": (tokens_per_request, 1),
        }
        for name, (value, least) in limits.items():
            if value < least:
                raise OptionError(f"{name} = {value}, expected at least {least}")
        if not timeout > 0 or not backoff >= 0:
            raise OptionError(
                f"timeout = {timeout}, backoff = {backoff}, expected seconds: above 0, at least 0"
            )
        self.vocab: Vocab | int = vocab if isinstance(vocab, int) else Vocab.from_tokenizer(vocab)
        self.vocab_size = self.vocab if isinstance(self.vocab, int) else len(self.vocab)
        if top_k > self.vocab_size:
            raise OptionError(
                f"top_k = {top_k} is more than the teacher vocabulary has (V_t = "
                f"{self.vocab_size}); pass a smaller top_k"
            )
        self.top_k = top_k
        self.chosen = chosen
        self.concurrency = concurrency
        self.tokens_per_request = tokens_per_request
        self.tokens_answered = 0
        self._api_name = api
        self._model_name = model
        self._known_fingerprint: str | None = None
        self._connecting = threading.RLock()
        policy = RetryPolicy(retries=retries, backoff=backoff, timeout=timeout)
        self.connection = Connection(url, connections=concurrency, policy=policy, api_key=api_key)

    @property
    def width(self) -> int:
        """Entries of a row of predictions: the K best and the chosen ones."""
        return self.top_k + (0 if self.chosen is None else self.chosen.width)

    @property
    def vocab_fingerprint(self) -> str:
        """That of the teacher's vocabulary; empty where only its size is known."""
        return "" if isinstance(self.vocab, int) else self.vocab.fingerprint

    @cached_property
    def api(self) -> Api:
        """The server's dialect, asked for where it was not given."""
        name = self._api_name
        if name == "auto":
            name = "vllm-tokens" if self.chosen is not None else _detect(self.connection)
        return _APIS[name]()

    @cached_property
    def question(self) -> Question:
        """What is asked per position, once the server's model and vocabulary were found right.

        Raises:
            ServerError: it serves other models than `model`, or another vocabulary.
        """
        with self._connecting:
            model = self._find_model()
            self._check_vocabulary(model)
            return Question(model, self.top_k, self.vocab_size, self.chosen)

    @property
    def model(self) -> str:
        """The name that the server knows its model by."""
        return self.question.model

    @cached_property
    def probe(self) -> Probe:
        """The server's answer to the fixed prompt."""
        with self._connecting:
            return self._asked_probe(self.connection)

    def _asked_probe(self, connection: Connection) -> Probe:
        prompt = fixed_prompt(self.vocab)
        entries = min(ENTRIES, self.vocab_size)

        def ask(count: int) -> Probe:
            question = Question(self.model, count, self.vocab_size)
            answers = self.api.ask(connection, [prompt], question)
            return Probe.of(self.model, prompt, next(iter(answers)))

        try:
            return ask(entries)
        except UnavailableServerError:
            raise
        except ServerError:
            # The server may cap them; what is asked for anyway it gives.
            if not 0 < self.top_k < entries:
                raise
            return ask(self.top_k)

    def require_same_model(self, *, retries: int | None = None) -> None:
        """Ask the fixed prompt again: a server that was started anew may serve other weights under
        the same name.

        Args:
            retries: of this request; None for those of the teacher.

        Raises:
            ServerError: it is answered differently, or not at all.
        """
        now = self._asked_probe(self.connection.variant(retries=retries))
        if not now.agrees(self.probe):
            raise ServerError(
                f"{self.connection.url} serves another {self.model} than before: its answer to a "
                f"fixed prompt has changed (digest {self.probe.digest[:12]}, now "
                f"{now.digest[:12]}); start the model of before again, or use another folder"
            )

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits: the model's name, its answer to a fixed prompt, chosen ids."""
        if self._known_fingerprint is None:
            self._known_fingerprint = self.probe.digest
            if self.chosen is not None:
                self._known_fingerprint += f"+{self.chosen.name}"
        return self._known_fingerprint

    def recognise(self, known: Probe) -> bool:
        """Take over the fingerprint of an earlier answer, if it was this model's.

        Servers round differently from one start to the next, so digests differ where models do not.
        """
        if not self.probe.agrees(known):
            return False
        self.probe = known
        self._known_fingerprint = None
        return True

    def predictions(self, sequences: Sequence[Ids]) -> list[Predictions]:
        """Predictions of sequences, in their order; equal sequences are asked for once.

        Args:
            sequences: [T] int64 each, teacher ids, none empty.

        Raises:
            ServerError: the server cannot be reached, refuses, or answers what cannot be used.
            TokenIdError: an id is outside the teacher vocabulary.
        """
        distinct = {ids.tobytes(): ids for ids in sequences}
        found = {
            ids.tobytes(): predictions
            for answered in self.answers(distinct.values(), spread=True)
            for ids, predictions in zip(answered.sequences, answered.predictions, strict=True)
        }
        return [found[ids.tobytes()] for ids in sequences]

    def signal(self, ids: Tensor, attention_mask: Tensor) -> TeacherTopK:
        """The server's predictions of a padded batch, as `TopKStore.signal` gives stored ones.

        Args:
            ids: [B, T] int64.
            attention_mask: [B, T], 1 for a token and 0 for padding on either side.
        """
        rows = [
            row[mask.bool()].numpy()
            for row, mask in zip(ids.cpu(), attention_mask.cpu(), strict=True)
        ]
        found = dict(zip((row.tobytes() for row in rows), self.predictions(rows), strict=True))
        return padded_signal(
            lambda row: found[row.tobytes()],
            ids,
            attention_mask,
            self.vocab_fingerprint,
        )

    def answers(self, sequences: Iterable[Ids], *, spread: bool = False) -> Iterator[Answered]:
        """Ask for sequences and give the answers as they come, in any order.

        Where a request fails for good, or a sequence cannot be asked for, the answers of the
        requests that are under way still come; then the error is raised. After a request that had
        to be repeated the model is asked for again, as it may be another one's server.

        Args:
            sequences: [T] int64 each, teacher ids, none empty.
            spread: make as many requests as may be under way, for an early end rather than few.

        Raises: as `predictions`.
        """
        limit = self.tokens_per_request
        if spread:
            sequences = list(sequences)
            limit = min(limit, -(-sum(map(len, sequences)) // self.concurrency))
        requests = self._requests(sequences, limit)
        first = next(requests, None)
        if first is None:
            return
        stopped = threading.Event()
        connection = self.connection.variant(stopped=stopped)
        question = self.question
        failure: XTokenError | None = None
        troubles = connection.troubles

        def ask(group: list[Ids]) -> tuple[Answered, ServerError | None]:
            arrived: list[Predictions] = []
            failure = None
            try:
                if not stopped.is_set():
                    for predictions in self.api.ask(connection, group, question):
                        arrived.append(predictions)
            except ServerError as error:
                failure = error
            return Answered(group[: len(arrived)], arrived), failure

        try:
            under_way = {_in_background(ask, first)}
            while True:
                while failure is None and len(under_way) < self.concurrency:
                    try:
                        group = next(requests, None)
                    except XTokenError as refusal:
                        failure = refusal
                        break
                    if group is None:
                        break
                    under_way.add(_in_background(ask, group))
                if not under_way:
                    break
                done, under_way = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    answered, error = future.result()
                    if error is not None and failure is None:
                        failure = error
                        stopped.set()
                    if not answered.sequences:
                        continue
                    if connection.troubles > troubles:
                        troubles = connection.troubles
                        self.require_same_model()
                    self.tokens_answered += answered.tokens
                    yield answered
        finally:
            stopped.set()
        if failure is not None:
            raise failure

    def _requests(self, sequences: Iterable[Ids], limit: int) -> Iterator[list[Ids]]:
        """Groups of at most `limit` tokens, or of one sequence."""
        group: list[Ids] = []
        tokens = 0
        for index, ids in enumerate(sequences):
            self._check_ids(index, ids)
            if group and tokens + len(ids) > limit:
                yield group
                group, tokens = [], 0
            group.append(ids)
            tokens += len(ids)
        if group:
            yield group

    def _check_ids(self, index: int, ids: Ids) -> None:
        if len(ids) == 0:
            raise ServerError(f"sequence {index} is empty, expected tokens; leave it out")
        for place in (int(ids.argmin()), int(ids.argmax())):
            if not 0 <= int(ids[place]) < self.vocab_size:
                raise TokenIdError(
                    f"id {int(ids[place])} at position {place} of sequence {index} is outside the "
                    f"teacher vocabulary (V_t = {self.vocab_size}); pass the tokenizer that made "
                    "these ids"
                )

    def _find_model(self) -> str:
        served = self.api.models(self.connection)
        wanted = self._model_name
        if wanted is None and len(served) == 1:
            return served[0]
        if wanted is None or wanted not in served:
            told = "no model was named" if wanted is None else f"model = {wanted!r}"
            raise ServerError(
                f"{told}, but {self.connection.url} serves {', '.join(served) or 'none'}; pass "
                "model= with one of them"
            )
        return wanted

    def _check_vocabulary(self, model: str) -> None:
        size = self.api.vocab_size(self.connection, model)
        most = most_columns(self.vocab_size)
        if size is not None and not self.vocab_size <= size <= most:
            raise ServerError(
                f"{model} at {self.connection.url} has a vocabulary of {size}, the tokenizer of "
                f"vocab= has {self.vocab_size}; pass vocab= of the model that is served (or "
                f"vocab={size} if both belong together)"
            )
        if isinstance(self.vocab, int):
            return
        prompt = fixed_prompt(self.vocab)
        served = _text(self.connection, model, prompt)
        own = self.vocab.decode_bytes(prompt.tolist()).decode(errors="replace")
        if served is not None and served.split() != own.split():
            raise ServerError(
                f"{model} at {self.connection.url} reads the ids {prompt[:3].tolist()}… as "
                f"{served[:30]!r}, the tokenizer of vocab= as {own[:30]!r}; pass vocab= of the "
                "model that is served"
            )

    def close(self) -> None:
        """Close the connections."""
        self.connection.close()

    def __enter__(self) -> ServedTeacher:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _in_background(ask: Callable[[list[Ids]], _Outcome], group: list[Ids]) -> Future[_Outcome]:
    """Ask in a thread of its own, which no end of the process waits for: a server may be silent for
    minutes when a user ends it."""
    future: Future[_Outcome] = Future()

    def run() -> None:
        try:
            future.set_result(ask(group))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="served-teacher", daemon=True).start()
    return future


def _detect(connection: Connection) -> ApiName:
    """The dialect of a server by what it says of itself."""
    try:
        data = items(member(connection.get("/v1/models"), "data"), "data")
    except RefusedRequestError as error:
        if error.status != 404:
            raise
        connection.get("/model_info")
        return "sglang"
    owners = [member(entry, "owned_by") for entry in data]
    return "sglang" if "sglang" in owners else "vllm"


def _text(connection: Connection, model: str, ids: Ids) -> str | None:
    """What the server's tokenizer makes of ids; None where it does not tell."""
    try:
        body: dict[str, JsonValue] = {"model": model, "tokens": ids.tolist()}
        answer = connection.variant(retries=0).post("/detokenize", body)
    except ServerError:
        return None
    for key in ("prompt", "text"):  # vLLM, SGLang
        text = member(answer, key)
        if isinstance(text, str):
            return text
    return None
