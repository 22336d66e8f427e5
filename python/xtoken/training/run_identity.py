"""What makes two sessions the same run: settings, models, tokenizers, texts, processes."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from xtoken.data import Example
from xtoken.errors import ResumeError
from xtoken.teachers import LiveTeacher, TeacherSource, TopKStore
from xtoken.teachers.model_fingerprint import model_fingerprint
from xtoken.teachers.served import PrefetchedTeacher
from xtoken.training.config import DistillConfig
from xtoken.training.prepare import PreparedData
from xtoken.training.processes import process_count
from xtoken.training.trainer_options import REPORTING

# Settings that do not change the trained weights. `steps` is not among them: the learning rate
# follows a cosine over them, so every step of a longer run differs.
MAY_CHANGE = ("device", "eval_every", "eval_batch_size", "checkpoint_every", "curves")

_WORDS = {
    "student": "weights of the student",
    "teacher": "weights of the teacher",
    "student_tokenizer": "tokens of the student",
    "teacher_tokenizer": "tokens of the teacher",
    "projection": "weights of W",
    # Some chat templates print today's date, and make other texts each day.
    "train": "training texts, or a date in the chat template",
    "held_out": "held-out texts, or a date in the chat template",
    "processes": "number of processes",
}


@dataclass(frozen=True)
class RunIdentity:
    """What a run depends on; equal ones give equal students on one machine.

    Args:
        settings: of `DistillConfig`, by name.
        student: digest of the weights that the run starts from.
        teacher: digest of the teacher's weights; None without one, or of one that has no digest. Of
            several all, each with its weight and loss.
        student_tokenizer, teacher_tokenizer: fingerprints of the vocabularies.
        projection, train, held_out: digests of W and of the examples of both parts; of several
            teachers all.
        processes: how many train together.
    """

    settings: dict[str, Any]
    student: str
    teacher: str | None
    student_tokenizer: str
    teacher_tokenizer: str
    projection: str
    train: str
    held_out: str
    processes: int

    @classmethod
    def of(
        cls,
        materials: PreparedData,
        config: DistillConfig,
        student: nn.Module,
        sources: Sequence[TeacherSource | None],
    ) -> RunIdentity:
        """Read it off the run; costs a pass over the student's weights, of seconds a gigabyte."""
        each = materials.teachers
        stream = materials.stream
        streamed = [] if stream is None else [stream.fingerprint]
        matrices = [(w.indptr, w.indices, w.weights) for w in (one.projection for one in each)]
        return cls(
            settings=dataclasses.asdict(config),
            student=model_fingerprint(student),
            teacher=_teachers(materials, sources),
            student_tokenizer=materials.pair.student_vocab.fingerprint,
            teacher_tokenizer="+".join(one.pair.teacher_vocab.fingerprint for one in each),
            projection="+".join(map(_digest, matrices)),
            train="+".join([_examples_digest(one.train.examples) for one in each] + streamed),
            held_out="+".join(_examples_digest(one.held_out.examples) for one in each),
            processes=process_count(),
        )

    def require(self, now: RunIdentity, where: object) -> None:
        """Check that `now` resumes this run.

        Raises: ResumeError that names what differs, and `where` this run lies.
        """
        defaults = dataclasses.asdict(DistillConfig())
        then = defaults | self.settings
        here = _without_reporting(now.settings)
        then = _without_reporting(then)
        differences = [
            f"{name} = {then.get(name)!r} there and {value!r} here"
            for name, value in here.items()
            if name not in MAY_CHANGE and then.get(name) != value
        ]
        # Other settings may make other examples and another W: then they are what to name.
        if not differences:
            differences = [
                f"other {words} ({getattr(self, name)} there, {getattr(now, name)} here)"
                for name, words in _WORDS.items()
                if getattr(self, name) != getattr(now, name)
            ]
        if differences:
            raise ResumeError(
                f"{where} is of another run: {'; '.join(differences)}; repeat the command of that "
                "run to resume it, or start anew (another --out, or --overwrite)"
            )


def _without_reporting(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the arguments of the trainer that change no weight."""
    trainer = {
        name: value
        for name, value in (settings.get("trainer") or {}).items()
        if name not in REPORTING
    }
    return {**settings, "trainer": trainer}


def _teachers(materials: PreparedData, sources: Sequence[TeacherSource | None]) -> str | None:
    found = [_teacher_fingerprint(source) for source in sources]
    if len(found) < 2:
        return found[0] if found else None
    models = [each.models for each in materials.teachers]
    return " ".join(
        f"{fingerprint}*{model.weight}:{model.loss}"
        for fingerprint, model in zip(found, models, strict=True)
    )


def _teacher_fingerprint(teacher: TeacherSource | None) -> str | None:
    if isinstance(teacher, TopKStore):
        return teacher.key.teacher
    if isinstance(teacher, LiveTeacher | PrefetchedTeacher):
        return teacher.fingerprint
    return None


def _digest(arrays: Iterable[NDArray[Any]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for array in arrays:
        digest.update(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _examples_digest(examples: Iterable[Example]) -> str:
    return _digest(
        array
        for example in examples
        for array in (
            *(example.student_ids, example.student_loss_mask),
            *(example.teacher_ids, example.teacher_loss_mask),
            *(example.alignment.student_bounds, example.alignment.teacher_bounds),
            example.alignment.kind,
        )
    )
