//! Many sequences at once; the only file that names rayon.

use std::ops::Range;

use rayon::prelude::*;

use crate::align::{Aligner, AlignmentBatch, Scratch, TokenId};
use crate::error::{Error, Result};

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

/// The alignments of all sequences, in order; the same for any number of threads.
///
/// `threads` is the most that work at once, 0 for one a core. One thread never touches rayon, so
/// that a forked process can go on.
///
/// # Errors
/// [`Error::Shape`] where the two sides differ in number or a range lies outside its ids;
/// [`Error::IdOutOfRange`] for the first sequence with an id outside its vocabulary.
pub fn align_batch<S: TokenId, T: TokenId>(
    aligner: &Aligner,
    student: Ragged<'_, S>,
    teacher: Ragged<'_, T>,
    threads: usize,
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
    let align_range = |range: Range<usize>| {
        let mut batch = AlignmentBatch::default();
        let mut scratch = Scratch::default();
        for at in range {
            aligner
                .align_into(student.get(at), teacher.get(at), &mut batch, &mut scratch)
                .map_err(|error| in_sequence(error, at))?;
        }
        Ok(batch)
    };
    let sequences = student.ranges.len();
    if threads == 1 || sequences < 2 {
        return align_range(0..sequences);
    }
    let parts = split(&student, &teacher, workers(threads));
    let aligned = in_pool(threads, || {
        parts
            .into_par_iter()
            .map(align_range)
            .collect::<Vec<Result<AlignmentBatch>>>()
    })?;
    let mut aligned = aligned.into_iter();
    let mut batch = aligned
        .next()
        .unwrap_or_else(|| Ok(AlignmentBatch::default()))?;
    for part in aligned {
        batch.append(&part?);
    }
    Ok(batch)
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

fn workers(threads: usize) -> usize {
    if threads == 0 {
        rayon::current_num_threads()
    } else {
        threads
    }
}

/// Runs `work` on at most `threads` threads.
fn in_pool<R: Send>(threads: usize, work: impl FnOnce() -> R + Send) -> Result<R> {
    if threads == 0 {
        return Ok(work());
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = pool.map_err(|error| Error::Option {
        name: "threads",
        value: format!("{threads} ({error})"),
        expected: "as many threads as the system allows",
    })?;
    Ok(pool.install(work))
}

/// Cuts the sequences into runs of about the same number of tokens, several a worker.
fn split<S, T>(
    student: &Ragged<'_, S>,
    teacher: &Ragged<'_, T>,
    workers: usize,
) -> Vec<Range<usize>> {
    let tokens: Vec<usize> = student
        .ranges
        .iter()
        .zip(teacher.ranges)
        .map(|(s, t)| s.len() + t.len() + 1)
        .collect();
    let share = tokens.iter().sum::<usize>().div_ceil(workers * 4);
    let mut parts = Vec::new();
    let (mut start, mut held) = (0, 0);
    for (at, count) in tokens.iter().enumerate() {
        held += count;
        if held >= share || at + 1 == tokens.len() {
            parts.push(start..at + 1);
            (start, held) = (at + 1, 0);
        }
    }
    parts
}
