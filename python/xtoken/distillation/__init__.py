"""The door: a pair's loss as one module, from texts to a gradient."""

from xtoken.distillation.batch import Batch as Batch
from xtoken.distillation.collate import DistillCollator as DistillCollator
from xtoken.distillation.distiller import Distiller as Distiller
from xtoken.distillation.options import DistillerOptions as DistillerOptions
from xtoken.distillation.options import DistillLossName as DistillLossName
from xtoken.distillation.output import Counts as Counts
from xtoken.distillation.output import DistillOutput as DistillOutput
from xtoken.distillation.several import MultiBatch as MultiBatch
from xtoken.distillation.several import MultiDistiller as MultiDistiller
from xtoken.distillation.several import several as several
