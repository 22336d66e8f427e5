//! Exact targets: what the teacher's predictions say about the student's next token.
//!
//! At a student position the teacher's rows along the text are a set of disjoint events, each a
//! piece of text with a mass: a token of the row at the boundary; a token of a later row behind the
//! text's own tokens (depths); a token of an earlier row that runs past the boundary (carry). Each
//! goes to the group of the student token that it starts with, if the student still has its
//! boundary there (consistency). A group is a set of student tokens that no event tells apart: a
//! cell off the text's path, a sibling or an end along it. The result depends on the teacher and
//! the two tokenizers alone, so it is made once an example.
//!
//! `tests/reference_targets.py` is the definition, slow and plain.

mod below;
mod carry;
mod columns;
mod doubt;
mod emit;
mod exp;
mod groups;
mod inside;
mod mask;
mod masses;
mod members;
mod pair;
mod places;
mod position;
mod rows;
mod side;

use std::sync::{Arc, Mutex, PoisonError};

pub use groups::{Account, Targets};
pub use rows::Predictions;

use crate::align::ChunkKind;
use crate::error::{Error, Result};
use crate::parallel::{self, Threads};
use crate::projection::Pieces;
use crate::tokenizer::Tokenizer;
use pair::PairTables;
use position::Scratch;

/// "No token", "no node", "no group".
pub(crate) const NONE: u32 = u32::MAX;

/// What [`TargetBuilder::new`] is made from.
pub struct PairInput {
    /// The student's tokenizer; it must be able to segment.
    pub student: Arc<Tokenizer>,
    /// The teacher's tokenizer; it must be able to segment.
    pub teacher: Arc<Tokenizer>,
    /// The teacher's pieces of each student token.
    pub pieces: Pieces,
    /// The student's pieces of each teacher token.
    pub teacher_pieces: Pieces,
    /// Control tokens that correspond, as (student id, teacher id), those that stop left out.
    pub specials: Vec<(u32, u32)>,
    /// All that can stop the student; one group.
    pub student_stops: Vec<u32>,
    /// All that can stop the teacher.
    pub teacher_stops: Vec<u32>,
}

/// Which corrections a target has; all off is the target of P-KL with decay 0.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TargetOptions {
    /// Mass on columns that no student token begins with goes to their cell.
    pub cells: bool,
    /// Events after which the student would not have its boundary are left out.
    pub consistent: bool,
    /// Earlier rows whose tokens may run past the boundary; 0 for none.
    pub levels: usize,
    /// Most of the text's own teacher tokens that groups are told apart along; 0 for none.
    pub max_depth: usize,
    /// Events of a row below this probability are its tail.
    pub min_prob: f64,
    /// Groups are left out where a longer student token than the first of an event would move mass
    /// into, out of or between them.
    pub sure: bool,
    /// Whether [`Targets::accounts`] is filled in.
    pub accounts: bool,
}

impl Default for TargetOptions {
    fn default() -> Self {
        Self {
            cells: true,
            consistent: true,
            levels: 1,
            max_depth: 8,
            min_prob: 2e-4,
            sure: false,
            accounts: false,
        }
    }
}

/// One text as both sides' ids, aligned, with the teacher's predictions.
#[derive(Debug, Clone, Copy)]
pub struct TargetExample<'a> {
    /// The student's ids.
    pub student_ids: &'a [i64],
    /// The teacher's ids.
    pub teacher_ids: &'a [i64],
    /// Chunk `c` is the student's tokens from `student_bounds[c]` to the next bound.
    pub student_bounds: &'a [i64],
    /// The same on the teacher's side.
    pub teacher_bounds: &'a [i64],
    /// The kind of each chunk, as [`ChunkKind`] numbers them.
    pub kinds: &'a [u8],
    /// What the teacher says after each of its tokens.
    pub predictions: Predictions<'a>,
}

/// Builds targets for one pair of tokenizers.
pub struct TargetBuilder {
    tables: PairTables,
    /// What threads keep between calls: buffers and the answers about pairs of tokens.
    idle: Mutex<Vec<Scratch>>,
}

impl TargetBuilder {
    /// Tables of a pair; some tenths of a second for vocabularies of 100,000 tokens.
    ///
    /// # Errors
    /// [`Error::NoModel`] or [`Error::Unsupported`] where a side cannot segment,
    /// [`Error::NoSuchId`] and [`Error::Shape`] where pieces or special tokens are of another pair.
    pub fn new(input: PairInput) -> Result<Self> {
        Ok(Self {
            tables: PairTables::new(input)?,
            idle: Mutex::new(Vec::new()),
        })
    }

    /// The student tokens that the ranges of all targets point into.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tables.tokens
    }

    /// The cell of each teacher token, as a teacher token; `u32::MAX` for none.
    #[must_use]
    pub fn roots(&self) -> &[u32] {
        &self.tables.root
    }

    /// The targets of each example; the same on any number of threads.
    ///
    /// # Errors
    /// [`Error::IdOutOfRange`] for an id outside its vocabulary, [`Error::Shape`] for bounds that do
    /// not fit, [`Error::Option`] for an option outside its range.
    pub fn build(
        &self,
        examples: &[TargetExample<'_>],
        options: &TargetOptions,
        threads: &Threads<'_>,
    ) -> Result<Vec<Targets>> {
        if !(0.0..1.0).contains(&options.min_prob) {
            return Err(Error::Option {
                name: "min_prob",
                value: options.min_prob.to_string(),
                expected: "a probability from 0 to below 1",
            });
        }
        parallel::map(threads, examples.len(), |at| {
            self.with_scratch(|scratch| self.build_one(at, &examples[at], options, scratch))
        })
    }

    /// The teacher's text tokens behind which the student would not keep each of these tokens: its
    /// own tokenizer would have joined them. None behind a token without text.
    ///
    /// # Errors
    /// [`Error::NoSuchId`] for an id outside the student's vocabulary.
    pub fn swallowing(&self, lasts: &[u32], threads: &Threads<'_>) -> Result<Vec<Vec<u32>>> {
        let student = &self.tables.student;
        parallel::map(threads, lasts.len(), |at| {
            let last = student.twins().of(lasts[at]);
            if last as usize >= student.vocab().len() {
                return Err(Error::NoSuchId {
                    id: i64::from(last),
                    size: student.vocab().len(),
                });
            }
            if student.bytes(last).is_empty() {
                return Ok(Vec::new());
            }
            Ok(self.with_scratch(|scratch| {
                let mut after = student.after(last, &mut scratch.student_pairs);
                let columns = (0..).zip(&self.tables.columns);
                columns
                    .filter(|(_, column)| column.is_text() && !after.keeps(&column.next()))
                    .map(|(id, _)| id)
                    .collect()
            }))
        })
    }

    fn with_scratch<T>(&self, work: impl FnOnce(&mut Scratch) -> T) -> T {
        let idle = || self.idle.lock().unwrap_or_else(PoisonError::into_inner);
        let kept = idle().pop();
        let mut scratch = kept.unwrap_or_else(Scratch::new);
        let answer = work(&mut scratch);
        idle().push(scratch);
        answer
    }

    fn build_one(
        &self,
        at: usize,
        example: &TargetExample<'_>,
        options: &TargetOptions,
        scratch: &mut Scratch,
    ) -> Result<Targets> {
        self.check(at, example)?;
        let mut targets = Targets::empty();
        position::build(&self.tables, example, options, scratch, &mut targets)?;
        Ok(targets)
    }

    fn check(&self, at: usize, example: &TargetExample<'_>) -> Result<()> {
        let sides = [
            (
                "student",
                &self.tables.student,
                example.student_ids,
                example.student_bounds,
            ),
            (
                "teacher",
                &self.tables.teacher,
                example.teacher_ids,
                example.teacher_bounds,
            ),
        ];
        for (side, tables, ids, bounds) in sides {
            let size = tables.vocab().len();
            if let Some(position) = ids.iter().position(|&id| !(0..size as i64).contains(&id)) {
                return Err(Error::IdOutOfRange {
                    sequence: Some(at),
                    side,
                    position,
                    id: ids[position],
                    size,
                });
            }
            let fits = bounds.len() == example.kinds.len() + 1
                && bounds.is_sorted()
                && bounds[0] >= 0
                && bounds[bounds.len() - 1] <= ids.len() as i64;
            if !fits {
                return Err(Error::Shape {
                    what: format!("{side}_bounds of example {at}"),
                    found: bounds.len(),
                    expected: example.kinds.len() + 1,
                    remedy: "pass the alignment of these ids: bounds that rise within them",
                });
            }
        }
        example
            .predictions
            .check(example.teacher_ids.len(), self.tables.columns.len())
    }
}

/// Whether chunks of this kind hold the same text on both sides.
fn is_exact(kind: u8) -> bool {
    kind == ChunkKind::Exact as u8
}

fn is_special(kind: u8) -> bool {
    kind == ChunkKind::Special as u8
}
