//! The student positions of an example that have a target, and where the teacher is at each.

use super::pair::PairTables;
use super::{TargetExample, is_exact, is_special};

/// Where a student position is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub position: usize,
    pub chunk: usize,
    /// The teacher token at or around the boundary.
    pub teacher: usize,
    /// Bytes of it that are before the boundary.
    pub past: usize,
    /// The text's own student token here; none where a special one is.
    pub own: Option<u32>,
    /// The student token before, where it is text.
    pub last: Option<u32>,
    /// The first teacher token of the text without a gap up to here.
    pub text_start: usize,
}

/// Visits the positions of all exact and paired special chunks, in order.
pub(super) fn for_each_place(
    tables: &PairTables,
    example: &TargetExample<'_>,
    student_ids: &[u32],
    teacher_ids: &[u32],
    mut visit: impl FnMut(Place),
) {
    // Where the text that has no gap up to here began, on both sides.
    let mut run: Option<(usize, usize)> = None;
    for (chunk, &kind) in example.kinds.iter().enumerate() {
        let range = |bounds: &[i64]| bounds[chunk] as usize..bounds[chunk + 1] as usize;
        let (student, teacher) = (range(example.student_bounds), range(example.teacher_bounds));
        if student.is_empty() || teacher.is_empty() {
            run = None;
            continue;
        }
        let student_size = |s: &u32| tables.student.bytes(*s).len();
        let teacher_size = |t: &u32| tables.teacher.bytes(*t).len();
        let sizes = (
            student_ids[student.clone()]
                .iter()
                .map(student_size)
                .sum::<usize>(),
            teacher_ids[teacher.clone()]
                .iter()
                .map(teacher_size)
                .sum::<usize>(),
        );
        // A dummy prefix makes a chunk exact whose tokens differ by a space.
        let exact = is_exact(kind) && sizes.0 == sizes.1 && sizes.0 > 0;
        if !exact && !is_special(kind) {
            run = None;
            continue;
        }
        let (student_start, text_start) = run.unwrap_or((student.start, teacher.start));
        let place = Place {
            position: student.start,
            chunk,
            teacher: teacher.start,
            past: 0,
            own: None,
            last: None,
            text_start,
        };
        let last = |position: usize| (position > student_start).then(|| student_ids[position - 1]);
        if !exact {
            if student.start > 0 {
                visit(Place {
                    last: last(student.start),
                    ..place
                });
            }
            run = None;
            continue;
        }
        run = Some((student_start, text_start));
        let (mut at, mut past) = (teacher.start, 0);
        for position in student {
            while at < teacher.end && past >= teacher_size(&teacher_ids[at]) {
                past -= teacher_size(&teacher_ids[at]);
                at += 1;
            }
            // Tokens without bytes at the end of a chunk leave nothing to compare with.
            if position > 0 && at < teacher.end {
                visit(Place {
                    position,
                    teacher: at,
                    past,
                    own: Some(student_ids[position]),
                    last: last(position),
                    ..place
                });
            }
            past += student_size(&student_ids[position]);
        }
    }
}
