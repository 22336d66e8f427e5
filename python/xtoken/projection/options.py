"""What a projection is built with, in a form that can be saved and compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Literal, get_args

from xtoken._core import Vocab
from xtoken.errors import FormatError, OptionError, TokenIdError

Reverse = Literal["off", "unmatched", "all"]
SpecialRoles = Mapping[str, tuple[int | str, int | str] | None]


@dataclass(frozen=True)
class ProjectionOptions:
    """The options of `Projection.build`, special tokens resolved to ids.

    `origin` says whether the weights are still those that were built.
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
            fields = json.loads(text)
            fields["canonical"] = tuple(fields["canonical"])
            fields["ignored_roles"] = tuple(fields["ignored_roles"])
            fields["special_pairs"] = tuple((s, t) for s, t in fields["special_pairs"])
            return cls(**fields)
        except (ValueError, TypeError, KeyError) as error:
            raise FormatError(f"the options {text!r} cannot be read: {error}") from error


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
    if reverse not in get_args(Reverse):
        raise OptionError(
            f"reverse = {reverse!r} is out of range; expected False, True, 'off', 'unmatched' or "
            "'all'"
        )
    pairs, ignored = [], []
    for role, pair in (special_roles or {}).items():
        if pair is None:
            ignored.append(role)
        else:
            student_token, teacher_token = pair
            pairs.append(
                (
                    special_id(student, student_token, f"special_roles[{role!r}][0]"),
                    special_id(teacher, teacher_token, f"special_roles[{role!r}][1]"),
                )
            )
    return ProjectionOptions(
        top_k=top_k,
        decay=float(decay),
        max_pieces=max_pieces,
        canonical=tuple(sorted({canonical} if isinstance(canonical, str) else set(canonical))),
        reverse=reverse,
        special_pairs=tuple(pairs),
        ignored_roles=tuple(sorted(ignored)),
        name_similarity=float(name_similarity),
    )


def special_id(vocab: Vocab, token: int | str, argument: str) -> int:
    """The id of a token given by id, by the text of a special token or by its own text.

    Raises:
        TokenIdError: the vocabulary has no such token; the message names `argument`.
    """
    if isinstance(token, str):
        by_text = (i for i, text in vocab.special_tokens.items() if text == token)
        token_id = next(by_text, vocab.id_of(token.encode()))
        if token_id is None:
            known = ", ".join(list(vocab.special_tokens.values())[:8])
            raise TokenIdError(
                f"{argument} = {token!r} is no token of the vocabulary; its special tokens begin "
                f"with {known}"
            )
        return token_id
    if not 0 <= token < len(vocab):
        raise TokenIdError(
            f"{argument} = {token} is outside the vocabulary (V = {len(vocab)}); pass an id below "
            "that or the token's text"
        )
    return int(token)
