"""Distillation on `transformers.Trainer`.

Your model and dataset, with the arguments that Trainer takes and those of the losses:

    trainer = DistillTrainer(model, DistillArguments("out", loss="p-kl"), teachers=["teacher"],
                             train_dataset=dataset, processing_class=tokenizer)
    trainer.train()

Over any other Trainer, with its own data and loss:

    class MyTrainer(DistillMixin, SFTTrainer): ...

    MyTrainer("student", SFTConfig("out"), train_dataset=dataset, teachers=["teacher"],
              distill=DistillSettings(loss="p-kl")).train()

A whole run, as `xtoken distill` makes it, from files to a scored student:

    models = load_models("student", "teacher")
    texts = split_held_out(read_documents("data.jsonl"), 0.1)
    config = DistillConfig(steps=500)
    materials = prepare(models, texts, config)
    teacher = open_teachers(materials, config, [config.loss], Path("cache"))[config.loss]
    result = train(materials, config, teacher, Path("out"))
    print(result.before.bits_per_byte, result.after.bits_per_byte)
"""

from xtoken.training.arguments import DistillArguments as DistillArguments
from xtoken.training.checkpoints import last_whole_checkpoint as last_whole_checkpoint
from xtoken.training.config import DistillConfig as DistillConfig
from xtoken.training.dry_run import DryRun as DryRun
from xtoken.training.dry_run import dry_run as dry_run
from xtoken.training.evaluate import HeldOutEvaluator as HeldOutEvaluator
from xtoken.training.evaluate import HeldOutScore as HeldOutScore
from xtoken.training.mixin import DistillMixin as DistillMixin
from xtoken.training.models import ModelPair as ModelPair
from xtoken.training.models import load_models as load_models
from xtoken.training.prepare import PreparedData as PreparedData
from xtoken.training.prepare import open_teachers as open_teachers
from xtoken.training.prepare import prepare as prepare
from xtoken.training.run import RunResult as RunResult
from xtoken.training.run import train as train
from xtoken.training.settings import DistillSettings as DistillSettings
from xtoken.training.teacher_columns import add_teacher_side as add_teacher_side
from xtoken.training.teacher_side import TeacherSideCollator as TeacherSideCollator
from xtoken.training.teaching import Teacher as Teacher
from xtoken.training.trainer import DistillTrainer as DistillTrainer
