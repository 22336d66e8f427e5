"""The few teacher logits that are not as the model gave them: stop tokens added to another."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from xtoken.losses.engine.teacher_rows import TeacherRows
from xtoken.tensors.full_logits import FullLogits
from xtoken.tensors.host import on_device
from xtoken.tensors.stop_fold import StopFold

# A kernel compares every column with every patch.
_MOST = 8


def readable_rows(teacher: TeacherRows) -> bool:
    """Whether kernels can read the rows: not where cells move columns or boundaries leave some
    out. Looks at no tensor, for it is asked before anybody wants a kernel."""
    fold = teacher.fold
    if teacher.left_out is not None or not isinstance(fold, StopFold | None):
        return False
    return fold is None or len(_columns(fold)) <= _MOST


def _columns(fold: StopFold) -> list[int]:
    return sorted({column for pair in fold.pairs for column in pair})


def patched_columns(teacher: TeacherRows) -> tuple[Tensor, Tensor]:
    """Columns [K] int32 that differ from the signal's, and each row's logits there [n, K] float32,
    before the temperature; none of either for plain logits."""
    fold, index = teacher.fold, teacher.where.index
    assert isinstance(fold, StopFold | None)
    columns = [] if fold is None else _columns(fold)
    at = on_device(np.array(columns, np.int32), index.device)
    if fold is None or not columns:
        return at, torch.empty((len(index), 0), dtype=torch.float32, device=index.device)
    tau, place = teacher.temperature, {column: i for i, column in enumerate(columns)}
    rows = FullLogits(teacher.signal, teacher.vocab_size).rows(index, at.to(torch.int64)) / tau  # type: ignore[arg-type]
    moved = StopFold([place[a] for a, _ in fold.pairs], [place[b] for _, b in fold.pairs])
    return at, moved.dense(rows).mul_(tau).to(torch.float32).contiguous()
