"""The data of `xtoken distill`: files of several kinds, directories, rows that cannot be used."""

from __future__ import annotations

import json
from pathlib import Path

from datasets import Dataset
from tiny_models import tiny_texts
from typer.testing import CliRunner

from xtoken.cli import app


def test_several_files_train_as_one_and_what_cannot_be_used_is_named(
    folder: Path, tmp_path: Path
) -> None:
    texts = tiny_texts(30)
    chats = [
        {"conversations": [{"from": "human", "value": "a"}, {"from": "bot", "value": "b"}]},
        {"conversations": [{"from": "gpt", "value": "nothing prompts it"}]},
    ]
    Dataset.from_dict({"text": [*texts[:15], " "]}).to_parquet(tmp_path / "data.parquet")
    (tmp_path / "more").mkdir()
    Dataset.from_dict({"text": texts[15:]}).to_csv(tmp_path / "more" / "data.csv")
    lines = [{"text": texts[0]}, {"messages": chats[1]["conversations"]}, chats[0]]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = CliRunner().invoke(
        app,
        [
            "distill", "--student", str(folder / "student"), "--teacher", str(folder / "teacher"),
            "--data", str(tmp_path / "data.parquet"), "--data", str(tmp_path / "more"),
            "--data", str(tmp_path / "chats.jsonl"), "--out", str(tmp_path / "out"),
            "--teacher-cache", str(tmp_path / "cache"), "--device", "cpu", "--loss", "ce",
            "--steps", "1", "--batch-size", "2", "--max-tokens", "48", "--no-curves",
        ],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    output = " ".join(result.output.split())
    assert "warning: 3 of 34 rows are left out; the first, " in output
    assert "data.parquet: row 15: its text is blank" in output
    assert "chats.jsonl:2: messages[0] is of role 'assistant'" in output
    assert "chats.jsonl:3: messages[1].from = 'bot', expected one of human" in output
    assert "1 repeated or held-out texts were dropped from training" in output
