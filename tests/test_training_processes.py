"""Two processes, data parallel over gloo: the gradient is that of one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_texts, write_jsonl, write_pair

from xtoken.training.history import read_history

SCRIPT = """
import os
import sys
from pathlib import Path

import torch
from transformers import TrainerCallback

from xtoken.data import DistillCollator, read_texts, split_held_out
from xtoken.training import *
from xtoken.training.history import History

folder, batch_size = Path(sys.argv[1]), int(sys.argv[2])
config = DistillConfig(
    steps=1, batch_size=batch_size, top_k=64, teacher_top_k=64, max_tokens=96, device="cpu",
    max_grad_norm=1e9, kd_weight="balanced",
)
pair = load_pair(folder / "student", folder / "teacher")
materials = prepare(pair, split_held_out(read_texts(folder / "data.jsonl"), 0.2), config)
rank = os.environ.get("RANK", "alone")
teachers = open_teachers(materials, config, [config.loss], folder / f"cache-{rank}")

class Keep(TrainerCallback):
    def on_pre_optimizer_step(self, args, state, control, model, **_):
        gradient = {n.removeprefix("module."): p.grad for n, p in model.named_parameters()}
        torch.save(gradient, folder / f"gradient-{rank}.pt")

trainer = DistillTrainer(
    pair.load_student(), config, objective=Objective(config, materials.projection),
    teacher=teachers[config.loss], train_examples=materials.train, collator=DistillCollator(),
    output_dir=folder, history=History(folder / f"metrics-{rank}.jsonl"),
)
trainer.add_callback(Keep())
trainer.train()
"""


def start(folder: Path, batch_size: int, **variables: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(folder), str(batch_size)],
        env=os.environ | {"OMP_NUM_THREADS": "1"} | variables,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_two_processes_give_the_gradient_of_one(tmp_path: Path) -> None:
    write_pair(tmp_path)
    write_jsonl(tmp_path / "data.jsonl", tiny_texts(40))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    ranks = [
        start(tmp_path, 2, RANK=rank, LOCAL_RANK=rank, WORLD_SIZE="2", **address)
        for rank in ("0", "1")
    ]
    for process in [*ranks, start(tmp_path, 4)]:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    (expected,) = read_history(tmp_path / "metrics-alone.jsonl")
    for rank in ("0", "1"):
        (record,) = read_history(tmp_path / f"metrics-{rank}.jsonl")
        assert record == pytest.approx(expected, rel=1e-3)
    alone = torch.load(tmp_path / "gradient-alone.pt")
    scale = max(float(value.abs().max()) for value in alone.values())
    for rank in ("0", "1"):
        gradient = torch.load(tmp_path / f"gradient-{rank}.pt")
        assert gradient.keys() == alone.keys()
        for name, value in alone.items():
            torch.testing.assert_close(
                gradient[name], value, rtol=1e-3, atol=1e-5 * scale, msg=name
            )
