//! The teacher's predictions of one example, cut to the columns that count.

use super::pair::{Column, PairTables};
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
        match ids.iter().find(|&&id| id < -1 || id >= vocab_size as i64) {
            Some(&id) => Err(Error::NoSuchId {
                id,
                size: vocab_size,
            }),
            None => Ok(()),
        }
    }
}

/// A column that counts.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub prob: f64,
    pub id: u32,
    pub column: Column,
}

/// The columns that count of each row.
#[derive(Debug, Default)]
pub(super) struct Rows {
    entries: Vec<Entry>,
    /// Offsets into `entries`, one more than there are rows.
    ptr: Vec<u32>,
}

impl Rows {
    pub fn fill(&mut self, tables: &PairTables, predictions: &Predictions<'_>, min_prob: f64) {
        self.entries.clear();
        self.ptr.clear();
        self.ptr.push(0);
        // A little below, as it is compared in single precision.
        let lowest = (min_prob.ln() - 1e-5) as f32;
        for row in 0..predictions.len() {
            let columns = row * predictions.width..(row + 1) * predictions.width;
            let log_probs = &predictions.log_probs[columns.clone()];
            match predictions.ids {
                Some(ids) => {
                    for (&id, &log_prob) in ids[columns].iter().zip(log_probs) {
                        if log_prob >= lowest && id >= 0 {
                            self.push(tables, id as u32, log_prob, min_prob);
                        }
                    }
                }
                None => {
                    for (id, &log_prob) in log_probs.iter().take(tables.columns.len()).enumerate() {
                        if log_prob >= lowest {
                            self.push(tables, id as u32, log_prob, min_prob);
                        }
                    }
                }
            }
            self.ptr.push(self.entries.len() as u32);
        }
    }

    fn push(&mut self, tables: &PairTables, id: u32, log_prob: f32, min_prob: f64) {
        let prob = f64::from(log_prob).exp();
        if prob >= min_prob && prob > 0.0 {
            self.entries.push(Entry {
                prob,
                id,
                column: tables.columns[id as usize],
            });
        }
    }

    /// Number of columns that count, in all rows.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// What predicts teacher token `token`; empty where nothing is known.
    pub fn of(&self, token: usize) -> &[Entry] {
        let Some(row) = token.checked_sub(1).filter(|row| row + 1 < self.ptr.len()) else {
            return &[];
        };
        &self.entries[self.ptr[row] as usize..self.ptr[row + 1] as usize]
    }

    /// The probability of one token, where it counts.
    pub fn prob(&self, token: usize, id: u32) -> Option<f64> {
        let found = self.of(token).iter().find(|entry| entry.id == id);
        found.map(|entry| entry.prob)
    }
}
