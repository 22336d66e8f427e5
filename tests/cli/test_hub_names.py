"""Every command takes models and tokenizers by their names on the hub."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from forked import Forked
from tiny_models import READ_HUB, tiny_texts, write_hub, write_jsonl

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


def test_every_command_takes_hub_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variables = write_hub(tmp_path)
    monkeypatch.chdir(tmp_path)
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
    process = Forked(READ_HUB + RUN, json.dumps(commands), **variables)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    failed = json.loads(output.splitlines()[-1])
    assert not failed, "\n".join(map(str, failed.items()))
    assert (tmp_path / "moved" / "model.safetensors").is_file()
