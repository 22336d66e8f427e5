//! The tokens just after a difference, and the states of a search among them, in fixed memory.

use crate::align::output::Boundary;
use crate::align::side::{Side, TokenId};
use crate::align::walk::Walk;

/// Tokens of either side that a search may skip.
pub(super) const WIDTH: usize = 64;

/// Skipped bytes at which a search gives up.
pub(super) const MAX_COST: usize = 256;

/// The first bytes and the length of one token.
#[derive(Clone, Copy, Default)]
pub(super) struct Head {
    bytes: u64,
    /// Ones on the bytes that belong to the token.
    mask: u64,
    pub(super) len: u32,
}

impl Head {
    fn new(rest: &[u8], len: usize) -> Self {
        let bytes = match rest.first_chunk::<8>() {
            Some(bytes) => u64::from_le_bytes(*bytes),
            None => rest
                .iter()
                .rev()
                .fold(0, |bytes, &byte| bytes << 8 | u64::from(byte)),
        };
        let mask = if len >= 8 {
            u64::MAX
        } else {
            (1 << (8 * len)) - 1
        };
        Self {
            bytes,
            mask,
            len: len as u32,
        }
    }

    /// Whether the first bytes rule out that two texts that begin with these tokens agree.
    #[inline(always)]
    pub(super) fn differs(&self, other: &Head) -> bool {
        (self.bytes ^ other.bytes) & self.mask & other.mask != 0
    }
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
            *slot = Head::new(&side.blob[start..], end - start);
            self.read += 1;
        }
        self.heads.get(offset).copied()
    }

    /// The first tokens; `None` where one has no text or is not there.
    #[inline]
    pub(super) fn first<I: TokenId, const N: usize>(
        &mut self,
        side: &Side<'_, I>,
        from: usize,
    ) -> Option<[Head; N]> {
        self.get(side, from, N - 1)?;
        let first = *self.heads.first_chunk::<N>()?;
        first.iter().all(|head| head.len > 0).then_some(first)
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

/// The tokens of both sides.
#[derive(Default)]
pub(super) struct Window {
    pub(super) student: Heads,
    pub(super) teacher: Heads,
}

impl Window {
    pub(super) fn clear(&mut self) {
        self.student.read = 0;
        self.teacher.read = 0;
    }

    /// Whether no text can agree from the place `(i, j)` after the difference on.
    #[inline]
    pub(super) fn rules_out<S: TokenId, T: TokenId>(
        &mut self,
        walk: &Walk<'_, S, T>,
        from: Boundary,
        (i, j): (usize, usize),
    ) -> bool {
        let (Some(left), Some(right)) = (
            self.student.get(&walk.student, from.0, i),
            self.teacher.get(&walk.teacher, from.1, j),
        ) else {
            return false;
        };
        let may_have_dummy = walk.has_dummy
            && (walk.student.starts_segment(from.0 + i) || walk.teacher.starts_segment(from.1 + j));
        left.differs(&right) && !may_have_dummy
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

    /// The cheapest state; `next_of` knows what [`Queue::push`] gave for each.
    #[inline]
    pub(super) fn pop(&mut self, next_of: impl Fn(u16) -> u16) -> Option<u16> {
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
        Some(state)
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
