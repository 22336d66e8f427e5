"""What two vocabularies have in common, where it matters, and which loss that speaks for."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Final, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from xtoken._checks import expect
from xtoken._core import Vocab
from xtoken.audit.placement import MassPlacement
from xtoken.audit.prefix_coverage import ClassSupervision
from xtoken.errors import OptionError
from xtoken.projection import EMPTY_RULES, RULE_CODES, Projection
from xtoken.trie import PieceTrie
from xtoken.vocab.classes import NUMERALS, PUNCTUATION, classes, order
from xtoken.vocab.display import surface

# Tokens whose loss the paper's Table of failures is about: where they fall out of the common set,
# H-KL and GOLD match them by rank to unrelated tokens and push them down through the softmax.
CRITICAL = (*NUMERALS, PUNCTUATION)
# What `distill` and `Pair.distiller` use unless told otherwise.
DEFAULT_LOSS: Final = "prefix-kl"
RecommendedLoss: TypeAlias = Literal["prefix-kl", "p-kl"]
# Below this share of a critical class in the common set, the class counts as outside.
CRITICAL_SHARE = 0.9


@dataclass(frozen=True)
class ClassCoverage:
    """One class of tokens; ids that a tokenizer never emits are not counted.

    Attributes:
        name: see `xtoken.vocab.classes`.
        critical: whether the recommendation looks at it.
        total: student tokens of the class.
        strict, relaxed: those in the common set, by equal bytes and by W at `threshold`.
        spread: those that W spreads over several teacher tokens or gives to an unequal one.
        empty: those without any correspondence.
        prefixed: those that prefix KL compares beyond their first piece, spelled as the teacher
            spells them alone.
        prefixes: at how many prefixes, all of them together.
        teacher_total, teacher_strict: the teacher's tokens, and those in the strict common set.
    """

    name: str
    critical: bool
    total: int
    strict: int
    relaxed: int
    spread: int
    empty: int
    prefixed: int
    prefixes: int
    teacher_total: int
    teacher_strict: int

    @property
    def share(self) -> float:
        """The part of the student's tokens in the relaxed common set; 1 where there are none."""
        return self.relaxed / self.total if self.total else 1.0


@dataclass(frozen=True)
class Audit:
    """See `audit`.

    Attributes:
        student_size, teacher_size: ids.
        student_family, teacher_family: how the tokens are spelled; see `Vocab.family`.
        student_fingerprint, teacher_fingerprint: of the vocabularies.
        shared_strings: tokens that both print alike, as strict string matching counts them.
        shared_bytes: byte strings that are tokens on both sides.
        student_tokens, teacher_tokens: distinct byte strings on each side.
        common_strict, common_relaxed: sizes of the common sets.
        threshold: of the relaxed common set.
        classes: coverage by class, in reading order.
        stats: `Projection.stats()`.
        notes: what else a user should know before training.
        supervision: where prefix KL compares in a sample of text; empty where none was given.
        placement, placement_by_class: where the teacher's mass goes there under exact targets, by
            shape of chunk and by class; empty without predictions of the text.
    """

    student_size: int
    teacher_size: int
    student_family: str
    teacher_family: str
    student_fingerprint: str
    teacher_fingerprint: str
    shared_strings: int
    shared_bytes: int
    student_tokens: int
    teacher_tokens: int
    common_strict: int
    common_relaxed: int
    threshold: float
    classes: tuple[ClassCoverage, ...]
    stats: dict[str, int]
    notes: tuple[str, ...]
    supervision: tuple[ClassSupervision, ...] = ()
    placement: tuple[MassPlacement, ...] = ()
    placement_by_class: tuple[MassPlacement, ...] = ()

    @property
    def recommendation(self) -> RecommendedLoss:
        """The loss that the coverage speaks for; see `recommended_loss`."""
        return recommended_loss(self)

    @property
    def reason(self) -> str:
        """Why, in a sentence or two with the numbers."""
        return _reason(self)

    def to_dict(self) -> dict[str, object]:
        """Plain values, as the command prints them with `--json`."""
        advice = {"recommendation": self.recommendation, "reason": self.reason}
        return asdict(self) | advice


def audit(projection: Projection, threshold: float = 0.6) -> Audit:
    """Count what a pair has in common, by class, and recommend a loss; see `recommended_loss`.

    Args:
        projection: built, or loaded with its tokenizers.
        threshold: of the relaxed common set, see `Projection.common_set`.

    Raises:
        ArgumentTypeError: no projection.
        OptionError: the projection was loaded without its tokenizers, or is a part of W; the
            threshold is out of range.
    """
    expect(projection, Projection, "projection", "pass xtoken.Projection.build(...) of the pair")
    student, teacher = projection.vocabularies()
    if projection.is_part:
        raise OptionError(
            f"this is W between the first {projection.shape[0]} student and "
            f"{projection.shape[1]} teacher tokens alone; audit W itself, before limited"
        )
    strict = projection.common_set("strict")
    relaxed = projection.common_set("relaxed", threshold)
    coverage = _coverage(projection, student, teacher, strict, relaxed)
    student_texts, teacher_texts = _byte_strings(student), _byte_strings(teacher)
    return Audit(
        student_size=len(student),
        teacher_size=len(teacher),
        student_family=student.family,
        teacher_family=teacher.family,
        student_fingerprint=student.fingerprint,
        teacher_fingerprint=teacher.fingerprint,
        shared_strings=len(_surfaces(student) & _surfaces(teacher)),
        shared_bytes=len(student_texts & teacher_texts),
        student_tokens=len(student_texts),
        teacher_tokens=len(teacher_texts),
        common_strict=len(strict),
        common_relaxed=len(relaxed),
        threshold=threshold,
        classes=coverage,
        stats=projection.stats(),
        notes=_notes(projection, coverage, student, teacher),
    )


def _coverage(
    projection: Projection,
    student: Vocab,
    teacher: Vocab,
    strict: NDArray[np.int64],
    relaxed: NDArray[np.int64],
) -> tuple[ClassCoverage, ...]:
    in_strict = np.isin(np.arange(len(student)), strict[:, 0])
    in_relaxed = np.isin(np.arange(len(student)), relaxed[:, 0])
    teacher_in = np.isin(np.arange(len(teacher)), strict[:, 1])
    empty = np.isin(projection.rules, [RULE_CODES[rule] for rule in EMPTY_RULES])
    same = np.isin(projection.rules, [RULE_CODES[rule] for rule in ("exact", "duplicate", "role")])
    prefixes = PieceTrie.from_projection(projection).prefix_counts()
    counts: dict[str, Counter[str]] = {}
    for token_id, name in classes(student):
        count = counts.setdefault(name, Counter())
        count["total"] += 1
        count["strict"] += bool(in_strict[token_id])
        count["relaxed"] += bool(in_relaxed[token_id])
        count["empty"] += bool(empty[token_id])
        count["spread"] += not (empty[token_id] or same[token_id])
        count["prefixed"] += bool(prefixes[token_id])
        count["prefixes"] += int(prefixes[token_id])
    for token_id, name in classes(teacher):
        count = counts.setdefault(name, Counter())
        count["teacher_total"] += 1
        count["teacher_strict"] += bool(teacher_in[token_id])
    fields = (
        *("total", "strict", "relaxed", "spread", "empty", "prefixed", "prefixes"),
        *("teacher_total", "teacher_strict"),
    )
    return tuple(
        ClassCoverage(name, name in CRITICAL, **{field: counts[name][field] for field in fields})
        for name in order(set(counts))
    )


_NAMES: dict[RecommendedLoss, str] = {"prefix-kl": "prefix KL", "p-kl": "P-KL"}


def recommended_loss(audit: Audit) -> RecommendedLoss:
    """The loss that suits a pair.

    The default, prefix KL; P-KL in its place where no token can be compared beyond its first piece,
    as under a W without pieces. Where all tokens that matter (numerals, punctuation) are in the
    common set the paper advises H-KL, which the reason then says: no run of ours has compared the
    two on such a pair. Elsewhere H-KL and GOLD would match tokens by rank to unrelated ones.
    """
    return DEFAULT_LOSS if any(item.prefixes for item in audit.classes) else "p-kl"


def _critical(audit: Audit) -> list[ClassCoverage]:
    return [item for item in audit.classes if item.critical and item.total]


def _outside(audit: Audit) -> list[ClassCoverage]:
    return [item for item in _critical(audit) if item.share < CRITICAL_SHARE]


def _reason(audit: Audit) -> str:
    outside = _outside(audit)
    if not outside:
        return (
            f"{_list(_critical(audit))} of the student are in the common set, so a KL on matched "
            "tokens reaches all that matters: the paper advises H-KL there (--loss h-kl), and no "
            f"run of ours has compared it with {_NAMES[recommended_loss(audit)]}, which reaches "
            "them too."
        )
    common = (
        f"{_list(outside)} of the student are in the common set. H-KL and GOLD would match the "
        "others by rank to unrelated tokens and push them down through the softmax; P-KL projects "
        "them on the teacher's tokens for the same text"
    )
    if recommended_loss(audit) == "p-kl":
        return f"{common}. Prefix KL would add nothing: W has no pieces to compare."
    return (
        f"{common}, and prefix KL, which starts from P-KL, also tells apart those that share a "
        "first piece."
    )


def _list(items: list[ClassCoverage]) -> str:
    parts = [f"{item.relaxed:,} of {item.total:,} {item.name}" for item in items]
    return " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts) or "none"


def _notes(
    projection: Projection, coverage: tuple[ClassCoverage, ...], student: Vocab, teacher: Vocab
) -> tuple[str, ...]:
    notes = []
    for item in coverage:
        if item.name in NUMERALS[1:] and item.teacher_total and not item.total:
            notes.append(
                f"The teacher has {item.teacher_total:,} {item.name} as tokens, the student none: "
                "no row of W reaches them, so what the teacher knows of them comes through the "
                "common tokens alone."
            )
    for side, vocab in (("student", student), ("teacher", teacher)):
        if vocab.is_lossy:
            notes.append(
                f"The {side}'s tokens do not determine the text (WordPiece drops case, accents and "
                "white space), so correspondences are best effort."
            )
    stats = projection.stats()
    if stats["unspellable"]:
        notes.append(
            f"{stats['unspellable']:,} student tokens cannot be spelled by the teacher; their rows "
            "are empty and their probability is left out."
        )
    if stats["unpaired"]:
        one = stats["unpaired"] == 1
        notes.append(
            f"{stats['unpaired']:,} special token{'' if one else 's'} of the student "
            f"{'has' if one else 'have'} no partner; declare with special_roles what of them "
            "training text holds."
        )
    return tuple(notes)


def _byte_strings(vocab: Vocab) -> set[bytes]:
    return {token for i in range(len(vocab)) if (token := vocab.token_bytes(i))}


def _surfaces(vocab: Vocab) -> set[str]:
    """Tokens as their tokenizer prints them, which is what matching by strings compares."""
    return {text for i in range(len(vocab)) if (text := surface(vocab, i))}
