//! The target of one student position at a common boundary.

use rustc_hash::FxHashMap;

use super::below::{MOST_TEXTS, TextMemo};
use super::columns::{ColumnKind, GATHERED, Gathered};
use super::groups::Targets;
use super::inside::Inside;
use super::mask::Mask;
use super::masses::Masses;
use super::pair::PairTables;
use super::places::{Place, for_each_place};
use super::rows::Rows;
use super::side::BoundaryMemo;
use super::{NONE, TargetExample, TargetOptions};
use crate::error::Result;
use crate::tokenizer::WordMemo;
use crate::trie::ROOT;

/// Buffers of one thread, and what it remembers of the pair.
#[derive(Debug)]
pub(super) struct Scratch {
    pub student_pairs: BoundaryMemo,
    pub teacher_pairs: BoundaryMemo,
    /// By teacher token and bytes of it that are past: the student tokens that the rest starts and
    /// ends with.
    pub rests: FxHashMap<(u32, u32), (u32, u32)>,
    /// By trie node and teacher token behind it: the student token that their text starts with.
    pub texts: TextMemo,
    pub words: WordMemo,
    rows: Rows,
    student_ids: Vec<u32>,
    teacher_ids: Vec<u32>,
    pub masses: Masses,
    /// The text's own teacher tokens from the boundary on, and the trie nodes that they lead to.
    pub path: Vec<u32>,
    pub nodes: Vec<u32>,
    pub bytes: Vec<u8>,
    pub pieces: Vec<u32>,
    pub extra: Vec<(u32, (u32, u32))>,
    /// The answers about the last rows that were asked about.
    pub masks: [Mask; 4],
    pub next_mask: usize,
    /// By teacher token, the last digit of it: the columns of the row before it.
    pub gathered: [Gathered; GATHERED],
    /// Columns of a row that are children of a node: place in the row, and the child.
    pub children: Vec<(u32, u32)>,
    /// Columns of a row that change what the text before them begins with: place in the row and
    /// id; and the student token that both begin with, where that is known.
    pub asked: Vec<(u32, u32)>,
    pub firsts: Vec<Option<u32>>,
    /// Places of the columns of a row that run past a boundary.
    pub longer: Vec<u32>,
    /// The ids of one row by their last bits.
    pub filter: Vec<u64>,
    pub filter_row: usize,
    /// Groups that are left out; see [`TargetOptions::sure`].
    pub doubted: Vec<u32>,
    pub inside: Inside,
}

impl Scratch {
    pub fn new() -> Self {
        Self {
            student_pairs: BoundaryMemo::new(),
            teacher_pairs: BoundaryMemo::new(),
            rests: FxHashMap::default(),
            texts: TextMemo::new(),
            words: WordMemo::default(),
            rows: Rows::default(),
            student_ids: Vec::new(),
            teacher_ids: Vec::new(),
            masses: Masses::new(),
            path: Vec::new(),
            nodes: Vec::new(),
            bytes: Vec::new(),
            pieces: Vec::new(),
            extra: Vec::new(),
            masks: std::array::from_fn(|_| Mask::new()),
            next_mask: 0,
            gathered: std::array::from_fn(|_| Gathered::new()),
            children: Vec::new(),
            asked: Vec::new(),
            firsts: Vec::new(),
            longer: Vec::new(),
            filter: Vec::new(),
            filter_row: usize::MAX,
            doubted: Vec::new(),
            inside: Inside::new(),
        }
    }

    /// Readies for another text; memos that have grown too large start anew.
    fn start(&mut self) {
        self.masks.iter_mut().for_each(Mask::forget);
        self.gathered.iter_mut().for_each(Gathered::forget);
        self.filter_row = usize::MAX;
        if self.rests.len() > MOST_TEXTS {
            self.rests.clear();
        }
        self.inside.start();
    }
}

/// One position while its target is built.
pub(super) struct Build<'a> {
    pub tables: &'a PairTables,
    pub options: &'a TargetOptions,
    pub rows: &'a Rows,
    pub teacher_ids: &'a [u32],
    pub place: Place,
    pub scratch: &'a mut Scratch,
    /// Whether a row after the path is known, and not only that the text's own token comes.
    pub closed: bool,
    /// The trie node of the cell of the path's first token.
    pub own_cell: u32,
    /// The mass that was given to groups, and of it that of longer tokens from earlier rows.
    given: f64,
    pub carried: f64,
}

/// The targets of all positions of an example, in order.
pub(super) fn build(
    tables: &PairTables,
    example: &TargetExample<'_>,
    options: &TargetOptions,
    scratch: &mut Scratch,
    targets: &mut Targets,
) -> Result<()> {
    let mut rows = std::mem::take(&mut scratch.rows);
    let mut student_ids = std::mem::take(&mut scratch.student_ids);
    let mut teacher_ids = std::mem::take(&mut scratch.teacher_ids);
    student_ids.clear();
    let twins = tables.student.twins();
    student_ids.extend(example.student_ids.iter().map(|&id| twins.of(id as u32)));
    teacher_ids.clear();
    teacher_ids.extend(example.teacher_ids.iter().map(|&id| id as u32));
    // Without cells a column is what W has of it.
    let twins = options.cells.then(|| tables.teacher.twins());
    if let Some(twins) = twins {
        teacher_ids.iter_mut().for_each(|id| *id = twins.of(*id));
    }
    rows.fill(
        &example.predictions,
        &teacher_ids,
        tables.columns.len(),
        options.min_prob,
        twins,
    )?;
    scratch.start();
    targets.reserve(student_ids.len(), rows.len() + student_ids.len());
    for_each_place(tables, example, &student_ids, &teacher_ids, |place| {
        let mut build = Build {
            tables,
            options,
            rows: &rows,
            teacher_ids: &teacher_ids,
            place,
            scratch: &mut *scratch,
            closed: false,
            own_cell: NONE,
            given: 0.0,
            carried: 0.0,
        };
        build.scratch.masses.clear(tables.key_count());
        if place.past > 0 {
            build.inside(targets);
        } else {
            build.boundary(targets);
        }
    });
    scratch.rows = rows;
    scratch.student_ids = student_ids;
    scratch.teacher_ids = teacher_ids;
    Ok(())
}

impl<'a> Build<'a> {
    /// Follows the text's teacher tokens until they cover its student token.
    pub fn find_path(&mut self) {
        self.scratch.path.clear();
        self.closed = false;
        let limit = if self.options.cells {
            self.options.max_depth
        } else {
            0
        };
        let size = self
            .place
            .own
            .map_or(0, |own| self.tables.student.bytes(own).len());
        let mut covered = 0;
        while self.scratch.path.len() < limit && covered < size + self.place.past {
            let at = self.place.teacher + self.scratch.path.len();
            let token = self.teacher_ids[at];
            let row = self.rows.of(at);
            if row.is_empty() {
                break;
            }
            if row.own_prob().is_none() {
                self.closed = true;
                break;
            }
            self.scratch.path.push(token);
            covered += self.tables.teacher.bytes(token).len();
        }
        let after = self.place.teacher + self.scratch.path.len();
        let known = !self.rows.of(after).is_empty();
        let ends_here = covered == size && self.place.past == 0;
        if self.scratch.path.is_empty() || (ends_here && known) {
            self.closed = true;
        }
    }

    fn boundary(&mut self, targets: &mut Targets) {
        self.find_path();
        let tables = self.tables;
        self.scratch.doubted.clear();
        self.scratch.nodes.clear();
        self.scratch.nodes.push(ROOT);
        let mut node = ROOT;
        for &token in &self.scratch.path {
            if node != NONE {
                node = tables.trie.child(node, token).unwrap_or(NONE);
            }
            self.scratch.nodes.push(node);
        }
        self.own_cell = match self.scratch.path.first() {
            Some(&token) => tables.columns[token as usize].cell,
            None => NONE,
        };
        let mut mass = 1.0;
        for depth in 0..self.scratch.path.len() + usize::from(self.closed) {
            if self.rows.of(self.place.teacher + depth).is_empty() {
                return;
            }
            if depth == 0 {
                self.place_first_row();
            } else {
                self.place_row_below(depth, mass);
            }
            if depth < self.scratch.path.len() {
                let row = self.rows.of(self.place.teacher + depth);
                mass *= row.own_prob().unwrap_or(0.0);
            }
        }
        if let (false, Some(own)) = (self.closed, self.place.own) {
            self.doubt_path();
            let group = self.group_of(own);
            self.add(group, mass);
        }
        // Nothing is known of texts before the first token of this one.
        if self.place.last.is_some() {
            let before = self.given;
            self.carry();
            self.carried = self.given - before;
        }
        self.emit(targets);
    }

    /// The row at the boundary: each token to its cell.
    fn place_first_row(&mut self) {
        let row = self.rows.of(self.place.teacher);
        let on_path = match self.scratch.path.is_empty() {
            true => NONE,
            false => row.own,
        };
        let slot = match self.place.last {
            Some(last) if self.options.consistent => Some(self.keep_mask(self.place.teacher, last)),
            _ => None,
        };
        if self.options.sure {
            self.doubt_row(on_path);
        }
        self.gather(self.place.teacher);
        // All but text of another cell than the text's own is rare, and between the others.
        let mut from = 0;
        loop {
            from = self.place_often(from, slot);
            if from == row.ids.len() {
                break;
            }
            if from != on_path as usize {
                self.place_column(row.ids[from], row.probs[from]);
            }
            from += 1;
        }
        self.scratch.masses.tail += row.tail();
    }

    /// Places the columns of the row at the boundary from one on, up to one that is left to
    /// [`Build::place_column`] or is the text's own, which is in its cell; its place.
    fn place_often(&mut self, from: usize, slot: Option<usize>) -> usize {
        let row = self.rows.of(self.place.teacher);
        let scratch = &mut *self.scratch;
        let cells = &scratch.gathered[self.place.teacher % GATHERED].cells[..];
        let kept = slot.map(|slot| scratch.masks[slot].keeps());
        if !self.options.cells {
            let keeps = |&at: &usize| kept.is_none_or(|kept| kept[at / 64] >> (at % 64) & 1 == 1);
            return (from..cells.len()).find(keeps).unwrap_or(cells.len());
        }
        let mut at = from;
        while at < cells.len() {
            let end = cells.len().min((at / 64 + 1) * 64);
            let word = kept.map_or(u64::MAX, |kept| kept[at / 64]) >> (at % 64);
            let columns = (&cells[at..end], &row.probs[at..end]);
            let added = scratch.masses.add_row(columns, word, self.own_cell);
            at += added;
            if at < end {
                break;
            }
        }
        at
    }

    fn place_column(&mut self, id: u32, prob: f64) {
        let tables = self.tables;
        let column = &tables.columns[id as usize];
        match column.kind() {
            ColumnKind::Text if !self.options.cells => {
                if let Some(node) = tables.trie.child(ROOT, id) {
                    self.add(node, prob);
                }
            }
            ColumnKind::Text if self.own_cell == NONE => self.scratch.masses.tail += prob,
            ColumnKind::Text => {
                let group = self.group_of(column.first);
                self.add(group, prob);
            }
            ColumnKind::Stop if tables.has_stops() => self.add(self.stop_key(), prob),
            ColumnKind::Special => self.add(self.stop_key() + 1 + column.first, prob),
            ColumnKind::Stop | ColumnKind::Dropped => {}
        }
    }

    /// The student tokens below a node.
    pub fn below(&self, node: u32) -> &'a [u32] {
        match node {
            NONE => &[],
            node => self.tables.trie.below(node),
        }
    }

    /// Gives mass to the group of the student token that comes first, if the boundary holds.
    pub fn give(&mut self, first: Option<u32>, mass: f64) {
        let Some(first) = first else {
            return;
        };
        if mass <= 0.0 || !self.holds(first) {
            return;
        }
        self.give_kept(first, mass);
    }

    /// As [`Build::give`], where the boundary is known to hold.
    pub fn give_kept(&mut self, first: u32, mass: f64) {
        self.given += mass;
        let head = &self.tables.heads[first as usize];
        if self.options.cells && head.cell != self.own_cell {
            match head.cell {
                NONE => self.scratch.masses.tail += mass,
                cell => self.scratch.masses.add_cell(cell, mass),
            }
        } else {
            let group = self.group_of(first);
            self.add(group, mass);
        }
    }

    pub fn add(&mut self, key: u32, mass: f64) {
        // Looked up once for each key: only a new one needs its range.
        let range = match self.scratch.masses.find(key) {
            Some(_) => (0, 0),
            None => self.own_range(key),
        };
        self.scratch.masses.add(key, mass, range);
    }

    /// Leaves of some tokens those before which the student still has its boundary.
    pub fn drop_lost(&mut self, firsts: &mut [Option<u32>]) {
        let heads = &self.tables.heads;
        let mut after = match self.place.last {
            Some(last) if self.options.consistent => {
                let memo = &mut self.scratch.student_pairs;
                Some(self.tables.student.after(last, memo))
            }
            _ => None,
        };
        for first in firsts {
            let holds = |token: u32| match &mut after {
                _ if token == NONE => false,
                Some(after) => after.keeps(&heads[token as usize].next()),
                None => true,
            };
            if !first.is_some_and(holds) {
                *first = None;
            }
        }
    }

    /// Whether the student still has its boundary when this token follows.
    pub fn holds(&mut self, first: u32) -> bool {
        match self.place.last {
            Some(last) if self.options.consistent => {
                let next = self.tables.heads[first as usize].next();
                let memo = &mut self.scratch.student_pairs;
                self.tables.student.after(last, memo).keeps(&next)
            }
            _ => true,
        }
    }

    fn stop_key(&self) -> u32 {
        2 * self.tables.trie.len() as u32
    }

    /// The key of the tokens that end at a node of the path.
    fn end_key(&self, node: u32) -> u32 {
        self.tables.trie.len() as u32 + node
    }

    /// The key of the group that a student token is in: the node at which its pieces part from the
    /// path, or the end of the path's node that it is; [`NONE`] for the tail.
    pub fn group_of(&self, token: u32) -> u32 {
        let tables = self.tables;
        let (path, nodes) = (&self.scratch.path, &self.scratch.nodes);
        let mut token = token;
        // Each turn makes the text shorter, or its spelling the tokenizer's own.
        for _ in 0..64 {
            let pieces = tables.trie.token_pieces().of(token);
            let Some(&first) = pieces.first() else {
                return NONE;
            };
            if !self.options.cells {
                return tables.trie.child(ROOT, first).unwrap_or(NONE);
            }
            let matched = pieces.iter().zip(path).take_while(|(a, b)| a == b).count();
            if matched == path.len() && matched > 0 && !self.closed {
                let own = self.place.own.unwrap_or(NONE);
                if tables.student.twins().of(token) == own {
                    return self.end_key(nodes[matched]);
                }
                if own == NONE {
                    return NONE;
                }
                token = own;
                continue;
            }
            if matched == pieces.len() {
                return self.end_key(nodes[matched]);
            }
            if matched == 0 {
                let spelled = tables.teacher_pieces.of(first);
                if spelled.len() == 1 && tables.root[first as usize] == first {
                    return tables.trie.child(ROOT, first).unwrap_or(NONE);
                }
                match spelled.first() {
                    Some(&shorter) if tables.root[first as usize] != NONE => token = shorter,
                    _ => return NONE,
                }
                continue;
            }
            let Some(node) = tables.trie.child(nodes[matched], pieces[matched]) else {
                return NONE;
            };
            if tables.trie.end_count(node) > 0 {
                return node;
            }
            match tables.nodes[node as usize].first {
                NONE => return NONE,
                shorter => token = shorter,
            }
        }
        NONE
    }
}
