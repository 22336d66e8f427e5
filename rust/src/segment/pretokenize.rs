//! How a tokenizer cuts text before its model sees it: normalizer and pre-tokenizer, as Hugging
//! Face's own crate runs them.
//!
//! What counts is a token inside a text, so what a tokenizer does at the edges of the text alone (a
//! dummy prefix, stripped white space) is left out.

use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::{
    NormalizedString, Normalizer as _, OffsetReferential, OffsetType, PreTokenizedString,
    PreTokenizer as _,
};

use super::unsupported;
use crate::error::{Error, Result};
use crate::vocab::Spelling;
use crate::vocab::tokenizer_json::{component, flatten};

/// Unicode's normal forms leave ASCII as it is.
const NORMAL_FORMS: [&str; 4] = ["NFC", "NFD", "NFKC", "NFKD"];

/// Cuts the text of a token as its tokenizer does.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct PreTokenizer {
    stored: Stored,
    cut: PreTokenizerWrapper,
    normalizer: Option<NormalizerWrapper>,
    keeps_ascii: bool,
}

/// The two sections in one canonical form, so that equal behavior is equal text.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Stored {
    pre_tokenizer: String,
    normalizer: Option<String>,
    /// What stands for a space once the text is normalized.
    replacement: Option<char>,
}

impl PreTokenizer {
    /// The sections of a `tokenizer.json`; `None` where they do not cut text.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for a section that Hugging Face's crate cannot read.
    pub(crate) fn from_sections(
        pre_tokenizer: Option<&Value>,
        normalizer: Option<&Value>,
        spelling: &Spelling,
    ) -> Result<Option<Self>> {
        let replacement = match spelling {
            Spelling::Metaspace { replacement, .. } => Some(*replacement),
            // Case, accents and white space are lost: words are cut by the model alone.
            Spelling::WordPiece { .. } => return Ok(None),
            Spelling::Bytes | Spelling::ByteLevel => None,
        };
        let normalizers: Vec<&Value> = normalizer
            .map(flatten)
            .unwrap_or_default()
            .into_iter()
            .filter(|part| !matches!(component(part), "Prepend" | "Strip"))
            .collect();
        let replaces_spaces = normalizers
            .iter()
            .any(|part| component(part) == "Replace" && part["pattern"]["String"] == " ");
        let mut cuts: Vec<Value> = pre_tokenizer
            .map(flatten)
            .unwrap_or_default()
            .into_iter()
            .filter(|part| {
                let of_spaces = component(part) == "Split" && part["pattern"]["String"] == " ";
                !(replaces_spaces && of_spaces)
            })
            .map(inside_text)
            .collect();
        // Spells the text anew and cuts nowhere; nothing comes after it.
        let only_spells = |part: &Value| match component(part) {
            "ByteLevel" => part["use_regex"] == false,
            "Metaspace" => part["split"] == false,
            _ => false,
        };
        while cuts.last().is_some_and(only_spells) {
            cuts.pop();
        }
        if cuts.is_empty() {
            return Ok(None);
        }
        if let Some(part) = cuts
            .iter()
            .find(|part| component(part) == "FixedLength" && part["length"] == 0)
        {
            return Err(unsupported(format!("pre-tokenizer {part}")));
        }
        let cut: PreTokenizerWrapper = read(
            "pre-tokenizer",
            json!({"type": "Sequence", "pretokenizers": cuts}),
        )?;
        let normalizer: Option<NormalizerWrapper> = match normalizers.is_empty() {
            true => None,
            false => Some(read(
                "normalizer",
                json!({"type": "Sequence", "normalizers": normalizers}),
            )?),
        };
        Self::compiled(Stored {
            pre_tokenizer: write(&cut)?,
            normalizer: normalizer.as_ref().map(write).transpose()?,
            replacement,
        })
        .map(Some)
    }

    /// Cuts at the matches of a regular expression, as tiktoken does.
    ///
    /// # Errors
    /// [`Error::Unsupported`] for an expression that cannot be read.
    pub(crate) fn from_pattern(pattern: &str) -> Result<Option<Self>> {
        let split = json!({
            "type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": false,
        });
        Self::from_sections(Some(&split), None, &Spelling::Bytes)
    }

    fn compiled(stored: Stored) -> Result<Self> {
        let normalizer: Option<NormalizerWrapper> = match &stored.normalizer {
            Some(text) => Some(parse("normalizer", text)?),
            None => None,
        };
        let keeps_ascii = match &stored.normalizer {
            Some(text) => flatten(&parse("normalizer", text)?)
                .into_iter()
                .all(|part: &Value| NORMAL_FORMS.contains(&component(part))),
            None => true,
        };
        Ok(Self {
            cut: parse("pre-tokenizer", &stored.pre_tokenizer)?,
            normalizer,
            keeps_ascii,
            stored,
        })
    }

    /// Where the tokenizer cuts `text`, as byte ranges that tile it. `None` where it would change
    /// the text first, or where that is not known.
    pub(crate) fn cut(&self, text: &str) -> Option<Vec<Range<usize>>> {
        if self.stored.replacement.is_some_and(|c| text.contains(c)) {
            return None;
        }
        // A foreign regular expression runs here: its limits are errors, and a slip of the crate
        // must not end the process.
        let cut = catch_unwind(AssertUnwindSafe(|| self.offsets(text)));
        let ranges = cut.ok().flatten()?;
        let mut end = 0;
        for range in &ranges {
            if range.start != end || range.end <= end {
                return None;
            }
            end = range.end;
        }
        (end == text.len()).then_some(ranges)
    }

    fn offsets(&self, text: &str) -> Option<Vec<Range<usize>>> {
        let mut normalized = NormalizedString::from(text);
        if let Some(normalizer) = &self.normalizer
            && !(self.keeps_ascii && text.is_ascii())
        {
            normalizer.normalize(&mut normalized).ok()?;
            let same = match self.stored.replacement {
                Some(replacement) => normalized
                    .get()
                    .chars()
                    .map(|c| if c == replacement { ' ' } else { c })
                    .eq(text.chars()),
                None => normalized.get() == text,
            };
            if !same {
                return None;
            }
        }
        let mut pieces = PreTokenizedString::from(normalized);
        self.cut.pre_tokenize(&mut pieces).ok()?;
        let splits = pieces.get_splits(OffsetReferential::Original, OffsetType::Byte);
        Some(
            splits
                .into_iter()
                .map(|(_, (start, end), _)| start..end)
                .filter(|range| !range.is_empty())
                .collect(),
        )
    }

    /// The stored section, whether ASCII stays as it is, whether anything may change, and what stands
    /// for a space.
    pub(super) fn parts(&self) -> (&str, bool, bool, Option<char>) {
        let stored = &self.stored;
        (
            &stored.pre_tokenizer,
            self.keeps_ascii,
            self.normalizer.is_some(),
            stored.replacement,
        )
    }

    /// What decides where text is cut, as stable text.
    pub(crate) fn identity(&self) -> [&str; 2] {
        [
            &self.stored.pre_tokenizer,
            self.stored.normalizer.as_deref().unwrap_or_default(),
        ]
    }
}

/// A component as it acts inside a text: without a space of its own.
fn inside_text(part: &Value) -> Value {
    let mut part = part.clone();
    let kind = component(&part).to_owned();
    if let Some(fields) = part.as_object_mut() {
        match kind.as_str() {
            "ByteLevel" => {
                fields.insert("add_prefix_space".to_owned(), false.into());
                fields.insert("trim_offsets".to_owned(), true.into());
            }
            "Metaspace" => {
                fields.remove("add_prefix_space");
                fields.insert("prepend_scheme".to_owned(), "never".into());
            }
            _ => {}
        }
    }
    part
}

fn read<T: for<'de> Deserialize<'de>>(what: &str, section: Value) -> Result<T> {
    serde_json::from_value(section).map_err(|error| unsupported(format!("{what}: {error}")))
}

fn parse<T: for<'de> Deserialize<'de>>(what: &str, text: &str) -> Result<T> {
    serde_json::from_str(text).map_err(|error| unsupported(format!("{what}: {error}")))
}

fn write<T: Serialize>(section: &T) -> Result<String> {
    // Through a value, whose keys are in order.
    serde_json::to_value(section)
        .map(|value| value.to_string())
        .map_err(|error| unsupported(error.to_string()))
}

impl TryFrom<Stored> for PreTokenizer {
    type Error = Error;

    fn try_from(stored: Stored) -> Result<Self> {
        Self::compiled(stored)
    }
}

impl From<PreTokenizer> for Stored {
    fn from(pre_tokenizer: PreTokenizer) -> Self {
        pre_tokenizer.stored
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pre_tokenizer(
        json: &str,
        normalizer: Option<Value>,
        spelling: &Spelling,
    ) -> Option<PreTokenizer> {
        let section: Value = serde_json::from_str(json).unwrap();
        PreTokenizer::from_sections(Some(&section), normalizer.as_ref(), spelling).unwrap()
    }

    fn parts<'t>(cut: &PreTokenizer, text: &'t str) -> Option<Vec<&'t str>> {
        let ranges = cut.cut(text)?;
        Some(ranges.into_iter().map(|range| &text[range]).collect())
    }

    const DIGITS: &str = r#"{"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": "\\p{N}{1,3}"}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": true, "trim_offsets": false, "use_regex": true}]}"#;

    #[test]
    fn text_is_cut_as_the_tokenizer_does_without_a_space_of_its_own() {
        let cut = pre_tokenizer(DIGITS, None, &Spelling::ByteLevel).unwrap();
        assert_eq!(
            parts(&cut, "a 2023é日!").unwrap(),
            ["a", " ", "202", "3", "é日", "!"]
        );
        let stored = serde_json::to_string(&cut).unwrap();
        let back: PreTokenizer = serde_json::from_str(&stored).unwrap();
        assert_eq!(back.identity(), cut.identity());
        assert_eq!(parts(&back, "12345").unwrap(), ["123", "45"]);
        let broken = stored.replacen("p{N}", "p{N", 1);
        assert!(serde_json::from_str::<PreTokenizer>(&broken).is_err());
    }

    #[test]
    fn text_that_the_normalizer_changes_is_not_cut() {
        let cut =
            pre_tokenizer(DIGITS, Some(json!({"type": "NFC"})), &Spelling::ByteLevel).unwrap();
        assert_eq!(parts(&cut, "a1234").unwrap(), ["a", "123", "4"]);
        assert_eq!(parts(&cut, "é1234").unwrap(), ["é", "123", "4"]);
        assert_eq!(parts(&cut, "e\u{301}1234"), None);
    }

    #[test]
    fn pipelines_that_spell_spaces_and_cut_nowhere_are_none() {
        let sentencepiece = Spelling::sentencepiece();
        for (json, normalizer) in [
            (
                r#"{"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false}"#,
                None,
            ),
            (
                r#"{"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": false}"#,
                Some(json!({"type": "Replace", "pattern": {"String": " "}, "content": "▁"})),
            ),
        ] {
            assert!(pre_tokenizer(json, normalizer, &sentencepiece).is_none());
        }
        let cut = pre_tokenizer(
            r#"{"type": "Metaspace", "replacement": "▁", "add_prefix_space": true}"#,
            Some(json!({"type": "Prepend", "prepend": "▁"})),
            &sentencepiece,
        )
        .unwrap();
        assert_eq!(parts(&cut, " the cat").unwrap(), [" the", " cat"]);
        assert_eq!(parts(&cut, "the cat").unwrap(), ["the", " cat"]);
        assert_eq!(parts(&cut, "the▁cat"), None);
    }

    #[test]
    fn what_cannot_be_read_is_refused_by_name() {
        for json in [
            r#"{"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": false}"#,
            r#"{"type": "Surprise"}"#,
            r#"{"type": "FixedLength", "length": 0}"#,
        ] {
            let section: Value = serde_json::from_str(json).unwrap();
            let error = PreTokenizer::from_sections(Some(&section), None, &Spelling::ByteLevel);
            assert!(error.unwrap_err().to_string().contains("pre-tokenizer"));
        }
    }
}
