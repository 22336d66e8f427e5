//! `xtoken._core.build_projection`: W as numpy arrays.

use std::collections::BTreeSet;

use numpy::{IntoPyArray, PyArray1};
use pyo3::prelude::*;

use super::interruptible;
use super::vocab::PyVocab;
use crate::error::{Error, Result};
use crate::projection::{self, Canonical, Options, Projection, Reverse, Rule};
use crate::vocab::Role;

/// W in CSR form as Python sees it; each array is handed over without a copy.
#[pyclass(name = "ProjectionArrays", module = "xtoken._core", frozen, get_all)]
pub(super) struct PyProjectionArrays {
    /// Offsets into `indices` and `weights`, one more than there are student ids.
    indptr: Py<PyArray1<i64>>,
    /// Teacher ids; in a row by falling weight.
    indices: Py<PyArray1<i64>>,
    /// Weights, above 0; a row sums to 1.
    weights: Py<PyArray1<f32>>,
    /// What made each row: an index into `PROJECTION_RULES`.
    rules: Py<PyArray1<u8>>,
    /// Offsets into `pieces`, one more than there are student ids.
    pieces_indptr: Py<PyArray1<i64>>,
    /// The teacher's pieces of each student token.
    pieces: Py<PyArray1<i64>>,
    /// Offsets into `teacher_pieces`; `None` where the student cannot segment.
    teacher_pieces_indptr: Option<Py<PyArray1<i64>>>,
    /// The student's pieces of each teacher token; `None` where it cannot segment.
    teacher_pieces: Option<Py<PyArray1<i64>>>,
    /// Rows to which the reverse rule gave an entry, beside those that it made alone.
    reverse_rows: usize,
    /// Teacher stops that no row reaches.
    stop_fold_from: Py<PyArray1<i64>>,
    /// For each of them, the reached stop that stands for it.
    stop_fold_to: Py<PyArray1<i64>>,
}

impl PyProjectionArrays {
    fn new(py: Python<'_>, w: Projection) -> Self {
        let rules: Vec<u8> = w.rules.iter().map(|&rule| rule as u8).collect();
        let ids = |ids: &[u32]| -> Py<PyArray1<i64>> {
            let ids: Vec<i64> = ids.iter().map(|&id| i64::from(id)).collect();
            ids.into_pyarray(py).unbind()
        };
        let (from, to): (Vec<u32>, Vec<u32>) = w.stop_folds.into_iter().unzip();
        let (teacher_pieces_indptr, teacher_pieces) = match w.teacher_pieces {
            Some(pieces) => (
                Some(pieces.indptr.into_pyarray(py).unbind()),
                Some(ids(&pieces.ids)),
            ),
            None => (None, None),
        };
        Self {
            indptr: w.indptr.into_pyarray(py).unbind(),
            indices: w.indices.into_pyarray(py).unbind(),
            weights: w.weights.into_pyarray(py).unbind(),
            rules: rules.into_pyarray(py).unbind(),
            pieces_indptr: w.pieces.indptr.into_pyarray(py).unbind(),
            pieces: ids(&w.pieces.ids),
            teacher_pieces_indptr,
            teacher_pieces,
            reverse_rows: w.reverse_rows,
            stop_fold_from: ids(&from),
            stop_fold_to: ids(&to),
        }
    }
}

fn count(name: &'static str, value: i64, least: i64, expected: &'static str) -> Result<usize> {
    usize::try_from(value)
        .ok()
        .filter(|_| value >= least)
        .ok_or_else(|| Error::Option {
            name,
            value: value.to_string(),
            expected,
        })
}

fn canonical(names: &BTreeSet<String>) -> Result<Canonical> {
    let mut canonical = Canonical::default();
    for name in names {
        match name.as_str() {
            "punctuation_space" => canonical.punctuation_space = true,
            "case" => canonical.case = true,
            _ => {
                return Err(Error::Option {
                    name: "canonical",
                    value: format!("{name:?}"),
                    expected: "names among 'punctuation_space', 'case'",
                });
            }
        }
    }
    Ok(canonical)
}

fn reverse(name: &str) -> Result<Reverse> {
    match name {
        "off" => Ok(Reverse::Off),
        "unmatched" => Ok(Reverse::Unmatched),
        "all" => Ok(Reverse::All),
        _ => Err(Error::Option {
            name: "reverse",
            value: format!("{name:?}"),
            expected: "False, True, 'off', 'unmatched' or 'all'",
        }),
    }
}

fn role(name: &String) -> Result<Role> {
    Role::from_name(name).ok_or_else(|| Error::Option {
        name: "special_roles",
        value: format!("{name:?}: None"),
        expected: "None only for 'bos', 'eos', 'pad', 'unk', 'eot'",
    })
}

/// W of two vocabularies; see `xtoken.Projection.build`. `threads=0` is one per core.
#[pyfunction]
#[pyo3(signature = (
    student, teacher, *, top_k, decay, max_pieces, canonical, reverse, special_pairs, ignored_roles,
    name_similarity, threads,
))]
#[expect(
    clippy::too_many_arguments,
    reason = "keyword arguments of one Python call"
)]
fn build_projection(
    py: Python<'_>,
    student: &PyVocab,
    teacher: &PyVocab,
    top_k: i64,
    decay: f64,
    max_pieces: i64,
    canonical: BTreeSet<String>,
    reverse: &str,
    special_pairs: Vec<(u32, u32)>,
    ignored_roles: Vec<String>,
    name_similarity: f64,
    threads: i64,
) -> PyResult<PyProjectionArrays> {
    let options = Options {
        top_k: count("top_k", top_k, 1, "at least 1")?,
        decay,
        max_pieces: count("max_pieces", max_pieces, 1, "at least 1")?,
        canonical: self::canonical(&canonical)?,
        reverse: self::reverse(reverse)?,
        special_pairs,
        ignored_roles: ignored_roles.iter().map(role).collect::<Result<_>>()?,
        name_similarity,
    };
    let (student, teacher) = (student.tokenizer(), teacher.tokenizer());
    let threads = count(
        "threads",
        threads,
        0,
        "at least 1, or None for one per core",
    )?;
    let w = interruptible(py, threads, |threads| {
        projection::build(student, teacher, &options, threads)
    })?;
    Ok(PyProjectionArrays::new(py, w))
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    let names: Vec<&str> = Rule::ALL.iter().map(|rule| rule.name()).collect();
    module.add("PROJECTION_RULES", names)?;
    module.add_class::<PyProjectionArrays>()?;
    module.add_function(wrap_pyfunction!(build_projection, module)?)
}
