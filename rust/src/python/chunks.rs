//! `xtoken._core.chunk_rows`, `usable_rows` and `usable_chunks`: the chunks of a padded batch.

use numpy::PyUntypedArrayMethods;
use numpy::{PyArray1, PyArray2, PyArrayMethods, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;

use super::{contiguous, detached, without_gaps};
use crate::align::{Bounds, ChunkRows, Chunks, Mask, flatten, usable, usable_of};

type Ints<'py> = PyReadonlyArray1<'py, i64>;
type Rows<'py> = (
    Bound<'py, PyArray2<i64>>,
    Bound<'py, PyArray1<bool>>,
    (i64, i64, i64),
    bool,
);
/// Bounds, columns and mask.
type Side<'py> = (Ints<'py>, Ints<'py>, PyReadonlyArray2<'py, u8>);

/// The chunks of a batch of alignments: [6, C] samples, ranges and kinds; [C] whether each has a
/// predictor; the largest sample and ends; whether all have.
#[pyfunction]
fn chunk_rows<'py>(
    py: Python<'py>,
    student: (Ints<'py>, Ints<'py>),
    teacher: (Ints<'py>, Ints<'py>),
    kinds: PyReadonlyArray1<'py, u8>,
    chunk_indptr: Ints<'py>,
) -> PyResult<Rows<'py>> {
    let student = Bounds {
        bounds: contiguous("student_bounds", &student.0)?,
        columns: contiguous("student_columns", &student.1)?,
    };
    let teacher = Bounds {
        bounds: contiguous("teacher_bounds", &teacher.0)?,
        columns: contiguous("teacher_columns", &teacher.1)?,
    };
    let kinds = without_gaps(kinds.as_slice(), "kind")?;
    let chunk_indptr = contiguous("chunk_indptr", &chunk_indptr)?;
    let rows = detached(py, || flatten(student, teacher, kinds, chunk_indptr))?;
    wrapped(py, rows)
}

/// The same of those that a loss counts.
#[pyfunction]
#[expect(
    clippy::too_many_arguments,
    reason = "flat arrays, called by xtoken.tensors.chunks alone"
)]
fn usable_rows<'py>(
    py: Python<'py>,
    sample: Ints<'py>,
    student: (Ints<'py>, Ints<'py>),
    teacher: (Ints<'py>, Ints<'py>),
    kind: Ints<'py>,
    has_predictor: PyReadonlyArray1<'py, u8>,
    student_mask: PyReadonlyArray2<'py, u8>,
    teacher_mask: PyReadonlyArray2<'py, u8>,
    admit: Vec<i64>,
) -> PyResult<Rows<'py>> {
    let chunks = Chunks {
        sample: contiguous("sample", &sample)?,
        student: (
            contiguous("student_start", &student.0)?,
            contiguous("student_end", &student.1)?,
        ),
        teacher: (
            contiguous("teacher_start", &teacher.0)?,
            contiguous("teacher_end", &teacher.1)?,
        ),
        kind: contiguous("kind", &kind)?,
        has_predictor: without_gaps(has_predictor.as_slice(), "has_predictor")?,
    };
    let student_mask = Mask {
        flags: without_gaps(student_mask.as_slice(), "student_mask")?,
        width: student_mask.shape()[1],
    };
    let teacher_mask = Mask {
        flags: without_gaps(teacher_mask.as_slice(), "teacher_mask")?,
        width: teacher_mask.shape()[1],
    };
    let rows = detached(py, || usable(&chunks, student_mask, teacher_mask, &admit))?;
    wrapped(py, rows)
}

/// Both of them in one pass; None where the two of them have to look.
#[pyfunction]
fn usable_chunks<'py>(
    py: Python<'py>,
    student: Side<'py>,
    teacher: Side<'py>,
    kinds: PyReadonlyArray1<'py, u8>,
    chunk_indptr: Ints<'py>,
    admit: Vec<i64>,
) -> PyResult<Option<Rows<'py>>> {
    let Some(((student, student_mask), (teacher, teacher_mask))) =
        side(&student).zip(side(&teacher))
    else {
        return Ok(None);
    };
    let (Ok(kinds), Ok(chunk_indptr)) = (kinds.as_slice(), chunk_indptr.as_slice()) else {
        return Ok(None);
    };
    let rows = detached(py, || {
        let (sides, masks) = ([student, teacher], [student_mask, teacher_mask]);
        Ok(usable_of(sides, kinds, chunk_indptr, masks, &admit))
    })?;
    rows.map(|rows| wrapped(py, rows)).transpose()
}

fn side<'a>((bounds, columns, mask): &'a Side<'_>) -> Option<(Bounds<'a>, Mask<'a>)> {
    let bounds = Bounds {
        bounds: bounds.as_slice().ok()?,
        columns: columns.as_slice().ok()?,
    };
    let mask = Mask {
        flags: mask.as_slice().ok()?,
        width: mask.shape()[1],
    };
    Some((bounds, mask))
}

fn wrapped(py: Python<'_>, rows: ChunkRows) -> PyResult<Rows<'_>> {
    let count = rows.has_predictor.len();
    Ok((
        PyArray1::from_vec(py, rows.columns).reshape([6, count])?,
        PyArray1::from_vec(py, rows.has_predictor),
        rows.reach.into(),
        rows.predicted,
    ))
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(chunk_rows, module)?)?;
    module.add_function(wrap_pyfunction!(usable_rows, module)?)?;
    module.add_function(wrap_pyfunction!(usable_chunks, module)?)
}
