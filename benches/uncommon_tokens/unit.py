"""One unit of the experiment: a student trained by one arm from one seed, and its scores."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback

from benches.uncommon_tokens.arms import ARMS, FIXED, HELD_OUT, NUMBER_SHARE, Unit
from benches.uncommon_tokens.score import score
from demo.corpus import Corpus, build_corpus, sample
from demo.document import Document
from demo.student import prepare_student
from demo.teacher import prepare_teacher
from xtoken.data import TextSplit
from xtoken.teachers import TopKStore
from xtoken.training.config import DistillConfig
from xtoken.training.config_arguments import training_arguments
from xtoken.training.metrics_log import History, KeepHistory
from xtoken.training.models import load_models
from xtoken.training.prepare import PreparedData, Reporter, open_store, prepare
from xtoken.training.trainer import DistillTrainer


@dataclass
class Bench:
    """What the units share: the demo's teacher, text and stored teacher predictions."""

    folder: Path
    reporter: Reporter
    corpus: Corpus
    held_out: list[Document]
    stores: dict[tuple[int, int], TopKStore] = field(default_factory=dict)

    @classmethod
    def prepare(cls, folder: Path, reporter: Reporter) -> Bench:
        """Draw text from the demo's corpus; it is the same for all seeds, the student is not."""
        corpus = build_corpus(seed=0)
        held_out = sample(corpus.held_out, HELD_OUT, NUMBER_SHARE, 0)
        return cls(folder, reporter, corpus, held_out)

    @property
    def kinds(self) -> list[str]:
        """The kind of each held-out passage."""
        return [document.kind for document in self.held_out]

    def materials(self, config: DistillConfig, seed: int, passages: int) -> PreparedData:
        """The pair with a student of this seed, W, and the examples."""
        student = self.folder / "uncommon-tokens" / f"student-{seed}"
        if not (student / "config.json").is_file():
            prepare_student(student, [d.text for d in self.corpus.train], seed=seed)
        train = sample(self.corpus.train, passages, NUMBER_SHARE, 0)
        texts = TextSplit([d.text for d in train], [d.text for d in self.held_out], 0)
        pair = load_models(student, prepare_teacher(self.folder / "teacher"))
        materials = prepare(pair, texts, config, self.reporter)
        if len(materials.held_out) != len(self.kinds):
            raise RuntimeError("a held-out passage was left out; the kinds no longer fit")
        return materials

    def store(self, materials: PreparedData, config: DistillConfig) -> TopKStore:
        """The teacher's stored predictions of the text; the teacher is loaded once."""
        top_k = config.teacher_top_k
        assert top_k is not None
        key = (top_k, len(materials.train))
        if key not in self.stores:
            teacher = materials.models.load_teacher(torch.device("cpu"))
            cache = self.folder / "teacher-top-k"
            self.stores[key] = open_store(materials, teacher, top_k, cache, self.reporter)
        return self.stores[key]

    def run(self, unit: Unit, on_step: Callable[[int], None]) -> dict[str, Any]:
        """Train and score; `on_step` is told the steps done."""
        arm, seed, steps, (passages, batch_size) = unit
        config = DistillConfig(
            **{**FIXED, "batch_size": batch_size, "steps": steps, "seed": seed, **ARMS[arm]}
        )
        materials = self.materials(config, seed, passages)
        store = self.store(materials, config) if config.loss != "ce" else None
        model = materials.models.load_student()
        pair = materials.pair
        with tempfile.TemporaryDirectory() as scratch:
            trainer = DistillTrainer(
                model,
                training_arguments(replace(config, device="cpu"), scratch),
                teachers=[] if store is None else [store],
                train_dataset=materials.train,
                processing_class=materials.pair,
                callbacks=[KeepHistory(History(), on_step)],
            )
            trainer.remove_callback(PrinterCallback)
            start = time.process_time()
            trainer.train()
            seconds = time.process_time() - start
        scores = score(model, materials.held_out.examples, self.kinds, pair.student_vocab)
        return {
            "arm": arm,
            "seed": seed,
            "steps": steps,
            "passages": passages,
            "batch_size": batch_size,
            "cpu_seconds_per_step": round(seconds / steps, 4),
            "scores": {name: round(value, 5) for name, value in scores.items()},
            "config": json.loads(config.to_json()),
        }
