//! Which student tokens are in a group inside a teacher token: all that begin with the group's, but
//! those before which the teacher has a boundary.

use super::NONE;
use super::groups::Targets;
use super::position::Build;

impl Build<'_> {
    /// Adds the tokens that begin with `token`, in a stretch of the order of bytes, but those before
    /// which the teacher has a boundary.
    pub(super) fn push_members(
        &mut self,
        targets: &mut Targets,
        last: Option<u32>,
        token: u32,
        strict: bool,
        (start, end): (u32, u32),
    ) {
        if start >= end {
            return;
        }
        let key = (last.unwrap_or(NONE), token, strict);
        if !self.scratch.inside.members.contains_key(&key) {
            let found = self.members(last, token, strict);
            self.scratch.inside.members.insert(key, found);
        }
        for &(from, to) in &self.scratch.inside.members[&key] {
            let (from, to) = (from.max(start), to.min(end));
            if from < to {
                targets.push_range(self.tables.by_bytes(from, to));
            }
        }
    }

    fn members(&mut self, last: Option<u32>, token: u32, strict: bool) -> Vec<(u32, u32)> {
        let tables = self.tables;
        let (student, teacher) = (&tables.student, &tables.teacher);
        let order = student.order[token as usize];
        let Some(last) = last else {
            return vec![(order.equal_start, order.prefix_end)];
        };
        let mut after = teacher.after(last, &mut self.scratch.teacher_pairs);
        // As `may_end_before`, of all members: of how many of the longer tokens up to each place.
        let ending = &mut self.scratch.inside.ending;
        let longer = tables.teacher_longer[token as usize];
        ending.clear();
        if strict {
            ending.push(0);
            for at in longer.0..longer.1 {
                let ends = after.keeps(&teacher.next(teacher.sorted[at as usize]));
                ending.push(ending[ending.len() - 1] + u32::from(ends));
            }
        }
        let mut found: Vec<(u32, u32)> = Vec::new();
        // Tokens that are neighbours often begin with the same piece.
        let mut recent = (NONE, false);
        for at in order.equal_start..order.prefix_end {
            let member = student.sorted[at as usize];
            let mut left_out = false;
            if let Some(&first) = tables.trie.token_pieces().of(member).first() {
                if recent.0 != first {
                    let ends = teacher.bytes(first).is_empty();
                    recent = (first, ends || after.keeps(&teacher.next(first)));
                }
                left_out = recent.1;
            }
            if strict {
                let (start, end) = tables.teacher_longer[member as usize];
                left_out |= start < end
                    && ending[(end - longer.0) as usize] > ending[(start - longer.0) as usize];
            }
            match found.last_mut() {
                _ if left_out => {}
                Some(stretch) if stretch.1 == at => stretch.1 = at + 1,
                _ => found.push((at, at + 1)),
            }
        }
        found
    }

    pub(super) fn is_left_out(&mut self, last: Option<u32>, token: u32, strict: bool) -> bool {
        let Some(left) = last else {
            return false;
        };
        let known = self.scratch.texts.get_left_out(left, token, strict);
        known.unwrap_or_else(|| {
            let found =
                self.ends_before(last, token) || (strict && self.may_end_before(left, token));
            let texts = &mut self.scratch.texts;
            texts.insert_left_out(left, token, strict, found);
            found
        })
    }

    /// Whether the teacher has a boundary between its token `last` and some longer token of its own
    /// than this student token.
    fn may_end_before(&mut self, last: u32, token: u32) -> bool {
        let teacher = &self.tables.teacher;
        let (start, end) = self.tables.teacher_longer[token as usize];
        let mut after = teacher.after(last, &mut self.scratch.teacher_pairs);
        (start..end).any(|at| after.keeps(&teacher.next(teacher.sorted[at as usize])))
    }

    /// Whether the teacher has a boundary between its token `last` and this student token.
    pub(super) fn ends_before(&mut self, last: Option<u32>, token: u32) -> bool {
        let pieces = self.tables.trie.token_pieces().of(token);
        let (Some(last), Some(&first)) = (last, pieces.first()) else {
            return false;
        };
        debug_assert_ne!(last, NONE);
        let memo = &mut self.scratch.teacher_pairs;
        self.tables.teacher.keeps(last, first, memo)
    }
}
