"""`python -m benches.targets`: time to build exact targets of a real pair, on one thread.

The student is SmolLM2's tokenizer, the teacher DeepSeek's, and the other way round; the text is
English prose and Python. The teacher's rows are made up: 512 stored columns with falling
probabilities, about a hundred of them above the builder's cut, the text's own token among the best.
"""

from __future__ import annotations

import inspect
import sys
import time
from pathlib import Path
from pydoc_data import topics

import numpy as np
from tokenizers import Tokenizer

from xtoken import Aligner, Projection
from xtoken.targets import TargetBuilder, TargetExample, TargetOptions

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from chat_families import family

COLUMNS = 512
REPEATS = 3


def rows(ids: np.ndarray, size: int, frequent: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[T, 512] column ids and log-probs after each token."""
    rng = np.random.default_rng(0)
    shares = 1.0 / np.arange(2, COLUMNS + 2) ** 1.6
    columns = np.empty((len(ids), COLUMNS), np.int64)
    log_probs = np.empty((len(ids), COLUMNS), np.float32)
    for at in range(len(ids)):
        # Half of what a model finds likely is frequent in the text, half is anything.
        some = np.concatenate([rng.permutation(frequent)[:300], rng.integers(0, size, 400)])
        columns[at] = rng.permutation(np.unique(some))[:COLUMNS]
        if at + 1 < len(ids) and ids[at + 1] not in columns[at]:
            columns[at, int(rng.exponential(3)) % COLUMNS] = ids[at + 1]
        scale = shares * rng.gamma(1.0, size=COLUMNS)
        log_probs[at] = np.log(np.sort(scale / scale.sum() * 0.98)[::-1])
    return columns, log_probs


def main() -> None:
    """Print milliseconds per 1,000 student tokens for each switch."""
    smollm2: Tokenizer = family("smollm2").tokenizer.backend_tokenizer
    deepseek: Tokenizer = family("deepseek").tokenizer.backend_tokenizer
    text = "\n".join(list(topics.topics.values())[:8])[:8_000]
    text += inspect.getsource(inspect)[:4_000]
    for name, student, teacher in (
        ("SmolLM2 <- DeepSeek", smollm2, deepseek),
        ("DeepSeek <- SmolLM2", deepseek, smollm2),
    ):
        projection = Projection.build(student, teacher, cache_dir=False)
        started = time.perf_counter()
        builder = TargetBuilder(projection)
        print(f"{name}: tables of the pair in {time.perf_counter() - started:.2f} s")
        ids = [
            np.array(side.encode(text, add_special_tokens=False).ids) for side in (student, teacher)
        ]
        frequent = np.unique(ids[1])
        columns, log_probs = rows(ids[1], projection.shape[1], frequent)
        alignment = Aligner(student, teacher, threads=1).align(*ids)
        example = TargetExample(*ids, alignment, log_probs, columns)
        kept = float((log_probs > np.log(2e-4)).sum(1).mean())
        print(f"  {len(ids[0])} student tokens, {kept:.0f} columns of {COLUMNS} above the cut")
        for label, options in (
            ("cells", TargetOptions(consistent=False, levels=0, max_depth=0)),
            ("cells, consistent", TargetOptions(levels=0, max_depth=0)),
            ("cells, consistent, carry", TargetOptions(max_depth=0)),
            ("with depths", TargetOptions()),
            ("with depths, four levels", TargetOptions(levels=4)),
            ("what is sure", TargetOptions(sure=True)),
        ):
            times = []
            for _ in range(REPEATS):
                started = time.process_time()
                targets = builder.build([example], options, threads=1)
                times.append(time.process_time() - started)
            best = 1e6 * min(times) / len(ids[0])
            first = 1e6 * times[0] / len(ids[0])
            print(
                f"  {label:27} {best:5.2f} ms per 1,000 tokens (first call {first:5.2f}); "
                f"{len(targets)} targets, {len(targets.probs) / max(len(targets), 1):.0f} groups, "
                f"tail {targets.tails.mean():.4f}, open {targets.open.mean():.3f}"
            )


if __name__ == "__main__":
    main()
