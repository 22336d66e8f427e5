"""SIGTERM and SIGINT during a run: finish the step, save a checkpoint, end with a word."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """Ends the training after the step in which a signal came, with a checkpoint.

    A second signal acts as it would without this: a user who cannot wait need not.

    Attributes:
        signal: the first that came; None while there was none.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Listen while the block runs; only the main thread of a process hears signals."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in SIGNALS}

        def remember(number: int, frame: FrameType | None) -> None:
            self.signal = signal.Signals(number)
            for each, handler in before.items():
                signal.signal(each, handler)

        for number in SIGNALS:
            signal.signal(number, remember)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _came_anywhere(self, args: TrainingArguments) -> bool:
        """Whether a signal came to any process: all must save and end after the same step."""
        if not (dist.is_available() and dist.is_initialized()):
            return self.signal is not None
        number = torch.tensor(0 if self.signal is None else int(self.signal), device=args.device)
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        if self.signal is None and int(number):
            self.signal = signal.Signals(int(number))
        return self.signal is not None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Ask for a checkpoint and the end, once a signal has come."""
        if self._came_anywhere(args):
            control.should_save = True
            control.should_training_stop = True
