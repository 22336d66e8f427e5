"""What a chat template prints after an answer, read off what it prints around known contents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from xtoken.data.backend import TextBackend, Tokens
from xtoken.data.conversations import Message

_QUESTION, _ANSWER, _NEXT = "XTOKENQUESTION", "XTOKENANSWER", "XTOKENNEXT"
_ARGUMENT = "XTOKENARGUMENT"
_CALL: Message = {"type": "function", "function": {"name": "f", "arguments": {"x": _ARGUMENT}}}


@dataclass(frozen=True)
class TurnEnd:
    """What stands behind an answer.

    Args:
        footer: all that follows the content of a last message; None where a template hides it.
        text: the beginning of the footer that ends the turn: up to its last marker, or to its last
            character that is no white space where it holds no marker.
        later: where `text` holds no marker, what ends an answer once more follows, up to its last
            marker.
        markers: the added tokens that end a turn, those of a last message first, that of a call
            of tools last.
    """

    footer: str | None
    text: str
    later: str
    markers: tuple[int, ...]


class Printer(Protocol):
    """Prints messages by a chat template; raises what the template raises."""

    def __call__(self, messages: list[Message], *, prompted: bool = False) -> str: ...


@dataclass(frozen=True, eq=False)
class _Piece:
    """A part of a printed text between contents, and the markers in it."""

    text: str
    tokens: Tokens
    markers: frozenset[int]

    @property
    def ids(self) -> list[int]:
        return [int(token) for token in self.tokens.ids]

    @property
    def found(self) -> tuple[int, ...]:
        return tuple(token for token in self.ids if token in self.markers)

    def head(self, count: int) -> _Piece:
        """Return the piece up to the last marker among its first tokens."""
        ids = self.ids[:count]
        while ids and ids[-1] not in self.markers:
            ids.pop()
        end = int(self.tokens.places[len(ids) - 1, 1]) if ids else 0
        tokens = Tokens(self.tokens.ids[: len(ids)], self.tokens.places[: len(ids)])
        return _Piece(self.text[:end], tokens, self.markers)


def read_turn_end(
    printer: Printer, backend: TextBackend, eos: int | None, bos: int | None
) -> TurnEnd:
    """Print short conversations and compare what surrounds their answers.

    An answer is printed as the last message, before a generation prompt, and before another
    question. What all of these share ends a turn; what they do not share does where it is not the
    header of the message that follows: the generation prompt, or what stands before a first
    question.

    Args:
        printer: of the template.
        backend: of its tokenizer.
        eos, bos: ids; a BOS that is not EOS as well begins something and ends nothing.
    """
    none = TurnEnd(None, "", "", ())
    for opening in ([], [{"role": "system", "content": "XTOKENSYSTEM"}]):
        ask = [*opening, {"role": "user", "content": _QUESTION}]
        answered = [*ask, {"role": "assistant", "content": _ANSWER}]
        called: list[Message] = [*ask, {"role": "assistant", "content": "", "tool_calls": [_CALL]}]
        longer = [*answered, {"role": "user", "content": _NEXT}]

        last = _between(printer, answered, _ANSWER)
        if last is None:
            continue
        parts = (
            last,
            _between(printer, answered, _ANSWER, prompted=True),
            _between(printer, longer, _ANSWER, _NEXT),
            _between(printer, ask, None, _QUESTION),
            _between(printer, ask, _QUESTION),
            _between(printer, ask, _QUESTION, prompted=True),
            _between(printer, called, _ARGUMENT),
        )
        texts = [text or "" for text in parts]
        markers = backend.markers - ({bos} if bos != eos else set())
        end, before_prompt, before_next, header, question, prompt, call = (
            _Piece(text, tokens, frozenset(markers))
            for text, tokens in zip(texts, backend.encode(texts), strict=True)
        )
        generation = prompt.ids[_common(question.ids, prompt.ids) :]
        followed = (
            _without_prompt(before_prompt, generation),
            _without_header(before_next, header),
        )
        return _turn_end(end, followed, call)
    return none


def _turn_end(last: _Piece, followed: Sequence[_Piece], call: _Piece) -> TurnEnd:
    end = last.head(len(last.ids))
    agreeing = [piece for piece in followed if piece.found[:1] == last.found[:1]]
    for piece in agreeing:
        end = end.head(_common(end.ids, piece.ids))
    others = [piece for piece in followed if piece not in agreeing and piece.found]
    if end.found:
        text = end.text
        later = ""
    else:
        text = last.text.rstrip() or last.text
        later = others[0].text if others else ""
    found = [*end.found, *(token for piece in others for token in piece.found)]
    closed = call.head(len(call.ids))
    # Where more is printed after a last answer than its end, it is after a call too.
    if last.found == end.found and not call.text[len(closed.text) :].strip():
        found += closed.found[-1:]
    return TurnEnd(last.text, text, later, tuple(dict.fromkeys(found)))


def _without_prompt(piece: _Piece, generation: list[int]) -> _Piece:
    count = len(piece.ids) - len(generation)
    if count < 0 or piece.ids[count:] != generation:
        count = len(piece.ids)
    return piece.head(count)


def _without_header(piece: _Piece, header: _Piece) -> _Piece:
    """Return what stands before the header of a question that follows."""
    own = piece.head(len(piece.ids) - _common(piece.ids[::-1], header.ids[::-1]))
    if own.found:
        return own
    # A system prompt that the template brings ends as the answer does: cut where a message opens.
    opener = next((token for token in header.ids if token in header.markers), None)
    return piece.head(piece.ids.index(opener)) if opener in piece.ids else piece.head(0)


def _common(left: Sequence[int], right: Sequence[int]) -> int:
    """Return how many tokens two sequences share at their beginning."""
    pairs = enumerate(zip(left, right, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(left), len(right)))


def _between(
    printer: Printer,
    messages: list[Message],
    start: str | None,
    end: str | None = None,
    *,
    prompted: bool = False,
) -> str | None:
    """Print messages, and return what stands between two contents; None where one is missing."""
    try:
        text = printer(messages, prompted=prompted)
    # A template may refuse any of these.
    except Exception:
        return None
    if start is not None:
        _, found, text = text.rpartition(start)
        if not found:
            return None
    if end is not None:
        text, found, _ = text.partition(end)
        if not found:
            return None
    return text
