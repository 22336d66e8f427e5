"""`python -m benches.store_bytes [FOLDER] [TEXTS]`: what a stored form of the teacher's predictions
costs on the disk, and how far the loss and its gradient are from those of full logits.

FOLDER is that of the demo: its teacher, its trained student (`run/student`) and held-out texts. A
form keeps the likeliest columns (`top k`) or those of a mass, and of the rest its mass. That rest
is one bucket, or is spread over the columns that are not kept by a prior: the teacher's mean
prediction over other texts of the corpus. Bytes are those of `xtoken teach` with float16, and with
uint8 in brackets; the losses here are of unrounded numbers.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from xtoken.cli.console import quiet_transformers
from xtoken.data import read_documents
from xtoken.distillation import Distiller
from xtoken.distillation.batch import Batch
from xtoken.pair import Pair
from xtoken.teachers import LiveTeacher
from xtoken.teachers.load_model import load_causal_lm
from xtoken.tensors.teacher_signal import TeacherTopK

LOSSES = ("p-kl", "prefix-kl")
FORMS: tuple[tuple[int, float | None], ...] = (
    *((k, None) for k in (64, 256, 512, 2048)),
    *((8192, mass) for mass in (0.9, 0.98, 0.99, 0.995, 0.999, 0.9999)),
)
# Of a row: its number of columns and the log-probability of the next token; tokens are stored once.
ROW_BYTES = 2 + 4 + 2
PRIOR_TEXTS = 80


def main() -> None:
    """Print a table of forms."""
    torch.set_num_threads(1)
    quiet_transformers()
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")
    count = int(sys.argv[2]) if len(sys.argv) > 2 else 12
    pair = Pair(str(folder / "student"), str(folder / "teacher"))
    student = load_causal_lm(folder / "run" / "student", side="student").eval()
    teacher = LiveTeacher.from_pretrained(folder / "teacher")
    texts = list(read_documents(folder / "held_out.jsonl"))[:count]
    others = list(read_documents(folder / "train.jsonl"))[:PRIOR_TEXTS]
    distillers = {loss: pair.distiller(loss, top_k=None, ce_weight=0.0) for loss in LOSSES}
    batch = distillers["p-kl"].collate(texts)
    mask = batch.teacher["attention_mask"].bool()
    prior = torch.zeros(pair.sizes[1])
    for text in others:
        part = distillers["p-kl"].collate([text])
        logits = teacher.logits(part.teacher_ids, part.teacher["attention_mask"])
        prior += logits[0, :, : len(prior)].softmax(-1).sum(0)
    log_prior = (prior / prior.sum()).log()
    with torch.no_grad():
        logits = student(**batch.student).logits
    full = teacher.logits(batch.teacher_ids, batch.teacher["attention_mask"])
    full = full[..., : len(prior)].log_softmax(-1)
    ids = batch.teacher_ids
    exact = {loss: _loss(each, logits, full, batch) for loss, each in distillers.items()}
    values = ", ".join(f"{loss} {value:.5f}" for loss, (value, _) in exact.items())
    print(f"{int(mask.sum())} teacher tokens; full logits: {values}")
    for k, mass in FORMS:
        top = TeacherTopK.from_logits(full, k, ids=ids, vocab_size=len(prior))
        if mass is not None:
            probs = top.log_probs.exp()
            gone = probs.cumsum(-1) - probs >= mass
            top = TeacherTopK(
                ids=top.ids, log_probs=top.log_probs.masked_fill(gone, -torch.inf),
                token_log_probs=top.token_log_probs, validate=False,
            )  # fmt: skip
        kept = float((top.log_probs > -torch.inf)[mask].sum()) / int(mask.sum())
        name = f"top {k}" if mass is None else f"mass {mass}"
        size = f"{ROW_BYTES + 4 * kept:6.0f} ({ROW_BYTES + 2 + 3 * kept:.0f}) bytes"
        cells = [f"{name:12s} {kept:6.0f} columns {size}"]
        spread = _spread(top, log_prior)
        for loss in LOSSES:
            bucket = pair.distiller(loss, top_k=k, tail_bucket="auto", ce_weight=0.0)
            for what, found in (
                ("bucket", _loss(bucket, logits, top, batch)),
                ("spread", _loss(distillers[loss], logits, spread, batch)),
            ):
                value, gradient = found
                reference, slope = exact[loss]
                cosine = float(torch.cosine_similarity(gradient, slope, 0))
                cells.append(f"{loss} {what} {value / reference - 1:+.2%} cos {cosine:.4f}")
        print("; ".join(cells), flush=True)


def _loss(
    distiller: Distiller, logits: Tensor, signal: Tensor | TeacherTopK, batch: Batch
) -> tuple[float, Tensor]:
    """The distillation loss, and its gradient by the student's logits."""
    own = logits.clone().requires_grad_()
    output = distiller(own, signal, batch, kd_scale=1.0)
    (gradient,) = torch.autograd.grad(output.loss, own)
    return float(output.kd.detach()), gradient.flatten()


def _spread(top: TeacherTopK, log_prior: Tensor) -> Tensor:
    """[B, T, V_t] log-probabilities: what is kept, and the rest by the prior."""
    dense = log_prior.expand(*top.ids.shape[:2], -1).clone()
    kept = top.log_probs > -torch.inf
    # A pad goes onto the likeliest column, which is kept in any case.
    ids = torch.where(kept, top.ids, top.ids[..., :1])
    dense.scatter_(-1, ids, -torch.inf)
    left = (1 - top.log_probs.exp().sum(-1)).clamp(min=1e-7).log()
    dense += (left - dense.logsumexp(-1))[..., None]
    values = torch.where(kept, top.log_probs, top.log_probs[..., :1])
    return dense.scatter_(-1, ids, values)


if __name__ == "__main__":
    main()
