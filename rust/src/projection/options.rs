//! What a projection is built with.

use crate::error::{Error, Result};
use crate::vocab::Role;

/// Which teacher tokens give weight back to the student tokens that spell them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Reverse {
    /// None: a row that splits is exactly the teacher's own segmentation.
    #[default]
    Off,
    /// All, but to rows that have no exact partner.
    Unmatched,
    /// All, to all rows: exact rows then hold more than their partner.
    All,
}

/// Which differences between a student and a teacher token do not count.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Canonical {
    /// A space before a token of ASCII punctuation alone.
    pub punctuation_space: bool,
    /// Letter case, for teachers that lower-case all text.
    pub case: bool,
}

/// The options of [`super::build`].
#[derive(Debug, Clone)]
pub struct Options {
    /// The most entries that a row keeps; the heaviest stay.
    pub top_k: usize,
    /// The weight of a piece over the weight of the piece before it; 0 keeps the first piece only.
    pub decay: f64,
    /// Of more pieces than this the first stay.
    pub max_pieces: usize,
    /// Differences that do not count.
    pub canonical: Canonical,
    /// Whether teacher tokens that split give weight back.
    pub reverse: Reverse,
    /// Pairs of special tokens, which go before the roles.
    pub special_pairs: Vec<(u32, u32)>,
    /// Roles that do not pair special tokens.
    pub ignored_roles: Vec<Role>,
    /// Special tokens without a common role pair where the words of their names overlap by at
    /// least this much (Jaccard index); above 1 they never do.
    pub name_similarity: f64,
}

impl Default for Options {
    /// The paper's constants.
    fn default() -> Self {
        Self {
            top_k: 4,
            decay: 0.1,
            max_pieces: 4,
            canonical: Canonical::default(),
            reverse: Reverse::Off,
            special_pairs: Vec::new(),
            ignored_roles: Vec::new(),
            name_similarity: 0.6,
        }
    }
}

impl Options {
    /// Refuses values outside their range.
    ///
    /// # Errors
    /// [`Error::Option`] by the name of the first that is.
    pub fn check(&self) -> Result<()> {
        let outside = |name, value: &dyn ToString, expected| {
            Err(Error::Option {
                name,
                value: value.to_string(),
                expected,
            })
        };
        if self.top_k == 0 {
            return outside("top_k", &self.top_k, "at least 1");
        }
        if self.max_pieces == 0 {
            return outside("max_pieces", &self.max_pieces, "at least 1");
        }
        // Also refuses NaN.
        if !(0.0..=1.0).contains(&self.decay) {
            return outside("decay", &self.decay, "0 <= decay <= 1");
        }
        if self.name_similarity.is_nan() || self.name_similarity <= 0.0 {
            return outside(
                "name_similarity",
                &self.name_similarity,
                "above 0; above 1 switches it off",
            );
        }
        Ok(())
    }
}
