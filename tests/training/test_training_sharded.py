"""DDP and FSDP2 by accelerate on two processes: the curve of one, sharded models, a resumed run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked, rank_variables
from transformers import AutoModelForCausalLM

SCRIPT = Path(__file__).parent / "sharded_run.py"

pytestmark = pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 8),
    reason="older torch cannot read a checkpoint of several processes back to the CPU",
)


def run(folder: Path, out: Path, kind: str, processes: int) -> dict[str, Any]:
    ranks = [
        Forked(SCRIPT, folder, out, kind, CUDA_VISIBLE_DEVICES="", DS_ACCELERATOR="cpu", **rank)
        for rank in rank_variables(processes)
    ]
    for process in ranks:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
    found: dict[str, Any] = json.loads((out / "found.json").read_text())
    return found


@pytest.fixture(scope="module")
def alone(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(folder, tmp_path_factory.mktemp("alone"), "ddp", 1)


def same_curve(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert len(found["records"]) == len(expected["records"]) == 4
    assert found["records"][0]["ce"] != found["records"][-1]["ce"]
    for mine, other in zip(found["records"], expected["records"], strict=True):
        assert mine.keys() == other.keys()
        for name in ("loss", "ce", "kd", "kd_scale", "chunks", "coverage", "teacher_mass"):
            assert mine[name] == pytest.approx(other[name], rel=1e-5), name
        assert mine["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)


def test_two_processes_of_data_parallel_have_the_curve_of_one(
    folder: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    same_curve(run(folder, tmp_path, "ddp", 2), alone)


def test_fsdp2_shards_student_and_teacher_has_the_curve_of_one_and_resumes(
    folder: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    found = run(folder, tmp_path, "fsdp", 2)
    same_curve(found, alone)
    assert found["model"] == "FSDPLlamaForCausalLM"
    assert found["sharded"] == pytest.approx([0.5, 0.5], abs=0.02)
    whole = shutil.move(tmp_path / "student", tmp_path / "whole")
    AutoModelForCausalLM.from_pretrained(whole)
    shutil.rmtree(tmp_path / "checkpoint-4")
    resumed = run(folder, tmp_path, "resume", 2)
    assert resumed["records"][-1] == found["records"][-1]
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "student")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_without_logits_a_sharded_head_is_gathered(
    folder: Path, tmp_path: Path, alone: dict[str, Any]
) -> None:
    found = run(folder, tmp_path, "fused", 2)
    same_curve(found, alone)
    assert found["sharded"] == pytest.approx([0.5, 0.5], abs=0.02)


def test_a_sharded_student_answers_too(folder: Path, tmp_path: Path) -> None:
    records = run(folder, tmp_path, "policy", 2)["records"]
    assert all(record["sampled_tokens"] > 0 for record in records)


def test_trls_trainer_with_the_mixin_has_the_curve_of_one_under_ddp_and_fsdp2(
    folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    one = run(folder, tmp_path, "sft-ddp", 1)
    same_curve(run(folder, tmp_path, "sft-ddp", 2), one)
    sharded = run(folder, tmp_path, "sft-fsdp", 2)
    same_curve(sharded, one)
    assert sharded["sharded"] == pytest.approx([0.5, 0.5], abs=0.02)


def test_the_parts_add_up_where_each_process_divides_by_its_own_tokens(
    folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("trl")
    for record in run(folder, tmp_path, "sft-apart", 2)["records"]:
        parts = record["ce"] + record["kd_scale"] * record["kd"]
        assert record["loss"] == pytest.approx(parts, rel=1e-4)
        assert record["kd_scale"] == pytest.approx(record["ce"] / record["kd"], rel=1e-4)


@pytest.mark.parametrize("kind", ["zero2", "zero3"])
def test_deepspeed_has_the_curve_of_one_process_and_the_teacher_whole(
    folder: Path, tmp_path: Path, alone: dict[str, Any], kind: str
) -> None:
    pytest.importorskip("deepspeed")
    found = run(folder, tmp_path, kind, 2)
    same_curve(found, alone)
    assert found["score"] == pytest.approx(alone["score"], rel=1e-4)
    assert found["sharded"][1] == 1
    AutoModelForCausalLM.from_pretrained(tmp_path / "student")
