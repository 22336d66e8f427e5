//! `xtoken._core.PieceTrie`: flat arrays in, flat arrays out.

use numpy::{PyArray1, PyReadonlyArray1};
use pyo3::prelude::*;
use pyo3::types::PyType;

use super::vocab::PyVocab;
use super::{contiguous, detached, interruptible};
use crate::error::{Error, Result, checked_id};
use crate::projection::Pieces;
use crate::trie::{self, PieceTrie, ROOT};

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
            Ok(PieceTrie::new(of, pieces.vocab.len())?.with_bytes_of(pieces))
        })?;
        Ok(Self { trie })
    }

    /// From the pieces of each token, in CSR form; and what the tokens spell of each piece, where
    /// that is known.
    #[staticmethod]
    #[pyo3(signature = (indptr, ids, piece_count, spelled = None))]
    fn from_pieces(
        py: Python<'_>,
        indptr: Ids<'_>,
        ids: Ids<'_>,
        piece_count: usize,
        spelled: Option<(Ids<'_>, Ids<'_>)>,
    ) -> PyResult<Self> {
        let pieces = (contiguous("indptr", &indptr)?, contiguous("ids", &ids)?);
        let spelled = spelled.as_ref().map(|(indptr, ids)| {
            let indptr = contiguous("spelled_indptr", indptr)?;
            Ok::<_, Error>((indptr, contiguous("spelled", ids)?))
        });
        let spelled = spelled.transpose()?;
        let trie = detached(py, || {
            let trie = PieceTrie::new(pieces_of(pieces, piece_count)?, piece_count)?;
            let Some(spelled) = spelled else {
                return Ok(trie);
            };
            let tokens = trie.token_pieces().indptr.len() - 1;
            let spelled = pieces_of(spelled, tokens)?;
            trie::check(&spelled, tokens)?;
            Ok(trie.with_spelled(&spelled))
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
                && self.trie.twins() == other.twins()
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
            (indptr, ids, this.trie.piece_count(), this.trie.twins()),
        ))
    }

    /// A trie from what pickling stored.
    #[classmethod]
    fn _from_state(
        _cls: &Bound<'_, PyType>,
        py: Python<'_>,
        indptr: Ids<'_>,
        ids: Ids<'_>,
        piece_count: usize,
        twins: Vec<(u32, u32)>,
    ) -> PyResult<Self> {
        for id in twins.iter().flat_map(|&(id, piece)| [id, piece]) {
            checked_id(i64::from(id), piece_count)?;
        }
        let Self { trie } = Self::from_pieces(py, indptr, ids, piece_count, None)?;
        Ok(Self {
            trie: trie.with_twins(twins),
        })
    }
}

type Ids<'py> = PyReadonlyArray1<'py, i64>;
type State<'py> = (Array<'py>, Array<'py>, usize, Vec<(u32, u32)>);
type Reduced<'py> = (Bound<'py, PyAny>, State<'py>);

fn pieces_of((indptr, ids): (&[i64], &[i64]), size: usize) -> Result<Pieces> {
    let id = |&id: &i64| checked_id(id, size);
    Ok(Pieces {
        indptr: indptr.to_vec(),
        ids: ids.iter().map(id).collect::<Result<_>>()?,
    })
}

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
