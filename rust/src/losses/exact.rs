//! Exact KL: a target over disjoint groups of student tokens and a tail of all others, against the
//! student's softmax summed over them.
//!
//! Loss, gradient and what an open tail means are said in `exact_kl/block.py`, whose closed form
//! this is, a row at a time.

use super::real::{Real, exponentials, largest, total};
use super::rows::{Gradient, Rows, by_tasks, length, task_by_processor};
use crate::error::{Error, Result};
use crate::parallel::Threads;

/// The targets of many positions.
#[derive(Clone, Copy)]
pub struct Targets<'a, T> {
    /// The mass of each position's tail; the most that it may have where it is open.
    pub tails: &'a [T],
    /// Which tails are open.
    pub open: &'a [bool],
    /// The range of each position's groups, one more than there are positions.
    pub group_ptr: &'a [i64],
    /// The mass of each group.
    pub probs: &'a [T],
    /// The depth of each group.
    pub depths: &'a [i64],
    /// The range of each group in `starts` and `ends`.
    pub range_ptr: &'a [i64],
    /// Ranges of `order`: the tokens of a group.
    pub starts: &'a [i64],
    /// See `starts`.
    pub ends: &'a [i64],
    /// Student tokens.
    pub order: &'a [i64],
}

impl<'a, T> Targets<'a, T> {
    /// The tokens of a group, a range after the other.
    #[inline(always)]
    fn tokens(&self, group: usize) -> impl Iterator<Item = &'a [i64]> + use<'a, T> {
        let ranges = range(self.range_ptr, group);
        let order = self.order;
        let ends = &self.ends[ranges.clone()];
        let each = self.starts[ranges].iter().zip(ends);
        each.map(|(&start, &end)| &order[start as usize..end as usize])
    }

    /// Checks that all groups are of tokens below `size`.
    fn check_tokens(&self, size: usize) -> Result<()> {
        let ranges = ranges("ranges of groups", self.range_ptr, self.probs.len())?;
        inside("ranges", ranges, self.starts.len())?;
        length("ends of ranges", self.ends.len(), self.starts.len())?;
        let mut each = self.starts.iter().zip(self.ends);
        if !each.all(|(&start, &end)| {
            0 <= start && start <= end && end.unsigned_abs() as usize <= self.order.len()
        }) {
            return Err(misfit("a range of tokens is none of the order's"));
        }
        let known = |&id: &i64| usize::try_from(id).is_ok_and(|id| id < size);
        if self.order.iter().all(known) {
            return Ok(());
        }
        let mut listed = (0..self.probs.len()).flat_map(|group| self.tokens(group).flatten());
        let Some(&id) = listed.find(|id| !known(id)) else {
            return Ok(());
        };
        Err(Error::Shape {
            what: format!("a group holds token {id}, of a vocabulary"),
            found: id.unsigned_abs() as usize,
            expected: size,
            remedy: "pass the targets of this pair",
        })
    }
}

/// What the depths weigh; the names are those of the module's formula.
#[derive(Clone, Copy)]
pub struct Depths<'a> {
    /// c of each group and of each position's tail.
    pub groups: &'a [f64],
    /// See `groups`.
    pub tails: &'a [f64],
    /// The range of each position's unions of deeper groups.
    pub union_ptr: &'a [i64],
    /// A and u of each union.
    pub masses: &'a [f64],
    /// See `masses`.
    pub weights: &'a [f64],
    /// The range of each position's members, and the group and the union of each.
    pub member_ptr: &'a [i64],
    /// See `member_ptr`.
    pub members: [&'a [i64]; 2],
}

/// One call: the loss of many positions.
pub struct ExactKl<'a, T> {
    /// What is compared with the student.
    pub targets: Targets<'a, T>,
    /// A row for each position.
    pub student: Rows<'a, T>,
    /// Size of the student's vocabulary.
    pub size: usize,
    /// What each row's gradient is multiplied with.
    pub seeds: &'a [T],
    /// c of all groups and tails where there are no `depths`.
    pub factor: f64,
    /// `None` where no depth has a weight of its own.
    pub depths: Option<Depths<'a>>,
}

/// What is found of each position.
#[derive(Clone, Copy)]
pub struct FoundExact {
    /// In nats.
    pub loss: f64,
    /// The target's tail.
    pub tail: f64,
    /// The part of the KL by the chain rule that is below depth 0.
    pub deeper: f64,
    /// The sum of what was written to the gradient: finite where all of it is.
    pub sum: f64,
    /// As [`super::Found::good`].
    pub good: bool,
}

impl FoundExact {
    const BAD: Self = Self {
        loss: 0.0,
        tail: 0.0,
        deeper: 0.0,
        sum: 0.0,
        good: false,
    };
}

/// Room for one position; slots are its groups, and its tail as the last.
struct Room<T> {
    /// The student's exponentials, without those of the groups' tokens.
    values: Vec<T>,
    /// Those, and their tokens.
    picked: Vec<T>,
    /// Of each slot: the student's mass, the target's, the log of their ratio, the weight of the
    /// student's log-mass in the loss.
    student: Vec<T>,
    target: Vec<T>,
    ratio: Vec<T>,
    pull: Vec<T>,
    /// Of each union: the student's mass, and then the pull of it.
    unions: Vec<f64>,
    /// What turns an exponential into a probability.
    share: T,
}

impl<T: Real> ExactKl<'_, T> {
    /// Loss and gradient of every position.
    ///
    /// # Arguments
    /// * `gradient`: like the student's logits; `None` for none. Its rows are written, or added to.
    ///
    /// # Errors
    /// [`Error::Shape`] and [`Error::Format`] where the arrays do not fit, [`Error::Option`] where
    /// a row is named twice and its gradient wanted, [`Error::Interrupted`].
    pub fn run(
        &self,
        gradient: Option<(&mut [T], bool)>,
        threads: &Threads<'_>,
    ) -> Result<Vec<FoundExact>> {
        let count = self.student.index.len();
        self.check(count)?;
        let gradient = gradient
            .map(|(flat, adds)| Gradient::of(flat, adds, &self.student))
            .transpose()?;
        by_tasks(count, threads, |rows| self.task(rows, gradient.as_ref()))
    }

    fn check(&self, count: usize) -> Result<()> {
        let targets = &self.targets;
        self.student.check("the student", self.size, count)?;
        length("seeds", self.seeds.len(), count)?;
        length("tails", targets.tails.len(), count)?;
        length("open", targets.open.len(), count)?;
        let groups = ranges("groups", targets.group_ptr, count)?;
        length("depths", targets.depths.len(), targets.probs.len())?;
        inside("groups", groups, targets.probs.len())?;
        targets.check_tokens(self.size)?;
        let Some(depths) = &self.depths else {
            return Ok(());
        };
        length(
            "weights of groups",
            depths.groups.len(),
            targets.probs.len(),
        )?;
        length("weights of tails", depths.tails.len(), count)?;
        let unions = ranges("unions", depths.union_ptr, count)?;
        length(
            "weights of unions",
            depths.weights.len(),
            depths.masses.len(),
        )?;
        inside("unions", unions, depths.masses.len())?;
        let members = ranges("members", depths.member_ptr, count)?;
        for of in depths.members {
            inside("members", members, of.len())?;
        }
        for at in 0..count {
            let ranges = [(0, targets.group_ptr), (1, depths.union_ptr)];
            for (which, ptr) in ranges {
                let some = &depths.members[which][range(depths.member_ptr, at)];
                if !some
                    .iter()
                    .all(|member| (ptr[at]..ptr[at + 1]).contains(member))
                {
                    return Err(misfit("a member is of another position"));
                }
            }
        }
        Ok(())
    }

    task_by_processor!(FoundExact);

    #[inline(always)]
    fn task_in(
        &self,
        rows: std::ops::Range<usize>,
        gradient: Option<&Gradient<T>>,
    ) -> Vec<FoundExact> {
        let mut room = Room {
            values: vec![T::ZERO; self.size],
            picked: Vec::new(),
            student: Vec::new(),
            target: Vec::new(),
            ratio: Vec::new(),
            pull: Vec::new(),
            unions: Vec::new(),
            share: T::ONE,
        };
        let mut found = Vec::with_capacity(rows.len());
        for at in rows {
            // SAFETY: `run` has seen that a row is of no other position.
            let written = gradient.map(|gradient| unsafe { gradient.row(&self.student, at) });
            found.push(self.row(at, written, &mut room).unwrap_or(FoundExact::BAD));
        }
        found
    }

    /// `None` where it needs log space.
    #[inline(always)]
    fn row(
        &self,
        at: usize,
        written: Option<(&mut [T], bool)>,
        room: &mut Room<T>,
    ) -> Option<FoundExact> {
        let groups = range(self.targets.group_ptr, at);
        self.read_student(at, groups.clone(), room)?;
        let tail = self.read_target(at, groups.clone(), room);
        let mut faint = false;
        room.ratio.clear();
        room.pull.clear();
        for (&q, &p) in room.target.iter().zip(&room.student) {
            let counts = q > T::ZERO;
            // What is no number is not below, but its logarithm tells it.
            faint |= counts & (p < T::FAINT);
            room.ratio
                .push(if counts { q.ln() - p.ln() } else { T::ZERO });
        }
        if faint {
            return None;
        }
        let mut found = FoundExact {
            loss: 0.0,
            tail: tail.wide(),
            deeper: 0.0,
            sum: 0.0,
            good: true,
        };
        let slots = room.target.len();
        for slot in 0..slots {
            let weight = self.weight(at, groups.start + slot, slot + 1 == slots);
            let term = room.target[slot].wide() * room.ratio[slot].wide();
            found.loss += weight * term;
            if slot + 1 < slots && self.targets.depths[groups.start + slot] > 0 {
                found.deeper += term;
            }
            room.pull.push(T::of(weight) * room.target[slot]);
        }
        if let Some(depths) = &self.depths {
            let rest = if self.targets.open[at] {
                1.0 - found.tail
            } else {
                1.0
            };
            found.loss += add_unions(depths, at, groups.start, rest, room)?;
        }
        if !found.loss.is_finite() {
            return None;
        }
        if let Some((row, adds)) = written {
            found.sum = self.write(row, adds, self.seeds[at], groups, room);
        }
        Some(found)
    }

    #[inline(always)]
    fn weight(&self, at: usize, group: usize, is_tail: bool) -> f64 {
        match &self.depths {
            None => self.factor,
            Some(depths) if is_tail => depths.tails[at],
            Some(depths) => depths.groups[group],
        }
    }

    /// The student's mass of each slot.
    #[inline(always)]
    fn read_student(
        &self,
        at: usize,
        groups: std::ops::Range<usize>,
        room: &mut Room<T>,
    ) -> Option<()> {
        let row = self.student.row(at, self.size);
        let top = largest(row);
        if !top.wide().is_finite() {
            return None;
        }
        let whole = exponentials(row, top, T::ONE, &mut room.values);
        let share = T::of(1.0 / whole);
        room.picked.clear();
        room.student.clear();
        let mut listed = 0.0;
        for group in groups {
            let mut sum = T::ZERO;
            for tokens in self.targets.tokens(group) {
                for &token in tokens {
                    let value = &mut room.values[token as usize];
                    sum += *value;
                    room.picked.push(*value * share);
                    *value = T::ZERO;
                }
            }
            listed += sum.wide();
            room.student.push(sum * share);
        }
        let mut outside = whole - listed;
        if outside < 0.1 * whole {
            // All less what is listed has lost its digits where little is left.
            outside = total(&room.values);
        }
        room.student.push(T::of(outside / whole));
        room.share = share;
        Some(())
    }

    /// The target's mass of each slot, against this student's; returns that of the tail.
    #[inline(always)]
    fn read_target(&self, at: usize, groups: std::ops::Range<usize>, room: &mut Room<T>) -> T {
        let most = self.targets.tails[at];
        let outside = room.student[groups.len()];
        room.target.clear();
        room.target.extend_from_slice(&self.targets.probs[groups]);
        if !self.targets.open[at] {
            room.target.push(most);
            return most;
        }
        let tail = if outside < most { outside } else { most };
        let rest = T::ONE - tail;
        for value in &mut room.target {
            *value = *value * rest;
        }
        room.target.push(tail);
        tail
    }

    /// The gradient; returns its sum.
    #[inline(always)]
    fn write(
        &self,
        row: &mut [T],
        adds: bool,
        seed: T,
        groups: std::ops::Range<usize>,
        room: &mut Room<T>,
    ) -> f64 {
        let whole = T::of(total(&room.pull));
        let mut sum = 0.0;
        for (slope, &p) in room.pull.iter_mut().zip(&room.student) {
            // Where nothing is said, nothing is pulled.
            let least = if p > T::FAINT { p } else { T::FAINT };
            *slope = (whole - *slope / least) * seed;
            sum += slope.wide() * p.wide();
        }
        let slots = room.pull.len();
        let (own, padding) = row.split_at_mut(self.size);
        let slope = room.pull[slots - 1] * room.share;
        if adds {
            for (value, &exponential) in own.iter_mut().zip(&room.values) {
                *value += exponential * slope;
            }
        } else {
            for (value, &exponential) in own.iter_mut().zip(&room.values) {
                *value = exponential * slope;
            }
            padding.fill(T::ZERO);
        }
        let mut place = 0;
        for (group, &slope) in groups.zip(&room.pull) {
            for tokens in self.targets.tokens(group) {
                for (&token, &picked) in tokens.iter().zip(&room.picked[place..]) {
                    own[token as usize] += picked * slope;
                }
                place += tokens.len();
            }
        }
        sum
    }
}

/// The loss of a position's unions; adds to the pull of their groups.
#[inline(always)]
fn add_unions<T: Real>(
    depths: &Depths<'_>,
    at: usize,
    first_group: usize,
    rest: f64,
    room: &mut Room<T>,
) -> Option<f64> {
    let unions = range(depths.union_ptr, at);
    let members = range(depths.member_ptr, at);
    room.unions.clear();
    room.unions.resize(unions.len(), 0.0);
    for member in members.clone() {
        let group = depths.members[0][member] as usize - first_group;
        let union = depths.members[1][member] as usize - unions.start;
        room.unions[union] += room.student[group].wide();
    }
    let mut loss = 0.0;
    for (place, union) in unions.clone().enumerate() {
        let (mass, weight) = (depths.masses[union] * rest, depths.weights[union]);
        let below = &mut room.unions[place];
        if *below < T::FAINT.wide() {
            return None;
        }
        loss += weight * mass * (mass.ln() - below.ln());
        *below = weight * mass / *below;
    }
    for member in members {
        let group = depths.members[0][member] as usize - first_group;
        let union = depths.members[1][member] as usize - unions.start;
        room.pull[group] += T::of(room.unions[union]) * room.student[group];
    }
    Some(loss)
}

#[inline(always)]
fn range(ptr: &[i64], at: usize) -> std::ops::Range<usize> {
    ptr[at] as usize..ptr[at + 1] as usize
}

/// Checks that `count` ranges rise; returns where they end.
fn ranges(what: &str, ptr: &[i64], count: usize) -> Result<usize> {
    length(what, ptr.len(), count + 1)?;
    if ptr[0] < 0 || !ptr.is_sorted() {
        return Err(misfit("their ranges do not rise from 0"));
    }
    Ok(ptr[count] as usize)
}

fn inside(what: &str, end: usize, size: usize) -> Result<()> {
    if end <= size {
        return Ok(());
    }
    length(what, size, end)
}

fn misfit(reason: &str) -> Error {
    Error::Format {
        what: "the targets of a batch",
        reason: reason.to_owned(),
        remedy: "pass them as they were laid out for this batch",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LOGITS: [f64; 5] = [0.3, -1.0, 2.0, 0.5, 9.0];

    /// Groups {0, 2} at depth 0 and {1} at depth 1, and token 3 in the tail; column 4 is padding.
    fn run(
        student: &[f64],
        tail: f64,
        open: bool,
        gradient: Option<&mut [f64]>,
    ) -> Result<FoundExact> {
        let call = ExactKl {
            targets: Targets {
                tails: &[tail],
                open: &[open],
                group_ptr: &[0, 2],
                probs: &if open {
                    [0.75, 0.25]
                } else {
                    [0.6, 0.4 - tail]
                },
                depths: &[0, 1],
                range_ptr: &[0, 2, 3],
                starts: &[3, 0, 1],
                ends: &[4, 1, 2],
                order: &[2, 1, 8, 0],
            },
            student: Rows {
                flat: student,
                width: 5,
                index: &[0],
            },
            size: 4,
            seeds: &[3.0],
            factor: 1.0,
            depths: None,
        };
        Ok(call.run(gradient.map(|flat| (flat, true)), &Threads::one())?[0])
    }

    fn by_hand(student: &[f64], target: [f64; 3]) -> f64 {
        let exps: Vec<f64> = student[..4].iter().map(|z| z.exp()).collect();
        let sum: f64 = exps.iter().sum();
        let own = [exps[0] + exps[2], exps[1], exps[3]];
        let terms = target.iter().zip(own);
        terms.map(|(q, p)| q * (q / (p / sum)).ln()).sum()
    }

    #[test]
    fn loss_and_gradient_are_those_of_the_definition() -> Result<()> {
        let outside = {
            let exps: Vec<f64> = LOGITS[..4].iter().map(|z| z.exp()).collect();
            exps[3] / exps.iter().sum::<f64>()
        };
        for (tail, open, own) in [(0.1, false, 0.1), (0.01, true, 0.01), (0.9, true, outside)] {
            let target = if open {
                [0.75 * (1.0 - own), 0.25 * (1.0 - own), own]
            } else {
                [0.6, 0.4 - own, own]
            };
            let mut gradient = [7.0; 5];
            let found = run(&LOGITS, tail, open, Some(&mut gradient))?;
            let loss = by_hand(&LOGITS, target);
            assert!(found.good);
            assert!((found.loss - loss).abs() < 1e-12);
            assert!((found.tail - own).abs() < 1e-12);
            for column in 0..5 {
                let mut moved = LOGITS;
                moved[column] += 1e-6;
                // An open tail counts as a constant.
                let wanted = 3.0 * (by_hand(&moved, target) - loss) / 1e-6;
                assert!((gradient[column] - 7.0 - wanted).abs() < 1e-4);
            }
        }
        Ok(())
    }

    #[test]
    fn what_needs_log_space_or_is_no_number_is_left_alone() -> Result<()> {
        for bad in [-2000.0, f64::NAN, f64::INFINITY] {
            let mut student = LOGITS;
            student[1] = bad;
            let mut gradient = [7.0; 5];
            let found = run(&student, 0.1, false, Some(&mut gradient))?;
            assert!(!found.good);
            assert_eq!(gradient, [7.0; 5]);
        }
        Ok(())
    }
}
