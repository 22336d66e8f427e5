//! Which tokens after a difference may agree, as bit sets in fixed memory.

use super::token_window::{Frame, FrameSide, Head, TokenWindow, WIDTH};
use crate::align::side::TokenId;

/// Ones in the first `count` places, 64 at most.
#[inline(always)]
pub(super) fn bits_below(count: usize) -> u64 {
    if count < 64 {
        (1 << count) - 1
    } else {
        u64::MAX
    }
}

/// FrameSide columns may agree with a token: by its first two bytes, all at once.
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
    pub(super) fn clear(&mut self, window: &TokenWindow) {
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
        window: &mut TokenWindow,
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
            if frame.may_have_dummy(FrameSide::Second, self.entered) {
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
        let Some(head) = head.filter(|_| !frame.may_have_dummy(FrameSide::First, row)) else {
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

const _: () = assert!(WIDTH + 1 == u64::BITS as usize);
