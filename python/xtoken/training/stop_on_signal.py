"""SIGTERM and SIGINT during a run: finish the step, save a checkpoint, end with a word.

After the last step there is no other to finish: the evaluation is left, or what is behind it done.
"""

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

from xtoken.errors import InterruptedRunError

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class StopOnSignal(TrainerCallback):
    """Ends the training after the step in which a signal came, with a checkpoint.

    A second signal acts as it would without this: a user who cannot wait need not.

    Args:
        steps: of the whole training.

    Attributes:
        signal: the first that came; None while there was none.
        ended: the training, or the evaluation after it, was ended for it; in all processes alike.
    """

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.signal: signal.Signals | None = None
        self.ended = False

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

    def came_anywhere(self, args: TrainingArguments) -> bool:
        """Whether a signal came to any process: all must save and end after the same step, so all
        must ask."""
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
        if self.came_anywhere(args):
            self.ended = True
            control.should_save = True
            control.should_training_stop = True

    def leave_last_evaluation(self, args: TrainingArguments, state: TrainerState) -> None:
        """End the evaluation after the last step, which may take long, once a signal has come.

        Raises:
            InterruptedRunError: one has, to any process.
        """
        if state.global_step >= self.steps and self.came_anywhere(args):
            self.ended = True
            raise self.error(state, "pass --resume to evaluate the student")

    def error(self, state: TrainerState, then: str) -> InterruptedRunError:
        """What a run that was ended tells.

        Args:
            then: what is left, and what to do.
        """
        assert self.signal is not None
        return InterruptedRunError(
            f"stopped by {self.signal.name} after step {state.global_step} of {self.steps}; {then}",
            self.signal,
        )
