"""A teacher's predictions of one side of a batch, packed documents told apart."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from xtoken.distillation.batch import Batch
from xtoken.teachers import LiveTeacher, TeacherSource
from xtoken.teachers.forward import check_positions
from xtoken.tensors.teacher_signal import TeacherTopK


def teacher_signal(source: TeacherSource, batch: Batch) -> Tensor | TeacherTopK:
    """The predictions of a padded or packed batch, in its layout [B, T_t, ...].

    In packed rows (`position_ids` that start again, and no attention mask) each document is
    predicted as if it stood alone: by a transformers model in the packed row itself, otherwise row
    by row.
    """
    inputs = batch.teacher
    ids = inputs["input_ids"]
    if "attention_mask" in inputs:
        if batch.asked_tokens is not None:
            asked = batch.teacher_loss_mask.any(1)
            return _of_rows(source, ids, inputs["attention_mask"], asked)
        return source.signal(ids, inputs["attention_mask"])
    positions = inputs["position_ids"]
    if isinstance(source, LiveTeacher) and masks_documents(source.model):
        return _packed_logits(source, ids, positions)
    return _by_document(source, ids, positions)


def _of_rows(
    source: TeacherSource, ids: Tensor, attention_mask: Tensor, asked: Tensor
) -> Tensor | TeacherTopK:
    """The predictions of some rows of a padded batch; the others hold zeros, which nobody reads."""
    if not bool(asked.any()):
        if isinstance(source, LiveTeacher):
            return source.signal(ids, attention_mask)
        nothing = ids.new_zeros(*ids.shape, 1)
        return TeacherTopK(
            nothing,
            torch.full(nothing.shape, -torch.inf, device=ids.device),
            token_log_probs=torch.zeros(ids.shape, device=ids.device),
        )
    signal = source.signal(ids[asked], attention_mask[asked])

    def spread(values: Tensor) -> Tensor:
        whole = values.new_zeros(len(ids), *values.shape[1:])
        whole[asked.to(values.device)] = values
        return whole

    if isinstance(signal, Tensor):
        return spread(signal)
    found = signal.map_tensors(spread)
    # Zeros would be a mass above 1, and one column many times.
    found.log_probs[~asked.to(found.log_probs.device)] = -torch.inf
    return found


def masks_documents(model: nn.Module) -> bool:
    """Whether the model keeps the documents of a packed row apart by their positions alone.

    Those of transformers whose every layer is attention do; recurrent layers carry their state on.
    """
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_output_embeddings"):
        return False
    text = config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    return kinds <= {"full_attention", "sliding_attention", "chunked_attention"} and not hasattr(
        text, "state_size"
    )


@torch.no_grad()
def _packed_logits(source: LiveTeacher, ids: Tensor, positions: Tensor) -> Tensor:
    device = source.device
    source.tokens_computed += int(ids.numel())
    inputs = {"input_ids": ids.to(device), "position_ids": positions.to(device)}
    check_positions(source.model, inputs, "teacher")
    logits: Tensor = source.model(**inputs, use_cache=False).logits
    return logits


def _by_document(source: TeacherSource, ids: Tensor, positions: Tensor) -> Tensor | TeacherTopK:
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
    signal = source.signal(padded, mask)

    def packed(values: Tensor) -> Tensor:
        at = document.to(values.device), column.to(values.device)
        return values[at].view(rows, width, *values.shape[2:])

    if isinstance(signal, Tensor):
        return packed(signal)
    return signal.map_tensors(packed)
