"""Whatever stands where token ids belong, the answer is right or one of our errors."""

from __future__ import annotations

import collections
import random
import traceback
from collections.abc import Callable

import numpy as np
import pytest
import torch
from drawing import count, generator
from tokenizer_zoo import byte_level_bpe

from xtoken import Aligner, Pair, Projection, Vocab, XTokenError
from xtoken.targets import TargetBuilder, TargetExample, TargetOptions
from xtoken.trie import PieceTrie

DTYPES = (np.int64, np.int32, np.uint64, np.uint8, np.float32, np.bool_, np.object_, "U3", "M8[s]")
ODD: tuple[object, ...] = (
    *(None, "", "201", b"201", 0, 1.5, float("nan"), object(), {}, {1: 2}, set(), (), [], [[]]),
    *([[1], 2], [None], ["1"], [1.0], [True, False], [2**63], [-(2**63) - 1], [10**40], [[1, 2]]),
    *(range(3), iter([1]), np.int64(3), np.zeros((2, 0), np.int64), np.zeros((0, 2), np.int64)),
    *(torch.tensor([1, 2]), torch.tensor([[1, 2], [3, 4]]), torch.tensor(1.0), [torch.tensor(1)]),
    *(torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.int64, device="meta")),
    *(torch.zeros(2, requires_grad=True), [torch.zeros(2, device="meta")]),
    *(
        "\ud800",
        "\0",
        [np.int64(1), np.int64(2)],
        [np.zeros(2, np.int64), [1]],
        np.ma.array([1, 2]),
    ),
)


@pytest.fixture(name="vocabs", scope="module")
def _vocabs() -> tuple[Vocab, Vocab]:
    return tuple(Vocab.from_tokenizer(one) for one in (byte_level_bpe(500), byte_level_bpe(400, 1)))  # type: ignore[return-value]


def number(rng: random.Random, size: int) -> int:
    edges = (0, size - 1, size, -1, 2**31, 2**32 - 1, 2**62, -(2**63), 2**63 - 1)
    return rng.choice(edges) if rng.random() < 0.1 else rng.randrange(size)


def array(rng: random.Random, size: int, dimensions: int | None = None) -> object:
    """An array of ids: of any dtype, shape and stride."""
    if dimensions is None:
        dimensions = rng.choice((0, 1, 1, 1, 2, 2, 3))
    shape = tuple(rng.choice((0, 1, 2, 7)) for _ in range(dimensions))
    values = [number(rng, size) for _ in range(int(np.prod(shape)))]
    made = np.array(values, dtype=np.int64).reshape(shape)
    if rng.random() < 0.3:
        dtype = rng.choice(DTYPES)
        with np.errstate(all="ignore"):
            made = made.astype(dtype)
    if made.ndim and rng.random() < 0.2:
        made = rng.choice((made[::-1], made[..., ::2], np.asfortranarray(made), made.T))
    if rng.random() < 0.1:
        made.flags.writeable = False
    return made.tolist() if rng.random() < 0.3 else made


def ids(rng: random.Random, size: int, dimensions: int | None = None) -> object:
    return rng.choice(ODD) if rng.random() < 0.25 else array(rng, size, dimensions)


def mostly(rng: random.Random, good: object, *other: object) -> object:
    return good if rng.random() < 0.7 else rng.choice((*ODD, *other))


def only_our_errors(calls: Callable[[random.Random], object], name: str, number: int) -> None:
    """Run a call on many draws; anything but an answer or an `XTokenError` falls."""
    rng = generator(name)
    fallen: dict[str, str] = {}
    outcomes: collections.Counter[str] = collections.Counter()
    for _ in range(number):
        try:
            calls(rng)
            outcomes["answered"] += 1
        except XTokenError as error:
            outcomes[type(error).__name__] += 1
            if "\n" in str(error):
                fallen[f"of many lines: {str(error)[:200]}"] = ""
        except BaseException as error:  # a panic is no Exception
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "xtoken" in frame.filename] or frames
            place = f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno} {ours[-1].line}"
            fallen[f"{type(error).__name__} at {place}"] = str(error)[:150]
    assert not fallen, "\n".join(f"{place}: {text}" for place, text in fallen.items())
    assert outcomes["answered"], outcomes
    assert sum(outcomes.values()) > outcomes["answered"], outcomes
    print(name, dict(outcomes))


def test_align_answers_or_refuses(vocabs: tuple[Vocab, Vocab]) -> None:
    aligner = Aligner(*vocabs, threads=1)

    def call(rng: random.Random) -> None:
        one, other = ids(rng, 500, 1), ids(rng, 400, 1)
        found = aligner.align(one, other)  # type: ignore[arg-type]
        assert found.student_bounds[-1] == len(one)  # type: ignore[arg-type]
        assert found.teacher_bounds[-1] == len(other)  # type: ignore[arg-type]
        assert (np.diff(found.student_bounds) >= 0).all()

    only_our_errors(call, "align", count(1500, 100_000))


def test_align_batch_answers_or_refuses(vocabs: tuple[Vocab, Vocab]) -> None:
    aligner = Aligner(*vocabs, threads=1)

    def sequences(rng: random.Random, size: int) -> object:
        if rng.random() < 0.4:
            return ids(rng, size)
        return [ids(rng, size, 1) for _ in range(rng.choice((0, 1, 2)))]

    def call(rng: random.Random) -> None:
        options = {}
        for name in ("mask", "lengths", "indptr"):
            for side in ("student", "teacher"):
                if rng.random() < 0.15:
                    options[f"{side}_{name}"] = ids(rng, 3)
        if rng.random() < 0.2:
            options["threads"] = rng.choice((1, 2, 0, -1, 2**40, 1.5, "1", True, 10**30))
        found = aligner.align_batch(sequences(rng, 500), sequences(rng, 400), **options)  # type: ignore[arg-type]
        assert len(found) == len(list(found))

    only_our_errors(call, "align_batch", count(2000, 100_000))


def test_a_batch_that_fits_is_answered(vocabs: tuple[Vocab, Vocab]) -> None:
    """The draws above are refused for the most part; these are right but for their ids."""
    aligner = Aligner(*vocabs, threads=1)

    def call(rng: random.Random) -> None:
        rows, width = rng.randrange(4), rng.randrange(5)
        sides = []
        options = {}
        for side, size in (("student", 500), ("teacher", 400)):
            made = np.array([number(rng, size) for _ in range(rows * width)], np.int64)
            sides.append(made.reshape(rows, width))
            kind = rng.randrange(3)
            if kind == 1:
                options[f"{side}_lengths"] = np.array(
                    [rng.randrange(width + 1) for _ in range(rows)]
                )
            elif kind == 2:
                starts = np.array([rng.randrange(width + 1) for _ in range(rows)])
                options[f"{side}_mask"] = np.arange(width) >= starts[:, None]
        found = aligner.align_batch(*sides, **options)  # type: ignore[arg-type]
        assert len(found) == rows

    only_our_errors(call, "align_batch that fits", count(500, 20_000))


def test_tries_answer_or_refuse(vocabs: tuple[Vocab, Vocab]) -> None:
    trie = PieceTrie.build(*vocabs, threads=1)

    def call(rng: random.Random) -> None:
        kind = rng.randrange(5)
        if kind == 0:
            trie.pieces(mostly(rng, number(rng, 500)))  # type: ignore[arg-type]
        elif kind == 1:
            trie.find(ids(rng, 400, 1))  # type: ignore[arg-type]
        elif kind == 2:
            trie.below(mostly(rng, number(rng, len(trie))))  # type: ignore[arg-type]
        elif kind == 3:
            sequences = [
                [number(rng, 400) for _ in range(rng.randrange(4))] for _ in range(rng.randrange(5))
            ]
            limit = rng.choice((400, 400, 0, -1, 2**31, 2**40, 2**62, 10**30, 1.5, None, "400"))
            PieceTrie.from_pieces(mostly(rng, sequences), limit)  # type: ignore[arg-type]
        else:
            length = rng.randrange(6)
            tokens = np.array([number(rng, 400) for _ in range(length)], np.int64)
            cuts = sorted(rng.randrange(length + 1) for _ in range(4))
            found = trie.lookup(
                mostly(rng, tokens, array(rng, 400)),  # type: ignore[arg-type]
                mostly(rng, np.array(cuts[:2], np.int64), array(rng, 6)),  # type: ignore[arg-type]
                mostly(rng, np.array(cuts[2:], np.int64), array(rng, 6)),  # type: ignore[arg-type]
                max_depth=rng.choice((None, 0, 1, 3, -1, 2**31, 2**63, "1", 1.5, True)),  # type: ignore[arg-type]
                threads=rng.choice((1, 1, 1, 0, -1, 10**20, "1", None)),  # type: ignore[arg-type]
            )
            assert len(found.chunk) == len(found.node)

    only_our_errors(call, "trie", count(2000, 100_000))


def test_explain_and_the_vocabulary_answer_or_refuse(vocabs: tuple[Vocab, Vocab]) -> None:
    projection = Projection.build(*vocabs, cache_dir=False, threads=1)
    pair = Pair(*vocabs, cache_dir=False)
    vocab = vocabs[0]

    def call(rng: random.Random) -> None:
        token = mostly(
            rng, number(rng, 500), "\udcff", b"\xff", True, 2**70, np.int64(5), "x" * 10**5
        )
        kind = rng.randrange(6)
        if kind == 0:
            str(projection.explain(token))  # type: ignore[arg-type]
        elif kind == 1:
            pair.explain(token)  # type: ignore[arg-type]
        elif kind == 2:
            pair.align(mostly(rng, [1, 2]), mostly(rng, [3]))  # type: ignore[call-overload]
        elif kind == 3:
            vocab.token_bytes(number(rng, 500))
        elif kind == 4:
            vocab.decode_bytes([number(rng, 500)])
        else:
            projection.token_pieces(number(rng, 500))

    only_our_errors(call, "explain", count(1000, 50_000))


def test_true_is_no_token_id_and_an_id_of_numpy_is(vocabs: tuple[Vocab, Vocab]) -> None:
    projection = Projection.build(*vocabs, cache_dir=False, threads=1)
    with pytest.raises(XTokenError, match="token is a bool; pass an id"):
        projection.explain(True)
    assert projection.explain(np.int64(40)) == projection.explain(40)  # type: ignore[arg-type]


def test_the_batch_of_a_distiller_is_made_or_refused(vocabs: tuple[Vocab, Vocab]) -> None:
    distiller = Pair(*vocabs, cache_dir=False, threads=1).distiller("p-kl")

    def call(rng: random.Random) -> None:
        rows = rng.choice((1, 1, 2, 0))
        sides = [
            [
                mostly(
                    rng, [number(rng, size) for _ in range(rng.randrange(1, 5))], array(rng, size)
                )
                for _ in range(rows)
            ]
            for size in (500, 400)
        ]
        given = [mostly(rng, side) for side in sides]
        batch = distiller.batch(*given)  # type: ignore[arg-type]
        assert len(batch) == len(given[0])  # type: ignore[arg-type]

    only_our_errors(call, "batch", count(800, 20_000))


def test_items_of_a_collation_are_used_or_refused() -> None:
    pair = Pair(byte_level_bpe(500), byte_level_bpe(400, 1), cache_dir=False, threads=1)
    distiller = pair.distiller("p-kl")

    def call(rng: random.Random) -> None:
        texts = (
            "a text",
            "201 x",
            "",
            "\ud800",
            "<|end_of_text|>",
            "\0",
            {"text": "t"},
            {"text": 1},
        )
        distiller.collate(mostly(rng, [mostly(rng, rng.choice(texts))]))  # type: ignore[arg-type, list-item]

    only_our_errors(call, "collate", count(300, 5000))


def test_targets_are_those_of_the_numbers_given_or_refused(vocabs: tuple[Vocab, Vocab]) -> None:
    projection = Projection.build(*vocabs, cache_dir=False, threads=1)
    builder = TargetBuilder(projection)
    aligner = Aligner(*vocabs, threads=1)
    rows = np.log(np.full((3, 2), 0.4)).astype(np.float32)
    columns = np.array([[65, 66], [67, -1], [66, 65]])
    tokens = np.array([65, 66, 67])
    odd_rows = (
        rows.tolist(), rows.astype(np.float16), rows[:, ::-1], rows[:2], rows * np.nan, -rows,
        rows.astype(np.int64), rows[0], torch.from_numpy(rows), rows.astype(complex), rows > 0,
    )  # fmt: skip

    def call(rng: random.Random) -> None:
        given = {
            "student_ids": mostly(rng, tokens, ids(rng, 500, 1)),
            "teacher_ids": mostly(rng, tokens, ids(rng, 400, 1)),
            "alignment": mostly(rng, aligner.align(tokens, tokens), aligner.align([65], [65])),
            "log_probs": mostly(rng, rows, *odd_rows),
            "column_ids": mostly(rng, columns, None, columns.tolist(), array(rng, 400, 2)),
            "validate": rng.choice((True, True, True, False, None, "no", 1)),
        }
        options = mostly(rng, None, TargetOptions(levels=0))
        threads = rng.choice((1, 1, 1, 0, -1, 1.0, "1", None, 2**40, 2**70, True, np.int64(1)))
        examples = mostly(rng, [TargetExample(**given)])  # type: ignore[arg-type]
        made = builder.build(examples, options, threads=threads)  # type: ignore[arg-type]
        assert made.examples == len(examples)  # type: ignore[arg-type]
        assert np.isfinite(made.probs).all()

    only_our_errors(call, "targets", count(3000, 100_000))


def test_a_builder_answers_or_refuses(vocabs: tuple[Vocab, Vocab]) -> None:
    projection = Projection.build(*vocabs, cache_dir=False, threads=1)
    builder = TargetBuilder(projection)

    def call(rng: random.Random) -> None:
        if rng.random() < 0.9:
            threads = rng.choice((1, 1, 1, 0, -1, 1.0, "1", None, 2**70))
            given = ids(rng, 500, 1)
            indptr, _ = builder.swallowing(given, threads=threads)  # type: ignore[arg-type]
            assert len(indptr) == len(given) + 1  # type: ignore[arg-type]
        else:
            stops = {"student_stops": ids(rng, 500, 1), "teacher_stops": mostly(rng, [1])}
            TargetBuilder(mostly(rng, projection), **stops)  # type: ignore[arg-type]

    only_our_errors(call, "target builder", count(600, 20_000))
