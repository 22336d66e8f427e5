#![doc = include_str!("../README.md")]

pub mod align;
mod error;
pub mod losses;
pub mod parallel;
pub mod projection;
pub mod reference;
pub mod segment;
pub mod targets;
pub mod tokenizer;
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
