//! `xtoken._core.prefix_kl_below`: prefix KL at nodes of a trie, on the CPU.

use numpy::{Element, IntoPyArray, PyReadonlyArray1, PyReadonlyArray2};
use pyo3::prelude::*;

use super::losses::{Columns, Given, Sides, rows_of};
use super::trie::PyPieceTrie;
use super::{contiguous, detached, without_gaps};
use crate::losses::{Below, FoundBelow, Real, Stored, Teacher};
use crate::parallel::Threads;

type BelowAnswer<'py> = (
    Columns<'py, bool>,
    Columns<'py, f64>,
    Columns<'py, bool>,
    Columns<'py, f64>,
    Columns<'py, f64>,
);

/// Prefix KL at nodes of a trie. Of each: whether it was computed, loss, whether it is compared,
/// known mass, sum of the gradient.
#[pyfunction]
#[pyo3(signature = (
    trie, student, teacher, student_rows, teacher_rows, ptr, nodes, seeds, *, ids, log_totals, sizes,
    mirrored, temperature, min_mass, end, gradient, threads
))]
#[expect(
    clippy::too_many_arguments,
    reason = "keyword arguments of one Python call"
)]
fn prefix_kl_below<'py>(
    py: Python<'py>,
    trie: &Bound<'py, PyPieceTrie>,
    student: &Bound<'py, PyAny>,
    teacher: &Bound<'py, PyAny>,
    student_rows: PyReadonlyArray1<'_, i64>,
    teacher_rows: PyReadonlyArray1<'_, i64>,
    ptr: PyReadonlyArray1<'_, i64>,
    nodes: PyReadonlyArray1<'_, i64>,
    seeds: PyReadonlyArray1<'_, f64>,
    ids: Option<PyReadonlyArray2<'_, i64>>,
    log_totals: Option<PyReadonlyArray1<'_, f64>>,
    sizes: (usize, usize),
    mirrored: bool,
    temperature: f64,
    min_mass: f64,
    end: bool,
    gradient: Option<Bound<'py, PyAny>>,
    threads: usize,
) -> PyResult<BelowAnswer<'py>> {
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
    let items = Items {
        trie: trie.get(),
        ptr: contiguous("ptr", &ptr)?,
        nodes: contiguous("nodes", &nodes)?,
        ids: ids
            .as_ref()
            .map(|ids| without_gaps(ids.as_slice(), "ids"))
            .transpose()?,
        log_totals: log_totals
            .as_ref()
            .map(|totals| without_gaps(totals.as_slice(), "log_totals"))
            .transpose()?,
        sizes,
        mirrored,
        temperature,
        min_mass,
        end,
        threads,
    };
    let found = if student.extract::<PyReadonlyArray2<'_, f32>>().is_ok() {
        below_of::<f32>(py, given, &items)?
    } else {
        below_of::<f64>(py, given, &items)?
    };
    let column = |of: fn(&FoundBelow) -> f64| {
        let values: Vec<f64> = found.iter().map(of).collect();
        values.into_pyarray(py)
    };
    let flags = |of: fn(&FoundBelow) -> bool| {
        let values: Vec<bool> = found.iter().map(of).collect();
        values.into_pyarray(py)
    };
    Ok((
        flags(|item| item.good),
        column(|item| item.loss),
        flags(|item| item.counted),
        column(|item| item.known),
        column(|item| item.sum),
    ))
}

/// What `prefix_kl_below` is given beside the models' numbers.
struct Items<'a> {
    trie: &'a PyPieceTrie,
    ptr: &'a [i64],
    nodes: &'a [i64],
    ids: Option<&'a [i64]>,
    log_totals: Option<&'a [f64]>,
    sizes: (usize, usize),
    mirrored: bool,
    temperature: f64,
    min_mass: f64,
    end: bool,
    threads: usize,
}

fn below_of<T: Real + Element>(
    py: Python<'_>,
    given: Given<'_, '_>,
    items: &Items<'_>,
) -> PyResult<Vec<FoundBelow>> {
    let mut sides: Sides<'_, T> = given.read()?;
    let rows = rows_of(&sides.teacher, "teacher", given.rows.1)?;
    let call = Below {
        trie: items.trie.trie(),
        mirrored: items.mirrored,
        ptr: items.ptr,
        nodes: items.nodes,
        student: rows_of(&sides.student, "student", given.rows.0)?,
        teacher: match items.ids {
            None => Teacher::Full(rows, items.log_totals),
            Some(ids) => Teacher::Stored(Stored {
                ids,
                log_probs: rows,
                factor: 1.0,
            }),
        },
        sizes: items.sizes,
        seeds: &sides.seeds,
        temperature: items.temperature,
        min_mass: items.min_mass,
        end: items.end,
    };
    let written = sides
        .gradient
        .as_mut()
        .map(|array| without_gaps(array.as_slice_mut(), "gradient"))
        .transpose()?;
    detached(py, || call.run(written, &Threads::new(items.threads)?))
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_function(wrap_pyfunction!(prefix_kl_below, module)?)
}
