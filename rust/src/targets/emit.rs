//! From the masses of a position to its groups and their tokens.

use super::NONE;
use super::columns::ColumnKind;
use super::groups::{Account, Targets};
use super::mask::Mask;
use super::places::Place;
use super::position::Build;
use crate::trie::ROOT;

impl Build<'_> {
    /// The tokens that are in a group whatever the path; those along it are `extra`.
    pub fn own_range(&self, key: u32) -> (u32, u32) {
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
        } else if tables.nodes[key as usize].depth > 1 || !self.options.cells {
            tables.below(key)
        } else if key != self.own_cell {
            tables.cell(tables.nodes[key as usize].column)
        } else {
            (0, 0)
        }
    }

    pub fn emit(&mut self, targets: &mut Targets) {
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
        let scale = 1.0 / total;
        let depth_of = |key: u32| {
            if key <= tables.last_column || key >= 2 * node_count {
                0
            } else if key < node_count {
                tables.nodes[key as usize].depth.saturating_sub(1)
            } else {
                tables.nodes[(key - node_count) as usize].depth
            }
        };
        targets.push_groups(
            &scratch.masses,
            &tables.cells,
            &scratch.extra,
            scale,
            depth_of,
        );
        let Place {
            position, chunk, ..
        } = self.place;
        let account = self.account();
        let tail = match open {
            true => 1.0, // nothing is sure of all others
            false => self.scratch.masses.tail / total,
        };
        targets.end_position(position, chunk, tail, open, account);
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
            for &child in tables.inexact(node) {
                let first = tables.nodes[child as usize].first;
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

    /// What became of the mass of the row at the boundary.
    fn account(&self) -> Account {
        let mut account = Account {
            carried: self.carried as f32,
            ..Account::default()
        };
        if !self.options.accounts {
            return account;
        }
        let tables = self.tables;
        let row = self.rows.of(self.place.teacher);
        let last = self.place.last.filter(|_| self.options.consistent);
        let found = |mask: &&Mask| last.is_some_and(|last| mask.is_of(self.place.teacher, last));
        let mask = self.scratch.masks.iter().find(found);
        for (place, (&id, &prob)) in row.ids.iter().zip(row.probs).enumerate() {
            let prob = prob as f32;
            let on_path = place == row.own as usize && !self.scratch.path.is_empty();
            match tables.columns[id as usize].kind() {
                ColumnKind::Stop if tables.has_stops() => {}
                ColumnKind::Stop | ColumnKind::Dropped => account.dropped += prob,
                ColumnKind::Text => {
                    let kept =
                        mask.is_none_or(|mask| mask.keeps()[place / 64] >> (place % 64) & 1 == 1);
                    if !kept && !on_path {
                        account.left_out += prob;
                    }
                    if tables.trie.child(ROOT, id).is_none() {
                        account.unreached += prob;
                    }
                }
                ColumnKind::Special => {}
            }
        }
        account
    }
}
