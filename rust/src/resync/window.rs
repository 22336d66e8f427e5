//! The tokens just after a difference, and the states of a search among them, in fixed memory.

use crate::align::side::{Side, TokenId};

/// Tokens of either side that a search may skip.
pub(super) const WIDTH: usize = 64;

/// Skipped bytes at which a search gives up.
pub(super) const MAX_COST: usize = 256;

/// The first bytes and the length of one token.
#[derive(Clone, Copy, Default)]
struct Head {
    bytes: u64,
    len: u32,
}

/// The tokens of one side from the difference on, read as far as they were asked for.
pub(super) struct Heads {
    heads: [Head; WIDTH],
    read: usize,
}

impl Default for Heads {
    fn default() -> Self {
        Self {
            heads: [Head::default(); WIDTH],
            read: 0,
        }
    }
}

impl Heads {
    pub(super) fn clear(&mut self) {
        self.read = 0;
    }

    /// Reads on to the token `offset` after `from`; `None` at the end of the side and of the window
    /// and for an id outside the vocabulary.
    #[inline]
    fn get<I: TokenId>(&mut self, side: &Side<'_, I>, from: usize, offset: usize) -> Option<Head> {
        while self.read <= offset {
            let slot = self.heads.get_mut(self.read)?;
            let at = from + self.read;
            if at >= side.ids.len() {
                return None;
            }
            let (start, end) = side.span(at)?;
            *slot = Head {
                bytes: first_bytes(&side.blob[start..], end - start),
                len: (end - start) as u32,
            };
            self.read += 1;
        }
        self.heads.get(offset).copied()
    }

    /// What skipping the token `offset` after `from` costs: its bytes, and something in any case.
    #[inline]
    pub(super) fn cost<I: TokenId>(
        &mut self,
        side: &Side<'_, I>,
        from: usize,
        offset: usize,
    ) -> Option<usize> {
        self.get(side, from, offset)
            .map(|head| (head.len as usize).max(1))
    }
}

/// Whether the first bytes of two tokens rule out that text agrees from there on.
#[inline]
pub(super) fn differ<S: TokenId, T: TokenId>(
    (student, student_from, i): (&mut Heads, (&Side<'_, S>, usize), usize),
    (teacher, teacher_from, j): (&mut Heads, (&Side<'_, T>, usize), usize),
) -> bool {
    let (Some(left), Some(right)) = (
        student.get(student_from.0, student_from.1, i),
        teacher.get(teacher_from.0, teacher_from.1, j),
    ) else {
        return false;
    };
    let len = left.len.min(right.len).min(8);
    len > 0 && (left.bytes ^ right.bytes) << (64 - 8 * len) != 0
}

#[inline]
fn first_bytes(rest: &[u8], len: usize) -> u64 {
    match rest.first_chunk::<8>() {
        Some(bytes) => u64::from_le_bytes(*bytes),
        None => rest
            .iter()
            .take(len)
            .rev()
            .fold(0, |bytes, &byte| bytes << 8 | u64::from(byte)),
    }
}

/// States by cost: pops the cheapest, of equals the latest.
pub(super) struct Queue {
    first: [u16; MAX_COST],
    occupied: [u64; MAX_COST / 64],
}

/// No state.
pub(super) const NONE: u16 = u16::MAX;

impl Default for Queue {
    fn default() -> Self {
        Self {
            first: [NONE; MAX_COST],
            occupied: [0; MAX_COST / 64],
        }
    }
}

impl Queue {
    pub(super) fn clear(&mut self) {
        self.occupied = [0; MAX_COST / 64];
    }

    /// Adds a state and gives the one that follows it among those of the same cost.
    #[inline]
    pub(super) fn push(&mut self, cost: usize, state: u16) -> u16 {
        let (word, bit) = (cost / 64, 1 << (cost % 64));
        let next = if self.occupied[word] & bit == 0 {
            NONE
        } else {
            self.first[cost]
        };
        self.occupied[word] |= bit;
        self.first[cost] = state;
        next
    }

    /// The cheapest state and its cost; `next_of` knows what [`Queue::push`] gave for each.
    #[inline]
    pub(super) fn pop(&mut self, next_of: impl Fn(u16) -> u16) -> Option<(usize, u16)> {
        let word = self.occupied.iter().position(|&word| word != 0)?;
        let bit = self.occupied[word].trailing_zeros() as usize;
        let cost = word * 64 + bit;
        let state = self.first[cost];
        let next = next_of(state);
        if next == NONE {
            self.occupied[word] &= !(1 << bit);
        } else {
            self.first[cost] = next;
        }
        Some((cost, state))
    }
}

/// Places that were taken up.
pub(super) struct Seen {
    rows: [u64; WIDTH],
}

impl Default for Seen {
    fn default() -> Self {
        Self { rows: [0; WIDTH] }
    }
}

impl Seen {
    pub(super) fn clear(&mut self) {
        self.rows = [0; WIDTH];
    }

    /// Marks a place; `false` where it was marked before. Places outside the window are never marked.
    #[inline]
    pub(super) fn insert(&mut self, i: usize, j: usize) -> bool {
        let Some(row) = self.rows.get_mut(i).filter(|_| j < WIDTH) else {
            return true;
        };
        let before = *row;
        *row |= 1 << j;
        *row != before
    }
}

const _: () = assert!(WIDTH == u64::BITS as usize && MAX_COST.is_multiple_of(64));
