//! P-KL of a stored top-k: KL(teacher || student) over the columns that a row names, and over one
//! more that stands for all others, its tail.
//!
//! With p the student's softmax of a row up to a factor, s = p W, and r the mass of p that W sends to
//! no named column or nowhere, the loss is that of [`super::forward_kl`] over s and r, and
//!
//! `d loss / d logit = p * (share of the token in r * d loss / d r + W (d loss / d s))`.
//!
//! r is a sum of what lies elsewhere and never 1 minus the rest, which would lose a small tail.

use super::forward_kl::{compare, slopes};
use super::real::{Real, largest, total};
use super::rows::{Found, Gradient, Rows, by_tasks, ids, length, task_by_processor};
use super::sparse::Sparse;
use crate::error::{Error, Result};
use crate::parallel::Threads;

/// A teacher token that is no output of W.
const NOWHERE: u32 = u32::MAX;

/// W, and where the teacher's tokens are in it.
pub struct StoredTarget<T> {
    inputs: usize,
    outputs: usize,
    /// The output of each teacher token, or [`NOWHERE`]; the last is that of all ids beyond.
    places: Vec<u32>,
    /// W by output, and by input.
    by_output: Lists<T>,
    by_input: Lists<T>,
    /// Student tokens without a row in W.
    empty: Vec<u32>,
}

/// Weighted indices of each of several.
struct Lists<T> {
    ptr: Vec<u32>,
    index: Vec<u32>,
    weight: Vec<T>,
}

impl<T: Real> Lists<T> {
    #[inline(always)]
    fn range(&self, of: usize) -> std::ops::Range<usize> {
        self.ptr[of] as usize..self.ptr[of + 1] as usize
    }
}

impl<T: Real> StoredTarget<T> {
    /// From W, and the output of each teacher token: -1 for none; of several tokens of one output
    /// the masses are added.
    ///
    /// # Errors
    /// [`Error::Shape`] where the arrays do not fit one another.
    pub fn new(sparse: &Sparse<T>, places: &[i64], empty: &[i64]) -> Result<Self> {
        let (inputs, outputs) = (sparse.inputs(), sparse.outputs());
        let mut found = Vec::with_capacity(places.len() + 1);
        for &place in places {
            found.push(match usize::try_from(place) {
                Err(_) => NOWHERE,
                Ok(place) if place < outputs => place as u32,
                Ok(place) => {
                    return Err(Error::Shape {
                        what: "an output of W".to_owned(),
                        found: place,
                        expected: outputs,
                        remedy: "pass places among the outputs",
                    });
                }
            });
        }
        found.push(NOWHERE);
        let mut by_output = Lists {
            ptr: vec![0],
            index: Vec::new(),
            weight: Vec::new(),
        };
        let mut ptr = vec![0u32; inputs + 1];
        for output in 0..outputs {
            for &(input, weight) in sparse.of_output(output) {
                by_output.index.push(input);
                by_output.weight.push(weight);
                ptr[input as usize + 1] += 1;
            }
            by_output.ptr.push(by_output.index.len() as u32);
        }
        for input in 0..inputs {
            ptr[input + 1] += ptr[input];
        }
        let mut next = ptr.clone();
        let mut by_input = Lists {
            ptr,
            index: vec![0; by_output.index.len()],
            weight: vec![T::ZERO; by_output.index.len()],
        };
        for output in 0..outputs {
            for &(input, weight) in sparse.of_output(output) {
                let at = &mut next[input as usize];
                by_input.index[*at as usize] = output as u32;
                by_input.weight[*at as usize] = weight;
                *at += 1;
            }
        }
        Ok(Self {
            inputs,
            outputs,
            places: found,
            by_output,
            by_input,
            empty: ids("empty", empty, inputs)?,
        })
    }
}

/// The column that stands for all that a row does not name.
#[derive(Clone, Copy)]
pub struct Tail {
    /// What the teacher has there at least, as its mass is 1 less a sum.
    pub least: f64,
    /// A row that names as many outputs leaves none to the tail, and is not computed here.
    pub all: Option<usize>,
}

/// The teacher's stored predictions.
#[derive(Clone, Copy)]
pub struct Stored<'a, T> {
    /// Teacher tokens, as many a row as of `log_probs`.
    pub ids: &'a [i64],
    /// Their log-probabilities; -inf for no entry.
    pub log_probs: Rows<'a, T>,
    /// What the log-probabilities are multiplied with, to be of the loss's temperature.
    pub factor: f64,
}

/// One call: the loss of many rows.
pub struct StoredKl<'a, T> {
    /// W and the columns.
    pub target: &'a StoredTarget<T>,
    /// The student's logits.
    pub student: Rows<'a, T>,
    /// What the teacher says.
    pub teacher: Stored<'a, T>,
    /// What each row's gradient is multiplied with; also by 1 / temperature.
    pub seeds: &'a [T],
    /// Divides the student's logits.
    pub temperature: f64,
    /// The most columns that a row keeps, its likeliest.
    pub top_k: usize,
    /// `None` compares the named columns alone.
    pub tail: Option<Tail>,
    /// Whether [`Found::empty`] is asked for, which takes whole rows.
    pub whole: bool,
}

/// Room for one row.
struct Room<T> {
    student: Vec<T>,
    /// The row that last named each output.
    named: Vec<u32>,
    /// The row that last reached each input.
    reached: Vec<u32>,
    now: u32,
    places: Vec<u32>,
    scaled: Vec<T>,
    teacher: Vec<T>,
    sums: Vec<T>,
    /// Of each named output: where its entries end among the next two.
    ends: Vec<u32>,
    inputs: Vec<u32>,
    /// What each entry brings to its output.
    parts: Vec<T>,
    weights: Vec<T>,
    order: Vec<u32>,
}

impl<T: Real> StoredKl<'_, T> {
    /// Loss and gradient of every row.
    ///
    /// # Arguments
    /// * `gradient`: like the student's logits; `None` for none. Its rows are written, or added to.
    ///
    /// # Errors
    /// As [`super::ForwardKl::run`].
    pub fn run(
        &self,
        gradient: Option<(&mut [T], bool)>,
        threads: &Threads<'_>,
    ) -> Result<Vec<Found>> {
        let count = self.student.index.len();
        let stored = &self.teacher.log_probs;
        self.student
            .check("the student", self.target.inputs, count)?;
        stored.check("the teacher", 0, count)?;
        length("ids", self.teacher.ids.len(), stored.flat.len())?;
        length("seeds", self.seeds.len(), count)?;
        let gradient = gradient
            .map(|(flat, adds)| Gradient::of(flat, adds, &self.student))
            .transpose()?;
        by_tasks(count, threads, |rows| self.task(rows, gradient.as_ref()))
    }

    task_by_processor!(Found);

    #[inline(always)]
    fn task_in(&self, rows: std::ops::Range<usize>, gradient: Option<&Gradient<T>>) -> Vec<Found> {
        let (inputs, outputs) = (self.target.inputs, self.target.outputs);
        let mut room = Room {
            student: vec![T::ZERO; inputs],
            named: vec![0; outputs],
            reached: vec![0; inputs],
            now: 0,
            places: Vec::new(),
            scaled: Vec::new(),
            teacher: Vec::new(),
            sums: Vec::new(),
            ends: Vec::new(),
            inputs: Vec::new(),
            parts: Vec::new(),
            weights: Vec::new(),
            order: Vec::new(),
        };
        let mut found = Vec::with_capacity(rows.len());
        for at in rows {
            // SAFETY: `run` has seen that a row is of no other chunk.
            let written = gradient.map(|gradient| unsafe { gradient.row(&self.student, at) });
            found.push(self.row(at, written, &mut room).unwrap_or(Found::BAD));
        }
        found
    }

    #[inline(always)]
    fn row(
        &self,
        at: usize,
        written: Option<(&mut [T], bool)>,
        room: &mut Room<T>,
    ) -> Option<Found> {
        room.now += 1;
        let mass = self.read_teacher(at, room)?;
        let inverse = T::of(1.0 / self.temperature);
        let row = self.student.row(at, self.target.inputs);
        let whole_rows = self.whole || self.tail.is_some();
        if whole_rows {
            read_whole(row, inverse, room)?;
        }
        // What lies on empty rows is in the tail.
        let on_empty = self.on_empty(room);
        let all = (self.whole && self.tail.is_none()).then(|| total(&room.student));
        self.sum_up(
            if whole_rows {
                None
            } else {
                Some((row, inverse))
            },
            room,
        )?;
        if self.tail.is_some() {
            self.leave_rest(room);
        }
        let (loss, kept, whole) = compare(&room.sums, &room.teacher, &room.scaled)?;
        let mut found = Found {
            loss,
            mass,
            empty: if self.whole {
                on_empty / all.unwrap_or(whole)
            } else {
                0.0
            },
            sum: 0.0,
            log_total: f64::NAN,
            good: true,
        };
        if let Some((row, adds)) = written {
            slopes(&mut room.sums, &room.teacher, kept, whole);
            found.sum = self.write(row, adds, self.seeds[at] * inverse, room);
        }
        Some(found)
    }

    /// The outputs that the row names and the teacher's numbers there, less the largest, with
    /// those of the tail as the last; returns its mass on them.
    #[inline(always)]
    fn read_teacher(&self, at: usize, room: &mut Room<T>) -> Option<f64> {
        let width = self.teacher.log_probs.width;
        let logs = self.teacher.log_probs.row(at, width);
        let start = self.teacher.log_probs.index[at] as usize * width;
        let factor = T::of(self.teacher.factor);
        room.places.resize(width, 0);
        room.scaled.resize(width, T::ZERO);
        let mut count = 0;
        let last = self.target.places.len() - 1;
        let ids = &self.teacher.ids[start..start + width];
        // Without a branch, as nobody can foresee which ids W reaches.
        for at in 0..width {
            // A negative id is beyond all others.
            let place = self.target.places[(ids[at] as u64).min(last as u64) as usize];
            room.places[count] = place;
            room.scaled[count] = logs[at] * factor;
            count += usize::from((place != NOWHERE) & (logs[at] != T::NOTHING));
        }
        room.places.truncate(count);
        room.scaled.truncate(count);
        let mut merged = false;
        for &place in &room.places {
            let row = &mut room.named[place as usize];
            merged |= *row == room.now;
            *row = room.now;
        }
        if merged {
            merge(&mut room.places, &mut room.scaled);
        }
        if room.places.len() > self.top_k {
            self.keep_best(room);
        }
        let mut top = largest(&room.scaled);
        let power = 1.0 / self.teacher.factor;
        let mut mass = 0.0;
        if !room.places.is_empty() {
            exponentials(&room.scaled, top, &mut room.teacher);
            mass = total(&room.teacher) * top.wide().exp();
            if self.teacher.factor != 1.0 {
                mass = room.scaled.iter().map(|d| (d.wide() * power).exp()).sum();
            }
        }
        if let Some(tail) = self.tail {
            if tail.all.is_some_and(|all| room.places.len() >= all) {
                return None;
            }
            let left = 1.0 - mass;
            // What is no number stays one.
            let left = if left < tail.least { tail.least } else { left };
            let log_left = T::of(left.ln());
            room.scaled.push(log_left);
            top = if log_left > top { log_left } else { top };
        }
        exponentials(&room.scaled, top, &mut room.teacher);
        for value in &mut room.scaled {
            *value = *value - top;
        }
        mass.is_finite().then_some(mass)
    }

    /// Keeps the likeliest outputs alone; of equal ones the first.
    #[cold]
    fn keep_best(&self, room: &mut Room<T>) {
        let Room { order, scaled, .. } = room;
        order.clear();
        order.extend(0..scaled.len() as u32);
        let falling = |&a: &u32, &b: &u32| {
            scaled[b as usize]
                .partial_cmp(&scaled[a as usize])
                .unwrap_or(std::cmp::Ordering::Equal)
                .then(a.cmp(&b))
        };
        if self.top_k > 0 {
            order.select_nth_unstable_by(self.top_k - 1, falling);
        }
        for &dropped in &order[self.top_k..] {
            room.named[room.places[dropped as usize] as usize] = 0;
        }
        order.truncate(self.top_k);
        order.sort_unstable();
        for (to, &from) in order.iter().enumerate() {
            room.places[to] = room.places[from as usize];
            room.scaled[to] = room.scaled[from as usize];
        }
        room.places.truncate(self.top_k);
        room.scaled.truncate(self.top_k);
    }

    /// The student's mass on the named outputs, from whole rows that were read, or from what is
    /// read of `(row, inverse)` alone.
    #[inline(always)]
    fn sum_up(&self, narrow: Option<(&[T], T)>, room: &mut Room<T>) -> Option<()> {
        let lists = &self.target.by_output;
        room.sums.clear();
        room.ends.clear();
        room.inputs.clear();
        room.weights.clear();
        for &place in &room.places {
            let range = lists.range(place as usize);
            if range.len() == 1 {
                room.inputs.push(lists.index[range.start]);
                room.weights.push(lists.weight[range.start]);
            } else {
                room.inputs.extend_from_slice(&lists.index[range.clone()]);
                room.weights.extend_from_slice(&lists.weight[range]);
            }
            room.ends.push(room.inputs.len() as u32);
        }
        room.parts.resize(room.inputs.len(), T::ZERO);
        let from = narrow.map_or(&room.student[..], |(row, _)| row);
        for (part, &input) in room.parts.iter_mut().zip(&room.inputs) {
            *part = from[input as usize];
        }
        if let Some((_, inverse)) = narrow {
            let top = largest(&room.parts);
            if !top.wide().is_finite() {
                return None;
            }
            for value in &mut room.parts {
                *value = ((*value - top) * inverse).exp();
            }
        }
        for (part, &weight) in room.parts.iter_mut().zip(&room.weights) {
            *part = *part * weight;
        }
        let mut start = 0;
        for &end in &room.ends {
            let mut sum = T::ZERO;
            for &part in &room.parts[start..end as usize] {
                sum += part;
            }
            room.sums.push(sum);
            start = end as usize;
        }
        Some(())
    }

    /// The student's mass on tokens without a row in W, up to its factor.
    #[inline(always)]
    fn on_empty(&self, room: &Room<T>) -> f64 {
        let mut sum = 0.0;
        if self.whole {
            for &token in &self.target.empty {
                sum += room.student[token as usize].wide();
            }
        }
        sum
    }

    /// Leaves of the student's masses what belongs to the tail, and puts their sum last.
    #[inline(always)]
    fn leave_rest(&self, room: &mut Room<T>) {
        let lists = &self.target.by_input;
        for &input in &room.inputs {
            let range = lists.range(input as usize);
            let input = input as usize;
            if range.len() == 1 {
                room.student[input] = T::ZERO;
                continue;
            }
            if room.reached[input] == room.now {
                continue;
            }
            room.reached[input] = room.now;
            let mut share = T::ZERO;
            for at in range {
                if room.named[lists.index[at] as usize] != room.now {
                    share += lists.weight[at];
                }
            }
            room.student[input] = room.student[input] * share;
        }
        room.sums.push(T::of(total(&room.student)));
    }

    /// The gradient, from that by `sums`; returns a sum that is finite where all of it is: a
    /// student's mass is at most 1.
    #[inline(always)]
    fn write(&self, row: &mut [T], adds: bool, seed: T, room: &Room<T>) -> f64 {
        match self.tail {
            None if adds => {}
            None => row.fill(T::ZERO),
            Some(_) => {
                let slope = room.sums[room.places.len()] * seed;
                let (own, padding) = row.split_at_mut(room.student.len());
                if adds {
                    for (value, &p) in own.iter_mut().zip(&room.student) {
                        *value += p * slope;
                    }
                } else {
                    for (value, &p) in own.iter_mut().zip(&room.student) {
                        *value = p * slope;
                    }
                    padding.fill(T::ZERO);
                }
            }
        }
        let mut start = 0;
        for (&end, &slope) in room.ends.iter().zip(&room.sums) {
            let (slope, end) = (slope * seed, end as usize);
            for (&input, &part) in room.inputs[start..end].iter().zip(&room.parts[start..end]) {
                row[input as usize] += part * slope;
            }
            start = end;
        }
        total(&room.sums) * seed.wide()
    }
}

/// exp of a row less its largest; `None` where that is no number.
#[inline(always)]
fn read_whole<T: Real>(row: &[T], inverse: T, room: &mut Room<T>) -> Option<()> {
    let top = largest(row);
    if !top.wide().is_finite() {
        return None;
    }
    for (value, &logit) in room.student.iter_mut().zip(row) {
        *value = ((logit - top) * inverse).exp();
    }
    Some(())
}

#[inline(always)]
fn exponentials<T: Real>(logs: &[T], top: T, to: &mut Vec<T>) {
    to.clear();
    to.resize(logs.len(), T::ZERO);
    for (value, &log) in to.iter_mut().zip(logs) {
        *value = (log - top).exp();
    }
}

/// Adds what stands at one place together, where it stands first.
#[cold]
fn merge<T: Real>(places: &mut Vec<u32>, scaled: &mut Vec<T>) {
    let mut count = 0;
    for at in 0..places.len() {
        let (place, log) = (places[at], scaled[at]);
        if let Some(first) = places[..count].iter().position(|&other| other == place) {
            let (one, other) = (scaled[first].wide(), log.wide());
            let (high, low) = if one > other {
                (one, other)
            } else {
                (other, one)
            };
            scaled[first] = T::of(high + (low - high).exp().ln_1p());
        } else {
            (places[count], scaled[count]) = (place, log);
            count += 1;
        }
    }
    places.truncate(count);
    scaled.truncate(count);
}
