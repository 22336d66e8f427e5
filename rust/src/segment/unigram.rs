//! Unigram: the segmentation with the highest sum of log-probabilities, by Viterbi over bytes.
//!
//! Kudo, 2018, arXiv 1804.10959; scores, the penalty of an unknown character and ties are those of
//! Hugging Face's `Unigram`, so that the answer is the same.

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::NONE;
use super::bpe_file::Str;
use super::occurrences::{SHORT_TOKEN, occurrences};
use crate::error::{Error, Result};
use crate::vocab::Spelling;
use crate::vocab::spelling::byte_to_char;
use crate::vocab::tokenizer_json::{TokenizerJson, parse_section};

/// What an unknown character costs below the least probable token.
const UNKNOWN_PENALTY: f64 = 10.0;

const REMEDY: &str = "scores are finite log-probabilities; pass the file as it was published";

/// How the decimal scores of a unigram model become numbers; matters where two segmentations tie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scores {
    /// As Hugging Face reads a file, by serde_json's fast path: off by a last bit at times.
    FromFile,
    /// To the last bit: what a tokenizer in memory has printed.
    FromMemory,
}

/// A unigram model.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Unigram {
    stored: Stored,
    /// All tokens of up to [`SHORT_TOKEN`] bytes.
    trie: SurfaceTrie,
    /// The others, one id for each surface.
    giants: Vec<u32>,
    unknown_score: f64,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Stored {
    /// Surface and score of each id.
    vocab: Vec<(String, f64)>,
    /// Id of each `<0xNN>`, or `NONE`; all `NONE` without byte fallback.
    byte_fallback: Vec<u32>,
}

impl Unigram {
    pub(super) fn from_json(
        json: &TokenizerJson<'_>,
        spelling: &Spelling,
        scores: Scores,
    ) -> Result<Self> {
        let vocab = read_vocab(json.model.vocab.get(), scores)?;
        if let Spelling::WordPiece { .. } = spelling {
            return Err(super::unsupported(
                "Unigram with a WordPiece decoder".to_owned(),
            ));
        }
        let mut byte_fallback = vec![NONE; 256];
        if json.model.byte_fallback == Some(true) {
            // The surface counts, also where the decoder does not read it as a byte.
            for (id, (surface, _)) in (0..).zip(&vocab) {
                if let Some(byte) = crate::vocab::spelling::byte_fallback(surface) {
                    byte_fallback[usize::from(byte)] = id;
                }
            }
        }
        Stored {
            vocab,
            byte_fallback,
        }
        .try_into()
    }

    /// Appends the pieces; `false` where a character is unknown and has no byte tokens.
    pub(super) fn segment(&self, spelling: &Spelling, bytes: &[u8], out: &mut Vec<u32>) -> bool {
        match spelling {
            // No file has a unigram model of such tokens.
            Spelling::Bytes | Spelling::WordPiece { .. } => false,
            Spelling::ByteLevel => {
                let text: String = bytes.iter().map(|&byte| byte_to_char(byte)).collect();
                self.viterbi(&text, out)
            }
            // No token holds a part of a character, so invalid bytes cut the text into parts that
            // are segmented on their own.
            Spelling::Metaspace { replacement, .. } => bytes.utf8_chunks().all(|chunk| {
                let valid = chunk.valid();
                let known = if valid.contains(' ') {
                    self.viterbi(
                        &valid.replace(' ', replacement.encode_utf8(&mut [0; 4])),
                        out,
                    )
                } else {
                    self.viterbi(valid, out)
                };
                known && self.push_bytes(chunk.invalid(), out)
            }),
        }
    }

    /// Place, length and id of each token of more than [`SHORT_TOKEN`] bytes, in order of places.
    fn giants_in(&self, text: &str) -> Vec<(usize, usize, u32)> {
        let mut found = Vec::new();
        for &id in &self.giants {
            let token = self.stored.vocab[id as usize].0.as_bytes();
            occurrences(text.as_bytes(), token, |at| {
                found.push((at, token.len(), id))
            });
        }
        found.sort_unstable();
        found
    }

    fn push_bytes(&self, bytes: &[u8], out: &mut Vec<u32>) -> bool {
        let ids = bytes
            .iter()
            .map(|&byte| self.stored.byte_fallback[usize::from(byte)]);
        let start = out.len();
        out.extend(ids);
        !out[start..].contains(&NONE)
    }

    fn viterbi(&self, text: &str, out: &mut Vec<u32>) -> bool {
        let size = text.len();
        let mut best = vec![
            Arrival {
                score: 0.0,
                from: usize::MAX,
                id: NONE
            };
            size + 1
        ];
        let giants = self.giants_in(text);
        let mut giants = giants.iter().peekable();
        let mut ends = text.char_indices().map(|(at, c)| (at, at + c.len_utf8()));
        for (start, char_end) in &mut ends {
            let so_far = best[start].score;
            let mut single = false;
            self.trie.prefixes(&text.as_bytes()[start..], |length, id| {
                let score = so_far + self.stored.vocab[id as usize].1;
                best[start + length].offer(score, start, id);
                single |= start + length == char_end;
            });
            while let Some(&(_, length, id)) = giants.next_if(|(at, ..)| *at == start) {
                let score = so_far + self.stored.vocab[id as usize].1;
                best[start + length].offer(score, start, id);
            }
            if !single {
                best[char_end].offer(so_far + self.unknown_score, start, NONE);
            }
        }
        let first = out.len();
        let mut end = size;
        while end > 0 {
            let Arrival { from, id, .. } = best[end];
            if id == NONE {
                let start = out.len();
                if !self.push_bytes(&text.as_bytes()[from..end], out) {
                    return false;
                }
                out[start..].reverse();
            } else {
                out.push(id);
            }
            end = from;
        }
        out[first..].reverse();
        true
    }

    pub(super) fn update_digest(&self, sha: &mut Sha256) {
        for (surface, score) in &self.stored.vocab {
            sha.update((surface.len() as u64).to_le_bytes());
            sha.update(surface);
            sha.update(score.to_le_bytes());
        }
        self.stored
            .byte_fallback
            .iter()
            .for_each(|id| sha.update(id.to_le_bytes()));
    }
}

fn read_vocab(text: &str, scores: Scores) -> Result<Vec<(String, f64)>> {
    const WHAT: &str = "the vocabulary of tokenizer.json";
    match scores {
        Scores::FromFile => {
            let vocab: Vec<(Str<'_>, f64)> = parse_section(text, WHAT)?;
            Ok(vocab
                .into_iter()
                .map(|(surface, score)| (surface.0.into_owned(), score))
                .collect())
        }
        Scores::FromMemory => {
            let vocab: Vec<(Str<'_>, &RawValue)> = parse_section(text, WHAT)?;
            let exact = |(surface, score): (Str<'_>, &RawValue)| match score.get().parse() {
                Ok(score) => Ok((surface.0.into_owned(), score)),
                Err(_) => Err(Error::Format {
                    what: WHAT,
                    reason: format!("the score of {:?} is {}", surface.0, score.get()),
                    remedy: REMEDY,
                }),
            };
            vocab.into_iter().map(exact).collect()
        }
    }
}

/// The best way to reach a byte position.
#[derive(Clone, Copy)]
struct Arrival {
    score: f64,
    from: usize,
    id: u32,
}

impl Arrival {
    /// Of equal scores the first offer stays: the longest last token.
    fn offer(&mut self, score: f64, from: usize, id: u32) {
        if self.from == usize::MAX || score > self.score {
            *self = Self { score, from, id };
        }
    }
}

impl TryFrom<Stored> for Unigram {
    type Error = Error;

    /// Checks what building guarantees, as stored bytes may have been altered.
    fn try_from(stored: Stored) -> Result<Self> {
        super::check_byte_table(&stored.byte_fallback)?;
        if let Some((surface, score)) = stored.vocab.iter().find(|(_, score)| !score.is_finite()) {
            return Err(Error::Format {
                what: "the vocabulary of tokenizer.json",
                reason: format!("the score of {surface:?} is {score}"),
                remedy: REMEDY,
            });
        }
        let trie = SurfaceTrie::new(&stored.vocab);
        let giant = |(_, (surface, _)): &(u32, &(String, f64))| surface.len() > SHORT_TOKEN;
        // Of two equal surfaces the later id counts, as in the trie.
        let giants: FxHashMap<&str, u32> = (0..)
            .zip(&stored.vocab)
            .filter(giant)
            .map(|(id, (surface, _))| (surface.as_str(), id))
            .collect();
        let giants = giants.into_values().collect();
        let scores = stored.vocab.iter().map(|&(_, score)| score);
        let unknown_score = scores.fold(f64::INFINITY, f64::min) - UNKNOWN_PENALTY;
        Ok(Self {
            stored,
            trie,
            giants,
            unknown_score,
        })
    }
}

impl From<Unigram> for Stored {
    fn from(model: Unigram) -> Self {
        model.stored
    }
}

/// All tokens by their bytes; node 0 is the root.
#[derive(Debug, Clone)]
struct SurfaceTrie {
    /// (node, byte) to the next node.
    edges: FxHashMap<(u32, u8), u32>,
    /// The token that ends at each node, or `NONE`.
    ids: Vec<u32>,
}

impl SurfaceTrie {
    fn new(vocab: &[(String, f64)]) -> Self {
        let mut trie = Self {
            edges: FxHashMap::default(),
            ids: vec![NONE],
        };
        for (id, (surface, _)) in (0..).zip(vocab) {
            if surface.len() > SHORT_TOKEN {
                continue;
            }
            let mut node = 0;
            for byte in surface.bytes() {
                let fresh = trie.ids.len() as u32;
                node = *trie.edges.entry((node, byte)).or_insert(fresh);
                if node == fresh {
                    trie.ids.push(NONE);
                }
            }
            // Of two equal surfaces the later id counts (as in Hugging Face's map).
            trie.ids[node as usize] = id;
        }
        trie
    }

    /// Calls `found` with the length and the id of each token that `bytes` starts with.
    fn prefixes(&self, bytes: &[u8], mut found: impl FnMut(usize, u32)) {
        let mut node = 0;
        for (length, &byte) in (1..).zip(bytes) {
            match self.edges.get(&(node, byte)) {
                Some(&next) => node = next,
                None => return,
            }
            let id = self.ids[node as usize];
            if id != NONE {
                found(length, id);
            }
        }
    }
}
