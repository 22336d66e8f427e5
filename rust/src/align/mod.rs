//! Span alignment: which tokens of two tokenizations of one text correspond.
//!
//! A chunk boundary stands at each byte where a student and a teacher token both end, and nowhere
//! else: the finest segmentation in which both sides of each chunk spell the same bytes. Bytes are
//! compared, never lengths alone. Where the texts differ, `resync` finds where they agree again.
//!
//! Exchanging student and teacher exchanges the sides of the answer and changes nothing else, but
//! that of tokens that stand alone at the same place the student's are always listed first.

mod batch;
mod characters;
mod counted;
mod differences;
mod output;
mod resync;
mod rows;
mod side;
mod walk;

use std::sync::Arc;

use rustc_hash::FxHashSet;

pub use batch::{MIN_PARALLEL_TOKENS, Ragged, align_batch};
pub use counted::usable_of;
pub use output::{AlignmentBatch, ChunkKind, Counts};
pub use rows::{Bounds, ChunkRows, Chunks, Mask, flatten, usable};
pub use side::TokenId;

use crate::error::{Error, Result, checked_id};
use crate::vocab::Role;
use crate::vocab::{DummyPrefix, TokenKind, Vocab};
use differences::BadId;
use output::Writer;
use side::Side;
use walk::{ID_BITS, ID_MASK, Walk};

/// Roles whose specials correspond unless the caller says otherwise, beside all that stops. An
/// unknown token stands for some text, so it has no counterpart.
const PAIRED_ROLES: [Role; 2] = [Role::Bos, Role::Pad];

/// What an [`Aligner`] is asked to do beyond the default.
#[derive(Debug, Clone, Default)]
pub struct AlignOptions {
    /// Pairs of special tokens, (student id, teacher id), that form [`ChunkKind::Special`] chunks;
    /// `None` pairs each stop token ([`Vocab::stops`]) of one side with each of the other, BOS with
    /// BOS and padding with padding.
    pub role_pairs: Option<Vec<(i64, i64)>>,
    /// Joins chunks whose boundary would cut a UTF-8 character.
    pub whole_characters: bool,
}

/// Aligns token sequences of one student and one teacher vocabulary.
///
/// ```
/// use std::sync::Arc;
/// use xtoken::{AlignOptions, Aligner, ChunkKind, DummyPrefix, Spelling, Vocab, VocabBuilder};
///
/// fn vocab(tokens: &[&str]) -> xtoken::Result<Arc<Vocab>> {
///     let mut builder = VocabBuilder::new(Spelling::Bytes, DummyPrefix::Never);
///     for token in tokens {
///         builder.push_text(token.as_bytes())?;
///     }
///     Ok(Arc::new(builder.build()))
/// }
///
/// let student = vocab(&["un", "known", "!"])?;
/// let teacher = vocab(&["unk", "nown", "?"])?;
/// let aligner = Aligner::new(student, teacher, AlignOptions::default())?;
/// // "unknown!" and "unknown?": no token ends at the same byte before the end of the word.
/// let chunks = aligner.align(&[0u32, 1, 2], &[0u32, 1, 2])?;
/// assert_eq!(chunks.student_bounds, [0, 2, 3]);
/// assert_eq!(chunks.kinds, [ChunkKind::Exact as u8, ChunkKind::Mismatch as u8]);
/// assert_eq!(chunks.counts[0].exact_bytes, 7);
/// # Ok::<(), xtoken::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Aligner {
    student: Arc<Vocab>,
    teacher: Arc<Vocab>,
    /// For each student id, the teacher id with the same bytes, and their number above it.
    same: Vec<u32>,
    pairs: FxHashSet<u64>,
    whole_characters: bool,
}

/// Working memory that sequences aligned one after the other share.
#[derive(Default)]
pub struct Scratch(resync::Memory);

impl Aligner {
    /// An aligner for two vocabularies.
    ///
    /// # Errors
    /// [`Error::NoSuchId`] for a role pair outside the vocabularies, [`Error::Option`] for one that
    /// is not special.
    pub fn new(student: Arc<Vocab>, teacher: Arc<Vocab>, options: AlignOptions) -> Result<Self> {
        let pairs = match options.role_pairs {
            None => default_pairs(&student, &teacher)
                .into_iter()
                .filter(|&(s, t)| is_special(&student, s) && is_special(&teacher, t))
                .map(pair_key)
                .collect(),
            Some(pairs) => {
                let key = |(student_id, teacher_id)| {
                    let student_id = special_id(&student, student_id, "student")?;
                    Ok(pair_key((
                        student_id,
                        special_id(&teacher, teacher_id, "teacher")?,
                    )))
                };
                pairs.into_iter().map(key).collect::<Result<_>>()?
            }
        };
        let same = same_bytes(&student, &teacher);
        Ok(Self {
            student,
            teacher,
            same,
            pairs,
            whole_characters: options.whole_characters,
        })
    }

    /// The student's vocabulary.
    #[must_use]
    pub fn student(&self) -> &Arc<Vocab> {
        &self.student
    }

    /// The teacher's vocabulary.
    #[must_use]
    pub fn teacher(&self) -> &Arc<Vocab> {
        &self.teacher
    }

    /// The pairs of special ids that correspond, in order.
    #[must_use]
    pub fn role_pairs(&self) -> Vec<(u32, u32)> {
        let mut pairs: Vec<(u32, u32)> = self
            .pairs
            .iter()
            .map(|&key| ((key >> 32) as u32, key as u32))
            .collect();
        pairs.sort_unstable();
        pairs
    }

    /// The alignment of one pair of sequences, as a batch of one.
    ///
    /// # Errors
    /// [`Error::IdOutOfRange`] for an id outside its vocabulary.
    pub fn align<S: TokenId, T: TokenId>(
        &self,
        student: &[S],
        teacher: &[T],
    ) -> Result<AlignmentBatch> {
        let mut batch = AlignmentBatch::default();
        self.align_into(student, teacher, &mut batch, &mut Scratch::default())?;
        batch.shrink();
        Ok(batch)
    }

    /// Appends the alignment of one pair of sequences to `batch`, which an error leaves as it was.
    ///
    /// # Errors
    /// [`Error::IdOutOfRange`] for an id outside its vocabulary.
    pub fn align_into<S: TokenId, T: TokenId>(
        &self,
        student: &[S],
        teacher: &[T],
        batch: &mut AlignmentBatch,
        scratch: &mut Scratch,
    ) -> Result<()> {
        let walk = Walk {
            student: Side::new(&self.student, student),
            teacher: Side::new(&self.teacher, teacher),
            same: &self.same,
            pairs: &self.pairs,
            has_dummy: self.student.dummy_prefix() != DummyPrefix::Never
                || self.teacher.dummy_prefix() != DummyPrefix::Never,
        };
        let mut writer = Writer::new(batch, student.len() + teacher.len());
        match differences::align_sides(&walk, &mut writer, &mut scratch.0) {
            Ok(()) => {
                writer.sort_one_sided();
                if self.whole_characters {
                    characters::join(&walk, &mut writer);
                }
                writer.finish();
                Ok(())
            }
            Err(BadId) => {
                writer.undo();
                Err(self.bad_id(student, teacher))
            }
        }
    }

    /// The first id outside its vocabulary, as an error.
    #[cold]
    fn bad_id<S: TokenId, T: TokenId>(&self, student: &[S], teacher: &[T]) -> Error {
        fn first<I: TokenId>(side: &'static str, ids: &[I], size: usize) -> Option<Error> {
            let position = ids.iter().position(|id| id.index() >= size)?;
            Some(Error::IdOutOfRange {
                sequence: None,
                side,
                position,
                id: ids[position].value(),
                size,
            })
        }
        first("student", student, self.student.len())
            .or_else(|| first("teacher", teacher, self.teacher.len()))
            .unwrap_or(Error::IdOutOfRange {
                sequence: None,
                side: "student",
                position: 0,
                id: -1,
                size: 0,
            })
    }
}

fn default_pairs(student: &Vocab, teacher: &Vocab) -> Vec<(u32, u32)> {
    let mut pairs: Vec<(u32, u32)> = PAIRED_ROLES
        .iter()
        .filter_map(|&role| Some((student.role(role)?, teacher.role(role)?)))
        .collect();
    let teacher_stops = teacher.stops();
    for s in student.stops() {
        pairs.extend(teacher_stops.iter().map(|&t| (s, t)));
    }
    pairs
}

fn pair_key((student_id, teacher_id): (u32, u32)) -> u64 {
    u64::from(student_id) << 32 | u64::from(teacher_id)
}

fn is_special(vocab: &Vocab, id: u32) -> bool {
    vocab.kind(id) == TokenKind::Special
}

fn special_id(vocab: &Vocab, id: i64, side: &'static str) -> Result<u32> {
    let known = checked_id(id, vocab.len())?;
    if !is_special(vocab, known) {
        return Err(Error::Option {
            name: "role_pairs",
            value: format!("{side} id {id}"),
            expected: "special tokens, which contribute no text",
        });
    }
    Ok(known)
}

/// The map from student ids to teacher ids with the same bytes, packed with their number; entries
/// that do not fit or do not exist equal no id.
fn same_bytes(student: &Vocab, teacher: &Vocab) -> Vec<u32> {
    let most = (u32::MAX >> ID_BITS) as usize;
    // What follows an added token may have a dummy prefix, which the map would not see.
    let starts_anew =
        |vocab: &Vocab, id| vocab.dummy_prefix() == DummyPrefix::Every && vocab.is_added(id);
    (0..student.len() as u32)
        .map(|id| {
            let bytes = student.token_bytes(id);
            match teacher.id_of(bytes) {
                Some(other)
                    if other < ID_MASK
                        && bytes.len() <= most
                        && !starts_anew(student, id)
                        && !starts_anew(teacher, other) =>
                {
                    (bytes.len() as u32) << ID_BITS | other
                }
                _ => ID_MASK,
            }
        })
        .collect()
}
