//! Which columns of a row leave a student token as it is.

use super::NONE;
use super::columns::{ColumnKind, GATHERED, Gathered};
use super::pair::ask_for;
use super::position::Build;
use crate::tokenizer::{NO_SHAPE, Told};

impl Build<'_> {
    /// Looks up the columns of the row before teacher token `at`, unless that was done.
    pub fn gather(&mut self, at: usize) {
        let gathered = &mut self.scratch.gathered[at % GATHERED];
        if gathered.at == at {
            return;
        }
        let briefs = &self.tables.briefs;
        gathered.fill(at, self.rows.of(at).ids, briefs);
        // The next row is looked up soon, each column of it somewhere else.
        for &id in self.rows.of(at + 1).ids {
            ask_for(briefs.as_ptr().wrapping_add(id as usize));
        }
    }

    /// Which columns of the row before teacher token `at` leave the student's token `last` as it
    /// is, as the slot of a mask.
    pub fn keep_mask(&mut self, at: usize, last: u32) -> usize {
        self.gather(at);
        let scratch = &mut *self.scratch;
        let found = |mask: &Mask| mask.is_of(at, last);
        if let Some(slot) = scratch.masks.iter().position(found) {
            return slot;
        }
        let slot = scratch.next_mask;
        scratch.next_mask = (slot + 1) % scratch.masks.len();
        let mask = &mut scratch.masks[slot];
        (mask.at, mask.last) = (at, last);
        let Gathered { shapes, begins, .. } = &scratch.gathered[at % GATHERED];
        let tables = self.tables;
        let mut after = tables.student.after(last, &mut scratch.student_pairs);
        let ids = self.rows.of(at).ids;
        match after.at_once() {
            Some(after) => after.at_once(shapes, begins, &mut mask.told),
            None => mask.told.nothing(ids.len()),
        }
        // What is asked about one by one is asked for first, so that none waits for another.
        let open = mask.told.open.iter().zip(ids.chunks(64));
        for (&word, ids) in open.clone() {
            for_each_bit(word, |bit| {
                ask_for(tables.columns.as_ptr().wrapping_add(ids[bit] as usize));
            });
        }
        for (&word, ids) in open {
            for_each_bit(word, |bit| {
                after.ask_for(&tables.columns[ids[bit] as usize].next());
            });
        }
        let Told {
            keeps,
            for_text,
            open,
        } = &mut mask.told;
        let words = keeps.iter_mut().zip(for_text).zip(open);
        for (((keep, keep_for_text), open), ids) in words.zip(ids.chunks(64)) {
            *keep &= !*open;
            *keep_for_text &= !*open;
            for_each_bit(*open, |bit| {
                let id = ids[bit];
                let column = &tables.columns[id as usize];
                let (keeps, keeps_for_text) = match column.kind() {
                    ColumnKind::Text => {
                        let text = || tables.teacher.bytes(id);
                        after.keeps_both(&column.next(), column.shape, text)
                    }
                    // Text that the student cannot spell.
                    ColumnKind::Dropped => (false, false),
                    ColumnKind::Stop | ColumnKind::Special => (true, column.shape != NO_SHAPE),
                };
                *keep |= u64::from(keeps) << bit;
                *keep_for_text |= u64::from(keeps_for_text) << bit;
            });
        }
        slot
    }
}

fn for_each_bit(mut word: u64, mut visit: impl FnMut(usize)) {
    while word != 0 {
        visit(word.trailing_zeros() as usize);
        word &= word - 1;
    }
}

/// Which columns of one row leave a student token as it is.
#[derive(Debug)]
pub(super) struct Mask {
    at: usize,
    last: u32,
    told: Told,
}

impl Mask {
    /// Whether it is of the row before teacher token `at`, behind `last`.
    pub fn is_of(&self, at: usize, last: u32) -> bool {
        self.at == at && self.last == last
    }

    /// By column, as bits.
    pub fn keeps(&self) -> &[u64] {
        &self.told.keeps
    }

    /// Of them those of which the first student token tells it for all of the column's text.
    pub fn plain(&self) -> &[u64] {
        &self.told.for_text
    }

    pub fn new() -> Self {
        Self {
            at: usize::MAX,
            last: NONE,
            told: Told::default(),
        }
    }

    /// Forgets: the next row may be of another text.
    pub fn forget(&mut self) {
        self.at = usize::MAX;
    }
}
