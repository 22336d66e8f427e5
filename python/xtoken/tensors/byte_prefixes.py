"""Which student token spells the beginning of each teacher token: tables over bytes."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn

from xtoken._checks import expect
from xtoken._core import Vocab
from xtoken.errors import ShapeError
from xtoken.projection import Projection
from xtoken.projection.arrays import RULE_CODES, ProjectionArrays
from xtoken.tensors.sparse_ops import SparseMap
from xtoken.tensors.twins import twin


class BytePrefixes(nn.Module):
    """The longest student token that the bytes of each teacher token begin with, from any of them.

    Attributes:
        student_bytes, teacher_bytes: the bytes of each token, empty for special and unused ones.
        spellers: student bytes to the id that the tokenizer emits for them.
        begins: [V_t] int64 the student token that a teacher token begins with; V_s for none. A
            special token begins with its partner.
        reached: [V_s] bool the student tokens that some teacher token begins with.
        order: [n] int64 teacher text tokens sorted by bytes, so that those with one prefix are a
            range.
        suffix_ptr: [V_t] int64 index into `suffix_begins`, at which the same table goes on for the
            bytes from the first, the second, ... one on; V_s for none.
    """

    begins: Tensor
    reached: Tensor
    order: Tensor
    suffix_ptr: Tensor
    suffix_begins: Tensor
    roots_in: Tensor
    roots_out: Tensor

    def __init__(
        self,
        student: Sequence[bytes],
        teacher: Sequence[bytes],
        *,
        specials: Iterable[tuple[int, int]] = (),
        spellers: Mapping[bytes, int] | None = None,
    ) -> None:
        """
        Args:
            student, teacher: the bytes of each token; empty for special and unused ones.
            specials: (student id, teacher id) of special tokens that mean one thing.
            spellers: as the attribute; by default the lowest id.

        >>> tables = BytePrefixes([b"B", b"Br", b"ead"], [b"Bread", b"Br", b"x"])
        >>> tables.begins.tolist()
        [1, 1, 3]
        """
        super().__init__()
        self.student_bytes, self.teacher_bytes = list(student), list(teacher)
        if spellers is None:
            spellers = {}
            for token, text in enumerate(student):
                if text:
                    spellers.setdefault(text, token)
        self.spellers = spellers
        none = len(self.student_bytes)
        longest = max(map(len, self.student_bytes), default=0)
        ptr = np.zeros(len(self.teacher_bytes), np.int64)
        np.cumsum([len(text) for text in self.teacher_bytes[:-1]], out=ptr[1:])
        suffixes = list(
            chain.from_iterable(_suffixes(text, spellers, longest, none) for text in teacher)
        )
        begins = np.full(len(ptr), none, np.int64)
        texts = np.flatnonzero([len(text) > 0 for text in self.teacher_bytes])
        flat = np.asarray(suffixes, np.int64)
        begins[texts] = flat[ptr[texts]]
        for own, other in specials:
            begins[other] = own
        reached = np.zeros(none + 1, np.bool_)
        reached[begins] = True
        order = sorted(texts.tolist(), key=self.teacher_bytes.__getitem__)
        self._sorted = [self.teacher_bytes[token] for token in order]
        self._ranges: dict[bytes, tuple[int, int]] = {}
        self._full: SparseMap | None = None
        self.host_begins, self.host_suffixes, self.host_ptr = begins, flat, ptr
        by_output = np.argsort(begins, kind="stable")
        for name, array in (
            ("begins", begins),
            ("reached", reached[:none]),
            ("order", np.asarray(order, np.int64)),
            ("suffix_ptr", ptr),
            ("suffix_begins", flat),
            ("roots_in", by_output),
            ("roots_out", begins[by_output]),
        ):
            self.register_buffer(name, torch.from_numpy(np.array(array)), persistent=False)

    @classmethod
    def from_projection(cls, projection: Projection) -> BytePrefixes:
        """Those of a pair, made once for each projection; special tokens are paired as W has them.

        Raises:
            OptionError: the projection was loaded without its tokenizers.
        """
        expect(projection, ProjectionArrays, "projection", "pass Projection.build(...)")
        return twin(projection.once(cls, lambda: cls._made_from(projection)))

    @classmethod
    def _made_from(cls, projection: Projection) -> BytePrefixes:
        student, teacher = projection.vocabularies()
        rows, columns = projection.shape
        own, other = token_bytes(student, rows), token_bytes(teacher, columns)
        spellers: dict[bytes, int] = {}
        for token, text in enumerate(own):
            if not text:
                continue
            if text in spellers:
                emitted = student.id_of(text)
                if emitted is not None and emitted < rows:
                    spellers[text] = emitted
            else:
                spellers[text] = token
        return cls(own, other, specials=special_pairs(projection), spellers=spellers)

    @property
    def sizes(self) -> tuple[int, int]:
        """(V_s, V_t)."""
        return len(self.student_bytes), len(self.teacher_bytes)

    @property
    def roots(self) -> SparseMap:
        """[V_t, V_s + 1] teacher tokens to what they begin with, the last column for nothing."""
        if self._full is None or self._full.inputs.device != self.roots_in.device:
            sizes = self.sizes
            with torch.inference_mode(False):  # it is kept, and training may come after
                self._full = SparseMap.build(self.roots_in, self.roots_out, sizes[1], sizes[0] + 1)
        return self._full

    def after(self, teacher_token: int, bytes_before: int) -> int:
        """The student token that a teacher token goes on with after some bytes; V_s for none."""
        if bytes_before == 0:
            return int(self.host_begins[teacher_token])
        if bytes_before >= len(self.teacher_bytes[teacher_token]):
            return len(self.student_bytes)
        return int(self.host_suffixes[self.host_ptr[teacher_token] + bytes_before])

    def range_of(self, prefix: bytes) -> tuple[int, int]:
        """The teacher tokens that start with these bytes, as a range of `order`."""
        found = self._ranges.get(prefix)
        if found is None:
            found = prefix_range(self._sorted, prefix)
            self._ranges[prefix] = found
        return found

    def range_of_equal(self, text: bytes) -> tuple[int, int]:
        """The teacher tokens with exactly these bytes, as a range of `order`."""
        start = bisect_left(self._sorted, text)
        return start, bisect_right(self._sorted, text, lo=start)

    def check_sizes(self, sizes: tuple[int, int]) -> None:
        """Raise ShapeError where the tables are of other vocabularies (V_s, V_t)."""
        if self.sizes != sizes:
            raise ShapeError(
                f"byte_prefixes are of {self.sizes[0]} student and {self.sizes[1]} teacher tokens, "
                f"expected {sizes[0]} and {sizes[1]}; build them from the same two tokenizers"
            )

    def extra_repr(self) -> str:
        return f"{self.sizes[0]} student and {self.sizes[1]} teacher tokens"


def _suffixes(text: bytes, spellers: Mapping[bytes, int], longest: int, none: int) -> Iterable[int]:
    """For each start in a text the longest token that stands there."""
    for start in range(len(text)):
        for end in range(min(len(text), start + longest), start, -1):
            token = spellers.get(text[start:end])
            if token is not None:
                yield token
                break
        else:
            yield none


def prefix_range(ordered: Sequence[bytes], prefix: bytes) -> tuple[int, int]:
    """The range of the sorted texts that start with `prefix`."""
    start = bisect_left(ordered, prefix)
    after = prefix.rstrip(b"\xff")
    if not after:
        return start, len(ordered)
    return start, bisect_left(ordered, after[:-1] + bytes([after[-1] + 1]), lo=start)


def token_bytes(vocab: Vocab, size: int) -> list[bytes]:
    """The bytes of the first `size` tokens; those beyond the vocabulary have none."""
    known = min(size, len(vocab))
    return [vocab.token_bytes(token) for token in range(known)] + [b""] * (size - known)


def special_pairs(projection: Projection) -> list[tuple[int, int]]:
    """(student id, teacher id) of special tokens that W pairs, a teacher token once: of several
    stop tokens the preferred one."""
    paired: dict[int, int] = {}
    stops = projection.student_stops
    rank = {} if stops is None else {int(stop): at for at, stop in enumerate(stops)}
    rows = np.flatnonzero(np.isin(projection.rules, [RULE_CODES["role"], RULE_CODES["name"]]))
    for student in sorted(rows.tolist(), key=lambda token: (rank.get(token, len(rank)), token)):
        paired.setdefault(int(projection.indices[projection.indptr[student]]), student)
    return [(student, teacher) for teacher, student in paired.items()]
