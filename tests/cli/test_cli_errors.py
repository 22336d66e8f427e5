"""The command as the shell runs it: whatever is wrong ends in one line, never in a traceback."""

from __future__ import annotations

import atexit
import functools
import gc
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import pytest
import tokenizer_zoo as zoo
import typer
from forked import CONTEXT, Forked, start_server
from one_by_one import serve
from tiny_models import tiny_texts, write_jsonl, write_pair
from typer.core import TyperGroup

import xtoken
from xtoken.cli import COMMANDS, app
from xtoken.cli.command import Command
from xtoken.cli.outputs import check_out, check_out_folder
from xtoken.cli.sides import read_side
from xtoken.errors import MissingFileError, OptionError


class Done(NamedTuple):
    """How a command ended, and what it said."""

    returncode: int
    stdout: bytes
    stderr: bytes


SOURCE = str(Path(xtoken.__file__).parent.parent)
RUN = "from xtoken.cli import main; main()"


@functools.cache
def worker() -> Connection:
    """A process that runs one command after another: torch is imported once for all tests."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=serve, args=(theirs,), daemon=True)
    start_server()
    process.start()
    atexit.register(process.kill)
    theirs.close()
    return ours


def command(*arguments: str | Path, code: str = RUN, **environment: str) -> Done:
    """Run a command; in a process of its own where it is to have another environment."""
    if code == RUN and not environment:
        worker().send([str(item) for item in arguments])
        return Done(*worker().recv())
    done = subprocess.run(
        [sys.executable, "-c", code, *map(os.fsencode, arguments)],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": SOURCE, "TERM": "dumb", **environment},
        timeout=300,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def one_line(done: Done, exit_code: int = 1) -> str:
    """What the command said on stderr, which must be one line."""
    errors = done.stderr.decode()
    assert "Traceback" not in errors, errors
    assert done.returncode == exit_code, errors
    assert errors.count("\n") == 1, errors
    return errors


@pytest.fixture(name="pair", scope="module")
def _pair(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    zoo.byte_level_bpe(2000, 3).save(str(folder / "student.json"))
    zoo.byte_level_bpe(2000, 1).save(str(folder / "teacher.json"))
    return ["--student", str(folder / "student.json"), "--teacher", str(folder / "teacher.json")]


@pytest.fixture(name="models", scope="module")
def _models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    student, teacher = write_pair(folder)
    data = write_jsonl(folder / "data.jsonl", tiny_texts(60))
    sources = ["--student", str(student), "--teacher", str(teacher), "--data", str(data)]
    return [*sources, "--device", "cpu", "--max-tokens", "80", "--batch-size", "2"]


def all_commands() -> dict[str, object]:
    root = typer.main.get_command(app)
    found: dict[str, object] = {}
    pending = [("", root)]
    while pending:
        name, item = pending.pop()
        if isinstance(item, TyperGroup):
            context = typer.Context(item)
            for key in item.list_commands(context):
                pending.append((f"{name} {key}", item.get_command(context, key)))
        else:
            found[name.strip()] = item
    return found


def test_garbage_is_collected_from_the_start_of_a_commands_work_on() -> None:
    """To the end, too: what Triton's binding finds then, it tells."""
    pytest.importorskip("triton")
    code = (
        "import gc, triton\nfrom xtoken import cli\ncli.app = cli.App()\n"
        "cli.app.command()(lambda: print(gc.isenabled()))\ncli.main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("True\n", "")


def test_garbage_is_collected_again_after_a_tokenizer_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(MissingFileError):
        read_side("student", str(tmp_path / "none"))
    assert gc.isenabled()


def test_the_list_of_commands_says_of_each_what_its_own_help_begins_with() -> None:
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    for name in root.list_commands(typer.Context(root)):
        command = root.get_command(typer.Context(root), name)
        assert command is not None
        assert command.name == name
        first = str(command.help).partition("\n\n")[0]
        assert " ".join(first.split()) == COMMANDS[name][1], name


def test_all_commands_refuse_options_that_are_given_twice() -> None:
    commands = all_commands()
    assert {"vocab", "align", "distill", "project build", "project audit"} <= set(commands)
    assert all(isinstance(item, Command) for item in commands.values())


@pytest.mark.parametrize(
    "arguments",
    [
        ("align", "--student", "a", "--student=b", "--teacher", "c"),
        ("project", "build", "--out", "a", "--out", "b"),
        ("distill", "--student", "A", "--student", "B"),
        ("distill", "--max-steps", "3", "--steps", "4"),
        ("distill", "--optim", "sgd", "--optim", "adamw_torch"),
        ("distill", "--out", "A", "--out", "B"),
        ("distill", "--resume", "--resume"),
        ("distill", "--tail-bucket", "--no-tail-bucket"),
    ],
)
def test_an_option_given_twice_is_refused(arguments: tuple[str, ...]) -> None:
    assert "is given 2 times, and only the last would count" in one_line(command(*arguments))


def test_options_that_may_be_repeated_are_taken(pair: list[str], tmp_path: Path) -> None:
    roles = ("--special-role", "a=<|begin_of_text|>,<|end_of_text|>")
    other = ("--special-role", "b=<|end_of_text|>,<|begin_of_text|>")
    done = command("project", "build", *pair, "--out", tmp_path / "w", *roles, *other)
    assert done.returncode == 0, done.stderr


def test_numbers_of_twenty_digits_are_refused(pair: list[str], tmp_path: Path) -> None:
    number = "9" * 20
    text = tmp_path / "text"
    text.write_text("text")
    out = ("--out", str(tmp_path / "w"))
    for arguments in (
        ("align", *pair, "--threads", number, str(text)),
        ("project", "build", *pair, *out, "--top-k", number),
        ("project", "build", *pair, *out, "--threads", number),
        ("project", "build", *pair, *out, "--top-k", "9" * 12),
    ):
        assert "out of range" in one_line(command(*arguments))
    many = command("project", "build", *pair, *out, "--top-k", "9" * 9_999)
    assert many.returncode in (1, 2)
    assert b"Traceback" not in many.stderr


def test_bytes_that_are_no_text_are_tokens_and_names(pair: list[str]) -> None:
    shown = command("project", "explain", b"\xff".decode("utf-8", "surrogateescape"), *pair)
    assert shown.returncode == 0, shown.stderr
    assert rb"b'\xff'" in shown.stdout
    assert "does not exist" in one_line(command("vocab", os.fsdecode(b"/tmp/\xff")))


EACH = """
import json, sys
from xtoken.cli import main

for words in json.loads(sys.argv[1]):
    sys.argv = ["xtoken", *words]
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, (words, stop.code)
"""


def test_a_terminal_of_one_column_or_of_ascii_is_printed_on(pair: list[str]) -> None:
    lines = json.dumps([("vocab", pair[1]), ("project", "audit", *pair), ("--help",)])
    for environment in ({"COLUMNS": "1"}, {"PYTHONIOENCODING": "ascii"}, {"COLUMNS": "x"}):
        done = command(lines, code=EACH, **environment)
        assert done.returncode == 0, (environment, done.stderr)


def test_a_wrong_file_in_place_of_a_table_is_one_line(pair: list[str], tmp_path: Path) -> None:
    (tmp_path / "short").write_bytes(b"PK\x03\x04")
    for wrong in (pair[1], str(tmp_path), str(tmp_path / "none"), str(tmp_path / "short")):
        out = ("--out", str(tmp_path / "w"))
        one_line(command("project", "import", wrong, *pair, *out))
        one_line(command("project", "show", wrong))
        one_line(command("project", "export", wrong, *out))


NO_EXTRA = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


@pytest.mark.parametrize("blocked", ["transformers", "torch"])
def test_without_the_extra_one_line_says_what_to_install(
    pair: list[str], models: list[str], tmp_path: Path, blocked: str
) -> None:
    code = NO_EXTRA.format(blocked=(blocked,)) + RUN
    out = ("--out", str(tmp_path / "run"))
    message = one_line_at_the_end(command("distill", *models, *out, "--steps", "1", code=code))
    extra = "torch" if blocked == "torch" else "train"
    assert f'this needs {blocked}, which is not installed; pip install "xtoken[{extra}]"' in message
    assert command("project", "audit", *pair, code=code).returncode == 0
    if blocked == "torch":
        w, table = str(tmp_path / "w"), str(tmp_path / "w.pt")
        assert command("project", "build", *pair, "--out", w, code=code).returncode == 0
        exported = command("project", "export", w, "--out", table, code=code)
        assert 'pip install "xtoken[torch]"' in one_line(exported)


# As where it was never installed: no module, and no version.
NEVER_INSTALLED = """
import importlib.machinery, importlib.metadata

find, read = importlib.machinery.PathFinder.find_spec, importlib.metadata.distribution

def found(name, path=None, target=None):
    return None if name.partition(".")[0] == {missing!r} else find(name, path, target)

def version(name):
    if name == {missing!r}:
        raise importlib.metadata.PackageNotFoundError(name)
    return read(name)

importlib.machinery.PathFinder.find_spec = staticmethod(found)
importlib.metadata.distribution = version
"""


@pytest.mark.parametrize("missing", ["accelerate", "matplotlib"])
def test_a_package_that_a_run_needs_is_missed_before_anything_is_done(
    models: list[str], tmp_path: Path, missing: str
) -> None:
    code = NEVER_INSTALLED.format(missing=missing) + RUN
    out = ("--out", str(tmp_path / "run"))
    command_line = ("distill", *models, *out, "--steps", "1")
    message = one_line_at_the_end(command(*command_line, code=code))
    assert f"needs {missing}, which is not installed; pip install" in message
    assert "bug in xtoken" not in message
    assert not (tmp_path / "run").exists()
    if missing == "matplotlib":
        assert "(--no-curves)" in message
        assert command(*command_line, "--no-curves", code=code).returncode == 0


def one_line_at_the_end(done: Done) -> str:
    """As `one_line`, for a command that may warn or show progress before."""
    errors = done.stderr.decode()
    assert "Traceback" not in errors, errors
    assert done.returncode == 1, errors
    return errors.rstrip("\n").rpartition("\n")[2]


def test_a_diverged_run_ends_in_one_line(models: list[str], tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "run"), "--teacher-cache", str(tmp_path / "cache"))
    done = command("distill", *models, *out, "--steps", "6", "--learning-rate", "1e18")
    message = one_line_at_the_end(done)
    assert message.startswith("error: ")
    assert "diverged" in message


def test_settings_that_need_the_option_beside_them_are_read_after_merging(
    models: list[str], tmp_path: Path
) -> None:
    config = tmp_path / "config.json"
    # Alone it is refused: more columns than are stored.
    config.write_text(json.dumps({"top_k": 600, "steps": 1, "loss": "p-kl"}))
    out = ("--out", str(tmp_path / "run"), "--teacher-cache", str(tmp_path / "cache"))
    run = ("distill", *models, "--config", str(config), *out)
    assert "top_k = 600, expected at most teacher_top_k = 512" in one_line(command(*run))
    assert command(*run, "--top-k", "32").returncode == 0


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"lösung": 1}'.encode("latin-1"), "is not UTF-8 at byte 3"),
        (b"[" * 10**5, "is nested too deeply"),
        (b'{"steps":' + b"[" * 10**5 + b"]" * 10**5 + b"}", "is nested too deeply"),
        (b'{"steps": ' + b"9" * 5000 + b"}", "is not JSON"),
        (b"[]", "is a list, expected an object"),
        (b'{"steps": 1e400}', "steps = inf, expected a whole number"),
        (b'{"steps": "many"}', "steps = 'many', expected a whole number"),
        (b'{"learning_rate": NaN}', "learning_rate = nan, expected more than 0"),
    ],
)
def test_a_settings_file_that_cannot_be_used_is_one_line(
    models: list[str], tmp_path: Path, content: bytes, message: str
) -> None:
    config = tmp_path / "config.json"
    config.write_bytes(content)
    run = ("distill", *models, "--config", str(config), "--out", str(tmp_path / "run"))
    assert message in one_line(command(*run))


def test_interrupts_are_one_line_with_the_shells_exit_code(pair: list[str]) -> None:
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        stops = "import os, xtoken.cli.align as align\n"
        stops += f"align.read_text = lambda file: os.kill(os.getpid(), {int(number)})\n{RUN}"
        one_line(command("align", *pair, code=stops), exit_code=code)


def test_a_disk_that_is_full_is_one_line(pair: list[str], tmp_path: Path) -> None:
    if not Path("/dev/full").is_char_device():
        pytest.skip("this system has no /dev/full")
    message = one_line(command("project", "build", *pair, "--out", "/dev/full"))
    assert "/dev/full cannot be written (No space left on device); free space there" in message


def test_a_place_that_cannot_be_written_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None of what is to be read exists: it is not looked at before.
    (tmp_path / "file").touch()
    folders = [
        ("distill", "--student", "x", "--teacher", "x", "--data", "x.jsonl"),
        ("teach", "--teacher", "x", "--data", "x.jsonl"),
        ("transfer", "--model", "x", "--tokenizer", "x"),
        ("align", "--student", "x", "--teacher", "x", "--batch", "x.jsonl"),
    ]
    files = [
        ("project", "build", "--student", "x", "--teacher", "x"),
        ("project", "export", "x"),
        ("project", "import", "x", "--student", "x", "--teacher", "x"),
        ("eval", "--model", "x", "--data", "x.jsonl"),
        ("report", "pair", "--student", "x", "--teacher", "x"),
    ]
    inside = tmp_path / "file" / "inside"
    for words in folders:
        message = one_line(command(*words, "--out", inside))
        assert f"--out {inside}: {tmp_path / 'file'} is a file, expected a directory" in message
    for words in files:
        message = one_line(command(*words, "--out", tmp_path / "none" / "file"))
        assert f"there is no directory {tmp_path / 'none'}; make it first" in message
        assert f"{tmp_path} is a directory" in one_line(command(*words, "--out", tmp_path))
    monkeypatch.setattr(os, "access", lambda *_: False)
    for check in (check_out, check_out_folder):
        with pytest.raises(OptionError, match=f"nothing may be written to {tmp_path}; pass"):
            check(tmp_path / "new")
    check_out(Path(os.devnull))


def test_a_bug_is_one_line_that_asks_for_a_report(pair: list[str]) -> None:
    code = f"import xtoken.cli.vocab as v; v.describe = lambda *_: 1 / 0\n{RUN}"
    message = one_line(command("vocab", pair[1], code=code))
    assert "ZeroDivisionError: division by zero; this is a bug in xtoken" in message
    traced = command("vocab", pair[1], code=code, XTOKEN_TRACEBACK="1")
    assert b"Traceback" in traced.stderr


WORDS = (
    *("", "-", "--", "x", "0", "-1", "1e400", "nan", "9" * 20, "/", "/dev/null", "\udcff", "\n"),
    *("owner", "a" * 300, "--json", "--student", "--teacher", "--out", "--threads=0", "--ids"),
)


DRAWN = """
import json, sys
from xtoken.cli import main

for line in open(sys.argv[1]).read().splitlines():
    sys.argv = ["xtoken", *json.loads(line)]
    try:
        main()
    except SystemExit:
        pass
"""


def test_drawn_arguments_never_end_in_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Seeded, in one process; XTOKEN_FUZZ=2000 draws more."""
    draws = random.Random(0)
    names = [name.split() for name in all_commands()]
    lines = []
    for _ in range(int(os.environ.get("XTOKEN_FUZZ", "150"))):
        words = [draws.choice(WORDS) for _ in range(draws.randrange(7))]
        lines.append(json.dumps([*draws.choice(names), *words]))
    (tmp_path / "lines").write_text("\n".join(lines))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    done = Forked(DRAWN, tmp_path / "lines", XTOKEN_CACHE="off")
    _, errors = done.communicate(timeout=600)
    assert done.returncode == 0, errors[-2000:]
    assert "Traceback" not in errors
    assert errors.count("─ Error ─") > 50  # so many were told
    bugs = [line for line in errors.splitlines() if "this is a bug" in line]
    assert not bugs, list(itertools.islice(bugs, 5))


def test_the_package_run_by_an_interpreter_is_the_command() -> None:
    def run(*arguments: str) -> Done:
        done = subprocess.run([sys.executable, "-m", "xtoken", *arguments], capture_output=True)
        return Done(done.returncode, done.stdout, done.stderr)

    assert run("--version") == Done(0, f"xtoken {xtoken.__version__}\n".encode(), b"")
    assert one_line(run("project", "show", "no-such-file.safetensors")).startswith("error: ")
