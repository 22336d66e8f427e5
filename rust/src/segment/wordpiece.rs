//! WordPiece: the longest token that fits, from left to right.
//!
//! A space starts a word, so that bytes without one continue the word before them. Letter case and
//! accents that the tokenizer's normalizer drops are not restored here.

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::occurrences::{SHORT_TOKEN, occurrences};
use super::unsupported;
use crate::error::Result;
use crate::vocab::{Spelling, TokenKind, TokenizerJson, Vocab};

/// A WordPiece model; its tokens are those of the vocabulary.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct WordPiece {
    /// Longer words are unknown.
    max_chars: usize,
    /// Lengths in bytes that tokens of up to [`SHORT_TOKEN`] bytes have, longest first.
    lengths: Vec<u32>,
    /// Ids of the others.
    giants: Vec<u32>,
}

impl WordPiece {
    pub(super) fn from_json(json: &TokenizerJson<'_>, vocab: &Vocab) -> Result<Self> {
        let declared = json
            .model
            .continuing_subword_prefix
            .as_deref()
            .unwrap_or("##");
        match vocab.spelling() {
            Spelling::WordPiece { prefix } if prefix == declared => {}
            other => {
                return Err(unsupported(format!(
                    "WordPiece ({declared}) with {other:?}"
                )));
            }
        }
        let mut lengths = Vec::new();
        let mut giants = Vec::new();
        for id in 0..vocab.len() as u32 {
            match vocab.token_bytes(id).len() {
                0 => {}
                length if length <= SHORT_TOKEN => lengths.push(length as u32),
                _ => giants.push(id),
            }
        }
        lengths.sort_unstable_by(|a, b| b.cmp(a));
        lengths.dedup();
        Ok(Self {
            max_chars: json.model.max_input_chars_per_word.unwrap_or(100),
            lengths,
            giants,
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
                || !self.longest_first(vocab, word.as_bytes(), out)
            {
                return false;
            }
            rest = tail;
        }
        true
    }

    fn longest_first(&self, vocab: &Vocab, word: &[u8], out: &mut Vec<u32>) -> bool {
        let giants = self.giants_in(vocab, word);
        let mut at = 0;
        while at < word.len() {
            let rest = &word[at..];
            let giant = giants.partition_point(|&(start, ..)| start <= at);
            let found = match giant.checked_sub(1).map(|last| giants[last]) {
                Some((start, length, id)) if start == at => Some((length, id)),
                _ => self
                    .lengths
                    .iter()
                    .filter_map(|&length| rest.get(..length as usize))
                    .find_map(|token| Some((token.len(), vocab.id_of(token)?))),
            };
            match found {
                Some((length, id)) if vocab.kind(id) == TokenKind::Normal => {
                    out.push(id);
                    at += length;
                }
                _ => return false,
            }
        }
        true
    }

    /// Place, length and id of each long token, in order, the longest of a place last.
    fn giants_in(&self, vocab: &Vocab, word: &[u8]) -> Vec<(usize, usize, u32)> {
        let mut found = Vec::new();
        for token in self.giants.iter().map(|&id| vocab.token_bytes(id)) {
            if let Some(id) = vocab.id_of(token) {
                occurrences(word, token, |at| found.push((at, token.len(), id)));
            }
        }
        found.sort_unstable();
        found
    }

    pub(super) fn update_digest(&self, sha: &mut Sha256) {
        sha.update((self.max_chars as u64).to_le_bytes());
    }
}
