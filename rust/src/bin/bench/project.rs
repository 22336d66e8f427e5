//! `xtoken-bench project`.

use std::path::{Path, PathBuf};

use serde_json::json;
use xtoken::projection::{Options, Pieces, Reverse, Rule, build};
use xtoken::segment::Scores;
use xtoken::{Threads, Tokenizer};

use super::input::Result;
use super::timing::{compare, keep};

#[derive(clap::Args)]
pub struct Arguments {
    /// The student's tokenizer.json.
    #[arg(long)]
    student: PathBuf,
    /// The teacher's tokenizer.json.
    #[arg(long)]
    teacher: PathBuf,
    /// Measurements of each candidate.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
}

/// W on one thread with tokenizers already read, and its parts.
pub fn run(arguments: &Arguments) -> Result<()> {
    let (student, teacher) = (read(&arguments.student)?, read(&arguments.teacher)?);
    let options = Options {
        ..Options::default()
    };
    let with_reverse = Options {
        reverse: Reverse::Unmatched,
        ..options.clone()
    };
    let w = build(&student, &teacher, &options, &Threads::one())?;
    let seconds = compare(
        arguments.rounds,
        &mut [
            &mut || keep(build(&student, &teacher, &options, &Threads::one())),
            &mut || keep(build(&student, &teacher, &with_reverse, &Threads::one())),
            &mut || {
                keep(Pieces::spell(
                    &student,
                    &teacher,
                    "teacher",
                    &Threads::one(),
                ))
            },
            &mut || keep(every_token_by_the_model(&student, &teacher)),
        ],
    );
    let names = [
        "build",
        "build with reverse",
        "pieces",
        "model on every token",
    ];
    let count = |rule| w.rules.iter().filter(|&&other| other == rule).count();
    for (what, seconds) in names.into_iter().zip(seconds) {
        let line = json!({
            "bench": "project",
            "what": what,
            "student": name(&arguments.student),
            "teacher": name(&arguments.teacher),
            "student_size": student.vocab.len(),
            "teacher_size": teacher.vocab.len(),
            "exact_rows": count(Rule::Exact),
            "split_rows": count(Rule::Forward),
            "threads": 1,
            "cpu_seconds_least": seconds.least,
            "cpu_seconds_median": seconds.median,
        });
        println!("{line}");
    }
    Ok(())
}

/// The price of segmentation alone: no row is spared by an exact partner.
fn every_token_by_the_model(student: &Tokenizer, teacher: &Tokenizer) -> usize {
    let Some(model) = &teacher.model else {
        return 0;
    };
    let mut pieces = Vec::new();
    let mut total = 0;
    for token in 0..student.vocab.len() as u32 {
        model.segment(
            &teacher.vocab,
            student.vocab.token_bytes(token),
            &mut pieces,
        );
        total += pieces.len();
    }
    total
}

fn read(path: &Path) -> Result<Tokenizer> {
    let json = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    Ok(Tokenizer::from_json(&json, Scores::FromFile)?)
}

fn name(path: &Path) -> String {
    let folder = path.parent().and_then(Path::file_name);
    folder
        .unwrap_or(path.as_os_str())
        .to_string_lossy()
        .into_owned()
}
