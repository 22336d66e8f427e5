"""Distillation on `transformers.Trainer`: settings, losses of a step, evaluation, a whole run.

    pair = load_models("student", "teacher")
    texts = split_held_out(read_documents("data.jsonl"), 0.1)
    config = DistillConfig(steps=500)
    materials = prepare(pair, texts, config)
    teacher = open_teachers(materials, config, [config.loss], Path("cache"))[config.loss]
    result = train(materials, config, teacher, Path("out"))
    print(result.before.bits_per_byte, result.after.bits_per_byte)

`train` makes a `DistillTrainer`; make one yourself to bring your own model, arguments or callbacks.
"""

from xtoken.training.arguments import DistillArguments as DistillArguments
from xtoken.training.config import DistillConfig as DistillConfig
from xtoken.training.evaluate import HeldOutEvaluator as HeldOutEvaluator
from xtoken.training.evaluate import HeldOutScore as HeldOutScore
from xtoken.training.mixin import DistillMixin as DistillMixin
from xtoken.training.models import ModelPair as ModelPair
from xtoken.training.models import load_models as load_models
from xtoken.training.prepare import Materials as Materials
from xtoken.training.prepare import open_teachers as open_teachers
from xtoken.training.prepare import prepare as prepare
from xtoken.training.run import RunResult as RunResult
from xtoken.training.run import train as train
from xtoken.training.settings import DistillSettings as DistillSettings
from xtoken.training.teacher_side import TeacherSideCollator as TeacherSideCollator
from xtoken.training.teacher_side import add_teacher_side as add_teacher_side
from xtoken.training.teaching import Teacher as Teacher
from xtoken.training.trainer import DistillTrainer as DistillTrainer
