"""Runs that end at any moment: killed, on a full disk, two in one folder."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from drawing import count, generator
from forked import CONTEXT, Forked, start_server
from run_once import CONFIG, serve
from tiny_models import tiny_texts, write_jsonl, write_pair
from tokenizer_zoo import byte_level_bpe


class Server:
    """A process that forks a run when told to; see `run_once`."""

    def __init__(self, folder: Path, kind: str = "plain") -> None:
        self.folder = folder
        self._questions, theirs = CONTEXT.Pipe()
        self._process = CONTEXT.Process(target=serve, args=(folder, kind, theirs))
        start_server()
        self._process.start()
        theirs.close()
        assert self._questions.recv() == "ready"

    def ask(self, question: str, given: object) -> int:
        self._questions.send((question, given))
        return int(self._questions.recv())

    def end(self) -> None:
        self._questions.close()
        self._process.join()

    def start(self, out: Path, command: str = "run") -> int:
        out.parent.mkdir(exist_ok=True)
        errors = self.folder / "errors"
        return self.ask("start", (str(out), command, str(errors)))

    def wait(self, pid: int) -> tuple[int, str]:
        code = self.ask("wait", pid)
        return code, (self.folder / "errors").read_text()

    def finish(self, out: Path, command: str = "run") -> tuple[int, str]:
        return self.wait(self.start(out, command))


def unfinished(folder: Path) -> list[str]:
    """Temporary files, ours and those of the libraries."""
    names = [path.name for path in folder.rglob("*")]
    return [name for name in names if name.endswith("-tmp") or name.startswith((".tmp", "tmp"))]


@pytest.fixture(name="server", scope="module")
def _server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("models")
    write_pair(folder)
    write_jsonl(folder / "data.jsonl", tiny_texts(12))
    server = Server(folder)
    yield server
    server.end()


@pytest.fixture(name="whole", scope="module")
def _whole(server: Server, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A run that nothing ended, and the seconds that it took once it was ready."""
    out = tmp_path_factory.mktemp("whole") / "run"
    begun = time.monotonic()
    code, errors = server.finish(out)
    assert code == 0, errors
    return out, time.monotonic() - begun


def assert_same_run(found: Path, expected: Path) -> None:
    for name in ("student/model.safetensors", "metrics.jsonl", "config.json"):
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def test_a_run_killed_at_any_moment_resumes_to_the_same_student(
    server: Server, whole: tuple[Path, float], tmp_path: Path
) -> None:
    expected, seconds = whole
    rng = generator("kill")
    for number in range(count(3, 20)):
        out = tmp_path / f"run-{number}"
        sittings = 0
        # Killed once, or again while it resumes; spread over the run, its store and its end.
        for part in rng.sample([0.02, 0.1, 0.3, 0.5, 0.7, 0.85, 0.95, 1.0], rng.choice((1, 1, 2))):
            moment = seconds * part * rng.uniform(0.8, 1.1)
            code, errors = server.finish(out, f"kill={moment:.3f}")
            assert code in (-9, 0), errors  # 0: it was done before
            sittings += 1
        code, errors = server.finish(out)
        assert code == 0, f"after {sittings} kills: {errors}"
        assert_same_run(out, expected)
        assert not unfinished(tmp_path), unfinished(tmp_path)
        shutil.rmtree(out)


def test_a_packed_run_with_two_teachers_killed_at_any_moment_resumes_to_the_same_weights(
    tmp_path: Path,
) -> None:
    pytest.importorskip("trl")
    models = tmp_path / "models"
    models.mkdir()
    write_pair(models)
    write_jsonl(models / "data.jsonl", tiny_texts(12))
    server = Server(models, "packed")
    try:
        whole = tmp_path / "whole" / "run"
        begun = time.monotonic()
        code, errors = server.finish(whole)
        assert code == 0, errors
        seconds = time.monotonic() - begun
        rng = generator("kill packed")
        for number in range(count(2, 20)):
            out = tmp_path / f"{number}" / "run"
            moment = seconds * rng.uniform(0.02, 1.0)
            code, errors = server.finish(out, f"kill={moment:.3f}")
            assert code in (-9, 0), errors  # 0: it was done before
            code, errors = server.finish(out)
            assert code == 0, f"killed after {moment:.3f} of {seconds:.3f} s: {errors}"
            assert weights(out) == weights(whole), f"killed after {moment:.3f} s"
            assert not unfinished(out.parent / "run-store")
            shutil.rmtree(out.parent)
    finally:
        server.end()


def weights(out: Path) -> bytes:
    return (out / "student" / "model.safetensors").read_bytes()


def test_of_two_runs_in_one_folder_the_second_is_refused_and_the_first_unharmed(
    server: Server, whole: tuple[Path, float], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    first = server.start(out)
    while not (out / "run.json").is_file():
        time.sleep(0.01)
    os.kill(first, signal.SIGSTOP)
    try:
        code, errors = server.finish(out)
    finally:
        os.kill(first, signal.SIGCONT)
    assert code == 1
    assert "another run writes into" in errors
    assert errors.count("\n") == 1
    code, errors = server.wait(first)
    assert code == 0, errors
    assert_same_run(out, whole[0])


def test_a_full_disk_is_one_line_and_the_run_resumes(
    server: Server, whole: tuple[Path, float], tmp_path: Path
) -> None:
    expected, _ = whole
    sizes = [path.stat().st_size for path in expected.rglob("*") if path.is_file()]
    rng = random.Random(0)
    # In a checkpoint's largest file, in the student's, in a small one; in the store.
    limits = [max(sizes) // 2, max(sizes) - 1, *rng.sample(sorted(set(sizes))[2:-2], count(1, 8))]
    out = tmp_path / "run"
    for limit in limits:
        code, errors = server.finish(out, f"limit={limit}")
        if code != 0:
            assert errors.count("\n") == 1, errors
            assert "error: " in errors
            assert " cannot be written (" in errors
            assert "Traceback" not in errors
    code, errors = server.finish(out)
    assert code == 0, errors
    assert_same_run(out, expected)
    assert not unfinished(tmp_path)
    steps = [line for line in (out / "metrics.jsonl").read_text().splitlines() if '"ce"' in line]
    assert len(steps) == CONFIG.steps


FULL_CACHE = """
import resource, signal, sys, warnings
from xtoken import Projection
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
_, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), hard))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    w = Projection.build(*sys.argv[3:], cache_dir=sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # what it says is kept in a file
print(len(w.indices), [warning.category.__name__ for warning in caught])
"""


def test_a_full_disk_under_the_cache_costs_the_cache_alone(tmp_path: Path) -> None:
    said, pair = [], (tmp_path / "student.json", tmp_path / "teacher.json")
    for path, tokenizer in zip(pair, (byte_level_bpe(500), byte_level_bpe(400, 1)), strict=True):
        tokenizer.save(str(path))
    for limit in (0, 5000, 10**7):
        done = Forked(FULL_CACHE, tmp_path / "cache", limit, *pair)
        output, errors = done.communicate()
        assert done.returncode == 0, errors
        said.append(output.split(maxsplit=1))
        assert not unfinished(tmp_path)
    assert len({entries for entries, _ in said}) == 1
    assert [warned.strip() for _, warned in said] == ["['UnavailableCacheWarning']"] * 2 + ["[]"]
