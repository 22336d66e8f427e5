"""Where teacher predictions come from: a model that runs, or a store that was filled once."""

from xtoken.teachers.causal import causal_logits as causal_logits
from xtoken.teachers.live import LiveTeacher as LiveTeacher
from xtoken.teachers.live import TeacherSource as TeacherSource
from xtoken.teachers.shard import Predictions as Predictions
from xtoken.teachers.shard import StoreKey as StoreKey
from xtoken.teachers.store import TopKStore as TopKStore
from xtoken.teachers.target_store import TargetStore as TargetStore
from xtoken.teachers.teach import estimate as estimate
from xtoken.teachers.teach import teacher_sequences as teacher_sequences
