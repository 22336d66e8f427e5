//! The teacher's pieces of every student token: computed once, read by W and by the piece trie.

use std::num::NonZero;
use std::ops::Range;

use crate::error::Result;
use crate::tokenizer::Tokenizer;

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
    /// Spells each token of `from` in tokens of `to`, on so many threads (0: one a core).
    ///
    /// # Errors
    /// As [`Tokenizer::require_model`], where a token has no byte-equal partner; `side` is what the
    /// message calls `to`.
    pub fn spell(
        from: &Tokenizer,
        to: &Tokenizer,
        side: &'static str,
        threads: usize,
    ) -> Result<Self> {
        let parts = in_blocks(from.vocab.len(), threads, |range| {
            spell(from, to, side, range)
        });
        let mut pieces = Self {
            indptr: vec![0],
            ids: Vec::new(),
        };
        for part in parts {
            let part = part?;
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
        } else if !bytes.is_empty()
            && to
                .require_model(side)?
                .segment(&to.vocab, bytes, &mut pieces)
        {
            block.ids.extend_from_slice(&pieces);
        }
        block.indptr.push(block.ids.len() as i64);
    }
    Ok(block)
}

/// The answers of `work` for consecutive ranges that cover `0..len`, in order.
///
/// One thread runs in the caller, so that a forked process can go on.
fn in_blocks<T: Send>(len: usize, threads: usize, work: impl Fn(Range<u32>) -> T + Sync) -> Vec<T> {
    let available = std::thread::available_parallelism().map_or(1, NonZero::get);
    let threads = if threads == 0 { available } else { threads }
        .min(len.div_ceil(4096))
        .max(1);
    let bound = |at: usize| (len * at / threads) as u32;
    if threads == 1 {
        return vec![work(0..len as u32)];
    }
    std::thread::scope(|scope| {
        let handles: Vec<_> = (1..threads)
            .map(|at| {
                let range = bound(at)..bound(at + 1);
                let work = &work;
                scope.spawn(move || work(range))
            })
            .collect();
        let mut answers = vec![work(0..bound(1))];
        for handle in handles {
            match handle.join() {
                Ok(answer) => answers.push(answer),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        answers
    })
}
