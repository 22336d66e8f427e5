"""What a loss makes of a batch's ids on the CPU before the step, so that it waits for no device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.tensors.host import on_device
from xtoken.tensors.host_chunks import HostChunks

Ints = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Items:
    """Items that belong to rows, sorted by row; columns of numbers, on a device and on the host.

    Attributes:
        row: [n] int64, rising.
        columns: [n] int64 each.
        host: the same columns, and `row`, on the host.
    """

    row: Tensor
    columns: Mapping[str, Tensor]
    host: Mapping[str, Ints]

    @classmethod
    def of(
        cls,
        rows: Sequence[int] | Ints,
        columns: Mapping[str, Sequence[int] | Ints],
        device: torch.device,
    ) -> Items:
        """From numbers on the host, whose rows are rising."""
        host = {name: np.asarray(values, np.int64) for name, values in columns.items()}
        row = np.asarray(rows, np.int64)
        tensors = {name: on_device(values, device) for name, values in host.items()}
        return cls(on_device(row, device), tensors, {**host, "row": row})

    def mapped(self, move: Callable[[Tensor], Tensor]) -> Items:
        """The same in tensors that `move` makes of these, of equal values."""
        columns = {name: move(values) for name, values in self.columns.items()}
        return replace(self, row=move(self.row), columns=columns)

    def of_rows(self, start: int, stop: int) -> Items:
        """The items of rows [start, stop), their rows counted from `start`."""
        first, last = np.searchsorted(self.host["row"], (start, stop)).tolist()
        part = slice(first, last)
        columns = {name: values[part] for name, values in self.columns.items()}
        host = {name: values[part] for name, values in self.host.items()}
        host["row"] = host["row"] - start
        return Items(self.row[part] - start, columns, host)

    def __len__(self) -> int:
        return self.row.shape[0]

    def __getitem__(self, name: str) -> Tensor:
        return self.columns[name]

    def total(self, name: str) -> int:
        """The sum of a column, without waiting for a device."""
        return int(self.host[name].sum())


@dataclass(frozen=True, eq=False)
class Prepared:
    """Tensors and host arrays of one batch's chunks; each loss that needs some has its own fields.

    Attributes:
        chunks: the chunks that these are of, on the host.
    """

    chunks: HostChunks

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> Self:
        """The same on another device."""
        return self.mapped(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        """The same in pinned memory, for a copy to a GPU that waits for nothing."""
        return self.mapped(Tensor.pin_memory)

    def mapped(self, move: Callable[[Tensor], Tensor]) -> Self:
        """The same in tensors that `move` makes of these, of equal values."""
        moved: dict[str, Tensor | Items] = {}
        for each in fields(self):
            value = getattr(self, each.name)
            if isinstance(value, Tensor):
                moved[each.name] = move(value)
            elif isinstance(value, Items):
                moved[each.name] = value.mapped(move)
        return replace(self, **moved)  # type: ignore[arg-type]
