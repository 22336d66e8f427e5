"""The loss in a training loop of your own: own_loop.py STUDENT TEACHER DATA.jsonl OUT"""

import sys

import torch
from datasets import load_dataset
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

import xtoken

student_name, teacher_name, data, out = sys.argv[1:5]
device = "cuda" if torch.cuda.is_available() else "cpu"
student = AutoModelForCausalLM.from_pretrained(student_name).to(device)
teacher = AutoModelForCausalLM.from_pretrained(teacher_name).to(device).eval()

pair = xtoken.Pair(student_name, teacher_name)
distiller = pair.distiller("prefix-kl", kd_weight=1.0, ce_weight=1.0, top_k=512).to(device)
rows = load_dataset("json", data_files=data, split="train")
loader = DataLoader(list(rows), batch_size=4, shuffle=True, collate_fn=distiller.collate)
optimizer = torch.optim.AdamW(student.parameters(), lr=2e-5)

for step, batch in enumerate(loader, 1):
    batch = batch.to(device)
    with torch.no_grad():
        teacher_logits = teacher(**batch.teacher).logits
    output = distiller(student(**batch.student).logits, teacher_logits, batch)
    output.loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: CE {output.ce.item():.3f}, KD {output.kd.item():.3f}")

student.save_pretrained(out)
pair.student_tokenizer.save_pretrained(out)
