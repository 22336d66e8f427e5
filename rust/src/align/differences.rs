//! From one difference to the next: the walk where bytes agree, the search where they do not.

use super::output::{Boundary, ChunkKind, Sink, Writer};
use super::resync::{self, Outcome};
use super::side::{Side, TokenId};
use super::walk::{Stop, Walk};

/// An id outside its vocabulary.
pub(super) struct BadId;

/// Walks both sides to their ends, over each difference.
pub(super) fn align_sides<S: TokenId, T: TokenId>(
    walk: &Walk<'_, S, T>,
    writer: &mut Writer<'_>,
    memory: &mut resync::Memory,
) -> Result<(), BadId> {
    let ends = (walk.student.ids.len(), walk.teacher.ids.len());
    let mut from = (0, 0);
    memory.start();
    loop {
        match walk.advance(from, writer) {
            Stop::End | Stop::Enough => return Ok(()),
            Stop::BadId => return Err(BadId),
            Stop::OneEnds { at, reached } => {
                block(walk, at, reached, false, writer)?;
                return block(walk, reached, ends, false, writer);
            }
            Stop::Differ {
                mut at,
                reached,
                agreed,
                bytes,
            } => {
                // A long chunk that agreed up to here is not taken up again from its start.
                if agreed >= resync::COMMIT_BYTES && reached.0 > at.0 && reached.1 > at.1 {
                    block(walk, at, reached, false, writer)?;
                    at = reached;
                    memory.plan.clear();
                }
                let mut coarse = false;
                if memory.plan.is_empty() {
                    match resync::search(walk, at, is_greater(walk, reached, bytes), memory) {
                        Outcome::Found => {}
                        Outcome::Coarse => coarse = true,
                        Outcome::BadId => return Err(BadId),
                    }
                }
                let next = memory.plan.pop().unwrap_or(ends);
                from = (next.0.max(at.0), next.1.max(at.1));
                block(walk, at, from, coarse, writer)?;
            }
        }
    }
}

/// Whether the student's text is the greater where both differ: something that the two sides have
/// in common whichever of them is called the student.
fn is_greater<S: TokenId, T: TokenId>(
    walk: &Walk<'_, S, T>,
    (i, j): Boundary,
    (left, right): (usize, usize),
) -> bool {
    let left = rest(&walk.student, i, left);
    let right = rest(&walk.teacher, j, right);
    left > right
}

/// The bytes of a token from the place `from` in the blob on. None where the caller has overwritten
/// the id since it was read: an array of another language may change under the call.
fn rest<'a, I: TokenId>(side: &Side<'a, I>, at: usize, from: usize) -> &'a [u8] {
    side.span(at)
        .and_then(|(_, end)| side.blob.get(from..end))
        .unwrap_or_default()
}

/// Writes the tokens between two boundaries as one that differs, or one by one where only one side
/// has any. Tokens without text at its edges stand alone.
fn block<S: TokenId, T: TokenId>(
    walk: &Walk<'_, S, T>,
    from: Boundary,
    to: Boundary,
    coarse: bool,
    writer: &mut Writer<'_>,
) -> Result<(), BadId> {
    let (student, teacher) = (&walk.student, &walk.teacher);
    let has_text = |side: Option<(usize, usize)>| side.is_some_and(|(start, end)| start < end);
    if (from.0..to.0).any(|i| student.span(i).is_none())
        || (from.1..to.1).any(|j| teacher.span(j).is_none())
    {
        return Err(BadId);
    }
    let student_text = trim(from.0, to.0, |i| has_text(student.span(i)));
    let teacher_text = trim(from.1, to.1, |j| has_text(teacher.span(j)));
    if student_text.0 == student_text.1 || teacher_text.0 == teacher_text.1 {
        alone(walk, from, to, writer);
        return Ok(());
    }
    alone(walk, from, (student_text.0, teacher_text.0), writer);
    let end = (student_text.1, teacher_text.1);
    let student_bytes = student.len_of(student_text.0..end.0);
    let teacher_bytes = teacher.len_of(teacher_text.0..end.1);
    writer.mismatch(end, student_bytes, teacher_bytes, coarse);
    alone(walk, end, to, writer);
    Ok(())
}

/// Writes tokens one by one, the student's before the teacher's.
fn alone<S: TokenId, T: TokenId>(
    walk: &Walk<'_, S, T>,
    from: Boundary,
    to: Boundary,
    writer: &mut Writer<'_>,
) {
    for i in from.0..to.0 {
        writer.one_sided(
            (i + 1, from.1),
            ChunkKind::StudentOnly,
            walk.student.token_len(i),
        );
    }
    for j in from.1..to.1 {
        writer.one_sided(
            (to.0, j + 1),
            ChunkKind::TeacherOnly,
            walk.teacher.token_len(j),
        );
    }
}

/// The part of a range from its first to its last element that qualifies; empty at its end if none.
fn trim(start: usize, end: usize, qualifies: impl Fn(usize) -> bool) -> (usize, usize) {
    let first = (start..end).find(|&at| qualifies(at)).unwrap_or(end);
    let last = (first..end)
        .rfind(|&at| qualifies(at))
        .map_or(first, |at| at + 1);
    (first, last)
}
