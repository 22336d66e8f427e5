"""The plain sum over depths: which weight each group has, and which unions of deeper ones."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.tensors.host import on_device
from xtoken.tensors.target_batch import HostTargets, owner_of


@dataclass(frozen=True, eq=False)
class DepthWeights:
    """c, u and A of `block`'s formula for all targets of a batch.

    Attributes:
        weights: [G] float64, c of each group.
        tail_weights: [P] float64, c of each position's tail.
        row, level, mass, weight: [D] the position of each union of deeper groups, the least depth
            of its groups, A and u.
        ptr: [P + 1] each position's range in these.
        member_group, member_union: [M] which group is in which union.
        union_ptr, member_ptr: [P + 1] each position's range in the unions and in their members, on
            the host.
    """

    weights: Tensor
    tail_weights: Tensor
    row: Tensor
    level: Tensor
    ptr: Tensor
    mass: Tensor
    weight: Tensor
    member_group: Tensor
    member_union: Tensor
    union_ptr: NDArray[np.int64]
    member_ptr: NDArray[np.int64]

    @classmethod
    def of(
        cls,
        host: HostTargets,
        given: tuple[float, ...],
        least_mass: float,
        device: torch.device,
    ) -> DepthWeights | None:
        """The weights `given` of depth 0, 1, ...; None where no group is below depth 0."""
        arrays = depth_arrays(host, given, least_mass)
        if arrays is None:
            return None
        tensors = zip(fields(cls)[:-2], arrays[:-2], strict=True)
        moved = {field.name: on_device(array, device) for field, array in tensors}
        return cls(**moved, union_ptr=arrays[-2], member_ptr=arrays[-1])

    def between(
        self, begin: int, end: int, first_group: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of positions [begin, end), counted from there: the row, A and u of each union, and the
        group and union of each member."""
        unions = slice(int(self.union_ptr[begin]), int(self.union_ptr[end]))
        members = slice(int(self.member_ptr[begin]), int(self.member_ptr[end]))
        return (
            self.row[unions] - begin,
            self.mass[unions].to(dtype),
            self.weight[unions].to(dtype),
            self.member_group[members] - first_group,
            self.member_union[members] - unions.start,
        )


def depth_arrays(
    host: HostTargets, given: tuple[float, ...], least_mass: float
) -> tuple[NDArray[Any], ...] | None:
    """The fields of `DepthWeights` on the host, made once of a batch: by its collator, if there is
    one that knows the loss."""
    key = ("depth weights", given, least_mass)
    if key not in host.made:
        host.made[key] = _arrays(host, given, least_mass)
    return cast("tuple[NDArray[Any], ...] | None", host.made[key])


def _arrays(
    host: HostTargets, given: tuple[float, ...], least_mass: float
) -> tuple[NDArray[Any], ...] | None:
    depths, probs = host.depths, host.probs
    # Nearly all groups are at depth 0: what can be is done for the deeper ones alone.
    deep = np.flatnonzero(depths > 0)
    if not len(deep):
        return None
    count, levels = len(host.group_ptr) - 1, int(depths[deep].max()) + 1
    group_row = owner_of(host.group_ptr)
    deep_row, deep_depth = group_row[deep], depths[deep]
    counted = deep >= host.group_ptr[0]
    cell = (deep_row * levels + deep_depth)[counted]
    own = np.bincount(cell, probs[deep[counted]], count * levels).reshape(count, levels)
    # All else, the tail too, parts from the text at depth 0, where A is 1 whatever it is.
    own[:, 0] = 1.0 - own.sum(1)
    mass = own[:, ::-1].cumsum(1)[:, ::-1]
    factors = np.array([given[min(depth, len(given) - 1)] for depth in range(levels)])
    # A depth with next to no mass has no conditional to speak of: it keeps its parent's weight.
    enough = mass >= least_mass
    each = factors / np.where(enough, mass, 1.0)
    for depth in range(1, levels):
        each[:, depth] = np.where(enough[:, depth], each[:, depth], each[:, depth - 1])
    change = each[:, :-1] - each[:, 1:]
    row, level = ((change != 0) & (mass[:, 1:] > 0)).nonzero()
    union = np.full((count, levels), -1)
    union[row, level + 1] = np.arange(len(row))
    # Each group is in the unions of all depths from 1 to its own.
    in_unions = np.where(counted, deep_depth, 0)
    member_group = np.repeat(deep, in_unions)
    first = np.repeat(np.cumsum(in_unions) - in_unions, in_unions)
    member_union = union[group_row[member_group], np.arange(len(first)) - first + 1]
    member_group = member_group[member_union >= 0]
    member_union = member_union[member_union >= 0]
    weights = each[:, 0][group_row]
    weights[deep] = each[deep_row, deep_depth]

    def ptr(rows: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])

    union_ptr = ptr(row)
    return (
        weights,
        np.ascontiguousarray(each[:, 0]),
        row,
        level + 1,
        union_ptr,
        mass[row, level + 1],
        change[row, level],
        member_group,
        member_union,
        union_ptr,
        ptr(group_row[member_group]),
    )
