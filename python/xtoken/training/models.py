"""A student and a teacher by directory or hub name, checked before any minute is spent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from xtoken._core import Vocab
from xtoken.errors import MissingFileError, ModelSourceError, OptionError
from xtoken.pair import Pair
from xtoken.teachers.forward import position_limit
from xtoken.teachers.live import LiveTeacher
from xtoken.teachers.load_model import load_causal_lm
from xtoken.training.config import TeacherDtype
from xtoken.vocab.load import by_transformers, is_hub_name


@dataclass(frozen=True)
class ModelPair:
    """The two models of a run by where they are, and the pair of their tokenizers.

    Attributes:
        student_source, teacher_source: directories that `save_pretrained` wrote, or hub names.
        pair: of their tokenizers, `transformers` fast tokenizers.
    """

    student_source: str
    teacher_source: str
    pair: Pair

    def check_positions(self, max_tokens: int) -> None:
        """Refuse examples that are longer than a model has positions.

        Raises:
            OptionError: names the side and its limit.
        """
        for side, source in (("student", self.student_source), ("teacher", self.teacher_source)):
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


def load_models(student: Path | str, teacher: Path | str) -> ModelPair:
    """Read both tokenizers.

    Args:
        student, teacher: a directory that `save_pretrained` wrote, or the name of a model on the
            hub ("owner/model").

    Raises:
        FileNotFoundError: if one is neither.
        ModelSourceError: if it holds no model or no tokenizer.
        UnsupportedTokenizerError: if a tokenizer is not a fast one or cannot be read exactly.
    """
    student_source, teacher_source = _source("student", student), _source("teacher", teacher)
    tokenizers = (
        by_transformers(student_source, "student "),
        by_transformers(teacher_source, "teacher "),
    )
    pair = Pair(*tokenizers)
    for side in pair.sides:
        _ = side.vocab  # refused here, before any minute is spent
    return ModelPair(student_source, teacher_source, pair)


def _source(side: str, given: Path | str) -> str:
    path = Path(given)
    if not path.is_dir():
        if not is_hub_name(given):
            raise MissingFileError(
                f"{side} directory {path} does not exist; pass a directory written by "
                "save_pretrained, or the name of a model on the hub (owner/model)"
            )
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
    if columns < len(vocab) - max(64, len(vocab) // 100):
        raise ModelSourceError(
            f"the {side}'s tokenizer in {source} has {len(vocab)} tokens, its model only {columns} "
            "columns; this is another model's tokenizer, or call model.resize_token_embeddings"
        )
    return model
