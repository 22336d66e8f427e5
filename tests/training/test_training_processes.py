"""Two processes over gloo: the gradient is that of one, and the teacher is asked once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from forked import Forked, fork_two, rank_variables
from tiny_models import tiny_texts, write_jsonl, write_pair

from xtoken.projection import Projection
from xtoken.training.metrics_log import read_history

TESTS = Path(__file__).parents[1]

SCRIPT = """
import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from xtoken.data import read_texts, split_held_out
from xtoken.training import *
from xtoken.training.config_arguments import training_arguments
from xtoken.training.metrics_log import History, KeepHistory

folder, batch_size = Path(sys.argv[1]), int(sys.argv[2])
config = DistillConfig(
    steps=1, batch_size=batch_size, top_k=64, teacher_top_k=64, max_tokens=96, device="cpu",
    max_grad_norm=1e9, kd_weight="balanced",
)
models = load_models(folder / "student", folder / "teacher")
materials = prepare(models, split_held_out(read_texts(folder / "data.jsonl"), 0.2), config)
rank = os.environ.get("RANK", "alone")
teachers = open_teachers(materials, config, [config.loss], folder / f"cache-{rank}")

class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **_):
        gradient = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
        torch.save(gradient, folder / f"gradient-{rank}.pt")

arguments = training_arguments(config, folder)
arguments.accelerator_config.dispatch_batches = rank != "alone"  # each collates its own rows
trainer = DistillTrainer(
    models.load_student(), arguments, teachers=[teachers[config.loss]],
    train_dataset=materials.train, processing_class=materials.pair,
    callbacks=[Keep(), KeepHistory(History(folder / f"metrics-{rank}.jsonl"))],
)
trainer.train()
"""


FILL = """
import json
import os
import signal
import sys
from pathlib import Path

from xtoken.data import read_texts, split_held_out
from xtoken.training import *
from xtoken.training.prepare import open_store
from xtoken.training.config_arguments import run_device

folder, fate = Path(sys.argv[1]), sys.argv[2]
config = DistillConfig(top_k=64, teacher_top_k=64, max_tokens=96, device="cpu")
models = load_models(folder / "student", folder / "teacher")
materials = prepare(models, split_held_out(read_texts(folder / "data.jsonl"), 0.2), config)
teacher = models.load_teacher(run_device(config))
store = open_store(materials, teacher, 64, folder / "shared")
first = (teacher.tokens_computed, store.sequences_computed)
if fate == "dies" and os.environ["RANK"] == "1":
    os.kill(os.getpid(), signal.SIGKILL)
store = open_store(materials, teacher, 64, folder / "shared")
print(json.dumps({
    "tokens": first[0],
    "sequences": first[1],
    "tokens again": teacher.tokens_computed - first[0],
    "sequences again": store.sequences_computed,
    "stored": len(store),
    "found": all(example.teacher_ids in store for example in materials.train.examples),
    "wanted": sum(len(example.teacher_ids) for example in materials.train.examples),
}))
"""

PREPARED = """
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

from xtoken.data import read_texts, split_held_out
from xtoken.errors import InterruptedRunError
from xtoken.training import *
from xtoken.training.metrics_log import History

folder, sitting = Path(sys.argv[1]), sys.argv[2]
config = DistillConfig(
    batch_size=2, top_k=32, teacher_top_k=32, max_tokens=48, device="cpu", learning_rate=3e-3,
    curves=False, **OPTIONS,
)
models = load_models(folder / "student", folder / "teacher")
materials = prepare(models, split_held_out(read_texts(folder / "data.jsonl"), 0.2), config)
teacher = open_teachers(materials, config, [config.loss], folder / "cache")[config.loss]
add = History.add
"""

RESUME = (
    f"OPTIONS = dict(steps=8, checkpoint_every=3){PREPARED}"
    + """
def end_in_step_five(history, record):
    if record["step"] == 5:
        os._exit(9)
    add(history, record)

if sitting == "first":
    train(materials, replace(config, checkpoint_every=0), teacher, folder / "whole")
    History.add = end_in_step_five
result = train(materials, config, teacher, folder / "cut", resume=sitting == "second")
assert result.steps_before == 3
assert [record["step"] for record in result.records if "ce" in record] == list(range(1, 9))
"""
)


SIGNAL = (
    f"OPTIONS = dict(steps=3, eval_every=3){PREPARED}"
    + """
def signal_the_second(history, record):
    add(history, record)
    before_evaluation = record["step"] == 3 and "ce" in record
    after_evaluation = record["step"] == 3 and "ce" not in record
    at = {"before": before_evaluation, "after": after_evaluation}
    if os.environ["RANK"] == "1" and at[when]:
        os.kill(os.getpid(), signal.SIGTERM)

if sitting == "first":
    train(materials, config, teacher, folder / "whole")
    History.add = signal_the_second
for when in ("before", "after"):
    if sitting == "second":
        assert train(materials, config, teacher, folder / when, resume=True).steps_before == 3
        continue
    try:
        train(materials, config, teacher, folder / when)
    except InterruptedRunError as error:
        print(f"{when}: {error}")
"""
)


DIFFER = (
    f"OPTIONS = dict(steps=1){PREPARED}"
    + """
from xtoken.errors import OptionError

rank = os.environ["RANK"]
other = replace(config, learning_rate=3e-3 if rank == "0" else 5e-3)
for chosen, out in ((other, "one"), (config, f"out-{rank}")):
    try:
        train(materials, chosen, teacher, folder / out)
    except OptionError as error:
        print(error)
"""
)


LEARN = """
import os
import sys
from pathlib import Path

from xtoken.data import read_texts, split_held_out
from xtoken.training import *

folder, batch_size = Path(sys.argv[1]), int(sys.argv[2])
# SGD: Adam makes a whole step of a gradient that is nothing but rounding.
config = DistillConfig(
    steps=2, batch_size=batch_size, loss="p-kl", top_k=32, teacher_top_k=32, max_tokens=48,
    device="cpu", learnable_projection=True, projection_learning_rate=1e4, learning_rate=0.1,
    kd_weight=1.0, warmup_steps=0, max_grad_norm=1e9, trainer={"optim": "sgd"}, curves=False,
)
models = load_models(folder / "student", folder / "teacher")
materials = prepare(models, split_held_out(read_texts(folder / "data.jsonl"), 0.2), config)
shared = "one" if "RANK" not in os.environ else "two"
teacher = open_teachers(materials, config, [config.loss], folder / f"cache-{shared}")[config.loss]
train(materials, config, teacher, folder / shared)
if shared == "one":
    materials.projection.save(folder / "before.safetensors")
"""


@pytest.fixture
def workspace(tmp_path: Path) -> Path:
    write_pair(tmp_path)
    write_jsonl(tmp_path / "data.jsonl", tiny_texts(40))
    return tmp_path


def test_two_processes_give_the_gradient_of_one(workspace: Path) -> None:
    for process in [*fork_two(SCRIPT, workspace, 2), Forked(SCRIPT, workspace, 4)]:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    (expected,) = read_history(workspace / "metrics-alone.jsonl")
    for rank in ("0", "1"):
        (record,) = read_history(workspace / f"metrics-{rank}.jsonl")
        assert record == pytest.approx(expected, rel=1e-3)
    alone = torch.load(workspace / "gradient-alone.pt")
    scale = max(float(value.abs().max()) for value in alone.values())
    for rank in ("0", "1"):
        gradient = torch.load(workspace / f"gradient-{rank}.pt")
        assert gradient.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(
                gradient[name], value, rtol=1e-3, atol=1e-5 * scale, msg=name
            )


def test_two_processes_learn_the_projection_of_one(workspace: Path) -> None:
    for process in [*fork_two(LEARN, workspace, 2), Forked(LEARN, workspace, 4)]:
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    before = Projection.load(workspace / "before.safetensors")
    one, two = (
        Projection.load(workspace / name / "projection.safetensors") for name in ("one", "two")
    )
    learned = one.weights - before.weights
    assert abs(learned).max() > 0.01
    assert two.weights - before.weights == pytest.approx(
        learned, abs=1e-3 * float(abs(learned).max())
    )
    curves = (read_history(workspace / name / "metrics.jsonl") for name in ("one", "two"))
    for mine, other in zip(*curves, strict=True):
        if "kd" in mine:
            assert other["kd"] == pytest.approx(mine["kd"], rel=1e-4)


def test_two_processes_share_the_teachers_work_and_see_all_of_it(workspace: Path) -> None:
    cache = workspace / "cache"
    reports = []
    for process in fork_two(FILL, workspace, "lives", XTOKEN_CACHE=str(cache)):
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        reports.append(json.loads(output.splitlines()[-1]))  # gloo may say something first
    wanted = reports[0]["wanted"]
    assert sum(report["tokens"] for report in reports) == wanted
    for report in reports:
        assert 0.4 * wanted < report["tokens"] < 0.6 * wanted
        assert report["sequences"] == report["stored"]
        assert report["found"]
        assert (report["tokens again"], report["sequences again"]) == (0, 0)
    # W was asked for by both at once.
    assert len(list(cache.glob("projection-*.safetensors"))) == 1


def test_the_end_of_one_process_ends_the_wait_of_the_other(workspace: Path) -> None:
    waiting, killed = fork_two(FILL, workspace, "dies")
    _, errors = waiting.communicate()
    killed.communicate(timeout=10)
    assert killed.returncode == -signal.SIGKILL
    assert waiting.returncode == 1
    assert "Connection closed by peer" in errors or "Connection reset by peer" in errors


def test_the_first_process_of_a_machine_tokenizes_and_the_others_have_the_same(
    workspace: Path,
) -> None:
    script = TESTS / "training" / "tokenize_once.py"
    ranks = rank_variables(2)
    # From nothing, so with a hash seed of its own.
    path = [str(TESTS / "uncollected"), str(TESTS), str(TESTS.parent), *sys.path]
    second = subprocess.Popen(
        [sys.executable, script, workspace, workspace / "two"],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)} | ranks[1],
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    first, alone = (
        Forked(script, workspace, workspace / cache, **variables)
        for cache, variables in (("two", ranks[0]), ("one", {}))
    )
    for process in (second, first, alone):
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    first, second, alone = (
        json.loads((workspace / f"{name}.json").read_text()) for name in ("0", "1", "alone")
    )
    assert first == alone
    assert len(alone) == 7
    for kind, expected in alone.items():
        assert expected["encoded"] >= 40, kind
        assert second[kind] == expected | {"encoded": 0}, kind


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) <= (2, 8),
    reason="older torch cannot read a checkpoint of several processes back to the CPU",
)
def test_two_processes_go_on_from_a_checkpoint_to_the_student_of_an_uninterrupted_run(
    workspace: Path,
) -> None:
    path = workspace / "student" / "config.json"
    # Each process draws its own dropout.
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 0.2}))
    for sitting, code in (("first", 9), ("second", 0)):
        for process in fork_two(RESUME, workspace, sitting):
            _, errors = process.communicate()
            assert process.returncode == code, errors
    for name in ("student/model.safetensors", "metrics.jsonl"):
        found, expected = ((workspace / run / name).read_bytes() for run in ("cut", "whole"))
        assert found == expected, name


def test_processes_that_were_started_otherwise_are_refused_in_each(workspace: Path) -> None:
    for process in fork_two(DIFFER, workspace, "only"):
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        settings, out = output.splitlines()[-2:]
        assert settings == (
            "process 1 of this run has learning_rate = 0.005, process 0 has 0.003; start all "
            "processes by the same command"
        )
        assert f"process 1 of this run has out = {workspace.resolve() / 'out-1'}, " in out
    assert not list(workspace.glob("o*/student"))


def test_two_processes_end_alike_when_a_signal_comes_to_one_after_the_last_step(
    workspace: Path,
) -> None:
    for process in fork_two(SIGNAL, workspace, "first"):
        output, errors = process.communicate()
        assert process.returncode == 0, errors
        assert "before: stopped by SIGTERM after step 3 of 3; the checkpoint is in" in output
        assert "after: stopped by SIGTERM after step 3 of 3; all is done" in output
    assert (workspace / "before" / "checkpoint-3" / "run.json").is_file()
    assert not (workspace / "before" / "result.json").exists()
    assert (workspace / "after" / "result.json").is_file()
    for process in fork_two(SIGNAL, workspace, "second"):
        _, errors = process.communicate()
        assert process.returncode == 0, errors
    for run in ("before", "after"):
        for name in ("student/model.safetensors", "metrics.jsonl"):
            found, expected = ((workspace / each / name).read_bytes() for each in (run, "whole"))
            assert found == expected, (run, name)
