"""The tokens that stop a model: those that end its turns, and its end of text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from xtoken._core import Vocab
from xtoken._files import path_to_read
from xtoken.data.chat_template import ChatTemplate
from xtoken.errors import DataError, FormatError
from xtoken.vocab.read import PLACES
from xtoken.vocab.side import Side
from xtoken.vocab.source import LoadedTokenizer


@dataclass(frozen=True)
class StopTokens:
    """The tokens that stop one side.

    Args:
        end_of_turn: what the chat template prints after an answer, that of a conversation's last
            message first; empty without a template, or where it ends a turn by plain text. An
            added token counts whether it is declared special or not.
        eos: the end of a text: the tokenizer's own, then what else the generation config lists.
    """

    end_of_turn: tuple[int, ...]
    eos: tuple[int, ...]

    @property
    def all(self) -> frozenset[int]:
        """All of them."""
        return frozenset(self.end_of_turn) | frozenset(self.eos)


def stop_tokens(
    tokenizer: LoadedTokenizer,
    vocab: Vocab | None = None,
    generation_config: object = None,
    *,
    template: ChatTemplate | None = None,
) -> StopTokens:
    """Find what stops a model: read off its chat template's own output, not from known names.

    Args:
        tokenizer: a `transformers` tokenizer.
        vocab: of the tokenizer, for an EOS that the tokenizer does not declare.
        generation_config: a `GenerationConfig`, or the content of a `generation_config.json`, whose
            `eos_token_id` is an id, a list of ids, or absent.
        template: of the tokenizer; made here if absent.

    Raises:
        FormatError: `eos_token_id` of the generation config holds something else.
    """
    if template is None:
        try:
            template = ChatTemplate(tokenizer)
        except DataError:
            template = None
    end_of_turn: tuple[int, ...] = ()
    if template is not None:
        end_of_turn = template.turn_end().markers
    listed = [
        getattr(tokenizer, "eos_token_id", None),
        None if vocab is None else vocab.roles.get("eos"),
    ]
    listed += _listed(generation_config)
    eos = tuple(dict.fromkeys(int(token) for token in listed if token is not None))
    return StopTokens(end_of_turn, eos)


def stop_pairs(student: StopTokens, teacher: StopTokens) -> list[tuple[int, int]]:
    """Pair the stops of two sides: ends of turn with ends of turn, ends of text with ends of text.

    All that may meet, the likeliest first: an end of turn of one side that the other side ends by
    its end of text is among them.
    """
    pairs = [(s, t) for s in student.end_of_turn for t in teacher.end_of_turn]
    pairs += [(s, t) for s in student.eos for t in teacher.eos]
    if not student.end_of_turn or not teacher.end_of_turn:
        left = student.end_of_turn or student.eos
        pairs += [(s, t) for s in left for t in teacher.end_of_turn or teacher.eos]
    return list(dict.fromkeys(pairs))


def _listed(config: object) -> list[int]:
    """Return the ids that a generation config stops at."""
    if isinstance(config, Mapping):
        found = config.get("eos_token_id")
    else:
        found = getattr(config, "eos_token_id", None)
    listed = found if isinstance(found, list | tuple) else [] if found is None else [found]
    for token in listed:
        if not isinstance(token, int) or isinstance(token, bool):
            raise FormatError(
                f"the generation config has eos_token_id = {found!r}, expected a token id or a "
                "list of them; mend generation_config.json"
            )
    return list(listed)


def vocab_with_stops(side: Side) -> Vocab:
    """The vocabulary of a side, with all that stops it: what its chat template prints after an
    answer, its end of text, and what its generation config lists.

    A directory with a chat template is read by transformers, which prints it; without transformers
    the roles of the special tokens alone are known.
    """
    if isinstance(side.source, Vocab):
        return side.source
    if side.vocab_with_stops is None:
        side.vocab_with_stops = _with_stops(side)
    return side.vocab_with_stops


def _with_stops(side: Side) -> Vocab:
    if side.is_path:
        path_to_read(f"the {side.name}", side.source, PLACES)
    stops: StopTokens | None = None
    if side.has_template:
        stops = stop_tokens(side.tokenizer, side.vocab, side.generation_config)
    vocab = side.vocab
    end_of_turn = () if stops is None else stops.end_of_turn
    eos = _listed(side.generation_config) if stops is None else list(stops.eos)
    ids = [token for token in (*end_of_turn, *eos) if token < len(vocab)]
    if end_of_turn and end_of_turn[0] < len(vocab):
        vocab = vocab.with_roles({"eot": end_of_turn[0]})
    return vocab.with_stops(ids) if ids else vocab
