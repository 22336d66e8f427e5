//! `xtoken._core.exact_kl`: exact KL of rows of logits, on the CPU.

use numpy::{Element, IntoPyArray, PyReadonlyArray1, PyReadonlyArray2, PyReadwriteArray2};
use pyo3::prelude::*;

use super::losses::{Columns, rows_of};
use super::{contiguous, detached, without_gaps};
use crate::losses::{Depths, ExactKl, FoundExact, Real, Targets};
use crate::parallel::Threads;

/// The targets of many positions: tails, open, group_ptr, probs, depths, range_ptr, starts, ends,
/// order.
type TargetColumns<'py> = (
    Bound<'py, PyAny>,
    PyReadonlyArray1<'py, bool>,
    PyReadonlyArray1<'py, i64>,
    Bound<'py, PyAny>,
    PyReadonlyArray1<'py, i64>,
    PyReadonlyArray1<'py, i64>,
    PyReadonlyArray1<'py, i64>,
    PyReadonlyArray1<'py, i64>,
    PyReadonlyArray1<'py, i64>,
);

/// Weights of depths: of groups and tails; union_ptr, masses, weights; member_ptr, groups, unions.
type DepthColumns<'py> = (
    PyReadonlyArray1<'py, f64>,
    PyReadonlyArray1<'py, f64>,
    PyReadonlyArray1<'py, i64>,
    PyReadonlyArray1<'py, f64>,
    PyReadonlyArray1<'py, f64>,
    PyReadonlyArray1<'py, i64>,
    PyReadonlyArray1<'py, i64>,
    PyReadonlyArray1<'py, i64>,
);

type Answer<'py> = (
    Columns<'py, bool>,
    Columns<'py, f64>,
    Columns<'py, f64>,
    Columns<'py, f64>,
    Columns<'py, f64>,
);

/// Exact KL of positions. Of each: whether it was computed, loss, tail, the part below depth 0, sum
/// of the gradient.
#[pyfunction]
#[pyo3(signature = (
    student, rows, targets, seeds, *, size, factor, depths, gradient, adds, threads
))]
#[expect(
    clippy::too_many_arguments,
    reason = "keyword arguments of one Python call"
)]
fn exact_kl<'py>(
    py: Python<'py>,
    student: &Bound<'py, PyAny>,
    rows: PyReadonlyArray1<'py, i64>,
    targets: TargetColumns<'py>,
    seeds: PyReadonlyArray1<'py, f64>,
    size: usize,
    factor: f64,
    depths: Option<DepthColumns<'py>>,
    gradient: Option<Bound<'py, PyAny>>,
    adds: bool,
    threads: usize,
) -> PyResult<Answer<'py>> {
    let given = ExactGiven {
        student,
        rows: contiguous("rows", &rows)?,
        targets: &targets,
        seeds: without_gaps(seeds.as_slice(), "seeds")?,
        size,
        factor,
        depths: depths.as_ref().map(depths_of).transpose()?,
        gradient: gradient.as_ref(),
        adds,
        threads,
    };
    let found = if student.extract::<PyReadonlyArray2<'_, f32>>().is_ok() {
        exact_of::<f32>(py, &given)?
    } else {
        exact_of::<f64>(py, &given)?
    };
    let column = |of: fn(&FoundExact) -> f64| {
        let values: Vec<f64> = found.iter().map(of).collect();
        values.into_pyarray(py)
    };
    let good: Vec<bool> = found.iter().map(|row| row.good).collect();
    Ok((
        good.into_pyarray(py),
        column(|row| row.loss),
        column(|row| row.tail),
        column(|row| row.deeper),
        column(|row| row.sum),
    ))
}

/// What `exact_kl` is given, before its dtype is known.
struct ExactGiven<'a, 'py> {
    student: &'a Bound<'py, PyAny>,
    rows: &'a [i64],
    targets: &'a TargetColumns<'py>,
    seeds: &'a [f64],
    size: usize,
    factor: f64,
    depths: Option<Depths<'a>>,
    gradient: Option<&'a Bound<'py, PyAny>>,
    adds: bool,
    threads: usize,
}

fn depths_of<'a>(given: &'a DepthColumns<'_>) -> PyResult<Depths<'a>> {
    Ok(Depths {
        groups: without_gaps(given.0.as_slice(), "weights of groups")?,
        tails: without_gaps(given.1.as_slice(), "weights of tails")?,
        union_ptr: contiguous("union_ptr", &given.2)?,
        masses: without_gaps(given.3.as_slice(), "masses of unions")?,
        weights: without_gaps(given.4.as_slice(), "weights of unions")?,
        member_ptr: contiguous("member_ptr", &given.5)?,
        members: [
            contiguous("member_group", &given.6)?,
            contiguous("member_union", &given.7)?,
        ],
    })
}

fn exact_of<T: Real + Element>(
    py: Python<'_>,
    given: &ExactGiven<'_, '_>,
) -> PyResult<Vec<FoundExact>> {
    let student: PyReadonlyArray2<'_, T> = given.student.extract()?;
    let (tails, open, group_ptr, probs, depths, range_ptr, starts, ends, order) = given.targets;
    let tails: PyReadonlyArray1<'_, T> = tails.extract()?;
    let probs: PyReadonlyArray1<'_, T> = probs.extract()?;
    let seeds: Vec<T> = given.seeds.iter().map(|&seed| T::of(seed)).collect();
    let mut gradient: Option<PyReadwriteArray2<'_, T>> =
        given.gradient.map(|array| array.extract()).transpose()?;
    let call = ExactKl {
        targets: Targets {
            tails: without_gaps(tails.as_slice(), "tails")?,
            open: without_gaps(open.as_slice(), "open")?,
            group_ptr: contiguous("group_ptr", group_ptr)?,
            probs: without_gaps(probs.as_slice(), "probs")?,
            depths: contiguous("depths", depths)?,
            range_ptr: contiguous("range_ptr", range_ptr)?,
            starts: contiguous("starts", starts)?,
            ends: contiguous("ends", ends)?,
            order: contiguous("order", order)?,
        },
        student: rows_of(&student, "student", given.rows)?,
        size: given.size,
        seeds: &seeds,
        factor: given.factor,
        depths: given.depths,
    };
    let written = gradient
        .as_mut()
        .map(|array| without_gaps(array.as_slice_mut(), "gradient"))
        .transpose()?;
    let (adds, threads) = (given.adds, given.threads);
    detached(py, || {
        call.run(written.map(|slice| (slice, adds)), &Threads::new(threads)?)
    })
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(exact_kl, module)?)
}
