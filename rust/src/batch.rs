//! Many sequences at once; the only file that names rayon.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use rayon::ThreadPool;
use rayon::prelude::*;
use rustc_hash::FxHashMap;

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
    let align_range = |range: Range<usize>, mut batch: AlignmentBatch| {
        let tokens = |ranges: &[Range<usize>]| ranges.iter().map(Range::len).sum::<usize>();
        let most = tokens(&student.ranges[range.clone()]) + tokens(&teacher.ranges[range.clone()]);
        batch.reserve(range.len(), most);
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
        let mut batch = align_range(0..sequences, AlignmentBatch::default())?;
        batch.shrink();
        return Ok(batch);
    }
    let pool = pool(threads)?;
    let parts = split(&student, &teacher, pool.current_num_threads());
    pool.install(|| {
        let aligned: Vec<Result<AlignmentBatch>> = parts
            .into_par_iter()
            .map(|range| align_range(range, spare()))
            .collect();
        let aligned: Vec<AlignmentBatch> = aligned.into_iter().collect::<Result<_>>()?;
        let batch = concatenate(&aligned);
        keep_spare(aligned);
        Ok(batch)
    })
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

/// The pool with this many threads, 0 for one a core. Pools are kept; a process that was forked
/// starts its own, as threads do not outlive a fork.
pub(crate) fn pool(threads: usize) -> Result<Arc<ThreadPool>> {
    type Pools = FxHashMap<(u32, usize), Arc<ThreadPool>>;
    static POOLS: Mutex<Option<Pools>> = Mutex::new(None);
    let mut pools = POOLS.lock().unwrap_or_else(PoisonError::into_inner);
    let pools = pools.get_or_insert_default();
    let key = (std::process::id(), threads);
    if let Some(pool) = pools.get(&key) {
        return Ok(Arc::clone(pool));
    }
    let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
    let pool = Arc::new(pool.map_err(|error| Error::Option {
        name: "threads",
        value: format!("{threads} ({error})"),
        expected: "as many threads as the system allows",
    })?);
    pools.insert(key, Arc::clone(&pool));
    Ok(pool)
}

/// Memory of earlier batches: writing to it again costs no page faults.
static SPARE: Mutex<Vec<AlignmentBatch>> = Mutex::new(Vec::new());

/// Batches of more chunks than this are not kept.
const MAX_SPARE_CHUNKS: usize = 1 << 20;

/// No more batches than this are kept.
const MAX_SPARE: usize = 64;

fn spare() -> AlignmentBatch {
    SPARE
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .pop()
        .unwrap_or_default()
}

fn keep_spare(batches: Vec<AlignmentBatch>) {
    let mut spare = SPARE.lock().unwrap_or_else(PoisonError::into_inner);
    for mut batch in batches {
        if spare.len() < MAX_SPARE && batch.kinds.capacity() <= MAX_SPARE_CHUNKS {
            batch.clear();
            spare.push(batch);
        }
    }
}

/// All parts in one batch; the large arrays are copied side by side.
fn concatenate(parts: &[AlignmentBatch]) -> AlignmentBatch {
    fn gather<T: Copy>(parts: &[AlignmentBatch], of: fn(&AlignmentBatch) -> &[T]) -> Vec<T> {
        let mut all = Vec::with_capacity(parts.iter().map(|part| of(part).len()).sum());
        for part in parts {
            all.extend_from_slice(of(part));
        }
        all
    }
    let (student_bounds, (teacher_bounds, kinds)) = rayon::join(
        || gather(parts, |part| &part.student_bounds),
        || {
            rayon::join(
                || gather(parts, |part| &part.teacher_bounds),
                || gather(parts, |part| &part.kinds),
            )
        },
    );
    let mut chunk_indptr = vec![0];
    let mut base = 0;
    for part in parts {
        chunk_indptr.extend(part.chunk_indptr[1..].iter().map(|end| base + end));
        base += part.kinds.len() as i64;
    }
    let counts = gather(parts, |part| &part.counts);
    AlignmentBatch {
        student_bounds,
        teacher_bounds,
        kinds,
        chunk_indptr,
        counts,
    }
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
