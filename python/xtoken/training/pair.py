"""A student and a teacher from their directories, checked before any minute is spent."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from xtoken import Vocab, XTokenError
from xtoken.teachers.live import LiveTeacher


class PairError(XTokenError):
    """A student or teacher directory cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Pair:
    """The two tokenizers of a run, and where the models are.

    Args:
        student_dir, teacher_dir: directories that `save_pretrained` wrote.
        student_tokenizer, teacher_tokenizer: `transformers` fast tokenizers.
        student_vocab, teacher_vocab: of these tokenizers.
    """

    student_dir: Path
    teacher_dir: Path
    student_tokenizer: Any
    teacher_tokenizer: Any
    student_vocab: Vocab
    teacher_vocab: Vocab

    def load_student(self) -> nn.Module:
        """Load the student in float32, fresh from its directory."""
        return _load_model("student", self.student_dir, self.student_vocab)

    def load_teacher(self, device: torch.device) -> LiveTeacher:
        """Load the teacher in float32 onto a device."""
        model = _load_model("teacher", self.teacher_dir, self.teacher_vocab)
        return LiveTeacher(model.to(device))


def load_pair(student_dir: Path | str, teacher_dir: Path | str) -> Pair:
    """Read both tokenizers.

    Raises:
        FileNotFoundError: if a directory is missing.
        PairError: if a directory holds no model or no fast tokenizer.
        UnsupportedTokenizerError: if a tokenizer cannot be read exactly.
    """
    student_dir, teacher_dir = Path(student_dir), Path(teacher_dir)
    tokenizers = [
        _load_tokenizer(side, path)
        for side, path in (("student", student_dir), ("teacher", teacher_dir))
    ]
    vocabs = [Vocab.from_tokenizer(tokenizer) for tokenizer in tokenizers]
    return Pair(student_dir, teacher_dir, *tokenizers, *vocabs)


def _load_tokenizer(side: str, path: Path) -> Any:
    from transformers import AutoTokenizer

    if not path.is_dir():
        raise FileNotFoundError(
            f"{side} directory {path} does not exist; pass a directory written by save_pretrained"
        )
    if not (path / "config.json").is_file():
        raise PairError(
            f"{side} directory {path} has no config.json; save the model and its tokenizer there "
            "with save_pretrained"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    # transformers raises many kinds here, down to KeyError and bare Exception.
    except Exception as error:
        raise PairError(
            f"{side} directory {path} has no tokenizer that transformers can read ({error}); save "
            "it there with tokenizer.save_pretrained"
        ) from error
    if not tokenizer.is_fast:
        raise PairError(
            f"the {side}'s tokenizer is {type(tokenizer).__name__}, not a fast one; convert it to "
            "tokenizer.json first"
        )
    return tokenizer


def _load_model(side: str, path: Path, vocab: Vocab) -> nn.Module:
    from transformers import AutoModelForCausalLM

    try:
        model: nn.Module = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    # As with the tokenizer: from OSError to safetensors' own class.
    except Exception as error:
        raise PairError(
            f"{side} directory {path} has no model that transformers can load ({error}); save it "
            "there with model.save_pretrained"
        ) from error
    columns = model.get_output_embeddings().weight.shape[0]  # type: ignore[operator]
    if columns < len(vocab):
        raise PairError(
            f"the {side}'s tokenizer in {path} has {len(vocab)} tokens, its model only {columns} "
            "columns; this is another model's tokenizer, or call model.resize_token_embeddings"
        )
    return model
