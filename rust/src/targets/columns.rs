//! What a pair of tokenizers says about one teacher token: all of it, and what every row is asked
//! about, side by side.

use super::NONE;
use crate::tokenizer::{BEGINNINGS, BYTES, Marks, Next};

/// What a teacher token stands for at a boundary.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum ColumnKind {
    Text,
    /// Nothing that the student could say.
    Dropped,
    Stop,
    Special,
}

/// All that is asked about a teacher token.
#[derive(Debug, Clone, Copy)]
#[repr(align(32))]
pub(super) struct Column {
    /// The student token that it starts with; of a special token, its index among the pairs.
    pub first: u32,
    /// The trie node of its cell.
    pub cell: u32,
    /// Its place in the order of bytes.
    pub rank: u32,
    pub part_start: u32,
    pub until: u16,
    /// The shape of its text for the student; `first` has the same, or is no text.
    pub shape: u16,
    pub begins: u16,
    pub longer: u16,
    pub first_byte: u8,
    pub part_count: u8,
}

const _: () = assert!(size_of::<Column>() == 32);

/// Bits of `begins`: the lowest are [`Next::begins`].
const BEGINS: u16 = BEGINNINGS as u16 - 1;
pub(super) const KIND_SHIFT: u32 = BEGINNINGS.ilog2();
pub(super) const FIRST_IS_BYTES: u16 = 1 << (KIND_SHIFT + 2);

impl Column {
    pub const DROPPED: Self = Self {
        first: NONE,
        cell: NONE,
        rank: NONE,
        part_start: 0,
        until: 0,
        shape: BYTES,
        begins: (ColumnKind::Dropped as u16) << KIND_SHIFT,
        longer: 0,
        first_byte: 0,
        part_count: 0,
    };

    #[inline]
    pub fn kind(&self) -> ColumnKind {
        match self.begins >> KIND_SHIFT & 3 {
            0 => ColumnKind::Text,
            1 => ColumnKind::Dropped,
            2 => ColumnKind::Stop,
            _ => ColumnKind::Special,
        }
    }

    #[inline]
    pub fn is_text(&self) -> bool {
        self.begins >> KIND_SHIFT & 3 == ColumnKind::Text as u16
    }

    pub fn set_kind(&mut self, kind: ColumnKind) {
        self.begins = self.begins & !(3 << KIND_SHIFT) | (kind as u16) << KIND_SHIFT;
    }

    /// `first`, as what may follow another token.
    #[inline]
    pub fn next(&self) -> Next {
        Next {
            token: self.first,
            part_start: self.part_start,
            shape: match self.begins & FIRST_IS_BYTES {
                0 => self.shape,
                _ => BYTES,
            },
            begins: self.begins & BEGINS,
            longer: self.longer,
            until: self.until,
            first_byte: self.first_byte,
            part_count: self.part_count,
        }
    }
}

/// Of a teacher token what is asked of each column of each row: little, so that a table of all stays
/// near.
#[derive(Debug, Clone, Copy)]
#[repr(align(16))]
pub(super) struct Brief {
    /// The trie node of its cell; [`NONE`] of what is no text.
    cell: u32,
    /// Its place in the order of bytes.
    rank: u32,
    marks: Marks,
}

const _: () = assert!(size_of::<Brief>() == 16);

impl Brief {
    pub fn of(column: &Column) -> Self {
        let is_text = column.is_text();
        Self {
            cell: if is_text { column.cell } else { NONE },
            rank: column.rank,
            marks: Marks::new(&column.next(), column.shape, is_text),
        }
    }
}

/// Rows whose columns are held together.
pub(super) const GATHERED: usize = 8;

/// What the pair says of the columns of one row, side by side: looking them up one by one, where
/// each is used, would wait for the memory as often.
#[derive(Debug)]
pub(super) struct Gathered {
    pub at: usize,
    /// By column, as [`Brief`] has them.
    pub cells: Vec<u32>,
    pub ranks: Vec<u32>,
    pub shapes: Vec<u32>,
    pub begins: Vec<u32>,
}

impl Gathered {
    pub fn new() -> Self {
        Self {
            at: usize::MAX,
            cells: Vec::new(),
            ranks: Vec::new(),
            shapes: Vec::new(),
            begins: Vec::new(),
        }
    }

    /// Forgets: the next row may be of another text.
    pub fn forget(&mut self) {
        self.at = usize::MAX;
    }

    /// Looks up these columns.
    pub fn fill(&mut self, at: usize, ids: &[u32], table: &[Brief]) {
        self.at = at;
        let size = ids.len();
        let arrays = [
            &mut self.cells,
            &mut self.ranks,
            &mut self.shapes,
            &mut self.begins,
        ];
        let [cells, ranks, shapes, begins] = arrays.map(|array| {
            array.resize(size, 0);
            &mut array[..size]
        });
        for (place, &id) in ids.iter().enumerate() {
            let brief = table[id as usize];
            cells[place] = brief.cell;
            ranks[place] = brief.rank;
            (shapes[place], begins[place]) = (brief.marks.shape, brief.marks.begins);
        }
    }

    /// Visits the columns whose place in the order of bytes is one of `longer`.
    pub fn next_within(&self, from: usize, longer: &std::ops::Range<u32>) -> Option<usize> {
        const BLOCK: usize = 16;
        let count = longer.end - longer.start;
        let within = |rank: u32| rank.wrapping_sub(longer.start) < count;
        let mut at = from;
        while let Some(block) = self.ranks.get(at..at + BLOCK) {
            if block.iter().fold(false, |any, &rank| any | within(rank)) {
                break;
            }
            at += BLOCK;
        }
        let rest = &self.ranks[at..];
        rest.iter().position(|&rank| within(rank)).map(|n| at + n)
    }
}
