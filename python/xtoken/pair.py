"""The pair: two tokenizers, and everything that follows from them alone."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict, cast, overload

from xtoken._core import Vocab
from xtoken._files import as_path
from xtoken._pair_files import read_pair, write_pair
from xtoken.align import Aligner, Alignment
from xtoken.align.ids import Ids
from xtoken.audit import Audit
from xtoken.audit import audit as audit_projection
from xtoken.audit.prefix_coverage import supervision
from xtoken.data.columns import Column, tokenize_columns
from xtoken.data.encode import Encoder
from xtoken.data.examples import ExampleSet, encode_examples
from xtoken.data.rows import Readable
from xtoken.data.stops import vocab_with_stops
from xtoken.errors import (
    ArgumentTypeError,
    OptionError,
)
from xtoken.projection import Explanation, Projection, ProjectionOptions
from xtoken.projection.options import Reverse, SpecialRoles, options_for, plain_options
from xtoken.trie import PairTries
from xtoken.vocab.fingerprints import PairFingerprint
from xtoken.vocab.side import Side
from xtoken.vocab.source import LoadedTokenizer, TokenizerSource

if TYPE_CHECKING:
    from typing import Unpack

    from transformers import PreTrainedModel

    from xtoken.distillation import Distiller, DistillerOptions, DistillLossName, MultiDistiller
    from xtoken.transfer import TransferCounts


class PairOptions(TypedDict, total=False):
    """How the projection of a pair is built; see `Projection.build` for each."""

    top_k: int
    decay: float
    max_pieces: int
    canonical: Iterable[str]
    reverse: bool | Reverse
    special_roles: SpecialRoles | None
    name_similarity: float


class Pair:
    """A student's and a teacher's tokenizer, and what follows from them.

    All parts are made when they are first asked for, once; the projection is also kept on disk, by
    the fingerprints of both tokenizers. Everything that is made from a pair carries its
    fingerprint, and is refused where it meets another pair.

    Args:
        student, teacher: a transformers fast tokenizer, a `tokenizers.Tokenizer`, a tiktoken
            `Encoding`, a directory or file that holds one, the name of a model on the hub
            (owner/model), or a `Vocab` (which cannot encode text).
        cache_dir: where the projection is kept; None for the user's cache folder, False for
            nowhere. See `Projection.build`.
        threads: at most this many for the aligner and the projection; None for one per core.
        options: how the projection is built, see `Projection.build`.

    Raises:
        MissingFileError, ModelSourceError, UnsupportedTokenizerError: a tokenizer cannot be read.
        OptionError: an option is outside its range.

    Example:
        >>> import xtoken
        >>> student = xtoken.Vocab.from_tokens([b"2", b"0", b"1", b"201"], ranked=True)
        >>> teacher = xtoken.Vocab.from_tokens([b"1", b"0", b"2"], ranked=True)
        >>> pair = xtoken.Pair(student, teacher, cache_dir=False)
        >>> pair.align([3], [2, 1, 0]).shapes()
        {(1, 3): 1}
        >>> [entry.token for entry in pair.explain("201").entries]
        ["'2'", "'0'", "'1'"]
    """

    def __init__(
        self,
        student: TokenizerSource | Side,
        teacher: TokenizerSource | Side,
        *,
        cache_dir: str | PathLike[str] | bool | None = None,
        threads: int | None = None,
        **options: Unpack[PairOptions],
    ) -> None:
        self.student = student if isinstance(student, Side) else Side("student", student)
        self.teacher = teacher if isinstance(teacher, Side) else Side("teacher", teacher)
        self.cache_dir = cache_dir
        self.threads = threads
        self.options = cast(PairOptions, plain_options(options))
        self._encoders: dict[tuple[object, ...], tuple[Encoder, Encoder]] = {}
        known = PairOptions.__annotations__
        unknown = next((name for name in options if name not in known), None)
        if unknown is not None:
            raise OptionError(f"Pair has no option {unknown!r}; it knows {', '.join(known)}")

    def with_options(self, **options: Unpack[PairOptions]) -> Pair:
        """The same two tokenizers with W built in another way; see `Projection.build`."""
        made: PairOptions = {**self.options, **options}
        return Pair(
            self.student, self.teacher, cache_dir=self.cache_dir, threads=self.threads, **made
        )

    @cached_property
    def student_vocab(self) -> Vocab:
        """What each student token contributes to the text, and what stops the student."""
        return vocab_with_stops(self.student)

    @cached_property
    def teacher_vocab(self) -> Vocab:
        """What each teacher token contributes to the text, and what stops the teacher."""
        return vocab_with_stops(self.teacher)

    @property
    def student_tokenizer(self) -> LoadedTokenizer:
        """The student's tokenizer object, read from its path or hub name where one was given."""
        return self.student.tokenizer

    @property
    def teacher_tokenizer(self) -> LoadedTokenizer:
        """The teacher's tokenizer object."""
        return self.teacher.tokenizer

    @property
    def sizes(self) -> tuple[int, int]:
        """(V_s, V_t): the numbers of ids of both vocabularies."""
        return len(self.student_vocab), len(self.teacher_vocab)

    @property
    def fingerprints(self) -> PairFingerprint:
        """The fingerprints of both vocabularies, which all that is made from the pair carries."""
        return PairFingerprint(self.student_vocab.fingerprint, self.teacher_vocab.fingerprint)

    @cached_property
    def fingerprint(self) -> str:
        """Stable hash of both tokenizers and of how the projection is built: 32 hex digits."""
        sides = [
            [vocab.fingerprint, vocab.model_fingerprint, sorted(vocab.roles.items()), vocab.stops]
            for vocab in (self.student_vocab, self.teacher_vocab)
        ]
        text = json.dumps([sides, self.projection_options.to_json()])
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    @cached_property
    def projection_options(self) -> ProjectionOptions:
        """How W is built: the defaults with what the pair was given, special tokens looked up."""
        return options_for(self.student_vocab, self.teacher_vocab, **self._projection_options())

    @cached_property
    def aligner(self) -> Aligner:
        """Aligns token sequences of the two."""
        return Aligner(self.student_vocab, self.teacher_vocab, threads=self.threads)

    @cached_property
    def projection(self) -> Projection:
        """W [V_s, V_t]; from the cache where an equal pair was built before."""
        return Projection.build(
            self.student_vocab,
            self.teacher_vocab,
            threads=self.threads,
            cache_dir=self.cache_dir,
            **self.options,
        )

    @property
    def tries(self) -> PairTries:
        """The tokens of each side by the pieces that the other spells them with."""
        return PairTries.from_projection(self.projection)

    @overload
    def align(self, student: str) -> Alignment: ...
    @overload
    def align(self, student: Ids, teacher: Ids) -> Alignment: ...
    def align(self, student: str | Ids, teacher: Ids | None = None) -> Alignment:
        """The alignment of a text under both tokenizers, or of the ids of both sides.

        Args:
            student: a text, or the ids of the student's tokens.
            teacher: the ids of the teacher's tokens; left out with a text.

        Raises:
            ArgumentTypeError: a text with ids, or the ids of one side alone.
            TokenIdError: an id is outside its vocabulary.
        """
        if isinstance(student, str):
            if teacher is not None:
                raise ArgumentTypeError(
                    "align got a text and ids; pass a text, or the ids of both sides"
                )
            (student,), (teacher,) = (side.encode([student]) for side in self.sides)
        if teacher is None:
            raise ArgumentTypeError(
                "align got the ids of one side; pass those of the teacher too, or a text"
            )
        return self.aligner.align(student, teacher)

    def encoders(self, date: datetime.date | None = None) -> tuple[Encoder, Encoder]:
        """Both sides' encoders of texts and conversations.

        Args:
            date: the day that chat templates print; None for today.
        """
        templates = [getattr(side.tokenizer, "chat_template", None) for side in self.sides]
        # Kept, as reading a template takes long; a template may be replaced.
        key = (date or datetime.date.today(), *map(repr, templates))
        if key not in self._encoders:
            student, teacher = (
                Encoder(
                    side.tokenizer,
                    side.name,
                    vocab=vocab,
                    date=date,
                    generation_config=side.generation_config,
                )
                for side, vocab in zip(
                    self.sides, (self.student_vocab, self.teacher_vocab), strict=True
                )
            )
            self._encoders = {key: (student, teacher)}
        return self._encoders[key]

    def examples(
        self,
        documents: Sequence[Readable],
        *,
        max_tokens: int | None = None,
        date: datetime.date | None = None,
        strict: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> ExampleSet:
        """Tokenize texts and conversations on both sides, align and cut; see `encode_examples`.

        Args:
            documents: texts, `Completion`s, `Conversation`s, lists of messages, or rows with one
                of these; see `document_of`.
            max_tokens: longest example on either side, cut at a chunk boundary; None for no limit.
            date: the day that chat templates print; None for today.
            strict: whether what cannot be read or printed ends the call, or is left out.
            progress: called with (documents done, documents to do).

        Raises:
            ArgumentTypeError: an item is no document, or all of them are no list.
            OptionError: `max_tokens` is no whole number of at least 2.
            DataError: a document cannot be read or printed, or no example is left.
        """
        return encode_examples(
            documents,
            self.encoders(date),
            self.aligner,
            max_tokens=max_tokens,
            strict=strict,
            progress=progress,
        )

    def tokenize(
        self,
        batch: Mapping[str, Sequence[object]],
        *,
        max_tokens: int | None = None,
        date: datetime.date | None = None,
        field: str | None = None,
    ) -> dict[str, Column]:
        """Tokenize and align rows given by column: a function for `datasets` and Ray.

            rows = dataset.map(pair.tokenize, batched=True, num_proc=8,
                               fn_kwargs={"max_tokens": 1024}, remove_columns=dataset.column_names)
            rows = ray_dataset.map_batches(pair.tokenize, fn_kwargs={"max_tokens": 1024})

        `DistillTrainer` and `Distiller.collate` take such rows; `example_from_columns` gives back
        the `Example`.

        Args:
            batch: columns of equal length, with what `document_of` reads. All other columns are
                passed over; remove them, as a conversation may give several rows.
            max_tokens, date: as in `examples`. Results are kept by `datasets` under these, so pass
                a date where a chat template prints one.
            field: the column of the text or the messages; None takes those of `document_of`.

        Returns: a row for each example, by column: lists of ints `student_ids` and `teacher_ids`,
            of bools `student_loss_mask` and `teacher_loss_mask`, the alignment's `student_bounds`,
            `teacher_bounds`, `chunk_kinds` and `byte_counts`, the fingerprint of the `pair`, `part`
            (0 for the first row of a document), whether it was `cut` at max_tokens, and `left_out`:
            empty, or why there is no example, in a row of one token without a loss. So rows that
            cannot be used are counted and named, and never taught: `ColumnExamples(rows).left_out`.

        Raises:
            OptionError: `max_tokens` is no whole number of at least 2.
            ArgumentTypeError, ShapeError: `batch` is no columns of equal length.

        >>> from tokenizers import Tokenizer, decoders, models
        >>> student = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")]))
        >>> teacher = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
        >>> student.decoder = teacher.decoder = decoders.ByteLevel()
        >>> rows = Pair(student, teacher, cache_dir=False).tokenize({"text": ["aab", " "]})
        >>> rows["student_ids"], rows["left_out"]
        ([[0, 2], [0]], ['', 'its text is blank'])
        """
        return tokenize_columns(
            batch,
            self.encoders(date),
            self.aligner,
            self.fingerprints,
            max_tokens=max_tokens,
            field=field,
        )

    @property
    def sides(self) -> tuple[Side, Side]:
        """Student and teacher."""
        return self.student, self.teacher

    def explain(self, token: int | str | bytes) -> Explanation:
        """One row of W in words; see `Projection.explain`."""
        return self.projection.explain(token)

    def audit(self, text: str | None = None) -> Audit:
        """What suits the pair: coverage by class, and the loss that it speaks for.

        Args:
            text: a sample, to count the chunks of; None for the vocabularies alone.
        """
        found = audit_projection(self.projection)
        if text is None:
            return found
        student_ids, teacher_ids = (side.encode([text])[0] for side in self.sides)
        alignment = self.aligner.align(student_ids, teacher_ids)
        counted = supervision(self.projection, alignment, student_ids, teacher_ids)
        return replace(found, supervision=counted)

    def distiller(
        self, loss: DistillLossName = "prefix-kl", **options: Unpack[DistillerOptions]
    ) -> Distiller:
        """The loss of this pair as a module; see `xtoken.distillation.Distiller`."""
        from xtoken.distillation import Distiller

        return Distiller(self, loss, **options)

    def transfer_embeddings(
        self,
        model: PreTrainedModel,
        *,
        decay: float | None = 1.0,
        pad_to_multiple_of: int = 1,
        progress: Callable[[int, int], None] | None = None,
    ) -> TransferCounts:
        """Give a model of the teacher's tokenizer the student's: the start of a tokenizer transfer.

        In place. The new embedding and head rows are W times the old ones: a token with the same
        bytes keeps its row as it was, one that the old tokenizer splits gets the mean of its
        pieces' rows, one without a source the mean of all rows with text. Everything else stays, so
        that what is left to do is a short distillation from the model as it was.
        `config` and `generation_config` get the size and the special tokens of the new tokenizer;
        save that beside the model.

        Args:
            model: of transformers, with the teacher's tokenizer; head and embedding tied or not,
                whatever its config says of it, with a bias or without, padded or not, or no head.
            decay: weight of a piece over that of the one before in a mean of the first
                `max_pieces`, whatever the pair's `top_k`, 0 to 1; None for the pair's own W. Even
                weights are best: with 0.1 the rows of all tokens with one first piece are nearly
                equal, and as long as its own.
            pad_to_multiple_of: the number of rows is rounded up to it.
            progress: called with (rows done, rows to do).

        Returns: how many rows were copied, averaged and without a source, by class of text. A
        warning names token ids of the configurations that could not be taken out.

        Raises:
            ArgumentTypeError: `model` is not one of transformers.
            ModelSourceError: its rows are not those of the pair's teacher; it has quantized tables,
                adapters or further tables by token; it needs a padding token, which the new
                tokenizer lacks. Nothing has changed then.
            OptionError: `decay` or `pad_to_multiple_of` is out of range.

        Example:
            >>> import xtoken
            >>> from transformers import LlamaConfig, LlamaForCausalLM
            >>> new = xtoken.Vocab.from_tokens([b"2", b"0", b"20", b"x"], ranked=True)
            >>> old = xtoken.Vocab.from_tokens([b"0", b"1", b"2"], ranked=True)
            >>> model = LlamaForCausalLM(LlamaConfig(
            ...     vocab_size=3, hidden_size=4, intermediate_size=4, num_hidden_layers=1,
            ...     num_attention_heads=1, bos_token_id=None, eos_token_id=None))
            >>> counts = xtoken.Pair(new, old, cache_dir=False).transfer_embeddings(model).total
            >>> counts.copied, counts.averaged, counts.without_source, model.config.vocab_size
            (2, 1, 1, 4)

        Source: FVT (Gee et al., 2022), the even mean of a token's pieces.
        """
        from xtoken.transfer import transfer_embeddings

        return transfer_embeddings(
            self, model, decay=decay, pad_to_multiple_of=pad_to_multiple_of, progress=progress
        )

    def save(self, directory: str | PathLike[str]) -> None:
        """Write the pair: both vocabularies, W, and the tokenizers that can be written, each with
        the generation config that lists what stops its model. A pair that is there is replaced.

        Raises:
            ArgumentTypeError: `directory` is no path.
            FailedWriteError: the directory cannot be written.
            OptionError: it holds a `student` or `teacher` that is of no saved pair.
        """
        write_pair(
            as_path("directory", directory),
            self.projection,
            self.sides,
            (self.student_vocab, self.teacher_vocab),
            fingerprint=self.fingerprint,
            options=self._projection_options(),
        )

    @classmethod
    def load(cls, directory: str | PathLike[str]) -> Pair:
        """Read what `save` wrote.

        Raises:
            ArgumentTypeError: `directory` is no path.
            MissingFileError: the directory holds no pair.
            FormatError: a file is damaged, or of another pair or a newer version.
        """
        saved = read_pair(as_path("directory", directory))
        pair = cls(*saved.sides, **cast(PairOptions, saved.options))
        projection = Projection.load(saved.projection, pair.student_vocab, pair.teacher_vocab)
        pair.__dict__["projection"] = projection
        saved.check(pair.fingerprint)
        return pair

    def __getstate__(self) -> dict[str, Any]:
        """What other processes make the same pair from, the same bytes however far this one has
        come: `datasets` recognizes by them what it has tokenized before."""
        return {
            "sides": self.sides,
            "fingerprint": self.fingerprint,
            "templates": [getattr(side.tokenizer, "chat_template", None) for side in self.sides],
            "options": dict(sorted(self.options.items())),
            "cache_dir": self.cache_dir,
            "threads": self.threads,
            "projection": self._other_projection(),
        }

    def _other_projection(self) -> Projection | None:
        """W where the options do not say it, as a learned one that was loaded."""
        own: Projection | None = self.__dict__.get("projection")
        return None if own is None or own.options.origin == "built" else own

    def __setstate__(self, state: dict[str, Any]) -> None:
        sides = state["sides"]
        for side, template in zip(sides, state["templates"], strict=True):
            if getattr(side.tokenizer, "chat_template", None) != template:
                cast(Any, side.tokenizer).chat_template = template
        Pair.__init__(
            self, *sides, cache_dir=state["cache_dir"], threads=state["threads"], **state["options"]
        )
        if state["projection"] is not None:
            self.__dict__["projection"] = state["projection"]

    def _projection_options(self) -> dict[str, Any]:
        defaults = Projection.build.__kwdefaults__ or {}
        return {name: defaults[name] for name in PairOptions.__annotations__} | self.options

    def __repr__(self) -> str:
        names = " <- ".join(
            f"{side.label} ({len(side.vocab):,} tokens, {side.vocab.family})" for side in self.sides
        )
        built = self.__dict__.get("projection")
        w = "W not built yet" if built is None else f"W of {len(built.indices):,} entries"
        return f"Pair({names}; {w})"


def distiller(
    teachers: Sequence[Pair | Distiller],
    weights: Sequence[float] | Literal["ce", "entropy", "max_prob"] | None = None,
    *,
    kd_weight: float | Literal["balanced"] = 1.0,
    ce_weight: float = 0.0,
) -> MultiDistiller:
    """The loss of several teachers as one module.

    Args:
        teachers: pairs of one student (`prefix-kl` then), or distillers of pairs.
        weights: one per teacher, 1 each if None; or what decides them per sample, the teacher's
            confidence: `ce`, `entropy` or `max_prob`.
        kd_weight, ce_weight: of the weighted sum and of the student's cross-entropy.

    Raises:
        OptionError, PairError: see `MultiDistiller`.
    """
    from xtoken.distillation import several

    return several(teachers, weights, kd_weight=kd_weight, ce_weight=ce_weight)
