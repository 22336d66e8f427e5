//! `xtoken-bench align`.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Instant;

use cpu_time::ProcessTime;
use serde_json::json;
use xtoken::align::Scratch;
use xtoken::align::{Ragged, align_batch};
use xtoken::{AlignOptions, Aligner, AlignmentBatch, Threads, reference};

use super::input::{self, Result, Side, pieces, read_ids, read_text};
use super::output::emit;
use super::timing::{compare, keep};

#[derive(clap::Args)]
pub struct Arguments {
    #[command(flatten)]
    input: input::Arguments,
    /// The student's ids in place of the text: one sequence a line, ids separated by spaces.
    #[arg(long, requires = "teacher_ids", conflicts_with = "text")]
    student_ids: Option<PathBuf>,
    /// The teacher's ids, as many lines.
    #[arg(long, requires = "student_ids")]
    teacher_ids: Option<PathBuf>,
    /// Threads of the batch that is timed by the clock.
    #[arg(long, default_value_t = 2)]
    threads: usize,
    /// Tokens of that batch, both sides together; the sequences are repeated until they are so
    /// many.
    #[arg(long, default_value_t = 8_000_000)]
    thread_tokens: usize,
}

/// All sequences of one side in one array.
struct Flat {
    ids: Vec<i64>,
    ranges: Vec<Range<usize>>,
    lens: Vec<u32>,
}

impl Flat {
    fn new(side: &Side, sequences: Vec<Vec<i64>>) -> Result<Self> {
        let (mut ids, mut ranges) = (Vec::new(), Vec::new());
        for sequence in sequences {
            let start = ids.len();
            ids.extend(sequence);
            ranges.push(start..ids.len());
        }
        if let Some(id) = ids
            .iter()
            .find(|&&id| id < 0 || id as usize >= side.vocab.len())
        {
            return Err(format!("id {id} is outside the vocabulary of {}", side.name).into());
        }
        let lens = side
            .vocab
            .starts()
            .windows(2)
            .map(|ends| ends[1] - ends[0])
            .collect();
        Ok(Self { ids, ranges, lens })
    }

    /// The same sequences several times, each time in memory of their own.
    fn repeated(&self, times: usize) -> Self {
        let len = self.ids.len();
        let ranges = (0..times).flat_map(|at| {
            let moved = move |range: &Range<usize>| at * len + range.start..at * len + range.end;
            self.ranges.iter().map(moved)
        });
        Self {
            ids: self.ids.repeat(times),
            ranges: ranges.collect(),
            lens: Vec::new(),
        }
    }

    fn ragged(&self) -> Ragged<'_, i64> {
        Ragged {
            ids: &self.ids,
            ranges: &self.ranges,
        }
    }

    fn sequence(&self, at: usize) -> &[i64] {
        &self.ids[self.ranges[at].clone()]
    }

    /// The floor of any alignment: read each id and the length of its token.
    fn byte_len(&self, at: usize) -> u64 {
        self.sequence(at)
            .iter()
            .map(|&id| u64::from(self.lens[id as usize]))
            .sum()
    }
}

pub fn run(arguments: &Arguments) -> Result<()> {
    let sides = (
        Side::read(&arguments.input.student)?,
        Side::read(&arguments.input.teacher)?,
    );
    let (student, teacher) = match (&arguments.student_ids, &arguments.teacher_ids) {
        (Some(student), Some(teacher)) => (read_ids(student)?, read_ids(teacher)?),
        _ => {
            let text = read_text(arguments.input.text()?)?;
            let texts = pieces(&text, arguments.input.sequence_bytes);
            let encode = |side: &Side| -> Result<Vec<Vec<i64>>> {
                texts.iter().map(|text| side.encode(text)).collect()
            };
            (encode(&sides.0)?, encode(&sides.1)?)
        }
    };
    if student.len() != teacher.len() {
        return Err("as many sequences of the teacher as of the student are needed".into());
    }
    let (student, teacher) = (Flat::new(&sides.0, student)?, Flat::new(&sides.1, teacher)?);
    let options = AlignOptions::default();
    let aligner = Aligner::new(sides.0.vocab.clone(), sides.1.vocab.clone(), options)?;
    let pair = format!("{}/{}", sides.0.name, sides.1.name);
    timed(&aligner, &pair, arguments, (&student, &teacher))?;
    threaded(&aligner, &pair, arguments, (&student, &teacher))?;
    checked(&aligner, &pair, &sides, (&student, &teacher))
}

fn timed(
    aligner: &Aligner,
    pair: &str,
    arguments: &Arguments,
    (student, teacher): (&Flat, &Flat),
) -> Result<()> {
    let tokens = student.ids.len() + teacher.ids.len();
    let rows = 0..student.ranges.len();
    let (mut reused, mut scratch) = (AlignmentBatch::default(), Scratch::default());
    let mut align = || {
        reused.clear();
        for at in rows.clone() {
            let sequences = (student.sequence(at), teacher.sequence(at));
            keep(
                aligner
                    .align_into(sequences.0, sequences.1, &mut reused, &mut scratch)
                    .is_ok(),
            );
        }
    };
    let mut fresh = || {
        keep(align_batch(
            aligner,
            student.ragged(),
            teacher.ragged(),
            &Threads::one(),
        ))
    };
    let mut floor = || {
        for at in rows.clone() {
            keep((student.byte_len(at), teacher.byte_len(at)));
        }
    };
    let seconds = compare(
        arguments.input.rounds,
        &mut [&mut align, &mut fresh, &mut floor],
    );
    let batch = align_batch(aligner, student.ragged(), teacher.ragged(), &Threads::one())?;
    let sum = |of: fn(&xtoken::Counts) -> i64| batch.counts.iter().map(of).sum::<i64>();
    let nanoseconds = |at: usize| seconds[at].least * 1e9 / tokens as f64;
    emit(&json!({
        "bench": "align", "pair": pair, "sequences": rows.end,
        "student_tokens": student.ids.len(), "teacher_tokens": teacher.ids.len(),
        "chunks": batch.kinds.len(),
        "exact_share": sum(|of| of.exact_bytes) as f64 / sum(|of| of.student_bytes).max(1) as f64,
        "ns_per_token": nanoseconds(0), "ns_per_token_median": seconds[0].median * 1e9 / tokens as f64,
        "ns_per_token_fresh_memory": nanoseconds(1), "floor_ns_per_token": nanoseconds(2),
        "times_floor": seconds[0].least / seconds[2].least,
        "times_floor_fresh_memory": seconds[1].least / seconds[2].least,
        "tokens_per_second": tokens as f64 / seconds[0].least,
    }))?;
    Ok(())
}

/// One thread against several, by the clock: CPU time would not see the gain. Both write to fresh
/// memory of the same size; handing it back is the caller's and not timed.
fn threaded(
    aligner: &Aligner,
    pair: &str,
    arguments: &Arguments,
    (student, teacher): (&Flat, &Flat),
) -> Result<()> {
    let once = (student.ids.len() + teacher.ids.len()).max(1);
    let times = arguments.thread_tokens.div_ceil(once).max(1);
    let (student, teacher) = (student.repeated(times), teacher.repeated(times));
    let timed = |threads: usize| -> Result<([f64; 2], AlignmentBatch)> {
        let (start, cpu) = (Instant::now(), ProcessTime::now());
        let batch = align_batch(
            aligner,
            student.ragged(),
            teacher.ragged(),
            &Threads::new(threads)?,
        )?;
        let taken = [start.elapsed(), cpu.elapsed()];
        Ok((taken.map(|taken| taken.as_secs_f64()), batch))
    };
    let (mut one, mut many, mut same) = ([f64::INFINITY; 2], [f64::INFINITY; 2], true);
    for _ in 0..arguments.input.rounds {
        let (taken, expected) = timed(1)?;
        one = [one[0].min(taken[0]), one[1].min(taken[1])];
        let (taken, batch) = timed(arguments.threads)?;
        many = [many[0].min(taken[0]), many[1].min(taken[1])];
        same &= batch == expected;
    }
    emit(&json!({
        "bench": "threads", "pair": pair, "threads": arguments.threads, "speedup": one[0] / many[0],
        "tokens": student.ids.len() + teacher.ids.len(), "sequences": student.ranges.len(),
        "seconds_one": one[0], "seconds_many": many[0],
        "cpu_seconds_one": one[1], "cpu_seconds_many": many[1], "same_answer": same,
    }))?;
    Ok(())
}

/// A slice against the quadratic reference.
fn checked(
    aligner: &Aligner,
    pair: &str,
    sides: &(Side, Side),
    (student, teacher): (&Flat, &Flat),
) -> Result<()> {
    if student.ranges.is_empty() {
        return Ok(());
    }
    let (s, t) = (student.sequence(0), teacher.sequence(0));
    let (student_tokens, teacher_tokens) = (sides.0.text(s), sides.1.text(t));
    let mut chunks = Vec::new();
    let mut slow = || chunks = reference::finest_chunks(&student_tokens, &teacher_tokens);
    let seconds = compare(1, &mut [&mut slow]);
    let batch = aligner.align(s, t)?;
    let bounds = |at: usize| {
        (
            batch.student_bounds[at] as usize,
            batch.teacher_bounds[at] as usize,
        )
    };
    let aligned: Vec<_> = (0..batch.kinds.len())
        .map(|at| {
            (
                bounds(at).0,
                bounds(at + 1).0,
                bounds(at).1,
                bounds(at + 1).1,
            )
        })
        .collect();
    emit(&json!({
        "bench": "reference", "pair": pair, "tokens": s.len() + t.len(), "equal": aligned == chunks,
        "ns_per_token": seconds[0].least * 1e9 / (s.len() + t.len()) as f64,
    }))?;
    Ok(())
}
