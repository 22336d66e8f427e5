"""A teacher's predictions of one side of a batch, packed documents told apart."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from xtoken.distillation.batch import Batch
from xtoken.errors import OptionError
from xtoken.teachers import LiveTeacher, TeacherSource, TopKStore
from xtoken.teachers.causal import causal_inputs
from xtoken.teachers.forward import check_positions
from xtoken.teachers.probe import check_causal, keeps_documents_apart
from xtoken.tensors.lm_head import LmHead
from xtoken.tensors.teacher_signal import TeacherTopK
from xtoken.tensors.teacher_spread import TeacherSpread

Signal: TypeAlias = Tensor | TeacherTopK | TeacherSpread | LmHead
FusedTeacher: TypeAlias = Literal[True, False, "auto"]


def teacher_signal(source: TeacherSource, batch: Batch, fused: FusedTeacher = False) -> Signal:
    """The predictions of a padded or packed batch, in its layout [B, T_t, ...].

    In packed rows (`position_ids` that start again, and no attention mask) each document is
    predicted as if it stood alone: in the packed row itself by a transformers model that keeps them
    apart, otherwise row by row.

    Args:
        fused: whether a live teacher gives hidden states and head in place of its logits; `auto`
            does on accelerators, and warns once where its model has no plain head.

    Raises:
        OptionError: the model has no plain head, and `fused` is True.
    """
    inputs = batch.teacher
    ids = inputs["input_ids"]
    if "attention_mask" in inputs:
        if batch.asked_tokens is not None:
            asked = batch.teacher_loss_mask.any(1)
            return _of_rows(source, ids, inputs["attention_mask"], asked, fused)
        return _padded(source, ids, inputs["attention_mask"], fused)
    positions = inputs["position_ids"]
    if isinstance(source, LiveTeacher) and masks_documents(source.model, ids.shape):
        packed = {"input_ids": ids, "position_ids": positions}
        found = _fused(source, packed, fused)
        return _packed_logits(source, ids, positions) if found is None else found
    return _by_document(source, ids, positions, fused)


def asked_sequences(batch: Batch) -> list[NDArray[np.int64]]:
    """The sequences [T] that a teacher is asked for by `teacher_signal`."""
    inputs = batch.teacher
    ids = inputs["input_ids"].cpu()
    if "attention_mask" in inputs:
        rows = batch.teacher_loss_mask.any(1).cpu()
        if batch.asked_tokens is None:
            rows = torch.ones_like(rows)
        mask = inputs["attention_mask"].bool().cpu()
        return [ids[row][mask[row]].numpy() for row in rows.nonzero().flatten().tolist()]
    starts = (inputs["position_ids"].cpu() == 0).flatten()
    starts[:: ids.shape[1]] = True
    found = np.split(ids.flatten().numpy(), starts.nonzero().flatten().tolist()[1:])
    return [document for document in found if len(document) > 1]


def _padded(
    source: TeacherSource, ids: Tensor, attention_mask: Tensor, fused: FusedTeacher
) -> Signal:
    if isinstance(source, LiveTeacher):
        if is_fused(source, fused):
            inputs, back = causal_inputs(source.model, ids, attention_mask)
            found = _fused(source, inputs, fused)
            if found is not None:
                return _mapped(found, back)
    return source.signal(ids, attention_mask)


def is_fused(source: TeacherSource, fused: FusedTeacher) -> bool:
    """Whether hidden states and head are asked for."""
    if not isinstance(source, LiveTeacher) or fused is False:
        return False
    return fused is True or source.device.type != "cpu"


def _fused(source: LiveTeacher, inputs: dict[str, Tensor], fused: FusedTeacher) -> LmHead | None:
    if not is_fused(source, fused):
        return None
    check_positions(source.model, inputs, "teacher")
    found = source.fused(inputs)
    if isinstance(found, LmHead):
        return found
    if fused is True:
        raise OptionError(f"fused_teacher = True, but {found}; set it to False or 'auto'")
    # Python says the same words of one place once.
    warnings.warn(
        f"the teacher's logits are made whole, [B, T, V] in memory: {found} "
        "(fused_teacher=False says nothing)",
        stacklevel=2,
    )
    return None


def _of_rows(
    source: TeacherSource,
    ids: Tensor,
    attention_mask: Tensor,
    asked: Tensor,
    fused: FusedTeacher,
) -> Signal:
    """The predictions of some rows of a padded batch; the others hold zeros, which nobody reads."""
    if not bool(asked.any()):
        if isinstance(source, LiveTeacher):
            return _padded(source, ids, attention_mask, fused)
        if isinstance(source, TopKStore) and source.key.is_spread:
            return source.unread(ids)  # takes what full logits take, such as a temperature
        nothing = ids.new_zeros(*ids.shape, 1)
        return TeacherTopK(
            nothing,
            torch.full(nothing.shape, -torch.inf, device=ids.device),
            token_log_probs=torch.zeros(ids.shape, device=ids.device),
        )

    def spread(values: Tensor) -> Tensor:
        whole = values.new_zeros(len(ids), *values.shape[1:])
        whole[asked.to(values.device)] = values
        return whole

    found = _mapped(_padded(source, ids[asked], attention_mask[asked], fused), spread)
    if isinstance(found, TeacherTopK):
        # Zeros would be a mass above 1, and one column many times.
        found.log_probs[~asked.to(found.log_probs.device)] = -torch.inf
    return found


def _mapped(signal: Signal, move: Callable[[Tensor], Tensor]) -> Signal:
    """The signal in another layout of its positions."""
    if isinstance(signal, Tensor):
        return move(signal)
    if isinstance(signal, LmHead):
        return replace(signal, hidden=move(signal.hidden))
    return signal.map_tensors(move)


def masks_documents(model: nn.Module, shape: Sequence[int]) -> bool:
    """Whether the model keeps the documents of packed rows [B, T] apart by their positions alone.

    Most of transformers whose every layer is attention do, and a few tokens say which; recurrent
    layers carry their state on.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        return False
    rows, width = shape
    text = config.get_text_config()
    if rows > 1 and "flash" in str(getattr(text, "_attn_implementation", None)):
        return False  # its kernels tell documents apart in a single row
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if "chunked_attention" in kinds or hasattr(text, "attention_chunk_size"):
        # A chunk begins at a multiple of its size in the row, wherever a document does.
        chunk = getattr(text, "attention_chunk_size", None)
        if chunk is not None and width > chunk:
            return False
    usual = {"full_attention", "sliding_attention", "chunked_attention"}
    return kinds <= usual and not hasattr(text, "state_size") and keeps_documents_apart(model)


@torch.no_grad()
def _packed_logits(source: LiveTeacher, ids: Tensor, positions: Tensor) -> Tensor:
    check_causal(source.model, "teacher")
    device = source.device
    source.tokens_computed += int(ids.numel())
    inputs = {"input_ids": ids.to(device), "position_ids": positions.to(device)}
    check_positions(source.model, inputs, "teacher")
    logits: Tensor = source.model(**inputs, use_cache=False).logits
    return logits


def _by_document(
    source: TeacherSource, ids: Tensor, positions: Tensor, fused: FusedTeacher
) -> Signal:
    starts = (positions == 0).flatten()
    rows, width = ids.shape
    starts[torch.arange(rows, device=starts.device) * width] = True
    document = starts.cumsum(0) - 1  # [B * T] the document of each place
    first = starts.nonzero().flatten()
    lengths = torch.bincount(document)
    column = torch.arange(rows * width, device=ids.device) - first[document]
    padded = ids.new_zeros(len(first), int(lengths.max()))
    mask = torch.zeros_like(padded)
    padded[document, column] = ids.flatten()
    mask[document, column] = 1
    asked = lengths > 1  # nothing is read of a single token, which a store need not hold
    if bool(asked.all()):
        signal = _padded(source, padded, mask, fused)
    else:
        signal = _of_rows(source, padded, mask, asked, fused)

    def packed(values: Tensor) -> Tensor:
        at = document.to(values.device), column.to(values.device)
        return values[at].view(rows, width, *values.shape[2:])

    return _mapped(signal, packed)
