"""`xtoken distill --teacher-url`: a served teacher, asked as training goes."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from served_server import Faults, ServedModel
from tiny_models import tiny_texts, write_jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from xtoken.cli import app
from xtoken.errors import OptionError, ServerError
from xtoken.teachers.served import ServedTeacher
from xtoken.training.metrics_log import read_history


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "data.jsonl", tiny_texts(24))


@pytest.fixture(scope="module")
def tokenizer(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the teacher's tokenizer, and no weights."""
    made = tmp_path_factory.mktemp("tokenizer")
    AutoTokenizer.from_pretrained(folder / "teacher").save_pretrained(made)
    return made


@pytest.fixture
def server(folder: Path) -> Iterator[ServedModel]:
    model = AutoModelForCausalLM.from_pretrained(folder / "teacher", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "teacher")
    with ServedModel(model, "vllm", tokenizer=tokenizer, faults=Faults(cap=-1)) as server:
        yield server


def distill(folder: Path, data: Path, out: Path, *flags: object, steps: int = 2) -> str:
    result = CliRunner().invoke(
        app,
        [
            *("distill", "--student", str(folder / "student"), "--data", str(data)),
            *("--out", str(out), "--device", "cpu", "--steps", str(steps), "--batch-size", "4"),
            *("--max-tokens", "64", "--top-k", "32", "--kd-weight", "1", "--no-curves"),
            *("--teacher-cache", str(out.parent / "cache"), *map(str, flags)),
        ],
    )
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def teach(tokenizer: Path, data: Path, out: Path, url: str, *flags: str) -> None:
    named = ("--teacher", str(tokenizer), "--url", url, "--data", str(data), "--out", str(out))
    result = CliRunner().invoke(app, ["teach", *named, "--top-k", "8", *flags])
    if result.exception is not None:
        raise result.exception


def kd(out: Path) -> list[float]:
    return [line["kd"] for line in read_history(out / "metrics.jsonl") if "kd" in line]


@pytest.mark.parametrize("flags", [(), ("--streaming", "--shuffle-buffer", "1")])
def test_a_served_teacher_teaches_what_its_stored_columns_do(
    folder: Path,
    tmp_path: Path,
    data: Path,
    tokenizer: Path,
    server: ServedModel,
    flags: tuple[str, ...],
) -> None:
    output = distill(
        folder, data, tmp_path / "served",
        "--teacher", tokenizer, "--teacher-url", server.url, *flags,
    )  # fmt: skip
    assert f"top 32 of tiny-teacher at {server.url}, asked as training goes" in output
    assert not list(tmp_path.rglob("*top32*"))  # nothing is stored
    if flags:
        assert len(kd(tmp_path / "served")) == 2
        return
    distill(
        folder, data, tmp_path / "stored", "--teacher", folder / "teacher", "--teacher-top-k", 32
    )
    assert kd(tmp_path / "served") == pytest.approx(kd(tmp_path / "stored"), rel=1e-5)


def test_a_run_goes_on_with_the_same_served_teacher_alone(
    folder: Path, tmp_path: Path, data: Path, tokenizer: Path, server: ServedModel
) -> None:
    common = ("--teacher", tokenizer, "--teacher-url", server.url, "--checkpoint-every", 1)
    distill(folder, data, tmp_path / "whole", *common, steps=3)
    distill(folder, data, tmp_path / "run", *common, steps=3)
    for name in ("result.json", "student", "SHA256SUMS"):  # as if it had ended after two steps
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.rmtree(tmp_path / "run" / "checkpoint-3")
    # Another start of the server, which rounds otherwise.
    with torch.no_grad():
        server.model.model.norm.weight.mul_(1 + 1e-5)
    output = distill(folder, data, tmp_path / "run", *common, "--resume", steps=3)
    assert "went on from step 2 of 3" in output
    assert kd(tmp_path / "run") == pytest.approx(kd(tmp_path / "whole"), rel=1e-3)
    with torch.no_grad():
        for parameter in server.model.parameters():
            parameter.mul_(2)
    with pytest.raises(Exception, match="of another run: other weights of the teacher"):
        distill(folder, data, tmp_path / "run", *common, "--resume", steps=3)


def test_what_does_not_go_with_a_server_is_one_line(
    folder: Path, tmp_path: Path, data: Path, tokenizer: Path, server: ServedModel
) -> None:
    named = ("--teacher", tokenizer, "--teacher-url", server.url)
    for flags, words in (
        (("--teacher-url", server.url), "1 --teacher-url and 0 --teacher; pass --teacher for each"),
        ((*named, "--teacher-store", tmp_path), "pass one of them: xtoken teach --url stores"),
        ((*named, "--teacher-api", "ollama"), "api = 'ollama', expected auto or one of vllm"),
        (("--teacher", folder / "teacher", "--teacher-model", "m"), "--teacher-model m is for a"),
        ((*named, "--merge", "mean", "--loss", "p-kl"), "needs the teacher's full logits"),
    ):
        with pytest.raises(OptionError, match=words) as caught:
            distill(folder, data, tmp_path / "out", *flags)
        assert "\n" not in str(caught.value)
    server.faults.cap = 20
    with pytest.raises(ServerError, match="--max-logprobs"):
        distill(folder, data, tmp_path / "out", *named)
    with pytest.raises(ServerError, match="model = 'other', but"):
        distill(folder, data, tmp_path / "other", *named, "--teacher-model", "other")


@pytest.mark.parametrize("command", ["distill", "teach", "a settings file"])
def test_a_slow_server_is_waited_for_as_long_as_the_command_says(
    folder: Path,
    tmp_path: Path,
    data: Path,
    tokenizer: Path,
    server: ServedModel,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(ServedTeacher.__init__.__kwdefaults__, "retries", 0)
    server.faults.slow = 3.0
    named = ("--teacher", tokenizer, "--teacher-url", server.url, "--teacher-timeout", 1)
    file = tmp_path / "run.json"
    source = f'{{"source": "{tokenizer}", "url": "{server.url}"}}'
    file.write_text(f'{{"teacher": {source}, "teacher_timeout": 1}}')
    run: Callable[[], object] = {
        "distill": lambda: distill(folder, data, tmp_path / "out", *named),
        "teach": lambda: teach(tokenizer, data, tmp_path / "out", server.url, "--timeout", "1"),
        "a settings file": lambda: distill(folder, data, tmp_path / "out", file),
    }[command]
    words = r"silent for 1 s .*with a larger --timeout \(distill: --teacher-timeout\)"
    with pytest.raises(ServerError, match=words):
        run()


def test_a_dry_run_asks_for_its_few_steps(
    folder: Path, tmp_path: Path, data: Path, tokenizer: Path, server: ServedModel
) -> None:
    output = distill(
        folder, data, tmp_path / "out",
        "--teacher", tokenizer, "--teacher-url", server.url, "--dry-run",
    )  # fmt: skip
    assert "nothing was written" in output
    assert not (tmp_path / "out").exists()
    assert server.requests > 0


def test_a_settings_file_names_a_server(
    folder: Path, tmp_path: Path, data: Path, tokenizer: Path, server: ServedModel
) -> None:
    file = tmp_path / "run.json"
    file.write_text(
        f'{{"teacher": {{"source": "{tokenizer}", "url": "{server.url}"}},'
        ' "teacher_concurrency": 1, "teacher_api": "vllm"}'
    )
    output = distill(folder, data, tmp_path / "run", file)
    assert "asked as training goes" in output
    assert server.busiest <= 2  # the server counts one until it has answered it
