"""Where the new rows come from, counted by class of text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from xtoken._core import PROJECTION_RULES, Vocab
from xtoken.projection import Projection
from xtoken.vocab.classes import SPECIAL, class_of, order


@dataclass(frozen=True)
class RowCounts:
    """Numbers of new rows.

    Attributes:
        copied: one row of the model as it was: of a token with the same bytes (or equal by what the
            pair declares equal), or of the special token with the same role or name.
        averaged: the mean of the rows of several pieces, which the model's tokenizer splits the
            token into; they may be one token repeated.
        without_source: no row corresponds; the mean of all rows stands in.
    """

    copied: int = 0
    averaged: int = 0
    without_source: int = 0

    @property
    def tokens(self) -> int:
        """All of them."""
        return self.copied + self.averaged + self.without_source

    def __add__(self, other: RowCounts) -> RowCounts:
        return RowCounts(
            self.copied + other.copied,
            self.averaged + other.averaged,
            self.without_source + other.without_source,
        )


@dataclass(frozen=True)
class TransferCounts:
    """What became of a model's embeddings under another tokenizer.

    Attributes:
        classes: the new tokenizer's tokens by class (`xtoken.vocab.classes`), in order.
        unused: ids of the new tokenizer that are no token; their rows are the mean too.
        padding: rows beyond the new tokenizer's ids; the same.
        tied: whether head and embedding are one matrix; True of a model without a head.
        changed_ids: token ids of the model's configurations that were set or taken out, such as
            `config.eos_token_id: 0 -> 2`.
        kept_ids: those that stay though the new tokenizer has no such token, as their configuration
            wants a number: `config.image_token_id: 151655`.
    """

    classes: dict[str, RowCounts]
    unused: int
    padding: int
    tied: bool
    changed_ids: tuple[str, ...] = ()
    kept_ids: tuple[str, ...] = ()

    @property
    def total(self) -> RowCounts:
        """All classes together."""
        return sum(self.classes.values(), RowCounts())

    def to_dict(self) -> dict[str, Any]:
        """The counts as JSON holds them."""
        names = ("copied", "averaged", "without_source")
        return {
            "classes": {
                label: {name: getattr(counts, name) for name in names}
                for label, counts in self.classes.items()
            },
            **{name: getattr(self.total, name) for name in names},
            "unused": self.unused,
            "padding": self.padding,
            "tied": self.tied,
            "changed_ids": list(self.changed_ids),
            "kept_ids": list(self.kept_ids),
        }


_COPIED = ("exact", "canonical", "role", "name", "duplicate")
_AVERAGED = ("forward", "reverse", "imported")


def count_rows(vocab: Vocab, projection: Projection) -> tuple[dict[str, RowCounts], int]:
    """The rows of W by where they come from, per class; and the number of unused ids."""
    one = {name: RowCounts(copied=1) for name in _COPIED}
    one |= {name: RowCounts(averaged=1) for name in _AVERAGED}
    found: dict[str, RowCounts] = {}
    unused = 0
    for token_id, code in enumerate(projection.rules.tolist()):
        rule = PROJECTION_RULES[code]
        if rule == "unused":
            unused += 1
            continue
        token = vocab.token_bytes(token_id)
        label = class_of(token) if token else SPECIAL
        row = one.get(rule, RowCounts(without_source=1))
        found[label] = found.get(label, RowCounts()) + row
    return {label: found[label] for label in order(set(found))}, unused
