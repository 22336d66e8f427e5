"""`python -m benches.truth [longest] [texts]`: how near each loss's target is to the truth.

Ten pairs of tiny tokenizers of each kind over three letters, a random distribution over all texts
up to eight letters, both sides' exact conditionals; mean total variation over the groups that each
construction tells apart, by chunk shape, and the share of places at which it is exact.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from truth_by_enumeration import BOUNDARIES, SHAPES, score, table, world
from truth_of_losses import losses_at_the_truth, sample


def main() -> None:
    """Print a table for each kind of tokenizer, and the loss of a student that is the truth."""
    numbers = [int(argument) for argument in sys.argv[1:3]]
    longest, texts = (*numbers, *(8, 60)[len(numbers) :])
    for kind in ("bpe", "unigram", "digits"):
        found = score([world(seed, longest, kind) for seed in range(10)], texts)
        places = sum(len(found["cells"].distances[shape]) for shape in BOUNDARIES)
        print(f"\n{kind}: {places} boundaries\n")
        print(table(found))
        print("\nloss of a student that is the truth, nats: mean, and share below 1e-9\n")
        for name, scored in found.items():
            losses = [value for shape in SHAPES for value in scored.losses[shape]]
            finite = [value for value in losses if value < float("inf")]
            infinite = len(losses) - len(finite)
            note = f", infinite at {infinite}" if infinite else ""
            share = sum(value < 1e-9 for value in losses) / len(losses)
            print(f"  {name}: {sum(finite) / len(finite):.4f}, {share:.2f}{note}")
        print("\nthe library's losses of that student, nats by chunk, computed by their own code\n")
        for name, values in _library(kind, longest, texts // 5).items():
            finite = [value for value in values if value < float("inf")]
            share = sum(abs(value) < 1e-9 for value in values) / len(values)
            infinite = len(values) - len(finite)
            note = f", infinite at {infinite}" if infinite else ""
            print(f"  {name}: {sum(finite) / len(finite):.4f}, {share:.2f}{note}")


def _library(kind: str, longest: int, texts: int) -> dict[str, list[float]]:
    """Each loss's values over all chunks of sampled texts."""
    found: dict[str, list[float]] = {}
    for seed in range(10):
        one = world(seed, longest, kind)
        for name, shapes in losses_at_the_truth(one, sample(one, texts, seed)).items():
            found.setdefault(name, []).extend(value for x in shapes.values() for value in x)
    return found


if __name__ == "__main__":
    main()
