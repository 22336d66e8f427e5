"""`xtoken teach` repeated, on odd folders and odd corpora: what is kept, counted and told."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from forked import Forked
from no_locks import refuse_locks
from tiny_models import tiny_texts, write_jsonl, write_pair
from typer.testing import CliRunner

from xtoken.cli import app, teach_stream
from xtoken.errors import DataError, NoLockError, OptionError
from xtoken.teachers import TopKStore
from xtoken.teachers.store_notes import NOTES_FILE, StoreNotes
from xtoken.teachers.teach import filling


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("again")
    write_pair(folder)
    write_jsonl(folder / "data.jsonl", tiny_texts(12))
    return folder


def arguments(workspace: Path, out: Path, *flags: str, **options: Any) -> list[str]:
    given = {
        "teacher": workspace / "teacher",
        "data": workspace / "data.jsonl",
        "out": out,
        "top-k": 16,
        "device": "cpu",
    } | options
    return ["teach", *flags, *(str(part) for k, v in given.items() for part in (f"--{k}", v))]


def teach(workspace: Path, out: Path, *flags: str, **options: Any) -> str:
    result = CliRunner().invoke(app, arguments(workspace, out, *flags, **options))
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


@pytest.fixture(scope="module")
def store(workspace: Path) -> Path:
    teach(workspace, workspace / "store")
    return workspace / "store"


def notes(folder: Path) -> StoreNotes:
    found = TopKStore.open(folder).notes
    assert found is not None
    return found


FULL = """
import resource, sys
from xtoken.cli import main
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
main()
"""


@pytest.mark.parametrize("flags", [(), ("--streaming",)])
def test_a_complete_store_stays_complete_where_a_run_finds_nothing_to_do_and_fails(
    workspace: Path, store: Path, tmp_path: Path, flags: tuple[str, ...]
) -> None:
    out = tmp_path / "store"
    shutil.copytree(store, out)
    place = (out / "tokenizer").stat().st_ino
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    failed = Forked(FULL, 100, *arguments(workspace, out, *flags))
    _, errors = failed.communicate()
    assert failed.returncode == 1
    assert "cannot be written (File too large)" in " ".join(errors.split())
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # A whole run writes no tokenizer anew.
    teach(workspace, out, *flags)
    assert (out / "tokenizer").stat().st_ino == place
    assert notes(out).complete
    (out / "tokenizer" / "tokenizer_config.json").unlink()
    teach(workspace, out, *flags)
    assert (out / "tokenizer" / "tokenizer_config.json").is_file()
    # With more to compute it is not complete until that is done.
    (out / NOTES_FILE).write_bytes(before[out / NOTES_FILE])
    more = write_jsonl(tmp_path / "more.jsonl", [text[5:] for text in tiny_texts(12)])
    failed = Forked(DIES, *arguments(workspace, out, *flags, data=more))
    failed.communicate()
    assert failed.returncode == 9
    assert not notes(out).complete


DIES = """
import os
from xtoken.cli import main
from xtoken.teachers import TopKStore
TopKStore.add = lambda *_: os._exit(9)
main()
"""


@pytest.mark.parametrize("name", ["st[v2]", "st[/v2]", "a store"])
def test_a_folder_is_named_as_it_is_spelled(workspace: Path, tmp_path: Path, name: str) -> None:
    data = tmp_path / "texts[en].jsonl"
    shutil.copy(workspace / "data.jsonl", data)
    out = tmp_path / name
    output = teach(workspace, out, data=data).replace(" ", "")
    assert f"textsin{out}".replace(" ", "") in output
    assert f"--teacher-store'{out}'--student".replace(" ", "") in output
    assert "[en].jsonl" in output
    output = teach(workspace, tmp_path / "[/x]", "--dry-run", data=data)
    assert f"nothing was written to {tmp_path / '[/x]'}" in output


def test_texts_are_counted_once_and_all_that_lie_there(workspace: Path, tmp_path: Path) -> None:
    rows = [f"The same text again, number {index % 2}." for index in range(1200)]
    data = write_jsonl(tmp_path / "data.jsonl", rows)
    assert len(rows) > 2 * teach_stream.ROWS_AT_ONCE
    out = tmp_path / "store"
    assert "2 texts in" in teach(workspace, out, "--streaming", data=data)
    assert notes(out).sequences == 2
    tokens = notes(out).tokens
    teach(workspace, tmp_path / "other", data=data)
    assert notes(tmp_path / "other").tokens == tokens
    output = teach(workspace, out).replace("12.", "")
    assert "14 texts in" in output
    assert "with the 12 of this data" in output


def test_a_stream_may_begin_with_rows_that_are_blank(workspace: Path, tmp_path: Path) -> None:
    blank = [""] * (teach_stream.ROWS_AT_ONCE + 5)
    data = write_jsonl(tmp_path / "late.jsonl", [*blank, *tiny_texts(4)])
    output = teach(workspace, tmp_path / "store", "--streaming", data=data)
    assert "4 texts in" in output
    assert notes(tmp_path / "store").complete
    data = write_jsonl(tmp_path / "never.jsonl", blank)
    words = rf"none of the {len(blank)} rows has a token to predict \(.*never.jsonl"
    with pytest.raises(DataError, match=words):
        teach(workspace, tmp_path / "none", "--streaming", data=data)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"api": "nonsense"}, "--api nonsense is for a served teacher; pass --url too, or"),
        ({"model": "foo"}, "--model foo is for a served teacher; pass --url too, or leave it"),
        ({"concurrency": 0}, "--concurrency 0 is for a served teacher; pass --url too, or"),
        ({"timeout": 5}, "--timeout 5 is for a served teacher; pass --url too, or"),
        ({"url": "http://x", "concurrency": 0}, "concurrency = 0, expected at least 1"),
        ({"url": "http://x", "api": "nonsense"}, "api = 'nonsense', expected auto or one of"),
    ],
)
def test_options_of_a_server_are_not_ignored(
    workspace: Path, tmp_path: Path, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(OptionError, match=words):
        teach(workspace, tmp_path / "store", **options)
    assert not (tmp_path / "store" / NOTES_FILE).exists()


def test_the_defaults_that_older_notes_name_are_taken(workspace: Path, tmp_path: Path) -> None:
    teach(workspace, tmp_path / "store", api="auto", concurrency=8)
    assert notes(tmp_path / "store").complete


@pytest.mark.parametrize(("mask", "folder", "file"), [(0o022, 0o755, 0o644), (0o027, 0o750, 0o640)])
def test_all_of_a_store_is_as_open_to_others_as_what_they_make(
    workspace: Path, tmp_path: Path, mask: int, folder: int, file: int
) -> None:
    before = os.umask(mask)
    try:
        teach(workspace, tmp_path / "store")
    finally:
        os.umask(before)
    modes = {path.relative_to(tmp_path): path.stat().st_mode & 0o777
             for path in tmp_path.rglob("*")}  # fmt: skip
    assert Path("store/tokenizer/tokenizer.json") in modes
    for path, mode in modes.items():
        assert mode == (folder if (tmp_path / path).is_dir() else file), path


def test_a_folder_on_a_file_system_without_locks_is_refused_in_one_line(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_locks(monkeypatch, errno.ENOSYS)
    out = tmp_path / "store"
    given = ["--data", "nowhere", "--teacher", "nowhere", "--out", str(out)]
    for command in (["teach"], ["distill", "--student", "nowhere"]):  # before they read
        result = CliRunner().invoke(app, [*command, *given])
        assert isinstance(result.exception, NoLockError)
        assert f"{tmp_path} cannot be locked (Function not implemented)" in str(result.exception)
    assert not list(tmp_path.iterdir())
    for _ in range(2):  # the second finds the first one's file
        with pytest.raises(NoLockError, match=r"store/.teach.lock cannot .* another file system"):
            with filling(out):
                pass


def test_what_fails_while_a_store_is_filled_is_told_as_it_is(tmp_path: Path) -> None:
    error = TimeoutError(errno.ETIMEDOUT, "Connection timed out")
    with pytest.raises(TimeoutError) as raised, filling(tmp_path):
        raise error
    assert raised.value is error
    with filling(tmp_path):  # free again
        pass
