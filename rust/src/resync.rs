//! Where two texts differ: finds the next place from which they agree again.
//!
//! The states are pairs of token boundaries. Skipping a token costs its bytes, following bytes that
//! agree costs nothing, so the cheapest path loses the fewest bytes to chunks that are not exact:
//! the same goal as the exact dynamic program over all pairs of boundaries. States are taken up in
//! order of cost, and the first one from which [`COMMIT_BYTES`] agree is taken for the answer. Work
//! is bounded: past [`MAX_WORK`] the search falls back to [`anchor`].

mod anchor;
mod window;

use crate::align::output::{Boundary, ChunkKind, Sink};
use crate::align::side::TokenId;
use crate::align::walk::{Stop, Walk};
use window::{Heads, MAX_COST, NONE, Queue, Seen};

/// Agreement of this many bytes ends a search.
pub(crate) const COMMIT_BYTES: usize = 64;

/// Agreement that convinces where nothing was skipped yet, and how much more each four skipped bytes ask for.
const COMMIT_BASE: usize = 12;
const COMMIT_SLOPE: usize = 2;

/// States kept before a search gives up.
const MAX_STATES: usize = 512;

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

#[derive(Debug, Clone, Copy)]
struct State {
    /// Where skipping led, in tokens from the difference on.
    at: (u16, u16),
    /// Where the agreement from there ended; `at` where there was none.
    end: (u16, u16),
    /// Bytes that agreed on the way.
    agreed: u16,
    cost: u16,
    parent: u16,
    /// The next state of the same cost in the queue.
    next: u16,
    /// Whether the last step skipped a teacher token; skipping then stays on that side, so that each
    /// place is reached in one order only.
    teacher_skipped: bool,
}

/// The best states of a search that found no convincing one.
#[derive(Default, Clone, Copy)]
struct Tried {
    /// From which text agreed.
    agreed: Best,
    /// From which text agreed up to the end of one side.
    ended: Best,
}

/// The state that keeps the most bytes for those that it loses; state 0 for none.
#[derive(Default, Clone, Copy)]
struct Best {
    state: u16,
    score: i32,
}

impl Best {
    fn offer(&mut self, state: &State, agreed: usize, index: u16) {
        let score = 2 * (i32::from(state.agreed) + agreed as i32) - i32::from(state.cost);
        if self.state == 0 || score > self.score {
            *self = Self {
                state: index,
                score,
            };
        }
    }
}

/// Memory of a search, kept from one to the next.
#[derive(Default)]
pub(crate) struct Scratch {
    states: Vec<State>,
    queue: Queue,
    seen: Seen,
    student: Heads,
    teacher: Heads,
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
    match search_near(walk, from, scratch) {
        Ok(outcome) => outcome,
        Err(tried) => search_far(walk, from, scratch, tried),
    }
}

/// The cheapest path among the next tokens; where none is convincing, the best that there was.
fn search_near<S: TokenId, T: TokenId>(
    walk: &Walk<'_, S, T>,
    from: Boundary,
    scratch: &mut Scratch,
) -> Result<Outcome, Tried> {
    let Scratch {
        states,
        queue,
        seen,
        student,
        teacher,
        plan,
        ..
    } = scratch;
    states.clear();
    queue.clear();
    seen.clear();
    student.clear();
    teacher.clear();
    plan.clear();
    let root = State {
        at: (0, 0),
        end: (0, 0),
        agreed: 0,
        cost: 0,
        parent: 0,
        next: NONE,
        teacher_skipped: false,
    };
    states.push(root);
    queue.push(0, 0);
    let mut tried = Tried::default();
    while let Some((cost, index)) = queue.pop(|state| states[state as usize].next) {
        let mut state = states[index as usize];
        if index > 0 {
            let (i, j) = (usize::from(state.at.0), usize::from(state.at.1));
            if !seen.insert(i, j) {
                continue;
            }
            let ruled_out = !walk.has_dummy
                && window::differ(
                    (student, (&walk.student, from.0), i),
                    (teacher, (&walk.teacher, from.1), j),
                );
            if !ruled_out {
                let at = (from.0 + i, from.1 + j);
                let enough = (COMMIT_BASE + cost * COMMIT_SLOPE / 4).min(COMMIT_BYTES);
                let mut probe = Probe {
                    end: at,
                    agreed: 0,
                    enough,
                };
                match walk.run(at, &mut probe) {
                    Stop::BadId => return Ok(Outcome::BadId),
                    Stop::End | Stop::Enough => {
                        make_plan(states, index, from, plan);
                        return Ok(Outcome::Found);
                    }
                    Stop::OneEnds { .. } => tried.ended.offer(&state, probe.agreed, index),
                    Stop::Differ { .. } => {}
                }
                if probe.end != at {
                    tried.agreed.offer(&state, probe.agreed, index);
                    let end = (probe.end.0 - from.0, probe.end.1 - from.1);
                    if !seen.insert(end.0, end.1) {
                        continue;
                    }
                    state.end = (end.0 as u16, end.1 as u16);
                    state.agreed += probe.agreed as u16;
                    state.teacher_skipped = false;
                    states[index as usize] = state;
                }
            }
        }
        if states.len() > MAX_STATES {
            break;
        }
        let (i, j) = state.end;
        let child = State {
            parent: index,
            ..state
        };
        if !state.teacher_skipped
            && let Some(more) = student.cost(&walk.student, from.0, usize::from(i))
        {
            push(
                states,
                queue,
                cost + more,
                State {
                    at: (i + 1, j),
                    ..child
                },
            );
        }
        if let Some(more) = teacher.cost(&walk.teacher, from.1, usize::from(j)) {
            push(
                states,
                queue,
                cost + more,
                State {
                    at: (i, j + 1),
                    teacher_skipped: true,
                    ..child
                },
            );
        }
    }
    Err(tried)
}

fn push(states: &mut Vec<State>, queue: &mut Queue, cost: usize, state: State) {
    if cost < MAX_COST {
        let next = queue.push(cost, states.len() as u16);
        states.push(State {
            end: state.at,
            cost: cost as u16,
            next,
            ..state
        });
    }
}

/// The places to which the path to `index` jumps, the last one first.
fn make_plan(states: &[State], index: u16, from: Boundary, plan: &mut Vec<Boundary>) {
    let place = |(i, j): (u16, u16)| (from.0 + usize::from(i), from.1 + usize::from(j));
    let mut state = states[usize::from(index)];
    plan.push(place(state.at));
    while state.parent > 0 {
        state = states[usize::from(state.parent)];
        // States without agreement are steps within one difference.
        if state.end != state.at {
            plan.push(place(state.at));
        }
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
    let path = |state: u16| scratch.states[usize::from(state)];
    let (agreed, ended) = (path(tried.agreed.state), path(tried.ended.state));
    if tried.agreed.score <= 0 {
        if !scratch.no_anchor && anchor::find(walk, from, scratch) {
            return Outcome::Found;
        }
        // What is left later is part of what is left now: looking once is enough.
        scratch.no_anchor = true;
    }
    let (end, end_bytes) = anchor::common_end(walk, from);
    let keeps_some = 8 * u32::from(agreed.agreed) > u32::from(agreed.cost);
    let state =
        if tried.ended.state > 0 && usize::from(ended.agreed.max(agreed.agreed)) >= end_bytes {
            if ended.agreed >= agreed.agreed {
                tried.ended.state
            } else {
                tried.agreed.state
            }
        } else if keeps_some {
            tried.agreed.state
        } else {
            scratch.plan.push(end);
            return Outcome::Coarse;
        };
    make_plan(&scratch.states, state, from, &mut scratch.plan);
    Outcome::Found
}
