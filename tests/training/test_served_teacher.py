"""A served teacher in the trainers: what it teaches, and that it is asked ahead of its use."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served_server import Faults, ServedModel
from tiny_models import tiny_texts
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtoken import Pair
from xtoken.errors import PairError, ServerError
from xtoken.teachers.served import PrefetchedTeacher, ServedTeacher
from xtoken.training import DistillArguments, DistillTrainer, Teacher

TEXTS = tiny_texts(24)
MAX_TOKENS = 48


@pytest.fixture(scope="module")
def pair(folder: Path) -> Pair:
    return Pair(
        *(AutoTokenizer.from_pretrained(folder / side) for side in ("student", "teacher")),
        cache_dir=False,
    )


@pytest.fixture
def server(folder: Path) -> Iterator[ServedModel]:
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    with ServedModel(model, "sglang", tokenizer=tokenizer, faults=Faults()) as server:
        yield server


@pytest.fixture
def served(server: ServedModel, pair: Pair) -> Iterator[ServedTeacher]:
    """All columns, so that what is served is what a live teacher says."""
    columns = len(pair.teacher_vocab)
    with ServedTeacher(
        server.url, vocab=pair.teacher_tokenizer, top_k=columns, backoff=0.01, retries=1
    ) as teacher:
        _ = teacher.question
        server.asked.clear()
        yield teacher


def trained(
    folder: Path, out: Path, teacher: Any, pair: Pair, texts: Any = TEXTS, **changed: Any
) -> DistillTrainer:
    options: dict[str, Any] = {
        "max_steps": 3,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
        "max_tokens": MAX_TOKENS,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "dataloader_pin_memory": False,
        "top_k": 32,
    }
    student = AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)
    trainer = DistillTrainer(
        student,
        DistillArguments(str(out), **(options | changed)),
        teachers=[teacher],
        train_dataset=texts,
        processing_class=pair,
    )
    trainer.train()
    return trainer


def weights(trainer: DistillTrainer) -> torch.Tensor:
    return nn.utils.parameters_to_vector(trainer.model.parameters()).detach()


def losses(trainer: DistillTrainer) -> list[float]:
    return [each["kd"] for each in trainer.state.log_history if "kd" in each]


@pytest.mark.parametrize("loss", ["prefix-kl", "p-kl"])
def test_a_served_teacher_trains_as_the_same_one_live(
    folder: Path, tmp_path: Path, served: ServedTeacher, pair: Pair, loss: str
) -> None:
    """Over the end of an epoch, in a step of fewer micro-batches."""
    options = {"loss": loss, "max_steps": -1, "num_train_epochs": 2, "top_k": 32}
    texts = TEXTS[:20]  # 5 micro-batches, 3 steps of an epoch
    live = trained(folder, tmp_path, Teacher(str(folder / "teacher"), pair), pair, texts, **options)
    found = trained(folder, tmp_path, Teacher(served, pair), pair, texts, **options)
    assert found.state.global_step == live.state.global_step == 6
    assert losses(found) == pytest.approx(losses(live), rel=1e-5)
    torch.testing.assert_close(weights(found), weights(live), rtol=0, atol=1e-5)


class Watched(PrefetchedTeacher):
    """Answers a call only once the server was asked for so many sequences."""

    needed: Callable[[int], int]
    server: ServedModel
    calls = 0

    def signal(self, ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
        end = time.monotonic() + 20
        while len(self.server.asked) < self.needed(self.calls):
            assert time.monotonic() < end, f"call {self.calls}: {len(self.server.asked)} asked"
            time.sleep(0.01)
        self.calls += 1
        return super().signal(ids, attention_mask)


@pytest.mark.parametrize("kd_weight", ["balanced", 1.0])
def test_a_step_and_the_next_one_are_asked_for_before_they_are_needed_and_once(
    folder: Path,
    tmp_path: Path,
    server: ServedModel,
    served: ServedTeacher,
    pair: Pair,
    kd_weight: Any,
) -> None:
    source = Watched(served)
    source.server = server
    # The balance reads all micro-batches of a step once more.
    calls_of_step = 4 if kd_weight == "balanced" else 2
    source.needed = lambda call: 8 * min(3, call // calls_of_step + 2)
    with source:
        trainer = trained(folder, tmp_path, Teacher(source, pair), pair, kd_weight=kd_weight)
    assert source.calls == 3 * calls_of_step
    assert len(losses(trainer)) == 3
    assert set(server.asked.values()) == {1}
    assert len(server.asked) == 24


def test_samples_of_the_student_are_asked_for_in_their_own_step(
    folder: Path, tmp_path: Path, server: ServedModel, served: ServedTeacher, pair: Pair
) -> None:
    source = Watched(served)
    source.server = server
    source.needed = lambda call: 8 * (call // 2 + 1)
    with source:
        trained(
            folder, tmp_path, Teacher(source, pair), pair,
            kd_weight=1.0, on_policy_fraction=0.5, max_steps=2, on_policy_max_new_tokens=6,
        )  # fmt: skip
    assert len(server.asked) <= 16  # not the texts that samples stand in for


def test_a_server_that_dies_ends_the_training_in_one_line(
    folder: Path, tmp_path: Path, server: ServedModel, served: ServedTeacher, pair: Pair
) -> None:
    server.faults.die_after = 3
    with pytest.raises(ServerError, match="gave no answer") as caught:
        trained(folder, tmp_path, Teacher(served, pair), pair)
    assert "\n" not in str(caught.value)


def test_the_tokenizer_of_a_served_teacher_is_that_of_its_pair(
    folder: Path, tmp_path: Path, server: ServedModel, pair: Pair
) -> None:
    with (
        ServedTeacher(server.url, vocab=pair.student_tokenizer, top_k=4) as other,
        pytest.raises(PairError, match="pass the same tokenizer to both"),
    ):
        trained(folder, tmp_path, Teacher(other, pair), pair)


def test_loader_workers_make_no_difference(
    folder: Path, tmp_path: Path, server: ServedModel, served: ServedTeacher, pair: Pair
) -> None:
    """Over two epochs: workers start anew while the connections are open."""
    options = {"max_steps": -1, "num_train_epochs": 2, "kd_weight": 1.0}
    texts = TEXTS[:16]
    plain = trained(folder, tmp_path, Teacher(served, pair), pair, texts, **options)
    workers = {"dataloader_num_workers": 2}
    found = trained(folder, tmp_path, Teacher(served, pair), pair, texts, **options, **workers)
    assert losses(found) == pytest.approx(losses(plain), rel=1e-5)
    # Once an epoch at most; what the step before had is still there.
    assert max(server.asked.values()) <= 4


@pytest.mark.parametrize("kind", ["served", "live"])
def test_a_loaders_worker_that_is_no_fork_gets_the_collator_without_the_teacher(
    folder: Path, tmp_path: Path, served: ServedTeacher, pair: Pair, kind: str
) -> None:
    """Python 3.14 pickles what it gives to workers, as others do where asked to spawn."""
    live = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    source = served if kind == "served" else live
    trainer = trained(folder, tmp_path, Teacher(source, pair), pair, max_steps=1)
    collator = trainer.data_collator
    again = pickle.loads(pickle.dumps(collator))
    assert again._teaching.sources == [None]
    assert trainer.teaching.sources != [None]
    found, expected = (each(TEXTS[:4]) for each in (again, collator))
    assert found.keys() == expected.keys()
    for name in ("input_ids", "attention_mask", "labels"):
        assert torch.equal(found[name], expected[name])
    chunks = [vars(each["teacher_side"].chunks) for each in (found, expected)]
    tensors = [{k: v for k, v in each.items() if isinstance(v, torch.Tensor)} for each in chunks]
    assert tensors[0].keys() == tensors[1].keys() != set()
    assert all(torch.equal(tensors[0][name], tensors[1][name]) for name in tensors[0])
