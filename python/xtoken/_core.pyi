"""The typed face of the Rust core."""

from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from os import PathLike
from typing import Any, Literal, TypeAlias, final

import numpy as np
import numpy.typing as npt

__all__ = [
    "PROJECTION_RULES",
    "Aligner",
    "FormatError",
    "ForwardKL",
    "OptionError",
    "PieceTrie",
    "ProjectionArrays",
    "ShapeError",
    "StoredForwardKL",
    "TargetArrays",
    "TargetBuilder",
    "TokenIdError",
    "UnsupportedTokenizerError",
    "Vocab",
    "XTokenError",
    "__version__",
    "build_projection",
    "chunk_rows",
    "column_masses",
    "cross_entropy",
    "exact_kl",
    "prefix_kl_below",
    "sorted_l1",
    "usable_chunks",
    "usable_rows",
]

__version__: str

class XTokenError(ValueError):
    """Base of all errors that xtoken raises."""

class TokenIdError(XTokenError):
    """A token id lies outside its vocabulary."""

class ShapeError(XTokenError):
    """Arrays that must fit together do not."""

class FormatError(XTokenError):
    """A file or stored object cannot be read."""

class UnsupportedTokenizerError(XTokenError):
    """A tokenizer whose tokens cannot be read exactly as bytes."""

class OptionError(XTokenError):
    """An option has a value outside its range."""

@final
class Vocab:
    """What each id of a vocabulary contributes to the text, as bytes.

    Immutable, picklable, safe to share between threads. Two vocabularies are equal when their
    fingerprints, roles and stops are.
    """

    @staticmethod
    def from_tokenizer(tokenizer: Any) -> Vocab:
        """Read a tokenizer.

        Args:
            tokenizer: a transformers fast tokenizer, a `tokenizers.Tokenizer`, a tiktoken
                `Encoding`, a path (see `from_path`), or a `Vocab`, which is returned as it is.

        Raises:
            UnsupportedTokenizerError: its tokens cannot be read exactly as bytes.
            TypeError: it is none of these.
        """

    @staticmethod
    def from_path(path: str | PathLike[str]) -> Vocab:
        """Read a directory with a `tokenizer.json`, a `tokenizer.json` (`.xz` too), a tekken file
        or a tiktoken rank file without special tokens (see `from_tiktoken`).

        Raises:
            FileNotFoundError: no such file, or the directory holds no tokenizer.
            FormatError: the file is damaged or of another kind.
            UnsupportedTokenizerError: its tokens cannot be read exactly as bytes.
        """

    @staticmethod
    def from_tokenizer_json(
        json: bytes,
        *,
        from_memory: bool = False,
        roles: Mapping[str, int | None] = ...,
        declared: Sequence[tuple[str, bool | None]] = ...,
    ) -> Vocab:
        """Read the content of a `tokenizer.json`.

        Args:
            json: UTF-8 text.
            from_memory: a tokenizer in memory printed it, so the scores of a Unigram model are read
                to the last bit; those of a file are read as Hugging Face reads them.
            roles: ids of the roles `bos`, `eos`, `pad`, `unk`, `eot`; those that are left out are
                guessed from the texts of the special tokens, `None` takes one away.
            declared: texts of tokens that a configuration beside the file declares, and whether
                each is a control token (`None`: unless the file adds it as text); those that the
                file lacks get the next ids.
        """

    @staticmethod
    def from_tiktoken(
        file: bytes,
        special_tokens: Mapping[str, int],
        *,
        roles: Mapping[str, int | None] = ...,
        pattern: str | None = None,
    ) -> Vocab:
        """Read the content of a tiktoken rank file.

        Args:
            file: lines of base64 and rank.
            special_tokens: texts to ids.
            pattern: the regular expression that cuts text into words, which the file does not
                hold; without it the pieces of a token are those of the merges alone.
        """

    @staticmethod
    def from_tekken(file: bytes, *, roles: Mapping[str, int | None] = ...) -> Vocab:
        """Read the content of a `tekken.json`."""

    @staticmethod
    def from_tokens(
        tokens: Sequence[bytes],
        special_tokens: Mapping[int, str] = ...,
        *,
        ranked: bool = False,
        roles: Mapping[str, int | None] = ...,
        pattern: str | None = None,
    ) -> Vocab:
        """Build from explicit bytes.

        Args:
            tokens: the bytes of each id; an empty one is unused.
            special_tokens: ids that contribute nothing, with their texts.
            ranked: ids are the merge ranks of a byte pair encoding, as in a tiktoken file;
                otherwise the vocabulary cannot segment bytes (see `segment`).
            pattern: the regular expression that cuts text into words before they are segmented.
        """

    def with_roles(self, roles: Mapping[str, int | None]) -> Vocab:
        """A copy with other ids for some roles; `None` takes a role away.

        Raises:
            OptionError: a key is no role.
            TokenIdError: an id is outside the vocabulary.
        """
    def with_stops(self, ids: Sequence[int]) -> Vocab:
        """A copy with other declared stop tokens, in order of preference: what a turn ends with
        first, as a chat template prints it, then what `generation_config` lists.

        Raises:
            TokenIdError: an id is outside the vocabulary.
        """
    @classmethod
    def _from_state(cls, state: bytes) -> Vocab: ...
    def __len__(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...
    @property
    def fingerprint(self) -> str:
        """Stable hash of what each id is (bytes, kinds and special texts): 64 hexadecimal digits.

        Roles, stops and the dummy prefix take no part."""
    @property
    def family(self) -> str:
        """`bytes`, `byte-level`, `sentencepiece` or `wordpiece (lossy)`."""
    @property
    def is_lossy(self) -> bool:
        """Whether the tokens do not determine the text (WordPiece)."""
    @property
    def dummy_prefix(self) -> Literal["never", "first", "every"]:
        """Where the tokenizer puts a space of its own: `first` at the start of the sequence,
        `every` after each special or added token as well but the unknown one, which stands within
        text."""
    @property
    def roles(self) -> dict[str, int]:
        """The ids that play `bos`, `eos`, `pad`, `unk`, `eot`, where known."""
    @property
    def stops(self) -> tuple[int, ...]:
        """All that can stop a sequence, in order of preference: the ids given to `with_stops`, then
        those of the roles `eot` and `eos`."""
    @property
    def special_tokens(self) -> dict[int, str]:
        """The special ids with their texts."""
    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token contributes; empty for special and unused ids.

        Raises:
            TokenIdError: the id is outside the vocabulary.
        """
    def is_special(self, token_id: int) -> bool:
        """Whether the id is a control token, which contributes no text."""
    def is_unused(self, token_id: int) -> bool:
        """Whether the id is a hole."""
    def is_byte_fallback(self, token_id: int) -> bool:
        """Whether the id is a `<0xNN>` token."""
    def id_of(self, token: bytes) -> int | None:
        """The id that spells exactly these bytes; of several, the one that the tokenizer emits."""
    @property
    def model_fingerprint(self) -> str:
        """Stable hash of how bytes become ids, beside `fingerprint`: 64 hexadecimal digits.
        Vocabularies without a model share one."""
    @property
    def model(self) -> str | None:
        """How bytes are segmented: `BPE`, `Unigram`, `WordPiece`, or `None` if not known."""
    def segment(self, token: bytes) -> list[int] | None:
        """The pieces that the tokenizer makes of these bytes inside a text.

        Added tokens that are text are matched first, then the pre-tokenizer cuts, then the model
        segments; no dummy prefix is put. Bytes that are not valid UTF-8, and text that the
        normalizer would change, go to the model as they are; so does all text of a WordPiece
        vocabulary, which its tokens do not determine. The pieces spell the bytes exactly.

        Returns: token ids, none for no bytes; `None` where the vocabulary cannot spell the bytes.

        Raises:
            UnsupportedTokenizerError: the vocabulary carries no supported model.
        """
    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of a sequence, without the dummy prefix.

        Raises:
            TokenIdError: an id is outside the vocabulary.
        """

_Arrays: TypeAlias = tuple[
    npt.NDArray[np.int64],
    npt.NDArray[np.int64],
    npt.NDArray[np.uint8],
    npt.NDArray[np.int64],
    npt.NDArray[np.int64],
]

@final
class Aligner:
    """The part of `xtoken.Aligner` that runs without Python."""

    def __new__(
        cls,
        student: Vocab,
        teacher: Vocab,
        role_pairs: Sequence[tuple[int, int]] | None = None,
        whole_characters: bool = False,
    ) -> Aligner: ...
    @property
    def role_pairs(self) -> list[tuple[int, int]]: ...
    def align(self, student_ids: object, teacher_ids: object) -> _Arrays | None:
        """The arrays of `align_flat` for one pair of sequences; None where a side is neither a
        contiguous int64 array nor a list or tuple of ints."""
    def align_given(
        self,
        student: object,
        student_mask: object | None,
        student_indptr: object | None,
        teacher: object,
        teacher_mask: object | None,
        teacher_indptr: object | None,
        threads: int,
    ) -> tuple[*_Arrays, npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
        """The arrays of `align_flat`, and the columns at which both sides' sequences begin.

        A side is a list or tuple of sequences as `align` takes them, a contiguous int64 array of
        padded rows with or without a mask of booleans, or a flat one with an int64 indptr. None
        where it is in another form, or does not fit together."""
    def align_flat(
        self,
        student_ids: npt.NDArray[np.int64],
        student_starts: npt.NDArray[np.int64],
        student_ends: npt.NDArray[np.int64],
        teacher_ids: npt.NDArray[np.int64],
        teacher_starts: npt.NDArray[np.int64],
        teacher_ends: npt.NDArray[np.int64],
        threads: int,
    ) -> _Arrays:
        """Student bounds, teacher bounds, kinds, chunk indptr and byte counts of the sequences
        `ids[starts[b]:ends[b]]`; `threads` 0 for one per core, at most 1024. Ctrl-C ends the
        call."""

_Pair: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]
_ChunkRows: TypeAlias = tuple[
    npt.NDArray[np.int64], npt.NDArray[np.bool_], tuple[int, int, int], bool
]

def chunk_rows(
    student: _Pair,
    teacher: _Pair,
    kinds: npt.NDArray[np.uint8],
    chunk_indptr: npt.NDArray[np.int64],
) -> _ChunkRows:
    """One row for each chunk of a batch of alignments, in order.

    Args:
        student: bounds and columns of the student's sequences.
        teacher: the same of the teacher's.

    Returns: samples, student starts and ends, teacher starts and ends and kinds, [6, C]; whether
        each chunk has a predictor, [C]; the largest sample, student end and teacher end; whether
        each chunk has a token on both sides and a predictor of each.

    Raises:
        ShapeError: the arrays do not fit together.
    """

def usable_rows(
    sample: npt.NDArray[np.int64],
    student: _Pair,
    teacher: _Pair,
    kind: npt.NDArray[np.int64],
    has_predictor: npt.NDArray[np.uint8],
    student_mask: npt.NDArray[np.uint8],
    teacher_mask: npt.NDArray[np.uint8],
    admit: Sequence[int],
) -> _ChunkRows:
    """Those of some chunks that a loss counts, as `chunk_rows` gives them.

    Raises:
        ShapeError: a chunk lies outside a mask.
    """

_Counted: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]

def usable_chunks(
    student: _Counted,
    teacher: _Counted,
    kinds: npt.NDArray[np.uint8],
    chunk_indptr: npt.NDArray[np.int64],
    admit: Sequence[int],
) -> _ChunkRows | None:
    """What `chunk_rows` and then `usable_rows` give, in one pass; None where these two have to
    look: bounds that fall, arrays that do not fit together, chunks that leave their mask.

    Args:
        student: bounds and columns of the student's sequences, and its mask, [B, T_s].
        teacher: the same of the teacher's.
    """

PROJECTION_RULES: list[str]
"""What made a row of W, or why it is empty; a row's rule code is an index into this."""

@final
class ProjectionArrays:
    """W in CSR form, as `build_projection` returns it."""

    @property
    def indptr(self) -> npt.NDArray[np.int64]: ...
    @property
    def indices(self) -> npt.NDArray[np.int64]: ...
    @property
    def weights(self) -> npt.NDArray[np.float32]: ...
    @property
    def rules(self) -> npt.NDArray[np.uint8]: ...
    @property
    def pieces_indptr(self) -> npt.NDArray[np.int64]: ...
    @property
    def pieces(self) -> npt.NDArray[np.int64]: ...
    @property
    def teacher_pieces_indptr(self) -> npt.NDArray[np.int64] | None: ...
    @property
    def teacher_pieces(self) -> npt.NDArray[np.int64] | None: ...
    @property
    def reverse_rows(self) -> int: ...
    @property
    def stop_fold_from(self) -> npt.NDArray[np.int64]: ...
    @property
    def stop_fold_to(self) -> npt.NDArray[np.int64]: ...

def build_projection(
    student: Vocab,
    teacher: Vocab,
    *,
    top_k: int,
    decay: float,
    max_pieces: int,
    canonical: AbstractSet[str],
    reverse: str,
    special_pairs: Sequence[tuple[int, int]],
    ignored_roles: Sequence[str],
    name_similarity: float,
    threads: int,
) -> ProjectionArrays:
    """Build W; see `xtoken.Projection.build`. `threads=0` is one per core. Ctrl-C ends the
    call."""

@final
class PieceTrie:
    """The tokens of one vocabulary by their pieces of another; used through `xtoken.trie`."""

    @staticmethod
    def build(
        tokens: Vocab, pieces: Vocab, side: Literal["student", "teacher"], threads: int
    ) -> PieceTrie:
        """Segment each token of `tokens` with the model of `pieces`."""
    @staticmethod
    def from_pieces(
        indptr: npt.NDArray[np.int64],
        ids: npt.NDArray[np.int64],
        piece_count: int,
        spelled: tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None = None,
    ) -> PieceTrie:
        """From the pieces of each token, in CSR form; and what the tokens spell of each piece."""
    @classmethod
    def _from_state(
        cls,
        indptr: npt.NDArray[np.int64],
        ids: npt.NDArray[np.int64],
        piece_count: int,
        twins: list[tuple[int, int]],
    ) -> PieceTrie: ...
    def pieces(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The pieces of each token, in CSR form."""
    def slots(self) -> list[npt.NDArray[np.int64]]:
        """The five arrays of `xtoken.trie.Slots`."""
    def lookup(
        self,
        ids: npt.NDArray[np.int64],
        starts: npt.NDArray[np.int64],
        ends: npt.NDArray[np.int64],
        max_depth: int,
        side: Literal["student", "teacher"],
        threads: int,
    ) -> list[npt.NDArray[np.int64]]:
        """The three arrays of `xtoken.trie.PrefixNodes`."""
    def find(self, prefix: Sequence[int]) -> int | None:
        """The node of a prefix."""
    @property
    def piece_count(self) -> int:
        """Size of the vocabulary that the pieces are from."""
    def __len__(self) -> int: ...
    def __eq__(self, other: object, /) -> bool: ...
    def __hash__(self) -> int: ...

@final
class TargetArrays:
    """Targets as flat arrays, as `TargetBuilder` returns them; see `xtoken.targets.Targets`."""

    @property
    def accounts(self) -> npt.NDArray[np.float32]: ...
    @property
    def position_indptr(self) -> npt.NDArray[np.int64]: ...
    @property
    def positions(self) -> npt.NDArray[np.int64]: ...
    @property
    def chunks(self) -> npt.NDArray[np.int64]: ...
    @property
    def tails(self) -> npt.NDArray[np.float64]: ...
    @property
    def open(self) -> npt.NDArray[np.bool_]: ...
    @property
    def group_indptr(self) -> npt.NDArray[np.int64]: ...
    @property
    def probs(self) -> npt.NDArray[np.float32]: ...
    @property
    def depths(self) -> npt.NDArray[np.uint8]: ...
    @property
    def range_indptr(self) -> npt.NDArray[np.int32]: ...
    @property
    def starts(self) -> npt.NDArray[np.int32]: ...
    @property
    def ends(self) -> npt.NDArray[np.int32]: ...

@final
class TargetBuilder:
    """Exact targets of one pair; used through `xtoken.targets`."""

    def __new__(
        cls,
        student: Vocab,
        teacher: Vocab,
        pieces_indptr: npt.NDArray[np.int64],
        pieces: npt.NDArray[np.int64],
        teacher_pieces_indptr: npt.NDArray[np.int64],
        teacher_pieces: npt.NDArray[np.int64],
        specials: Sequence[tuple[int, int]],
        student_stops: Sequence[int],
        teacher_stops: Sequence[int],
    ) -> TargetBuilder: ...
    def tokens(self) -> npt.NDArray[np.int64]:
        """The student tokens that the ranges of targets point into."""
    def roots(self) -> npt.NDArray[np.int64]:
        """The cell of each teacher token, -1 for none."""
    def swallowing(
        self, tokens: npt.NDArray[np.int64], threads: int
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The teacher tokens that the student would have joined to each token, and their offsets:
        [tokens + 1], then the ids."""
    def build(
        self,
        student_ids: npt.NDArray[np.int64],
        student_indptr: npt.NDArray[np.int64],
        teacher_ids: npt.NDArray[np.int64],
        teacher_indptr: npt.NDArray[np.int64],
        student_bounds: npt.NDArray[np.int64],
        teacher_bounds: npt.NDArray[np.int64],
        kinds: npt.NDArray[np.uint8],
        chunk_indptr: npt.NDArray[np.int64],
        column_ids: Sequence[npt.NDArray[np.int64]] | None,
        log_probs: Sequence[npt.NDArray[np.float32]],
        options: tuple[bool, bool, int, int, float, bool, bool],
        threads: int,
    ) -> TargetArrays:
        """The targets of a ragged batch; bounds are one more than chunks per example, predictions a
        table per example, `options` the fields of `xtoken.targets.TargetOptions` and whether
        `accounts` are kept."""

@final
class ForwardKL:
    """W on the columns that P-KL compares, ready for rows of float32 or of float64."""

    def __new__(
        cls,
        inputs: npt.NDArray[np.int64],
        output_ptr: npt.NDArray[np.int64],
        values: npt.NDArray[np.float64],
        *,
        rows: npt.NDArray[np.int64] | None,
        columns: npt.NDArray[np.int64],
        folds: Sequence[tuple[int, int]],
        empty: npt.NDArray[np.int64],
        sizes: tuple[int, int],
        single: bool,
        alone: bool = False,
    ) -> ForwardKL:
        """
        Args:
            inputs, output_ptr, values: W's non-zeros by output, the inputs counted among `rows`.
            rows: the student token of each input; None for all V_s.
            columns: the teacher token of each output.
            folds: teacher tokens, each with the output that its mass is added to.
            empty: student tokens without a row in W.
            sizes: (V_s, V_t).
            single: for rows of float32.
            alone: whether each run tells `log_totals`.
        """

    def run(
        self,
        student: npt.NDArray[Any],
        teacher: npt.NDArray[Any],
        student_rows: npt.NDArray[np.int64],
        teacher_rows: npt.NDArray[np.int64],
        seeds: npt.NDArray[np.float64],
        *,
        temperature: float,
        top_k: int | None,
        gradient: npt.NDArray[Any] | None,
        adds: bool,
        threads: int,
        log_totals: npt.NDArray[np.float64] | None = None,
        whole: bool = False,
    ) -> tuple[
        npt.NDArray[np.bool_],
        npt.NDArray[np.float64],
        npt.NDArray[np.float64],
        npt.NDArray[np.float64],
        npt.NDArray[np.float64],
        npt.NDArray[np.float64],
    ]:
        """Of each row: whether it was computed, loss in nats, the teacher's mass on the kept
        columns, the student's on empty rows of W, the sum of the gradient, the log of the
        teacher's denominator (NaN where unknown).

        Args:
            student, teacher: [rows, columns] logits, C-contiguous.
            student_rows, teacher_rows: [n] the rows of each chunk; the student's distinct.
            seeds: [n] factor of each row's gradient.
            top_k: columns kept of each row, of the teacher's largest logits.
            gradient: like `student`; its rows are written, or added to where `adds`.
            threads: 0 for one per core.
            log_totals: [n] the log of the teacher's softmax denominators, by temperature.
            whole: whether the mass on empty rows is told where W has `rows`; 0 without.

        Raises:
            ShapeError: arrays that do not fit.
        """

@final
class StoredForwardKL:
    """W, ready for stored predictions and rows of float32 or of float64."""

    def __new__(
        cls,
        inputs: npt.NDArray[np.int64],
        output_ptr: npt.NDArray[np.int64],
        values: npt.NDArray[np.float64],
        *,
        places: npt.NDArray[np.int64],
        empty: npt.NDArray[np.int64],
        size: int,
        single: bool,
    ) -> StoredForwardKL:
        """
        Args:
            inputs, output_ptr, values: W's non-zeros by output; its rows sum to 1 or are empty.
            places: [V_t] the output of each teacher token, -1 for none; those of one are added.
            empty: student tokens without a row in W.
            size: V_s.
            single: for rows of float32.
        """

    def run(
        self,
        student: npt.NDArray[Any],
        ids: npt.NDArray[np.int64],
        log_probs: npt.NDArray[Any],
        student_rows: npt.NDArray[np.int64],
        teacher_rows: npt.NDArray[np.int64],
        seeds: npt.NDArray[np.float64],
        *,
        temperature: float,
        factor: float,
        top_k: int,
        tail: tuple[float, int | None] | None,
        whole: bool,
        gradient: npt.NDArray[Any] | None,
        adds: bool,
        threads: int,
    ) -> tuple[
        npt.NDArray[np.bool_],
        npt.NDArray[np.float64],
        npt.NDArray[np.float64],
        npt.NDArray[np.float64],
        npt.NDArray[np.float64],
        npt.NDArray[np.float64],
    ]:
        """As `ForwardKL.run`; the mass on empty rows is 0 unless `whole`.

        Args:
            ids, log_probs: [rows, k] stored predictions, C-contiguous; -inf for no entry.
            factor: what turns them into those of the temperature.
            top_k: the most columns that a row keeps, of its likeliest.
            tail: the least mass of the teacher in its tail, and the number of kept columns that
                leaves none; such a row is not computed. None for no tail.
            whole: whether the student's mass on empty rows is asked for.
        """

def cross_entropy(
    student: npt.NDArray[Any],
    rows: npt.NDArray[np.int64],
    targets: npt.NDArray[np.int64],
    *,
    size: int,
    seed: float,
    gradient: npt.NDArray[Any] | None,
    adds: bool,
    threads: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Of each of `rows` [n] its loss in nats against `targets` [n], NaN where it has no softmax,
    and a number that is finite where all of its gradient is.

    Args:
        student: [rows, columns] logits, of whose columns `size` count.
        seed: what the gradient is multiplied with.
        gradient: like `student`; its rows are written, or added to where `adds`.
    """

def sorted_l1(
    student: npt.NDArray[np.float32],
    teacher: npt.NDArray[np.float32],
    *,
    signs: npt.NDArray[np.float32] | None,
    threads: int,
) -> npt.NDArray[np.float64]:
    """[R] the L1 distance of rows of probabilities, each sorted by falling value; NaN where a value
    is infinite, below 0 or no number, or is -0.

    Args:
        student, teacher: [R, n] and [R, m], neither of them 0, C-contiguous.
        signs: like `student`; the sign of each value's difference is written, 0 at equality. Of
            equal values the first has the highest rank.
        threads: 0 for one per core.

    Raises:
        ShapeError: arrays that do not fit.
    """

def exact_kl(
    student: npt.NDArray[Any],
    rows: npt.NDArray[np.int64],
    targets: tuple[
        npt.NDArray[Any],
        npt.NDArray[np.bool_],
        npt.NDArray[np.int64],
        npt.NDArray[Any],
        npt.NDArray[np.int64],
        npt.NDArray[np.int64],
        npt.NDArray[np.int64],
        npt.NDArray[np.int64],
        npt.NDArray[np.int64],
    ],
    seeds: npt.NDArray[np.float64],
    *,
    size: int,
    factor: float,
    depths: tuple[
        npt.NDArray[np.float64],
        npt.NDArray[np.float64],
        npt.NDArray[np.int64],
        npt.NDArray[np.float64],
        npt.NDArray[np.float64],
        npt.NDArray[np.int64],
        npt.NDArray[np.int64],
        npt.NDArray[np.int64],
    ]
    | None,
    gradient: npt.NDArray[Any] | None,
    adds: bool,
    threads: int,
) -> tuple[
    npt.NDArray[np.bool_],
    npt.NDArray[np.float64],
    npt.NDArray[np.float64],
    npt.NDArray[np.float64],
    npt.NDArray[np.float64],
]:
    """Forward exact KL of positions.

    Args:
        student: [rows, columns] logits, of whose columns `size` count.
        rows: [P] the row of each position; distinct.
        targets: tails [P], open [P], group_ptr [P + 1], probs [G], depths [G], as those of a
            `TargetBatch`; range_ptr [G + 1], starts [R], ends [R] and order [L], as those of its
            `GroupTokens`.
        seeds: [P] what each gradient is multiplied with.
        factor: weight of all groups and tails where there are no `depths`.
        depths: weights of groups [G] and tails [P]; union_ptr [P + 1], mass and weight of each
            union; member_ptr [P + 1], group and union of each member.
        gradient: like `student`; its rows are written, or added to where `adds`.

    Returns: of each position, whether it was computed, nats, the target's tail, the KL below depth
        0 by the chain rule, and the sum of the gradient.

    Raises:
        ShapeError, FormatError: arrays that do not fit.
    """

def prefix_kl_below(
    trie: PieceTrie,
    student: npt.NDArray[Any],
    teacher: npt.NDArray[Any],
    student_rows: npt.NDArray[np.int64],
    teacher_rows: npt.NDArray[np.int64],
    ptr: npt.NDArray[np.int64],
    nodes: npt.NDArray[np.int64],
    seeds: npt.NDArray[np.float64],
    *,
    ids: npt.NDArray[np.int64] | None,
    log_totals: npt.NDArray[np.float64] | None,
    sizes: tuple[int, int],
    mirrored: bool,
    temperature: float,
    min_mass: float,
    end: bool,
    gradient: npt.NDArray[Any] | None,
    threads: int,
) -> tuple[
    npt.NDArray[np.bool_],
    npt.NDArray[np.float64],
    npt.NDArray[np.bool_],
    npt.NDArray[np.float64],
    npt.NDArray[np.float64],
]:
    """Prefix KL at `nodes` [n] of a trie, one row of each side for each.

    Args:
        student: [rows, columns] logits, of whose columns V_s count.
        teacher: the same of V_t; with `ids`, log-probabilities [rows, k] of these.
        ptr: [chunks + 1] the range of each chunk's nodes.
        seeds: [n] what each gradient is multiplied with.
        log_totals: [n] the log of the denominator of the teacher's softmax of logits, NaN where
            unknown.
        sizes: V_s and V_t.
        mirrored: the teacher has the tokens below, and the student says the next piece.
        gradient: like `student`; added to.

    Returns: of each node, whether it was computed, nats, whether it is compared, the teacher's
        known mass, and the sum of what was added.
    """

def column_masses(
    logits: npt.NDArray[Any],
    rows: npt.NDArray[np.int64],
    *,
    size: int,
    temperature: float,
    threads: int,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """[size] the sum of the softmaxes of [n] rows of [rows, columns] logits, and [n] the logs of
    their denominators."""
