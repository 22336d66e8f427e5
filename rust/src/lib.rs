//! Cross-tokenizer distillation at the level of bytes: what tokens contribute to the text
//! ([`Vocab`]), how two tokenizations of one text correspond, and which tokens of one vocabulary
//! stand for which of another. X-Token (Sreenivas et al., 2026, arXiv 2605.21699) is the method;
//! Python reaches this crate through the `python` feature, everything else needs no Python.

pub mod align;
mod error;
pub mod parallel;
pub mod projection;
pub mod reference;
pub mod segment;
mod tokenizer;
pub mod trie;
pub mod vocab;

#[cfg(feature = "python")]
mod python;

pub use align::{AlignOptions, Aligner, AlignmentBatch, ChunkKind, Counts};
pub use error::{Error, Result};
pub use parallel::Threads;
pub use projection::Projection;
pub use segment::Model;
pub use tokenizer::{Token, Tokenizer};
pub use vocab::{DummyPrefix, Role, Spelling, TokenKind, TokenizerJson, Vocab, VocabBuilder};
