"""Rule 5 of W: what stops the student goes to what stops the teacher, as sets, both ways."""

from __future__ import annotations

import itertools
import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from xtoken import Aligner, Projection, Vocab
from xtoken.align.alignment import ChunkKind
from xtoken.errors import PairError, TokenIdError
from xtoken.projection.file import read_arrays, write_arrays
from xtoken.targets import TargetBuilder

LETTERS = [b"a", b"b", b"c"]


def side(specials: list[str], roles: dict[str, str], stops: tuple[str, ...] = ()) -> Vocab:
    """A vocabulary of three letters with a family's special tokens."""
    texts = {len(LETTERS) + i: text for i, text in enumerate(specials)}
    ids = {text: i for i, text in texts.items()}
    declared = {role: None for role in ("bos", "eos", "pad", "unk", "eot")}
    vocab = Vocab.from_tokens(
        [*LETTERS, *(b"" for _ in specials)],
        texts,
        ranked=True,
        roles=declared | {role: ids[text] for role, text in roles.items()},
    )
    return vocab.with_stops([ids[text] for text in stops]) if stops else vocab


FAMILIES = {
    "ChatML": side(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"eos": "<|im_end|>", "eot": "<|im_end|>", "pad": "<|endoftext|>"},
    ),
    "ChatML with its generation config": side(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        {"eos": "<|im_end|>", "eot": "<|im_end|>", "pad": "<|endoftext|>"},
        ("<|im_end|>", "<|endoftext|>"),
    ),
    "Gemma-3": side(
        ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"],
        {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>", "eot": "<end_of_turn>"},
    ),
    "Gemma-4, known from its template": side(
        ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>"],
        {"bos": "<bos>", "eos": "<eos>", "pad": "<pad>"},
        ("<turn|>", "<eos>"),
    ),
    "gpt-oss": side(
        ["<|startoftext|>", "<|endoftext|>", "<|return|>", "<|call|>", "<|end|>"],
        {"bos": "<|startoftext|>", "eos": "<|return|>", "pad": "<|endoftext|>", "eot": "<|end|>"},
        ("<|end|>", "<|return|>", "<|endoftext|>", "<|call|>"),
    ),
    "Phi-4-mini": side(
        ["<|endoftext|>", "<|user|>", "<|end|>"],
        {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "pad": "<|endoftext|>", "eot": "<|end|>"},
    ),
    "Llama-3 with the base model's config": side(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
        {"bos": "<|begin_of_text|>", "eos": "<|end_of_text|>", "eot": "<|eot_id|>"},
    ),
    "Llama-3 with its generation config": side(
        ["<|begin_of_text|>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"],
        {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>", "eot": "<|eot_id|>"},
        ("<|eot_id|>", "<|end_of_text|>", "<|eom_id|>"),
    ),
    "GPT-2": side(
        ["<|endoftext|>"],
        dict.fromkeys(("bos", "eos", "pad", "unk"), "<|endoftext|>"),
    ),
}
PAIRS = list(itertools.product(FAMILIES, FAMILIES))


def row(w: Projection, student_id: int) -> list[int]:
    row: list[int] = w.indices[w.indptr[student_id] : w.indptr[student_id + 1]].tolist()
    return row


def folds(w: Projection) -> dict[int, int]:
    assert w.stop_fold_from is not None
    assert w.stop_fold_to is not None
    return dict(zip(w.stop_fold_from.tolist(), w.stop_fold_to.tolist(), strict=True))


@pytest.mark.parametrize(("student_name", "teacher_name"), PAIRS)
def test_each_stop_reaches_a_stop_and_each_stop_of_the_teacher_is_reached_or_folded(
    student_name: str, teacher_name: str
) -> None:
    student, teacher = FAMILIES[student_name], FAMILIES[teacher_name]
    w = Projection.build(student, teacher, cache_dir=False)
    reached = set(w.indices.tolist())
    for stop in student.stops:
        assert row(w, stop)[0] in teacher.stops
        assert len(row(w, stop)) == 1
    folded = folds(w)
    assert set(folded) == set(teacher.stops) - reached
    assert set(folded.values()) <= set(teacher.stops) & reached
    # A probability on all stops of one side stays on stops, whichever token holds it.
    stops = np.zeros(len(student), dtype=np.float32)
    stops[list(student.stops)] = 1 / len(student.stops)
    projected = np.zeros(len(teacher), dtype=np.float32)
    np.add.at(projected, w.indices, w.weights * np.repeat(stops, np.diff(w.indptr)))
    assert projected[list(teacher.stops)].sum() == pytest.approx(1)


@pytest.mark.parametrize(("student_name", "teacher_name"), PAIRS)
def test_any_stop_of_one_side_meets_any_stop_of_the_other_in_a_special_chunk(
    student_name: str, teacher_name: str
) -> None:
    student, teacher = FAMILIES[student_name], FAMILIES[teacher_name]
    aligner = Aligner(student, teacher)
    for s, t in itertools.product(student.stops, teacher.stops):
        chunks = aligner.align([0, 1, s, 2], [0, 1, t, 2])
        kinds = [int(kind) for kind in chunks.kind]
        exact, special = int(ChunkKind.EXACT), int(ChunkKind.SPECIAL)
        assert kinds == [exact, exact, special, exact]


def test_the_end_of_a_turn_goes_to_the_end_of_a_turn_and_eos_to_eos() -> None:
    def target(student: str, text: str, teacher: str) -> str:
        s, t = FAMILIES[student], FAMILIES[teacher]
        ids = {text: i for i, text in s.special_tokens.items()}
        return t.special_tokens[row(Projection.build(s, t, cache_dir=False), ids[text])[0]]

    assert target("ChatML", "<|im_end|>", "Gemma-3") == "<end_of_turn>"
    assert target("ChatML", "<|im_end|>", "Gemma-4, known from its template") == "<turn|>"
    assert target("ChatML", "<|im_end|>", "gpt-oss") == "<|end|>"
    assert target("ChatML", "<|im_end|>", "Phi-4-mini") == "<|end|>"
    assert target("ChatML", "<|im_end|>", "Llama-3 with the base model's config") == "<|eot_id|>"
    assert target("Gemma-3", "<end_of_turn>", "ChatML") == "<|im_end|>"
    assert target("Gemma-3", "<eos>", "gpt-oss") == "<|return|>"
    assert target("GPT-2", "<|endoftext|>", "Gemma-3") == "<eos>"
    assert target("gpt-oss", "<|call|>", "Gemma-3") == "<end_of_turn>"


def test_one_marker_that_is_bos_eos_pad_and_unk_is_distilled_as_the_end() -> None:
    from xtoken.losses import LossInputs, p_kl
    from xtoken.tensors.chunks import ChunkBatch
    from xtoken.tensors.pair_parts import PairParts
    from xtoken.tensors.projection import SparseProjection

    def tokenizer(specials: list[str], **roles: str) -> PreTrainedTokenizerFast:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens(specials)
        return PreTrainedTokenizerFast(tokenizer_object=backend, **roles)

    end = "<|end_of_text|>"
    student = tokenizer([end], bos_token=end, eos_token=end, pad_token=end, unk_token=end)
    teacher = tokenizer(
        ["<|begin_of_text|>", "<|eos|>"], bos_token="<|begin_of_text|>", eos_token="<|eos|>"
    )
    w = Projection.build(student, teacher, decay=0.0, cache_dir=False)
    s, t = student.convert_tokens_to_ids(end), teacher.convert_tokens_to_ids("<|eos|>")
    assert row(w, s) == [t]

    ids = student("abc", add_special_tokens=False).input_ids
    mask = torch.ones(1, len(ids), dtype=torch.bool)
    aligned = Aligner(student, teacher).align(ids, ids)
    chunks = ChunkBatch.from_alignments([aligned]).usable(mask, mask)
    student_logits = torch.full((1, len(ids), len(student)), -30.0)
    teacher_logits = torch.full((1, len(ids), len(teacher)), -30.0)
    student_logits[..., [s, ids[1]]] = 0.0
    teacher_logits[..., [t, ids[1]]] = 0.0
    student_logits.requires_grad_()
    inputs = LossInputs(student_logits, teacher_logits, chunks)
    parts = PairParts(w.shape, projection=SparseProjection.from_projection(w))
    loss = p_kl(inputs, parts).loss
    loss.backward()
    assert student_logits.grad is not None
    assert abs(loss.item()) < 1e-5
    assert abs(student_logits.grad[..., s].sum().item()) < 1e-5


def test_stops_are_kept_in_copies_and_count_in_equality_and_not_in_the_fingerprint() -> None:
    vocab = FAMILIES["Gemma-3"]
    eos, eot = vocab.roles["eos"], vocab.roles["eot"]
    assert vocab.stops == (eot, eos)
    turned = vocab.with_stops([eos])
    assert turned.stops == (eos, eot)
    assert turned != vocab
    assert turned.fingerprint == vocab.fingerprint
    assert pickle.loads(pickle.dumps(turned)) == turned
    assert turned.with_roles({}).stops == (eos, eot)
    assert turned.with_stops([]) == vocab
    with pytest.raises(TokenIdError, match="99"):
        vocab.with_stops([99])


def test_folds_are_saved_with_w_and_a_build_for_other_stops_is_another(tmp_path: object) -> None:
    from pathlib import Path

    assert isinstance(tmp_path, Path)
    student, teacher = FAMILIES["ChatML"], FAMILIES["gpt-oss"]
    w = Projection.build(student, teacher, cache_dir=tmp_path)
    again = Projection.build(student, teacher, cache_dir=tmp_path)
    assert folds(w)
    assert folds(again) == folds(w)
    w.save(tmp_path / "w.safetensors")
    assert folds(Projection.load(tmp_path / "w.safetensors")) == folds(w)
    call = next(i for i, text in teacher.special_tokens.items() if text == "<|call|>")
    other = Projection.build(student, teacher.with_stops([call]), cache_dir=tmp_path)
    assert row(other, student.stops[0]) == [call]
    assert len(list(tmp_path.glob("projection-*.safetensors"))) == 2


@pytest.fixture
def stopping(folder: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A pair whose models both stop at a token more than their tokenizers say."""
    for name, stops in (("student", [1, 50]), ("teacher", [0, 60])):
        shutil.copytree(folder / name, tmp_path / name)
        config = tmp_path / name / "generation_config.json"
        config.write_text(json.dumps({"eos_token_id": stops}))
    return tmp_path / "student", tmp_path / "teacher"


def test_w_that_is_loaded_or_imported_has_the_stops_of_w_that_is_built(
    stopping: tuple[Path, Path], tmp_path: Path
) -> None:
    w = Projection.build(*stopping, cache_dir=False)
    w.save(tmp_path / "w.safetensors")
    w.export_topk_pt(tmp_path / "w.pt")
    loaded = Projection.load(tmp_path / "w.safetensors", *stopping)
    imported = Projection.import_topk_pt(tmp_path / "w.pt", *stopping)
    for each in (w, loaded, imported):
        assert each.student is not None
        assert each.teacher is not None
        assert set(each.student.stops) == {1, 50}
        assert set(each.teacher.stops) == {0, 60}
    own, other = (TargetBuilder.from_projection(each) for each in (w, loaded))
    assert own.fingerprint == other.fingerprint


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_w_that_was_built_for_other_stops_is_refused(
    stopping: tuple[Path, Path], tmp_path: Path, name: str
) -> None:
    w = Projection.build(*stopping, cache_dir=False)
    path = tmp_path / "w.safetensors"
    w.save(path)
    (tmp_path / name / "generation_config.json").unlink()
    stops = {"student": ([1, 50], [1]), "teacher": ([0, 60], [0])}[name]
    with pytest.raises(PairError) as refused:
        Projection.load(path, *stopping)
    message = str(refused.value)
    assert f"built for a {name} that stops at {stops[0]}, this one stops at {stops[1]}" in message
    assert "\n" not in message
    # The remedy.
    vocabs = {side: Vocab.from_path(tmp_path / side) for side in ("student", "teacher")}
    Projection.load(
        path, vocabs["student"].with_stops([1, 50]), vocabs["teacher"].with_stops([0, 60])
    )
    # A file of before says nothing of the teacher's stops.
    arrays, metadata = read_arrays(path)
    del arrays["teacher_stops"]
    write_arrays(path, arrays, metadata)
    if name == "teacher":
        assert Projection.load(path, *stopping).teacher_stops is None
