//! `xtoken.Vocab`.

use std::collections::BTreeMap;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyType};

use super::detached;
use crate::error::{Error, Result, checked_id};
use crate::segment::Scores;
use crate::tokenizer::{Token, Tokenizer};
use crate::vocab::Role;
use crate::vocab::{DummyPrefix, TokenKind, Vocab};

/// A vocabulary as bytes; immutable, hashable, safe to share between threads.
#[pyclass(name = "Vocab", module = "xtoken._core", frozen)]
pub(super) struct PyVocab {
    tokenizer: Arc<Tokenizer>,
}

const _: () = {
    const fn shared_between_threads<T: Send + Sync>() {}
    shared_between_threads::<PyVocab>();
};

type Roles = BTreeMap<String, Option<i64>>;

fn declare(mut tokenizer: Tokenizer, roles: &Roles) -> Result<Tokenizer> {
    for (name, id) in roles {
        let role = Role::from_name(name).ok_or_else(|| Error::Option {
            name: "roles",
            value: format!("{name:?}"),
            expected: "keys among 'bos', 'eos', 'pad', 'unk', 'eot'",
        })?;
        let id = id
            .map(|id| checked_id(id, tokenizer.vocab.len()))
            .transpose()?;
        tokenizer.vocab.set_role(role, id)?;
    }
    Ok(tokenizer)
}

impl PyVocab {
    fn wrap(py: Python<'_>, build: impl Send + FnOnce() -> Result<Tokenizer>) -> PyResult<Self> {
        Ok(Self {
            tokenizer: Arc::new(detached(py, build)?),
        })
    }

    /// The tokenizer, to be shared with work that runs without the GIL.
    pub(super) fn tokenizer(&self) -> &Arc<Tokenizer> {
        &self.tokenizer
    }

    pub(super) fn vocab(&self) -> &Vocab {
        &self.tokenizer.vocab
    }

    fn id(&self, id: i64) -> PyResult<u32> {
        Ok(checked_id(id, self.vocab().len())?)
    }

    fn with(&self, id: i64, of: impl FnOnce(TokenKind) -> bool) -> PyResult<bool> {
        Ok(of(self.vocab().kind(self.id(id)?)))
    }
}

#[pymethods]
impl PyVocab {
    #[staticmethod]
    fn from_tokenizer<'py>(tokenizer: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        // Which Python objects are tokenizers is Python's to know.
        let readers = tokenizer.py().import("xtoken.vocab")?;
        readers.call_method1("read_tokenizer", (tokenizer,))
    }

    #[staticmethod]
    fn from_path<'py>(path: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        path.py()
            .import("xtoken.vocab")?
            .call_method1("read_path", (path,))
    }

    #[staticmethod]
    #[pyo3(signature = (json, *, from_memory = false, roles = Roles::new()))]
    fn from_tokenizer_json(
        py: Python<'_>,
        json: &[u8],
        from_memory: bool,
        roles: Roles,
    ) -> PyResult<Self> {
        let scores = if from_memory {
            Scores::FromMemory
        } else {
            Scores::FromFile
        };
        Self::wrap(py, || declare(Tokenizer::from_json(json, scores)?, &roles))
    }

    #[staticmethod]
    #[pyo3(signature = (file, special_tokens, *, roles = Roles::new()))]
    fn from_tiktoken(
        py: Python<'_>,
        file: &[u8],
        special_tokens: BTreeMap<String, u32>,
        roles: Roles,
    ) -> PyResult<Self> {
        let specials: Vec<(String, u32)> = special_tokens.into_iter().collect();
        Self::wrap(py, || {
            declare(Tokenizer::from_tiktoken(file, &specials)?, &roles)
        })
    }

    #[staticmethod]
    #[pyo3(signature = (file, *, roles = Roles::new()))]
    fn from_tekken(py: Python<'_>, file: &[u8], roles: Roles) -> PyResult<Self> {
        Self::wrap(py, || declare(Tokenizer::from_tekken(file)?, &roles))
    }

    #[staticmethod]
    #[pyo3(signature = (tokens, special_tokens = BTreeMap::new(), *, ranked = false, roles = Roles::new()))]
    fn from_tokens(
        py: Python<'_>,
        tokens: Vec<Vec<u8>>,
        special_tokens: BTreeMap<i64, String>,
        ranked: bool,
        roles: Roles,
    ) -> PyResult<Self> {
        Self::wrap(py, || {
            for &id in special_tokens.keys() {
                checked_id(id, tokens.len())?;
            }
            let tokens = (0..)
                .zip(tokens)
                .map(|(id, bytes)| match special_tokens.get(&id) {
                    Some(text) => Token::Special(text.clone()),
                    None => Token::Text(bytes),
                });
            declare(Tokenizer::from_tokens(tokens, ranked)?, &roles)
        })
    }

    fn with_roles(&self, py: Python<'_>, roles: Roles) -> PyResult<Self> {
        Self::wrap(py, || declare((*self.tokenizer).clone(), &roles))
    }

    #[classmethod]
    fn _from_state(_cls: &Bound<'_, PyType>, py: Python<'_>, state: &[u8]) -> PyResult<Self> {
        Self::wrap(py, || {
            postcard::from_bytes(state).map_err(|error| Error::Format {
                what: "stored vocabulary",
                reason: error.to_string(),
                remedy: "build it again from the tokenizer",
            })
        })
    }

    fn __reduce__<'py>(
        slf: &Bound<'py, Self>,
    ) -> PyResult<(Bound<'py, PyAny>, (Bound<'py, PyBytes>,))> {
        let py = slf.py();
        let tokenizer = Arc::clone(&slf.get().tokenizer);
        let state = detached(py, || {
            postcard::to_stdvec(&*tokenizer).map_err(|error| Error::Format {
                what: "vocabulary",
                reason: error.to_string(),
                remedy: "build it again from the tokenizer",
            })
        })?;
        Ok((
            slf.get_type().getattr("_from_state")?,
            (PyBytes::new(py, &state),),
        ))
    }

    fn __len__(&self) -> usize {
        self.vocab().len()
    }

    fn __repr__(&self) -> String {
        format!(
            "Vocab({} tokens, {}, {} special, fingerprint {}…)",
            self.vocab().len(),
            self.vocab().spelling().name(),
            self.vocab().specials().count(),
            &self.vocab().fingerprint()[..12],
        )
    }

    fn __eq__(&self, other: &Bound<'_, PyAny>) -> bool {
        other.cast::<Self>().is_ok_and(|other| {
            let other = other.get().vocab();
            self.vocab().fingerprint() == other.fingerprint()
                && Role::ALL
                    .iter()
                    .all(|&role| self.vocab().role(role) == other.role(role))
        })
    }

    fn __hash__(&self) -> u64 {
        u64::from_str_radix(&self.vocab().fingerprint()[..16], 16).unwrap_or_default()
    }

    #[getter]
    fn fingerprint(&self) -> String {
        self.vocab().fingerprint()
    }

    #[getter]
    fn family(&self) -> &'static str {
        self.vocab().spelling().name()
    }

    #[getter]
    fn is_lossy(&self) -> bool {
        self.vocab().spelling().is_lossy()
    }

    #[getter]
    fn dummy_prefix(&self) -> &'static str {
        match self.vocab().dummy_prefix() {
            DummyPrefix::Never => "never",
            DummyPrefix::First => "first",
            DummyPrefix::Every => "every",
        }
    }

    #[getter]
    fn roles<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let roles = PyDict::new(py);
        for role in Role::ALL {
            if let Some(id) = self.vocab().role(role) {
                roles.set_item(role.name(), id)?;
            }
        }
        Ok(roles)
    }

    #[getter]
    fn special_tokens(&self) -> BTreeMap<u32, String> {
        self.vocab()
            .specials()
            .map(|(id, text)| (id, text.to_owned()))
            .collect()
    }

    fn token_bytes<'py>(&self, py: Python<'py>, token_id: i64) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(
            py,
            self.vocab().token_bytes(self.id(token_id)?),
        ))
    }

    fn is_special(&self, token_id: i64) -> PyResult<bool> {
        self.with(token_id, |kind| kind == TokenKind::Special)
    }

    fn is_unused(&self, token_id: i64) -> PyResult<bool> {
        self.with(token_id, |kind| kind == TokenKind::Unused)
    }

    fn is_byte_fallback(&self, token_id: i64) -> PyResult<bool> {
        self.with(token_id, |kind| kind == TokenKind::ByteFallback)
    }

    fn id_of(&self, token: &[u8]) -> Option<u32> {
        self.tokenizer.id_of(token)
    }

    fn segment(&self, py: Python<'_>, token: &[u8]) -> PyResult<Option<Vec<u32>>> {
        detached(py, || self.tokenizer().segment(token))
    }

    #[getter]
    fn model_fingerprint(&self, py: Python<'_>) -> PyResult<String> {
        detached(py, || Ok(self.tokenizer.model_fingerprint().to_owned()))
    }

    #[getter]
    fn model(&self) -> Option<&'static str> {
        self.tokenizer.model.as_ref().map(|model| model.name())
    }

    fn decode_bytes<'py>(&self, py: Python<'py>, ids: Vec<i64>) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.vocab().decode_bytes(&ids)?))
    }
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyVocab>()
}
