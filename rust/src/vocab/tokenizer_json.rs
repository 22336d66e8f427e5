//! Reads Hugging Face's `tokenizer.json`: the bytes of each token, from the decoder that it
//! declares.

use std::borrow::Cow;

use rustc_hash::{FxHashMap, FxHashSet};
use serde::Deserialize;
use serde_json::Value;
use serde_json::value::RawValue;

use super::holes::Holes;
use super::spelling::{ByteLevel, METASPACE, Spelling, byte_fallback, byte_to_char, single_char};
use super::{DummyPrefix, Role, TokenKind, Vocab, VocabBuilder};
use crate::error::{Error, Result};

/// The parts of a `tokenizer.json` that say what its tokens are and how its model segments.
#[derive(Debug, Deserialize)]
pub struct TokenizerJson<'a> {
    /// Tokens matched in the text before the model sees it.
    #[serde(default)]
    pub added_tokens: Vec<AddedToken>,
    /// How text is changed before it is tokenized.
    #[serde(default)]
    pub normalizer: Option<Value>,
    /// How text is cut before the model sees it.
    #[serde(default)]
    pub pre_tokenizer: Option<Value>,
    /// How tokens become text.
    #[serde(default)]
    pub decoder: Option<Value>,
    /// The vocabulary and the segmentation model.
    #[serde(borrow)]
    pub model: ModelJson<'a>,
}

/// One entry of `added_tokens`.
#[derive(Debug, Deserialize)]
pub struct AddedToken {
    /// Its id.
    pub id: u32,
    /// The text that it matches.
    pub content: String,
    /// Whether it is a control token; the others are literal text.
    #[serde(default)]
    pub special: bool,
    /// Whether it is matched only where no letter or digit stands beside it.
    #[serde(default)]
    pub single_word: bool,
}

/// The `model` section; the large parts stay unparsed until they are asked for.
#[derive(Debug, Deserialize)]
pub struct ModelJson<'a> {
    /// `BPE`, `Unigram`, `WordPiece` or `WordLevel`; old files leave it out.
    #[serde(rename = "type", default)]
    pub kind: Option<String>,
    /// An object of surfaces to ids, or for Unigram an array of surfaces with scores.
    #[serde(borrow)]
    pub vocab: &'a RawValue,
    /// The merges of BPE, best first: `"a b"` or `["a", "b"]`.
    #[serde(borrow, default)]
    pub merges: Option<&'a RawValue>,
    /// The surface of the unknown token.
    #[serde(default)]
    pub unk_token: Option<String>,
    /// Unigram names its unknown token by id.
    #[serde(default)]
    pub unk_id: Option<u32>,
    /// Whether characters without a token are spelled in `<0xNN>` tokens.
    #[serde(default)]
    pub byte_fallback: Option<bool>,
    /// Whether a run of unknown characters is one unknown token.
    #[serde(default)]
    pub fuse_unk: Option<bool>,
    /// Whether a word that is itself a token skips the merges.
    #[serde(default)]
    pub ignore_merges: Option<bool>,
    /// What continues a word (`##`).
    #[serde(default)]
    pub continuing_subword_prefix: Option<String>,
    /// What ends a word (`</w>`).
    #[serde(default)]
    pub end_of_word_suffix: Option<String>,
    /// WordPiece gives up on longer words.
    #[serde(default)]
    pub max_input_chars_per_word: Option<usize>,
}

const REMEDY: &str = "pass the tokenizer.json of a Hugging Face fast tokenizer";

impl<'a> TokenizerJson<'a> {
    /// Parses the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// [`Error::Format`] where it is not JSON of that shape.
    pub fn parse(json: &'a [u8]) -> Result<Self> {
        serde_json::from_slice(json).map_err(|error| Error::Format {
            what: "tokenizer.json",
            reason: error.to_string(),
            remedy: REMEDY,
        })
    }

    /// Takes over what a configuration beside the file declares: tokens by their texts, each a
    /// control token, text, or `None`: a control token unless the file adds it as text. One that the
    /// file lacks gets the next id, in order, as the libraries that read the configuration give it.
    ///
    /// # Errors
    /// [`Error::Format`] where the vocabulary is damaged.
    pub fn declare(&mut self, declared: &[(String, Option<bool>)]) -> Result<()> {
        if declared.is_empty() {
            return Ok(());
        }
        let surfaces: FxHashMap<String, u32> = self
            .surfaces()?
            .into_iter()
            .map(|(id, surface)| (surface, id))
            .collect();
        let added = self.added_tokens.iter().map(|token| token.id);
        let last = surfaces.values().copied().chain(added).max();
        let mut next = last.map_or(0, |last| last.saturating_add(1));
        for (content, special) in declared {
            let mut known = false;
            for token in &mut self.added_tokens {
                if token.content == *content {
                    token.special = special.unwrap_or(token.special);
                    known = true;
                }
            }
            if known || content.is_empty() {
                continue;
            }
            let id = surfaces.get(content).copied().unwrap_or_else(|| {
                next = next.saturating_add(1);
                next - 1
            });
            self.added_tokens.push(AddedToken {
                id,
                content: content.clone(),
                special: special.unwrap_or(true),
                single_word: false,
            });
        }
        Ok(())
    }

    /// How this tokenizer spells bytes.
    ///
    /// # Errors
    /// [`Error::Unsupported`] where a decoder component has an effect that is not known exactly.
    pub fn spelling(&self) -> Result<Spelling> {
        let (section, parts) = match &self.decoder {
            Some(decoder) => ("decoder", flatten(decoder)),
            // Without a decoder the pre-tokenizer still says which alphabet the surfaces use.
            None => (
                "pre_tokenizer",
                self.pre_tokenizer.as_ref().map(flatten).unwrap_or_default(),
            ),
        };
        let mut spelling = None;
        let mut fallback = false;
        for part in parts {
            let name = component(part);
            match name {
                "ByteLevel" => spelling = Some(Spelling::ByteLevel),
                "WordPiece" if section == "decoder" => {
                    let prefix = part["prefix"].as_str().unwrap_or("##").to_owned();
                    spelling = Some(Spelling::WordPiece { prefix });
                }
                "Metaspace" => {
                    let replacement = part["replacement"]
                        .as_str()
                        .and_then(|s| s.chars().next())
                        .unwrap_or(METASPACE);
                    spelling = Some(Spelling::Metaspace {
                        replacement,
                        byte_fallback: false,
                    });
                }
                "Replace" if section == "decoder" && part["content"] == " " => {
                    let Some(replacement) =
                        part["pattern"]["String"].as_str().and_then(single_char)
                    else {
                        return Err(unsupported(section, part));
                    };
                    spelling = Some(Spelling::Metaspace {
                        replacement,
                        byte_fallback: false,
                    });
                }
                "ByteFallback" => fallback = true,
                "Fuse" => {}
                // Takes the dummy prefix off the whole text, not off a token.
                "Strip" if part["content"] == " " && part["stop"] == 0 => {}
                _ if section == "decoder" => return Err(unsupported(section, part)),
                _ => {}
            }
        }
        match spelling {
            Some(Spelling::Metaspace { replacement, .. }) => Ok(Spelling::Metaspace {
                replacement,
                byte_fallback: fallback,
            }),
            Some(spelling) => Ok(spelling),
            None => Err(Error::Unsupported {
                section: "decoder",
                found: self
                    .decoder
                    .as_ref()
                    .map_or("null".to_owned(), |d| component(d).to_owned()),
                supported: SUPPORTED,
            }),
        }
    }

    /// Where this tokenizer puts a space of its own before the text.
    #[must_use]
    pub fn dummy_prefix(&self) -> DummyPrefix {
        let normalizers = self.normalizer.as_ref().map(flatten).unwrap_or_default();
        if normalizers.iter().any(|part| component(part) == "Prepend") {
            return DummyPrefix::Every;
        }
        for part in self.pre_tokenizer.as_ref().map(flatten).unwrap_or_default() {
            match (component(part), part["prepend_scheme"].as_str()) {
                ("Metaspace", Some("first")) => return DummyPrefix::First,
                ("Metaspace", Some("never")) => return DummyPrefix::Never,
                ("Metaspace", Some(_)) => return DummyPrefix::Every,
                ("Metaspace", None) if part["add_prefix_space"] != false => {
                    return DummyPrefix::Every;
                }
                ("ByteLevel", _) if part["add_prefix_space"] == true => return DummyPrefix::Every,
                _ => {}
            }
        }
        DummyPrefix::Never
    }

    /// The names of the normalizer's components: what may change text before it is tokenized.
    #[must_use]
    pub fn normalizers(&self) -> Vec<&str> {
        self.normalizer
            .as_ref()
            .map(flatten)
            .unwrap_or_default()
            .into_iter()
            .map(component)
            .collect()
    }

    /// The model's surfaces, by id.
    ///
    /// # Errors
    /// [`Error::Format`] where the vocabulary is neither an object nor an array of pairs.
    pub fn surfaces(&self) -> Result<Vec<(u32, String)>> {
        let text = self.model.vocab.get();
        if text.starts_with('[') {
            let pairs: Vec<(String, f64)> =
                parse_section(text, "the vocabulary of tokenizer.json")?;
            return Ok((0..)
                .zip(pairs.into_iter().map(|(surface, _)| surface))
                .collect());
        }
        let by_surface: FxHashMap<Cow<'_, str>, u32> =
            parse_section(text, "the vocabulary of tokenizer.json")?;
        let mut surfaces: Vec<(u32, String)> = by_surface
            .into_iter()
            .map(|(surface, id)| (id, surface.into_owned()))
            .collect();
        surfaces.sort_unstable();
        if let Some(pair) = surfaces.windows(2).find(|pair| pair[0].0 == pair[1].0) {
            return Err(Error::Format {
                what: "the vocabulary of tokenizer.json",
                reason: format!("{:?} and {:?} share id {}", pair[0].1, pair[1].1, pair[0].0),
                remedy: REMEDY,
            });
        }
        Ok(surfaces)
    }

    /// The vocabulary: what each id contributes to the text.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a tokenizer that cannot be read exactly, [`Error::Format`] for a
    /// damaged one.
    pub fn vocab(&self) -> Result<Vocab> {
        let spelling = self.spelling()?;
        if let Some(suffix) = self
            .model
            .end_of_word_suffix
            .as_deref()
            .filter(|s| !s.is_empty())
        {
            return Err(Error::Unsupported {
                section: "model",
                found: format!("end_of_word_suffix {suffix}"),
                supported: SUPPORTED,
            });
        }
        let mut added: Vec<&AddedToken> = self.added_tokens.iter().collect();
        added.sort_by_key(|token| token.id);
        let surfaces = self.surfaces()?;
        self.check_alphabet(&spelling, &surfaces)?;
        let mut surfaces = surfaces.into_iter().peekable();
        let mut added = added.into_iter().peekable();
        let dummy_prefix = match spelling {
            Spelling::WordPiece { .. } => DummyPrefix::Every,
            _ => self.dummy_prefix(),
        };
        let mut builder = VocabBuilder::new(spelling.clone(), dummy_prefix);
        let reader = SurfaceReader {
            spelling,
            byte_level: ByteLevel::default(),
        };
        let mut unknown = None;
        let mut holes = Holes::among(surfaces.len() + added.len());
        loop {
            let next = match (surfaces.peek(), added.peek()) {
                (Some((id, _)), Some(token)) => (*id).min(token.id),
                (Some((id, _)), None) => *id,
                (None, Some(token)) => token.id,
                (None, None) => break,
            };
            holes.fill(&mut builder, next, "tokenizer.json", REMEDY)?;
            let surface = surfaces
                .next_if(|(id, _)| *id == next)
                .map(|(_, surface)| surface);
            let mut token = None;
            while let Some(entry) = added.next_if(|token| token.id == next) {
                token = Some(entry);
            }
            if surface
                .as_deref()
                .is_some_and(|surface| self.is_unk(next, surface))
            {
                unknown = Some(next);
            }
            match (token, surface) {
                (Some(token), _) if token.special => builder.push_special(&token.content)?,
                (Some(token), _) => builder.push_added(&reader.added_bytes(&token.content))?,
                (None, Some(surface)) if unknown == Some(next) => builder.push_special(&surface)?,
                (None, Some(surface)) => reader.push(&surface, &mut builder)?,
                (None, None) => builder.push_unused()?,
            };
        }
        let mut vocab = builder.build();
        if unknown.is_some_and(|id| vocab.kind(id) == TokenKind::Special) {
            vocab.set_role(Role::Unk, unknown)?;
        }
        Ok(vocab)
    }

    /// Refuses tokens that are spelled in one alphabet and read in another.
    ///
    /// Releases of transformers give a byte-level file whose configuration names a Llama tokenizer
    /// the pipeline of SentencePiece: spaces then vanish from the text.
    fn check_alphabet(&self, spelling: &Spelling, surfaces: &[(u32, String)]) -> Result<()> {
        let added: FxHashSet<&str> = self
            .added_tokens
            .iter()
            .map(|token| token.content.as_str())
            .collect();
        let tokens = || {
            let surfaces = surfaces.iter().map(|(_, surface)| surface.as_str());
            surfaces.filter(|surface| !added.contains(surface))
        };
        // A script may use either character; a vocabulary that spells spaces so is full of them.
        let many = |space: char| {
            let marked = tokens()
                .filter(|surface| surface.starts_with(space))
                .count();
            marked > 0 && marked * MARKED >= surfaces.len()
        };
        let any = |space: char| tokens().any(|surface| surface.contains(space));
        let whole_alphabet = || {
            let single: FxHashSet<char> = tokens().filter_map(single_char).collect();
            (0..=u8::MAX).all(|byte| single.contains(&byte_to_char(byte)))
        };
        let level_space = byte_to_char(b' ');
        let (found, expected) = match spelling {
            Spelling::Metaspace { replacement, .. }
                if !any(*replacement) && (many(level_space) || whole_alphabet()) =>
            {
                ("byte-level (Ġ for a space)", "SentencePiece")
            }
            Spelling::ByteLevel if !any(level_space) && many(METASPACE) => {
                ("SentencePiece (▁ for a space)", "the byte level")
            }
            _ => return Ok(()),
        };
        Err(Error::MixedTokenizer { found, expected })
    }

    fn is_unk(&self, id: u32, surface: &str) -> bool {
        self.model.unk_id == Some(id) || self.model.unk_token.as_deref() == Some(surface)
    }
}

const SUPPORTED: &str = "ByteLevel, Metaspace, WordPiece, and Sequences of Replace (of one character \
                         by a space), ByteFallback, Fuse and Strip";

/// Of this many tokens at least one starts with a space, or the alphabet is another.
const MARKED: usize = 50;

struct SurfaceReader {
    spelling: Spelling,
    byte_level: ByteLevel,
}

impl SurfaceReader {
    fn push(&self, surface: &str, builder: &mut VocabBuilder) -> Result<u32> {
        match &self.spelling {
            Spelling::Bytes => builder.push_text(surface.as_bytes()),
            Spelling::ByteLevel => {
                let mut bytes = Vec::with_capacity(surface.len());
                if !self.byte_level.push_bytes(surface, &mut bytes) {
                    // The decoder passes a surface outside the alphabet on as it is.
                    bytes.extend_from_slice(surface.as_bytes());
                }
                builder.push_text(&bytes)
            }
            Spelling::Metaspace {
                byte_fallback: true,
                ..
            } if byte_fallback(surface).is_some() => {
                builder.push_byte_fallback(byte_fallback(surface).unwrap_or_default())
            }
            Spelling::Metaspace { replacement, .. } => {
                builder.push_text(surface.replace(*replacement, " ").as_bytes())
            }
            Spelling::WordPiece { prefix } => match surface.strip_prefix(prefix.as_str()) {
                Some(rest) => builder.push_text(rest.as_bytes()),
                None => builder.push_text(format!(" {surface}").as_bytes()),
            },
        }
    }

    /// What an added token that is not special contributes: its own text.
    fn added_bytes(&self, content: &str) -> Vec<u8> {
        match &self.spelling {
            // The SentencePiece decoders run over added tokens as well.
            Spelling::Metaspace { replacement, .. } => {
                content.replace(*replacement, " ").into_bytes()
            }
            Spelling::Bytes | Spelling::ByteLevel => content.as_bytes().to_vec(),
            Spelling::WordPiece { .. } => format!(" {content}").into_bytes(),
        }
    }
}

/// Parses one of the sections that were left raw.
pub(crate) fn parse_section<'a, T: Deserialize<'a>>(
    text: &'a str,
    what: &'static str,
) -> Result<T> {
    serde_json::from_str(text).map_err(|error| Error::Format {
        what,
        reason: error.to_string(),
        remedy: REMEDY,
    })
}

pub(crate) fn component(part: &Value) -> &str {
    part["type"].as_str().unwrap_or("(no type)")
}

/// The components of a section, with nested sequences opened.
pub(crate) fn flatten(section: &Value) -> Vec<&Value> {
    for key in ["decoders", "normalizers", "pretokenizers"] {
        if let Some(parts) = section[key].as_array() {
            return parts.iter().flat_map(flatten).collect();
        }
    }
    if section.is_null() {
        Vec::new()
    } else {
        vec![section]
    }
}

fn unsupported(section: &'static str, part: &Value) -> Error {
    Error::Unsupported {
        section,
        found: part.to_string(),
        supported: SUPPORTED,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn byte_level(vocab: &str, added: &str) -> String {
        format!(
            r#"{{"added_tokens": {added}, "decoder": {{"type": "ByteLevel"}},
                "model": {{"type": "BPE", "vocab": {vocab}, "merges": []}}}}"#
        )
    }

    #[test]
    fn byte_level_tokens_are_their_bytes_and_holes_are_unused() {
        let json = byte_level(
            r#"{"Ġthe": 0, "Ċ": 1, "â": 2, "a▁b": 5}"#,
            r#"[{"id": 3, "content": "<|end|>", "special": true},
                {"id": 4, "content": "é ", "special": false}]"#,
        );
        let vocab = TokenizerJson::parse(json.as_bytes())
            .unwrap()
            .vocab()
            .unwrap();
        let tokens: Vec<&[u8]> = (0..6).map(|id| vocab.token_bytes(id)).collect();
        assert_eq!(
            tokens,
            [
                b" the" as &[u8],
                b"\n",
                &[0xE2],
                b"",
                "é ".as_bytes(),
                "a▁b".as_bytes()
            ]
        );
        assert_eq!(vocab.special_text(3), Some("<|end|>"));
        let json = byte_level(r#"{"a": 0, "b": 3}"#, "[]");
        let vocab = TokenizerJson::parse(json.as_bytes())
            .unwrap()
            .vocab()
            .unwrap();
        assert_eq!(vocab.kind(1), crate::vocab::TokenKind::Unused);
        assert_eq!(vocab.len(), 4);
    }

    #[test]
    fn sentencepiece_tokens_lose_their_metaspace_and_their_byte_spelling() {
        let json = r#"{
            "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}]},
            "decoder": {"type": "Sequence", "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"}, {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
            "added_tokens": [{"id": 3, "content": "▁▁", "special": false}],
            "model": {"type": "BPE", "unk_token": "<unk>", "merges": [],
                      "vocab": {"<unk>": 0, "<0x41>": 1, "▁A": 2, "A": 4}}}"#;
        let vocab = TokenizerJson::parse(json.as_bytes())
            .unwrap()
            .vocab()
            .unwrap();
        assert_eq!(vocab.token_bytes(1), b"A");
        assert_eq!(vocab.token_bytes(2), b" A");
        assert_eq!(vocab.token_bytes(3), b"  ");
        assert_eq!(vocab.id_of(b"A"), Some(4));
        assert_eq!(vocab.special_text(0), Some("<unk>"));
        assert_eq!(vocab.dummy_prefix(), DummyPrefix::Every);
    }

    #[test]
    fn what_cannot_be_read_exactly_is_refused_by_name() {
        let refused = |json: &str| {
            let parsed = TokenizerJson::parse(json.as_bytes());
            parsed
                .and_then(|json| json.vocab())
                .unwrap_err()
                .to_string()
        };
        let model = r#""model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}"#;
        assert!(refused(&format!(r#"{{"decoder": {{"type": "CTC"}}, {model}}}"#)).contains("CTC"));
        assert!(refused(&format!("{{{model}}}")).contains("null"));
        assert!(refused("[]").contains("tokenizer.json"));
        assert!(refused(&byte_level(r#"{"a": 4000000000}"#, "[]")).contains("4000000000"));
        assert!(refused(&byte_level(r#"{"a": 1, "b": 1}"#, "[]")).contains("share id 1"));
        let suffix = r#"{"decoder": {"type": "ByteLevel"},
            "model": {"vocab": {"a": 0}, "merges": [], "end_of_word_suffix": "</w>"}}"#;
        assert!(refused(suffix).contains("</w>"));
    }
}
