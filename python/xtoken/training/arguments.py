"""`transformers.TrainingArguments` and the settings of a distillation in one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from transformers import TrainingArguments

from xtoken.training.settings import LEARNING_RATE, WARMUP_STEPS, DistillSettings

# Scores of `DistillTrainer.evaluate`, behind whatever prefix.
_LOWER_IS_BETTER = ("bits_per_byte", "numeral_nll")


@dataclass
class DistillArguments(DistillSettings, TrainingArguments):
    """The arguments of a `DistillTrainer`: those of `transformers`, by the names people know, and
    those of `DistillSettings`.

    The defaults suit a pretrained student: learning rate 2e-5, falling along a cosine after a
    short warm-up. `remove_unused_columns` is off, as the columns of a dataset are texts. Of the
    scores, fewer bits per byte and a lower NLL are better, unless `greater_is_better` says else.

    >>> arguments = DistillArguments("out", loss="p-kl", report_to="none")
    >>> arguments.learning_rate, arguments.lr_scheduler_type.value
    (2e-05, 'cosine')
    """

    learning_rate: float = field(
        default=LEARNING_RATE, metadata={"help": "Peak learning rate of AdamW."}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Learning rate schedule."})
    warmup_steps: float = field(
        default=WARMUP_STEPS, metadata={"help": "Warm-up steps, or their share of all below 1."}
    )
    logging_steps: float = field(default=10, metadata={"help": "Steps between logs."})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Columns of a dataset are texts: nothing is removed."}
    )

    def __post_init__(self) -> None:
        DistillSettings.check(self)
        # TrainingArguments takes more for better, unless the name ends in "loss".
        metric = str(self.metric_for_best_model or "").partition("/")[0]
        if self.greater_is_better is None and metric.endswith(_LOWER_IS_BETTER):
            self.greater_is_better = False
        # Through Any: transformers declares the method without types.
        cast(Any, TrainingArguments).__post_init__(self)
