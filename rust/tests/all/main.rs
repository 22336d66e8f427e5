//! All tests of the library from outside, in one program: each links all of it.

#![allow(clippy::unwrap_used, reason = "a test that panics fails")]

mod align_differences;
mod align_hostile;
mod align_laws;
mod align_rows;
mod align_symmetry;
mod bounds;
mod common;
mod project_laws;
mod trie_laws;
mod vocab_hostile;
