"""Distillation losses: one loss a file, a pure function and a thin module."""

from .combine import balance as balance
from .combine import combine as combine
from .cross_entropy import cross_entropy as cross_entropy
from .gold import Gold as Gold
from .gold import gold as gold
from .output import LossOutput as LossOutput
from .output import global_normalizer as global_normalizer
from .p_kl import PKL as PKL
from .p_kl import p_kl as p_kl
from .student import LmHead as LmHead
from .student import VocabShard as VocabShard
from .teacher_signal import TeacherTopK as TeacherTopK
