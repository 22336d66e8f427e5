"""Span alignment: ids of two tokenizations in, chunks that spell the same bytes out."""

from xtoken.align.aligner import Aligner as Aligner
from xtoken.align.alignment import Alignment as Alignment
from xtoken.align.alignment import AlignmentBatch as AlignmentBatch
from xtoken.align.alignment import ChunkKind as ChunkKind
from xtoken.align.alignment import Coverage as Coverage
