"""Starts small runs in processes of their own, forked from one that has read all that they need.

Asked `("start", (out, command, errors))` it answers a process id, asked `("wait", pid)` its exit
code, negative for a signal.
"""

from __future__ import annotations

import contextlib
import gc
import os
import resource
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

from huggingface_hub.utils import disable_progress_bars
from transformers.utils import logging

from xtoken import Pair
from xtoken.data import read_documents, split_held_out
from xtoken.errors import XTokenError
from xtoken.teachers import LiveTeacher, StoreKey, TopKStore, teacher_sequences
from xtoken.training import (
    DistillConfig,
    DistillMixin,
    DistillSettings,
    Teacher,
    last_whole_checkpoint,
    load_models,
    open_teachers,
    prepare,
    train,
)

CONFIG = DistillConfig(
    steps=8, batch_size=2, top_k=16, teacher_top_k=16, max_tokens=32, warmup_steps=1,
    checkpoint_every=2, learning_rate=3e-3, device="cpu", curves=False,
)  # fmt: skip


Run = Callable[[Path], None]


def begin(run: Run, out: Path, command: str) -> None:
    kind, _, value = command.partition("=")
    if kind == "kill":
        # At a moment of the work itself, from whatever place it has reached.
        threading.Timer(float(value), lambda: os.kill(os.getpid(), signal.SIGKILL)).start()
    if kind == "limit":
        # As on a full disk: no file grows beyond this, and the write says so.
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(value), int(value)))
    run(out)


def start(run: Run, out: str, command: str, errors: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    with open(errors, "w") as file:
        os.dup2(file.fileno(), 2)
        os.dup2(file.fileno(), 1)
        try:
            begin(run, Path(out), command)
            code = 0
        except (XTokenError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
        except BaseException:
            traceback.print_exc()
        sys.stderr.flush()
    os._exit(code)


def plain(folder: Path) -> Run:
    """A run as the command makes it."""
    texts = split_held_out(read_documents(folder / "data.jsonl"), 0.2)
    materials = prepare(load_models(folder / "student", folder / "teacher"), texts, CONFIG)
    _ = materials.pair.tries

    def run(out: Path) -> None:
        cache = out.parent / f"{out.name}-store"
        teachers = open_teachers(materials, CONFIG, [CONFIG.loss], cache)
        train(materials, CONFIG, teachers[CONFIG.loss], out, resume=True)

    return run


def packed(folder: Path) -> Run:
    """TRL's SFTTrainer with packing and two teachers: one from a store that the run fills, one
    that runs beside it."""
    import torch
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    class Trainer(DistillMixin, trl.SFTTrainer):
        """What a user writes."""

    torch.set_num_threads(1)  # bit for bit, and a fork of a pool of threads would hang
    texts = read_documents(folder / "data.jsonl")
    tokenizer = AutoTokenizer.from_pretrained(folder / "student")
    pair = Pair(tokenizer, AutoTokenizer.from_pretrained(folder / "teacher"))
    same = Pair(tokenizer, tokenizer)
    _ = pair.tries, same.projection
    sequences = teacher_sequences(texts, pair.teacher_tokenizer)

    def run(out: Path) -> None:
        live = LiveTeacher.from_pretrained(folder / "teacher")
        key = StoreKey(live.fingerprint, 16, "uint8", pair.teacher_vocab.fingerprint, 0.9)
        store = TopKStore(out.parent / f"{out.name}-store", key)
        store.fill(live, sequences)
        trainer = Trainer(
            AutoModelForCausalLM.from_pretrained(folder / "student"),
            args=trl.SFTConfig(
                str(out), max_steps=8, per_device_train_batch_size=1, max_length=256, packing=True,
                save_steps=2, save_total_limit=2, report_to="none", use_cpu=True, bf16=False,
                gradient_checkpointing=False, disable_tqdm=True, dataloader_pin_memory=False,
            ),
            train_dataset=Dataset.from_dict({"text": list(texts)}),
            processing_class=tokenizer,
            teachers=[
                Teacher(store, pair),
                Teacher(str(folder / "student"), same, loss="same-vocab-kl", weight=0.5),
            ],
            distill=DistillSettings(loss="p-kl", top_k=16),
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=last_whole_checkpoint(out))
        trainer.save_model(str(out / "student"))

    return run


def serve(folder: Path, kind: str, questions: Connection) -> None:
    """Answer until the other end is closed."""
    os.environ |= {"XTOKEN_CACHE": "off", "TOKENIZERS_PARALLELISM": "false"}
    warnings.simplefilter("ignore")
    disable_progress_bars()
    logging.disable_progress_bar()
    run = {"plain": plain, "packed": packed}[kind](folder)
    gc.freeze()  # the collector of a run passes by what it shares with the others
    questions.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            question, given = questions.recv()
            if question == "start":
                questions.send(start(run, *given))
            else:
                questions.send(os.waitstatus_to_exitcode(os.waitpid(given, 0)[1]))
