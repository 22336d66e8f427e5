//! `xtoken._core.Aligner`: flat arrays in, flat arrays out.

use std::ops::Range;
use std::sync::Arc;

use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1};
use pyo3::prelude::*;

use super::ids::{self, Given};
use super::vocab::PyVocab;
use super::{contiguous, detached, interruptible};
use crate::align::{AlignOptions, Aligner, AlignmentBatch, Ragged, align_batch};
use crate::error::{Error, Result};

/// The part of an aligner that runs without Python.
#[pyclass(name = "Aligner", module = "xtoken._core", frozen)]
pub(super) struct PyAligner {
    aligner: Aligner,
}

const _: () = {
    const fn shared_between_threads<T: Send + Sync>() {}
    shared_between_threads::<PyAligner>();
};

type Arrays<'py> = (
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<u8>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray2<i64>>,
);

type BatchArrays<'py> = (
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<u8>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray2<i64>>,
    Bound<'py, PyArray1<i64>>,
    Bound<'py, PyArray1<i64>>,
);

#[pymethods]
impl PyAligner {
    #[new]
    #[pyo3(signature = (student, teacher, role_pairs = None, whole_characters = false))]
    fn new(
        py: Python<'_>,
        student: &Bound<'_, PyVocab>,
        teacher: &Bound<'_, PyVocab>,
        role_pairs: Option<Vec<(i64, i64)>>,
        whole_characters: bool,
    ) -> PyResult<Self> {
        let (student, teacher) = (student.get().vocab(), teacher.get().vocab());
        let aligner = detached(py, || {
            let options = AlignOptions {
                role_pairs,
                whole_characters,
            };
            Aligner::new(
                Arc::new(student.clone()),
                Arc::new(teacher.clone()),
                options,
            )
        })?;
        Ok(Self { aligner })
    }

    /// The pairs (student id, teacher id) of special tokens that become SPECIAL chunks, in order.
    #[getter]
    fn role_pairs(&self) -> Vec<(u32, u32)> {
        self.aligner.role_pairs()
    }

    /// The alignment of one pair of sequences: student bounds, teacher bounds, kinds, chunk indptr and
    /// byte counts. None where a side is neither an array nor a list or tuple of ints.
    fn align<'py>(
        &self,
        py: Python<'py>,
        student_ids: &Bound<'py, PyAny>,
        teacher_ids: &Bound<'py, PyAny>,
    ) -> PyResult<Option<Arrays<'py>>> {
        let (Some(student), Some(teacher)) = (ids::one(student_ids), ids::one(teacher_ids)) else {
            return Ok(None);
        };
        let (student, teacher) = (student.ids(), teacher.ids());
        arrays(py, detached(py, || self.aligner.align(student, teacher))?).map(Some)
    }

    /// The alignments of a batch whose sides are lists or tuples of sequences, padded rows with or
    /// without a mask, or flat arrays with an indptr; and the columns of both sides' first tokens.
    /// None where a side is in no such form. `threads` 0 for one per core.
    #[expect(
        clippy::too_many_arguments,
        reason = "two sides, called by xtoken.aligner alone"
    )]
    fn align_given<'py>(
        &self,
        py: Python<'py>,
        student: &Bound<'py, PyAny>,
        student_mask: Option<&Bound<'py, PyAny>>,
        student_indptr: Option<&Bound<'py, PyAny>>,
        teacher: &Bound<'py, PyAny>,
        teacher_mask: Option<&Bound<'py, PyAny>>,
        teacher_indptr: Option<&Bound<'py, PyAny>>,
        threads: usize,
    ) -> PyResult<Option<BatchArrays<'py>>> {
        let Some(student) = given(student, student_mask, student_indptr) else {
            return Ok(None);
        };
        let Some(teacher) = given(teacher, teacher_mask, teacher_indptr) else {
            return Ok(None);
        };
        let sides = [&student, &teacher].map(|side| Ragged {
            ids: side.ids(),
            ranges: &side.ranges,
        });
        let batch = interruptible(py, threads, |threads| {
            align_batch(&self.aligner, sides[0], sides[1], threads)
        })?;
        let (student_bounds, teacher_bounds, kinds, chunk_indptr, counts) = arrays(py, batch)?;
        Ok(Some((
            student_bounds,
            teacher_bounds,
            kinds,
            chunk_indptr,
            counts,
            PyArray1::from_vec(py, student.columns),
            PyArray1::from_vec(py, teacher.columns),
        )))
    }

    /// Sequences `ids[starts[b]..ends[b]]` of both sides; `threads` 0 for one per core.
    #[expect(
        clippy::too_many_arguments,
        reason = "flat arrays, called by xtoken.aligner alone"
    )]
    fn align_flat<'py>(
        &self,
        py: Python<'py>,
        student_ids: PyReadonlyArray1<'py, i64>,
        student_starts: PyReadonlyArray1<'py, i64>,
        student_ends: PyReadonlyArray1<'py, i64>,
        teacher_ids: PyReadonlyArray1<'py, i64>,
        teacher_starts: PyReadonlyArray1<'py, i64>,
        teacher_ends: PyReadonlyArray1<'py, i64>,
        threads: usize,
    ) -> PyResult<Arrays<'py>> {
        let student_ranges = ranges("student", &student_starts, &student_ends)?;
        let teacher_ranges = ranges("teacher", &teacher_starts, &teacher_ends)?;
        let student_ids = contiguous("student_ids", &student_ids)?;
        let teacher_ids = contiguous("teacher_ids", &teacher_ids)?;
        let batch = interruptible(py, threads, |threads| {
            let student = Ragged {
                ids: student_ids,
                ranges: &student_ranges,
            };
            let teacher = Ragged {
                ids: teacher_ids,
                ranges: &teacher_ranges,
            };
            align_batch(&self.aligner, student, teacher, threads)
        })?;
        arrays(py, batch)
    }
}

/// One side in any of the forms of [`ids`].
fn given<'py>(
    side: &Bound<'py, PyAny>,
    mask: Option<&Bound<'py, PyAny>>,
    indptr: Option<&Bound<'py, PyAny>>,
) -> Option<Given<'py>> {
    match (mask, indptr) {
        (None, None) => ids::sequences(side).or_else(|| ids::rows(side, None)),
        (mask, None) => ids::rows(side, mask),
        (None, Some(indptr)) => ids::ragged(side, indptr),
        (Some(_), Some(_)) => None,
    }
}

fn ranges(
    side: &'static str,
    starts: &PyReadonlyArray1<'_, i64>,
    ends: &PyReadonlyArray1<'_, i64>,
) -> Result<Vec<Range<usize>>> {
    let starts = contiguous("starts", starts)?;
    let ends = contiguous("ends", ends)?;
    if starts.len() != ends.len() {
        return Err(Error::Shape {
            what: format!("{side} ends"),
            found: ends.len(),
            expected: starts.len(),
            remedy: "pass one end per start",
        });
    }
    // A negative offset becomes one that no array reaches, and is refused with the others.
    let offset = |offset: i64| usize::try_from(offset).unwrap_or(usize::MAX);
    Ok(starts
        .iter()
        .zip(ends)
        .map(|(&start, &end)| offset(start)..offset(end))
        .collect())
}

fn arrays(py: Python<'_>, batch: AlignmentBatch) -> PyResult<Arrays<'_>> {
    let rows = batch.counts.len();
    let counts: Vec<i64> = batch
        .counts
        .iter()
        .flat_map(|of| {
            [
                of.student_bytes,
                of.teacher_bytes,
                of.exact_bytes,
                of.coarse_chunks,
            ]
        })
        .collect();
    Ok((
        PyArray1::from_vec(py, batch.student_bounds),
        PyArray1::from_vec(py, batch.teacher_bounds),
        PyArray1::from_vec(py, batch.kinds),
        PyArray1::from_vec(py, batch.chunk_indptr),
        PyArray1::from_vec(py, counts).reshape([rows, 4])?,
    ))
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyAligner>()
}
