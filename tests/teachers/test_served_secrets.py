"""Passwords and keys of a server: sent, and neither kept nor printed."""

from __future__ import annotations

import base64
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from run_command import invoke
from served_server import Faults, ServedModel
from tiny_models import tiny_texts, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

import xtoken
from xtoken.errors import OptionError, RefusedRequestError, ServerError
from xtoken.teachers import TopKStore
from xtoken.teachers.served import ServedTeacher
from xtoken.teachers.served.client import KEY_VARIABLE, Connection, RetryPolicy
from xtoken.training.models import ServedSource
from xtoken.training.on_policy import SampleRequest
from xtoken.training.served_sampler import ServedSampler
from xtoken.training.settings import DistillSettings

SECRET = "S3cr3t@:/"
QUOTED = "S3cr3t%40:%2F"
KEY = "key-of-the-server"


class Guarded(ServedModel):
    """Answers only who brings a password or a key, and says which one it refuses."""

    allowed = (f"Bearer {KEY}", "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode())

    def __init__(self, *args: Any, **named: Any) -> None:
        self.seen: Counter[str] = Counter()
        super().__init__(*args, **named)

    def _serve(self, handler: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        sent = handler.headers.get("Authorization", "")
        self.seen[sent] += 1
        if sent in self.allowed:
            super()._serve(handler, body)
        else:
            words = f"Incorrect key provided: {sent}"
            self._send(handler, 401, {"error": {"message": words}})


@pytest.fixture
def server(folder: Path) -> Iterator[Guarded]:
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    with Guarded(model, "vllm", tokenizer=tokenizer, faults=Faults(cap=-1)) as made:
        yield made


@pytest.fixture
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "teacher")


def address(server: ServedModel, login: str = f"me:{QUOTED}") -> str:
    return server.url.replace("http://", f"http://{login}@")


def ask(url: str, tokenizer: Any, **options: Any) -> None:
    with ServedTeacher(url, vocab=tokenizer, top_k=4, retries=0, **options) as teacher:
        teacher.predictions([np.array([1, 2])])


def has_secret(text: str) -> bool:
    return any(word in text for word in ("S3cr3t", KEY, "me:"))


def test_a_password_in_the_address_is_sent_and_stands_nowhere(
    folder: Path, tmp_path: Path, server: Guarded
) -> None:
    data = write_jsonl(tmp_path / "data.jsonl", tiny_texts(12))
    common = ("--teacher", folder / "teacher", "--data", data)
    output = invoke(
        *("teach", *common, "--top-k", 8, "--url", address(server)), "--out", tmp_path / "store"
    )
    output += invoke(
        "distill", "--student", folder / "student", *common, "--teacher-url", address(server),
        "--out", tmp_path / "run", "--steps", 1, "--top-k", 8, "--max-tokens", 64, "--no-curves",
        "--device", "cpu", "--teacher-cache", tmp_path / "cache", "--checkpoint-every", 1,
    )  # fmt: skip
    assert server.url in output
    assert not has_secret(output)
    notes = TopKStore.open(tmp_path / "store").notes
    assert notes is not None
    assert notes.teacher == server.url
    assert notes.arguments[notes.arguments.index("--url") + 1] == server.url
    for file in tmp_path.rglob("*"):
        if file.is_file():
            assert b"S3cr3t" not in file.read_bytes(), file
    # The same teacher without one, by the fingerprint and by the names of files.
    before = sorted(path.name for path in (tmp_path / "cache").rglob("served-*"))
    assert ServedSource(address(server)).address == server.url
    assert len(before) == 1


def test_errors_name_neither_password_nor_key(
    server: Guarded, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def told(url: str, **options: Any) -> str:
        with pytest.raises((ServerError, OptionError)) as caught:
            ask(url, tokenizer, **options)
        words = str(caught.value)
        assert not has_secret(words), words
        return words

    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    assert "set XTOKEN_API_KEY to the server's key, or pass api_key=" in told(server.url)
    assert "correct the name and password in the add" in told(address(server, "me:S3cr3t"))
    assert "correct the key in XTOKEN_API_KEY or api_key=" in told(server.url, api_key=f"{KEY}2")
    assert "Incorrect key provided: Bearer ***" in told(server.url, api_key=f"{KEY}2")
    for bad in ("http://me:S3cr3t@host:x1", "me:S3cr3t@host", "http://me:S3cr/3t@host"):
        assert "expected the address of a server" in told(bad)
    assert "api_key= and a password in the address" in told(address(server), api_key=KEY)
    assert "api_key holds a character that no key has" in told(server.url, api_key=f"{KEY}\nö")
    monkeypatch.setenv(KEY_VARIABLE, f"{KEY} {KEY}")
    assert "XTOKEN_API_KEY holds a character that no key has" in told(server.url)
    monkeypatch.delenv(KEY_VARIABLE)
    url = address(server)
    server.kill()
    assert "gave no answer in 1 tries" in told(url)


def test_a_key_comes_from_the_environment(
    folder: Path,
    tmp_path: Path,
    server: Guarded,
    tokenizer: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, f" {KEY}\n")
    data = write_jsonl(tmp_path / "data.jsonl", tiny_texts(3))
    invoke(
        *("teach", "--teacher", folder / "teacher", "--data", data, "--top-k", 8),
        *("--url", server.url, "--out", tmp_path / "store"),
    )
    assert set(server.seen) == {f"Bearer {KEY}"}
    for file in tmp_path.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes()
    # A password that was named goes before a key that merely lies there.
    server.seen.clear()
    ask(address(server), tokenizer)
    assert set(server.seen) == {server.allowed[1]}
    connection = Connection(server.url)
    assert KEY not in repr(connection)
    connection.close()


@pytest.mark.parametrize("by", ["address", "variable", "argument"])
def test_a_sampler_may_need_a_key_too(
    folder: Path, server: Guarded, monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    vocab = xtoken.Pair(folder / "student", folder / "teacher").student_vocab
    request = SampleRequest([[5, 6]], 1, 1.0, 1.0, (), 0)
    monkeypatch.delenv(KEY_VARIABLE, raising=False)
    sampler = ServedSampler(server.url, vocab, policy=RetryPolicy(retries=0))
    with pytest.raises(RefusedRequestError, match="set XTOKEN_API_KEY to the server's key, or p"):
        sampler(request)
    sampler._connection.close()
    if by == "variable":
        monkeypatch.setenv(KEY_VARIABLE, KEY)
    url = address(server) if by == "address" else server.url
    key = KEY if by == "argument" else None
    sampler = ServedSampler(url, vocab, api_key=key)
    assert len(sampler(request)) == 1
    sampler._connection.close()


def test_settings_that_checkpoints_keep_hold_no_password() -> None:
    with pytest.raises(OptionError, match="on_policy_url names a password for http://host:1, and"):
        DistillSettings(on_policy_url=f"http://me:{QUOTED}@host:1").check()
    DistillSettings(on_policy_url="http://host:1").check()
