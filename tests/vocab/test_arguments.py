"""What is no token id, no bytes and no role is refused by name on every method of `Vocab`."""

import numpy as np
import pytest

from xtoken import Vocab
from xtoken.errors import ArgumentTypeError, OptionError, TokenIdError

VOCAB = Vocab.from_tokens([b"a", b"b", b"ab", b""], {3: "<eos>"}, roles={"eos": 3})

TAKE_AN_ID = {
    "token_bytes": VOCAB.token_bytes,
    "is_special": VOCAB.is_special,
    "is_unused": VOCAB.is_unused,
    "is_byte_fallback": VOCAB.is_byte_fallback,
    "with_stops": lambda token: VOCAB.with_stops([token]),
    "decode_bytes": lambda token: VOCAB.decode_bytes([token]),
    "with_roles": lambda token: VOCAB.with_roles({"eos": token}),
    "from_tokens": lambda token: Vocab.from_tokens([b"a"], roles={"eos": token}),
}


@pytest.mark.parametrize("method", TAKE_AN_ID)
@pytest.mark.parametrize("wrong", ["x", 1.5, True, b"a", [1]], ids=repr)
def test_what_is_no_token_id_is_refused_by_name(method: str, wrong: object) -> None:
    with pytest.raises(ArgumentTypeError, match="expected a token id, which is an integer"):
        TAKE_AN_ID[method](wrong)


@pytest.mark.parametrize("method", TAKE_AN_ID)
@pytest.mark.parametrize("wrong", [-1, 4, 2**40, 2**63, -(2**70)], ids=repr)
def test_ids_outside_the_vocabulary_are_refused_however_large(method: str, wrong: int) -> None:
    with pytest.raises(TokenIdError, match=rf"token id {wrong} is outside"):
        TAKE_AN_ID[method](wrong)


@pytest.mark.parametrize("method", TAKE_AN_ID)
def test_integers_of_numpy_are_token_ids(method: str) -> None:
    TAKE_AN_ID[method](np.int64(0))


@pytest.mark.parametrize("wrong", ["ab", b"ab", 5, None], ids=repr)
def test_what_is_no_sequence_of_ids_is_refused(wrong: object) -> None:
    for method in (VOCAB.with_stops, VOCAB.decode_bytes):
        with pytest.raises(ArgumentTypeError, match="expected a sequence of token ids"):
            method(wrong)


def test_roles_are_a_mapping_of_known_names() -> None:
    assert VOCAB.with_roles({"eos": None}).roles == {}
    for wrong in ([1], None, "eos"):
        with pytest.raises(ArgumentTypeError, match="expected a mapping of roles to token ids"):
            VOCAB.with_roles(wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="5 is a int, expected the name of a role"):
        VOCAB.with_roles({5: 1})  # type: ignore[dict-item]
    with pytest.raises(OptionError, match='roles = "end" is out of range; expected keys among'):
        VOCAB.with_roles({"end": 1})


@pytest.mark.parametrize(
    "call",
    [
        VOCAB.segment,
        VOCAB.id_of,
        Vocab.from_tokenizer_json,
        Vocab.from_tekken,
        lambda file: Vocab.from_tiktoken(file, {}),
    ],
    ids=["segment", "id_of", "from_tokenizer_json", "from_tekken", "from_tiktoken"],
)
@pytest.mark.parametrize("wrong", ["a", 5, None, [97]], ids=repr)
def test_what_is_no_bytes_is_refused_with_the_call_that_makes_them(call, wrong: object) -> None:
    with pytest.raises(ArgumentTypeError, match=r"expected bytes; pass a text as text\.encode\(\)"):
        call(wrong)


def test_explicit_tokens_are_bytes_and_special_tokens_are_mappings() -> None:
    with pytest.raises(ArgumentTypeError, match="expected a sequence of bytes, those of each id"):
        Vocab.from_tokens(["a"])  # type: ignore[list-item]
    with pytest.raises(ArgumentTypeError, match="expected a dict of special token ids to their"):
        Vocab.from_tokens([b""], {"<eos>": 0})  # type: ignore[dict-item]
    with pytest.raises(ArgumentTypeError, match="expected a dict of texts to token ids"):
        Vocab.from_tiktoken(b"", {"<eos>": -1})


@pytest.mark.parametrize("wrong", ["\ud800", 5, b"a"], ids=ascii)
def test_a_pattern_is_unicode_text_and_flags_are_true_or_false(wrong: object) -> None:
    with pytest.raises(ArgumentTypeError, match="expected a str of Unicode text"):
        Vocab.from_tokens([b"a"], ranked=True, pattern=wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="expected a str of Unicode text"):
        Vocab.from_tiktoken(b"YQ== 0\n", {}, pattern=wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="expected True or False"):
        Vocab.from_tokens([b"a"], ranked=wrong)  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="expected True or False"):
        Vocab.from_tokenizer_json(b"{}", from_memory=wrong)  # type: ignore[arg-type]
