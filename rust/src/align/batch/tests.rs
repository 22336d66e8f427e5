//! The blocks of a batch against one thread that takes all of it.

use proptest::prelude::*;

use std::sync::Arc;

use common::draws;

use super::*;
use crate::align::AlignOptions;
use crate::vocab::{DummyPrefix, Spelling, VocabBuilder};

#[path = "../../../tests/all/common.rs"]
mod common;

fn aligner() -> Aligner {
    let mut builder = VocabBuilder::new(Spelling::ByteLevel, DummyPrefix::Never);
    for token in ["a", "b", "ab", "ba", "c", " "] {
        builder.push_text(token.as_bytes()).unwrap();
    }
    builder.push_special("<s>").unwrap();
    let vocab = Arc::new(builder.build());
    Aligner::new(vocab.clone(), vocab, AlignOptions::default()).unwrap()
}

/// All sequences of one side in one array.
fn flat(sequences: &[Vec<u32>]) -> (Vec<u32>, Vec<Range<usize>>) {
    let (mut ids, mut ranges) = (Vec::new(), Vec::new());
    for sequence in sequences {
        ranges.push(ids.len()..ids.len() + sequence.len());
        ids.extend_from_slice(sequence);
    }
    (ids, ranges)
}

fn with_work<R>(pairs: &[(Vec<u32>, Vec<u32>)], run: impl Fn(&Work<'_, u32, u32>) -> R) -> R {
    let (student, teacher): (Vec<_>, Vec<_>) = pairs.iter().cloned().unzip();
    let (student, teacher) = (flat(&student), flat(&teacher));
    fn ragged<'a>((ids, ranges): &'a (Vec<u32>, Vec<Range<usize>>)) -> Ragged<'a, u32> {
        Ragged { ids, ranges }
    }
    run(&Work {
        aligner: &aligner(),
        student: ragged(&student),
        teacher: ragged(&teacher),
    })
}

/// What one thread makes of the pairs, and what several make of them in blocks.
fn both(
    pairs: &[(Vec<u32>, Vec<u32>)],
    threads: usize,
    block_tokens: usize,
) -> [Result<AlignmentBatch>; 2] {
    with_work(pairs, |work| {
        let mut one = AlignmentBatch::default();
        let result = work.align(0..pairs.len(), &mut one);
        let blocks = work.align_blocks(&Threads::uncapped(threads), block_tokens);
        [result.map(|()| one), blocks]
    })
}

proptest! {
    #![proptest_config(draws(64))]

    #[test]
    fn blocks_of_any_size_give_the_answer_of_one_thread(
        pairs in prop::collection::vec(
            (prop::collection::vec(0u32..7, 0..20), prop::collection::vec(0u32..7, 0..20)), 0..24),
        threads in 2usize..5,
        block_tokens in 1usize..60,
    ) {
        let [one, blocks] = both(&pairs, threads, block_tokens);
        prop_assert_eq!(one.unwrap(), blocks.unwrap());
    }
}

#[test]
fn one_long_sequence_among_short_ones_changes_nothing() {
    let mut pairs = vec![(vec![0, 1, 4], vec![2, 4]); 300];
    pairs.insert(40, ([0, 1].repeat(5000), [2].repeat(5000)));
    pairs.push(([1, 0].repeat(9000), [3].repeat(9000)));
    for threads in [2, 3] {
        let [one, blocks] = both(&pairs, threads, 64);
        assert_eq!(one.unwrap(), blocks.unwrap());
    }
}

#[test]
fn the_first_sequence_with_a_bad_id_is_the_one_that_is_named() {
    let mut pairs = vec![(vec![0, 1], vec![2]); 50];
    pairs[45].0[1] = 9;
    pairs[17].1[0] = 8;
    for _ in 0..20 {
        for result in both(&pairs, 3, 4) {
            let message = result.unwrap_err().to_string();
            assert!(message.contains("17") && message.contains('8'), "{message}");
        }
    }
}

#[test]
fn blocks_hold_about_as_many_tokens_each_and_every_sequence_once() {
    let pairs: Vec<_> = [3, 0, 9, 40, 1, 1, 1, 0, 2]
        .map(|len| (vec![0; len], vec![0; len]))
        .to_vec();
    with_work(&pairs, |work| {
        assert_eq!(work.cut(28), [0..3, 3..4, 4..9]);
        assert_eq!(work.cut(1).len(), 9);
    });
}
