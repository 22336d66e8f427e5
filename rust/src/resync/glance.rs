//! The usual difference, a word or two: all places among the next few tokens at a glance.
//!
//! Gives the answer of [`super::near`] where one skip from the difference is convincing before any
//! other place agrees in part; anything else is left to it.

use super::window::Window;
use super::{Probe, enough};
use crate::align::output::Boundary;
use crate::align::side::TokenId;
use crate::align::walk::{Stop, Walk};

/// Tokens of either side that are looked at.
const TOKENS: usize = 6;

/// Places that are tried before the question is left open.
const TRIES: usize = 4;

/// The nearest boundary from which enough agrees.
#[inline]
pub(super) fn search<S: TokenId, T: TokenId>(
    walk: &Walk<'_, S, T>,
    from: Boundary,
    window: &mut Window,
) -> Option<Boundary> {
    if walk.has_dummy && (from.0 <= walk.student.first_text || from.1 <= walk.teacher.first_text) {
        return None;
    }
    let student = window.student.first::<S, TOKENS>(&walk.student, from.0)?;
    let teacher = window.teacher.first::<T, TOKENS>(&walk.teacher, from.1)?;
    let mut student_cost = [0; TOKENS];
    let mut teacher_cost = [0; TOKENS];
    for at in 1..TOKENS {
        student_cost[at] = student_cost[at - 1] + student[at - 1].len as usize;
        teacher_cost[at] = teacher_cost[at - 1] + teacher[at - 1].len as usize;
    }
    // Beyond the tokens looked at, places cost at least this much.
    let limit = (student_cost[TOKENS - 1] + student[TOKENS - 1].len as usize)
        .min(teacher_cost[TOKENS - 1] + teacher[TOKENS - 1].len as usize);
    let mut last = 0;
    for _ in 0..TRIES {
        // The cheapest place after the last one tried; its key is its cost, then where it is.
        let mut nearest = usize::MAX;
        for i in 0..TOKENS {
            for j in 0..TOKENS {
                let key = (student_cost[i] + teacher_cost[j]) << 8 | i << 4 | j;
                let differ = student[i].differs(&teacher[j]);
                let key = if differ || key <= last {
                    usize::MAX
                } else {
                    key
                };
                nearest = nearest.min(key);
            }
        }
        if nearest >> 8 >= limit {
            return None;
        }
        last = nearest;
        let at = (from.0 + (nearest >> 4 & 15), from.1 + (nearest & 15));
        let mut probe = Probe {
            end: at,
            agreed: 0,
            enough: enough(nearest >> 8),
        };
        match walk.run(at, &mut probe) {
            Stop::End | Stop::Enough => return Some(at),
            Stop::Differ { .. } if probe.agreed == 0 => {}
            _ => return None,
        }
    }
    None
}
