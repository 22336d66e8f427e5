"""`xtoken teach`, and `xtoken distill` from what it stored, without the teacher's weights."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from forked import Forked, fork_two
from run_command import invoke
from tiny_models import tiny_texts, write_jsonl, write_pair
from transformers import AutoModelForCausalLM

from xtoken import Pair
from xtoken.cli import teach_stream
from xtoken.errors import DataError, PairError
from xtoken.teachers import LiveTeacher, TopKStore
from xtoken.training import DistillArguments, DistillConfig, DistillTrainer, Teacher
from xtoken.training.metrics_log import read_history


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("teach")
    write_pair(folder)
    write_jsonl(folder / "data.jsonl", tiny_texts(40))
    return folder


def command(name: str, *flags: str, **options: object) -> list[str]:
    named = {key.replace("_", "-"): value for key, value in options.items()}
    return [name, *(part for k, v in named.items() for part in (f"--{k}", str(v))), *flags]


def teach(workspace: Path, out: Path, *flags: str, **options: object) -> str:
    given: dict[str, object] = {
        "teacher": workspace / "teacher",
        "data": workspace / "data.jsonl",
        "out": out,
        "top_k": 64,
        "device": "cpu",
    }
    return invoke(*command("teach", *flags, **(given | options)))


def distill(workspace: Path, out: Path, *flags: str, **options: object) -> str:
    given: dict[str, object] = {
        "student": workspace / "student",
        "data": workspace / "data.jsonl",
        "out": out,
        "steps": 3,
        "top_k": 64,
        "max_tokens": 80,
        "learning_rate": 3e-3,
        "device": "cpu",
    }
    return invoke(*command("distill", "--no-curves", *flags, **(given | options)))


@pytest.fixture(scope="module")
def store(workspace: Path) -> Path:
    teach(workspace, workspace / "store")
    return workspace / "store"


def test_a_complete_store_needs_no_weights_and_trains_as_the_teacher_does(
    workspace: Path, store: Path, tmp_path: Path
) -> None:
    """float32: the predictions of a batch of other texts differ by rounding."""
    exact = tmp_path / "store"
    teach(workspace, exact, dtype="float32")
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(workspace / "teacher", tokenizer)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tokenizer / name).unlink(missing_ok=True)
    settings = DistillConfig(steps=3, top_k=64, teacher_top_k=64, max_tokens=80)
    settings.save(tmp_path / "config.json")
    distill(
        workspace, tmp_path / "live", teacher=workspace / "teacher",
        config=tmp_path / "config.json", teacher_cache=tmp_path / "cache",
    )  # fmt: skip
    distill(workspace, tmp_path / "stored", teacher=tokenizer, teacher_store=exact)
    output = distill(workspace, tmp_path / "alone", teacher_store=exact)
    assert "0 of them computed now" in output
    records = [read_history(tmp_path / name / "metrics.jsonl") for name in ("live", "stored")]
    for live, stored in zip(*records, strict=True):
        assert live.keys() == stored.keys()
        for name in ("loss", "ce", "kd", "eval_bits_per_byte"):
            if name in live:
                assert stored[name] == pytest.approx(live[name], rel=1e-5), name
    first, second = ((tmp_path / n / "student/model.safetensors") for n in ("stored", "alone"))
    assert first.read_bytes() == second.read_bytes()


def test_the_estimate_comes_first_and_a_dry_run_writes_nothing(
    workspace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    output = teach(workspace, out, "--dry-run", dtype="uint8", mass=0.5)
    assert not out.exists()
    assert "0.5 of mass, 64 at most, uint8" in output
    for words in ("bytes per token", "tokens per second", "size of the rest", "time for the rest"):
        assert words in output
    measured = float(re.search(r"([\d,]+) bytes per token", output)[1].replace(",", ""))
    assert "next: xtoken distill --teacher-store" in teach(workspace, out, dtype="uint8", mass=0.5)
    found = TopKStore.open(out)
    size = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert found.notes.complete
    assert size / found.notes.tokens == pytest.approx(measured, rel=0.2)


def test_a_spread_store_is_estimated_and_trains_as_the_teacher_does(
    workspace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "store"
    options: dict[str, object] = {"dtype": "spread", "top_k": 800, "min_prob": 1e-6}
    output = teach(workspace, out, "--dry-run", **options)
    assert "probability 1e-06 or more, 800 at most, spread" in output
    measured = float(re.search(r"([\d,]+) bytes per token", output)[1].replace(",", ""))
    teach(workspace, out, **options)
    store = TopKStore.open(out)
    assert store.notes.complete
    assert store.file_bytes / store.notes.tokens == pytest.approx(measured, rel=0.2)
    settings = DistillConfig(steps=3, teacher_top_k=None, top_k=64, max_tokens=80, curves=False)
    settings.save(tmp_path / "config.json")
    distill(
        workspace, tmp_path / "live", teacher=workspace / "teacher",
        config=tmp_path / "config.json",
    )  # fmt: skip
    output = distill(workspace, tmp_path / "stored", teacher_store=out)
    assert "probabilities from 1e-06, the rest spread, of" in output
    names = ("live", "stored")
    records = [read_history(tmp_path / name / "metrics.jsonl") for name in names]
    live, stored = ([each["kd"] for each in found if "kd" in each] for found in records)
    assert len(live) == 3
    assert stored == pytest.approx(live, rel=5e-3)
    output = distill(workspace, tmp_path / "exact", teacher_store=out, loss="exact-kl")
    assert "student, projection and metrics are in" in output
    trainer = DistillTrainer(
        _student(workspace),
        DistillArguments(
            str(tmp_path / "out"), max_steps=1, max_tokens=80, report_to=[], use_cpu=True,
            disable_tqdm=True, save_strategy="no", logging_steps=1,
        ),
        teachers=[out],
        train_dataset=tiny_texts(40),
    )  # fmt: skip
    trainer.train()
    assert any("kd" in log for log in trainer.state.log_history)


DIES = """
import os, signal, sys
from xtoken.teachers.store import TopKStore
from xtoken.cli import main

writes = int(sys.argv.pop(1))
add = TopKStore.add

def die(store, sequences, predictions):
    global writes
    writes -= 1
    if writes == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return add(store, sequences, predictions)

TopKStore.add = die
main()
"""


def test_a_killed_teacher_goes_on_and_computes_nothing_twice(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, out = tmp_path / "whole", tmp_path / "store"
    data = write_jsonl(tmp_path / "data.jsonl", tiny_texts(110))
    given = {"teacher": workspace / "teacher", "data": data, "top_k": 64, "device": "cpu"}
    arguments = command("teach", **given, out=out)
    killed = Forked(DIES, 7, *arguments)
    _, errors = killed.communicate()
    assert killed.returncode == -signal.SIGKILL, errors
    before = TopKStore.open(out)
    assert not before.notes.complete
    stored = sum(shard.length(i) for shard in before._shards for i in range(len(shard.digests)))
    assert stored > 1000
    with pytest.raises(Exception, match=r"it was not filled to the end; run: xtoken teach --data"):
        distill(workspace, tmp_path / "run", teacher_store=out)
    teachers: list[LiveTeacher] = []
    load = LiveTeacher.from_pretrained

    def counted(*args: object, **named: object) -> LiveTeacher:
        teachers.append(load(*args, **named))  # type: ignore[arg-type]
        return teachers[-1]

    monkeypatch.setattr(LiveTeacher, "from_pretrained", counted)
    invoke(*arguments)
    invoke(*command("teach", **given, out=whole))
    assert teachers[0].tokens_computed == teachers[1].tokens_computed - stored
    assert invoke(*arguments).count("0 tokens") == 1
    assert teachers[2].tokens_computed == 0
    one, two = TopKStore.open(whole), TopKStore.open(out)
    assert len(one) == len(two)
    for shard in one._shards:
        for index in range(len(shard.digests)):
            expected, found = shard.read(index), two.get(shard.tokens(index))
            assert np.array_equal(expected.ids[:, :8], found.ids[:, :8])


def test_a_store_that_does_not_fit_is_refused_in_one_line(
    workspace: Path, store: Path, tmp_path: Path
) -> None:
    def refused(words: str, **options: object) -> None:
        with pytest.raises(Exception, match=words) as found:
            distill(workspace, tmp_path / "run", **({"teacher_store": store} | options))
        assert "\n" not in str(found.value)

    refused("are of the teacher tokenizer .* this pair's is", teacher=workspace / "student")
    other = write_jsonl(tmp_path / "other.jsonl", [text[7:] for text in tiny_texts(60)])
    lacks = r"lacks \d+ of the \d+ teacher sequences .* with other texts, .*run, .* DATA: xtoken"
    refused(lacks, data=other)
    refused("top_k = 99, but the store .* holds 64 columns; lower it to 64, or", top_k=99)
    refused("teacher store .*nowhere does not exist; fill one", teacher_store=tmp_path / "nowhere")
    refused(r"teacher store .*other\.jsonl is a file; pass a folder", teacher_store=other)
    short = tmp_path / "short"
    teach(workspace, short, max_tokens=20)
    refused("were cut at 20 tokens, one here has .*: pass max_tokens = 20", teacher_store=short)
    bare = tmp_path / "bare"
    shutil.copytree(store, bare)
    shutil.rmtree(bare / "tokenizer")
    refused("has no tokenizer in .* no weights are needed", teacher_store=bare)
    with pytest.raises(Exception, match="no teacher was given; pass --teacher, a directory"):
        distill(workspace, tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mass": 1}, r"mass = 1.0, expected a share inside \(0, 1\)"),
        ({"dtype": "int4"}, "dtype = 'int4', expected one of 'float32', 'float16', 'uint8'"),
        ({"dtype": "spread", "mass": 0.9}, "mass = 0.9 with dtype = 'spread', which keeps"),
        ({"min_prob": 1e-4}, "min_prob = 0.0001 with dtype = 'float16'; pass dtype='spread'"),
        ({"dtype": "spread", "url": "localhost"}, "--dtype spread needs the teacher's full logits"),
        ({"top_k": 0}, "top_k = 0, expected at least 1"),
        ({"top_k": 9999}, "the teacher has 800 columns; pass a smaller top_k"),
        ({"max_tokens": 1}, "--max-tokens 1, expected at least 2"),
        ({"max_tokens": 513}, "has 512 positions; pass 512 or less"),
        ({"date": "today"}, "--date today, expected a day as YYYY-MM-DD"),
        ({"device": "tpu"}, "--device tpu, expected auto, cpu or cuda"),
        ({"teacher_dtype": "int8"}, "--teacher-dtype int8, expected auto, float32 or bfloat16"),
        ({"url": "localhost"}, "expected the address of a server such as"),
    ],
)
def test_a_bad_option_is_named(
    workspace: Path, tmp_path: Path, options: dict[str, object], words: str
) -> None:
    with pytest.raises(Exception, match=words):
        teach(workspace, tmp_path / "store", **options)


def stored(folder: Path) -> dict[bytes, np.ndarray]:
    """The kept columns of each sequence."""
    store = TopKStore.open(folder)
    return {
        shard.tokens(index).tobytes(): shard.read(index).ids[:, :8]
        for shard in store._shards
        for index in range(len(shard.digests))
    }


def test_a_text_of_one_teacher_token_teaches_nothing_and_stops_nothing(
    workspace: Path, tmp_path: Path
) -> None:
    pair = Pair(workspace / "student", workspace / "teacher", cache_dir=False)
    found = pair.teacher_vocab
    texts = [found.token_bytes(token).decode(errors="replace") for token in range(len(found))]
    single = next(
        text
        for text in texts
        if text.isalpha()
        and len(pair.student_tokenizer(text).input_ids) > 1
        and len(pair.teacher_tokenizer(text).input_ids) == 1
    )
    data = write_jsonl(tmp_path / "data.jsonl", [single, *tiny_texts(7)])
    held_out = write_jsonl(tmp_path / "held.jsonl", tiny_texts(2))
    store = tmp_path / "store"
    assert "7 texts in" in teach(workspace, store, data=data)
    for source in ({"teacher_store": store}, {"teacher": workspace / "teacher"}):
        out = tmp_path / next(iter(source))
        distill(
            workspace, out, data=data, held_out=held_out, batch_size=4, loss="exact-kl",
            teacher_cache=tmp_path / "cache", **source,
        )  # fmt: skip
        assert len(read_history(out / "metrics.jsonl")) >= 3


def test_a_stream_is_stored_as_the_same_texts_in_memory_are(
    workspace: Path, store: Path, tmp_path: Path
) -> None:
    lines = (workspace / "data.jsonl").read_text().splitlines()
    messages = [{"role": "user", "content": "no template prints it"}] * 2
    lines[5:5] = ["[", '{"text": ""}', json.dumps({"messages": messages})]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    given = {"data": tmp_path / "data.jsonl"}
    assert "about 40 texts" not in teach(workspace, tmp_path / "dry", "--dry-run", **given)
    output = teach(workspace, tmp_path / "store", "--streaming", **given)
    assert "3 of 43 rows are left out; the first, " in output
    assert "data.jsonl:6: is not JSON" in output
    assert "40 texts in" in output
    found, expected = stored(tmp_path / "store"), stored(store)
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[ids], expected[ids]) for ids in found)
    notes = TopKStore.open(tmp_path / "store").notes
    assert notes.complete
    assert (notes.sequences, notes.tokens) == (40, TopKStore.open(store).notes.tokens)
    assert "--streaming" in notes.command(tmp_path)
    output = distill(
        workspace, tmp_path / "run", "--streaming", teacher_store=tmp_path / "store",
    )  # fmt: skip
    assert "student, projection and metrics are in" in output


ROLES = ("user", "assistant")


def test_texts_in_memory_that_cannot_be_used_are_counted_and_named(
    workspace: Path, store: Path, tmp_path: Path
) -> None:
    """As in a stream: an unprintable conversation ends nothing, and one token teaches nothing."""
    lines = (workspace / "data.jsonl").read_text().splitlines()
    messages = [{"role": role, "content": "no template prints it"} for role in ROLES]
    lines[5:5] = ["[", '{"text": "e"}', json.dumps({"messages": messages})]
    (tmp_path / "data.jsonl").write_text("\n".join(lines) + "\n")
    output = teach(workspace, tmp_path / "store", data=tmp_path / "data.jsonl")
    assert "1 of 43 rows are left out; the first, " in output
    assert "2 of 42 texts are left out; the first, documents[5]: no token to predict; " in output
    assert "has no chat template" in output
    found, expected = stored(tmp_path / "store"), stored(store)
    assert found.keys() == expected.keys()
    streamed = teach(workspace, tmp_path / "stream", "--streaming", data=tmp_path / "data.jsonl")
    assert "3 of 43 rows are left out" in streamed
    (tmp_path / "none.jsonl").write_text('{"text": "e"}\n')
    with pytest.raises(DataError, match=r"within max_tokens = 512 \(documents\[0\]: no token to"):
        teach(workspace, tmp_path / "none", data=tmp_path / "none.jsonl")


def test_a_stream_of_several_batches_is_estimated_by_its_length(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(teach_stream, "ROWS_AT_ONCE", 8)
    output = teach(workspace, tmp_path / "store", "--streaming")
    assert re.search(r"texts +. about (39|40|41) ", output)
    assert len(stored(tmp_path / "store")) == 40
    computed = len(TopKStore.open(tmp_path / "store"))
    # Of the rest it cannot say that it is stored before it was read.
    assert "bytes per token" not in teach(workspace, tmp_path / "store", "--streaming")
    assert len(TopKStore.open(tmp_path / "store")) == computed


def test_two_processes_share_the_work_of_one_store(
    workspace: Path, store: Path, tmp_path: Path
) -> None:
    for flags in ([], ["--streaming"]):
        out = tmp_path / f"store{len(flags)}"
        arguments = command(
            "teach", *flags, teacher=workspace / "teacher", data=workspace / "data.jsonl",
            out=out, top_k=64, device="cpu",
        )  # fmt: skip
        ranks = fork_two(COUNTS, tmp_path, *arguments, COLUMNS="200")
        for process in ranks:
            output, errors = process.communicate()
            assert process.returncode == 0, errors
            assert ("cpu, 2 processes" in " ".join(output.split())) == (process is ranks[0])
        found, expected = stored(out), stored(store)
        assert found.keys() == expected.keys()
        assert all(np.array_equal(found[ids], expected[ids]) for ids in found)
        shares = [int((tmp_path / f"tokens-{rank}").read_text()) for rank in range(2)]
        assert min(shares) > 0
        assert sum(shares) == TopKStore.open(store).notes.tokens
        texts = [int((tmp_path / f"texts-{rank}").read_text()) for rank in range(2)]
        assert texts[0] >= 40
        assert (texts[1] == 0) == (not flags)  # what is streamed each reads by itself
        assert TopKStore.open(out).notes.complete


def test_a_folder_that_is_not_shared_is_told(workspace: Path, tmp_path: Path) -> None:
    arguments = command(
        "teach", teacher=workspace / "teacher", data=workspace / "data.jsonl",
        out=tmp_path / "RANK", top_k=64, device="cpu",
    )  # fmt: skip
    for process in fork_two(COUNTS, tmp_path, *arguments, COLUMNS="200"):
        _, errors = process.communicate()
        assert process.returncode == 1
        told = "20 of 40 texts were stored where this process cannot see them"
        assert told in " ".join(errors.split())
    for path in (tmp_path / "1").glob("*.safetensors"):
        shutil.copy(path, tmp_path / "0")
    assert "0 tokens" in teach(workspace, tmp_path / "0")


COUNTS = """
import os, sys
from pathlib import Path
import xtoken.data.encode
from xtoken.cli import main
from xtoken.teachers import LiveTeacher

folder, rank = Path(sys.argv.pop(1)), os.environ["RANK"]
sys.argv = [each.replace("RANK", rank) for each in sys.argv]
load = LiveTeacher.from_pretrained
teachers = []

def counted(*args, **named):
    teachers.append(load(*args, **named))
    return teachers[-1]

LiveTeacher.from_pretrained = counted
encode = xtoken.data.encode.encode_texts
texts = 0

def encoded(tokenizer, each, **named):
    global texts
    texts += len(each)
    return encode(tokenizer, each, **named)

xtoken.data.encode.encode_texts = encoded
try:
    main()
finally:
    (folder / f"texts-{rank}").write_text(str(texts))
    (folder / f"tokens-{rank}").write_text(str(teachers[0].tokens_computed))
"""


def test_two_processes_do_not_fill_one_store(workspace: Path, tmp_path: Path) -> None:
    with FileLock(tmp_path / ".teach.lock"):
        with pytest.raises(Exception, match=r"another process fills .*; wait for its end"):
            teach(workspace, tmp_path)


def test_a_trainer_takes_the_folder_of_a_store_as_a_teacher(
    workspace: Path, store: Path, tmp_path: Path
) -> None:
    arguments = DistillArguments(
        str(tmp_path / "out"), max_steps=2, max_tokens=80, report_to=[], use_cpu=True, seed=0,
        per_device_train_batch_size=2, logging_steps=1, disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    losses = []
    for teacher in (str(store), store, TopKStore.open(store)):
        torch.manual_seed(0)
        trainer = DistillTrainer(
            _student(workspace), arguments, teachers=[teacher], train_dataset=tiny_texts(40)
        )
        trainer.train()
        losses.append([log["kd"] for log in trainer.state.log_history if "kd" in log])
    assert len(losses[0]) == 2
    assert losses[0] == losses[1] == losses[2]
    wrong = Teacher(store, tokenizer=str(workspace / "student"))
    with pytest.raises(PairError, match=r"are of the teacher tokenizer .* this pair's is"):
        DistillTrainer(_student(workspace), arguments, teachers=[wrong], train_dataset=["a b"])


def _student(workspace: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(workspace / "student")
