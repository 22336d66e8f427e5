//! Texts that differ: differences stay local, answers are close to the exact optimum, and hostile
//! input costs time in proportion to its length.

use cpu_time::ThreadTime;
use std::sync::Arc;

use xtoken::{
    AlignOptions, Aligner, AlignmentBatch, ChunkKind, DummyPrefix, Spelling, Vocab, VocabBuilder,
    reference,
};

/// A vocabulary with all bytes, and words and their halves from `words`.
fn vocab(words: &str, cut: usize, dummy_prefix: DummyPrefix) -> Arc<Vocab> {
    let mut builder = VocabBuilder::new(Spelling::sentencepiece(), dummy_prefix);
    for byte in 0..=u8::MAX {
        builder.push_text(&[byte]).unwrap();
    }
    builder.push_special("<s>").unwrap();
    for word in words.split(' ') {
        let word = format!(" {word}");
        let (head, tail) = word.split_at(word.len().min(cut));
        builder.push_text(head.as_bytes()).unwrap();
        builder.push_text(tail.as_bytes()).unwrap();
        builder.push_text(word.as_bytes()).unwrap();
    }
    Arc::new(builder.build())
}

/// Greedy: the longest token that fits.
fn encode(vocab: &Vocab, text: &[u8]) -> Vec<i64> {
    let (mut ids, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let longest = (1..=rest.len().min(12))
            .rev()
            .find_map(|len| vocab.id_of(&rest[..len]));
        let id = longest.unwrap();
        ids.push(i64::from(id));
        rest = &rest[vocab.token_bytes(id).len()..];
    }
    ids
}

fn texts<'a>(vocab: &'a Vocab, ids: &[i64]) -> Vec<&'a [u8]> {
    ids.iter().map(|&id| vocab.token_bytes(id as u32)).collect()
}

const WORDS: &str = "the of and language model student teacher token byte chunk aligns projects learns \
    from with under over never always boundary rate loss gradient masked padded sampled vocabulary \
    distribution mass numeral digit small large exact local hostile linear text ends starts";

/// A small generator of random numbers: the same texts in each run.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(0x5851_F42D_4C95_7F2D)
            .wrapping_add(0x1405_7B7E_F767_814F);
        (self.0 >> 33) as usize % limit
    }

    fn text(&mut self, words: usize) -> String {
        let known: Vec<&str> = WORDS.split_whitespace().collect();
        (0..words)
            .map(|_| format!(" {}", known[self.below(known.len())]))
            .collect()
    }
}

struct Pair {
    student: Arc<Vocab>,
    teacher: Arc<Vocab>,
    aligner: Aligner,
}

fn pair() -> Pair {
    let student = vocab(WORDS, 4, DummyPrefix::Never);
    let teacher = vocab(WORDS, 6, DummyPrefix::Never);
    let options = AlignOptions::default();
    let aligner = Aligner::new(student.clone(), teacher.clone(), options).unwrap();
    Pair {
        student,
        teacher,
        aligner,
    }
}

impl Pair {
    fn align(&self, left: &str, right: &str) -> AlignmentBatch {
        let student = encode(&self.student, left.as_bytes());
        let teacher = encode(&self.teacher, right.as_bytes());
        self.aligner.align(&student, &teacher).unwrap()
    }

    /// Bytes in exact chunks, and the most that there could be.
    fn quality(&self, left: &str, right: &str) -> (i64, i64) {
        let student = encode(&self.student, left.as_bytes());
        let teacher = encode(&self.teacher, right.as_bytes());
        let exact = self.aligner.align(&student, &teacher).unwrap().counts[0].exact_bytes;
        let texts = (
            texts(&self.student, &student),
            texts(&self.teacher, &teacher),
        );
        (
            exact,
            reference::most_exact_bytes(&texts.0, &texts.1) as i64,
        )
    }
}

#[test]
fn one_changed_word_costs_that_word_wherever_it_stands() {
    let pair = pair();
    let text = Random(1).text(60);
    let words: Vec<&str> = text.split_inclusive(' ').collect();
    for at in 1..words.len() {
        for change in ["hostile ", "", "x", "gradient masked "] {
            let mut changed = words.clone();
            changed[at] = change;
            let (exact, most) = pair.quality(&text, &changed.concat());
            assert_eq!(exact, most, "{change:?} in place of word {at}");
        }
    }
}

#[test]
fn many_changed_words_come_close_to_the_optimum() {
    let pair = pair();
    for (percent, allowed_points) in [(1, 0.05), (10, 0.5)] {
        let (mut exact, mut most, mut bytes) = (0, 0, 0);
        for seed in 0..40 {
            let mut random = Random(seed);
            let text = random.text(200);
            let changed: String = text
                .split_inclusive(' ')
                .map(
                    |word| match (random.below(100) < percent, random.below(3)) {
                        (false, _) => word.to_owned(),
                        (true, 0) => String::new(),
                        (true, 1) => word.repeat(2),
                        (true, _) => word.to_uppercase(),
                    },
                )
                .collect();
            let (here, best) = pair.quality(&text, &changed);
            exact += here;
            most += best;
            bytes += text.len() as i64;
        }
        let points = 100.0 * (most - exact) as f64 / bytes as f64;
        assert!(
            points <= allowed_points,
            "{percent} %: {points} points below the optimum"
        );
    }
}

#[test]
fn a_header_on_one_side_is_one_sided_and_nothing_else_changes() {
    let pair = pair();
    let text = Random(2).text(500);
    let header = Random(3).text(300).to_uppercase();
    let plain = pair.align(&text, &text);
    for (left, right) in [
        (text.clone(), header.clone() + &text),
        (header + &text, text),
    ] {
        let batch = pair.align(&left, &right);
        assert_eq!(batch.counts[0].exact_bytes, plain.counts[0].exact_bytes);
        let one_sided = batch.kinds.len() - plain.kinds.len();
        assert!(
            batch.kinds[one_sided..]
                .iter()
                .all(|&kind| kind == ChunkKind::Exact as u8)
        );
    }
}

#[test]
fn a_header_before_a_text_too_short_for_an_anchor_is_one_sided() {
    let pair = pair();
    let header = Random(3).text(300).to_uppercase();
    let batch = pair.align(" small exact", &(header + " small exact"));
    assert_eq!(batch.counts[0].exact_bytes, 12);
    assert_eq!(batch.counts[0].coarse_chunks, 0);
}

#[test]
fn a_cut_tail_is_one_sided_up_to_the_token_that_was_cut() {
    let pair = pair();
    let text = Random(4).text(2000);
    for cut in [0, 1, 3, 500, 507, 511, text.len() - 1] {
        let batch = pair.align(&text, &text[..cut]);
        let kinds = &batch.kinds;
        let exact = kinds
            .iter()
            .take_while(|&&kind| kind == ChunkKind::Exact as u8)
            .count();
        let mismatch = usize::from(kinds.get(exact) == Some(&(ChunkKind::Mismatch as u8)));
        assert!(
            kinds[exact + mismatch..]
                .iter()
                .all(|&kind| kind == ChunkKind::StudentOnly as u8)
        );
        // What the cut left of a word of ten bytes at most.
        assert!(batch.counts[0].exact_bytes + 13 >= cut as i64, "{cut}");
    }
}

#[test]
fn a_replaced_section_leaves_the_text_around_it() {
    let pair = pair();
    let (before, after) = (Random(5).text(400), Random(6).text(400));
    let left = before.clone() + &Random(7).text(2000) + &after;
    let right = before.clone() + &Random(8).text(1500).to_uppercase() + &after;
    let batch = pair.align(&left, &right);
    let kept = (before.len() + after.len()) as i64;
    assert!(
        batch.counts[0].exact_bytes >= kept - 16,
        "{}",
        batch.counts[0].exact_bytes
    );
}

#[test]
fn differences_every_few_bytes_keep_what_lies_between() {
    let pair = pair();
    let left = " the language \u{E9} of the model \u{E9}".repeat(200);
    let right = left.replace('\u{E9}', "e\u{301}");
    let batch = pair.align(&left, &right);
    let kept = left.len() as i64 * 4 / 5;
    assert!(batch.counts[0].exact_bytes >= kept, "{:?}", batch.counts[0]);
    assert_eq!(batch.counts[0].coarse_chunks, 0);
}

#[test]
fn hostile_texts_cost_time_in_proportion_to_their_length() {
    let pair = pair();
    let size = 200_000;
    let repeat = |unit: &str| unit.repeat(size / unit.len());
    let mut random = Random(9);
    let noise: String = (0..size)
        .map(|_| char::from(b'a' + random.below(3) as u8))
        .collect();
    let other: String = (0..size)
        .map(|_| char::from(b'a' + random.below(3) as u8))
        .collect();
    let shifted = format!("b{}", repeat("a"));
    let cases = [
        (repeat("a"), repeat("b")),
        (repeat("a"), shifted + "c"),
        (repeat("ab"), repeat("ba") + "c"),
        (repeat(" the"), repeat(" the of")),
        (
            repeat(&format!("{}x", " ".repeat(70))),
            repeat(&format!("{}y", " ".repeat(70))),
        ),
        (
            repeat(&format!("{}x", "ab".repeat(20))),
            repeat(&format!("{}y", "ab".repeat(20))),
        ),
        (noise.clone(), other),
        (Random(10).text(size / 8), Random(11).text(size / 8)),
        (noise.clone(), noise.chars().rev().collect()),
    ];
    for (at, (left, right)) in cases.iter().enumerate() {
        let student = encode(&pair.student, left.as_bytes());
        let teacher = encode(&pair.teacher, right.as_bytes());
        let start = ThreadTime::now();
        let batch = pair.aligner.align(&student, &teacher).unwrap();
        let seconds = start.elapsed().as_secs_f64();
        // Of this thread alone; a quadratic walk would take minutes.
        assert!(seconds < 3.0, "case {at}: {seconds} s");
        assert_eq!(batch.student_bounds.last(), Some(&(student.len() as i64)));
        eprintln!("case {at}: {seconds:.3} s, {:?}", batch.counts[0]);
    }
}

#[test]
fn tokens_without_text_stay_outside_mismatches_and_keep_their_pairs() {
    let mut builder = VocabBuilder::new(Spelling::Bytes, DummyPrefix::Never);
    builder.push_special("</s>").unwrap();
    for byte in b"abcdefgh" {
        builder.push_text(&[*byte]).unwrap();
    }
    let vocab = Arc::new(builder.build());
    let aligner = Aligner::new(vocab.clone(), vocab, AlignOptions::default()).unwrap();
    let (exact, mismatch, special) = (
        ChunkKind::Exact as u8,
        ChunkKind::Mismatch as u8,
        ChunkKind::Special as u8,
    );
    // a </s> b | c </s> d: the pair of </s> stands between two mismatches.
    let batch = aligner.align(&[1u32, 0, 2], &[3u32, 0, 4]).unwrap();
    assert_eq!(batch.kinds, [mismatch, special, mismatch]);
    // A special on one side, next to a mismatch.
    let batch = aligner.align(&[1u32, 0, 2], &[3u32, 2]).unwrap();
    assert_eq!(batch.kinds, [mismatch, ChunkKind::StudentOnly as u8, exact]);
    let batch = aligner.align(&[0u32, 1, 2], &[3u32, 2]).unwrap();
    assert_eq!(batch.kinds, [ChunkKind::StudentOnly as u8, mismatch, exact]);
}

#[test]
fn the_dummy_prefix_is_told_from_a_space_of_the_text() {
    let words = "a b";
    let student = vocab(words, 4, DummyPrefix::Every);
    let teacher = vocab(words, 4, DummyPrefix::Never);
    let aligner = Aligner::new(student.clone(), teacher.clone(), AlignOptions::default()).unwrap();
    let bos = i64::from(student.specials().next().unwrap().0);
    let id = |token: &str| i64::from(student.id_of(token.as_bytes()).unwrap());
    let (space, a, spaced_a, b) = (id(" "), id("a"), id(" a"), id("b"));
    let (exact, student_only) = (ChunkKind::Exact as u8, ChunkKind::StudentOnly as u8);
    let kinds = |student: &[i64], teacher: &[i64]| aligner.align(student, teacher).unwrap().kinds;
    // "a": the dummy prefix inside a token, or alone.
    assert_eq!(kinds(&[bos, spaced_a], &[a]), [student_only, exact]);
    assert_eq!(kinds(&[space, a], &[a]), [student_only, exact]);
    // " a": the text's own space doubles the prefix, or stands for it.
    assert_eq!(
        kinds(&[space, spaced_a], &[spaced_a]),
        [student_only, exact]
    );
    assert_eq!(kinds(&[spaced_a], &[spaced_a]), [exact]);
    // After each special token, also inside a teacher's token.
    assert_eq!(
        kinds(&[spaced_a, bos, spaced_a], &[a, a]),
        [exact, student_only, exact]
    );
    let joined = i64::from(teacher.id_of(b" b").unwrap());
    assert_eq!(
        kinds(&[space, space, bos, space, b], &[joined]),
        [student_only, exact]
    );
    // Two spaces more are a difference of the texts.
    let batch = aligner.align(&[space, space, spaced_a], &[a]).unwrap();
    assert_eq!(batch.counts[0].exact_bytes, 0);
}
