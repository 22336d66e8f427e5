//! The teacher's predictions of one example, cut to the columns that count.

use super::NONE;
use super::exp::Exp;
use super::pair::ask_for;
use super::side::Twins;
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
    /// Reads the predictions of a text with these ids, where each stands for its `twins`.
    pub fn fill(
        &mut self,
        predictions: &Predictions<'_>,
        teacher_ids: &[u32],
        vocab_size: usize,
        min_prob: f64,
        twins: Option<&Twins>,
    ) -> Result<()> {
        self.used = 0;
        self.ptr.clear();
        self.facts.clear();
        self.ptr.push(0);
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has it.
            return unsafe {
                self.push_rows_avx2(predictions, teacher_ids, vocab_size, min_prob, twins)
            };
        }
        self.push_rows(predictions, teacher_ids, vocab_size, min_prob, twins)
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
        twins: Option<&Twins>,
    ) -> Result<()> {
        self.push_rows(predictions, teacher_ids, vocab_size, min_prob, twins)
    }

    // Loops here: what an iterator's adapter calls is not compiled for the processor's features.
    #[inline(always)]
    fn push_rows(
        &mut self,
        predictions: &Predictions<'_>,
        teacher_ids: &[u32],
        vocab_size: usize,
        min_prob: f64,
        twins: Option<&Twins>,
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
            if let Some(twins) = twins
                && twins.may_be_among(&self.ids[start..self.used])
            {
                self.merge_twins(start, twins);
                facts = None;
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
        self.exp.of_all(probs);
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
            self.exp.of_all(&mut prob);
            // No id is no column.
            if prob[0] >= min_prob && prob[0] > 0.0 && id != -1 {
                self.make_room(1);
                self.ids[self.used] = u32::try_from(id).unwrap_or(NONE);
                self.probs[self.used] = prob[0];
                self.used += 1;
            }
        }
    }

    /// Of the columns from a place on, adds those up that one token stands for.
    #[cold]
    fn merge_twins(&mut self, start: usize, twins: &Twins) {
        let mut moved: Vec<(u32, f64)> = Vec::new();
        let mut end = start;
        for at in start..self.used {
            let (id, prob) = (self.ids[at], self.probs[at]);
            match twins.of(id) {
                same if same == id => {
                    (self.ids[end], self.probs[end]) = (id, prob);
                    end += 1;
                }
                other => moved.push((other, prob)),
            }
        }
        moved.sort_by_key(|moved| moved.0);
        moved.dedup_by(|next, kept| {
            let same = next.0 == kept.0;
            if same {
                kept.1 += next.1;
            }
            same
        });
        for at in start..end {
            let found = moved.binary_search_by_key(&self.ids[at], |moved| moved.0);
            if let Ok(found) = found {
                self.probs[at] += std::mem::take(&mut moved[found].1);
            }
        }
        // There is room: each came from a column.
        for (id, prob) in moved.into_iter().filter(|moved| moved.1 > 0.0) {
            (self.ids[end], self.probs[end]) = (id, prob);
            end += 1;
        }
        self.used = end;
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
    #[inline]
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
