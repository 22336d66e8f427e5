"""Every command takes models and tokenizers by their names on the hub."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from tiny_models import tiny_texts, write_jsonl, write_pair

RUN = """
import json, sys
from typer.testing import CliRunner
from xtoken.cli import app

failed = {}
for command in json.loads(sys.argv[1]):
    done = CliRunner().invoke(app, command)
    if done.exit_code:
        failed[" ".join(command)] = f"{done.exception!r} {done.output[-500:]}"
print(json.dumps(failed))
"""
PAIR = ("--student", "owner/student", "--teacher", "owner/teacher")


def test_every_command_takes_hub_names(tmp_path: Path) -> None:
    for side, source in zip(("student", "teacher"), write_pair(tmp_path / "pair"), strict=True):
        # The layout of a hub's local cache: what a download leaves behind.
        model = tmp_path / "hub" / f"models--owner--{side}"
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text("0" * 40)
        shutil.copytree(source, model / "snapshots" / ("0" * 40))
    write_jsonl(tmp_path / "data.jsonl", tiny_texts(12))
    (tmp_path / "text.txt").write_text("201 is 3 * 67")
    run = ("--max-tokens", "48", "--device", "cpu")
    commands = [
        ["vocab", "owner/student"],
        ["align", *PAIR, "text.txt"],
        ["project", "build", *PAIR, "--out", "w.safetensors"],
        ["project", "show", "w.safetensors", *PAIR],
        ["project", "explain", *PAIR, "201"],
        ["project", "export", "w.safetensors", "--out", "w.pt"],
        ["project", "import", "w.pt", *PAIR, "--out", "again.safetensors"],
        ["project", "audit", *PAIR, "--teacher-model", "owner/teacher", "--text", "text.txt"],
        ["report", "pair", *PAIR, "--out", "pair.html"],
        [
            *("report", "alignment", *PAIR, "--text", "text.txt", "--out", "text.html"),
            *("--student-model", "owner/student", "--teacher-model", "owner/teacher"),
        ],
        ["doctor", *PAIR],
        ["teach", "--teacher", "owner/teacher", "--data", "data.jsonl", "--out", "store"],
        ["distill", *PAIR, "--data", "data.jsonl", "--out", "run", "--steps", "1", *run],
        [
            *("transfer", "--model", "owner/teacher", "--tokenizer", "owner/student"),
            *("--out", "moved"),
        ],
        ["eval", "--model", "owner/student", "--data", "data.jsonl"],
    ]
    environment = os.environ | {
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path))),
    }
    done = subprocess.run(
        [sys.executable, "-c", RUN, json.dumps(commands)],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    failed = json.loads(done.stdout.splitlines()[-1])
    assert not failed, "\n".join(map(str, failed.items()))
    assert (tmp_path / "moved" / "model.safetensors").is_file()
