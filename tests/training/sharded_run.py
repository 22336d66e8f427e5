"""One run of a DistillTrainer: sharded_run.py FOLDER OUT KIND; KIND is ddp,
fsdp, resume (of fsdp), fused or policy.

accelerate has FSDP for accelerators alone, and takes processes on CPUs for data parallel. Told
otherwise, it shards over gloo: all else is as on GPUs.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from tiny_models import tiny_texts
from transformers import AutoModelForCausalLM

from xtoken.training import DistillArguments, DistillTrainer

STEPS = 4
ROWS = 4


def shard_on_cpus() -> None:
    made = PartialState.__init__

    def init(self: PartialState, *given: Any, **named: Any) -> None:
        made(self, *given, **named)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = init  # type: ignore[method-assign]


def main(folder: Path, out: Path, kind: str) -> None:
    options: dict[str, Any] = {}
    if kind != "ddp":
        shard_on_cpus()
        options["fsdp"] = True
        options["fsdp_config"] = {
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        }
    if kind == "fused":
        options["fused"] = True
    if kind == "policy":
        options |= {"on_policy_fraction": 0.5, "on_policy_max_new_tokens": 6}
    arguments = DistillArguments(
        str(out),
        max_steps=STEPS,
        per_device_train_batch_size=ROWS // int(os.environ.get("WORLD_SIZE", "1")),
        logging_steps=1,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        save_strategy="no" if kind in ("policy", "fused") else "steps",
        save_steps=2,
        use_cpu=True,
        disable_tqdm=True,
        report_to="none",
        dataloader_pin_memory=False,
        loss="p-kl",
        top_k=32,
        max_tokens=64,
        **options,
    )
    trainer = DistillTrainer(
        AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32),
        arguments,
        teachers=[str(folder / "teacher")],
        train_dataset=tiny_texts(16),
    )
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2") if kind == "resume" else None)
    trainer.save_model(str(out / "student"))
    sharded = [
        sum(
            p.to_local().numel() if hasattr(p, "to_local") else p.numel()
            for p in model.parameters()
        )
        / sum(p.numel() for p in model.parameters())
        for model in (trainer.model, trainer.teaching.sources[0].model)
    ]
    if trainer.accelerator.is_main_process:
        records = [each for each in trainer.state.log_history if "kd" in each]
        found = {"records": records, "sharded": sharded, "model": type(trainer.model).__name__}
        (out / "found.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
