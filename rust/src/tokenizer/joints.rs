//! Whether a tokenizer keeps a token when another follows, without segmenting their bytes.
//!
//! Two questions decide it: does the pre-tokenizer cut between the two, and if not, do merges cross
//! the joint. The first is answered once for two shapes of text (see [`CharClasses`]), the second
//! from the derivations of the two tokens (see [`Derivations`]).

mod at_once;

use std::sync::Arc;

use rustc_hash::{FxHashMap, FxHashSet};

use super::Tokenizer;
use crate::segment::{CharClasses, Derivations, Model};
pub(crate) use at_once::{Marks, NO_TEXT, Told};

/// Numbers that the first two bytes of a token are told apart by.
pub(crate) const BEGINNINGS: usize = 1 << 11;
/// Numbers that the first three bytes of a token are told apart by.
const LONGER_BEGINNINGS: usize = 1 << 11;
/// The shape of a token about which only its bytes can tell.
pub(crate) const NO_SHAPE: u16 = 0;
/// The shape of a token that is no text: behind text the merges alone decide.
pub(crate) const BYTES: u16 = 1;
const FIRST_SHAPE: usize = 2;

/// What the shapes of two tokens say.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd)]
#[repr(u8)]
pub(crate) enum Cut {
    /// The pre-tokenizer cuts between them and not before.
    Between,
    /// It cuts the left one.
    Before,
    /// It cuts nowhere: the merges decide.
    Nowhere,
    /// It cuts within the right one alone: their bytes decide.
    Unclear,
    /// Nobody has asked yet.
    Unknown,
}

/// The tables of one tokenizer.
#[derive(Debug)]
pub(crate) struct Joints {
    derivations: Derivations,
    /// By token: the number of its shape, [`BYTES`] or [`NO_SHAPE`].
    shape: Vec<u16>,
    /// By token: whether that tells how text behind it is cut.
    may_lead: Vec<bool>,
    /// The number of each shape, and whether text of that shape is one word.
    shapes: FxHashMap<Vec<u32>, (u16, bool)>,
    classes: Option<CharClasses>,
    /// By token: where its left parts begin in `parts`; one more than there are tokens.
    start: Vec<u32>,
    /// Left parts of all tokens that have a shape or are no text, as (token, until).
    parts: Vec<(u32, u32)>,
    /// The first three bytes of each token.
    begins: Vec<[u8; 3]>,
    /// By token: until when its first byte stands alone; see [`rounded`].
    until: Vec<u16>,
    /// By beginning of a text that is matched before the pre-tokenizer: the bytes that go on with
    /// it, as 256 bits.
    matched: FxHashMap<Vec<u8>, [u64; 4]>,
    /// Pairs that together are a word that skips the merges, which would not make it.
    words: FxHashSet<(u32, u32)>,
    has_pre_tokenizer: bool,
}

/// The answers of one thread: what is asked about is what a text's own tokens are followed by.
#[derive(Debug, Default)]
pub(crate) struct JointMemo {
    /// By token: its place in `known`.
    place: FxHashMap<u32, u32>,
    /// The last one that was asked about, with its place.
    recent: Option<(u32, u32)>,
    known: Vec<Last>,
    /// For each shape of a left token that was asked about, a [`Cut`] by shape of the right one.
    cuts: Vec<Cut>,
    cuts_of_shape: FxHashMap<u16, u32>,
    /// Open addressing: (token, time) of the tokens that merge with a left one.
    partners: Vec<(u32, u32)>,
    bytes: Vec<u8>,
}

/// The number of characters of the first word of texts of each shape, 0 where the pre-tokenizer
/// does not say.
#[derive(Debug, Default)]
pub(crate) struct WordMemo {
    shape: Vec<u32>,
    words: FxHashMap<Vec<u32>, usize>,
}

const MOST_WORDS: usize = 1 << 16;

/// A left token.
#[derive(Debug, Clone, Copy)]
#[repr(C)]
struct Last {
    cuts: u32,
    partners: u32,
    /// One less than the size of its part of `partners`, a power of two.
    mask: u32,
    has_matched: bool,
    matched: [u64; 4],
    /// By byte: the earliest time at which it merges with the token; see [`rounded`].
    times: [u16; TIMES],
    /// The tokens of two bytes that merge with it, as bits of their hash.
    long: [u32; BEGINNINGS / 32],
    /// The first three bytes of the others, as bits of their hash.
    longer: [u32; LONGER_BEGINNINGS / 32],
    /// Whether the three above do not tell all.
    is_open: bool,
}

/// Bytes behind the cuts of a shape, as four are read where one is meant.
const CUT_PADDING: usize = 3;

/// Most left tokens in one memo.
const MOST_KNOWN: usize = 1 << 14;

/// Most entries of `partners`; beyond, the memo starts anew.
const MOST_PARTNERS: usize = 1 << 21;
const FREE: u32 = u32::MAX;

/// A token on the right of a joint.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Next {
    pub token: u32,
    pub part_start: u32,
    pub shape: u16,
    /// One of [`BEGINNINGS`] for its first two bytes.
    pub begins: u16,
    /// One of [`LONGER_BEGINNINGS`] for its first three.
    pub longer: u16,
    /// Until when its first byte stands alone; see [`rounded`].
    pub until: u16,
    pub first_byte: u8,
    pub part_count: u8,
}

impl Joints {
    /// The tables of a byte pair encoding, and which tokens it makes of their own bytes; `None` for
    /// other models and for a pre-tokenizer that may look at more than characters.
    pub fn new(tokenizer: &Tokenizer) -> Option<(Self, Vec<bool>)> {
        let Some(Model::Bpe(model)) = tokenizer.model.as_deref() else {
            return None;
        };
        let mut classes = match &tokenizer.pre_tokenizer {
            Some(cut) => Some(CharClasses::of(cut)?),
            None => None,
        };
        let vocab = &tokenizer.vocab;
        let size = vocab.len();
        let derivations = Derivations::new(model, vocab);
        let mut matched: FxHashMap<Vec<u8>, [u64; 4]> = FxHashMap::default();
        for &id in &tokenizer.matched {
            let bytes = vocab.token_bytes(id);
            for cut in 1..bytes.len() {
                let next = matched.entry(bytes[..cut].to_vec()).or_default();
                insert(next, bytes[cut]);
            }
        }
        let begins = (0..size as u32).map(|id| match *vocab.token_bytes(id) {
            [] => [0; 3],
            [first] => [first, 0, 0],
            [first, second] => [first, second, 0],
            [first, second, third, ..] => [first, second, third],
        });
        let mut made = Self {
            derivations,
            shape: vec![NO_SHAPE; size],
            may_lead: vec![false; size],
            shapes: FxHashMap::default(),
            classes: None,
            start: vec![0; size + 1],
            parts: Vec::new(),
            begins: begins.collect(),
            until: vec![0; size],
            matched,
            words: FxHashSet::default(),
            has_pre_tokenizer: classes.is_some(),
        };
        let mut shape = Vec::new();
        let mut canonical = vec![false; size];
        let mut pieces = Vec::new();
        for id in 0..size as u32 {
            let at = id as usize;
            made.start[at] = made.parts.len() as u32;
            let bytes = vocab.token_bytes(id);
            if bytes.is_empty() {
                continue;
            }
            let matched = |text: &str| tokenizer.matcher().is_some_and(|m| m.is_match(text));
            // What is matched first is not cut as other text of its shape.
            let text = str::from_utf8(bytes).ok().filter(|text| !matched(text));
            let guarded = text.and_then(|text| match &mut classes {
                Some(classes) => classes.shape(text, &mut shape),
                None => Some(false),
            });
            let known = guarded.and(text);
            let known = known.and_then(|text| made.number(tokenizer, text, &shape));
            canonical[at] = match known {
                Some((_, true)) if made.derivations.is_regular(id) => {
                    model.whole_word(vocab, bytes).is_none_or(|word| word == id)
                }
                // Two words are two tokens.
                Some((_, false)) => false,
                _ => {
                    let model = tokenizer.model.as_deref()?;
                    tokenizer.segment_with(model, bytes, &mut pieces) && pieces == [id]
                }
            };
            if !canonical[at] {
                continue;
            }
            if !made.derivations.is_regular(id) {
                if model.whole_word(vocab, bytes) == Some(id) {
                    let halves = (1..bytes.len()).filter_map(|cut| {
                        let (left, right) = bytes.split_at(cut);
                        Some((tokenizer.id_of(left)?, tokenizer.id_of(right)?))
                    });
                    made.words.extend(halves);
                }
                continue;
            }
            made.shape[at] = match known {
                Some((number, true)) => number,
                None if str::from_utf8(bytes).is_err() => BYTES,
                _ => continue,
            };
            made.may_lead[at] = guarded == Some(false);
            let parts = made.derivations.left_parts(id);
            made.parts
                .extend(parts.map(|part| (part.token, part.until)));
            let (smallest, until) = made.parts[made.parts.len() - 1];
            if is_byte(tokenizer, smallest) {
                made.until[at] = rounded(until);
            }
        }
        made.start[size] = made.parts.len() as u32;
        made.classes = classes;
        Some((made, canonical))
    }

    /// The number of a shape, which this text has, and whether such text is one word.
    fn number(
        &mut self,
        tokenizer: &Tokenizer,
        text: &str,
        shape: &Vec<u32>,
    ) -> Option<(u16, bool)> {
        if let Some(&known) = self.shapes.get(shape) {
            return Some(known);
        }
        let next = u16::try_from(FIRST_SHAPE + self.shapes.len()).ok()?;
        let cut = tokenizer.pre_tokenizer.as_ref().map(|cut| cut.cut(text));
        let is_word = cut.is_none_or(|cut| cut.is_some_and(|cut| cut.len() == 1));
        self.shapes.insert(shape.clone(), (next, is_word));
        Some((next, is_word))
    }

    /// The shape of bytes that are no token here, if they are one word; before the first question.
    pub fn shape_of(&mut self, tokenizer: &Tokenizer, bytes: &[u8]) -> u16 {
        let Ok(text) = str::from_utf8(bytes) else {
            return NO_SHAPE;
        };
        let Some(mut classes) = self.classes.take() else {
            return if tokenizer.matched.is_empty() {
                BYTES
            } else {
                NO_SHAPE
            };
        };
        let mut shape = Vec::new();
        let matched = tokenizer.matcher().is_some_and(|m| m.is_match(text));
        let known = !matched && classes.shape(text, &mut shape).is_some();
        self.classes = Some(classes);
        match known.then(|| self.number(tokenizer, text, &shape)) {
            Some(Some((number, true))) => number,
            _ => NO_SHAPE,
        }
    }

    /// The length of the first word of a text; `None` where that is not known without asking.
    pub fn first_word(
        &self,
        tokenizer: &Tokenizer,
        text: &str,
        memo: &mut WordMemo,
    ) -> Option<usize> {
        let WordMemo { shape, words } = memo;
        self.classes.as_ref()?.known_shape(text, shape)?;
        if tokenizer
            .matcher()
            .is_some_and(|found| found.is_match(text))
        {
            return None;
        }
        let chars = match words.get(shape) {
            Some(&chars) => chars,
            None => {
                let cut = tokenizer.pre_tokenizer.as_ref()?.cut(text);
                let end = cut.and_then(|cut| cut.first().map(|word| word.end));
                let chars = end.map_or(0, |end| text[..end].chars().count());
                if words.len() > MOST_WORDS {
                    words.clear();
                }
                words.insert(shape.clone(), chars);
                chars
            }
        };
        let mut ends = text.char_indices().map(|(at, c)| at + c.len_utf8());
        ends.nth(chars.checked_sub(1)?)
    }

    /// Whether a text is known to be one word, so that the merges alone make its tokens.
    pub fn is_one_word(&self, tokenizer: &Tokenizer, text: &str, shape: &mut Vec<u32>) -> bool {
        let Some(classes) = &self.classes else {
            return tokenizer.matched.is_empty();
        };
        classes.known_shape(text, shape).is_some()
            && self.shapes.get(shape).is_some_and(|&(_, is_word)| is_word)
            && !tokenizer
                .matcher()
                .is_some_and(|found| found.is_match(text))
    }

    /// Where the left parts of a token are.
    pub fn parts_of(&self, next: &Next) -> *const (u32, u32) {
        self.parts.as_ptr().wrapping_add(next.part_start as usize)
    }

    /// A token as what may follow.
    pub fn next(&self, token: u32) -> Next {
        let at = token as usize;
        let count = self.start[at + 1] - self.start[at];
        Next {
            token,
            part_start: self.start[at],
            shape: match self.shape[at] {
                // A spine that does not fit is looked at as bytes.
                _ if count > 255 => NO_SHAPE,
                shape => shape,
            },
            begins: pair_bit(self.begins[at]) as u16,
            longer: triple_bit(self.begins[at]) as u16,
            until: self.until[at],
            first_byte: self.begins[at][0],
            part_count: count.min(255) as u8,
        }
    }
}

fn has(set: &[u64; 4], byte: u8) -> bool {
    set[usize::from(byte) / 64] >> (byte % 64) & 1 == 1
}

fn has_bit(words: &[u32], bit: usize) -> bool {
    words[bit / 32] >> (bit % 32) & 1 == 1
}

/// One left token, ready for questions.
pub(crate) struct AfterToken<'a> {
    joints: &'a Joints,
    tokenizer: &'a Arc<Tokenizer>,
    token: u32,
    last: &'a Last,
    cuts: &'a mut [Cut],
    partners: &'a [(u32, u32)],
    bytes: &'a mut Vec<u8>,
}

impl JointMemo {
    /// `None` where only the bytes of this token can tell.
    pub fn after<'a>(
        &'a mut self,
        joints: &'a Joints,
        tokenizer: &'a Arc<Tokenizer>,
        token: u32,
    ) -> Option<AfterToken<'a>> {
        let shape = joints.shape[token as usize];
        if shape == NO_SHAPE || !joints.may_lead[token as usize] {
            return None;
        }
        let at = match self.recent {
            Some((recent, at)) if recent == token => at,
            _ => match self.place.get(&token) {
                Some(&at) => at,
                None => self.add(joints, tokenizer, token, shape),
            },
        };
        self.recent = Some((token, at));
        let last = &self.known[at as usize];
        let size = FIRST_SHAPE + joints.shapes.len() + CUT_PADDING;
        let row = last.cuts as usize..last.cuts as usize + size;
        let partners = last.partners as usize..(last.partners + last.mask) as usize + 1;
        Some(AfterToken {
            joints,
            tokenizer,
            token,
            last,
            cuts: &mut self.cuts[row],
            partners: &self.partners[partners],
            bytes: &mut self.bytes,
        })
    }

    #[cold]
    fn add(&mut self, joints: &Joints, tokenizer: &Tokenizer, token: u32, shape: u16) -> u32 {
        if self.partners.len() > MOST_PARTNERS || self.known.len() >= MOST_KNOWN {
            self.place.clear();
            self.known.clear();
            self.partners.clear();
        }
        let row = FIRST_SHAPE + joints.shapes.len() + CUT_PADDING;
        let next = self.cuts.len() as u32;
        let cuts = *self.cuts_of_shape.entry(shape).or_insert(next);
        if cuts == next {
            let unknown = match joints.has_pre_tokenizer {
                true => Cut::Unknown,
                false => Cut::Nowhere,
            };
            self.cuts.resize(self.cuts.len() + row, unknown);
            self.cuts[next as usize + usize::from(NO_SHAPE)] = Cut::Unclear;
            self.cuts[next as usize + usize::from(BYTES)] = Cut::Nowhere;
        }
        let mut found: FxHashMap<u32, u32> = FxHashMap::default();
        joints.derivations.for_each_partner(token, |right, time| {
            let earliest = found.entry(right).or_insert(time);
            *earliest = (*earliest).min(time);
        });
        let size = (2 * found.len()).next_power_of_two().max(1);
        let start = self.partners.len();
        self.partners.resize(start + size, (FREE, 0));
        let table = &mut self.partners[start..];
        let mut times = [NEVER; TIMES];
        let mut long = [0; BEGINNINGS / 32];
        let mut longer = [0; LONGER_BEGINNINGS / 32];
        let mut is_open = joints.words.iter().any(|pair| pair.0 == token);
        for (&right, &time) in &found {
            let begins = joints.begins[right as usize];
            if is_byte(tokenizer, right) {
                times[usize::from(begins[0])] = rounded(time);
            } else {
                // Another token of one byte: its times are not those of the byte.
                let size = tokenizer.vocab.token_bytes(right).len();
                is_open |= size < 2;
                if size == 2 {
                    let bit = pair_bit(begins);
                    long[bit / 32] |= 1 << (bit % 32);
                } else {
                    let bit = triple_bit(begins);
                    longer[bit / 32] |= 1 << (bit % 32);
                }
            }
            let mut slot = slot_of(right, size as u32 - 1);
            while table[slot].0 != FREE {
                slot = (slot + 1) & (size - 1);
            }
            table[slot] = (right, time);
        }
        let bytes = tokenizer.vocab.token_bytes(token);
        let mut matched = [0; 4];
        for start in 0..bytes.len() {
            if let Some(next) = joints.matched.get(&bytes[start..]) {
                (0..4).for_each(|word| matched[word] |= next[word]);
            }
        }
        self.known.push(Last {
            cuts,
            partners: start as u32,
            mask: size as u32 - 1,
            has_matched: matched != [0; 4],
            matched,
            times,
            long,
            longer,
            is_open,
        });
        let at = self.known.len() as u32 - 1;
        self.place.insert(token, at);
        at
    }
}

/// One for each byte, and one more, as two are read where one is meant.
const TIMES: usize = 257;

/// Later than all times.
const NEVER: u16 = u16::MAX;

/// A time in few bits: one that is not later has no greater number.
fn rounded(time: u32) -> u16 {
    u16::try_from(time >> 1).map_or(NEVER - 1, |time| time.min(NEVER - 1))
}

/// Whether a token is the one of its only byte.
fn is_byte(tokenizer: &Tokenizer, token: u32) -> bool {
    let bytes = tokenizer.vocab.token_bytes(token);
    bytes.len() == 1 && tokenizer.vocab.id_of(bytes) == Some(token)
}

fn insert(set: &mut [u64; 4], byte: u8) {
    set[usize::from(byte) / 64] |= 1 << (byte % 64);
}

/// One of [`BEGINNINGS`].
fn pair_bit([first, second, _]: [u8; 3]) -> usize {
    let pair = u32::from_be_bytes([0, 0, first, second]);
    (pair.wrapping_mul(0x9E37_79B9) >> (u32::BITS - BEGINNINGS.ilog2())) as usize
}

/// One of [`LONGER_BEGINNINGS`].
fn triple_bit([first, second, third]: [u8; 3]) -> usize {
    let triple = u32::from_be_bytes([0, first, second, third]);
    (triple.wrapping_mul(0x9E37_79B9) >> (u32::BITS - LONGER_BEGINNINGS.ilog2())) as usize
}

fn slot_of(token: u32, mask: u32) -> usize {
    (token.wrapping_mul(0x9E37_79B9) >> 7 & mask) as usize
}

impl AfterToken<'_> {
    /// Whether the tokenizer keeps the left token when this one follows; `None` where only their
    /// bytes can tell.
    #[inline]
    pub fn keeps(&mut self, next: &Next) -> Option<bool> {
        if self.last.has_matched && has(&self.last.matched, next.first_byte) {
            return None;
        }
        if self.cuts[usize::from(next.shape)] == Cut::Unknown {
            self.ask(next.shape, next.token);
        }
        match self.cuts[usize::from(next.shape)] {
            Cut::Between => Some(true),
            Cut::Nowhere => {
                let merges =
                    self.merges_at_once(next) || (self.may_merge(next) && self.merges_with(next));
                Some(!merges)
            }
            Cut::Before => Some(false),
            Cut::Unclear | Cut::Unknown => None,
        }
    }

    /// Whether only bytes tell what some tokens do that follow.
    pub fn is_matched(&self) -> bool {
        self.last.has_matched
    }

    /// Whether text of this shape with these bytes leaves the left token as it is, `keeps` being
    /// the same of the token that the text begins with.
    pub fn keeps_for_text<'b>(
        &mut self,
        keeps: bool,
        text: u16,
        bytes: impl FnOnce() -> &'b [u8],
    ) -> bool {
        if self.last.has_matched {
            return false;
        }
        if self.cuts[usize::from(text)] == Cut::Unknown {
            self.ask_text(text, bytes());
        }
        match self.cuts[usize::from(text)] {
            Cut::Between => true,
            Cut::Nowhere => keeps,
            _ => false,
        }
    }

    /// Whether the first byte alone merges with the left token before it does with what follows it.
    #[inline]
    fn merges_at_once(&self, next: &Next) -> bool {
        next.until > self.last.times[usize::from(next.first_byte)]
    }

    /// Whether it takes a look at all left parts to tell that nothing merges.
    #[inline]
    fn may_merge(&self, next: &Next) -> bool {
        (next.until == self.last.times[usize::from(next.first_byte)])
            | has_bit(&self.last.long, usize::from(next.begins) % BEGINNINGS)
            | has_bit(
                &self.last.longer,
                usize::from(next.longer) % LONGER_BEGINNINGS,
            )
            | self.last.is_open
    }

    #[inline(never)]
    fn merges_with(&self, next: &Next) -> bool {
        let start = next.part_start as usize;
        for &(token, until) in &self.joints.parts[start..start + usize::from(next.part_count)] {
            let mut slot = slot_of(token, self.last.mask);
            loop {
                let (found, time) = self.partners[slot];
                if found == token {
                    if time <= until {
                        return true;
                    }
                    break;
                }
                if found == FREE {
                    break;
                }
                slot = (slot + 1) & self.last.mask as usize;
            }
        }
        self.last.is_open && self.joints.words.contains(&(self.token, next.token))
    }

    #[cold]
    fn ask(&mut self, shape: u16, token: u32) {
        let tokenizer = self.tokenizer;
        self.ask_text(shape, tokenizer.vocab.token_bytes(token));
    }

    #[cold]
    fn ask_text(&mut self, shape: u16, right: &[u8]) {
        let left = self.tokenizer.vocab.token_bytes(self.token);
        self.bytes.clear();
        self.bytes.extend_from_slice(left);
        self.bytes.extend_from_slice(right);
        let cut = match (&self.tokenizer.pre_tokenizer, str::from_utf8(self.bytes)) {
            (Some(cut), Ok(text)) => cut.cut(text),
            _ => None,
        };
        self.cuts[usize::from(shape)] = match cut.as_deref() {
            Some([_]) => Cut::Nowhere,
            Some([first, ..]) if first.end == left.len() => Cut::Between,
            Some([first, ..]) if first.end < left.len() => Cut::Before,
            _ => Cut::Unclear,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    pub(super) fn tokenizer(pattern: Option<&str>) -> Arc<Tokenizer> {
        let mut tokens: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
        let words = [
            " t", "th", " th", "he", " the", "en", " then", "  ", "\n\n", " \n", "12", "123", "34",
            "'s", "'t", "an", "and", " an", " and", "é", "日", "本", "日本", "ing", "in", "ng",
            "ti", "at", "ation", "ion", "on", "io", "tion", "nt", "ss", "sss", "!!", "!\n",
        ];
        tokens.extend(words.iter().map(|word| word.as_bytes().to_vec()));
        let tokens = tokens.into_iter().map(super::super::Token::Text);
        let made = Tokenizer::from_tokens(tokens, true).unwrap();
        Arc::new(match pattern {
            Some(pattern) => made.with_pattern(pattern).unwrap(),
            None => made,
        })
    }

    #[test]
    fn answers_are_those_of_the_segmented_bytes() {
        let llama3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";
        for pattern in [None, Some(llama3)] {
            let tokenizer = tokenizer(pattern);
            let size = tokenizer.vocab.len() as u32;
            let segment = |bytes: &[u8]| tokenizer.segment(bytes).unwrap().unwrap();
            let bytes = |id| tokenizer.vocab.token_bytes(id);
            let (mut joints, canonical) = Joints::new(&tokenizer).unwrap();
            // Texts that begin with a part of a character, as the tokenizer spells them.
            let texts = ["東", "東京", "ü", "×", "\u{3000}", "\u{2028}", "é東"].map(|text| {
                let first = segment(text.as_bytes())[0];
                (text, first, joints.shape_of(&tokenizer, text.as_bytes()))
            });
            let expected: Vec<bool> = (0..size).map(|id| segment(bytes(id)) == [id]).collect();
            assert_eq!(canonical, expected);
            let mut memo = JointMemo::default();
            let (mut clear, mut kept, mut unclear, mut words) = (0, 0, 0, 0);
            let (mut kept_texts, mut first) = (0, 0);
            let mut first_words = WordMemo::default();
            for last in (0..size).filter(|&id| canonical[id as usize]) {
                let Some(mut after) = memo.after(&joints, &tokenizer, last) else {
                    continue;
                };
                for &(text, first, shape) in &texts {
                    let Some(keeps) = after.keeps(&joints.next(first)) else {
                        continue;
                    };
                    if after.keeps_for_text(keeps, shape, || text.as_bytes()) {
                        let joined = segment(&[bytes(last), text.as_bytes()].concat());
                        assert_eq!(joined[0], last, "{last} {text:?} with {pattern:?}");
                        kept_texts += 1;
                    }
                }
                for next in 0..size {
                    let text = [bytes(last), bytes(next)].concat();
                    let mut shape = Vec::new();
                    if let Ok(text) = str::from_utf8(&text)
                        && let Some(end) = joints.first_word(&tokenizer, text, &mut first_words)
                    {
                        let whole = segment(text.as_bytes());
                        assert_eq!(segment(&text.as_bytes()[..end])[0], whole[0], "{text:?}");
                        first += 1;
                    }
                    if let Ok(text) = str::from_utf8(&text)
                        && joints.is_one_word(&tokenizer, text, &mut shape)
                    {
                        let mut merged = Vec::new();
                        let model = tokenizer.model.as_deref().unwrap();
                        assert!(model.segment(&tokenizer.vocab, text.as_bytes(), &mut merged));
                        assert_eq!(merged, segment(text.as_bytes()), "{text:?}");
                        words += 1;
                    }
                    let Some(found) = after.keeps(&joints.next(next)) else {
                        unclear += 1;
                        continue;
                    };
                    let expected = segment(&[bytes(last), bytes(next)].concat())[0] == last;
                    assert_eq!(found, expected, "{last} {next} with {pattern:?}");
                    clear += 1;
                    kept += usize::from(found);
                }
            }
            assert!(
                clear > 20_000 && kept > clear / 2 && kept < clear,
                "{clear} {kept}"
            );
            assert!(unclear < 2 * clear, "{unclear}");
            assert!(words > 1_000, "{words}");
            assert!(kept_texts > 200, "{kept_texts}");
            assert_eq!(first > 1_000, pattern.is_some(), "{first}");
        }
    }
}
