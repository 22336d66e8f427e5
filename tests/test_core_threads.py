"""The thread engine of the core as Python sees it: bounded, shared, and stopped by Ctrl-C."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from xtoken import OptionError, Vocab, _core

VOCAB = Vocab.from_tokens([bytes([byte]) for byte in range(256)] + [b"ab", b"ba"], ranked=True)

# Unrelated texts over four letters are the slowest to align: 0.3 s per sequence, 20 s in all.
SLOW_CALL = """
import sys
import numpy as np
from xtoken import Vocab, _core

vocab = Vocab.from_tokens([bytes([byte]) for byte in range(256)])
aligner = _core.Aligner(vocab, vocab)
letters = np.random.default_rng(0)
student, teacher = letters.integers(97, 101, (2, 200_000))
starts, ends = np.zeros(70, np.int64), np.full(70, 200_000)
print("ready", flush=True)
try:
    aligner.align_flat(student, starts, ends, teacher, starts, ends, int(sys.argv[1]))
except KeyboardInterrupt:
    print("interrupted", flush=True)
else:
    print("finished", flush=True)
aligner.align(student[:100], student[:100])
"""


def run(code: str, *arguments: str) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(sys.platform == "win32", reason="sends SIGINT")
@pytest.mark.parametrize("threads", ["1", "2", "0"])
def test_ctrl_c_ends_a_long_call_soon_and_the_aligner_still_works(threads: str) -> None:
    with run(SLOW_CALL, threads) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        sent = time.monotonic()
        assert process.stdout.readline() == "interrupted\n"
        # One sequence is finished, at worst on a busy machine.
        assert time.monotonic() - sent < 8
        assert process.wait() == 0


MANY_COUNTS = """
import os
import numpy as np
from xtoken import Vocab, _core

vocab = Vocab.from_tokens([bytes([byte]) for byte in range(256)])
aligner = _core.Aligner(vocab, vocab)
ids = np.full(1 << 18, 97)
starts = np.arange(0, len(ids), 1 << 12)
before = len(os.listdir("/proc/self/task"))
for threads in range(2, 66):
    aligner.align_flat(ids, starts, starts + (1 << 12), ids, starts, starts + (1 << 12), threads)
print(len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="counts threads in /proc")
def test_asking_for_many_thread_counts_leaves_no_more_threads_than_cores() -> None:
    with run(MANY_COUNTS) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) <= (os.cpu_count() or 1)


def align(threads: int) -> object:
    ids, ends = np.zeros(1, np.int64), np.ones(1, np.int64)
    aligner = _core.Aligner(VOCAB, VOCAB)
    return aligner.align_flat(ids, ids, ends, ids, ids, ends, threads)


def project(threads: int) -> object:
    return _core.build_projection(
        VOCAB,
        VOCAB,
        top_k=4,
        decay=0.1,
        max_pieces=4,
        canonical=set(),
        reverse="off",
        special_pairs=[],
        ignored_roles=[],
        name_similarity=0.6,
        threads=threads,
    )


def build_trie(threads: int) -> object:
    return _core.PieceTrie.build(VOCAB, VOCAB, "teacher", threads)


def look_up(threads: int) -> object:
    ids, ends = np.zeros(1, np.int64), np.ones(1, np.int64)
    trie = _core.PieceTrie.build(VOCAB, VOCAB, "teacher", 1)
    return trie.lookup(ids, ids, ends, 4, "teacher", threads)


@pytest.mark.parametrize("call", [align, project, build_trie, look_up])
def test_more_than_1024_threads_are_refused_by_every_call(call: Callable[[int], object]) -> None:
    with pytest.raises(OptionError, match="threads = 1025 is out of range; expected at most 1024"):
        call(1025)
    call(1024)


@pytest.mark.parametrize("piece_count", [2**62, 2**40, 2**26 + 1])
def test_a_trie_over_an_impossible_vocabulary_is_refused(piece_count: int) -> None:
    indptr, ids = np.array([0, 1]), np.array([0])
    with pytest.raises(OptionError, match=f"piece_count = {piece_count} is out of range"):
        _core.PieceTrie.from_pieces(indptr, ids, piece_count)
