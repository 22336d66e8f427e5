"""The rows of a Trainer with a teachers' side: where they get it, and how they reach the step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import Trainer

from xtoken.distillation import MultiBatch
from xtoken.distillation.batch import Batch
from xtoken.errors import OptionError
from xtoken.training.batches import split
from xtoken.training.pack_rows import pack_rows
from xtoken.training.teacher_side import (
    TeacherSideCollator,
    add_teacher_side,
    columns,
)
from xtoken.training.teaching import Teaching

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


class TakesTeacherSide(_Base):
    """The part of `DistillMixin` that prepares rows and moves batches."""

    teaching: Teaching

    def _bind_data(self) -> None:
        """Give the rows a teachers' side, where the Trainer below has tokenized for the student."""
        if not self.teaching.needs_teacher:
            return
        pairs = self.teaching.pairs
        if not isinstance(self.data_collator, TeacherSideCollator):
            self.data_collator = TeacherSideCollator(
                self.data_collator, pairs, self.teaching.targets,
                [member.prepared for member in self.teaching.members],
            )  # fmt: skip
        names = getattr(self.train_dataset, "column_names", None)
        if names is not None and "input_ids" in names and columns(len(pairs))[0] not in names:
            # The others find what the first process of their machine has made.
            with self.args.main_process_first(desc="the teachers' side"):
                self.train_dataset = add_teacher_side(
                    cast(Any, self.train_dataset), pairs, routes=self.teaching.routes
                )

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        """What TRL's `SFTTrainer` makes of a dataset, with the teachers' side of the rows that are
        trained on. Rows are packed here, the same documents on all sides."""
        below = cast(Any, super())
        if dataset_name != "train" or not self.teaching.needs_teacher:
            return below._prepare_dataset(
                dataset, processing_class, args, packing, formatting_func, dataset_name
            )
        if packing and args.packing_strategy != "bfd":
            raise OptionError(
                f"packing_strategy = {args.packing_strategy!r} cuts documents, whose teacher side "
                "would lose its beginning; use 'bfd'"
            )
        pairs = self.teaching.pairs
        prepared = below._prepare_dataset(
            dataset, processing_class, args, False, formatting_func, dataset_name
        )
        names = getattr(prepared, "column_names", None) or ()
        if columns(len(pairs))[0] not in names:
            with args.main_process_first(desc="the teachers' side"):
                prepared = add_teacher_side(
                    prepared,
                    pairs,
                    text_field=args.dataset_text_field,
                    eos=getattr(processing_class, "eos_token", None),
                    num_proc=args.dataset_num_proc if hasattr(prepared, "__len__") else None,
                    routes=self.teaching.routes,
                )
        if not packing:
            return prepared
        with args.main_process_first(desc="packing"):
            return pack_rows(prepared, args.max_length, len(pairs))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        names: list[str] = cast("list[str]", self._signature_columns)
        names += [name for name in columns(len(self.teaching.pairs)) if name not in names]

    def _prepare_input(self, data: Any) -> Any:
        if isinstance(data, Batch | MultiBatch):
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    def floating_point_ops(self, inputs: Any) -> int:
        """The Trainer's estimate, from the student's side."""
        return super().floating_point_ops(split(inputs)[0])

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """The Trainer's own, on the student's side."""
        return super().prediction_step(model, split(inputs)[0], prediction_loss_only, ignore_keys)
