//! W and segmentation by criterion, on byte pair encodings trained here on this crate's sources.
//!
//! `xtoken-bench project` times real pairs of tokenizers from files.

use std::collections::HashMap;
use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use xtoken::projection::{Options, Pieces, build};
use xtoken::{Threads, Token, Tokenizer};

const TEXT: &str = concat!(
    include_str!("../src/vocab/mod.rs"),
    include_str!("../src/vocab/tokenizer_json.rs"),
    include_str!("../src/align/mod.rs"),
    include_str!("../src/segment/bpe.rs"),
);

/// A byte pair encoding with so many merges; only bytes of one class are merged.
fn train(merges: usize, class: impl Fn(u8) -> u32) -> Tokenizer {
    let mut words: HashMap<Vec<u32>, usize> = HashMap::new();
    for word in TEXT.as_bytes().chunk_by(|&a, &b| class(a) == class(b)) {
        *words
            .entry(word.iter().map(|&byte| u32::from(byte)).collect())
            .or_default() += 1;
    }
    let mut words: Vec<(Vec<u32>, usize)> = words.into_iter().collect();
    words.sort();
    let mut tokens: Vec<Vec<u8>> = (0..=u8::MAX).map(|byte| vec![byte]).collect();
    for _ in 0..merges {
        let mut counts: HashMap<(u32, u32), usize> = HashMap::new();
        for (word, count) in &words {
            for pair in word.windows(2) {
                *counts.entry((pair[0], pair[1])).or_default() += count;
            }
        }
        let best = counts
            .iter()
            .max_by_key(|&(&pair, &count)| (count, std::cmp::Reverse(pair)));
        let Some((&(left, right), _)) = best else {
            break;
        };
        let merged = tokens.len() as u32;
        tokens.push([&*tokens[left as usize], &*tokens[right as usize]].concat());
        for (word, _) in &mut words {
            let mut at = 0;
            while at + 1 < word.len() {
                if (word[at], word[at + 1]) == (left, right) {
                    word[at] = merged;
                    word.remove(at + 1);
                }
                at += 1;
            }
        }
    }
    let mut seen = std::collections::HashSet::new();
    tokens.retain(|token| seen.insert(token.clone()));
    Tokenizer::from_tokens(tokens.into_iter().map(Token::Text), true).unwrap_or_else(|error| {
        eprintln!("error: {error}");
        std::process::exit(1)
    })
}

fn benches(criterion: &mut Criterion) {
    let teacher = train(250, |byte| u32::from(byte.is_ascii_alphabetic()));
    let options = Options {
        ..Options::default()
    };
    let mut group = criterion.benchmark_group("project");
    group.sample_size(20);
    for merges in [250, 500, 1000] {
        let student = train(merges, |byte| {
            u32::from(byte.is_ascii_alphanumeric() || byte == b' ')
        });
        group.throughput(Throughput::Elements(student.vocab.len() as u64));
        group.bench_with_input(
            BenchmarkId::new("build", student.vocab.len()),
            &student,
            |b, s| {
                b.iter(|| black_box(build(s, &teacher, &options, &Threads::one())));
            },
        );
        group.bench_with_input(
            BenchmarkId::new("pieces", student.vocab.len()),
            &student,
            |b, s| {
                b.iter(|| black_box(Pieces::spell(s, &teacher, "teacher", &Threads::one())));
            },
        );
    }
    group.finish();

    let mut group = criterion.benchmark_group("segment");
    let long_run = vec![b' '; 20_000];
    for (name, bytes) in [
        ("a word", b"deterministically".as_slice()),
        ("a page as one word", &TEXT.as_bytes()[..8192]),
        // The worst case: every pair merges, again and again.
        ("a run of one byte", &long_run),
    ] {
        group.throughput(Throughput::Bytes(bytes.len() as u64));
        group.bench_with_input(BenchmarkId::new("bpe", name), bytes, |b, bytes| {
            b.iter(|| black_box(teacher.segment(bytes)));
        });
    }
    group.finish();
}

criterion_group!(project, benches);
criterion_main!(project);
