//! P-KL of whole rows: KL(teacher || student) over the columns that W reaches, and its gradient.
//!
//! With p the student's softmax of a row up to a factor, s = p W on the compared columns, e the
//! teacher's exponentials there, Q their sum and S that of s,
//!
//! `loss = sum e/Q (log e/Q - log s) + log S`, `d loss / d logit = p * W (1/S - e/(Q s))`.
//!
//! The formula is that of `p_kl/closed_form.py`, which holds it by eight rows and transposed.

use super::real::{Real, largest, sum_of_exponentials, total};
use super::rows::{Found, Gradient, Rows, by_tasks, ids, length, task_by_processor};
use super::select::largest_places;
use super::sparse::Sparse;
use crate::error::Result;
use crate::parallel::Threads;

/// W on the compared columns, and what else of two vocabularies the loss reads.
pub struct Target<T> {
    sparse: Sparse<T>,
    /// The student token of each input; `None` for its number.
    tokens: Option<Vec<u32>>,
    /// The teacher token of each output.
    columns: Vec<u32>,
    /// Teacher tokens that are not compared, without the sources of `folds`; `None` where a row's
    /// denominator is told.
    others: Option<Vec<u32>>,
    /// Teacher tokens whose mass is added to that of an output.
    folds: Vec<(u32, u32)>,
    /// Student tokens without a row in W.
    empty: Vec<u32>,
    sizes: (usize, usize),
}

impl<T: Real> Target<T> {
    /// From W's non-zeros by output; `alone` where each call brings the teacher's denominators.
    ///
    /// # Errors
    /// [`crate::error::Error::Shape`] where the arrays do not fit one another or `sizes`, those of student and
    /// teacher.
    pub fn new(
        sparse: Sparse<T>,
        tokens: Option<&[i64]>,
        columns: &[i64],
        folds: &[(i64, i64)],
        empty: &[i64],
        sizes: (usize, usize),
        alone: bool,
    ) -> Result<Self> {
        let tokens = tokens.map(|t| ids("rows", t, sizes.0)).transpose()?;
        length(
            "inputs of W",
            sparse.inputs(),
            tokens.as_ref().map_or(sizes.0, Vec::len),
        )?;
        length("columns", columns.len(), sparse.outputs())?;
        let columns = ids("columns", columns, sizes.1)?;
        let (from, to): (Vec<i64>, Vec<i64>) = folds.iter().copied().unzip();
        let from = ids("folds", &from, sizes.1)?;
        let to = ids("folds", &to, columns.len())?;
        let others = (!alone).then(|| {
            let mut taken = vec![false; sizes.1];
            for &id in columns.iter().chain(&from) {
                taken[id as usize] = true;
            }
            (0..sizes.1 as u32)
                .filter(|&id| !taken[id as usize])
                .collect()
        });
        Ok(Self {
            sparse,
            tokens,
            columns,
            others,
            folds: from.into_iter().zip(to).collect(),
            empty: ids("empty", empty, sizes.0)?,
            sizes,
        })
    }
}

/// One call: the loss of many rows.
pub struct ForwardKl<'a, T> {
    /// W and the columns.
    pub target: &'a Target<T>,
    /// The student's logits.
    pub student: Rows<'a, T>,
    /// The teacher's.
    pub teacher: Rows<'a, T>,
    /// What each row's gradient is multiplied with; also by 1 / temperature.
    pub seeds: &'a [T],
    /// Divides the logits of both sides.
    pub temperature: f64,
    /// The columns that each row keeps, those of the teacher's largest logits; `None` for all.
    pub top_k: Option<usize>,
    /// The log of the teacher's softmax denominator of each row, by temperature, where it is known:
    /// only the columns are read then.
    pub log_totals: Option<&'a [f64]>,
    /// Whether [`Found::empty`] is asked for where W has few of the student's tokens as inputs, so
    /// that whole rows are read for it.
    pub whole: bool,
}

/// Room for one row.
struct Room<T> {
    student: Vec<T>,
    sums: Vec<T>,
    teacher: Vec<T>,
    scaled: Vec<T>,
    slope: Vec<T>,
    buckets: Vec<u32>,
    close: Vec<(T, u32)>,
    places: Vec<u32>,
    /// Of the chosen columns: sums, exponentials and logits of `sums`, `teacher` and `scaled`.
    chosen: [Vec<T>; 3],
}

impl<T: Real> ForwardKl<'_, T> {
    /// Loss and gradient of every row.
    ///
    /// # Arguments
    /// * `gradient`: like the student's logits; `None` for none. Its rows are written, or added to.
    ///
    /// # Errors
    /// [`crate::error::Error::Shape`] where the arrays do not fit; [`crate::error::Error::Option`] where a row is named twice
    /// and its gradient wanted; [`crate::error::Error::Interrupted`].
    pub fn run(
        &self,
        gradient: Option<(&mut [T], bool)>,
        threads: &Threads<'_>,
    ) -> Result<Vec<Found>> {
        let count = self.student.index.len();
        let (own, other) = self.target.sizes;
        self.student.check("the student", own, count)?;
        self.teacher.check("the teacher", other, count)?;
        length("seeds", self.seeds.len(), count)?;
        let known = self.log_totals.map_or(0, <[f64]>::len);
        let alone = self.target.others.is_none();
        length("log_totals", known, if alone { count } else { 0 })?;
        let gradient = gradient
            .map(|(flat, adds)| Gradient::of(flat, adds, &self.student))
            .transpose()?;
        by_tasks(count, threads, |rows| self.task(rows, gradient.as_ref()))
    }

    task_by_processor!(Found);

    #[inline(always)]
    fn task_in(&self, rows: std::ops::Range<usize>, gradient: Option<&Gradient<T>>) -> Vec<Found> {
        let (inputs, outputs) = (self.target.sparse.inputs(), self.target.sparse.outputs());
        let mut room = Room {
            student: vec![T::ZERO; inputs],
            sums: vec![T::ZERO; outputs],
            teacher: vec![T::ZERO; outputs],
            scaled: vec![T::ZERO; outputs],
            slope: vec![T::ZERO; inputs],
            buckets: Vec::new(),
            close: Vec::new(),
            places: Vec::new(),
            chosen: [Vec::new(), Vec::new(), Vec::new()],
        };
        // A loop: what an iterator's adapter calls is not compiled for the processor's features.
        let mut found = Vec::with_capacity(rows.len());
        for at in rows {
            found.push(self.row(at, gradient, &mut room));
        }
        found
    }

    #[inline(always)]
    fn row(&self, at: usize, gradient: Option<&Gradient<T>>, room: &mut Room<T>) -> Found {
        let inverse = T::of(1.0 / self.temperature);
        let Some(empty) = self.read_student(at, inverse, room) else {
            return Found::BAD;
        };
        let Some((whole, log_total)) = self.read_teacher(at, inverse, room) else {
            return Found::BAD;
        };
        // SAFETY: `run` has seen that a row is of no other chunk.
        let written = gradient.map(|gradient| unsafe { gradient.row(&self.student, at) });
        let seed = self.seeds[at] * inverse;
        let found = match self.top_k {
            Some(count) if count < room.sums.len() => self.chosen(count, seed, written, room),
            _ => self.all(seed, written, room),
        };
        match found {
            None => Found::BAD,
            Some((loss, kept, sum)) => Found {
                loss,
                mass: kept / whole,
                empty,
                sum,
                log_total,
                good: true,
            },
        }
    }

    /// exp of the student's logits less the largest; returns its mass on empty rows.
    #[inline(always)]
    fn read_student(&self, at: usize, inverse: T, room: &mut Room<T>) -> Option<f64> {
        let row = self.student.row(at, self.target.sizes.0);
        match &self.target.tokens {
            None => room.student.copy_from_slice(row),
            Some(tokens) => {
                for (value, &token) in room.student.iter_mut().zip(tokens) {
                    *value = row[token as usize];
                }
            }
        }
        let top = largest(&room.student);
        if !top.wide().is_finite() {
            return None;
        }
        for value in &mut room.student {
            *value = ((*value - top) * inverse).exp();
        }
        let target = self.target;
        if target.empty.is_empty() || (target.tokens.is_some() && !self.whole) {
            return Some(0.0);
        }
        if target.tokens.is_none() {
            let mut empty = 0.0;
            for &token in &target.empty {
                empty += room.student[token as usize].wide();
            }
            return Some(empty / total(&room.student));
        }
        let top = largest(row);
        if !top.wide().is_finite() {
            return None;
        }
        let whole = sum_of_exponentials(row, top, inverse);
        let mut empty = 0.0;
        for &token in &target.empty {
            empty += ((row[token as usize] - top) * inverse).exp().wide();
        }
        Some(empty / whole)
    }

    /// The teacher's logits on the columns, by temperature and less the largest, and their
    /// exponentials; returns the sum of those of all columns, and its log in the scale of the logits.
    #[inline(always)]
    fn read_teacher(&self, at: usize, inverse: T, room: &mut Room<T>) -> Option<(f64, f64)> {
        let target = self.target;
        let row = self.teacher.row(at, target.sizes.1);
        for (value, &column) in room.scaled.iter_mut().zip(&target.columns) {
            *value = row[column as usize];
        }
        let mut top = match &target.others {
            Some(_) => largest(row),
            None => largest(&room.scaled),
        };
        if target.others.is_none() {
            for &(source, _) in &target.folds {
                let more = row[source as usize];
                top = if more <= top { top } else { more };
            }
        }
        if !top.wide().is_finite() {
            return None;
        }
        for value in &mut room.scaled {
            *value = (*value - top) * inverse;
        }
        for &(source, place) in &target.folds {
            let own = room.scaled[place as usize].wide();
            let more = ((row[source as usize] - top) * inverse).wide();
            let (high, low) = if own > more { (own, more) } else { (more, own) };
            if high > f64::NEG_INFINITY {
                room.scaled[place as usize] = T::of(high + (low - high).exp().ln_1p());
            }
        }
        for (to, &from) in room.teacher.iter_mut().zip(&room.scaled) {
            *to = from.exp();
        }
        let scaled_top = (top * inverse).wide();
        let Some(columns) = &target.others else {
            let log_total = self.log_totals.map_or(f64::NAN, |totals| totals[at]);
            let whole = (log_total - scaled_top).exp();
            return whole.is_finite().then_some((whole, log_total));
        };
        let mut others = 0.0;
        let mut part = [T::ZERO; 1024];
        for some in columns.chunks(1024) {
            for (value, &column) in part.iter_mut().zip(some) {
                *value = (row[column as usize] - top) * inverse;
            }
            for value in &mut part {
                *value = value.exp();
            }
            others += total(&part[..some.len()]);
        }
        let whole = others + total(&room.teacher);
        Some((whole, scaled_top + whole.ln()))
    }

    /// Over all columns: loss, the teacher's kept sum, the sum of the gradient.
    #[inline(always)]
    fn all(
        &self,
        seed: T,
        written: Option<(&mut [T], bool)>,
        room: &mut Room<T>,
    ) -> Option<(f64, f64, f64)> {
        self.target.sparse.forward(&room.student, &mut room.sums);
        let (loss, kept, whole) = compare(&room.sums, &room.teacher, &room.scaled)?;
        let Some((row, adds)) = written else {
            return Some((loss, kept, 0.0));
        };
        slopes(&mut room.sums, &room.teacher, kept, whole);
        self.target.sparse.backward(&room.sums, &mut room.slope);
        for (slope, &p) in room.slope.iter_mut().zip(&room.student) {
            *slope = *slope * p * seed;
        }
        if !adds && self.target.tokens.is_some() {
            row.fill(T::ZERO);
        }
        match &self.target.tokens {
            Some(tokens) => {
                for (&token, &slope) in tokens.iter().zip(&room.slope) {
                    row[token as usize] += slope;
                }
            }
            None if adds => {
                for (value, &slope) in row.iter_mut().zip(&room.slope) {
                    *value += slope;
                }
            }
            None => {
                let (own, padding) = row.split_at_mut(room.slope.len());
                own.copy_from_slice(&room.slope);
                padding.fill(T::ZERO);
            }
        }
        Some((loss, kept, total(&room.slope)))
    }

    /// The same over the columns of the teacher's largest logits.
    #[inline(always)]
    fn chosen(
        &self,
        count: usize,
        seed: T,
        written: Option<(&mut [T], bool)>,
        room: &mut Room<T>,
    ) -> Option<(f64, f64, f64)> {
        let sparse = &self.target.sparse;
        let Room {
            buckets,
            close,
            places,
            ..
        } = room;
        largest_places(&room.scaled, count, buckets, close, places);
        let [sums, teacher, scaled] = &mut room.chosen;
        sums.clear();
        teacher.clear();
        scaled.clear();
        for &place in &room.places {
            let mut sum = T::ZERO;
            for &(input, weight) in sparse.of_output(place as usize) {
                sum += weight * room.student[input as usize];
            }
            sums.push(sum);
            teacher.push(room.teacher[place as usize]);
            scaled.push(room.scaled[place as usize]);
        }
        let (loss, kept, whole) = compare(sums, teacher, scaled)?;
        let Some((row, adds)) = written else {
            return Some((loss, kept, 0.0));
        };
        slopes(sums, teacher, kept, whole);
        if !adds {
            row.fill(T::ZERO);
        }
        let mut all = 0.0;
        for (&place, &slope) in room.places.iter().zip(sums.iter()) {
            for &(input, weight) in sparse.of_output(place as usize) {
                let part = weight * slope * room.student[input as usize] * seed;
                let token = self
                    .target
                    .tokens
                    .as_ref()
                    .map_or(input, |t| t[input as usize]);
                row[token as usize] += part;
                all += part.wide();
            }
        }
        Some((loss, kept, all))
    }
}

/// Loss, the teacher's sum and the student's; `None` where a column has next to no mass.
#[inline(always)]
pub(super) fn compare<T: Real>(sums: &[T], teacher: &[T], scaled: &[T]) -> Option<(f64, f64, f64)> {
    let (mut low, mut entropy, mut cross) = ([T::ONE; 16], [T::ZERO; 16], [T::ZERO; 16]);
    let mut step = |lane: usize, s: T, e: T, d: T| {
        // NaN is not below, but its sum tells it.
        low[lane] = if s < low[lane] { s } else { low[lane] };
        entropy[lane] += if e > T::ZERO { e * d } else { e };
        cross[lane] += e * s.ln();
    };
    let whole_lanes = sums.len() / 16 * 16;
    for start in (0..whole_lanes).step_by(16) {
        let (s, e, d) = (
            &sums[start..start + 16],
            &teacher[start..start + 16],
            &scaled[start..start + 16],
        );
        for lane in 0..16 {
            step(lane, s[lane], e[lane], d[lane]);
        }
    }
    for at in whole_lanes..sums.len() {
        step(0, sums[at], teacher[at], scaled[at]);
    }
    let sum = |lanes: [T; 16]| lanes.iter().map(|lane| lane.wide()).sum::<f64>();
    let (whole, kept) = (total(sums), total(teacher));
    let faint = low.iter().any(|&lane| lane < T::FAINT);
    if faint || !whole.is_finite() || kept.partial_cmp(&1e-25) != Some(std::cmp::Ordering::Greater)
    {
        return None;
    }
    let loss = (sum(entropy) - sum(cross)) / kept - kept.ln() + whole.ln();
    Some((loss, kept, whole))
}

/// The sums' place is taken by the gradient of the loss in them.
#[inline(always)]
pub(super) fn slopes<T: Real>(sums: &mut [T], teacher: &[T], kept: f64, whole: f64) {
    let (base, factor) = (T::of(1.0 / whole), T::of(1.0 / kept));
    for (value, &e) in sums.iter_mut().zip(teacher) {
        *value = base - e * factor / *value;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition, number by number.
    fn by_hand(
        w: &[[f64; 4]; 3],
        student: &[f64],
        teacher: &[f64],
        tau: f64,
        kept: &[usize],
    ) -> (f64, f64) {
        let p: Vec<f64> = student.iter().map(|z| (z / tau).exp()).collect();
        let q: Vec<f64> = teacher.iter().map(|y| (y / tau).exp()).collect();
        let s = |t: usize| (0..3).map(|i| p[i] * w[i][t]).sum::<f64>();
        let whole: f64 = kept.iter().map(|&t| s(t)).sum();
        let mass: f64 = kept.iter().map(|&t| q[t]).sum();
        let loss = kept
            .iter()
            .map(|&t| q[t] / mass * ((q[t] / mass).ln() - (s(t) / whole).ln()))
            .sum();
        (loss, mass / q.iter().sum::<f64>())
    }

    #[test]
    fn loss_and_gradient_are_those_of_the_definition() -> Result<()> {
        let w = [
            [0.5, 0.0, 0.5, 0.0],
            [0.0, 0.0, 0.25, 0.75],
            [1.0, 0.0, 0.0, 0.0],
        ];
        let sparse = Sparse::new(
            &[0, 2, 0, 1, 1],
            &[0, 2, 4, 5],
            &[0.5, 1.0, 0.5, 0.25, 0.75],
            3,
        )?;
        let target = Target::new(sparse, None, &[0, 2, 3], &[], &[], (3, 4), false)?;
        let student = [0.3, -1.0, 2.0, 9.0, 1.0, 0.5, -0.7, 9.0];
        let teacher = [1.0, 0.2, -0.4, 2.0, 0.0, 3.0, 1.5, 0.1];
        for (top_k, kept) in [
            (None, vec![vec![0, 2, 3]; 2]),
            (Some(2), vec![vec![0, 3], vec![2, 3]]),
        ] {
            for tau in [1.0, 2.0] {
                let call = |student: &[f64], gradient: Option<(&mut [f64], bool)>| {
                    ForwardKl {
                        target: &target,
                        student: Rows {
                            flat: student,
                            width: 4,
                            index: &[1, 0],
                        },
                        teacher: Rows {
                            flat: &teacher,
                            width: 4,
                            index: &[1, 0],
                        },
                        seeds: &[1.0, 10.0],
                        temperature: tau,
                        top_k,
                        log_totals: None,
                        whole: false,
                    }
                    .run(gradient, &Threads::one())
                };
                let mut gradient = vec![7.0; 8];
                let found = call(&student, Some((&mut gradient, false)))?;
                for (row, result) in [1, 0].into_iter().zip(&found) {
                    let (z, y) = (
                        &student[4 * row..4 * row + 3],
                        &teacher[4 * row..4 * row + 4],
                    );
                    let (loss, mass) = by_hand(&w, z, y, tau, &kept[row]);
                    assert!((result.loss - loss).abs() < 1e-12);
                    assert!((result.mass - mass).abs() < 1e-12);
                    for column in 0..3 {
                        let mut moved = student;
                        moved[4 * row + column] += 1e-6;
                        let seed = if row == 1 { 1.0 } else { 10.0 };
                        let up = call(&moved, None)?[1 - row].loss;
                        let slope = seed * (up - loss) / 1e-6;
                        assert!((gradient[4 * row + column] - slope).abs() < 1e-4);
                    }
                    assert_eq!(gradient[4 * row + 3], 0.0);
                }
                let mut twice = gradient.clone();
                call(&student, Some((&mut twice, true)))?;
                assert!(
                    twice
                        .iter()
                        .zip(&gradient)
                        .all(|(a, b)| (a - 2.0 * b).abs() < 1e-12)
                );
            }
        }
        Ok(())
    }

    #[test]
    fn what_needs_log_space_or_is_no_number_is_left_alone() -> Result<()> {
        let sparse = Sparse::new(&[0, 1], &[0, 1, 2], &[1.0f32, 1.0], 2)?;
        let target = Target::new(sparse, None, &[0, 1], &[], &[], (2, 2), false)?;
        for student in [[0.0, -200.0], [f32::NAN, 0.0], [f32::INFINITY, 0.0]] {
            let mut gradient = [5.0f32; 2];
            let found = ForwardKl {
                target: &target,
                student: Rows {
                    flat: &student,
                    width: 2,
                    index: &[0],
                },
                teacher: Rows {
                    flat: &[1.0, 2.0],
                    width: 2,
                    index: &[0],
                },
                seeds: &[1.0],
                temperature: 1.0,
                top_k: None,
                log_totals: None,
                whole: false,
            }
            .run(Some((&mut gradient, false)), &Threads::one())?;
            assert!(!found[0].good);
            assert_eq!(gradient, [5.0, 5.0]);
        }
        Ok(())
    }
}
