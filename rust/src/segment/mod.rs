//! A tokenizer's own segmentation of bytes: what its model (BPE, Unigram, WordPiece) makes of one
//! word that is given as bytes, and how its pre-tokenizer cuts text into such words.
//!
//! A token of another vocabulary need not be valid UTF-8, so nothing here passes through a decoded
//! string. What a segmentation returns always spells the input: pieces that do not (an unknown
//! token, a control token, a literal `▁` that SentencePiece takes for a space) are no answer.

mod bpe;
mod bpe_file;
mod char_classes;
mod derivations;
mod occurrences;
mod pairs;
mod pretokenize;
mod symbols;
mod unigram;
mod wordpiece;

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

pub use bpe::Bpe;
pub(crate) use char_classes::CharClasses;
pub(crate) use derivations::Derivations;
pub use pretokenize::PreTokenizer;
pub use unigram::{Scores, Unigram};
pub use wordpiece::WordPiece;

use crate::error::{Error, Result};
use crate::vocab::{Spelling, TokenKind, TokenizerJson, Vocab};

/// "No id" in the tables of the models; [`crate::VocabBuilder`] never gives it out.
pub(crate) const NONE: u32 = u32::MAX;

/// The models that can be read.
pub(crate) const SUPPORTED: &str = "BPE without affixes, Unigram and WordPiece, behind a \
                                   normalizer and a pre-tokenizer that Hugging Face's crate reads";

/// A segmentation model; it goes with the [`Vocab`] that it was built for.
///
/// ```
/// use xtoken::{DummyPrefix, Model, Spelling, VocabBuilder};
///
/// let mut builder = VocabBuilder::new(Spelling::Bytes, DummyPrefix::Never);
/// for token in ["a", "b", "ab"] {
///     builder.push_text(token.as_bytes())?;
/// }
/// let vocab = builder.build();
/// let model = Model::from_ranks(&vocab);
/// let mut pieces = Vec::new();
/// assert!(model.segment(&vocab, b"abba", &mut pieces));
/// assert_eq!(pieces, [2, 1, 0]);
/// # Ok::<(), xtoken::Error>(())
/// ```
#[derive(Debug, Clone, Serialize, Deserialize)]
pub enum Model {
    /// Byte pair encoding, on bytes or on characters with byte fallback.
    Bpe(Bpe),
    /// The most probable segmentation under a unigram distribution.
    Unigram(Unigram),
    /// Greedy longest match, words and continuations apart.
    WordPiece(WordPiece),
}

impl Model {
    /// The model of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where the model is of another kind, [`Error::Format`] where it is
    /// damaged.
    pub fn from_tokenizer_json(
        json: &TokenizerJson<'_>,
        vocab: &Vocab,
        scores: Scores,
    ) -> Result<Self> {
        let spelling = json.spelling()?;
        let kind = json.model.kind.as_deref().unwrap_or(match spelling {
            // Files from before the field existed: the other sections tell.
            _ if json.model.merges.is_some() => "BPE",
            Spelling::WordPiece { .. } => "WordPiece",
            _ => "(no type)",
        });
        match kind {
            "BPE" => Bpe::from_json(json, &spelling, vocab).map(Model::Bpe),
            "Unigram" => Unigram::from_json(json, &spelling, scores).map(Model::Unigram),
            "WordPiece" => WordPiece::from_json(json, vocab).map(Model::WordPiece),
            other => Err(unsupported(other.to_owned())),
        }
    }

    /// The model of a rank file, whose tokens are spelled as bytes: two neighbours merge where
    /// their bytes together are a token, the lowest rank (here: id) first.
    #[must_use]
    pub fn from_ranks(vocab: &Vocab) -> Self {
        Model::Bpe(Bpe::from_ranks(vocab))
    }

    /// The model's name, as `tokenizer.json` gives it.
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Model::Bpe(_) => "BPE",
            Model::Unigram(_) => "Unigram",
            Model::WordPiece(_) => "WordPiece",
        }
    }

    /// Replaces `out` by the pieces of `bytes`.
    ///
    /// Returns `false`, with `out` empty, where the vocabulary cannot spell them; no bytes are
    /// spelled by no pieces. `vocab` is the vocabulary that the model was built for.
    pub fn segment(&self, vocab: &Vocab, bytes: &[u8], out: &mut Vec<u32>) -> bool {
        out.clear();
        if bytes.is_empty() {
            return true;
        }
        let complete = match self {
            Model::Bpe(model) => model.segment(vocab, bytes, out),
            Model::Unigram(model) => model.segment(vocab.spelling(), bytes, out),
            Model::WordPiece(model) => model.segment(vocab, bytes, out),
        };
        let spelled = complete && spells(vocab, out, bytes);
        if !spelled {
            out.clear();
        }
        spelled
    }

    /// A stable hash of all that decides a segmentation, beside the vocabulary's own. `vocab` is
    /// the vocabulary that the model was built for.
    #[must_use]
    pub fn digest(&self, vocab: &Vocab) -> [u8; 32] {
        let mut sha = Sha256::new();
        sha.update(b"xtoken model 1\0");
        sha.update(self.name());
        match self {
            Model::Bpe(model) => model.update_digest(vocab.spelling(), &mut sha),
            Model::Unigram(model) => model.update_digest(&mut sha),
            Model::WordPiece(model) => model.update_digest(&mut sha),
        }
        sha.finalize().into()
    }
}

/// Whether the pieces contribute exactly `bytes`, and each of them something.
fn spells(vocab: &Vocab, pieces: &[u32], bytes: &[u8]) -> bool {
    let mut rest = bytes;
    for &piece in pieces {
        let token = vocab.token_bytes(piece);
        match rest.strip_prefix(token) {
            Some(tail) if !token.is_empty() => rest = tail,
            _ => return false,
        }
    }
    rest.is_empty() && !bytes.is_empty()
}

fn unsupported(found: String) -> Error {
    Error::Unsupported {
        section: "model",
        found,
        supported: SUPPORTED,
    }
}

/// Refuses what a stored model cannot be: its tables must have a slot for each byte.
fn check_byte_table(table: &[u32]) -> Result<()> {
    if table.len() == 256 {
        return Ok(());
    }
    Err(Error::Format {
        what: "stored model",
        reason: format!("a table of bytes has {} slots", table.len()),
        remedy: "build it again from the tokenizer",
    })
}

/// The id of `<0xNN>` for each byte, or [`NONE`].
fn byte_fallback_ids(vocab: &Vocab) -> Vec<u32> {
    let mut ids = vec![NONE; 256];
    for (id, kind) in (0u32..).zip(vocab.kinds()) {
        if let (TokenKind::ByteFallback, [byte]) = (kind, vocab.token_bytes(id)) {
            ids[usize::from(*byte)] = id;
        }
    }
    ids
}
