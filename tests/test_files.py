"""Files that are there whole or not at all, locks, JSON, warnings of caches."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from forked import Forked
from no_locks import refuse_locks
from safetensors.numpy import save_file

from xtoken import _files
from xtoken._files import (
    folder_beside,
    parse_json,
    parts_beside,
    read_json,
    temporary_beside,
    to_disk,
    write_text,
    writes,
)
from xtoken._locks import locked
from xtoken.errors import FailedWriteError, FormatError, MissingFileError, NoLockError

SITE = str(Path(_files.__file__).parent.parent)


def test_a_write_that_fails_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "old")

    def fails(file: object) -> None:
        raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        _files.write_atomically(path, fails)
    assert path.read_text() == "old"
    assert [item.name for item in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_file_has_the_mode_of_any_new_file(tmp_path: Path, mask: int, mode: int) -> None:
    before = os.umask(mask)
    try:
        write_text(tmp_path / "file", "text")
        with locked(tmp_path / "lock"):
            pass
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == mode
    assert (tmp_path / "lock").stat().st_mode & 0o777 == mode


def test_bytes_of_a_path_that_are_no_text_can_be_written(tmp_path: Path) -> None:
    write_text(tmp_path / "page", "from st\udcff")
    assert (tmp_path / "page").read_text() == "from st\\udcff"


def test_a_name_of_255_bytes_and_one_of_another_script_can_be_written(tmp_path: Path) -> None:
    for name in ("n" * 255, "模" * 85):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def test_a_device_is_written_and_never_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()))
    reader.start()
    write_text(pipe, "text")
    reader.join()
    assert read == ["text"]
    assert pipe.is_fifo()


def test_through_a_link_the_file_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_text(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_text() == "text"


def test_a_full_disk_is_an_os_error_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_text(tmp_path / "file", "text")
    assert not list(tmp_path.iterdir())


def test_parts_of_a_folder_are_replaced_together_or_not_at_all(tmp_path: Path) -> None:
    names = ["part", "file", "gone"]

    def fill(folder: Path, text: str) -> None:
        (folder / "part").mkdir()
        (folder / "part" / "file").write_text(text)
        (folder / "file").write_text(text)

    def replace(text: str, more: str) -> None:
        with parts_beside(tmp_path, names) as made:
            fill(made, text)
            if more:
                (made / more).mkdir()

    fill(tmp_path, "old")
    (tmp_path / "gone").write_text("old")
    (tmp_path / "xyz").write_text("kept")
    # The first before any part has its place, the second after all have theirs.
    for more in ("file", "xyz"):
        with pytest.raises(FailedWriteError, match=f"^{tmp_path} cannot be written"):
            replace("new", more)
        assert {path.name for path in tmp_path.iterdir()} == {"xyz", *names}
        assert {(tmp_path / name).read_text() for name in ("part/file", "file", "gone")} == {"old"}
    replace("new", "")
    assert {path.name for path in tmp_path.iterdir()} == {"part", "file", "xyz"}
    assert {(tmp_path / name).read_text() for name in ("part/file", "file")} == {"new"}


def test_a_full_disk_elsewhere_is_told_by_the_file_that_did_not_fit(tmp_path: Path) -> None:
    out, elsewhere = tmp_path / "out", tmp_path / "temporary" / "file"
    with pytest.raises(FailedWriteError, match=f"^{elsewhere} cannot be written") as told:
        with writes(out, ", and pass --resume"):
            raise OSError(errno.ENOSPC, "No space left on device", str(elsewhere))
    assert str(told.value).endswith(", and pass --resume")
    with pytest.raises(FailedWriteError, match=f"^{out} cannot be written"), writes(out):
        raise OSError(errno.ENOSPC, "No space left on device")


# As on a full disk: no file grows beyond 3 kB, and the write says so.
LIMITED = """
import resource, signal, sys
from pathlib import Path
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from xtoken._files import folder_beside, temporary_beside, writes, write_text
from xtoken.errors import FailedWriteError

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
tensor = torch.zeros(4000)
words = Tokenizer(WordLevel({str(number): number for number in range(4000)}, "0"))
writers = {
    "bytes": lambda path: path.write_bytes(b"x" * 4000),
    "torch": lambda path: torch.save(tensor, path),
    "safetensors": lambda path: save_file({"tensor": tensor}, path),
    "tokenizers": lambda path: words.save(str(path)),
}
said = []
for name, write in writers.items():
    try:
        with folder_beside(Path(sys.argv[1]) / name) as folder:
            (folder / "first").touch()
            write(folder / "file")
    except FailedWriteError as error:
        said.append(f"{name} {error}")
    try:
        with temporary_beside(Path(sys.argv[1]) / name) as path:
            write(path)
    except FailedWriteError as error:
        said.append(f"{name} {error}")
try:
    with folder_beside(Path(sys.argv[1]) / "texts") as folder:
        write_text(folder / "file", "x" * 4000)
except FailedWriteError as error:
    said.append(f"texts {error}")
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # what it says is kept in a file
print("\\n".join(said))
"""


def test_a_write_that_fails_is_one_line_with_path_and_remedy_whichever_library_wrote(
    tmp_path: Path,
) -> None:
    done = Forked(LIMITED, tmp_path)
    output, errors = done.communicate()
    assert done.returncode == 0, errors
    lines = output.splitlines()
    names = ["bytes", "torch", "safetensors", "tokenizers"]
    assert [line.split()[0] for line in lines] == [*sorted(names * 2, key=names.index), "texts"]
    for line in lines:
        name, rest = line.split(maxsplit=1)
        end = "/file" if name == "texts" else ""
        assert rest.startswith(f"{tmp_path / name}{end} cannot be written ("), line
        assert "free space" in rest or "raise the limit" in rest, line
        assert "xtoken-tmp" not in rest, line
    assert not list(tmp_path.iterdir())


def test_where_it_may_not_be_written_the_remedy_is_another(tmp_path: Path) -> None:
    with pytest.raises(FailedWriteError, match=r"none.file cannot .*; make the folder first$"):
        write_text(tmp_path / "none" / "file", "text")
    (tmp_path / "file").touch()
    with pytest.raises(FailedWriteError, match=r"Not a directory\); pass another path, and so on$"):
        with writes(tmp_path / "file" / "inside", ", and so on"):
            write_text(tmp_path / "file" / "inside", "text")


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file or directory", "another"),
        ConnectionRefusedError(111, "Connection refused"),
        BrokenPipeError(32, "Broken pipe"),
        OSError("a library's own words"),
        Exception("No such file or directory (os error 2)"),
        ValueError("no write"),
        FormatError("no write"),
    ],
)
def test_what_is_no_failed_write_of_this_file_passes(tmp_path: Path, error: Exception) -> None:
    with pytest.raises(type(error)) as raised, writes(tmp_path / "file"):
        raise error
    assert raised.value is error


def test_files_are_flushed_through_a_handle_that_may_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("text")
    modes: list[int] = []
    monkeypatch.setattr(
        os, "fsync", lambda handle: modes.append(fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE)
    )
    to_disk(tmp_path / "file")
    assert modes == [os.O_RDWR]


def test_two_processes_hold_a_lock_one_after_the_other(tmp_path: Path) -> None:
    code = (
        "import sys, time; from xtoken._locks import locked\n"
        "with locked(sys.argv[1]):\n"
        "    print('held', flush=True); sys.stdin.readline()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "lock")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": SITE},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    with pytest.raises(TimeoutError), locked(tmp_path / "lock", timeout=0.1):
        pass
    process.communicate("\n")
    with locked(tmp_path / "lock", timeout=10):
        pass


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
@pytest.mark.parametrize("mask", [0o022, 0o002])
def test_a_file_system_without_locks_is_told_and_never_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, mask: int
) -> None:
    """As Lustre mounted without flock, and NFS without a lock server, answer flock(2)."""

    refuse_locks(monkeypatch, number)
    before = os.umask(mask)
    try:
        for _ in range(2):  # the second finds the first one's file
            with pytest.raises(NoLockError, match=r"lock cannot be locked .* another file") as told:
                with locked(tmp_path / "lock", timeout=0):
                    pass
            assert os.strerror(number) in str(told.value)
            assert "\n" not in str(told.value)
            with locked(tmp_path / "lock", needed=False), locked(tmp_path / "lock", needed=False):
                pass
    finally:
        os.umask(before)
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


def test_an_error_of_the_work_is_none_of_its_lock(tmp_path: Path) -> None:
    for error in (TimeoutError(110, "Connection timed out"), OSError(37, "No locks available")):
        for needed in (True, False):
            with pytest.raises(OSError, match=r"timed out|No locks") as raised:
                with locked(tmp_path / "lock", timeout=0, needed=needed):
                    raise error
            assert raised.value is error


def test_a_folder_appears_whole_in_place_of_what_was_there(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with folder_beside(tmp_path / "model") as folder:
            (folder / "parts").mkdir()
            (folder / "parts" / content).write_text(content)
    with pytest.raises(FailedWriteError), folder_beside(tmp_path / "model") as folder:
        folder.write_text("a folder is none")
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "parts", "new"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_what_a_library_made_for_its_owner_alone_is_as_open_as_any_new_file(
    tmp_path: Path, mask: int
) -> None:
    (tmp_path / "elsewhere").touch(mode=0o600)
    before = os.umask(mask)
    try:
        with folder_beside(tmp_path / "model") as folder:
            with tempfile.TemporaryDirectory() as scratch:
                Path(scratch, "parts").mkdir(0o700)
                shutil.copytree(scratch, folder, dirs_exist_ok=True)
            save_file({"tensor": np.zeros(3)}, folder / "parts" / "file")
            (folder / "parts" / "file").chmod(0o600)  # as its newer versions make it
            (folder / "link").symlink_to(tmp_path / "elsewhere")
            (folder / "program").touch(0o700)
        with temporary_beside(tmp_path / "file") as path:
            path.unlink()
            path.touch(mode=0o600)
    finally:
        os.umask(before)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path, *tmp_path.rglob("*"))}
    assert modes["model"] == modes["parts"] == 0o777 & ~mask
    assert modes["file"] == (tmp_path / "model/parts/file").stat().st_mode & 0o777 == 0o666 & ~mask
    assert modes["program"] == 0o666 & ~mask | 0o100
    assert modes["elsewhere"] == 0o600


def test_a_folder_that_cannot_be_replaced_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = Path.rename

    def refuse_new(path: Path, target: Path) -> Path:
        if (path / "new").exists():
            raise PermissionError(f"{target} cannot be written")
        return rename(path, target)

    with folder_beside(tmp_path / "model") as folder:
        (folder / "old").touch()
    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(PermissionError), folder_beside(tmp_path / "model") as folder:
        (folder / "new").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "old"]


def test_a_folder_of_a_writer_that_was_killed_is_removed_with_all_in_it(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from xtoken._files import folder_beside\n"
        "with folder_beside(sys.argv[1]) as folder:\n"
        "    (folder / '.tmp12').write_text('half'); os.kill(os.getpid(), 9)"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "model")]
    done = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": SITE}, check=False)
    assert done.returncode == -9
    (left,) = tmp_path.iterdir()
    assert (left / ".tmp12").exists()
    with folder_beside(tmp_path / "model") as folder:
        (folder / "whole").touch()
    assert [path.name for path in tmp_path.rglob("*")] == ["model", "whole"]


@pytest.mark.parametrize("killed_at", [1, 2, 3])
def test_a_writer_killed_between_its_renames_leaves_the_old_folder_or_the_new(
    tmp_path: Path, killed_at: int
) -> None:
    """Before the first rename, between the two, and before the old one is removed."""
    with folder_beside(tmp_path / "model") as folder:
        (folder / "old").touch()
    code = (
        "import os, pathlib, shutil, sys; from xtoken._files import folder_beside\n"
        "calls = []\n"
        "def counted(real):\n"
        "    def call(*arguments, **options):\n"
        "        calls.append(real)\n"
        "        os.kill(os.getpid(), 9) if len(calls) == int(sys.argv[2]) else None\n"
        "        return real(*arguments, **options)\n"
        "    return call\n"
        "with folder_beside(sys.argv[1]) as folder:\n"
        "    (folder / 'new').touch()\n"
        "    pathlib.Path.rename = counted(pathlib.Path.rename)\n"
        "    shutil.rmtree = counted(shutil.rmtree)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "model"), str(killed_at)]
    done = subprocess.run(arguments, env={**os.environ, "PYTHONPATH": SITE}, check=False)
    assert done.returncode == -9
    write_text(tmp_path / "another", "")
    (tmp_path / "another").unlink()
    found = ["model", "old"] if killed_at < 3 else ["model", "new"]
    assert [path.name for path in tmp_path.rglob("*")] == found


def test_unfinished_files_of_the_living_stay(tmp_path: Path) -> None:
    with temporary_beside(tmp_path / "one") as first:
        with temporary_beside(tmp_path / "two"):
            pass
        assert first.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "two"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff{}", "is not UTF-8 at byte 0"),
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b"[" * 10**5, "is nested too deeply"),
        (b"1" * 5000, "is not JSON"),
    ],
)
def test_json_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(FormatError, match=f"settings .*file {message}") as refused:
        read_json(tmp_path / "file", "settings")
    assert "\n" not in str(refused.value)
    with pytest.raises(MissingFileError, match="settings none does not exist"):
        read_json("none", "settings")


def test_a_byte_order_mark_is_passed_over() -> None:
    assert parse_json(b"\xef\xbb\xbf[1]") == [1]
