"""Reading tokenizers: paths, hub names, bounds on what a file may hold, tokens for people."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import pytest
import tokenizer_zoo as zoo
from tokenizers import Tokenizer, decoders, models

from xtoken import Projection, Vocab
from xtoken.errors import ArgumentTypeError, FormatError, MissingFileError, ModelSourceError
from xtoken.vocab import Side, read_tokenizer
from xtoken.vocab import read as reading
from xtoken.vocab.display import BYTE_ALPHABET, quoted, special_id, surface, visible, visible_token
from xtoken.vocab.load import is_hub_name
from xtoken.vocab.side import labels


def test_a_packed_file_is_read_up_to_a_bound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokenizer.json.xz"
    content = zoo.byte_level_bpe(2000, 1).to_str().encode()
    path.write_bytes(lzma.compress(content[:1000]) + lzma.compress(content[1000:]))
    assert len(Vocab.from_path(path)) == 2000
    monkeypatch.setattr(reading, "MAX_FILE_BYTES", 2 << 20)
    # 8 MB of zeros in about a kilobyte.
    path.write_bytes(lzma.compress(bytes(8 << 20)))
    with pytest.raises(FormatError, match="unpacks to more than 2 MB, which no tokenizer has"):
        Vocab.from_path(path)
    path.write_bytes(lzma.compress(content)[:-20])
    with pytest.raises(FormatError, match="is not a whole xz file"):
        Vocab.from_path(path)
    (tmp_path / "big").write_bytes(bytes(3 << 20))
    with pytest.raises(FormatError, match="has more than 2 MB"):
        Vocab.from_path(tmp_path / "big")


@pytest.mark.parametrize("content", [b"[" * 10**5, b"\xff", b"{", b"9" * 5000])
def test_a_tokenizer_config_that_cannot_be_read_is_one_line(tmp_path: Path, content: bytes) -> None:
    zoo.byte_level_bpe(2000, 1).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"tokenizer configuration .*json is ") as refused:
        Vocab.from_path(tmp_path)
    assert "\n" not in str(refused.value)


def test_only_a_name_of_owner_and_model_is_sent_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    assert is_hub_name("owner/model")
    assert is_hub_name("Qwen/Qwen3-0.6B")
    for name in ("model", "./owner/model", "/owner/model", "../model", "a/b/c", "~/model",
                 "owner/tokenizer.json", "models/missing", "owner/", "models"):  # fmt: skip
        assert not is_hub_name(name), name
        if name != "models":
            with pytest.raises(MissingFileError, match=r"does not exist.*hub \(owner/model\)"):
                Side("student", name).tokenizer  # noqa: B018
            with pytest.raises(MissingFileError, match="does not exist"):
                read_tokenizer(name)


def test_a_hub_name_without_network_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xtoken.vocab.load._hub_is_reachable", lambda: False)
    for read in (
        lambda: read_tokenizer("nobody/nothing"),
        lambda: Vocab.from_tokenizer("nobody/nothing"),
        lambda: Projection.build("nobody/nothing", zoo.byte_level_bpe(2000, 1)),
        lambda: Side("student", "nobody/nothing").vocab,
    ):
        with pytest.raises(ModelSourceError, match="nobody/nothing") as refused:
            read()
        assert "\n" not in str(refused.value)


def test_a_hub_name_is_fetched_and_read_like_a_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    zoo.byte_level_bpe(2000, 1).save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda name, file, **_: str(tmp_path / file)
    )
    assert read_tokenizer("owner/model") == read_tokenizer(zoo.byte_level_bpe(2000, 1))


def test_what_is_no_tokenizer_is_a_type_error_of_ours() -> None:
    with pytest.raises(ArgumentTypeError, match="int is not a tokenizer that can be read"):
        read_tokenizer(3)  # type: ignore[arg-type]


def test_sides_are_called_as_their_models(tmp_path: Path) -> None:
    for folder in ("llama/tok", "qwen/tok", "gemma"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "tokenizer.json").write_text("{}")
    gemma = Side("teacher", str(tmp_path / "gemma" / "tokenizer.json"))
    assert gemma.label == "gemma"
    llama, qwen = (Side("student", tmp_path / name / "tok") for name in ("llama", "qwen"))
    assert labels(llama, gemma) == ("tok", "gemma")
    assert labels(llama, qwen) == ("llama/tok", "qwen/tok")
    assert Side("student", "owner/model").label == "model"
    assert Side("student", tmp_path / "student.json").label == "student"


def test_the_byte_alphabet_is_the_one_that_the_core_inverts() -> None:
    tokenizer = Tokenizer(models.BPE({char: byte for byte, char in BYTE_ALPHABET.items()}, []))
    tokenizer.decoder = decoders.ByteLevel()
    vocab = read_tokenizer(tokenizer)
    assert [vocab.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert [surface(vocab, i) for i in range(256)] == [BYTE_ALPHABET[i] for i in range(256)]


def test_a_token_is_shown_as_its_tokenizer_spells_it() -> None:
    for tokenizer in (zoo.byte_level_bpe(2000, 1), zoo.wordpiece(), zoo.sentencepiece_bpe()):
        vocab, spelled = read_tokenizer(tokenizer), tokenizer.get_vocab()
        wrong = {text: i for text, i in spelled.items() if surface(vocab, i) != text}
        assert len(wrong) <= 1, list(wrong.items())[:5]


def test_tokens_for_people() -> None:
    vocab = Vocab.from_tokens([b" a\n", b"\xff", b"", b""], {2: "<eos>"})
    assert [quoted(vocab, i) for i in range(4)] == ["' a\\n'", "b'\\xff'", "<eos>", "<unused 3>"]
    assert [visible_token(vocab, i) for i in range(4)] == ["·a⏎", "\\xff", "<eos>", "<unused 3>"]
    assert visible("e\u0301\u200b".encode()) == "e\u0301\\xe2\\x80\\x8b"
    assert (special_id(vocab, "<eos>"), special_id(vocab, " a\n")) == (2, None)


def test_a_tokenizer_with_a_python_part_is_refused(tmp_path: Path) -> None:
    class Custom:
        def to_str(self) -> str:
            raise Exception("Custom PreTokenizer cannot be serialized")

    with pytest.raises(ValueError, match=r"cannot be printed as a tokenizer\.json"):
        read_tokenizer(Custom())


def test_a_deep_tokenizer_json_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b'{"a":' + b"[" * 10**5)
    with pytest.raises(FormatError) as refused:
        Vocab.from_path(tmp_path)
    assert "\n" not in str(refused.value)
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": []}}))
    with pytest.raises(ValueError, match=r".") as refused:
        Vocab.from_path(tmp_path)
    assert "\n" not in str(refused.value)
