//! Ids that no token has: bounded in total, as reading a small file must not take gigabytes.

use super::VocabBuilder;
use crate::error::{Error, Result};

/// Holes that any vocabulary may have.
const ALWAYS: usize = 1 << 17;

/// How many more ids without a token a file may leave.
pub(super) struct Holes {
    left: usize,
}

impl Holes {
    /// As many holes as there are tokens, and some.
    pub fn among(tokens: usize) -> Self {
        Self {
            left: ALWAYS + tokens,
        }
    }

    /// Makes the ids before `next` unused.
    ///
    /// # Errors
    /// [`Error::Format`] about `what` where that makes too many of them.
    pub fn fill(
        &mut self,
        builder: &mut VocabBuilder,
        next: u32,
        what: &'static str,
        remedy: &'static str,
    ) -> Result<()> {
        let missing = (next as usize).saturating_sub(builder.len());
        if missing > self.left {
            return Err(Error::Format {
                what,
                reason: format!(
                    "id {next} follows id {}, and ids without a token would outnumber the tokens",
                    builder.len() as i64 - 1
                ),
                remedy,
            });
        }
        self.left -= missing;
        for _ in 0..missing {
            builder.push_unused()?;
        }
        Ok(())
    }
}
