//! WordPiece: the longest token that fits, from left to right.
//!
//! A space starts a word, so that bytes without one continue the word before them. Letter case and
//! accents that the tokenizer's normalizer drops are not restored here.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::unsupported;
use crate::error::Result;
use crate::vocab::{Spelling, TokenKind, TokenizerJson, Vocab};

/// A WordPiece model; its tokens are those of the vocabulary.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WordPiece {
    /// Longer words are unknown.
    max_chars: usize,
}

impl WordPiece {
    pub(super) fn from_json(json: &TokenizerJson<'_>, spelling: &Spelling) -> Result<Self> {
        let declared = json
            .model
            .continuing_subword_prefix
            .as_deref()
            .unwrap_or("##");
        match spelling {
            Spelling::WordPiece { prefix } if prefix == declared => {}
            other => {
                return Err(unsupported(format!(
                    "WordPiece ({declared}) with {other:?}"
                )));
            }
        }
        Ok(Self {
            max_chars: json.model.max_input_chars_per_word.unwrap_or(100),
        })
    }

    pub(super) fn segment(&self, vocab: &Vocab, bytes: &[u8], out: &mut Vec<u32>) -> bool {
        let Ok(text) = str::from_utf8(bytes) else {
            return false;
        };
        let mut rest = text;
        while !rest.is_empty() {
            // A word is a space, if it starts with one, and all up to the next.
            let word_start = usize::from(rest.starts_with(' '));
            let end = rest[word_start..]
                .find(' ')
                .map_or(rest.len(), |at| word_start + at);
            let (word, tail) = rest.split_at(end);
            if word[word_start..].chars().count() > self.max_chars
                || !longest_first(vocab, word, out)
            {
                return false;
            }
            rest = tail;
        }
        true
    }

    pub(super) fn update_digest(&self, sha: &mut Sha256) {
        sha.update((self.max_chars as u64).to_le_bytes());
    }
}

fn longest_first(vocab: &Vocab, word: &str, out: &mut Vec<u32>) -> bool {
    let mut rest = word;
    while !rest.is_empty() {
        let ends = rest.char_indices().rev().map(|(at, c)| at + c.len_utf8());
        let found = ends
            .filter_map(|end| Some((vocab.id_of(&rest.as_bytes()[..end])?, end)))
            .next();
        match found {
            Some((id, end)) if vocab.kind(id) == TokenKind::Normal => {
                out.push(id);
                rest = &rest[end..];
            }
            _ => return false,
        }
    }
    true
}
