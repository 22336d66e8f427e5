//! The cheapest path over the next tokens, through as many differences as it takes.

use super::window::{MAX_COST, NONE, Queue, Seen, Window};
use super::{Outcome, Probe, Scratch, enough};
use crate::align::output::Boundary;
use crate::align::side::TokenId;
use crate::align::walk::{Stop, Walk};

/// States kept before a search gives up.
const MAX_STATES: usize = 1024;

/// Agreement over this many tokens, most of them without text, ends a search as well.
const MAX_TOKENS: usize = 4096;

#[derive(Debug, Clone, Copy)]
struct State {
    /// Tokens from the difference on.
    at: (u16, u16),
    /// Bytes that agreed on the way.
    agreed: u16,
    cost: u16,
    parent: u16,
    /// The next state of the same cost in the queue.
    next: u16,
    step: Step,
}

/// How a state was reached from its parent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    /// By skipping a student token.
    Student,
    /// By skipping a teacher token; only such skips follow, so that each place is reached in one
    /// order only.
    Teacher,
    /// By agreement.
    Agreement,
}

/// A state that may be the answer where none is convincing.
#[derive(Default, Clone, Copy)]
pub(super) struct Best {
    state: u16,
    pub(super) agreed: u16,
    pub(super) cost: u16,
}

impl Best {
    pub(super) fn is_state(self) -> bool {
        self.state > 0
    }

    /// Bytes kept on both sides less those lost.
    pub(super) fn score(self) -> i32 {
        2 * i32::from(self.agreed) - i32::from(self.cost)
    }

    fn offer(&mut self, state: &State, agreed: usize, index: u16) {
        let other = Self {
            state: index,
            agreed: state.agreed + agreed as u16,
            cost: state.cost,
        };
        if self.state == 0 || other.score() > self.score() {
            *self = other;
        }
    }
}

/// The best states of a search that found no convincing one.
#[derive(Default, Clone, Copy)]
pub(super) struct Tried {
    /// From which text agreed.
    pub(super) agreed: Best,
    /// From which text agreed up to the end of one side.
    pub(super) ended: Best,
}

/// The states of a search, kept for their memory.
#[derive(Default)]
pub(super) struct States {
    states: Vec<State>,
    queue: Queue,
    seen: Seen,
}

impl States {
    fn start(&mut self) {
        self.states.clear();
        self.queue.clear();
        self.seen.clear();
        let root = State {
            at: (0, 0),
            agreed: 0,
            cost: 0,
            parent: 0,
            next: NONE,
            step: Step::Agreement,
        };
        self.states.push(root);
    }

    fn skip(&mut self, cost: usize, state: State) {
        if cost < MAX_COST {
            let next = self.queue.push(cost, self.states.len() as u16);
            self.states.push(State {
                cost: cost as u16,
                next,
                ..state
            });
        }
    }

    /// Adds the states one skip away from the state `index`.
    fn expand<S: TokenId, T: TokenId>(
        &mut self,
        index: u16,
        walk: &Walk<'_, S, T>,
        from: Boundary,
        window: &mut Window,
    ) {
        let state = self.states[usize::from(index)];
        let (i, j) = state.at;
        let child = State {
            parent: index,
            ..state
        };
        if state.step != Step::Teacher
            && let Some(more) = window.student.cost(&walk.student, from.0, usize::from(i))
        {
            let cost = usize::from(state.cost) + more;
            self.skip(
                cost,
                State {
                    at: (i + 1, j),
                    step: Step::Student,
                    ..child
                },
            );
        }
        if let Some(more) = window.teacher.cost(&walk.teacher, from.1, usize::from(j)) {
            let cost = usize::from(state.cost) + more;
            self.skip(
                cost,
                State {
                    at: (i, j + 1),
                    step: Step::Teacher,
                    ..child
                },
            );
        }
    }

    /// The places to which the path to a state jumps, the last one first.
    pub(super) fn plan(&self, best: Best, from: Boundary, plan: &mut Vec<Boundary>) {
        let mut state = self.states[usize::from(best.state)];
        let mut skipped = false;
        loop {
            // Skips in a row are one difference; the last of them says where it ends.
            if state.step == Step::Agreement {
                skipped = false;
            } else if !skipped {
                plan.push((
                    from.0 + usize::from(state.at.0),
                    from.1 + usize::from(state.at.1),
                ));
                skipped = true;
            }
            if state.parent == 0 {
                return;
            }
            state = self.states[usize::from(state.parent)];
        }
    }
}

/// The cheapest path that is convincing; where none is, the best that there was.
pub(super) fn search<S: TokenId, T: TokenId>(
    walk: &Walk<'_, S, T>,
    from: Boundary,
    scratch: &mut Scratch,
) -> Result<Outcome, Tried> {
    let Scratch {
        near: states,
        window,
        plan,
        ..
    } = scratch;
    states.start();
    states.expand(0, walk, from, window);
    let mut tried = Tried::default();
    while let Some(index) = states
        .queue
        .pop(|state| states.states[usize::from(state)].next)
    {
        let state = states.states[usize::from(index)];
        let (i, j) = (usize::from(state.at.0), usize::from(state.at.1));
        if !states.seen.insert(i, j) {
            continue;
        }
        let at = (from.0 + i, from.1 + j);
        if !window.rules_out(walk, from, (i, j)) {
            let cost = usize::from(state.cost);
            let mut probe = Probe {
                end: at,
                agreed: 0,
                enough: enough(cost),
            };
            let stop = walk.run(at, &mut probe);
            let tokens = (probe.end.0 - from.0).max(probe.end.1 - from.1);
            match stop {
                Stop::BadId => return Ok(Outcome::BadId),
                Stop::OneEnds { .. } => tried.ended.offer(&state, probe.agreed, index),
                Stop::Differ { .. } if tokens < MAX_TOKENS => {}
                Stop::End | Stop::Enough | Stop::Differ { .. } => {
                    let best = Best {
                        state: index,
                        agreed: state.agreed,
                        cost: state.cost,
                    };
                    states.plan(best, from, plan);
                    return Ok(Outcome::Found);
                }
            }
            if probe.end != at && tokens < MAX_TOKENS {
                tried.agreed.offer(&state, probe.agreed, index);
                let end = (probe.end.0 - from.0, probe.end.1 - from.1);
                if states.seen.insert(end.0, end.1) {
                    let agreed = state.agreed + probe.agreed as u16;
                    let at = (end.0 as u16, end.1 as u16);
                    let (parent, step) = (index, Step::Agreement);
                    let after = State {
                        at,
                        agreed,
                        parent,
                        step,
                        ..state
                    };
                    states.states.push(after);
                    states.expand((states.states.len() - 1) as u16, walk, from, window);
                }
            }
        }
        if states.states.len() > MAX_STATES {
            break;
        }
        // Also without the agreement, which may be worth less than what it stands in the way of.
        states.expand(index, walk, from, window);
    }
    Err(tried)
}
