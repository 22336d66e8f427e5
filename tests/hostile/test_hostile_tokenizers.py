"""Whatever a tokenizer's file says, it is read, or refused in one line, within bounds."""

from __future__ import annotations

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tokenizer_zoo as zoo
from drawing import SEED, count

import xtoken

HERE = Path(__file__).parent
# Bounds of one draw; the largest that were measured are 1.5 s and 300 MB.
SECONDS, MEGABYTES = 20, 1500


@pytest.fixture(name="folder", scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    zoo.byte_level_bpe(500, 3).save(str(folder / "byte_level.json"))
    zoo.sentencepiece_bpe(700).save(str(folder / "sentencepiece.json"))
    zoo.unigram(500, False).save(str(folder / "unigram.json"))
    zoo.wordpiece(500).save(str(folder / "wordpiece.json"))
    return folder


@pytest.mark.parametrize(
    ("kind", "fast", "deep"),
    [("json", 250, 20_000), ("object", 80, 5000), ("state", 300, 30_000), ("ranks", 150, 10_000)],
)
def test_mutants_are_read_or_refused_within_bounds(
    folder: Path, kind: str, fast: int, deep: int
) -> None:
    number = count(fast, deep)
    process = subprocess.run(
        [
            sys.executable,
            str(HERE / "read_mutants.py"),
            kind,
            str(folder),
            str(SEED),
            str(number),
            "0",
        ],
        capture_output=True,
        text=True,
        timeout=600 if number == fast else 6 * 3600,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(Path(xtoken.__file__).parent.parent), str(HERE)]),
        },
    )
    # An older tokenizers prints words of its own among them.
    lines = [
        line for line in process.stdout.splitlines() if not line.startswith("The OrderedVocab")
    ]
    answers = [json.loads(line) for line in lines]
    last = f"the draw is {folder / 'last'}; {len(answers)} were good before"
    assert process.returncode == 0, f"{process.stderr[-2000:]}\n{last}"
    counts = collections.Counter(answer[1] for answer in answers)
    assert set(counts) <= {"read", "refused"}, counts
    slow = [answer for answer in answers if answer[2] > SECONDS]
    assert not slow
    assert answers[-1][3] < MEGABYTES
    # The draws are neither all harmless nor all hopeless.
    assert min(counts["read"], counts["refused"]) > len(answers) // 20, counts
    print(kind, counts, max(answer[2] for answer in answers), "s", answers[-1][3], "MB")
