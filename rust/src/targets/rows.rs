//! The teacher's predictions of one example, cut to the columns that count.

use std::f64::consts::LN_2;

use super::NONE;
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
    ids: Vec<u32>,
    probs: Vec<f64>,
    /// Offsets into the two, one more than there are rows.
    ptr: Vec<u32>,
    facts: Vec<Facts>,
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

/// As many columns are looked at together.
const CHUNK: usize = 16;

impl Rows {
    /// Reads the predictions of a text with these ids.
    pub fn fill(
        &mut self,
        predictions: &Predictions<'_>,
        teacher_ids: &[u32],
        vocab_size: usize,
        min_prob: f64,
    ) -> Result<()> {
        self.ids.clear();
        self.probs.clear();
        self.ptr.clear();
        self.facts.clear();
        self.ptr.push(0);
        // A little below, as it is compared in single precision.
        let lowest = (min_prob.ln() - 1e-5) as f32;
        let width = predictions.width;
        for row in 0..predictions.len() {
            let start = self.ids.len();
            let log_probs = &predictions.log_probs[row * width..(row + 1) * width];
            match predictions.ids {
                Some(ids) => {
                    let ids = &ids[row * width..(row + 1) * width];
                    self.push_row(log_probs, lowest, min_prob, |at| ids[at]);
                    let found = &self.ids[start..];
                    if found.iter().any(|&id| id as usize >= vocab_size) {
                        let outside = |&&id: &&i64| id < -1 || id >= vocab_size as i64;
                        return Err(Error::NoSuchId {
                            id: ids.iter().find(outside).copied().unwrap_or(-1),
                            size: vocab_size,
                        });
                    }
                }
                None => {
                    let known = &log_probs[..vocab_size.min(width)];
                    self.push_row(known, lowest, min_prob, |at| at as i64);
                }
            }
            self.ptr.push(self.ids.len() as u32);
            let (ids, probs) = (&self.ids[start..], &self.probs[start..]);
            let own = teacher_ids.get(row + 1);
            let own = own.and_then(|&own| ids.iter().position(|&id| id == own));
            self.facts.push(Facts {
                own: own.map_or(NONE, |at| at as u32),
                listed: sum(probs),
            });
        }
        Ok(())
    }

    fn push_row(
        &mut self,
        log_probs: &[f32],
        lowest: f32,
        min_prob: f64,
        id: impl Fn(usize) -> i64,
    ) {
        for (chunk, values) in log_probs.chunks(CHUNK).enumerate() {
            // Stored columns fall: most chunks hold none that counts.
            if !values
                .iter()
                .fold(false, |any, &value| any | (value >= lowest))
            {
                continue;
            }
            for (at, &log_prob) in (chunk * CHUNK..).zip(values) {
                let id = id(at);
                // No id, and no number, is no column.
                let counts = log_prob >= lowest && id != -1;
                if !counts {
                    continue;
                }
                let prob = self.exp.of(f64::from(log_prob));
                if prob >= min_prob && prob > 0.0 {
                    self.ids.push(u32::try_from(id).unwrap_or(NONE));
                    self.probs.push(prob);
                }
            }
        }
    }

    /// Number of columns that count, in all rows.
    pub fn len(&self) -> usize {
        self.ids.len()
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

/// The sum in four strands, which do not wait for one another.
fn sum(values: &[f64]) -> f64 {
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
    /// e to the power of a log-probability, to within two units in the last place.
    #[inline]
    fn of(&self, x: f64) -> f64 {
        if x < -700.0 {
            return x.exp();
        }
        // x = (64 k + i) log(2) / 64 + r
        let rounded = x * (1.0 / STEP) + ROUND;
        let steps = rounded - ROUND;
        let whole = rounded.to_bits().wrapping_sub(ROUND.to_bits()) as i64;
        let r = (x - steps * HIGH) - steps * LOW;
        let power = self.powers[(whole & (STEPS as i64 - 1)) as usize];
        let series =
            1.0 + r * (1.0 + r * (0.5 + r * (1.0 / 6.0 + r * (1.0 / 24.0 + r * (1.0 / 120.0)))));
        f64::from_bits(((1023 + (whole >> 6)) as u64) << 52) * power * series
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_that_of_the_standard_library_to_the_last_digits() {
        let exp = Exp::default();
        for step in 0..200_000 {
            let x = f64::from(-(step as f32) * 0.0037 + 0.3);
            let (found, expected) = (exp.of(x), x.exp());
            assert!(
                (found - expected).abs() <= 6e-16 * expected,
                "exp({x}) = {found:e}, expected {expected:e}"
            );
        }
        assert_eq!(exp.of(0.0), 1.0);
        assert_eq!(exp.of(f64::NEG_INFINITY), 0.0);
    }
}
