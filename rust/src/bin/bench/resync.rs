//! `xtoken-bench resync`.

use serde_json::json;
use xtoken::align::Scratch;
use xtoken::{AlignOptions, Aligner, AlignmentBatch, Counts, reference};

use super::hostile;
use super::input::{self, Result, Side, pieces, read_text};
use super::output::emit;
use super::timing::{compare, keep};

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    input: input::Arguments,
    /// Shares of the words that are changed on the teacher's side.
    #[arg(long, value_delimiter = ',', default_values_t = [0.001, 0.01, 0.1])]
    rates: Vec<f64>,
    /// Sequences that are compared with the exact optimum.
    #[arg(long, default_value_t = 40)]
    checked: usize,
}

type Ids = Vec<Vec<i64>>;

pub fn run(arguments: &Arguments) -> Result<()> {
    let (student, teacher) = (
        Side::read(&arguments.input.student)?,
        Side::read(&arguments.input.teacher)?,
    );
    let text = read_text(arguments.input.text()?)?;
    let texts = pieces(&text, arguments.input.sequence_bytes);
    let options = AlignOptions::default();
    let aligner = Aligner::new(student.vocab.clone(), teacher.vocab.clone(), options)?;
    let pair = format!("{}/{}", student.name, teacher.name);
    let encode = |side: &Side, texts: &[String]| -> Result<Ids> {
        texts.iter().map(|text| side.encode(text)).collect()
    };
    let clean: Vec<String> = texts.iter().map(|&text| text.to_owned()).collect();
    let student_ids = encode(&student, &clean)?;
    let clean_ids = encode(&teacher, &clean)?;
    for &rate in &arguments.rates {
        let mut random = Random(0x5eed);
        let changed: Vec<String> = texts
            .iter()
            .map(|text| change_words(text, rate, &mut random))
            .collect();
        let changed_ids = encode(&teacher, &changed)?;
        let mut batches = [AlignmentBatch::default(), AlignmentBatch::default()];
        let [clean_batch, changed_batch] = &mut batches;
        let mut clean = || align_all(&aligner, &student_ids, &clean_ids, clean_batch);
        let mut differing = || align_all(&aligner, &student_ids, &changed_ids, changed_batch);
        let seconds = compare(arguments.input.rounds, &mut [&mut clean, &mut differing]);
        let tokens: usize = changed_ids.iter().chain(&student_ids).map(Vec::len).sum();
        let sum = |of: fn(&Counts) -> i64| batches[1].counts.iter().map(of).sum::<i64>();
        let (mut exact, mut optimum, mut bytes) = (0, 0, 0);
        for at in 0..arguments.checked.min(texts.len()) {
            exact += batches[1].counts[at].exact_bytes;
            let most = reference::most_exact_bytes_of_ids(
                (&student.vocab, &student_ids[at]),
                (&teacher.vocab, &changed_ids[at]),
            );
            optimum += most as i64;
            bytes += batches[1].counts[at].student_bytes;
        }
        emit(&json!({
            "bench": "resync", "pair": pair, "rate": rate,
            "times_clean": seconds[1].least / seconds[0].least,
            "ns_per_token": seconds[1].least * 1e9 / tokens as f64,
            "exact_share": sum(|of| of.exact_bytes) as f64 / sum(|of| of.student_bytes) as f64,
            "coarse_chunks": sum(|of| of.coarse_chunks),
            "checked_exact_share": exact as f64 / bytes as f64,
            "checked_optimum_share": optimum as f64 / bytes as f64,
            "points_below_optimum": 100.0 * (optimum - exact) as f64 / bytes as f64,
        }))?;
    }
    hostile::run(&aligner, &pair, (&student, &teacher), &text)
}

fn align_all(aligner: &Aligner, student: &Ids, teacher: &Ids, batch: &mut AlignmentBatch) {
    let mut scratch = Scratch::default();
    batch.clear();
    for (s, t) in student.iter().zip(teacher) {
        keep(aligner.align_into(s, t, batch, &mut scratch).is_ok());
    }
}

/// A small generator of random numbers (splitmix64): the changes are the same in each run.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut mixed = self.0;
        mixed = (mixed ^ mixed >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    }

    fn chance(&mut self, share: f64) -> bool {
        ((self.next() >> 11) as f64) < share * (1u64 << 53) as f64
    }
}

/// Replaces, drops, doubles, capitalizes or joins a share of the words: runs without white space,
/// each with the white space after it.
fn change_words(text: &str, rate: f64, random: &mut Random) -> String {
    let words = words(text);
    let mut changed = String::with_capacity(text.len());
    for &word in &words {
        if !random.chance(rate) {
            changed.push_str(word);
            continue;
        }
        let bare = word.trim_end();
        let space = &word[bare.len()..];
        match random.next() % 5 {
            0 => {
                changed.push_str(words[random.next() as usize % words.len()].trim_end());
                changed.push_str(space);
            }
            1 => {}
            2 => {
                changed.push_str(word);
                changed.push_str(word);
            }
            3 => changed.push_str(&word.to_uppercase()),
            _ => changed.push_str(bare),
        }
    }
    changed
}

fn words(text: &str) -> Vec<&str> {
    let mut cuts = vec![0];
    let mut before_is_space = false;
    for (at, c) in text.char_indices() {
        if before_is_space && !c.is_whitespace() {
            cuts.push(at);
        }
        before_is_space = c.is_whitespace();
    }
    cuts.push(text.len());
    cuts.windows(2).map(|cut| &text[cut[0]..cut[1]]).collect()
}
