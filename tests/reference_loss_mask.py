"""The loss mask of a conversation the slow way: by the bytes of each token, walked one by one."""

from __future__ import annotations

from xtoken import Vocab


def walked_mask(ids: list[int], vocab: Vocab, pieces: list[tuple[str, bool]]) -> list[bool]:
    """Which tokens lie in pieces that the assistant says, whole but for white space before them.

    Args:
        ids: of the printed text.
        vocab: of a tokenizer that changes no text.
        pieces: the printed text, cut where the assistant begins and ends to speak.
    """
    said: list[bool] = []
    for text, is_said in pieces:
        said += [is_said] * len(text.encode())
    spelled = "".join(text for text, _ in pieces).encode()
    at = 0
    mask = []
    for token in ids:
        surface = vocab.special_tokens.get(token)
        length = len(vocab.token_bytes(token) if surface is None else surface.encode())
        first = at
        while first < at + length and not said[first] and spelled[first : first + 1].isspace():
            first += 1
        mask.append(all(said[first : at + length]) and (first < at + length or length == 0))
        at += length
    assert at == len(said), "the tokens do not spell the pieces"
    return mask
