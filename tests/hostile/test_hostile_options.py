"""Options of any value are refused where they are given, or give finite answers."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import random
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from drawing import count, generator
from loss_cases import make_case
from tokenizer_zoo import byte_level_bpe

from xtoken import Aligner, OptionError, Pair, Projection, Vocab, XTokenError
from xtoken.data import make_examples
from xtoken.distillation import DistillCollator, Distiller
from xtoken.distillation.options import LOSS_FIELDS, LOSS_NAMES, DistillerOptions
from xtoken.losses import LOSSES, LossOptions, TeacherTopK
from xtoken.targets import TargetOptions
from xtoken.teachers import teacher_sequences
from xtoken.teachers.teach import SequenceReader
from xtoken.training import DistillConfig, DistillSettings
from xtoken.trie import PieceTrie

NAN, INF = float("nan"), float("inf")
VALUES: tuple[object, ...] = (
    *(None, True, False, 0, 1, 2, 3, 5, -1, 7, 2**31, 2**63, 10**30, 10**400, -(10**400)),
    *(0.0, -0.0, 0.3, 0.5, 1.0, 1.5, -0.5, 1e-300, 5e-324, 1e300, 1e308, NAN, INF, -INF),
    *("", "chain", "last", "mean", "forward", "reverse", "jsd", "auto", "balanced", "chunk", "1"),
    *("microbatch", "right", "left", "cpu", "bf16", "no", "float32", "2026-01-01", "\ud800", "\n"),
    *(b"1", [], (), {}, [1.0], (0.5, 1.0), [NAN], [INF], ["1"], [True], {"a": 1}, {1, 2}, object()),
    *(np.int64(3), np.float32(0.5), np.float64(NAN), np.bool_(True), np.array([1, 2])),
    *(torch.tensor(2), torch.tensor(0.5), torch.tensor([1.0, 2.0]), int, 1j),
)


# Values that are right, so that draws get beyond the first check.
RIGHT: dict[str, tuple[object, ...]] = {
    "direction": ("forward", "reverse", "jsd"),
    "merge": ("chain", "last", "mean"),
    "top_k_scope": ("chunk", "microbatch"),
    "tail_bucket": (True, False, "auto"),
    "padding_side": ("left", "right"),
    "reverse": (True, "all", "off"),
    "loss": LOSS_NAMES,
    **dict.fromkeys(("temperature", "kd_weight", "ce_weight"), (1, 0.5, 2, 1e9, 10**8, 1e-9)),
    **dict.fromkeys(("common_weight", "uld_weight", "depth_weights"), (0, 1.5, 1e9, 10**8)),
    **dict.fromkeys(
        ("beta", "min_mass", "threshold", "decay", "name_similarity"), (0.1, 1e-9, 0.99)
    ),
    **dict.fromkeys(
        ("top_k", "max_depth", "block_size", "max_pieces", "max_tokens"), (1, 3, 10**17)
    ),
    **dict.fromkeys(("end", "mirror", "full_metrics", "learnable_projection"), (True, False)),
    **dict.fromkeys(("threads", "pad_to_multiple_of", "vocab_size", "student_pad_id"), (1, 2, 5)),
}


def options(rng: random.Random, names: tuple[str, ...], most: int = 3) -> dict[str, Any]:
    chosen = rng.sample(names, min(len(names), rng.randrange(1, most + 1)))
    return {
        name: rng.choice(RIGHT[name] if name in RIGHT and rng.random() < 0.7 else VALUES)
        for name in chosen
    }


def only_option_errors(
    call: Callable[[random.Random, list[object]], str], name: str, number: int, least: float = 0.02
) -> None:
    rng = generator(name)
    fallen: dict[str, str] = {}
    outcomes: collections.Counter[str] = collections.Counter()
    for _ in range(number):
        given: list[object] = []
        try:
            outcomes[call(rng, given)] += 1
        except XTokenError as error:
            outcomes[type(error).__name__] += 1
            if "\n" in str(error):
                fallen[f"of many lines: {str(error)[:200]!r}"] = repr(given)
        except BaseException as error:  # a panic is no Exception
            frames = traceback.extract_tb(error.__traceback__)
            ours = [frame for frame in frames if "xtoken" in frame.filename] or frames
            place = f"{ours[-1].filename.rpartition('/')[2]}:{ours[-1].lineno} {ours[-1].line}"
            fallen[f"{type(error).__name__} at {place}"] = f"{str(error)[:90]} for {given}"[:300]
    assert not fallen, "\n".join(f"{place}: {text}" for place, text in fallen.items())
    assert outcomes["accepted"] > least * number, outcomes
    print(name, dict(outcomes))


LOSS_FIELD_NAMES = tuple(field.name for field in dataclasses.fields(LossOptions))


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_options_are_refused_or_give_a_finite_loss_and_gradient(loss: str) -> None:
    case = make_case(0, dtype=torch.float32)
    ids = {"student_ids": case.student_ids, "teacher_ids": case.teacher_ids}
    read = LOSSES[loss].options - {"compiled"}  # seconds of the compiler for each draw
    names = tuple(name for name in LOSS_FIELD_NAMES if name in read)
    pair = case.shared if loss == "same-vocab-kl" else case.pair
    if loss in ("prefix-kl", "exact-kl"):  # they read tries
        names = ()  # which test_a_distiller_is_refused_or_gives_a_finite_loss has

    def call(rng: random.Random, given: list[object]) -> str:
        chosen = options(rng, names or LOSS_FIELD_NAMES)
        given.append(chosen)
        LossOptions(**chosen)
        if not names:
            return "accepted"
        if rng.random() < 0.3:
            given.append("normalizer")
            chosen["normalizer"] = rng.choice(VALUES)
        output = case.loss(loss, pair=pair, **ids, **chosen)
        assert torch.isfinite(output.loss), output.loss
        (gradient,) = torch.autograd.grad(output.loss, case.student_logits)
        assert torch.isfinite(gradient).all()
        assert all(torch.isfinite(value).all() for value in output.metrics.values())
        return "accepted"

    only_option_errors(call, f"options of {loss}", count(250, 10_000))


def test_settings_of_a_run_are_refused_or_survive_json() -> None:
    names = tuple(field.name for field in dataclasses.fields(DistillConfig))

    def call(rng: random.Random, given: list[object]) -> str:
        chosen = options(rng, names)
        given.append(chosen)
        config = DistillConfig(**chosen)
        assert DistillConfig.from_json(config.to_json()) == config
        for name in names:
            value = getattr(config, name)
            assert not isinstance(value, float) or np.isfinite(value), name
        return "accepted"

    only_option_errors(call, "DistillConfig", count(2000, 100_000))


def test_corrections_of_targets_are_refused_or_survive_json() -> None:
    names = tuple(field.name for field in dataclasses.fields(TargetOptions))

    def call(rng: random.Random, given: list[object]) -> str:
        chosen = options(rng, names)
        given.append(chosen)
        made = TargetOptions(**chosen)
        assert TargetOptions(**json.loads(json.dumps(dataclasses.asdict(made)))) == made
        return "accepted"

    only_option_errors(call, "TargetOptions", count(2000, 100_000))


def vocabs() -> tuple[Vocab, Vocab]:
    one, other = (Vocab.from_tokenizer(x) for x in (byte_level_bpe(500), byte_level_bpe(400, 1)))
    return one, other


def test_a_projection_is_refused_or_its_rows_are_distributions() -> None:
    pair = vocabs()
    names = (
        *("top_k", "decay", "max_pieces", "canonical", "reverse", "special_roles"),
        *("name_similarity", "threads"),
    )
    roles = (
        {"bos": None}, {"eot": ("<|end_of_text|>", 1)}, {"eot": (0, 10**30)}, {"eot": (None, 1)},
        {"eot": 1}, {1: (1, 1)}, {"x": ("\ud800", 0)}, {"x": (True, 1)}, {"x": (1.5, 1)},
        [("a", 1)],
    )  # fmt: skip
    canonical = (["case"], "case", ["nothing"], [1], {"punctuation_space"}, "\ud800", [["case"]])

    def call(rng: random.Random, given: list[object]) -> str:
        chosen = options(rng, names)
        if "special_roles" in chosen and rng.random() < 0.8:
            chosen["special_roles"] = rng.choice(roles)
        if "canonical" in chosen and rng.random() < 0.8:
            chosen["canonical"] = rng.choice(canonical)
        chosen.setdefault("threads", 1)
        given.append(chosen)
        w = Projection.build(*pair, cache_dir=False, **chosen)
        sums = w.csr.row_sums()[np.diff(w.indptr) > 0]
        assert np.abs(sums - 1).max() < 1e-5
        assert (w.weights > 0).all()
        return "accepted"

    only_option_errors(call, "Projection.build", count(300, 10_000))


def test_a_distiller_is_refused_or_gives_a_finite_loss() -> None:
    pair = Pair(*vocabs(), cache_dir=False, threads=1)
    names = tuple(DistillerOptions.__annotations__)
    assert set(LOSS_FIELDS) < set(names)
    names = tuple(name for name in names if name != "compiled")
    ids = [[1, 40, 80, 201], [300, 7]], [[1, 40, 80, 201], [300, 7]]
    teacher = torch.randn(2, 4, 400, generator=torch.Generator().manual_seed(0))
    student = torch.randn(2, 4, 500, generator=torch.Generator().manual_seed(1))

    def call(rng: random.Random, given: list[object]) -> str:
        loss = rng.choice(LOSS_NAMES) if rng.random() < 0.9 else rng.choice(VALUES)
        chosen = options(rng, names)
        given += [loss, chosen]
        distiller = Distiller(pair, loss, **chosen)  # type: ignore[arg-type]
        batch = distiller.batch(*ids)
        width = batch.student_ids.shape[1]
        if width > 1000:  # padded to a multiple that somebody asked for
            return "accepted"
        logits = torch.zeros(2, width, 500)
        kept = min(4, width)  # max_tokens may cut
        logits[:, :kept] = student[:, :kept]
        others = torch.zeros(2, batch.teacher_ids.shape[1], 400)
        kept = min(4, others.shape[1])
        others[:, :kept] = teacher[:, :kept]
        output = distiller(logits.requires_grad_(), others, batch)
        output.loss.backward()
        assert torch.isfinite(output.loss)
        assert logits.grad is not None
        assert torch.isfinite(logits.grad).all()
        return "accepted"

    only_option_errors(call, "Distiller", count(400, 20_000))


@pytest.mark.parametrize("value", [1, 0, -1, 2.5, "2", True, NAN, [2], 10**30])
def test_a_limit_of_tokens_is_a_whole_number_wherever_it_is_given(value: object) -> None:
    tokenizers = byte_level_bpe(500), byte_level_bpe(400, 1)
    pair = Pair(*tokenizers, cache_dir=False, threads=1)
    calls: dict[str, Callable[..., object]] = {
        "examples": functools.partial(pair.examples, ["a text"]),
        "tokenize": functools.partial(pair.tokenize, {"text": ["a text"]}),
        "make_examples": functools.partial(make_examples, ["a text"], *tokenizers),
        "distiller": pair.distiller,
        "SequenceReader": functools.partial(SequenceReader, tokenizers[1]),
        "teacher_sequences": functools.partial(teacher_sequences, ["a text"], tokenizers[1]),
        "DistillSettings": DistillSettings,
        "DistillConfig": DistillConfig,
    }
    for call in calls.values():
        with pytest.raises(OptionError, match=r"max_tokens = .* expected ") as error:
            call(max_tokens=value)
        assert "\n" not in str(error.value)
    if value == 1:
        del calls["DistillConfig"]  # whose settings are those of JSON
        made = {name: call(max_tokens=np.int64(2)) for name, call in calls.items()}
        assert type(made["distiller"].max_tokens) is int  # type: ignore[attr-defined]
        assert type(made["DistillSettings"].max_tokens) is int  # type: ignore[attr-defined]


@pytest.mark.parametrize("documents", [None, 5, "a text", b"a text", {"text": "a"}, {1}, iter("a")])
def test_documents_are_a_list(documents: object) -> None:
    pair = Pair(byte_level_bpe(500), byte_level_bpe(400, 1), cache_dir=False, threads=1)
    with pytest.raises(XTokenError, match=r"documents is a \w+, expected a list of texts"):
        pair.examples(documents)  # type: ignore[arg-type]
    texts = np.array(["a text", "another"], dtype=object)
    assert len(pair.examples(texts)) == 2  # type: ignore[arg-type]


def test_a_collator_an_aligner_and_a_signal_are_refused_or_work() -> None:
    pair = vocabs()
    example = Pair(*pair, cache_dir=False, threads=1).distiller("p-kl")
    texts = example.batch([[1, 2]], [[1, 2]])
    assert len(texts) == 1
    logits = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(0))

    def call(rng: random.Random, given: list[object]) -> str:
        kind = rng.randrange(4)
        given.append(kind)
        if kind == 0:
            chosen = options(
                rng, ("student_pad_id", "teacher_pad_id", "padding_side", "pad_to_multiple_of")
            )
            given.append(chosen)
            DistillCollator(**chosen)
        elif kind == 1:
            chosen = options(rng, ("role_pairs", "whole_characters", "threads"))
            given.append(chosen)
            Aligner(*pair, **chosen).align([1, 2], [1, 2])
        elif kind == 2:
            chosen = options(rng, ("vocab_size", "temperature"), 2)
            k = rng.choice(VALUES)
            given += [k, chosen]
            signal = TeacherTopK.from_logits(logits, k, **chosen)  # type: ignore[arg-type]
            assert torch.isfinite(signal.log_probs).all()
        else:
            chosen = options(rng, ("side", "threads"))
            given.append(chosen)
            PieceTrie.build(*pair, **chosen)
        return "accepted"

    only_option_errors(call, "small classes", count(600, 20_000))
