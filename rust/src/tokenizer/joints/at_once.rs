//! What shapes, first bytes and times alone tell of many tokens that follow another: which leave it
//! as it is, and of which that takes more.

use super::{AfterToken, BEGINNINGS, Cut, LONGER_BEGINNINGS, Next, has_bit};

/// What is looked at of a text and the token that it begins with, in two words, as many are looked
/// at together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Marks {
    /// The shape of the text, and [`Next::until`] in the upper half.
    pub shape: u32,
    /// [`Next::begins`], [`Next::longer`] and [`Next::first_byte`] above it, and two flags.
    pub begins: u32,
}

const LONGER_SHIFT: u32 = BEGINNINGS.ilog2();
const BYTE_SHIFT: u32 = LONGER_SHIFT + LONGER_BEGINNINGS.ilog2();
/// The first token has the shape [`super::BYTES`], the text one of its own.
const IS_BYTES: u32 = 1 << 30;
/// Of what is no text these marks tell nothing.
pub(crate) const NO_TEXT: u32 = 1 << 31;

impl Marks {
    /// Of text that begins with `next` and has this shape.
    pub fn new(next: &Next, shape: u16, is_text: bool) -> Self {
        let flags = [(next.shape == super::BYTES, IS_BYTES), (!is_text, NO_TEXT)];
        let flags = flags.iter().filter(|flag| flag.0).map(|flag| flag.1);
        Self {
            shape: u32::from(shape) | u32::from(next.until) << 16,
            begins: u32::from(next.begins)
                | u32::from(next.longer) << LONGER_SHIFT
                | u32::from(next.first_byte) << BYTE_SHIFT
                | flags.sum::<u32>(),
        }
    }
}

/// Answers about many texts, 64 in a word.
#[derive(Debug, Default)]
pub(crate) struct Told {
    /// Whether the first token leaves the left one.
    pub keeps: Vec<u64>,
    /// Whether all of the text does, as far as its first token tells.
    pub for_text: Vec<u64>,
    /// Whether it is not known so quickly; then the other two mean nothing.
    pub open: Vec<u64>,
}

impl Told {
    /// So many questions, all of them open.
    pub fn nothing(&mut self, count: usize) {
        self.clear();
        self.keeps.resize(count.div_ceil(WORD), 0);
        self.for_text.resize(count.div_ceil(WORD), 0);
        self.open.resize(count / WORD, u64::MAX);
        if !count.is_multiple_of(WORD) {
            self.open.push(u64::MAX >> (WORD - count % WORD));
        }
    }

    fn clear(&mut self) {
        self.keeps.clear();
        self.for_text.clear();
        self.open.clear();
    }

    fn push(&mut self, word: [u64; 3]) {
        self.keeps.push(word[0]);
        self.for_text.push(word[1]);
        self.open.push(word[2]);
    }
}

/// Texts whose answers are in one word.
const WORD: usize = 64;

impl AfterToken<'_> {
    /// Whether the texts with these marks, as [`Marks`] has them, leave the left token.
    pub fn at_once(&self, shapes: &[u32], begins: &[u32], told: &mut Told) {
        told.clear();
        #[cfg(target_arch = "x86_64")]
        if std::arch::is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has it.
            return unsafe { self.at_once_avx2(shapes, begins, told) };
        }
        self.at_once_plain(shapes, begins, told);
    }

    fn at_once_plain(&self, shapes: &[u32], begins: &[u32], told: &mut Told) {
        for (shapes, begins) in shapes.chunks(WORD).zip(begins.chunks(WORD)) {
            let mut words = [0; 3];
            for (bit, (&shape, &begins)) in shapes.iter().zip(begins).enumerate() {
                let answers = self.at_once_of(shape, begins);
                for (word, answer) in words.iter_mut().zip(answers) {
                    *word |= u64::from(answer) << bit;
                }
            }
            told.push(words);
        }
    }

    /// The three answers about one.
    #[inline]
    fn at_once_of(&self, shape: u32, begins: u32) -> [bool; 3] {
        let cut = self.cuts[shape as usize & 0xFFFF];
        let first_cut = match begins & IS_BYTES {
            0 => cut,
            _ => Cut::Nowhere,
        };
        let until = (shape >> 16) as u16;
        let time = self.last.times[(begins >> BYTE_SHIFT) as usize & 0xFF];
        let bit = (begins >> LONGER_SHIFT) as usize % LONGER_BEGINNINGS;
        let long = has_bit(&self.last.long, begins as usize % BEGINNINGS)
            | has_bit(&self.last.longer, bit);
        // No branches: neither way is rare.
        let nowhere = first_cut == Cut::Nowhere;
        let merges = until > time;
        let may_merge = (until == time) | long | self.last.is_open;
        let keeps = (first_cut == Cut::Between) | (nowhere & !(merges | may_merge));
        let open = (first_cut > Cut::Nowhere)
            | (cut == Cut::Unknown)
            | (nowhere & may_merge & !merges)
            | (begins & NO_TEXT != 0);
        let for_text = (cut == Cut::Between) | ((cut == Cut::Nowhere) & keeps);
        [keeps, for_text, open]
    }

    /// The same bits, of eight texts together.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2")]
    fn at_once_avx2(&self, shapes: &[u32], begins: &[u32], told: &mut Told) {
        use std::arch::x86_64::*;
        const LANES: usize = 8;
        let last_shape = _mm256_set1_epi32(self.cuts.len() as i32 - super::CUT_PADDING as i32 - 1);
        let (low, byte) = (_mm256_set1_epi32(0xFFFF), _mm256_set1_epi32(0xFF));
        let five = _mm256_set1_epi32(31);
        let word = _mm256_set1_epi32(BEGINNINGS as i32 / 32 - 1);
        let longer_word = _mm256_set1_epi32(LONGER_BEGINNINGS as i32 / 32 - 1);
        let between = _mm256_set1_epi32(Cut::Between as i32);
        let nowhere = _mm256_set1_epi32(Cut::Nowhere as i32);
        let unclear = _mm256_set1_epi32(Cut::Unclear as i32);
        let always = _mm256_set1_epi32(-i32::from(self.last.is_open));
        let (and, or, andnot) = (_mm256_and_si256, _mm256_or_si256, _mm256_andnot_si256);
        let (equal, more) = (_mm256_cmpeq_epi32, _mm256_cmpgt_epi32);
        for (shapes, begins) in shapes.chunks(WORD).zip(begins.chunks(WORD)) {
            let mut words = [0; 3];
            let ((eights, rest), (other_eights, _)) =
                (shapes.as_chunks::<LANES>(), begins.as_chunks::<LANES>());
            for (eight, (shapes, begins)) in eights.iter().zip(other_eights).enumerate() {
                // SAFETY: eight numbers are read of eight; a shape is no more than the last one, a
                // cut has as many bytes behind it as are read; a byte is one of 256 times, with
                // one more behind; a beginning's word is one of its table.
                let (shape, begin, cut, time, long, longer) = unsafe {
                    let shape = _mm256_loadu_si256(shapes.as_ptr().cast());
                    let begin = _mm256_loadu_si256(begins.as_ptr().cast());
                    let number = _mm256_min_epi32(and(shape, low), last_shape);
                    let cut = _mm256_i32gather_epi32::<1>(self.cuts.as_ptr().cast(), number);
                    let first = and(_mm256_srli_epi32::<{ BYTE_SHIFT as i32 }>(begin), byte);
                    let time = _mm256_i32gather_epi32::<2>(self.last.times.as_ptr().cast(), first);
                    let at = and(_mm256_srli_epi32::<5>(begin), word);
                    let long = _mm256_i32gather_epi32::<4>(self.last.long.as_ptr().cast(), at);
                    let at = _mm256_srli_epi32::<{ LONGER_SHIFT as i32 + 5 }>(begin);
                    let at = and(at, longer_word);
                    let longer = self.last.longer.as_ptr().cast();
                    let longer = _mm256_i32gather_epi32::<4>(longer, at);
                    (shape, begin, cut, time, long, longer)
                };
                let (cut, time) = (and(cut, byte), and(time, low));
                let until = _mm256_srli_epi32::<16>(shape);
                let bit = and(begin, five);
                let longer_bit = and(_mm256_srli_epi32::<{ LONGER_SHIFT as i32 }>(begin), five);
                let long = or(
                    _mm256_srlv_epi32(long, bit),
                    _mm256_srlv_epi32(longer, longer_bit),
                );
                // Of each number the highest bit counts.
                let long = _mm256_slli_epi32::<31>(long);
                let is_bytes = _mm256_srai_epi32::<31>(_mm256_slli_epi32::<1>(begin));
                let first_cut = _mm256_blendv_epi8(cut, nowhere, is_bytes);
                let first_nowhere = equal(first_cut, nowhere);
                let merges = more(until, time);
                let may_merge = or(or(equal(until, time), always), long);
                let keeps = andnot(or(merges, may_merge), first_nowhere);
                let keeps = or(equal(first_cut, between), keeps);
                let open = and(andnot(merges, may_merge), first_nowhere);
                let open = or(open, or(more(first_cut, nowhere), more(cut, unclear)));
                let for_text = or(equal(cut, between), and(equal(cut, nowhere), keeps));
                for (word, bits) in words.iter_mut().zip([keeps, for_text, or(open, begin)]) {
                    let bits = _mm256_movemask_ps(_mm256_castsi256_ps(bits)) as u32;
                    *word |= u64::from(bits) << (LANES * eight);
                }
            }
            let from = LANES * eights.len();
            for bit in from..from + rest.len() {
                let answers = self.at_once_of(shapes[bit], begins[bit]);
                for (word, answer) in words.iter_mut().zip(answers) {
                    *word |= u64::from(answer) << bit;
                }
            }
            told.push(words);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::{BYTES, JointMemo, Joints, tests::tokenizer};
    use super::*;

    #[test]
    fn eight_together_are_told_what_each_is_told_alone() {
        let tokenizer = tokenizer(Some(r"\p{N}{1,3}| ?\p{L}+|\s+|."));
        let (joints, _) = Joints::new(&tokenizer).unwrap();
        let size = tokenizer.vocab.len() as u32;
        let other = joints.next(size - 1).shape;
        let shape = |id: u32, next: &Next| match next.shape {
            BYTES if id.is_multiple_of(2) => other,
            shape => shape,
        };
        let marks: Vec<Marks> = (0..size)
            .map(|id| {
                let next = joints.next(id);
                Marks::new(&next, shape(id, &next), id % 11 != 0)
            })
            .collect();
        let shapes: Vec<u32> = marks.iter().map(|marks| marks.shape).collect();
        let begins: Vec<u32> = marks.iter().map(|marks| marks.begins).collect();
        let mut memo = JointMemo::default();
        let (mut kept, mut open, mut lost, mut apart) = (0, 0, 0, 0);
        for last in 0..size {
            let Some(mut after) = memo.after(&joints, &tokenizer, last) else {
                continue;
            };
            for round in 0..2 {
                let (mut together, mut plain) = (Told::default(), Told::default());
                after.at_once(&shapes, &begins, &mut together);
                after.at_once_plain(&shapes, &begins, &mut plain);
                assert_eq!(together.open, plain.open, "{last}");
                for next in 0..size {
                    let bit = |words: &[u64]| words[next as usize / WORD] >> (next % 64) & 1 == 1;
                    if bit(&plain.open) {
                        open += round;
                        // What is asked about is known the next time.
                        after.keeps(&joints.next(next));
                        continue;
                    }
                    let next = joints.next(next);
                    let (keeps, for_text) = (bit(&plain.keeps), bit(&plain.for_text));
                    assert_eq!(bit(&together.keeps), keeps, "{last} {next:?}");
                    assert_eq!(bit(&together.for_text), for_text, "{last} {next:?}");
                    assert_eq!(after.keeps(&next), Some(keeps), "{last} {next:?}");
                    let text = shape(next.token, &next);
                    let bytes = || tokenizer.vocab.token_bytes(next.token);
                    assert_eq!(after.keeps_for_text(keeps, text, bytes), for_text);
                    kept += u32::from(keeps);
                    lost += u32::from(!keeps);
                    apart += u32::from(keeps != for_text);
                }
            }
        }
        let found = [kept, open, lost, apart];
        assert!(found.iter().all(|&count| count > 50), "{found:?}");
    }
}
