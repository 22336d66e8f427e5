"""`python -m demo [OPTIONS of xtoken distill]`: prepare teacher, student and text, then distil."""

from __future__ import annotations

import sys
from pathlib import Path

from demo.corpus import build_corpus, sample, write_jsonl
from demo.student import prepare_student
from demo.teacher import prepare_teacher

SEED = 0
TRAIN_PASSAGES, HELD_OUT_PASSAGES, NUMBER_SHARE = 210, 60, 0.4
OPTIONS = ("--steps", "160", "--eval-every", "40", "--seed", str(SEED), "--overwrite")


def main() -> None:
    """Prepare everything below `runs/demo` and hand over to the command `xtoken distill`."""
    from xtoken.cli import main as xtoken

    folder = Path("runs/demo")
    folder.mkdir(parents=True, exist_ok=True)
    corpus = build_corpus(seed=SEED)
    teacher = prepare_teacher(folder / "teacher")
    student = prepare_student(
        folder / "student", [document.text for document in corpus.train], seed=SEED
    )
    train, held_out = folder / "train.jsonl", folder / "held_out.jsonl"
    write_jsonl(sample(corpus.train, TRAIN_PASSAGES, NUMBER_SHARE, SEED), train)
    write_jsonl(sample(corpus.held_out, HELD_OUT_PASSAGES, NUMBER_SHARE, SEED), held_out)
    sys.argv = [
        *("xtoken", "distill", "--student", str(student), "--teacher", str(teacher)),
        *("--data", str(train), "--held-out", str(held_out), "--out", str(folder / "run")),
        *("--teacher-cache", str(folder / "teacher-top-k"), *OPTIONS, *sys.argv[1:]),
    ]
    print("$", " ".join(sys.argv))
    xtoken()


if __name__ == "__main__":
    main()
