//! Byte pair encoding on ids: the lowest rank first, of equal ranks the leftmost.

use std::cell::RefCell;
use std::cmp::Reverse;
use std::collections::BinaryHeap;

use rustc_hash::FxHashMap;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::bpe_file::{Str, read_merges};
use super::pairs::{Merge, PairTable};
use super::symbols::{Symbols, Words};
use super::{NONE, byte_fallback_ids, check_byte_table, unsupported};
use crate::error::{Error, Result};
use crate::vocab::Vocab;
use crate::vocab::spelling::{Spelling, byte_to_char, single_char};
use crate::vocab::tokenizer_json::{TokenizerJson, parse_section};

/// Below this many symbols a scan for the lowest rank beats a heap.
const SHORT: usize = 48;

/// A BPE model whose symbols are token ids.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(try_from = "Stored", into = "Stored")]
pub struct Bpe {
    stored: Stored,
    pairs: PairTable,
}

/// What a model is saved as; the pair table follows from it.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Stored {
    symbols: Symbols,
    merges: Vec<Merge>,
    words: Words,
}

impl Bpe {
    fn new(stored: Stored) -> Self {
        let pairs = PairTable::new(&stored.merges);
        Self { stored, pairs }
    }

    pub(super) fn from_json(
        json: &TokenizerJson<'_>,
        spelling: &Spelling,
        vocab: &Vocab,
    ) -> Result<Self> {
        let affixes = [
            &json.model.continuing_subword_prefix,
            &json.model.end_of_word_suffix,
        ];
        if let Some(affix) = affixes
            .into_iter()
            .flatten()
            .find(|affix| !affix.is_empty())
        {
            return Err(unsupported(format!("BPE with the affix {affix}")));
        }
        let ids: FxHashMap<Str<'_>, u32> =
            parse_section(json.model.vocab.get(), "the vocabulary of tokenizer.json")?;
        let symbols = match spelling {
            Spelling::Bytes | Spelling::ByteLevel => Symbols {
                chars: FxHashMap::default(),
                bytes: (0..=u8::MAX)
                    .map(|byte| {
                        let mut buffer = [0; 4];
                        let surface: &str = byte_to_char(byte).encode_utf8(&mut buffer);
                        ids.get(surface).copied().unwrap_or(NONE)
                    })
                    .collect(),
            },
            Spelling::Metaspace { .. } => Symbols {
                chars: ids
                    .iter()
                    .filter_map(|(surface, &id)| Some((single_char(&surface.0)?, id)))
                    .collect(),
                bytes: if json.model.byte_fallback == Some(true) {
                    byte_fallback_ids(vocab)
                } else {
                    vec![NONE; 256]
                },
            },
            Spelling::WordPiece { .. } => {
                return Err(unsupported("BPE with a WordPiece decoder".to_owned()));
            }
        };
        let words = if json.model.ignore_merges == Some(true) {
            Words::tokens(vocab, ids.values().copied())
        } else {
            Words::None
        };
        let merges = read_merges(json, &ids)?;
        Ok(Self::new(Stored {
            symbols,
            merges,
            words,
        }))
    }

    pub(super) fn from_ranks(vocab: &Vocab) -> Self {
        let bytes = (0..=u8::MAX)
            .map(|byte| vocab.id_of(&[byte]).unwrap_or(NONE))
            .collect();
        let merges = merges_of_ranks(vocab);
        let words = Words::tokens(vocab, 0..vocab.len() as u32);
        Self::new(Stored {
            symbols: Symbols {
                chars: FxHashMap::default(),
                bytes,
            },
            merges,
            words,
        })
    }

    /// Appends the pieces; `false` where a byte or a character has no symbol.
    pub(super) fn segment(&self, vocab: &Vocab, bytes: &[u8], out: &mut Vec<u32>) -> bool {
        if let Some(id) = self.stored.words.get(vocab, bytes) {
            out.push(id);
            return true;
        }
        if !self.stored.symbols.push(vocab.spelling(), bytes, out) {
            return false;
        }
        BUFFERS.with_borrow_mut(|buffers| {
            if out.len() <= SHORT {
                self.merge_short(out, &mut buffers.ranks);
            } else {
                self.merge_long(out, buffers);
            }
        });
        true
    }

    /// Quadratic, without allocation: `ranks[i]` is the merge of symbols `i` and `i + 1`.
    fn merge_short(&self, symbols: &mut Vec<u32>, ranks: &mut Vec<(u32, u32)>) {
        ranks.clear();
        ranks.extend(
            symbols
                .windows(2)
                .map(|pair| self.pairs.get(pair[0], pair[1])),
        );
        loop {
            let mut best = NONE;
            let mut at = 0;
            for (i, &(rank, _)) in ranks.iter().enumerate() {
                if rank < best {
                    (best, at) = (rank, i);
                }
            }
            if best == NONE {
                return;
            }
            symbols[at] = ranks[at].1;
            symbols.remove(at + 1);
            ranks.remove(at);
            if at < ranks.len() {
                ranks[at] = self.pairs.get(symbols[at], symbols[at + 1]);
            }
            if at > 0 {
                ranks[at - 1] = self.pairs.get(symbols[at - 1], symbols[at]);
            }
        }
    }

    /// The merges alone, whole words or not: replaces `symbols` by what they make of `bytes`, and
    /// returns the last one as (left, right, rank), if there is any; `None` where a byte or a
    /// character has no symbol.
    pub(super) fn last_merge(
        &self,
        vocab: &Vocab,
        bytes: &[u8],
        symbols: &mut Vec<u32>,
    ) -> Option<Option<(u32, u32, u32)>> {
        symbols.clear();
        if !self.stored.symbols.push(vocab.spelling(), bytes, symbols) {
            return None;
        }
        let mut last = None;
        loop {
            let pairs = symbols.windows(2).enumerate();
            let found = pairs.map(|(at, pair)| (self.pairs.get(pair[0], pair[1]), at));
            let Some(((rank, merged), at)) = found.min_by_key(|&((rank, _), at)| (rank, at)) else {
                return Some(last);
            };
            if rank == NONE {
                return Some(last);
            }
            last = Some((symbols[at], symbols[at + 1], rank));
            symbols[at] = merged;
            symbols.remove(at + 1);
        }
    }

    /// All merges, as (left, right, rank).
    pub(super) fn merges(&self) -> impl Iterator<Item = (u32, u32, u32)> {
        let merges = self.stored.merges.iter();
        // Of a pair that is listed twice the later rank counts.
        let counts = |m: &&Merge| self.pairs.get(m.left, m.right).0 == m.rank;
        merges.filter(counts).map(|m| (m.left, m.right, m.rank))
    }

    /// The token that a word is as a whole, whatever the merges make of it.
    pub(crate) fn whole_word(&self, vocab: &Vocab, word: &[u8]) -> Option<u32> {
        self.stored.words.get(vocab, word)
    }

    /// A heap of candidate merges over a linked list: O(n log n) for long words.
    fn merge_long(&self, symbols: &mut Vec<u32>, buffers: &mut MergeBuffers) {
        let MergeBuffers {
            heap,
            next,
            previous,
            ..
        } = buffers;
        let length = symbols.len();
        let end = length as u32;
        next.clear();
        next.extend(1..=end);
        previous.clear();
        previous.extend((0..end).map(|at| at.wrapping_sub(1)));
        heap.clear();
        for at in 0..length - 1 {
            self.offer(heap, symbols, at as u32, at as u32 + 1);
        }
        while let Some(Reverse((rank, at, left, right))) = heap.pop() {
            let follower = next[at as usize];
            // A candidate is stale once either of its symbols has changed.
            if symbols[at as usize] != left
                || follower >= end
                || symbols[follower as usize] != right
            {
                continue;
            }
            let (found, merged) = self.pairs.get(left, right);
            debug_assert_eq!(found, rank);
            symbols[at as usize] = merged;
            symbols[follower as usize] = NONE;
            let after = next[follower as usize];
            next[at as usize] = after;
            if after < end {
                previous[after as usize] = at;
                self.offer(heap, symbols, at, after);
            }
            let before = previous[at as usize];
            if before != NONE {
                self.offer(heap, symbols, before, at);
            }
        }
        symbols.retain(|&id| id != NONE);
    }

    fn offer(&self, heap: &mut Heap, symbols: &[u32], at: u32, follower: u32) {
        let (left, right) = (symbols[at as usize], symbols[follower as usize]);
        let (rank, _) = self.pairs.get(left, right);
        if rank != NONE {
            heap.push(Reverse((rank, at, left, right)));
        }
    }

    pub(super) fn update_digest(&self, spelling: &Spelling, sha: &mut Sha256) {
        let fields = self
            .stored
            .merges
            .iter()
            .flat_map(|m| [m.left, m.right, m.rank, m.merged]);
        let bytes: Vec<u8> = fields.flat_map(u32::to_le_bytes).collect();
        sha.update((self.stored.merges.len() as u64).to_le_bytes());
        sha.update(&bytes);
        self.stored.symbols.update_digest(spelling, sha);
        if let Words::Tokens { in_model, .. } = &self.stored.words {
            sha.update(b"whole words");
            in_model
                .iter()
                .for_each(|word| sha.update(word.to_le_bytes()));
        }
    }
}

/// Each token with each pair of tokens that it is cut into, the shortest left part first.
///
/// In sorted order all tokens that start as one does lie behind it, so the prefixes of a token that
/// are tokens form a chain, as do the suffixes in the order of reversed bytes. Two chains are merged
/// by length: a token of any length costs no more than it has such parts.
fn merges_of_ranks(vocab: &Vocab) -> Vec<Merge> {
    let mut ids: Vec<u32> = (0..vocab.len() as u32)
        .filter(|&id| vocab.id_of(vocab.token_bytes(id)) == Some(id))
        .collect();
    ids.sort_unstable_by(|&a, &b| vocab.token_bytes(a).cmp(vocab.token_bytes(b)));
    let prefix = nested(vocab, &ids, <[u8]>::starts_with);
    ids.sort_unstable_by(|&a, &b| {
        let reversed = |id| vocab.token_bytes(id).iter().rev();
        reversed(a).cmp(reversed(b))
    });
    let suffix = nested(vocab, &ids, <[u8]>::ends_with);
    ids.sort_unstable();
    let len = |id: u32| vocab.token_bytes(id).len();
    let mut merges = Vec::new();
    let mut prefixes = Vec::new();
    for merged in ids {
        prefixes.clear();
        let mut left = prefix[merged as usize];
        while left != NONE {
            prefixes.push(left);
            left = prefix[left as usize];
        }
        let mut right = suffix[merged as usize];
        for &left in prefixes.iter().rev() {
            let wanted = len(merged) - len(left);
            while right != NONE && len(right) > wanted {
                right = suffix[right as usize];
            }
            if right != NONE && len(right) == wanted {
                merges.push(Merge {
                    left,
                    right,
                    rank: merged,
                    merged,
                });
            }
        }
    }
    merges
}

/// For each id the longest other token that `begins` it, given ids in an order in which those that
/// a token begins follow it; `NONE` where there is none.
fn nested(vocab: &Vocab, ids: &[u32], begins: fn(&[u8], &[u8]) -> bool) -> Vec<u32> {
    let mut longest = vec![NONE; vocab.len()];
    let mut open: Vec<u32> = Vec::new();
    for &id in ids {
        let token = vocab.token_bytes(id);
        while open
            .last()
            .is_some_and(|&outer| !begins(token, vocab.token_bytes(outer)))
        {
            open.pop();
        }
        longest[id as usize] = open.last().copied().unwrap_or(NONE);
        open.push(id);
    }
    longest
}

type Heap = BinaryHeap<Reverse<(u32, u32, u32, u32)>>;

#[derive(Default)]
struct MergeBuffers {
    ranks: Vec<(u32, u32)>,
    heap: Heap,
    next: Vec<u32>,
    previous: Vec<u32>,
}

thread_local! {
    static BUFFERS: RefCell<MergeBuffers> = RefCell::default();
}

impl TryFrom<Stored> for Bpe {
    type Error = Error;

    /// Checks what building guarantees, as stored bytes may have been altered.
    fn try_from(stored: Stored) -> Result<Self> {
        check_byte_table(&stored.symbols.bytes)?;
        Ok(Self::new(stored))
    }
}

impl From<Bpe> for Stored {
    fn from(model: Bpe) -> Self {
        model.stored
    }
}
