"""Run by test_hostile_tokenizers in a process of its own, whose memory and time are bounded."""

from __future__ import annotations

import json
import random
import resource
import sys
import time
from pathlib import Path

from mutate_json import mutant
from tokenizers import Tokenizer

from xtoken import Aligner, Projection, Vocab, XTokenError
from xtoken._checks import panics_refused

WORDS = (b"201", b" the", "नमस्ते".encode(), b"\xff\xfe", b"a" * 3000, b"")


def use(vocab: Vocab) -> None:
    """What a vocabulary is there for, at its limits."""
    size = len(vocab)
    hash(vocab)
    repr(vocab)
    _ = vocab.roles, vocab.special_tokens, vocab.family, vocab.dummy_prefix, vocab.model_fingerprint
    for token in {0, size // 2, size - 1} if size else ():
        vocab.id_of(vocab.token_bytes(token))
        vocab.decode_bytes([token, token])
    if vocab.model is not None:
        for word in WORDS:
            pieces = vocab.segment(word)
            if pieces is not None and not vocab.is_lossy:
                assert b"".join(map(vocab.token_bytes, pieces)) == word, (word[:9], pieces[:9])
    ids = [token for token in (0, 1, 5, size - 1) if 0 <= token < size]
    aligner = Aligner(vocab, vocab, threads=1)
    alignment = aligner.align(ids, ids[::-1])
    assert alignment.student_bounds[-1] == len(ids)
    if 0 < size < 3000:
        Projection.build(vocab, vocab, cache_dir=False, threads=1)


def draws(kind: str, folder: Path, rng: random.Random, number: int):
    files = sorted(folder.glob("*.json"))
    documents = [json.loads(file.read_text()) for file in files]
    states = [Vocab.from_path(file).__reduce__()[1][0] for file in files]
    made_now = 0
    while made_now < number:
        made_now += 1
        if kind == "json":
            content = mutant(rng.choice(documents), rng)
            yield content, Vocab.from_tokenizer_json
        elif kind == "object":
            content = mutant(rng.choice(documents), rng, gently=True)
            try:
                if aborts_tokenizers(json.loads(content)):
                    raise ValueError
                with panics_refused("a draw"):
                    made = Tokenizer.from_str(content.decode())
            except Exception:  # tokenizers refuses it with a bare Exception
                made_now -= 1
                continue
            yield content, lambda _, made=made: Vocab.from_tokenizer(made)
        elif kind == "state":
            content = bytearray(rng.choice(states))
            for _ in range(rng.choice((1, 1, 3, 20))):
                at = rng.choice((rng.randrange(min(64, len(content))), rng.randrange(len(content))))
                content[at] = rng.choice((0, 255, content[at] ^ (1 << rng.randrange(8))))
            if rng.random() < 0.2:
                del content[rng.randrange(len(content)) :]
            yield bytes(content), Vocab._from_state
        else:
            yield rank_file(rng), lambda content: Vocab.from_tiktoken(content, {"<|end|>": 300})


def aborts_tokenizers(document: object) -> bool:
    """Whether tokenizers panics on its merges, and may abort: a prefix of continuing pieces is
    longer than the second piece of one."""
    model = document.get("model") if isinstance(document, dict) else None
    prefix = model.get("continuing_subword_prefix") if isinstance(model, dict) else None
    return bool(prefix) and isinstance(model.get("merges"), list)


def rank_file(rng: random.Random) -> bytes:
    import base64

    lines = [base64.b64encode(bytes([byte])) + b" %d" % byte for byte in range(256)]
    lines += [base64.b64encode(b"ab" * n) + b" %d" % (256 + n) for n in range(1, 20)]
    for _ in range(rng.choice((0, 1, 3, 40))):
        at = rng.randrange(len(lines))
        lines[at] = rng.choice(
            (
                *(b"", b" ", b"YQ== -1", b"YQ== 1.5", b"YQ==", b"=== 5", b"YQ== 0", b"\xff\xff 7"),
                *(b"YQ== %d" % (2**20 * at), b"YQ== %d" % 2**63, b"YQ== %d" % 10**30, lines[0]),
                base64.b64encode(b"a" * 100_000) + b" 299",
                base64.b64encode(rng.randbytes(5)) + b" %d" % rng.randrange(2**22),
            )
        )
    if rng.random() < 0.1:
        rng.shuffle(lines)
    text = rng.choice((b"\n", b"\r\n", b"\n\n")).join(lines)
    return text[: rng.randrange(len(text))] if rng.random() < 0.1 else text


def peak_megabytes() -> int:
    """Of this program alone: a child's ru_maxrss starts at what its parent held before exec."""
    status = Path("/proc/self/status")
    if status.exists():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def main(kind: str, folder: str, seed: str, number: str, first: str) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
    rng = random.Random(int(seed))
    for at, (content, read) in enumerate(draws(kind, Path(folder), rng, int(number))):
        if at < int(first):
            continue
        (Path(folder) / "last").write_bytes(content)
        start = time.process_time()
        try:
            vocab = read(content)
            use(vocab)
            answer = "read"
        except XTokenError as error:
            answer = "refused" if "\n" not in str(error) else f"of many lines: {error}"
        seconds = time.process_time() - start
        memory = peak_megabytes()
        print(json.dumps([at, answer, round(seconds, 2), memory]), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
