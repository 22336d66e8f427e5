//! What a pair of tokenizers says about targets, before any text: cells, groups, boundaries.

use std::sync::Arc;

use super::{NONE, PairInput};
use crate::error::{Error, Result};
use crate::projection::Pieces;
use crate::segment::Model;
use crate::tokenizer::Tokenizer;
use crate::trie::{PieceTrie, ROOT};
use crate::vocab::Vocab;

/// What a teacher token stands for at a boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ColumnKind {
    /// Nothing that the student could say.
    Dropped,
    Text,
    Stop,
    Special,
}

/// A teacher token, as the hot loop reads it.
#[derive(Debug, Clone, Copy)]
pub(super) struct Column {
    pub kind: ColumnKind,
    /// The first byte of `first`.
    pub first_byte: u8,
    /// The student token that it starts with; of a special token, its index among the pairs.
    pub first: u32,
    /// The trie node of its cell, and the range of the cell's tokens.
    pub cell: u32,
    pub cell_range: (u32, u32),
    /// Its place in the order of bytes.
    pub rank: u32,
}

/// The tables of one pair of tokenizers.
#[derive(Debug)]
pub(super) struct PairTables {
    pub student: Side,
    pub teacher: Side,
    pub trie: PieceTrie,
    pub teacher_pieces: Pieces,
    pub columns: Vec<Column>,
    /// By node: the student token that the node's bytes start with.
    pub node_first: Vec<u32>,
    pub node_depth: Vec<u8>,
    /// By node: the first piece of its prefix.
    pub node_column: Vec<u32>,
    /// Offsets into `inexact`, one more than there are nodes.
    pub inexact_ptr: Vec<u32>,
    /// The children at which no token ends.
    pub inexact: Vec<u32>,
    /// By teacher token: the cell that it is in, as a teacher token.
    pub root: Vec<u32>,
    /// By cell: the reached columns in it.
    pub cell_columns: Pieces,
    /// By teacher token that a cell is named after: the range of the cell's tokens.
    cell_range: Vec<(u32, u32)>,
    /// All student tokens by cell and pieces, then by bytes, then stops and paired specials.
    pub tokens: Vec<u32>,
    node_start: Vec<u32>,
    bytes_start: u32,
    stop_start: u32,
    stop_count: u32,
    pub special_count: u32,
}

/// One tokenizer with its tokens in the order of their bytes.
#[derive(Debug)]
pub(super) struct Side {
    tokenizer: Arc<Tokenizer>,
    /// Text tokens by their bytes, equal ones by id.
    pub sorted: Vec<u32>,
    /// By token: its place in `sorted`, the end of those with equal bytes, and of those that begin so.
    pub order: Vec<Order>,
    /// Whether the tokenizer gives this token for its bytes.
    canonical: Vec<bool>,
    /// Pairs of bytes that are neighbours within some token, 256 bits a first byte.
    adjacent: Vec<[u64; 4]>,
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Order {
    pub equal_start: u32,
    pub equal_end: u32,
    pub prefix_end: u32,
}

impl Side {
    fn new(tokenizer: Arc<Tokenizer>, side: &'static str) -> Result<Self> {
        tokenizer.require_model(side)?;
        let vocab = &tokenizer.vocab;
        let mut sorted: Vec<u32> = (0..vocab.len() as u32)
            .filter(|&id| !vocab.token_bytes(id).is_empty())
            .collect();
        sorted.sort_by(|&a, &b| {
            vocab
                .token_bytes(a)
                .cmp(vocab.token_bytes(b))
                .then(a.cmp(&b))
        });
        let mut order = vec![Order::default(); vocab.len()];
        // Tokens whose range of longer ones is still open, each a prefix of the next.
        let mut open: Vec<u32> = Vec::new();
        let mut at = 0;
        while at < sorted.len() {
            let bytes = vocab.token_bytes(sorted[at]);
            let equal = sorted[at..].partition_point(|&id| vocab.token_bytes(id) == bytes);
            while let Some(&top) = open.last() {
                let first = sorted[top as usize];
                if bytes.starts_with(vocab.token_bytes(first)) {
                    break;
                }
                open.pop();
                close(&mut order, &sorted, top, at as u32);
            }
            for &id in &sorted[at..at + equal] {
                order[id as usize] = Order {
                    equal_start: at as u32,
                    equal_end: (at + equal) as u32,
                    prefix_end: 0,
                };
            }
            open.push(at as u32);
            at += equal;
        }
        while let Some(top) = open.pop() {
            close(&mut order, &sorted, top, sorted.len() as u32);
        }
        let mut adjacent = vec![[0u64; 4]; 256];
        for &id in &sorted {
            for pair in vocab.token_bytes(id).windows(2) {
                adjacent[usize::from(pair[0])][usize::from(pair[1]) / 64] |= 1 << (pair[1] % 64);
            }
        }
        let mut canonical = vec![false; vocab.len()];
        let mut pieces = Vec::new();
        for &id in &sorted {
            let spelled = match &tokenizer.model {
                Some(model) => tokenizer.segment_with(model, vocab.token_bytes(id), &mut pieces),
                None => false,
            };
            canonical[id as usize] = spelled && pieces == [id];
        }
        Ok(Self {
            tokenizer,
            sorted,
            order,
            canonical,
            adjacent,
        })
    }

    pub fn vocab(&self) -> &Vocab {
        &self.tokenizer.vocab
    }

    pub fn bytes(&self, id: u32) -> &[u8] {
        self.tokenizer.vocab.token_bytes(id)
    }

    fn model(&self) -> Option<&Model> {
        self.tokenizer.model.as_deref()
    }

    /// Whether pairs of neighbours decide a segmentation.
    pub fn is_pairwise(&self) -> bool {
        matches!(self.model(), Some(Model::Bpe(_)))
    }

    /// The token that a text starts with.
    pub fn first_piece(&self, bytes: &[u8], pieces: &mut Vec<u32>) -> Option<u32> {
        let model = self.model()?;
        if !self.tokenizer.segment_with(model, bytes, pieces) {
            return None;
        }
        pieces.first().copied()
    }

    /// The token that a text ends with.
    pub fn last_piece(&self, bytes: &[u8], pieces: &mut Vec<u32>) -> Option<u32> {
        self.first_piece(bytes, pieces)?;
        pieces.last().copied()
    }

    /// The neighbours after which `last` may be swallowed, as a set of first bytes; none where a
    /// text never ends with this token anyway.
    pub fn may_swallow(&self, last: u32) -> [u64; 4] {
        match self.bytes(last).last() {
            Some(&byte) if self.canonical[last as usize] => self.adjacent[usize::from(byte)],
            _ => [0; 4],
        }
    }

    /// Whether the tokenizer keeps `last` when `next` follows.
    pub fn keeps(&self, last: u32, next: u32, memo: &mut PairMemo) -> bool {
        let Some(&first) = self.bytes(next).first() else {
            return true;
        };
        if !has(&self.may_swallow(last), first) {
            return true;
        }
        memo.get(last, next, |bytes, pieces| {
            bytes.clear();
            bytes.extend_from_slice(self.bytes(last));
            bytes.extend_from_slice(self.bytes(next));
            self.first_piece(bytes, pieces) == Some(last)
        })
    }

    /// The places in `sorted` of the tokens that begin with `bytes` and go on.
    pub fn longer_than(&self, bytes: &[u8]) -> std::ops::Range<u32> {
        let vocab = self.vocab();
        let start = self
            .sorted
            .partition_point(|&id| vocab.token_bytes(id) <= bytes);
        let more =
            self.sorted[start..].partition_point(|&id| vocab.token_bytes(id).starts_with(bytes));
        start as u32..(start + more) as u32
    }
}

fn close(order: &mut [Order], sorted: &[u32], start: u32, end: u32) {
    let equal_end = order[sorted[start as usize] as usize].equal_end;
    for &id in &sorted[start as usize..equal_end as usize] {
        order[id as usize].prefix_end = end;
    }
}

pub(super) fn has(set: &[u64; 4], byte: u8) -> bool {
    set[usize::from(byte) / 64] >> (byte % 64) & 1 == 1
}

/// Answers about pairs of tokens, a fixed number of them.
#[derive(Debug)]
pub(super) struct PairMemo {
    slots: Vec<u64>,
    bytes: Vec<u8>,
    pieces: Vec<u32>,
}

const MEMO_BITS: u32 = 19;

impl PairMemo {
    pub fn new() -> Self {
        Self {
            slots: vec![u64::MAX; 1 << MEMO_BITS],
            bytes: Vec::new(),
            pieces: Vec::new(),
        }
    }

    fn get(
        &mut self,
        left: u32,
        right: u32,
        answer: impl FnOnce(&mut Vec<u8>, &mut Vec<u32>) -> bool,
    ) -> bool {
        // Ids are below 2^31, which leaves the lowest bit to the answer.
        let key = u64::from(left) << 32 | u64::from(right) << 1;
        let slot = (key.wrapping_mul(0x9E37_79B9_7F4A_7C15) >> (64 - MEMO_BITS)) as usize;
        if self.slots[slot] & !1 == key {
            return self.slots[slot] & 1 == 1;
        }
        let found = answer(&mut self.bytes, &mut self.pieces);
        self.slots[slot] = key | u64::from(found);
        found
    }
}

impl PairTables {
    pub fn new(input: PairInput) -> Result<Self> {
        let PairInput {
            student,
            teacher,
            pieces,
            teacher_pieces,
            specials,
            student_stops,
            teacher_stops,
        } = input;
        let (student, teacher) = (
            Side::new(student, "student")?,
            Side::new(teacher, "teacher")?,
        );
        let (student_size, teacher_size) = (student.vocab().len(), teacher.vocab().len());
        check_pieces(
            &teacher_pieces,
            teacher_size,
            student_size,
            "teacher_pieces",
        )?;
        check_pieces(&pieces, student_size, teacher_size, "pieces")?;
        let ids = specials.iter().map(|pair| (pair.0, pair.1));
        for (s, t) in ids.chain(student_stops.iter().map(|&s| (s, 0))) {
            check_id(s, student_size)?;
            check_id(t, teacher_size)?;
        }
        for &t in &teacher_stops {
            check_id(t, teacher_size)?;
        }
        let trie = PieceTrie::new(pieces, teacher_size)?;
        let root = roots(&trie, &teacher_pieces);
        let nodes = Nodes::new(&trie, &teacher, &student);
        let (by_cell, node_start, cell_columns) = by_cell(&trie, &root, &nodes.column);
        let mut tokens = by_cell;
        let bytes_start = tokens.len() as u32;
        tokens.extend_from_slice(&student.sorted);
        let stop_start = tokens.len() as u32;
        tokens.extend_from_slice(&student_stops);
        tokens.extend(specials.iter().map(|pair| pair.0));
        let cell_range: Vec<(u32, u32)> = (0..teacher_size as u32)
            .map(|cell| range_of_cell(&trie, &cell_columns, &node_start, cell))
            .collect();
        let columns = (0..teacher_size as u32)
            .map(|t| {
                let text = !teacher.bytes(t).is_empty();
                let first = teacher_pieces.of(t).first().copied();
                let place = teacher.order[t as usize].equal_start;
                let mut column = Column {
                    kind: ColumnKind::Dropped,
                    first_byte: 0,
                    first: NONE,
                    cell: NONE,
                    cell_range: (0, 0),
                    rank: place,
                };
                if teacher_stops.contains(&t) {
                    column.kind = ColumnKind::Stop;
                } else if let Some(at) = specials.iter().position(|pair| pair.1 == t)
                    && !text
                {
                    column.kind = ColumnKind::Special;
                    column.first = at as u32;
                } else if let (true, Some(first)) = (text, first) {
                    column.kind = ColumnKind::Text;
                    column.first = first;
                    column.first_byte = student.bytes(first)[0];
                    let cell = root[t as usize];
                    if cell != NONE {
                        column.cell = trie.child(ROOT, cell).unwrap_or(NONE);
                        column.cell_range = cell_range[cell as usize];
                    }
                }
                column
            })
            .collect();
        Ok(Self {
            student,
            teacher,
            columns,
            node_first: nodes.first,
            node_depth: nodes.depth,
            node_column: nodes.column,
            inexact_ptr: nodes.inexact_ptr,
            inexact: nodes.inexact,
            trie,
            teacher_pieces,
            root,
            cell_columns,
            cell_range,
            tokens,
            node_start,
            bytes_start,
            stop_start,
            stop_count: student_stops.len() as u32,
            special_count: specials.len() as u32,
        })
    }

    /// Where the tokens below a node are in `tokens`.
    pub fn below(&self, node: u32) -> (u32, u32) {
        let start = self.node_start[node as usize];
        (start, start + self.trie.below(node).len() as u32)
    }

    /// Where the tokens of the cell that a teacher token names are in `tokens`.
    pub fn cell(&self, column: u32) -> (u32, u32) {
        self.cell_range[column as usize]
    }

    /// Where the tokens that end at a node are in `tokens`.
    pub fn ending_at(&self, node: u32) -> (u32, u32) {
        let start = self.node_start[node as usize];
        (start, start + self.trie.end_count(node) as u32)
    }

    /// Where the tokens from one place of the student's byte order to another are in `tokens`.
    pub fn by_bytes(&self, start: u32, end: u32) -> (u32, u32) {
        (self.bytes_start + start, self.bytes_start + end)
    }

    /// Where the stop tokens are in `tokens`.
    pub fn stops(&self) -> (u32, u32) {
        (self.stop_start, self.stop_start + self.stop_count)
    }

    /// Where a paired special token is in `tokens`.
    pub fn special(&self, index: u32) -> (u32, u32) {
        let at = self.stop_start + self.stop_count + index;
        (at, at + 1)
    }
}

/// The columns of a cell are neighbours, and so are their tokens.
fn range_of_cell(
    trie: &PieceTrie,
    cell_columns: &Pieces,
    node_start: &[u32],
    cell: u32,
) -> (u32, u32) {
    let nodes = cell_columns.of(cell).iter();
    let nodes = nodes.filter_map(|&column| trie.child(ROOT, column));
    let (start, end) = nodes.fold((NONE, 0), |(start, end), node| {
        let first = node_start[node as usize];
        (
            start.min(first),
            end.max(first + trie.below(node).len() as u32),
        )
    });
    if start == NONE { (0, 0) } else { (start, end) }
}

fn check_id(id: u32, size: usize) -> Result<()> {
    if (id as usize) < size {
        return Ok(());
    }
    Err(Error::NoSuchId {
        id: i64::from(id),
        size,
    })
}

fn check_pieces(pieces: &Pieces, count: usize, size: usize, name: &'static str) -> Result<()> {
    if pieces.indptr.len() != count + 1 {
        return Err(Error::Shape {
            what: format!("{name}_indptr"),
            found: pieces.indptr.len(),
            expected: count + 1,
            remedy: "pass the projection that was built from these two tokenizers",
        });
    }
    // Offsets and ids are checked as for a trie.
    PieceTrie::new(pieces.clone(), size).map(|_| ())
}

/// The cell of each teacher token: itself where a student token has its bytes, else that of the
/// first teacher piece of its first student piece, which is shorter.
fn roots(trie: &PieceTrie, teacher_pieces: &Pieces) -> Vec<u32> {
    let size = trie.piece_count();
    let mut root = vec![NONE; size];
    let mut seen = Vec::new();
    for column in 0..size as u32 {
        let mut at = column;
        seen.clear();
        root[column as usize] = loop {
            let spelled = teacher_pieces.of(at);
            let Some(&piece) = spelled.first() else {
                break NONE;
            };
            let Some(&first) = trie.token_pieces().of(piece).first() else {
                break NONE;
            };
            if spelled.len() == 1 {
                break first;
            }
            // Pieces from elsewhere may go round; those of a pair of tokenizers get shorter.
            if seen.contains(&first) {
                break NONE;
            }
            seen.push(first);
            at = first;
        };
    }
    root
}

struct Nodes {
    depth: Vec<u8>,
    column: Vec<u32>,
    first: Vec<u32>,
    inexact_ptr: Vec<u32>,
    inexact: Vec<u32>,
}

impl Nodes {
    fn new(trie: &PieceTrie, teacher: &Side, student: &Side) -> Self {
        let count = trie.len();
        let mut nodes = Self {
            depth: vec![0; count],
            column: vec![NONE; count],
            first: vec![NONE; count],
            inexact_ptr: vec![0],
            inexact: Vec::new(),
        };
        let mut length = vec![0usize; count];
        let mut pieces = Vec::new();
        // A node's children come after it.
        for node in 0..count as u32 {
            let at = node as usize;
            for (piece, child) in trie.children(node) {
                let below = child as usize;
                nodes.depth[below] = nodes.depth[at].saturating_add(1);
                nodes.column[below] = if node == ROOT {
                    piece
                } else {
                    nodes.column[at]
                };
                length[below] = length[at] + teacher.bytes(piece).len();
                if trie.end_count(child) == 0 {
                    nodes.inexact.push(child);
                }
            }
            nodes.inexact_ptr.push(nodes.inexact.len() as u32);
            if let (false, Some(&token)) = (node == ROOT, trie.below(node).first()) {
                let bytes = student.bytes(token);
                let text = &bytes[..length[at].min(bytes.len())];
                nodes.first[at] = student.first_piece(text, &mut pieces).unwrap_or(NONE);
            }
        }
        nodes
    }
}

/// The tokens by cell and pieces, each node's first place among them, and the columns of each cell.
fn by_cell(trie: &PieceTrie, root: &[u32], column: &[u32]) -> (Vec<u32>, Vec<u32>, Pieces) {
    let mut reached: Vec<(u32, u32, u32)> = trie
        .children(ROOT)
        .map(|(piece, node)| (root[piece as usize], piece, node))
        .collect();
    reached.sort_unstable();
    let starts = trie.slots().starts;
    let mut tokens = Vec::with_capacity(trie.tokens().len());
    let mut shift = vec![0i64; root.len()];
    let mut of_cell: Vec<Vec<u32>> = vec![Vec::new(); root.len()];
    for &(cell, piece, node) in &reached {
        shift[piece as usize] = tokens.len() as i64 - starts[node as usize];
        tokens.extend_from_slice(trie.below(node));
        if cell != NONE {
            of_cell[cell as usize].push(piece);
        }
    }
    let place = |node: usize| match column[node] {
        NONE => 0,
        column => (starts[node] + shift[column as usize]) as u32,
    };
    let node_start = (0..trie.len()).map(place).collect();
    (tokens, node_start, of_cell.iter().collect())
}
