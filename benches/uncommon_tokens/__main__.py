"""Train and score every arm; go on where an earlier call stopped.

    python -m benches.uncommon_tokens                       # all of it: hours of CPU
    python -m benches.uncommon_tokens --minutes 30          # so far as half an hour allows
    python -m benches.uncommon_tokens --only "prefix KL" --seeds 0 --steps 160
    python -m benches.uncommon_tokens --report              # only the table and the picture
    python -m benches.uncommon_tokens --teacher             # only the teacher's own scores

Each unit (an arm, a seed, steps, a setting) is one line of results.jsonl, written when it is done;
what is there is not run again, so that several calls may work side by side with --seeds or --steps.
The demo's pair, text and teacher are used; what the teacher says is stored at the first call.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

from benches.uncommon_tokens.arms import ARMS, Setting, Unit, plan

HERE = Path(__file__).parent


def main() -> None:
    options = _options()
    # Before torch is imported: the units are small, and CPU time is compared.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if options.teacher:
        _print_teacher(options)
        return
    results = _read(options.results)
    if not options.report:
        _run(options, results)
    if results:
        _write_report(options.results, results)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benches.uncommon_tokens")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo"), help="of the demo")
    parser.add_argument("--minutes", type=float, help="start no unit after so many minutes")
    parser.add_argument("--only", action="append", help="an arm; may be repeated")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--steps", type=int, nargs="+")
    parser.add_argument("--passages", type=int, nargs="+", help="to train on")
    parser.add_argument("--report", action="store_true", help="train nothing")
    parser.add_argument("--teacher", action="store_true", help="score the teacher")
    return parser.parse_args()


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _done(results: list[dict[str, Any]]) -> set[Unit]:
    return {
        Unit(r["arm"], r["seed"], r["steps"], Setting(r["passages"], r["batch_size"]))
        for r in results
    }


def _run(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    from rich.console import Console

    from benches.uncommon_tokens.unit import Bench
    from xtoken.cli.console import Bars, quiet_transformers

    unknown = [arm for arm in options.only or () if arm not in ARMS]
    if unknown:
        raise SystemExit(f"--only {unknown[0]!r} is no arm; they are {', '.join(ARMS)}")
    done = _done(results)
    units = [
        unit
        for unit in plan()
        if unit not in done
        and (options.only is None or unit.arm in options.only)
        and (options.seeds is None or unit.seed in options.seeds)
        and (options.steps is None or unit.steps in options.steps)
        and (options.passages is None or unit.setting.passages in options.passages)
    ]
    quiet_transformers()
    console = Console()
    bars = Bars(console)
    bench = Bench.prepare(options.folder, bars)
    start = time.monotonic()
    for place, unit in enumerate(units):
        if options.minutes is not None and time.monotonic() - start > 60 * options.minutes:
            console.print(f"{len(units) - place} units are left for another call")
            break
        results[:] = _read(options.results)
        if unit in _done(results):  # by another process, beside this one
            continue
        console.print(f"unit {place + 1} of {len(units)}: {unit}")
        with bars.progress(unit.arm, unit.steps) as update:
            result = bench.run(unit, lambda done, update=update: update(done, ""))
        result["machine"] = f"{platform.machine()}, {os.cpu_count()} cores, one thread"
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        results.append(result)


def _print_teacher(options: argparse.Namespace) -> None:
    import torch
    from rich.console import Console

    from benches.uncommon_tokens.teacher_score import score_teacher
    from benches.uncommon_tokens.unit import Bench
    from xtoken.cli.console import Bars, quiet_transformers
    from xtoken.training.config import DistillConfig

    quiet_transformers()
    console = Console()
    bench = Bench.prepare(options.folder, Bars(console))
    materials = bench.materials(DistillConfig(), 0, Setting().passages)
    pair = materials.pair
    scores = score_teacher(
        pair.load_teacher(torch.device("cpu")),
        materials.held_out.examples,
        pair.student_vocab,
        pair.teacher_vocab,
    )
    console.print(scores)


def _write_report(path: Path, results: list[dict[str, Any]]) -> None:
    from benches.uncommon_tokens.report import draw, markdown

    table = markdown(results)
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    draw(results, path.with_suffix(".png"))
    print(table)


if __name__ == "__main__":
    main()
