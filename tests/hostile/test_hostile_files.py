"""Every flipped bit and every cut of a file that we write is found, or changes nothing."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from drawing import count, generator, silent_damages
from tiny_models import tiny_texts, write_jsonl, write_pair
from tokenizer_zoo import byte_level_bpe, sentencepiece_bpe

from xtoken import Aligner, Pair, Projection, Vocab
from xtoken.cli.align_corpus import Corpus, align_corpus
from xtoken.data import split_held_out
from xtoken.errors import ResumeError
from xtoken.teachers import StoreKey, TopKStore
from xtoken.teachers.shard import Predictions, Shard, write_shard
from xtoken.training import DistillConfig, load_models, open_teachers, prepare, train
from xtoken.training.checkpoints import find_checkpoints
from xtoken.training.run_files import RUN_FILE
from xtoken.vocab.side import Side

TEXTS = ["The year 201, and 1991 ▁\n", "नमस्ते 世界 👩‍👧 <|end_of_text|>"]
CONFIG = DistillConfig(
    steps=4, batch_size=2, top_k=16, teacher_top_k=16, max_tokens=32, warmup_steps=1,
    checkpoint_every=2, learning_rate=3e-3, device="cpu", curves=False,
)  # fmt: skip


def content_of(projection: Projection) -> tuple[object, ...]:
    arrays = ("indptr", "indices", "weights", "rules", "pieces_indptr", "pieces")
    optional = ("teacher_pieces_indptr", "teacher_pieces")
    return (
        projection.shape,
        projection.options,
        projection.pair,
        projection.model_fingerprint,
        projection.student_model_fingerprint,
        *(getattr(projection, name).tobytes() for name in arrays),
        *(
            None if (array := getattr(projection, name)) is None else array.tobytes()
            for name in optional
        ),
    )


def vocab_content(vocab: Vocab) -> tuple[object, ...]:
    return vocab.fingerprint, vocab.model_fingerprint, vocab.roles, vocab.special_tokens


def test_no_damage_of_a_projection_is_silent(tmp_path: Path) -> None:
    path = tmp_path / "projection.safetensors"
    pair = byte_level_bpe(900, 3), byte_level_bpe(700, 1)
    Projection.build(*pair, cache_dir=False).save(path)
    rng = generator("projection")
    silent, found = silent_damages(
        path, lambda: content_of(Projection.load(path)), rng, count(150, 5000)
    )
    assert not silent
    assert found


def test_no_damage_of_an_exported_table_is_silent(tmp_path: Path) -> None:
    path = tmp_path / "table.pt"
    pair = [Vocab.from_tokenizer(one) for one in (byte_level_bpe(900, 3), byte_level_bpe(700, 1))]
    Projection.build(*pair, cache_dir=False).export_topk_pt(path)

    def read() -> object:
        return content_of(Projection.import_topk_pt(path, *pair))

    silent, found = silent_damages(path, read, generator("table"), count(150, 5000))
    assert not silent
    assert found


def pair_content(folder: Path) -> tuple[object, ...]:
    pair = Pair.load(folder)
    return (
        pair.fingerprint,
        content_of(pair.projection),
        vocab_content(pair.student_vocab),
        vocab_content(pair.teacher_vocab),
        tuple(str(side.encode(TEXTS)) for side in pair.sides),
        tuple(side.label for side in pair.sides),
        tuple(str(getattr(side.tokenizer, "chat_template", None)) for side in pair.sides),
    )


def test_no_damage_of_a_saved_pair_is_silent(tmp_path: Path) -> None:
    student, _ = write_pair(tmp_path / "models")
    pair = Pair(str(student), sentencepiece_bpe(700), cache_dir=False, top_k=3)
    pair.save(tmp_path / "pair")
    files = sorted(path for path in (tmp_path / "pair").rglob("*") if path.is_file())
    names = {path.name for path in files}
    assert {"pair.json", "student.vocab", "tokenizer_config.json", "tokenizer.json"} <= names
    rng = generator("pair")
    for path in files:
        silent, found = silent_damages(
            path, lambda: pair_content(tmp_path / "pair"), rng, count(20, 600)
        )
        assert not silent
        assert found


def test_no_damage_of_stored_predictions_is_silent(tmp_path: Path) -> None:
    generator_ = np.random.default_rng(0)
    predictions = []
    for length in (5, 1, 7):
        logits = generator_.normal(size=(length, 40))
        log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        ids = np.argsort(-log_probs, axis=-1)[:, :6]
        top = np.take_along_axis(log_probs, ids, -1).astype(np.float32)
        predictions.append(Predictions(ids, top, log_probs[:, 0].astype(np.float32)))
    key = StoreKey("t" * 32, 6, "float32", "v" * 64)
    path = tmp_path / "shard.safetensors"
    sequences = [np.arange(len(item.ids)) for item in predictions]
    write_shard(path, key, [bytes([i]) * 16 for i in range(3)], sequences, predictions)

    def read() -> object:
        shard = Shard(path, key)
        parts = [shard.read(index) for index in range(3)]
        values = [
            (p.ids.tobytes(), p.log_probs.tobytes(), p.token_log_probs.tobytes()) for p in parts
        ]
        return shard.digests, values

    silent, found = silent_damages(path, read, generator("shard"), count(300, 20_000))
    assert not silent
    assert found


@pytest.fixture(name="run", scope="module")
def _run(tmp_path_factory: pytest.TempPathFactory):
    """A finished run with its checkpoints and its store, and what it was made from."""
    folder = tmp_path_factory.mktemp("run")
    materials = prepare(
        load_models(*write_pair(folder / "models")), split_held_out(tiny_texts(12), 0.2), CONFIG
    )
    teacher = open_teachers(materials, CONFIG, [CONFIG.loss], folder / "cache")[CONFIG.loss]
    train(materials, CONFIG, teacher, folder / "run")
    return materials, teacher, folder


def test_no_damage_of_a_checkpoint_is_silent(run) -> None:
    _, _, folder = run
    newest = find_checkpoints(folder / "run").whole
    assert newest is not None

    def read() -> object:
        found = find_checkpoints(folder / "run").whole
        # The one before it stands in: the damage was found, and the run loses two steps.
        if found is None or found.step != newest.step:
            raise ResumeError("passed over")
        return found

    rng = generator("checkpoint")
    for path in sorted(newest.path.rglob("*")):
        silent, found = silent_damages(path, read, rng, count(8, 300))
        assert not silent
        assert found or path.name == RUN_FILE


def result_content(result) -> str:
    return repr((result.loss, result.before, result.after, result.steps, result.records))


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl", "SHA256SUMS", "run.json"])
def test_no_damage_of_what_a_finished_run_is_read_from_is_silent(run, name: str) -> None:
    materials, teacher, folder = run
    out = folder / "run"

    def read() -> object:
        return result_content(train(materials, CONFIG, teacher, out, resume=True))

    kept = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    silent, _ = silent_damages(out / name, read, generator(name), count(12, 200))
    assert not silent
    # Nothing else was touched.
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == kept


@pytest.mark.parametrize("name", ["student/model.safetensors", "projection.safetensors"])
def test_a_finished_run_without_what_it_made_is_not_taken_for_one(
    run, name: str, tmp_path: Path
) -> None:
    materials, teacher, folder = run
    out = tmp_path / "run"
    shutil.copytree(folder / "run", out)
    (out / name).write_bytes(b"")
    with pytest.raises(ResumeError, match=f"{name} is missing or was altered"):
        train(materials, CONFIG, teacher, out, resume=True)
    (out / name).unlink()
    with pytest.raises(ResumeError, match=f"{name} is missing or was altered"):
        train(materials, CONFIG, teacher, out, resume=True)


def test_no_damage_of_the_metrics_under_a_checkpoint_is_silent(run, tmp_path: Path) -> None:
    from xtoken.training.checkpoints import _find_start

    _, _, folder = run
    out = tmp_path / "run"
    shutil.copytree(folder / "run", out)
    (out / "result.json").unlink()
    newest = find_checkpoints(out).whole
    assert newest is not None

    def read() -> object:
        start = _find_start(out, newest.run)
        return start.checkpoint == newest, [r for r in start.records if "ce" in r]

    silent, found = silent_damages(
        out / "metrics.jsonl", read, generator("prefix"), count(100, 3000)
    )
    assert not silent
    assert found


def test_every_file_that_a_run_leaves_is_in_its_sums(run) -> None:
    out = run[2] / "run"
    lines = (out / "SHA256SUMS").read_text().splitlines()
    sums = {name: checksum for checksum, name in (line.split("  ") for line in lines)}
    for name, checksum in sums.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == checksum
    left = {
        path.relative_to(out).as_posix()
        for path in out.rglob("*")
        if path.is_file() and "checkpoint-" not in str(path.relative_to(out))
    }
    assert left - set(sums) == {"SHA256SUMS", ".lock", "run.json"}


def test_a_damaged_settings_file_is_refused_or_read_as_what_it_says(tmp_path: Path) -> None:
    """It is a file that people edit: a digit may be another one, and nothing else is taken."""
    path = tmp_path / "config.json"
    CONFIG.save(path)
    content = json.loads(path.read_text())

    def read() -> object:
        settings = DistillConfig.load(path)
        # What was read is what stands there.
        assert settings == replace(DistillConfig(), **json.loads(path.read_text("utf-8-sig")))
        return None

    silent, found = silent_damages(path, read, generator("config"), count(300, 10_000))
    assert not silent
    assert found
    assert content == json.loads(CONFIG.to_json())


def test_no_damage_of_a_store_survives_its_opening(run, tmp_path: Path) -> None:
    materials, teacher, _ = run
    shutil.copytree(teacher.directory, tmp_path / "store")
    (path, *_) = sorted((tmp_path / "store").glob("*.safetensors"))
    content = path.read_bytes()
    sequences = [example.teacher_ids for example in materials.train.examples]
    live = materials.models.load_teacher(torch.device("cpu"))
    expected = [teacher.get(ids).log_probs.tobytes() for ids in sequences]
    rng = generator("store")
    for _ in range(count(3, 60)):
        at = rng.randrange(len(content))
        path.write_bytes(content[:at] + bytes((content[at] ^ 4,)) + content[at + 1 :])
        store = TopKStore(tmp_path / "store", teacher.key)
        assert store.files_discarded == 1
        store.fill(live, sequences)
        assert [store.get(ids).log_probs.tobytes() for ids in sequences] == expected


def test_a_damaged_part_of_an_aligned_corpus_is_made_again(tmp_path: Path) -> None:
    pair = byte_level_bpe(900, 3), byte_level_bpe(700, 1)
    sides = Side("student", pair[0]), Side("teacher", pair[1])
    aligner = Aligner(*pair, threads=1)
    source = write_jsonl(tmp_path / "texts.jsonl", tiny_texts(10))
    corpus = Corpus(source, "text", tmp_path / "out", 5, False)
    expected = align_corpus(corpus, aligner, *sides)
    assert (expected.files, expected.made_now) == (2, 2)
    state = tmp_path / "out" / ".xtoken-align"
    for path in (tmp_path / "out" / "part-00001.parquet", state / "part-00000.json"):
        content, made = path.read_bytes(), 0

        def read() -> object:
            nonlocal made
            found = align_corpus(corpus, aligner, *sides)
            made += found.made_now
            return found.coverage, found.rows, path.read_bytes()  # noqa: B023

        silent, _ = silent_damages(path, read, generator(path.name), count(15, 300))
        assert not silent
        assert made >= count(15, 300) - 3  # zeros over zeros are no damage
        assert path.read_bytes() == content
    claim = state / "claim.json"
    silent, found = silent_damages(claim, read, generator("claim"), count(10, 200))
    assert not silent
    assert found
