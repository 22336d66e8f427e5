//! `xtoken._core.ForwardKL`: P-KL of rows of logits on the CPU.

use numpy::{
    Element, IntoPyArray, PyArray1, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray2,
    PyUntypedArrayMethods,
};
use pyo3::prelude::*;

use super::{contiguous, detached, without_gaps};
use crate::error::Result;
use crate::losses::{
    ColumnMasses, ForwardKl, Found, Real, Rows, Sparse, Stored, StoredKl, StoredTarget, Tail,
    Target,
};
use crate::parallel::Threads;

/// What was made of W for rows of float32 or of float64.
enum Kept<S, D> {
    Single(S),
    Double(D),
}

/// W on the columns that P-KL compares, ready for rows of float32 or of float64.
#[pyclass(name = "ForwardKL", module = "xtoken._core", frozen)]
pub(super) struct PyForwardKl {
    kept: Kept<Target<f32>, Target<f64>>,
}

pub(super) type Columns<'py, T> = Bound<'py, PyArray1<T>>;
type Answer<'py> = (
    Columns<'py, bool>,
    Columns<'py, f64>,
    Columns<'py, f64>,
    Columns<'py, f64>,
    Columns<'py, f64>,
    Columns<'py, f64>,
);

#[pymethods]
impl PyForwardKl {
    #[new]
    #[pyo3(signature = (
        inputs, output_ptr, values, *, rows, columns, folds, empty, sizes, single, alone=false
    ))]
    #[expect(
        clippy::too_many_arguments,
        reason = "keyword arguments of one Python call"
    )]
    fn new(
        inputs: PyReadonlyArray1<'_, i64>,
        output_ptr: PyReadonlyArray1<'_, i64>,
        values: PyReadonlyArray1<'_, f64>,
        rows: Option<PyReadonlyArray1<'_, i64>>,
        columns: PyReadonlyArray1<'_, i64>,
        folds: Vec<(i64, i64)>,
        empty: PyReadonlyArray1<'_, i64>,
        sizes: (usize, usize),
        single: bool,
        alone: bool,
    ) -> PyResult<Self> {
        let inputs = contiguous("inputs", &inputs)?;
        let ptr = contiguous("output_ptr", &output_ptr)?;
        let values = without_gaps(values.as_slice(), "values")?;
        let rows = rows
            .as_ref()
            .map(|rows| contiguous("rows", rows))
            .transpose()?;
        let columns = contiguous("columns", &columns)?;
        let empty = contiguous("empty", &empty)?;
        let width = rows.map_or(sizes.0, <[i64]>::len);
        let kept = if single {
            let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
            let sparse = Sparse::new(inputs, ptr, &values, width)?;
            Kept::Single(Target::new(
                sparse, rows, columns, &folds, empty, sizes, alone,
            )?)
        } else {
            let sparse = Sparse::new(inputs, ptr, values, width)?;
            Kept::Double(Target::new(
                sparse, rows, columns, &folds, empty, sizes, alone,
            )?)
        };
        Ok(Self { kept })
    }

    /// Of each row: whether it was computed, loss, teacher mass, mass on empty rows, sum of the
    /// gradient, log of the teacher's denominator.
    #[pyo3(signature = (
        student, teacher, student_rows, teacher_rows, seeds, *, temperature, top_k, gradient, adds,
        threads, log_totals=None, whole=false
    ))]
    #[expect(
        clippy::too_many_arguments,
        reason = "keyword arguments of one Python call"
    )]
    fn run<'py>(
        &self,
        py: Python<'py>,
        student: &Bound<'py, PyAny>,
        teacher: &Bound<'py, PyAny>,
        student_rows: PyReadonlyArray1<'_, i64>,
        teacher_rows: PyReadonlyArray1<'_, i64>,
        seeds: PyReadonlyArray1<'_, f64>,
        temperature: f64,
        top_k: Option<usize>,
        gradient: Option<Bound<'py, PyAny>>,
        adds: bool,
        threads: usize,
        log_totals: Option<PyReadonlyArray1<'_, f64>>,
        whole: bool,
    ) -> PyResult<Answer<'py>> {
        let given = Given {
            student,
            teacher,
            gradient: gradient.as_ref(),
            rows: (
                contiguous("student_rows", &student_rows)?,
                contiguous("teacher_rows", &teacher_rows)?,
            ),
            seeds: without_gaps(seeds.as_slice(), "seeds")?,
        };
        let totals = log_totals
            .as_ref()
            .map(|totals| without_gaps(totals.as_slice(), "log_totals"))
            .transpose()?;
        let options = (temperature, top_k, adds, threads, totals, whole);
        let found = match &self.kept {
            Kept::Single(target) => run_as(py, target, given, options)?,
            Kept::Double(target) => run_as(py, target, given, options)?,
        };
        Ok(answer(py, &found))
    }
}

fn answer<'py>(py: Python<'py>, found: &[Found]) -> Answer<'py> {
    let column = |of: fn(&Found) -> f64| {
        let values: Vec<f64> = found.iter().map(of).collect();
        values.into_pyarray(py)
    };
    let good: Vec<bool> = found.iter().map(|row| row.good).collect();
    (
        good.into_pyarray(py),
        column(|row| row.loss),
        column(|row| row.mass),
        column(|row| row.empty),
        column(|row| row.sum),
        column(|row| row.log_total),
    )
}

/// What both classes' calls are given, before its dtype is known.
#[derive(Clone, Copy)]
pub(super) struct Given<'a, 'py> {
    pub(super) student: &'a Bound<'py, PyAny>,
    /// Logits, or log-probabilities.
    pub(super) teacher: &'a Bound<'py, PyAny>,
    pub(super) gradient: Option<&'a Bound<'py, PyAny>>,
    pub(super) rows: (&'a [i64], &'a [i64]),
    pub(super) seeds: &'a [f64],
}

/// The same, of one dtype.
pub(super) struct Sides<'py, T: Real + Element> {
    pub(super) student: PyReadonlyArray2<'py, T>,
    pub(super) teacher: PyReadonlyArray2<'py, T>,
    pub(super) gradient: Option<PyReadwriteArray2<'py, T>>,
    pub(super) seeds: Vec<T>,
}

impl<'py> Given<'_, 'py> {
    pub(super) fn read<T: Real + Element>(&self) -> PyResult<Sides<'py, T>> {
        Ok(Sides {
            student: self.student.extract()?,
            teacher: self.teacher.extract()?,
            gradient: self.gradient.map(|array| array.extract()).transpose()?,
            seeds: self.seeds.iter().map(|&seed| T::of(seed)).collect(),
        })
    }
}

pub(super) fn rows_of<'a, T: Real + Element>(
    array: &'a PyReadonlyArray2<'_, T>,
    name: &'static str,
    index: &'a [i64],
) -> Result<Rows<'a, T>> {
    Ok(Rows {
        flat: without_gaps(array.as_slice(), name)?,
        width: array.shape()[1],
        index,
    })
}

fn run_as<T: Real + Element>(
    py: Python<'_>,
    target: &Target<T>,
    given: Given<'_, '_>,
    options: (f64, Option<usize>, bool, usize, Option<&[f64]>, bool),
) -> PyResult<Vec<Found>> {
    let mut sides: Sides<'_, T> = given.read()?;
    let call = ForwardKl {
        target,
        student: rows_of(&sides.student, "student", given.rows.0)?,
        teacher: rows_of(&sides.teacher, "teacher", given.rows.1)?,
        seeds: &sides.seeds,
        temperature: options.0,
        top_k: options.1,
        log_totals: options.4,
        whole: options.5,
    };
    let written = sides
        .gradient
        .as_mut()
        .map(|array| without_gaps(array.as_slice_mut(), "gradient"))
        .transpose()?;
    detached(py, || {
        call.run(
            written.map(|slice| (slice, options.2)),
            &Threads::new(options.3)?,
        )
    })
}

/// W, ready for stored predictions and rows of float32 or of float64.
#[pyclass(name = "StoredForwardKL", module = "xtoken._core", frozen)]
pub(super) struct PyStoredForwardKl {
    kept: Kept<StoredTarget<f32>, StoredTarget<f64>>,
}

#[pymethods]
impl PyStoredForwardKl {
    #[new]
    #[pyo3(signature = (inputs, output_ptr, values, *, places, empty, size, single))]
    fn new(
        inputs: PyReadonlyArray1<'_, i64>,
        output_ptr: PyReadonlyArray1<'_, i64>,
        values: PyReadonlyArray1<'_, f64>,
        places: PyReadonlyArray1<'_, i64>,
        empty: PyReadonlyArray1<'_, i64>,
        size: usize,
        single: bool,
    ) -> PyResult<Self> {
        let inputs = contiguous("inputs", &inputs)?;
        let ptr = contiguous("output_ptr", &output_ptr)?;
        let values = without_gaps(values.as_slice(), "values")?;
        let places = contiguous("places", &places)?;
        let empty = contiguous("empty", &empty)?;
        let kept = if single {
            let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
            let sparse = Sparse::new(inputs, ptr, &values, size)?;
            Kept::Single(StoredTarget::new(&sparse, places, empty)?)
        } else {
            let sparse = Sparse::new(inputs, ptr, values, size)?;
            Kept::Double(StoredTarget::new(&sparse, places, empty)?)
        };
        Ok(Self { kept })
    }

    /// As `ForwardKL.run`.
    #[pyo3(signature = (
        student, ids, log_probs, student_rows, teacher_rows, seeds, *, temperature, factor, top_k,
        tail, whole, gradient, adds, threads
    ))]
    #[expect(
        clippy::too_many_arguments,
        reason = "keyword arguments of one Python call"
    )]
    fn run<'py>(
        &self,
        py: Python<'py>,
        student: &Bound<'py, PyAny>,
        ids: PyReadonlyArray2<'_, i64>,
        log_probs: &Bound<'py, PyAny>,
        student_rows: PyReadonlyArray1<'_, i64>,
        teacher_rows: PyReadonlyArray1<'_, i64>,
        seeds: PyReadonlyArray1<'_, f64>,
        temperature: f64,
        factor: f64,
        top_k: usize,
        tail: Option<(f64, Option<usize>)>,
        whole: bool,
        gradient: Option<Bound<'py, PyAny>>,
        adds: bool,
        threads: usize,
    ) -> PyResult<Answer<'py>> {
        let given = Given {
            student,
            teacher: log_probs,
            gradient: gradient.as_ref(),
            rows: (
                contiguous("student_rows", &student_rows)?,
                contiguous("teacher_rows", &teacher_rows)?,
            ),
            seeds: without_gaps(seeds.as_slice(), "seeds")?,
        };
        let ids = without_gaps(ids.as_slice(), "ids")?;
        let tail = tail.map(|(least, all)| Tail { least, all });
        let options = StoredOptions {
            ids,
            temperature,
            factor,
            top_k,
            tail,
            whole,
            adds,
            threads,
        };
        let found = match &self.kept {
            Kept::Single(target) => run_stored(py, target, given, options)?,
            Kept::Double(target) => run_stored(py, target, given, options)?,
        };
        Ok(answer(py, &found))
    }
}

struct StoredOptions<'a> {
    ids: &'a [i64],
    temperature: f64,
    factor: f64,
    top_k: usize,
    tail: Option<Tail>,
    whole: bool,
    adds: bool,
    threads: usize,
}

fn run_stored<T: Real + Element>(
    py: Python<'_>,
    target: &StoredTarget<T>,
    given: Given<'_, '_>,
    options: StoredOptions<'_>,
) -> PyResult<Vec<Found>> {
    let mut sides: Sides<'_, T> = given.read()?;
    let call = StoredKl {
        target,
        student: rows_of(&sides.student, "student", given.rows.0)?,
        teacher: Stored {
            ids: options.ids,
            log_probs: rows_of(&sides.teacher, "log_probs", given.rows.1)?,
            factor: options.factor,
        },
        seeds: &sides.seeds,
        temperature: options.temperature,
        top_k: options.top_k,
        tail: options.tail,
        whole: options.whole,
    };
    let written = sides
        .gradient
        .as_mut()
        .map(|array| without_gaps(array.as_slice_mut(), "gradient"))
        .transpose()?;
    detached(py, || {
        call.run(
            written.map(|slice| (slice, options.adds)),
            &Threads::new(options.threads)?,
        )
    })
}

/// The sum of the softmaxes of a teacher's rows over `size` columns, and the log of each row's
/// denominator.
#[pyfunction]
#[pyo3(signature = (logits, rows, *, size, temperature, threads))]
fn column_masses<'py>(
    py: Python<'py>,
    logits: &Bound<'py, PyAny>,
    rows: PyReadonlyArray1<'_, i64>,
    size: usize,
    temperature: f64,
    threads: usize,
) -> PyResult<(Columns<'py, f64>, Columns<'py, f64>)> {
    let rows = contiguous("rows", &rows)?;
    let (masses, totals) = if let Ok(single) = logits.extract::<PyReadonlyArray2<'_, f32>>() {
        masses_of(py, &single, rows, size, temperature, threads)?
    } else {
        let double: PyReadonlyArray2<'_, f64> = logits.extract()?;
        masses_of(py, &double, rows, size, temperature, threads)?
    };
    Ok((masses.into_pyarray(py), totals.into_pyarray(py)))
}

fn masses_of<T: Real + Element>(
    py: Python<'_>,
    logits: &PyReadonlyArray2<'_, T>,
    rows: &[i64],
    size: usize,
    temperature: f64,
    threads: usize,
) -> PyResult<(Vec<f64>, Vec<f64>)> {
    let call = ColumnMasses {
        teacher: rows_of(logits, "logits", rows)?,
        size,
        temperature,
    };
    detached(py, || call.run(&Threads::new(threads)?))
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyForwardKl>()?;
    module.add_class::<PyStoredForwardKl>()?;
    module.add_function(wrap_pyfunction!(column_masses, module)?)
}
