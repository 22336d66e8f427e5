//! The tokens just after a difference, read as far as a search asks for them.

use crate::align::output::Boundary;
use crate::align::side::{Side, TokenId};
use crate::align::walk::Walk;

/// Tokens of either side that a search may skip: with the place after the last one, a row of bits.
pub(super) const WIDTH: usize = 63;

/// A place after the difference: tokens skipped on the frame's first and on its second side.
pub(super) type Place = (usize, usize);

/// A difference as a search sees it: ties go one way or the other by which side is the first, so
/// that is decided by the texts, and exchanging student and teacher changes no answer.
pub(super) struct Frame<'f, 'a, S, T> {
    pub(super) walk: &'f Walk<'a, S, T>,
    pub(super) from: Boundary,
    /// Whether the teacher is the first side.
    pub(super) swapped: bool,
}

/// A side of a frame.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum FrameSide {
    First,
    Second,
}

impl<S: TokenId, T: TokenId> Frame<'_, '_, S, T> {
    /// The boundary at a place.
    #[inline(always)]
    pub(super) fn boundary(&self, (first, second): Place) -> Boundary {
        let (i, j) = self.oriented((first, second));
        (self.from.0 + i, self.from.1 + j)
    }

    /// The place of a boundary that is not before the difference.
    #[inline(always)]
    pub(super) fn place(&self, (i, j): Boundary) -> Place {
        self.oriented((i - self.from.0, j - self.from.1))
    }

    /// Exchanges a pair where the teacher is the first side.
    #[inline(always)]
    pub(super) fn oriented<X>(&self, (one, other): (X, X)) -> (X, X) {
        if self.swapped {
            (other, one)
        } else {
            (one, other)
        }
    }

    /// The token `offset` after the difference on one side.
    #[inline(always)]
    fn head(&self, side: FrameSide, offset: usize) -> Option<Head> {
        if (side == FrameSide::First) != self.swapped {
            Head::read(&self.walk.student, self.from.0 + offset)
        } else {
            Head::read(&self.walk.teacher, self.from.1 + offset)
        }
    }

    /// Whether a tokenizer may have put a space of its own at a place, which lets texts agree whose
    /// bytes do not.
    #[inline(always)]
    pub(super) fn may_have_dummy(&self, side: FrameSide, offset: usize) -> bool {
        self.walk.has_dummy
            && if (side == FrameSide::First) != self.swapped {
                self.walk.student.starts_segment(self.from.0 + offset)
            } else {
                self.walk.teacher.starts_segment(self.from.1 + offset)
            }
    }
}

/// The first bytes and the length of one token.
#[derive(Clone, Copy, Default)]
pub(super) struct Head {
    bytes: u64,
    /// Ones on the bytes that belong to the token.
    mask: u64,
    pub(super) len: u32,
}

impl Head {
    /// `None` at the end of the side and for an id outside the vocabulary.
    #[inline]
    fn read<I: TokenId>(side: &Side<'_, I>, at: usize) -> Option<Self> {
        if at >= side.ids.len() {
            return None;
        }
        let (start, end) = side.span(at)?;
        Some(Self::new(&side.blob[start..], end - start))
    }

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

    /// The first byte of a token that has one.
    #[inline(always)]
    pub(super) fn first_byte(&self) -> Option<u8> {
        (self.len > 0).then_some(self.bytes as u8)
    }

    /// The second byte of a token that has one.
    #[inline(always)]
    pub(super) fn second_byte(&self) -> Option<u8> {
        (self.len > 1).then_some((self.bytes >> 8) as u8)
    }

    /// What skipping the token costs: its bytes, and something in any case.
    #[inline(always)]
    fn cost(&self) -> u32 {
        self.len.max(1)
    }
}

/// The tokens of one side from the difference on.
pub(super) struct Heads {
    side: FrameSide,
    heads: [Head; WIDTH],
    /// What skipping the first so many tokens costs.
    costs: [u32; WIDTH + 1],
    read: usize,
    /// No token follows those that were read.
    ended: bool,
}

impl Heads {
    pub(super) fn new(side: FrameSide) -> Self {
        Self {
            side,
            heads: [Head::default(); WIDTH],
            costs: [0; WIDTH + 1],
            read: 0,
            ended: false,
        }
    }

    pub(super) fn clear(&mut self) {
        self.read = 0;
        self.ended = false;
    }

    /// Number of tokens read so far.
    #[inline(always)]
    pub(super) fn read(&self) -> usize {
        self.read
    }

    /// How many tokens there are, if that is known and in a range.
    #[inline(always)]
    pub(super) fn end_in(&self, range: std::ops::Range<usize>) -> Option<usize> {
        (self.ended && range.contains(&self.read)).then_some(self.read)
    }

    /// Reads on until `count` tokens are known, or all.
    #[inline]
    pub(super) fn read_to<S: TokenId, T: TokenId>(
        &mut self,
        frame: &Frame<'_, '_, S, T>,
        count: usize,
    ) {
        while self.read < count.min(WIDTH) && !self.ended {
            let Some(head) = frame.head(self.side, self.read) else {
                self.ended = true;
                return;
            };
            self.heads[self.read] = head;
            self.costs[self.read + 1] = self.costs[self.read].saturating_add(head.cost());
            self.read += 1;
        }
    }

    /// The token at `offset`, where it was read.
    #[inline(always)]
    pub(super) fn get(&self, offset: usize) -> Option<&Head> {
        self.heads[..self.read].get(offset)
    }

    /// What skipping the first `count` tokens costs; they have to be read.
    #[inline(always)]
    pub(super) fn cost(&self, count: usize) -> usize {
        self.costs[count] as usize
    }

    /// The first tokens; `None` where one has no text or is not there.
    #[inline]
    pub(super) fn first<S: TokenId, T: TokenId, const N: usize>(
        &mut self,
        frame: &Frame<'_, '_, S, T>,
    ) -> Option<&[Head; N]> {
        self.read_to(frame, N);
        let first = self.heads[..self.read].first_chunk::<N>()?;
        first.iter().all(|head| head.len > 0).then_some(first)
    }
}

/// The tokens of both sides.
pub(super) struct TokenWindow {
    pub(super) first: Heads,
    pub(super) second: Heads,
}

impl Default for TokenWindow {
    fn default() -> Self {
        Self {
            first: Heads::new(FrameSide::First),
            second: Heads::new(FrameSide::Second),
        }
    }
}

impl TokenWindow {
    pub(super) fn clear(&mut self) {
        self.first.clear();
        self.second.clear();
    }

    /// Whether no text can agree from a place on.
    #[inline]
    pub(super) fn rules_out<S: TokenId, T: TokenId>(
        &self,
        frame: &Frame<'_, '_, S, T>,
        (row, column): Place,
    ) -> bool {
        let (Some(left), Some(right)) = (self.first.get(row), self.second.get(column)) else {
            return false;
        };
        left.differs(right)
            && !frame.may_have_dummy(FrameSide::First, row)
            && !frame.may_have_dummy(FrameSide::Second, column)
    }
}
