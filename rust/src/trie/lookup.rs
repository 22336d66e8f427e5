//! The nodes of all prefixes of a batch of chunks, in one call.

use std::ops::Range;

use super::PieceTrie;
use crate::error::{Error, Result};
use crate::parallel::{self, Threads};

/// Chunks that one thread looks up at a time.
const CHUNKS_PER_TASK: usize = 4096;
/// Chunks whose answers are held back before they are appended.
const CHUNKS_PER_BLOCK: usize = 256;

/// One (chunk, depth) at which a loss can compare: the node of the chunk's first `depth` pieces.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PrefixNodes {
    /// Index of the chunk, rising.
    pub chunk: Vec<i64>,
    /// Number of pieces in the prefix, from 1, rising within a chunk.
    pub depth: Vec<i64>,
    /// The node.
    pub node: Vec<i64>,
}

impl PieceTrie {
    /// The nodes of all prefixes of all chunks, where there is something to decide.
    ///
    /// Chunk `c` is `ids[starts[c]..ends[c]]`. Each of its prefixes of 1 to `max_depth` pieces that
    /// is a node with at least two slots is in the answer, by chunk and depth.
    ///
    /// # Errors
    /// [`Error::Shape`] where a chunk is no range of `ids`, [`Error::IdOutOfRange`] for an id of a
    /// chunk outside the pieces' vocabulary; `side` names it; [`Error::Interrupted`]
    /// where the caller gives up.
    pub fn lookup(
        &self,
        ids: &[i64],
        starts: &[i64],
        ends: &[i64],
        max_depth: usize,
        side: &'static str,
        threads: &Threads<'_>,
    ) -> Result<PrefixNodes> {
        if starts.len() != ends.len() {
            return Err(Error::Shape {
                what: "chunk ends".to_owned(),
                found: ends.len(),
                expected: starts.len(),
                remedy: "pass one start and one end per chunk",
            });
        }
        let call = Lookup {
            trie: self,
            ids,
            starts,
            ends,
            max_depth,
            side,
        };
        let tasks = starts.len().div_ceil(CHUNKS_PER_TASK);
        let chunks_of = |task: usize| {
            let start = task * CHUNKS_PER_TASK;
            start..starts.len().min(start + CHUNKS_PER_TASK)
        };
        if threads.count() == 1 || tasks < 2 {
            let mut watch = threads.watch();
            let mut found = PrefixNodes::default();
            for task in 0..tasks {
                call.append(chunks_of(task), &mut found)?;
                watch.check()?;
            }
            return Ok(found);
        }
        let parts = parallel::map(threads, tasks, |task| {
            let mut found = PrefixNodes::default();
            call.append(chunks_of(task), &mut found)?;
            Ok(found)
        })?;
        Ok(PrefixNodes::concat(&parts))
    }
}

impl PrefixNodes {
    fn push(&mut self, chunk: usize, depth: usize, node: u32) {
        self.chunk.push(chunk as i64);
        self.depth.push(depth as i64);
        self.node.push(i64::from(node));
    }

    fn concat(parts: &[Self]) -> Self {
        let column = |of: fn(&Self) -> &Vec<i64>| {
            let columns: Vec<&[i64]> = parts.iter().map(|part| of(part).as_slice()).collect();
            columns.concat()
        };
        Self {
            chunk: column(|part| &part.chunk),
            depth: column(|part| &part.depth),
            node: column(|part| &part.node),
        }
    }
}

/// The arguments of [`PieceTrie::lookup`].
struct Lookup<'a> {
    trie: &'a PieceTrie,
    ids: &'a [i64],
    starts: &'a [i64],
    ends: &'a [i64],
    max_depth: usize,
    side: &'static str,
}

impl Lookup<'_> {
    /// Appends the nodes of some chunks.
    fn append(&self, chunks: Range<usize>, found: &mut PrefixNodes) -> Result<()> {
        if self.max_depth == 0 {
            return Ok(());
        }
        // Whether a chunk's first piece has a choice cannot be predicted: every chunk is written,
        // and kept or not by where the next one goes.
        let mut held = [(0usize, 0u32); CHUNKS_PER_BLOCK];
        for block in chunks.clone().step_by(CHUNKS_PER_BLOCK) {
            let mut count = 0;
            for chunk in block..chunks.end.min(block + CHUNKS_PER_BLOCK) {
                let range =
                    chunk_range(self.starts[chunk], self.ends[chunk], chunk, self.ids.len())?;
                if range.is_empty() {
                    continue;
                }
                let entry = self.trie.first[self.piece(range.start)?];
                held[count] = (chunk, entry.node());
                count += usize::from(entry.has_choice());
                if entry.has_children() && range.len() > 1 {
                    flush(&held[..count], found);
                    count = 0;
                    self.deeper(chunk, entry.node(), range, found)?;
                }
            }
            flush(&held[..count], found);
        }
        Ok(())
    }

    /// Descends from the node of the chunk's first piece.
    fn deeper(
        &self,
        chunk: usize,
        mut node: u32,
        range: Range<usize>,
        found: &mut PrefixNodes,
    ) -> Result<()> {
        for (depth, position) in (1..=self.max_depth).zip(range).skip(1) {
            let piece = self.piece(position)?;
            let Some(next) = self.trie.child(node, piece as u32) else {
                break;
            };
            node = next;
            if self.trie.slot_count(node) >= 2 {
                found.push(chunk, depth, node);
            }
        }
        Ok(())
    }

    fn piece(&self, position: usize) -> Result<usize> {
        let id = self.ids[position];
        let size = self.trie.first.len();
        match usize::try_from(id) {
            Ok(piece) if piece < size => Ok(piece),
            _ => Err(Error::IdOutOfRange {
                sequence: None,
                side: self.side,
                position,
                id,
                size,
            }),
        }
    }
}

fn flush(held: &[(usize, u32)], found: &mut PrefixNodes) {
    found
        .chunk
        .extend(held.iter().map(|&(chunk, _)| chunk as i64));
    found.depth.extend(held.iter().map(|_| 1));
    found
        .node
        .extend(held.iter().map(|&(_, node)| i64::from(node)));
}

fn chunk_range(start: i64, end: i64, chunk: usize, len: usize) -> Result<Range<usize>> {
    match (usize::try_from(start), usize::try_from(end)) {
        (Ok(start), Ok(end)) if start <= end && end <= len => Ok(start..end),
        _ => Err(Error::Shape {
            what: format!("chunk {chunk} is tokens [{start}, {end}), which reach"),
            found: usize::try_from(end.max(start)).unwrap_or(0),
            expected: len,
            remedy: "pass the chunks of these ids: 0 <= start <= end <= their number",
        }),
    }
}
