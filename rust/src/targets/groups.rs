//! Targets as flat arrays.

use super::masses::Masses;

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

    /// Adds the groups of one position, but those without mass, each with its own range, which is
    /// that of `cells` for most, and those of `extra`, which rise by the places of their groups.
    pub(super) fn push_groups(
        &mut self,
        found: &Masses,
        cells: &[(i32, i32)],
        extra: &[(u32, (u32, u32))],
        scale: f64,
        depth: impl Fn(u32) -> u8,
    ) {
        let mut extra = extra.iter().peekable();
        let mut others = found.others.iter().peekable();
        let (keys, masses) = (found.keys(), found.masses());
        let mut from = 0;
        while from < keys.len() {
            // Up to the next group of which not just a cell's range is to be copied.
            let next = |place: Option<&u32>| place.map_or(usize::MAX, |&place| place as usize);
            let mut to = next(others.peek().map(|other| &other.0))
                .min(next(extra.peek().map(|extra| &extra.0)))
                .min(keys.len());
            if found.has_zeros
                && let Some(zero) = masses[from..to].iter().position(|&mass| mass <= 0.0)
            {
                to = from + zero;
            }
            self.copy_cells(&keys[from..to], &masses[from..to], cells, scale);
            from = to;
            if to == keys.len() {
                break;
            }
            let place = to as u32;
            let range = match others.next_if(|other| other.0 == place) {
                Some(&(_, range)) => range,
                None => {
                    let (start, end) = cells[keys[to] as usize];
                    (start as u32, end as u32)
                }
            };
            let counts = masses[to] > 0.0;
            if counts {
                self.push_range(range);
            }
            while let Some(&(_, range)) = extra.next_if(|extra| extra.0 == place) {
                if counts {
                    self.push_range(range);
                }
            }
            if counts {
                self.push_group(masses[to] * scale, depth(keys[to]));
                self.end_group();
            }
            from += 1;
        }
    }

    /// Adds groups that are a cell each.
    fn copy_cells(&mut self, keys: &[u32], masses: &[f64], cells: &[(i32, i32)], scale: f64) {
        self.probs
            .extend(masses.iter().map(|mass| (mass * scale) as f32));
        self.depths.resize(self.depths.len() + keys.len(), 0);
        let before = self.starts.len();
        self.range_ptr
            .extend((0..keys.len() as i32).map(|range| before as i32 + range + 1));
        let ranges = keys.iter().map(|&key| cells[key as usize]);
        self.starts.extend(ranges.clone().map(|range| range.0));
        self.ends.extend(ranges.map(|range| range.1));
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
