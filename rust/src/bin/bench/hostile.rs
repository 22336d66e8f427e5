//! Differences that are not a word here and there, at two sizes: time has to grow with the length.

use serde_json::json;
use xtoken::align::Scratch;
use xtoken::{Aligner, AlignmentBatch};

use super::input::{Result, Side};
use super::output::emit;
use super::timing::{compare, keep};

const ROUNDS: usize = 5;

/// About 300 tokens that only one side has.
fn header() -> String {
    "<|system|> Knowledge cutoff 2023, today 26 July; be brief. ".repeat(20)
}

/// A case, and what its student and its teacher see of a text.
type Case = (&'static str, fn(&str) -> (String, String));

const CASES: [Case; 4] = [
    ("cut tail", |text| {
        let half = text.floor_char_boundary(text.len() / 2);
        (text.to_owned(), text[..half].to_owned())
    }),
    ("header", |text| (text.to_owned(), header() + text)),
    ("unrelated", |text| {
        (text.to_owned(), text.chars().rev().collect())
    }),
    ("one character", |text| {
        ("a".repeat(text.len()), "b".repeat(text.len()))
    }),
];

/// Each case on half of the text, then on that half twice over: the same kind of text at two
/// lengths.
pub fn run(
    aligner: &Aligner,
    pair: &str,
    (student, teacher): (&Side, &Side),
    text: &str,
) -> Result<()> {
    let half = &text[..text.floor_char_boundary(text.len() / 2)];
    for (case, sides) in CASES {
        for times in [1, 2] {
            let (left, right) = sides(&half.repeat(times));
            let (s, t) = (student.encode(&left)?, teacher.encode(&right)?);
            // Memory that is there already: fresh pages would cost more than the walk.
            let (mut batch, mut scratch) = (AlignmentBatch::default(), Scratch::default());
            let mut align = || {
                batch.clear();
                keep(aligner.align_into(&s, &t, &mut batch, &mut scratch).is_ok());
            };
            let seconds = compare(ROUNDS, &mut [&mut align])[0].least;
            emit(&json!({
                "bench": "hostile", "pair": pair, "case": case,
                "student_bytes": left.len(), "teacher_bytes": right.len(),
                "tokens": s.len() + t.len(), "seconds": seconds,
                "exact_bytes": batch.counts[0].exact_bytes, "chunks": batch.kinds.len(),
                "coarse_chunks": batch.counts[0].coarse_chunks,
            }))?;
        }
    }
    Ok(())
}
