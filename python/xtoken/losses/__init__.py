"""Distillation losses: one loss a file, a pure function and a thin module."""

from .alm import ALM as ALM
from .alm import alm as alm
from .combine import balance as balance
from .combine import combine as combine
from .cross_entropy import cross_entropy as cross_entropy
from .gold import Gold as Gold
from .gold import gold as gold
from .h_kl import HKL as HKL
from .h_kl import h_kl as h_kl
from .lm_head import LmHead as LmHead
from .multi_teacher import TeacherTerm as TeacherTerm
from .multi_teacher import multi_teacher as multi_teacher
from .output import LossOutput as LossOutput
from .output import global_normalizer as global_normalizer
from .p_kl import PKL as PKL
from .p_kl import p_kl as p_kl
from .prefix_kl import PrefixKL as PrefixKL
from .prefix_kl import prefix_kl as prefix_kl
from .prefix_nodes import TrieSlots as TrieSlots
from .prefix_nodes import first_pieces as first_pieces
from .same_vocab_kl import SameVocabKL as SameVocabKL
from .same_vocab_kl import same_vocab_kl as same_vocab_kl
from .teacher_signal import TeacherTopK as TeacherTopK
from .uld import ULD as ULD
from .uld import uld as uld
from .vocab_shard import VocabShard as VocabShard
