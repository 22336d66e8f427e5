//! `xtoken._core.cross_entropy`: cross-entropy of rows of logits, on the CPU.

use numpy::{Element, IntoPyArray, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray2};
use pyo3::prelude::*;

use super::losses::{Columns, rows_of};
use super::{contiguous, detached, without_gaps};
use crate::losses::{CrossEntropy, Found, Real};
use crate::parallel::Threads;

/// Of each row its loss, and a number that is finite where all of its gradient is.
#[pyfunction]
#[pyo3(signature = (student, rows, targets, *, size, seed, gradient, adds, threads))]
#[expect(
    clippy::too_many_arguments,
    reason = "keyword arguments of one Python call"
)]
fn cross_entropy<'py>(
    py: Python<'py>,
    student: &Bound<'py, PyAny>,
    rows: PyReadonlyArray1<'py, i64>,
    targets: PyReadonlyArray1<'py, i64>,
    size: usize,
    seed: f64,
    gradient: Option<Bound<'py, PyAny>>,
    adds: bool,
    threads: usize,
) -> PyResult<(Columns<'py, f64>, Columns<'py, f64>)> {
    let rows = contiguous("rows", &rows)?;
    let targets = contiguous("targets", &targets)?;
    let given = (size, seed, adds, threads);
    let found = if student.extract::<PyReadonlyArray2<'_, f32>>().is_ok() {
        run_as::<f32>(py, student, rows, targets, gradient.as_ref(), given)?
    } else {
        run_as::<f64>(py, student, rows, targets, gradient.as_ref(), given)?
    };
    let column = |of: fn(&Found) -> f64| {
        let values: Vec<f64> = found.iter().map(of).collect();
        values.into_pyarray(py)
    };
    Ok((column(|row| row.loss), column(|row| row.sum)))
}

fn run_as<'py, T: Real + Element>(
    py: Python<'py>,
    student: &Bound<'py, PyAny>,
    rows: &[i64],
    targets: &[i64],
    gradient: Option<&Bound<'py, PyAny>>,
    (size, seed, adds, threads): (usize, f64, bool, usize),
) -> PyResult<Vec<Found>> {
    let student: PyReadonlyArray2<'_, T> = student.extract()?;
    let mut gradient: Option<PyReadwriteArray2<'_, T>> =
        gradient.map(|array| array.extract()).transpose()?;
    let call = CrossEntropy {
        student: rows_of(&student, "student", rows)?,
        size,
        targets,
        seed: T::of(seed),
    };
    let written = gradient
        .as_mut()
        .map(|array| without_gaps(array.as_slice_mut(), "gradient"))
        .transpose()?;
    detached(py, || {
        call.run(written.map(|slice| (slice, adds)), &Threads::new(threads)?)
    })
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(cross_entropy, module)?)
}
