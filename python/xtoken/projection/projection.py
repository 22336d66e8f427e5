"""The projection W: which teacher tokens a student token corresponds to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from os import PathLike
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from xtoken._core import PROJECTION_RULES, Vocab, build_projection
from xtoken._files import cache_directory
from xtoken.data.stops import vocab_with_stops
from xtoken.projection import file, topk_pt
from xtoken.projection.arrays import EMPTY_RULES, RULE_CODES, ProjectionArrays
from xtoken.projection.cache import build_cached
from xtoken.projection.common_set import common_set as find_common_set
from xtoken.projection.csr import Csr, offsets, part_of, reweighted
from xtoken.projection.explain import Explanation
from xtoken.projection.explain import explain as explain_row
from xtoken.projection.options import (
    ProjectionOptions,
    Reverse,
    SpecialRoles,
    check_count,
    options_for,
)
from xtoken.vocab import TokenizerSource
from xtoken.vocab.side import Side

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Projection(ProjectionArrays):
    """W `[V_s, V_t]` in compressed rows: row s spreads student token s over teacher tokens.

    A row sums to 1, its entries by falling weight, or it is empty. `probs @ W` of a distribution
    over student tokens with rows is a distribution over teacher tokens.

    The fields are those of `ProjectionArrays`.

    Source: X-Token (arXiv 2605.21699). Departures: tokens are compared as bytes and segmented by
    the teacher's own model; the paper compares and re-tokenizes decoded strings.
    """

    @classmethod
    def build(
        cls,
        student_tokenizer: TokenizerSource,
        teacher_tokenizer: TokenizerSource,
        *,
        top_k: int = 4,
        decay: float = 0.1,
        max_pieces: int = 4,
        canonical: Iterable[str] = (),
        reverse: bool | Reverse = False,
        special_roles: SpecialRoles | None = None,
        name_similarity: float = 0.6,
        threads: int | None = None,
        cache_dir: str | PathLike[str] | bool | None = None,
    ) -> Projection:
        """Build W from two tokenizers, by these rules in order.

        1. exact: a teacher token has the same bytes; weight 1 on it alone. Of several, the one that
           the teacher's tokenizer emits.
        2. canonical: the same, up to the differences in `canonical`.
        3. forward: the pieces that the teacher's own model makes of the token's bytes, piece i with
           weight in proportion to `decay ** i`.
        4. reverse: a teacher token that the student's model splits gives weight back to its pieces.
        5. special tokens: each of the student's stops (`Vocab.stops`) with the one that the teacher
           prints at that place, the others by role, then by similar names.

        What has no correspondence by any of them is an empty row.

        Args:
            student_tokenizer, teacher_tokenizer: what `Vocab.from_tokenizer` takes: objects, paths,
                hub names or `Vocab`s.
            top_k: at least 1, the most entries that a row keeps; of equal weights those of the
                first pieces.
            decay: 0 to 1; the paper's is 0.1. With 0 all mass is on the first piece, which is the
                exact marginal of the student's next token on the teacher's next token.
            max_pieces: at least 1; of more pieces the first `max_pieces` stay.
            canonical: differences that do not count: `"punctuation_space"`, a space before a token
                of ASCII punctuation alone; `"case"`, for teachers that lower-case all text.
            reverse: `False` ("off"), `True` ("unmatched": rows without an exact partner) or
                `"all"`. Off, because the entries of a row that splits are then exactly the
                teacher's own segmentation, and `decay=0` exactly the marginal.
            special_roles: pairs of special tokens by role or any other name, each token by id or by
                text, such as `{"eot": ("<|im_end|>", "<|eot_id|>")}`; they go before the roles that
                the tokenizers declare. `None` for a role keeps it from pairing tokens.
            name_similarity: how much the words of two names must overlap (Jaccard index) for
                special tokens without a role; above 1 never.
            threads: at least 1; `None` is one per core.
            cache_dir: where W is kept by fingerprints and options, for the next call to read;
                `None` is the environment variable `XTOKEN_CACHE` (a directory, or `off`) or else
                the user's cache directory, `False` is nowhere.

        Raises:
            OptionError: an option is outside its range.
            TokenIdError: a special token in `special_roles` does not exist.
            UnsupportedTokenizerError: a tokenizer cannot be read or segmented exactly.
        """
        student = vocab_with_stops(Side("student", student_tokenizer))
        teacher = vocab_with_stops(Side("teacher", teacher_tokenizer))
        options = options_for(
            student,
            teacher,
            top_k=top_k,
            decay=decay,
            max_pieces=max_pieces,
            canonical=canonical,
            reverse=reverse,
            special_roles=special_roles,
            name_similarity=name_similarity,
        )
        if threads is not None:
            check_count("threads", threads)

        def build() -> Projection:
            return cls._build(student, teacher, options, threads or 0)

        directory = cache_directory(cache_dir)
        if directory is None:
            return build()
        return build_cached(cls, student, teacher, options, directory, build)

    @classmethod
    def _build(
        cls, student: Vocab, teacher: Vocab, options: ProjectionOptions, threads: int
    ) -> Projection:
        arrays = build_projection(
            student,
            teacher,
            top_k=options.top_k,
            decay=options.decay,
            max_pieces=options.max_pieces,
            canonical=set(options.canonical),
            reverse=options.reverse,
            special_pairs=options.special_pairs,
            ignored_roles=options.ignored_roles,
            name_similarity=options.name_similarity,
            threads=threads,
        )
        return cls(
            indptr=arrays.indptr,
            indices=arrays.indices,
            weights=arrays.weights,
            shape=(len(student), len(teacher)),
            rules=arrays.rules,
            pieces_indptr=arrays.pieces_indptr,
            pieces=arrays.pieces,
            options=options,
            student_fingerprint=student.fingerprint,
            teacher_fingerprint=teacher.fingerprint,
            model_fingerprint=teacher.model_fingerprint,
            student=student,
            teacher=teacher,
            teacher_pieces_indptr=arrays.teacher_pieces_indptr,
            teacher_pieces=arrays.teacher_pieces,
            student_model_fingerprint=student.model_fingerprint,
            stop_fold_from=arrays.stop_fold_from,
            stop_fold_to=arrays.stop_fold_to,
            student_stops=np.asarray(student.stops, dtype=np.int64),
            teacher_stops=np.asarray(teacher.stops, dtype=np.int64),
        )

    def transposed(self) -> Csr:
        """`W^T` [V_t, V_s] in compressed rows."""
        return self.csr.transposed()

    def row_slice(self, start: int, stop: int) -> Csr:
        """Rows [start, stop), as for one shard of a student's vocabulary."""
        return self.csr.row_slice(start, stop)

    def column_slice(self, columns: ArrayLike) -> Csr:
        """W onto some teacher ids, [V_s, K]; see `Csr.column_slice`."""
        return self.csr.column_slice(columns)

    def to_torch(
        self, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """W as a torch sparse CSR tensor [V_s, V_t], float32 unless `dtype` says otherwise."""
        return self.csr.to_torch(device, dtype)

    def stats(self) -> dict[str, int]:
        """Rows by rule, empty rows and entries; with a known student, its numerals.

        `numerals_d` counts student tokens of d ASCII digits, `numerals_d_exact` those of them that
        have an exact partner.
        """
        counts = np.bincount(self.rules, minlength=len(PROJECTION_RULES))
        stats = {name: int(counts[code]) for name, code in RULE_CODES.items()}
        stats |= {
            "rows": self.shape[0],
            "columns": self.shape[1],
            "entries": len(self.indices),
            "empty": sum(stats[name] for name in EMPTY_RULES),
            "reached_columns": len(np.unique(self.indices)),
        }
        if self.student is not None:
            exact = self.rules == RULE_CODES["exact"]
            for digits, ids in self._numerals().items():
                stats[f"numerals_{digits}"] = len(ids)
                stats[f"numerals_{digits}_exact"] = int(exact[ids].sum())
        return stats

    def _numerals(self) -> dict[int, list[int]]:
        assert self.student is not None
        numerals: dict[int, list[int]] = {1: [], 2: [], 3: []}
        for digits in numerals:
            for number in range(10**digits):
                token_id = self.student.id_of(b"%0*d" % (digits, number))
                if token_id is not None and token_id < self.shape[0]:
                    numerals[digits].append(token_id)
        return numerals

    def common_set(
        self, mode: Literal["strict", "relaxed"] = "relaxed", threshold: float = 0.6
    ) -> NDArray[np.int64]:
        """One-to-one pairs of tokens that correspond, for H-KL (relaxed) and GOLD (strict).

        Args:
            mode: `"strict"`: equal bytes, and special tokens of one role. `"relaxed"`: each student
                token with the teacher token of its largest weight.
            threshold: above 0, at most 1; a relaxed pair weighs at least this much.

        Returns: [n, 2] int64, student and teacher id, by rising student id. Where several student
            tokens claim one teacher token the highest weight wins, of equals the lowest id; ids
            that the student's tokenizer does not emit claim none.

        Raises:
            OptionError: an unknown mode, or a threshold outside its range.
        """
        return find_common_set(self, mode, threshold)

    def explain(self, token: int | str | bytes) -> Explanation:
        """One row: the rule that made it, its entries, and the bytes on both sides.

        Args:
            token: a student id, its text (a special token by its name), or its bytes.

        Raises:
            TokenIdError: there is no such student token.
            OptionError: the vocabularies are not known; pass the tokenizers to `load`.
        """
        return explain_row(self, token)

    def with_weights(self, weights: ArrayLike) -> Projection:
        """W with other weights on the same entries, as a learnable W ends up.

        Args:
            weights: [nnz] float, finite and >= 0, in the order of `indices`; each row is scaled to
                sum to 1, and sorted by falling weight.

        Raises:
            ArgumentTypeError: they are no numbers.
            ShapeError: another number of weights, or one that is negative or not finite.
            OptionError: the weights of a row are all 0.
        """
        indptr, order, kept = reweighted(self.csr, weights)
        return replace(
            self,
            indptr=indptr,
            indices=self.indices[order],
            weights=kept,
            options=replace(self.options, origin="learned"),
        )

    def limited(self, rows: int, columns: int) -> Projection:
        """W between the first tokens of both sides, for heads that are narrower than a tokenizer.

        Gemma-3's text models have one column less than their tokenizer has tokens. Rows and columns
        beyond are left out, rows are scaled to sum to 1 again, and tokens whose pieces lie beyond
        have none.

        Args:
            rows: at most V_s.
            columns: at most V_t.

        Raises:
            ArgumentTypeError: a number is no whole one.
            ShapeError: a number is outside its range.
        """
        rows, columns = part_of(self.shape, rows, columns)
        row_of = self.csr.row_of()
        kept = (row_of < rows) & (self.indices < columns)
        row_of, indices = row_of[kept], self.indices[kept]
        sums = np.bincount(row_of, self.weights[kept], rows)
        lengths = np.bincount(row_of, minlength=rows)
        rules = self.rules[:rows].copy()
        rules[(lengths == 0) & (np.diff(self.indptr[: rows + 1]) > 0)] = RULE_CODES["unspellable"]
        pieces = _limited_pieces(self.pieces_indptr, self.pieces, rows, columns)
        mirror: tuple[NDArray[np.int64] | None, NDArray[np.int64] | None] = (None, None)
        if self.teacher_pieces_indptr is not None and self.teacher_pieces is not None:
            mirror = _limited_pieces(self.teacher_pieces_indptr, self.teacher_pieces, columns, rows)
        folds = self.stop_fold_from, self.stop_fold_to
        if folds[0] is not None and folds[1] is not None:
            inside = (folds[0] < columns) & (folds[1] < columns)
            folds = folds[0][inside], folds[1][inside]
        return replace(
            self,
            indptr=offsets(lengths),
            indices=indices,
            weights=(self.weights[kept] / sums[row_of]).astype(np.float32),
            shape=(rows, columns),
            rules=rules,
            pieces_indptr=pieces[0],
            pieces=pieces[1],
            teacher_pieces_indptr=mirror[0],
            teacher_pieces=mirror[1],
            stop_fold_from=folds[0],
            stop_fold_to=folds[1],
            student_stops=_below(self.student_stops, rows),
            teacher_stops=_below(self.teacher_stops, columns),
            whole=self.whole or self,
        )

    def export_topk_pt(self, path: str | PathLike[str]) -> None:
        """Write the dense table that NeMo-RL reads; see `xtoken.projection.topk_pt`."""
        topk_pt.export_topk_pt(self, path)

    @classmethod
    def import_topk_pt(
        cls,
        path: str | PathLike[str],
        student_tokenizer: TokenizerSource,
        teacher_tokenizer: TokenizerSource,
        *,
        normalize: bool = False,
    ) -> Projection:
        """Read a dense table of NeMo-RL; see `xtoken.projection.topk_pt`."""
        return topk_pt.import_topk_pt(
            cls, path, student_tokenizer, teacher_tokenizer, normalize=normalize
        )

    def save(self, path: str | PathLike[str]) -> None:
        """Write W to one safetensors file; see `xtoken.projection.file.save`.

        Raises:
            OptionError: it is a part of W (`limited`).
            FailedWriteError: the directory does not exist or cannot be written.
        """
        file.save(self, path)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        student_tokenizer: TokenizerSource | None = None,
        teacher_tokenizer: TokenizerSource | None = None,
    ) -> Projection:
        """Read W back; see `xtoken.projection.file.load`.

        Args:
            student_tokenizer, teacher_tokenizer: the pair that W must be for, read as by `build`;
                without them the pair is not checked, and `explain` has no bytes to show.

        Raises:
            PairError: W was built for another pair, or one that stops at other tokens.
            ShapeError: W is between some tokens of the pair alone.
            FormatError: the file is no projection, is truncated or was altered.
            FileNotFoundError: there is no such file.
        """
        return file.load(cls, path, student_tokenizer, teacher_tokenizer)

    def __repr__(self) -> str:
        return (
            f"Projection({self.shape[0]} x {self.shape[1]}, {len(self.indices)} entries, "
            f"student {self.student_fingerprint[:12]}…, teacher {self.teacher_fingerprint[:12]}…)"
        )


def _below(stops: NDArray[np.int64] | None, size: int) -> NDArray[np.int64] | None:
    return None if stops is None else stops[stops < size]


def _limited_pieces(
    indptr: NDArray[np.int64], pieces: NDArray[np.int64], tokens: int, size: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The pieces of the first tokens; none of one with a piece outside [0, size)."""
    owner = np.repeat(np.arange(tokens), np.diff(indptr[: tokens + 1]))
    pieces = pieces[: indptr[tokens]]
    whole = np.bincount(owner, pieces >= size, tokens) == 0
    kept = whole[owner]
    return offsets(np.bincount(owner[kept], minlength=tokens)), pieces[kept]
