//! Tokens of earlier rows that run past a boundary.

use super::NONE;
use super::columns::GATHERED;
use super::position::Build;

impl Build<'_> {
    /// Tokens of earlier rows that run past the boundary.
    pub fn carry(&mut self) {
        let mut scale = 1.0;
        for level in 1..=self.options.levels {
            let Some(at) = self.place.teacher.checked_sub(level) else {
                return;
            };
            if at < self.place.text_start {
                return;
            }
            match self.rows.of(at).own_prob() {
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
        let row = self.rows.of(at);
        if row.is_empty() {
            return;
        }
        let (longer, length) = self.longer_tokens(at);
        if longer.is_empty() {
            return;
        }
        self.gather(at);
        let mut found = std::mem::take(&mut self.scratch.longer);
        found.clear();
        let mut from = 0;
        while let Some(place) = self.scratch.gathered[at % GATHERED].next_within(from, &longer) {
            from = place + 1;
            found.push(place as u32);
        }
        // All answers are asked for first, so that none waits for another one's memory.
        for &place in &found {
            self.scratch
                .texts
                .ask_for_rest(row.ids[place as usize], length);
        }
        for &place in &found {
            let (id, prob) = (row.ids[place as usize], row.probs[place as usize]);
            let first = self.first_of_rest(id, length);
            visit(self, id, (first != NONE).then_some(first), prob);
        }
        self.scratch.longer = found;
    }

    /// The student token that a teacher token without its first bytes starts with.
    fn first_of_rest(&mut self, token: u32, past: usize) -> u32 {
        if let Some(first) = self.scratch.texts.get_rest(token, past) {
            return first;
        }
        let (first, _) = self.rest_of(token, past);
        self.scratch.texts.insert_rest(token, past, first);
        first
    }

    /// The teacher's tokens, by their places in the order of bytes, that begin with the text from
    /// teacher token `at` to the boundary and go on; and the length of that text.
    pub fn longer_tokens(&mut self, at: usize) -> (std::ops::Range<u32>, usize) {
        let teacher = &self.tables.teacher;
        let whole = &self.teacher_ids[at..self.place.teacher];
        if let (&[token], 0) = (whole, self.place.past) {
            let order = teacher.order[token as usize];
            return (
                order.equal_end..order.prefix_end,
                teacher.bytes(token).len(),
            );
        }
        if self.place.past > 0 {
            let before = self.before(at);
            return (before.longer.0..before.longer.1, before.length);
        }
        let bytes = &mut self.scratch.bytes;
        bytes.clear();
        for &token in whole {
            bytes.extend_from_slice(teacher.bytes(token));
        }
        (teacher.longer_behind(whole[0], bytes), bytes.len())
    }

    /// The student tokens that a teacher token without its first bytes starts and ends with.
    pub fn rest_of(&mut self, token: u32, past: usize) -> (u32, u32) {
        let tables = self.tables;
        let pieces = &mut self.scratch.pieces;
        let rests = &mut self.scratch.rests;
        *rests.entry((token, past as u32)).or_insert_with(|| {
            let rest = &tables.teacher.bytes(token)[past..];
            tables.student.outer_pieces(rest, pieces)
        })
    }
}
