"""Train and score every arm on two pretrained models; go on where an earlier call stopped.

    python -m benches.losses_on_pairs                         # all of it: many hours of CPU
    python -m benches.losses_on_pairs --minutes 30            # so far as half an hour allows
    python -m benches.losses_on_pairs --only "exact KL" --texts wesnoth-ru --seeds 0
    python -m benches.losses_on_pairs --report                # only the table and the picture
    python -m benches.losses_on_pairs --ends wesnoth-de       # only what both models know before

Each unit (an arm, a text, a seed, a setting) is one line of results.jsonl, written when it is done;
what is there is not run again. SIGTERM and the end of --minutes leave a unit between two steps and
keep its state, so that the next call goes on with it. Models and texts are below --folder; the
README says which packages they come from.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import time
from pathlib import Path
from typing import Any

from benches.losses_on_pairs.arms import ARMS, Setting, Unit, plan

HERE = Path(__file__).parent


def main() -> None:
    options = _options()
    # Before torch is imported: CPU time is compared, and other work goes on beside this.
    os.environ["OMP_NUM_THREADS"] = "1"
    results = _read(options.results)
    if not options.report:
        _run(options, results)
    if results:
        _write_report(options.results, results)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benches.losses_on_pairs")
    parser.add_argument("--results", type=Path, default=HERE / "results.jsonl")
    parser.add_argument("--folder", type=Path, default=Path("runs/losses-on-pairs"))
    parser.add_argument("--minutes", type=float, help="stop after so many minutes")
    parser.add_argument("--only", action="append", help="an arm; may be repeated")
    parser.add_argument("--texts", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--rates", type=float, nargs="+", help="learning rates")
    parser.add_argument("--steps", type=int, nargs="+", help="steps of a student")
    parser.add_argument("--ends", nargs="+", metavar="TEXT", help="score the untrained models")
    parser.add_argument("--report", action="store_true", help="train nothing")
    return parser.parse_args()


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]


def _done(results: list[dict[str, Any]]) -> set[Unit]:
    return {
        Unit(r["arm"], r["text"], r["seed"], Setting(*(r[name] for name in Setting._fields)))
        for r in results
        if "arm" in r
    }


def _chosen(options: argparse.Namespace) -> list[Unit]:
    from xtoken.distillation.options import LOSS_NAMES

    unknown = [arm for arm in options.only or () if arm not in ARMS]
    if unknown:
        raise SystemExit(f"--only {unknown[0]!r} is no arm; they are {', '.join(ARMS)}")
    absent = {arm for arm, settings in ARMS.items() if settings["loss"] not in LOSS_NAMES}
    if absent:
        print(f"left out, as the library has no such loss: {', '.join(sorted(absent))}")
    return [
        unit
        for unit in plan()
        if unit.arm not in absent
        and (options.only is None or unit.arm in options.only)
        and (options.texts is None or unit.text in options.texts)
        and (options.seeds is None or unit.seed in options.seeds)
        and (options.steps is None or unit.setting.steps in options.steps)
        and (options.rates is None or unit.setting.learning_rate in options.rates)
    ]


def _run(options: argparse.Namespace, results: list[dict[str, Any]]) -> None:
    import torch

    from benches.losses_on_pairs.unit import Bench, Stopped
    from xtoken.cli.console import quiet_transformers

    torch.set_num_threads(1)
    quiet_transformers()
    stop = False

    def on_signal(*_: object) -> None:
        nonlocal stop
        stop = True

    signal.signal(signal.SIGTERM, on_signal)
    start = time.monotonic()

    def should_stop() -> bool:
        late = options.minutes is not None and time.monotonic() - start > 60 * options.minutes
        return stop or late

    def progress(what: str, step: int) -> None:
        print(f"{time.monotonic() - start:7.0f} s  step {step:3}  {what}", flush=True)

    bench = Bench(options.folder, should_stop, progress)
    machine = f"{platform.machine()}, one thread"

    def write(result: dict[str, Any]) -> None:
        result["machine"] = machine
        with options.results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
        results.append(result)

    def write_ends(text: str) -> None:
        if not any(r.get("ends") == text for r in results):
            write({"ends": text, **bench.ends(text)})
            print(f"{text}: {results[-1]['student']['all']} bits per byte untrained, ", end="")
            print(f"teacher {results[-1]['teacher']['all']}", flush=True)

    for text in options.ends or ():
        write_ends(text)
    units = _chosen(options) if options.ends is None else []
    for place, unit in enumerate(units):
        if unit in _done(results):
            continue
        if should_stop():
            print(f"{len(units) - place} units are left for another call")
            return
        try:
            write_ends(unit.text)
            write(bench.run(unit))
        except Stopped:
            print(f"{unit} was left between two steps; the next call goes on with it")
            return
        print(f"{unit}: {results[-1]['scores']['all']} bits per byte", flush=True)


def _write_report(path: Path, results: list[dict[str, Any]]) -> None:
    from benches.losses_on_pairs.report import draw, markdown

    table = markdown(results)
    path.with_suffix(".md").write_text(table, encoding="utf-8")
    draw(results, path.with_suffix(".png"))
    print(table)


if __name__ == "__main__":
    main()
