"""Where prefix KL compares in a text, beside the loss itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import tokenizer_zoo as zoo
import torch
from typer.testing import CliRunner

from xtoken import Aligner, Projection
from xtoken.audit.prefix_coverage import ClassSupervision, supervision
from xtoken.cli import app
from xtoken.losses import LossInputs, LossOptions, PairParts, prefix_kl
from xtoken.tensors.chunks import ChunkBatch

TEXT = "In 1969, 201 of 42 words;\tif x == 7:\n    return naïve 世界 + extraordinarily(3.14)\n" * 3


def pair(packed: bool) -> tuple[object, object]:
    """A student with numerals of up to three digits and a teacher with one, or the reverse."""
    sides = zoo.byte_level_bpe(3000, 3), zoo.byte_level_bpe(2000, 1)
    return sides if packed else sides[::-1]


@pytest.fixture(name="counted", params=[True, False], ids=["student packs", "teacher packs"])
def _counted(request: pytest.FixtureRequest):
    student, teacher = pair(request.param)
    projection = Projection.build(student, teacher, cache_dir=False)
    ids = [side.encode(TEXT).ids for side in (student, teacher)]
    alignment = Aligner(student, teacher).align(*ids)
    return projection, alignment, ids, supervision(projection, alignment, *ids)


def test_its_chunks_and_prefixes_are_those_of_the_loss(counted) -> None:
    projection, alignment, ids, found = counted
    tensors = [torch.tensor([side]) for side in ids]
    masks = [torch.ones_like(side, dtype=torch.bool) for side in tensors]
    chunks = ChunkBatch.from_alignments([alignment]).usable(*masks)
    generator = torch.Generator().manual_seed(0)
    logits = [
        torch.randn(1, len(side), size, generator=generator)
        for side, size in zip(ids, projection.shape, strict=True)
    ]
    inputs = LossInputs(*logits, chunks, student_ids=tensors[0], teacher_ids=tensors[1])
    pair = PairParts.from_projection(projection, needs="prefix-kl")
    out = prefix_kl(inputs, pair, LossOptions(min_mass=0.0))
    assert sum(item.chunks for item in found) == len(chunks)
    prefixes = sum(item.prefixes for item in found)
    assert prefixes > 0
    assert float(out.metrics["prefixes"]) * len(chunks) == pytest.approx(prefixes)


def test_numerals_that_one_side_packs_are_compared_at_each_digit(counted) -> None:
    _, _, _, found = counted
    by_class = {item.name: item for item in found}
    packed = by_class["three-digit numerals"]
    # 196 and 201 in each copy of the text; 196 is followed by its last digit.
    assert (packed.chunks, packed.compared) == (6, 6)
    assert packed.mirrored in (0, 6)
    assert packed.prefixes >= 2 * packed.compared
    assert all(item.mirrored <= item.compared <= item.chunks for item in found)


def test_the_audit_shows_it_for_a_text(tmp_path: Path) -> None:
    paths = []
    for name, side in zip(("student", "teacher"), pair(True), strict=True):
        paths.append(tmp_path / f"{name}.json")
        side.save(str(paths[-1]))
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    arguments = ["project", "audit", "--student", str(paths[0]), "--teacher", str(paths[1])]
    shown = CliRunner().invoke(app, [*arguments, "--text", str(text)])
    assert "what prefix KL compares in the text" in shown.output
    printed = CliRunner().invoke(app, [*arguments, "--text", str(text), "--json"])
    found = [ClassSupervision(**item) for item in json.loads(printed.stdout)["supervision"]]
    assert any(item.name == "three-digit numerals" and item.compared for item in found)
    without = CliRunner().invoke(app, [*arguments, "--json"])
    assert json.loads(without.stdout)["supervision"] == []
    missing = CliRunner().invoke(app, [*arguments, "--text", str(tmp_path / "none.txt")])
    assert isinstance(missing.exception, FileNotFoundError)
