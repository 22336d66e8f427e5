"""A real HTTP server on loopback with a real small model, in the formats of vLLM and SGLang.

Requests and answers are those of vllm 0.33.0 and sglang 0.5.23, refusals in their words. Faults are
switched on one by one.
"""

from __future__ import annotations

import base64
import io
import json
import math
import random
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import torch
from torch import nn

Rows = list[tuple[np.ndarray, np.ndarray]]


@dataclass
class Faults:
    """What goes wrong; counts go down with each request that they spoil.

    Attributes:
        slow: seconds before each answer.
        errors: answers with `error_status`, as many.
        cut: connections that end in the middle of an answer, as many.
        not_json: whole answers that are cut off, as many.
        die_after: requests answered before the server is gone.
        cap: `--max-logprobs`.
        no_mass: ids whose logits are -inf, which vLLM writes as -9999.0.
        unordered: entries of a position in random order.
        without_ranks: entries without a rank.
        duplicate: an id comes twice (SGLang).
        raw_logits: logits in place of log-probabilities.
        nan: the third position is NaN.
        other_ids: a BOS before the prompt, as of a chat template.
        no_echo: `prompt_token_ids` is absent, as in older servers.
        short: the last row is left out.
        hole: null in the middle.
        nested: SGLang without the flat form.
        two_models: a second name is served.
        old: probes of the vocabulary are not understood; no text of tokens.
    """

    slow: float = 0.0
    errors: int = 0
    error_status: int = 500
    cut: int = 0
    not_json: int = 0
    die_after: int | None = None
    cap: int = 20
    no_mass: tuple[int, ...] = ()
    unordered: bool = False
    without_ranks: bool = False
    duplicate: bool = False
    raw_logits: bool = False
    nan: bool = False
    other_ids: bool = False
    no_echo: bool = False
    short: bool = False
    hole: bool = False
    nested: bool = False
    two_models: bool = False
    old: bool = False


class RefuseError(Exception):
    """The request is refused with this status and these words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(words)
        self.status = status


class ServedModel:
    """A server of one causal language model; a context that ends it.

    Attributes:
        asked: how often each sequence was scored, by its ids; probes of one token are left out.
        requests: POST requests of the scoring paths, spoiled ones included.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str,
        *,
        tokenizer: Any = None,
        name: str = "tiny-teacher",
        faults: Faults | None = None,
        max_model_len: int = 512,
        port: int = 0,
    ) -> None:
        self.model = model.eval()
        self.kind = kind
        self.tokenizer = tokenizer
        self.name = name
        self.faults = faults or Faults()
        self.max_model_len = max_model_len
        self.asked: Counter[tuple[int, ...]] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.requests = 0
        self.busiest = 0
        self._busy = 0
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        )
        self._thread.start()

    @property
    def port(self) -> int:
        return self._server.server_address[1]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def vocab_size(self) -> int:
        return int(self.model.config.vocab_size)

    @property
    def tokens_asked(self) -> int:
        return sum(len(ids) * count for ids, count in self.asked.items())

    def kill(self) -> None:
        """End at once: the port is closed, and so are all connections."""
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self._sockets):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass
        self._thread.join()

    def __enter__(self) -> ServedModel:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            # As real servers do: a body that follows its head is not held back for 40 ms.
            disable_nagle_algorithm = True

            def setup(self) -> None:
                super().setup()
                outer._sockets.add(self.connection)

            def finish(self) -> None:
                outer._sockets.discard(self.connection)
                try:
                    super().finish()
                except OSError:
                    pass

            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                outer._serve(self, {})

            def do_POST(self) -> None:
                length = int(self.headers["Content-Length"])
                outer._serve(self, json.loads(self.rfile.read(length)))

        return Handler

    def _serve(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        faults = self.faults
        scores = handler.path in ("/v1/completions", "/inference/v1/generate", "/generate")
        with self._lock:
            self.requests += scores
            self.bodies.append(body)
            self._busy += 1
            self.busiest = max(self.busiest, self._busy)
        try:
            if scores and faults.die_after is not None:
                faults.die_after -= 1
                if faults.die_after < 0:
                    threading.Thread(target=self.kill, daemon=True).start()
                    handler.close_connection = True
                    handler.connection.shutdown(socket.SHUT_RDWR)
                    return
            time.sleep(faults.slow if scores else 0)
            if scores and self._spoils("errors"):
                self._send(handler, faults.error_status, {"error": {"message": "engine is busy"}})
                return
            try:
                content = self._answer(handler.path, body)
            except RefuseError as error:
                words = {"message": str(error), "type": "BadRequestError", "code": error.status}
                nested = {"error": words} if self.kind != "sglang" else words
                self._send(handler, error.status, nested)
                return
            if scores and self._spoils("cut"):
                data = json.dumps(content).encode()
                self._head(handler, 200, len(data))
                handler.wfile.write(data[: len(data) // 2])
                handler.wfile.flush()
                handler.close_connection = True
                handler.connection.shutdown(socket.SHUT_RDWR)
            elif scores and self._spoils("not_json"):
                data = json.dumps(content).encode()
                self._send_bytes(handler, 200, data[: len(data) // 2])
            else:
                self._send(handler, 200, content)
        except OSError:
            handler.close_connection = True
        finally:
            with self._lock:
                self._busy -= 1

    def _spoils(self, fault: str) -> bool:
        with self._lock:
            left = getattr(self.faults, fault)
            setattr(self.faults, fault, max(0, left - 1))
            return left > 0

    def _send(self, handler: BaseHTTPRequestHandler, status: int, content: Any) -> None:
        self._send_bytes(handler, status, json.dumps(content).encode())

    def _send_bytes(self, handler: BaseHTTPRequestHandler, status: int, data: bytes) -> None:
        self._head(handler, status, len(data))
        handler.wfile.write(data)

    def _head(self, handler: BaseHTTPRequestHandler, status: int, length: int) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", "application/json")
        handler.send_header("Content-Length", str(length))
        handler.end_headers()

    def _answer(self, path: str, body: dict[str, Any]) -> Any:
        vllm = self.kind != "sglang"
        if path == "/v1/models":
            owner = "vllm" if vllm else "sglang"
            names = [self.name, "another"] if self.faults.two_models else [self.name]
            return {"object": "list", "data": [{"id": n, "owned_by": owner} for n in names]}
        if path == "/model_info" and not vllm:
            return {"model_path": f"/models/{self.name}", "served_model_name": self.name}
        if path == "/detokenize" and self.tokenizer is not None and not self.faults.old:
            text = self.tokenizer.decode(body["tokens"])
            return {"prompt" if vllm else "text": text}
        if path == "/v1/completions" and vllm:
            return self._completions(body)
        if path == "/inference/v1/generate" and self.kind == "vllm-tokens":
            return self._tokens(body)
        if path == "/generate" and not vllm:
            return self._sglang(body)
        raise RefuseError(404, "Not Found")

    # What the model says.

    def _log_probs(self, ids: list[int]) -> torch.Tensor:
        """[T, V] of the next tokens."""
        if len(ids) + 1 > self.max_model_len:
            raise RefuseError(
                400,
                f"This model's maximum context length is {self.max_model_len} tokens. However, "
                f"you requested {len(ids) + 1} tokens",
            )
        if not all(0 <= token < self.vocab_size for token in ids):
            raise RefuseError(400, f"Token id {max(ids)} is out of vocabulary")
        with self._lock, torch.no_grad():
            if len(ids) > 1:
                self.asked[tuple(ids)] += 1
            logits = self.model(torch.tensor([ids])).logits[0].float()
        logits[:, list(self.faults.no_mass)] = -torch.inf
        if self.faults.nan:
            logits[2:] = torch.nan
        return logits + 30 if self.faults.raw_logits else logits.log_softmax(-1)

    def _prompt(self, ids: list[int]) -> list[int]:
        return [0, *ids] if self.faults.other_ids else ids

    def _check_cap(self, count: int, words: str) -> None:
        cap = self.vocab_size if self.faults.cap == -1 else self.faults.cap
        if count > cap:
            raise RefuseError(400, f"{words}, which is greater than max allowed: {cap}")

    # vLLM

    def _prompt_logprobs(self, ids: list[int], top_k: int) -> list[dict[str, Any] | None]:
        log_probs = self._log_probs(ids)
        found: list[dict[str, Any] | None] = [None]
        shuffle = random.Random(0).shuffle
        rows = log_probs[:-1]
        actual = rows.gather(1, torch.tensor(ids[1:]).view(-1, 1))
        ranks = (rows > actual).sum(1) + 1
        best = rows.topk(top_k)
        for own, own_value, own_rank, tokens, values in zip(
            ids[1:],
            actual[:, 0].tolist(),
            ranks.tolist(),
            best.indices.tolist(),
            best.values.tolist(),
            strict=True,
        ):
            # The actual token first, then the K best, as vLLM does it.
            entries = {own: (own_value, own_rank)}
            entries |= {
                token: (value, index + 1)
                for index, (token, value) in enumerate(zip(tokens, values, strict=True))
            }
            listed = list(entries.items())
            if self.faults.unordered:
                shuffle(listed)
            found.append(
                {
                    str(token): {
                        "logprob": -9999.0 if value == -np.inf else value,
                        "rank": None if self.faults.without_ranks else rank,
                        "decoded_token": f"t{token}",
                    }
                    for token, (value, rank) in listed
                }
            )
        if self.faults.hole:
            found[len(found) // 2] = None
        return found[:-1] if self.faults.short else found

    def _check_chosen(self, ids: list[int]) -> None:
        if self.faults.old:
            return
        if any(not -1 <= token < self.vocab_size for token in ids):
            raise RefuseError(
                400, f"contain out-of-vocab token ids. Vocabulary size: {self.vocab_size}"
            )

    def _completions(self, body: dict[str, Any]) -> Any:
        self._check_model(body)
        self._check_chosen(body.get("logprob_token_ids") or [])
        top_k = body.get("prompt_logprobs")
        if top_k is not None:
            self._check_cap(top_k, f"Requested prompt logprobs of {top_k}")
        prompts = body["prompt"]
        if prompts and isinstance(prompts[0], int):
            prompts = [prompts]
        choices = []
        for index, sent in enumerate(prompts):
            ids = self._prompt(sent)
            choice: dict[str, Any] = {"index": index, "text": "x", "finish_reason": "length"}
            if top_k is not None:
                choice["prompt_logprobs"] = self._prompt_logprobs(ids, top_k)
            if body.get("return_token_ids") and not self.faults.no_echo:
                choice["prompt_token_ids"] = ids
            choices.append(choice)
        if self.faults.unordered:
            choices.reverse()
        return {"id": "cmpl-1", "object": "text_completion", "choices": choices}

    def _check_model(self, body: dict[str, Any]) -> None:
        if body.get("model", self.name) != self.name:
            raise RefuseError(404, f"The model `{body['model']}` does not exist.")

    def _tokens(self, body: dict[str, Any]) -> Any:
        self._check_model(body)
        parameters = body["sampling_params"]
        ids = self._prompt(body["token_ids"])
        top_k, rows = parameters.get("prompt_logprobs"), parameters.get("prompt_logprob_token_ids")
        if top_k:
            self._check_cap(top_k, f"Requested prompt logprobs of {top_k}")
        answer: dict[str, Any] = {"request_id": "1", "choices": [{"index": 0, "token_ids": [1]}]}
        if rows is not None and not self.faults.old:
            width = max(map(len, rows))
            self._check_cap(
                width, f"Requested {width} token ids per row in prompt_logprob_token_ids"
            )
            self._check_chosen([token for row in rows for token in row])
            start = parameters.get("prompt_logprob_start", 0)
            if not self.faults.other_ids and len(rows) != max(len(ids) - 1 - start, 0):
                raise RefuseError(
                    400,
                    f"prompt_logprob_token_ids has {len(rows)} rows, but the prompt has "
                    f"{len(ids) - 1 - start} scored rows",
                )
            log_probs = self._log_probs(ids)
            if top_k:  # scored once, told twice
                self.asked[tuple(ids)] -= 1
            scores = np.full((len(rows), width), -np.inf, np.float32)
            for index, row in enumerate(rows):
                for column, token in enumerate(row):
                    if token >= 0:
                        scores[index, column] = log_probs[start + index, token]
            buffer = io.BytesIO()
            np.save(buffer, scores[:-1] if self.faults.short else scores)
            answer["prompt_token_id_logprobs"] = base64.b64encode(buffer.getvalue()).decode()
        if top_k:
            answer["prompt_logprobs"] = self._prompt_logprobs(ids, top_k)
        if body.get("return_token_ids") and not self.faults.no_echo:
            answer["prompt_token_ids"] = ids
        return answer

    # SGLang

    def _sglang(self, body: dict[str, Any]) -> Any:
        chosen = body.get("token_ids_logprob")
        for token in (chosen or []) if not self.faults.old else []:
            if not 0 <= token < self.vocab_size:
                raise RefuseError(
                    400,
                    f"token_ids_logprob contains out-of-vocabulary token id {token}; valid range "
                    f"is [0, {self.vocab_size}).",
                )
        prompts = body["input_ids"]
        if isinstance(prompts[0], int):
            return self._sglang_one(prompts, body)
        return [self._sglang_one(ids, body) for ids in prompts]

    def _sglang_one(self, sent: list[int], body: dict[str, Any]) -> Any:
        ids = self._prompt(sent)
        info: dict[str, Any] = {"id": "1", "prompt_tokens": len(ids)}
        answer = {"text": "x", "output_ids": [1], "meta_info": info}
        if not body.get("return_logprob") or body.get("logprob_start_len", -1) != 0:
            return answer
        log_probs = self._log_probs(ids)[:-1]
        actual = log_probs.gather(1, torch.tensor(ids[1:]).view(-1, 1))[:, 0].tolist()
        own = [None, *map(_or_null, actual)]
        listed = [[value, token, None] for value, token in zip(own, ids, strict=True)]
        top_k = body.get("top_logprobs_num", 0)
        values, best = (part.numpy() for part in log_probs.topk(top_k))
        if self.faults.duplicate:
            best[1, 1] = best[1, 0]
        if self.faults.unordered:
            order = np.random.default_rng(0).permutation(top_k)
            values, best = values[:, order], best[:, order]
        if self.faults.short:
            listed, values, best = listed[:-1], values[:-1], best[:-1]
        info["input_token_logprobs"] = listed
        if body.get("return_flat_raw_top_logprobs") and not self.faults.nested:
            info |= {
                "input_top_logprobs_val_flat_b64": _base64(values.astype("<f4")),
                "input_top_logprobs_idx_flat_b64": _base64(best.astype("<i4")),
                "input_top_logprobs_val_flat_b64_dtype": "float32",
                "input_top_logprobs_idx_flat_b64_dtype": "int32",
                "input_top_logprobs_shape": list(values.shape),
                "input_top_logprobs_null_prefix": 1,
            }
        else:
            rows: list[Any] = [None]
            for value_row, id_row in zip(values.tolist(), best.tolist(), strict=True):
                pairs = zip(value_row, id_row, strict=True)
                rows.append([[_or_null(value), token, None] for value, token in pairs])
            if self.faults.hole:
                rows[len(rows) // 2] = None
            info["input_top_logprobs"] = rows
        return answer


def _or_null(value: float) -> float | None:
    """A number as orjson writes it."""
    return value if math.isfinite(value) else None


def _base64(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode()
