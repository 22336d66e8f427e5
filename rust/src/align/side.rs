//! One side of an alignment: ids, and the bytes that they stand for.

use crate::vocab::{DummyPrefix, TokenKind, Vocab};

/// A token id as callers hold it.
pub trait TokenId: Copy + Send + Sync {
    /// The id as an index; a negative one becomes an index that no vocabulary reaches.
    fn index(self) -> usize;
    /// The id as a number, for messages.
    fn value(self) -> i64;
}

impl TokenId for i64 {
    #[inline(always)]
    fn index(self) -> usize {
        usize::try_from(self as u64).unwrap_or(usize::MAX)
    }

    fn value(self) -> i64 {
        self
    }
}

impl TokenId for u32 {
    #[inline(always)]
    fn index(self) -> usize {
        self as usize
    }

    fn value(self) -> i64 {
        i64::from(self)
    }
}

/// Spaces are counted this far where a dummy prefix is looked for; runs as long are left alone.
const MAX_SPACES: usize = 1024;

/// The tokens of one side, read through their vocabulary.
#[derive(Clone, Copy)]
pub(crate) struct Side<'a, I> {
    pub(crate) ids: &'a [I],
    pub(crate) blob: &'a [u8],
    starts: &'a [u32],
    kinds: &'a [TokenKind],
    added: &'a [u32],
    dummy: DummyPrefix,
    /// The id that stands for text which the vocabulary lacks; `usize::MAX` for none.
    unknown: usize,
    /// Index of the first token with text, where this side can have a dummy prefix.
    pub(crate) first_text: usize,
}

impl<'a, I: TokenId> Side<'a, I> {
    pub(crate) fn new(vocab: &'a Vocab, ids: &'a [I]) -> Self {
        let mut side = Self {
            ids,
            blob: vocab.blob(),
            starts: vocab.starts(),
            kinds: vocab.kinds(),
            added: vocab.added(),
            dummy: vocab.dummy_prefix(),
            unknown: vocab.unknown().map_or(usize::MAX, |id| id as usize),
            first_text: 0,
        };
        if side.dummy != DummyPrefix::Never {
            let is_text =
                |at: &usize| !matches!(side.span(*at), Some((start, end)) if start == end);
            side.first_text = (0..ids.len()).find(is_text).unwrap_or(ids.len());
        }
        side
    }

    /// Start and end in `blob` of the token at `at`; `None` for an id that the vocabulary lacks.
    #[inline(always)]
    pub(crate) fn span(&self, at: usize) -> Option<(usize, usize)> {
        let id = self.ids[at].index();
        let end = *self.starts.get(id.wrapping_add(1))?;
        let start = *self.starts.get(id)?;
        Some((start as usize, end as usize))
    }

    /// Length of the token at `at`; 0 for an id that the vocabulary lacks.
    #[inline(always)]
    pub(crate) fn token_len(&self, at: usize) -> usize {
        self.span(at).map_or(0, |(start, end)| end - start)
    }

    /// The bytes of the token at `at`; none for an id that the vocabulary lacks.
    pub(crate) fn bytes(&self, at: usize) -> &'a [u8] {
        self.span(at)
            .map_or(&[], |(start, end)| &self.blob[start..end])
    }

    /// Bytes of several tokens together.
    pub(crate) fn len_of(&self, tokens: std::ops::Range<usize>) -> usize {
        tokens.map(|at| self.token_len(at)).sum()
    }

    fn is_special(&self, at: usize) -> bool {
        self.kinds.get(self.ids[at].index()) == Some(&TokenKind::Special)
    }

    /// Whether the tokenizer cuts its text after the token at `at`: what follows is tokenized as a
    /// text of its own.
    fn ends_segment(&self, at: usize) -> bool {
        let id = self.ids[at].index();
        self.is_special(at) && id != self.unknown
            || u32::try_from(id).is_ok_and(|id| self.added.binary_search(&id).is_ok())
    }

    /// Whether the tokenizer may put a space of its own right behind text: behind an added token.
    #[inline(always)]
    pub(crate) fn has_dummy_after_text(&self) -> bool {
        self.dummy == DummyPrefix::Every && !self.added.is_empty()
    }

    /// Whether the tokenizer may have put a space of its own before the token at `at`.
    #[inline(always)]
    pub(crate) fn starts_segment(&self, at: usize) -> bool {
        self.dummy != DummyPrefix::Never
            && (at == self.first_text
                || self.dummy == DummyPrefix::Every && at > 0 && self.ends_segment(at - 1))
    }

    /// Number of tokens without text from `at` on, counted up to `limit`.
    #[inline]
    pub(crate) fn zero_width_count(&self, at: usize, limit: usize) -> usize {
        (at..self.ids.len().min(at + limit))
            .take_while(|&at| matches!(self.span(at), Some((start, end)) if start == end))
            .count()
    }

    /// Spaces from a byte inside the token at `at` on, up to `limit`, not past a special token.
    fn leading_spaces(&self, at: usize, skipped: usize, limit: usize) -> usize {
        let mut spaces = 0;
        let mut skipped = skipped;
        for at in at..self.ids.len() {
            let Some((start, end)) = self.span(at) else {
                break;
            };
            if self.is_special(at) {
                break;
            }
            // None where the caller has overwritten the id since `skipped` was counted.
            let bytes = self.blob.get(start + skipped..end).unwrap_or_default();
            skipped = 0;
            let here = bytes.iter().take_while(|&&byte| byte == b' ').count();
            spaces += here;
            if here < bytes.len() || spaces >= limit {
                break;
            }
        }
        spaces.min(limit)
    }
}

/// A byte inside a token: its index and how much of it lies behind.
pub(crate) type Cursor = (usize, usize);

/// Whether the student or the teacher, both at the same place of the text, has a dummy prefix there
/// that the other lacks: the side that may have one loses one space where it has exactly one more.
pub(crate) fn dummy_prefix<S: TokenId, T: TokenId>(
    student: &Side<'_, S>,
    teacher: &Side<'_, T>,
    (i, student_skipped): Cursor,
    (j, teacher_skipped): Cursor,
) -> (bool, bool) {
    let student_may = student_skipped == 0 && student.starts_segment(i);
    let teacher_may = teacher_skipped == 0 && teacher.starts_segment(j);
    if !student_may && !teacher_may {
        return (false, false);
    }
    // The other side is read just past what decides: long runs are not read again and again.
    let (student_spaces, teacher_spaces) = if student_may {
        let spaces = student.leading_spaces(i, student_skipped, MAX_SPACES);
        (
            spaces,
            teacher.leading_spaces(j, teacher_skipped, spaces + 2),
        )
    } else {
        let spaces = teacher.leading_spaces(j, teacher_skipped, MAX_SPACES);
        (
            student.leading_spaces(i, student_skipped, spaces + 2),
            spaces,
        )
    };
    if student_spaces.max(teacher_spaces) >= MAX_SPACES {
        return (false, false);
    }
    (
        student_may && student_spaces == teacher_spaces + 1,
        teacher_may && teacher_spaces == student_spaces + 1,
    )
}

/// Whether `len` bytes agree, from `at` in `student` and from `other` in `teacher` on; `len > 0`.
#[inline(always)]
pub(crate) fn bytes_agree(
    student: &[u8],
    at: usize,
    teacher: &[u8],
    other: usize,
    len: usize,
) -> bool {
    if len <= 8
        && let Some(left) = student[at..].first_chunk::<8>()
        && let Some(right) = teacher[other..].first_chunk::<8>()
    {
        let differing = u64::from_le_bytes(*left) ^ u64::from_le_bytes(*right);
        return differing << (64 - 8 * len) == 0;
    }
    student[at..at + len] == teacher[other..other + len]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_agree_looks_at_len_bytes_and_no_more() {
        let (left, right) = (b"xabcdefghij".to_vec(), b"abcdefgXij".to_vec());
        assert!(bytes_agree(&left, 1, &right, 0, 7));
        assert!(!bytes_agree(&left, 1, &right, 0, 8));
        assert!(bytes_agree(&left, 9, &right, 8, 2));
        assert!(!bytes_agree(&left, 8, &right, 7, 3));
        assert!(bytes_agree(b"abcdefghijk", 0, b"abcdefghijk", 0, 11));
    }
}
