"""The audit of a pair that the command line names, and its page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, cast

import numpy as np
import typer
from numpy.typing import NDArray

from xtoken._core import Vocab
from xtoken.align import Aligner
from xtoken.audit.audit import Audit
from xtoken.cli.sides import page_names, working
from xtoken.data.stops import vocab_with_stops
from xtoken.projection import Projection
from xtoken.vocab.side import Side

Threshold = Annotated[float, typer.Option(help="Least weight of a pair in the relaxed common set.")]


# Of a teacher that runs: so many tokens of a text, and so many columns after each.
LONGEST = 2_048
COLUMNS = 4_096


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
    student: Side,
    teacher: Side,
    threshold: float,
    text: str | None = None,
    model: str | None = None,
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
    from xtoken.audit.placement import mass_placement
    from xtoken.audit.prefix_coverage import supervision
    from xtoken.targets import TargetExample

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
    if text is not None and model is not None:
        with working("predicting the text"):
            log_probs, columns = predictions(model, teacher, ids[1])
        with working("placing the teacher's mass"):
            example = TargetExample(
                np.asarray(ids[0], dtype=np.int64),
                np.asarray(ids[1][: len(log_probs)], dtype=np.int64),
                Aligner(*vocabs).align(ids[0], ids[1][: len(log_probs)]),
                log_probs,
                columns,
            )
            by_shape, by_class = mass_placement(projection, example)
            found = replace(found, placement=by_shape, placement_by_class=by_class)
    return AuditedPair(found, projection, student, teacher)


def predictions(
    model: str, teacher: Side, ids: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """A teacher's likeliest columns after each token of a text, as log-probabilities and ids.

    Args:
        model: a folder that `xtoken teach` filled, or a model's directory or hub name.
        ids: the text; of a long one the first tokens are predicted.

    Raises:
        StoreError: the store lacks the text.
        ModelSourceError: the model cannot be loaded.
    """
    from xtoken.targets.rows import within
    from xtoken.teachers import LiveTeacher, TopKStore
    from xtoken.teachers.load_model import load_causal_lm
    from xtoken.teachers.predict import predict
    from xtoken.teachers.store import is_store

    whole = np.asarray(ids, dtype=np.int64)
    if is_store(model):
        store = TopKStore.open(model)
        store.require_tokenizer(teacher.vocab.fingerprint)
        notes = store.notes
        found = store.get(whole if notes is None else whole[: notes.max_tokens])
    else:
        loaded = load_causal_lm(model, side="teacher")
        rows = cast(Any, loaded).get_output_embeddings().weight.shape[0]
        (found,) = predict(LiveTeacher(loaded), [whole[:LONGEST]], min(COLUMNS, rows))
    return found.log_probs, within(found.ids, len(teacher.vocab))
