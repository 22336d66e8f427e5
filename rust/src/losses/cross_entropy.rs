//! Cross-entropy of rows of logits and its gradient, `softmax - 1 at the target`.

use super::real::{Real, exponentials, largest};
use super::rows::{Found, Gradient, Rows, by_tasks, ids, length, task_by_processor};
use crate::error::Result;
use crate::parallel::Threads;

/// One call: the loss of many rows.
pub struct CrossEntropy<'a, T> {
    /// The logits.
    pub student: Rows<'a, T>,
    /// The columns that count.
    pub size: usize,
    /// The token that each row should have predicted.
    pub targets: &'a [i64],
    /// What every row's gradient is multiplied with.
    pub seed: T,
}

impl<T: Real> CrossEntropy<'_, T> {
    /// Loss and gradient of every row; of [`Found`] only loss, sum and good say something. A row
    /// without a softmax has a loss that is no number, and nothing is written.
    ///
    /// # Arguments
    /// * `gradient`: like the logits; `None` for none. Its rows are written, or added to.
    ///
    /// # Errors
    /// As [`super::ForwardKl::run`].
    pub fn run(
        &self,
        gradient: Option<(&mut [T], bool)>,
        threads: &Threads<'_>,
    ) -> Result<Vec<Found>> {
        let count = self.student.index.len();
        self.student.check("the student", self.size, count)?;
        length("targets", self.targets.len(), count)?;
        ids("targets", self.targets, self.size)?;
        let gradient = gradient
            .map(|(flat, adds)| Gradient::of(flat, adds, &self.student))
            .transpose()?;
        by_tasks(count, threads, |rows| self.task(rows, gradient.as_ref()))
    }

    task_by_processor!(Found);

    #[inline(always)]
    fn task_in(&self, rows: std::ops::Range<usize>, gradient: Option<&Gradient<T>>) -> Vec<Found> {
        let mut values = vec![T::ZERO; self.size];
        let mut found = Vec::with_capacity(rows.len());
        for at in rows {
            // SAFETY: `run` has seen that a row is named once.
            let written = gradient.map(|gradient| unsafe { gradient.row(&self.student, at) });
            found.push(self.row(at, written, &mut values));
        }
        found
    }

    #[inline(always)]
    fn row(&self, at: usize, written: Option<(&mut [T], bool)>, values: &mut [T]) -> Found {
        let row = self.student.row(at, self.size);
        let target = self.targets[at] as usize;
        let top = largest(row);
        if !top.wide().is_finite() {
            return Found {
                loss: f64::NAN,
                sum: f64::NAN,
                ..Found::BAD
            };
        }
        let whole = exponentials(row, top, T::ONE, values);
        let mut found = Found {
            loss: whole.ln() - (row[target] - top).wide(),
            good: true,
            ..Found::BAD
        };
        let Some((row, adds)) = written else {
            return found;
        };
        let share = T::of(self.seed.wide() / whole);
        let (own, padding) = row.split_at_mut(self.size);
        if adds {
            for (value, &exponential) in own.iter_mut().zip(values.iter()) {
                *value += exponential * share;
            }
        } else {
            for (value, &exponential) in own.iter_mut().zip(values.iter()) {
                *value = exponential * share;
            }
            padding.fill(T::ZERO);
        }
        own[target] += -self.seed;
        // All that was written is at most this.
        found.sum = share.wide();
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loss_and_gradient_are_those_of_the_definition() -> Result<()> {
        let logits = [0.3, -1.0, 2.0, 9.0, 1.0, f64::NEG_INFINITY, -0.7, 9.0];
        let call = CrossEntropy {
            student: Rows {
                flat: &logits,
                width: 4,
                index: &[1, 0],
            },
            size: 3,
            targets: &[2, 0],
            seed: 2.0,
        };
        let mut gradient = [7.0; 8];
        let found = call.run(Some((&mut gradient, false)), &Threads::one())?;
        let mut twice = gradient;
        call.run(Some((&mut twice, true)), &Threads::one())?;
        for (at, (row, target)) in [(1, 2), (0, 0)].into_iter().enumerate() {
            let row = 4 * row;
            let exps: Vec<f64> = logits[row..row + 3].iter().map(|z| z.exp()).collect();
            let sum: f64 = exps.iter().sum();
            assert!((found[at].loss + (exps[target] / sum).ln()).abs() < 1e-12);
            for column in 0..3 {
                let hit = f64::from(u8::from(column == target));
                let wanted = 2.0 * (exps[column] / sum - hit);
                assert!((gradient[row + column] - wanted).abs() < 1e-12);
                assert!((twice[row + column] - 2.0 * wanted).abs() < 1e-12);
            }
            assert_eq!(gradient[row + 3], 0.0);
        }
        Ok(())
    }

    #[test]
    fn a_row_without_a_softmax_has_no_number() -> Result<()> {
        for bad in [f64::NAN, f64::INFINITY] {
            let call = CrossEntropy {
                student: Rows {
                    flat: &[0.0, bad],
                    width: 2,
                    index: &[0],
                },
                size: 2,
                targets: &[0],
                seed: 1.0,
            };
            assert!(call.run(None, &Threads::one())?[0].loss.is_nan());
        }
        Ok(())
    }
}
