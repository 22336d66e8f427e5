//! Many sequences at once.

mod in_order;

use std::cmp::Reverse;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use in_order::Output;

use super::{Aligner, AlignmentBatch, Scratch, TokenId};
use crate::error::{Error, Result};
use crate::parallel::{self, Threads};

/// Sequences that lie in one array, each in its own range.
#[derive(Debug, Clone, Copy)]
pub struct Ragged<'a, I> {
    /// The ids of all sequences; gaps between the ranges are padding.
    pub ids: &'a [I],
    /// Where each sequence lies.
    pub ranges: &'a [Range<usize>],
}

impl<'a, I> Ragged<'a, I> {
    fn get(&self, at: usize) -> &'a [I] {
        &self.ids[self.ranges[at].clone()]
    }

    fn check(&self, side: &str) -> Result<()> {
        let beyond = self
            .ranges
            .iter()
            .find(|range| range.start > range.end || range.end > self.ids.len());
        match beyond {
            None => Ok(()),
            Some(range) => Err(Error::Shape {
                what: format!("{side} ids"),
                found: self.ids.len(),
                expected: range.end,
                remedy: "pass lengths or offsets that lie within the ids",
            }),
        }
    }
}

/// Batches of fewer tokens than this on both sides together stay on the calling thread: waking
/// another one takes about as long as aligning them.
pub const MIN_PARALLEL_TOKENS: usize = 1 << 18;

/// Tokens of both sides that a thread takes at a time. What it writes for them (17 bytes per chunk)
/// stays in its own cache until it is copied to its slice.
const BLOCK_TOKENS: usize = 1 << 15;

/// The alignments of all sequences, in order; the same for any number of threads.
///
/// A batch of less than [`MIN_PARALLEL_TOKENS`] stays on the calling thread.
///
/// # Errors
/// [`Error::Shape`] where the two sides differ in number or a range lies outside its ids;
/// [`Error::IdOutOfRange`] for the first sequence with an id outside its vocabulary;
/// [`Error::Interrupted`] where the caller gives up.
pub fn align_batch<S: TokenId, T: TokenId>(
    aligner: &Aligner,
    student: Ragged<'_, S>,
    teacher: Ragged<'_, T>,
    threads: &Threads<'_>,
) -> Result<AlignmentBatch> {
    student.check("student")?;
    teacher.check("teacher")?;
    if student.ranges.len() != teacher.ranges.len() {
        return Err(Error::Shape {
            what: "teacher sequences".to_owned(),
            found: teacher.ranges.len(),
            expected: student.ranges.len(),
            remedy: "pass as many teacher sequences as student sequences",
        });
    }
    let work = Work {
        aligner,
        student,
        teacher,
    };
    let all = 0..student.ranges.len();
    let tokens = work.tokens(&all);
    if threads.count() == 1 || all.len() < 2 || tokens < MIN_PARALLEL_TOKENS {
        let mut watch = threads.watch();
        let mut batch = AlignmentBatch::default();
        batch.reserve(all.len(), tokens);
        for block in work.cut(BLOCK_TOKENS) {
            work.align(block, &mut batch)?;
            watch.check()?;
        }
        batch.shrink();
        return Ok(batch);
    }
    work.align_blocks(threads, BLOCK_TOKENS)
}

/// A checked call.
struct Work<'a, S, T> {
    aligner: &'a Aligner,
    student: Ragged<'a, S>,
    teacher: Ragged<'a, T>,
}

impl<S: TokenId, T: TokenId> Work<'_, S, T> {
    /// Tokens of some sequences on both sides together: the most chunks that they can have.
    fn tokens(&self, sequences: &Range<usize>) -> usize {
        let side = |ranges: &[Range<usize>]| ranges.iter().map(Range::len).sum::<usize>();
        side(&self.student.ranges[sequences.clone()])
            + side(&self.teacher.ranges[sequences.clone()])
    }

    /// Appends the alignments of some sequences to `batch`.
    fn align(&self, sequences: Range<usize>, batch: &mut AlignmentBatch) -> Result<()> {
        batch.reserve(sequences.len(), self.tokens(&sequences));
        let mut scratch = Scratch::default();
        for at in sequences {
            self.aligner
                .align_into(
                    self.student.get(at),
                    self.teacher.get(at),
                    batch,
                    &mut scratch,
                )
                .map_err(|error| in_sequence(error, at))?;
        }
        Ok(())
    }

    /// All sequences on several threads: each takes the next block, and puts what it made of it in
    /// its slice of the output as soon as that is known.
    fn align_blocks(&self, threads: &Threads<'_>, block_tokens: usize) -> Result<AlignmentBatch> {
        let blocks = self.cut(block_tokens);
        // A block of one long sequence is begun early: others fill the time that it takes.
        let mut order: Vec<usize> = (0..blocks.len()).collect();
        order.sort_by_key(|&at| Reverse(self.tokens(&blocks[at]) / (2 * block_tokens)));
        let sequences = self.student.ranges.len();
        let mut output = Output::new(sequences, self.tokens(&(0..sequences)));
        let slots = output.slots(blocks.len());
        parallel::for_each(threads, &order, |at| {
            let mut batch = spare();
            self.align(blocks[at].clone(), &mut batch)?;
            slots.put(at, batch, keep_spare);
            Ok(())
        })?;
        let filled = slots.finish();
        Ok(output.into_batch(filled))
    }

    /// Cuts the sequences into blocks of about so many tokens; a longer sequence stands alone.
    fn cut(&self, block_tokens: usize) -> Vec<Range<usize>> {
        let mut blocks = Vec::new();
        let (mut start, mut held) = (0, 0);
        let sequences = self.student.ranges.len();
        for at in 0..sequences {
            // The one stands for what a sequence costs however short it is.
            let tokens = self.tokens(&(at..at + 1)) + 1;
            if held > 0 && held + tokens > block_tokens {
                blocks.push(start..at);
                (start, held) = (at, 0);
            }
            held += tokens;
        }
        if start < sequences {
            blocks.push(start..sequences);
        }
        blocks
    }
}

fn in_sequence(error: Error, at: usize) -> Error {
    match error {
        Error::IdOutOfRange {
            side,
            position,
            id,
            size,
            ..
        } => Error::IdOutOfRange {
            sequence: Some(at),
            side,
            position,
            id,
            size,
        },
        other => other,
    }
}

/// Memory of earlier blocks: writing to it again costs no page faults.
static SPARE: Mutex<Vec<AlignmentBatch>> = Mutex::new(Vec::new());

/// Batches with room for more chunks than this are not kept.
const MAX_SPARE_CHUNKS: usize = 2 * BLOCK_TOKENS;

/// No more batches than this are kept.
const MAX_SPARE: usize = 64;

fn spare() -> AlignmentBatch {
    SPARE
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .pop()
        .unwrap_or_default()
}

fn keep_spare(mut batch: AlignmentBatch) {
    let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    if spare.len() < MAX_SPARE && batch.kinds.capacity() <= MAX_SPARE_CHUNKS {
        batch.clear();
        spare.push(batch);
    }
}

#[cfg(test)]
mod tests;
