"""The rows of a Trainer with a teachers' side: where they get it, and how they reach the step."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from torch import nn
from transformers import Trainer

from xtoken.distillation import MultiBatch
from xtoken.distillation.batch import Batch
from xtoken.errors import ArgumentTypeError, DataError, OptionError
from xtoken.training.batches import TEACHER_SIDE, split
from xtoken.training.pack_rows import pack_rows
from xtoken.training.teacher_columns import add_teacher_side, columns
from xtoken.training.teacher_side import TeacherSideCollator
from xtoken.training.teaching import Teaching

if TYPE_CHECKING:
    _Base = Trainer
else:
    _Base = object


def _column_names(dataset: Any) -> Iterable[str]:
    """Those of a dataset of `datasets`; none of others, which cannot be mapped as these are."""
    if not hasattr(dataset, "map") or not hasattr(dataset, "column_names"):
        return ()
    # A generator's stream, or a mapped one, does not know them before its first row.
    return next(iter(dataset), {}) if dataset.column_names is None else dataset.column_names


def check_rows_given(name: str, rows: Any) -> None:
    """Refuse a path or name in the place of rows: a text is a sequence of texts, its characters."""
    for given in rows.values() if isinstance(rows, dict) else [rows]:
        if isinstance(given, str | bytes | Path):
            raise ArgumentTypeError(
                f"{name} is the text {str(given)!r}, expected rows; pass "
                "xtoken.data.read_documents(...) or datasets.load_dataset(...) of it"
            )


class TakesTeacherSide(_Base):
    """The part of `DistillMixin` that prepares rows and moves batches."""

    teaching: Teaching
    # Whether the Trainer below had its rows prepared, with the teachers' side.
    _rows_prepared = False

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
        # A stream that was packed would read many rows for its first.
        names = () if self._rows_prepared else _column_names(self.train_dataset)
        if "input_ids" in names and columns(len(pairs))[0] not in names:
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
        if columns(len(pairs))[0] not in _column_names(prepared):
            with args.main_process_first(desc="the teachers' side"):
                prepared = add_teacher_side(
                    prepared,
                    pairs,
                    text_field=args.dataset_text_field,
                    eos=getattr(processing_class, "eos_token", None),
                    num_proc=args.dataset_num_proc if hasattr(prepared, "__len__") else None,
                    routes=self.teaching.routes,
                )
        self._rows_prepared = True
        if not packing:
            return prepared
        with args.main_process_first(desc="packing"):
            return pack_rows(prepared, args.max_length, len(pairs))

    def _check_no_side(self) -> None:
        """Refuse a batch without a teachers' side, unless the loss reads no teacher.

        Raises:
            DataError: rows of the dataset have none.
            OptionError: a collator that is not ours makes none.
        """
        if not self.teaching.needs_teacher:
            return
        collator = self.data_collator
        if not isinstance(collator, TeacherSideCollator):
            name = getattr(collator, "__name__", type(collator).__name__)
            raise OptionError(
                f"data_collator = {name} makes no {TEACHER_SIDE!r}, of which the loss is made; "
                "leave it out, or pass a DistillCollator"
            )
        raise DataError(
            f"a batch of train_dataset ({type(self.train_dataset).__name__}) has rows without "
            f"{columns(1)[0]!r}, of which the loss is made; pass a Dataset or IterableDataset of "
            "datasets whose rows hold input_ids, and in place of with_transform use map"
        )

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

    def get_test_dataloader(self, test_dataset: Any) -> Any:
        """The Trainer's own.

        Raises: ArgumentTypeError for a path or name.
        """
        check_rows_given("test_dataset", test_dataset)
        return super().get_test_dataloader(test_dataset)

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Any, Any, Any]:
        """The Trainer's own, on the student's side."""
        return super().prediction_step(model, split(inputs)[0], prediction_loss_only, ignore_keys)
