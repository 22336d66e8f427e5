"""Which two tokenizers a teacher of a trainer and its student have."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import cast

from xtoken.errors import OptionError, PairError, XTokenError
from xtoken.pair import Pair
from xtoken.teachers import LiveTeacher, TopKStore
from xtoken.teachers.store import is_store
from xtoken.teachers.store_notes import TOKENIZER_FOLDER
from xtoken.vocab import TokenizerSource
from xtoken.vocab.display import quoted
from xtoken.vocab.load import is_hub_name
from xtoken.vocab.side import Side


def pair_of(
    source: object, tokenizer: Pair | TokenizerSource | None, student: Pair | TokenizerSource
) -> Pair:
    """The pair of a teacher.

    Args:
        source: where its predictions come from.
        tokenizer: the one that was named for it, or its pair; None for the trainer's own pair, or
            for what lies beside the source's weights.
        student: the student's tokenizer, or the trainer's pair.

    Raises:
        PairError: a pair of another student, or of another teacher than the source.
        OptionError: the source does not say where its tokenizer is.
    """
    known = student if isinstance(student, Pair) else None
    own = student.student if isinstance(student, Pair) else student
    if isinstance(tokenizer, Pair):
        pair, mine = tokenizer, known or Pair(own, tokenizer.teacher)
        if mine.student_vocab.fingerprint != pair.student_vocab.fingerprint:
            raise PairError(
                f"the teacher's pair has student {pair.student_vocab.fingerprint[:12]}, the "
                f"trainer's tokenizer is {mine.student_vocab.fingerprint[:12]}; pass the pair of "
                "this student"
            )
        return pair
    if tokenizer is None and known is not None:
        _check_own_tokenizer(source, known)
        return known
    if tokenizer is None:
        tokenizer = _tokenizer_place(source)
    return Pair(own, tokenizer)


def _check_own_tokenizer(source: object, pair: Pair) -> None:
    """Refuse a model whose own tokenizer spells a token otherwise than the pair's teacher does:
    heads may well be of one size.

    Raises:
        PairError: it is another tokenizer; further and special tokens may differ.
    """
    given = pair.teacher.source
    model = source.model if isinstance(source, LiveTeacher) else source
    place = model if isinstance(model, str | PathLike) else getattr(model, "name_or_path", "")
    same = given if isinstance(given, str | PathLike) else getattr(given, "name_or_path", "")
    if not str(place) or str(place) == str(same) or is_store(place):
        return
    if not is_hub_name(place) and not Path(place).is_dir():
        return
    try:
        own = Side("teacher", place).vocab
    except XTokenError:
        return  # weights alone
    wanted = pair.teacher_vocab
    shared = 0 if own.fingerprint == wanted.fingerprint else min(len(own), len(wanted))
    for token in range(shared):
        spelled = own.token_bytes(token), wanted.token_bytes(token)
        if all(spelled) and spelled[0] != spelled[1]:
            raise PairError(
                f"token {token} of the teacher {place} is {quoted(own, token)}, of the pair's "
                f"teacher {quoted(wanted, token)}: it is another tokenizer; pass "
                "Teacher(source, tokenizer=...), or the pair of this teacher"
            )


def _tokenizer_place(source: object) -> TokenizerSource:
    folder = source.directory if isinstance(source, TopKStore) else source
    if isinstance(source, TopKStore) or is_store(folder):
        place = Path(cast("str", folder)) / TOKENIZER_FOLDER
        if place.is_dir():
            return place
        raise OptionError(
            f"the teacher store {folder} has no tokenizer in {place.name}; pass "
            "Teacher(store, tokenizer=...), no weights are needed"
        )
    if isinstance(source, str | PathLike):
        return source
    model = source.model if isinstance(source, LiveTeacher) else source
    name = getattr(model, "name_or_path", "")
    if name and (is_hub_name(name) or Path(name).is_dir()):
        return name
    raise OptionError(
        f"the teacher {type(source).__name__} does not say where its tokenizer is; pass "
        "Teacher(source, tokenizer=...), or a Pair as processing_class"
    )
