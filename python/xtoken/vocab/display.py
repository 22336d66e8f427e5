"""Tokens as people see them: quoted, as one visible line, or as their tokenizer prints them."""

from __future__ import annotations

from xtoken._core import Vocab

_VISIBLE = {"\n": "⏎", "\t": "⇥", "\r": "␍", " ": "·"}


def _byte_alphabet() -> dict[int, str]:
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


# GPT-2's character for each byte: printable Latin-1 itself, the others from U+0100 on.
BYTE_ALPHABET = _byte_alphabet()


def special_id(vocab: Vocab, text: str) -> int | None:
    """The id of a special token by its text, the lowest of several; None if there is none."""
    return min((i for i, special in vocab.special_tokens.items() if special == text), default=None)


def special_name(vocab: Vocab, token_id: int) -> str:
    """The name of a token without bytes: its text, printable, or `<unused N>`."""
    return printable(vocab.special_tokens.get(token_id, f"<unused {token_id}>"))


def quoted(vocab: Vocab, token_id: int) -> str:
    """A token as in Python source: quoted text, `b'..'` where it is not valid UTF-8.

    A special token is shown by its text, without quotes.
    """
    token = vocab.token_bytes(token_id)
    if not token:
        return special_name(vocab, token_id)
    return repr(token.decode()) if is_utf8(token) else repr(token)


def visible(data: bytes) -> str:
    """Bytes as one printable line: white space by sign, and `\\xNN` for what is no character."""
    return "".join(map(_visible_character, data.decode("utf-8", "backslashreplace")))


def printable(text: str) -> str:
    """Text with its control characters, line breaks and marks of direction as `visible` has them:
    a terminal would obey them."""
    return "".join(c if c.isprintable() else _visible_character(c) for c in text)


def visible_token(vocab: Vocab, token_id: int) -> str:
    """A token as part of a line: its bytes by `visible`, or its name where it has none."""
    data = vocab.token_bytes(token_id)
    return visible(data) if data else special_name(vocab, token_id)


def surface(vocab: Vocab, token_id: int) -> str:
    """A token as its tokenizer spells it, which is what matching by strings compares.

    `Ġthe` in a byte-level vocabulary, `▁the` in SentencePiece's, `##ing` in WordPiece's; empty for
    an unused id.
    """
    token = vocab.token_bytes(token_id)
    if not token:
        return vocab.special_tokens.get(token_id, "")
    if vocab.family == "sentencepiece":
        if vocab.is_byte_fallback(token_id):
            return f"<0x{token[0]:02X}>"
        return token.decode(errors="replace").replace(" ", "▁")
    if vocab.is_lossy:
        text = token.decode(errors="replace")
        return text[1:] if text[0] == " " else f"##{text}"
    return "".join(BYTE_ALPHABET[byte] for byte in token)


def is_utf8(data: bytes) -> bool:
    """Whether bytes are valid UTF-8 by themselves."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return False
    return True


def _visible_character(character: str) -> str:
    if character in _VISIBLE:
        return _VISIBLE[character]
    if character.isprintable():
        return character
    return "".join(f"\\x{byte:02x}" for byte in character.encode("utf-8", "surrogatepass"))
