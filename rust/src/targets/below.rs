//! A teacher's row behind some of the text's own tokens.

use super::NONE;
use super::columns::{ColumnKind, GATHERED};
use super::pair::ask_for;
use super::position::Build;
use super::rows::place_of;
use crate::tokenizer::NO_TEXT;

/// Beyond this the memo of texts starts anew.
pub(super) const MOST_TEXTS: usize = 1 << 20;

impl Build<'_> {
    /// A row behind the first `depth` tokens of the path.
    pub fn place_row_below(&mut self, depth: usize, mass: f64) {
        let tables = self.tables;
        let node = self.scratch.nodes[depth];
        let at = self.place.teacher + depth;
        let row = self.rows.of(at);
        let on_path = match depth < self.scratch.path.len() {
            true => row.own,
            false => NONE,
        };
        // The student tokens that the text of the path begins and ends with.
        let (first, last) = match node {
            NONE => {
                let mut bytes = std::mem::take(&mut self.scratch.bytes);
                self.path_bytes(depth, &mut bytes);
                let found = tables
                    .student
                    .outer_pieces(&bytes, &mut self.scratch.pieces);
                self.scratch.bytes = bytes;
                found
            }
            node => (
                tables.nodes[node as usize].first,
                tables.nodes[node as usize].last,
            ),
        };
        let mut stays = row.listed;
        if let Some(&own) = row.probs.get(on_path as usize) {
            stays -= own;
        }
        let children = self.find_children(node, at, on_path);
        for place in 0..children {
            let (at, child) = self.scratch.children[place];
            let prob = row.probs[at as usize];
            stays -= prob;
            let child_first = tables.nodes[child as usize].first;
            let child_first = (child_first != NONE).then_some(child_first);
            if self.options.sure {
                self.doubt(child_first, self.below(child));
            }
            match child_first {
                // Of a node on the path a child that is a token is a group.
                Some(first)
                    if tables.trie.end_count(child) > 0
                        && tables.trie.below(child).first() == Some(&first) =>
                {
                    if mass * prob > 0.0 && self.holds(first) {
                        self.add(child, mass * prob);
                    }
                }
                first => self.give(first, mass * prob),
            }
        }
        // What the student's tokenizer does not join to the text so far leaves its tokens as they
        // are; for other models than byte pair encoding the whole text decides.
        let slot = match tables.student.is_pairwise() && last != NONE {
            true => Some(self.keep_mask(at, last)),
            false => None,
        };
        let mut next_child = 0;
        self.gather(at);
        self.scratch.asked.clear();
        for word in 0..row.ids.len().div_ceil(64) {
            let mut open = match slot {
                Some(slot) => !self.scratch.masks[slot].plain()[word],
                None => u64::MAX,
            };
            if word == row.ids.len() / 64 {
                open &= (1 << (row.ids.len() % 64)) - 1;
            }
            while open != 0 {
                let place = word * 64 + open.trailing_zeros() as usize;
                open &= open - 1;
                while next_child < children
                    && (self.scratch.children[next_child].0 as usize) < place
                {
                    next_child += 1;
                }
                let is_child =
                    next_child < children && self.scratch.children[next_child].0 as usize == place;
                if is_child || place == on_path as usize {
                    continue;
                }
                let id = row.ids[place];
                let begins = self.scratch.gathered[at % GATHERED].begins[place];
                if begins & NO_TEXT != 0 {
                    let kind = tables.columns[id as usize].kind();
                    let empty = tables.teacher.bytes(id).is_empty();
                    if empty || kind == ColumnKind::Stop {
                        continue;
                    }
                }
                stays -= row.probs[place];
                self.scratch.asked.push((place as u32, id));
                self.scratch.texts.ask_for(node, id);
            }
        }
        self.give_texts(depth, node, at, mass);
        let stays = stays.max(0.0) + row.tail();
        self.give((first != NONE).then_some(first), mass * stays);
    }

    /// Gives the columns of a row that are in `asked` to what the path's text and theirs begin with.
    fn give_texts(&mut self, depth: usize, node: u32, at: usize, mass: f64) {
        let row = self.rows.of(at);
        let asked = std::mem::take(&mut self.scratch.asked);
        let mut firsts = std::mem::take(&mut self.scratch.firsts);
        firsts.clear();
        // All answers are looked up first, so that none waits for another one's memory.
        if node != NONE {
            let texts = &self.scratch.texts;
            firsts.extend(asked.iter().map(|&(_, id)| texts.get(node, id)));
        } else {
            firsts.resize(asked.len(), None);
        }
        for first in firsts.iter().flatten() {
            self.tables.ask_for_head(*first);
        }
        for (&(_, id), first) in asked.iter().zip(&mut firsts) {
            if first.is_none() {
                *first = Some(self.first_of_text(depth, node, id));
            }
        }
        self.drop_lost(&mut firsts);
        for (&(place, _), &first) in asked.iter().zip(&firsts) {
            let mass = mass * row.probs[place as usize];
            if let Some(first) = first
                && mass > 0.0
            {
                self.give_kept(first, mass);
            }
        }
        self.scratch.asked = asked;
        self.scratch.firsts = firsts;
    }

    fn path_bytes(&self, depth: usize, bytes: &mut Vec<u8>) {
        bytes.clear();
        for &token in &self.scratch.path[..depth] {
            bytes.extend_from_slice(self.tables.teacher.bytes(token));
        }
    }

    /// The student token that the path's text and a token behind it begin with, or [`NONE`].
    #[cold]
    fn first_of_text(&mut self, depth: usize, node: u32, id: u32) -> u32 {
        let tables = self.tables;
        let mut bytes = std::mem::take(&mut self.scratch.bytes);
        self.path_bytes(depth, &mut bytes);
        bytes.extend_from_slice(tables.teacher.bytes(id));
        let (pieces, words) = (&mut self.scratch.pieces, &mut self.scratch.words);
        let first = match tables.columns[id as usize].is_text() {
            true => tables.student.first_of_spelled(&bytes, pieces, words),
            false => tables.student.first_piece(&bytes, pieces),
        };
        self.scratch.bytes = bytes;
        let first = first.unwrap_or(NONE);
        if node != NONE {
            self.scratch.texts.insert(node, id, first);
        }
        first
    }

    /// Finds the columns of a row that are children of a node, but the text's own, by their places
    /// in the row; how many there are.
    fn find_children(&mut self, node: u32, at: usize, on_path: u32) -> usize {
        self.scratch.children.clear();
        if node == NONE {
            return 0;
        }
        let tables = self.tables;
        let children = tables.trie.children(node);
        if children.len() == 0 {
            return 0;
        }
        let row = self.rows.of(at);
        let scratch = &mut *self.scratch;
        if tables.has_many_children(node) {
            for (place, &id) in (0u32..).zip(row.ids) {
                if place != on_path
                    && tables.may_have_child(node, id)
                    && let Some(child) = tables.trie.child(node, id)
                {
                    scratch.children.push((place, child));
                }
            }
            return scratch.children.len();
        }
        const FEW: usize = 8;
        if children.len() <= FEW {
            for (piece, child) in children {
                let place = place_of(row.ids, piece);
                if place != NONE && place != on_path {
                    scratch.children.push((place, child));
                }
            }
            scratch.children.sort_unstable();
            return scratch.children.len();
        }
        // Which ids a row has, by their last bits.
        const BITS: usize = 4096;
        if scratch.filter_row != at {
            scratch.filter_row = at;
            scratch.filter.clear();
            scratch.filter.resize(BITS / 64, 0);
            for &id in row.ids {
                scratch.filter[id as usize % BITS / 64] |= 1 << (id % 64);
            }
        }
        for (piece, child) in children {
            if scratch.filter[piece as usize % BITS / 64] >> (piece % 64) & 1 == 0 {
                continue;
            }
            if let Some(place) = row.ids.iter().position(|&id| id == piece)
                && place != on_path as usize
            {
                scratch.children.push((place as u32, child));
            }
        }
        scratch.children.sort_unstable();
        scratch.children.len()
    }
}

/// Answers about texts of a node and a token behind it, a fixed number of them, each one look into
/// memory away.
#[derive(Debug)]
pub(super) struct TextMemo {
    /// Node and token, and the student token that their text starts with; the newest comes first.
    sets: Vec<TextSet>,
}

/// One line of a cache.
#[derive(Debug, Clone, Copy)]
#[repr(align(64))]
struct TextSet([(u64, u32); 4]);

const SET_BITS: u32 = 16;

impl TextMemo {
    pub fn new() -> Self {
        Self {
            sets: vec![TextSet([(u64::MAX, NONE); 4]); 1 << SET_BITS],
        }
    }

    /// Has what is known of a text brought nearer.
    fn ask_for(&self, node: u32, id: u32) {
        ask_for(self.sets.as_ptr().wrapping_add(Self::set(node, id).1));
    }

    /// Has what is known of a token without its first bytes brought nearer.
    pub fn ask_for_rest(&self, id: u32, past: usize) {
        self.ask_for(Self::rest(past), id);
    }

    pub fn get_rest(&self, id: u32, past: usize) -> Option<u32> {
        self.get(Self::rest(past), id)
    }

    pub fn insert_rest(&mut self, id: u32, past: usize, first: u32) {
        self.insert(Self::rest(past), id, first);
    }

    /// Whether a student token is left out behind this teacher token, where that is known.
    pub fn get_left_out(&self, last: u32, token: u32, strict: bool) -> Option<bool> {
        let (behind, token) = Self::left_out(last, token, strict);
        self.get(behind, token).map(|found| found != 0)
    }

    pub fn insert_left_out(&mut self, last: u32, token: u32, strict: bool, is_left_out: bool) {
        let (behind, token) = Self::left_out(last, token, strict);
        self.insert(behind, token, u32::from(is_left_out));
    }

    /// A number that no node has.
    fn rest(past: usize) -> u32 {
        1 << 31 | past as u32
    }

    /// Another one.
    fn left_out(last: u32, token: u32, strict: bool) -> (u32, u32) {
        (1 << 30 | last, u32::from(strict) << 31 | token)
    }

    fn set(node: u32, id: u32) -> (u64, usize) {
        let key = u64::from(node) << 32 | u64::from(id);
        let set = key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (u64::BITS - SET_BITS);
        (key, set as usize)
    }

    fn get(&self, node: u32, id: u32) -> Option<u32> {
        let (key, set) = Self::set(node, id);
        let found = self.sets[set].0.iter().find(|entry| entry.0 == key);
        found.map(|entry| entry.1)
    }

    fn insert(&mut self, node: u32, id: u32, first: u32) {
        let (key, set) = Self::set(node, id);
        let entries = &mut self.sets[set].0;
        entries.rotate_right(1);
        entries[0] = (key, first);
    }
}
