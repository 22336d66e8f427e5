"""A server that changes its model while it is asked, and a user who does not wait for one."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import torch
from served_server import Faults, ServedModel
from tiny_models import tiny_texts, write_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtoken.errors import ServerError
from xtoken.teachers import TopKStore
from xtoken.teachers.served import ServedTeacher, fill_store, open_store

TOP_K = 16


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any, Any]:
    """A tokenizer, its model, and one of the same form with other weights."""
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder)
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher").eval()
    torch.manual_seed(1)
    other = AutoModelForCausalLM.from_config(model.config).eval()
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(3)
    return AutoTokenizer.from_pretrained(folder / "teacher"), model, other


@pytest.fixture
def server(models: tuple[Any, Any, Any]) -> Iterator[ServedModel]:
    tokenizer, model, _ = models
    with ServedModel(model, "vllm", tokenizer=tokenizer, faults=Faults()) as running:
        yield running


@pytest.fixture
def served(server: ServedModel, models: tuple[Any, Any, Any]) -> Iterator[ServedTeacher]:
    with ServedTeacher(
        server.url, vocab=models[0], top_k=TOP_K, api="vllm", backoff=0.01, concurrency=1,
        tokens_per_request=1,
    ) as teacher:  # fmt: skip
        yield teacher


@pytest.fixture(scope="module")
def sequences(models: tuple[Any, Any, Any]) -> list[np.ndarray]:
    return [np.array(models[0](text)["input_ids"][:40], np.int64) for text in tiny_texts(8)]


class Told:
    """A reporter that does something once some answers have been stored."""

    def __init__(self, act: Callable[[], None]) -> None:
        self.act, self.calls = act, 0

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        def update(done: int, remark: str) -> None:
            self.calls += 1
            if self.calls == 3:
                self.act()

        yield update


@pytest.mark.parametrize("cut", [1, 0])  # in the middle of an answer, or between two
def test_another_model_at_the_same_address_is_refused_and_nothing_of_it_is_kept(
    server: ServedModel, served: ServedTeacher, models: tuple[Any, Any, Any],
    sequences: list[np.ndarray], tmp_path: Path, cut: int,
) -> None:  # fmt: skip
    _, model, other = models

    def start_another() -> None:
        server.model, server.faults.cut = other, cut

    store = open_store(tmp_path / "store", served)
    with pytest.raises(ServerError, match="serves another tiny-teacher than before: its answer"):
        fill_store(store, served, sequences, Told(start_another))
    for kept in (store, TopKStore(store.directory, store.key)):
        stored = [ids for ids in sequences if ids in kept]
        assert len(stored) == (3 if cut else 0)
        for ids in stored:
            with torch.no_grad():
                wanted = model(torch.from_numpy(ids)[None]).logits[0].log_softmax(-1)
            found = kept.get(ids)
            best = wanted.topk(TOP_K).values
            np.testing.assert_allclose(found.log_probs, best.numpy(), atol=1e-5, rtol=0)


def test_a_server_that_ends_behind_its_last_answer_costs_nothing(
    server: ServedModel, served: ServedTeacher, sequences: list[np.ndarray], tmp_path: Path
) -> None:
    told = Told(server.kill)
    told.calls = 3 - len(sequences)  # after the last one
    store = open_store(tmp_path / "store", served)
    assert fill_store(store, served, sequences, told).sequences == len(sequences)
    assert all(ids in store for ids in sequences)


def test_a_user_who_ends_it_does_not_wait_for_a_silent_server(
    server: ServedModel, served: ServedTeacher, sequences: list[np.ndarray], tmp_path: Path
) -> None:
    def interrupt(number: int, frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    def be_silent() -> None:
        server.faults.slow = 60
        signal.setitimer(signal.ITIMER_REAL, 0.5)

    store = open_store(tmp_path / "store", served)
    before = signal.signal(signal.SIGALRM, interrupt)
    began = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            fill_store(store, served, sequences, Told(be_silent))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert time.monotonic() - began < 30
    assert sum(ids in TopKStore.open(tmp_path / "store") for ids in sequences) == 3
