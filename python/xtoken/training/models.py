"""A student and a teacher by directory or hub name, checked before any minute is spent."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import torch
from torch import nn

from xtoken._core import Vocab
from xtoken._files import path_to_read
from xtoken.distillation import DistillLossName
from xtoken.errors import MissingFileError, ModelSourceError, OptionError
from xtoken.pair import Pair
from xtoken.teachers.forward import position_limit
from xtoken.teachers.live import LiveTeacher
from xtoken.teachers.load_model import load_causal_lm
from xtoken.teachers.served import ApiName, PrefetchedTeacher, Probe, ServedTeacher
from xtoken.teachers.served.client import without_password
from xtoken.teachers.store import TopKStore
from xtoken.teachers.store_notes import TOKENIZER_FOLDER
from xtoken.training.config import TeacherDtype
from xtoken.vocab.head_size import least_columns
from xtoken.vocab.load import by_transformers, is_hub_name, no_directory


@dataclass(frozen=True)
class ServedSource:
    """A teacher that a server runs: where it is, and how it is asked; see `ServedTeacher`."""

    url: str = field(repr=False)  # with its password
    api: str = "auto"
    model: str | None = None
    concurrency: int = 8
    timeout: float = 120.0

    @property
    def address(self) -> str:
        """The URL without a name and password."""
        return without_password(self.url)


@dataclass(frozen=True)
class ModelPair:
    """The two models of a run by where they are, and the pair of their tokenizers.

    Attributes:
        student_source, teacher_source: directories that `save_pretrained` wrote, or hub names.
        pair: of their tokenizers, `transformers` fast tokenizers.
        store: folder with the teacher's predictions, in place of its weights; of `teacher_source`
            only the tokenizer is read then.
        served: where a server runs the teacher, in place of its weights; the same.
        weight, loss: of this teacher among several; None for the loss of the settings.
        name: by which a column of the data names the teacher; None for the last part of its source.
    """

    student_source: str
    teacher_source: str
    pair: Pair
    store: Path | None = None
    weight: float = 1.0
    loss: DistillLossName | None = None
    name: str | None = None
    served: ServedSource | None = None

    @property
    def teacher_name(self) -> str:
        """The name, or the last part of where the predictions come from."""
        return self.name or Path(self.store or self.teacher_source).name

    def check_positions(self, max_tokens: int) -> None:
        """Refuse examples that are longer than a model has positions.

        Raises:
            OptionError: names the side and its limit.
        """
        sources = [("student", self.student_source)]
        if self.store is None and self.served is None:
            sources.append(("teacher", self.teacher_source))
        for side, source in sources:
            limit = _positions(source)
            if limit is not None and max_tokens > limit:
                raise OptionError(
                    f"max_tokens = {max_tokens}, but the {side} {source} has {limit} positions; "
                    f"pass max_tokens = {limit} or less"
                )

    def load_student(self, source: Path | str | None = None) -> nn.Module:
        """Load the student in float32, fresh from its source, or from a checkpoint of it."""
        return _load_model("student", str(source or self.student_source), self.pair.student_vocab)

    def load_teacher(self, device: torch.device, dtype: TeacherDtype = "float32") -> LiveTeacher:
        """Load the teacher onto a device; `auto` keeps the dtype of its files."""
        wanted = dtype if dtype == "auto" else getattr(torch, dtype)
        model = _load_model("teacher", self.teacher_source, self.pair.teacher_vocab, wanted)
        return LiveTeacher(model.to(device))

    def served_teacher(self, top_k: int, folder: Path) -> PrefetchedTeacher:
        """Ask for the teacher's server.

        Args:
            top_k: columns that it is asked for.
            folder: keeps its answer to a fixed prompt, by which a server that rounds otherwise from
                one start to the next is recognised in a later run.

        Raises:
            OptionError, ServerError: as `ServedTeacher`.
        """
        assert self.served is not None
        served = ServedTeacher(
            self.served.url,
            vocab=self.pair.teacher_vocab,
            top_k=top_k,
            api=cast(ApiName, self.served.api),
            model=self.served.model,
            concurrency=self.served.concurrency,
            timeout=self.served.timeout,
        )
        try:
            name = f"{self.served.address} {served.model} {self.pair.teacher_vocab.fingerprint}"
            digest = hashlib.blake2b(name.encode(), digest_size=8).hexdigest()
            path = folder / f"served-{digest}.json"
            if not path.exists() or not served.recognise(Probe.load(path)):
                folder.mkdir(parents=True, exist_ok=True)
                served.probe.save(path)
        except BaseException:
            served.close()
            raise
        return PrefetchedTeacher(served)


def load_models(
    student: Path | str,
    teacher: Path | str | None = None,
    *,
    store: Path | str | None = None,
    served: ServedSource | None = None,
) -> ModelPair:
    """Read both tokenizers.

    Args:
        student, teacher: a directory that `save_pretrained` wrote, or the name of a model on the
            hub ("owner/model").
        store: folder with the teacher's predictions, as `xtoken teach` or a `TopKStore` wrote it.
            The teacher's weights are not needed then: `teacher` is a directory with its tokenizer,
            or None for the one that lies in the store.
        served: a server that runs the teacher; `teacher` is a directory with its tokenizer.

    Raises:
        FileNotFoundError: if one is neither.
        ModelSourceError: if it holds no model or no tokenizer.
        UnsupportedTokenizerError: if a tokenizer is not a fast one or cannot be read exactly.
        OptionError: neither a teacher nor a store.
        StoreError, PairError: the folder holds no predictions, or those of another tokenizer.
    """
    student_source = _source("student", student)
    found = None if store is None else TopKStore.open(store)
    if found is not None:
        teacher_source = _tokenizer_of(found, teacher)
    elif served is not None and teacher is not None:
        teacher_source = _tokenizer_folder(teacher)
    elif teacher is None:
        raise OptionError(
            "no teacher was given; pass a directory by save_pretrained, a hub name, or a store "
            "that xtoken teach filled"
        )
    else:
        teacher_source = _source("teacher", teacher)
    tokenizers = (
        by_transformers(student_source, "student "),
        by_transformers(teacher_source, "teacher "),
    )
    pair = Pair(*tokenizers)
    for side in pair.sides:
        _ = side.vocab  # refused here, before any minute is spent
    if found is not None:
        found.require_tokenizer(pair.teacher_vocab.fingerprint)
    folder = None if store is None else Path(store)
    return ModelPair(student_source, teacher_source, pair, folder, served=served)


def _tokenizer_of(store: TopKStore, given: Path | str | None) -> str:
    """Where the tokenizer of a store's teacher is."""
    if given is None:
        folder = store.directory / TOKENIZER_FOLDER
        if not folder.is_dir():
            raise MissingFileError(
                f"the teacher store {store.directory} has no tokenizer in {folder}; pass the "
                "teacher's: a directory with its tokenizer, no weights are needed"
            )
        return str(folder)
    return _tokenizer_folder(given)


def _tokenizer_folder(given: Path | str) -> str:
    hint = (
        "pass a directory with the teacher's tokenizer, or the name of a model on the hub "
        "(owner/model)"
    )
    if not path_to_read("teacher directory", given, hint).is_dir() and not is_hub_name(given):
        raise MissingFileError(f"teacher directory {given} {no_directory(given)}; {hint}")
    return str(given)


def _source(side: str, given: Path | str) -> str:
    hint = (
        "pass a directory written by save_pretrained, or the name of a model on the hub "
        "(owner/model)"
    )
    path = path_to_read(f"{side} directory", given, hint)
    if not path.is_dir():
        if not is_hub_name(given):
            raise MissingFileError(f"{side} directory {path} {no_directory(path)}; {hint}")
    elif not (path / "config.json").is_file():
        raise ModelSourceError(
            f"{side} directory {path} has no config.json; save the model and its tokenizer there "
            "with save_pretrained"
        )
    return str(given)


def _positions(source: str) -> int | None:
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except Exception:  # the model's own loading says it better
        return None
    return position_limit(config)


def _load_model(
    side: str, source: str, vocab: Vocab, dtype: torch.dtype | str = torch.float32
) -> nn.Module:
    model = load_causal_lm(source, side=side, dtype=dtype)
    columns = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    # Some have a few columns less than tokens (Gemma-3); the losses leave those tokens out.
    if columns < least_columns(len(vocab)):
        raise ModelSourceError(
            f"the {side}'s tokenizer in {source} has {len(vocab)} tokens, its model only {columns} "
            "columns; this is another model's tokenizer, or call model.resize_token_embeddings"
        )
    return model
