//! Whole characters: chunks whose boundary would cut a UTF-8 character become one.

use super::output::{Boundary, ChunkKind, Writer};
use super::side::{Side, TokenId};
use super::walk::Walk;

/// Tokens without text inside a character are looked past up to this many.
const REACH: usize = 16;

/// Joins the chunks of the sequence at hand wherever a boundary stands inside a character of the
/// student's or the teacher's text.
pub(crate) fn join<S: TokenId, T: TokenId>(walk: &Walk<'_, S, T>, writer: &mut Writer<'_>) {
    let chunks = writer.len();
    let mut kept = 0;
    let mut first = 0;
    while first < chunks {
        let mut last = first;
        while last + 1 < chunks && cuts(walk, writer.end(last)) {
            last += 1;
        }
        if last == first {
            writer.keep(first, kept);
        } else {
            let merged = merge(walk, writer, first, last);
            writer.replace(last, kept, merged);
        }
        kept += 1;
        first = last + 1;
    }
    writer.truncate(kept);
}

/// What several chunks are together, with the bytes that are exact no longer.
fn merge<S: TokenId, T: TokenId>(
    walk: &Walk<'_, S, T>,
    writer: &Writer<'_>,
    first: usize,
    last: usize,
) -> (ChunkKind, usize) {
    let (mut student_text, mut teacher_text, mut all_exact, mut exact_bytes) = (0, 0, true, 0);
    for chunk in first..=last {
        let (from, to) = (writer.start(chunk), writer.end(chunk));
        let student_bytes = walk.student.len_of(from.0..to.0);
        let teacher_bytes = walk.teacher.len_of(from.1..to.1);
        student_text += student_bytes;
        teacher_text += teacher_bytes;
        if writer.kind(chunk) == ChunkKind::Exact as u8 {
            // One of the two may have a dummy prefix, which is not text.
            exact_bytes += student_bytes.min(teacher_bytes);
        } else {
            all_exact &= student_bytes == 0 && teacher_bytes == 0;
        }
    }
    match (student_text > 0, teacher_text > 0) {
        _ if all_exact && exact_bytes > 0 => (ChunkKind::Exact, 0),
        (true, true) => (ChunkKind::Mismatch, exact_bytes),
        (true, false) => (ChunkKind::StudentOnly, 0),
        (false, _) => (ChunkKind::TeacherOnly, 0),
    }
}

fn cuts<S: TokenId, T: TokenId>(walk: &Walk<'_, S, T>, (i, j): Boundary) -> bool {
    inside_character(&walk.student, i) || inside_character(&walk.teacher, j)
}

/// Whether the token at `at` begins inside a character.
fn inside_character<I: TokenId>(side: &Side<'_, I>, at: usize) -> bool {
    let is_continuation = |byte: u8| byte & 0xC0 == 0x80;
    let end = side.ids.len().min(at + REACH);
    let next = (at..end).find_map(|at| side.bytes(at).first());
    if !next.is_some_and(|&byte| is_continuation(byte)) {
        return false;
    }
    let before = (at.saturating_sub(REACH)..at)
        .rev()
        .flat_map(|at| side.bytes(at).iter().rev().copied())
        .take(3);
    for (distance, byte) in (1..).zip(before) {
        if !is_continuation(byte) {
            let character = match byte {
                0xC2..=0xDF => 2,
                0xE0..=0xEF => 3,
                0xF0..=0xF4 => 4,
                _ => 0,
            };
            return distance < character;
        }
    }
    false
}
