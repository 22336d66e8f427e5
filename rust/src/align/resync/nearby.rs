//! Fast path: try every resynchronization point among the next six tokens of either side.
//!
//! Gives the answer of [`super::local_search`] where one skip from the difference is convincing
//! before any other place agrees in part; anything else is left to it.

use super::token_window::{Frame, TokenWindow};
use super::{Probe, enough};
use crate::align::output::Boundary;
use crate::align::side::TokenId;
use crate::align::walk::Stop;

/// Tokens of either side that are looked at.
const TOKENS: usize = 6;

/// Places that are tried before the question is left open.
const TRIES: usize = 4;

/// The nearest boundary from which enough agrees.
#[inline]
pub(super) fn search<S: TokenId, T: TokenId>(
    frame: &Frame<'_, '_, S, T>,
    window: &mut TokenWindow,
) -> Option<Boundary> {
    let (walk, from) = (frame.walk, frame.from);
    if walk.has_dummy && (from.0 <= walk.student.first_text || from.1 <= walk.teacher.first_text) {
        return None;
    }
    let first = window.first.first::<S, T, TOKENS>(frame)?;
    let second = window.second.first::<S, T, TOKENS>(frame)?;
    let mut first_cost = [0; TOKENS];
    let mut second_cost = [0; TOKENS];
    for at in 1..TOKENS {
        first_cost[at] = first_cost[at - 1] + first[at - 1].len as usize;
        second_cost[at] = second_cost[at - 1] + second[at - 1].len as usize;
    }
    // Beyond the tokens looked at, places cost at least this much.
    let limit = (first_cost[TOKENS - 1] + first[TOKENS - 1].len as usize)
        .min(second_cost[TOKENS - 1] + second[TOKENS - 1].len as usize);
    let mut last = 0;
    for _ in 0..TRIES {
        // The cheapest place after the last one tried; its key is its cost, then where it is.
        let mut nearest = usize::MAX;
        for i in 0..TOKENS {
            for j in 0..TOKENS {
                let key = (first_cost[i] + second_cost[j]) << 8 | i << 4 | j;
                let differ = first[i].differs(&second[j]);
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
        let at = frame.boundary((nearest >> 4 & 15, nearest & 15));
        let mut probe = Probe {
            end: at,
            agreed: 0,
            enough: enough(nearest >> 8),
        };
        match walk.advance(at, &mut probe) {
            Stop::End | Stop::Enough => return Some(at),
            Stop::Differ { .. } if probe.agreed == 0 => {}
            _ => return None,
        }
    }
    None
}
