//! The piece trie: the tokens of one vocabulary, each as its sequence of pieces of another.
//!
//! A node is a prefix of such sequences. Tokens sorted by their sequences make the tokens below a
//! node one range of [`PieceTrie::tokens`]: first those that end at the node, then one range for
//! each child, by rising piece. Nodes are numbered level by level, so that the children of a node
//! are neighbours too. Nothing else is kept: a node costs five words, a token one.

mod lookup;
mod slots;
mod twins;

use std::ops::Range;

pub use lookup::PrefixNodes;
pub use slots::Slots;

use crate::error::{Error, Result, checked_id};
use crate::projection::Pieces;

/// "No piece": there are fewer than 2^32 - 1.
const NONE: u32 = u32::MAX;
const MOST_PIECES: usize = 1 << 30;
/// The root's table has an entry for each id of the pieces' vocabulary.
const MOST_IDS: usize = 1 << 26;
/// The node of the empty prefix.
pub const ROOT: u32 = 0;

/// Tokens as sequences of pieces, by prefix; see the module.
///
/// ```
/// use xtoken::projection::Pieces;
/// use xtoken::trie::PieceTrie;
///
/// // Tokens 0 "2", 1 "20" and 2 "27", in pieces that are digits.
/// let pieces: Pieces = [&[2u32][..], &[2, 0], &[2, 7]].iter().collect();
/// let trie = PieceTrie::new(pieces, 10)?;
/// let two = trie.find(&[2]).expect("three tokens begin with this piece");
/// assert_eq!(trie.below(two), [0, 1, 2]);
/// assert_eq!(trie.slot_count(two), 3, "to end, or to continue with 0 or 7");
/// # Ok::<(), xtoken::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PieceTrie {
    pieces: Pieces,
    tokens: Vec<u32>,
    nodes: Vec<Node>,
    /// The root's child for each piece: the one node with too many children to search among.
    first: Vec<Entry>,
    /// By id: the piece with its bytes that leads on from a node; empty where each is its own.
    twins: Vec<u32>,
}

/// A child of the root with the two facts that most lookups need of it, so that a chunk of one
/// piece costs one read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Entry(u32);

impl Entry {
    const NONE: Self = Self(0);

    fn new(node: u32, has_choice: bool, has_children: bool) -> Self {
        Self(node << 2 | u32::from(has_choice) << 1 | u32::from(has_children))
    }

    /// [`ROOT`] where there is no such child.
    fn node(self) -> u32 {
        self.0 >> 2
    }

    fn has_choice(self) -> bool {
        self.0 & 2 != 0
    }

    fn has_children(self) -> bool {
        self.0 & 1 != 0
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Node {
    /// The last piece of the prefix.
    piece: u32,
    /// Range in `tokens`; the first `ends` of it are the prefix itself.
    start: u32,
    end: u32,
    ends: u32,
    /// The first child; the last one is before the next node's first.
    child: u32,
}

impl PieceTrie {
    /// Sorts the tokens into a trie. Tokens without pieces are in no node.
    ///
    /// # Errors
    /// [`Error::NoSuchId`] for a piece that is not below `piece_count`, [`Error::Format`] for
    /// offsets that do not fit.
    pub fn new(pieces: Pieces, piece_count: usize) -> Result<Self> {
        check(&pieces, piece_count)?;
        let tokens = sorted_tokens(&pieces);
        let mut nodes = vec![Node {
            piece: NONE,
            start: 0,
            end: tokens.len() as u32,
            ends: 0,
            child: 1,
        }];
        let mut level = 0..1;
        let mut depth = 0;
        while !level.is_empty() {
            for parent in level.clone() {
                nodes[parent].child = nodes.len() as u32;
                let Node {
                    mut start,
                    end,
                    ends,
                    ..
                } = nodes[parent];
                start += ends;
                while start < end {
                    let piece = pieces.of(tokens[start as usize])[depth];
                    let rest = &tokens[start as usize..end as usize];
                    let same = rest.partition_point(|&token| pieces.of(token)[depth] == piece);
                    let full = |&token: &u32| pieces.of(token).len() == depth + 1;
                    nodes.push(Node {
                        piece,
                        start,
                        end: start + same as u32,
                        ends: rest[..same].partition_point(full) as u32,
                        child: 0,
                    });
                    start += same as u32;
                }
            }
            level = level.end..nodes.len();
            depth += 1;
        }
        let mut trie = Self {
            pieces,
            tokens,
            nodes,
            first: vec![Entry::NONE; piece_count],
            twins: Vec::new(),
        };
        for node in trie.child_range(ROOT) {
            let entry = Entry::new(
                node as u32,
                trie.slot_count(node as u32) >= 2,
                !trie.child_range(node as u32).is_empty(),
            );
            let piece = trie.nodes[node].piece;
            trie.first[piece as usize] = entry;
        }
        Ok(trie)
    }

    /// Number of nodes, the root among them.
    #[must_use]
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Whether no token is in the trie.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Size of the vocabulary that the pieces are from.
    #[must_use]
    pub fn piece_count(&self) -> usize {
        self.first.len()
    }

    /// What the trie was made of.
    #[must_use]
    pub fn token_pieces(&self) -> &Pieces {
        &self.pieces
    }

    /// The tokens in the trie, by their sequences of pieces, equal ones by id.
    #[must_use]
    pub fn tokens(&self) -> &[u32] {
        &self.tokens
    }

    /// The tokens whose sequence starts with the prefix of `node`; those equal to it come first.
    #[must_use]
    pub fn below(&self, node: u32) -> &[u32] {
        let node = &self.nodes[node as usize];
        &self.tokens[node.start as usize..node.end as usize]
    }

    /// How many tokens are the prefix of `node` itself.
    #[must_use]
    pub fn end_count(&self, node: u32) -> usize {
        self.nodes[node as usize].ends as usize
    }

    /// The children of a node, with the piece that each adds, by rising piece.
    pub fn children(&self, node: u32) -> impl ExactSizeIterator<Item = (u32, u32)> {
        self.child_range(node)
            .map(|child| (self.nodes[child].piece, child as u32))
    }

    fn child_range(&self, node: u32) -> Range<usize> {
        let node = node as usize;
        let end = match self.nodes.get(node + 1) {
            Some(next) => next.child as usize,
            None => self.nodes.len(),
        };
        self.nodes[node].child as usize..end
    }

    /// The node reached from `node` by one more piece.
    #[must_use]
    pub fn child(&self, node: u32, piece: u32) -> Option<u32> {
        if node == ROOT {
            let found = self.first.get(piece as usize).map(|entry| entry.node());
            return found.filter(|&child| child != ROOT);
        }
        let piece = match self.twins.get(piece as usize) {
            Some(&twin) => twin,
            None => piece,
        };
        let children = self.child_range(node);
        let offset = self.nodes[children.clone()]
            .binary_search_by_key(&piece, |child| child.piece)
            .ok()?;
        Some((children.start + offset) as u32)
    }

    /// The node of a prefix.
    #[must_use]
    pub fn find(&self, prefix: &[u32]) -> Option<u32> {
        prefix
            .iter()
            .try_fold(ROOT, |node, &piece| self.child(node, piece))
    }

    /// Ways to go on from a node: its children, and to end there where a token does.
    #[must_use]
    pub fn slot_count(&self, node: u32) -> usize {
        self.child_range(node).len() + usize::from(self.nodes[node as usize].ends > 0)
    }
}

pub(crate) fn check(pieces: &Pieces, piece_count: usize) -> Result<()> {
    let ends_right = pieces.indptr.last().copied() == i64::try_from(pieces.ids.len()).ok();
    if pieces.indptr.first() != Some(&0) || !ends_right || !pieces.indptr.is_sorted() {
        return Err(Error::Format {
            what: "token pieces",
            reason: "their offsets do not rise from 0 to the number of pieces".to_owned(),
            remedy: "build them again from the two tokenizers",
        });
    }
    if piece_count > MOST_IDS {
        return Err(Error::Option {
            name: "piece_count",
            value: piece_count.to_string(),
            expected: "the size of a vocabulary, at most 2^26",
        });
    }
    // Nodes are numbered in 30 bits, and there is at most one per piece.
    if pieces.ids.len() >= MOST_PIECES || pieces.indptr.len() >= NONE as usize {
        return Err(Error::Option {
            name: "tokens",
            value: format!("{} pieces", pieces.ids.len()),
            expected: "fewer than 2^30",
        });
    }
    for &id in &pieces.ids {
        checked_id(i64::from(id), piece_count)?;
    }
    Ok(())
}

/// The tokens with pieces in order of their sequences, then ids.
fn sorted_tokens(pieces: &Pieces) -> Vec<u32> {
    // The first two pieces as one number decide almost every comparison.
    let key = |sequence: &[u32]| {
        let second = sequence.get(1).map_or(0, |&piece| u64::from(piece) + 1);
        u64::from(sequence[0]) << 33 | second
    };
    let mut keyed: Vec<(u64, u32)> = (0..pieces.indptr.len().saturating_sub(1) as u32)
        .map(|token| (pieces.of(token), token))
        .filter(|(sequence, _)| !sequence.is_empty())
        .map(|(sequence, token)| (key(sequence), token))
        .collect();
    keyed.sort_unstable_by(|a, b| {
        a.0.cmp(&b.0)
            .then_with(|| pieces.of(a.1).cmp(pieces.of(b.1)))
            .then(a.1.cmp(&b.1))
    });
    keyed.into_iter().map(|(_, token)| token).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::parallel::Threads;

    /// Tokens 0: "2", 1: "20", 2: "201", 3: "27", 4: special, 5: "20" again, 6: "9".
    fn numerals() -> PieceTrie {
        let sequences: [&[u32]; 7] = [&[2], &[2, 0], &[2, 0, 1], &[2, 7], &[], &[2, 0], &[9]];
        PieceTrie::new(sequences.iter().collect(), 10).unwrap()
    }

    #[test]
    fn a_nodes_tokens_are_one_range_and_those_that_end_there_come_first() {
        let trie = numerals();
        assert_eq!(trie.tokens(), [0, 1, 5, 2, 3, 6]);
        let two = trie.find(&[2]).unwrap();
        assert_eq!(trie.below(two), [0, 1, 5, 2, 3]);
        assert_eq!(trie.end_count(two), 1);
        let children: Vec<u32> = trie.children(two).map(|(piece, _)| piece).collect();
        assert_eq!(children, [0, 7]);
        let twenty = trie.find(&[2, 0]).unwrap();
        assert_eq!(trie.below(twenty), [1, 5, 2]);
        assert_eq!((trie.end_count(twenty), trie.slot_count(twenty)), (2, 2));
        assert_eq!(trie.find(&[2, 0, 1, 1]), None);
        assert_eq!(trie.find(&[3]), None);
        assert_eq!(trie.find(&[10]), None);
    }

    #[test]
    fn lookup_gives_the_prefixes_at_which_there_is_a_choice() {
        let trie = numerals();
        let ids = [2, 0, 1, 9, 2, 7, 3];
        let found = trie
            .lookup(
                &ids,
                &[0, 3, 4, 6],
                &[3, 4, 6, 7],
                8,
                "teacher",
                &Threads::one(),
            )
            .unwrap();
        // "201" at 2 and 20, where it is not the only one; "9" and "3" nowhere; "27" at 2.
        assert_eq!(found.chunk, [0, 0, 2]);
        assert_eq!(found.depth, [1, 2, 1]);
        let nodes = [trie.find(&[2]), trie.find(&[2, 0]), trie.find(&[2])];
        assert_eq!(found.node, nodes.map(|node| i64::from(node.unwrap())));
        let one = trie
            .lookup(&ids, &[0], &[3], 1, "teacher", &Threads::one())
            .unwrap();
        assert_eq!(one.depth, [1]);
    }

    #[test]
    fn slots_lay_end_and_children_side_by_side() {
        let trie = numerals();
        let slots = trie.slots();
        let two = trie.find(&[2]).unwrap() as usize;
        let range = slots.ptr[two] as usize..slots.ptr[two + 1] as usize;
        assert_eq!(slots.pieces[range.clone()], [-1, 0, 7]);
        assert_eq!(slots.sizes[range], [1, 3, 1]);
        assert_eq!(slots.starts[two], 0);
        assert_eq!(slots.pieces[..slots.ptr[1] as usize], [2, 9]);
    }

    #[test]
    fn bad_ids_ranges_and_offsets_are_refused() {
        let trie = numerals();
        let look = |ids: &[i64], start, end| {
            trie.lookup(ids, &[start], &[end], 8, "teacher", &Threads::uncapped(2))
                .unwrap_err()
                .to_string()
        };
        assert!(look(&[2, 10], 0, 2).contains("teacher_ids[1] = 10"));
        assert!(look(&[-1], 0, 1).contains("teacher_ids[0] = -1"));
        assert!(look(&[2], 0, 2).contains("chunk 0 is tokens [0, 2)"));
        assert!(look(&[2], -1, 1).contains("[-1, 1)"));
        assert!(
            trie.lookup(&[2], &[0], &[], 8, "teacher", &Threads::uncapped(2))
                .is_err()
        );
        assert!(PieceTrie::new([[10]].iter().collect(), 10).is_err());
        let broken = Pieces {
            indptr: vec![0, 2],
            ids: vec![1],
        };
        assert!(PieceTrie::new(broken, 10).is_err());
        for piece_count in [1 << 62, 1 << 40, MOST_IDS + 1] {
            let error = PieceTrie::new([[1]].iter().collect(), piece_count).unwrap_err();
            assert_eq!(
                error.to_string(),
                format!(
                    "piece_count = {piece_count} is out of range; \
                     expected the size of a vocabulary, at most 2^26"
                )
            );
        }
    }

    #[test]
    fn a_trie_without_tokens_is_a_root() {
        let trie = PieceTrie::new([[], []].iter().collect(), 3).unwrap();
        assert_eq!((trie.len(), trie.is_empty()), (1, true));
        assert_eq!(trie.find(&[0]), None);
        assert_eq!(trie.slots().ptr, [0, 0]);
        assert!(
            trie.lookup(&[0], &[0], &[1], 8, "teacher", &Threads::uncapped(2))
                .unwrap()
                .node
                .is_empty()
        );
    }
}
