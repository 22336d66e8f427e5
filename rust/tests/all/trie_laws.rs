//! Laws of the piece trie, against a map of all prefixes.

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;
use xtoken::Threads;
use xtoken::trie::PieceTrie;

use crate::common::draws;

const PIECES: usize = 5;

fn prefixes(sequences: &[Vec<u32>]) -> BTreeMap<Vec<u32>, BTreeSet<u32>> {
    let mut found: BTreeMap<Vec<u32>, BTreeSet<u32>> = BTreeMap::new();
    for (token, sequence) in (0..).zip(sequences) {
        for length in 1..=sequence.len() {
            let prefix = sequence[..length].to_vec();
            found.entry(prefix).or_default().insert(token);
        }
    }
    found
}

fn sequences() -> impl Strategy<Value = Vec<Vec<u32>>> {
    prop::collection::vec(prop::collection::vec(0..PIECES as u32, 0..5), 0..40)
}

proptest! {
    #![proptest_config(draws(256))]
    #[test]
    fn nodes_are_the_prefixes_and_hold_exactly_their_tokens(sequences in sequences()) {
        let trie = PieceTrie::new(sequences.iter().collect(), PIECES).unwrap();
        let twin = prefixes(&sequences);
        prop_assert_eq!(trie.len(), twin.len() + 1);
        for (prefix, tokens) in &twin {
            let node = trie.find(prefix).unwrap();
            let below: BTreeSet<u32> = trie.below(node).iter().copied().collect();
            prop_assert_eq!(&below, tokens);
            let (ends, longer) = trie.below(node).split_at(trie.end_count(node));
            prop_assert!(ends.iter().all(|&token| &sequences[token as usize] == prefix));
            prop_assert!(longer.iter().all(|&token| sequences[token as usize].len() > prefix.len()));
        }
    }

    #[test]
    fn slots_partition_the_tokens_below(sequences in sequences()) {
        let trie = PieceTrie::new(sequences.iter().collect(), PIECES).unwrap();
        let slots = trie.slots();
        for node in 0..trie.len() {
            let range = slots.ptr[node] as usize..slots.ptr[node + 1] as usize;
            let total: i64 = slots.sizes[range.clone()].iter().sum();
            prop_assert_eq!(total as usize, trie.below(node as u32).len());
            prop_assert_eq!(range.len(), trie.slot_count(node as u32));
            prop_assert!(slots.sizes[range.clone()].iter().all(|&size| size > 0));
            prop_assert!(slots.pieces[range].is_sorted_by(|a, b| a < b));
        }
    }

    #[test]
    fn lookup_is_one_chunk_after_the_other_for_any_thread_count(
        sequences in sequences(),
        chunks in prop::collection::vec(prop::collection::vec(0..PIECES as i64, 0..6), 0..30),
        max_depth in 0usize..6,
    ) {
        let trie = PieceTrie::new(sequences.iter().collect(), PIECES).unwrap();
        let ids = chunks.concat();
        let ends: Vec<i64> = chunks.iter().scan(0, |end, chunk| {
            *end += chunk.len() as i64;
            Some(*end)
        }).collect();
        let starts: Vec<i64> = [0].into_iter().chain(ends.iter().copied()).take(ends.len()).collect();
        let found = trie.lookup(&ids, &starts, &ends, max_depth, "teacher", &Threads::one()).unwrap();
        let mut at = 0;
        for (index, chunk) in (0..).zip(&chunks) {
            let chunk: Vec<u32> = chunk.iter().map(|&id| id as u32).collect();
            for depth in 1..=chunk.len().min(max_depth) {
                let Some(node) = trie.find(&chunk[..depth]) else { break };
                if trie.slot_count(node) >= 2 {
                    let (c, d, n) = (found.chunk[at], found.depth[at], found.node[at]);
                    prop_assert_eq!((c, d, n), (index, depth as i64, i64::from(node)));
                    at += 1;
                }
            }
        }
        prop_assert_eq!(at, found.node.len());
        prop_assert_eq!(&trie.lookup(&ids, &starts, &ends, max_depth, "teacher", &Threads::new(3).unwrap()).unwrap(), &found);
    }
}
