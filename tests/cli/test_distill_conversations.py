"""`xtoken distill` on conversations, with two chat templates."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from tiny_models import tiny_texts, write_jsonl, write_pair
from transformers import AutoTokenizer
from typer.testing import CliRunner

from xtoken.cli import app
from xtoken.data import read_documents
from xtoken.training import DistillConfig
from xtoken.training.metrics_log import read_history

STUDENT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '\n' + message['role'] + ':\n' }}{{ message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '\nassistant:\n' }}{% endif %}"
)
TEACHER_TEMPLATE = (
    "{% for message in messages %}{{ '## ' + message['role'] + '\n' }}"
    "{{ message['content'] | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '## assistant\n' }}{% endif %}"
)


def conversations(count: int) -> list[list[dict[str, str]]]:
    """Two questions and two answers each, cut from real text."""
    made = []
    for text in tiny_texts(count):
        quarter = len(text) // 4
        parts = [text[at * quarter : (at + 1) * quarter].strip() for at in range(4)]
        roles = ("user", "assistant") * 2
        made.append([{"role": r, "content": c} for r, c in zip(roles, parts, strict=True)])
    return made


def write_conversations(path: Path, talks: list[list[dict[str, str]]]) -> Path:
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    return path


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chat")
    for directory, template in zip(
        write_pair(folder), (STUDENT_TEMPLATE, TEACHER_TEMPLATE), strict=True
    ):
        tokenizer = AutoTokenizer.from_pretrained(directory)
        tokenizer.chat_template = template
        tokenizer.save_pretrained(directory)
    write_conversations(folder / "train.jsonl", conversations(24))
    write_conversations(folder / "held_out.jsonl", conversations(60)[-5:])
    settings = DistillConfig(
        steps=3, batch_size=3, top_k=32, teacher_top_k=32, max_tokens=400, curves=False
    )
    settings.save(folder / "config.json")
    return folder


def arguments(workspace: Path, out: Path, **changed: object) -> list[str]:
    options: dict[str, object] = {
        "student": workspace / "student",
        "teacher": workspace / "teacher",
        "data": workspace / "train.jsonl",
        "config": workspace / "config.json",
        "teacher-cache": workspace / "cache",
        "device": "cpu",
        "out": out,
    } | {name.replace("_", "-"): value for name, value in changed.items()}
    return [
        "distill",
        *(part for name, value in options.items() for part in (f"--{name}", str(value))),
    ]


def distill(workspace: Path, out: Path, **changed: object) -> str:
    result = CliRunner().invoke(app, arguments(workspace, out, **changed))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def row(output: str, title: str) -> list[int]:
    """The numbers of a row of a printed table."""
    (cells,) = re.findall(rf"^│ {title} +│(.+)$", output, re.MULTILINE)
    return [int(number.replace(",", "")) for number in re.findall(r"[\d,]*\d", cells)]


def test_a_run_on_conversations_trains_and_scores_what_the_assistant_says(
    workspace: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    output = distill(workspace, out, held_out=workspace / "held_out.jsonl")
    history = read_history(out / "metrics.jsonl")
    assert len([record for record in history if "kd" in record]) == 3
    assert row(output, "examples") == [24, 5]

    in_loss, tokens = row(output, "student tokens in the loss"), row(output, "student tokens")
    assert all(0 < few < all_ for few, all_ in zip(in_loss, tokens, strict=True))
    chunks = row(output, "chunks in the loss")
    assert all(0 < count <= tokens for count, tokens in zip(chunks, in_loss, strict=True))

    # Held-out bits per byte are of the answers, without the markers after them.
    student = AutoTokenizer.from_pretrained(out / "student")
    assert student.chat_template == STUDENT_TEMPLATE
    expected = 0
    for document in read_documents(workspace / "held_out.jsonl"):
        assert not isinstance(document, str)
        expected += sum(len(message["content"].encode()) for message in document.messages[1::2])
    score = json.loads((out / "result.json").read_text())["after"]
    assert score["bytes"] == expected


def test_conversations_are_held_out_by_hash_and_repeated_ones_dropped(
    workspace: Path, tmp_path: Path
) -> None:
    talks = conversations(24)
    data = write_conversations(tmp_path / "data.jsonl", [*talks, talks[0], talks[5]])
    output = distill(workspace, tmp_path / "run", data=data, loss="ce", steps=1)
    assert "2 repeated or held-out texts were dropped" in output
    examples = row(output, "examples")
    assert sum(examples) == 24
    assert examples[1] > 0


def test_a_file_may_mix_texts_and_conversations_and_the_field_can_be_named(
    workspace: Path, tmp_path: Path
) -> None:
    data = tmp_path / "data.jsonl"
    write_jsonl(data, tiny_texts(10))
    with data.open("a") as lines:
        for talk in conversations(10):
            lines.write(json.dumps({"messages": talk}) + "\n")
    output = distill(workspace, tmp_path / "mixed", data=data, loss="ce", steps=1)
    assert sum(row(output, "examples")) == 20

    named = tmp_path / "named.jsonl"
    named.write_text("".join(json.dumps({"chat": talk}) + "\n" for talk in conversations(20)))
    output = distill(
        workspace, tmp_path / "named", data=named, text_field="chat", loss="ce", steps=1
    )
    assert sum(row(output, "examples")) == 20


def test_a_chat_template_can_be_given_as_a_file_and_stays_with_the_student(
    workspace: Path, tmp_path: Path
) -> None:
    for side in ("student", "teacher"):
        shutil.copytree(workspace / side, tmp_path / side)
        (tmp_path / side / "chat_template.jinja").unlink()
    sides = {side: tmp_path / side for side in ("student", "teacher")}
    with pytest.raises(Exception, match="the student's tokenizer has no chat template, expected"):
        distill(workspace, tmp_path / "none", **sides)
    files = {}
    for side, template in (("student", STUDENT_TEMPLATE), ("teacher", TEACHER_TEMPLATE)):
        files[f"{side}_chat_template"] = tmp_path / f"{side}.jinja"
        files[f"{side}_chat_template"].write_text(template)
    partial = {"student_chat_template": files["student_chat_template"]}
    with pytest.raises(Exception, match="the teacher's tokenizer has no chat template"):
        distill(workspace, tmp_path / "one", **sides, **partial)
    output = distill(workspace, tmp_path / "run", **sides, **files, loss="ce", steps=1)
    expected = distill(workspace, tmp_path / "own", loss="ce", steps=1)
    table = [line for line in expected.splitlines() if "student tokens" in line]
    assert table
    assert set(table) <= set(output.splitlines())
    saved = AutoTokenizer.from_pretrained(tmp_path / "run" / "student")
    assert saved.chat_template == STUDENT_TEMPLATE


def test_bad_conversations_and_templates_are_named(workspace: Path, tmp_path: Path) -> None:
    talks = conversations(40)
    talks[3][0]["role"] = "human"
    data = write_conversations(tmp_path / "data.jsonl", talks)
    output = distill(workspace, tmp_path / "one", data=data, loss="ce", steps=1)
    output = " ".join(output.split())
    assert "warning: 1 of 40 rows are left out; the first, " in output
    assert "data.jsonl:4: messages[0].role = 'human', expected" in output
    for talk in talks:
        talk[0]["role"] = "human"
    data = write_conversations(tmp_path / "data.jsonl", talks)
    with pytest.raises(Exception, match=r"data\.jsonl:1: messages\[0\]\.role = 'human', expected"):
        distill(workspace, tmp_path / "run", data=data)
    with pytest.raises(FileNotFoundError, match=r"--student-chat-template nowhere does not exist"):
        distill(workspace, tmp_path / "run", student_chat_template="nowhere")
    (tmp_path / "latin.jinja").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(Exception, match=r"--teacher-chat-template .*latin\.jinja is not UTF-8"):
        distill(workspace, tmp_path / "run", teacher_chat_template=tmp_path / "latin.jinja")
    (tmp_path / "broken.jinja").write_text("{% for %}")
    with pytest.raises(Exception, match=r"train\.jsonl:1: the teacher's chat template cannot"):
        distill(workspace, tmp_path / "run", teacher_chat_template=tmp_path / "broken.jinja")


def test_stored_conversations_are_those_that_are_trained_on(
    workspace: Path, tmp_path: Path
) -> None:
    """Of the teacher's template and day, whatever the student's template makes of them."""
    store = tmp_path / "store"
    made = CliRunner().invoke(
        app,
        [
            *("teach", "--teacher", str(workspace / "teacher"), "--out", str(store)),
            *("--data", str(workspace / "train.jsonl"), "--top-k", "32", "--max-tokens", "400"),
            *("--date", "2020-02-02"),
        ],
    )
    assert made.exit_code == 0, made.output
    run = CliRunner().invoke(
        app,
        [
            *("distill", "--student", str(workspace / "student"), "--teacher-store", str(store)),
            *("--data", str(workspace / "train.jsonl"), "--out", str(tmp_path / "run")),
            *("--held-out", str(workspace / "held_out.jsonl")),
            *("--config", str(workspace / "config.json"), "--steps", "1"),
        ],
    )
    assert run.exit_code == 0, (run.output, run.exception)
    assert "0 of them computed now" in " ".join(run.output.split())
    assert DistillConfig.load(tmp_path / "run" / "config.json").date == "2020-02-02"
