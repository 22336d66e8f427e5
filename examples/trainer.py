"""DistillTrainer with its flags: trainer.py STUDENT TEACHER DATA.jsonl --output_dir OUT ..."""

import sys

from datasets import load_dataset
from transformers import AutoModelForCausalLM, HfArgumentParser

from xtoken.training import DistillArguments, DistillTrainer

student, teacher, data, *flags = sys.argv[1:]
(args,) = HfArgumentParser(DistillArguments).parse_args_into_dataclasses(flags)

trainer = DistillTrainer(
    AutoModelForCausalLM.from_pretrained(student),
    args,
    teachers=[teacher],
    train_dataset=load_dataset("json", data_files=data, split="train"),
)
trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
trainer.save_model()
