//! Losses of rows of logits on the CPU, in one pass a row: what torch does in twenty.

mod below;
mod cross_entropy;
mod exact;
mod forward_kl;
mod masses;
mod real;
mod rows;
mod select;
mod sorted;
mod sparse;
mod stored_kl;

pub use below::{Below, FoundBelow, Teacher};
pub use cross_entropy::CrossEntropy;
pub use exact::{Depths, ExactKl, FoundExact, Targets};
pub use forward_kl::{ForwardKl, Target};
pub use masses::ColumnMasses;
pub use real::Real;
pub use rows::{Found, Rows};
pub use sorted::SortedL1;
pub use sparse::Sparse;
pub use stored_kl::{Stored, StoredKl, StoredTarget, Tail};
