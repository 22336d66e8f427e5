//! `xtoken._core.sorted_l1`: the L1 distance of sorted rows, on the CPU.

use numpy::{IntoPyArray, PyReadonlyArray2, PyReadwriteArray2, PyUntypedArrayMethods};
use pyo3::prelude::*;

use super::losses::{Columns, rows_of};
use super::{detached, without_gaps};
use crate::losses::SortedL1;
use crate::parallel::Threads;

/// Of each row its distance, NaN where a value is no probability.
#[pyfunction]
#[pyo3(signature = (student, teacher, *, signs, threads))]
fn sorted_l1<'py>(
    py: Python<'py>,
    student: PyReadonlyArray2<'py, f32>,
    teacher: PyReadonlyArray2<'py, f32>,
    signs: Option<PyReadwriteArray2<'py, f32>>,
    threads: usize,
) -> PyResult<Columns<'py, f64>> {
    let index: Vec<i64> = (0..student.shape()[0] as i64).collect();
    let call = SortedL1 {
        student: rows_of(&student, "student", &index)?,
        teacher: rows_of(&teacher, "teacher", &index)?,
    };
    let mut signs = signs;
    let written = signs
        .as_mut()
        .map(|array| without_gaps(array.as_slice_mut(), "signs"))
        .transpose()?;
    let found = detached(py, || call.run(written, &Threads::new(threads)?))?;
    Ok(found.into_pyarray(py))
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(sorted_l1, module)?)
}
