//! The teacher's pieces of every student token: computed once, read by W and by the piece trie.

use std::ops::Range;

use crate::error::Result;
use crate::parallel::{self, Threads};
use crate::tokenizer::Tokenizer;

/// Tokens that a thread spells at a time.
const TOKENS_PER_TASK: usize = 4096;

/// The pieces of each token of one vocabulary in another, in CSR form.
///
/// A token with the same bytes on both sides is one piece; one that cannot be spelled, or that
/// contributes no text, has none.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pieces {
    /// Offsets into `ids`, one more than there are tokens.
    pub indptr: Vec<i64>,
    /// The pieces of all tokens, one after the other.
    pub ids: Vec<u32>,
}

impl Pieces {
    /// Spells each token of `from` in tokens of `to`.
    ///
    /// # Errors
    /// As [`Tokenizer::require_model`], where a token has no byte-equal partner; `side` is what the
    /// message calls `to`; [`Error::Interrupted`](crate::Error::Interrupted) where the caller gives
    /// up.
    pub fn spell(
        from: &Tokenizer,
        to: &Tokenizer,
        side: &'static str,
        threads: &Threads<'_>,
    ) -> Result<Self> {
        let len = from.vocab.len();
        let parts = parallel::map(threads, len.div_ceil(TOKENS_PER_TASK), |task| {
            let start = task * TOKENS_PER_TASK;
            let end = len.min(start + TOKENS_PER_TASK);
            spell(from, to, side, start as u32..end as u32)
        })?;
        let mut pieces = Self {
            indptr: vec![0],
            ids: Vec::new(),
        };
        for part in parts {
            let start = pieces.ids.len() as i64;
            pieces
                .indptr
                .extend(part.indptr.iter().map(|end| start + end));
            pieces.ids.extend_from_slice(&part.ids);
        }
        Ok(pieces)
    }

    /// The pieces of one token.
    #[must_use]
    pub fn of(&self, token: u32) -> &[u32] {
        let token = token as usize;
        &self.ids[self.indptr[token] as usize..self.indptr[token + 1] as usize]
    }
}

impl<S: AsRef<[u32]>> FromIterator<S> for Pieces {
    /// The pieces of each token, in the order of the tokens.
    fn from_iter<I: IntoIterator<Item = S>>(sequences: I) -> Self {
        let mut pieces = Self {
            indptr: vec![0],
            ids: Vec::new(),
        };
        for sequence in sequences {
            pieces.ids.extend_from_slice(sequence.as_ref());
            pieces.indptr.push(pieces.ids.len() as i64);
        }
        pieces
    }
}

/// One block of [`Pieces::spell`]; its offsets leave the leading 0 out.
fn spell(
    from: &Tokenizer,
    to: &Tokenizer,
    side: &'static str,
    range: Range<u32>,
) -> Result<Pieces> {
    let mut block = Pieces {
        indptr: Vec::with_capacity(range.len()),
        ids: Vec::new(),
    };
    let mut pieces = Vec::new();
    for token in range {
        let bytes = from.vocab.token_bytes(token);
        if let Some(id) = to.id_of(bytes) {
            block.ids.push(id);
        } else if !bytes.is_empty() && to.segment_with(to.require_model(side)?, bytes, &mut pieces)
        {
            block.ids.extend_from_slice(&pieces);
        }
        block.indptr.push(block.ids.len() as i64);
    }
    Ok(block)
}
