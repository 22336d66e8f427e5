"""`python -m benches.exact_kl [tokens]`: what a step's loss costs with targets made before, against
P-KL of the same stored predictions.

SmolLM2's and DeepSeek's tokenizers, each as the student; forward and backward by the student's
logits on one thread in float32, CPU time, the least of the repeats, taken in turns. The rows of the
teacher are those of `benches.targets`; the student's logits are random.
"""

from __future__ import annotations

import sys
import time

import torch

from benches.targets import COLUMNS, pairs
from xtoken import Projection
from xtoken.losses import LOSSES, LossInputs, LossOptions, PairParts, TeacherTopK
from xtoken.targets import TargetBuilder
from xtoken.tensors.chunks import ChunkBatch
from xtoken.tensors.target_batch import TargetBatch

REPEATS = 5


def main() -> None:
    """Print milliseconds of each loss, and the ratio."""
    torch.set_num_threads(1)
    tokens = int(sys.argv[1]) if len(sys.argv) > 1 else 512
    for name, student, teacher, example in pairs(tokens):
        projection = Projection.build(student, teacher, cache_dir=False)
        builder = TargetBuilder(projection)
        own, other = (
            torch.from_numpy(ids)[None] for ids in (example.student_ids, example.teacher_ids)
        )
        everything = [torch.ones_like(ids, dtype=torch.bool) for ids in (own, other)]
        chunks = ChunkBatch.usable_from_alignments([example.alignment], *everything)
        assert example.column_ids is not None
        signal = TeacherTopK(
            torch.from_numpy(example.column_ids)[None], torch.from_numpy(example.log_probs)[None],
            vocab_size=projection.shape[1],
        )  # fmt: skip
        parts = PairParts.from_projection(projection, needs=("projection", "targets"))
        started = time.process_time()
        made = builder.build([example], threads=1)
        built = time.process_time() - started
        started = time.process_time()
        targets = TargetBatch.from_targets(made, builder.tokens, chunks, own.shape[1])
        laid_out = time.process_time() - started
        logits = torch.randn(*own.shape, projection.shape[0], requires_grad=True)
        inputs = LossInputs(
            logits, signal, chunks, student_ids=own, teacher_ids=other, targets=targets
        )
        calls = {
            f"P-KL, stored {COLUMNS}, tail": ("p-kl", LossOptions(tail_bucket=True)),
            f"P-KL, stored {COLUMNS} alone": ("p-kl", LossOptions()),
            "exact-kl, stored targets": ("exact-kl", LossOptions()),
            "exact-kl by the chain rule": ("exact-kl", LossOptions(chain_rule=True)),
        }
        times: dict[str, list[float]] = {label: [] for label in calls}
        for _ in range(REPEATS):
            for label, (loss, options) in calls.items():
                logits.grad = None
                started = time.process_time()
                LOSSES[loss].function(inputs, parts, options).loss.backward()
                times[label].append(time.process_time() - started)
        print(
            f"{name}: {own.shape[1]} student tokens, {len(chunks)} chunks, {len(made)} targets; "
            f"first build {1e3 * built:.0f} ms, laid out in {1e3 * laid_out:.0f} ms"
        )
        floor = min(times[f"P-KL, stored {COLUMNS}, tail"])
        for label, found in times.items():
            print(f"  {label:48} {1e3 * min(found):7.1f} ms  {min(found) / floor:.2f} x")


if __name__ == "__main__":
    main()
