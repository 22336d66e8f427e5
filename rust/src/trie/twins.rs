//! Ids of the pieces' vocabulary that have the bytes of a piece, such as `<0x41>` beside `A`: text
//! may have either, tokens are spelled with one.

use rustc_hash::FxHashMap;

use super::PieceTrie;
use crate::projection::Pieces;
use crate::tokenizer::Tokenizer;

impl PieceTrie {
    /// Has texts looked up by bytes: an id that is no piece here and has the bytes of one leads where
    /// that one does. `spelled` are the other vocabulary's pieces of each id; equal ones are equal
    /// bytes.
    #[must_use]
    pub fn with_spelled(self, spelled: &Pieces) -> Self {
        let size = self.first.len().min(spelled.indptr.len().saturating_sub(1)) as u32;
        let is_piece = self.is_piece();
        let mut found: FxHashMap<&[u32], u32> = FxHashMap::default();
        for id in (0..size).filter(|&id| is_piece[id as usize] && !spelled.of(id).is_empty()) {
            found.entry(spelled.of(id)).or_insert(id);
        }
        let twins = (0..size).filter_map(|id| Some((id, *found.get(spelled.of(id))?)));
        self.with_twins(twins.collect())
    }

    /// As [`PieceTrie::with_spelled`], by the bytes of the pieces' vocabulary.
    #[must_use]
    pub fn with_bytes_of(self, pieces: &Tokenizer) -> Self {
        let size = self.first.len().min(pieces.vocab.len()) as u32;
        let emitted = |id| pieces.id_of(pieces.vocab.token_bytes(id));
        let twins = (0..size).filter_map(|id| Some((id, emitted(id)?)));
        self.with_twins(twins.collect())
    }

    /// As [`PieceTrie::with_spelled`], from pairs of an id and one with its bytes.
    pub(crate) fn with_twins(mut self, twins: Vec<(u32, u32)>) -> Self {
        let is_piece = self.is_piece();
        for (id, piece) in twins {
            if is_piece[id as usize] || !is_piece[piece as usize] {
                continue;
            }
            if self.twins.is_empty() {
                self.twins = (0..self.first.len() as u32).collect();
            }
            self.twins[id as usize] = piece;
            self.first[id as usize] = self.first[piece as usize];
        }
        self
    }

    /// Each id that leads where a piece with its bytes does, and that piece.
    #[must_use]
    pub fn twins(&self) -> Vec<(u32, u32)> {
        let twins = (0..).zip(self.twins.iter().copied());
        twins.filter(|(id, piece)| id != piece).collect()
    }

    fn is_piece(&self) -> Vec<bool> {
        let mut is_piece = vec![false; self.first.len()];
        for &piece in &self.pieces.ids {
            is_piece[piece as usize] = true;
        }
        is_piece
    }
}
