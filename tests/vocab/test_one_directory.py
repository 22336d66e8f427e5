"""One directory gives one vocabulary, read as a file or by AutoTokenizer; broken ones are named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from xtoken import Projection, Vocab
from xtoken.errors import FormatError, UnsupportedTokenizerError

LETTERS = "▁abcdefghijklmnopqrstuvwxyz"


def byte_level() -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return made


def sentencepiece(specials: list[str], added: list[AddedToken]) -> Tokenizer:
    vocab = {text: i for i, text in enumerate(specials)}
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    for letter in LETTERS:
        vocab[letter] = len(vocab)
    vocab["▁a"] = len(vocab)
    made = Tokenizer(
        models.BPE(
            vocab=vocab, merges=[("▁", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True
        )
    )
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    made.add_tokens(added)
    return made


def save(directory: Path, tokenizer: Tokenizer, config: dict[str, Any], model: str) -> Path:
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({"model_type": model}))
    return directory


def llama_2(directory: Path) -> Path:
    specials = ["<unk>", "<s>", "</s>"]
    made = sentencepiece(specials, [AddedToken(text, special=True) for text in specials])
    made.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    config = {
        "tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>",
        "unk_token": "<unk>", "legacy": False,
    }  # fmt: skip
    return save(directory, made, config, "llama")


def gemma_3(directory: Path) -> Path:
    """As published: `<mask>` is text in the file, and special by the class alone."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    added = [
        AddedToken(text, special=text != "<mask>", normalized=False)
        for text in [*specials, "<start_of_image>"]
    ] + [AddedToken("\n\n", special=False, normalized=False)]
    made = sentencepiece(specials, added)
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    config = {
        "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>",
        "unk_token": "<unk>", "pad_token": "<pad>",
        "added_tokens_decoder": {
            str(made.token_to_id(text)): {
                "content": text, "lstrip": False, "normalized": False, "rstrip": False,
                "single_word": False, "special": text not in ("<mask>", "\n\n"),
            }
            for text in [*specials, "<start_of_image>", "\n\n"]
        },
    }  # fmt: skip
    return save(directory, made, config, "gemma3_text")


def declared(directory: Path) -> Path:
    """Tokens that the configuration alone makes special, one of them new."""
    made = byte_level()
    made.add_tokens([AddedToken("<|think|>", special=False), AddedToken("<|x|>", special=False)])
    made.add_special_tokens(["<|eos|>"])
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|eos|>",
        "pad_token": {"__type": "AddedToken", "content": "<|new|>"},
        "additional_special_tokens": ["<|think|>", "<|newer|>"],
    }  # fmt: skip
    return save(directory, made, config, "llama")


@pytest.mark.parametrize("make", [llama_2, gemma_3, declared])
def test_a_directory_is_one_vocabulary_as_a_file_and_through_autotokenizer(
    make: Any, tmp_path: Path
) -> None:
    directory = make(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(directory)
    file, memory = Vocab.from_path(directory), Vocab.from_tokenizer(tokenizer)
    assert file.special_tokens == memory.special_tokens
    assert file.fingerprint == memory.fingerprint
    assert file.model_fingerprint == memory.model_fingerprint
    assert file == memory
    Projection.build(directory, byte_level(), cache_dir=False).save(tmp_path / "w.safetensors")
    Projection.load(tmp_path / "w.safetensors", tokenizer, byte_level())


def test_the_mask_of_a_gemma_directory_is_a_control_token(tmp_path: Path) -> None:
    vocab = Vocab.from_path(gemma_3(tmp_path / "model"))
    assert "<mask>" in vocab.special_tokens.values()
    assert vocab.segment(b"\n\n") is not None


def test_tokens_that_an_older_map_declares_are_special(tmp_path: Path) -> None:
    directory = declared(tmp_path / "model")
    (directory / "tokenizer_config.json").unlink()
    (directory / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|x|>"}))
    vocab = Vocab.from_path(directory)
    assert vocab.special_tokens[vocab.roles["eos"]] == "<|x|>"


def test_a_configuration_that_is_nested_too_deep_is_refused(tmp_path: Path) -> None:
    directory = declared(tmp_path / "model")
    (directory / "tokenizer_config.json").write_text("[" * 100_000)
    with pytest.raises(FormatError, match=r"tokenizer_config\.json"):
        Vocab.from_path(directory)


@pytest.mark.parametrize("config", [
    {"eos_token": "a\ud800"},
    {"added_tokens_decoder": {"5": {"content": "a\ud800", "special": True}}},
    {"additional_special_tokens": ["a\ud800"]},
])  # fmt: skip
def test_a_declared_token_with_half_a_character_is_refused(
    config: dict[str, Any], tmp_path: Path
) -> None:
    directory = declared(tmp_path / "model")
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(FormatError, match=r"a token 'a.ud800' of the tokenizer configuration"):
        Vocab.from_path(directory)


def test_a_byte_level_vocabulary_in_a_sentencepiece_pipeline_is_named_as_broken() -> None:
    made = byte_level()
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    # As in DeepSeek's files: added tokens have the other character.
    made.add_special_tokens(["<｜begin▁of▁sentence｜>"])
    for broken in (made, PreTrainedTokenizerFast(tokenizer_object=made)):
        with pytest.raises(UnsupportedTokenizerError, match=r"broken.*byte-level.*tokenizer\.json"):
            Vocab.from_tokenizer(broken)


def test_a_sentencepiece_vocabulary_in_a_byte_level_pipeline_is_named_as_broken() -> None:
    made = sentencepiece(["<unk>"], [])
    vocab = made.get_vocab() | {f"▁{letter}": 2000 + i for i, letter in enumerate(LETTERS[2:])}
    ids = {token: i for i, token in enumerate(sorted(vocab, key=vocab.__getitem__))}
    made = Tokenizer(models.BPE(vocab=ids, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    with pytest.raises(UnsupportedTokenizerError, match=r"broken.*SentencePiece.*byte level"):
        Vocab.from_tokenizer(made)
