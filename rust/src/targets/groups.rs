//! Targets as flat arrays, and the masses of one position while it is built.

use std::hint::black_box;

use super::NONE;
use super::pair::Column;

/// The targets of one example, position by position, in flat arrays.
///
/// Position `n` holds the groups `group_ptr[n]..group_ptr[n + 1]`; group `g` is the student tokens
/// in the ranges `range_ptr[g]..range_ptr[g + 1]`, each from `starts` to `ends` in
/// [`super::TargetBuilder::tokens`].
#[derive(Debug, Clone, PartialEq)]
pub struct Targets {
    /// Index of the student token that is predicted.
    pub positions: Vec<i64>,
    /// The chunk that it is in.
    pub chunks: Vec<i64>,
    /// The target's mass on all tokens that are in no group.
    pub tails: Vec<f64>,
    /// Whether the groups are compared with one another only, whatever the other tokens have.
    pub open: Vec<bool>,
    /// Offsets into the next two.
    pub group_ptr: Vec<i64>,
    /// The target's mass of each group; with the tail they sum to 1.
    pub probs: Vec<f32>,
    /// The depth along the text's own tokens at which a group parts from it.
    pub depths: Vec<u8>,
    /// Offsets into the next two.
    pub range_ptr: Vec<i32>,
    /// First place of each range.
    pub starts: Vec<i32>,
    /// The place after the last of each range.
    pub ends: Vec<i32>,
    /// By position: what became of the teacher's mass.
    pub accounts: Vec<Account>,
}

/// Where the mass of the teacher's row at a boundary goes, as shares of it.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct Account {
    /// On tokens that the student cannot say: special ones without a partner.
    pub dropped: f32,
    /// On tokens after which the student would not have its boundary.
    pub left_out: f32,
    /// Of longer tokens from earlier rows, brought here; beside the row's own mass.
    pub carried: f32,
    /// On columns that no student token begins with, which a loss on those alone drops.
    pub unreached: f32,
}

impl Targets {
    /// No position.
    #[must_use]
    pub fn empty() -> Self {
        Self {
            positions: Vec::new(),
            chunks: Vec::new(),
            tails: Vec::new(),
            open: Vec::new(),
            group_ptr: vec![0],
            probs: Vec::new(),
            depths: Vec::new(),
            range_ptr: vec![0],
            starts: Vec::new(),
            ends: Vec::new(),
            accounts: Vec::new(),
        }
    }

    /// Adds the positions of another example behind these.
    pub fn append(&mut self, other: Self) {
        let (groups, ranges) = (self.probs.len() as i64, self.starts.len() as i32);
        self.positions.extend(other.positions);
        self.chunks.extend(other.chunks);
        self.tails.extend(other.tails);
        self.open.extend(other.open);
        self.group_ptr
            .extend(other.group_ptr[1..].iter().map(|at| groups + at));
        self.probs.extend(other.probs);
        self.depths.extend(other.depths);
        self.range_ptr
            .extend(other.range_ptr[1..].iter().map(|at| ranges + at));
        self.starts.extend(other.starts);
        self.ends.extend(other.ends);
        self.accounts.extend(other.accounts);
    }

    /// Makes room for the groups of an example with so many columns that count.
    pub(super) fn reserve(&mut self, positions: usize, columns: usize) {
        self.positions.reserve(positions);
        self.chunks.reserve(positions);
        self.tails.reserve(positions);
        self.open.reserve(positions);
        self.group_ptr.reserve(positions);
        self.probs.reserve(columns);
        self.depths.reserve(columns);
        self.range_ptr.reserve(columns);
        self.starts.reserve(columns);
        self.ends.reserve(columns);
    }

    pub(super) fn push_group(&mut self, prob: f64, depth: u8) {
        self.probs.push(prob as f32);
        self.depths.push(depth);
    }

    pub(super) fn push_range(&mut self, (start, end): (u32, u32)) {
        if start < end {
            self.starts.push(start as i32);
            self.ends.push(end as i32);
        }
    }

    pub(super) fn end_group(&mut self) {
        self.range_ptr.push(self.starts.len() as i32);
    }

    pub(super) fn end_position(
        &mut self,
        position: usize,
        chunk: usize,
        tail: f64,
        open: bool,
        account: Account,
    ) {
        self.accounts.push(account);
        self.positions.push(position as i64);
        self.chunks.push(chunk as i64);
        self.tails.push(tail);
        self.open.push(open);
        self.group_ptr.push(self.probs.len() as i64);
    }
}

/// A key's mass.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mass {
    pub key: u32,
    /// The range of the key's tokens, where it has one of its own.
    pub range: (u32, u32),
    pub mass: f64,
}

/// Masses by key, in order of first use.
#[derive(Debug, Default)]
pub(super) struct Masses {
    /// By key: its place in `found` above `base`; anything below is of an earlier use.
    place: Vec<u32>,
    base: u32,
    pub found: Vec<Mass>,
    pub tail: f64,
}

impl Masses {
    pub fn new(key_count: usize) -> Self {
        Self {
            place: vec![0; key_count],
            base: 1,
            ..Self::default()
        }
    }

    pub fn clear(&mut self) {
        self.base += self.found.len() as u32;
        if self.base > u32::MAX / 2 {
            self.place.fill(0);
            self.base = 1;
        }
        self.found.clear();
        self.tail = 0.0;
    }

    /// Adds to the mass of a key, whose tokens are `range`; [`NONE`] is the tail.
    #[inline]
    pub fn add(&mut self, key: u32, mass: f64, range: (u32, u32)) {
        if key == NONE {
            self.tail += mass;
            return;
        }
        let place = &mut self.place[key as usize];
        if *place >= self.base {
            self.found[(*place - self.base) as usize].mass += mass;
        } else {
            *place = self.base + self.found.len() as u32;
            self.found.push(Mass { key, range, mass });
        }
    }

    /// Brings the places of these columns' cells near, all at once.
    pub fn touch(&self, columns: &[Column]) {
        let places = columns
            .iter()
            .map(|column| self.place.get(column.cell as usize));
        black_box(places.fold(0, |all, place| all ^ place.copied().unwrap_or(0)));
    }

    /// Takes a key's mass away.
    pub fn remove(&mut self, key: u32) {
        if let Some(place) = self.find(key) {
            self.found[place].mass = 0.0;
        }
    }

    /// The place of a key that has mass.
    pub fn find(&self, key: u32) -> Option<usize> {
        let place = *self.place.get(key as usize)?;
        place.checked_sub(self.base).map(|place| place as usize)
    }

    pub fn total(&self) -> f64 {
        self.found.iter().map(|found| found.mass).sum::<f64>() + self.tail
    }
}
