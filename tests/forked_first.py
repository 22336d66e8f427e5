"""What a process does the first time that it loads a model, done once for all that are forked.

The server of `forked` imports it, last of all: 0.2 s in each of them.
"""

from __future__ import annotations

import gc
import tempfile
import weakref

from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar, enable_progress_bar

disable_progress_bar()
with tempfile.TemporaryDirectory() as folder:
    config = LlamaConfig(
        vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    AutoModelForCausalLM.from_pretrained(folder)
enable_progress_bar()

# At its end each would undo what was imported here, the operators of torch one by one: 30 ms.
for finalizer in weakref.finalize._registry:  # type: ignore[attr-defined]
    finalizer.atexit = False

# Until here nothing was collected; see `uncollected`.
gc.enable()
