//! Where two texts differ: finds the next place from which they agree again.
//!
//! The states are pairs of token boundaries. Skipping a token costs its bytes, following bytes that
//! agree costs nothing, so the cheapest path loses the fewest bytes to chunks that are not exact:
//! the same goal as the exact dynamic program over all pairs of boundaries. The first state in order
//! of cost from which enough agrees is taken for the answer; how much is enough grows with what was
//! skipped. Three stages, each for what the one before cannot settle, and each of bounded work:
//! [`glance`] at the next few tokens, [`near`] among the next 64, [`anchor`] for longer differences.

mod anchor;
mod glance;
mod near;
mod window;

use crate::align::output::{Boundary, ChunkKind, Sink};
use crate::align::side::TokenId;
use crate::align::walk::Walk;
use near::Tried;
use window::Window;

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
pub(crate) struct Scratch {
    window: Window,
    near: near::States,
    anchors: anchor::Table,
    /// No anchor follows in what is left of the sequence.
    no_anchor: bool,
    /// Boundaries to jump to, the next one last: one for each difference that the search passed.
    pub(crate) plan: Vec<Boundary>,
}

impl Scratch {
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
    fn run(&mut self, start: Boundary, count: usize, bytes: usize) {
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

/// Fills the plan with the jumps that lead from the difference at `from` to agreement.
pub(crate) fn search<S: TokenId, T: TokenId>(
    walk: &Walk<'_, S, T>,
    from: Boundary,
    scratch: &mut Scratch,
) -> Outcome {
    scratch.plan.clear();
    scratch.window.clear();
    if let Some(jump) = glance::search(walk, from, &mut scratch.window) {
        scratch.plan.push(jump);
        return Outcome::Found;
    }
    match near::search(walk, from, scratch) {
        Ok(outcome) => outcome,
        Err(tried) => search_far(walk, from, scratch, tried),
    }
}

/// Where no near path is convincing: one that keeps more than it loses, else the nearest anchor,
/// else one that keeps something or leads to the end of a side.
fn search_far<S: TokenId, T: TokenId>(
    walk: &Walk<'_, S, T>,
    from: Boundary,
    scratch: &mut Scratch,
    tried: Tried,
) -> Outcome {
    let Tried { agreed, ended } = tried;
    if agreed.score() <= 0 {
        if !scratch.no_anchor
            && let Some(jump) = anchor::find(walk, from, &mut scratch.anchors)
        {
            scratch.plan.push(jump);
            return Outcome::Found;
        }
        // What is left later is part of what is left now: looking once is enough.
        scratch.no_anchor = true;
    }
    let (end, end_bytes) = anchor::common_end(walk, from);
    let best = if ended.is_state() && ended.agreed >= agreed.agreed {
        ended
    } else {
        agreed
    };
    let reaches_an_end = ended.is_state() && usize::from(best.agreed) >= end_bytes;
    if reaches_an_end || 8 * u32::from(agreed.agreed) > u32::from(agreed.cost) {
        scratch.near.plan(
            if reaches_an_end { best } else { agreed },
            from,
            &mut scratch.plan,
        );
        return Outcome::Found;
    }
    scratch.plan.push(end);
    Outcome::Coarse
}
