"""Which student tokens are in which group of a target: ranges of one order of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class ListedTokens(NamedTuple):
    """The tokens of all groups, one group after the other.

    Attributes:
        ptr: [G + 1] int64 offsets into the next two.
        tokens: [N] int64 student tokens.
        group: [N] int64, the group of each.
    """

    ptr: Tensor
    tokens: Tensor
    group: Tensor


@dataclass(frozen=True, eq=False)
class GroupTokens:
    """Tokens of G groups. A cell of the root map holds every token that begins in it, thousands a
    position, but few ranges: the tokens themselves are listed where a loss asks for them.

    Attributes:
        range_ptr: [G + 1] int64 offsets into the next two, from 0.
        starts, ends: [R] int64 ranges of `order`.
        order: [L] int64 student tokens.
        count: N, the number of tokens in all groups.
        kept: their list, once it was asked for.
    """

    range_ptr: Tensor
    starts: Tensor
    ends: Tensor
    order: Tensor
    count: int
    kept: list[ListedTokens] = field(default_factory=list, repr=False)

    @classmethod
    def of_lists(cls, ptr: Tensor, tokens: Tensor) -> GroupTokens:
        """Of tokens that lie one group after the other, at offsets `ptr` [G + 1]."""
        groups = torch.arange(len(ptr), device=ptr.device)
        return cls(groups, ptr[:-1], ptr[1:], tokens, len(tokens))

    def listed(self) -> ListedTokens:
        """The tokens of all groups, on the device of the ranges, without waiting for it."""
        if not self.kept:
            device, sizes = self.order.device, self.ends - self.starts
            before = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))
            first = self.starts - before[:-1]
            first = torch.repeat_interleave(first, sizes, output_size=self.count)
            ptr = before[self.range_ptr]
            groups = torch.arange(len(ptr) - 1, device=device)
            self.kept.append(
                ListedTokens(
                    ptr,
                    self.order[first + torch.arange(self.count, device=device)],
                    torch.repeat_interleave(groups, ptr.diff(), output_size=self.count),
                )
            )
        return self.kept[0]

    def mapped(self, move: Callable[[Tensor], Tensor]) -> GroupTokens:
        """The same with moved tensors; the list is made again there."""
        return GroupTokens(
            move(self.range_ptr), move(self.starts), move(self.ends), move(self.order), self.count
        )

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "kept": []}
