"""The loss mask of a conversation the slow way: by the bytes of each token, walked one by one."""

from __future__ import annotations

from xtoken import Vocab


def walked_mask(ids: list[int], vocab: Vocab, pieces: list[tuple[str, bool]]) -> list[bool]:
    """Which tokens lie in pieces that the assistant says, whole.

    Args:
        ids: of the printed text.
        vocab: of a tokenizer that changes no text.
        pieces: the printed text, cut where the assistant begins and ends to speak.
    """
    said: list[bool] = []
    for text, is_said in pieces:
        said += [is_said] * len(text.encode())
    at = 0
    mask = []
    for token in ids:
        surface = vocab.special_tokens.get(token)
        length = len(vocab.token_bytes(token) if surface is None else surface.encode())
        mask.append(all(said[at : at + length]))
        at += length
    assert at == len(said), "the tokens do not spell the pieces"
    return mask
