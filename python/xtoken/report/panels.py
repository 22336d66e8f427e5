"""What of a run is drawn: the panels of its metrics, for the page and for `curves.png`."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

Records = Sequence[Mapping[str, float]]

# Records of a moving mean.
MEAN_OF = 15

_LOSS, _HELD_OUT, _MASS = "Parts of the loss", "Held-out text", "Mass and coverage"
_STEPS, _CLASSES, _OTHERS = "Steps", "By class", "Other metrics"
_GROUPS = (_HELD_OUT, _LOSS, _MASS, _CLASSES, _STEPS, _OTHERS)


@dataclass(frozen=True)
class Panel:
    """One metric.

    Attributes:
        name: in a record.
        title: with its unit.
        group: the heading that it stands under.
        smooth: drawn with a moving mean, as it is noisy from step to step.
        share: a part of 1.
    """

    name: str
    title: str
    group: str
    smooth: bool = True
    share: bool = False

    def points(self, records: Records) -> list[tuple[float, float]]:
        """(step, value) of the records that have a finite one, by rising step."""
        found = [
            (record["step"], record[self.name])
            for record in records
            if math.isfinite(record.get(self.name, math.nan))
        ]
        return sorted(found, key=lambda point: point[0])

    def limits(self, values: Sequence[float]) -> tuple[float, float]:
        """The range of an honest axis: a share has all of 0 to 1, others begin at 0 unless a value
        is below."""
        low, high = min(values, default=0.0), max(values, default=1.0)
        if self.share:
            return min(0.0, low), max(1.0, high)
        return min(0.0, low), high if high > 0 else 1.0 if low == 0 else 0.0


_KNOWN = (
    Panel("eval_bits_per_byte", "bits per byte", _HELD_OUT, smooth=False),
    Panel("eval_loss", "cross-entropy (nats per token)", _HELD_OUT, smooth=False),
    Panel(
        "eval_numeral_mass", "mass on 2-3 digit numerals, where one is right", _HELD_OUT,
        smooth=False, share=True,
    ),
    Panel(
        "eval_digit_mass", "mass on single digits, where a numeral is right", _HELD_OUT,
        smooth=False, share=True,
    ),
    Panel("eval_numeral_nll", "NLL of the right numeral (nats)", _HELD_OUT, smooth=False),
    Panel("total", "total, weighted", _LOSS),
    Panel("ce", "cross-entropy (nats per token)", _LOSS),
    Panel("kd", "distillation loss (nats per chunk)", _LOSS),
    Panel("kl", "KL of the first pieces, or all of it (nats per chunk)", _LOSS),
    Panel("prefix_kl", "prefix KL beyond the first piece (nats per chunk)", _LOSS),
    Panel("deeper_kl", "exact KL below depth 0, by the chain rule (nats per chunk)", _LOSS),
    Panel("kd_scale", "weight of the distillation loss", _LOSS),
    Panel("kd_scale_clipped", "share of steps with that weight clipped", _LOSS, share=True),
    Panel("teacher_mass", "teacher's mass kept", _MASS, share=True),
    Panel("student_mass", "student's mass kept", _MASS, share=True),
    Panel("coverage", "student's tokens in exact chunks", _MASS, share=True),
    Panel("empty_row_mass", "student's mass on empty rows of W", _MASS, share=True),
    Panel("prefix_teacher_mass", "teacher's known mass at prefixes", _MASS, share=True),
    Panel("target_tail", "targets' mass outside all groups", _MASS, share=True),
    Panel("top1_agreement", "top-1 agreement", _MASS, share=True),
    Panel("chunks", "chunks in a step", _STEPS),
    Panel("prefixes", "compared prefixes per chunk", _STEPS),
    Panel("groups", "groups per chunk", _STEPS),
    Panel("learning_rate", "learning rate", _STEPS, smooth=False),
    Panel("grad_norm", "norm of the gradient", _STEPS),
)  # fmt: skip
_BY_NAME = {panel.name: panel for panel in _KNOWN}
# Counts that do not change over a run.
_CONSTANTS = frozenset({"step", "eval_bytes", "eval_tokens", "eval_numeral_positions"})
_OF_TEACHER = re.compile(r"teacher\d+")


def panels_of(runs: Sequence[Records]) -> list[Panel]:
    """The panels of all metrics that some run has a finite value of, in reading order.

    A name with a slash is a metric of a part: `teacher1/kd` of a teacher, `kl/Latin letters` of a
    class.
    """
    names = dict.fromkeys(
        name
        for records in runs
        for record in records
        for name, value in record.items()
        if math.isfinite(value) and name not in _CONSTANTS
    )
    known = [panel for panel in _KNOWN if panel.name in names]
    others = [_unknown(name) for name in names if name not in _BY_NAME]
    return sorted([*known, *others], key=lambda panel: _GROUPS.index(panel.group))


def _unknown(name: str) -> Panel:
    metric, slash, part = name.partition("/")
    plain = name.replace("_", " ")
    if not slash:
        return Panel(name, plain, _OTHERS, smooth=not name.startswith("eval_"))
    if _OF_TEACHER.fullmatch(metric):
        inner = _BY_NAME.get(part)
        title = f"teacher {metric.removeprefix('teacher')}: {inner.title if inner else part}"
        return Panel(name, title, _OTHERS, share=inner is not None and inner.share)
    inner = _BY_NAME.get(metric)
    title = f"{part}: {inner.title if inner else metric.replace('_', ' ')}"
    return Panel(
        name, title, _CLASSES, smooth=not name.startswith("eval_"),
        share=inner is not None and inner.share,
    )  # fmt: skip


def moving_mean(values: Sequence[float], width: int) -> list[float]:
    """Each value with the `width` - 1 before it, as a mean."""
    means = []
    for end in range(1, len(values) + 1):
        window = values[max(0, end - width) : end]
        means.append(sum(window) / len(window))
    return means
