"""The library's losses of a student that is the truth, in a world whose conditionals are known.

What `truth_by_enumeration` says of each construction's target, the losses themselves say here: a
student whose every conditional is that of the texts has loss 0 where a loss asks for the truth.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping

import torch
from torch import Tensor
from truth_by_enumeration import Place, World, places

from xtoken.losses import (
    LOSSES,
    CommonSet,
    LossInputs,
    LossOptions,
    LossOutput,
    PairParts,
    SparseProjection,
)
from xtoken.tensors.byte_prefixes import BytePrefixes
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.completions import Completions
from xtoken.tensors.piece_chains import PieceChains

from reference_targets import STOP

AT_THE_TRUTH: dict[str, tuple[str, dict[str, object]]] = {
    "p-kl, decay 0": ("p-kl", {}),
    "gold, its KL alone": ("gold", {"uld_weight": 0.0}),
    "bpm": ("bpm", {"mask_spaces": False}),
    "escd": ("escd", {}),
    "partition-kl": ("partition-kl", {}),
    "strict-top-k": ("strict-top-k", {}),
    "alm": ("alm", {"temperature": 1.0}),
}


def parts(world: World) -> PairParts:
    """The pair of a world; the last id of each side stops a text."""
    pair = world.pair
    student, teacher = [*pair.student, b""], [*pair.teacher, b""]
    sizes = len(student), len(teacher)
    stops = (len(pair.student), len(pair.teacher))
    shared = [
        (s, pieces[0])
        for s, pieces in enumerate(pair.student_pieces)
        if len(pieces) == 1 and pair.teacher[pieces[0]] == pair.student[s]
    ]
    shared.append(stops)
    own, other = (torch.tensor(ids) for ids in zip(*shared, strict=True))
    first = [pieces[0] for pieces in pair.student_pieces] + [stops[1]]
    tables = BytePrefixes(student, teacher, specials=[stops])
    return PairParts(
        sizes,
        projection=SparseProjection.from_csr(
            range(sizes[0] + 1), first, torch.ones(sizes[0], dtype=torch.float64), sizes
        ),
        strict_common=CommonSet(own, other),
        byte_prefixes=tables,
        completions=Completions(tables),
        piece_chains=PieceChains(
            [*map(list, pair.student_pieces), []], [*map(list, pair.teacher_pieces), []]
        ),
    )


def _logits(rows: list[Mapping[int, float]], size: int) -> Tensor:
    """[1, T, size] log-probabilities; the stop is the last column."""
    masses = torch.zeros(1, len(rows), size, dtype=torch.float64)
    for at, row in enumerate(rows):
        for token, mass in row.items():
            masses[0, at, size - 1 if token == STOP else token] = mass
    return torch.log(masses)


def losses_at_the_truth(
    world: World, texts: list[bytes], names: list[str] | None = None
) -> dict[str, dict[str, list[float]]]:
    """Of each loss, by the shape of a chunk, what a student that is the truth has there."""
    pair = parts(world)
    found: dict[str, dict[str, list[float]]] = {
        name: defaultdict(list) for name in names or AT_THE_TRUTH
    }
    for text in texts:
        example = world.example(text)
        starts = [place for place in places(world, example) if not place.shape.startswith("ins")]
        own = [*example.student_ids, len(world.pair.student)]
        other = [*example.teacher_ids, len(world.pair.teacher)]
        student = [world.student.after(example.student_ids[:at]) for at in range(len(own))]
        teacher = [world.teacher.after(example.teacher_ids[:at]) for at in range(len(other))]
        # A first token that nothing predicts, and whose row predicts the first of the text.
        ids = [torch.tensor([[row[-1], *row]]) for row in (own, other)]
        chunks = ChunkBatch.from_ranges(*torch.tensor([_range(place) for place in starts]).T)
        sides = [
            _padded(_logits(rows, size))
            for rows, size in zip((student, teacher), pair.sizes, strict=True)
        ]
        for name in found:
            loss, options = AT_THE_TRUTH[name]

            def output(
                *which: int,
                loss: str = loss,
                options: dict[str, object] = options,
                chunks: ChunkBatch = chunks,
                ids: list[Tensor] = ids,
                sides: list[Tensor] = sides,
            ) -> LossOutput:
                some = chunks.select(torch.tensor(which))
                inputs = LossInputs(sides[0], sides[1], some, ids[0], ids[1], normalizer=1.0)
                return LOSSES[loss].function(inputs, pair, LossOptions(**options))  # type: ignore[arg-type]

            for at, place in enumerate(starts):
                value = float(output(at).loss)
                if loss == "escd" and at:  # the token before may begin what is completed here
                    value += sum(
                        sign * len(which) * float(output(*which).metrics["completion"])
                        for sign, which in ((1, (at - 1, at)), (-1, (at - 1,)), (-1, (at,)))
                    )
                found[name][place.shape].append(value)
    return found


def _padded(logits: Tensor) -> Tensor:
    """With a row for the last token, which predicts nothing."""
    return torch.cat([logits, torch.zeros_like(logits[:, :1])], 1)


def _range(place: Place) -> tuple[int, int, int, int, int]:
    """A chunk's tokens, counted with the one before the text."""
    own, other = place.student.start + 1, place.teacher.start + 1
    sizes = max(len(place.student), 1), max(len(place.teacher), 1)
    return 0, own, own + sizes[0], other, other + sizes[1]


def sample(world: World, count: int, seed: int = 0) -> list[bytes]:
    """Texts by their probability."""
    rng = random.Random(seed)
    return rng.choices(list(world.texts), list(world.texts.values()), k=count)
