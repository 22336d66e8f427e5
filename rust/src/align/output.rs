//! What an alignment is: two rising arrays of token bounds and a kind for each chunk between them.

/// How the two sides of a chunk relate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum ChunkKind {
    /// Tokens on both sides that spell the same bytes.
    Exact = 0,
    /// Tokens on both sides whose bytes differ.
    Mismatch = 1,
    /// One student token that the teacher has nothing for.
    StudentOnly = 2,
    /// One teacher token that the student has nothing for.
    TeacherOnly = 3,
    /// Two special tokens that the caller declared to correspond.
    Special = 4,
}

impl ChunkKind {
    /// All kinds, by value.
    pub const ALL: [ChunkKind; 5] = [
        ChunkKind::Exact,
        ChunkKind::Mismatch,
        ChunkKind::StudentOnly,
        ChunkKind::TeacherOnly,
        ChunkKind::Special,
    ];
}

/// Bytes of text by what became of them. A dummy prefix that one side alone has is not text and
/// counts nowhere, unless it ended up in a chunk that is not exact.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Bytes of the student's text.
    pub student_bytes: i64,
    /// Bytes of the teacher's text.
    pub teacher_bytes: i64,
    /// Bytes in [`ChunkKind::Exact`] chunks; the same on both sides.
    pub exact_bytes: i64,
    /// Mismatch chunks that stand where the search for a finer answer met its limit.
    pub coarse_chunks: i64,
}

/// The alignments of a batch, one after the other.
///
/// Sequence `b` has the chunks `chunk_indptr[b]..chunk_indptr[b + 1]` of `kinds`; as each sequence
/// has one bound more than chunks, its bounds are `chunk_indptr[b] + b..=chunk_indptr[b + 1] + b`.
/// Chunk `c` of a sequence covers its tokens `bounds[c]..bounds[c + 1]` on either side.
///
/// ```
/// use xtoken::AlignmentBatch;
///
/// // Two sequences: the first has chunks of 2:1 and 1:1 tokens, the second one chunk of 1:1.
/// let batch = AlignmentBatch {
///     student_bounds: vec![0, 2, 3, 0, 1],
///     teacher_bounds: vec![0, 1, 2, 0, 1],
///     kinds: vec![0, 0, 0],
///     chunk_indptr: vec![0, 2, 3],
///     counts: vec![Default::default(); 2],
/// };
/// let bounds_of = |b: usize| {
///     let (start, end) = (batch.chunk_indptr[b] as usize, batch.chunk_indptr[b + 1] as usize);
///     &batch.student_bounds[start + b..=end + b]
/// };
/// assert_eq!((bounds_of(0), bounds_of(1)), (&[0, 2, 3][..], &[0, 1][..]));
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AlignmentBatch {
    /// Token bounds in the student's sequences.
    pub student_bounds: Vec<i64>,
    /// Token bounds in the teacher's sequences.
    pub teacher_bounds: Vec<i64>,
    /// [`ChunkKind`] of each chunk, as its value.
    pub kinds: Vec<u8>,
    /// Where the chunks of each sequence begin, and at last their number.
    pub chunk_indptr: Vec<i64>,
    /// One entry per sequence.
    pub counts: Vec<Counts>,
}

impl Default for AlignmentBatch {
    fn default() -> Self {
        Self {
            student_bounds: Vec::new(),
            teacher_bounds: Vec::new(),
            kinds: Vec::new(),
            chunk_indptr: vec![0],
            counts: Vec::new(),
        }
    }
}

impl AlignmentBatch {
    /// Number of sequences.
    #[must_use]
    pub fn len(&self) -> usize {
        self.counts.len()
    }

    /// Whether there is no sequence.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.counts.is_empty()
    }

    /// Makes room for sequences of so many tokens on both sides together: growing step by step
    /// would copy what is there. Memory that is never written to is never mapped.
    pub fn reserve(&mut self, sequences: usize, tokens: usize) {
        self.student_bounds
            .reserve(tokens + sequences + SHORT_SERIES);
        self.teacher_bounds
            .reserve(tokens + sequences + SHORT_SERIES);
        self.kinds.reserve(tokens + SHORT_SERIES);
        self.chunk_indptr.reserve(sequences);
        self.counts.reserve(sequences);
    }

    /// Gives back the memory beyond what is in use.
    pub fn shrink(&mut self) {
        self.student_bounds.shrink_to_fit();
        self.teacher_bounds.shrink_to_fit();
        self.kinds.shrink_to_fit();
    }

    /// Empties the batch but keeps its memory.
    pub fn clear(&mut self) {
        self.student_bounds.clear();
        self.teacher_bounds.clear();
        self.kinds.clear();
        self.chunk_indptr.truncate(1);
        self.counts.clear();
    }
}

/// So many chunks at most are written in one piece.
const SHORT_SERIES: usize = 8;

/// A place where a student and a teacher token both begin.
pub(crate) type Boundary = (usize, usize);

/// Receives the chunks of one walk, in order; each call says where the chunk ends.
pub(crate) trait Sink {
    /// Whether the walk may stop once `bytes` more have agreed since its start.
    fn enough(&self, bytes: usize) -> bool;
    /// `count` chunks of one token on either side, `bytes` together.
    fn one_to_one(&mut self, start: Boundary, count: usize, bytes: usize);
    /// One exact chunk.
    fn exact(&mut self, end: Boundary, bytes: usize);
    /// One pair of special tokens.
    fn special(&mut self, end: Boundary);
    /// One token that only one side has, with the text that it contributes.
    fn one_sided(&mut self, end: Boundary, kind: ChunkKind, bytes: usize);
}

/// Appends the chunks of one sequence to a batch.
pub(crate) struct Writer<'a> {
    batch: &'a mut AlignmentBatch,
    counts: Counts,
    /// Lengths of the bounds and of the kinds before this sequence.
    before: (usize, usize),
    /// A student's token stands after a teacher's, both alone, at the same place.
    is_unsorted: bool,
}

impl<'a> Writer<'a> {
    pub(crate) fn new(batch: &'a mut AlignmentBatch, tokens: usize) -> Self {
        let before = (batch.student_bounds.len(), batch.kinds.len());
        // Each chunk holds a token or more: no further growth while the sequence is written.
        batch.reserve(1, tokens);
        batch.student_bounds.push(0);
        batch.teacher_bounds.push(0);
        Self {
            batch,
            counts: Counts::default(),
            before,
            is_unsorted: false,
        }
    }

    fn push(&mut self, end: Boundary, kind: ChunkKind) {
        self.batch.student_bounds.push(end.0 as i64);
        self.batch.teacher_bounds.push(end.1 as i64);
        self.batch.kinds.push(kind as u8);
    }

    pub(crate) fn mismatch(
        &mut self,
        end: Boundary,
        student_bytes: usize,
        teacher_bytes: usize,
        coarse: bool,
    ) {
        self.counts.student_bytes += student_bytes as i64;
        self.counts.teacher_bytes += teacher_bytes as i64;
        self.counts.coarse_chunks += i64::from(coarse);
        self.push(end, ChunkKind::Mismatch);
    }

    /// Number of chunks of this sequence so far.
    pub(crate) fn len(&self) -> usize {
        self.batch.kinds.len() - self.before.1
    }

    pub(crate) fn kind(&self, chunk: usize) -> u8 {
        self.batch.kinds[self.before.1 + chunk]
    }

    pub(crate) fn start(&self, chunk: usize) -> Boundary {
        let at = self.before.0 + chunk;
        (
            self.batch.student_bounds[at] as usize,
            self.batch.teacher_bounds[at] as usize,
        )
    }

    pub(crate) fn end(&self, chunk: usize) -> Boundary {
        self.start(chunk + 1)
    }

    /// Moves a chunk forward to the place `to`, where the chunk before it ends.
    pub(crate) fn keep(&mut self, chunk: usize, to: usize) {
        let (bounds, kinds) = self.before;
        self.batch.student_bounds[bounds + to + 1] = self.batch.student_bounds[bounds + chunk + 1];
        self.batch.teacher_bounds[bounds + to + 1] = self.batch.teacher_bounds[bounds + chunk + 1];
        self.batch.kinds[kinds + to] = self.batch.kinds[kinds + chunk];
    }

    /// Puts one chunk that ends with the chunk `last` at the place `to`; `bytes` are no longer
    /// exact.
    pub(crate) fn replace(&mut self, last: usize, to: usize, (kind, bytes): (ChunkKind, usize)) {
        self.keep(last, to);
        self.batch.kinds[self.before.1 + to] = kind as u8;
        self.counts.exact_bytes -= bytes as i64;
        self.counts.student_bytes += bytes as i64;
        self.counts.teacher_bytes += bytes as i64;
    }

    /// Drops all chunks but the first `chunks`.
    pub(crate) fn truncate(&mut self, chunks: usize) {
        self.batch
            .student_bounds
            .truncate(self.before.0 + chunks + 1);
        self.batch
            .teacher_bounds
            .truncate(self.before.0 + chunks + 1);
        self.batch.kinds.truncate(self.before.1 + chunks);
    }

    /// Where tokens of both sides stand alone at the same place, puts the student's before the
    /// teacher's: which of them was found first must not show.
    pub(crate) fn sort_one_sided(&mut self) {
        if !self.is_unsorted {
            return;
        }
        self.is_unsorted = false;
        let (bounds, kinds) = self.before;
        let is_one_sided =
            |kind: u8| kind == ChunkKind::StudentOnly as u8 || kind == ChunkKind::TeacherOnly as u8;
        let mut start = 0;
        while start < self.len() {
            let kinds = &mut self.batch.kinds[kinds..];
            let length = kinds[start..]
                .iter()
                .take_while(|&&kind| is_one_sided(kind))
                .count();
            kinds[start..start + length].sort_unstable();
            for (at, &kind) in (bounds + start..).zip(&kinds[start..start + length]) {
                let is_student = i64::from(kind == ChunkKind::StudentOnly as u8);
                self.batch.student_bounds[at + 1] = self.batch.student_bounds[at] + is_student;
                self.batch.teacher_bounds[at + 1] = self.batch.teacher_bounds[at] + 1 - is_student;
            }
            start += length.max(1);
        }
    }

    /// Takes back what was written.
    pub(crate) fn undo(self) {
        self.batch.student_bounds.truncate(self.before.0);
        self.batch.teacher_bounds.truncate(self.before.0);
        self.batch.kinds.truncate(self.before.1);
    }

    pub(crate) fn finish(self) {
        self.batch.chunk_indptr.push(self.batch.kinds.len() as i64);
        let mut counts = self.counts;
        counts.student_bytes += counts.exact_bytes;
        counts.teacher_bytes += counts.exact_bytes;
        self.batch.counts.push(counts);
    }
}

/// Appends the first `count` of [`SHORT_SERIES`] values. All of them are written, whatever the
/// count: a loop would end where nobody can foresee it.
#[inline(always)]
fn extend_short<T: Copy>(values: &mut Vec<T>, count: usize, of: impl Fn(i64) -> T) {
    let len = values.len();
    values.extend_from_slice(&std::array::from_fn::<T, SHORT_SERIES, _>(|at| {
        of(at as i64)
    }));
    values.truncate(len + count);
}

impl Sink for Writer<'_> {
    #[inline(always)]
    fn enough(&self, _bytes: usize) -> bool {
        false
    }

    #[inline(always)]
    fn one_to_one(&mut self, start: Boundary, count: usize, bytes: usize) {
        let (i, j, n) = (start.0 as i64, start.1 as i64, count as i64);
        self.counts.exact_bytes += bytes as i64;
        if count <= SHORT_SERIES {
            extend_short(&mut self.batch.student_bounds, count, |at| i + 1 + at);
            extend_short(&mut self.batch.teacher_bounds, count, |at| j + 1 + at);
            extend_short(&mut self.batch.kinds, count, |_| ChunkKind::Exact as u8);
            return;
        }
        self.batch.student_bounds.extend(i + 1..=i + n);
        self.batch.teacher_bounds.extend(j + 1..=j + n);
        self.batch
            .kinds
            .extend(std::iter::repeat_n(ChunkKind::Exact as u8, count));
    }

    #[inline(always)]
    fn exact(&mut self, end: Boundary, bytes: usize) {
        self.counts.exact_bytes += bytes as i64;
        self.push(end, ChunkKind::Exact);
    }

    fn special(&mut self, end: Boundary) {
        self.push(end, ChunkKind::Special);
    }

    fn one_sided(&mut self, end: Boundary, kind: ChunkKind, bytes: usize) {
        if kind == ChunkKind::StudentOnly {
            self.counts.student_bytes += bytes as i64;
            let before = self.batch.kinds[self.before.1..].last();
            self.is_unsorted |= before == Some(&(ChunkKind::TeacherOnly as u8));
        } else {
            self.counts.teacher_bytes += bytes as i64;
        }
        self.push(end, kind);
    }
}
