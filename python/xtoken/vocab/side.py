"""One tokenizer of a pair: its vocabulary, and the ids that it makes of texts."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from xtoken._checks import expect_list, half_character, panics_refused
from xtoken._core import Vocab
from xtoken._extras import installed
from xtoken._files import read_json
from xtoken.errors import (
    DataError,
    FormatError,
    MissingFileError,
    ModelSourceError,
    PairError,
    UnsupportedTokenizerError,
)
from xtoken.vocab.content import content_digest, splits_special_tokens
from xtoken.vocab.load import hub_file, is_hub_name, is_made_by_class, load_tokenizer
from xtoken.vocab.read import DIRECTORY_FILES
from xtoken.vocab.source import LoadedTokenizer, TokenizerSource

if TYPE_CHECKING:
    from tokenizers import Tokenizer

GENERATION_CONFIG_FILE = "generation_config.json"

_TEMPLATE_FILES = ("chat_template.jinja", "chat_template.json")

SideName = Literal["student", "teacher"]


class Side:
    """A tokenizer and what follows from it; the tokenizer is read when it is first needed.

    Args:
        name: `student` or `teacher`, for messages.
        source: a tokenizer object, a directory, a file, a hub name, or a `Vocab`, which has no
            encoder for texts.
        vocab: of the tokenizer, where it is known already.
        label: a short name for people, in place of the one that the source gives.
        splits: see `splits`, of a source that is a path.
    """

    # As `xtoken.data.stops.vocab_with_stops` makes it, once for all pairs of the side.
    vocab_with_stops: Vocab | None = None
    # Of another process, which this one was sent from.
    _content: str | None = None

    def __init__(
        self,
        name: SideName,
        source: TokenizerSource,
        *,
        vocab: Vocab | None = None,
        label: str | None = None,
        splits: bool = False,
    ) -> None:
        self._label = label
        self._splits = splits
        self.name = name
        self.source = source
        if vocab is not None:
            self.vocab = vocab

    def __getstate__(self) -> dict[str, object]:
        """What it was made from: the rest is read again, and refused where it reads otherwise."""
        return {
            "name": self.name,
            "source": self.source,
            "_label": self._label,
            "_content": self.content,
            "_splits": self.splits,
        }

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        if not self.is_path:
            self._set_splits(self.source)

    @property
    def splits(self) -> bool:
        """Whether special tokens in a text are read as text. A `tokenizers.Tokenizer` that is set
        so neither writes nor pickles it."""
        read = self.source if not self.is_path else self.__dict__.get("tokenizer")
        return self._splits if read is None else splits_special_tokens(read)

    def _set_splits(self, tokenizer: object) -> None:
        if self._splits and hasattr(tokenizer, "encode_special_tokens"):
            cast(Any, tokenizer).encode_special_tokens = True

    @property
    def content(self) -> str | None:
        """As `content_digest` gives it of the tokenizer as it is now; None where there is none."""
        try:
            return content_digest(self.tokenizer, again=True)
        except (UnsupportedTokenizerError, MissingFileError, ModelSourceError):
            return None

    @property
    def is_path(self) -> bool:
        """Whether the source names a place to read from, rather than being a tokenizer."""
        return isinstance(self.source, str | PathLike)

    @cached_property
    def tokenizer(self) -> LoadedTokenizer:
        """The tokenizer object; of a `Vocab` there is none.

        Raises:
            UnsupportedTokenizerError: the source is a vocabulary without an encoder for texts.
            MissingFileError, ModelSourceError: a path or hub name cannot be read.
        """
        if isinstance(self.source, Vocab):
            raise UnsupportedTokenizerError(
                f"the {self.name} is a Vocab, which cannot encode text; pass the tokenizer, or ids"
            )
        if not isinstance(self.source, str | PathLike):
            return self.source
        tokenizer = load_tokenizer(self.source)
        self._set_splits(tokenizer)
        known = self.__dict__.get("vocab")
        if known is not None and _differs(read := Vocab.from_tokenizer(tokenizer), known):
            raise PairError(
                f"the {self.name} tokenizer of {self.source} reads as fingerprint "
                f"{read.fingerprint[:12]} (V = {len(read)}), its file as {known.fingerprint[:12]} "
                f"(V = {len(known)}); pass the tokenizer object in place of the path"
            )
        if self._content is not None and content_digest(tokenizer) != self._content:
            raise PairError(
                f"the {self.name} tokenizer of {self.source} is not as it was when it was sent to "
                "this process: it was changed in memory, or on the disk; pass the tokenizer object "
                "in place of the path"
            )
        return tokenizer

    @cached_property
    def vocab(self) -> Vocab:
        """What each id contributes to the text.

        Raises:
            UnsupportedTokenizerError: its tokens cannot be read exactly as bytes.
        """
        if isinstance(self.source, Vocab):
            return self.source
        source = self.source
        if not isinstance(source, str | PathLike) or is_hub_name(source):
            return Vocab.from_tokenizer(self.tokenizer)
        if "tokenizer" in self.__dict__ or is_made_by_class(source):
            # What transformers cannot make encodes no text, and says so then.
            with contextlib.suppress(ModelSourceError, UnsupportedTokenizerError):
                return Vocab.from_tokenizer(self.tokenizer)
        return Vocab.from_path(source)

    @cached_property
    def has_template(self) -> bool:
        """Whether the tokenizer has a chat template, which this installation can print."""
        if not isinstance(self.source, str | PathLike):
            return bool(getattr(self.source, "chat_template", None))
        if not installed("transformers"):
            return False
        if "tokenizer" in self.__dict__ or is_hub_name(self.source):
            return bool(getattr(self.tokenizer, "chat_template", None))
        folder = Path(self.source)
        if any((folder / name).is_file() for name in _TEMPLATE_FILES):
            return True
        file = folder / "tokenizer_config.json"
        config = read_json(file, "tokenizer config") if file.is_file() else None
        return isinstance(config, dict) and bool(config.get("chat_template"))

    @cached_property
    def generation_config(self) -> Mapping[str, object] | None:
        """The content of the model's `generation_config.json`, from beside the tokenizer or from
        the hub: it lists what stops the model."""
        place = self.source if self.is_path else getattr(self.source, "name_or_path", None)
        if not isinstance(place, str | PathLike) or not str(place):
            return None
        file: Path | None = Path(place) / GENERATION_CONFIG_FILE
        if is_hub_name(place):
            file = hub_file(str(place), GENERATION_CONFIG_FILE)
        if file is None or not file.is_file():
            return None
        content = read_json(file, "generation config")
        if not isinstance(content, dict):
            raise FormatError(
                f"generation config {file} holds a {type(content).__name__}, expected an object; "
                "write it again with generation_config.save_pretrained"
            )
        return content

    @property
    def label(self) -> str:
        """A short name for people: the folder, the hub name, or the tokenizer's class."""
        if self._label is not None:
            return self._label
        if self.is_path:
            path = Path(str(self.source))
            # A tokenizer.json is called as its folder, which is called as the model.
            if path.name in DIRECTORY_FILES:
                return path.resolve().parent.name
            return path.name.partition(".json")[0] or path.resolve().name
        name = getattr(self.source, "name_or_path", "") or ""
        return Path(name).name or type(self.source).__name__

    def encode(self, texts: Sequence[str], *, add_special_tokens: bool = True) -> list[list[int]]:
        """The ids of each text.

        Args:
            texts: whole texts; neither padded nor truncated.
            add_special_tokens: whether those that the tokenizer adds (BOS, EOS) are there.

        Raises: as `encode_texts`.
        """
        return encode_texts(self._whole(), texts, add_special_tokens=add_special_tokens)

    @cached_property
    def _whole(self) -> Untruncated:
        return Untruncated(self.tokenizer)

    def __repr__(self) -> str:
        return f"Side({self.name!r}, {self.label!r})"


def labels(student: Side, teacher: Side) -> tuple[str, str]:
    """Short names of two sides; of equal ones, as much of their paths as tells them apart."""
    names = student.label, teacher.label
    if names[0] != names[1] or not (student.is_path and teacher.is_path):
        return names
    parts = [Path(str(side.source)).resolve().parts for side in (student, teacher)]
    for length in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-length:]) for part in parts]
        if ends[0] != ends[1]:
            return ends[0], ends[1]
    return names


class Untruncated:
    """Gives a tokenizer, or a copy of a `tokenizers.Tokenizer` that is set to pad or truncate at
    the time: it is the user's, and may be set to at any."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._copy: Any = None

    def __call__(self) -> Any:
        tokenizer = self._tokenizer
        if not hasattr(tokenizer, "no_truncation"):
            return tokenizer  # transformers does neither unless a call asks for it
        if tokenizer.truncation is None and tokenizer.padding is None:
            return tokenizer
        if self._copy is None:
            self._copy = with_own_settings(tokenizer)
        # It may be set to others at any time, too.
        self._copy.post_processor = tokenizer.post_processor
        self._copy.encode_special_tokens = tokenizer.encode_special_tokens
        return self._copy


def with_own_settings(tokenizer: Tokenizer) -> Tokenizer:
    """One with the same model, normalizer, pre-tokenizer and added tokens, which neither pads nor
    truncates, with no post-processor yet.

    The model is the same object: to print a large one and to read it again takes half a second.
    """
    made = type(tokenizer)(tokenizer.model)
    # Before the tokens, which are matched in normalized text.
    if tokenizer.normalizer is not None:
        made.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        made.pre_tokenizer = tokenizer.pre_tokenizer
    added = tokenizer.get_added_tokens_decoder()
    made.add_tokens([added[token_id] for token_id in sorted(added)])
    made.encode_special_tokens = tokenizer.encode_special_tokens
    return made


def encode_texts(
    tokenizer: Any, texts: Sequence[str], *, add_special_tokens: bool = True
) -> list[list[int]]:
    """The ids that a transformers tokenizer, a `tokenizers.Tokenizer` or a tiktoken `Encoding`
    makes of each text, whole: neither padded nor truncated.

    Raises:
        ArgumentTypeError: `texts` is one text, or one of them is none.
        DataError: one holds half a character, which no tokenizer takes.
    """
    expect_list("texts", texts, str, "texts (str)")
    for text in texts:
        fault = half_character(text)
        if fault is not None:
            raise DataError(f"text {text[:40]!r} {fault}")
    with panics_refused("a text"):
        if hasattr(tokenizer, "apply_chat_template"):  # transformers
            # verbose=False: what is longer than the model's context is cut later or refused.
            rows = tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)
            return [list(row) for row in rows["input_ids"]]
        if hasattr(tokenizer, "to_str"):  # tokenizers
            encodings = tokenizer.encode_batch(list(texts), add_special_tokens=add_special_tokens)
            return [list(encoding.ids) for encoding in encodings]
        return [list(row) for row in tokenizer.encode_batch(list(texts), disallowed_special=())]


def _differs(one: Vocab, other: Vocab) -> bool:
    # Other roles may have been given to it since.
    found = [
        (
            *(each.fingerprint, each.model_fingerprint, each.dummy_prefix),
            *(each.roles.get(role) for role in ("bos", "eos", "unk")),
        )
        for each in (one, other)
    ]
    return found[0] != found[1]
