//! What a pair of tokenizers says about targets, before any text: cells, groups, boundaries.

use super::columns::{Brief, Column, ColumnKind, FIRST_IS_BYTES, KIND_SHIFT};
use super::side::Side;
use super::{NONE, PairInput};
use crate::error::{Error, Result};
use crate::projection::Pieces;
use crate::tokenizer::BYTES;
use crate::trie::{self, PieceTrie, ROOT};

/// What is known of a node of the trie, together: looking up one thing waits as long as all.
#[derive(Debug, Clone, Copy)]
#[repr(align(32))]
pub(super) struct Node {
    /// The student tokens that its bytes start and end with.
    pub first: u32,
    pub last: u32,
    /// The first piece of its prefix.
    pub column: u32,
    /// The first place of its tokens in `tokens`.
    start: u32,
    /// Where its children begin in `inexact`; the next node's begin behind them.
    inexact: u32,
    /// Where the bits of its children begin in `child_bits`, and how many less one; no bit where it
    /// has few children.
    filter: (u32, u32),
    pub depth: u8,
}

const _: () = assert!(size_of::<Node>() == 32);

/// The tables of one pair of tokenizers.
#[derive(Debug)]
pub(super) struct PairTables {
    pub student: Side,
    pub teacher: Side,
    pub trie: PieceTrie,
    pub teacher_pieces: Pieces,
    pub columns: Vec<Column>,
    /// The same, but only what every row is asked about.
    pub briefs: Vec<Brief>,
    /// The same by student token, each as what it starts with.
    pub heads: Vec<Column>,
    /// By node of the trie, and one more.
    pub nodes: Vec<Node>,
    child_bits: Vec<u64>,
    /// The nodes from 1 to this one are the root's children.
    pub last_column: u32,
    /// The children of nodes at which no token ends.
    inexact: Vec<u32>,
    /// By teacher token: the cell that it is in, as a teacher token.
    pub root: Vec<u32>,
    /// By cell: the reached columns in it.
    pub cell_columns: Pieces,
    /// By teacher token that a cell is named after: the range of the cell's tokens.
    cell_range: Vec<(u32, u32)>,
    /// The same by the node of that token, up to `last_column`.
    pub cells: Vec<(i32, i32)>,
    /// By student token: the places, in the teacher's order of bytes, of the tokens that begin with
    /// its bytes and go on.
    pub teacher_longer: Vec<(u32, u32)>,
    /// All student tokens by cell and pieces, then by bytes, then stops and paired specials.
    pub tokens: Vec<u32>,
    bytes_start: u32,
    stop_start: u32,
    stop_count: u32,
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
        let (mut student, teacher) = (
            Side::new(student, &student_stops, "student")?,
            Side::new(teacher, &teacher_stops, "teacher")?,
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
        let nodes = NodeArrays::new(&trie, &teacher_pieces, &teacher, &student);
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
        let mut text_column = |first: u32, piece: Option<u32>, bytes: Option<&[u8]>| {
            let next = student.next(first);
            let shape = match bytes {
                Some(bytes) => student.shape_of(&next, bytes),
                None => next.shape,
            };
            let cell = piece.map_or(NONE, |piece| root[piece as usize]);
            let cell = match cell {
                NONE => NONE,
                cell => trie.child(ROOT, cell).unwrap_or(NONE),
            };
            Column {
                first,
                cell,
                rank: NONE,
                part_start: next.part_start,
                until: next.until,
                shape,
                begins: next.begins
                    | (ColumnKind::Text as u16) << KIND_SHIFT
                    | if next.shape == BYTES {
                        FIRST_IS_BYTES
                    } else {
                        0
                    },
                longer: next.longer,
                first_byte: next.first_byte,
                part_count: next.part_count,
            }
        };
        let heads = (0..student_size as u32)
            .map(|s| text_column(s, trie.token_pieces().of(s).first().copied(), None))
            .collect();
        let columns: Vec<Column> = (0..teacher_size as u32)
            .map(|t| {
                let text = !teacher.bytes(t).is_empty();
                let mut column = match teacher_pieces.of(t).first() {
                    Some(&first) if text => text_column(first, Some(t), Some(teacher.bytes(t))),
                    _ => Column::DROPPED,
                };
                if teacher_stops.contains(&t) {
                    column.set_kind(ColumnKind::Stop);
                } else if text {
                    column.rank = teacher.order[t as usize].equal_start;
                } else if let Some(at) = specials.iter().position(|pair| pair.1 == t) {
                    column.set_kind(ColumnKind::Special);
                    column.first = at as u32;
                }
                column
            })
            .collect();
        let last_column = trie.children(ROOT).len() as u32;
        let cells: Vec<(i32, i32)> = (0..=last_column)
            .map(|node| match nodes.column[node as usize] {
                NONE => (0, 0),
                column => {
                    let (start, end) = cell_range[column as usize];
                    (start as i32, end as i32)
                }
            })
            .collect();
        let (filters, child_bits) = child_filters(&trie);
        let node = |at: usize| match at < trie.len() {
            true => Node {
                first: nodes.first[at],
                last: nodes.last[at],
                column: nodes.column[at],
                start: node_start[at],
                inexact: nodes.inexact_ptr[at],
                filter: filters[at],
                depth: nodes.depth[at],
            },
            false => Node {
                first: NONE,
                last: NONE,
                column: NONE,
                start: 0,
                inexact: nodes.inexact.len() as u32,
                filter: (0, 0),
                depth: 0,
            },
        };
        let all_nodes = (0..=trie.len()).map(node).collect();
        let teacher_longer = longer_tokens(&student, &teacher);
        Ok(Self {
            student,
            teacher,
            briefs: columns.iter().map(Brief::of).collect(),
            columns,
            heads,
            cells,
            nodes: all_nodes,
            child_bits,
            teacher_longer,
            last_column,
            inexact: nodes.inexact,
            trie,
            teacher_pieces,
            root,
            cell_columns,
            cell_range,
            tokens,
            bytes_start,
            stop_start,
            stop_count: student_stops.len() as u32,
        })
    }

    /// Whether a piece may lead to a child of a node that has many: most that do not are told apart.
    pub fn may_have_child(&self, node: u32, piece: u32) -> bool {
        let (start, mask) = self.nodes[node as usize].filter;
        let bit = child_bit(piece) & mask;
        self.child_bits[(start + bit / 64) as usize] >> (bit % 64) & 1 == 1
    }

    /// Whether a node has so many children that they are asked about one by one.
    pub fn has_many_children(&self, node: u32) -> bool {
        self.nodes[node as usize].filter.1 > 0
    }

    /// Has a student token's column brought nearer while other work is done.
    pub fn ask_for_head(&self, first: u32) {
        ask_for(self.heads.as_ptr().wrapping_add(first as usize));
    }

    /// More than any key of a group: a node, the end of one, the stop, a special token.
    pub fn key_count(&self) -> usize {
        2 * self.trie.len() + 1 + self.tokens.len() - self.stop_start as usize
    }

    /// The children of a node at which no token ends.
    pub fn inexact(&self, node: u32) -> &[u32] {
        let node = node as usize;
        let range = self.nodes[node].inexact as usize..self.nodes[node + 1].inexact as usize;
        &self.inexact[range]
    }

    /// Where the tokens below a node are in `tokens`.
    pub fn below(&self, node: u32) -> (u32, u32) {
        let start = self.nodes[node as usize].start;
        (start, start + self.trie.below(node).len() as u32)
    }

    /// Where the tokens of the cell that a teacher token names are in `tokens`.
    pub fn cell(&self, column: u32) -> (u32, u32) {
        self.cell_range[column as usize]
    }

    /// Where the tokens that end at a node are in `tokens`.
    pub fn ending_at(&self, node: u32) -> (u32, u32) {
        let start = self.nodes[node as usize].start;
        (start, start + self.trie.end_count(node) as u32)
    }

    /// Where the tokens from one place of the student's byte order to another are in `tokens`.
    pub fn by_bytes(&self, start: u32, end: u32) -> (u32, u32) {
        (self.bytes_start + start, self.bytes_start + end)
    }

    /// Whether anything stops the student.
    pub fn has_stops(&self) -> bool {
        self.stop_count > 0
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

/// Has what is there brought nearer, wherever it is.
#[inline]
pub(super) fn ask_for<T>(place: *const T) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        // SAFETY: nothing is read, wherever it points.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(place.cast()) };
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = place;
}

/// More children than this are many.
const FEW_CHILDREN: usize = 48;

fn child_bit(piece: u32) -> u32 {
    piece.wrapping_mul(0x9E37_79B9) >> 12
}

/// Bits of the pieces of each node that has many children, eight for each of them or more.
fn child_filters(trie: &PieceTrie) -> (Vec<(u32, u32)>, Vec<u64>) {
    let mut filters = vec![(0, 0); trie.len()];
    let mut bits = Vec::new();
    for node in (0..trie.len() as u32).filter(|&node| node != ROOT) {
        let children = trie.children(node);
        if children.len() <= FEW_CHILDREN {
            continue;
        }
        let size = (8 * children.len()).next_power_of_two();
        let (start, mask) = (bits.len(), size as u32 - 1);
        bits.resize(start + size / 64, 0u64);
        for (piece, _) in children {
            let bit = child_bit(piece) & mask;
            bits[start + bit as usize / 64] |= 1 << (bit % 64);
        }
        filters[node as usize] = (start as u32, mask);
    }
    (filters, bits)
}

/// By token of one side: the places of the other's tokens that begin with its bytes and go on.
fn longer_tokens(own: &Side, other: &Side) -> Vec<(u32, u32)> {
    let mut found = vec![(0, 0); own.vocab().len()];
    let mut at = 0;
    for &token in &own.sorted {
        let bytes = own.bytes(token);
        let rest = &other.sorted[at..];
        at += rest
            .iter()
            .take_while(|&&id| other.bytes(id) < bytes)
            .count();
        let same = |&id: &u32| other.bytes(id) == bytes;
        let start = at + other.sorted[at..].partition_point(same);
        let more = |&id: &u32| other.bytes(id).starts_with(bytes);
        let end = start + other.sorted[start..].partition_point(more);
        found[token as usize] = (start as u32, end as u32);
    }
    found
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
    trie::check(pieces, size)
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

struct NodeArrays {
    depth: Vec<u8>,
    column: Vec<u32>,
    first: Vec<u32>,
    last: Vec<u32>,
    inexact_ptr: Vec<u32>,
    inexact: Vec<u32>,
}

impl NodeArrays {
    fn new(trie: &PieceTrie, teacher_pieces: &Pieces, teacher: &Side, student: &Side) -> Self {
        let count = trie.len();
        let mut nodes = Self {
            depth: vec![0; count],
            column: vec![NONE; count],
            first: vec![NONE; count],
            last: vec![NONE; count],
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
                // Most nodes are a token, or a teacher's token whose pieces are known.
                let whole = trie.end_count(node) > 0 && student.canonical[token as usize];
                let pieces_of_column = match nodes.depth[at] {
                    1 => teacher_pieces.of(nodes.column[at]),
                    _ => &[],
                };
                (nodes.first[at], nodes.last[at]) = match pieces_of_column {
                    _ if whole => (token, token),
                    [first, .., last] => (*first, *last),
                    _ => {
                        let bytes = student.bytes(token);
                        let text = &bytes[..length[at].min(bytes.len())];
                        student.outer_pieces(text, &mut pieces)
                    }
                };
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
