"""What backward reads again of a batch, which nobody may have overwritten since."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass

from torch import Tensor

from xtoken.errors import BackwardError


@dataclass(frozen=True, eq=False)
class Held:
    """Tensors by name, with torch's count of the writes in place that each had seen.

    autograd would keep this account by `save_for_backward`, which takes no tensor of
    `torch.inference_mode`. Of such a one nobody counts the writes.
    """

    tensors: tuple[tuple[str, Tensor, int], ...]

    @classmethod
    def of(cls, **values: object) -> Held:
        """All tensors in the values, which may be tensors, dataclasses or mappings of them."""
        found = (each for name, value in values.items() for each in _tensors(name, value))
        return cls(tuple((name, each, each._version) for name, each in found))

    def check(self) -> None:
        """Raise BackwardError where one was written to since."""
        for name, tensor, version in self.tensors:
            if tensor._version != version:
                raise BackwardError(
                    f"{name} was overwritten between the loss and its backward, which reads it "
                    f"again: it is at version {tensor._version}, expected {version}; call backward "
                    "before, or pass a clone"
                )


def _tensors(name: str, value: object) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if not value.is_inference():
            yield name, value
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from _tensors(f"{name}.{each.name}", getattr(value, each.name))
    elif isinstance(value, Mapping):
        for key, each in value.items():
            yield from _tensors(f"{name}[{key!r}]", each)
