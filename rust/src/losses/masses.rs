//! What a teacher's rows say of each column together: the choice of a micro-batch's columns.

use super::real::{Real, largest, total};
use super::rows::{Gradient, Rows, task_by_processor};
use crate::error::Result;
use crate::parallel::{self, Threads};

/// Parts that a batch's rows are summed in, whatever the number of threads, and their least size.
const PARTS: usize = 16;
const ROWS: usize = 32;

/// One call: the softmax of many rows, summed.
pub struct ColumnMasses<'a, T> {
    /// The teacher's logits.
    pub teacher: Rows<'a, T>,
    /// The columns that count.
    pub size: usize,
    /// Divides the logits.
    pub temperature: f64,
}

/// Of some rows: the sum of their softmaxes, and the log of each one's denominator.
type Part<T> = (Vec<T>, Vec<f64>);

impl<T: Real> ColumnMasses<'_, T> {
    /// The mass of each column over all rows, and the log of each row's denominator, in the scale
    /// of the logits by temperature: NaN or infinite where a row has no softmax.
    ///
    /// # Errors
    /// [`crate::error::Error::Shape`] where the arrays do not fit;
    /// [`crate::error::Error::Interrupted`].
    pub fn run(&self, threads: &Threads<'_>) -> Result<(Vec<f64>, Vec<f64>)> {
        let count = self.teacher.index.len();
        self.teacher.check("the teacher", self.size, count)?;
        let step = count.div_ceil(PARTS).max(ROWS);
        let parts = parallel::map(threads, count.div_ceil(step), |part| {
            Ok(self.task(part * step..count.min((part + 1) * step), None))
        })?;
        let mut masses = vec![0.0; self.size];
        let mut totals = Vec::with_capacity(count);
        for (mass, logs) in parts.into_iter().flatten() {
            for (sum, more) in masses.iter_mut().zip(mass) {
                *sum += more.wide();
            }
            totals.extend(logs);
        }
        Ok((masses, totals))
    }

    task_by_processor!(Part<T>);

    #[inline(always)]
    fn task_in(&self, rows: std::ops::Range<usize>, _: Option<&Gradient<T>>) -> Vec<Part<T>> {
        let inverse = T::of(1.0 / self.temperature);
        let mut exps = vec![T::ZERO; self.size];
        let mut masses = vec![T::ZERO; self.size];
        let mut totals = Vec::with_capacity(rows.len());
        for at in rows {
            let row = self.teacher.row(at, self.size);
            let top = largest(row);
            for (value, &logit) in exps.iter_mut().zip(row) {
                *value = ((logit - top) * inverse).exp();
            }
            let sum = total(&exps);
            let share = T::of(1.0 / sum);
            for (mass, &value) in masses.iter_mut().zip(&exps) {
                *mass += value * share;
            }
            totals.push((top * inverse).wide() + sum.ln());
        }
        vec![(masses, totals)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masses_and_denominators_are_those_of_the_definition_on_any_number_of_threads() -> Result<()>
    {
        let (width, size, count) = (7, 5, 100);
        let flat: Vec<f64> = (0..width * count)
            .map(|i| f64::from((i * 37 % 101) as u32) / 11.0)
            .collect();
        let index: Vec<i64> = (0..count as i64).rev().collect();
        let call = ColumnMasses {
            teacher: Rows {
                flat: &flat,
                width,
                index: &index,
            },
            size,
            temperature: 2.0,
        };
        let (masses, totals) = call.run(&Threads::one())?;
        assert_eq!(
            call.run(&Threads::uncapped(3))?,
            (masses.clone(), totals.clone())
        );
        let mut wanted = vec![0.0; size];
        for (at, &row) in index.iter().enumerate() {
            let row = &flat[row as usize * width..][..size];
            let sum: f64 = row.iter().map(|y| (y / 2.0).exp()).sum();
            assert!((totals[at] - sum.ln()).abs() < 1e-12);
            for (mass, y) in wanted.iter_mut().zip(row) {
                *mass += (y / 2.0).exp() / sum;
            }
        }
        assert!(
            masses
                .iter()
                .zip(&wanted)
                .all(|(a, b)| (a - b).abs() < 1e-10)
        );
        Ok(())
    }
}
