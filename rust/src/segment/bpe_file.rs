//! The merges of a `tokenizer.json`, which names tokens by their surfaces.

use std::borrow::Cow;

use rustc_hash::FxHashMap;
use serde::Deserialize;

use super::pairs::Merge;
use crate::error::{Error, Result};
use crate::vocab::tokenizer_json::{TokenizerJson, parse_section};

/// A string that borrows from the JSON text where it holds no escape.
#[derive(Deserialize, PartialEq, Eq, Hash)]
pub(super) struct Str<'a>(#[serde(borrow)] pub(super) Cow<'a, str>);

impl std::borrow::Borrow<str> for Str<'_> {
    fn borrow(&self) -> &str {
        &self.0
    }
}

/// The merge list, by ids; the rank of a merge is its line.
pub(super) fn read_merges(
    json: &TokenizerJson<'_>,
    ids: &FxHashMap<Str<'_>, u32>,
) -> Result<Vec<Merge>> {
    const WHAT: &str = "the merges of tokenizer.json";
    let malformed = |rank: usize, reason: String| Error::Format {
        what: WHAT,
        reason: format!("merge {rank}: {reason}"),
        remedy: "pass the tokenizer.json of a Hugging Face fast tokenizer",
    };
    let text = json.model.merges.map_or("[]", |raw| raw.get());
    // ["a", "b"] since tokenizers 0.20, "a b" before.
    let in_pairs = text[1..].trim_start().starts_with('[');
    let rows: Vec<(Str<'_>, Str<'_>)> = if in_pairs {
        parse_section(text, WHAT)?
    } else {
        let lines: Vec<Str<'_>> = parse_section(text, WHAT)?;
        let mut rows = Vec::with_capacity(lines.len());
        for (rank, line) in lines.into_iter().enumerate() {
            let halves = match line.0 {
                Cow::Borrowed(line) => line
                    .split_once(' ')
                    .map(|(left, right)| (Cow::Borrowed(left), Cow::Borrowed(right))),
                Cow::Owned(ref line) => line
                    .split_once(' ')
                    .map(|(left, right)| (Cow::Owned(left.into()), Cow::Owned(right.into()))),
            };
            let (left, right) = halves
                .filter(|(_, right)| !right.contains(' '))
                .ok_or_else(|| malformed(rank, format!("{:?} is not two tokens", line.0)))?;
            rows.push((Str(left), Str(right)));
        }
        rows
    };
    let mut merged = String::new();
    let mut merges = Vec::with_capacity(rows.len());
    for (rank, (left, right)) in rows.iter().enumerate() {
        merged.clear();
        merged.push_str(&left.0);
        merged.push_str(&right.0);
        let id = |surface: &str| {
            let missing = || malformed(rank, format!("{surface:?} is not in the vocabulary"));
            ids.get(surface).copied().ok_or_else(missing)
        };
        merges.push(Merge {
            left: id(&left.0)?,
            right: id(&right.0)?,
            rank: rank as u32,
            merged: id(&merged)?,
        });
    }
    Ok(merges)
}
