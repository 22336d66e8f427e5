//! Hostile ids: no panic, no hang, whatever stands where text is expected.

use cpu_time::ThreadTime;
use std::cell::Cell;
use std::sync::Arc;

use xtoken::align::TokenId;
use xtoken::{AlignOptions, Aligner, DummyPrefix, Role, Spelling, Vocab, VocabBuilder};

const BOS: u32 = 256;
const EOS: u32 = 257;
const UNUSED: u32 = 258;
const LONG: u32 = 259;
const SPACE: u32 = b' ' as u32;

/// All bytes, two specials, a hole, and a token of 300 bytes.
fn vocab(dummy_prefix: DummyPrefix) -> Arc<Vocab> {
    let mut builder = VocabBuilder::new(Spelling::sentencepiece(), dummy_prefix);
    for byte in 0..=u8::MAX {
        builder.push_text(&[byte]).unwrap();
    }
    builder.push_special("<s>").unwrap();
    builder.push_special("</s>").unwrap();
    builder.push_unused().unwrap();
    builder.push_text(&[b'a'; 300]).unwrap();
    let mut vocab = builder.build();
    vocab.set_role(Role::Bos, Some(BOS)).unwrap();
    vocab.set_role(Role::Eos, Some(EOS)).unwrap();
    Arc::new(vocab)
}

/// Each side repeats one of these to the full length.
fn cases() -> Vec<(Vec<u32>, Vec<u32>)> {
    let spaces = |count: usize, end: u8| [vec![BOS], vec![SPACE; count], vec![end.into()]].concat();
    let after = |id: u32, count: usize, end: u8| [vec![id; count], vec![end.into()]].concat();
    let periodic = |end: u8| -> Vec<u32> {
        (0..40)
            .map(|at| 97 + at * 7 % 13)
            .chain([end.into()])
            .collect()
    };
    vec![
        (vec![BOS], vec![EOS]),
        (vec![BOS, EOS], vec![EOS, UNUSED]),
        (vec![BOS, EOS], vec![EOS, BOS]),
        (vec![BOS], vec![97]),
        (vec![UNUSED], vec![UNUSED]),
        (spaces(1000, b'x'), spaces(1002, b'y')),
        (spaces(60, b'x'), spaces(62, b'y')),
        (spaces(3, b'x'), spaces(5, b'y')),
        (spaces(1000, b'x'), vec![97]),
        (vec![SPACE], vec![97]),
        (vec![BOS, 97], vec![97, 98]),
        (vec![BOS, SPACE], vec![SPACE, 98]),
        (after(BOS, 15, b'a'), after(UNUSED, 15, b'b')),
        (after(BOS, 63, b'a'), after(UNUSED, 63, b'b')),
        (vec![0xA9], vec![0xAA]),
        (vec![0xC3, BOS, 0xA9], vec![0xC3, UNUSED, 0xAA]),
        (vec![0xC3, 0xA9], vec![0xA9, 0xC3]),
        (periodic(b'x'), periodic(b'y')),
        (vec![LONG, 98], vec![97]),
        (vec![LONG], vec![97, 97, 98]),
    ]
}

#[test]
fn hostile_ids_cost_time_in_proportion_to_their_number() {
    let tokens = 8_000;
    let repeat = |unit: &[u32]| -> Vec<u32> { unit.iter().copied().cycle().take(tokens).collect() };
    for (student, teacher) in [
        (DummyPrefix::Never, DummyPrefix::Never),
        (DummyPrefix::Every, DummyPrefix::Never),
        (DummyPrefix::Every, DummyPrefix::First),
    ] {
        let (student, teacher) = (vocab(student), vocab(teacher));
        for whole_characters in [false, true] {
            let options = AlignOptions {
                role_pairs: None,
                whole_characters,
            };
            let aligner = Aligner::new(student.clone(), teacher.clone(), options).unwrap();
            for (case, (left, right)) in cases().iter().enumerate() {
                let (left, right) = (repeat(left), repeat(right));
                let start = ThreadTime::now();
                let batch = aligner.align(&left, &right).unwrap();
                // Of this thread alone, on which it takes milliseconds.
                assert!(start.elapsed().as_secs() < 5, "case {case}");
                assert_eq!(
                    batch.student_bounds.last(),
                    Some(&(tokens as i64)),
                    "case {case}"
                );
                assert_eq!(
                    batch.teacher_bounds.last(),
                    Some(&(tokens as i64)),
                    "case {case}"
                );
                let alone = aligner.align(&left, &[0u32; 0]).unwrap();
                assert_eq!(
                    alone.student_bounds.last(),
                    Some(&(tokens as i64)),
                    "case {case}"
                );
            }
        }
    }
}

/// An id that another thread of the caller's program overwrites now and then, as Python can.
#[derive(Clone, Copy)]
struct Overwritten(u32);

thread_local! {
    static STATE: Cell<u64> = const { Cell::new(0x9E37_79B9_7F4A_7C15) };
}

impl TokenId for Overwritten {
    fn index(self) -> usize {
        let state = STATE.get();
        let next = state ^ state << 13;
        let next = next ^ next >> 7;
        let next = next ^ next << 17;
        STATE.set(next);
        match next % 16 {
            0 => [32, 97, 98, 169, 195, 256, 257, 258, 259][next as usize / 16 % 9],
            _ => self.0 as usize,
        }
    }

    fn value(self) -> i64 {
        i64::from(self.0)
    }
}

#[test]
fn ids_that_are_overwritten_during_a_call_panic_nowhere() {
    for dummy_prefix in [DummyPrefix::Never, DummyPrefix::Every] {
        let (student, teacher) = (vocab(dummy_prefix), vocab(DummyPrefix::Never));
        for whole_characters in [false, true] {
            let options = AlignOptions {
                role_pairs: None,
                whole_characters,
            };
            let aligner = Aligner::new(student.clone(), teacher.clone(), options).unwrap();
            for (left, right) in cases() {
                let repeat = |unit: &[u32]| -> Vec<Overwritten> {
                    unit.iter()
                        .copied()
                        .cycle()
                        .take(3000)
                        .map(Overwritten)
                        .collect()
                };
                let batch = aligner.align(&repeat(&left), &repeat(&right)).unwrap();
                assert!(batch.student_bounds.is_sorted() && batch.teacher_bounds.is_sorted());
                assert_eq!(batch.student_bounds.last(), Some(&3000));
                assert_eq!(batch.teacher_bounds.last(), Some(&3000));
            }
        }
    }
}
