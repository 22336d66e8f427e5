"""A student and a teacher small enough for tests: real tokenizers, trained here on real text."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

from real_texts import NUMBERS, TOPICS
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from demo.student import train_tokenizer, write_llama
from xtoken.data import cut_passages


def tiny_texts(count: int) -> list[str]:
    """Short passages: half of the language reference, half rich in numerals."""
    topics = sorted(set(TOPICS.values()))
    prose = [text for topic in topics for text in cut_passages(topic, 300) if len(text) > 100]
    numbers = [text for each in NUMBERS for text in cut_passages(each, 300) if len(text) > 100]
    half = count // 2
    step = len(numbers) // half
    return prose[: count - half] + numbers[: half * step : step]


def write_pair(directory: Path) -> tuple[Path, Path]:
    """Write `student` and `teacher` below the directory: numerals packed, and digit by digit."""
    student, teacher = _tokenizers()
    _write(directory / "student", student, hidden_size=48, seed=1)
    _write(directory / "teacher", teacher, hidden_size=32, seed=2)
    return directory / "student", directory / "teacher"


def write_hub(directory: Path) -> dict[str, str]:
    """What a download leaves of `owner/student` and `owner/teacher`: variables for `READ_HUB`."""
    for source in write_pair(directory / "pair"):
        model = directory / "hub" / f"models--owner--{source.name}"
        (model / "refs").mkdir(parents=True)
        (model / "refs" / "main").write_text("0" * 40)
        shutil.copytree(source, model / "snapshots" / ("0" * 40))
    return {"HF_HUB_CACHE": str(directory / "hub"), "HF_HUB_OFFLINE": "1"}


# The variables are read when this is imported, which a forked process has behind it.
READ_HUB = """
import importlib, huggingface_hub.constants
importlib.reload(huggingface_hub.constants)
"""


def write_jsonl(path: Path, texts: list[str]) -> Path:
    """Write one text a line."""
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


@functools.cache
def _tokenizers() -> tuple[PreTrainedTokenizerFast, PreTrainedTokenizerFast]:
    texts = tiny_texts(400)
    return train_tokenizer(texts, vocab_size=1700), _digit_tokenizer(texts)


def _digit_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=800,
        special_tokens=["<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def _write(
    directory: Path, tokenizer: PreTrainedTokenizerFast, *, hidden_size: int, seed: int
) -> None:
    write_llama(
        directory,
        tokenizer,
        seed=seed,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
    )
