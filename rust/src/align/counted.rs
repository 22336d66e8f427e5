//! The usable chunks of a batch of alignments, in one pass over their bounds.

use std::ops::Range;

use super::rows::{Bounds, ChunkRows, Mask, offsets};

/// What [`flatten`](super::flatten) and then [`usable`](super::usable) give, without the chunks
/// that do not count; `None` where these two have to look: bounds that fall, arrays that do not fit
/// together, and chunks that leave their mask.
///
/// ```
/// use xtoken::align::{Bounds, Mask, usable_of};
///
/// // One sequence of 1:1, 2:1 and 1:1 tokens, of which the student's last does not count.
/// let student = Bounds { bounds: &[0, 1, 3, 4], columns: &[0] };
/// let teacher = Bounds { bounds: &[0, 1, 2, 3], columns: &[0] };
/// let masks = [Mask { flags: &[1, 1, 1, 0], width: 4 }, Mask { flags: &[1; 3], width: 3 }];
/// let rows = usable_of([student, teacher], &[0, 0, 0], &[0, 3], masks, &[0]).unwrap();
/// assert_eq!(rows.columns, [0, 1, 3, 1, 2, 0]);
/// ```
pub fn usable_of(
    sides: [Bounds<'_>; 2],
    kinds: &[u8],
    chunk_indptr: &[i64],
    masks: [Mask<'_>; 2],
    admit: &[i64],
) -> Option<ChunkRows> {
    let offsets = offsets(chunk_indptr, kinds.len()).ok()?;
    for side in &sides {
        side.check("", kinds.len(), offsets.len() - 1).ok()?;
    }
    let mut admitted = [0; 256];
    for &kind in admit.iter().filter(|kind| (0..64).contains(*kind)) {
        admitted[kind as usize] = 1;
    }
    let mut kept = Kept::default();
    let mut flags = Vec::new();
    let (mut of_student, mut both) = (Vec::new(), Vec::new());
    for (sample, ends) in offsets.windows(2).enumerate() {
        let (from, to) = (ends[0], ends[1]);
        if from == to {
            continue;
        }
        let [student, teacher] =
            [0, 1].map(|side| Sequence::of(sides[side], from..to, sample, masks[side]));
        let (student, teacher) = (student?, teacher?);
        good(&mut flags, &kinds[from..to], &student, &teacher, &admitted)?;
        // From the first chunk on whose tokens all follow a token of the sequence.
        let first = student.before(0, 1).max(teacher.before(0, 1));
        student.inside(first, &mut of_student);
        teacher.inside(first, &mut both);
        intersect(&of_student, &mut both);
        for span in &both {
            for run in runs(&flags[span.clone()]) {
                let run = span.start + run.start..span.start + run.end;
                kept.add(sample, from, run, [&student, &teacher]);
            }
        }
    }
    Some(kept.rows(sides, kinds))
}

/// The bounds and the row of the mask of one side of a sequence.
struct Sequence<'a> {
    bounds: &'a [i64],
    column: i64,
    mask: &'a [u8],
}

impl<'a> Sequence<'a> {
    /// `None` where its chunks do not lie in the row, given that its bounds rise.
    fn of(
        side: Bounds<'a>,
        chunks: Range<usize>,
        sample: usize,
        mask: Mask<'a>,
    ) -> Option<Sequence<'a>> {
        let bounds = &side.bounds[chunks.start + sample..=chunks.end + sample];
        let column = side.columns[sample];
        let start = bounds[0].checked_add(column)?;
        let end = bounds[bounds.len() - 1].checked_add(column)?;
        let row = sample.checked_mul(mask.width)?;
        let mask = mask.flags.get(row..row.checked_add(mask.width)?)?;
        // Of rows without a token nobody knows how many there are.
        let inside = start >= 0 && end <= mask.len() as i64 && !mask.is_empty();
        inside.then_some(Sequence {
            bounds,
            column,
            mask,
        })
    }

    /// The first bound from the one at `at` on that is not below `value`.
    fn before(&self, at: usize, value: i64) -> usize {
        // The next one is most often near.
        let mut step = 1;
        while at + step < self.bounds.len() && self.bounds[at + step] < value {
            step *= 2;
        }
        let near = at + step / 2..self.bounds.len().min(at + step + 1);
        near.start + self.bounds[near].partition_point(|&bound| bound < value)
    }

    /// The chunks from `first` on that lie inside a run of tokens that count, as ranges.
    fn inside(&self, first: usize, found: &mut Vec<Range<usize>>) {
        found.clear();
        let last = self.bounds.len() - 1;
        let mut at = first.min(last);
        for run in runs(self.mask) {
            let (start, end) = (run.start as i64, run.end as i64);
            let from = self.before(at, start - self.column);
            if from > last {
                break;
            }
            let past = end - self.column + 1;
            let to = if self.bounds[last] < past {
                last
            } else {
                self.before(from, past).max(1) - 1
            };
            if from < to {
                found.push(from..to);
            }
            at = to.max(from);
        }
    }

    fn start(&self, chunk: usize) -> i64 {
        self.bounds[chunk] + self.column
    }
}

/// Which chunks are of an admitted kind and have a token on both sides; `None` where bounds fall.
fn good(
    flags: &mut Vec<u8>,
    kinds: &[u8],
    student: &Sequence<'_>,
    teacher: &Sequence<'_>,
    admitted: &[u8; 256],
) -> Option<()> {
    let (student, teacher) = (student.bounds, teacher.bounds);
    let count = kinds.len();
    let (student, teacher) = (&student[..=count], &teacher[..=count]);
    flags.clear();
    let mut rising = true;
    flags.extend((0..count).map(|chunk| {
        let (start, end) = (student[chunk], student[chunk + 1]);
        let (teacher_start, teacher_end) = (teacher[chunk], teacher[chunk + 1]);
        rising &= (start <= end) & (teacher_start <= teacher_end);
        let tokens = (start < end) & (teacher_start < teacher_end);
        admitted[usize::from(kinds[chunk])] & u8::from(tokens)
    }));
    rising.then_some(())
}

/// What lies in a range of both; both rise.
fn intersect(one: &[Range<usize>], other: &mut Vec<Range<usize>>) {
    let mut found = Vec::new();
    let (mut at, mut other_at) = (0, 0);
    while let (Some(left), Some(right)) = (one.get(at), other.get(other_at)) {
        let both = left.start.max(right.start)..left.end.min(right.end);
        if !both.is_empty() {
            found.push(both);
        }
        if left.end <= right.end {
            at += 1;
        } else {
            other_at += 1;
        }
    }
    *other = found;
}

/// The runs of bytes that are not zero.
fn runs(flags: &[u8]) -> impl Iterator<Item = Range<usize>> + '_ {
    let mut at = 0;
    std::iter::from_fn(move || {
        let start = at + leading(&flags[at..], |word| word == 0, |flag| flag == 0);
        at = start + leading(&flags[start..], no_zero_byte, |flag| flag != 0);
        (start < at).then_some(start..at)
    })
}

/// How many bytes at the beginning are as asked, eight at a time where all of these are.
fn leading(flags: &[u8], all: impl Fn(u64) -> bool, one: impl Fn(u8) -> bool) -> usize {
    let (words, _) = flags.as_chunks();
    let whole = words
        .iter()
        .take_while(|&&word| all(u64::from_ne_bytes(word)))
        .count();
    let rest = flags[8 * whole..].iter().take_while(|&&flag| one(flag));
    8 * whole + rest.count()
}

fn no_zero_byte(word: u64) -> bool {
    const ONES: u64 = u64::MAX / 0xff;
    word.wrapping_sub(ONES) & !word & (ONES << 7) == 0
}

/// Runs of chunks that count: the sample, and the chunks of the batch.
#[derive(Default)]
struct Kept {
    runs: Vec<(usize, Range<usize>)>,
    count: usize,
    reach: [i64; 3],
    unpredicted: bool,
}

impl Kept {
    /// Takes chunks of a sequence whose first one is the batch's chunk `from`.
    fn add(&mut self, sample: usize, from: usize, run: Range<usize>, sides: [&Sequence<'_>; 2]) {
        self.count += run.len();
        self.reach[0] = sample as i64;
        for (reach, side) in self.reach[1..].iter_mut().zip(sides) {
            *reach = side.start(run.end).max(*reach);
            self.unpredicted |= side.start(run.start) < 1;
        }
        self.runs.push((sample, from + run.start..from + run.end));
    }

    fn rows(self, sides: [Bounds<'_>; 2], kinds: &[u8]) -> ChunkRows {
        let mut columns = Vec::with_capacity(6 * self.count);
        for (sample, run) in &self.runs {
            columns.extend(std::iter::repeat_n(*sample as i64, run.len()));
        }
        for side in sides {
            for end in 0..2 {
                for (sample, run) in &self.runs {
                    let column = side.columns[*sample];
                    let bounds = &side.bounds[run.start + sample + end..run.end + sample + end];
                    columns.extend(bounds.iter().map(|&bound| bound + column));
                }
            }
        }
        for (_, run) in &self.runs {
            columns.extend(kinds[run.clone()].iter().map(|&kind| i64::from(kind)));
        }
        ChunkRows {
            columns,
            has_predictor: vec![true; self.count],
            reach: self.reach,
            predicted: !self.unpredicted,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::rows::{Chunks, flatten, usable};
    use super::*;

    /// What the two steps give, or that they refuse.
    fn in_two_steps(
        sides: [Bounds<'_>; 2],
        kinds: &[u8],
        indptr: &[i64],
        masks: [Mask<'_>; 2],
        admit: &[i64],
    ) -> Option<ChunkRows> {
        let all = flatten(sides[0], sides[1], kinds, indptr).ok()?;
        let count = all.has_predictor.len();
        let column = |at: usize| &all.columns[at * count..(at + 1) * count];
        let has_predictor: Vec<u8> = all.has_predictor.iter().map(|&has| has.into()).collect();
        let chunks = Chunks {
            sample: column(0),
            student: (column(1), column(2)),
            teacher: (column(3), column(4)),
            kind: column(5),
            has_predictor: &has_predictor,
        };
        usable(&chunks, masks[0], masks[1], admit).ok()
    }

    /// Tokens of each chunk on both sides, and its kind.
    fn sequence() -> impl Strategy<Value = Vec<(i64, i64, u8)>> {
        let size = prop_oneof![8 => Just(1_i64), 1 => Just(0), 2 => 0..4_i64, 1 => Just(-1)];
        let usual = prop_oneof![8 => Just(1_i64), 1 => Just(0), 2 => 0..4_i64];
        let chunk = (
            usual.clone(),
            usual,
            prop_oneof![9 => Just(0), 3 => 0..6_u8],
        );
        let falls = (size.clone(), size, Just(0));
        prop_oneof![
            9 => prop::collection::vec(chunk, 0..50),
            1 => prop::collection::vec(falls, 0..50),
        ]
    }

    proptest! {
        #[test]
        fn one_pass_gives_what_two_steps_give(
            sequences in prop::collection::vec((sequence(), 0..3_i64, -1..3_i64), 0..4),
            bytes in prop::collection::vec(prop_oneof![12 => Just(1_u8), 1 => Just(0), 1 => any::<u8>()], 512),
            widths in [0..70_usize, 0..70_usize],
            rows in 0..5_usize,
            admit in prop::collection::vec(-1..70_i64, 0..3),
        ) {
            let mut bounds = [vec![], vec![]];
            let (mut kinds, mut indptr) = (vec![], vec![0]);
            for (chunks, _, _) in &sequences {
                for (side, bounds) in bounds.iter_mut().enumerate() {
                    let mut at = 0;
                    bounds.push(at);
                    for &(student, teacher, _) in chunks {
                        at += [student, teacher][side];
                        bounds.push(at);
                    }
                }
                kinds.extend(chunks.iter().map(|chunk| chunk.2));
                indptr.push(kinds.len() as i64);
            }
            let columns = [0, 1].map(|side| {
                sequences.iter().map(|of| [of.1, of.2][side]).collect::<Vec<_>>()
            });
            let sides = [0, 1].map(|side| Bounds { bounds: &bounds[side], columns: &columns[side] });
            let flags = widths.map(|width| bytes.iter().cycle().copied().take(rows * width).collect::<Vec<u8>>());
            let masks = [0, 1].map(|side| Mask { flags: &flags[side], width: widths[side] });
            let mut admit = admit;
            admit.push(0);
            let found = usable_of(sides, &kinds, &indptr, masks, &admit);
            let fits = (0..sequences.len()).all(|at| {
                let chunks = indptr[at] as usize + at..=indptr[at + 1] as usize + at;
                let inside = |side: usize| {
                    let (own, column) = (&bounds[side][chunks.clone()], columns[side][at]);
                    let end = own[own.len() - 1] + column;
                    own.is_sorted() && column >= 0 && end <= widths[side] as i64
                };
                let empty = chunks.start() == chunks.end();
                empty || at < rows && inside(0) && inside(1) && widths[0].min(widths[1]) > 0
            });
            prop_assert_eq!(found.is_some(), fits);
            if let Some(found) = found {
                let wanted = in_two_steps(sides, &kinds, &indptr, masks, &admit);
                prop_assert_eq!(Some(found), wanted);
            }
        }
    }

    #[test]
    fn bounds_that_rise_inside_their_masks_take_one_pass() {
        let side = Bounds {
            bounds: &[0, 1, 3, 3, 0, 2],
            columns: &[0, 1],
        };
        let mask = Mask {
            flags: &[1; 6],
            width: 3,
        };
        let rows = |side, mask| usable_of([side, side], &[0; 4], &[0, 3, 4], [mask, mask], &[0]);
        let found = rows(side, mask);
        assert_eq!(found.map(|rows| rows.columns), Some(vec![0, 1, 3, 1, 3, 0]));
        for (bounds, columns, flags) in [
            (&[0, 1, 3, 2, 0, 2], &[0, 1], &[1; 6][..]),
            (&[0, 1, 3, 3, 0, 3], &[0, 1], &[1; 6]),
            (&[0, 1, 3, 3, 0, 2], &[0, -1], &[1; 6]),
            (&[0, 1, 3, 3, 0, 2], &[0, i64::MAX], &[1; 6]),
            (&[0, 1, 3, 3, 0, 2], &[0, 1], &[1; 5]),
        ] {
            let mask = Mask { flags, width: 3 };
            assert_eq!(rows(Bounds { bounds, columns }, mask), None, "{bounds:?}");
        }
    }

    #[test]
    fn runs_end_where_a_byte_is_zero() {
        for length in 0..20 {
            for bits in [0_u32, 1, 0x5_5555, 0xf_ffff, 0xf_fefe, 0x8_0100, 0x3_ff00] {
                let flags: Vec<u8> = (0..length)
                    .map(|at| {
                        if bits >> at & 1 == 1 {
                            [1, 0x80, 0xff][at % 3]
                        } else {
                            0
                        }
                    })
                    .collect();
                let found: Vec<usize> = runs(&flags).flatten().collect();
                let wanted: Vec<usize> = (0..length).filter(|&at| flags[at] != 0).collect();
                assert_eq!(found, wanted);
                for run in runs(&flags) {
                    assert!(run.end == length || flags[run.end] == 0);
                    assert!(run.start == 0 || flags[run.start - 1] == 0);
                }
            }
        }
    }
}
