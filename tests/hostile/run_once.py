"""Starts small runs in processes of their own, forked from one that has read all that they need.

Reads a JSON object per line: `{"start": [out, command, errors]}` answers a process id, `{"wait":
pid}` its exit code, negative for a signal.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import threading
import traceback
from pathlib import Path

from xtoken.data import read_documents, split_held_out
from xtoken.errors import XTokenError
from xtoken.training import DistillConfig, PreparedData, load_models, open_teachers, prepare, train

CONFIG = DistillConfig(
    steps=8, batch_size=2, top_k=16, teacher_top_k=16, max_tokens=32, warmup_steps=1,
    checkpoint_every=2, device="cpu",
)  # fmt: skip


def run(materials: PreparedData, out: Path, command: str) -> None:
    kind, _, value = command.partition("=")
    if kind == "kill":
        # At a moment of the work itself, from whatever place it has reached.
        threading.Timer(float(value), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    if kind == "limit":
        # As on a full disk: no file grows beyond this, and the write says so.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), int(value)))
    teachers = open_teachers(materials, CONFIG, [CONFIG.loss], out.parent / f"{out.name}-store")
    train(materials, CONFIG, teachers[CONFIG.loss], out, resume=True)


def start(materials: PreparedData, out: str, command: str, errors: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
        try:
            run(materials, Path(out), command)
            code = 0
        except (XTokenError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def main(folder: Path) -> None:
    texts = split_held_out(read_documents(folder / "data.jsonl"), 0.2)
    materials = prepare(load_models(folder / "student", folder / "teacher"), texts, CONFIG)
    _ = materials.pair.tries
    print("ready", flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if "start" in asked:
            answer = start(materials, *asked["start"])
        else:
            answer = os.waitstatus_to_exitcode(os.waitpid(asked["wait"], 0)[1])
        print(answer, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
