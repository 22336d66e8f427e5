"""`python benches/sorted_l1.py`: sorted L1, the distance of ULD and GOLD, by the core and by sorts.

Rows of softmaxes of random logits, one thread, float32; milliseconds of CPU a row, the least of the
repeats, both ways in turn. The same spread on both sides of one width is the core's worst: the
sorted rows cross again and again.
"""

from __future__ import annotations

import argparse
import time

import torch
from torch import Tensor

from xtoken.losses.engine import sorting

# V_s, V_t, and the standard deviations of both sides' logits.
CASES = (
    (49_152, 128_256, 3.0, 3.0),
    (128_256, 151_936, 3.0, 3.0),
    (128_256, 262_144, 3.0, 3.0),
    (262_144, 262_144, 3.0, 1.5),
    (262_144, 262_144, 3.0, 3.0),
    (262_144, 262_144, 0.3, 0.3),
)


def least(student: Tensor, teacher: Tensor, gradient: bool, repeats: int) -> tuple[float, float]:
    """Seconds by sorts and by the core."""
    best = [float("inf")] * 2
    for _ in range(repeats):
        for way, distance in enumerate((sorting._by_sorting, sorting._by_core)):
            start = time.process_time()
            distance(student, teacher, gradient)
            best[way] = min(best[way], time.process_time() - start)
    return best[0], best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    for *sizes, own, other in CASES:
        student, teacher = (
            torch.softmax(torch.randn(args.rows, int(size), generator=generator) * spread, 1)
            for size, spread in zip(sizes, (own, other), strict=True)
        )
        for gradient in (False, True):
            sorts, core = least(student, teacher, gradient, args.repeats)
            print(
                f"{sizes[0]:>7} {sizes[1]:>7}, logits of {own} and {other}, "
                f"{'signs' if gradient else 'value'}: "
                f"sorts {sorts / args.rows * 1e3:.2f} ms a row, "
                f"core {core / args.rows * 1e3:.2f}, {sorts / core:.1f} x",
                flush=True,
            )


if __name__ == "__main__":
    main()
