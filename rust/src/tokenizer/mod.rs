//! A vocabulary together with the model that segments bytes into its tokens.

mod joints;

use std::sync::{Arc, OnceLock};

use aho_corasick::{AhoCorasick, MatchKind};
use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::segment::{Model, PreTokenizer, SUPPORTED, Scores};
use crate::vocab::rank_files;
use crate::vocab::tokenizer_json::TokenizerJson;
use crate::vocab::{DummyPrefix, Spelling, Vocab, VocabBuilder, hex};

pub(crate) use joints::{
    AfterToken, BEGINNINGS, BYTES, JointMemo, Joints, Marks, NO_SHAPE, NO_TEXT, Next, Told,
    WordMemo,
};

/// One token for [`Tokenizer::from_tokens`].
#[derive(Debug, Clone)]
pub enum Token {
    /// Contributes these bytes; without any it is unused.
    Text(Vec<u8>),
    /// Contributes one byte, where no text token does.
    ByteFallback(u8),
    /// A control token with this text.
    Special(String),
    /// A hole.
    Unused,
}

/// What the tokens of a tokenizer are, and how it segments bytes into them.
///
/// ```
/// use xtoken::Tokenizer;
/// use xtoken::segment::Scores;
///
/// let json = br#"{"decoder": {"type": "ByteLevel"}, "model": {"type": "BPE",
///     "vocab": {"l": 0, "o": 1, "w": 2, "lo": 3, "low": 4}, "merges": ["l o", "lo w"]}}"#;
/// let tokenizer = Tokenizer::from_json(json, Scores::FromFile)?;
/// assert_eq!(tokenizer.segment(b"lowlo")?, Some(vec![4, 3]));
/// assert_eq!(tokenizer.segment(b"high")?, None, "it has no token for these bytes");
/// # Ok::<(), xtoken::Error>(())
/// ```
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "Stored")]
pub struct Tokenizer {
    /// The bytes and the kind of each id.
    pub vocab: Vocab,
    /// How bytes are segmented; none for explicit tokens and for models that are not supported.
    pub model: Option<Arc<Model>>,
    /// Why there is no model, where the tokenizer has one.
    unsupported_model: Option<String>,
    /// Ids that [`Vocab::id_of`] finds for bytes for which the tokenizer emits another id.
    emitted: FxHashMap<u32, u32>,
    /// How text is cut before the model sees it.
    pre_tokenizer: Option<Arc<PreTokenizer>>,
    /// Ids of text that is matched anywhere before the pre-tokenizer cuts.
    matched: Vec<u32>,
    #[serde(skip)]
    matcher: OnceLock<Option<AhoCorasick>>,
    #[serde(skip)]
    model_fingerprint: OnceLock<String>,
}

/// A stored [`Tokenizer`], before it is checked.
#[derive(Deserialize)]
struct Stored {
    vocab: Vocab,
    model: Option<Arc<Model>>,
    unsupported_model: Option<String>,
    emitted: FxHashMap<u32, u32>,
    pre_tokenizer: Option<Arc<PreTokenizer>>,
    matched: Vec<u32>,
}

impl TryFrom<Stored> for Tokenizer {
    type Error = Error;

    fn try_from(stored: Stored) -> Result<Self> {
        let same_bytes = |(&found, &emitted): (&u32, &u32)| {
            let bytes = stored.vocab.token_bytes(found);
            !bytes.is_empty() && bytes == stored.vocab.token_bytes(emitted)
        };
        let has_bytes = |&id: &u32| !stored.vocab.token_bytes(id).is_empty();
        if !stored.emitted.iter().all(same_bytes) || !stored.matched.iter().all(has_bytes) {
            return Err(Error::Format {
                what: "stored tokenizer",
                reason: "ids that stand for one another, or for text, do not have its bytes"
                    .to_owned(),
                remedy: "build it again from the tokenizer",
            });
        }
        Ok(Self {
            vocab: stored.vocab,
            model: stored.model,
            unsupported_model: stored.unsupported_model,
            emitted: stored.emitted,
            pre_tokenizer: stored.pre_tokenizer,
            matched: stored.matched,
            matcher: OnceLock::new(),
            model_fingerprint: OnceLock::new(),
        })
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`, from a file or as a tokenizer in memory prints it. A model that is
    /// not supported leaves `model` empty: the vocabulary is still exact.
    ///
    /// # Errors
    /// [`Error::Format`] for a damaged file, [`Error::Unsupported`] where the bytes of the tokens
    /// are not known exactly.
    pub fn from_json(json: &[u8], scores: Scores) -> Result<Self> {
        Self::from_json_declared(json, scores, &[])
    }

    /// As [`Tokenizer::from_json`], with what a configuration beside the file declares; see
    /// [`TokenizerJson::declare`].
    ///
    /// # Errors
    /// As [`Tokenizer::from_json`].
    pub fn from_json_declared(
        json: &[u8],
        scores: Scores,
        declared: &[(String, Option<bool>)],
    ) -> Result<Self> {
        let mut json = TokenizerJson::parse(json)?;
        json.declare(declared)?;
        let vocab = json.vocab()?;
        let model = Model::from_tokenizer_json(&json, &vocab, scores).and_then(|model| {
            let (cut, normalizer) = (json.pre_tokenizer.as_ref(), json.normalizer.as_ref());
            let cut = PreTokenizer::from_sections(cut, normalizer, vocab.spelling())?;
            Ok((model, cut))
        });
        let mut tokenizer = match model {
            Ok((model, cut)) => Self {
                pre_tokenizer: cut.map(Arc::new),
                ..Self::new(vocab, Some(model))
            },
            Err(Error::Unsupported { found, .. }) => Self {
                unsupported_model: Some(found),
                ..Self::new(vocab, None)
            },
            Err(error) => return Err(error),
        };
        // Added tokens are matched in the text before the model sees it.
        for token in json.added_tokens.iter().filter(|token| !token.special) {
            if !token.single_word && tokenizer.vocab.is_added(token.id) {
                tokenizer.matched.push(token.id);
            }
            let found = tokenizer.vocab.id_of(tokenizer.vocab.token_bytes(token.id));
            if let Some(found) = found.filter(|&found| found != token.id) {
                tokenizer.emitted.insert(found, token.id);
            }
        }
        Ok(tokenizer)
    }

    /// Reads a tiktoken rank file, which does not say how text is cut (see
    /// [`Tokenizer::with_pattern`]); `specials` are the texts and ids of its control tokens.
    ///
    /// # Errors
    /// [`Error::Format`] for a damaged file.
    pub fn from_tiktoken(file: &[u8], specials: &[(String, u32)]) -> Result<Self> {
        let vocab = rank_files::from_tiktoken(file, specials)?;
        let model = Model::from_ranks(&vocab);
        Ok(Self::new(vocab, Some(model)))
    }

    /// Reads a `tekken.json`.
    ///
    /// # Errors
    /// [`Error::Format`] for a damaged file.
    pub fn from_tekken(file: &[u8]) -> Result<Self> {
        let (vocab, pattern) = rank_files::from_tekken(file)?;
        let model = Model::from_ranks(&vocab);
        let tokenizer = Self::new(vocab, Some(model));
        match pattern {
            Some(pattern) => tokenizer.with_pattern(&pattern),
            None => Ok(tokenizer),
        }
    }

    /// A vocabulary from explicit tokens, ids in order. `ranked` says that ids are the ranks of a
    /// byte pair encoding, as in a tiktoken file; otherwise there is no model.
    ///
    /// # Errors
    /// [`Error::Option`] where the tokens do not fit 32-bit offsets.
    pub fn from_tokens(tokens: impl IntoIterator<Item = Token>, ranked: bool) -> Result<Self> {
        let mut builder = VocabBuilder::new(Spelling::Bytes, DummyPrefix::Never);
        for token in tokens {
            match token {
                Token::Text(bytes) => builder.push_text(&bytes)?,
                Token::ByteFallback(byte) => builder.push_byte_fallback(byte)?,
                Token::Special(text) => builder.push_special(&text)?,
                Token::Unused => builder.push_unused()?,
            };
        }
        let vocab = builder.build();
        let model = ranked.then(|| Model::from_ranks(&vocab));
        Ok(Self::new(vocab, model))
    }

    /// A vocabulary with the model that was built for it.
    #[must_use]
    pub fn new(vocab: Vocab, model: Option<Model>) -> Self {
        let mut emitted = FxHashMap::default();
        if let Some(model) = &model {
            let mut pieces = Vec::new();
            for id in 0..vocab.len() as u32 {
                let bytes = vocab.token_bytes(id);
                let Some(found) = vocab.id_of(bytes).filter(|&found| found != id) else {
                    continue;
                };
                if model.segment(&vocab, bytes, &mut pieces) && pieces.len() == 1 {
                    emitted.insert(found, pieces[0]);
                }
            }
        }
        Self {
            vocab,
            model: model.map(Arc::new),
            unsupported_model: None,
            emitted,
            pre_tokenizer: None,
            matched: Vec::new(),
            matcher: OnceLock::new(),
            model_fingerprint: OnceLock::new(),
        }
    }

    /// The tokenizer with a pre-tokenizer that cuts text at the matches of a regular expression, as
    /// a rank file's tokenizer has one.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an expression that cannot be read.
    pub fn with_pattern(mut self, pattern: &str) -> Result<Self> {
        self.pre_tokenizer = PreTokenizer::from_pattern(pattern)?.map(Arc::new);
        self.model_fingerprint = OnceLock::new();
        Ok(self)
    }

    /// The id of the token with exactly these bytes. Of several, the one that the tokenizer emits.
    #[must_use]
    pub fn id_of(&self, bytes: &[u8]) -> Option<u32> {
        let found = self.vocab.id_of(bytes)?;
        Some(self.emitted.get(&found).copied().unwrap_or(found))
    }

    /// The model, or why there is none; `side` goes into the message.
    ///
    /// # Errors
    /// [`Error::NoModel`] or [`Error::Unsupported`].
    pub fn require_model(&self, side: &'static str) -> Result<&Model> {
        match (&self.model, &self.unsupported_model) {
            (Some(model), _) => Ok(model),
            (None, Some(found)) => Err(Error::Unsupported {
                section: "model",
                found: found.clone(),
                supported: SUPPORTED,
            }),
            (None, None) => Err(Error::NoModel { side }),
        }
    }

    /// The pieces that the tokenizer makes of `bytes` inside a text; `None` where the vocabulary
    /// cannot spell them.
    ///
    /// Added tokens that are text are matched first, then the pre-tokenizer cuts, then the model
    /// segments. Bytes that are not valid UTF-8, and text that the normalizer would change, go to
    /// the model as they are.
    ///
    /// # Errors
    /// As [`Tokenizer::require_model`].
    pub fn segment(&self, bytes: &[u8]) -> Result<Option<Vec<u32>>> {
        let model = self.require_model("")?;
        let mut pieces = Vec::new();
        let spelled = self.segment_with(model, bytes, &mut pieces);
        Ok(spelled.then_some(pieces))
    }

    /// As [`Tokenizer::segment`], with its own model: replaces `out` by the pieces; `false`, with
    /// `out` empty, where the vocabulary cannot spell the bytes.
    pub(crate) fn segment_with(&self, model: &Model, bytes: &[u8], out: &mut Vec<u32>) -> bool {
        out.clear();
        let text = match str::from_utf8(bytes) {
            Ok(text) if self.pre_tokenizer.is_some() || !self.matched.is_empty() => text,
            _ => return model.segment(&self.vocab, bytes, out),
        };
        let mut word = Vec::new();
        let mut start = 0;
        let mut spelled = true;
        for found in self.matcher().into_iter().flat_map(|m| m.find_iter(text)) {
            spelled &= self.cut_and_segment(model, &text[start..found.start()], &mut word, out);
            out.push(self.matched[found.pattern().as_usize()]);
            start = found.end();
        }
        spelled &= self.cut_and_segment(model, &text[start..], &mut word, out);
        if !spelled {
            out.clear();
        }
        spelled
    }

    /// Appends the pieces of text without added tokens.
    fn cut_and_segment(
        &self,
        model: &Model,
        text: &str,
        word: &mut Vec<u32>,
        out: &mut Vec<u32>,
    ) -> bool {
        let cut = self.pre_tokenizer.as_ref().and_then(|cut| cut.cut(text));
        let whole = std::iter::once(0..text.len());
        let mut segment = |range| {
            let spelled = model.segment(&self.vocab, &text.as_bytes()[range], word);
            out.extend_from_slice(word);
            spelled
        };
        match cut {
            Some(ranges) => ranges.into_iter().all(&mut segment),
            None => whole.into_iter().all(&mut segment),
        }
    }

    /// Finds the added tokens that are text: of those that start at one place the longest.
    fn matcher(&self) -> Option<&AhoCorasick> {
        if self.matched.is_empty() {
            return None;
        }
        let build = || {
            let texts = self.matched.iter().map(|&id| self.vocab.token_bytes(id));
            AhoCorasick::builder()
                .match_kind(MatchKind::LeftmostLongest)
                .build(texts)
                .ok()
        };
        self.matcher.get_or_init(build).as_ref()
    }

    /// A stable hash of how bytes become ids, beside the vocabulary's own: 64 hexadecimal digits.
    /// Tokenizers without a model share one.
    #[must_use]
    pub fn model_fingerprint(&self) -> &str {
        self.model_fingerprint.get_or_init(|| {
            let mut sha = Sha256::new();
            sha.update(b"xtoken tokenizer 2\0");
            if let Some(model) = &self.model {
                sha.update(model.digest(&self.vocab));
            }
            for part in self.pre_tokenizer.iter().flat_map(|cut| cut.identity()) {
                sha.update((part.len() as u64).to_le_bytes());
                sha.update(part);
            }
            for id in &self.matched {
                sha.update(id.to_le_bytes());
            }
            let mut emitted: Vec<(u32, u32)> = self.emitted.iter().map(|(&a, &b)| (a, b)).collect();
            emitted.sort_unstable();
            for id in emitted
                .into_iter()
                .flat_map(|(found, emitted)| [found, emitted])
            {
                sha.update(id.to_le_bytes());
            }
            hex(&sha.finalize())
        })
    }
}
