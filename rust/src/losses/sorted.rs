//! The L1 distance of rows of probabilities, each sorted by falling value, without sorting them.
//!
//! It is the sum over ranks of `s * p - s * q`, `s` the sign of the difference at that rank. Values
//! are counted by the upper bits of their floats. Where a bucket's values of one side rank wholly
//! below those that the other side has in higher buckets, all its ranks have one sign, whatever
//! their order; only in the others are ranks looked at.

use super::rows::{Gradient, Rows, by_tasks, length, task_by_processor};
use crate::error::Result;
use crate::parallel::Threads;

/// What [`task_by_processor`] calls the rows' type.
type T = f32;

/// Bits of a float below its bucket: 128 buckets for each power of two.
const SHIFT: u32 = 16;
/// A float that is not below 0 has no upper bit.
const BUCKETS: usize = 1 << (31 - SHIFT);
const INFINITE: u32 = f32::INFINITY.to_bits();
/// A slot is the bits of a sign, or else a place; these are below the bits of 1 and of -1.
const PLUS: u32 = 1.0f32.to_bits();
const MINUS: u32 = (-1.0f32).to_bits();
/// Buckets of a part by eight bits more, and the least part that is worth them.
const FINER: usize = 256;
const WORTH: usize = 192;

/// One call: the distances of the rows of two matrices.
pub struct SortedL1<'a> {
    /// Probabilities.
    pub student: Rows<'a, f32>,
    /// Those of as many rows, of any width.
    pub teacher: Rows<'a, f32>,
}

impl SortedL1<'_> {
    /// The distance of each row; NaN where a value is below 0, infinite or no number, or is -0:
    /// nothing that counts was written then.
    ///
    /// # Arguments
    /// * `gradient`: like the student's rows; each value's sign is written, 0 at equality. Of equal
    ///   values the first has the highest rank.
    ///
    /// # Errors
    /// [`crate::Error::Shape`] where the arrays do not fit.
    pub fn run(&self, gradient: Option<&mut [f32]>, threads: &Threads<'_>) -> Result<Vec<f64>> {
        let count = self.student.index.len();
        self.student.check("the student", 0, count)?;
        self.teacher.check("the teacher", 0, count)?;
        for width in [self.student.width, self.teacher.width] {
            length("columns below 2^29", width.min(1 << 29), width)?;
        }
        let gradient = gradient
            .map(|flat| Gradient::of(flat, false, &self.student))
            .transpose()?;
        by_tasks(count, threads, |rows| self.task(rows, gradient.as_ref()))
    }

    task_by_processor!(f64);

    #[inline(always)]
    fn task_in(&self, rows: std::ops::Range<usize>, gradient: Option<&Gradient<T>>) -> Vec<f64> {
        let mut room = Room::default();
        let mut found = Vec::with_capacity(rows.len());
        for at in rows {
            // SAFETY: `Gradient::of` has seen that a row is named once.
            let signs = gradient.map(|gradient| unsafe { gradient.row(&self.student, at).0 });
            let student = self.student.row(at, self.student.width);
            let teacher = self.teacher.row(at, self.teacher.width);
            let distance = match signs {
                Some(signs) => room.distance::<true>(student, teacher, signs),
                None => room.distance::<false>(student, teacher, &mut []),
            };
            found.push(distance.unwrap_or(f64::NAN));
        }
        found
    }
}

/// What a row needs, kept for the next.
#[derive(Default)]
struct Room {
    student: Side,
    teacher: Side,
    descent: Descent,
}

#[derive(Default)]
struct Side {
    /// All 0 between two rows.
    counts: Vec<u32>,
    slots: Vec<u32>,
    /// The values of open buckets, bucket by bucket in the row's order: [`entry`].
    entries: Vec<u64>,
    spare: Vec<u64>,
}

/// A bucket whose ranks have several signs.
struct Open {
    /// Ranks of the student's first value there less that of the teacher's.
    lead: i64,
    /// Values of the student and the teacher.
    counts: (usize, usize),
}

/// Buckets of both sides from the highest down: which of them have one sign.
#[derive(Default)]
struct Descent {
    /// Values of the student and the teacher above the next bucket, up to a number for both.
    above: (u32, u32),
    /// Those in open buckets.
    sizes: (u32, u32),
    open: Vec<Open>,
}

impl Descent {
    #[inline(always)]
    fn begin(&mut self, above: (u32, u32)) {
        (self.above, self.sizes) = (above, (0, 0));
        self.open.clear();
    }

    /// The slots of the next bucket: a sign, or the places of its first values.
    #[inline(always)]
    fn slots(&mut self, counts: (u32, u32), has_sign: bool) -> (u32, u32) {
        let slots = match sign(self.above, counts) {
            Some(sign) if has_sign => (sign, sign),
            _ => {
                let slots = self.sizes;
                self.sizes = (slots.0 + counts.0, slots.1 + counts.1);
                self.open.push(Open {
                    lead: i64::from(self.above.0) - i64::from(self.above.1),
                    counts: (counts.0 as usize, counts.1 as usize),
                });
                slots
            }
        };
        self.above = (self.above.0 + counts.0, self.above.1 + counts.1);
        slots
    }

    /// The sum over the entries of the open buckets, see [`ranks`].
    #[inline(always)]
    fn ranks<const SIGNS: bool>(
        &self,
        mut entries: (&mut [u64], &mut [u64]),
        mut spare: (&mut [u64], &mut [u64]),
        bits: u32,
        signs: &mut [f32],
    ) -> f64 {
        let mut total = 0.0;
        for open in &self.open {
            let part = (
                split(&mut entries.0, open.counts.0),
                split(&mut entries.1, open.counts.1),
            );
            let room = (
                split(&mut spare.0, open.counts.0),
                split(&mut spare.1, open.counts.1),
            );
            total += ranks::<SIGNS>(part, room, open.lead, bits, signs);
        }
        total
    }
}

/// The order of these is by falling value, then by place.
#[inline(always)]
fn entry(bits: u32, place: usize) -> u64 {
    u64::from(!bits) << 32 | place as u64
}

#[inline(always)]
fn value(entry: u64) -> f32 {
    f32::from_bits(!((entry >> 32) as u32))
}

/// The sign of a bucket's ranks, by what both sides have above it and in it; `None` for several.
#[inline(always)]
fn sign(above: (u32, u32), counts: (u32, u32)) -> Option<u32> {
    if above.1 + counts.1 <= above.0 {
        Some(PLUS)
    } else if above.0 + counts.0 <= above.1 {
        Some(MINUS)
    } else {
        None
    }
}

impl Room {
    #[inline(always)]
    fn distance<const SIGNS: bool>(
        &mut self,
        student: &[f32],
        teacher: &[f32],
        signs: &mut [f32],
    ) -> Option<f64> {
        let own = self.student.count(student)?;
        let Some(other) = self.teacher.count(teacher) else {
            self.student.counts.fill(0);
            return None;
        };
        let sizes = self.settle(own.low.min(other.low), own.top.max(other.top));
        self.student.entries.resize(sizes.0, 0);
        self.teacher.entries.resize(sizes.1, 0);
        // Zeros rank last, the first of them beside what the teacher has more above 0.
        let more = (teacher.len() - other.zeros).saturating_sub(student.len() - own.zeros);
        let mut total = self.student.pass::<SIGNS>(student, signs, more);
        total -= self.teacher.pass::<false>(teacher, &mut [], 0);
        self.student.spare.resize(sizes.0, 0);
        self.teacher.spare.resize(sizes.1, 0);
        let entries = (&mut *self.student.entries, &mut *self.teacher.entries);
        let spare = (&mut *self.student.spare, &mut *self.teacher.spare);
        total += self.descent.ranks::<SIGNS>(entries, spare, SHIFT, signs);
        Some(total)
    }

    /// The slots of the buckets between two, whose counts are taken, and how many values each side has in open ones.
    #[inline(always)]
    fn settle(&mut self, low: u32, top: u32) -> (usize, usize) {
        self.descent.begin((0, 0));
        for bucket in (low.min(top)..=top).rev().map(|bits| bits as usize) {
            let counts = (
                std::mem::take(&mut self.student.counts[bucket]),
                std::mem::take(&mut self.teacher.counts[bucket]),
            );
            // The last has the zeros, which no sign is kept for.
            if counts == (0, 0) && bucket > 0 {
                continue;
            }
            let slots = self.descent.slots(counts, bucket > 0);
            self.student.slots[bucket] = slots.0;
            self.teacher.slots[bucket] = slots.1;
        }
        let sizes = self.descent.sizes;
        (sizes.0 as usize, sizes.1 as usize)
    }
}

/// What a row's counting finds: its lowest and highest bucket, and its zeros.
struct Span {
    low: u32,
    top: u32,
    zeros: usize,
}

impl Side {
    /// Counts values above 0 by bucket; `None` where one is no probability.
    #[inline(always)]
    fn count(&mut self, values: &[f32]) -> Option<Span> {
        self.counts.resize(BUCKETS, 0);
        self.slots.resize(BUCKETS, 0);
        let counts = &mut self.counts[..BUCKETS];
        let (mut low, mut top, mut zeros) = (u32::MAX, 0, 0);
        for part in values.chunks(4096) {
            let mut more = 0;
            for bits in part.iter().map(|value| value.to_bits()) {
                low = low.min(bits);
                top = top.max(bits);
                more += u32::from(bits == 0);
            }
            zeros += more;
            if top >= INFINITE {
                counts.fill(0);
                return None;
            }
            for value in part {
                counts[(value.to_bits() >> SHIFT) as usize & (BUCKETS - 1)] += 1;
            }
        }
        counts[0] -= zeros;
        Some(Span {
            low: low >> SHIFT,
            top: top >> SHIFT,
            zeros: zeros as usize,
        })
    }

    /// The sum of values by their sign, which is written; those of open buckets become entries.
    /// The first `more` zeros have the sign -1.
    #[inline(always)]
    fn pass<const SIGNS: bool>(
        &mut self,
        values: &[f32],
        signs: &mut [f32],
        mut more: usize,
    ) -> f64 {
        const PART: usize = 64;
        let slots = &mut self.slots[..BUCKETS];
        let mut lanes = [0.0f64; 8];
        let mut found = [0u32; PART];
        for (at, part) in values.chunks(PART).enumerate() {
            let found = &mut found[..part.len()];
            let mut least = u32::MAX;
            for (slot, value) in found.iter_mut().zip(part) {
                *slot = slots[(value.to_bits() >> SHIFT) as usize & (BUCKETS - 1)];
                least = least.min(*slot);
            }
            if least < PLUS {
                for (within, (slot, value)) in found.iter_mut().zip(part).enumerate() {
                    if *slot >= PLUS {
                        continue;
                    }
                    let bits = value.to_bits();
                    *slot = 0;
                    if bits == 0 {
                        if more > 0 {
                            more -= 1;
                            *slot = MINUS;
                        }
                        continue;
                    }
                    let place = &mut slots[(bits >> SHIFT) as usize & (BUCKETS - 1)];
                    self.entries[*place as usize] = entry(bits, at * PART + within);
                    *place += 1;
                }
            }
            if SIGNS {
                for (sign, slot) in signs[at * PART..].iter_mut().zip(found.iter()) {
                    *sign = f32::from_bits(*slot);
                }
            }
            let (slots, last) = found.as_chunks::<8>();
            let (values, rest) = part.as_chunks::<8>();
            for (slots, values) in slots.iter().zip(values) {
                for ((lane, slot), value) in lanes.iter_mut().zip(slots).zip(values) {
                    *lane += f64::from(f32::from_bits(*slot) * value);
                }
            }
            for (slot, value) in last.iter().zip(rest) {
                lanes[0] += f64::from(f32::from_bits(*slot) * value);
            }
        }
        lanes.iter().sum()
    }
}

/// The first values of a slice, which is left with the others.
fn split<'a>(rest: &mut &'a mut [u64], count: usize) -> &'a mut [u64] {
    let (part, others) = std::mem::take(rest).split_at_mut(count);
    *rest = others;
    part
}

/// The sum over the entries of a bucket, whose floats differ in the last `bits` bits alone; in the
/// row's order each. As [`Open`] says, `lead`.
#[inline(always)]
fn ranks<const SIGNS: bool>(
    (student, teacher): (&mut [u64], &mut [u64]),
    (spare, other_spare): (&mut [u64], &mut [u64]),
    lead: i64,
    bits: u32,
    signs: &mut [f32],
) -> f64 {
    if bits > 0 && student.len() + teacher.len() >= WORTH {
        return finer::<SIGNS>(
            (student, teacher),
            (spare, other_spare),
            lead,
            bits - 8,
            signs,
        );
    }
    if bits > 0 {
        student.sort_unstable();
        teacher.sort_unstable();
    }
    let mut total = 0.0;
    for (rank, &own) in (lead..).zip(student.iter()) {
        let sign = match usize::try_from(rank) {
            Err(_) => -1.0,
            Ok(rank) => match teacher.get(rank) {
                None => 1.0,
                Some(&other) => signum(value(own), value(other)),
            },
        };
        total += f64::from(sign * value(own));
        if SIGNS {
            signs[own as u32 as usize] = sign;
        }
    }
    for (rank, &own) in (-lead..).zip(teacher.iter()) {
        let sign = match usize::try_from(rank) {
            Err(_) => 1.0,
            Ok(rank) => match student.get(rank) {
                None => -1.0,
                Some(&other) => signum(value(other), value(own)),
            },
        };
        total -= f64::from(sign * value(own));
    }
    total
}

#[inline(always)]
fn signum(a: f32, b: f32) -> f32 {
    f32::from(i8::from(a > b) - i8::from(a < b))
}

/// The same by buckets of the eight bits above the last `bits`.
#[inline(never)]
fn finer<const SIGNS: bool>(
    (student, teacher): (&mut [u64], &mut [u64]),
    (spare, other_spare): (&mut [u64], &mut [u64]),
    lead: i64,
    bits: u32,
    signs: &mut [f32],
) -> f64 {
    let bucket = |entry: u64| (entry >> (32 + bits)) as usize & (FINER - 1);
    let (mut counts, mut others) = ([0u32; FINER], [0u32; FINER]);
    for &own in student.iter() {
        counts[bucket(own)] += 1;
    }
    for &other in teacher.iter() {
        others[bucket(other)] += 1;
    }
    let (mut slots, mut other_slots) = ([0; FINER], [0; FINER]);
    let mut descent = Descent::default();
    // As counted from a rank that both sides are above.
    descent.begin((lead.max(0) as u32, (-lead).max(0) as u32));
    for at in 0..FINER {
        (slots[at], other_slots[at]) = descent.slots((counts[at], others[at]), true);
    }
    let mut total = 0.0;
    for &own in student.iter() {
        let slot = &mut slots[bucket(own)];
        if *slot >= PLUS {
            let sign = f32::from_bits(*slot);
            total += f64::from(sign * value(own));
            if SIGNS {
                signs[own as u32 as usize] = sign;
            }
        } else {
            spare[*slot as usize] = own;
            *slot += 1;
        }
    }
    for &other in teacher.iter() {
        let slot = &mut other_slots[bucket(other)];
        if *slot >= PLUS {
            total -= f64::from(f32::from_bits(*slot) * value(other));
        } else {
            other_spare[*slot as usize] = other;
            *slot += 1;
        }
    }
    total + descent.ranks::<SIGNS>((spare, other_spare), (student, teacher), bits, signs)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// By whole sorts, in doubles: the distance and the signs, of equal values the first above.
    fn by_sorting(student: &[f32], teacher: &[f32]) -> (f64, Vec<f32>) {
        let falling = |values: &[f32]| {
            let mut order: Vec<usize> = (0..values.len()).collect();
            order.sort_by(|&a, &b| values[b].total_cmp(&values[a]));
            order
        };
        let (own, other) = (falling(student), falling(teacher));
        let (mut distance, mut signs) = (0.0, vec![0.0; student.len()]);
        for rank in 0..student.len().max(teacher.len()) {
            let p = own.get(rank).map_or(0.0, |&at| student[at]);
            let q = other.get(rank).map_or(0.0, |&at| teacher[at]);
            distance += (f64::from(p) - f64::from(q)).abs();
            if let Some(&at) = own.get(rank) {
                signs[at] = signum(p, q);
            }
        }
        (distance, signs)
    }

    fn check(student: &[f32], teacher: &[f32]) -> Result<()> {
        let (wanted, signs) = by_sorting(student, teacher);
        let call = SortedL1 {
            student: Rows {
                flat: student,
                width: student.len(),
                index: &[0],
            },
            teacher: Rows {
                flat: teacher,
                width: teacher.len(),
                index: &[0],
            },
        };
        let mut written = vec![7.0; student.len()];
        let found = call.run(Some(&mut written), &Threads::one())?[0];
        let scale: f64 = student.iter().chain(teacher).copied().map(f64::from).sum();
        assert!((found - wanted).abs() <= 1e-13 * scale, "{found} {wanted}");
        assert_eq!(written, signs);
        assert_eq!(call.run(None, &Threads::one())?[0], found);
        Ok(())
    }

    proptest! {
        #[test]
        fn distance_and_signs_are_those_of_whole_sorts(
            student in prop::collection::vec((0u32..6, 0u32..4), 1..70),
            teacher in prop::collection::vec((0u32..6, 0u32..4), 1..70),
            step in prop::sample::select(vec![1u32, 1 << 8, 1 << 16, 1 << 23]),
            from in prop::sample::select(vec![0u32, 1, 0x0000_fff0, 0x3c00_0000]),
        ) {
            let values = |steps: &[(u32, u32)]| -> Vec<f32> {
                steps
                    .iter()
                    .map(|&(a, b)| f32::from_bits(if b == 3 { 0 } else { from + a * step + b }))
                    .collect()
            };
            check(&values(&student), &values(&teacher))?;
        }

        /// Long rows, so that parts are cut finer; near one value or many.
        #[test]
        fn so_are_those_of_long_rows(
            seed in any::<u32>(),
            sizes in (1usize..3000, 1usize..3000),
            spread in prop::sample::select(vec![1u32, 40, 1 << 10, 1 << 18, 1 << 26, 0x3f00_0000]),
            near in any::<bool>(),
        ) {
            let mut state = seed;
            let mut values = |count: usize| -> Vec<f32> {
                (0..count)
                    .map(|_| {
                        state = state.wrapping_mul(747_796_405).wrapping_add(2_891_336_453);
                        let mixed = (state >> 7) ^ state;
                        f32::from_bits((if near { 0x3700_0000 } else { 0 }) + mixed % spread)
                    })
                    .collect()
            };
            let (student, teacher) = (values(sizes.0), values(sizes.1));
            check(&student, &teacher)?;
            check(&student, &student)?;
        }
    }

    #[test]
    fn rows_of_several_threads_are_those_of_one() -> Result<()> {
        let flat: Vec<f32> = (0..9 * 500u32).map(|i| (i * 7919 % 1013) as f32).collect();
        let index: Vec<i64> = (0..9).collect();
        let call = SortedL1 {
            student: Rows {
                flat: &flat,
                width: 500,
                index: &index,
            },
            teacher: Rows {
                flat: &flat[500..],
                width: 400,
                index: &index,
            },
        };
        let (mut one, mut many) = (vec![0.0; flat.len()], vec![0.0; flat.len()]);
        let alone = call.run(Some(&mut one), &Threads::one())?;
        assert_eq!(call.run(Some(&mut many), &Threads::uncapped(3))?, alone);
        assert_eq!(one, many);
        Ok(())
    }

    #[test]
    fn what_is_no_probability_has_no_distance_and_arrays_must_fit() -> Result<()> {
        for bad in [f32::NAN, f32::INFINITY, -0.5, -0.0] {
            for flat in [[[0.5, bad], [0.5, 0.5]], [[0.5, 0.5], [0.5, bad]]] {
                let side = |row: usize| Rows {
                    flat: &flat[row],
                    width: 2,
                    index: &[0],
                };
                let call = SortedL1 {
                    student: side(0),
                    teacher: side(1),
                };
                assert!(call.run(None, &Threads::one())?[0].is_nan());
                assert!(call.run(Some(&mut [0.0]), &Threads::one()).is_err());
            }
        }
        Ok(())
    }
}
