"""Distillation losses: `loss(inputs, pair, options)`, each in a room of its own.

`xtoken.losses.registry.LOSSES` has all of them by name; docs/add-a-loss.md says how to add one.
"""

from xtoken.losses.alm import alm as alm
from xtoken.losses.bpm.loss import bpm as bpm
from xtoken.losses.cross_entropy import cross_entropy as cross_entropy
from xtoken.losses.engine.shared_gradient import SharedLogits as SharedLogits
from xtoken.losses.engine.vocab_shard import VocabShard as VocabShard
from xtoken.losses.escd.loss import escd as escd
from xtoken.losses.hybrid.gold import gold as gold
from xtoken.losses.hybrid.h_kl import h_kl as h_kl
from xtoken.losses.hybrid.uld import uld as uld
from xtoken.losses.inputs import LossInputs as LossInputs
from xtoken.losses.inputs import LossOptions as LossOptions
from xtoken.losses.multi_teacher import TeacherTerm as TeacherTerm
from xtoken.losses.multi_teacher import multi_teacher as multi_teacher
from xtoken.losses.output import LossOutput as LossOutput
from xtoken.losses.output import balance as balance
from xtoken.losses.output import combine as combine
from xtoken.losses.output import global_normalizer as global_normalizer
from xtoken.losses.p_kl.loss import p_kl as p_kl
from xtoken.losses.partition_kl.loss import partition_kl as partition_kl
from xtoken.losses.prefix_kl.loss import prefix_kl as prefix_kl
from xtoken.losses.registry import LOSSES as LOSSES
from xtoken.losses.registry import LossName as LossName
from xtoken.losses.registry import LossSpec as LossSpec
from xtoken.losses.same_vocab_kl import same_vocab_kl as same_vocab_kl
from xtoken.losses.strict_top_k import strict_top_k as strict_top_k
from xtoken.tensors.chunks import ChunkBatch as ChunkBatch
from xtoken.tensors.lm_head import LmHead as LmHead
from xtoken.tensors.pair_parts import CommonSet as CommonSet
from xtoken.tensors.pair_parts import PairParts as PairParts
from xtoken.tensors.projection import SparseProjection as SparseProjection
from xtoken.tensors.teacher_signal import TeacherTopK as TeacherTopK
from xtoken.tensors.trie import TrieSlots as TrieSlots
from xtoken.tensors.trie import first_pieces as first_pieces
