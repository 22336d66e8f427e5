//! The teacher's predictions of one example, cut to the columns that count.

use std::f64::consts::LN_2;

use super::NONE;
use super::pair::ask_for;
use crate::error::{Error, Result};

/// Natural log-probabilities after each teacher token: row `p` predicts token `p + 1`.
#[derive(Debug, Clone, Copy)]
pub struct Predictions<'a> {
    /// The teacher ids of each row, -1 where there is none; none for whole rows, column by column.
    pub ids: Option<&'a [i64]>,
    /// As many as `ids`.
    pub log_probs: &'a [f32],
    /// Columns of a row.
    pub width: usize,
}

impl Predictions<'_> {
    /// Number of rows.
    #[must_use]
    pub fn len(&self) -> usize {
        self.log_probs.len().checked_div(self.width).unwrap_or(0)
    }

    /// Whether there is no row.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    pub(super) fn check(&self, tokens: usize, vocab_size: usize) -> Result<()> {
        if self.len() > tokens || self.width * self.len() != self.log_probs.len() {
            return Err(Error::Shape {
                what: "rows of the teacher's predictions".to_owned(),
                found: self.len(),
                expected: tokens,
                remedy: "pass one row per teacher token",
            });
        }
        // Those that count are looked at as they are read.
        let Some(ids) = self.ids else {
            return if self.width >= vocab_size || self.is_empty() {
                Ok(())
            } else {
                Err(Error::Shape {
                    what: "columns of the teacher's predictions".to_owned(),
                    found: self.width,
                    expected: vocab_size,
                    remedy: "pass the ids of the columns beside them",
                })
            };
        };
        if ids.len() != self.log_probs.len() {
            return Err(Error::Shape {
                what: "ids of the teacher's predictions".to_owned(),
                found: ids.len(),
                expected: self.log_probs.len(),
                remedy: "pass one id a log-probability",
            });
        }
        Ok(())
    }
}

/// The columns that count of each row.
#[derive(Debug, Default)]
pub(super) struct Rows {
    /// As many as are used, and some more.
    ids: Vec<u32>,
    probs: Vec<f64>,
    /// Offsets into the two, one more than there are rows.
    ptr: Vec<u32>,
    facts: Vec<Facts>,
    used: usize,
    exp: Exp,
}

#[derive(Debug, Clone, Copy)]
struct Facts {
    own: u32,
    listed: f64,
}

/// What predicts one token of the text.
#[derive(Debug, Clone, Copy)]
pub(super) struct Row<'a> {
    /// Teacher ids.
    pub ids: &'a [u32],
    pub probs: &'a [f64],
    /// The place of the text's own token in the two, or [`NONE`].
    pub own: u32,
    /// The sum of `probs`.
    pub listed: f64,
}

impl Row<'_> {
    /// The probability of the text's own token, where it counts.
    pub fn own_prob(&self) -> Option<f64> {
        self.probs.get(self.own as usize).copied()
    }

    /// What the row says of all columns that are not listed.
    pub fn tail(&self) -> f64 {
        let rest = 1.0 - self.listed;
        if rest > 1e-12 { rest } else { 0.0 }
    }

    pub fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

impl Rows {
    /// Reads the predictions of a text with these ids.
    pub fn fill(
        &mut self,
        predictions: &Predictions<'_>,
        teacher_ids: &[u32],
        vocab_size: usize,
        min_prob: f64,
    ) -> Result<()> {
        self.used = 0;
        self.ptr.clear();
        self.facts.clear();
        self.ptr.push(0);
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has it.
            return unsafe { self.push_rows_avx2(predictions, teacher_ids, vocab_size, min_prob) };
        }
        self.push_rows(predictions, teacher_ids, vocab_size, min_prob)
    }

    /// The same numbers: nothing is contracted.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn push_rows_avx2(
        &mut self,
        predictions: &Predictions<'_>,
        teacher_ids: &[u32],
        vocab_size: usize,
        min_prob: f64,
    ) -> Result<()> {
        self.push_rows(predictions, teacher_ids, vocab_size, min_prob)
    }

    // Loops here: what an iterator's adapter calls is not compiled for the processor's features.
    #[inline(always)]
    fn push_rows(
        &mut self,
        predictions: &Predictions<'_>,
        teacher_ids: &[u32],
        vocab_size: usize,
        min_prob: f64,
    ) -> Result<()> {
        // A little below, as it is compared in single precision.
        let lowest = (min_prob.ln() - 1e-5) as f32;
        let width = predictions.width;
        for row in 0..predictions.len() {
            let start = self.used;
            let log_probs = &predictions.log_probs[row * width..(row + 1) * width];
            let own = teacher_ids.get(row + 1).copied();
            let mut facts = None;
            if let Some(ids) = predictions.ids {
                let ids = &ids[row * width..(row + 1) * width];
                facts = self.push_first(log_probs, lowest, min_prob, ids, vocab_size, own);
                // As many of the next row are read next, which is not where these end.
                for line in (0..self.used - start).step_by(64 / size_of::<i64>()) {
                    ask_for(ids.as_ptr().wrapping_add(width + line));
                }
                if facts.is_none() {
                    self.push_any(log_probs, lowest, min_prob, |at| ids[at]);
                    let found = &self.ids[start..self.used];
                    if found.iter().any(|&id| id as usize >= vocab_size) {
                        let outside = |&&id: &&i64| id < -1 || id >= vocab_size as i64;
                        return Err(Error::NoSuchId {
                            id: ids.iter().find(outside).copied().unwrap_or(-1),
                            size: vocab_size,
                        });
                    }
                }
            } else {
                let known = &log_probs[..vocab_size.min(width)];
                self.push_any(known, lowest, min_prob, |at| at as i64);
            }
            self.ptr.push(self.used as u32);
            self.facts.push(facts.unwrap_or_else(|| Facts {
                own: own.map_or(NONE, |own| place_of(&self.ids[start..self.used], own)),
                listed: sum(&self.probs[start..self.used]),
            }));
        }
        Ok(())
    }

    /// Adds the columns of a row that count, if these are its first ones, as stored columns fall, and
    /// all of them have ids.
    #[inline(always)]
    fn push_first(
        &mut self,
        log_probs: &[f32],
        lowest: f32,
        min_prob: f64,
        ids: &[i64],
        vocab_size: usize,
        own: Option<u32>,
    ) -> Option<Facts> {
        let mut count = 0;
        for &log_prob in log_probs {
            count += u32::from(log_prob >= lowest);
        }
        let count = count as usize;
        let (first, ids) = (&log_probs[..count], &ids[..count]);
        let (mut all, mut bits) = (true, 0);
        for &log_prob in first {
            all &= log_prob >= lowest;
        }
        for &id in ids {
            bits |= id as u64;
        }
        if !all || bits > u64::from(u32::MAX) {
            return None;
        }
        self.make_room(count);
        let new = self.used..self.used + count;
        let (new_ids, probs) = (&mut self.ids[new.clone()], &mut self.probs[new.clone()]);
        let mut largest = 0;
        for (new, &id) in new_ids.iter_mut().zip(ids) {
            *new = id as u32;
            largest = u32::max(largest, id as u32);
        }
        for (prob, &log_prob) in probs.iter_mut().zip(first) {
            *prob = f64::from(log_prob);
        }
        self.exp.of_all_in(probs);
        let mut all = count == 0 || (largest as usize) < vocab_size;
        for &prob in &*probs {
            all &= (prob >= min_prob) & (prob > 0.0);
        }
        if !all {
            return None;
        }
        self.used = new.end;
        Some(Facts {
            own: own.map_or(NONE, |own| place_of(new_ids, own)),
            listed: sum(probs),
        })
    }

    /// Adds the columns of a row that count, wherever they are.
    fn push_any(
        &mut self,
        log_probs: &[f32],
        lowest: f32,
        min_prob: f64,
        id: impl Fn(usize) -> i64,
    ) {
        for (at, &log_prob) in log_probs.iter().enumerate() {
            if log_prob < lowest || log_prob.is_nan() {
                continue;
            }
            let id = id(at);
            let mut prob = [f64::from(log_prob)];
            self.exp.of_all_in(&mut prob);
            // No id is no column.
            if prob[0] >= min_prob && prob[0] > 0.0 && id != -1 {
                self.make_room(1);
                self.ids[self.used] = u32::try_from(id).unwrap_or(NONE);
                self.probs[self.used] = prob[0];
                self.used += 1;
            }
        }
    }

    fn make_room(&mut self, count: usize) {
        let size = self.used + count;
        if size > self.ids.len() {
            self.ids.resize(size.next_power_of_two(), 0);
            self.probs.resize(size.next_power_of_two(), 0.0);
        }
    }

    /// Number of columns that count, in all rows.
    pub fn len(&self) -> usize {
        self.used
    }

    /// What predicts teacher token `token`; empty where nothing is known.
    pub fn of(&self, token: usize) -> Row<'_> {
        let Some(row) = token.checked_sub(1).filter(|&row| row < self.facts.len()) else {
            return Row {
                ids: &[],
                probs: &[],
                own: NONE,
                listed: 0.0,
            };
        };
        let range = self.ptr[row] as usize..self.ptr[row + 1] as usize;
        Row {
            ids: &self.ids[range.clone()],
            probs: &self.probs[range],
            own: self.facts[row].own,
            listed: self.facts[row].listed,
        }
    }
}

/// The place of an id among some, or [`NONE`].
#[inline(always)]
pub(super) fn place_of(ids: &[u32], own: u32) -> u32 {
    const BLOCK: usize = 16;
    let mut from = 0;
    while let Some(block) = ids.get(from..from + BLOCK) {
        let mut any = false;
        for &id in block {
            any |= id == own;
        }
        if any {
            break;
        }
        from += BLOCK;
    }
    let found = ids[from..].iter().position(|&id| id == own);
    found.map_or(NONE, |at| (from + at) as u32)
}

/// The sum in four strands, which do not wait for one another.
pub(super) fn sum(values: &[f64]) -> f64 {
    let mut strands = [0.0; 4];
    let (fours, rest) = values.as_chunks::<4>();
    for four in fours {
        for (strand, value) in strands.iter_mut().zip(four) {
            *strand += value;
        }
    }
    strands.iter().sum::<f64>() + rest.iter().sum::<f64>()
}

/// The exponential function from a table, the same on every machine.
#[derive(Debug)]
struct Exp {
    /// 2 to the power of `i / 64`.
    powers: [f64; STEPS],
}

const STEPS: usize = 64;
const STEP: f64 = LN_2 / STEPS as f64;
/// The first digits of log(2) / 64, so few that its multiples are exact, and the others.
const HIGH: f64 = f64::from_bits(STEP.to_bits() & !((1 << 27) - 1));
const LOW: f64 = (STEP - HIGH) + 2.319_046_813_846_299_6e-17 / STEPS as f64;
/// So many numbers are worked on together.
const BLOCK: usize = 8;
/// Added to a number below 2^51 it leaves the nearest whole one in the last bits.
const ROUND: f64 = 6_755_399_441_055_744.0;

impl Default for Exp {
    fn default() -> Self {
        Self {
            powers: std::array::from_fn(|i| (i as f64 / STEPS as f64).exp2()),
        }
    }
}

impl Exp {
    /// e to the power of each of some log-probabilities, to within two units in the last place.
    #[inline(always)]
    fn of_all_in(&self, values: &mut [f64]) {
        let (blocks, rest) = values.as_chunks_mut::<BLOCK>();
        // A loop: what an iterator's adapter calls is not compiled for the processor's features.
        for block in blocks {
            self.of_block(block);
        }
        let mut block = [0.0; BLOCK];
        block[..rest.len()].copy_from_slice(rest);
        self.of_block(&mut block);
        rest.copy_from_slice(&block[..rest.len()]);
    }

    /// In steps of one kind, as processors work on several numbers at once.
    #[inline(always)]
    #[allow(
        clippy::needless_range_loop,
        reason = "what an iterator's adapter calls is not compiled for the processor's features"
    )]
    fn of_block(&self, values: &mut [f64; BLOCK]) {
        if values.iter().any(|&x| x < -700.0) {
            values.iter_mut().for_each(|x| *x = x.exp());
            return;
        }
        // x = (64 k + i) log(2) / 64 + r
        let (mut rounded, mut powers) = ([0.0; BLOCK], [0.0; BLOCK]);
        for at in 0..BLOCK {
            rounded[at] = values[at] * (1.0 / STEP) + ROUND;
            let whole = rounded[at].to_bits().wrapping_sub(ROUND.to_bits());
            let i = whole % STEPS as u64;
            let exponent = (whole - i).wrapping_add(1023 * STEPS as u64) << (52 - STEPS.ilog2());
            powers[at] = f64::from_bits(exponent) * self.powers[i as usize];
        }
        for (at, x) in values.iter_mut().enumerate() {
            let steps = rounded[at] - ROUND;
            let r = (*x - steps * HIGH) - steps * LOW;
            let series = 1.0
                + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0)))));
            *x = powers[at] * series;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_that_of_the_standard_library_to_the_last_digits() {
        let exp = Exp::default();
        let of = |x: f64| {
            let mut values = [-1.0, -2.0, x, -3.0, -4.0, -5.0, -6.0, -7.0, -8.0, -9.0, x];
            exp.of_all_in(&mut values);
            assert_eq!(values[2], values[10]);
            values[10]
        };
        for step in 0..200_000 {
            let x = f64::from(-(step as f32) * 0.0037 + 0.3);
            let (found, expected) = (of(x), x.exp());
            assert!(
                (found - expected).abs() <= 6e-16 * expected,
                "exp({x}) = {found:e}, expected {expected:e}"
            );
        }
        assert_eq!(of(0.0), 1.0);
        assert_eq!(of(f64::NEG_INFINITY), 0.0);
    }
}
