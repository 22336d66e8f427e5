//! `xtoken._core.TargetBuilder`: flat arrays in, flat arrays out.

use numpy::ndarray::Dimension;
use numpy::{Element, IntoPyArray, PyArray1, PyReadonlyArray, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;

use super::vocab::PyVocab;
use super::{detached, interruptible};
use crate::error::{Error, Result};
use crate::projection::Pieces;
use crate::targets::{
    Account, PairInput, Predictions, TargetBuilder, TargetExample, TargetOptions, Targets,
};

/// The part of `xtoken.targets.TargetBuilder` that runs without Python.
#[pyclass(name = "TargetBuilder", module = "xtoken._core", frozen)]
pub(super) struct PyTargetBuilder {
    builder: TargetBuilder,
}

const _: () = {
    const fn shared_between_threads<T: Send + Sync>() {}
    shared_between_threads::<PyTargetBuilder>();
};

/// The targets of a batch; each array is handed over without a copy.
#[pyclass(name = "TargetArrays", module = "xtoken._core", frozen, get_all)]
pub(super) struct PyTargetArrays {
    position_indptr: Py<PyArray1<i64>>,
    positions: Py<PyArray1<i64>>,
    chunks: Py<PyArray1<i64>>,
    tails: Py<PyArray1<f64>>,
    open: Py<PyArray1<bool>>,
    group_indptr: Py<PyArray1<i64>>,
    probs: Py<PyArray1<f32>>,
    depths: Py<PyArray1<u8>>,
    range_indptr: Py<PyArray1<i32>>,
    starts: Py<PyArray1<i32>>,
    ends: Py<PyArray1<i32>>,
    accounts: Py<PyArray1<f32>>,
}

type Ids<'py> = PyReadonlyArray1<'py, i64>;
/// Where each row begins, and what the rows hold.
type IndptrAndIds = (Py<PyArray1<i64>>, Py<PyArray1<i64>>);

#[pymethods]
impl PyTargetBuilder {
    #[new]
    #[expect(
        clippy::too_many_arguments,
        reason = "flat arrays, called by xtoken.targets alone"
    )]
    fn new(
        py: Python<'_>,
        student: &Bound<'_, PyVocab>,
        teacher: &Bound<'_, PyVocab>,
        pieces_indptr: Ids<'_>,
        pieces: Ids<'_>,
        teacher_pieces_indptr: Ids<'_>,
        teacher_pieces: Ids<'_>,
        specials: Vec<(u32, u32)>,
        student_stops: Vec<u32>,
        teacher_stops: Vec<u32>,
    ) -> PyResult<Self> {
        let input = PairInput {
            student: student.get().tokenizer().clone(),
            teacher: teacher.get().tokenizer().clone(),
            pieces: pieces_of("pieces", &pieces_indptr, &pieces)?,
            teacher_pieces: pieces_of("teacher_pieces", &teacher_pieces_indptr, &teacher_pieces)?,
            specials,
            student_stops,
            teacher_stops,
        };
        let builder = detached(py, || TargetBuilder::new(input))?;
        Ok(Self { builder })
    }

    /// The student tokens that ranges point into.
    fn tokens<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        let ids = self.builder.tokens().iter().map(|&id| i64::from(id));
        PyArray1::from_iter(py, ids)
    }

    /// The cell of each teacher token, -1 for none.
    fn roots<'py>(&self, py: Python<'py>) -> Bound<'py, PyArray1<i64>> {
        let id = |&id: &u32| if id == u32::MAX { -1 } else { i64::from(id) };
        PyArray1::from_iter(py, self.builder.roots().iter().map(id))
    }

    /// The teacher tokens that the student would have joined to each of these tokens of its own.
    fn swallowing(
        &self,
        py: Python<'_>,
        tokens: Ids<'_>,
        threads: usize,
    ) -> PyResult<IndptrAndIds> {
        let tokens = slice("tokens", &tokens)?;
        let size = |id: i64| u32::try_from(id).unwrap_or(u32::MAX);
        let tokens: Vec<u32> = tokens.iter().map(|&id| size(id)).collect();
        let found = interruptible(py, threads, |threads| {
            self.builder.swallowing(&tokens, threads)
        })?;
        let mut indptr = vec![0];
        let mut ids = Vec::new();
        for each in found {
            ids.extend(each.into_iter().map(i64::from));
            indptr.push(ids.len() as i64);
        }
        Ok((handed_over(py, indptr), handed_over(py, ids)))
    }

    #[expect(
        clippy::too_many_arguments,
        reason = "flat arrays, called by xtoken.targets alone"
    )]
    fn build(
        &self,
        py: Python<'_>,
        student_ids: Ids<'_>,
        student_indptr: Ids<'_>,
        teacher_ids: Ids<'_>,
        teacher_indptr: Ids<'_>,
        student_bounds: Ids<'_>,
        teacher_bounds: Ids<'_>,
        kinds: PyReadonlyArray1<'_, u8>,
        chunk_indptr: Ids<'_>,
        column_ids: Option<Vec<PyReadonlyArray2<'_, i64>>>,
        log_probs: Vec<PyReadonlyArray2<'_, f32>>,
        options: (bool, bool, usize, usize, f64, bool, bool),
        threads: usize,
    ) -> PyResult<PyTargetArrays> {
        let student = Ragged::new("student", &student_ids, &student_indptr)?;
        let teacher = Ragged::new("teacher", &teacher_ids, &teacher_indptr)?;
        let chunks = Ragged::new("chunk", &kinds, &chunk_indptr)?;
        let bounds = [
            slice("student_bounds", &student_bounds)?,
            slice("teacher_bounds", &teacher_bounds)?,
        ];
        // One array per example: putting them together would copy most of what is read.
        let predictions = log_probs.iter().enumerate().map(|(at, rows)| {
            let ids = column_ids.as_ref().map(|ids| {
                let ids = ids.get(at).map(|ids| slice("column_ids", ids));
                ids.unwrap_or(Ok(&[]))
            });
            Ok(Predictions {
                ids: ids.transpose()?,
                log_probs: slice("log_probs", rows)?,
                width: rows.as_array().ncols(),
            })
        });
        let predictions = predictions.collect::<Result<Vec<_>>>()?;
        let count = student.len();
        let (cells, consistent, levels, max_depth, min_prob, sure, accounts) = options;
        let options = TargetOptions {
            cells,
            consistent,
            levels,
            max_depth,
            min_prob,
            sure,
            accounts,
        };
        let made = interruptible(py, threads, |threads| {
            for (what, found) in [
                ("teacher_indptr", teacher.len()),
                ("chunk_indptr", chunks.len()),
                ("log_probs", predictions.len()),
            ] {
                if found != count {
                    return Err(Error::Shape {
                        what: what.to_owned(),
                        found,
                        expected: count,
                        remedy: "pass one entry per example",
                    });
                }
            }
            for (what, bounds) in ["student_bounds", "teacher_bounds"].iter().zip(bounds) {
                if bounds.len() != chunks.flat.len() + count {
                    return Err(Error::Shape {
                        what: (*what).to_owned(),
                        found: bounds.len(),
                        expected: chunks.flat.len() + count,
                        remedy: "pass one bound a chunk and one more an example",
                    });
                }
            }
            let examples: Vec<TargetExample<'_>> = (0..count)
                .map(|at| {
                    let first = chunks.range(at).start + at;
                    let own = first..first + chunks.range(at).len() + 1;
                    TargetExample {
                        student_ids: student.of(at),
                        teacher_ids: teacher.of(at),
                        student_bounds: &bounds[0][own.clone()],
                        teacher_bounds: &bounds[1][own],
                        kinds: chunks.of(at),
                        predictions: predictions[at],
                    }
                })
                .collect();
            let made = self.builder.build(&examples, &options, threads)?;
            Ok(joined(made))
        })?;
        let (position_indptr, targets) = made;
        let accounts = targets.accounts.iter().flat_map(|account| {
            let Account {
                dropped,
                left_out,
                carried,
                unreached,
            } = *account;
            [dropped, left_out, carried, unreached]
        });
        let accounts = match options.accounts {
            true => accounts.collect(),
            false => Vec::new(),
        };
        Ok(PyTargetArrays {
            position_indptr: handed_over(py, position_indptr),
            positions: handed_over(py, targets.positions),
            chunks: handed_over(py, targets.chunks),
            tails: handed_over(py, targets.tails),
            open: handed_over(py, targets.open),
            group_indptr: handed_over(py, targets.group_ptr),
            probs: handed_over(py, targets.probs),
            depths: handed_over(py, targets.depths),
            range_indptr: handed_over(py, targets.range_ptr),
            starts: handed_over(py, targets.starts),
            ends: handed_over(py, targets.ends),
            accounts: handed_over(py, accounts),
        })
    }
}

fn handed_over<T: Element>(py: Python<'_>, values: Vec<T>) -> Py<PyArray1<T>> {
    values.into_pyarray(py).unbind()
}

/// All examples' targets one after the other, and where each example's positions begin.
fn joined(made: Vec<Targets>) -> (Vec<i64>, Targets) {
    let mut position_indptr = vec![0];
    let mut made = made.into_iter();
    let Some(mut all) = made.next() else {
        return (position_indptr, Targets::empty());
    };
    position_indptr.push(all.positions.len() as i64);
    for targets in made {
        all.append(targets);
        position_indptr.push(all.positions.len() as i64);
    }
    (position_indptr, all)
}

struct Ragged<'a, T> {
    flat: &'a [T],
    indptr: &'a [i64],
}

impl<'a, T: Element> Ragged<'a, T> {
    fn new(
        what: &'static str,
        flat: &'a PyReadonlyArray1<'_, T>,
        indptr: &'a Ids<'_>,
    ) -> Result<Self> {
        let (flat, indptr) = (slice(what, flat)?, slice("indptr", indptr)?);
        check_offsets("indptr", indptr, flat.len())?;
        Ok(Self { flat, indptr })
    }

    fn len(&self) -> usize {
        self.indptr.len() - 1
    }

    fn range(&self, at: usize) -> std::ops::Range<usize> {
        self.indptr[at] as usize..self.indptr[at + 1] as usize
    }

    fn of(&self, at: usize) -> &'a [T] {
        &self.flat[self.range(at)]
    }
}

fn check_offsets(what: &'static str, offsets: &[i64], length: usize) -> Result<()> {
    let mut previous = 0;
    for (position, &value) in offsets.iter().enumerate() {
        let first = position == 0 && value != 0;
        if first || value < previous || value > length as i64 {
            return Err(Error::Indptr {
                what,
                position,
                value,
                previous,
                length,
            });
        }
        previous = value;
    }
    if offsets.is_empty() || previous != length as i64 {
        return Err(Error::Indptr {
            what,
            position: offsets.len(),
            value: previous,
            previous,
            length,
        });
    }
    Ok(())
}

fn pieces_of(name: &'static str, indptr: &Ids<'_>, ids: &Ids<'_>) -> Result<Pieces> {
    let id = |&id: &i64| u32::try_from(id).map_err(|_| Error::NoSuchId { id, size: 0 });
    Ok(Pieces {
        indptr: slice(name, indptr)?.to_vec(),
        ids: slice(name, ids)?.iter().map(id).collect::<Result<_>>()?,
    })
}

fn slice<'a, T: Element, D: Dimension>(
    name: &'static str,
    array: &'a PyReadonlyArray<'_, T, D>,
) -> Result<&'a [T]> {
    array.as_slice().map_err(|_| Error::Option {
        name,
        value: "an array with gaps between its elements".to_owned(),
        expected: "a contiguous array; pass numpy.ascontiguousarray of it",
    })
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyTargetBuilder>()?;
    module.add_class::<PyTargetArrays>()
}
