"""Each script of `examples/` runs as its first lines say, on tiny models.

What a launcher starts, it starts from nothing; the launcher itself is forked.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import Forked, free_port, rank_variables
from tiny_models import tiny_texts, write_jsonl, write_pair
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtoken import Pair
from xtoken.data import ColumnExamples, load_rows

EXAMPLES = Path(__file__).parents[2] / "examples"
FLAGS = "--use_cpu --max_steps 3 --logging_steps 1 --save_strategy no --disable_tqdm true".split()
ACCELERATE = "from accelerate.commands.launch import main; main()"
TORCHRUN = "from torch.distributed.run import main; main()"

pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pair")
    write_pair(made)
    write_jsonl(made / "data.jsonl", [text[:200] for text in tiny_texts(24)])
    return made


def start(
    folder: Path,
    script: str,
    *flags: str,
    launcher: Sequence[str] = (),
    **variables: str,
) -> Forked:
    """A launcher is its program and its flags."""
    models = [folder / name for name in ("student", "teacher", "data.jsonl")]
    program, *given = (*launcher, EXAMPLES / script, *models)
    path = [str(Path(__file__).parents[1] / "uncollected"), os.environ.get("PYTHONPATH")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    variables["HF_DEACTIVATE_ASYNC_LOAD"] = "0"  # as for whoever runs it
    return Forked(program, *given, *flags, CUDA_VISIBLE_DEVICES="", **variables)


def said(process: Forked) -> str:
    output, errors = process.communicate()
    assert process.returncode == 0, errors[-3000:]
    return output


def run(folder: Path, script: str, *flags: str, **given: Any) -> str:
    return said(start(folder, script, *flags, **given))


def is_a_student(folder: Path, out: Path) -> None:
    AutoModelForCausalLM.from_pretrained(out)
    made, given = (AutoTokenizer.from_pretrained(each) for each in (out, folder / "student"))
    assert made.get_vocab() == given.get_vocab()


def logged(output: str, name: str) -> list[float]:
    return [float(value) for value in re.findall(rf"'{name}': '([^']+)'", output)]


def test_own_loop(folder: Path, tmp_path: Path) -> None:
    output = run(folder, "own_loop.py", str(tmp_path))
    assert len(re.findall(r"step \d+: CE \d+\.\d+, KD \d+\.\d+", output)) == 6
    is_a_student(folder, tmp_path)


def test_trainer_alone_and_under_accelerate_launch_are_one_curve(
    folder: Path, tmp_path: Path
) -> None:
    flags = [*FLAGS, "--loss", "p-kl", "--max_tokens", "64"]
    alone = run(
        folder, "trainer.py", *flags, "--output_dir", str(tmp_path / "alone"),
        "--per_device_train_batch_size", "4",
    )  # fmt: skip
    # "multi_gpu" starts processes; with --cpu alone accelerate would start one.
    launch: tuple[str, ...] = (ACCELERATE, "--multi_gpu", "--num_processes", "2")
    launch += ("--num_machines", "1", "--main_process_port", str(free_port()))
    launch += ("--mixed_precision", "no", "--dynamo_backend", "no")
    both = run(
        folder, "trainer.py", *flags, "--output_dir", str(tmp_path / "both"),
        "--per_device_train_batch_size", "2", launcher=launch,
    )  # fmt: skip
    for name in ("loss", "ce", "kd", "kd_scale", "grad_norm"):
        assert len(logged(alone, name)) == 3
        assert logged(both, name) == pytest.approx(logged(alone, name), rel=2e-3), name
    for out in ("alone", "both"):
        is_a_student(folder, tmp_path / out)


def test_sft_trainer(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    flags = [*FLAGS, "--bf16", "false", "--packing", "--output_dir", str(tmp_path)]
    output = run(folder, "sft_trainer.py", *flags)
    assert len(logged(output, "kd")) == 3
    assert len(logged(output, "mean_token_accuracy")) >= 3
    is_a_student(folder, tmp_path)


def test_what_a_trl_user_adds_is_at_most_six_lines() -> None:
    lines = (EXAMPLES / "sft_trainer.py").read_text().splitlines()
    assert 0 < sum(bool(re.search(r"# \d$", line)) for line in lines) <= 6


@pytest.mark.skipif(
    tuple(map(int, torch.__version__.split(".")[:2])) < (2, 7),
    reason="older torch has no FSDP2 on the CPU",
)
def test_fsdp2_gives_the_curve_of_one_process(folder: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    # Of processes that one launcher starts, `accelerate launch` has two, by torchrun's agent.
    launch = (TORCHRUN, "--nproc_per_node", "1", "--master_port", str(free_port()))
    first = start(folder, "fsdp2.py", str(one), launcher=launch)
    ranks = [start(folder, "fsdp2.py", str(two), **rank) for rank in rank_variables(2)]
    outputs = (said(first), "".join(map(said, ranks)))
    curves = [
        [float(value) for value in re.findall(r"loss (\d+\.\d+)", output)] for output in outputs
    ]
    is_a_student(folder, one)
    is_a_student(folder, two)
    assert len(curves[0]) == 3
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)


def test_ray_data_tokenizes_what_a_trainer_reads(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    # Workers start when there is something to do, and not one more for each core before.
    few = dict.fromkeys(("RAY_enable_worker_prestart", "RAY_prestart_worker_first_driver"), "0")
    output = run(folder, "ray_data.py", str(tmp_path / "out"), **few)
    assert "24 examples, 0 cut at 512 tokens" in output
    pair = Pair(folder / "student", folder / "teacher")
    found = ColumnExamples(load_rows(tmp_path / "out"), pair.fingerprints)
    texts = [text[:200] for text in tiny_texts(24)]
    expected = {each.student_ids.tobytes() for each in pair.examples(texts).examples}
    assert {each.student_ids.tobytes() for each in found} == expected


def test_the_readme_names_every_script() -> None:
    page = (EXAMPLES / "README.md").read_text()
    for script in EXAMPLES.glob("*.py"):
        assert script.name in page, script.name
