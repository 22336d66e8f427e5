//! The chunks of a padded batch, one entry for each, and which of them a loss counts.

use std::iter::zip;
use std::ops::Range;

use crate::error::{Error, Result};

/// The bounds of one side's sequences, as in [`AlignmentBatch`](super::AlignmentBatch).
#[derive(Debug, Clone, Copy)]
pub struct Bounds<'a> {
    /// One bound more than chunks for each sequence.
    pub bounds: &'a [i64],
    /// The column of each sequence's first token in its padded row.
    pub columns: &'a [i64],
}

/// Chunks by what is asked of them: `C` entries each.
#[derive(Debug, Clone, Copy)]
pub struct Chunks<'a> {
    /// The row of the batch.
    pub sample: &'a [i64],
    /// First tokens and ends in the student's padded rows.
    pub student: (&'a [i64], &'a [i64]),
    /// The same for the teacher.
    pub teacher: (&'a [i64], &'a [i64]),
    /// [`ChunkKind`](super::ChunkKind), as its value.
    pub kind: &'a [i64],
    /// Whether a token of its own document stands before each token; zero is no.
    pub has_predictor: &'a [u8],
}

/// Which tokens of a padded batch count; zero is no.
#[derive(Debug, Clone, Copy)]
pub struct Mask<'a> {
    /// Row after row.
    pub flags: &'a [u8],
    /// Tokens of a row.
    pub width: usize,
}

/// Chunks in memory of their own.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChunkRows {
    /// Samples, student starts, student ends, teacher starts, teacher ends, kinds: one after the
    /// other, each as long as `has_predictor`.
    pub columns: Vec<i64>,
    /// Whether a token of its own document stands before each token of the chunk.
    pub has_predictor: Vec<bool>,
    /// The largest sample, student end and teacher end; 0 without a chunk.
    pub reach: [i64; 3],
    /// Whether each chunk has a token on both sides and a predictor of each of them.
    pub predicted: bool,
}

/// One row for each chunk of a batch of alignments, in order.
///
/// ```
/// use xtoken::align::{Bounds, flatten};
///
/// // Two sequences of 2:1 and 1:1 tokens, and of 1:1; the second begins at column 3 of its row.
/// let student = Bounds { bounds: &[0, 2, 3, 0, 1], columns: &[0, 3] };
/// let teacher = Bounds { bounds: &[0, 1, 2, 0, 1], columns: &[0, 0] };
/// let rows = flatten(student, teacher, &[0, 0, 0], &[0, 2, 3])?;
/// assert_eq!(rows.columns[3..9], [0, 2, 3, 2, 3, 4]);
/// assert_eq!(rows.has_predictor, [false, true, false]);
/// # Ok::<(), xtoken::Error>(())
/// ```
///
/// # Errors
/// [`Error::Shape`] and [`Error::Indptr`] where the arrays do not fit together.
pub fn flatten(
    student: Bounds<'_>,
    teacher: Bounds<'_>,
    kinds: &[u8],
    chunk_indptr: &[i64],
) -> Result<ChunkRows> {
    let offsets = offsets(chunk_indptr, kinds.len())?;
    let sequences = offsets.len() - 1;
    student.check("student", kinds.len(), sequences)?;
    teacher.check("teacher", kinds.len(), sequences)?;
    let count = kinds.len();
    let mut columns = vec![0; 6 * count];
    let (samples, rest) = columns.split_at_mut(count);
    let (student_out, rest) = rest.split_at_mut(2 * count);
    let (teacher_out, kinds_out) = rest.split_at_mut(2 * count);
    let mut has_predictor = vec![false; count];
    let mut reach = [0; 3];
    let mut predicted = true;
    for (at, ends) in offsets.windows(2).enumerate() {
        let (from, to) = (ends[0], ends[1]);
        if from == to {
            continue;
        }
        samples[from..to].fill(at as i64);
        let bounds = from + at..to + at + 1;
        let flags = &mut has_predictor[from..to];
        flags.fill(true);
        let sides = [(&student, &mut *student_out), (&teacher, &mut *teacher_out)];
        for (side, (of, out)) in sides.into_iter().enumerate() {
            let (starts, ends) = out.split_at_mut(count);
            let out = (&mut starts[from..to], &mut ends[from..to]);
            let bounds = &of.bounds[bounds.clone()];
            let furthest = write_side(bounds, of.columns[at], out, flags, &mut predicted);
            reach[1 + side] = reach[1 + side].max(furthest);
        }
        predicted &= flags.iter().all(|&has| has);
        reach[0] = at as i64;
    }
    for (out, &kind) in zip(kinds_out, kinds) {
        *out = i64::from(kind);
    }
    Ok(ChunkRows {
        columns,
        has_predictor,
        reach,
        predicted,
    })
}

/// Ranges of one sequence's chunks in its row; returns the furthest end.
fn write_side(
    bounds: &[i64],
    column: i64,
    (starts, ends): (&mut [i64], &mut [i64]),
    has_predictor: &mut [bool],
    whole: &mut bool,
) -> i64 {
    let mut furthest = 0;
    let mut good = true;
    for (out, bounds) in [
        (&mut *starts, &bounds[..bounds.len() - 1]),
        (&mut *ends, &bounds[1..]),
    ] {
        for (out, &bound) in zip(out, bounds) {
            *out = bound.wrapping_add(column);
        }
    }
    for (has, &bound) in zip(has_predictor, bounds) {
        *has &= bound >= 1;
    }
    for (&start, &end) in zip(&*starts, &*ends) {
        good &= (start >= 1) & (end > start);
        furthest = furthest.max(end);
    }
    *whole &= good;
    furthest
}

pub(super) fn offsets(indptr: &[i64], length: usize) -> Result<Vec<usize>> {
    let mut previous = 0;
    let mut offsets = Vec::with_capacity(indptr.len());
    for (position, &value) in indptr.iter().enumerate() {
        let last = position + 1 == indptr.len();
        match usize::try_from(value) {
            Ok(offset)
                if offset >= previous
                    && offset <= length
                    && (position > 0 || offset == 0)
                    && (!last || offset == length) =>
            {
                offsets.push(offset);
                previous = offset;
            }
            _ => {
                return Err(Error::Indptr {
                    what: "chunk_indptr",
                    position,
                    value,
                    previous: previous as i64,
                    length,
                });
            }
        }
    }
    if offsets.is_empty() {
        return Err(shape("chunk_indptr", 0, 1));
    }
    Ok(offsets)
}

impl Bounds<'_> {
    pub(super) fn check(&self, side: &str, chunks: usize, sequences: usize) -> Result<()> {
        if self.bounds.len() != chunks + sequences {
            let what = format!("{side}_bounds");
            return Err(shape(&what, self.bounds.len(), chunks + sequences));
        }
        if self.columns.len() != sequences {
            let what = format!("{side}_columns");
            return Err(shape(&what, self.columns.len(), sequences));
        }
        Ok(())
    }
}

fn shape(what: &str, found: usize, expected: usize) -> Error {
    Error::Shape {
        what: format!("entries of {what}"),
        found,
        expected,
        remedy: "pass the arrays of one AlignmentBatch",
    }
}

/// The chunks that a loss counts, in order: of a kind in `admit`, not empty on either side, each
/// token with a predictor, and all tokens inside both masks.
///
/// # Errors
/// [`Error::Shape`] where arrays differ in length or a chunk lies outside a mask.
pub fn usable(
    chunks: &Chunks<'_>,
    student: Mask<'_>,
    teacher: Mask<'_>,
    admit: &[i64],
) -> Result<ChunkRows> {
    let count = chunks.sample.len();
    let lengths = [
        chunks.student.0.len(),
        chunks.student.1.len(),
        chunks.teacher.0.len(),
        chunks.teacher.1.len(),
        chunks.kind.len(),
        chunks.has_predictor.len(),
    ];
    if let Some(&found) = lengths.iter().find(|&&length| length != count) {
        return Err(Error::Shape {
            what: "entries of the chunks".to_owned(),
            found,
            expected: count,
            remedy: "pass arrays of one length",
        });
    }
    // Runs of chunks that are kept, and their number.
    let (mut runs, mut kept) = (Vec::<Range<usize>>::new(), 0);
    let mut reach = [0; 3];
    let mut predicted = true;
    let (student_ends, teacher_ends) = (&chunks.student.1[..count], &chunks.teacher.1[..count]);
    let (student_starts, teacher_starts) = (&chunks.student.0[..count], &chunks.teacher.0[..count]);
    let (kind, has_predictor) = (&chunks.kind[..count], &chunks.has_predictor[..count]);
    // The few kinds that there are, as bits.
    let bit = |kind: i64| {
        if (0..64).contains(&kind) {
            1 << kind
        } else {
            0_u64
        }
    };
    let admitted = admit.iter().fold(0, |bits, &kind| bits | bit(kind));
    let (of_student_mask, of_teacher_mask) = (Counted::of(student), Counted::of(teacher));
    for (at, &sample) in chunks.sample.iter().enumerate() {
        let of_student = (student_starts[at], student_ends[at]);
        let of_teacher = (teacher_starts[at], teacher_ends[at]);
        let inside = of_student_mask.holds("student", sample, of_student)?
            & of_teacher_mask.holds("teacher", sample, of_teacher)?;
        if inside & (has_predictor[at] != 0) & (admitted & bit(kind[at]) != 0) {
            kept += 1;
            match runs.last_mut() {
                Some(run) if run.end == at => run.end = at + 1,
                _ => runs.push(at..at + 1),
            }
            reach[0] = reach[0].max(sample);
            reach[1] = reach[1].max(of_student.1);
            reach[2] = reach[2].max(of_teacher.1);
            predicted &= (of_student.0 >= 1) & (of_teacher.0 >= 1);
        }
    }
    let mut columns = Vec::with_capacity(6 * kept);
    for column in [
        chunks.sample,
        student_starts,
        student_ends,
        teacher_starts,
        teacher_ends,
        kind,
    ] {
        for run in &runs {
            columns.extend_from_slice(&column[run.clone()]);
        }
    }
    Ok(ChunkRows {
        has_predictor: vec![true; kept],
        columns,
        reach,
        predicted,
    })
}

/// A mask and how many tokens before each do not count: a range is told by two of these numbers,
/// whatever its length, where a loop over its tokens is guessed wrong.
struct Counted {
    width: usize,
    rows: usize,
    gone: Vec<u32>,
}

impl Counted {
    fn of(mask: Mask<'_>) -> Self {
        let mut gone = Vec::with_capacity(mask.flags.len() + 1);
        let mut count = 0u32;
        gone.push(count);
        gone.extend(mask.flags.iter().map(|&flag| {
            // It may wrap: equal numbers are 2^32 tokens apart then.
            count = count.wrapping_add(u32::from(flag == 0));
            count
        }));
        Self {
            width: mask.width,
            rows: mask.flags.len().checked_div(mask.width).unwrap_or(0),
            gone,
        }
    }

    /// Whether a range of a row has a token, and all of them count.
    #[inline]
    fn holds(&self, side: &str, sample: i64, (start, end): (i64, i64)) -> Result<bool> {
        // Negative numbers are beyond all as unsigned ones.
        if sample as u64 >= self.rows as u64 || end as u64 > self.width as u64 || start < 0 {
            return if end <= start && sample.min(start) >= 0 {
                Ok(false)
            } else {
                Err(self.left_by(side, sample, (start, end)))
            };
        }
        if end <= start {
            return Ok(false);
        }
        let row = sample as usize * self.width;
        Ok(self.gone[row + start as usize] == self.gone[row + end as usize])
    }

    #[cold]
    fn left_by(&self, side: &str, sample: i64, (start, end): (i64, i64)) -> Error {
        Error::Shape {
            what: format!(
                "{side} tokens {start} to {end} of sample {sample}, a chunk, leave their mask, width"
            ),
            found: self.width,
            expected: usize::try_from(end).unwrap_or(0),
            remedy: "pass the masks of this batch, and chunks whose numbers are 0 or more",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MASK: Mask<'_> = Mask {
        flags: &[1; 8],
        width: 4,
    };

    fn one(sample: i64, student: (i64, i64)) -> Result<ChunkRows> {
        let chunks = Chunks {
            sample: &[sample],
            student: (&[student.0], &[student.1]),
            teacher: (&[1], &[2]),
            kind: &[0],
            has_predictor: &[1],
        };
        usable(&chunks, MASK, MASK, &[0, 4])
    }

    #[test]
    fn a_chunk_inside_its_masks_is_kept_as_it_is() -> Result<()> {
        let rows = one(1, (2, 4))?;
        assert_eq!(rows.columns, [1, 2, 4, 1, 2, 0]);
        assert_eq!((rows.reach, rows.predicted), ([1, 4, 2], true));
        Ok(())
    }

    #[test]
    fn a_chunk_with_a_token_that_does_not_count_is_left_out() -> Result<()> {
        let flags = [1, 0, 2, 1, 1, 1, 0, 1];
        let mask = Mask {
            flags: &flags,
            width: 4,
        };
        for sample in 0..2 {
            for start in 1..4 {
                for end in start + 1..=4 {
                    let chunks = Chunks {
                        sample: &[sample],
                        student: (&[start], &[end]),
                        teacher: (&[1], &[2]),
                        kind: &[0],
                        has_predictor: &[1],
                    };
                    let row = &flags[4 * sample as usize..][..4];
                    let all = row[start as usize..end as usize]
                        .iter()
                        .all(|&flag| flag != 0);
                    let found = usable(&chunks, mask, MASK, &[0])?;
                    assert_eq!(found.has_predictor.len(), usize::from(all));
                    let turned = Chunks {
                        student: chunks.teacher,
                        teacher: chunks.student,
                        ..chunks
                    };
                    assert_eq!(
                        usable(&turned, MASK, mask, &[0])?.columns.len(),
                        6 * usize::from(all)
                    );
                }
            }
        }
        Ok(())
    }

    #[test]
    fn a_chunk_without_tokens_is_left_out() -> Result<()> {
        for empty in [(2, 2), (3, 2), (4, 4), (9, 9)] {
            assert!(one(1, empty)?.has_predictor.is_empty(), "{empty:?}");
        }
        Ok(())
    }

    #[test]
    fn a_chunk_outside_its_mask_is_refused() {
        for (sample, range) in [
            (2, (1, 2)),
            (-1, (1, 2)),
            (0, (-1, 2)),
            (0, (3, 5)),
            (0, (i64::MIN, i64::MAX)),
        ] {
            let found = one(sample, range);
            assert!(
                matches!(found, Err(Error::Shape { .. })),
                "{sample} {range:?}"
            );
        }
    }

    #[test]
    fn offsets_that_do_not_rise_from_0_to_the_chunks_are_refused() {
        let side = Bounds {
            bounds: &[0, 1, 0, 1],
            columns: &[0, 0],
        };
        for indptr in [&[0, 1][..], &[1, 1, 2], &[0, 2, 1], &[0, 3, 2], &[]] {
            assert!(flatten(side, side, &[0, 0], indptr).is_err(), "{indptr:?}");
        }
        assert!(flatten(side, side, &[0, 0], &[0, 1, 2]).is_ok());
    }
}
