"""The hub, of which the API is replaced: a push that arrives, and data that is there by name."""

from __future__ import annotations

import shutil
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pytest
import torch
import transformers.trainer
from huggingface_hub.utils import filter_repo_objects
from run_command import invoke
from tiny_models import tiny_texts, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtoken.data import load_rows, read_documents
from xtoken.errors import DataError
from xtoken.teachers import TopKStore
from xtoken.training import DistillArguments, DistillTrainer

TEXTS = tiny_texts(20)
NAME = "owner/corpus"


class Hub:
    """Keeps what is uploaded in a folder, as the hub does."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.repositories: list[tuple[str, Any]] = []
        self.commits: list[str] = []

    def create_repo(self, repo_id: str, *, private: Any = None, **_: Any) -> Any:
        self.repositories.append((repo_id, private))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(
        self,
        *,
        repo_id: str,
        folder_path: Any,
        commit_message: str,
        path_in_repo: str = "",
        ignore_patterns: Any = None,
        run_as_future: bool = False,
        **_: Any,
    ) -> Any:
        folder = Path(folder_path)
        names = [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()]
        for name in filter_repo_objects(names, ignore_patterns=ignore_patterns):
            target = self.folder / repo_id / path_in_repo / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / name, target)
        self.commits.append(commit_message)
        done: Future[None] = Future()
        done.set_result(None)
        return done if run_as_future else None


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "hub")
    for name in ("create_repo", "upload_folder"):
        call = getattr(made, name)
        monkeypatch.setattr(
            huggingface_hub.HfApi, name, lambda _, *given, call=call, **named: call(*given, **named)
        )
        if hasattr(transformers.trainer, name):  # older releases call these
            monkeypatch.setattr(transformers.trainer, name, call)
    return made


@pytest.mark.parametrize("strategy", ["end", "checkpoint"])
def test_a_student_is_pushed_to_the_hub_as_it_was_trained(
    folder: Path, tmp_path: Path, hub: Hub, strategy: str
) -> None:
    args = DistillArguments(
        str(tmp_path / "out"), max_steps=2, per_device_train_batch_size=4, max_tokens=48,
        save_strategy="steps", save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        dataloader_pin_memory=False, top_k=32, push_to_hub=True, hub_model_id="owner/student",
        hub_strategy=strategy, hub_private_repo=True,
    )  # fmt: skip
    trainer = DistillTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32),
        args,
        teachers=str(folder / "teacher"),
        train_dataset=TEXTS,
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
    )
    trainer.train()
    trainer.push_to_hub("the student")
    assert hub.repositories == [("owner/student", True)]
    assert hub.commits[-1] == "the student"
    pushed = hub.folder / "owner/student"
    model = AutoModelForCausalLM.from_pretrained(pushed)
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(model.state_dict()[name], value), name
    text = "the same tokens"
    own = AutoTokenizer.from_pretrained(folder / "student")(text)["input_ids"]
    assert AutoTokenizer.from_pretrained(pushed)(text)["input_ids"] == own
    assert (pushed / "README.md").is_file()
    assert not list(pushed.glob("checkpoint-*"))
    # What a later session resumes from.
    assert (pushed / "last-checkpoint" / "optimizer.pt").is_file() == (strategy == "checkpoint")


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A dataset with two splits behind a name of the hub, read by the real `load_dataset`."""
    here = tmp_path / "corpus"
    here.mkdir()
    write_jsonl(here / "train.jsonl", TEXTS[:16])
    write_jsonl(here / "validation.jsonl", TEXTS[16:])
    asked: list[str] = []
    real = datasets.load_dataset

    def load(path: str, **options: Any) -> Any:
        asked.append(path)
        assert path == NAME
        return real(str(here), cache_dir=str(tmp_path / "cache"), **options)

    monkeypatch.setattr(datasets, "load_dataset", load)
    return asked


def test_data_of_the_hub_is_read_by_its_name_and_split(corpus: list[str]) -> None:
    assert read_documents(NAME) == TEXTS[:16]
    assert read_documents(NAME, split="validation") == TEXTS[16:]
    assert read_documents(NAME, split="train[:25%]") == TEXTS[:4]
    assert [row["text"] for row in load_rows(NAME, split="validation")] == TEXTS[16:]
    stream = load_rows(NAME, split="train", streaming=True)
    assert isinstance(stream, datasets.IterableDataset)
    assert [row["text"] for row in stream] == TEXTS[:16]
    assert corpus == [NAME] * 5
    with pytest.raises(DataError, match="owner/corpus cannot be read as a dataset with split 'tes"):
        read_documents(NAME, split="test")


@pytest.mark.parametrize("flags", [(), ("--streaming",)])
def test_commands_take_data_of_the_hub_with_its_split(
    folder: Path, tmp_path: Path, corpus: list[str], flags: tuple[str, ...]
) -> None:
    data = ("--data", NAME, *flags)
    store = tmp_path / "store"
    output = invoke(
        "teach", *data, "--split", "validation", "--teacher", folder / "teacher", "--out", store,
        "--top-k", 16, "--device", "cpu", "--max-tokens", 64,
    )  # fmt: skip
    assert "4 texts in" in output
    assert len(TopKStore.open(store)) == 4
    held_out = write_jsonl(tmp_path / "held_out.jsonl", TEXTS[:2])
    output = invoke(
        "distill", *data, "--split", "validation", "--student", folder / "student",
        "--teacher-store", store, "--held-out", held_out, "--out", tmp_path / "run",
        "--steps", 1, "--batch-size", 2, "--max-tokens", 64, "--device", "cpu",
    )  # fmt: skip
    assert "student, projection, metrics and curves are in" in output
    assert set(corpus) == {NAME}
