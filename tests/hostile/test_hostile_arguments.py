"""Whatever stands on the command line: one of four exit codes, and never a traceback."""

from __future__ import annotations

import collections
import json
from pathlib import Path

import pytest
import tokenizer_zoo as zoo
import typer
from drawing import count, generator
from forked import Forked
from tiny_models import READ_HUB, tiny_texts, write_jsonl

from xtoken.cli import app

# A command per line of a file; what it prints on standard output is the answer.
WORKER = """
import io, json, os, sys, time
from one_by_one import run

answers = os.fdopen(os.dup(1), "w")
for line in open(sys.argv[1]).readlines():
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"some text"))
    start = time.process_time()
    code, _, said = run(json.loads(line), "replace")
    answer = [code, said.decode(errors="replace"), time.process_time() - start]
    print(json.dumps(answer), file=answers, flush=True)
"""

# Of one command, on the small files here.
SECONDS = 60

VALUES = (
    *("", "-", "--", "x", "0", "1", "-1", "2", "1e400", "nan", "inf", "9" * 20, "9" * 5000, "0x10"),
    *("/", "/dev/null", "/dev/full", "/proc/self/mem", "\udcff", "\n", "\0", "a/b", "a" * 300),
    *("prefix-kl", "ce", "balanced", "text", "[]", "{}", "eot=<s>,</s>", "=", "eot=", "=,", "日本"),
)


def options_of(command: object) -> list[str]:
    """The names of the options of a command, hidden ones too."""
    return [name for item in command.params for name in item.opts if name.startswith("-")]  # type: ignore[attr-defined]


def commands() -> dict[str, list[str]]:
    found, pending = {}, [("", typer.main.get_command(app))]
    while pending:
        name, item = pending.pop()
        inner = getattr(item, "commands", None)
        if inner is None:
            found[name.strip()] = options_of(item)
        else:
            pending += [(f"{name} {key}", value) for key, value in inner.items()]
    return found


def test_drawn_command_lines_end_in_one_of_four_exit_codes(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.byte_level_bpe(500).save(str(tmp_path / "student.json"))
    zoo.byte_level_bpe(400, 1).save(str(tmp_path / "teacher.json"))
    write_jsonl(tmp_path / "data.jsonl", tiny_texts(6))
    (tmp_path / "bytes").write_bytes(bytes(range(256)) * 10)
    (tmp_path / "config.json").write_text('{"steps": 1}')
    (tmp_path / "folder").mkdir()
    files = [*(path.name for path in tmp_path.iterdir()), "none", "none/none"]
    rng = generator("arguments")

    def value() -> str:
        return rng.choice(files) if rng.random() < 0.6 else rng.choice(VALUES)

    known, lines = commands(), []
    for _ in range(count(70, 5000)):
        name = rng.choice(sorted(known))
        words = name.split()
        # Half of them get as far as the tokenizers.
        if rng.random() < 0.5 and "--student" in known[name]:
            words += ["--student", "student.json", "--teacher", "teacher.json"]
        for _ in range(rng.randrange(5)):
            option = rng.choice(known[name] or ["--help"])
            kind = rng.randrange(4)
            words += {
                0: [option], 1: [option, value()], 2: [f"{option}={value()}"], 3: [value()],
            }[kind]  # fmt: skip
        if name == "distill" and rng.random() < 0.5:
            words += ["--data", "data.jsonl", "--out", "out"]
        lines.append(words)
    # A NUL cannot stand on a command line, but in an argument of `main` it can.
    given = tmp_path_factory.mktemp("given") / "lines"
    given.write_text("".join(json.dumps(words) + "\n" for words in lines))
    monkeypatch.chdir(tmp_path)
    variables = {"XTOKEN_CACHE": "off", "HF_HUB_OFFLINE": "1", "TERM": "dumb"}
    done = Forked(READ_HUB + WORKER, given, **variables)
    output, errors = done.communicate(timeout=3000)
    answers = [json.loads(line) for line in output.splitlines()]
    assert len(answers) == len(lines), f"{lines[len(answers)]} ended the process: {errors}"
    fallen = [
        (words, code, said[-300:])
        for words, (code, said, _) in zip(lines, answers, strict=True)
        if code not in (0, 1, 2, 130) or "Traceback" in said or "this is a bug" in said
    ]
    assert not fallen, "\n".join(map(str, fallen[:10]))
    of_many_lines = [
        (words, said)
        for words, (code, said, _) in zip(lines, answers, strict=True)
        if code == 1 and said.rstrip("\n").count("\n") > 0 and "warning" not in said
    ]
    assert not of_many_lines, of_many_lines[:3]
    codes = collections.Counter(code for code, *_ in answers)
    assert min(codes[0], codes[1], codes[2]) > 0, codes
    slowest = max(zip(answers, lines, strict=True), key=lambda item: item[0][2])
    assert slowest[0][2] < SECONDS, slowest
    print(dict(codes), slowest)
