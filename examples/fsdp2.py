"""FSDP2 in a loop of your own: torchrun --nproc_per_node N fsdp2.py STUDENT TEACHER DATA.jsonl OUT

Both models are sharded; each process takes every N-th row of a step of 8 rows, and the loss is that
of one process with all of them.
"""

import sys

import torch
import torch.distributed as dist
from datasets import load_dataset
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM

import xtoken

student_name, teacher_name, data, out = sys.argv[1:5]
dist.init_process_group()
rank, processes = dist.get_rank(), dist.get_world_size()
device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
if device is not None:
    torch.accelerator.set_device_index(rank % torch.accelerator.device_count())


def sharded(name: str) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(name).to(device or "cpu")
    for layer in model.model.layers:
        fully_shard(layer)
    return fully_shard(model)


student, teacher = sharded(student_name), sharded(teacher_name).eval()
pair = xtoken.Pair(student_name, teacher_name)
distiller = pair.distiller("p-kl", kd_weight=1.0, ce_weight=1.0, top_k=512).to(device or "cpu")
optimizer = torch.optim.AdamW(student.parameters(), lr=2e-5)
rows = list(load_dataset("json", data_files=data, split="train"))

for start in range(0, len(rows) - 7, 8):
    batch = distiller.collate(rows[start + rank : start + 8 : processes]).to(device or "cpu")
    with torch.no_grad():
        teacher_logits = teacher(**batch.teacher).logits
    totals = distiller.counts(batch).over_processes()
    output = distiller(student(**batch.student).logits, teacher_logits, batch, totals=totals)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = output.loss.detach()
    dist.all_reduce(loss)
    if rank == 0:
        print(f"step {start // 8 + 1}: loss {loss.item() / processes:.6f}", flush=True)

state = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True))
if rank == 0:
    student.save_pretrained(out, state_dict=state)
    pair.student_tokenizer.save_pretrained(out)
dist.destroy_process_group()
