//! Prefix KL below the roots: KL(teacher || student) over the ways to go on from nodes of a trie.
//!
//! An item is one node that a chunk reaches. Its slots are its children, and END where tokens end
//! there. One model has the tokens below and sums them up by slot; the other says the next piece,
//! with all that is no child in END. With q the teacher's probability of a slot, m the student's
//! mass up to a factor and M the sum of m,
//!
//! `loss = sum q (log q - log m) + log M`, `d loss / d m = 1/M - q/m`.
//!
//! The formula is that of `prefix_kl/closed_form.py`; which slots count is that of its `targets.py`.

use super::forward_kl::{compare, slopes};
use super::real::{Real, exponentials, largest, top_and_sum, total};
use super::rows::{Gradient, Rows, by_tasks, length, task_by_processor};
use super::stored_kl::Stored;
use crate::error::{Error, Result};
use crate::parallel::Threads;
use crate::trie::PieceTrie;

/// Where less than this is left, 1 less a sum has lost its digits in single precision.
const FAINT_REST: f64 = 1e-3;

/// What the teacher says at each item's row.
#[derive(Clone, Copy)]
pub enum Teacher<'a, T> {
    /// Logits, and the log of each item's softmax denominator by temperature, NaN where unknown.
    Full(Rows<'a, T>, Option<&'a [f64]>),
    /// Log-probabilities of some ids at the loss's temperature; the factor is not read.
    Stored(Stored<'a, T>),
}

/// One call: the divergences at many nodes.
pub struct Below<'a, T> {
    /// Of the side that has several tokens in a chunk.
    pub trie: &'a PieceTrie,
    /// Whether the teacher has the tokens below, and the student says the next piece.
    pub mirrored: bool,
    /// The range of each chunk's items, one more than there are chunks.
    pub ptr: &'a [i64],
    /// The node of each item.
    pub nodes: &'a [i64],
    /// The student's logits, a row for each item. What two chunks share in the same call, no thread
    /// could write.
    pub student: Rows<'a, T>,
    /// A row for each item.
    pub teacher: Teacher<'a, T>,
    /// Sizes of the vocabularies, student and teacher.
    pub sizes: (usize, usize),
    /// What each item's gradient is multiplied with; also by 1 / temperature.
    pub seeds: &'a [T],
    /// Divides the logits of both sides.
    pub temperature: f64,
    /// Items at which the teacher has less on the children, and where nothing ends, are left out.
    pub min_mass: f64,
    /// Whether END is a slot.
    pub end: bool,
}

/// What is found of each item.
#[derive(Clone, Copy)]
pub struct FoundBelow {
    /// In nats; 0 where it is not compared.
    pub loss: f64,
    /// Whether it is compared.
    pub counted: bool,
    /// The teacher's known mass, 1 of logits.
    pub known: f64,
    /// The sum of what was added to the gradient: finite where all of it is.
    pub sum: f64,
    /// As [`super::Found::good`].
    pub good: bool,
}

impl FoundBelow {
    const BAD: Self = Self {
        loss: 0.0,
        counted: false,
        known: 0.0,
        sum: 0.0,
        good: false,
    };
}

/// Room for one item. Its slots are END, where a token ends, and then its children.
struct Room<T> {
    /// The piece of each slot, [`NONE`] of END.
    pieces: Vec<u32>,
    /// Where each slot's tokens end among those below.
    ends: Vec<u32>,
    /// The compared slot that each counts in: its own, END's, or [`NONE`].
    counts_in: Vec<u32>,
    /// Of the compared slots: the teacher's log-mass less the largest, its exponential, the
    /// student's mass, of which the gradient takes the place, and the mass again.
    scaled: Vec<T>,
    teacher: Vec<T>,
    sums: Vec<T>,
    masses: Vec<T>,
    /// Of the tokens below, or of whole rows.
    values: Vec<T>,
    stored: StoredRow<T>,
}

const NONE: u32 = u32::MAX;

/// A stored row, and where its ids are.
struct StoredRow<T> {
    row: Option<i64>,
    /// The reading that last found each id, and its place there.
    marks: Vec<(u32, u32)>,
    now: u32,
    logs: Vec<T>,
    /// 0 for no entry.
    probs: Vec<T>,
}

impl<T: Real> StoredRow<T> {
    #[inline(always)]
    fn read(&mut self, stored: &Stored<'_, T>, at: usize, size: usize) {
        let row = stored.log_probs.index[at];
        if self.row == Some(row) {
            return;
        }
        self.row = Some(row);
        self.now += 1;
        let width = stored.log_probs.width;
        let logs = stored.log_probs.row(at, width);
        let ids = &stored.ids[row as usize * width..][..width];
        self.logs.clear();
        self.logs.extend_from_slice(logs);
        self.probs.clear();
        self.probs.resize(width, T::ZERO);
        for (place, &id) in ids.iter().enumerate() {
            match usize::try_from(id) {
                Ok(id) if id < size && logs[place] != T::NOTHING => {
                    self.marks[id] = (self.now, place as u32);
                }
                _ => self.logs[place] = T::NOTHING,
            }
        }
        for (prob, &log) in self.probs.iter_mut().zip(&self.logs) {
            *prob = log.exp();
        }
    }

    #[inline(always)]
    fn place(&self, id: u32) -> Option<usize> {
        let (row, place) = self.marks[id as usize];
        (row == self.now).then_some(place as usize)
    }
}

impl<T: Real> Below<'_, T> {
    /// The divergence at every item.
    ///
    /// # Arguments
    /// * `gradient`: like the student's logits; `None` for none. It is added to.
    ///
    /// # Errors
    /// [`Error::Shape`] where the arrays do not fit, [`Error::Option`] where two chunks have the
    /// same row of the student and its gradient is wanted, [`Error::Interrupted`].
    pub fn run(
        &self,
        gradient: Option<&mut [T]>,
        threads: &Threads<'_>,
    ) -> Result<Vec<FoundBelow>> {
        let count = self.nodes.len();
        self.check(count)?;
        let mut chunk_of = vec![0; count];
        for chunk in 0..self.chunks() {
            chunk_of[self.items(chunk)].fill(chunk);
        }
        let gradient = gradient
            .map(|flat| Gradient::by_owner(flat, true, &self.student, |at| chunk_of[at]))
            .transpose()?;
        by_tasks(self.chunks(), threads, |chunks| {
            self.task(chunks, gradient.as_ref())
        })
    }

    fn check(&self, count: usize) -> Result<()> {
        let (tokens, pieces) = if self.mirrored {
            (self.sizes.1, self.sizes.0)
        } else {
            self.sizes
        };
        let sorted = self.trie.token_pieces().indptr.len().saturating_sub(1);
        length("tokens of the trie", sorted, tokens)?;
        length("pieces of the trie", self.trie.piece_count(), pieces)?;
        self.student.check("the student", self.sizes.0, count)?;
        match &self.teacher {
            Teacher::Full(rows, totals) => {
                rows.check("the teacher", self.sizes.1, count)?;
                length("log_totals", totals.map_or(count, <[f64]>::len), count)?;
            }
            Teacher::Stored(stored) => {
                stored.log_probs.check("the teacher", 0, count)?;
                length("ids", stored.ids.len(), stored.log_probs.flat.len())?;
            }
        }
        length("seeds", self.seeds.len(), count)?;
        let inside = |&node: &i64| usize::try_from(node).is_ok_and(|node| node < self.trie.len());
        let rising = self.ptr.first() == Some(&0)
            && self.ptr.is_sorted()
            && self.ptr.last() == i64::try_from(count).ok().as_ref();
        if rising && self.nodes.iter().all(inside) {
            return Ok(());
        }
        Err(Error::Format {
            what: "the nodes of a batch",
            reason: "they are not those of the trie, or not cut into chunks".to_owned(),
            remedy: "pass what the trie's lookup found of this batch",
        })
    }

    fn chunks(&self) -> usize {
        self.ptr.len().saturating_sub(1)
    }

    fn items(&self, chunk: usize) -> std::ops::Range<usize> {
        self.ptr[chunk] as usize..self.ptr[chunk + 1] as usize
    }

    task_by_processor!(FoundBelow);

    #[inline(always)]
    fn task_in(
        &self,
        chunks: std::ops::Range<usize>,
        gradient: Option<&Gradient<T>>,
    ) -> Vec<FoundBelow> {
        let stored = matches!(self.teacher, Teacher::Stored(_));
        let mut room = Room {
            pieces: Vec::new(),
            ends: Vec::new(),
            counts_in: Vec::new(),
            scaled: Vec::new(),
            teacher: Vec::new(),
            sums: Vec::new(),
            masses: Vec::new(),
            values: Vec::new(),
            stored: StoredRow {
                row: None,
                marks: vec![(0, 0); if stored { self.sizes.1 } else { 0 }],
                now: 0,
                logs: Vec::new(),
                probs: Vec::new(),
            },
        };
        let items = self.ptr[chunks.start] as usize..self.ptr[chunks.end] as usize;
        let mut found = Vec::with_capacity(items.len());
        for at in items {
            // SAFETY: `run` has seen that a row is of no other chunk, and a chunk is of one task.
            let written = gradient.map(|gradient| unsafe { gradient.row(&self.student, at).0 });
            found.push(self.item(at, written, &mut room).unwrap_or(FoundBelow::BAD));
        }
        found
    }

    /// `None` where it needs log space.
    #[inline(always)]
    fn item(&self, at: usize, written: Option<&mut [T]>, room: &mut Room<T>) -> Option<FoundBelow> {
        let node = self.nodes[at] as u32;
        self.lay_out(node, room);
        let (counted, known) = if self.mirrored {
            self.teacher_below(at, node, room)?
        } else {
            self.teacher_next(at, room)
        };
        let mut found = FoundBelow {
            loss: 0.0,
            counted: false,
            known,
            sum: 0.0,
            good: true,
        };
        let top = largest(&room.scaled);
        if !counted || top == T::NOTHING {
            return Some(found);
        }
        if !top.wide().is_finite() {
            return None;
        }
        room.teacher.clear();
        for value in &mut room.scaled {
            *value = *value - top;
            room.teacher.push(value.exp());
        }
        let inverse = T::of(1.0 / self.temperature);
        let row = self.student.row(at, self.sizes.0);
        if self.mirrored {
            student_next(row, inverse, room)?;
        } else {
            student_below(row, self.trie.below(node), inverse, room)?;
        }
        let (loss, kept, whole) = compare(&room.sums, &room.teacher, &room.scaled)?;
        (found.loss, found.counted) = (loss, true);
        if let Some(written) = written {
            let seed = self.seeds[at] * inverse;
            room.masses.clone_from(&room.sums);
            slopes(&mut room.sums, &room.teacher, kept, whole);
            for slope in &mut room.sums {
                *slope = *slope * seed;
            }
            if self.mirrored {
                write_next(written, room);
            } else {
                write_below(written, self.trie.below(node), room);
            }
            // A student's mass is at most 1 in the scale of its row.
            found.sum = total(&room.sums);
        }
        Some(found)
    }

    /// The slots of a node; all are compared, but END where it is none.
    #[inline(always)]
    fn lay_out(&self, node: u32, room: &mut Room<T>) {
        room.pieces.clear();
        room.ends.clear();
        room.counts_in.clear();
        let ending = self.trie.end_count(node);
        let mut end = ending as u32;
        if ending > 0 {
            room.pieces.push(NONE);
            room.ends.push(end);
            room.counts_in.push(if self.end { 0 } else { NONE });
        }
        let first = u32::from(ending > 0 && self.end);
        for (place, (piece, child)) in (first..).zip(self.trie.children(node)) {
            end += self.trie.below(child).len() as u32;
            room.pieces.push(piece);
            room.ends.push(end);
            room.counts_in.push(place);
        }
    }

    /// The teacher's next piece after the prefix: whether the item counts, and its known mass.
    #[inline(always)]
    fn teacher_next(&self, at: usize, room: &mut Room<T>) -> (bool, f64) {
        let has_end = room.pieces.first() == Some(&NONE);
        let on_end = has_end && self.end;
        let first = usize::from(has_end);
        room.scaled.clear();
        room.scaled.resize(usize::from(on_end), T::ZERO);
        let (on_children, rest, known) = match &self.teacher {
            Teacher::Full(rows, totals) => {
                let row = rows.row(at, self.sizes.1);
                let told = totals.map_or(f64::NAN, |totals| totals[at]);
                let (on_children, rest) = self.logits_next(row, told, first, on_end, room);
                (on_children, rest, 1.0)
            }
            Teacher::Stored(stored) => {
                room.stored.read(stored, at, self.sizes.1);
                self.stored_next(first, on_end, room)
            }
        };
        if on_end {
            room.scaled[0] = T::of(rest.ln());
        }
        // NaN counts: it is to be told.
        (
            on_end || on_children.is_nan() || on_children >= self.min_mass,
            known,
        )
    }

    /// Of logits; `told` is the log of the denominator, or NaN.
    #[inline(always)]
    fn logits_next(
        &self,
        row: &[T],
        told: f64,
        first: usize,
        on_end: bool,
        room: &mut Room<T>,
    ) -> (f64, f64) {
        let inverse = T::of(1.0 / self.temperature);
        let log_total = if told.is_nan() {
            let (top, whole) = top_and_sum(row, inverse);
            (top * inverse).wide() + whole.ln()
        } else {
            told
        };
        let shift = T::of(log_total);
        let mut mass = 0.0;
        for &piece in &room.pieces[first..] {
            let log = row[piece as usize] * inverse - shift;
            mass += log.exp().wide();
            room.scaled.push(log);
        }
        let mut rest = 1.0 - mass;
        if on_end && rest < FAINT_REST {
            room.values.clear();
            room.values.extend_from_slice(row);
            for &piece in &room.pieces[first..] {
                room.values[piece as usize] = T::NOTHING;
            }
            let (top, sum) = top_and_sum(&room.values, inverse);
            rest = ((top * inverse).wide() + sum.ln() - log_total).exp();
        }
        (mass, rest)
    }

    /// Of stored predictions: what is not stored counts in END, or nowhere.
    #[inline(always)]
    fn stored_next(&self, first: usize, on_end: bool, room: &mut Room<T>) -> (f64, f64, f64) {
        let known = total(&room.stored.probs);
        room.values.clone_from(&room.stored.probs);
        let mut on_children = 0.0;
        for slot in first..room.pieces.len() {
            room.counts_in[slot] = match room.stored.place(room.pieces[slot]) {
                Some(place) => {
                    on_children += room.stored.probs[place].wide();
                    room.values[place] = T::ZERO;
                    room.scaled.push(room.stored.logs[place]);
                    room.scaled.len() as u32 - 1
                }
                None if on_end => 0,
                None => NONE,
            };
        }
        let unknown = if known < 1.0 { 1.0 - known } else { 0.0 };
        (on_children, total(&room.values) + unknown, known)
    }

    /// The teacher's tokens below the prefix, as [`Self::teacher_next`]; `None` where a slot's mass
    /// has lost its digits.
    #[inline(always)]
    fn teacher_below(&self, at: usize, node: u32, room: &mut Room<T>) -> Option<(bool, f64)> {
        let tokens = self.trie.below(node);
        room.values.clear();
        let (mut known, mut counted) = (1.0, true);
        match &self.teacher {
            Teacher::Full(rows, _) => {
                let row = rows.row(at, self.sizes.1);
                for &token in tokens {
                    room.values.push(row[token as usize]);
                }
                let top = largest(&room.values);
                if !top.wide().is_finite() {
                    return None;
                }
                let inverse = T::of(1.0 / self.temperature);
                for value in &mut room.values {
                    *value = ((*value - top) * inverse).exp();
                }
            }
            Teacher::Stored(stored) => {
                room.stored.read(stored, at, self.sizes.1);
                known = total(&room.stored.probs);
                counted = self.leave_unknown(tokens, room);
            }
        }
        room.scaled.clear();
        let mut start = 0;
        for (&end, &place) in room.ends.iter().zip(&room.counts_in) {
            if place != NONE {
                let mut sum = T::ZERO;
                for &value in &room.values[start..end as usize] {
                    sum += value;
                }
                if sum < T::FAINT {
                    return None;
                }
                room.scaled.push(sum.ln());
            }
            start = end as usize;
        }
        Some((counted, known))
    }

    /// Fills in what the teacher's row stores of `tokens`; slots of which it stores nothing count
    /// nowhere. Returns whether what ends here, if anything does, is known.
    #[inline(always)]
    fn leave_unknown(&self, tokens: &[u32], room: &mut Room<T>) -> bool {
        let (mut start, mut place, mut ends_known) = (0, 0, true);
        for slot in 0..room.pieces.len() {
            let end = room.ends[slot] as usize;
            let mut known = false;
            for &token in &tokens[start..end] {
                let found = room.stored.place(token);
                known |= found.is_some();
                room.values
                    .push(found.map_or(T::ZERO, |at| room.stored.probs[at]));
            }
            if room.pieces[slot] == NONE {
                ends_known = known;
            }
            room.counts_in[slot] = if known && room.counts_in[slot] != NONE {
                place += 1;
                place - 1
            } else {
                NONE
            };
            start = end;
        }
        ends_known
    }
}

/// The student's mass of each compared slot from its tokens below, whose exponentials stay.
#[inline(always)]
fn student_below<T: Real>(row: &[T], tokens: &[u32], inverse: T, room: &mut Room<T>) -> Option<()> {
    room.values.clear();
    for &token in tokens {
        room.values.push(row[token as usize]);
    }
    let top = largest(&room.values);
    if !top.wide().is_finite() {
        return None;
    }
    for value in &mut room.values {
        *value = ((*value - top) * inverse).exp();
    }
    room.sums.clear();
    room.sums.resize(room.scaled.len(), T::ZERO);
    let mut start = 0;
    for (&end, &place) in room.ends.iter().zip(&room.counts_in) {
        if place != NONE {
            let mut sum = T::ZERO;
            for &value in &room.values[start..end as usize] {
                sum += value;
            }
            room.sums[place as usize] += sum;
        }
        start = end as usize;
    }
    Some(())
}

/// The student's mass of each compared slot from its next piece, and in `values` the exponentials
/// of a whole row without the compared children.
#[inline(always)]
fn student_next<T: Real>(row: &[T], inverse: T, room: &mut Room<T>) -> Option<()> {
    let top = largest(row);
    if !top.wide().is_finite() {
        return None;
    }
    room.values.resize(row.len(), T::ZERO);
    let whole = exponentials(row, top, inverse, &mut room.values);
    room.sums.clear();
    room.sums.resize(room.scaled.len(), T::ZERO);
    let mut rest = whole;
    for (&piece, &place) in room.pieces.iter().zip(&room.counts_in) {
        if place != NONE && piece != NONE {
            let value = &mut room.values[piece as usize];
            room.sums[place as usize] = *value;
            rest += -value.wide();
            *value = T::ZERO;
        }
    }
    if room.pieces.first() == Some(&NONE) && room.counts_in[0] != NONE {
        // All less the children has lost its digits where END is small.
        if rest < 0.1 * whole {
            rest = total(&room.values);
        }
        room.sums[0] = T::of(rest);
    }
    Some(())
}

#[inline(always)]
fn write_below<T: Real>(written: &mut [T], tokens: &[u32], room: &Room<T>) {
    let mut start = 0;
    for (&end, &place) in room.ends.iter().zip(&room.counts_in) {
        let range = start..end as usize;
        start = range.end;
        if place != NONE {
            let slope = room.sums[place as usize];
            for (&token, &value) in tokens[range.clone()].iter().zip(&room.values[range]) {
                written[token as usize] += value * slope;
            }
        }
    }
}

#[inline(always)]
fn write_next<T: Real>(written: &mut [T], room: &Room<T>) {
    for (&piece, &place) in room.pieces.iter().zip(&room.counts_in) {
        if place == NONE {
            continue;
        }
        let slope = room.sums[place as usize];
        if piece == NONE {
            for (value, &exponential) in written.iter_mut().zip(&room.values) {
                *value += exponential * slope;
            }
        } else {
            written[piece as usize] += room.masses[place as usize] * slope;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::projection::Pieces;

    /// Tokens 0 "2", 1 "20", 2 "27" and 3 "27" again, in pieces that are digits.
    fn numerals() -> PieceTrie {
        let pieces: Pieces = [&[2u32][..], &[2, 0], &[2, 7], &[2, 7]].iter().collect();
        PieceTrie::new(pieces, 8).unwrap()
    }

    const TOKENS: [f64; 4] = [0.3, -1.0, 2.0, 0.5];
    const DIGITS: [f64; 8] = [1.0, 0.2, -0.4, 2.0, 0.0, 3.0, 1.5, 0.1];

    fn softmax(logits: &[f64], tau: f64) -> Vec<f64> {
        let exps: Vec<f64> = logits.iter().map(|z| (z / tau).exp()).collect();
        let sum: f64 = exps.iter().sum();
        exps.iter().map(|e| e / sum).collect()
    }

    /// What each side says of: to end, to go on with 0, to go on with 7.
    fn slots(tokens: &[f64], digits: &[f64], tau: f64, end: bool) -> [Vec<f64>; 2] {
        let (p, q) = (softmax(tokens, tau), softmax(digits, tau));
        let mut below = vec![p[0], p[1], p[2] + p[3]];
        let mut next = vec![1.0 - q[0] - q[7], q[0], q[7]];
        if !end {
            below.remove(0);
            next.remove(0);
        }
        [below, next].map(|masses| {
            let sum: f64 = masses.iter().sum();
            masses.iter().map(|mass| mass / sum).collect()
        })
    }

    fn kl(q: &[f64], p: &[f64]) -> f64 {
        q.iter().zip(p).map(|(q, p)| q * (q / p).ln()).sum()
    }

    #[test]
    fn loss_and_gradient_are_those_of_the_definition() -> Result<()> {
        let trie = numerals();
        let node = [i64::from(trie.find(&[2]).unwrap())];
        for (mirrored, end, tau) in [
            (false, true, 1.0),
            (false, false, 2.0),
            (true, true, 2.0),
            (true, false, 1.0),
        ] {
            let call = |student: &[f64], gradient: Option<&mut [f64]>| -> Result<FoundBelow> {
                let teacher = if mirrored { &TOKENS[..] } else { &DIGITS[..] };
                let found = Below {
                    trie: &trie,
                    mirrored,
                    ptr: &[0, 0, 1],
                    nodes: &node,
                    student: Rows {
                        flat: student,
                        width: student.len(),
                        index: &[0],
                    },
                    teacher: Teacher::Full(
                        Rows {
                            flat: teacher,
                            width: teacher.len(),
                            index: &[0],
                        },
                        None,
                    ),
                    sizes: if mirrored { (8, 4) } else { (4, 8) },
                    seeds: &[3.0],
                    temperature: tau,
                    min_mass: 0.0,
                    end,
                }
                .run(gradient, &Threads::one())?;
                Ok(found[0])
            };
            let student = if mirrored { &DIGITS[..] } else { &TOKENS[..] };
            let loss = |student: &[f64]| {
                if mirrored {
                    let [below, next] = slots(&TOKENS, student, tau, end);
                    kl(&below, &next)
                } else {
                    let [below, next] = slots(student, &DIGITS, tau, end);
                    kl(&next, &below)
                }
            };
            let mut gradient = vec![7.0; student.len()];
            let found = call(student, Some(&mut gradient))?;
            assert!(found.good && found.counted);
            assert!((found.loss - loss(student)).abs() < 1e-12);
            for (at, slope) in gradient.iter().enumerate() {
                let mut moved = student.to_vec();
                moved[at] += 1e-6;
                let wanted = 3.0 * (loss(&moved) - loss(student)) / 1e-6;
                assert!((slope - 7.0 - wanted).abs() < 1e-4);
            }
        }
        Ok(())
    }

    #[test]
    fn a_row_of_two_chunks_is_refused_and_one_of_a_chunk_twice_is_not() {
        let trie = numerals();
        let node = i64::from(trie.find(&[2]).unwrap());
        let run = |ptr: &[i64], nodes: &[i64]| {
            let call = Below {
                trie: &trie,
                mirrored: false,
                ptr,
                nodes,
                student: Rows {
                    flat: &TOKENS,
                    width: 4,
                    index: &[0, 0],
                },
                teacher: Teacher::Full(
                    Rows {
                        flat: &DIGITS,
                        width: 8,
                        index: &[0, 0],
                    },
                    None,
                ),
                sizes: (4, 8),
                seeds: &[1.0, 1.0],
                temperature: 1.0,
                min_mass: 0.0,
                end: true,
            };
            call.run(Some(&mut [0.0; 4]), &Threads::one())
        };
        assert!(run(&[0, 2], &[node, node]).is_ok());
        assert!(run(&[0, 1, 2], &[node, node]).is_err());
        assert!(run(&[0, 2], &[node, 99]).is_err());
        assert!(run(&[0, 1], &[node, node]).is_err());
    }
}
