"""Served teachers: three formats over real HTTP, their faults, stores that resume, a head start."""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forked import Forked
from served_server import Faults, ServedModel
from tiny_models import tiny_texts
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

import xtoken
from xtoken.errors import MissingExtraError, OptionError, ServerError, StoreError, TokenIdError
from xtoken.losses import TeacherTopK
from xtoken.teachers import LiveTeacher, Predictions, StoreKey, TopKStore
from xtoken.teachers.served import (
    ChosenIds,
    PrefetchedTeacher,
    Probe,
    ServedTeacher,
    fill_store,
    open_store,
    prefix_ids,
)
from xtoken.teachers.served.fill import pace
from xtoken.teachers.store import TOKENS_PER_SHARD

APIS = ["vllm", "vllm-tokens", "sglang"]
TOP_K = 16
Serve = Callable[..., tuple[ServedModel, ServedTeacher]]


@pytest.fixture(scope="module")
def live(folder: Path) -> LiveTeacher:
    return LiveTeacher.from_pretrained(folder / "teacher")


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder / "teacher")


@pytest.fixture(scope="module")
def pair(folder: Path) -> xtoken.Pair:
    return xtoken.Pair(
        *(AutoTokenizer.from_pretrained(folder / side) for side in ("student", "teacher")),
        cache_dir=False,
    )


@pytest.fixture(scope="module")
def student(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder / "student").eval()


@pytest.fixture(scope="module")
def some_texts() -> list[str]:
    return tiny_texts(3)


@pytest.fixture(scope="module")
def sequences(tokenizer: Any) -> list[np.ndarray]:
    """Real text, shortest 2 tokens, longest about 120."""
    rows = [tokenizer(text)["input_ids"][:120] for text in tiny_texts(12)]
    return [np.array(row[: 120 - 9 * index], np.int64) for index, row in enumerate(rows)] + [
        np.array(rows[0][:2], np.int64)
    ]


@pytest.fixture
def serve(live: LiveTeacher, tokenizer: Any) -> Iterator[Serve]:
    """Start a server with some faults, and a client for it that does not wait long."""
    with contextlib.ExitStack() as stack:

        def start(
            kind: str = "vllm",
            faults: Faults | None = None,
            *,
            model: Any = None,
            port: int = 0,
            max_model_len: int = 512,
            **options: Any,
        ) -> tuple[ServedModel, ServedTeacher]:
            server = stack.enter_context(
                ServedModel(
                    model or live.model,
                    kind,
                    tokenizer=tokenizer,
                    faults=replace(faults or Faults()),
                    port=port,
                    max_model_len=max_model_len,
                )
            )
            settings = {
                "vocab": tokenizer,
                "top_k": TOP_K,
                "api": kind,
                "backoff": 0.01,
                "timeout": 30.0,
            } | options
            client = stack.enter_context(ServedTeacher(server.url, **settings))
            return server, client

        yield start


def expected(live: LiveTeacher, ids: np.ndarray, top_k: int = TOP_K) -> Predictions:
    """The same from the model in this process."""
    rows = torch.from_numpy(ids)[None]
    log_probs = live.logits(rows, torch.ones_like(rows))[0].float().log_softmax(-1)
    best = log_probs.topk(top_k)
    own = log_probs[torch.arange(len(ids) - 1), torch.from_numpy(ids[1:])]
    return Predictions(best.indices.numpy(), best.values.numpy(), np.append(own.numpy(), 0))


def assert_same(found: Predictions, wanted: Predictions) -> None:
    """Equal within float error; equal log-probabilities may stand in another order."""
    assert found.ids.shape == wanted.ids.shape
    np.testing.assert_allclose(found.log_probs, wanted.log_probs, atol=1e-5, rtol=0)
    np.testing.assert_allclose(found.token_log_probs, wanted.token_log_probs, atol=1e-5, rtol=0)
    for row in range(len(found.ids)):
        strangers = set(found.ids[row]) ^ set(wanted.ids[row])
        assert len(strangers) <= 2  # a tie at the last place
    assert (np.diff(found.log_probs, axis=1) <= 0).all()


def times(server: ServedModel, ids: np.ndarray) -> int:
    """How often a sequence was scored: with one more token, for what follows the last."""
    return server.asked[(*ids.tolist(), int(ids[-1]))]


def padded(sequences: list[np.ndarray], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, sequences))
    ids, mask = torch.full((len(sequences), width), 5), torch.zeros(len(sequences), width).long()
    for row, sequence in enumerate(sequences):
        place = slice(0, len(sequence)) if side == "right" else slice(width - len(sequence), width)
        ids[row, place] = torch.from_numpy(sequence)
        mask[row, place] = 1
    return ids, mask


# What a server says is what the model says.


@pytest.mark.parametrize("kind", APIS)
def test_served_predictions_are_those_of_the_model(
    kind: str, serve: Serve, live: LiveTeacher, sequences: list[np.ndarray]
) -> None:
    server, teacher = serve(kind, tokens_per_request=250)
    found = teacher.predictions([*sequences, sequences[0]])
    assert len(found) == len(sequences) + 1
    for ids, item in zip(sequences, found, strict=False):
        assert_same(item, expected(live, ids))
    assert all(times(server, ids) == 1 for ids in sequences)
    assert teacher.tokens_answered == sum(map(len, sequences))
    assert teacher.model == "tiny-teacher"


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_padded_batch_gets_the_signal_that_a_store_would_give(
    side: str, serve: Serve, live: LiveTeacher, sequences: list[np.ndarray], tmp_path: Path
) -> None:
    _, teacher = serve("vllm")
    ids, mask = padded(sequences[:4], side)
    signal = teacher.signal(ids, mask)
    store = TopKStore(tmp_path, StoreKey(live.fingerprint, TOP_K, "float32"))
    store.fill(live, sequences[:4])
    wanted = store.signal(ids, mask)
    inner = mask == 1
    torch.testing.assert_close(signal.log_probs[inner], wanted.log_probs[inner], atol=1e-5, rtol=0)
    assert signal.token_log_probs is not None
    assert wanted.token_log_probs is not None
    torch.testing.assert_close(signal.token_log_probs, wanted.token_log_probs, atol=1e-5, rtol=0)
    padding = mask == 0
    assert torch.equal(signal.log_probs[padding], wanted.log_probs[padding])


@pytest.mark.parametrize("kind", APIS)
def test_losses_of_a_served_teacher_are_those_of_the_live_one(
    kind: str,
    serve: Serve,
    live: LiveTeacher,
    pair: xtoken.Pair,
    student: Any,
    some_texts: list[str],
) -> None:
    distillers = {loss: pair.distiller(loss) for loss in ("p-kl", "prefix-kl", "alm", "gold")}
    batches = {loss: distiller.collate(some_texts) for loss, distiller in distillers.items()}
    asked = _batch(batches["p-kl"])
    with torch.no_grad():
        logits = student(**batches["p-kl"].student).logits
    full = live.logits(**asked)
    some = TeacherTopK.from_logits(full, 32, ids=asked["ids"])
    for top_k, teacher in ((32, some), (800, full)):
        _, served = serve(kind, Faults(cap=-1), top_k=top_k)
        signal = served.signal(**asked)
        for loss, batch in batches.items():
            assert torch.equal(batch.teacher_ids, asked["ids"])
            found = distillers[loss](logits, signal, batch)
            wanted = distillers[loss](logits, teacher, batch)
            assert float(found.loss) == pytest.approx(float(wanted.loss), abs=1e-5), loss
            assert float(wanted.loss) > 1e-3, loss


def _batch(batch: Any) -> dict[str, torch.Tensor]:
    inputs = batch.teacher
    return {"ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}


@pytest.mark.parametrize(
    ("kind", "faults"),
    [
        ("vllm", Faults(unordered=True)),
        ("vllm", Faults(unordered=True, without_ranks=True)),
        ("vllm", Faults(no_echo=True)),
        ("vllm", Faults(old=True)),
        ("vllm-tokens", Faults(unordered=True)),
        ("sglang", Faults(unordered=True)),
        ("sglang", Faults(nested=True)),
        ("sglang", Faults(nested=True, unordered=True)),
        ("sglang", Faults(old=True)),
    ],
)
def test_other_ways_to_say_it_change_nothing(
    kind: str, faults: Faults, serve: Serve, live: LiveTeacher, sequences: list[np.ndarray]
) -> None:
    _, teacher = serve(kind, faults)
    for ids, item in zip(sequences[:3], teacher.predictions(sequences[:3]), strict=True):
        assert_same(item, expected(live, ids))


@pytest.mark.parametrize(("kind", "nested"), [*((kind, False) for kind in APIS), ("sglang", True)])
def test_what_has_no_mass_is_minus_infinity(
    kind: str, nested: bool, serve: Serve, sequences: list[np.ndarray]
) -> None:
    ids = sequences[0]
    banned = int(ids[5])
    faults = Faults(no_mass=(banned, *range(300, 800)), cap=-1, nested=nested)
    _, teacher = serve(kind, faults, top_k=400)
    (found,) = teacher.predictions([ids])
    assert found.token_log_probs[4] == -np.inf
    assert np.isneginf(found.log_probs).any()
    assert np.isfinite(found.log_probs[:, 0]).all()
    np.testing.assert_allclose(np.exp(found.log_probs).sum(1), 1, atol=1e-4)
    assert not np.isnan(found.log_probs).any()


def test_a_single_token_has_a_prediction(
    serve: Serve, live: LiveTeacher, sequences: list[np.ndarray]
) -> None:
    _, teacher = serve("sglang")
    single = np.array([7])
    found = teacher.predictions([sequences[0], single, sequences[1]])
    assert [len(item.ids) for item in found] == [len(sequences[0]), 1, len(sequences[1])]
    assert_same(found[1], expected(live, single))


def test_chosen_ids_come_with_the_best_ones_and_never_twice(
    serve: Serve, live: LiveTeacher, sequences: list[np.ndarray]
) -> None:
    ids = sequences[0]
    wanted = expected(live, ids, 800)
    best = wanted.ids[:, :3]
    last = wanted.ids[:, -2:]
    chosen = ChosenIds(
        lambda _: np.concatenate([best, last, last[:, :1], np.full_like(last, -1)], axis=1), 8, "x"
    )
    server, teacher = serve("vllm-tokens", top_k=4, chosen=chosen)
    (found,) = teacher.predictions([ids])
    assert found.ids.shape == (len(ids), 12)
    finite = np.isfinite(found.log_probs)
    assert (finite.sum(1) == 6).all()
    for row in range(len(ids)):
        entries = dict(
            zip(found.ids[row][finite[row]], found.log_probs[row][finite[row]], strict=True)
        )
        assert set(entries) == {*wanted.ids[row, :4], *last[row]}
        for place in (0, 1, 2, 3, -2, -1):
            value = wanted.log_probs[row, place]
            assert entries[wanted.ids[row, place]] == pytest.approx(value, abs=1e-5)
    np.testing.assert_allclose(found.token_log_probs, wanted.token_log_probs, atol=1e-5)
    assert server.requests == 1 + 1  # the probe of the vocabulary
    with ServedTeacher(server.url, vocab=800, top_k=0, chosen=chosen) as alone:
        (few,) = alone.predictions([ids])
    assert np.isfinite(few.log_probs).sum(1).max() == 5
    assert teacher.fingerprint.endswith("+x")
    with pytest.raises(ServerError, match=r"chosen ids of a sequence have shape \(\d+, 8\)"):
        teacher.predictions([sequences[1]])


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("mirror", [False, True])
def test_prefix_kl_beyond_its_root_is_exact_with_the_ids_that_it_asks_for(
    mirror: bool,
    side: Any,
    serve: Serve,
    live: LiveTeacher,
    pair: xtoken.Pair,
    student: Any,
    some_texts: list[str],
) -> None:
    distiller = pair.distiller("prefix-kl", mirror=mirror, padding_side=side)
    batch = distiller.collate(some_texts)
    with torch.no_grad():
        logits = student(**batch.student).logits
    wanted = distiller(logits, live.logits(**_batch(batch)), batch).metrics["prefix_kl"]
    chosen = prefix_ids(distiller.parts, [batch], mirror=mirror)
    found = {}
    for ids in (None, chosen):
        _, served = serve("vllm-tokens", Faults(cap=-1), top_k=4, chosen=ids)
        found[ids] = distiller(logits, served.signal(**_batch(batch)), batch).metrics["prefix_kl"]
    assert float(found[chosen]) == pytest.approx(float(wanted), abs=1e-5)
    assert abs(float(found[None]) - float(wanted)) > 1e-3


@pytest.mark.parametrize(("kind", "name"), [("vllm", "vllm"), ("sglang", "sglang")])
def test_the_dialect_is_asked_for(
    kind: str, name: str, serve: Serve, sequences: list[np.ndarray]
) -> None:
    _, teacher = serve(kind, api="auto")
    assert teacher.api.name == name
    assert len(teacher.predictions(sequences[:2])) == 2


@pytest.mark.parametrize("kind", APIS)
def test_a_server_with_a_low_cap_gives_as_much(
    kind: str, serve: Serve, sequences: list[np.ndarray], tmp_path: Path
) -> None:
    _, teacher = serve(kind, Faults(cap=5), top_k=5)
    store = open_store(tmp_path / "store", teacher)
    fill_store(store, teacher, sequences[:2])
    assert store.get(sequences[0]).ids.shape[1] == 5


# What cannot be used is refused, with what helps.


@pytest.mark.parametrize(
    ("kind", "faults", "words"),
    [
        ("vllm", Faults(cap=8), r"top_k = 16 is above the server's cap of 8; .*--max-logprobs -1"),
        ("vllm-tokens", Faults(cap=8), r"cap of 8; .*--max-logprobs -1, or pass top_k=8"),
        ("vllm", Faults(nan=True), "position 2 is NaN: .*--dtype bfloat16"),
        ("vllm-tokens", Faults(nan=True), "position 2 is NaN"),
        ("sglang", Faults(nan=True), "position 2 is NaN"),
        ("sglang", Faults(nan=True, nested=True), "position 2 is NaN"),
        ("vllm", Faults(raw_logits=True), "expected at most 1; .*--logprobs-mode raw_logprobs"),
        ("sglang", Faults(raw_logits=True), "probabilities at position 0 sum to"),
        ("vllm", Faults(other_ids=True), r"id \d+ at position 0 came back as 0; .*added BOS"),
        ("vllm", Faults(other_ids=True, no_echo=True), "expected as many, the first null"),
        ("vllm-tokens", Faults(other_ids=True), "at position 0 came back as 0"),
        ("sglang", Faults(other_ids=True), "at position 0 came back as 0"),
        ("vllm", Faults(short=True), "entries for a prompt of 97 tokens.*--max-model-len"),
        ("vllm-tokens", Faults(short=True), r"expected float32 \(96, 1\).*--max-model-len"),
        ("sglang", Faults(short=True), "scored 96 of the 97 ids.*--context-length"),
        ("vllm", Faults(hole=True), "no entries at position 48.*--no-enable-prefix-caching"),
        ("sglang", Faults(hole=True, nested=True), "a row of input_top_logprobs of the answer"),
        ("sglang", Faults(duplicate=True), r"id \d+ comes twice at position 1"),
        ("sglang", Faults(duplicate=True, nested=True), r"id \d+ comes twice at position 1"),
        ("vllm", Faults(two_models=True), "serves tiny-teacher, another; pass model="),
        ("vllm-tokens", Faults(old=True), "it needs vLLM 0.33 or later, else pass api='vllm'"),
    ],
)
def test_what_cannot_be_used_is_refused_with_what_helps(
    kind: str, faults: Faults, words: str, serve: Serve, sequences: list[np.ndarray]
) -> None:
    server, teacher = serve(kind, faults)
    with pytest.raises(ServerError, match=words):
        teacher.predictions([sequences[0]])
    assert server.requests <= 4  # a refusal is not repeated


@pytest.mark.parametrize("kind", ["vllm", "vllm-tokens", "sglang"])
def test_a_context_that_is_too_short_is_named(
    kind: str, serve: Serve, sequences: list[np.ndarray]
) -> None:
    _, teacher = serve(kind, max_model_len=50)
    with pytest.raises(ServerError, match=r"sequence of 97 tokens .*--max-model-len"):
        teacher.predictions([sequences[0]])


def other_model(vocab_size: int) -> LlamaForCausalLM:
    with torch.random.fork_rng():
        torch.manual_seed(5)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=16,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=2,
            )
        )


@pytest.mark.parametrize("size", [700, 1700])
@pytest.mark.parametrize("kind", APIS)
def test_another_vocabulary_is_refused(
    kind: str, size: int, serve: Serve, sequences: list[np.ndarray]
) -> None:
    server, teacher = serve(kind, model=other_model(size))
    with pytest.raises(ServerError, match=rf"has a vocabulary of {size}, .*has 800; pass vocab="):
        teacher.predictions([sequences[0]])
    assert not server.asked


def test_a_padded_head_is_no_other_vocabulary(serve: Serve, sequences: list[np.ndarray]) -> None:
    model = other_model(832)
    with torch.no_grad():
        model.lm_head.weight[800:] = 0
        model.lm_head.weight[:800] *= 30
    _, teacher = serve("vllm", Faults(no_mass=tuple(range(800, 832))), model=model)
    assert len(teacher.predictions(sequences[:2])) == 2


def test_mass_outside_the_vocabulary_is_refused_where_the_server_does_not_tell_its_size(
    serve: Serve, sequences: list[np.ndarray]
) -> None:
    _, teacher = serve("vllm", Faults(old=True), model=other_model(1700))
    with pytest.raises(ServerError, match=r"of its mass to ids such as \d+, outside the teacher"):
        teacher.predictions([sequences[0]])


def test_another_tokenizer_of_the_same_size_is_refused(
    serve: Serve, tokenizer: Any, sequences: list[np.ndarray]
) -> None:
    vocab = xtoken.Vocab.from_tokenizer(tokenizer)
    tokens = [vocab.token_bytes(token) for token in range(len(vocab))]
    other = xtoken.Vocab.from_tokens(tokens[:1] + tokens[:0:-1], vocab.special_tokens, ranked=True)
    server, teacher = serve("vllm", vocab=other)
    with pytest.raises(
        ServerError, match=r"reads the ids \[.*\]… as .* the tokenizer of vocab= as"
    ):
        teacher.predictions([sequences[0]])
    assert not server.asked


def test_bad_options_are_named() -> None:
    def make(**options: Any) -> ServedTeacher:
        return ServedTeacher("http://127.0.0.1:1", **({"vocab": 800, "top_k": 4} | options))

    for options, words in (
        ({"temperature": 2.0}, r"temperature = 2.0, .*pass temperature=1, or .*LiveTeacher"),
        ({"api": "tgi"}, "api = 'tgi', expected auto or one of vllm, vllm-tokens, sglang"),
        ({"top_k": 0}, "top_k = 0, expected at least 1"),
        ({"top_k": 801}, r"top_k = 801 is more than the teacher vocabulary has \(V_t = 800\)"),
        ({"concurrency": 0}, "concurrency = 0"),
        ({"retries": -1}, "retries = -1"),
        ({"timeout": 0.0}, "timeout = 0.0"),
        (
            {"api": "sglang", "chosen": ChosenIds(lambda ids: ids, 1, "x")},
            "api = 'sglang' does not score chosen ids; pass api='vllm-tokens'",
        ),
    ):
        with pytest.raises(OptionError, match=words):
            make(**options)
    for url in ("localhost:8000", "http://", "http://localhost:port", "ftp://localhost"):
        with pytest.raises(ServerError, match=r"url = '.*', expected the address of a server"):
            ServedTeacher(url, vocab=800, top_k=4)


def test_ids_outside_the_vocabulary_are_never_sent(
    serve: Serve, sequences: list[np.ndarray]
) -> None:
    server, teacher = serve("vllm")
    for bad in (-1, 800):
        with pytest.raises(TokenIdError, match=rf"id {bad} at position 1 of sequence 1 is outside"):
            teacher.predictions([sequences[0], np.array([3, bad, 4])])
    with pytest.raises(ServerError, match="sequence 0 is empty"):
        teacher.predictions([np.array([], np.int64)])
    assert not server.asked


def test_without_the_extra_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "httpx2", None)
    with pytest.raises(MissingExtraError, match=r'needs httpx2, .*pip install "xtoken\[serve\]"'):
        ServedTeacher("http://127.0.0.1:1", vocab=800, top_k=4)


# Servers that stumble.


@pytest.mark.parametrize(
    "faults",
    [
        Faults(errors=2),
        Faults(errors=2, error_status=503),
        Faults(errors=1, error_status=429),
        Faults(cut=2),
        Faults(not_json=2),
    ],
    ids=["500", "503", "429", "cut", "not-json"],
)
@pytest.mark.parametrize("kind", APIS)
def test_a_server_that_stumbles_is_asked_again(
    kind: str, faults: Faults, serve: Serve, live: LiveTeacher, sequences: list[np.ndarray]
) -> None:
    server, teacher = serve(kind)
    _ = teacher.question
    server.faults = replace(faults)
    before = server.requests
    for ids, item in zip(sequences[:2], teacher.predictions(sequences[:2]), strict=True):
        assert_same(item, expected(live, ids))
    assert server.requests - before >= 3


def test_tries_have_a_limit(serve: Serve, sequences: list[np.ndarray]) -> None:
    server, teacher = serve("vllm", retries=3)
    _ = teacher.question
    server.faults = Faults(errors=100)
    before = server.requests
    with pytest.raises(ServerError, match=r"no answer in 4 tries over .*500 engine is busy"):
        teacher.predictions([sequences[0]])
    assert server.requests - before == 4


def test_pauses_between_tries_grow_and_are_bounded() -> None:
    from xtoken.teachers.served.client import RetryPolicy

    policy = RetryPolicy(backoff=0.5)
    for tries in range(1, 40):
        longest = min(0.5 * 2 ** (tries - 1), 30.0)
        assert 0.75 * longest <= policy.pause(tries) <= longest


def test_a_silent_server_is_given_up_after_the_timeout(
    serve: Serve, sequences: list[np.ndarray]
) -> None:
    server, teacher = serve("vllm", timeout=0.2, retries=1)
    _ = teacher.question
    server.faults = Faults(slow=1.0)
    began = time.monotonic()
    with pytest.raises(ServerError, match=r"silent for 0.2 s .*raise timeout= and retries="):
        teacher.predictions([sequences[0]])
    assert time.monotonic() - began < 3


def test_nobody_listens_ends_in_one_line(sequences: list[np.ndarray]) -> None:
    teacher = ServedTeacher("http://127.0.0.1:9", vocab=800, top_k=4, retries=1, backoff=0.01)
    with pytest.raises(ServerError, match=r"gave no answer in 2 tries .*start the server again"):
        teacher.predictions([sequences[0]])


def test_requests_under_way_are_bounded(serve: Serve, sequences: list[np.ndarray]) -> None:
    server, teacher = serve("vllm", concurrency=3, tokens_per_request=1)
    _ = teacher.question
    server.faults = Faults(slow=0.05)
    server.busiest = 0
    teacher.predictions(sequences)
    assert server.busiest == 3


def test_requests_hold_at_most_their_tokens(serve: Serve, sequences: list[np.ndarray]) -> None:
    server, teacher = serve("vllm", tokens_per_request=200)
    list(teacher.answers(sequences))
    sizes = [sum(map(len, body["prompt"])) for body in server.bodies if body.get("prompt_logprobs")]
    assert max(sizes) <= 200
    assert len(sizes) < len(sequences)


# Stores.


class Told:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.title, self.total = "", 0
        self.updates: list[tuple[int, str]] = []

    @contextlib.contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
        self.title, self.total = title, total
        yield lambda done, remark: self.updates.append((done, remark))


@pytest.mark.parametrize("kind", APIS)
def test_a_store_is_filled_once_and_read_like_any_other(
    kind: str, serve: Serve, live: LiveTeacher, sequences: list[np.ndarray], tmp_path: Path
) -> None:
    server, teacher = serve(kind, tokens_per_request=150)
    told = Told()
    store = open_store(tmp_path, teacher)
    filled = fill_store(store, teacher, [*sequences, sequences[0]], told)
    total = sum(map(len, sequences))
    assert (filled.sequences, filled.tokens) == (len(sequences), total)
    assert told.total == told.updates[-1][0] == total
    assert told.updates == sorted(told.updates, key=lambda update: update[0])
    assert all(remark.count("tokens/s") == 1 for _, remark in told.updates)
    assert told.updates[-1][1].endswith("0 s left")
    again = TopKStore(tmp_path, StoreKey(teacher.fingerprint, TOP_K, "float32"))
    for ids in sequences:
        assert_same(again.get(ids), expected(live, ids))
    asked = server.tokens_asked
    assert fill_store(again, teacher, sequences).tokens == 0
    assert server.tokens_asked == asked
    assert all(times(server, ids) == 1 for ids in sequences)


def test_a_live_teacher_fills_a_store_by_the_same_call(
    live: LiveTeacher, sequences: list[np.ndarray], tmp_path: Path
) -> None:
    told = Told()
    store = TopKStore(tmp_path, StoreKey(live.fingerprint, TOP_K, "float32"))
    assert fill_store(store, live, sequences, told).sequences == len(sequences)
    assert told.updates[-1][0] == told.total == sum(map(len, sequences))


@pytest.mark.parametrize("kind", APIS)
def test_a_server_that_dies_loses_nothing_and_is_asked_for_nothing_twice(
    kind: str, serve: Serve, live: LiveTeacher, sequences: list[np.ndarray], tmp_path: Path
) -> None:
    server, teacher = serve(kind, tokens_per_request=1, concurrency=2, retries=1)
    store = open_store(tmp_path, teacher)
    server.faults.die_after = 7
    words = r"no answer in \d tries.*tokens arrived and are stored in .*asks for the rest alone"
    with pytest.raises(ServerError, match=words):
        fill_store(store, teacher, sequences)
    arrived = [ids for ids in sequences if ids in store]
    assert len(arrived) >= 5
    assert len(arrived) < len(sequences)
    assert all(times(server, ids) == 1 for ids in arrived)
    # What was scored and did not arrive is what was under way: at most two.
    assert sum(times(server, ids) > 0 for ids in sequences) <= len(arrived) + 2
    second, teacher = serve(kind, tokens_per_request=1, concurrency=2)
    store = open_store(tmp_path, teacher)
    assert all(ids in store for ids in arrived)
    fill_store(store, teacher, sequences)
    assert not any(times(second, ids) for ids in arrived)
    for ids in sequences:
        assert_same(store.get(ids), expected(live, ids))


def test_a_client_that_is_killed_keeps_what_arrived(
    serve: Serve, sequences: list[np.ndarray], tmp_path: Path
) -> None:
    server, teacher = serve("vllm", tokens_per_request=1, concurrency=1)
    store = open_store(tmp_path, teacher)

    class Killed(BaseException):
        pass

    class Reporter:
        @contextlib.contextmanager
        def progress(self, title: str, total: int) -> Iterator[Callable[[int, str], None]]:
            def update(done: int, remark: str) -> None:
                if done > 100:
                    raise Killed

            yield update

    with pytest.raises(Killed):
        fill_store(store, teacher, sequences, Reporter())
    # As after kill -9: nothing but the folder is left.
    again = open_store(tmp_path, teacher)
    arrived = [ids for ids in sequences if ids in again]
    assert arrived
    fill_store(again, teacher, sequences)
    assert all(times(server, ids) == 1 for ids in arrived)
    assert all(ids in again for ids in sequences)


def test_after_kill_9_nothing_that_arrived_is_asked_for_again(
    serve: Serve, live: LiveTeacher, sequences: list[np.ndarray], tmp_path: Path
) -> None:
    server, teacher = serve("sglang", Faults(slow=0.2))
    np.save(tmp_path / "ids.npy", np.array(sequences, dtype=object), allow_pickle=True)
    folder = tmp_path / "store"
    code = (
        "import sys, numpy, pathlib\n"
        "from xtoken.teachers.served import ServedTeacher, fill_store, open_store\n"
        "url, folder = sys.argv[1:]\n"
        "ids = list(numpy.load(pathlib.Path(folder).parent / 'ids.npy', allow_pickle=True))\n"
        "vocab = pathlib.Path(folder).parent / 'tokenizer'\n"
        f"teacher = ServedTeacher(url, vocab=str(vocab), top_k={TOP_K}, api='sglang',\n"
        "                        tokens_per_request=1, concurrency=1)\n"
        "fill_store(open_store(folder, teacher), teacher, ids)\n"
    )
    server.tokenizer.save_pretrained(tmp_path / "tokenizer")
    process = Forked(code, server.url, folder)
    try:
        _until(
            lambda: len(list(folder.glob("*.safetensors"))) >= 3 or process.returncode is not None,
            seconds=120,
        )
    finally:
        process.kill()
        _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    time.sleep(0.3)  # what the server still scores for the dead
    server.faults.slow = 0
    store = open_store(folder, teacher)
    arrived = [ids for ids in sequences if ids in store]
    assert 3 <= len(arrived) < len(sequences)
    before = {ids.tobytes(): times(server, ids) for ids in arrived}
    filled = fill_store(store, teacher, sequences)
    assert filled.sequences == len(sequences) - len(arrived)
    assert before == {ids.tobytes(): times(server, ids) for ids in arrived}
    assert set(before.values()) == {1}
    for ids in sequences:
        assert_same(store.get(ids), expected(live, ids))


def test_small_files_are_merged_when_they_make_a_large_one(serve: Serve, tmp_path: Path) -> None:
    server, teacher = serve("sglang", tokens_per_request=4000, top_k=2, max_model_len=512)
    rng = np.random.default_rng(0)
    count = TOKENS_PER_SHARD // 400 + 4
    many = [rng.integers(0, 800, 400) for _ in range(count)]
    store = open_store(tmp_path, teacher)
    fill_store(store, teacher, many)
    files = list(tmp_path.glob("*.safetensors"))
    assert len(files) == 1  # the last answer completed it
    again = open_store(tmp_path, teacher)
    assert all(ids in again for ids in many)
    assert server.requests < count


def test_a_folder_is_of_one_model(
    serve: Serve, sequences: list[np.ndarray], tmp_path: Path
) -> None:
    _, teacher = serve("vllm")
    fill_store(open_store(tmp_path, teacher), teacher, sequences[:2])
    _, other = serve("vllm", model=other_model(800))
    with pytest.raises(StoreError, match=r"was filled by tiny-teacher .*use another folder"):
        open_store(tmp_path, other)
    with pytest.raises(StoreError, match="has top_k = '16', expected '8'"):
        open_store(tmp_path, serve("vllm", top_k=8)[1])
    with pytest.raises(StoreError, match="this one is"):
        fill_store(open_store(tmp_path, teacher), other, sequences)
    (tmp_path / "served.json").write_text("{}")
    with pytest.raises(StoreError, match="does not describe a served teacher"):
        open_store(tmp_path, teacher)


def test_a_server_that_rounds_otherwise_is_recognised(
    serve: Serve, sequences: list[np.ndarray], live: LiveTeacher, tmp_path: Path
) -> None:
    _, teacher = serve("vllm")
    store = open_store(tmp_path, teacher)
    fill_store(store, teacher, sequences[:3])
    low = LlamaForCausalLM(live.model.config)
    low.load_state_dict(live.model.state_dict())
    _, again = serve("sglang", model=low.to(torch.bfloat16))
    assert again.fingerprint != teacher.fingerprint
    store = open_store(tmp_path, again)
    assert again.fingerprint == teacher.fingerprint == store.key.teacher
    assert fill_store(store, again, sequences[:3]).tokens == 0


def test_the_fingerprint_is_that_of_the_answer_not_of_the_client(
    serve: Serve, tmp_path: Path
) -> None:
    _, one = serve("vllm")
    _, two = serve("vllm-tokens", top_k=4, concurrency=1)
    assert one.fingerprint == two.fingerprint
    assert len(one.fingerprint) == 32
    one.probe.save(tmp_path / "p.json")
    assert Probe.load(tmp_path / "p.json") == one.probe
    assert serve("vllm", model=other_model(800))[1].fingerprint != one.fingerprint


def test_pace_is_told_in_words() -> None:
    assert pace(0, 100, 1.0) == ""
    assert pace(1000, 3000, 2.0) == "500 tokens/s, 4 s left"
    assert pace(1000, 1_000_000, 1.0) == "1,000 tokens/s, 17 min left"
    assert pace(1000, 100_000_000, 1.0) == "1,000 tokens/s, 27.8 h left"


# As a live source.


def batches_of(sequences: list[np.ndarray], size: int = 3) -> list[list[np.ndarray]]:
    return [sequences[start : start + size] for start in range(0, len(sequences), size)]


@pytest.mark.parametrize("stored", [False, True])
def test_a_head_start_changes_no_signal_and_asks_for_nothing_twice(
    stored: bool, serve: Serve, sequences: list[np.ndarray], tmp_path: Path
) -> None:
    server, teacher = serve("vllm")
    store = open_store(tmp_path, teacher) if stored else None
    order = batches_of(sequences)
    wanted = {
        ids.tobytes(): item
        for ids, item in zip(sequences, teacher.predictions(sequences), strict=True)
    }
    server.asked.clear()
    with PrefetchedTeacher(teacher, iter(order), store=store) as source:
        for batch in order:
            ids, mask = padded(batch, "right")
            signal = source.signal(ids, mask)
            for row, sequence in enumerate(batch):
                item = wanted[sequence.tobytes()]
                found = signal.log_probs[row, : len(sequence)].numpy()
                # What a sequence is answered with decides the last digits.
                np.testing.assert_allclose(found, item.log_probs, rtol=0, atol=1e-5)
    # A store also answers the beginning of what it holds.
    begins = [
        any(len(other) > len(ids) and np.array_equal(other[: len(ids)], ids) for other in sequences)
        for ids in sequences
    ]
    asked = [times(server, ids) for ids in sequences]
    for count, beginning in zip(asked, begins, strict=True):
        assert count == 1 or (stored and beginning and count == 0)
    if store is not None:
        assert all(ids in store for ids in sequences)
        with PrefetchedTeacher(teacher, iter(order), store=store) as source:
            source.signal(*padded(order[0], "left"))
        assert [times(server, ids) for ids in sequences] == asked


def test_the_head_start_is_bounded_and_real(serve: Serve, sequences: list[np.ndarray]) -> None:
    server, teacher = serve("vllm")
    _ = teacher.question
    order = batches_of(sequences, 2)
    with PrefetchedTeacher(teacher, iter(order), ahead=2) as source:
        _until(lambda: len(server.asked) == 4)
        time.sleep(0.2)
        assert len(server.asked) == 4  # two batches, without a call
        source.signal(*padded(order[0], "right"))
        _until(lambda: len(server.asked) == 6)
        # Another order, and what was never announced, are answered too.
        source.signal(*padded(order[4], "right"))
        stranger = np.array([3, 4, 5, 6])
        source.signal(*padded([stranger, order[1][0]], "right"))
        for batch in (order[1], order[2], order[3], order[5]):
            source.signal(*padded(batch, "right"))
    repeated = [ids for ids, count in server.asked.items() if count > 1]
    assert repeated in (
        [],
        [(*order[1][0].tolist(), int(order[1][0][-1]))],
    )  # used twice, announced once


def _until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_server_that_dies_behind_a_head_start_ends_the_call_that_waits(
    serve: Serve, sequences: list[np.ndarray]
) -> None:
    server, teacher = serve("vllm", retries=1)
    _ = teacher.question
    order = batches_of(sequences, 2)
    with PrefetchedTeacher(teacher, iter(order), ahead=1) as source:
        source.signal(*padded(order[0], "right"))
        server.kill()
        with pytest.raises(ServerError, match="gave no answer"):
            _signals(source, order[1:])


def _signals(source: PrefetchedTeacher, order: list[list[np.ndarray]]) -> None:
    for batch in order:
        source.signal(*padded(batch, "right"))


def test_a_head_start_needs_a_place() -> None:
    teacher = ServedTeacher("http://127.0.0.1:1", vocab=800, top_k=4)
    with pytest.raises(OptionError, match="ahead = 0"):
        PrefetchedTeacher(teacher, [], ahead=0)


def test_what_is_announced_is_asked_for_at_once_and_kept_for_two_calls(
    serve: Serve, sequences: list[np.ndarray]
) -> None:
    server, teacher = serve("vllm")
    _ = teacher.question
    first, second, third, fourth = batches_of(sequences, 3)[:4]
    with PrefetchedTeacher(teacher) as source:
        source.announce([*first, *second])
        source.announce([*third, np.empty(0, np.int64)])
        _until(lambda: len(server.asked) == 9)  # without a call
        for batch in (first, second, first, third, third):
            source.signal(*padded(batch, "right"))
        assert set(server.asked.values()) == {1}
        source.announce([*third, *fourth])  # the first ones are forgotten
        for batch in (third, fourth, fourth):
            source.signal(*padded(batch, "right"))
        assert set(server.asked.values()) == {1}
        source.signal(*padded(first, "right"))
        assert [times(server, ids) for ids in first] == [2, 2, 2]
    with pytest.raises(ServerError, match="was closed"):
        source.announce(first)


def test_a_server_that_fails_fails_the_calls_that_wait_and_no_later_one(
    serve: Serve, sequences: list[np.ndarray]
) -> None:
    server, teacher = serve("vllm", Faults(error_status=503), retries=0)
    _ = teacher.question
    first, second = batches_of(sequences, 2)[:2]
    server.faults.errors = 1
    with PrefetchedTeacher(teacher) as source:
        source.announce(first)
        with pytest.raises(ServerError):
            source.signal(*padded(first, "right"))
        _until(lambda: source._worker is None)
        server.faults.errors = 0
        source.announce(second)
        _signals(source, [first, second])
    assert {times(server, ids) for ids in (*first, *second)} <= {1, 2}
