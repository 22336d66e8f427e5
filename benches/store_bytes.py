"""`python -m benches.store_bytes [FOLDER] [TEXTS] [OTHERS]`: what a stored form of the teacher's
predictions costs on the disk, and how far the loss and its gradient are from those of full logits.

FOLDER is that of the demo: its teacher, its trained student (`run/student`) and held-out texts, of
which TEXTS are compared. The forms `spread` are stores as `xtoken teach --dtype spread` writes
them, filled with these texts and OTHERS of the training texts, and read back: bytes are those of
their files, priors and tokens among them, and the losses are of the numbers as stored. The others
keep the likeliest columns, or those of a mass, and of the rest its mass as one bucket: bytes are
those of float16, and of uint8 in brackets, and the losses are of unrounded numbers.

The last lines are what a step sees at the losses' defaults, top 512 and a tail: stores of the same
texts beside a live teacher, the distance of the loss from its, and the CPU time of reading the
predictions, the loss and its gradient, the least of ROUNDS in turn.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from xtoken.cli.console import quiet_transformers
from xtoken.data import read_documents
from xtoken.distillation import Distiller
from xtoken.distillation.batch import Batch
from xtoken.pair import Pair
from xtoken.teachers import LiveTeacher, StoreKey, TopKStore
from xtoken.teachers.load_model import load_causal_lm
from xtoken.tensors.teacher_signal import Teacher, TeacherTopK

Ids = NDArray[np.int64]
LOSSES = ("p-kl", "prefix-kl", "exact-kl")
LEAST = (1e-4, 2e-5, 1e-5)
FORMS: tuple[tuple[int, float | None], ...] = ((512, None), (8192, 0.99), (8192, 0.999))
# Of a row: its number of columns and the log-probability of the next token; tokens are stored once.
ROW_BYTES = 2 + 4 + 2
TOP_K, ROUNDS = 512, 3


def main() -> None:
    """Print a table of forms."""
    torch.set_num_threads(1)
    quiet_transformers()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    count, beside = (int(sys.argv[at]) if len(sys.argv) > at else 12 for at in (2, 3))
    pair = Pair(str(folder / "student"), str(folder / "teacher"))
    student = load_causal_lm(folder / "run" / "student", side="student").eval()
    teacher = LiveTeacher.from_pretrained(folder / "teacher")
    texts = list(read_documents(folder / "held_out.jsonl"))[:count]
    others = list(read_documents(folder / "train.jsonl"))[:beside]
    distillers = {loss: pair.distiller(loss, top_k=None, ce_weight=0.0) for loss in LOSSES}
    batch = distillers["p-kl"].collate(texts)
    ids, mask = batch.teacher_ids, batch.teacher["attention_mask"]
    size = pair.sizes[1]
    with torch.no_grad():
        logits = student(**batch.student).logits
    full = teacher.logits(ids, mask)[..., :size].log_softmax(-1)
    exact = {loss: _loss(each, logits, full, batch) for loss, each in distillers.items()}
    values = ", ".join(f"{loss} {value:.5f}" for loss, (value, _) in exact.items())
    print(f"{int(mask.sum())} teacher tokens; full logits: {values}", flush=True)
    for k, mass in FORMS:
        top = TeacherTopK.from_logits(full, k, ids=ids, vocab_size=size)
        if mass is not None:
            probs = top.log_probs.exp()
            gone = probs.cumsum(-1) - probs >= mass
            top = TeacherTopK(
                ids=top.ids, log_probs=top.log_probs.masked_fill(gone, -torch.inf),
                token_log_probs=top.token_log_probs, validate=False,
            )  # fmt: skip
        kept = float((top.log_probs > -torch.inf)[mask.bool()].sum()) / int(mask.sum())
        name = f"top {k}" if mass is None else f"mass {mass}"
        cells = [f"{ROW_BYTES + 4 * kept:6.0f} ({ROW_BYTES + 2 + 3 * kept:.0f}) bytes"]
        for loss in LOSSES:
            tail = {} if loss == "exact-kl" else {"tail_bucket": "auto"}
            bucket = pair.distiller(loss, top_k=k, ce_weight=0.0, **tail)
            cells.append(_against(loss, _loss(bucket, logits, top, batch), exact[loss]))
        print(f"{name:12s} {kept:6.0f} columns", *cells, sep="; ", flush=True)
    sequences = [each.teacher_ids for each in pair.examples(texts + others).examples]
    for least in LEAST:
        with tempfile.TemporaryDirectory() as scratch:
            key = StoreKey(
                teacher.fingerprint, 8192, "spread", pair.teacher_vocab.fingerprint, None, least
            )
            store = TopKStore(scratch, key)
            store.fill(teacher, sequences)
            tokens = sum(map(len, sequences))
            cells = [f"{store.file_bytes / tokens:6.0f} bytes of {tokens} tokens"]
            signal = store.signal(ids, mask)
            for loss, distiller in distillers.items():
                cells.append(_against(loss, _loss(distiller, logits, signal, batch), exact[loss]))
        print(f"spread {least:g}", *cells, sep="; ", flush=True)

    _steps(pair, teacher, sequences, batch, logits)


def _steps(
    pair: Pair, teacher: LiveTeacher, sequences: list[Ids], batch: Batch, logits: Tensor
) -> None:
    """Print what a step takes with each form, and its losses."""
    ids, mask = batch.teacher_ids, batch.teacher["attention_mask"]
    tails = {loss: {} if loss == "exact-kl" else {"tail_bucket": "auto"} for loss in LOSSES}
    distillers = {
        loss: pair.distiller(loss, top_k=TOP_K, ce_weight=0.0, **tails[loss]) for loss in LOSSES
    }
    vocab, name = pair.teacher_vocab.fingerprint, teacher.fingerprint
    keys = {
        "float32": StoreKey(name, TOP_K, "float32", vocab),
        "float16": StoreKey(name, TOP_K, "float16", vocab),
        "spread": StoreKey(name, 8192, "spread", vocab, None, 2e-5),
    }
    full = teacher.logits(ids, mask)
    values: dict[tuple[str, str], float] = {}
    seconds: dict[tuple[str, str], float] = {}
    with tempfile.TemporaryDirectory() as scratch:
        stores = {each: TopKStore(Path(scratch) / each, key) for each, key in keys.items()}
        sizes = {}
        for each, store in stores.items():
            store.fill(teacher, sequences)
            sizes[each] = store.file_bytes / sum(map(len, sequences))
        for _ in range(ROUNDS):
            for form in ("live", *stores):
                began = time.process_time()
                signal = full if form == "live" else stores[form].signal(ids, mask)
                took = time.process_time() - began
                seconds[form, "read"] = min(seconds.get((form, "read"), took), took)
                for loss, distiller in distillers.items():
                    own = distiller.prepared(batch)
                    began = time.process_time()
                    values[form, loss], _ = _loss(distiller, logits, signal, own)
                    took = time.process_time() - began
                    seconds[form, loss] = min(seconds.get((form, loss), took), took)
    for form in ("live", *stores):
        cells = [f"read {seconds[form, 'read']:.3f} s"]
        for loss in LOSSES:
            away = values[form, loss] / values["live", loss] - 1
            cells.append(f"{loss} {away:+.2%} {seconds[form, loss]:.3f} s")
        size = f"{sizes[form]:6.0f} bytes" if form in sizes else "           "
        print(f"step, {form:8s}", size, *cells, sep="; ", flush=True)


def _against(loss: str, found: tuple[float, Tensor], exact: tuple[float, Tensor]) -> str:
    cosine = float(torch.cosine_similarity(found[1].double(), exact[1].double(), 0))
    return f"{loss} {found[0] / exact[0] - 1:+.2%} cos {cosine:.4f}"


def _loss(
    distiller: Distiller, logits: Tensor, signal: Teacher, batch: Batch
) -> tuple[float, Tensor]:
    """The distillation loss, and its gradient by the student's logits."""
    own = logits.clone().requires_grad_()
    output = distiller(own, signal, batch, kd_scale=1.0)
    (gradient,) = torch.autograd.grad(output.loss, own)
    assert output.kd is not None
    return float(output.kd.detach()), gradient.flatten()


if __name__ == "__main__":
    main()
