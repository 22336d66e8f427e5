"""Runs on a stream: rows in a known order, resumed bit for bit, what cannot be used counted."""

from __future__ import annotations

import json
import re
import tracemalloc
import warnings
from dataclasses import replace
from itertools import islice
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from test_training_resume import InterruptAt, Interrupted, assert_same_run, write_dropout
from tiny_models import tiny_texts, write_jsonl, write_pair
from torch.utils.data import DataLoader
from typer.testing import CliRunner

from xtoken.cli import app
from xtoken.data import read_documents
from xtoken.data.stream import DocumentStream, StreamedRow
from xtoken.errors import DataError, OptionError
from xtoken.training import DistillConfig, PreparedData, load_models, open_teachers, prepare, train
from xtoken.training.metrics_log import read_history
from xtoken.training.stream import TrainingStream, read_head

CONFIG = DistillConfig(
    steps=10,
    batch_size=2,
    accumulation=2,
    top_k=32,
    teacher_top_k=None,
    max_tokens=48,
    learning_rate=1e-2,
    warmup_steps=2,
    checkpoint_every=3,
    device="cpu",
    curves=False,
)


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    student, _ = write_pair(folder)
    write_dropout(student)
    lines = [json.dumps({"text": text}) for text in tiny_texts(30)]
    lines[7:7] = ["{", json.dumps({"text": " "}), json.dumps({"words": "no text"})]
    (folder / "data.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet", "csv"])
def test_a_stream_has_the_documents_of_memory_in_their_order(tmp_path: Path, kind: str) -> None:
    texts = [*tiny_texts(40), "a\u2028line that is none", "one\n\n\n\ntwo\n"]
    path = tmp_path / f"data.{kind}"
    if kind == "jsonl":
        content = "\ufeff" + "\r\n".join(json.dumps({"text": each}) for each in texts)
        path.write_text(content, newline="", encoding="utf-8")
    elif kind == "txt":
        path.write_text("\r\n\r\n".join(texts), newline="", encoding="utf-8")
    elif kind == "parquet":
        Dataset.from_dict({"text": texts}).to_parquet(path)
    else:
        Dataset.from_dict({"text": texts}).to_csv(path)
    found = [row.document for row in DocumentStream(path)]
    assert found == list(read_documents(path))
    assert len(found) > 5


def test_a_text_larger_than_a_block_is_cut_as_in_memory(tmp_path: Path) -> None:
    text = "\n\n".join(tiny_texts(60)) * 120
    assert len(text) > 1 << 20
    (tmp_path / "data.txt").write_text(text)
    found = [row.document for row in DocumentStream(tmp_path / "data.txt")]
    assert found == list(read_documents(tmp_path / "data.txt"))


def test_a_stream_holds_its_buffer_and_not_the_corpus(tmp_path: Path) -> None:
    text = " ".join(tiny_texts(12))
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"text": f"{n} {text}"}) + "\n" for n in range(5000)))

    def peak(buffer: int) -> int:
        tracemalloc.start()
        count = sum(
            1 for _ in islice(iter(TrainingStream(DocumentStream(path), buffer=buffer)), 5000)
        )
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == 5000
        return found

    size = path.stat().st_size
    assert size > 12_000_000
    assert peak(50) < size / 4
    assert peak(5000) > size / 2  # the measure sees what is held


def test_a_file_that_is_not_utf8_ends_a_stream_where_it_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"text": "one"}\n' * 3 + b'{"text": "\xff"}\n')
    with pytest.raises(DataError, match=r"data\.jsonl is not UTF-8 soon after line \d+, 0xff"):
        list(DocumentStream(path))


def of(workspace: Path, **options: object) -> TrainingStream:
    return TrainingStream(DocumentStream(workspace / "data.jsonl"), **options)  # type: ignore[arg-type]


def first(stream: TrainingStream, count: int) -> list[StreamedRow]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return list(islice(iter(stream), count))


def test_each_pass_is_another_order_of_all_rows_but_the_held_out(workspace: Path) -> None:
    rows = list(DocumentStream(workspace / "data.jsonl"))
    held_out = [rows[3].document, rows[20].document]
    left = [row for row in rows if row.document not in held_out]
    passes = first(of(workspace, held_out=held_out, buffer=8), 2 * len(left))
    one, two = passes[: len(left)], passes[len(left) :]
    key = lambda row: row.source  # noqa: E731
    assert sorted(one, key=key) == sorted(two, key=key) == sorted(left, key=key)
    assert one != two
    assert one != left
    assert first(of(workspace, held_out=held_out, buffer=1), len(left)) == left
    assert first(of(workspace, seed=1, buffer=8), 10) != first(of(workspace, buffer=8), 10)


def test_skipped_rows_are_those_that_came_first_over_the_end_of_a_pass(workspace: Path) -> None:
    stream = of(workspace, buffer=8)
    rows = first(stream, 100)
    for skip in (0, 5, 33, 70):
        assert first(stream.starting(skip, 1), 30) == rows[skip : skip + 30]


@pytest.mark.filterwarnings("ignore:the data ended")
@pytest.mark.parametrize("skip", [0, 8])
def test_workers_give_the_batches_that_one_process_gives(workspace: Path, skip: int) -> None:
    stream = of(workspace, buffer=8).starting(skip, 4)
    expected = first(stream, 40)
    loader = DataLoader(stream, batch_size=4, num_workers=2, collate_fn=list)
    assert [row for batch in islice(loader, 10) for row in batch] == expected


def test_the_end_of_the_data_is_told_and_no_data_ends_the_run(
    workspace: Path, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="the data ended after 33 rows, and are read from their"):
        list(islice(iter(of(workspace)), 34))
    path = write_jsonl(tmp_path / "one.jsonl", ["the only text"])
    alone = TrainingStream(DocumentStream(path), held_out=["the only text"])
    with pytest.raises(DataError, match="the stream holds no row to train on"):
        next(iter(alone))


def materials_of(workspace: Path, config: DistillConfig) -> PreparedData:
    source = DocumentStream(workspace / "data.jsonl")
    head = read_head(source, 0.2)
    models = load_models(workspace / "student", workspace / "teacher")
    stream = TrainingStream(source, held_out=head.texts.held_out, seed=config.seed, buffer=8)
    return replace(prepare(models, head.texts, config), stream=stream)


@pytest.mark.filterwarnings("ignore")  # that rows are left out, in a worker too
@pytest.mark.parametrize("workers", [0, 2])
def test_an_interrupted_stream_goes_on_bit_for_bit_into_its_second_pass(
    workspace: Path, tmp_path: Path, workers: int
) -> None:
    config = replace(CONFIG, trainer={"dataloader_num_workers": workers})
    materials = materials_of(workspace, config)
    teacher = open_teachers(materials, config, [config.loss], tmp_path / "cache")[config.loss]
    train(materials, replace(config, checkpoint_every=0), teacher, tmp_path / "whole")
    for step, resume in ((5, False), (8, True)):
        with pytest.raises(Interrupted):
            train(materials, config, teacher, tmp_path / "cut", InterruptAt(step), resume=resume)
        torch.manual_seed(step)
    result = train(materials, config, teacher, tmp_path / "cut", resume=True)
    assert result.steps_before == 6
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    # Three rows cannot be used, and come again in the second pass.
    assert read_history(tmp_path / "cut" / "metrics.jsonl")[-2]["rows_left_out"] >= 3


def invoke(workspace: Path, out: Path, *flags: str) -> tuple[int, str]:
    result = CliRunner().invoke(
        app,
        [
            "distill", "--student", str(workspace / "student"),
            "--teacher", str(workspace / "teacher"), "--data", str(workspace / "data.jsonl"),
            "--out", str(out), "--device", "cpu", "--steps", "9", "--batch-size", "4",
            "--max-tokens", "48", "--top-k", "32", "--streaming", "--no-curves", *flags,
        ],
    )  # fmt: skip
    error = result.exception
    shown = "" if error is None or isinstance(error, SystemExit) else str(error)
    return result.exit_code, " ".join((result.output + shown).split())


@pytest.mark.filterwarnings("ignore:the data ended")
def test_the_command_streams_and_tells_what_it_left_out(workspace: Path, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="a row is left out, and others like it will be"):
        code, output = invoke(workspace, tmp_path / "out")
    assert code == 0, output
    assert "are held out, of the first 33 rows of the stream" in output
    assert "3 of 33 rows at the beginning of the stream are left out; the first, " in output
    assert "data.jsonl:8: is not JSON" in output
    # Three in the whole of the first pass, and what came of the second.
    assert re.search("prefix-kl: [3-6] rows of the stream could not be used, and were left", output)
    assert not (tmp_path / "out" / "teacher-top-k").exists()
    code, output = invoke(workspace, tmp_path / "dry", "--dry-run")
    assert code == 0, output
    assert "nothing was written to" in output


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--teacher-top-k", "32"], "--teacher-top-k 32 stores predictions of all texts before"),
        (
            ["--train-sampling-strategy", "group_by_length"],
            "--train-sampling-strategy group_by_length needs the length of every text",
        ),
    ],
)
def test_what_cannot_be_combined_with_a_stream_is_refused_by_name(
    workspace: Path, tmp_path: Path, flags: list[str], message: str
) -> None:
    code, output = invoke(workspace, tmp_path / "out", *flags)
    assert code == 1
    assert message in output


def test_a_stream_in_its_order_trains_as_the_texts_in_memory_do_also_with_routes(
    workspace: Path, tmp_path: Path
) -> None:
    rows = [{"text": text, "who": ["teacher"]} for text in tiny_texts(30)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = write_jsonl(tmp_path / "held.jsonl", ["held out", "another text"])

    def run(out: str, *flags: str) -> bytes:
        result = CliRunner().invoke(
            app,
            [
                "distill", "--student", str(workspace / "student"),
                "--teacher", str(workspace / "teacher"), "--teacher", str(workspace / "student"),
                "--teacher-loss", "p-kl", "--teacher-loss", "same-vocab-kl", "--kd-weight", "1",
                "--data", str(tmp_path / "data.jsonl"), "--held-out", str(held_out),
                "--out", str(tmp_path / out), "--device", "cpu", "--steps", "4",
                "--batch-size", "4", "--max-tokens", "48", "--teacher-column", "who", "--no-curves",
                *flags,
            ],
        )  # fmt: skip
        assert result.exit_code == 0, (result.output, result.exception)
        return (tmp_path / out / "metrics.jsonl").read_bytes()

    streamed = run("stream", "--streaming", "--shuffle-buffer", "1")
    memory = ("--train-sampling-strategy", "sequential", "--teacher-top-k", "none")
    assert streamed == run("memory", *memory)


def test_a_buffer_of_nothing_is_refused(workspace: Path) -> None:
    with pytest.raises(OptionError, match="buffer = 0, expected at least 1"):
        of(workspace, buffer=0)


def test_a_stream_whose_rows_lack_the_teachers_column_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    lines = [json.dumps({"text": text, "for": "teacher"}) for text in tiny_texts(40)]
    path.write_text("\n".join(lines) + "\n")
    head = read_head(DocumentStream(path, teacher_column="for"), 0.3)
    assert set(head.teachers.values()) == {"teacher"}
    with pytest.raises(DataError, match="none of the first 40 rows of the stream has a column"):
        read_head(DocumentStream(path, teacher_column="fro"), 0.3)
