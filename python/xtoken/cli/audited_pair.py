"""The audit of a pair that the command line names, and its page."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated

import typer

from xtoken._core import Vocab
from xtoken.align import Aligner
from xtoken.audit.audit import Audit
from xtoken.cli.sides import page_names, working
from xtoken.data.stops import vocab_with_stops
from xtoken.projection import Projection
from xtoken.vocab.side import Side

Threshold = Annotated[float, typer.Option(help="Least weight of a pair in the relaxed common set.")]


@dataclass(frozen=True, eq=False)
class AuditedPair:
    """An audit with what it is of."""

    audit: Audit
    projection: Projection
    student: Side
    teacher: Side

    def page(
        self,
        source: str,
        student_name: str | None = None,
        teacher_name: str | None = None,
        rows: int | None = None,
    ) -> str:
        """The page of `xtoken report pair`.

        Args:
            source: what the page calls the sample of text, where there is one.
            student_name, teacher_name: None for the names of their folders.
            rows: the most rows of W; None for the default.
        """
        from xtoken.report.page import PageNames
        from xtoken.report.pair_page import ROWS, pair_page

        names = page_names(self.student, self.teacher, student_name, teacher_name)
        return pair_page(
            self.audit,
            self.projection,
            PageNames(*names, source),
            rows=ROWS if rows is None else rows,
        )


def audit_sides(
    student: Side, teacher: Side, threshold: float, text: str | None = None
) -> AuditedPair:
    """Build W and audit.

    Args:
        text: a sample, to count the chunks of; encoders are read only where there is one, as not
            every file of a vocabulary has one.

    Raises:
        OptionError: the threshold is out of range.
        MissingFileError, ModelSourceError, UnsupportedTokenizerError: a tokenizer cannot be read.
    """
    from xtoken.audit.audit import audit
    from xtoken.audit.prefix_coverage import supervision

    sides = student, teacher
    with working("reading the tokenizers"):
        if text is not None:
            for side in sides:  # first, as the vocabulary is then the tokenizer's own
                _ = side.tokenizer
        vocabs: list[Vocab] = [vocab_with_stops(side) for side in sides]
    with working("auditing the pair"):
        projection = Projection.build(*vocabs)
        found = audit(projection, threshold)
        if text is not None:
            ids = [side.encode([text])[0] for side in sides]
            alignment = Aligner(*vocabs).align(*ids)
            found = replace(found, supervision=supervision(projection, alignment, *ids))
    return AuditedPair(found, projection, student, teacher)
