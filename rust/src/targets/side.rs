//! One side of a pair: its tokens in the order of their bytes, and where it has a boundary.

use std::ops::Range;
use std::sync::Arc;

use super::NONE;
use super::pair::ask_for;
use crate::error::Result;
use crate::segment::Model;
use crate::tokenizer::{AfterToken, BYTES, JointMemo, Joints, NO_SHAPE, Next, Tokenizer, WordMemo};
use crate::vocab::Vocab;

/// One tokenizer with its tokens in the order of their bytes.
#[derive(Debug)]
pub(super) struct Side {
    tokenizer: Arc<Tokenizer>,
    /// Text tokens by their bytes, equal ones by id.
    pub sorted: Vec<u32>,
    /// By token: its place in `sorted`, the end of those with equal bytes, and of those that begin so.
    pub order: Vec<Order>,
    /// By place in `sorted`: the first place of the longest tokens that begin this one and are
    /// shorter.
    shorter: Vec<u32>,
    /// Whether the tokenizer gives this token for its bytes.
    pub canonical: Vec<bool>,
    twins: Twins,
    /// Pairs of bytes that are neighbours within some token, 256 bits per first byte.
    adjacent: Vec<[u64; 4]>,
    /// What answers most questions about boundaries without their bytes.
    joints: Option<Joints>,
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Order {
    pub equal_start: u32,
    pub equal_end: u32,
    pub prefix_end: u32,
}

impl Side {
    /// `stops` are a group of their own, whatever their bytes.
    pub fn new(tokenizer: Arc<Tokenizer>, stops: &[u32], side: &'static str) -> Result<Self> {
        tokenizer.require_model(side)?;
        let vocab = &tokenizer.vocab;
        let mut sorted: Vec<u32> = (0..vocab.len() as u32)
            .filter(|&id| !vocab.token_bytes(id).is_empty())
            .collect();
        sorted.sort_by(|&a, &b| {
            vocab
                .token_bytes(a)
                .cmp(vocab.token_bytes(b))
                .then(a.cmp(&b))
        });
        let mut order = vec![Order::default(); vocab.len()];
        let mut shorter = vec![NONE; sorted.len()];
        // Tokens whose range of longer ones is still open, each a prefix of the next.
        let mut open: Vec<u32> = Vec::new();
        let mut at = 0;
        while at < sorted.len() {
            let bytes = vocab.token_bytes(sorted[at]);
            let equal = sorted[at..].partition_point(|&id| vocab.token_bytes(id) == bytes);
            while let Some(&top) = open.last() {
                let first = sorted[top as usize];
                if bytes.starts_with(vocab.token_bytes(first)) {
                    break;
                }
                open.pop();
                close(&mut order, &sorted, top, at as u32);
            }
            for &id in &sorted[at..at + equal] {
                order[id as usize] = Order {
                    equal_start: at as u32,
                    equal_end: (at + equal) as u32,
                    prefix_end: 0,
                };
            }
            if let Some(&beginning) = open.last() {
                shorter[at..at + equal].fill(beginning);
            }
            open.push(at as u32);
            at += equal;
        }
        while let Some(top) = open.pop() {
            close(&mut order, &sorted, top, sorted.len() as u32);
        }
        let mut adjacent = vec![[0u64; 4]; 256];
        for &id in &sorted {
            for pair in vocab.token_bytes(id).windows(2) {
                adjacent[usize::from(pair[0])][usize::from(pair[1]) / 64] |= 1 << (pair[1] % 64);
            }
        }
        let twins = Twins::new(&tokenizer, &sorted, &order, stops);
        let (joints, canonical) = match Joints::new(&tokenizer) {
            Some((joints, canonical)) => (Some(joints), canonical),
            None => (None, canonical_tokens(&tokenizer, &sorted)),
        };
        Ok(Self {
            tokenizer,
            sorted,
            order,
            shorter,
            canonical,
            twins,
            adjacent,
            joints,
        })
    }

    pub fn vocab(&self) -> &Vocab {
        &self.tokenizer.vocab
    }

    /// The tokens that stand for others with the same bytes.
    pub fn twins(&self) -> &Twins {
        &self.twins
    }

    /// A token with exactly these bytes.
    pub fn id_of(&self, bytes: &[u8]) -> Option<u32> {
        self.tokenizer.vocab.id_of(bytes)
    }

    pub fn bytes(&self, id: u32) -> &[u8] {
        self.tokenizer.vocab.token_bytes(id)
    }

    fn model(&self) -> Option<&Model> {
        self.tokenizer.model.as_deref()
    }

    /// Whether pairs of neighbours decide a segmentation.
    pub fn is_pairwise(&self) -> bool {
        matches!(self.model(), Some(Model::Bpe(_)))
    }

    /// The token that a text starts with.
    pub fn first_piece(&self, bytes: &[u8], pieces: &mut Vec<u32>) -> Option<u32> {
        let model = self.model()?;
        // Where the pre-tokenizer has nothing to do, asking it would take most of the time.
        let is_one_word = self.joints.as_ref().is_some_and(|joints| {
            str::from_utf8(bytes)
                .is_ok_and(|text| joints.is_one_word(&self.tokenizer, text, pieces))
        });
        let spelled = match is_one_word {
            true => model.segment(self.vocab(), bytes, pieces),
            false => self.tokenizer.segment_with(model, bytes, pieces),
        };
        pieces.first().copied().filter(|_| spelled)
    }

    /// As [`Side::first_piece`], of a text that can be spelled; only its first word is looked at where
    /// the shape of the text tells which that is.
    pub fn first_of_spelled(
        &self,
        bytes: &[u8],
        pieces: &mut Vec<u32>,
        words: &mut WordMemo,
    ) -> Option<u32> {
        if let (Some(joints), Ok(text), Some(model)) =
            (&self.joints, str::from_utf8(bytes), self.model())
            && let Some(end) = joints.first_word(&self.tokenizer, text, words)
        {
            let spelled = model.segment(self.vocab(), &bytes[..end], pieces);
            return pieces.first().copied().filter(|_| spelled);
        }
        self.first_piece(bytes, pieces)
    }

    /// The token that a text ends with.
    pub fn last_piece(&self, bytes: &[u8], pieces: &mut Vec<u32>) -> Option<u32> {
        self.first_piece(bytes, pieces)?;
        pieces.last().copied()
    }

    /// The first and the last token of a text; [`NONE`] twice where it cannot be spelled.
    pub fn outer_pieces(&self, bytes: &[u8], pieces: &mut Vec<u32>) -> (u32, u32) {
        match self.first_piece(bytes, pieces) {
            Some(first) => (first, pieces[pieces.len() - 1]),
            None => (NONE, NONE),
        }
    }

    /// The shape of a text that begins with this token, as far as it tells what the text does to one
    /// before it; before any question about boundaries.
    pub fn shape_of(&mut self, first: &Next, bytes: &[u8]) -> u16 {
        match &mut self.joints {
            // Where it begins with a part of a character, the text is asked about and not the token.
            Some(joints) if first.shape == BYTES => joints.shape_of(&self.tokenizer, bytes),
            _ => first.shape,
        }
    }

    /// A token as what may follow another.
    pub fn next(&self, token: u32) -> Next {
        match &self.joints {
            Some(joints) => joints.next(token),
            None => Next {
                token,
                first_byte: self.bytes(token).first().copied().unwrap_or(0),
                ..Next::default()
            },
        }
    }

    /// Whether the tokenizer keeps `last` when `next` follows.
    pub fn keeps(&self, last: u32, next: u32, memo: &mut BoundaryMemo) -> bool {
        if self.bytes(next).is_empty() {
            return true;
        }
        self.after(last, memo).keeps(&self.next(next))
    }

    /// Whether `last` stays when a token follows, ready to be asked of many.
    pub fn after<'a>(&'a self, last: u32, memo: &'a mut BoundaryMemo) -> After<'a> {
        let BoundaryMemo { joints, pairs } = memo;
        let by_joint = match &self.joints {
            Some(tables) => joints.after(tables, &self.tokenizer, last),
            None => None,
        };
        After {
            side: self,
            last,
            by_joint,
            pairs,
            // A text never ends with another token anyway.
            may_end: self.canonical[last as usize],
        }
    }

    /// Whether any token might swallow `last` and a part of what begins as `next` does.
    pub fn may_join(&self, last: u32, next: u32) -> bool {
        let (Some(&before), Some(&after)) = (self.bytes(last).last(), self.bytes(next).first())
        else {
            return false;
        };
        // White space may belong to what follows although no token says so.
        self.canonical[last as usize]
            && (has(&self.adjacent[usize::from(before)], after) || before.is_ascii_whitespace())
    }

    fn keeps_bytes(&self, last: u32, next: u32, memo: &mut PairMemo) -> bool {
        if !self.may_join(last, next) {
            return true;
        }
        memo.get(last, next, |bytes, pieces| {
            bytes.clear();
            bytes.extend_from_slice(self.bytes(last));
            bytes.extend_from_slice(self.bytes(next));
            self.first_piece(bytes, pieces) == Some(last)
        })
    }

    /// Whether some token begins with the bytes of this one and goes on.
    pub fn has_longer(&self, token: u32) -> bool {
        let order = self.order[token as usize];
        order.equal_end < order.prefix_end
    }

    /// The first places in `sorted` of the tokens that a token which is text begins with, its own
    /// before those of shorter ones.
    pub fn beginnings(&self, token: u32) -> impl Iterator<Item = u32> {
        let own = self.order[token as usize].equal_start;
        std::iter::successors(Some(own), |&place| {
            Some(self.shorter[place as usize]).filter(|&place| place != NONE)
        })
    }

    /// The places in `sorted` of the tokens that begin with `bytes` and go on.
    pub fn longer_than(&self, bytes: &[u8]) -> Range<u32> {
        self.longer_within(0..self.sorted.len() as u32, bytes)
    }

    /// As [`Side::longer_than`], of a text that begins with the bytes of this token: few do.
    pub fn longer_behind(&self, token: u32, bytes: &[u8]) -> Range<u32> {
        match self.bytes(token) {
            [] => self.longer_than(bytes),
            _ => {
                let order = self.order[token as usize];
                self.longer_within(order.equal_start..order.prefix_end, bytes)
            }
        }
    }

    fn longer_within(&self, places: Range<u32>, bytes: &[u8]) -> Range<u32> {
        let vocab = self.vocab();
        let sorted = &self.sorted[places.start as usize..places.end as usize];
        let start = sorted.partition_point(|&id| vocab.token_bytes(id) <= bytes);
        let more = sorted[start..].partition_point(|&id| vocab.token_bytes(id).starts_with(bytes));
        let start = places.start + start as u32;
        start..start + more as u32
    }
}

/// Tokens with the bytes of another one, such as `<0x41>` beside `A`: what is said of a text must not
/// depend on which of them spells it.
#[derive(Debug)]
pub(super) struct Twins {
    /// By token: the one with its bytes that the tokenizer emits; empty where all are apart.
    stands_for: Vec<u32>,
    /// All ids that have another one in `stands_for` are within these: few others are.
    within: Range<u32>,
}

impl Twins {
    fn new(tokenizer: &Tokenizer, sorted: &[u32], order: &[Order], stops: &[u32]) -> Self {
        let mut stands_for = Vec::new();
        let mut within = 0..0;
        for &id in sorted {
            let Order {
                equal_start,
                equal_end,
                ..
            } = order[id as usize];
            if equal_end - equal_start == 1 || stops.contains(&id) {
                continue;
            }
            let emitted = tokenizer.id_of(tokenizer.vocab.token_bytes(id));
            if let Some(emitted) = emitted.filter(|other| *other != id && !stops.contains(other)) {
                if stands_for.is_empty() {
                    stands_for.extend(0..tokenizer.vocab.len() as u32);
                }
                stands_for[id as usize] = emitted;
                within = match within.is_empty() {
                    true => id..id + 1,
                    false => within.start.min(id)..within.end.max(id + 1),
                };
            }
        }
        Self { stands_for, within }
    }

    /// The token that stands for all with the bytes of this one.
    #[inline]
    pub fn of(&self, id: u32) -> u32 {
        match self.within.contains(&id) {
            true => self.stands_for[id as usize],
            false => id,
        }
    }

    /// Whether some of these may have another one that stands for it.
    #[inline(always)]
    pub fn may_be_among(&self, ids: &[u32]) -> bool {
        let count = self.within.end - self.within.start;
        let mut any = false;
        for &id in ids {
            any |= id.wrapping_sub(self.within.start) < count;
        }
        any
    }
}

/// Whether the tokenizer gives each token for its bytes.
fn canonical_tokens(tokenizer: &Tokenizer, sorted: &[u32]) -> Vec<bool> {
    let vocab = &tokenizer.vocab;
    let mut canonical = vec![false; vocab.len()];
    let mut pieces = Vec::new();
    for &id in sorted {
        let spelled = match &tokenizer.model {
            Some(model) => tokenizer.segment_with(model, vocab.token_bytes(id), &mut pieces),
            None => false,
        };
        canonical[id as usize] = spelled && pieces == [id];
    }
    canonical
}

fn close(order: &mut [Order], sorted: &[u32], start: u32, end: u32) {
    let equal_end = order[sorted[start as usize] as usize].equal_end;
    for &id in &sorted[start as usize..equal_end as usize] {
        order[id as usize].prefix_end = end;
    }
}

fn has(set: &[u64; 4], byte: u8) -> bool {
    set[usize::from(byte) / 64] >> (byte % 64) & 1 == 1
}

/// A token at the end of a text; see [`Side::after`].
pub(super) struct After<'a> {
    side: &'a Side,
    last: u32,
    by_joint: Option<AfterToken<'a>>,
    pairs: &'a mut PairMemo,
    may_end: bool,
}

impl After<'_> {
    /// Whether the tokenizer keeps the token when this one, which is not empty, follows.
    #[inline]
    pub fn keeps(&mut self, next: &Next) -> bool {
        let by_joint = self.by_joint.as_mut().and_then(|after| after.keeps(next));
        by_joint.unwrap_or_else(|| self.by_bytes(next.token))
    }

    /// What answers at once; `None` where nothing does.
    pub fn at_once(&self) -> Option<&AfterToken<'_>> {
        self.by_joint.as_ref().filter(|after| !after.is_matched())
    }

    /// Has what a question about this token takes brought nearer.
    pub fn ask_for(&self, next: &Next) {
        if let Some(joints) = &self.side.joints {
            ask_for(joints.parts_of(next));
        }
    }

    /// Whether the tokenizer keeps the token when this one follows, and when the text does that has
    /// this shape and these bytes and begins with it.
    pub fn keeps_both<'b>(
        &mut self,
        next: &Next,
        text: u16,
        bytes: impl FnOnce() -> &'b [u8],
    ) -> (bool, bool) {
        let keeps = self.keeps(next);
        let keeps_for_text = match &mut self.by_joint {
            _ if next.shape == text => keeps && text != NO_SHAPE,
            Some(after) => after.keeps_for_text(keeps, text, bytes),
            None => false,
        };
        (keeps, keeps_for_text)
    }

    #[cold]
    fn by_bytes(&mut self, next: u32) -> bool {
        !self.may_end || self.side.keeps_bytes(self.last, next, self.pairs)
    }
}

/// What one thread knows of the boundaries of one side.
#[derive(Debug)]
pub(super) struct BoundaryMemo {
    joints: JointMemo,
    pairs: PairMemo,
}

impl BoundaryMemo {
    pub fn new() -> Self {
        Self {
            joints: JointMemo::default(),
            pairs: PairMemo::new(),
        }
    }
}

/// Answers about pairs of tokens, a fixed number of them.
#[derive(Debug)]
struct PairMemo {
    slots: Vec<u64>,
    bytes: Vec<u8>,
    pieces: Vec<u32>,
}

const MEMO_BITS: u32 = 18;

impl PairMemo {
    fn new() -> Self {
        Self {
            slots: vec![u64::MAX; 1 << MEMO_BITS],
            bytes: Vec::new(),
            pieces: Vec::new(),
        }
    }

    fn get(
        &mut self,
        left: u32,
        right: u32,
        answer: impl FnOnce(&mut Vec<u8>, &mut Vec<u32>) -> bool,
    ) -> bool {
        // Ids are below 2^31, which leaves the lowest bit to the answer.
        let key = u64::from(left) << 32 | u64::from(right) << 1;
        let slot = (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - MEMO_BITS)) as usize;
        if self.slots[slot] & !1 == key {
            return self.slots[slot] & 1 == 1;
        }
        let found = answer(&mut self.bytes, &mut self.pieces);
        self.slots[slot] = key | u64::from(found);
        found
    }
}
