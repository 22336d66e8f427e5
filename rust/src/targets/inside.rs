//! The target of a student position inside a teacher token: the teacher's tokens that begin with
//! the bytes so far, by the student token that what is left of them starts with.

use rustc_hash::FxHashMap;

use super::NONE;
use super::below::MOST_TEXTS;
use super::columns::GATHERED;
use super::groups::{Account, Targets};
use super::masses::Masses;
use super::places::Place;
use super::position::Build;
use super::rows::place_of;
use super::side::Order;

/// What one thread remembers of positions inside teacher tokens.
#[derive(Debug)]
pub(super) struct Inside {
    /// By teacher token and bytes of it that are past.
    facts: FxHashMap<(u32, u32), Facts>,
    /// By the same and the token behind it: the student token that their text starts with.
    texts: FxHashMap<(u32, u32, u32), u32>,
    /// By the token before, or [`NONE`], and the same.
    before: FxHashMap<(u32, u32, u32), Before>,
    /// Places, in the teacher's order of bytes, of the tokens that texts of `before` begin with.
    beginnings: Vec<u32>,
    /// By the teacher token before a boundary, a student token behind it, and whether all must be
    /// sure: the stretches of the student's order of bytes that begin with it and before which the
    /// teacher has no boundary.
    pub members: FxHashMap<(u32, u32, bool), Vec<(u32, u32)>>,
    by_token: Masses,
    kept: Vec<Kept>,
    /// Of some neighbours in the teacher's order of bytes, how many up to each end a text behind
    /// which they come.
    pub ending: Vec<u32>,
    stretches: Vec<(u32, u32)>,
}

/// Where the teacher has a boundary inside a chunk its next row is not known. So much of that, as a
/// share of what is known, is let pass.
const MAX_UNKNOWN: f64 = 0.05;

/// A teacher token with some bytes past.
#[derive(Debug, Clone, Copy)]
struct Facts {
    /// The tokens that these bytes begin and end with, as the tokenizer segments them, or [`NONE`].
    first: u32,
    last: u32,
}

/// The text from a token to a boundary inside another one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Before {
    /// The places, in the order of bytes, of the tokens that begin with it and go on.
    pub longer: (u32, u32),
    /// Its bytes.
    pub length: usize,
    /// Where the tokens that it begins with are in `beginnings`.
    beginnings: (u32, u32),
}

#[derive(Debug, Clone, Copy)]
struct Kept {
    token: u32,
    mass: f64,
    order: Order,
}

impl Inside {
    pub fn new() -> Self {
        Self {
            facts: FxHashMap::default(),
            before: FxHashMap::default(),
            beginnings: Vec::new(),
            texts: FxHashMap::default(),
            members: FxHashMap::default(),
            by_token: Masses::new(),
            kept: Vec::new(),
            ending: Vec::new(),
            stretches: Vec::new(),
        }
    }

    /// Memos that have grown too large start anew.
    pub fn start(&mut self) {
        if self.texts.len() > MOST_TEXTS {
            self.texts.clear();
        }
        if self.members.len() > MOST_TEXTS {
            self.members.clear();
        }
        if self.facts.len() > MOST_TEXTS {
            self.facts.clear();
        }
        // Texts of several tokens leave theirs behind, too.
        if self.before.len() > MOST_TEXTS || self.beginnings.len() > 8 * MOST_TEXTS {
            self.before.clear();
            self.beginnings.clear();
        }
    }
}

impl Build<'_> {
    /// What is known of the teacher token around the boundary.
    fn inside_facts(&mut self) -> Facts {
        let around = self.teacher_ids[self.place.teacher];
        let past = self.place.past;
        if let Some(&facts) = self.scratch.inside.facts.get(&(around, past as u32)) {
            return facts;
        }
        let teacher = &self.tables.teacher;
        let before = &teacher.bytes(around)[..past];
        let (first, last) = teacher.outer_pieces(before, &mut self.scratch.pieces);
        let facts = Facts { first, last };
        self.scratch
            .inside
            .facts
            .insert((around, past as u32), facts);
        facts
    }

    /// What is known of the text from teacher token `at` to the boundary, which is inside a token.
    pub(super) fn before(&mut self, at: usize) -> Before {
        let around = self.teacher_ids[self.place.teacher];
        let past = self.place.past;
        // With more than one token between there are too many to keep.
        let key = match self.teacher_ids[at..self.place.teacher] {
            [] => Some((NONE, around, past as u32)),
            [first] => Some((first, around, past as u32)),
            _ => None,
        };
        if let Some(&before) = key.and_then(|key| self.scratch.inside.before.get(&key)) {
            return before;
        }
        let teacher = &self.tables.teacher;
        let bytes = &mut self.scratch.bytes;
        bytes.clear();
        for &token in &self.teacher_ids[at..self.place.teacher] {
            bytes.extend_from_slice(teacher.bytes(token));
        }
        bytes.extend_from_slice(&teacher.bytes(around)[..past]);
        let length = bytes.len();
        let first = self.teacher_ids[at];
        let known = teacher.bytes(first).len();
        let longer = match at < self.place.teacher {
            true => teacher.longer_behind(first, bytes),
            false => teacher.longer_than(bytes),
        };
        let Inside {
            before, beginnings, ..
        } = &mut self.scratch.inside;
        let start = beginnings.len() as u32;
        if known > 0 {
            let fits = |place: &u32| teacher.bytes(teacher.sorted[*place as usize]).len() <= length;
            beginnings.extend(teacher.beginnings(first).filter(fits));
        }
        if known == 0 || teacher.has_longer(first) {
            let ids = (known + 1..=length).filter_map(|cut| teacher.id_of(&bytes[..cut]));
            beginnings.extend(ids.map(|id| teacher.order[id as usize].equal_start));
        }
        let found = Before {
            longer: (longer.start, longer.end),
            length,
            beginnings: (start, beginnings.len() as u32),
        };
        if let Some(key) = key {
            before.insert(key, found);
        }
        found
    }

    pub(super) fn inside(&mut self, targets: &mut Targets) {
        if !self.options.cells || self.options.levels == 0 {
            return;
        }
        self.find_path();
        let limit = self.tables.heads.len();
        self.scratch.inside.by_token.clear(limit);
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
                match self.rows.of(at).own_prob() {
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

    /// The teacher's mass on texts that go on as the student's do, of which later rows would tell
    /// how: on tokens that end before the boundary or at it and are not the text's own; and one level
    /// further back than is placed, on those that run past it. Infinite where a row on the way is
    /// not known.
    fn unknown(&mut self) -> f64 {
        let (mut found, mut scale) = (0.0, 1.0);
        for level in 0..=self.options.levels {
            let at = match self.place.teacher.checked_sub(level) {
                Some(at) if at >= self.place.text_start => at,
                _ => break,
            };
            let row = self.rows.of(at);
            if row.is_empty() {
                return f64::INFINITY;
            }
            if level > 0 {
                match row.own_prob() {
                    Some(prob) => scale /= prob,
                    None => return f64::INFINITY,
                }
            }
            found += scale * self.ending_by(at, level > 0);
            if level == self.options.levels {
                let mut longer = 0.0;
                self.for_each_longer(at, |_, _, _, prob| longer += prob);
                found += scale * longer;
            }
        }
        found
    }

    /// The mass of a row's tokens that end before the boundary or at it; `but_own` without the
    /// text's own.
    fn ending_by(&mut self, at: usize, but_own: bool) -> f64 {
        let (start, end) = self.before(at).beginnings;
        self.gather(at);
        let row = self.rows.of(at);
        // The tokens that the text begins with are few: compared by their places in the order of
        // bytes, no column's bytes are read.
        let ranks = &self.scratch.gathered[at % GATHERED].ranks;
        let mut found = 0.0;
        for &rank in &self.scratch.inside.beginnings[start as usize..end as usize] {
            let mut from = 0;
            while let Some(at) = ranks.get(from..).map(|ranks| place_of(ranks, rank)) {
                if at == NONE {
                    break;
                }
                let place = from + at as usize;
                if !(but_own && place == row.own as usize) {
                    found += row.probs[place];
                }
                from = place + 1;
            }
        }
        found
    }

    /// The rows behind the text's own tokens; false where one of them is not known.
    fn follow_path(&mut self, mut mass: f64) -> bool {
        let around = self.scratch.path[0];
        let past = self.place.past;
        let mut prefix = self.tables.teacher.bytes(around)[past..].to_vec();
        for depth in 1..self.scratch.path.len() + usize::from(self.closed) {
            let row = self.rows.of(self.place.teacher + depth);
            if row.is_empty() {
                return false;
            }
            let (first, last) = match depth {
                1 => self.rest_of(around, past),
                _ => {
                    let pieces = &mut self.scratch.pieces;
                    self.tables.student.outer_pieces(&prefix, pieces)
                }
            };
            self.place_inside_row(depth, &mut prefix, (first, last), mass);
            if let Some(&token) = self.scratch.path.get(depth) {
                mass *= row.own_prob().unwrap_or(0.0);
                prefix.extend_from_slice(self.tables.teacher.bytes(token));
            }
        }
        if let (false, Some(own)) = (self.closed, self.place.own) {
            self.add_token(own, mass);
        }
        true
    }

    /// A row behind a text, which the student's tokens `outer` begin and end.
    fn place_inside_row(
        &mut self,
        depth: usize,
        prefix: &mut Vec<u8>,
        outer: (u32, u32),
        mass: f64,
    ) {
        let tables = self.tables;
        let at = self.place.teacher + depth;
        let row = self.rows.of(at);
        let on_path = match depth < self.scratch.path.len() {
            true => row.own,
            false => NONE,
        };
        let mut stays = row.listed;
        if let Some(&own) = row.probs.get(on_path as usize) {
            stays -= own;
        }
        let slot = match tables.student.is_pairwise() && outer.1 != NONE {
            true => Some(self.keep_mask(at, outer.1)),
            false => None,
        };
        let around = (self.scratch.path[0], self.place.past as u32);
        let length = prefix.len();
        for (place, (&id, &prob)) in row.ids.iter().zip(row.probs).enumerate() {
            let kept = slot.is_some_and(|slot| {
                self.scratch.masks[slot].plain()[place / 64] >> (place % 64) & 1 == 1
            });
            if kept || place == on_path as usize || tables.teacher.bytes(id).is_empty() {
                continue;
            }
            stays -= prob;
            let key = (around.0, around.1, id);
            let known = match depth {
                1 => self.scratch.inside.texts.get(&key).copied(),
                _ => None,
            };
            let first = known.unwrap_or_else(|| {
                prefix.extend_from_slice(tables.teacher.bytes(id));
                let pieces = &mut self.scratch.pieces;
                let first = tables.student.first_piece(prefix, pieces).unwrap_or(NONE);
                prefix.truncate(length);
                if depth == 1 {
                    self.scratch.inside.texts.insert(key, first);
                }
                first
            });
            self.give_token((first != NONE).then_some(first), mass * prob);
        }
        let stays = stays.max(0.0) + row.tail();
        self.give_token((outer.0 != NONE).then_some(outer.0), mass * stays);
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
        // Those with the same bytes delimit one group.
        let token = self.tables.student.twins().of(token);
        self.scratch.inside.by_token.add_cell(token, mass);
    }

    /// Groups by the longest of the tokens found that a student token begins with. One before which
    /// the teacher has a boundary is in none: its mass is not that of a longer teacher token. Nor is
    /// one before which it has a boundary in some texts, where those may be many. All others have at
    /// most the mass of these and what is not known.
    fn emit_inside(&mut self, targets: &mut Targets) {
        let tables = self.tables;
        let Facts { first, last, .. } = self.inside_facts();
        let last = (last != NONE).then_some(last);
        let row = self.rows.of(self.place.teacher);
        let ending = row.ids.iter().position(|&id| id == first);
        let ending = ending.map_or(0.0, |at| row.probs[at]);
        let strict = ending > MAX_UNKNOWN * self.scratch.inside.by_token.total();
        let mut kept = std::mem::take(&mut self.scratch.inside.kept);
        let mut stretches = std::mem::take(&mut self.scratch.inside.stretches);
        // Student tokens with the bytes of one found, and all that begin so, are one range of the
        // order of bytes; ranges are nested or apart. All tokens found delimit groups.
        kept.clear();
        let mut total = 0.0;
        for at in 0..self.scratch.inside.by_token.keys().len() {
            let token = self.scratch.inside.by_token.keys()[at];
            let mass = match self.is_left_out(last, token, strict) {
                true => 0.0,
                false => self.scratch.inside.by_token.masses()[at],
            };
            total += mass;
            kept.push(Kept {
                token,
                mass,
                order: tables.student.order[token as usize],
            });
        }
        if total > 0.0 {
            kept.sort_unstable_by_key(|kept| {
                (
                    kept.order.equal_start,
                    u32::MAX - kept.order.prefix_end,
                    kept.token,
                )
            });
            for at in 0..kept.len() {
                let Kept { token, mass, order } = kept[at];
                if mass <= 0.0 {
                    continue;
                }
                stretches.clear();
                // What is nested in this range comes behind it, the outermost first.
                let mut from = order.equal_start;
                for inner in &kept[at + 1..] {
                    if inner.order.equal_start >= order.prefix_end {
                        break;
                    }
                    if inner.order.equal_start >= order.equal_end.max(from) {
                        stretches.push((from, inner.order.equal_start));
                        from = inner.order.prefix_end;
                    }
                }
                stretches.push((from, order.prefix_end));
                targets.push_group(mass / total, 0);
                for &stretch in &stretches {
                    self.push_members(targets, last, token, strict, stretch);
                }
                targets.end_group();
            }
            let Place {
                position, chunk, ..
            } = self.place;
            let all = self.scratch.inside.by_token.total();
            // Columns that are not listed are taken to begin with these bytes as often as others.
            let unlisted = all * row.tail() / row.listed;
            let outside = self.unknown() + unlisted + (all - total).max(0.0);
            let most = match outside.is_finite() {
                true => outside / (total + outside),
                false => 1.0,
            };
            targets.end_position(position, chunk, most, true, Account::default());
        }
        self.scratch.inside.kept = kept;
        self.scratch.inside.stretches = stretches;
    }
}
