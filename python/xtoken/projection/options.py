"""What a projection is built with, in a form that can be saved and compared."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Set
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from xtoken._checks import as_whole, check_number
from xtoken._core import Vocab
from xtoken.errors import ArgumentTypeError, FormatError, OptionError, TokenIdError
from xtoken.vocab.display import printable
from xtoken.vocab.display import special_id as find_special

Reverse = Literal["off", "unmatched", "all"]
SpecialRoles = Mapping[str, tuple[int | str, int | str] | None]


@dataclass(frozen=True)
class ProjectionOptions:
    """The options of `Projection.build`, special tokens resolved to ids.

    Attributes:
        top_k: the most entries that a row keeps.
        decay: weight of a piece over that of the one before.
        max_pieces: of more pieces, the first this many stay.
        canonical: differences between bytes that do not count.
        reverse: which rows teacher tokens that split give weight back to.
        special_pairs: (student id, teacher id) of special tokens that were paired by the caller.
        ignored_roles: roles that pair no tokens.
        name_similarity: overlap of names from which special tokens without a role are paired.
        origin: whether the weights are those that were built, or were learned or imported.
    """

    top_k: int = 4
    decay: float = 0.1
    max_pieces: int = 4
    canonical: tuple[str, ...] = ()
    reverse: Reverse = "off"
    special_pairs: tuple[tuple[int, int], ...] = ()
    ignored_roles: tuple[str, ...] = ()
    name_similarity: float = 0.6
    origin: Literal["built", "learned", "imported"] = "built"

    def to_json(self) -> str:
        """One line; equal options give equal text."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> ProjectionOptions:
        """Read `to_json` back.

        Raises:
            FormatError: it is not what `to_json` writes.
        """
        try:
            fields = dict(json.loads(text))
            fields["canonical"] = tuple(fields["canonical"])
            fields["ignored_roles"] = tuple(fields["ignored_roles"])
            fields["special_pairs"] = tuple((s, t) for s, t in fields["special_pairs"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise FormatError(f"the options {text[:80]!r} cannot be read: {error}") from error


def options_for(
    student: Vocab,
    teacher: Vocab,
    *,
    top_k: int,
    decay: float,
    max_pieces: int,
    canonical: Iterable[str],
    reverse: bool | Reverse,
    special_roles: SpecialRoles | None,
    name_similarity: float,
) -> ProjectionOptions:
    """The options of a call, special tokens looked up in the pair; see `Projection.build`."""
    if isinstance(reverse, bool):
        reverse = "unmatched" if reverse else "off"
    if not isinstance(reverse, str) or reverse not in get_args(Reverse):
        raise OptionError(
            f"reverse = {reverse!r} is out of range; expected False, True, 'off', 'unmatched' or "
            "'all'"
        )
    check_count("top_k", top_k)
    check_count("max_pieces", max_pieces)
    try:
        names = {canonical} if isinstance(canonical, str) else set(canonical)
    # A tensor of one number says that it can be iterated over, and cannot.
    except TypeError as error:
        raise ArgumentTypeError(f"canonical = {canonical!r}; pass names of differences") from error
    if not all(map(_is_text, names)):
        raise ArgumentTypeError(f"canonical = {canonical!r}; pass names of differences")
    for name, value in (("decay", decay), ("name_similarity", name_similarity)):
        if not isinstance(value, int | float) or isinstance(value, bool):
            raise ArgumentTypeError(
                f"{name} = {value!r} is a {type(value).__name__}; pass a number"
            )
        known = "0 <= decay <= 1" if name == "decay" else "a finite number from 0 on"
        check_number(name, value, 0, rule=f"is out of range; expected {known}")
    if special_roles is not None and not isinstance(special_roles, Mapping):
        raise ArgumentTypeError(
            f"special_roles is a {type(special_roles).__name__}; pass a dictionary of pairs by role"
        )
    pairs, ignored = [], []
    for role, pair in (special_roles or {}).items():
        if not _is_text(role):
            raise ArgumentTypeError(f"special_roles names a role {role!r}; pass a name")
        if pair is None:
            ignored.append(role)
        else:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise ArgumentTypeError(
                    f"special_roles[{role!r}] = {pair!r}; pass (student token, teacher token)"
                )
            student_token, teacher_token = pair
            pairs.append(
                (
                    special_id(student, student_token, f"special_roles[{role!r}][0]"),
                    special_id(teacher, teacher_token, f"special_roles[{role!r}][1]"),
                )
            )
    return ProjectionOptions(
        top_k=int(top_k),
        decay=float(decay),
        max_pieces=int(max_pieces),
        canonical=tuple(sorted(names)),
        reverse=reverse,
        special_pairs=tuple(pairs),
        ignored_roles=tuple(sorted(ignored)),
        name_similarity=float(name_similarity),
    )


def plain_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `Projection.build` as JSON has them, to be read any number of times: iterators,
    NumPy's numbers and mappings made plain. What is no option's value stays, and is refused when it
    is read."""
    made = {name: _plain(value) for name, value in options.items()}
    names = made.get("canonical")
    if isinstance(names, Iterable) and not isinstance(names, str):
        with contextlib.suppress(TypeError):
            # A set has no order that another process would have.
            made["canonical"] = tuple(sorted(names) if isinstance(names, Set) else names)
    roles = made.get("special_roles")
    if isinstance(roles, Mapping):
        made["special_roles"] = {
            role: tuple(map(_plain, pair)) if isinstance(pair, tuple | list) else pair
            for role, pair in roles.items()
        }
    return made


def _plain(value: object) -> object:
    return int(value) if isinstance(value, np.integer) else value


def check_count(name: str, value: object) -> None:
    """Refuse a count that is not a whole number of at least 1.

    Raises:
        ArgumentTypeError: it is not a whole number.
        OptionError: it is below 1, or more than any row or machine has.
    """
    if not isinstance(value, int | np.integer) or isinstance(value, bool):
        raise ArgumentTypeError(
            f"{name} = {value!r} is a {type(value).__name__}; pass a whole number"
        )
    if not 1 <= value < 2**31:
        raise OptionError(f"{name} = {value} is out of range; expected at least 1, below 2^31")


def _is_text(value: object) -> bool:
    """Whether it is a string that UTF-8 holds."""
    return isinstance(value, str) and not any("\ud800" <= char <= "\udfff" for char in value)


def special_id(vocab: Vocab, token: int | str, argument: str) -> int:
    """The id of a token given by id, by the text of a special token or by its own text.

    Raises:
        TokenIdError: the vocabulary has no such token; the message names `argument`.
    """
    if isinstance(token, str):
        by_text = find_special(vocab, token)
        spelled = token.encode("utf-8", "surrogatepass")
        token_id = vocab.id_of(spelled) if by_text is None else by_text
        if token_id is None:
            known = ", ".join(map(printable, list(vocab.special_tokens.values())[:8]))
            raise TokenIdError(
                f"{argument} = {token!r} is not in the vocabulary; special tokens include {known}"
            )
        return token_id
    token = as_whole(argument, token, "or the token's text")
    if not 0 <= token < len(vocab):
        raise TokenIdError(
            f"{argument} = {token} is outside the vocabulary (V = {len(vocab)}); pass an id below "
            "that or the token's text"
        )
    return int(token)
