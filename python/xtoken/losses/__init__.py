"""Distillation losses: one loss a file, a pure function and a thin module."""

from xtoken.losses.alm import ALM as ALM
from xtoken.losses.alm import alm as alm
from xtoken.losses.cross_entropy import cross_entropy as cross_entropy
from xtoken.losses.engine.lm_head import LmHead as LmHead
from xtoken.losses.engine.vocab_shard import VocabShard as VocabShard
from xtoken.losses.hybrid.gold import Gold as Gold
from xtoken.losses.hybrid.gold import gold as gold
from xtoken.losses.hybrid.h_kl import HKL as HKL
from xtoken.losses.hybrid.h_kl import h_kl as h_kl
from xtoken.losses.hybrid.uld import ULD as ULD
from xtoken.losses.hybrid.uld import uld as uld
from xtoken.losses.multi_teacher import TeacherTerm as TeacherTerm
from xtoken.losses.multi_teacher import multi_teacher as multi_teacher
from xtoken.losses.output import LossOutput as LossOutput
from xtoken.losses.output import balance as balance
from xtoken.losses.output import combine as combine
from xtoken.losses.output import global_normalizer as global_normalizer
from xtoken.losses.p_kl.loss import PKL as PKL
from xtoken.losses.p_kl.loss import p_kl as p_kl
from xtoken.losses.prefix_kl.compared_prefixes import TrieSlots as TrieSlots
from xtoken.losses.prefix_kl.compared_prefixes import first_pieces as first_pieces
from xtoken.losses.prefix_kl.loss import PrefixKL as PrefixKL
from xtoken.losses.prefix_kl.loss import prefix_kl as prefix_kl
from xtoken.losses.same_vocab_kl import SameVocabKL as SameVocabKL
from xtoken.losses.same_vocab_kl import same_vocab_kl as same_vocab_kl
from xtoken.tensors.teacher_signal import TeacherTopK as TeacherTopK
