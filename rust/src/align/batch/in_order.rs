//! One batch from blocks that are ready in any order: each is copied to its place as soon as all
//! blocks before it are known.

use std::mem::MaybeUninit;
use std::sync::{Mutex, PoisonError};

use crate::align::{AlignmentBatch, Counts};

/// Memory for a whole batch.
pub(super) struct Output {
    batch: AlignmentBatch,
}

/// Where the blocks of a batch go.
pub(super) struct OutputSlots<'a> {
    rest: Mutex<Rest<'a>>,
}

/// What is not yet given to a block.
struct Rest<'a> {
    slice: OutputSlice<'a>,
    chunk_indptr: &'a mut Vec<i64>,
    counts: &'a mut Vec<Counts>,
    /// The first block without a slice.
    next: usize,
    /// Blocks that are aligned and have no slice.
    waiting: Vec<Option<AlignmentBatch>>,
}

/// Part of the large arrays, not yet written.
struct OutputSlice<'a> {
    student_bounds: &'a mut [MaybeUninit<i64>],
    teacher_bounds: &'a mut [MaybeUninit<i64>],
    kinds: &'a mut [MaybeUninit<u8>],
}

/// How much of the large arrays is written.
pub(super) struct Filled {
    bounds: usize,
    chunks: usize,
}

impl Output {
    /// Room for so many sequences and at most so many chunks.
    pub(super) fn new(sequences: usize, chunks: usize) -> Self {
        let mut batch = AlignmentBatch::default();
        batch.reserve(sequences, chunks);
        Self { batch }
    }

    /// The places of so many blocks.
    pub(super) fn slots(&mut self, blocks: usize) -> OutputSlots<'_> {
        let batch = &mut self.batch;
        let slice = OutputSlice {
            student_bounds: batch.student_bounds.spare_capacity_mut(),
            teacher_bounds: batch.teacher_bounds.spare_capacity_mut(),
            kinds: batch.kinds.spare_capacity_mut(),
        };
        OutputSlots {
            rest: Mutex::new(Rest {
                slice,
                chunk_indptr: &mut batch.chunk_indptr,
                counts: &mut batch.counts,
                next: 0,
                waiting: (0..blocks).map(|_| None).collect(),
            }),
        }
    }

    /// The batch, once all blocks are in their slots.
    pub(super) fn into_batch(self, filled: Filled) -> AlignmentBatch {
        let mut batch = self.batch;
        assert!(
            batch.student_bounds.capacity() >= filled.bounds
                && batch.teacher_bounds.capacity() >= filled.bounds
                && batch.kinds.capacity() >= filled.chunks
        );
        // SAFETY: `OutputSlots` hands out the spare room from its start on without a gap, `put`
        // writes all of each place before it returns, and `filled` counts what was handed out.
        unsafe {
            batch.student_bounds.set_len(filled.bounds);
            batch.teacher_bounds.set_len(filled.bounds);
            batch.kinds.set_len(filled.chunks);
        }
        batch.shrink();
        batch
    }
}

impl<'a> OutputSlots<'a> {
    /// Hands in a block, copies all that now has a slice, and gives its memory to `reuse`.
    pub(super) fn put(&self, at: usize, aligned: AlignmentBatch, reuse: impl Fn(AlignmentBatch)) {
        self.lock().waiting[at] = Some(aligned);
        while let Some((block, slice)) = self.next() {
            slice.fill(&block);
            reuse(block);
        }
    }

    /// The next block in order, if it is aligned, and its slice.
    fn next(&self) -> Option<(AlignmentBatch, OutputSlice<'a>)> {
        let mut rest = self.lock();
        let at = rest.next;
        let block = rest.waiting.get_mut(at)?.take()?;
        let slice = rest.slice.split_off(&block)?;
        rest.next += 1;
        let base = rest.chunk_indptr.last().copied().unwrap_or(0);
        let ends = block.chunk_indptr[1..].iter().map(|end| base + end);
        rest.chunk_indptr.extend(ends);
        rest.counts.extend_from_slice(&block.counts);
        Some((block, slice))
    }

    pub(super) fn finish(self) -> Filled {
        let rest = self.rest.into_inner();
        let rest = rest.unwrap_or_else(PoisonError::into_inner);
        let chunks = rest.chunk_indptr.last().map_or(0, |&end| end as usize);
        Filled {
            bounds: chunks + rest.counts.len(),
            chunks,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Rest<'a>> {
        self.rest.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<'a> OutputSlice<'a> {
    /// The first part, of the size that `block` needs.
    fn split_off(&mut self, block: &AlignmentBatch) -> Option<OutputSlice<'a>> {
        Some(OutputSlice {
            student_bounds: self
                .student_bounds
                .split_off_mut(..block.student_bounds.len())?,
            teacher_bounds: self
                .teacher_bounds
                .split_off_mut(..block.teacher_bounds.len())?,
            kinds: self.kinds.split_off_mut(..block.kinds.len())?,
        })
    }

    fn fill(self, block: &AlignmentBatch) {
        self.student_bounds
            .write_copy_of_slice(&block.student_bounds);
        self.teacher_bounds
            .write_copy_of_slice(&block.teacher_bounds);
        self.kinds.write_copy_of_slice(&block.kinds);
    }
}
