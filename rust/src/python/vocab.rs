//! `xtoken.Vocab`.

use std::collections::BTreeMap;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyTuple, PyType};

use super::arguments::{
    Bytes, Roles, SpecialIds, SpecialTexts, Text, TokenId, TokenIds, Tokens, flag,
};
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

fn declare(mut tokenizer: Tokenizer, roles: &Roles) -> Result<Tokenizer> {
    for (name, id) in &roles.0 {
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

fn cut_by(tokenizer: Tokenizer, pattern: Option<&Text>) -> Result<Tokenizer> {
    match pattern {
        Some(pattern) => tokenizer.with_pattern(&pattern.0),
        None => Ok(tokenizer),
    }
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

    fn id(&self, id: &TokenId) -> PyResult<u32> {
        Ok(checked_id(id.0, self.vocab().len())?)
    }

    fn with(&self, id: &TokenId, of: impl FnOnce(TokenKind) -> bool) -> PyResult<bool> {
        Ok(of(self.vocab().kind(self.id(id)?)))
    }
}

#[pymethods]
impl PyVocab {
    /// Read a transformers fast tokenizer, a `tokenizers.Tokenizer`, a tiktoken `Encoding`, a path, or
    /// a `Vocab`, which is returned as it is.
    #[staticmethod]
    fn from_tokenizer<'py>(tokenizer: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        // Which Python objects are tokenizers is Python's to know.
        let readers = tokenizer.py().import("xtoken.vocab")?;
        readers.call_method1("read_tokenizer", (tokenizer,))
    }

    /// Read a directory with a tokenizer, a `tokenizer.json` (`.xz` too), a tekken file or a tiktoken
    /// rank file without special tokens.
    #[staticmethod]
    fn from_path<'py>(path: &Bound<'py, PyAny>) -> PyResult<Bound<'py, PyAny>> {
        path.py()
            .import("xtoken.vocab")?
            .call_method1("read_path", (path,))
    }

    /// Read the content of a `tokenizer.json`.
    ///
    /// `from_memory` says that a tokenizer in memory printed it, so that scores are read to the last bit;
    /// `roles` are ids by role, `declared` the texts of tokens that a configuration beside the file
    /// declares, and whether each is a control token (`None`: unless the file adds it as text).
    #[staticmethod]
    #[pyo3(signature = (json, *, from_memory = false, roles = Roles::NONE, declared = Vec::new()))]
    fn from_tokenizer_json(
        py: Python<'_>,
        json: Bytes<'_>,
        #[pyo3(from_py_with = flag)] from_memory: bool,
        roles: Roles,
        declared: Vec<(String, Option<bool>)>,
    ) -> PyResult<Self> {
        let scores = if from_memory {
            Scores::FromMemory
        } else {
            Scores::FromFile
        };
        Self::wrap(py, || {
            let tokenizer = Tokenizer::from_json_declared(json.0, scores, &declared)?;
            declare(tokenizer, &roles)
        })
    }

    /// Read the content of a tiktoken rank file; `special_tokens` maps texts to ids, `pattern` is the
    /// regular expression that cuts text into words, which the file does not hold.
    #[staticmethod]
    #[pyo3(signature = (file, special_tokens, *, roles = Roles::NONE, pattern = None))]
    fn from_tiktoken(
        py: Python<'_>,
        file: Bytes<'_>,
        special_tokens: SpecialIds,
        roles: Roles,
        pattern: Option<Text>,
    ) -> PyResult<Self> {
        let specials: Vec<(String, u32)> = special_tokens.0.into_iter().collect();
        Self::wrap(py, || {
            let tokenizer = Tokenizer::from_tiktoken(file.0, &specials)?;
            declare(cut_by(tokenizer, pattern.as_ref())?, &roles)
        })
    }

    /// Read the content of a `tekken.json`.
    #[staticmethod]
    #[pyo3(signature = (file, *, roles = Roles::NONE))]
    fn from_tekken(py: Python<'_>, file: Bytes<'_>, roles: Roles) -> PyResult<Self> {
        Self::wrap(py, || declare(Tokenizer::from_tekken(file.0)?, &roles))
    }

    /// Build from explicit bytes: those of each id, and the texts of special ids.
    ///
    /// `ranked` says that ids are the merge ranks of a byte pair encoding; `pattern` is the regular
    /// expression that cuts text into words before they are segmented.
    #[staticmethod]
    #[pyo3(signature = (tokens, special_tokens = SpecialTexts::NONE, *, ranked = false, roles = Roles::NONE, pattern = None))]
    fn from_tokens(
        py: Python<'_>,
        tokens: Tokens,
        special_tokens: SpecialTexts,
        #[pyo3(from_py_with = flag)] ranked: bool,
        roles: Roles,
        pattern: Option<Text>,
    ) -> PyResult<Self> {
        Self::wrap(py, || {
            for &id in special_tokens.0.keys() {
                checked_id(id, tokens.0.len())?;
            }
            let tokens = (0..)
                .zip(tokens.0)
                .map(|(id, bytes)| match special_tokens.0.get(&id) {
                    Some(text) => Token::Special(text.clone()),
                    None => Token::Text(bytes),
                });
            let tokenizer = Tokenizer::from_tokens(tokens, ranked)?;
            declare(cut_by(tokenizer, pattern.as_ref())?, &roles)
        })
    }

    /// A copy with other ids for some of the roles bos, eos, pad, unk and eot; `None` takes one away.
    fn with_roles(&self, py: Python<'_>, roles: Roles) -> PyResult<Self> {
        Self::wrap(py, || declare((*self.tokenizer).clone(), &roles))
    }

    /// A copy with other declared stop tokens, in order of preference: what a turn ends with first.
    fn with_stops(&self, py: Python<'_>, ids: TokenIds) -> PyResult<Self> {
        Self::wrap(py, || {
            let mut tokenizer = (*self.tokenizer).clone();
            tokenizer.vocab.set_stops(&ids.0)?;
            Ok(tokenizer)
        })
    }

    /// A vocabulary from what pickling stored.
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
                && self.vocab().stops() == other.stops()
                && Role::ALL
                    .iter()
                    .all(|&role| self.vocab().role(role) == other.role(role))
        })
    }

    fn __hash__(&self) -> u64 {
        u64::from_str_radix(&self.vocab().fingerprint()[..16], 16).unwrap_or_default()
    }

    /// Stable hash of what each id is (bytes, kinds and special texts): 64 hexadecimal digits. Roles,
    /// stops and the dummy prefix take no part.
    #[getter]
    fn fingerprint(&self) -> String {
        self.vocab().fingerprint()
    }

    /// `bytes`, `byte-level`, `sentencepiece` or `wordpiece (lossy)`.
    #[getter]
    fn family(&self) -> &'static str {
        self.vocab().spelling().name()
    }

    /// Whether the tokens do not determine the text (WordPiece).
    #[getter]
    fn is_lossy(&self) -> bool {
        self.vocab().spelling().is_lossy()
    }

    /// Where the tokenizer puts a space of its own: `never`, `first` at the start of the sequence, or
    /// `every`: after each special or added token as well.
    #[getter]
    fn dummy_prefix(&self) -> &'static str {
        match self.vocab().dummy_prefix() {
            DummyPrefix::Never => "never",
            DummyPrefix::First => "first",
            DummyPrefix::Every => "every",
        }
    }

    /// The ids that play `bos`, `eos`, `pad`, `unk`, `eot`, where known.
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

    /// All that can stop a sequence, in order of preference: the ids given to `with_stops`, then
    /// those of the roles `eot` and `eos`.
    #[getter]
    fn stops<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyTuple>> {
        PyTuple::new(py, self.vocab().stops())
    }

    /// The special ids with their texts.
    #[getter]
    fn special_tokens(&self) -> BTreeMap<u32, String> {
        self.vocab()
            .specials()
            .map(|(id, text)| (id, text.to_owned()))
            .collect()
    }

    /// The bytes that a token contributes; empty for special and unused ids.
    fn token_bytes<'py>(
        &self,
        py: Python<'py>,
        token_id: TokenId,
    ) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(
            py,
            self.vocab().token_bytes(self.id(&token_id)?),
        ))
    }

    /// Whether the id is a control token, which contributes no text.
    fn is_special(&self, token_id: TokenId) -> PyResult<bool> {
        self.with(&token_id, |kind| kind == TokenKind::Special)
    }

    /// Whether the id is a hole.
    fn is_unused(&self, token_id: TokenId) -> PyResult<bool> {
        self.with(&token_id, |kind| kind == TokenKind::Unused)
    }

    /// Whether the id is a `<0xNN>` token.
    fn is_byte_fallback(&self, token_id: TokenId) -> PyResult<bool> {
        self.with(&token_id, |kind| kind == TokenKind::ByteFallback)
    }

    /// The id that spells exactly these bytes; of several, the one that the tokenizer emits. `None`
    /// where there is none.
    fn id_of(&self, token: Bytes<'_>) -> Option<u32> {
        self.tokenizer.id_of(token.0)
    }

    /// The pieces that the tokenizer makes of these bytes inside a text, or `None` where it cannot spell
    /// them.
    ///
    /// Added tokens that are text are matched first, then the pre-tokenizer cuts, then the model
    /// segments; no dummy prefix is put. Bytes that are not valid UTF-8, and text that the normalizer
    /// would change, go to the model as they are; so does all text of a WordPiece vocabulary. The pieces
    /// spell the bytes exactly.
    fn segment(&self, py: Python<'_>, token: Bytes<'_>) -> PyResult<Option<Vec<u32>>> {
        detached(py, || self.tokenizer().segment(token.0))
    }

    /// Stable hash of how bytes become ids, beside `fingerprint`: 64 hexadecimal digits. Vocabularies
    /// without a model share one.
    #[getter]
    fn model_fingerprint(&self, py: Python<'_>) -> PyResult<String> {
        detached(py, || Ok(self.tokenizer.model_fingerprint().to_owned()))
    }

    /// How bytes are segmented: `BPE`, `Unigram`, `WordPiece`, or `None` where that is not known.
    #[getter]
    fn model(&self) -> Option<&'static str> {
        self.tokenizer.model.as_ref().map(|model| model.name())
    }

    /// The bytes of a sequence, without the dummy prefix.
    fn decode_bytes<'py>(&self, py: Python<'py>, ids: TokenIds) -> PyResult<Bound<'py, PyBytes>> {
        Ok(PyBytes::new(py, &self.vocab().decode_bytes(&ids.0)?))
    }
}

pub(super) fn register(module: &Bound<'_, PyModule>) -> PyResult<()> {
    module.add_class::<PyVocab>()
}
