//! The projection W `[V_s, V_t]`: which teacher tokens a student token corresponds to.
//!
//! Built from the two tokenizers alone, in this order: equal bytes; equal bytes up to declared
//! differences; the teacher's own segmentation of the student token; student tokens that a teacher
//! token splits into; special tokens. A row sums to 1 or is empty. Source: X-Token (Sreenivas et
//! al., 2026, arXiv 2605.21699), which builds it from decoded strings; here all is bytes.

mod canonical;
mod options;
mod pieces;
mod specials;

pub use options::{Canonical, Options, Reverse};
pub use pieces::Pieces;

use canonical::CanonicalIndex;

use crate::error::{Error, Result, checked_id};
use crate::parallel::Threads;
use crate::tokenizer::Tokenizer;
use crate::vocab::TokenKind;

/// What made a row, or why it is empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Rule {
    /// Empty: the id is a hole.
    Unused = 0,
    /// Empty: the teacher cannot spell the bytes.
    Unspellable = 1,
    /// Empty: a special token without a partner.
    Unpaired = 2,
    /// A teacher token with the same bytes.
    Exact = 3,
    /// A teacher token with the same bytes up to a declared difference.
    Canonical = 4,
    /// The teacher's own segmentation of the bytes.
    Forward = 5,
    /// Only teacher tokens that split into this one and others.
    Reverse = 6,
    /// Special tokens with the same role, or declared a pair.
    Role = 7,
    /// Special tokens with similar names.
    Name = 8,
    /// Equal bytes, but the student's tokenizer emits another id for them (`<0x41>` beside `A`).
    Duplicate = 9,
    /// Read from another program's table; no row is built so.
    Imported = 10,
}

impl Rule {
    /// All rules, in order of their codes.
    pub const ALL: [Rule; 11] = [
        Rule::Unused,
        Rule::Unspellable,
        Rule::Unpaired,
        Rule::Exact,
        Rule::Canonical,
        Rule::Forward,
        Rule::Reverse,
        Rule::Role,
        Rule::Name,
        Rule::Duplicate,
        Rule::Imported,
    ];

    /// The name in the Python API and in files.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Rule::Unused => "unused",
            Rule::Unspellable => "unspellable",
            Rule::Unpaired => "unpaired",
            Rule::Exact => "exact",
            Rule::Canonical => "canonical",
            Rule::Forward => "forward",
            Rule::Reverse => "reverse",
            Rule::Role => "role",
            Rule::Name => "name",
            Rule::Duplicate => "duplicate",
            Rule::Imported => "imported",
        }
    }
}

/// W in CSR form, with the rule of each row and the pieces that it was made from.
///
/// ```
/// use xtoken::projection::{Options, Rule, build};
/// use xtoken::{Threads, Token, Tokenizer};
///
/// let tokenizer = |tokens: &[&str]| {
///     Tokenizer::from_tokens(tokens.iter().map(|token| Token::Text((*token).into())), true)
/// };
/// let (student, teacher) = (tokenizer(&["a", "b", "ab"])?, tokenizer(&["a", "b"])?);
/// let w = build(&student, &teacher, &Options::default(), &Threads::one())?;
/// assert_eq!(w.rules, [Rule::Exact, Rule::Exact, Rule::Forward]);
/// // Row 2, "ab": the teacher's "a", and "b" with a tenth of its weight.
/// let row = w.indptr[2] as usize..w.indptr[3] as usize;
/// assert_eq!(w.indices[row.clone()], [0, 1]);
/// assert!((w.weights[row][0] - 10.0 / 11.0).abs() < 1e-6);
/// # Ok::<(), xtoken::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq)]
pub struct Projection {
    /// Offsets into `indices` and `weights`, `V_s + 1` of them.
    pub indptr: Vec<i64>,
    /// Teacher ids; in a row by falling weight, of equal weights in the order of the pieces, then
    /// by rising id.
    pub indices: Vec<i64>,
    /// Above 0; a row sums to 1.
    pub weights: Vec<f32>,
    /// What made each row.
    pub rules: Vec<Rule>,
    /// Rows to which the reverse rule gave an entry, beside those that it made alone.
    pub reverse_rows: usize,
    /// The teacher's pieces of each student token.
    pub pieces: Pieces,
    /// The mirror: the student's pieces of each teacher token; none where the student cannot
    /// segment.
    pub teacher_pieces: Option<Pieces>,
    /// Teacher stops that no row reaches, each with the reached one that stands for it.
    pub stop_folds: Vec<(u32, u32)>,
}

/// Builds W.
///
/// # Errors
/// [`Error::Option`] for an option outside its range, [`Error::NoSuchId`] for a declared special
/// pair outside its vocabulary, [`Error::NoModel`] or [`Error::Unsupported`] where a token must be
/// segmented and the other side cannot; [`Error::Interrupted`] where the caller gives up.
pub fn build(
    student: &Tokenizer,
    teacher: &Tokenizer,
    options: &Options,
    threads: &Threads<'_>,
) -> Result<Projection> {
    options.check()?;
    for &(s, t) in &options.special_pairs {
        for (id, vocab) in [(s, &student.vocab), (t, &teacher.vocab)] {
            checked_id(i64::from(id), vocab.len())?;
        }
    }
    let pieces = Pieces::spell(student, teacher, "teacher", threads)?;
    let teacher_pieces = match Pieces::spell(teacher, student, "student", threads) {
        Ok(pieces) => Some(pieces),
        // Only the reverse rule must have them.
        Err(Error::NoModel { .. } | Error::Unsupported { .. })
            if options.reverse == Reverse::Off =>
        {
            None
        }
        Err(error) => return Err(error),
    };
    let reverse = match &teacher_pieces {
        Some(pieces) if options.reverse != Reverse::Off => Given::back(pieces, options),
        _ => Given::default(),
    };
    let canonical = CanonicalIndex::new(teacher, options.canonical);
    let mut special_of = vec![None; student.vocab.len()];
    for (s, t, rule) in specials::pair(&student.vocab, &teacher.vocab, options) {
        special_of[s as usize].get_or_insert((t, rule));
    }

    let size = student.vocab.len();
    let mut w = Projection {
        indptr: Vec::with_capacity(size + 1),
        indices: Vec::with_capacity(size + size / 2),
        weights: Vec::with_capacity(size + size / 2),
        rules: Vec::with_capacity(size),
        reverse_rows: 0,
        pieces,
        teacher_pieces,
        stop_folds: Vec::new(),
    };
    w.indptr.push(0);
    let mut row: Vec<Entry> = Vec::new();
    for s in 0..size as u32 {
        row.clear();
        let bytes = student.vocab.token_bytes(s);
        let pieces = w.pieces.of(s);
        let mut rule = if let Some((t, rule)) = special_of[s as usize] {
            row.push(Entry::alone(t));
            rule
        } else if let [t] = pieces {
            // Pieces spell the bytes, so a single one is equal to them.
            row.push(Entry::alone(*t));
            if student.id_of(bytes) == Some(s) {
                Rule::Exact
            } else {
                Rule::Duplicate
            }
        } else if let Some(t) = canonical.as_ref().and_then(|index| index.id_of(bytes)) {
            row.push(Entry::alone(t));
            Rule::Canonical
        } else if !pieces.is_empty() {
            spread(pieces, options, &mut row);
            Rule::Forward
        } else {
            match student.vocab.kind(s) {
                TokenKind::Unused => Rule::Unused,
                TokenKind::Special => Rule::Unpaired,
                TokenKind::Normal | TokenKind::ByteFallback => Rule::Unspellable,
            }
        };
        let given = reverse.to(s);
        if !given.is_empty()
            && (options.reverse == Reverse::All || !matches!(rule, Rule::Exact | Rule::Duplicate))
        {
            if row.is_empty() {
                rule = Rule::Reverse;
            } else {
                w.reverse_rows += 1;
            }
            row.extend(
                (row.len()..)
                    .zip(given)
                    .map(|(place, &(_, column, weight))| Entry {
                        column,
                        weight,
                        place,
                    }),
            );
        }
        w.push(&mut row, options.top_k, rule);
    }
    w.stop_folds = specials::stop_folds(&teacher.vocab, options, &w.indices);
    Ok(w)
}

/// Appends the first `max_pieces` pieces with weights in proportion to `decay^i` that sum to 1.
fn spread(pieces: &[u32], options: &Options, row: &mut Vec<Entry>) {
    let kept = &pieces[..pieces.len().min(options.max_pieces)];
    let total: f64 = (0..kept.len() as i32).map(|i| options.decay.powi(i)).sum();
    row.extend((0..).zip(kept).map(|(i, &piece)| Entry {
        column: piece,
        weight: options.decay.powi(i) / total,
        place: i as usize,
    }));
}

/// One entry of a row in the making.
#[derive(Debug, Clone, Copy)]
struct Entry {
    column: u32,
    weight: f64,
    /// Which of the row's entries it is, in the order of the rules and of the pieces.
    place: usize,
}

impl Entry {
    fn alone(column: u32) -> Self {
        Self {
            column,
            weight: 1.0,
            place: 0,
        }
    }
}

impl Projection {
    /// Ends a row: equal columns summed, zeros dropped, the heaviest kept, normalized.
    fn push(&mut self, row: &mut Vec<Entry>, top_k: usize, rule: Rule) {
        // Stable, so that of equal columns the earliest place stays.
        row.sort_by_key(|entry| entry.column);
        row.dedup_by(|next, kept| {
            let same = next.column == kept.column;
            if same {
                kept.weight += next.weight;
            }
            same
        });
        row.retain(|entry| entry.weight as f32 > 0.0);
        // Of equal weights earlier pieces stay first; given entries come after, by id.
        row.sort_by(|a, b| {
            b.weight
                .total_cmp(&a.weight)
                .then_with(|| a.place.cmp(&b.place))
        });
        row.truncate(top_k);
        let total: f64 = row.iter().map(|entry| entry.weight).sum();
        for entry in row.iter() {
            self.indices.push(i64::from(entry.column));
            self.weights.push((entry.weight / total) as f32);
        }
        self.indptr.push(self.indices.len() as i64);
        self.rules.push(rule);
    }
}

/// Entries (student id, teacher id, weight) of the reverse rule, sorted.
#[derive(Default)]
struct Given {
    entries: Vec<(u32, u32, f64)>,
}

impl Given {
    fn back(teacher_pieces: &Pieces, options: &Options) -> Self {
        let mut entries = Vec::new();
        let mut row = Vec::new();
        for t in 0..teacher_pieces.indptr.len() as u32 - 1 {
            let split = teacher_pieces.of(t);
            if split.len() < 2 {
                continue;
            }
            row.clear();
            spread(split, options, &mut row);
            entries.extend(row.iter().map(|piece| (piece.column, t, piece.weight)));
        }
        entries.sort_by_key(|entry: &(u32, u32, f64)| (entry.0, entry.1));
        Self { entries }
    }

    fn to(&self, s: u32) -> &[(u32, u32, f64)] {
        let start = self.entries.partition_point(|entry| entry.0 < s);
        let length = self.entries[start..].partition_point(|entry| entry.0 == s);
        &self.entries[start..start + length]
    }
}
