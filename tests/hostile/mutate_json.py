"""Structure-aware damage to a tokenizer's JSON: what a careless or a hostile program writes."""

from __future__ import annotations

import copy
import json
import random

SCALARS: tuple[object, ...] = (
    *(None, True, False, 0, -1, 1, 2**20, 2**31 - 1, 2**31, 2**32, 2**63, 2**64, -(2**63), 10**40),
    *(0.5, -0.0, 1e308, float("nan"), float("inf")),
    *(
        "",
        " ",
        "\0",
        "a",
        "▁",
        "Ġ",
        "<0x41>",
        "<0xZZ>",
        "##",
        "\ud800",
        "é",
        "e\u0301",
        "\U0010ffff",
    ),
    *("ByteLevel", "BPE", "Unigram", "WordPiece", "Sequence", "Metaspace", "x" * 70_000),
    *([], {}, [[]], [None], [["a", "b"]], [["a", 1e400]], {"": 0}, {"type": "BPE"}),
)


class Pairs(list):
    """An object as its pairs, so that a key may stand there twice."""


class Raw(str):
    """JSON as text: what is nested too deeply for Python to build."""

    def __deepcopy__(self, memo: object) -> Raw:
        return self


def dumps(value: object) -> str:
    """JSON, lone surrogates escaped, keys as often as they are there."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(k)}:{dumps(v)}" for k, v in value) + "}"
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(k)}:{dumps(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(dumps, value)) + "]"
    return json.dumps(value)


def _places(document: object) -> list[tuple[object, object]]:
    """Every container with each of its keys, those of the large tables seldom."""
    found: list[tuple[object, object]] = []
    pending = [document]
    while pending:
        node = pending.pop()
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))  # type: ignore[call-overload]
        for key in keys if len(keys) < 64 else keys[:8] + keys[-8:]:
            found.append((node, key))
            child = node[key]  # type: ignore[index]
            if isinstance(child, dict | list) and child and not isinstance(child, Pairs):
                pending.append(child)
    return found


def _change(document: dict, rng: random.Random) -> None:
    places = _places(document)
    if not places:
        return
    node, key = rng.choice(places)
    kind = rng.randrange(10)
    if kind == 0:
        del node[key]  # type: ignore[attr-defined]
    elif kind in (1, 2, 3):
        node[key] = copy.deepcopy(rng.choice(SCALARS))  # type: ignore[index]
    elif kind == 4:
        other, place = rng.choice(places)
        node[key] = copy.deepcopy(other[place])  # type: ignore[index]
    elif kind == 5 and isinstance(node, dict):
        node[rng.choice(("", "type", "vocab", "merges", "\ud800", "x" * 70_000))] = rng.choice(
            SCALARS
        )
    elif kind == 6 and isinstance(node, list):
        node.insert(rng.randrange(len(node) + 1), copy.deepcopy(rng.choice(SCALARS)))
    elif kind == 7:
        left, right = rng.choice((("[", "]"), ('{"type":"Sequence","normalizers":[', "]}")))
        depth = rng.choice((2, 100, 200, 100_000))
        node[key] = Raw(left * depth + dumps(node[key]) + right * depth)  # type: ignore[index]
    elif kind == 8 and isinstance(node, dict):
        for name, value in list(node.items())[:3]:
            if isinstance(value, dict):
                node[name] = Pairs([*value.items(), *list(value.items())[:2]])
    elif kind == 9:
        node[key] = [copy.deepcopy(node[key]) for _ in range(rng.choice((2, 50)))]  # type: ignore[index]


def _change_ids(document: dict, rng: random.Random) -> None:
    """Holes, ids twice, ids beyond all bounds, entries renamed: in the vocabulary itself."""
    model = document.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocab, dict) and not isinstance(vocab, Pairs) and vocab:
        keys = rng.sample(list(vocab), min(len(vocab), rng.choice((1, 3, 40))))
        kind = rng.randrange(5)
        for at, key in enumerate(keys):
            if kind == 0:
                vocab[key] = rng.choice((-1, 2**20 * (at + 1), 2**31, 2**32 - 1, 2**40, 10**30))
            elif kind == 1:
                vocab[key] = vocab[rng.choice(keys)]
            elif kind == 2:
                vocab[rng.choice(("", "\ud800", "x" * 100_000, "\0", f"odd{at}"))] = vocab.pop(key)
            elif kind == 3:
                del vocab[key]
            elif isinstance(vocab[key], int):
                vocab[key] += rng.choice((1, 1000, 2**19))
    elif isinstance(vocab, list) and vocab:
        for _ in range(rng.choice((1, 5))):
            vocab[rng.randrange(len(vocab))] = copy.deepcopy(
                rng.choice([["x" * 100_000, 0.0], ["", -1.0], ["a"], ["a", "b"], "a", *SCALARS])
            )
    added = document.get("added_tokens")
    if isinstance(added, list) and added and rng.random() < 0.3:
        token = rng.choice(added)
        if isinstance(token, dict):
            token["id"] = rng.choice((0, -1, 2**21, 2**31, 2**63, "1", None))


def mutant(document: dict, rng: random.Random, *, gently: bool = False) -> bytes:
    """One damaged document, as a file; `gently` for readers that refuse most."""
    made = copy.deepcopy(document)
    for _ in range(1 if gently else rng.choice((1, 1, 2, 4))):
        (_change_ids if rng.random() < 0.3 else _change)(made, rng)
    text = dumps(made).encode("utf-8", "surrogatepass")
    if gently:
        return text
    kind = rng.randrange(12)
    if kind == 0:
        return text[: rng.randrange(len(text) + 1)]
    if kind == 1:
        at = rng.randrange(len(text))
        return text[:at] + bytes((text[at] ^ (1 << rng.randrange(8)),)) + text[at + 1 :]
    if kind == 2:
        return text + rng.choice((b"}", b"\0", b"\xff", text[:50]))
    return text
