//! Groups that are left out because longer student tokens would decide otherwise; see
//! [`TargetOptions::sure`](super::TargetOptions::sure).

use super::NONE;
use super::position::Build;
use crate::trie::ROOT;

impl Build<'_> {
    /// As [`Build::doubt`], of each column of the row at the boundary.
    pub fn doubt_row(&mut self, on_path: u32) {
        let tables = self.tables;
        let row = self.rows.of(self.place.teacher);
        let (true, Some(last)) = (self.options.consistent, self.place.last) else {
            return;
        };
        for (place, &id) in (0u32..).zip(row.ids) {
            let column = &tables.columns[id as usize];
            let text = column.is_text() && place != on_path;
            if text && tables.student.may_join(last, column.first) {
                let node = tables.trie.child(ROOT, id).unwrap_or(NONE);
                self.doubt(Some(column.first), self.below(node));
            }
        }
    }

    /// Marks groups that longer tokens, where the text goes on so, would move mass into, out of or
    /// between.
    pub fn doubt(&mut self, first: Option<u32>, longer: &[u32]) {
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
    pub fn doubt_path(&mut self) {
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
    pub fn doubt_rest(&mut self, at: usize, token: u32, first: Option<u32>) {
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
}
