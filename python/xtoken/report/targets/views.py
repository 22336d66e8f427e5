"""What all losses of the registry compare at each chunk of a text."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from xtoken.errors import XTokenError
from xtoken.report.aligned_text import AlignedText, Chunk
from xtoken.report.comparisons import LossView
from xtoken.report.structure import PairStructure
from xtoken.report.targets.byte_events import bpm_views, escd_views
from xtoken.report.targets.case import Case
from xtoken.report.targets.chunks import alm_views, partition_kl_views
from xtoken.report.targets.exact import exact_kl_views
from xtoken.report.targets.projected import p_kl_views, prefix_kl_views
from xtoken.report.targets.vocabularies import (
    hybrid_views,
    same_vocab_kl_views,
    strict_top_k_views,
)
from xtoken.tensors.pair_parts import LossName

# In the order of the page, which opens on the first three.
MAKERS: dict[LossName, Callable[[Case], Iterator[LossView]]] = {
    "p-kl": p_kl_views,
    "prefix-kl": prefix_kl_views,
    "exact-kl": exact_kl_views,
    "h-kl": hybrid_views,
    "gold": hybrid_views,
    "uld": hybrid_views,
    "alm": alm_views,
    "bpm": bpm_views,
    "escd": escd_views,
    "strict-top-k": strict_top_k_views,
    "partition-kl": partition_kl_views,
    "same-vocab-kl": same_vocab_kl_views,
}


@torch.no_grad()
def model_views(
    text: AlignedText, chunks: list[Chunk], teacher: Tensor, student: Tensor | None
) -> list[list[LossView]]:
    """For each chunk what every loss compares there.

    Args:
        teacher: [1, T_t, V_t'] the teacher's logits of the text.
        student: [1, T_s, V_s'] the student's; None where there is no model of it.

    Returns: for each chunk its losses; none for a chunk that no loss counts. A loss that does not
        suit the pair says why.
    """
    found: list[list[LossView]] = [[] for _ in chunks]
    counted = [chunk for chunk in chunks if chunk.counted]
    structure = PairStructure(text.pair.projection)
    for name in MAKERS:
        for chunk, view in zip(
            counted, _views(text, name, structure, counted, teacher, student), strict=True
        ):
            found[chunk.index].append(view)
    return found


def _views(
    text: AlignedText,
    name: LossName,
    structure: PairStructure,
    chunks: list[Chunk],
    teacher: Tensor,
    student: Tensor | None,
) -> list[LossView]:
    fingerprints = text.pair.fingerprints
    if name == "same-vocab-kl" and fingerprints.student != fingerprints.teacher:
        note = "it needs one vocabulary on both sides, and this pair has two"
        return [LossView(name, (), note=note) for _ in chunks]
    try:
        return list(MAKERS[name](Case.of(text, name, structure, chunks, teacher, student)))
    except XTokenError as error:
        return [LossView(name, (), note=str(error)) for _ in chunks]
