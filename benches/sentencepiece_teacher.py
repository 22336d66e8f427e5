"""A large SentencePiece-style BPE for the benchmarks, trained once on the text of this machine.

No package carries one of Gemma's size, so a real one is trained by `tokenizers`: characters with
`▁`, byte fallback, 262,144 entries, on the Python, C and documentation sources that are installed.
"""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

SIZE = 262_144
_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
_SUFFIXES = {".py", ".pyi", ".h", ".hpp", ".md", ".rst", ".txt", ".json", ".html", ".js"}
_MOST_BYTES = 150_000_000


def teacher(size: int = SIZE) -> Path:
    """The path of its tokenizer.json, trained on first use (minutes) and kept in the cache."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "xtoken"
    path = cache / f"bench-sentencepiece-{size}" / "tokenizer.json"
    if not path.is_file():
        print(f"training {path} once", file=sys.stderr)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        temporary.write_text(_train(size))
        temporary.rename(path)
    return path


def _texts() -> Iterator[str]:
    budget = _MOST_BYTES
    for folder in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for path in sorted(Path(folder).rglob("*")):
            if path.suffix in _SUFFIXES and path.is_file() and path.stat().st_size < 2_000_000:
                text = path.read_text(encoding="utf-8", errors="ignore")
                budget -= len(text)
                if budget < 0:
                    return
                yield text


def _train(size: int) -> str:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    # Words, as a space begins them, and runs of punctuation; only the training sees this.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("▁", "merged_with_next"), pre_tokenizers.Punctuation("contiguous")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<eos>", "<bos>", "<unk>", *_BYTES],
        limit_alphabet=8000,
        max_token_length=24,
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    state = json.loads(tokenizer.to_str())
    state["pre_tokenizer"] = None
    # As SentencePiece has them, byte tokens are plain entries of the model's vocabulary.
    state["added_tokens"] = [t for t in state["added_tokens"] if t["content"] not in set(_BYTES)]
    return json.dumps(state, ensure_ascii=False)


if __name__ == "__main__":
    print(teacher())
