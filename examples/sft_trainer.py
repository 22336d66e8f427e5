"""P-KL inside TRL's SFTTrainer: sft_trainer.py STUDENT TEACHER DATA.jsonl --output_dir OUT ..."""

import sys

from datasets import load_dataset
from transformers import HfArgumentParser
from trl import SFTConfig, SFTTrainer

from xtoken.training import DistillMixin, DistillSettings  # 1


class Trainer(DistillMixin, SFTTrainer):  # 2
    """SFTTrainer with teachers."""


student, teacher, data, *flags = sys.argv[1:]
(args,) = HfArgumentParser(SFTConfig).parse_args_into_dataclasses(flags)
trainer = Trainer(
    student,
    args,
    train_dataset=load_dataset("json", data_files=data, split="train"),
    teachers=[teacher],  # 3
    distill=DistillSettings(loss="p-kl"),  # 4
)
trainer.train()
trainer.save_model()
