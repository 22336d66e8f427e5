//! The equal-byte walk: from one common boundary to the next for as long as the bytes agree.
//!
//! A boundary `(i, j)` stands before student token `i` and teacher token `j`. From each, the side
//! that is behind reads its next token until both have read the same number of bytes:
//!
//! ```text
//! student   | un | known | ! |        from (0, 0): un against unk, 2 bytes agree
//! teacher   | unk | nown | ! |                     known against k: 1 byte; the teacher is used up
//!                                                  nown against nown: both end, a chunk of 2:2
//!                                     from (2, 2): ! against !, a chunk of 1:1
//! ```
//!
//! Most chunks are 1:1. For these, `same` holds the teacher id with the student token's bytes: one
//! read both finds the chunk and proves its bytes equal, without touching the text.

use std::cmp::Ordering;

use super::output::{Boundary, ChunkKind, Sink};
use super::side::{Side, TokenId, bytes_agree, dummy_prefix};

/// Entries of the direct map hold a teacher id in these bits and the token's length above them.
pub(crate) const ID_BITS: u32 = 24;
pub(crate) const ID_MASK: u32 = (1 << ID_BITS) - 1;

/// Special tokens pair up across at most this many tokens without text.
const PAIR_WINDOW: usize = 16;

/// Why a walk ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stop {
    /// Both sides are used up.
    End,
    /// The sink asked to stop.
    Enough,
    /// One side is used up. The tokens between the last boundary and `reached` agree with the other
    /// side as far as they go.
    OneEnds { at: Boundary, reached: Boundary },
    /// The bytes after the boundary `at` differ; `agreed` of them do not. `reached` are the tokens
    /// in which the difference lies, and `bytes` are places in the blobs from which on they differ.
    Differ {
        at: Boundary,
        reached: Boundary,
        agreed: usize,
        bytes: (usize, usize),
    },
    /// An id lies outside its vocabulary.
    BadId,
}

/// Both sides and what is known about the pair of vocabularies.
pub(crate) struct Walk<'a, S, T> {
    pub(crate) student: Side<'a, S>,
    pub(crate) teacher: Side<'a, T>,
    /// For each student id, the teacher id with the same bytes and their number.
    pub(crate) same: &'a [u32],
    /// Pairs of special ids that correspond, as `student << 32 | teacher`.
    pub(crate) pairs: &'a rustc_hash::FxHashSet<u64>,
    pub(crate) has_dummy: bool,
}

impl<S: TokenId, T: TokenId> Walk<'_, S, T> {
    /// Walks from `from` on and tells `sink` each chunk.
    #[inline(always)]
    pub(crate) fn advance<K: Sink>(&self, from: Boundary, sink: &mut K) -> Stop {
        let (mut i, mut j) = from;
        let mut walked = 0;
        let mut first = true;
        loop {
            match self.step((i, j), first, walked, sink) {
                Ok((end, bytes)) => {
                    (i, j) = end;
                    walked += bytes;
                }
                Err(stop) => return stop,
            }
            first = false;
            if sink.enough(walked) {
                return Stop::Enough;
            }
            if self.starts_after_text((i, j)) {
                continue;
            }
            // Chunks of one token on either side: the map both finds and verifies them.
            let (start, mut bytes) = (i, 0);
            for (student_id, teacher_id) in self.student.ids[i..].iter().zip(&self.teacher.ids[j..])
            {
                let Some(&entry) = self.same.get(student_id.index()) else {
                    break;
                };
                let len = (entry >> ID_BITS) as usize;
                let same = (entry & ID_MASK) as usize == teacher_id.index() && len > 0;
                if !same || sink.enough(walked + bytes) {
                    break;
                }
                bytes += len;
                i += 1;
            }
            let count = i - start;
            if count > 0 {
                sink.one_to_one((start, j), count, bytes);
                j += count;
                walked += bytes;
                if sink.enough(walked) {
                    return Stop::Enough;
                }
            }
        }
    }

    /// Whether one of the sides may have a dummy prefix at `at` though text precedes it.
    #[inline(always)]
    fn starts_after_text(&self, (i, j): Boundary) -> bool {
        self.has_dummy
            && (self.student.has_dummy_after_text()
                && i < self.student.ids.len()
                && self.student.starts_segment(i)
                || self.teacher.has_dummy_after_text()
                    && j < self.teacher.ids.len()
                    && self.teacher.starts_segment(j))
    }

    /// One chunk with text, with the tokens without text before it; gives its end and its bytes.
    /// `first` says that nothing is known of the tokens before.
    #[inline]
    fn step<K: Sink>(
        &self,
        from: Boundary,
        first: bool,
        walked: usize,
        sink: &mut K,
    ) -> Result<(Boundary, usize), Stop> {
        let (n, m) = (self.student.ids.len(), self.teacher.ids.len());
        // Tokens without text are told to the sink only with what follows: where the texts differ,
        // they belong to the difference.
        let mut at = from;
        let (mut i, mut j) = from;
        let (mut left, mut right);
        loop {
            if i < n && j < m {
                left = self.student.span(i).ok_or(Stop::BadId)?;
                right = self.teacher.span(j).ok_or(Stop::BadId)?;
                if left.0 < left.1 && right.0 < right.1 {
                    break;
                }
            }
            let before = (i, j);
            (at, (i, j)) = self.zero_width(at, before, sink);
            if i == n && j == m {
                one_sided(at, (n, m), sink);
                return Err(Stop::End);
            }
            if before == (i, j) {
                return Err(Stop::OneEnds { at, reached: at });
            }
        }
        // A segment starts only after tokens without text or added tokens, and where the walk does
        // not know.
        if self.has_dummy && (first || (i, j) != from || self.starts_after_text(from)) {
            let (student_extra, teacher_extra) =
                dummy_prefix(&self.student, &self.teacher, (i, 0), (j, 0));
            left.0 += usize::from(student_extra);
            right.0 += usize::from(teacher_extra);
            // A token that was nothing but the dummy prefix.
            if left.0 == left.1 || right.0 == right.1 {
                let end = (
                    i + usize::from(left.0 == left.1),
                    j + usize::from(right.0 == right.1),
                );
                one_sided(at, end, sink);
                return Ok((end, 0));
            }
        }
        let chunk = (i, j);
        let mut agreed = 0;
        // `left` and `right` are what is left of the tokens at `i` and `j`, as ranges of the blobs.
        loop {
            let len = (left.1 - left.0).min(right.1 - right.0);
            if !bytes_agree(self.student.blob, left.0, self.teacher.blob, right.0, len) {
                return Err(Stop::Differ {
                    at,
                    reached: (i, j),
                    agreed,
                    bytes: (left.0, right.0),
                });
            }
            agreed += len;
            left.0 += len;
            right.0 += len;
            if left.0 == left.1 && right.0 == right.1 {
                let end = (i + 1, j + 1);
                if at != chunk {
                    one_sided(at, chunk, sink);
                }
                sink.exact(end, agreed);
                return Ok((end, agreed));
            }
            if sink.enough(walked + agreed) {
                return Err(Stop::Enough);
            }
            // One side is inside a token, as after `un` against `unk`: the other reads its next
            // token, past those without text.
            let mut after_text = true;
            while left.0 == left.1 {
                i += 1;
                if i == n {
                    return Err(Stop::OneEnds {
                        at,
                        reached: (n, j + 1),
                    });
                }
                left = self.student.span(i).ok_or(Stop::BadId)?;
                let has_text = left.0 < left.1;
                let may_start = !after_text || self.student.has_dummy_after_text();
                if self.has_dummy && may_start && has_text && self.student.starts_segment(i) {
                    let skipped = self.teacher.token_len(j).saturating_sub(right.1 - right.0);
                    let extra = dummy_prefix(&self.student, &self.teacher, (i, 0), (j, skipped)).0;
                    left.0 += usize::from(extra);
                }
                after_text = has_text;
            }
            let mut after_text = true;
            while right.0 == right.1 {
                j += 1;
                if j == m {
                    return Err(Stop::OneEnds {
                        at,
                        reached: (i + 1, m),
                    });
                }
                right = self.teacher.span(j).ok_or(Stop::BadId)?;
                let has_text = right.0 < right.1;
                let may_start = !after_text || self.teacher.has_dummy_after_text();
                if self.has_dummy && may_start && has_text && self.teacher.starts_segment(j) {
                    let skipped = self.student.token_len(i).saturating_sub(left.1 - left.0);
                    let extra = dummy_prefix(&self.student, &self.teacher, (i, skipped), (j, 0)).1;
                    right.0 += usize::from(extra);
                }
                after_text = has_text;
            }
        }
    }

    /// Passes tokens without text at `before`, those from `at` on not yet told to the sink, up to
    /// the next pair of specials that correspond or to text on both sides.
    #[cold]
    fn zero_width<K: Sink>(
        &self,
        at: Boundary,
        before: Boundary,
        sink: &mut K,
    ) -> (Boundary, Boundary) {
        let (i, j) = before;
        let student_count = self.student.zero_width_count(i, PAIR_WINDOW);
        let teacher_count = self.teacher.zero_width_count(j, PAIR_WINDOW);
        if let Some((x, y)) = self.nearest_pair(i, j, student_count, teacher_count) {
            one_sided(at, (i + x, j + y), sink);
            let end = (i + x + 1, j + y + 1);
            sink.special(end);
            return (end, end);
        }
        // With more than a window of them on a side, that side goes first.
        let passed = match student_count.cmp(&teacher_count) {
            Ordering::Less => (i, j + teacher_count),
            Ordering::Equal => (i + student_count, j + teacher_count),
            Ordering::Greater => (i + student_count, j),
        };
        (at, passed)
    }

    /// The pair of corresponding specials with the fewest tokens before it. Of two at the same
    /// distance, the more even one, then the one of the smaller ids: student and teacher may be
    /// exchanged. Two that cross and are alike even so pair up with nothing.
    fn nearest_pair(
        &self,
        i: usize,
        j: usize,
        student_count: usize,
        teacher_count: usize,
    ) -> Option<Boundary> {
        let (a, b) = (student_count, teacher_count);
        if self.pairs.is_empty() || a == 0 || b == 0 {
            return None;
        }
        let ids = |(x, y): Boundary| {
            let student_id = self.student.ids[i + x].index() as u64;
            let teacher_id = self.teacher.ids[j + y].index() as u64;
            (student_id, teacher_id)
        };
        let is_pair = |&place: &Boundary| {
            place.0 < a && place.1 < b && {
                let (student_id, teacher_id) = ids(place);
                self.pairs.contains(&(student_id << 32 | teacher_id))
            }
        };
        let key = |place| {
            let (student_id, teacher_id) = ids(place);
            (student_id.min(teacher_id), student_id.max(teacher_id))
        };
        (0..a + b - 1).find_map(|skipped| {
            (0..=skipped / 2).rev().find_map(|less| {
                let more = skipped - less;
                let one = Some((less, more)).filter(is_pair);
                let other = Some((more, less)).filter(is_pair);
                match (one, other) {
                    (Some(one), Some(other)) if less != more => match key(one).cmp(&key(other)) {
                        Ordering::Less => Some(one),
                        Ordering::Equal => None,
                        Ordering::Greater => Some(other),
                    },
                    (one, other) => one.or(other),
                }
            })
        })
    }
}

/// Tells the sink tokens without text, the student's before the teacher's.
fn one_sided<K: Sink>(from: Boundary, to: Boundary, sink: &mut K) {
    for i in from.0..to.0 {
        sink.one_sided((i + 1, from.1), ChunkKind::StudentOnly, 0);
    }
    for j in from.1..to.1 {
        sink.one_sided((to.0, j + 1), ChunkKind::TeacherOnly, 0);
    }
}
