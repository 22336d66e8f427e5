//! Where two texts differ: finds the next place from which they agree again.
//!
//! The states are pairs of token boundaries. Skipping a token costs its bytes, following bytes that
//! agree costs nothing, so the cheapest path loses the fewest bytes to chunks that are not exact:
//! the same goal as the exact dynamic program over all pairs of boundaries. States are taken up in
//! order of cost, and the first one from which [`COMMIT_BYTES`] agree is taken for the answer. Work
//! is bounded: past [`MAX_WORK`] the search falls back to [`anchor`].

mod anchor;

pub(crate) use anchor::common_end;

use std::cmp::Reverse;
use std::collections::BinaryHeap;

use crate::align::output::{Boundary, ChunkKind, Sink};
use crate::align::side::TokenId;
use crate::align::walk::{Stop, Walk};

/// Agreement of this many bytes ends a search.
pub(crate) const COMMIT_BYTES: usize = 64;

/// States taken up before a search gives up.
const MAX_STATES: usize = 1024;

/// Tokens and bytes walked from the states of one search before it gives up.
const MAX_WALKED: usize = 16 * 1024;

/// What a search came to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// The plan leads to agreement, or to the end of a side.
    Found,
    /// Nothing was found within the limits.
    Nothing,
    /// An id lies outside its vocabulary.
    BadId,
}

#[derive(Debug, Clone, Copy)]
struct State {
    /// Where skipping led.
    at: Boundary,
    /// Where the agreement from there ended; `at` where there was none.
    end: Boundary,
    parent: u32,
    /// Whether the last step skipped a teacher token; skipping then stays on that side, so that each
    /// place is reached in one order only.
    teacher_skipped: bool,
}

/// Memory of a search, kept from one to the next.
#[derive(Default)]
pub(crate) struct Scratch {
    states: Vec<State>,
    queue: BinaryHeap<Reverse<u64>>,
    seen: hashbrown::HashSet<u64, rustc_hash::FxBuildHasher>,
    anchors: anchor::Table,
    /// Boundaries to jump to, the next one last: one for each difference that the search passed.
    pub(crate) plan: Vec<Boundary>,
}

/// Counts agreement without writing it down.
struct Probe {
    end: Boundary,
    agreed: usize,
}

impl Sink for Probe {
    #[inline(always)]
    fn enough(&self, bytes: usize) -> bool {
        bytes >= COMMIT_BYTES
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
    let (n, m) = (walk.student.ids.len(), walk.teacher.ids.len());
    scratch.states.clear();
    scratch.queue.clear();
    scratch.seen.clear();
    scratch.plan.clear();
    scratch.states.push(State {
        at: from,
        end: from,
        parent: 0,
        teacher_skipped: false,
    });
    scratch.queue.push(Reverse(0));
    // The cheapest state in which one side is used up: the answer where nothing agrees any more.
    let mut ended = None;
    let mut walked = 0;
    while let Some(Reverse(key)) = scratch.queue.pop() {
        let (cost, index) = (key >> 32, key as u32);
        let mut state = scratch.states[index as usize];
        if index > 0 {
            if !scratch.seen.insert(place(state.at)) {
                continue;
            }
            let mut probe = Probe {
                end: state.at,
                agreed: 0,
            };
            let stop = walk.run(state.at, &mut probe);
            walked += probe.agreed + 1;
            match stop {
                Stop::BadId => return Outcome::BadId,
                Stop::End | Stop::Enough => {
                    make_plan(&scratch.states, index, &mut scratch.plan);
                    return Outcome::Found;
                }
                Stop::OneEnds { .. } if ended.is_none() => ended = Some(index),
                Stop::OneEnds { .. } | Stop::Differ { .. } => {}
            }
            if probe.end != state.at {
                if !scratch.seen.insert(place(probe.end)) {
                    continue;
                }
                state.end = probe.end;
                state.teacher_skipped = false;
                scratch.states[index as usize] = state;
            }
        }
        let (i, j) = state.end;
        if scratch.states.len() > MAX_STATES || walked > MAX_WALKED {
            if anchor::find(walk, from, scratch) {
                return Outcome::Found;
            }
            break;
        }
        if i < n && !state.teacher_skipped {
            let cost = cost + walk.student.token_len(i).max(1) as u64;
            push(
                scratch,
                cost,
                State {
                    at: (i + 1, j),
                    end: (i + 1, j),
                    parent: index,
                    ..state
                },
            );
        }
        if j < m {
            let cost = cost + walk.teacher.token_len(j).max(1) as u64;
            let at = (i, j + 1);
            push(
                scratch,
                cost,
                State {
                    at,
                    end: at,
                    parent: index,
                    teacher_skipped: true,
                },
            );
        }
    }
    match ended {
        Some(index) => {
            make_plan(&scratch.states, index, &mut scratch.plan);
            Outcome::Found
        }
        None => Outcome::Nothing,
    }
}

fn place((i, j): Boundary) -> u64 {
    (i as u64) << 32 | j as u64
}

fn push(scratch: &mut Scratch, cost: u64, state: State) {
    // Ties go to the state that was found first.
    scratch
        .queue
        .push(Reverse(cost << 32 | scratch.states.len() as u64));
    scratch.states.push(state);
}

/// The places to which the path to `index` jumps, the last one first.
fn make_plan(states: &[State], index: u32, plan: &mut Vec<Boundary>) {
    let mut state = states[index as usize];
    plan.push(state.at);
    loop {
        let parent = states[state.parent as usize];
        if parent.end == parent.at {
            // A skip within the same difference, or the root.
            if state.parent == 0 {
                return;
            }
        } else {
            plan.push(parent.at);
        }
        state = parent;
    }
}
