//! A sparse matrix as two lists of weighted copies: nearly every row of W has one entry.

use super::real::Real;
use crate::error::{Error, Result};

/// Sums of weighted elements: `to[i] = first weight * from[first index] + the rest`.
struct Copies<T> {
    index: Vec<u32>,
    weight: Vec<T>,
    /// Further elements: place, index, weight; by place.
    rest: Vec<(u32, u32, T)>,
}

impl<T: Real> Copies<T> {
    fn of(count: usize, entries: impl Iterator<Item = (u32, u32, T)>) -> Self {
        let mut copies = Self {
            index: vec![0; count],
            weight: vec![T::ZERO; count],
            rest: Vec::new(),
        };
        let mut taken = vec![false; count];
        for (place, index, weight) in entries {
            if std::mem::replace(&mut taken[place as usize], true) {
                copies.rest.push((place, index, weight));
            } else {
                copies.index[place as usize] = index;
                copies.weight[place as usize] = weight;
            }
        }
        copies
    }

    #[inline(always)]
    fn apply(&self, from: &[T], to: &mut [T]) {
        for ((value, &index), &weight) in to.iter_mut().zip(&self.index).zip(&self.weight) {
            // SAFETY: `Sparse::new` has seen that every index is inside, and its callers pass
            // slices of the matrix's sizes.
            *value = weight * unsafe { *from.get_unchecked(index as usize) };
        }
        for &(place, index, weight) in &self.rest {
            // SAFETY: as above.
            unsafe {
                *to.get_unchecked_mut(place as usize) +=
                    weight * *from.get_unchecked(index as usize);
            }
        }
    }
}

/// A sparse `[inputs, outputs]` matrix.
pub struct Sparse<T> {
    inputs: usize,
    outputs: usize,
    forward: Copies<T>,
    backward: Copies<T>,
    ptr: Vec<usize>,
    entries: Vec<(u32, T)>,
}

impl<T: Real> Sparse<T> {
    /// From non-zeros by output.
    ///
    /// # Errors
    /// [`Error::Shape`] where the arrays do not fit or an input is outside.
    pub fn new(input_of: &[i64], ptr: &[i64], values: &[T], inputs: usize) -> Result<Self> {
        let shape = |what: &str, found: usize, expected: usize| Error::Shape {
            what: what.to_owned(),
            found,
            expected,
            remedy: "pass the arrays of one matrix",
        };
        if values.len() != input_of.len() {
            return Err(shape("values", values.len(), input_of.len()));
        }
        let outputs = ptr.len().saturating_sub(1);
        let rising = ptr.windows(2).all(|pair| pair[0] <= pair[1]);
        let last = ptr.last().copied().unwrap_or(0);
        if !rising || ptr.first() != Some(&0) || last != input_of.len() as i64 {
            return Err(shape("output_ptr", last.max(0) as usize, input_of.len()));
        }
        if inputs > u32::MAX as usize || outputs > u32::MAX as usize {
            return Err(shape("inputs", inputs, u32::MAX as usize));
        }
        if let Some(&bad) = input_of.iter().find(|&&i| i < 0 || i >= inputs as i64) {
            return Err(shape("inputs", bad.unsigned_abs() as usize, inputs));
        }
        let ptr: Vec<usize> = ptr.iter().map(|&at| at as usize).collect();
        let all = || {
            ptr.windows(2).enumerate().flat_map(|(output, pair)| {
                (pair[0]..pair[1]).map(move |at| (output as u32, input_of[at] as u32, values[at]))
            })
        };
        Ok(Self {
            inputs,
            outputs,
            forward: Copies::of(outputs, all()),
            backward: Copies::of(inputs, all().map(|(to, from, value)| (from, to, value))),
            entries: all().map(|(_, from, value)| (from, value)).collect(),
            ptr,
        })
    }

    /// Its inputs.
    #[must_use]
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    /// Its outputs.
    #[must_use]
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    /// `from * matrix`; slices of `inputs` and `outputs`.
    #[inline(always)]
    pub(super) fn forward(&self, from: &[T], to: &mut [T]) {
        assert!(from.len() == self.inputs && to.len() == self.outputs);
        self.forward.apply(from, to);
    }

    /// `matrix * from`; slices of `outputs` and `inputs`.
    #[inline(always)]
    pub(super) fn backward(&self, from: &[T], to: &mut [T]) {
        assert!(from.len() == self.outputs && to.len() == self.inputs);
        self.backward.apply(from, to);
    }

    /// The entries of one output.
    #[inline(always)]
    pub(super) fn of_output(&self, output: usize) -> &[(u32, T)] {
        &self.entries[self.ptr[output]..self.ptr[output + 1]]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_products_are_those_of_the_dense_matrix() -> Result<()> {
        let dense = [
            [0.5, 0.0, 2.0, 1.0],
            [0.0, 0.0, 3.0, 1.5],
            [1.0, 0.0, 0.0, 0.25],
        ];
        let (mut inputs, mut ptr, mut values) = (vec![], vec![0], vec![]);
        for output in 0..4 {
            for (input, row) in dense.iter().enumerate() {
                if row[output] != 0.0 {
                    inputs.push(input as i64);
                    values.push(row[output]);
                }
            }
            ptr.push(inputs.len() as i64);
        }
        let sparse = Sparse::new(&inputs, &ptr, &values, 3)?;
        let (from, mut to) = ([1.0, 10.0, 100.0], [9.0; 4]);
        sparse.forward(&from, &mut to);
        assert_eq!(to, [100.5, 0.0, 32.0, 41.0]);
        let mut back = [9.0; 3];
        sparse.backward(&[1.0, 10.0, 100.0, 1000.0], &mut back);
        assert_eq!(back, [1200.5, 1800.0, 251.0]);
        assert_eq!(sparse.of_output(2), [(0, 2.0), (1, 3.0)]);
        Ok(())
    }

    #[test]
    fn arrays_that_do_not_fit_are_refused() {
        assert!(Sparse::new(&[3], &[0, 1], &[1.0], 3).is_err());
        assert!(Sparse::new(&[-1], &[0, 1], &[1.0], 3).is_err());
        assert!(Sparse::new(&[0], &[0, 2], &[1.0], 3).is_err());
        assert!(Sparse::new(&[0, 1], &[0, 1], &[1.0, 1.0], 3).is_err());
        assert!(Sparse::new(&[0], &[0, 1], &[1.0, 2.0], 3).is_err());
        assert!(Sparse::<f32>::new(&[], &[], &[], 3).is_err());
    }
}
