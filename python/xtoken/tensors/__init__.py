"""What the losses read, as tensors: chunks of a batch, W, tries and the teacher's signal."""

from xtoken.tensors.chunks import ChunkBatch as ChunkBatch
