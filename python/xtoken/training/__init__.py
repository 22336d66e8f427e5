"""Distillation on `transformers.Trainer`: settings, losses of a step, evaluation, a whole run."""

from xtoken.training.config import ConfigError as ConfigError
from xtoken.training.config import DistillConfig as DistillConfig
from xtoken.training.evaluate import HeldOutEvaluator as HeldOutEvaluator
from xtoken.training.evaluate import HeldOutScore as HeldOutScore
from xtoken.training.objective import Objective as Objective
from xtoken.training.pair import Pair as Pair
from xtoken.training.pair import PairError as PairError
from xtoken.training.pair import load_pair as load_pair
from xtoken.training.prepare import Materials as Materials
from xtoken.training.prepare import open_teachers as open_teachers
from xtoken.training.prepare import prepare as prepare
from xtoken.training.run import RunResult as RunResult
from xtoken.training.run import train as train
from xtoken.training.trainer import DistillTrainer as DistillTrainer
