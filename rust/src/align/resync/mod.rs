//! Where two texts differ: finds the next place from which they agree again.
//!
//! The states are pairs of token boundaries. Skipping a token costs its bytes, following bytes that
//! agree costs nothing, so the cheapest path loses the fewest bytes to chunks that are not exact:
//! the same goal as the exact dynamic program over all pairs of boundaries. The first state in
//! order of cost from which enough agrees is taken for the answer; how much is enough grows with
//! what was skipped. Three stages, each for what the one before cannot settle, and each of bounded
//! work: [`nearby`] at the next few tokens, [`local_search`] among the next 64, [`hash_anchor`] for
//! longer differences.

mod bitset;
mod bucket_queue;
mod hash_anchor;
mod local_search;
mod nearby;
mod token_window;

use crate::align::output::{Boundary, ChunkKind, Sink};
use crate::align::side::TokenId;
use crate::align::walk::Walk;
use local_search::{Best, Candidates};
use token_window::{Frame, TokenWindow};

/// Agreement of this many bytes always ends a search.
pub(crate) const COMMIT_BYTES: usize = 64;

/// Bytes of agreement that convince after skipping `cost` bytes. With less, one difference in a
/// hundred words is passed wrongly; with more, the next difference comes before the search may end.
fn enough(cost: usize) -> usize {
    (16 + cost / 2).min(COMMIT_BYTES)
}

/// What a search came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The plan leads to agreement, or to the end of a side.
    Found,
    /// Nothing was found within the limits: the plan leads to the common end of both sides.
    Coarse,
    /// An id lies outside its vocabulary.
    BadId,
}

/// Memory of a search, kept from one to the next.
#[derive(Default)]
pub(crate) struct Memory {
    window: TokenWindow,
    local: local_search::LocalSearch,
    anchors: hash_anchor::Table,
    /// No anchor follows in what is left of the sequence.
    no_anchor: bool,
    /// Boundaries to jump to, the next one last: one for each difference that the search passed.
    pub(crate) plan: Vec<Boundary>,
}

impl Memory {
    /// Forgets the sequence before.
    pub(crate) fn start(&mut self) {
        self.plan.clear();
        self.no_anchor = false;
    }
}

/// Counts agreement without writing it down.
struct Probe {
    end: Boundary,
    agreed: usize,
    enough: usize,
}

impl Sink for Probe {
    #[inline(always)]
    fn enough(&self, bytes: usize) -> bool {
        bytes >= self.enough
    }

    #[inline(always)]
    fn one_to_one(&mut self, start: Boundary, count: usize, bytes: usize) {
        self.end = (start.0 + count, start.1 + count);
        self.agreed += bytes;
    }

    #[inline(always)]
    fn exact(&mut self, end: Boundary, bytes: usize) {
        self.end = end;
        self.agreed += bytes;
    }

    fn special(&mut self, end: Boundary) {
        self.end = end;
    }

    fn one_sided(&mut self, _: Boundary, _: ChunkKind, _: usize) {}
}

/// Fills the plan with the jumps that lead from the difference at `from` to agreement. Ties fall
/// the way of the first side, which is the teacher's if `swapped`.
pub(crate) fn search<S: TokenId, T: TokenId>(
    walk: &Walk<'_, S, T>,
    from: Boundary,
    swapped: bool,
    memory: &mut Memory,
) -> Outcome {
    let frame = Frame {
        walk,
        from,
        swapped,
    };
    memory.plan.clear();
    memory.local.leave(&memory.window);
    memory.window.clear();
    if let Some(jump) = nearby::search(&frame, &mut memory.window) {
        memory.plan.push(jump);
        return Outcome::Found;
    }
    match local_search::search(&frame, memory) {
        Ok(outcome) => outcome,
        Err(candidates) => search_far(&frame, memory, candidates),
    }
}

/// Where no near path is convincing: one that keeps more than it loses, else the nearest anchor,
/// else one that keeps something or leads to the end of a side.
fn search_far<S: TokenId, T: TokenId>(
    frame: &Frame<'_, '_, S, T>,
    memory: &mut Memory,
    candidates: Candidates,
) -> Outcome {
    let Candidates { agreed, ended } = candidates;
    if agreed.is_none_or(|agreed| agreed.score() <= 0) {
        if !memory.no_anchor
            && let Some(jump) = hash_anchor::find(frame, &mut memory.anchors)
        {
            memory.plan.push(jump);
            return Outcome::Found;
        }
        // What is left later is part of what is left now: looking once is enough.
        memory.no_anchor = true;
    }
    let (end, end_bytes) = hash_anchor::common_end(frame.walk, frame.from);
    let kept = |best: Option<Best>| best.map_or(0, |best| best.agreed);
    let best = if kept(ended) >= kept(agreed) {
        ended.or(agreed)
    } else {
        agreed
    };
    let best = if ended.is_some() && kept(best) >= end_bytes {
        best
    } else {
        agreed.filter(|agreed| 8 * agreed.agreed > agreed.cost)
    };
    match best {
        Some(best) => {
            memory.local.plan(best, frame, &mut memory.plan);
            Outcome::Found
        }
        None => {
            memory.plan.push(end);
            Outcome::Coarse
        }
    }
}
