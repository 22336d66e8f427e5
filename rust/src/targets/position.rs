//! The target of one student position at a common boundary, and the walk over all positions.

use rustc_hash::FxHashMap;

use super::groups::{Masses, Targets};
use super::pair::{ColumnKind, PairMemo, PairTables, has};
use super::rows::Rows;
use super::{NONE, TargetExample, TargetOptions, is_exact, is_special};
use crate::trie::ROOT;

/// Buffers of one thread.
#[derive(Debug)]
pub(super) struct Scratch {
    pub student_pairs: PairMemo,
    pub teacher_pairs: PairMemo,
    /// By teacher token and bytes of it that are past: the student token that the rest starts with.
    rests: FxHashMap<(u32, u32), u32>,
    rows: Rows,
    student_ids: Vec<u32>,
    teacher_ids: Vec<u32>,
    pub masses: Masses,
    /// The text's own teacher tokens from the boundary on, and the trie nodes that they lead to.
    pub path: Vec<u32>,
    nodes: Vec<u32>,
    pub bytes: Vec<u8>,
    pub pieces: Vec<u32>,
    extra: Vec<(u32, (u32, u32))>,
    /// Groups that are left out; see [`TargetOptions::sure`].
    doubted: Vec<u32>,
    /// By the teacher token before a boundary and a student token behind it: the stretches of the
    /// student's order of bytes that begin with it and before which the teacher has no boundary.
    pub members: FxHashMap<(u32, u32), Vec<(u32, u32)>>,
    pub by_token: Vec<(u32, f64)>,
}

/// Beyond this the memo of rests starts anew.
const MOST_RESTS: usize = 1 << 20;

impl Scratch {
    pub fn new(tables: &PairTables) -> Self {
        let keys = 2 * tables.trie.len() + 1 + tables.special_count as usize;
        Self {
            student_pairs: PairMemo::new(),
            teacher_pairs: PairMemo::new(),
            rests: FxHashMap::default(),
            rows: Rows::default(),
            student_ids: Vec::new(),
            teacher_ids: Vec::new(),
            masses: Masses::new(keys),
            path: Vec::new(),
            nodes: Vec::new(),
            bytes: Vec::new(),
            pieces: Vec::new(),
            extra: Vec::new(),
            doubted: Vec::new(),
            members: FxHashMap::default(),
            by_token: Vec::new(),
        }
    }
}

/// Where a student position is.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place {
    pub position: usize,
    pub chunk: usize,
    /// The teacher token at or around the boundary.
    pub teacher: usize,
    /// Bytes of it that are before the boundary.
    pub past: usize,
    /// The text's own student token here; none where a special one is.
    pub own: Option<u32>,
    /// The student token before, where it is text.
    pub last: Option<u32>,
    /// The first teacher token of the text without a gap up to here.
    pub text_start: usize,
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
    own_cell: u32,
}

/// The targets of all positions of an example, in order.
pub(super) fn build(
    tables: &PairTables,
    example: &TargetExample<'_>,
    options: &TargetOptions,
    scratch: &mut Scratch,
    targets: &mut Targets,
) {
    let mut rows = std::mem::take(&mut scratch.rows);
    let mut student_ids = std::mem::take(&mut scratch.student_ids);
    let mut teacher_ids = std::mem::take(&mut scratch.teacher_ids);
    rows.fill(tables, &example.predictions, options.min_prob);
    student_ids.clear();
    student_ids.extend(example.student_ids.iter().map(|&id| id as u32));
    teacher_ids.clear();
    teacher_ids.extend(example.teacher_ids.iter().map(|&id| id as u32));
    if scratch.rests.len() > MOST_RESTS {
        scratch.rests.clear();
    }
    if scratch.members.len() > MOST_RESTS {
        scratch.members.clear();
    }
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
        };
        build.scratch.masses.clear();
        if place.past > 0 {
            build.inside(targets);
        } else {
            build.boundary(targets);
        }
    });
    scratch.rows = rows;
    scratch.student_ids = student_ids;
    scratch.teacher_ids = teacher_ids;
}

fn for_each_place(
    tables: &PairTables,
    example: &TargetExample<'_>,
    student_ids: &[u32],
    teacher_ids: &[u32],
    mut visit: impl FnMut(Place),
) {
    // Where the text that has no gap up to here began, on both sides.
    let mut run: Option<(usize, usize)> = None;
    for (chunk, &kind) in example.kinds.iter().enumerate() {
        let range = |bounds: &[i64]| bounds[chunk] as usize..bounds[chunk + 1] as usize;
        let (student, teacher) = (range(example.student_bounds), range(example.teacher_bounds));
        if student.is_empty() || teacher.is_empty() {
            run = None;
            continue;
        }
        let student_size = |s: &u32| tables.student.bytes(*s).len();
        let teacher_size = |t: &u32| tables.teacher.bytes(*t).len();
        let sizes = (
            student_ids[student.clone()]
                .iter()
                .map(student_size)
                .sum::<usize>(),
            teacher_ids[teacher.clone()]
                .iter()
                .map(teacher_size)
                .sum::<usize>(),
        );
        // A dummy prefix makes a chunk exact whose tokens differ by a space.
        let exact = is_exact(kind) && sizes.0 == sizes.1 && sizes.0 > 0;
        if !exact && !is_special(kind) {
            run = None;
            continue;
        }
        let (student_start, text_start) = run.unwrap_or((student.start, teacher.start));
        let place = Place {
            position: student.start,
            chunk,
            teacher: teacher.start,
            past: 0,
            own: None,
            last: None,
            text_start,
        };
        let last = |position: usize| (position > student_start).then(|| student_ids[position - 1]);
        if !exact {
            if student.start > 0 {
                visit(Place {
                    last: last(student.start),
                    ..place
                });
            }
            run = None;
            continue;
        }
        run = Some((student_start, text_start));
        let (mut at, mut past) = (teacher.start, 0);
        for position in student {
            while at < teacher.end && past >= teacher_size(&teacher_ids[at]) {
                past -= teacher_size(&teacher_ids[at]);
                at += 1;
            }
            // Tokens without bytes at the end of a chunk leave nothing to compare with.
            if position > 0 && at < teacher.end {
                visit(Place {
                    position,
                    teacher: at,
                    past,
                    own: Some(student_ids[position]),
                    last: last(position),
                    ..place
                });
            }
            past += student_size(&student_ids[position]);
        }
    }
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
            if self.rows.of(at).is_empty() {
                break;
            }
            if self.rows.prob(at, token).is_none() {
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
            let on_path = self.scratch.path.get(depth).copied();
            if depth == 0 {
                self.place_first_row(on_path);
            } else {
                self.place_row_below(depth, mass, on_path);
            }
            if let Some(token) = on_path {
                mass *= self
                    .rows
                    .prob(self.place.teacher + depth, token)
                    .unwrap_or(0.0);
            }
        }
        if let (false, Some(own)) = (self.closed, self.place.own) {
            self.doubt_path();
            let group = self.group_of(own);
            self.add(group, mass);
        }
        // Nothing is known of texts before the first token of this one.
        if self.place.last.is_some() {
            self.carry();
        }
        self.emit(targets);
    }

    /// The row at the boundary: each token to its cell.
    fn place_first_row(&mut self, on_path: Option<u32>) {
        let tables = self.tables;
        let swallow = match self.place.last {
            Some(last) if self.options.consistent => tables.student.may_swallow(last),
            _ => [0; 4],
        };
        let last = self.place.last.unwrap_or(NONE);
        let on_path = on_path.unwrap_or(NONE);
        let rows = self.rows;
        let mut listed = 0.0;
        for entry in rows.of(self.place.teacher) {
            listed += entry.prob;
            if entry.id == on_path {
                continue;
            }
            let column = entry.column;
            match column.kind {
                ColumnKind::Text => {
                    if has(&swallow, column.first_byte) {
                        if self.options.sure {
                            let node = tables.trie.child(ROOT, entry.id).unwrap_or(NONE);
                            self.doubt(Some(column.first), self.below(node));
                        }
                        let memo = &mut self.scratch.student_pairs;
                        if !tables.student.keeps(last, column.first, memo) {
                            continue;
                        }
                    }
                    if !self.options.cells {
                        if let Some(node) = tables.trie.child(ROOT, entry.id) {
                            self.add(node, entry.prob);
                        }
                    } else if column.cell == self.own_cell && self.own_cell != NONE {
                        let group = self.group_of(column.first);
                        self.add(group, entry.prob);
                    } else {
                        let masses = &mut self.scratch.masses;
                        masses.add(column.cell, entry.prob, column.cell_range);
                    }
                }
                ColumnKind::Stop => {
                    self.add(self.stop_key(), entry.prob);
                }
                ColumnKind::Special => {
                    self.add(self.stop_key() + 1 + column.first, entry.prob);
                }
                ColumnKind::Dropped => {}
            }
        }
        self.scratch.masses.tail += tail(listed);
    }

    /// A row behind the first `depth` tokens of the path.
    fn place_row_below(&mut self, depth: usize, mass: f64, on_path: Option<u32>) {
        let tables = self.tables;
        let node = self.scratch.nodes[depth];
        let mut prefix = Vec::new();
        for &token in &self.scratch.path[..depth] {
            prefix.extend_from_slice(tables.teacher.bytes(token));
        }
        let prefix_first = match node {
            NONE => tables
                .student
                .first_piece(&prefix, &mut self.scratch.pieces),
            node => Some(tables.node_first[node as usize]).filter(|&first| first != NONE),
        };
        // The student token that is the path itself: what follows decides whether it stays.
        let whole = prefix_first.filter(|&first| tables.student.bytes(first) == prefix);
        let swallow = whole.map(|token| tables.student.may_swallow(token));
        let pairwise = tables.student.is_pairwise();
        let has_children = node != NONE && tables.trie.children(node).len() > 0;
        let on_path = on_path.unwrap_or(NONE);
        let rows = self.rows;
        let (mut listed, mut stays) = (0.0, 0.0);
        for entry in rows.of(self.place.teacher + depth) {
            listed += entry.prob;
            if entry.id == on_path {
                continue;
            }
            let text = tables.teacher.bytes(entry.id);
            if text.is_empty() || entry.column.kind == ColumnKind::Stop {
                stays += entry.prob;
                continue;
            }
            let child = if has_children {
                tables.trie.child(node, entry.id)
            } else {
                None
            };
            if let Some(child) = child {
                let first = Some(tables.node_first[child as usize]).filter(|&first| first != NONE);
                if self.options.sure {
                    self.doubt(first, self.below(child));
                }
                self.give(first, mass * entry.prob);
                continue;
            }
            if let (Some(token), Some(swallow), ColumnKind::Text) =
                (whole, &swallow, entry.column.kind)
            {
                let memo = &mut self.scratch.student_pairs;
                if !has(swallow, entry.column.first_byte)
                    || (pairwise && tables.student.keeps(token, entry.column.first, memo))
                {
                    stays += entry.prob;
                    continue;
                }
            }
            let length = prefix.len();
            prefix.extend_from_slice(text);
            let first = tables
                .student
                .first_piece(&prefix, &mut self.scratch.pieces);
            prefix.truncate(length);
            self.give(first, mass * entry.prob);
        }
        self.give(prefix_first, mass * (stays + tail(listed)));
    }

    /// Tokens of earlier rows that run past the boundary.
    fn carry(&mut self) {
        let mut scale = 1.0;
        for level in 1..=self.options.levels {
            let Some(at) = self.place.teacher.checked_sub(level) else {
                return;
            };
            if at < self.place.text_start {
                return;
            }
            match self.rows.prob(at, self.teacher_ids[at]) {
                Some(prob) => scale /= prob,
                None => return,
            }
            self.for_each_longer(at, |build, token, first, prob| {
                if build.options.sure {
                    build.doubt_rest(at, token, first);
                }
                build.give(first, prob * scale);
            });
        }
    }

    /// Visits the tokens of a row that begin with the text from there to the boundary and go on:
    /// the token, the student token that its rest starts with, and its probability.
    pub fn for_each_longer(
        &mut self,
        at: usize,
        mut visit: impl FnMut(&mut Self, u32, Option<u32>, f64),
    ) {
        let (tables, rows) = (self.tables, self.rows);
        let whole = &self.teacher_ids[at..self.place.teacher];
        let (longer, length) = if let (&[token], 0) = (whole, self.place.past) {
            let order = tables.teacher.order[token as usize];
            (
                order.equal_end..order.prefix_end,
                tables.teacher.bytes(token).len(),
            )
        } else {
            let bytes = &mut self.scratch.bytes;
            bytes.clear();
            for &token in whole {
                bytes.extend_from_slice(tables.teacher.bytes(token));
            }
            if self.place.past > 0 {
                let around = tables.teacher.bytes(self.teacher_ids[self.place.teacher]);
                bytes.extend_from_slice(&around[..self.place.past]);
            }
            (tables.teacher.longer_than(bytes), bytes.len())
        };
        if longer.is_empty() {
            return;
        }
        for entry in rows.of(at) {
            let text = matches!(entry.column.kind, ColumnKind::Text | ColumnKind::Dropped);
            if text && longer.contains(&entry.column.rank) {
                let first = self.first_of_rest(entry.id, length);
                visit(self, entry.id, first, entry.prob);
            }
        }
    }

    fn first_of_rest(&mut self, token: u32, past: usize) -> Option<u32> {
        let tables = self.tables;
        let pieces = &mut self.scratch.pieces;
        let found = self
            .scratch
            .rests
            .entry((token, past as u32))
            .or_insert_with(|| {
                let rest = &tables.teacher.bytes(token)[past..];
                tables.student.first_piece(rest, pieces).unwrap_or(NONE)
            });
        (*found != NONE).then_some(*found)
    }

    /// The student tokens below a node.
    fn below(&self, node: u32) -> &'a [u32] {
        match node {
            NONE => &[],
            node => self.tables.trie.below(node),
        }
    }

    /// Marks groups that longer tokens, where the text goes on so, would move mass into, out of or
    /// between.
    fn doubt(&mut self, first: Option<u32>, longer: &[u32]) {
        let start = self.scratch.doubted.len();
        let (mut held, mut lost) = (false, false);
        for token in first.into_iter().chain(longer.iter().copied()) {
            if self.holds(token) {
                held = true;
                let group = self.group_of(token);
                if group != NONE && !self.scratch.doubted[start..].contains(&group) {
                    self.scratch.doubted.push(group);
                }
            } else {
                lost = true;
            }
        }
        if self.scratch.doubted.len() - start < 2 && !(held && lost) {
            self.scratch.doubted.truncate(start);
        }
    }

    /// As [`Build::doubt`], of the path as a whole.
    fn doubt_path(&mut self) {
        if !self.options.sure || self.scratch.path.is_empty() {
            return;
        }
        let tables = self.tables;
        let mut text = Vec::new();
        for &token in &self.scratch.path {
            text.extend_from_slice(tables.teacher.bytes(token));
        }
        let first = tables.student.first_piece(&text, &mut self.scratch.pieces);
        let node = self.scratch.nodes.last().copied().unwrap_or(NONE);
        self.doubt(first, self.below(node));
    }

    /// As [`Build::doubt`], of what is left of a teacher token from an earlier row.
    fn doubt_rest(&mut self, at: usize, token: u32, first: Option<u32>) {
        let tables = self.tables;
        let size = |t: &u32| tables.teacher.bytes(*t).len();
        let past: usize = self.teacher_ids[at..self.place.teacher]
            .iter()
            .map(size)
            .sum();
        let rest = &tables.teacher.bytes(token)[past..];
        let last = self.teacher_ids[self.place.teacher - 1];
        let last = tables
            .teacher
            .last_piece(tables.teacher.bytes(last), &mut self.scratch.pieces);
        let sorted = &tables.student.sorted;
        let start = sorted.partition_point(|&id| tables.student.bytes(id) < rest);
        let longer: Vec<u32> = sorted[start..]
            .iter()
            .copied()
            .take_while(|&id| tables.student.bytes(id).starts_with(rest))
            .collect();
        let kept: Vec<u32> = longer
            .into_iter()
            .filter(|&id| !self.ends_before(last, id))
            .collect();
        self.doubt(first, &kept);
    }

    /// Gives mass to the group of the student token that comes first, if the boundary holds.
    fn give(&mut self, first: Option<u32>, mass: f64) {
        let Some(first) = first else {
            return;
        };
        if mass > 0.0 && self.holds(first) {
            let group = self.group_of(first);
            self.add(group, mass);
        }
    }

    fn add(&mut self, key: u32, mass: f64) {
        // Looked up once for each key: only a new one needs its range.
        let range = match self.scratch.masses.find(key) {
            Some(_) => (0, 0),
            None => self.own_range(key),
        };
        self.scratch.masses.add(key, mass, range);
    }

    /// The tokens that are in a group whatever the path; those along it are `extra`.
    fn own_range(&self, key: u32) -> (u32, u32) {
        let tables = self.tables;
        let node_count = tables.trie.len() as u32;
        if key == NONE {
            (0, 0)
        } else if key == 2 * node_count {
            tables.stops()
        } else if key > 2 * node_count {
            tables.special(key - 2 * node_count - 1)
        } else if key >= node_count {
            let node = key - node_count;
            let last = self.scratch.nodes.last().copied();
            if self.closed || Some(node) != last {
                tables.ending_at(node)
            } else {
                (0, 0)
            }
        } else if tables.node_depth[key as usize] > 1 || !self.options.cells {
            tables.below(key)
        } else if key != self.own_cell {
            tables.cell(tables.node_column[key as usize])
        } else {
            (0, 0)
        }
    }

    /// Whether the student still has its boundary when this token follows.
    pub fn holds(&mut self, first: u32) -> bool {
        match self.place.last {
            Some(last) if self.options.consistent => {
                let memo = &mut self.scratch.student_pairs;
                self.tables.student.keeps(last, first, memo)
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
    fn group_of(&self, token: u32) -> u32 {
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
                if token == own {
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
            match tables.node_first[node as usize] {
                NONE => return NONE,
                shorter => token = shorter,
            }
        }
        NONE
    }

    fn emit(&mut self, targets: &mut Targets) {
        let open = !self.scratch.doubted.is_empty();
        if open {
            self.scratch.masses.tail = 0.0;
            for at in 0..self.scratch.doubted.len() {
                let group = self.scratch.doubted[at];
                self.scratch.masses.remove(group);
            }
        }
        let total = self.scratch.masses.total();
        if total.is_nan() || total <= 0.0 {
            return;
        }
        self.find_extra_ranges();
        let tables = self.tables;
        let node_count = tables.trie.len() as u32;
        let scratch = &mut *self.scratch;
        scratch.extra.sort_by_key(|extra| extra.0);
        let mut extra = scratch.extra.iter().peekable();
        let places = scratch.masses.keys.iter().zip(&scratch.masses.masses);
        for (place, (&key, &mass)) in (0u32..).zip(places) {
            if mass <= 0.0 {
                while extra.next_if(|extra| extra.0 == place).is_some() {}
                continue;
            }
            let depth = if key < node_count {
                tables.node_depth[key as usize].saturating_sub(1)
            } else if key < 2 * node_count {
                tables.node_depth[(key - node_count) as usize]
            } else {
                0
            };
            targets.push_group(mass / total, depth);
            targets.push_range(scratch.masses.ranges[place as usize]);
            while let Some(&(_, range)) = extra.next_if(|extra| extra.0 == place) {
                targets.push_range(range);
            }
            targets.end_group();
        }
        let Place {
            position, chunk, ..
        } = self.place;
        targets.end_position(position, chunk, scratch.masses.tail / total, open);
    }

    /// The student tokens along the path that no node of their own stands for.
    fn find_extra_ranges(&mut self) {
        self.scratch.extra.clear();
        let tables = self.tables;
        let Some(&first) = self.scratch.path.first() else {
            return;
        };
        let cell = tables.root[first as usize];
        if cell != NONE {
            for &column in tables
                .cell_columns
                .of(cell)
                .iter()
                .filter(|&&column| column != first)
            {
                let Some(node) = tables.trie.child(ROOT, column) else {
                    continue;
                };
                let group = if column == cell {
                    node
                } else {
                    match tables.teacher_pieces.of(column).first() {
                        Some(&shorter) => self.group_of(shorter),
                        None => NONE,
                    }
                };
                self.add_extra(group, tables.below(node));
            }
        }
        let depths = self.scratch.path.len();
        for depth in 1..=depths {
            let node = self.scratch.nodes[depth];
            if node == NONE {
                return;
            }
            if depth == depths && !self.closed {
                let group = self.place.own.map_or(NONE, |own| self.group_of(own));
                self.add_extra(group, tables.below(node));
                return;
            }
            let next = self.scratch.nodes.get(depth + 1).copied().unwrap_or(NONE);
            let children = tables.inexact_ptr[node as usize]..tables.inexact_ptr[node as usize + 1];
            for &child in &tables.inexact[children.start as usize..children.end as usize] {
                let first = tables.node_first[child as usize];
                if child != next && first != NONE {
                    let group = self.group_of(first);
                    self.add_extra(group, tables.below(child));
                }
            }
        }
    }

    fn add_extra(&mut self, group: u32, range: (u32, u32)) {
        if let Some(place) = self.scratch.masses.find(group) {
            self.scratch.extra.push((place as u32, range));
        }
    }
}

/// What a row says of all columns that are not listed.
pub(super) fn tail(listed: f64) -> f64 {
    let rest = 1.0 - listed;
    if rest > 1e-12 { rest } else { 0.0 }
}
