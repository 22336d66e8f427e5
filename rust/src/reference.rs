//! Slow, obvious twins of the fast paths, for the tests and the bench binary.

use crate::vocab::{DummyPrefix, Vocab};

/// The finest common segmentation `(s0, s1, t0, t1)` of two spellings of the same bytes by tokens
/// that all have bytes: a cut wherever a token ends on both sides. Quadratic.
#[must_use]
pub fn finest_chunks(student: &[&[u8]], teacher: &[&[u8]]) -> Vec<(usize, usize, usize, usize)> {
    let ends = |side: &[&[u8]]| -> Vec<usize> {
        (1..=side.len())
            .map(|count| side[..count].iter().map(|token| token.len()).sum())
            .collect()
    };
    let (student_ends, teacher_ends) = (ends(student), ends(teacher));
    let mut chunks = Vec::new();
    let mut from = (0, 0);
    for (i, end) in student_ends.iter().enumerate() {
        if let Some(j) = teacher_ends.iter().position(|other| other == end) {
            chunks.push((from.0, i + 1, from.1, j + 1));
            from = (i + 1, j + 1);
        }
    }
    chunks
}

/// The most bytes that exact chunks of two sequences can hold, a dummy prefix at the start of one
/// of them not counted where the other lacks it. Those after special tokens are taken for text.
#[must_use]
pub fn most_exact_bytes_of_ids(
    (student, student_ids): (&Vocab, &[i64]),
    (teacher, teacher_ids): (&Vocab, &[i64]),
) -> usize {
    let (left, right) = (tokens(student, student_ids), tokens(teacher, teacher_ids));
    let mut most = most_exact_bytes(&left, &right);
    if let Some(left) = without_dummy_prefix(student, &left) {
        most = most.max(most_exact_bytes(&left, &right));
    }
    if let Some(right) = without_dummy_prefix(teacher, &right) {
        most = most.max(most_exact_bytes(&left, &right));
    }
    most
}

fn tokens<'v>(vocab: &'v Vocab, ids: &[i64]) -> Vec<&'v [u8]> {
    ids.iter().map(|&id| vocab.token_bytes(id as u32)).collect()
}

fn without_dummy_prefix<'v>(vocab: &Vocab, tokens: &[&'v [u8]]) -> Option<Vec<&'v [u8]>> {
    let first = tokens.iter().position(|token| !token.is_empty())?;
    let may_have_one = vocab.dummy_prefix() != DummyPrefix::Never;
    let rest = tokens[first].strip_prefix(b" ").filter(|_| may_have_one)?;
    let mut tokens = tokens.to_vec();
    tokens[first] = rest;
    Some(tokens)
}

/// The most bytes that exact chunks can hold, whatever the two texts: dynamic programming over all
/// pairs of token boundaries. Quadratic at least.
#[must_use]
pub fn most_exact_bytes(student: &[&[u8]], teacher: &[&[u8]]) -> usize {
    let (n, m) = (student.len(), teacher.len());
    let mut best = vec![0; (n + 1) * (m + 1)];
    let at = |i: usize, j: usize| i * (m + 1) + j;
    for i in (0..=n).rev() {
        for j in (0..=m).rev() {
            let mut most = 0;
            if i < n {
                most = most.max(best[at(i + 1, j)]);
            }
            if j < m {
                most = most.max(best[at(i, j + 1)]);
            }
            if let Some((end_i, end_j, bytes)) = chunk_from(student, teacher, i, j) {
                most = most.max(bytes + best[at(end_i, end_j)]);
            }
            best[at(i, j)] = most;
        }
    }
    best[0]
}

/// Where the shortest exact chunk from two boundaries ends, and its bytes.
fn chunk_from(
    student: &[&[u8]],
    teacher: &[&[u8]],
    i: usize,
    j: usize,
) -> Option<(usize, usize, usize)> {
    let (mut i, mut j, mut bytes) = (i, j, 0);
    let (mut left, mut right): (&[u8], &[u8]) = (&[], &[]);
    loop {
        while left.is_empty() {
            left = student.get(i)?;
            i += 1;
        }
        while right.is_empty() {
            right = teacher.get(j)?;
            j += 1;
        }
        let shared = left.len().min(right.len());
        if left[..shared] != right[..shared] {
            return None;
        }
        bytes += shared;
        (left, right) = (&left[shared..], &right[shared..]);
        if left.is_empty() && right.is_empty() {
            return Some((i, j, bytes));
        }
    }
}
