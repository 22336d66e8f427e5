//! The piece trie by criterion: building and lookup over vocabularies of several sizes, and the
//! worst case of tokens that share long prefixes. `benches/trie.py` times real pairs.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use xtoken::Threads;
use xtoken::projection::Pieces;
use xtoken::trie::PieceTrie;

const CHUNKS: usize = 100_000;

/// A fixed sequence of numbers below `bound` (Knuth's MMIX generator).
fn numbers(bound: u64) -> impl FnMut() -> u64 {
    let mut state: u64 = 1;
    move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % bound
    }
}

/// As real pairs have it: most tokens are one piece, some several, a few of those start alike.
fn ordinary(tokens: usize) -> (Pieces, usize) {
    let mut next = numbers(1 << 30);
    let mut pieces = Pieces {
        indptr: vec![0],
        ids: Vec::new(),
    };
    for token in 0..tokens as u32 {
        if next().is_multiple_of(8) {
            for _ in 0..2 + next() % 3 {
                pieces.ids.push((next() % 1000) as u32);
            }
        } else {
            pieces.ids.push(token);
        }
        pieces.indptr.push(pieces.ids.len() as i64);
    }
    (pieces, tokens)
}

/// Token `i` is a run of `i % 64` zeros and a number: every node has the deepest tokens below it.
fn nested(tokens: usize) -> (Pieces, usize) {
    let mut pieces = Pieces {
        indptr: vec![0],
        ids: Vec::new(),
    };
    for token in 0..tokens as u32 {
        pieces.ids.resize(pieces.ids.len() + token as usize % 64, 0);
        pieces.ids.push(token / 64 + 1);
        pieces.indptr.push(pieces.ids.len() as i64);
    }
    (pieces, tokens)
}

fn trie_of(pieces: &Pieces, count: usize) -> PieceTrie {
    PieceTrie::new(pieces.clone(), count).unwrap_or_else(|error| {
        eprintln!("error: {error}");
        std::process::exit(1)
    })
}

fn benches(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("trie");
    group.sample_size(20);
    let cases = [
        ("ordinary", ordinary(10_000)),
        ("ordinary", ordinary(100_000)),
        ("nested", nested(10_000)),
    ];
    for (name, (pieces, count)) in &cases {
        group.throughput(Throughput::Elements(*count as u64));
        let build = BenchmarkId::new(format!("build {name}"), count);
        group.bench_with_input(build, pieces, |b, pieces| {
            b.iter(|| trie_of(black_box(pieces), *count));
        });
        let trie = trie_of(pieces, *count);
        // Chunks that spell tokens drawn at random.
        let mut next = numbers(*count as u64);
        let (mut ids, mut starts, mut ends) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..CHUNKS {
            starts.push(ids.len() as i64);
            ids.extend(pieces.of(next() as u32).iter().map(|&id| i64::from(id)));
            ends.push(ids.len() as i64);
        }
        group.throughput(Throughput::Elements(CHUNKS as u64));
        let lookup = BenchmarkId::new(format!("lookup {name}"), count);
        group.bench_with_input(lookup, &ids, |b, ids| {
            b.iter(|| {
                trie.lookup(
                    black_box(ids),
                    &starts,
                    &ends,
                    64,
                    "teacher",
                    &Threads::one(),
                )
            });
        });
    }
    group.finish();
}

criterion_group!(all, benches);
criterion_main!(all);
