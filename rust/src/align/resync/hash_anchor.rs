//! Long differences: finds text that both sides share by hashing what follows each boundary.
//!
//! Stretches double until one holds a common anchor, so the work is in proportion to what is
//! skipped.

use hashbrown::HashTable;

use crate::align::output::Boundary;
use crate::align::side::{Side, TokenId};
use crate::align::walk::Walk;

use super::token_window::Frame;

/// Bytes that must agree.
const ANCHOR_BYTES: usize = 32;

/// The length of the first stretches, in bytes.
const FIRST_BYTES: usize = 2048;

/// Boundaries of the second side's stretch by the bytes that follow, with the stretches themselves.
#[derive(Default)]
pub(super) struct Table {
    by_hash: HashTable<Entry>,
    first: Stretch,
    second: Stretch,
}

#[derive(Clone, Copy)]
struct Entry {
    hash: u64,
    /// Index into the second stretch's boundaries.
    boundary: u32,
}

/// The text after a boundary, and the boundaries in it.
#[derive(Default)]
struct Stretch {
    text: Vec<u8>,
    /// Byte and token index of each boundary whose anchor lies in the text.
    boundaries: Vec<(usize, usize)>,
}

impl Stretch {
    /// Reads tokens from `from` on; `false` where the side ends before the stretch is full.
    fn fill<I: TokenId>(&mut self, side: &Side<'_, I>, from: usize, bytes: usize) -> bool {
        self.text.clear();
        self.boundaries.clear();
        for at in from..side.ids.len() {
            if self.text.len() >= bytes {
                break;
            }
            let Some((start, end)) = side.span(at) else {
                break;
            };
            if start < end {
                self.boundaries.push((self.text.len(), at));
                self.text.extend_from_slice(&side.blob[start..end]);
            }
        }
        let last = self.text.len().saturating_sub(ANCHOR_BYTES - 1);
        self.boundaries
            .truncate(self.boundaries.partition_point(|&(byte, _)| byte < last));
        self.text.len() >= bytes
    }

    fn anchor(&self, boundary: usize) -> Option<&[u8; ANCHOR_BYTES]> {
        self.text[self.boundaries[boundary].0..].first_chunk()
    }
}

fn hash(bytes: &[u8; ANCHOR_BYTES]) -> u64 {
    let (words, _) = bytes.as_chunks::<8>();
    words.iter().fold(0, |hash: u64, word| {
        (hash.rotate_left(23) ^ u64::from_le_bytes(*word)).wrapping_mul(0x9E37_79B9_7F4A_7C15)
    })
}

/// The nearest pair of boundaries with the same text after them.
pub(super) fn find<S: TokenId, T: TokenId>(
    frame: &Frame<'_, '_, S, T>,
    table: &mut Table,
) -> Option<Boundary> {
    let (walk, from) = (frame.walk, frame.from);
    let mut bytes = FIRST_BYTES;
    loop {
        let (student, teacher) = frame.oriented((&mut table.first, &mut table.second));
        let more_student = student.fill(&walk.student, from.0, bytes);
        let more_teacher = teacher.fill(&walk.teacher, from.1, bytes);
        let found = table
            .nearest(frame.oriented(from))
            .map(|at| frame.oriented(at));
        if found.is_some() || !more_student && !more_teacher {
            return found;
        }
        bytes *= 2;
    }
}

impl Table {
    /// The pair of token indices, the first side's first, with a common anchor and the fewest bytes
    /// before it on both sides.
    fn nearest(&mut self, from: (usize, usize)) -> Option<(usize, usize)> {
        self.by_hash.clear();
        for at in 0..self.second.boundaries.len() {
            let Some(anchor) = self.second.anchor(at) else {
                break;
            };
            let hash = hash(anchor);
            // The first of several is the nearest.
            if self
                .by_hash
                .find(hash, |entry| entry.hash == hash)
                .is_none()
            {
                let entry = Entry {
                    hash,
                    boundary: at as u32,
                };
                self.by_hash.insert_unique(hash, entry, |entry| entry.hash);
            }
        }
        let mut best = None;
        let mut fewest = usize::MAX;
        for (at, &(byte, i)) in self.first.boundaries.iter().enumerate() {
            if byte >= fewest {
                break;
            }
            let Some(anchor) = self.first.anchor(at) else {
                break;
            };
            let hash = hash(anchor);
            let Some(entry) = self.by_hash.find(hash, |entry| entry.hash == hash) else {
                continue;
            };
            let (second_byte, j) = self.second.boundaries[entry.boundary as usize];
            let same_text = self.second.anchor(entry.boundary as usize) == Some(anchor);
            // A jump must lead on, or the search would come back to the same difference.
            if same_text && (i, j) != from && byte + second_byte < fewest {
                fewest = byte + second_byte;
                best = Some((i, j));
            }
        }
        best
    }
}

/// The first pair of boundaries in the common end of both texts, and the bytes after it. It is
/// looked for in the last bytes only, being too short for an anchor; the ends themselves where
/// there is none.
pub(super) fn common_end<S: TokenId, T: TokenId>(
    walk: &Walk<'_, S, T>,
    from: Boundary,
) -> (Boundary, usize) {
    let (student, teacher) = (&walk.student, &walk.teacher);
    let (mut i, mut j) = (student.ids.len(), teacher.ids.len());
    let ends = (i, j);
    let mut found = (ends, 0);
    let (mut left, mut right): (&[u8], &[u8]) = (&[], &[]);
    let mut agreed = 0;
    while agreed < 2 * ANCHOR_BYTES {
        if left.is_empty() && right.is_empty() {
            found = ((i, j), agreed);
        }
        while left.is_empty() && i > from.0 {
            i -= 1;
            left = student
                .span(i)
                .map_or(&[], |(start, end)| &student.blob[start..end]);
        }
        while right.is_empty() && j > from.1 {
            j -= 1;
            right = teacher
                .span(j)
                .map_or(&[], |(start, end)| &teacher.blob[start..end]);
        }
        let len = left.len().min(right.len());
        let (left_rest, left_end) = left.split_at(left.len() - len);
        let (right_rest, right_end) = right.split_at(right.len() - len);
        if len == 0 || left_end != right_end {
            break;
        }
        agreed += len;
        (left, right) = (left_rest, right_rest);
    }
    // A jump must lead on, whatever a dummy prefix made of equal bytes.
    if found.0 == from { (ends, 0) } else { found }
}
