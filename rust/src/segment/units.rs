//! What a word of BPE starts from: its symbols before any merge, or a token that it is as a whole.

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};

use super::NONE;
use crate::vocab::{TokenKind, Vocab};

/// The symbols that a word starts from.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Units {
    /// The id of each of the 256 bytes, or `NONE`.
    Bytes(Vec<u32>),
    /// A character each; one without a token is spelled in byte tokens, as are bytes that are not
    /// valid UTF-8.
    Chars {
        ids: FxHashMap<char, u32>,
        /// What stands for a space, usually `▁`.
        space: char,
        byte_fallback: Vec<u32>,
    },
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

impl Units {
    /// Appends the symbols of `bytes`; `false` where one has no id.
    pub fn push(&self, bytes: &[u8], out: &mut Vec<u32>) -> bool {
        let mut known = true;
        let mut push = |id: u32, out: &mut Vec<u32>| {
            known &= id != NONE;
            out.push(id);
        };
        match self {
            Units::Bytes(ids) => {
                bytes
                    .iter()
                    .for_each(|&byte| push(ids[usize::from(byte)], out));
            }
            Units::Chars {
                ids,
                space,
                byte_fallback,
            } => {
                for chunk in bytes.utf8_chunks() {
                    for c in chunk.valid().chars() {
                        match ids.get(if c == ' ' { space } else { &c }) {
                            Some(&id) => push(id, out),
                            None => {
                                let mut buffer = [0; 4];
                                let surface = if c == ' ' { *space } else { c };
                                for byte in surface.encode_utf8(&mut buffer).bytes() {
                                    push(byte_fallback[usize::from(byte)], out);
                                }
                            }
                        }
                    }
                    chunk.invalid().iter().for_each(|&byte| {
                        push(byte_fallback[usize::from(byte)], out);
                    });
                }
            }
        }
        known
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
