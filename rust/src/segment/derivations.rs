//! How byte pair encoding makes each token, and what merges across a joint of two of them.
//!
//! Two tokens that each come out of their own bytes stay apart when joined unless a merge crosses
//! the joint: of the last part of the left one and the first part of the right one, as they stand
//! at some time. Merges happen in the order of their ranks, so the time at which a part stands is
//! known from the two derivations alone. (The pairwise test of rust-gems' `bpe`, for merge lists as
//! well as rank files.)

use super::bpe::Bpe;
use crate::segment::NONE;
use crate::vocab::Vocab;

/// The symbol of a single byte or character stands from the start.
const START: u32 = 0;

/// A token as a part of a larger one: the token, and when it is merged into the next part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Part {
    pub token: u32,
    /// [`NONE`] for the whole token.
    pub until: u32,
}

/// The derivation of each token of a vocabulary.
#[derive(Debug)]
pub(crate) struct Derivations {
    /// By token: when it stands, [`START`] or one more than the rank of its merge; [`NONE`] where
    /// its own bytes are not merged into it, or not in the order of ranks.
    time: Vec<u32>,
    /// By token: its two parts, [`NONE`] for a symbol.
    parts: Vec<(u32, u32)>,
    /// Offsets into `merges`, one more than there are tokens.
    by_left: Vec<u32>,
    /// The right part and the time of all merges, by left part and rising time.
    merges: Vec<(u32, u32)>,
}

impl Derivations {
    pub fn new(model: &Bpe, vocab: &Vocab) -> Self {
        let size = vocab.len();
        let mut made = Self {
            time: vec![NONE; size],
            parts: vec![(NONE, NONE); size],
            by_left: vec![0; size + 1],
            merges: Vec::new(),
        };
        let mut ids: Vec<u32> = (0..size as u32).collect();
        ids.sort_by_key(|&id| vocab.token_bytes(id).len());
        let mut symbols = Vec::new();
        for id in ids {
            let bytes = vocab.token_bytes(id);
            let Some(last) = model.last_merge(vocab, bytes, &mut symbols) else {
                continue;
            };
            if symbols != [id] {
                continue;
            }
            let Some((left, right, rank)) = last else {
                made.time[id as usize] = START;
                continue;
            };
            // Shorter tokens are done.
            let (first, second) = (made.time[left as usize], made.time[right as usize]);
            if first.max(second) <= rank {
                made.time[id as usize] = rank + 1;
                made.parts[id as usize] = (left, right);
            }
        }
        let mut merges: Vec<(u32, u32, u32)> = model.merges().collect();
        merges.retain(|&(left, right, _)| {
            made.time[left as usize] != NONE && made.time[right as usize] != NONE
        });
        merges.sort_unstable_by_key(|&(left, _, rank)| (left, rank));
        for &(left, ..) in &merges {
            made.by_left[left as usize + 1] += 1;
        }
        for at in 0..size {
            made.by_left[at + 1] += made.by_left[at];
        }
        made.merges = merges
            .iter()
            .map(|&(_, right, rank)| (right, rank + 1))
            .collect();
        made
    }

    /// Whether byte pair encoding makes this token of its own bytes, in the order of ranks.
    pub fn is_regular(&self, token: u32) -> bool {
        self.time[token as usize] != NONE
    }

    /// A regular token and what it begins with, the largest first, each with the time at which it
    /// is merged into the one before.
    pub fn left_parts(&self, token: u32) -> impl Iterator<Item = Part> {
        self.spine(token, |parts| parts.0)
    }

    fn spine(&self, token: u32, side: fn((u32, u32)) -> u32) -> impl Iterator<Item = Part> {
        let whole = Part { token, until: NONE };
        std::iter::successors(Some(whole), move |part| {
            let smaller = side(self.parts[part.token as usize]);
            (smaller != NONE).then(|| Part {
                token: smaller,
                until: self.time[part.token as usize],
            })
        })
    }

    /// Visits the tokens that merge with the end of a regular `last` when they stand right of it,
    /// with the time of that merge. A token behind `last` is merged with it exactly if one of its
    /// left parts is visited and stands at that time: is merged into the next part then or later.
    pub fn for_each_partner(&self, last: u32, mut visit: impl FnMut(u32, u32)) {
        for part in self.spine(last, |parts| parts.1) {
            let stands = self.time[part.token as usize];
            let range = self.by_left[part.token as usize] as usize
                ..self.by_left[part.token as usize + 1] as usize;
            for &(right, time) in &self.merges[range] {
                // At one time the leftmost merge is the first.
                if time >= part.until {
                    break;
                }
                let time = time.max(stands).max(self.time[right as usize]);
                if time < part.until {
                    visit(right, time);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::segment::Model;
    use crate::vocab::{DummyPrefix, Spelling, VocabBuilder};

    fn merged(made: &Derivations, last: u32, next: u32) -> bool {
        let mut found = false;
        made.for_each_partner(last, |token, time| {
            found |= made
                .left_parts(next)
                .any(|part| part.token == token && time <= part.until);
        });
        found
    }

    fn random(state: &mut u64, below: usize) -> usize {
        *state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (*state >> 33) as usize % below
    }

    /// Tokens over few letters, so that merges meet often and of equal rank.
    fn vocab(seed: u64) -> Vocab {
        let mut state = seed;
        let mut tokens: Vec<Vec<u8>> = [b"a", b"b", b"c"][..2 + seed as usize % 2]
            .iter()
            .map(|symbol| symbol.to_vec())
            .collect();
        let size = 6 + random(&mut state, 16);
        while tokens.len() < size {
            let left = tokens[random(&mut state, tokens.len())].clone();
            let right = &tokens[random(&mut state, tokens.len())];
            let new = [&left[..], right].concat();
            if new.len() <= 9 && !tokens.contains(&new) {
                tokens.push(new);
            }
        }
        let mut builder = VocabBuilder::new(Spelling::Bytes, DummyPrefix::Never);
        for token in &tokens {
            builder.push_text(token).unwrap();
        }
        builder.build()
    }

    #[test]
    fn tokens_stay_apart_exactly_where_segmenting_their_bytes_says_so() {
        let (mut apart, mut joined) = (0, 0);
        for seed in 0..300 {
            let vocab = vocab(seed);
            let Model::Bpe(model) = Model::from_ranks(&vocab) else {
                unreachable!();
            };
            let made = Derivations::new(&model, &vocab);
            let mut pieces = Vec::new();
            for last in (0..vocab.len() as u32).filter(|&t| made.is_regular(t)) {
                for next in (0..vocab.len() as u32).filter(|&t| made.is_regular(t)) {
                    let text = [vocab.token_bytes(last), vocab.token_bytes(next)].concat();
                    model.last_merge(&vocab, &text, &mut pieces).unwrap();
                    let expected = pieces[0] != last;
                    assert_eq!(
                        merged(&made, last, next),
                        expected,
                        "seed {seed}: {:?} of {last} {next}",
                        String::from_utf8_lossy(&text)
                    );
                    *(if expected { &mut joined } else { &mut apart }) += 1;
                }
            }
        }
        assert!(apart > 10_000 && joined > 10_000, "{apart} {joined}");
    }
}
