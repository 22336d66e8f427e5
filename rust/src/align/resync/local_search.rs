//! The cheapest path over the next tokens, through as many differences as it takes.
//!
//! A path leads from the difference, and from each place where text that agreed ends, to places
//! whose first bytes agree. They are found by bits, a row for each token of the first side, in
//! squares that double.

use super::bitset::{Columns, Tried, bits_below};
use super::bucket_queue::{BucketQueue, MAX_COST};
use super::token_window::{Frame, Place, TokenWindow};
use super::{Memory, Outcome, Probe, enough};
use crate::align::output::Boundary;
use crate::align::side::TokenId;
use crate::align::walk::Stop;

/// Steps after which a search gives up.
const MAX_STEPS: usize = 1024;

/// Tokens of either side after an origin that are looked at together first.
const FIRST_SQUARE: usize = 8;

/// Agreement over this many tokens, most of them without text, ends a search as well.
const MAX_TOKENS: usize = 4096;

/// A place where agreement ends, or the difference itself: paths lead on from here.
#[derive(Debug, Clone, Copy)]
struct Origin {
    at: (u8, u8),
    /// Where the agreement began, and the origin from which it was reached.
    jump: (u8, u8),
    parent: u16,
    /// Bytes that agreed on the way.
    agreed: u16,
    cost: u16,
}

/// What a search does next.
#[derive(Debug, Clone, Copy)]
struct Step {
    origin: u16,
    target: Target,
    cost: u16,
    /// The next step with the same key in the queue.
    next: u16,
}

#[derive(Debug, Clone, Copy)]
enum Target {
    /// Tries a place.
    Place(u8, u8),
    /// Looks for places so many tokens and more after the origin.
    Beyond(u8),
}

/// A place that may be the answer where none is convincing.
#[derive(Clone, Copy)]
pub(super) struct Best {
    origin: u16,
    at: Place,
    pub(super) agreed: usize,
    pub(super) cost: usize,
}

impl Best {
    /// Bytes kept on both sides less those lost.
    pub(super) fn score(self) -> isize {
        2 * self.agreed as isize - self.cost as isize
    }

    fn offer(best: &mut Option<Self>, other: Self) {
        if best.is_none_or(|best| other.score() > best.score()) {
            *best = Some(other);
        }
    }
}

/// The best places of a search that found no convincing one.
#[derive(Default, Clone, Copy)]
pub(super) struct Candidates {
    /// From which text agreed.
    pub(super) agreed: Option<Best>,
    /// From which text agreed up to the end of one side.
    pub(super) ended: Option<Best>,
}

/// The state of a search, kept for its memory.
#[derive(Default)]
pub(super) struct LocalSearch {
    origins: Vec<Origin>,
    steps: Vec<Step>,
    queue: BucketQueue,
    tried: Tried,
    columns: Columns,
}

impl LocalSearch {
    fn push(&mut self, origin: u16, target: Target, cost: usize) {
        if cost < MAX_COST {
            let next = self.queue.push(cost, self.steps.len() as u16);
            self.steps.push(Step {
                origin,
                target,
                cost: cost as u16,
                next,
            });
        }
    }

    fn start(&mut self) {
        self.origins.clear();
        self.steps.clear();
        self.queue.clear();
        self.tried.clear();
        self.tried.insert((0, 0));
        self.origins.push(Origin {
            at: (0, 0),
            jump: (0, 0),
            parent: 0,
            agreed: 0,
            cost: 0,
        });
    }

    /// Lines up the places that may agree among the next tokens after an origin: those of a square
    /// that lie outside the square of the first `seen` tokens.
    #[inline]
    fn look<S: TokenId, T: TokenId>(
        &mut self,
        index: u16,
        seen: usize,
        frame: &Frame<'_, '_, S, T>,
        window: &mut TokenWindow,
    ) {
        let origin = self.origins[usize::from(index)];
        let (top, left) = (usize::from(origin.at.0), usize::from(origin.at.1));
        let size = if seen == 0 { FIRST_SQUARE } else { 2 * seen };
        let (bottom, right) = (top + size, left + size);
        window.first.read_to(frame, bottom);
        self.columns.reach(frame, window, right);
        let window = &*window;
        let (first, second) = (&window.first, &window.second);
        let cost_at = |row: usize, column: usize| {
            usize::from(origin.cost) + first.cost(row) - first.cost(top) + second.cost(column)
                - second.cost(left)
        };
        let columns = bits_below(right.min(second.read()));
        for row in top..bottom.min(first.read()) {
            if cost_at(row, left) >= MAX_COST {
                break;
            }
            let from = if row < top + seen { left + seen } else { left };
            let alike = self.columns.like(frame, row, first.get(row));
            let mut alike = alike & columns & !bits_below(from) & !self.tried.row(row);
            while alike != 0 {
                let column = alike.trailing_zeros() as usize;
                alike &= alike - 1;
                if !window.rules_out(frame, (row, column)) {
                    let target = Target::Place(row as u8, column as u8);
                    self.push(index, target, cost_at(row, column));
                }
            }
        }
        // Where one side ends, one place is as good as another.
        let row_end = first.end_in(top + seen..bottom);
        let column_end = second.end_in(left + seen..right);
        let both_end = row_end
            .and(second.end_in(left..right))
            .or(column_end.and(first.end_in(top..bottom)));
        let ends = [
            row_end.map(|row| (row, left)),
            column_end.map(|column| (top, column)),
            both_end.map(|_| (first.read(), second.read())),
        ];
        for (row, column) in ends.into_iter().flatten() {
            let target = Target::Place(row as u8, column as u8);
            self.push(index, target, cost_at(row, column));
        }
        let rows_left = (first.read() >= bottom).then(|| cost_at(bottom, left));
        let columns_left = (second.read() >= right).then(|| cost_at(top, right));
        let cost = match (rows_left, columns_left) {
            (Some(rows), Some(columns)) => rows.min(columns),
            (rows, columns) => match rows.or(columns) {
                Some(cost) => cost,
                None => return,
            },
        };
        self.push(index, Target::Beyond(size as u8), cost);
    }

    /// Whether a place is reached as cheaply from another origin.
    fn is_covered(&self, at: Place, cost: usize, window: &TokenWindow) -> bool {
        self.origins.iter().any(|origin| {
            let (row, column) = (usize::from(origin.at.0), usize::from(origin.at.1));
            row <= at.0
                && column <= at.1
                && usize::from(origin.cost) + window.first.cost(at.0) + window.second.cost(at.1)
                    <= cost + window.first.cost(row) + window.second.cost(column)
        })
    }

    /// The places to which the path to `best` jumps, the last one first.
    pub(super) fn plan<S: TokenId, T: TokenId>(
        &self,
        best: Best,
        frame: &Frame<'_, '_, S, T>,
        plan: &mut Vec<Boundary>,
    ) {
        plan.push(frame.boundary(best.at));
        let mut at = best.origin;
        while at > 0 {
            let origin = self.origins[usize::from(at)];
            let jump = (usize::from(origin.jump.0), usize::from(origin.jump.1));
            plan.push(frame.boundary(jump));
            at = origin.parent;
        }
    }
}

/// The cheapest path that is convincing; where none is, the best that there was.
pub(super) fn search<S: TokenId, T: TokenId>(
    frame: &Frame<'_, '_, S, T>,
    memory: &mut Memory,
) -> Result<Outcome, Candidates> {
    let Memory {
        local: states,
        window,
        plan,
        ..
    } = memory;
    states.start();
    states.look(0, 0, frame, window);
    let mut candidates = Candidates::default();
    while let Some(index) = states
        .queue
        .pop(|step| states.steps[usize::from(step)].next)
    {
        let step = states.steps[usize::from(index)];
        let at = match step.target {
            Target::Place(row, column) => (usize::from(row), usize::from(column)),
            Target::Beyond(seen) => {
                states.look(step.origin, usize::from(seen), frame, window);
                continue;
            }
        };
        if states.tried.insert(at) {
            let cost = usize::from(step.cost);
            let agreed = usize::from(states.origins[usize::from(step.origin)].agreed);
            let start = frame.boundary(at);
            let mut probe = Probe {
                end: start,
                agreed: 0,
                enough: enough(cost),
            };
            let stop = frame.walk.advance(start, &mut probe);
            let end = frame.place(probe.end);
            let is_long = end.0.max(end.1) >= MAX_TOKENS;
            let best = Best {
                origin: step.origin,
                at,
                agreed: agreed + probe.agreed,
                cost,
            };
            match stop {
                Stop::BadId => return Ok(Outcome::BadId),
                Stop::OneEnds { .. } => Best::offer(&mut candidates.ended, best),
                Stop::Differ { .. } if !is_long => {}
                Stop::End | Stop::Enough | Stop::Differ { .. } => {
                    states.plan(best, frame, plan);
                    return Ok(Outcome::Found);
                }
            }
            if end != at && !is_long {
                Best::offer(&mut candidates.agreed, best);
                window.first.read_to(frame, end.0);
                states.columns.reach(frame, window, end.1);
                let is_near = end.0 <= window.first.read() && end.1 <= window.second.read();
                if is_near && !states.is_covered(end, cost, window) {
                    states.tried.insert(end);
                    states.origins.push(Origin {
                        at: (end.0 as u8, end.1 as u8),
                        jump: (at.0 as u8, at.1 as u8),
                        parent: step.origin,
                        agreed: best.agreed as u16,
                        cost: step.cost,
                    });
                    states.look((states.origins.len() - 1) as u16, 0, frame, window);
                }
            }
        }
        if states.steps.len() > MAX_STEPS {
            break;
        }
    }
    Err(candidates)
}

impl LocalSearch {
    /// Forgets the difference before, whose tokens `window` holds.
    pub(super) fn leave(&mut self, window: &TokenWindow) {
        self.columns.clear(window);
    }
}
