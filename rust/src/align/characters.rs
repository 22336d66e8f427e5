//! Whole characters: chunks whose boundary would cut a UTF-8 character become one.

use super::output::{Boundary, ChunkKind, Writer};
use super::side::{Side, TokenId};
use super::walk::Walk;

/// Tokens without text inside a character are looked past up to this many in a row.
const REACH: usize = 16;

/// Joins the chunks of the sequence at hand wherever a boundary stands inside a character of the
/// student's or the teacher's text.
pub(crate) fn join<S: TokenId, T: TokenId>(walk: &Walk<'_, S, T>, writer: &mut Writer<'_>) {
    let chunks = writer.len();
    let (mut kept, mut first) = (0, 0);
    let mut group = OneSidedGroup::default();
    while first < chunks {
        let mut last = first;
        loop {
            if group.end <= last {
                group = OneSidedGroup::from(walk, writer, last);
            }
            let is_inside = group.is_cut && last + 1 < group.end;
            if last + 1 == chunks || !is_inside && !cuts(walk, writer.end(last)) {
                break;
            }
            last += 1;
        }
        if last == first {
            writer.keep(first, kept);
        } else {
            let joined = joined(walk, writer, first, last);
            writer.replace(last, kept, joined);
        }
        kept += 1;
        first = last + 1;
    }
    writer.truncate(kept);
}

/// Tokens that stand alone at one place, the student's before the teacher's.
#[derive(Default)]
struct OneSidedGroup {
    end: usize,
    /// A character is cut at the start or the end of a group with tokens of both sides. As their
    /// order is a matter of convention, all of the group then cuts it.
    is_cut: bool,
}

impl OneSidedGroup {
    /// The group that begins with `chunk`, or that chunk.
    fn from<S: TokenId, T: TokenId>(
        walk: &Walk<'_, S, T>,
        writer: &Writer<'_>,
        chunk: usize,
    ) -> Self {
        let end_of = |kind: ChunkKind, from: usize| {
            let other = |&at: &usize| writer.kind(at) != kind as u8;
            (from..writer.len()).find(other).unwrap_or(writer.len())
        };
        let students = end_of(ChunkKind::StudentOnly, chunk);
        let end = end_of(ChunkKind::TeacherOnly, students);
        let has_both = chunk < students && students < end;
        Self {
            end: end.max(chunk + 1),
            is_cut: has_both
                && (cuts(walk, writer.start(chunk)) || cuts(walk, writer.end(end - 1))),
        }
    }
}

/// What several chunks are together, with the bytes that are exact no longer.
fn joined<S: TokenId, T: TokenId>(
    walk: &Walk<'_, S, T>,
    writer: &Writer<'_>,
    first: usize,
    last: usize,
) -> (ChunkKind, usize) {
    let (mut all_exact, mut exact_bytes) = (true, 0);
    for chunk in first..=last {
        let (from, to) = (writer.start(chunk), writer.end(chunk));
        let student_bytes = walk.student.len_of(from.0..to.0);
        let teacher_bytes = walk.teacher.len_of(from.1..to.1);
        if writer.kind(chunk) == ChunkKind::Exact as u8 {
            // One of the two may have a dummy prefix, which is not text.
            exact_bytes += student_bytes.min(teacher_bytes);
        } else {
            all_exact &= student_bytes == 0 && teacher_bytes == 0;
        }
    }
    let (from, to) = (writer.start(first), writer.end(last));
    match (from.0 < to.0, from.1 < to.1) {
        _ if all_exact && exact_bytes > 0 => (ChunkKind::Exact, 0),
        (true, true) => (ChunkKind::Mismatch, exact_bytes),
        (true, false) => (ChunkKind::StudentOnly, 0),
        (false, _) => (ChunkKind::TeacherOnly, 0),
    }
}

fn cuts<S: TokenId, T: TokenId>(walk: &Walk<'_, S, T>, (i, j): Boundary) -> bool {
    inside_character(&walk.student, i) || inside_character(&walk.teacher, j)
}

/// Whether the token at `at` begins inside a character. Tokens without text between two parts of
/// one are all inside it, or none of them.
fn inside_character<I: TokenId>(side: &Side<'_, I>, at: usize) -> bool {
    let is_continuation = |byte: u8| byte & 0xC0 == 0x80;
    let end = side.ids.len().min(at + REACH + 1);
    let next = (at..end).find_map(|at| Some((at, *side.bytes(at).first()?)));
    let Some((next, _)) = next.filter(|&(_, byte)| is_continuation(byte)) else {
        return false;
    };
    let (mut without_text, mut distance) = (next - at, 0);
    for at in (0..at).rev() {
        let bytes = side.bytes(at);
        if bytes.is_empty() {
            without_text += 1;
            if without_text > REACH {
                return false;
            }
            continue;
        }
        without_text = 0;
        for &byte in bytes.iter().rev() {
            distance += 1;
            if !is_continuation(byte) {
                let character = match byte {
                    0xC2..=0xDF => 2,
                    0xE0..=0xEF => 3,
                    0xF0..=0xF4 => 4,
                    _ => 0,
                };
                return distance < character;
            }
            if distance == 3 {
                return false;
            }
        }
    }
    false
}
