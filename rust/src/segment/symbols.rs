//! What a word of BPE starts from: its symbols before any merge, or a token that it is as a whole.

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::NONE;
use crate::vocab::{Spelling, TokenKind, Vocab};

/// The ids of the symbols that a word starts from; which of the two tables counts is a matter of
/// the vocabulary's spelling.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Symbols {
    /// The id of each character that is a token; empty where symbols are bytes.
    pub chars: FxHashMap<char, u32>,
    /// The id of each of the 256 bytes, or `NONE`. Where symbols are characters, these spell a
    /// character without a token and bytes that are not valid UTF-8.
    pub bytes: Vec<u32>,
}

/// Which whole words skip the merges.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Words {
    None,
    /// Each word that is itself a token of the model (`ignore_merges`, and all rank files).
    Tokens {
        /// Whether an id belongs to the model, bit by bit; added tokens do not.
        in_model: Vec<u64>,
        /// Model tokens that share their bytes with another id, which [`Vocab::id_of`] prefers.
        shadowed: FxHashMap<Vec<u8>, u32>,
    },
}

impl Symbols {
    /// Appends the symbols of `bytes`; `false` where one has no id.
    pub fn push(&self, spelling: &Spelling, bytes: &[u8], out: &mut Vec<u32>) -> bool {
        let mut known = true;
        let mut push_bytes = |bytes: &[u8], out: &mut Vec<u32>| {
            for &byte in bytes {
                let id = self.bytes[usize::from(byte)];
                known &= id != NONE;
                out.push(id);
            }
        };
        let Spelling::Metaspace { replacement, .. } = spelling else {
            push_bytes(bytes, out);
            return known;
        };
        for chunk in bytes.utf8_chunks() {
            for c in chunk.valid().chars() {
                let surface = if c == ' ' { *replacement } else { c };
                match self.chars.get(&surface) {
                    Some(&id) => out.push(id),
                    None => push_bytes(surface.encode_utf8(&mut [0; 4]).as_bytes(), out),
                }
            }
            push_bytes(chunk.invalid(), out);
        }
        known
    }

    /// Adds the tables to a digest, in a stable order.
    pub fn update_digest(&self, spelling: &Spelling, sha: &mut Sha256) {
        let ids = |sha: &mut Sha256, ids: &[u32]| {
            ids.iter().for_each(|id| sha.update(id.to_le_bytes()));
        };
        if let Spelling::Metaspace { replacement, .. } = spelling {
            let mut chars: Vec<(char, u32)> = self.chars.iter().map(|(&c, &id)| (c, id)).collect();
            chars.sort_unstable();
            chars.iter().for_each(|&(c, id)| ids(sha, &[c as u32, id]));
            ids(sha, &[*replacement as u32]);
        }
        ids(sha, &self.bytes);
    }
}

impl Words {
    /// The words that are tokens of the model, which has these ids.
    pub fn tokens(vocab: &Vocab, model_ids: impl Iterator<Item = u32>) -> Self {
        let mut in_model = vec![0u64; vocab.len().div_ceil(64)];
        let mut shadowed = FxHashMap::default();
        for id in model_ids {
            if vocab.kind(id) != TokenKind::Normal {
                continue;
            }
            if let Some(word) = in_model.get_mut(id as usize / 64) {
                *word |= 1 << (id % 64);
            }
            if vocab.id_of(vocab.token_bytes(id)) != Some(id) {
                shadowed.insert(vocab.token_bytes(id).to_vec(), id);
            }
        }
        Words::Tokens { in_model, shadowed }
    }

    /// The token that `bytes` are as a whole.
    pub fn get(&self, vocab: &Vocab, bytes: &[u8]) -> Option<u32> {
        let Words::Tokens { in_model, shadowed } = self else {
            return None;
        };
        let id = vocab.id_of(bytes)?;
        if in_model
            .get(id as usize / 64)
            .is_some_and(|word| word >> (id % 64) & 1 == 1)
        {
            return Some(id);
        }
        shadowed.get(bytes).copied()
    }
}
