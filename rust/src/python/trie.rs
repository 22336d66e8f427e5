//! `xtoken._core.PieceTrie`: flat arrays in, flat arrays out.

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyType;

use super::vocab::PyVocab;
use super::{contiguous, detached, interruptible};
use crate::error::{Error, Result, checked_id};
use crate::projection::Pieces;
use crate::trie::{PieceTrie, ROOT};

/// The tokens of one vocabulary by their pieces of another; the part that runs without Python.
#[pyclass(name = "PieceTrie", module = "xtoken._core", frozen)]
pub(super) struct PyPieceTrie {
    trie: PieceTrie,
}

const _: () = {
    const fn shared_between_threads<T: Send + Sync>() {}
    shared_between_threads::<PyPieceTrie>();
};

type Array<'py> = Bound<'py, PyArray1<i64>>;

impl PyPieceTrie {
    pub(super) fn trie(&self) -> &PieceTrie {
        &self.trie
    }
}

#[pymethods]
impl PyPieceTrie {
    /// Segments each token of `tokens` with the model of `pieces`; `side` names the latter.
    #[staticmethod]
    fn build(
        py: Python<'_>,
        tokens: &Bound<'_, PyVocab>,
        pieces: &Bound<'_, PyVocab>,
        side: &str,
        threads: usize,
    ) -> PyResult<Self> {
        let (tokens, pieces) = (tokens.get().tokenizer(), pieces.get().tokenizer());
        let side = side_name(side)?;
        let trie = interruptible(py, threads, |threads| {
            let of = Pieces::spell(tokens, pieces, side, threads)?;
            PieceTrie::new(of, pieces.vocab.len())
        })?;
        Ok(Self { trie })
    }

    /// From the pieces of each token, in CSR form.
    #[staticmethod]
    fn from_pieces(
        py: Python<'_>,
        indptr: PyReadonlyArray1<'_, i64>,
        ids: PyReadonlyArray1<'_, i64>,
        piece_count: usize,
    ) -> PyResult<Self> {
        let indptr = contiguous("indptr", &indptr)?;
        let ids = contiguous("ids", &ids)?;
        let trie = detached(py, || {
            let id = |&id: &i64| checked_id(id, piece_count);
            let pieces = Pieces {
                indptr: indptr.to_vec(),
                ids: ids.iter().map(id).collect::<Result<_>>()?,
            };
            PieceTrie::new(pieces, piece_count)
        })?;
        Ok(Self { trie })
    }

    /// The pieces of each token, `(indptr, ids)`.
    fn pieces<'py>(&self, py: Python<'py>) -> (Array<'py>, Array<'py>) {
        let pieces = self.trie.token_pieces();
        let ids = pieces.ids.iter().map(|&id| i64::from(id)).collect();
        (
            PyArray1::from_slice(py, &pieces.indptr),
            PyArray1::from_vec(py, ids),
        )
    }

    /// `(tokens, node_starts, slot_ptr, slot_sizes, slot_pieces)`.
    fn slots<'py>(&self, py: Python<'py>) -> PyResult<[Array<'py>; 5]> {
        let (tokens, slots) = detached(py, || {
            let tokens: Vec<i64> = self.trie.tokens().iter().map(|&id| i64::from(id)).collect();
            Ok((tokens, self.trie.slots()))
        })?;
        Ok([tokens, slots.starts, slots.ptr, slots.sizes, slots.pieces]
            .map(|column| PyArray1::from_vec(py, column)))
    }

    /// Nodes with at least two slots of chunks `ids[starts[c]..ends[c]]`: `(chunk, depth, node)`.
    #[expect(clippy::too_many_arguments, reason = "called by xtoken.trie alone")]
    fn lookup<'py>(
        &self,
        py: Python<'py>,
        ids: PyReadonlyArray1<'py, i64>,
        starts: PyReadonlyArray1<'py, i64>,
        ends: PyReadonlyArray1<'py, i64>,
        max_depth: usize,
        side: &str,
        threads: usize,
    ) -> PyResult<[Array<'py>; 3]> {
        let ids = contiguous("ids", &ids)?;
        let starts = contiguous("starts", &starts)?;
        let ends = contiguous("ends", &ends)?;
        let side = side_name(side)?;
        let found = interruptible(py, threads, |threads| {
            self.trie
                .lookup(ids, starts, ends, max_depth, side, threads)
        })?;
        Ok([found.chunk, found.depth, found.node].map(|column| PyArray1::from_vec(py, column)))
    }

    /// The node of a prefix, or `None`.
    fn find(&self, prefix: Vec<u32>) -> Option<u32> {
        self.trie.find(&prefix)
    }

    /// Size of the vocabulary that the pieces are from.
    #[getter]
    fn piece_count(&self) -> usize {
        self.trie.piece_count()
    }

    fn __len__(&self) -> usize {
        self.trie.len()
    }

    fn __repr__(&self) -> String {
        format!(
            "PieceTrie({} of {} tokens in {} nodes, {} below the root)",
            self.trie.tokens().len(),
            self.trie.token_pieces().indptr.len() - 1,
            self.trie.len(),
            self.trie.children(ROOT).len(),
        )
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| {
            let other = &other.get().trie;
            self.trie.piece_count() == other.piece_count()
                && self.trie.token_pieces() == other.token_pieces()
        })
    }

    fn __hash__(&self) -> u64 {
        (self.trie.len() as u64) << 32 | self.trie.tokens().len() as u64
    }

    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Reduced<'py>> {
        let py = slf.py();
        let this = slf.get();
        let (indptr, ids) = this.pieces(py);
        Ok((
            slf.get_type().getattr("_from_state")?,
            (indptr, ids, this.trie.piece_count()),
        ))
    }

    /// A trie from what pickling stored.
    #[classmethod]
    fn _from_state(
        _cls: &Bound<'_, PyType>,
        py: Python<'_>,
        indptr: PyReadonlyArray1<'_, i64>,
        ids: PyReadonlyArray1<'_, i64>,
        piece_count: usize,
    ) -> PyResult<Self> {
        Self::from_pieces(py, indptr, ids, piece_count)
    }
}

type Reduced<'py> = (Bound<'py, PyAny>, (Array<'py>, Array<'py>, usize));

fn side_name(side: &str) -> Result<&'static str> {
    match side {
        "student" => Ok("student"),
        "teacher" => Ok("teacher"),
        other => Err(Error::Option {
            name: "side",
            value: format!("{other:?}"),
            expected: "'student' or 'teacher'",
        }),
    }
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyPieceTrie>()
}
