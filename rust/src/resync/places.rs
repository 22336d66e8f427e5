//! Sets of places after a difference, as rows of bits in fixed memory.

use super::window::{Frame, Head, WIDTH, Which, Window};
use crate::align::side::TokenId;

/// Skipped bytes at which a search gives up.
pub(super) const MAX_COST: usize = 256;

/// Ones in the first `count` places, 64 at most.
#[inline(always)]
pub(super) fn bits_below(count: usize) -> u64 {
    if count < 64 {
        (1 << count) - 1
    } else {
        u64::MAX
    }
}

/// Which columns may agree with a token: by its first two bytes, all at once.
pub(super) struct Columns {
    by_first: [u64; 256],
    by_second: [u64; 256],
    /// Columns whose token has no first byte, or may agree in spite of it.
    any_first: u64,
    any_second: u64,
    /// Columns entered so far.
    entered: usize,
}

impl Default for Columns {
    fn default() -> Self {
        Self {
            by_first: [0; 256],
            by_second: [0; 256],
            any_first: 0,
            any_second: 0,
            entered: 0,
        }
    }
}

impl Columns {
    /// Empties the set, which holds the columns of `window`.
    pub(super) fn clear(&mut self, window: &Window) {
        for head in (0..self.entered).filter_map(|column| window.second.get(column)) {
            if let Some(byte) = head.first_byte() {
                self.by_first[usize::from(byte)] = 0;
            }
            if let Some(byte) = head.second_byte() {
                self.by_second[usize::from(byte)] = 0;
            }
        }
        (self.any_first, self.any_second, self.entered) = (0, 0, 0);
    }

    /// Reads and enters the first `count` columns, as far as there are any.
    #[inline]
    pub(super) fn reach<S: TokenId, T: TokenId>(
        &mut self,
        frame: &Frame<'_, '_, S, T>,
        window: &mut Window,
        count: usize,
    ) {
        window.second.read_to(frame, count);
        while let Some(head) = window.second.get(self.entered) {
            let bit = 1 << self.entered;
            match head.first_byte() {
                Some(byte) => self.by_first[usize::from(byte)] |= bit,
                None => self.any_first |= bit,
            }
            match head.second_byte() {
                Some(byte) => self.by_second[usize::from(byte)] |= bit,
                None => self.any_second |= bit,
            }
            if frame.may_have_dummy(Which::Second, self.entered) {
                self.any_first |= bit;
                self.any_second |= bit;
            }
            self.entered += 1;
        }
    }

    /// The columns whose text may agree with that of a row.
    #[inline(always)]
    pub(super) fn like<S: TokenId, T: TokenId>(
        &self,
        frame: &Frame<'_, '_, S, T>,
        row: usize,
        head: Option<&Head>,
    ) -> u64 {
        let Some(head) = head.filter(|_| !frame.may_have_dummy(Which::First, row)) else {
            return u64::MAX;
        };
        let Some(first) = head.first_byte() else {
            return u64::MAX;
        };
        let first = self.by_first[usize::from(first)] | self.any_first;
        match head.second_byte() {
            Some(second) => first & (self.by_second[usize::from(second)] | self.any_second),
            None => first,
        }
    }
}

/// Entries by their key: pops the smallest, of equals the latest.
pub(super) struct Queue {
    first: [u16; MAX_COST],
    occupied: [u64; MAX_COST / 64],
}

/// No entry.
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

    /// Adds an entry and gives the one that follows it among those of the same key.
    #[inline]
    pub(super) fn push(&mut self, key: usize, entry: u16) -> u16 {
        let (word, bit) = (key / 64, 1 << (key % 64));
        let next = if self.occupied[word] & bit == 0 {
            NONE
        } else {
            self.first[key]
        };
        self.occupied[word] |= bit;
        self.first[key] = entry;
        next
    }

    /// The entry with the smallest key; `next_of` knows what [`Queue::push`] gave for each.
    #[inline]
    pub(super) fn pop(&mut self, next_of: impl Fn(u16) -> u16) -> Option<u16> {
        let word = self.occupied.iter().position(|&word| word != 0)?;
        let bit = self.occupied[word].trailing_zeros() as usize;
        let key = word * 64 + bit;
        let entry = self.first[key];
        let next = next_of(entry);
        if next == NONE {
            self.occupied[word] &= !(1 << bit);
        } else {
            self.first[key] = next;
        }
        Some(entry)
    }
}

/// Places that were tried.
pub(super) struct Tried {
    rows: [u64; WIDTH + 1],
}

impl Default for Tried {
    fn default() -> Self {
        Self {
            rows: [0; WIDTH + 1],
        }
    }
}

impl Tried {
    pub(super) fn clear(&mut self) {
        self.rows = [0; WIDTH + 1];
    }

    /// The columns that were tried in a row.
    #[inline(always)]
    pub(super) fn row(&self, row: usize) -> u64 {
        self.rows[row]
    }

    /// Marks a place within the window; `false` where it was marked before.
    #[inline]
    pub(super) fn insert(&mut self, (row, column): (usize, usize)) -> bool {
        let before = self.rows[row];
        self.rows[row] |= 1 << column;
        self.rows[row] != before
    }
}

const _: () = assert!(WIDTH + 1 == u64::BITS as usize && MAX_COST.is_multiple_of(64));
