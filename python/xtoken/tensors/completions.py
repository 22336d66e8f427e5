"""How a student goes on after a token that begins a teacher token which it cannot say at once."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
import torch
from torch import Tensor, nn

from xtoken.errors import ShapeError
from xtoken.projection import Projection
from xtoken.tensors.byte_prefixes import BytePrefixes, prefix_range
from xtoken.tensors.sparse_ops import SparseMap
from xtoken.tensors.twins import twin


class Completions(nn.Module):
    """Groups of teacher tokens without a student token of the same bytes, and what completes them.

    Two such tokens are in one group where one's bytes begin the other's; the group stands for its
    shortest member. After a student token that begins it, each student token that starts with the
    rest completes it.

    Attributes:
        members, groups: [m] int64 teacher tokens and their groups, sorted by group.
        order: [n] int64 student text tokens sorted by bytes.
        ptr: [V_s + 1] int64, the groups that each student token begins and that one more token can
            complete, as a range of the next three.
        group, lo, size: [e] int64 the group, and the tokens that complete it as a range of `order`.
        host_ptr: `ptr` on the host.
        host_tokens: [V_s] on the host, the sum of `size` in each token's range.
        group_count: number of groups.
    """

    members: Tensor
    groups: Tensor
    order: Tensor
    ptr: Tensor
    group: Tensor
    lo: Tensor
    size: Tensor

    def __init__(self, tables: BytePrefixes) -> None:
        """
        Args:
            tables: the bytes of both vocabularies.

        >>> tables = BytePrefixes([b"B", b"Br", b"ead", b"eads"], [b"Bread", b"Breads", b"Br"])
        >>> Completions(tables)
        Completions(1 groups, 1 of them completed after some token)
        """
        super().__init__()
        self.sizes = tables.sizes
        own = tables.student_bytes
        order = sorted((t for t, text in enumerate(own) if text), key=own.__getitem__)
        ordered = [own[token] for token in order]
        texts, members, groups = _groups(tables)
        entries: dict[int, list[tuple[int, int, int]]] = {}
        ranges: dict[bytes, tuple[int, int]] = {}
        for group, text in enumerate(texts):
            for cut in range(1, len(text)):
                start = text[:cut]
                if start not in tables.spellers:
                    continue
                rest = text[cut:]
                if rest not in ranges:
                    ranges[rest] = prefix_range(ordered, rest)
                lo, hi = ranges[rest]
                if lo < hi:  # of several tokens with these bytes, each begins it
                    for at in range(bisect_left(ordered, start), len(order)):
                        if ordered[at] != start:
                            break
                        entries.setdefault(order[at], []).append((group, lo, hi - lo))
        counts = np.zeros(len(own), np.int64)
        tokens = np.zeros(len(own), np.int64)
        flat: list[tuple[int, int, int]] = []
        for token in sorted(entries):
            counts[token] = len(entries[token])
            tokens[token] = sum(size for _, _, size in entries[token])
            flat += entries[token]
        ptr = np.concatenate([[0], counts.cumsum()]).astype(np.int64)
        rows = np.asarray(flat, np.int64).reshape(-1, 3)
        self.host_ptr, self.host_tokens, self.group_count = ptr, tokens, len(texts)
        self._full: SparseMap | None = None
        for name, array in (
            ("members", np.asarray(members, np.int64)),
            ("groups", np.asarray(groups, np.int64)),
            ("order", np.asarray(order, np.int64)),
            ("ptr", ptr),
            ("group", rows[:, 0]),
            ("lo", rows[:, 1]),
            ("size", rows[:, 2]),
        ):
            self.register_buffer(name, torch.from_numpy(np.array(array)), persistent=False)

    @classmethod
    def from_projection(cls, projection: Projection) -> Completions:
        """Those of a pair; made once for each projection.

        Raises:
            OptionError: the projection was loaded without its tokenizers.
        """
        tables = BytePrefixes.from_projection(projection)
        return twin(projection.once(cls, lambda: cls(tables)))

    @property
    def events(self) -> SparseMap:
        """[V_t, groups] teacher tokens to their groups."""
        if self._full is None or self._full.inputs.device != self.members.device:
            self._full = SparseMap.build(self.members, self.groups, self.sizes[1], self.group_count)
        return self._full

    def check_sizes(self, sizes: tuple[int, int]) -> None:
        """Raise ShapeError where they are of other vocabularies (V_s, V_t)."""
        if self.sizes != sizes:
            raise ShapeError(
                f"completions are of {self.sizes[0]} student and {self.sizes[1]} teacher tokens, "
                f"expected {sizes[0]} and {sizes[1]}; build them from the same two tokenizers"
            )

    def extra_repr(self) -> str:
        some = len(set(self.group.tolist()))
        return f"{self.group_count} groups, {some} of them completed after some token"


def _groups(tables: BytePrefixes) -> tuple[list[bytes], list[int], list[int]]:
    """The shortest bytes of each group; the teacher tokens in groups, and their groups."""
    texts: list[bytes] = []
    members: list[int] = []
    groups: list[int] = []
    other = tables.teacher_bytes
    for token in tables.order.tolist():  # by bytes: what begins others comes before them
        if other[token] in tables.spellers:
            continue
        if not texts or not other[token].startswith(texts[-1]):
            texts.append(other[token])
        members.append(token)
        groups.append(len(texts) - 1)
    return texts, members, groups
