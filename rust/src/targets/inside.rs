//! The target of a student position inside a teacher token: the teacher's tokens that begin with
//! the bytes so far, by the student token that what is left of them starts with.

use super::NONE;
use super::groups::Targets;
use super::position::{Build, tail};

impl Build<'_> {
    pub(super) fn inside(&mut self, targets: &mut Targets) {
        if !self.options.cells || self.options.levels == 0 {
            return;
        }
        self.find_path();
        self.scratch.by_token.clear();
        let on_path = self.scratch.path.first().copied();
        let (mut scale, mut mass) = (1.0, 0.0);
        for level in 0..self.options.levels {
            let Some(at) = self.place.teacher.checked_sub(level) else {
                break;
            };
            if at < self.place.text_start || self.rows.of(at).is_empty() {
                break;
            }
            if level > 0 {
                match self.rows.prob(at, self.teacher_ids[at]) {
                    Some(prob) => scale /= prob,
                    None => break,
                }
            }
            self.for_each_longer(at, |build, token, first, prob| {
                if level == 0 && Some(token) == on_path {
                    mass = prob;
                } else {
                    build.give_token(first, prob * scale);
                }
            });
        }
        if on_path.is_some() && !self.follow_path(mass) {
            return;
        }
        self.emit_inside(targets);
    }

    /// The rows behind the text's own tokens; false where one of them is not known.
    fn follow_path(&mut self, mut mass: f64) -> bool {
        let tables = self.tables;
        let around = self.scratch.path[0];
        let mut prefix = tables.teacher.bytes(around)[self.place.past..].to_vec();
        for depth in 1..self.scratch.path.len() + usize::from(self.closed) {
            let row = self.rows.of(self.place.teacher + depth);
            if row.is_empty() {
                return false;
            }
            let on_path = self.scratch.path.get(depth).copied();
            let (length, mut listed) = (prefix.len(), 0.0);
            let mut on_path_prob = 0.0;
            for entry in row {
                listed += entry.prob;
                if Some(entry.id) == on_path {
                    on_path_prob = entry.prob;
                    continue;
                }
                prefix.extend_from_slice(tables.teacher.bytes(entry.id));
                let first = tables
                    .student
                    .first_piece(&prefix, &mut self.scratch.pieces);
                prefix.truncate(length);
                self.give_token(first, mass * entry.prob);
            }
            let first = tables
                .student
                .first_piece(&prefix, &mut self.scratch.pieces);
            self.give_token(first, mass * tail(listed));
            if let Some(token) = on_path {
                mass *= on_path_prob;
                prefix.extend_from_slice(tables.teacher.bytes(token));
            }
        }
        if let (false, Some(own)) = (self.closed, self.place.own) {
            self.add_token(own, mass);
        }
        true
    }

    fn give_token(&mut self, first: Option<u32>, mass: f64) {
        if let Some(first) = first
            && mass > 0.0
            && self.holds(first)
        {
            self.add_token(first, mass);
        }
    }

    fn add_token(&mut self, token: u32, mass: f64) {
        let by_token = &mut self.scratch.by_token;
        match by_token.iter_mut().find(|entry| entry.0 == token) {
            Some(entry) => entry.1 += mass,
            None => by_token.push((token, mass)),
        }
    }

    /// Groups by the longest of the tokens found that a student token begins with. One before which
    /// the teacher has a boundary is in none: its mass is not that of a longer teacher token.
    fn emit_inside(&mut self, targets: &mut Targets) {
        let tables = self.tables;
        let before = &tables.teacher.bytes(self.teacher_ids[self.place.teacher])[..self.place.past];
        let last = tables.teacher.last_piece(before, &mut self.scratch.pieces);
        let found = std::mem::take(&mut self.scratch.by_token);
        // Student tokens with the bytes of one found, and all that begin so, are one range of the
        // order of bytes; ranges are nested or apart.
        let order = |token: u32| tables.student.order[token as usize];
        let kept: Vec<bool> = found
            .iter()
            .map(|&(token, _)| !self.ends_before(last, token))
            .collect();
        let total: f64 = found
            .iter()
            .zip(&kept)
            .filter(|entry| *entry.1)
            .map(|entry| entry.0.1)
            .sum();
        if total > 0.0 {
            for (&(token, mass), _) in found.iter().zip(&kept).filter(|entry| *entry.1) {
                let own = order(token);
                let mut longer: Vec<(u32, u32)> = found
                    .iter()
                    .map(|&(other, _)| order(other))
                    .filter(|other| {
                        other.equal_start >= own.equal_end && other.prefix_end <= own.prefix_end
                    })
                    .map(|other| (other.equal_start, other.prefix_end))
                    .collect();
                longer.sort_unstable();
                targets.push_group(mass / total, 0);
                let mut at = own.equal_start;
                for (start, end) in longer.into_iter().chain([(own.prefix_end, own.prefix_end)]) {
                    self.push_members(targets, last, token, (at, start));
                    at = at.max(end);
                }
                targets.end_group();
            }
            targets.end_position(self.place.position, self.place.chunk, 0.0, true);
        }
        self.scratch.by_token = found;
    }

    /// Adds the tokens that begin with `token`, in a stretch of the order of bytes, but those before
    /// which the teacher has a boundary.
    fn push_members(
        &mut self,
        targets: &mut Targets,
        last: Option<u32>,
        token: u32,
        (start, end): (u32, u32),
    ) {
        if start >= end {
            return;
        }
        let key = (last.unwrap_or(NONE), token);
        if !self.scratch.members.contains_key(&key) {
            let found = self.members(last, token);
            self.scratch.members.insert(key, found);
        }
        for &(from, to) in &self.scratch.members[&key] {
            let (from, to) = (from.max(start), to.min(end));
            if from < to {
                targets.push_range(self.tables.by_bytes(from, to));
            }
        }
    }

    fn members(&mut self, last: Option<u32>, token: u32) -> Vec<(u32, u32)> {
        let order = self.tables.student.order[token as usize];
        let mut found: Vec<(u32, u32)> = Vec::new();
        for at in order.equal_start..order.prefix_end {
            if self.ends_before(last, self.tables.student.sorted[at as usize]) {
                continue;
            }
            match found.last_mut() {
                Some(stretch) if stretch.1 == at => stretch.1 = at + 1,
                _ => found.push((at, at + 1)),
            }
        }
        found
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
