//! The trie as flat arrays, for segment operations.

use super::PieceTrie;

/// A trie as flat arrays: the tokens below a node are `tokens[starts[node]..]`, cut into its slots
/// `ptr[node]..ptr[node + 1]` one after the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Slots {
    /// Range of each node's slots, one more than there are nodes.
    pub ptr: Vec<i64>,
    /// Number of tokens in each slot.
    pub sizes: Vec<i64>,
    /// The piece that leads to each slot; -1 for tokens that end at the node, which come first.
    pub pieces: Vec<i64>,
    /// Each node's first token, as an index into [`PieceTrie::tokens`].
    pub starts: Vec<i64>,
}

impl PieceTrie {
    /// The trie as arrays in which each node's slots are neighbours.
    #[must_use]
    pub fn slots(&self) -> Slots {
        let mut slots = Slots {
            ptr: Vec::with_capacity(self.nodes.len() + 1),
            sizes: Vec::new(),
            pieces: Vec::new(),
            starts: self.nodes.iter().map(|n| i64::from(n.start)).collect(),
        };
        slots.ptr.push(0);
        for node in 0..self.nodes.len() as u32 {
            if self.end_count(node) > 0 {
                slots.pieces.push(-1);
                slots.sizes.push(self.end_count(node) as i64);
            }
            for (piece, child) in self.children(node) {
                slots.pieces.push(i64::from(piece));
                slots.sizes.push(self.below(child).len() as i64);
            }
            slots.ptr.push(slots.pieces.len() as i64);
        }
        slots
    }
}
