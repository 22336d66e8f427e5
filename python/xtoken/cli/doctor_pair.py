"""A quick look at a pair: does it load, align, project, and stop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from xtoken._core import Vocab
from xtoken._extras import installed
from xtoken._files import cache_directory, read_json
from xtoken.cli.doctor_findings import Finding, one_line
from xtoken.cli.sides import read_side
from xtoken.data.low_coverage import low_exact_bytes
from xtoken.errors import XTokenError
from xtoken.pair import Pair
from xtoken.projection.cache import cache_file
from xtoken.vocab.display import special_name, visible
from xtoken.vocab.side import Side, SideName

# A little of all that tokenizers cut in different ways.
LINE = (
    "In 1969 a computer with 4,096 words flew 384,400 km; naïve cafés, 東京, привет, 👍🏽\n"
    "\tif x != 0:  return {'a': [1, 2.5e-3]}"
)


def pair_findings(student: str, teacher: str) -> Iterator[Finding]:
    """One line for each part of a pair, in the order in which they depend on one another."""
    sides = []
    names: tuple[tuple[SideName, str], ...] = (("student", student), ("teacher", teacher))
    for name, source in names:
        try:
            side = read_side(name, source)
        except (XTokenError, OSError) as error:
            yield Finding("broken", name, one_line(error))
            continue
        sides.append(side)
        vocab = side.vocab
        lossy = "; lossy: its tokens do not determine the text" if vocab.is_lossy else ""
        yield Finding(
            "warning" if lossy else "ok",
            name,
            f"{side.label}: {len(vocab):,} ids, {vocab.family}, "
            f"fingerprint {vocab.fingerprint[:12]}{lossy}",
        )
        yield from _model_size(side)
    if len(sides) < 2:
        return
    pair = Pair(*sides)
    try:
        yield _projection(pair)
        yield _alignment(pair)
        for side, vocab in zip(pair.sides, (pair.student_vocab, pair.teacher_vocab), strict=True):
            yield _stops(side, vocab)
        yield from _agreeing_stops(pair)
    except (XTokenError, OSError) as error:
        yield Finding("broken", "pair", one_line(error))


def _projection(pair: Pair) -> Finding:
    directory = cache_directory()
    kept = "the cache is off" if directory is None else f"kept in {directory}"
    # Made before the clock starts.
    _ = pair.student_vocab, pair.teacher_vocab
    cached = directory is not None and _cache_file(pair, directory).is_file()
    start = time.perf_counter()
    w = pair.projection
    seconds = time.perf_counter() - start
    stats = w.stats()
    rows = (
        f"{w.shape[0]:,} x {w.shape[1]:,}, {stats['exact']:,} rows exact, {stats['empty']:,} empty"
    )
    if not len(w.indices):
        return Finding(
            "broken",
            "W",
            f"{rows}: no token of one side stands for any of the other; look at xtoken vocab of "
            "both",
        )
    made = "read from the cache" if cached else "built"
    end = "" if cached else f"; {kept}"
    return Finding("ok", "W", f"{rows}; {made} in {seconds:.2f} s{end}")


def _cache_file(pair: Pair, directory: Path) -> Path:
    return cache_file(directory, pair.student_vocab, pair.teacher_vocab, pair.projection_options)


def _alignment(pair: Pair) -> Finding:
    alignment = pair.align(LINE)
    coverage = alignment.coverage
    shares = (
        f"{coverage.student_byte_share:.1%} of the student's bytes and "
        f"{coverage.teacher_byte_share:.1%} of the teacher's in exact chunks of a line of "
        f"{coverage.student_tokens} and {coverage.teacher_tokens} tokens"
    )
    if not coverage.exact_chunks:
        return Finding(
            "broken", "alignment", f"{shares}; the two sides spell nothing alike: see xtoken align"
        )
    low = low_exact_bytes(pair.sides, coverage)
    return (
        Finding("ok", "alignment", shares) if low is None else Finding("warning", "alignment", low)
    )


def _stops(side: Side, vocab: Vocab) -> Finding:
    if vocab.stops:
        named = ", ".join(f"{_name(vocab, token)} ({token})" for token in vocab.stops)
        return Finding("ok", f"{side.name}'s stops", named)
    remedy = "declare an eos_token in its tokenizer_config.json"
    if side.is_path and not installed("transformers"):
        remedy = 'its chat template may name one, which pip install "xtoken[train]" reads'
    return Finding(
        "warning", f"{side.name}'s stops", f"nothing stops it, so no end is distilled; {remedy}"
    )


def _agreeing_stops(pair: Pair) -> Iterator[Finding]:
    """Whether each stop of the student has a stop of the teacher in W."""
    w, teacher = pair.projection, set(pair.teacher_vocab.stops)
    stops = pair.student_vocab.stops
    if not stops or not teacher:
        return  # said of the side that has none
    without = [
        token
        for token in stops
        if not teacher.intersection(w.indices[w.indptr[token] : w.indptr[token + 1]].tolist())
    ]
    if without:
        named = ", ".join(_name(pair.student_vocab, token) for token in without[:4])
        yield Finding(
            "warning",
            "stops in W",
            f"{named} of the student meets no stop of the teacher, so that end is not distilled; "
            "pair them with special_roles",
        )
    else:
        yield Finding("ok", "stops in W", "each of the student's meets one of the teacher's")


def _model_size(side: Side) -> Iterator[Finding]:
    """Whether the model beside the tokenizer has a row for every id."""
    file = Path(str(side.source)) / "config.json"
    if not side.is_path or not file.is_file():
        return
    config = read_json(file, "model config")
    inner = config.get("text_config") if isinstance(config, dict) else None
    config = inner if isinstance(inner, dict) else config
    size = config.get("vocab_size") if isinstance(config, dict) else None
    if isinstance(size, int) and size < len(side.vocab):
        yield Finding(
            "broken",
            f"{side.name}'s model",
            f"{file} says vocab_size = {size:,}, the tokenizer has {len(side.vocab):,} ids; "
            "resize the model's embeddings, or take the tokenizer that belongs to it",
        )


def _name(vocab: Vocab, token: int) -> str:
    data = vocab.token_bytes(token)
    return visible(data) if data else special_name(vocab, token)
