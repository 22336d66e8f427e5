"""One run of a DistillTrainer: sharded_run.py FOLDER OUT KIND; KIND is ddp,
fsdp, resume (of fsdp), fused or policy; zero2 or zero3 of DeepSpeed; or sft-ddp or sft-fsdp, of
TRL's SFTTrainer with the mixin.

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
from transformers import AutoModelForCausalLM, AutoTokenizer

from xtoken.training import DistillArguments, DistillMixin, DistillSettings, DistillTrainer

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
    if kind.startswith("zero"):
        options["deepspeed"] = deepspeed_config(int(kind[-1]))
        options["gradient_accumulation_steps"] = 2
    elif kind not in ("ddp", "sft-ddp", "sft-apart"):
        shard_on_cpus()
        options["fsdp"] = True
        options["fsdp_config"] = {
            "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        }
    if kind == "fused":
        options["fused"] = True
    if kind == "sft-apart":
        options["average_tokens_across_devices"] = False
    if kind == "policy":
        options |= {"on_policy_fraction": 0.5, "on_policy_max_new_tokens": 6}
    losses: dict[str, Any] = {"loss": "p-kl", "top_k": 32}
    options |= {
        "max_steps": STEPS,
        "per_device_train_batch_size": ROWS
        // int(os.environ.get("WORLD_SIZE", "1"))
        // options.get("gradient_accumulation_steps", 1),
        "logging_steps": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps" if kind in ("ddp", "fsdp", "resume") else "no",
        "save_steps": 2,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": "none",
        "dataloader_pin_memory": False,
    }
    texts = tiny_texts(16)
    trainer: Any
    if kind.startswith("sft"):
        trainer = sft_trainer(student_of(folder), folder, out, texts, options, losses)
    else:
        # Before the student is loaded, as DeepSpeed wants it.
        arguments = DistillArguments(str(out), max_tokens=64, **losses, **options)
        trainer = DistillTrainer(
            student_of(folder),
            arguments,
            teachers=[str(folder / "teacher")],
            train_dataset=texts,
            eval_dataset=texts[:4],
        )
    trainer.train(resume_from_checkpoint=str(out / "checkpoint-2") if kind == "resume" else None)
    trainer.save_model(str(out / "student"))
    sharded = [
        sum(
            p.to_local().numel() if hasattr(p, "to_local") else p.numel()
            for p in model.parameters()
        )
        / sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters())
        for model in (trainer.model, trainer.teaching.sources[0].model)
    ]
    score = None if kind.startswith("sft") else trainer.evaluate()["eval_bits_per_byte"]
    if trainer.accelerator.is_main_process:
        records = [each for each in trainer.state.log_history if "kd" in each]
        found = {
            "records": records,
            "sharded": sharded,
            "model": type(trainer.model).__name__,
            "score": score,
        }
        (out / "found.json").write_text(json.dumps(found))
    trainer.accelerator.wait_for_everyone()


def student_of(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder / "student", dtype=torch.float32)


def deepspeed_config(stage: int) -> dict[str, Any]:
    named = ("lr", "weight_decay", "betas", "eps")
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {
            "stage": stage,
            "stage3_gather_16bit_weights_on_model_save": stage == 3,
        },
        "optimizer": {
            "type": "AdamW",
            "params": {"torch_adam": True, **dict.fromkeys(named, "auto")},
        },
    }


def sft_trainer(
    student: torch.nn.Module,
    folder: Path,
    out: Path,
    texts: list[str],
    options: dict[str, Any],
    losses: dict[str, Any],
) -> Any:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    class Trainer(DistillMixin, SFTTrainer):
        """What a user writes."""

    plain = {"max_length": 64, "bf16": False, "gradient_checkpointing": False}
    return Trainer(
        student,
        args=SFTConfig(str(out), **plain, **options),
        train_dataset=Dataset.from_dict({"text": texts}),
        processing_class=AutoTokenizer.from_pretrained(folder / "student"),
        teachers=[str(folder / "teacher")],
        distill=DistillSettings(**losses),
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3])
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
