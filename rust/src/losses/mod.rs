//! Losses of rows of logits on the CPU, in one pass a row: what torch does in twenty.

mod forward_kl;
mod real;
mod select;
mod sparse;

pub use forward_kl::{ForwardKl, Found, Rows, Target};
pub use real::Real;
pub use sparse::Sparse;
