//! The alignment by criterion, on vocabularies made of this crate's sources: texts that agree,
//! texts that differ in some words, and the worst texts.
//!
//! `xtoken-bench align` and `resync` time real pairs of tokenizers from files.

use std::hint::black_box;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use xtoken::align::Scratch;
use xtoken::{
    AlignOptions, Aligner, AlignmentBatch, DummyPrefix, Error, Spelling, Vocab, VocabBuilder,
    reference,
};

const TEXT: &str = concat!(
    include_str!("../src/vocab/mod.rs"),
    include_str!("../src/vocab/tokenizer_json.rs"),
    include_str!("../src/align/mod.rs"),
    include_str!("../src/align/resync/mod.rs"),
);

/// All bytes, the words of the text with the space before them, and their parts on both sides of
/// `cut` for words that are longer than `whole`.
fn vocab(cut: usize, whole: usize) -> Result<Arc<Vocab>, Error> {
    let mut builder = VocabBuilder::new(Spelling::Bytes, DummyPrefix::Never);
    for byte in 0..=u8::MAX {
        builder.push_text(&[byte])?;
    }
    let mut words: Vec<&[u8]> = TEXT.as_bytes().chunk_by(|_, &next| next != b' ').collect();
    words.sort_unstable();
    words.dedup();
    for word in words {
        let (head, tail) = word.split_at(word.len().min(cut));
        if word.len() <= whole {
            builder.push_text(word)?;
        } else {
            builder.push_text(head)?;
            builder.push_text(tail)?;
        }
    }
    Ok(Arc::new(builder.build()))
}

/// Greedy: the longest token that fits.
fn encode(vocab: &Vocab, text: &[u8]) -> Vec<u32> {
    let (mut ids, mut rest) = (Vec::new(), text);
    while !rest.is_empty() {
        let fitting = (1..=rest.len().min(24))
            .rev()
            .find_map(|len| vocab.id_of(&rest[..len]));
        let id = fitting.unwrap_or_default();
        ids.push(id);
        rest = &rest[vocab.token_bytes(id).len()..];
    }
    ids
}

/// Every word of so many is written in capitals.
fn change_one_word_in(every: usize, text: &str) -> String {
    let change = |(at, word): (usize, &str)| match at % every {
        0 => word.to_ascii_uppercase(),
        _ => word.to_owned(),
    };
    text.split_inclusive(' ').enumerate().map(change).collect()
}

fn bench(criterion: &mut Criterion) {
    let (Ok(student), Ok(teacher)) = (vocab(4, 8), vocab(3, 24)) else {
        return;
    };
    let options = AlignOptions::default();
    let Ok(aligner) = Aligner::new(student.clone(), teacher.clone(), options) else {
        return;
    };
    let mut group = criterion.benchmark_group("align");
    let mut time = |name: &str, left: &str, right: &str| {
        let (s, t) = (
            encode(&student, left.as_bytes()),
            encode(&teacher, right.as_bytes()),
        );
        let (mut batch, mut scratch) = (AlignmentBatch::default(), Scratch::default());
        group.throughput(Throughput::Bytes(left.len() as u64));
        group.bench_function(BenchmarkId::new(name, left.len()), |bencher| {
            bencher.iter(|| {
                batch.clear();
                let done =
                    aligner.align_into(black_box(&s), black_box(&t), &mut batch, &mut scratch);
                black_box(done.is_ok())
            });
        });
    };
    for size in [1_000, 8_000, 32_000] {
        let text = &TEXT[..TEXT.floor_char_boundary(size)];
        let token = |vocab: &Vocab, ids: &[u32]| -> Vec<Vec<u8>> {
            ids.iter()
                .map(|&id| vocab.token_bytes(id).to_vec())
                .collect()
        };
        if size == 1_000 {
            // What is timed is what is right.
            let s = token(&student, &encode(&student, text.as_bytes()));
            let t = token(&teacher, &encode(&teacher, text.as_bytes()));
            let slices = |tokens: &'_ [Vec<u8>]| tokens.iter().map(Vec::len).sum::<usize>();
            assert_eq!(slices(&s), slices(&t));
            let (s, t): (Vec<&[u8]>, Vec<&[u8]>) = (
                s.iter().map(Vec::as_slice).collect(),
                t.iter().map(Vec::as_slice).collect(),
            );
            let chunks = reference::finest_chunks(&s, &t).len();
            let ids = (
                encode(&student, text.as_bytes()),
                encode(&teacher, text.as_bytes()),
            );
            assert_eq!(
                aligner
                    .align(&ids.0, &ids.1)
                    .map_or(0, |batch| batch.kinds.len()),
                chunks
            );
        }
        time("equal", text, text);
        time("a word in 100", text, &change_one_word_in(100, text));
        time("a word in 10", text, &change_one_word_in(10, text));
        let reversed: String = text.chars().rev().collect();
        time("unrelated", text, &reversed);
        time(
            "one letter",
            &"a".repeat(text.len()),
            &"b".repeat(text.len()),
        );
    }
    group.finish();
}

criterion_group!(benches, bench);
criterion_main!(benches);
