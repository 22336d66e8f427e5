"""One unit of the experiment: a student trained by one arm on one text from one seed."""

from __future__ import annotations

import random
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM

import xtoken
from benches.losses_on_pairs.arms import ARMS, COMMON, TEACHER_TOP_K, TRANSFER, Setting, Unit
from benches.losses_on_pairs.corpus import Texts, read_texts
from benches.losses_on_pairs.models import (
    prepare_gemma,
    prepare_student,
    prepare_transferred,
)
from benches.losses_on_pairs.score import Sums, score
from xtoken.data import Example
from xtoken.distillation import Distiller
from xtoken.teachers import LiveTeacher, TopKStore
from xtoken.teachers.shard import StoreKey
from xtoken.vocab.side import SideName

MAX_TOKENS = 128
HELD_OUT = 24
WARMUP = 5

Progress = Callable[[str, int], None]
"""Told what is done and its number of the step."""


class Stopped(Exception):
    """A unit was left in the middle; its state is on disk."""


class Couple:
    """Two models, and what their pair of tokenizers gives."""

    def __init__(self, student: Path, teacher: Path) -> None:
        self.student_path, self.teacher_path = student, teacher
        self.pair = xtoken.Pair(str(student), str(teacher))
        self.plain = self.pair.distiller("ce", max_tokens=MAX_TOKENS)
        # Of `ce` a batch has all chunks too, but no teacher is asked for; this one scores.
        self.scorer = self.pair.distiller("p-kl", max_tokens=MAX_TOKENS)
        self._teacher: LiveTeacher | None = None

    def teacher(self) -> LiveTeacher:
        """The teacher's weights, loaded at the first call."""
        if self._teacher is None:
            self._teacher = LiveTeacher.from_pretrained(self.teacher_path)
        return self._teacher

    def student(self) -> nn.Module:
        """The student as it came."""
        return AutoModelForCausalLM.from_pretrained(self.student_path, dtype=torch.float32)


@dataclass
class Bench:
    """What the units share: the models, the texts and the stored teacher predictions."""

    folder: Path
    should_stop: Callable[[], bool]
    progress: Progress
    couples: dict[bool, Couple] = field(default_factory=dict)
    texts: dict[str, Texts] = field(default_factory=dict)
    stores: dict[str, TopKStore] = field(default_factory=dict)
    held_out: dict[str, list[Example]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit = _commit()  # of the code that is loaded

    def couple(self, name: str) -> Couple:
        """The models that meet on a text: of two families, or one before and after a transfer."""
        transfer = name == TRANSFER
        if transfer not in self.couples:
            small = prepare_student(self.folder / "student")
            if transfer:
                new = prepare_transferred(self.folder / "transferred", small)
                self.couples[transfer] = Couple(new, small)
            else:
                self.couples[transfer] = Couple(small, prepare_gemma(self.folder / "gemma"))
        return self.couples[transfer]

    def passages(self, name: str) -> Texts:
        """The text of a name, read once."""
        if name not in self.texts:
            self.texts[name] = read_texts(self.folder / "text", name)
        return self.texts[name]

    def score(self, name: str, side: SideName, model: nn.Module) -> Sums:
        """A model on the passages that all units of a text are scored on."""
        couple, texts = self.couple(name), self.passages(name)
        if name not in self.held_out:
            self.held_out[name] = couple.plain.examples(texts.held_out[:HELD_OUT])
        kinds = texts.kinds[:HELD_OUT]
        return score(model, side, self.held_out[name], couple.scorer, kinds)

    def ends(self, name: str) -> dict[str, dict[str, float]]:
        """What both models know of a text before training, and what is how much of it."""
        couple = self.couple(name)
        student = self.score(name, "student", couple.student())
        teacher = self.score(name, "teacher", couple.teacher().model)
        return {
            "student": student.scores(),
            "teacher": teacher.scores(),
            "shares": student.shares() | {"bytes": student.bytes["all"]},
        }

    def run(self, unit: Unit) -> dict[str, Any]:
        """Train and score.

        Raises: Stopped where it was asked to stop in between; the next call goes on.
        """
        couple = self.couple(unit.text)
        distiller = self._distiller(couple, unit.arm)
        examples = self._train_examples(unit)
        model = couple.student()
        training = _Training.start_or_resume(model, unit, self.folder / "unit.pt")
        store = self._store(unit.text, examples) if distiller.needs_teacher else None
        while training.step < unit.setting.steps:
            if self.should_stop():
                training.save()
                raise Stopped
            training.one_step(distiller, store, examples)
            self.progress(f"{unit}", training.step)
        scores = self.score(unit.text, "student", model)
        training.forget()
        return {
            "arm": unit.arm,
            "text": unit.text,
            "seed": unit.seed,
            **unit.setting._asdict(),
            "scores": scores.scores(),
            "cpu_seconds_per_step": round(training.seconds / training.step, 3),
            "training_ce": training.ce,
            "training_kd": training.kd,
            "settings": {
                **COMMON,
                **ARMS[unit.arm],
                "teacher_top_k": TEACHER_TOP_K,
                "max_tokens": MAX_TOKENS,
                "held_out": HELD_OUT,
                "warmup": WARMUP,
            },
            "commit": self.commit,
        }

    def _distiller(self, couple: Couple, arm: str) -> Distiller:
        options = {**COMMON, **ARMS[arm]}
        loss = options.pop("loss")
        return couple.pair.distiller(loss, max_tokens=MAX_TOKENS, **options)

    def _train_examples(self, unit: Unit) -> list[Example]:
        """As many passages as the unit reads, each once; the order is the seed's."""
        passages = list(self.passages(unit.text).train)
        random.Random(unit.seed).shuffle(passages)
        count = unit.setting.steps * unit.setting.batch_size
        if count > len(passages):
            raise SystemExit(f"{unit.text} has {len(passages)} passages, {unit} reads {count}")
        return self.couple(unit.text).plain.examples(passages[:count])

    def _store(self, name: str, examples: Sequence[Example]) -> TopKStore:
        """The teacher's stored predictions; what is missing is computed."""
        folder = self.folder / f"teacher-top-{TEACHER_TOP_K}" / name
        couple = self.couple(name)
        if name not in self.stores:
            fingerprints = couple.teacher().fingerprint, couple.pair.teacher_vocab.fingerprint
            key = StoreKey(fingerprints[0], TEACHER_TOP_K, "float32", fingerprints[1])
            self.stores[name] = TopKStore(folder, key)
        store = self.stores[name]
        missing = [e.teacher_ids for e in examples if e.teacher_ids not in store]
        if missing:
            store.fill(couple.teacher(), sorted(missing, key=len))
        return store


class _Training:
    """The optimizer's loop, which can be left at a step and resumed."""

    def __init__(self, model: nn.Module, unit: Unit, file: Path) -> None:
        self.model, self.unit, self.file = model, unit, file
        self.optimizer = torch.optim.AdamW(
            model.parameters(), lr=unit.setting.learning_rate, betas=(0.9, 0.95), weight_decay=0.0
        )
        self.step, self.seconds = 0, 0.0
        self.ce: list[float] = []
        self.kd: list[float] = []

    @classmethod
    def start_or_resume(cls, model: nn.Module, unit: Unit, file: Path) -> _Training:
        training = cls(model, unit, file)
        if file.is_file():
            state = torch.load(file, weights_only=True)
            if state["unit"] == repr(unit):
                model.load_state_dict(state["model"])
                training.optimizer.load_state_dict(state["optimizer"])
                training.step, training.seconds = state["step"], state["seconds"]
                training.ce, training.kd = state["ce"], state["kd"]
        return training

    def save(self) -> None:
        state = {
            "unit": repr(self.unit),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            **{name: getattr(self, name) for name in ("step", "seconds", "ce", "kd")},
        }
        unfinished = self.file.with_suffix(".unfinished")
        torch.save(state, unfinished)
        unfinished.replace(self.file)

    def forget(self) -> None:
        self.file.unlink(missing_ok=True)

    def one_step(
        self, distiller: Distiller, store: TopKStore | None, examples: Sequence[Example]
    ) -> None:
        setting = self.unit.setting
        start = time.process_time()
        place = self.step * setting.batch_size
        batch = distiller.collate(examples[place : place + setting.batch_size])
        self.model.train()
        signal = None
        if store is not None:
            signal = store.signal(batch.teacher_ids, batch.teacher["attention_mask"])
        output = distiller(self.model(**batch.student).logits, signal, batch)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = setting.learning_rate * _schedule(self.step, setting)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.seconds += time.process_time() - start
        for values, value in ((self.ce, output.ce), (self.kd, output.kd)):
            if value is not None:
                values.append(round(float(value.detach()), 4))


def _schedule(step: int, setting: Setting) -> float:
    """Linear warm-up, then a straight line that would reach 0 one step after the last."""
    if step < WARMUP:
        return (step + 1) / WARMUP
    return (setting.steps - step) / (setting.steps - WARMUP)


def _commit() -> str:
    """The commit of the tree, with `+` where its code was changed."""
    head = _git("rev-parse", "--short", "HEAD")
    return head + "+" if _git("status", "--porcelain", "--", "*.py", "*.rs") else head


def _git(*arguments: str) -> str:
    found = subprocess.run(["git", *arguments], capture_output=True, text=True, check=False)
    return found.stdout.strip()
